"""The quantized caches: how far a number may move, what they weigh, and that the model runs on them
however its tokens are cut."""

from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from clawdemy_infer.files import load_model
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.variants.int4_cache import KiviCache
from clawdemy_infer.variants.int8_cache import Int8Cache
from clawdemy_infer.variants.named_caches import CACHES as NAMED

SMALL = {
    "num_hidden_layers": 3, "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 44, "vocab_size": 101, "max_position_embeddings": 512,
    "initializer_range": 0.2
}
TEXT = torch.randint(101, (83,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("llama")
    theirs = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, eos_token_id=None))
    theirs.save_pretrained(folder)
    return load_model(folder)


def int8(model, batch=1, capacity=90):
    return Int8Cache.for_model(model, batch, capacity)


def kivi(bits):
    def new_cache(model, batch=1, capacity=90):
        return KiviCache.for_model(model, batch, capacity, bits=bits, group=8)
    return new_cache


CACHES = {"int8": int8, "kivi8": kivi(8), "kivi4": kivi(4), "kivi2": kivi(2)}
ALL = pytest.mark.parametrize("new_cache", CACHES.values(), ids=CACHES)


def fed(model, cache, ids, pieces, sequence=0):
    """Logits [S, V] of `ids`, brought in pieces of these lengths."""
    out, start = [], 0
    for piece in pieces:
        out.append(model.step({sequence: ids[start:start + piece]}, cache, logits_to_keep=0))
        start += piece
    return torch.cat(out)


def assert_same_but_for_roundings(ours, theirs):
    """Where a number lies between two codes, the last bit of fp32 decides which it becomes. What is
    wrong is off by a whole standard deviation; such a choice by a hundredth of one."""
    assert (ours - theirs).std() < 0.03 * theirs.std()


def kept_keys_and_values(cache, tokens):
    """What a new token would be shown of `tokens` old ones in layer 1: keys and values [K, S,
    H]."""
    [part], nothing = cache.begin({0: [0]}).parts, torch.zeros(1, 2, 16)
    if isinstance(cache, Int8Cache):
        cache.write(1, part, nothing, nothing)
        keys, values = cache.read(1, part)
    else:
        keys, values = (x.seen(1, part, nothing[:, :, None]) for x in (cache.keys, cache.values))
    return keys[0, :, :tokens], values[0, :, :tokens]


def numpy_rounded(x, bits, axis):
    """Asymmetric rounding of x [K, groups of tokens, g, H / g', g'] along `axis`, with 16-bit scale
    and minimum, in numpy and fp64."""
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    low16 = low.astype(np.float16).astype(float)
    scale = (high.astype(np.float32) - low16.astype(np.float32)) / (2**bits - 1)
    scale = scale.astype(np.float16).astype(float)
    return np.clip(np.rint((x - low16) / scale), 0, 2**bits - 1) * scale + low16


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("pieces", [[45], [1]*45, [7, 1, 1, 1, 20, 15]],
                         ids=["whole", "one by one", "in pieces"])
