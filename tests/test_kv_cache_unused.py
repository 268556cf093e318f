"""What lies in slots that hold no token of a sequence does not matter, NaN and infinity included,
in any cache and on any way of attending; what lies in its own slots is never passed over."""

import importlib.util
from itertools import product
from math import inf, nan
from random import Random

import pytest
import torch
from cpp_code import attend_pages
from tolerances import LOGITS

from clawdemy_infer.arithmetic import MLA, ModelShape
from clawdemy_infer.batching import Policy, Request
from clawdemy_infer.fast import cpp
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.kv_cache import ContiguousCache, PagedCache
from clawdemy_infer.model import Decoder, ModelConfig, Sampling, generate
from clawdemy_infer.speculative import PromptLookup, Proposal, speculate_batch
from clawdemy_infer.speculative.engine import engine as speculating
from clawdemy_infer.variants.cross_layer import CrossLayerConfig, CrossLayerDecoder
from clawdemy_infer.variants.int4_cache import KiviCache
from clawdemy_infer.variants.int8_cache import Int8Cache
from clawdemy_infer.variants.latent import LatentCache, LatentConfig, LatentDecoder
from clawdemy_infer.variants.sliding_cache import SlidingWindowCache

SIZES = {"name": "small", "L": 2, "D": 32, "N": 4, "K": 2, "H": 16, "F": 48, "V": 61,
         "max_context": 128, "tied": False}
# Prompts, decodes side by side, ragged decodes, a sequence that goes back, chunks beside decodes.
STEPS = [{0: 5, 1: 1, 2: 40}, {0: 1, 1: 1, 2: 1}, {0: 1, 2: 1}, {0: 3, 1: 3, 2: 3}, {0: 1, 1: 1},
         {0: 1, 1: 20, 2: 1}, {1: 2, 2: 2}, {0: 1, 1: 1, 2: 1}]
ROOM = 80
CACHES = {
    "contiguous": lambda model: ContiguousCache.for_model(model, 3, ROOM),
    "paged": lambda model: PagedCache.for_model(model, 3, ROOM, block_size=4),
    "int8": lambda model: Int8Cache.for_model(model, 3, ROOM),
    "int4": lambda model: KiviCache.for_model(model, 3, ROOM, group=16),
    "ring": lambda model: SlidingWindowCache.for_model(model, 3, window=9),
    "ring with sinks": lambda model: SlidingWindowCache.for_model(model, 3, window=7, sinks=3),
}


