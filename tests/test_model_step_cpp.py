"""A step in C++ says what the layers say, for any tokens of any sequences, and writes what they
write."""

from dataclasses import replace

import pytest
import torch
from tolerances import KERNEL, LOGITS

from clawdemy_infer.arithmetic import ModelShape, MoE
from clawdemy_infer.fast import FORMATS, Codes, cpp, packable
from clawdemy_infer.fast.cpp_step import CppLayers, CppStep
from clawdemy_infer.fast.faster import faster, shallow_copy
from clawdemy_infer.kv_cache import BlockPool, BlockTables, ContiguousCache, PagedCache
from clawdemy_infer.lesson.steps import step_ops
from clawdemy_infer.model import Decoder, ModelConfig, generate
from clawdemy_infer.variants.experts import decoder_with_experts
from clawdemy_infer.variants.int8_cache import Int8Cache

pytestmark = pytest.mark.skipif(not cpp.available(), reason="no C++ compiler here")

SHAPE = ModelShape("plain", L=3, D=96, N=6, K=2, H=16, F=160, V=176, tied=False, max_context=256)
# All that one family has and another has not: a bias, norms on Q and K, a window, a vocabulary of
# no round size.
ODD = replace(SHAPE, name="odd", V=177, biases=("qkv",), qk_norm=True, window=11)
PROMPTS = {0: [3, 141, 59, 26, 5], 1: [7], 2: list(range(40, 61))}
# Prompts of a few tokens and of many; decodes; sequences apart; a few tokens each; decodes beside a
# few, and beside a chunk that sees more than a block of keys before it; one prompt alone that ends
# within a block of queries.
STEPS = [
    PROMPTS, {0: [5], 1: [6], 2: [7]}, {0: [8], 2: [9]}, {1: [1, 2, 3, 4, 5]},
    {0: [5], 1: [1, 2, 3], 2: [4]}, {0: [1, 2], 2: [3, 4]},
    {0: [5], 1: [i % 176 for i in range(70)], 2: [4]},
    {0: [5], 1: [9 * i % 176 for i in range(83)], 2: [*range(17)]}, {1: [3]},
]
ROOM = 180
CACHES = {
    "contiguous": ContiguousCache.for_model,
    "paged": lambda model, batch, capacity: PagedCache.for_model(model, batch, capacity, 4),
}


def random_model(shape=SHAPE):
    torch.manual_seed(7)
    made = Decoder(ModelConfig(shape)).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return made


def in_cpp(model, format=None):
    made = faster(model, format, compile=True)
    assert type(made.runner) is CppStep and model.runner is None
    return made


def agree(got, right, dtype=torch.float32):
    torch.testing.assert_close(got / right.std(), right / right.std(), **LOGITS[dtype])


@pytest.fixture(scope="module")
def both():
    """The odd model layer by layer, and in C++."""
    eager = random_model(ODD)
    return eager, in_cpp(eager)


@pytest.mark.parametrize(
    "more", [{}, {"window": 9}, {"window": 70}, {"tied": True, "K": 6}, {"N": 4, "K": 1, "H": 48},
             {"N": 4, "K": 2, "H": 20}, {"biases": ("qkv",)}, {"qk_norm": True},
             {"D": 90, "F": 120}, {"D": 91, "F": 37, "N": 1, "K": 1, "H": 6}],
    ids=["grouped", "window", "window over blocks", "tied, one head each", "one KV head of 48",
         "heads of 20", "bias", "norms on Q and K", "D of 90", "odd sizes"])
@pytest.mark.parametrize("cache", CACHES)
def test_steps_of_any_tokens_say_what_the_layers_say(cache, more):
    eager = random_model(replace(SHAPE, **more))
    models = eager, in_cpp(eager)
    caches = [CACHES[cache](model, 3, ROOM) for model in models]
    # whoever reads what nobody wrote is found out
    caches[1].keys.fill_(torch.nan), caches[1].values.fill_(torch.nan)
    for new in STEPS:
        right, got = (model.step(new, cache, logits_to_keep=0)
                      for model, cache in zip(models, caches, strict=True))
        agree(got, right)
    assert caches[0].lengths == caches[1].lengths


@pytest.mark.parametrize("cache", CACHES)
def test_the_odd_model_says_what_its_layers_say_on_ragged_steps(both, cache):
    caches = [CACHES[cache](model, 3, 32) for model in both]
    mixed = {0: [5], 1: [1, 2, 3], 2: [4]}
    for new, keep in ((PROMPTS, 1), ({0: [5], 1: [6], 2: [7]}, 1), ({0: [8], 2: [9]}, 0),
                      (mixed, [1, 2, 1]), (mixed, 2)):
        right, got = (model.step(new, cache, logits_to_keep=keep)
                      for model, cache in zip(both, caches, strict=True))
        agree(got, right)
    assert caches[0].lengths == caches[1].lengths == {0: 9, 1: 8, 2: 25}


