"""The quantized caches: how far a number may move, what they weigh, and that the model runs on them however its tokens are cut."""

from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from tolerances import LOGITS
from transformers import AutoModelForCausalLM, LlamaConfig

from clawdemy_infer.kv_cache import (
    BlockPool,
    BlockTables,
    ContiguousCache,
    Int8Cache,
    KiviCache,
    PagedCache,
    PagedInt8Store,
    PagedKiviCache,
)
from clawdemy_infer.model import load_model
from clawdemy_infer.model.generate import KEEPERS as NAMED

SMALL = {"num_hidden_layers": 3, "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
         "intermediate_size": 44, "vocab_size": 101, "max_position_embeddings": 512, "initializer_range": 0.2}
TEXT = torch.randint(101, (83,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, eos_token_id=None)).save_pretrained(folder)
    return load_model(folder)


def int8(model, batch=1, capacity=90):
    return Int8Cache.for_model(model, batch, capacity)


def kivi(bits):
    return lambda model, batch=1, capacity=90: KiviCache.for_model(model, batch, capacity, bits=bits, group=8)


def paged_int8(model, batch=1, capacity=90):
    return PagedCache.for_model(model, batch, capacity, store=PagedInt8Store)


def paged_kivi4(model, batch=1, capacity=90):
    return PagedKiviCache.for_model(model, batch, capacity, block_size=8)


KEEPERS = {"int8": int8, "kivi8": kivi(8), "kivi4": kivi(4), "kivi2": kivi(2), "paged int8": paged_int8, "paged kivi4": paged_kivi4}
ALL = pytest.mark.parametrize("keeper", KEEPERS.values(), ids=KEEPERS)


def fed(model, cache, ids, pieces, sequence=0):
    """Logits [S, V] of `ids`, brought in pieces of these lengths."""
    out, start = [], 0
    for piece in pieces:
        out.append(model.step({sequence: ids[start:start + piece]}, cache, last_only=False))
        start += piece
    return torch.cat(out)


def assert_same_but_for_roundings(ours, theirs):
    """Where a number lies between two codes, the last bit of fp32 decides which it becomes. What is wrong is off by a whole standard
    deviation; such a choice by a hundredth of one."""
    assert (ours - theirs).std() < 0.03 * theirs.std()


def kept_keys_and_values(cache, tokens):
    """What a new token would be shown of `tokens` old ones in layer 1: keys and values [K, S, H]."""
    step = cache.begin({0: [0]})
    seen = {}
    nothing = torch.zeros(1, 2, 16)
    if isinstance(cache, Int8Cache):
        seen["keys"], seen["values"] = cache.remember(1, step.rectangles[0].stretches, nothing, nothing)
    else:
        part = step.parts[0]
        seen["keys"] = part.all(1, cache.keys, cache.key_tail, nothing[:, :, None])
        seen["values"] = part.all(1, cache.values, cache.value_tail, nothing[:, :, None])
    return seen["keys"][0, :, :tokens], seen["values"][0, :, :tokens]