def random_model(make=Decoder, config=ModelConfig, **more):
    torch.manual_seed(5)
    model = make(config(ModelShape(**SIZES | more))).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def fill(tensor, value):
    """Codes have no NaN: those get what is most wrong."""
    return tensor.fill_(value if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def spoil(cache, value, window):
    """`value` into all slots that hold no token, or one that no query to come may see."""
    lengths = dict(cache.lengths)
    if isinstance(cache, PagedCache):
        size, tables = cache.tables.pool.block_size, cache.tables
        owned = {(tables.blocks[name][i // size], i % size) for name, length in lengths.items()
                 for i in range(max(0, length + 1 - (window or length + 1)), length)}
        for block, offset in set(product(range(tables.pool.blocks), range(size))) - owned:
            for tensor in (cache.keys, cache.values):
                fill(tensor[:, block, :, offset], value)
    elif isinstance(cache, KiviCache):
        for kept, (name, length) in product((cache.keys, cache.values), lengths.items()):
            whole = kept.whole(length)
            groups = whole // kept.group if kept.along == -2 else whole
            fill(kept.codes[:, name, :, whole:], value)
            fill(kept.scale[:, name, :, groups:], value)
            fill(kept.low[:, name, :, groups:], value)
            fill(kept.tail[:, name, :, length - whole:], value)
    elif isinstance(cache, SlidingWindowCache):
        for tensor, (name, length) in product(cache.tensors, lengths.items()):
            fill(tensor[:, name, :, length:], value)
    else:
        for tensor, (name, length) in product(cache.tensors, lengths.items()):
            fill(tensor[:, name, :, length:], value)
            if window:
                fill(tensor[:, name, :, :max(0, length + 1 - window)], value)


def logits(model, cache, value=None):
    """Of all steps, with `value` in all unused slots before each."""
    generator, rows = torch.Generator().manual_seed(1), []
    for i, step in enumerate(STEPS):
        if i == 4 and not isinstance(cache, SlidingWindowCache):
            cache.truncate(cache.lengths[0] - 3, 0)
        if value is not None:
            spoil(cache, value, model.config.shape.window)
        new = {name: torch.randint(61, (count,), generator=generator).tolist()
               for name, count in step.items()}
        rows.append(model.step(new, cache, logits_to_keep=0))
    return torch.cat(rows)


def same(model, make_cache, value):
    clean = logits(model, make_cache(model))
    assert clean.isfinite().all()
    torch.testing.assert_close(logits(model, make_cache(model), value), clean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("name", CACHES)
def test_unused_slots_do_not_matter(name, value):
    same(random_model(), CACHES[name], value)


@pytest.mark.parametrize("name", ["contiguous", "paged", "int8", "int4"])
def test_neither_do_those_that_a_window_has_left_behind(name):
    same(random_model(window=6), CACHES[name], nan)


@pytest.mark.parametrize("absorbed", [True, False])
def test_nor_those_of_latents(absorbed):
    mla = MLA(latent=20, rope=8, value=10)
    model = random_model(lambda config: LatentDecoder(config, absorbed), LatentConfig, K=4, H=22,
                         mla=mla)
    same(model, lambda model: LatentCache.for_model(model, 3, ROOM), nan)


def test_nor_those_that_layers_share():
    model = random_model(CrossLayerDecoder, CrossLayerConfig, L=3,
                         pattern=("global", "global shared", "global shared"))
    same(model, lambda model: model.new_cache(3, ROOM), nan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nor_in_16_bits(dtype):
    for name in ("contiguous", "paged", "ring with sinks"):
        model = random_model().to(dtype)
        clean, spoiled = (logits(model, CACHES[name](model), value) for value in (None, nan))
        torch.testing.assert_close(spoiled, clean, **LOGITS[dtype])


@pytest.mark.skipif(not cpp.available(), reason="no C++ compiler here")
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("name", ["contiguous", "paged"])
def test_nor_to_the_step_in_cpp(name, window):
    same(faster(random_model(window=window), compile=True), CACHES[name], nan)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton for this system")
@pytest.mark.parametrize("name", CACHES)
def test_nor_to_the_step_in_triton(name, monkeypatch):
    monkeypatch.setattr("test_kv_cache_unused.STEPS",
                        [{0: 5, 1: 1, 2: 18}, {0: 1, 1: 1, 2: 1}, {0: 1, 2: 2}, {1: 1, 2: 1}])
    on_gpu = torch.cuda.is_available()
    same(faster(random_model().to("cuda" if on_gpu else "cpu"), backend="triton"), CACHES[name],
         nan)


# ---- what was drafted, read and rejected ----

LOST = 60                       # keys and values of this token are NaN, and its logit is 0


class Reckless(PromptLookup):
    """Drafts anything, `LOST` among it at any place."""

    def __init__(self, seed):
        self.random = Random(seed)

    def propose(self, texts, counts, sampling, generator):
        return Proposal([self.random.choices([LOST, *range(9)], k=counts[sequence])
                         for sequence in texts])


def lossy(**more):
    model = random_model(**more)
    model.embed.weight[LOST] = nan
    model.head.weight[LOST] = 0.0
    return model


@pytest.mark.parametrize("way", ["pytorch", "cpp"])
@pytest.mark.parametrize("window", [None, 6])
def test_a_rejected_token_whose_keys_are_nan_leaves_no_trace(way, window):
    """In no cache, neither with texts of one token nor beside longer ones: all tokens are those of
    a generation without a draft. Every next draft is written over what the last has left."""
    model = lossy(window=window)
    prompts = [[5], [7, 8, 9], [*range(1, 31)], [3]]
    expected = [generate(model, prompt, 16).tokens for prompt in prompts]
    assert LOST not in sum(expected, [])
    if way == "cpp":
        if not cpp.available():
            pytest.skip("no C++ compiler here")
        model = faster(model, compile=True)
    for seed, cache in product(range(2), ["contiguous", "paged"]):
        done = speculate_batch(model, prompts, Reckless(seed), 16, gamma=4, cache=cache)
        assert [each.tokens for each in done] == expected
        assert sum(LOST in round.drafted for each in done for round in each.rounds) > 9
        warm = Sampling(temperature=0.5, top_k=3, seed=seed)
        done = speculate_batch(model, prompts, Reckless(seed), 16, warm, gamma=4, cache=cache)
        assert [len(each.tokens) for each in done] == [16] * 4
    for seed, prefixes in product(range(2), [False, True]):
        policy = Policy(gamma=4, max_batch=3, token_budget=24, prefix_caching=prefixes)
        served = speculating(model, Reckless(seed), policy, kv_bytes=2**17, block_size=4)
        report = served.run([Request(i, prompt, 16) for i, prompt in enumerate(prompts * 2)])
        assert [sequence.tokens for sequence in report.sequences] == expected * 2


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("way", ["pytorch", "cpp"])
def test_a_token_reaches_nobody_before_it(name, way):
    """In a prompt, a chunk and a batch: so the blocks of a prefix may be shared."""
    if way == "cpp" and not (cpp.available() and name in ("contiguous", "paged")):
        pytest.skip("no C++ compiler here, or no way of its own")
    model, found = lossy(), []
    if way == "cpp":
        model = faster(model, compile=True)
    for last in (LOST, 1):
        cache = CACHES[name](model)
        found += [[model.step({each: [5, 6, 7, last, last] for each in some}, cache, 0)
                   .view(len(some), 5, -1) for some in ([0], [1, 2])]]
        cache = CACHES[name](model)
        model.step({0: [8, 9], 1: [8], 2: [8, 8, 8]}, cache)
        found[-1] += [model.step({each: [5, 6, 7, last, last] for each in range(3)}, cache, 0)
                      .view(3, 5, -1)]
    for lost, plain in zip(*found, strict=True):
        assert lost[:, 3:].isnan().all()
        torch.testing.assert_close(lost[:, :3], plain[:, :3], rtol=1e-5, atol=1e-5)


# ---- its own ----


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("value", [nan, inf])
def test_a_sequence_whose_own_keys_are_lost_harms_itself_alone(name, value):
    """Its logits are NaN, so that it can be seen; those beside it are what they were."""
    model, found = random_model(), []
    model.embed.weight[60] = value
    for middle in (59, 60):
        cache = CACHES[name](model)
        model.step({0: [5, 6], 1: [7, middle, 9], 2: [*range(20)]}, cache)
        found.append(model.step({0: [8], 1: [9], 2: [10]}, cache))
    assert found[0].isfinite().all() and found[1][1].isnan().all()
    torch.testing.assert_close(found[1][[0, 2]], found[0][[0, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not cpp.available(), reason="no C++ compiler here")
@pytest.mark.parametrize("lost", ["keys", "values"])
@pytest.mark.parametrize(("past", "count"), [(70, 1), (0, 71), (35, 36)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_passes_over_no_key_or_value_that_is_nan(dtype, past, count, lost):
    """A lost key leaves no weights, and a lost value no sum; those of another head do."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 80, 16, generator=generator).to(dtype)
    q = torch.randn(count, 4, 16, generator=generator).to(dtype)
    {"keys": keys, "values": values}[lost][0, 1, 3, 5] = nan
    out = attend_pages(q, keys, values, torch.zeros(1, 1, dtype=torch.int32), [past], [count])
    last = out[-1].view(2, 2, 16)
    assert last[0].isfinite().all()
    assert last[1, :, 5].isnan().all() and (lost == "values" or last[1].isnan().all())