def test_numbers_so_small_that_the_epsilon_of_a_norm_rules_are_normed_alike():
    """Embeddings and queries near 1e-4, whose squares are below the 1e-5 that norms add."""
    eager = random_model(ODD)
    eager.embed.weight.mul_(1e-3)
    for layer in eager.layers:
        layer.qkv.weight.mul_(1e-2)
        layer.qkv.bias.mul_(1e-2)
    models = eager, in_cpp(eager)
    caches = [ContiguousCache.for_model(model, 3, 32) for model in models]
    right, got = (model.step(PROMPTS, cache, logits_to_keep=0)
                  for model, cache in zip(models, caches, strict=True))
    agree(got, right)
    torch.testing.assert_close(*(cache.keys[:, 2, :, :21] for cache in reversed(caches)),
                               **LOGITS[torch.float32])


@pytest.mark.parametrize("cache", ["contiguous", "paged", "int8"])
def test_greedy_tokens_are_those_of_the_eager_model_on_every_cache(both, cache):
    made = {"int8": Int8Cache.for_model, **CACHES}[cache]
    eager, fast = (generate(model, PROMPTS[0], 24, cache=made(model, 1, 40)).tokens
                   for model in both)
    assert eager == fast


def test_logits_of_every_step_are_those_of_a_pass_over_the_whole_text(both):
    eager, fast = both
    text = torch.randint(ODD.V, (1, 20), generator=torch.Generator().manual_seed(1))
    cache = ContiguousCache.for_model(fast, 1, 20)
    agree(torch.cat([fast(token, cache)[0] for token in text.split(1, dim=1)]), eager(text)[0])


