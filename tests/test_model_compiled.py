"""Decode by compiled code says what the layers say, whatever cache is under it, and everything else is left as it was."""

import shutil
from dataclasses import replace

import pytest
import torch
from tolerances import KERNEL, LOGITS

from clawdemy_infer.arithmetic import ModelShape, MoE
from clawdemy_infer.bench import step_ops
from clawdemy_infer.kv_cache import ContiguousCache, PagedCache
from clawdemy_infer.linear import FORMATS, Codes, packable
from clawdemy_infer.model import Decoder, ModelConfig, compiled, generate, load_model, with_weights
from clawdemy_infer.model.experts import decoder_with_experts
from clawdemy_infer.model.loops import product, stored

# All that one family has and another has not: a bias, norms on Q and K, a window, a head of its own.
SHAPE = ModelShape("odd", L=3, D=96, N=6, K=2, H=16, F=160, V=177, tied=False, qkv_bias=True, qk_norm=True, window=11, max_context=64)
PROMPT = [3, 141, 59, 26, 5]


def random_model(shape):
    torch.manual_seed(7)
    made = Decoder(ModelConfig(shape)).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return made


@pytest.fixture(scope="module")
def eager():
    return random_model(SHAPE)


@pytest.fixture(scope="module")
def both(eager, tmp_path_factory):
    """The model layer by layer, and compiled into a folder that nobody compiled into before."""
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield eager, compiled(eager, rows=(1, 4))


@pytest.mark.parametrize("cache", ["contiguous", "paged", "int8", "paged-int8"])
def test_greedy_tokens_are_those_of_the_eager_model_on_every_cache(both, cache):
    eager, fast = both
    assert generate(fast, PROMPT, 24, cache=cache).tokens == generate(eager, PROMPT, 24, cache=cache).tokens


def test_logits_of_every_step_are_those_of_a_pass_over_the_whole_text(both):
    eager, fast = both
    text = torch.randint(SHAPE.V, (1, 20), generator=torch.Generator().manual_seed(1))
    right = eager(text)[0]
    cache = ContiguousCache.for_model(fast, 1, 20)
    got = torch.cat([fast(token, cache)[0] for token in text.split(1, dim=1)])      # the first step has no past
    torch.testing.assert_close(got / right.std(), right / right.std(), **LOGITS[torch.float32])


@pytest.mark.parametrize("keeper", [ContiguousCache, PagedCache])
def test_ragged_steps_of_any_size_say_what_the_layers_say(both, keeper):
    """Prompts of several sequences in one step, decodes of different lengths, a chunk among decodes; grouped heads and a window."""
    caches = [keeper.for_model(model, 3, 32) for model in both]
    prompts = {0: PROMPT, 1: [7], 2: list(range(40, 61))}
    mixed = {0: [5], 1: [1, 2, 3], 2: [4]}
    for new, last_only in ((prompts, True), ({0: [5], 1: [6], 2: [7]}, True), ({0: [8], 2: [9]}, False), (mixed, [1, 2, 1])):
        right, got = (model.step(new, cache, last_only) for model, cache in zip(both, caches, strict=True))
        torch.testing.assert_close(got / right.std(), right / right.std(), **LOGITS[torch.float32])
    assert caches[0].lengths == caches[1].lengths == {0: 8, 1: 5, 2: 24}


