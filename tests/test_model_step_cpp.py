"""A step in C++ says what the layers say, for any tokens of any sequences, and writes what they write."""

from dataclasses import replace

import pytest
import torch
from tolerances import LOGITS

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.kv_cache import BlockPool, BlockTables, ContiguousCache, Int8Cache, PagedCache
from clawdemy_infer.linear import FORMATS, Codes, cpp_strips, packable
from clawdemy_infer.model import Decoder, ModelConfig, compiled, generate, with_weights
from clawdemy_infer.model.compiled import CompiledStep
from clawdemy_infer.model.formats import twin
from clawdemy_infer.model.step_cpp import FEW, StepInCpp, runs

pytestmark = pytest.mark.skipif(not cpp_strips.available(), reason="no C++ compiler here, or a CPU without AVX512_BF16")

SHAPE = ModelShape("plain", L=3, D=96, N=6, K=2, H=16, F=160, V=176, tied=False, max_context=256)
PROMPTS = {0: [3, 141, 59, 26, 5], 1: [7], 2: list(range(40, 61))}
# Prompts of a few tokens and of many; decodes; sequences apart; a few tokens each; decodes beside a few, and beside a chunk that sees
# more than a block of keys before it; one prompt alone that ends within a block of queries.
STEPS = [PROMPTS, {0: [5], 1: [6], 2: [7]}, {0: [8], 2: [9]}, {1: [1, 2, 3, 4, 5]}, {0: [5], 1: [1, 2, 3], 2: [4]}, {0: [1, 2], 2: [3, 4]},
         {0: [5], 1: [i % 176 for i in range(70)], 2: [4]}, {0: [5], 1: [9 * i % 176 for i in range(83)], 2: [*range(17)]}, {1: [3]}]
ROOM = 180
KEEPERS = {"contiguous": ContiguousCache.for_model, "paged": lambda model, batch, capacity: PagedCache.for_model(model, batch, capacity, 4)}


def random_model(shape=SHAPE):
    torch.manual_seed(7)
    made = Decoder(ModelConfig(shape)).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return made


def in_cpp(model, format="fp32"):
    made = compiled(model, format)
    assert type(made.compiled_step) is StepInCpp
    return made


@pytest.mark.parametrize("more", [{}, {"window": 9}, {"window": 70}, {"tied": True, "K": 6}, {"N": 4, "K": 1, "H": 48}],
                         ids=["grouped", "window", "window over blocks", "tied, one head each", "one KV head of 48"])
@pytest.mark.parametrize("keeper", KEEPERS)
def test_steps_of_a_few_tokens_say_what_the_layers_say(keeper, more):
    eager = random_model(replace(SHAPE, **more))
    models = eager, in_cpp(eager)
    caches = [KEEPERS[keeper](model, 3, ROOM) for model in models]
    for store in [caches[1].store if keeper == "paged" else caches[1]]:
        store.keys.fill_(torch.nan), store.values.fill_(torch.nan)      # whoever reads what nobody wrote is found out
    for new in STEPS:
        right, got = (model.step(new, cache, last_only=False) for model, cache in zip(models, caches, strict=True))
        torch.testing.assert_close(got / right.std(), right / right.std(), **LOGITS[torch.float32])
    assert caches[0].lengths == caches[1].lengths


def test_it_runs_wherever_keys_and_values_lie_plain_and_as_its_own():
    model, ran = in_cpp(random_model()), []
    step = model.compiled_step

    class Counted:
        takes = step.takes

        def __call__(self, tokens, *rest):
            ran.append(len(tokens))
            return step(tokens, *rest)
    model.compiled_step = Counted()
    cache = ContiguousCache.for_model(model, 3, ROOM)
    for new in STEPS:
        model.step(new, cache)
    assert ran == [sum(map(len, new.values())) for new in STEPS]
    model.step({0: [1]}, Int8Cache.for_model(model, 1, 48))
    model.step({0: [1]}, ContiguousCache(3, 1, 2, 16, 48))  # by PyTorch, as it says itself
    assert len(ran) == len(STEPS)