@pytest.mark.parametrize("pieces", [[2, 3, 4, 1], [6, 2, 2], [3, 1, 3, 3]])
def test_a_few_tokens_at_once_are_read_as_they_would_be_one_by_one(both, pieces):
    text = torch.randint(ODD.V, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    caches = [ContiguousCache.for_model(model, 2, 20) for model in both]
    past = 0
    for count in pieces:
        new = {1: text[past:past + count]}
        right, got = (model.step(new, cache, logits_to_keep=0)
                      for model, cache in zip(both, caches, strict=True))
        agree(got, right)
        past += count
    assert [cache.lengths for cache in caches] == [{0: 0, 1: past}] * 2
    torch.testing.assert_close(caches[1].keys[:, 1, :, :past], caches[0].keys[:, 1, :, :past],
                               **KERNEL[torch.float32])
    assert not caches[1].keys[:, 1, :, past:].any() and not caches[1].values[:, 0].any()


@pytest.mark.parametrize("wanted", [1, 0, [2]])
def test_rows_that_are_wanted_are_the_last(both, wanted):
    logits = []
    for model in both:
        cache = ContiguousCache.for_model(model, 1, 20)
        model.step({0: PROMPTS[0]}, cache)
        logits.append(model.step({0: [7, 8, 9]}, cache, logits_to_keep=wanted))
    torch.testing.assert_close(*logits, **LOGITS[torch.float32])


def test_it_runs_wherever_keys_and_values_lie_plain_and_as_its_own():
    model, ran = in_cpp(random_model()), []
    step = model.runner

    class Counted:
        takes = step.takes

        def __call__(self, tokens, *rest):
            ran.append(len(tokens))
            return step(tokens, *rest)
    model.runner = Counted()
    cache = ContiguousCache.for_model(model, 3, ROOM)
    for new in STEPS:
        model.step(new, cache)
    assert ran == [sum(map(len, new.values())) for new in STEPS]
    model.step({0: [1]}, PagedCache.for_model(model, 1, 48))
    assert len(ran) == len(STEPS) + 1
    model.step({0: [1]}, Int8Cache.for_model(model, 1, 48))
    assert len(ran) == len(STEPS) + 1
    other = ContiguousCache(3, 1, 2, 16, 48, torch.bfloat16)    # keys of another type than its own
    assert not step.takes(other.begin({0: [1]}))


@pytest.mark.parametrize("cache", CACHES)
def test_it_keeps_the_keys_and_values_that_the_layers_keep_and_no_others(cache):
    eager = random_model()
    models = eager, in_cpp(eager)
    caches = [CACHES[cache](model, 3, ROOM) for model in models]
    for new in ({0: [5], 1: [6], 2: [*range(70)]}, {0: [1, 2, 3], 2: [4]}):
        for model, each in zip(models, caches, strict=True):
            model.step(new, each)
    for name in ("keys", "values"):
        torch.testing.assert_close(*(getattr(store, name) for store in reversed(caches)),
                                   **LOGITS[torch.float32])
        # zeros where nothing belongs
        assert torch.equal(*(getattr(store, name).any(-1) for store in caches))


def test_forks_share_their_blocks_until_one_writes():
    eager = random_model()
    models = eager, in_cpp(eager)
    caches = [PagedCache.over(model, BlockTables(BlockPool(40, 4))) for model in models]
    for model, cache in zip(models, caches, strict=True):
        cache.add(0)
        model.step({0: list(range(30))}, cache)
        cache.fork(0, 1)
    for token in range(3):
        right, got = (model.step({0: [token], 1: [token + 9]}, cache)
                      for model, cache in zip(models, caches, strict=True))
        agree(got, right)


@pytest.mark.parametrize(
    ("format", "F"), [*((format, 160) for format in FORMATS), ("int4", 192), ("fp16", 121),
                      ("int8", 121)],
    ids=[*FORMATS, "int4 in groups of 32 and of 64", "fp16 of an odd width", "int8 of one"])
def test_each_format_says_what_its_weights_say_in_fp32(format, F):
    eager = random_model(replace(SHAPE, F=F))
    fast = in_cpp(eager, format)
    right = shallow_copy(eager)
    right.layers = torch.nn.ModuleList(shallow_copy(layer) for layer in eager.layers)
    for owner, name in [(layer, name) for layer in right.layers
                        for name in ("qkv", "out", "gate_up", "down")] + [(right, "head")]:
        kept = packable(format, getattr(owner, name).weight)
        linear = shallow_copy(getattr(owner, name))
        linear.weight = torch.nn.Parameter(
            (kept.dequantized() if isinstance(kept, Codes) else kept).float(), requires_grad=False)
        setattr(owner, name, linear)
    by_layers = faster(eager, format)
    caches = [ContiguousCache.for_model(model, 3, ROOM) for model in (right, by_layers, fast)]
    for new in STEPS:
        wanted, theirs, got = (model.step(new, cache, logits_to_keep=0).float() for model, cache
                               in zip((right, by_layers, fast), caches, strict=True))
        error, other = ((x - wanted).abs().mean() / wanted.std() for x in (got, theirs))
        if format in ("fp32", "fp16"):
            agree(got, wanted)
        else:
            # PyTorch rounds to bf16 after each operation
            assert error < 0.04 and (format != "bf16" or error < other)


def test_packed_matrices_are_shared_with_the_layers_that_pytorch_runs():
    fast = in_cpp(random_model(), "int8")
    layers = {kernel.panels.data_ptr() for part in fast.modules()
              for _, kernel in getattr(part, "kernels", ())}
    step = {int(pointer) for pointer in fast.runner.layers[:, [0, 2, 4, 6]].flatten()}
    assert len(step) == 4 * SHAPE.L and step < layers


def test_generation_is_token_for_token_the_same():
    eager = random_model()
    fast = in_cpp(eager)
    for cache in ("contiguous", "paged"):
        assert generate(fast, PROMPTS[0], 40, cache=cache).tokens == generate(
            eager, PROMPTS[0], 40, cache=cache).tokens


def test_an_observer_sees_what_the_last_layer_leaves(both):
    seen = []
    for model in both:
        model.observer = lambda step, x: seen.append(x.clone())
        model.step({0: [42], 1: [7, 8]}, ContiguousCache.for_model(model, 2, 8))
        model.observer = None
    torch.testing.assert_close(*seen, **LOGITS[torch.float32])


def test_a_step_is_one_call_however_many_layers_there_are(both):
    eager, fast = both
    assert fast.runner.compile_s > 0
    deeper = in_cpp(random_model(replace(ODD, L=5)))
    assert step_ops(deeper) == step_ops(fast) < step_ops(eager) / 2
    assert step_ops(fast, batch=3) < step_ops(eager, batch=3) / 2


def test_a_number_that_is_not_finite_in_another_sequence_touches_nobody(both):
    """Of two sequences one keeps NaN; the other says what it says alone."""
    _, fast = both
    caches = [ContiguousCache.for_model(fast, 2, 60) for _ in range(2)]
    for cache in caches:
        fast.step({0: [*range(40)], 1: [*range(7)]}, cache)
    caches[1].keys[:, 1], caches[1].values[:, 1] = torch.nan, torch.nan
    right, got = (fast.step({0: [5], 1: [6]}, cache) for cache in caches)
    assert torch.equal(got[0], right[0])


@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("place", "window"), [(20, None), (39, None), (0, 9), (20, 9)])
def test_a_token_that_is_not_finite_touches_those_that_see_it_and_no_others(
        place, value, format, window):
    """A prompt that is attended in blocks, of which one token has an embedding of NaN, beside the
    same read token by token, so that nothing is there to be hidden."""
    eager = random_model(replace(SHAPE, window=window))
    eager.embed.weight[175] = value
    prompt = [i % 175 for i in range(40)]
    prompt[place] = 175
    by_layers, fast = faster(eager, format), in_cpp(eager, format)
    cache = ContiguousCache.for_model(by_layers, 1, 40)
    right = torch.cat([by_layers.step({0: [token]}, cache) for token in prompt])
    got = fast.step({0: prompt}, ContiguousCache.for_model(fast, 1, 40), logits_to_keep=0)
    lost = right.isnan().any(1)
    # each of three layers hands it on
    assert lost.sum() == min(40 - place, 3 * ((window or 40) - 1) + 1)
    assert torch.equal(got.isnan().any(1), lost)
    got, right = got[~lost].float(), right[~lost].float()
    assert (got - right).abs().mean() < (1e-5 if format == "fp32" else 0.04) * right.std()