def test_kivi_rounds_keys_by_channel_and_values_by_token_and_leaves_the_tail(bits, pieces):
    K, H, g, S = 2, 16, 8, 45
    cache = KiviCache(layers=2, batch=1, kv_heads=K, head_dim=H, capacity=60, bits=bits, group=g)
    k, v = torch.randn(2, S, K, H, generator=torch.Generator().manual_seed(0))
    k[:, :, 3] *= 40  # a channel as the paper's figure 2 shows it
    for kp, vp in zip(k.split(pieces), v.split(pieces), strict=True):
        step = cache.begin({0: [0] * len(kp)})
        for layer in (0, 1):
            step.attend(layer, torch.randn(len(kp), K, H), kp + layer, vp - layer)
        step.commit()
    whole = 40                                              # five groups of 8; five tokens wait
    # [K, S, H] of layer 1
    keys, values = ((x + shift).transpose(0, 1).double().numpy() for x, shift in ((k, 1), (v, -1)))
    by_channel = numpy_rounded(keys[:, :whole].reshape(K, whole // g, g, H), bits, axis=2)
    by_token = numpy_rounded(values[:, :whole].reshape(K, whole, H // g, g), bits, axis=3)
    by_channel, by_token = (x.reshape(K, whole, H) for x in (by_channel, by_token))
    seen_keys, seen_values = kept_keys_and_values(cache, S)
    np.testing.assert_allclose(seen_keys, np.concatenate([by_channel, keys[:, whole:]], 1),
                               rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(seen_values, np.concatenate([by_token, values[:, whole:]], 1),
                               rtol=1e-3, atol=1e-3)


def test_int8_moves_no_number_by_more_than_half_a_step_of_its_own_token_and_head():
    cache = Int8Cache(layers=2, batch=1, kv_heads=2, head_dim=16, capacity=60)
    k, v = torch.randn(2, 45, 2, 16, generator=torch.Generator().manual_seed(0))
    k, v = (x * torch.logspace(-3, 2, 45)[:, None, None] for x in (k, v))
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
@pytest.mark.parametrize("pieces", [[40, *[1]*43], [40, 3, 5, 8, 1, 1, 25]],
                         ids=["one by one", "in pieces"])
def test_the_model_is_as_near_to_fp32_as_its_bits_allow_however_the_tokens_are_cut(
        model, new_cache, pieces, request):
    exact = model(torch.tensor([TEXT]))[0]
    error = (fed(model, new_cache(model), TEXT, pieces) - exact).std() / exact.std()
    allowed = {"int8": 0.02, "kivi8": 0.02, "kivi4": 0.2, "kivi2": 0.8}
    name = next(name for name in allowed if name in request.node.name)
    assert 0 < error < allowed[name]


def test_more_bits_are_nearer(model):
    exact = model(torch.tensor([TEXT]))[0]
    errors = [(fed(model, kivi(bits)(model), TEXT, [40] + [1] * 43) - exact).std()
              for bits in (2, 4, 8)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


@ALL
def test_a_ragged_batch_of_seven_computes_what_each_sequence_does_alone(model, new_cache):
    starts = [1, 30, 7, 16, 2, 8, 41]
    cache = new_cache(model, 7)
    out = {i: [] for i in range(7)}
    steps = [{i: TEXT[i:i + n] for i, n in enumerate(starts)}]
    steps += [{i: [TEXT[i + n + t]] for i, n in enumerate(starts)} for t in range(9)]
    steps += [{i: TEXT[i + n + 9:i + n + 10 + i % 3] for i, n in enumerate(starts) if i != 4}]
    for step in steps:
        logits = model.step(step, cache, logits_to_keep=0)
        for i, rows in zip(step, logits.split([len(ids) for ids in step.values()]), strict=True):
            out[i].append(rows)
    for i, rows in out.items():
        alone = fed(model, new_cache(model), TEXT[i:], [len(piece) for piece in rows])
        assert_same_but_for_roundings(torch.cat(rows), alone)


@ALL
def test_an_interrupted_step_can_be_begun_again(model, new_cache):
    cache = new_cache(model)
    fed(model, cache, TEXT[:20], [20])
    for new in (TEXT[20:50], TEXT[50:51]):
        step = cache.begin({0: new})
        for layer in (0, 1):
            step.attend(layer, *(torch.full((len(new), heads, 16), 7.0) for heads in (6, 2, 2)))
    assert cache.lengths == {0: 20}
    expected = fed(model, new_cache(model), TEXT, [20, 15, 1, 47])[20:]
    assert_same_but_for_roundings(fed(model, cache, TEXT[20:], [15, 1, 47]), expected)


def test_bytes_are_those_counted_by_hand(model):
    """3 layers, 2 KV heads, H = 16: 2 * 3 * 2 = 12 vectors of 16 numbers for each token of each
    sequence."""
    assert Int8Cache.for_model(model, 5, 90).allocated_bytes == 5 * 90 * 12 * (16 + 2)
    # 88 = 11 * 8 tokens in 4 bits; a scale and a minimum of 2 bytes each for 8 numbers; 8 tokens
    # wait in fp32
    four, two = (KiviCache.for_model(model, 5, 90, bits=bits, group=group).allocated_bytes
                 for bits, group in ((4, 8), (2, 16)))
    assert four == 5 * 12 * (88 * 16 // 2 + 88 * 2 * (2 + 2) + 8 * 16 * 4)
    assert two == 5 * 12 * (80 * 16 // 4 + 80 * 1 * (2 + 2) + 16 * 16 * 4)


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
    ({"bits": 3}, "bits=3: accepted are 2, 4, 8"), ({"group": 5}, "group=5"),
    ({"capacity": 0}, "capacity=0"), ({"group": 0}, "group=0")])
def test_what_cannot_be_packed_is_refused_by_name(options, message):
    sizes = {"layers": 1, "batch": 1, "kv_heads": 1, "head_dim": 16, "capacity": 32}
    with pytest.raises(ValueError, match=message):
        KiviCache(**sizes | options)


@ALL
def test_more_than_the_capacity_is_refused_before_anything_is_written(model, new_cache):
    cache = new_cache(model, capacity=20)
    model.step({0: TEXT[:19]}, cache)
    assert cache.can_append({0: 1}) and not cache.can_append({0: 2})
    with pytest.raises(ValueError, match="19 tokens of at most 20"):
        model.step({0: TEXT[19:21]}, cache)
    assert cache.lengths == {0: 19}


REAL = {"int8": 0.01, "int4": 0.05}


@pytest.fixture(scope="module")
def real_log_probabilities(smollm):
    """[1, 64, V] behind 64 other tokens, for each cache of the real model."""
    ids = torch.tensor([smollm.tokenizer.encode(str(topics["assert"]))[:128]])
    logs = {}
    for name in ("contiguous", *REAL):
        cache = NAMED[name](smollm, 1, 128)
        smollm(ids[:, :64], cache)
        logs[name] = torch.cat([smollm(piece, cache) for piece in ids[:, 64:].split(32, dim=1)],
                               dim=1).log_softmax(-1)
    return logs


@pytest.mark.parametrize(("name", "most"), REAL.items(), ids=REAL)
def test_the_real_model_hardly_notices(real_log_probabilities, name, most):
    """KL(fp32 cache || this one) over 64 tokens that follow on 64 others. For int4 that is a
    seventh of what 4-bit weights cost."""
    exact, ours = real_log_probabilities["contiguous"], real_log_probabilities[name]
    assert 0 < (exact.exp() * (exact - ours)).sum(-1).mean() < most
    assert (ours.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9