def test_tokens_of_a_few_look_by_themselves_and_those_of_many_together():
    assert runs([1, 1, FEW, FEW + 1, 1, 90, 40]).tolist() == [2 + FEW, -FEW - 1, 1, -90, -40]


@pytest.mark.parametrize("keeper", KEEPERS)
def test_it_keeps_the_keys_and_values_that_the_layers_keep_and_no_others(keeper):
    eager = random_model()
    models = eager, in_cpp(eager)
    caches = [KEEPERS[keeper](model, 3, ROOM) for model in models]
    for new in ({0: [5], 1: [6], 2: [*range(70)]}, {0: [1, 2, 3], 2: [4]}):
        for model, cache in zip(models, caches, strict=True):
            model.step(new, cache)
    stores = [cache.store if keeper == "paged" else cache for cache in caches]
    for name in ("keys", "values"):
        torch.testing.assert_close(*(getattr(store, name) for store in reversed(stores)), **LOGITS[torch.float32])
        assert torch.equal(*(getattr(store, name).any(-1) for store in stores))             # zeros where nothing belongs


def test_forks_share_their_blocks_until_one_writes():
    eager = random_model()
    models = eager, in_cpp(eager)
    caches = [PagedCache.over(model, BlockTables(BlockPool(40, 4))) for model in models]
    for model, cache in zip(models, caches, strict=True):
        cache.add(0)
        model.step({0: list(range(30))}, cache)
        cache.fork(0, 1)
    for token in range(3):
        right, got = (model.step({0: [token], 1: [token + 9]}, cache) for model, cache in zip(models, caches, strict=True))
        torch.testing.assert_close(got / right.std(), right / right.std(), **LOGITS[torch.float32])


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_says_what_its_weights_say_in_fp32(format):
    eager = random_model()
    fast = in_cpp(eager, format)
    right = twin(eager)
    right.layers = torch.nn.ModuleList(twin(layer) for layer in eager.layers)
    for owner, name in [(layer, name) for layer in right.layers for name in ("qkv", "out", "gate_up", "down")] + [(right, "head")]:
        kept = packable(format, getattr(owner, name).weight)
        linear = twin(getattr(owner, name))
        linear.weight = torch.nn.Parameter((kept.dequantized() if isinstance(kept, Codes) else kept).float(), requires_grad=False)
        setattr(owner, name, linear)
    by_layers = with_weights(eager, format)
    caches = [ContiguousCache.for_model(model, 3, ROOM) for model in (right, by_layers, fast)]
    for new in STEPS:
        wanted, theirs, got = (model.step(new, cache, last_only=False).float()
                               for model, cache in zip((right, by_layers, fast), caches, strict=True))
        error, other = ((x - wanted).abs().mean() / wanted.std() for x in (got, theirs))
        if format in ("fp32", "fp16"):
            torch.testing.assert_close(got / wanted.std(), wanted / wanted.std(), **LOGITS[torch.float32])
        else:
            assert error < 0.04 and (format != "bf16" or error < other)     # PyTorch rounds to bf16 after each operation


def test_generation_is_token_for_token_the_same():
    eager = random_model()
    fast = in_cpp(eager)
    for cache in ("contiguous", "paged"):
        assert generate(fast, PROMPTS[0], 40, cache=cache).tokens == generate(eager, PROMPTS[0], 40, cache=cache).tokens


def test_an_observer_sees_what_the_last_layer_leaves():
    eager, seen = random_model(), []
    for model in (eager, in_cpp(eager)):
        model.observer = lambda step, x: seen.append(x.clone())
        model.step({0: [42], 1: [7, 8]}, ContiguousCache.for_model(model, 2, 8))
        model.observer = None
    torch.testing.assert_close(*seen, **LOGITS[torch.float32])


@pytest.mark.parametrize(("more", "format"), [({"qkv_bias": True}, "fp32"), ({"qk_norm": True}, "bf16"), ({"D": 90}, "bf16"),
                                              ({"F": 192}, "int4")], ids=["bias", "norms", "90 outputs", "groups of 32 and of 64"])
def test_what_it_does_not_know_is_left_to_the_compiler_of_pytorch(more, format):
    assert type(compiled(random_model(replace(SHAPE, **more)), format).compiled_step) is CompiledStep