def with_threads(number, of):
    """What `of` returns when PyTorch has so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return of()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("format", ["fp32", "int4"])
def test_any_number_of_threads_says_the_same_bit_for_bit(format):
    model = in_cpp(random_model(replace(ODD, V=176, D=128, F=192)), format)

    def steps():
        cache = PagedCache.for_model(model, 3, ROOM, 4)
        return [model.step(new, cache, logits_to_keep=0).clone() for new in STEPS], cache.keys
    right, keys = with_threads(1, steps)
    for threads in (2, 3, 7):
        got, others = with_threads(threads, steps)
        assert all(map(torch.equal, got, right)) and torch.equal(others, keys)


def test_an_x_in_any_order_of_memory_is_read_as_it_is():
    model = in_cpp(random_model())
    x, found = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)), []
    for each in (x.clone(), x.T.contiguous().T):
        step = ContiguousCache.for_model(model, 1, 8).begin({0: [1, 2, 3, 4, 5]})
        found.append(model.runner.run(each, step)[0])
    assert torch.equal(*found)


# ---- what is refused ----


def test_activations_in_fp16_are_refused_before_anything_is_packed(monkeypatch):
    model = random_model().half()
    monkeypatch.setattr("clawdemy_infer.fast.cpp_step.CppProduct",
                        lambda *_: pytest.fail("packed"))
    with pytest.raises(ValueError, match="compile: activations are in torch.float16; float32 or "
                                         "bfloat16 is accepted"):
        faster(model, compile=True)


@pytest.mark.parametrize(("changed", "words"), [
    ({"format": "fp32"}, r"a matrix \[160, 96\] that C\+\+ does not take in fp32"),
    ({"F": 176}, r"a matrix is \[320, 96\], and the config's is \[352, 96\]"),
    ({"K": 3}, r"a matrix is \[160, 96\], and the config's is \[192, 96\]")])
def test_matrices_of_another_format_or_size_than_the_codes_are_refused(changed, words):
    """C++ would read beyond their end."""
    model = faster(random_model(), "int8")
    sizes = {"format": "int8"} | changed
    format = sizes.pop("format")
    with pytest.raises(ValueError, match="compile: " + words):
        CppLayers(model.layers, model.norm, ModelConfig(replace(SHAPE, **sizes)), format,
                  torch.float32, model.frequencies)


def test_what_cannot_be_compiled_is_refused_before_anything_is_done(monkeypatch):
    eager = random_model()
    with pytest.raises(ValueError, match="weights='fp8'"):
        faster(eager, "fp8", compile=True)
    with pytest.raises(ValueError, match="weights are packed in bf16"):
        faster(faster(eager, "bf16"), compile=True)
    with pytest.raises(ValueError, match="experts"):
        faster(decoder_with_experts(ModelConfig(SHAPE), MoE(4, 2)), compile=True)
    with pytest.raises(ValueError, match="compile: on a CPU it is C.., and backend='triton'"):
        faster(eager, backend="triton", compile=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = r"there is no C\+\+ compiler here \(no-such-compiler\).*without compile it runs as Py"
    with pytest.raises(ValueError, match="compile: " + words):
        faster(eager, compile=True)