def numpy_rounded(x, bits, axis):
    """Asymmetric rounding of x [K, groups of tokens, g, H / g', g'] along `axis`, with 16-bit scale and minimum, in numpy and fp64."""
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    low16 = low.astype(np.float16).astype(float)
    scale = ((high.astype(np.float32) - low16.astype(np.float32)) / (2**bits - 1)).astype(np.float16).astype(float)
    return np.clip(np.rint((x - low16) / scale), 0, 2**bits - 1) * scale + low16


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("pieces", [[45], [1] * 45, [7, 1, 1, 1, 20, 15]], ids=["whole", "one by one", "in pieces"])
def test_kivi_rounds_keys_by_channel_and_values_by_token_and_leaves_the_tail(bits, pieces):
    K, H, g, S = 2, 16, 8, 45
    cache = KiviCache(layers=2, batch=1, kv_heads=K, head_dim=H, capacity=60, bits=bits, group=g)
    k, v = torch.randn(2, S, K, H, generator=torch.Generator().manual_seed(0))
    k[:, :, 3] *= 40                                        # a channel as the paper's figure 2 shows it
    for kp, vp in zip(k.split(pieces), v.split(pieces), strict=True):
        step = cache.begin({0: [0] * len(kp)})
        for layer in (0, 1):
            step.attend(layer, torch.randn(len(kp), K, H), kp + layer, vp - layer)
        step.commit()
    whole = 40                                              # five groups of 8; five tokens wait
    keys, values = ((x + shift).transpose(0, 1).double().numpy() for x, shift in ((k, 1), (v, -1)))     # [K, S, H] of layer 1
    by_channel = numpy_rounded(keys[:, :whole].reshape(K, whole // g, g, H), bits, axis=2).reshape(K, whole, H)
    by_token = numpy_rounded(values[:, :whole].reshape(K, whole, H // g, g), bits, axis=3).reshape(K, whole, H)
    seen_keys, seen_values = kept_keys_and_values(cache, S)
    np.testing.assert_allclose(seen_keys, np.concatenate([by_channel, keys[:, whole:]], 1), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(seen_values, np.concatenate([by_token, values[:, whole:]], 1), rtol=1e-3, atol=1e-3)


def test_int8_moves_no_number_by_more_than_half_a_step_of_its_own_token_and_head():
    cache = Int8Cache(layers=2, batch=1, kv_heads=2, head_dim=16, capacity=60)
    k, v = torch.randn(2, 45, 2, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 45)[:, None, None]
    k[7], v[11, 1] = 0, 0                                   # a vector of zeros has no scale
    for kp, vp in zip(k.split([30, 1, 14]), v.split([30, 1, 14]), strict=True):
        step = cache.begin({0: [0] * len(kp)})
        for layer in (0, 1):
            step.attend(layer, torch.randn(len(kp), 2, 16), kp, vp)
        step.commit()
    for kept, x in zip(kept_keys_and_values(cache, 45), (k, v), strict=True):
        x = x.transpose(0, 1)
        step = x.abs().amax(-1, keepdim=True) / 127
        # Half a step, and another 127 * 2^-11 for the scale's own rounding.
        assert ((kept - x).abs() <= (0.5 + 0.0625) * step + 1e-6).all()
        assert (kept - x).abs().max() > 0                   # it is rounded at all
    assert cache.keys.min() == -127 and cache.keys.max() == 127         # and the codes are all used


@ALL
@pytest.mark.parametrize("pieces", [[40, *[1] * 43], [40, 3, 5, 8, 1, 1, 25]], ids=["one by one", "in pieces"])
def test_the_model_is_as_near_to_fp32_as_its_bits_allow_however_the_tokens_are_cut(model, keeper, pieces, request):
    exact = model(torch.tensor([TEXT]))[0]
    error = (fed(model, keeper(model), TEXT, pieces) - exact).std() / exact.std()
    allowed = {"int8": 0.02, "kivi8": 0.02, "kivi4": 0.2, "kivi2": 0.8, "paged int8": 0.02, "paged kivi4": 0.2}
    name = next(name for name in sorted(allowed, key=len, reverse=True) if name in request.node.name)
    assert 0 < error < allowed[name]


def test_more_bits_are_nearer(model):
    exact = model(torch.tensor([TEXT]))[0]
    errors = [(fed(model, kivi(bits)(model), TEXT, [40] + [1] * 43) - exact).std() for bits in (2, 4, 8)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


@ALL
def test_a_ragged_batch_of_seven_computes_what_each_sequence_does_alone(model, keeper):
    starts = [1, 30, 7, 16, 2, 8, 41]
    cache = keeper(model, 7)
    out = {i: [] for i in range(7)}
    steps = [{i: TEXT[i:i + n] for i, n in enumerate(starts)}]
    steps += [{i: [TEXT[i + n + t]] for i, n in enumerate(starts)} for t in range(9)]
    steps += [{i: TEXT[i + n + 9:i + n + 10 + i % 3] for i, n in enumerate(starts) if i != 4}]
    for step in steps:
        logits = model.step(step, cache, last_only=False)
        for i, rows in zip(step, logits.split([len(ids) for ids in step.values()]), strict=True):
            out[i].append(rows)
    for i, rows in out.items():
        alone = fed(model, keeper(model), TEXT[i:], [len(piece) for piece in rows])
        assert_same_but_for_roundings(torch.cat(rows), alone)


def test_paged_int8_gives_the_logits_of_int8(model):
    pieces = [40, 3, 5, 8, 1, 1, 25]
    assert_same_but_for_roundings(fed(model, paged_int8(model), TEXT, pieces), fed(model, int8(model), TEXT, pieces))


def test_a_fork_in_8_bit_pages_writes_like_its_parent(model):
    cache = paged_int8(model)
    model.step({0: TEXT[:21]}, cache)
    cache.fork(0, "child")
    logits = model.step({0: TEXT[21:22], "child": TEXT[21:22]}, cache)
    torch.testing.assert_close(logits[0], logits[1], **LOGITS[torch.float32])
    assert_same_but_for_roundings(logits[:1], fed(model, int8(model), TEXT[:22], [21, 1])[-1:])


@ALL
def test_an_interrupted_step_can_be_begun_again(model, keeper):
    cache = keeper(model)
    fed(model, cache, TEXT[:20], [20])
    if type(cache) is not PagedCache:                       # pages of bytes: tested with their own
        for new in (TEXT[20:50], TEXT[50:51]):
            step = cache.begin({0: new})
            for layer in (0, 1):
                step.attend(layer, *(torch.full((len(new), heads, 16), 7.0) for heads in (6, 2, 2)))
        assert cache.lengths == {0: 20}
    expected = fed(model, keeper(model), TEXT, [20, 15, 1, 47])[20:]
    assert_same_but_for_roundings(fed(model, cache, TEXT[20:], [15, 1, 47]), expected)


def test_bytes_are_those_counted_by_hand(model):
    """3 layers, 2 KV heads, H = 16: 2 * 3 * 2 = 12 vectors of 16 numbers for each token of each sequence."""
    assert Int8Cache.for_model(model, 5, 90).allocated_bytes == 5 * 90 * 12 * (16 + 2)
    # 88 = 11 * 8 tokens in 4 bits; a scale and a minimum of 2 bytes each for 8 numbers; 8 tokens wait in fp32
    assert KiviCache.for_model(model, 5, 90, bits=4, group=8).allocated_bytes == 5 * 12 * (88 * 16 // 2 + 88 * 2 * (2 + 2) + 8 * 16 * 4)
    assert KiviCache.for_model(model, 5, 90, bits=2, group=16).allocated_bytes == 5 * 12 * (80 * 16 // 4 + 80 * 1 * (2 + 2) + 16 * 16 * 4)
    tables = BlockTables(BlockPool(8, 16))
    assert PagedInt8Store(tables.pool, 3, 2, 16).allocated_bytes == 8 * 16 * 12 * (16 + 2)


def test_truncated_tokens_go_back_to_the_tail_as_they_were_rounded(model):
    cache = kivi(4)(model)
    before = fed(model, cache, TEXT[:44], [40, 1, 1, 1, 1])
    cache.truncate(42)
    assert_same_but_for_roundings(fed(model, cache, TEXT[42:44], [1, 1]), before[42:])
    cache.truncate(35)                                      # 3 of the 8 of a rounded group
    k, _ = kept_keys_and_values(cache, 35)
    cache.truncate(35)
    again, _ = kept_keys_and_values(cache, 35)
    torch.testing.assert_close(again, k, rtol=0, atol=0)
    plain = ContiguousCache.for_model(model, 1, 90)
    exact = fed(model, plain, TEXT, [83])
    assert (fed(model, cache, TEXT[35:], [48]) - exact[35:]).std() < 0.2 * exact.std()
    with pytest.raises(ValueError, match="length=84: the cache holds 83 tokens"):
        cache.truncate(84)


@pytest.mark.parametrize(("options", "message"), [
    ({"bits": 3}, "bits=3: accepted are 2, 4, 8"), ({"group": 5}, "group=5"), ({"capacity": 0}, "capacity=0"), ({"group": 0}, "group=0"),
])
def test_what_cannot_be_packed_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        KiviCache(**{"layers": 1, "batch": 1, "kv_heads": 1, "head_dim": 16, "capacity": 32} | options)


@ALL
def test_more_than_the_capacity_is_refused_before_anything_is_written(model, keeper):
    cache = keeper(model, capacity=20)
    model.step({0: TEXT[:19]}, cache)
    assert cache.can_append({0: 1}) and not cache.can_append({0: 2})
    with pytest.raises(ValueError, match="19 tokens of at most 20"):
        model.step({0: TEXT[19:21]}, cache)
    assert cache.lengths == {0: 19}


REAL = {"int8": 0.01, "int4": 0.05, "paged-int8": 0.01, "paged-int4": 0.05}


@pytest.fixture(scope="module")
def real_log_probabilities(smollm):
    """[1, 64, V] behind 64 other tokens, for each keeper of the real model."""
    ids = torch.tensor([smollm.tokenizer.encode(str(topics["assert"]))[:128]])
    logs = {}
    for name in ("contiguous", *REAL):
        cache = NAMED[name](smollm, 1, 128)
        smollm(ids[:, :64], cache)
        logs[name] = torch.cat([smollm(piece, cache) for piece in ids[:, 64:].split(32, dim=1)], dim=1).log_softmax(-1)
    return logs


@pytest.mark.parametrize(("keeper", "most"), REAL.items(), ids=REAL)
def test_the_real_model_hardly_notices(real_log_probabilities, keeper, most):
    """KL(fp32 cache || this one) over 64 tokens that follow on 64 others. For int4 that is a seventh of what 4-bit weights cost."""
    exact, ours = real_log_probabilities["contiguous"], real_log_probabilities[keeper]
    assert 0 < (exact.exp() * (exact - ours)).sum(-1).mean() < most
    assert (ours.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9


def test_pages_of_4_bits_lose_what_the_4_bit_cache_loses(real_log_probabilities):
    exact, piece, page = (real_log_probabilities[name] for name in ("contiguous", "int4", "paged-int4"))
    assert_same_but_for_roundings(page, piece)
    kl = [(exact.exp() * (exact - ours)).sum(-1).mean() for ours in (piece, page)]
    torch.testing.assert_close(kl[0], kl[1], rtol=1e-3, atol=0)