@pytest.mark.parametrize("pieces", [[2, 3, 4, 1], [6, 2, 2], [3, 1, 3, 3]])
def test_a_few_tokens_at_once_are_read_as_they_would_be_one_by_one(both, pieces):
    """Fewer than there is code for are filled up, and what filled them up is in no cache. Rows that a window cuts go layer by layer."""
    eager, fast = both
    text = torch.randint(SHAPE.V, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    caches = [ContiguousCache.for_model(model, 2, 20) for model in both]
    past = 0
    for count in pieces:
        new = {1: text[past:past + count]}
        right, got = (model.step(new, cache, last_only=False) for model, cache in zip(both, caches, strict=True))
        torch.testing.assert_close(got / right.std(), right / right.std(), **LOGITS[torch.float32])
        past += count
    assert [cache.lengths for cache in caches] == [{0: 0, 1: past}] * 2
    torch.testing.assert_close(caches[1].keys[:, 1, :, :past], caches[0].keys[:, 1, :, :past], **KERNEL[torch.float32])
    assert not caches[1].keys[:, 1, :, past:].any() and not caches[1].values[:, 0].any()


@pytest.mark.parametrize("wanted", [True, False, [2]])
def test_rows_that_are_wanted_are_the_last(both, wanted):
    logits = []
    for model in both:
        cache = ContiguousCache.for_model(model, 1, 20)
        model.step({0: PROMPT}, cache)
        logits.append(model.step({0: [7, 8, 9]}, cache, last_only=wanted))
    torch.testing.assert_close(*logits, **LOGITS[torch.float32])


def test_only_a_step_of_one_sequence_for_which_there_is_code_is_compiled_code(both, monkeypatch):
    _, fast = both
    runs, takes = [], fast.compiled_step.takes

    class Counted:
        def __call__(self, tokens, step, last_only):
            runs.append(len(tokens))
            return fast._layer_by_layer(tokens, step, last_only)

        def takes(self, step):
            return takes(step)

    monkeypatch.setattr(fast, "compiled_step", Counted())
    fast(torch.tensor([PROMPT]))                            # more rows than there is code for, and no past
    fast(torch.tensor([[1], [2]]))
    assert runs == []
    cache = ContiguousCache.for_model(fast, 2, 30)
    for new in ({1: [5]}, {1: [6, 7]}, {1: [6, 7, 8, 9]}, {1: PROMPT}, {0: [5], 1: [6]}):
        fast.step(new, cache)
    assert runs == [1, 4] and cache.lengths == {0: 1, 1: 13}
    fast.step({1: [5, 6]}, PagedCache.for_model(fast, 2, 30))
    assert runs == [1, 4]


def test_an_observer_sees_what_the_last_layer_leaves(both):
    seen = []
    for model in both:
        model.observer = lambda step, x: seen.append(x.clone())
        model(torch.tensor([[42]]))
        model.observer = None
    torch.testing.assert_close(*seen, **LOGITS[torch.float32])


def test_compiled_code_is_called_once_a_layer_and_once_more(both):
    """Beside the calls there is what is left: attention, one write for keys and one for values a layer, RoPE's tables."""
    eager, fast = both
    assert fast.compile_s > 0 == eager.compile_s
    assert SHAPE.L + 1 < step_ops(fast) < step_ops(eager)
    assert step_ops(fast, batch=3) < step_ops(eager, batch=3) / 2


@pytest.mark.parametrize("format", FORMATS)
def test_a_product_is_that_of_the_weights_as_they_are_stored(format):
    weight, x = torch.randn(67, 96, generator=torch.Generator().manual_seed(2)), torch.linspace(-2, 3, 96)
    kept = packable(format, weight)
    meant = kept.dequantized() if isinstance(kept, Codes) else kept
    x = torch.stack((x, x.flip(0) ** 2))
    right = x.double() @ meant.double().T
    torch.testing.assert_close(product(stored(format, weight), x).double() / right.std(), right / right.std(), **KERNEL[torch.float32])


def test_a_stored_matrix_takes_the_bytes_of_its_format():
    weight = torch.randn(64, 128)
    assert stored("fp32", weight)[0] is weight
    bits = {format: 8 * sum(part.nbytes for part in stored(format, weight)) / weight.numel() for format in FORMATS}
    assert bits == {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8 + 32 / 128, "int4": 4 + 2 * 32 / 64}


def test_what_cannot_be_compiled_is_refused_before_anything_is_done(eager, monkeypatch):
    with pytest.raises(ValueError, match="weights='fp8'"):
        compiled(eager, "fp8")
    with pytest.raises(ValueError, match="rows=\\(1, 0\\)"):
        compiled(eager, rows=(1, 0))
    with pytest.raises(ValueError, match="packed weights"):
        compiled(with_weights(eager, "bf16"))
    with pytest.raises(ValueError, match="experts"):
        compiled(decoder_with_experts(ModelConfig(replace(SHAPE, window=None)), MoE(4, 2)))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"compile: there is no C\+\+ compiler here \(no-such-compiler\)"):
        compiled(eager)
    with pytest.raises(ValueError, match="no-such-compiler"):
        load_model(compile=True)
