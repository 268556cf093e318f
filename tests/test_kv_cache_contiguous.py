"""The contiguous KV cache: what goes in comes out, and a step counts only once it is over."""

import pytest
import torch

from clawdemy_infer.kv_cache import ContiguousCache


def cache_of(capacity=11, dtype=torch.float32):
    return ContiguousCache(layers=2, batch=3, kv_heads=2, head_dim=5, capacity=capacity, dtype=dtype)


def some(tokens, seed):
    """Keys and values [B, K, T, H] of `tokens` tokens."""
    return torch.randn(2, 3, 2, tokens, 5, generator=torch.Generator().manual_seed(seed)).unbind()


def test_appended_chunks_come_back_in_order_layer_by_layer():
    cache = cache_of()
    chunks = [some(4, 1), some(1, 2), some(6, 3)]
    for k, v in chunks:
        for layer in (0, 1):
            keys, values = cache.append(layer, k + layer, v - layer)
        cache.advance(k.shape[2])
    assert cache.length == 11
    torch.testing.assert_close(keys, torch.cat([k for k, _ in chunks], dim=2) + 1, rtol=0, atol=0)
    torch.testing.assert_close(values, torch.cat([v for _, v in chunks], dim=2) - 1, rtol=0, atol=0)


def test_length_moves_only_with_advance_so_that_a_step_can_be_repeated():
    cache = cache_of()
    cache.append(0, *some(4, 1))
    cache.advance(4)
    cache.append(0, *some(2, 2))        # a step that never finished
    k, v = some(3, 3)
    keys, values = cache.append(0, k, v)
    assert cache.length == 4 and keys.shape == (3, 2, 7, 5)
    torch.testing.assert_close(keys[:, :, 4:], k, rtol=0, atol=0)
    torch.testing.assert_close(values[:, :, 4:], v, rtol=0, atol=0)


def test_truncate_forgets_the_end_and_keeps_the_beginning():
    cache = cache_of()
    first, second = some(5, 1), some(2, 2)
    cache.append(0, *first)
    cache.advance(5)
    cache.truncate(3)
    keys, _ = cache.append(0, *second)
    assert cache.length == 3
    torch.testing.assert_close(keys, torch.cat([first[0][:, :, :3], second[0]], dim=2), rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "element"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_allocated_bytes_are_both_tensors_at_full_capacity(dtype, element):
    assert cache_of(7, dtype).allocated_bytes == 2 * 2 * 3 * 2 * 7 * 5 * element


def test_llama_2_13b_needs_800_kib_per_token():
    """Kwon et al. 2023 (PagedAttention), section 3: 800 KB per token for a 13B model of 40 layers and 40 heads of 128."""
    cache = ContiguousCache(layers=40, batch=1, kv_heads=40, head_dim=128, capacity=3, dtype=torch.float16, device="meta")
    assert cache.allocated_bytes == 3 * 800 * 1024


def test_more_than_the_capacity_is_refused_and_writes_nothing():
    cache = cache_of(capacity=5)
    k, v = some(4, 1)
    cache.append(0, k, v)
    cache.advance(4)
    with pytest.raises(ValueError, match="2 tokens on top of 4: the cache holds 5"):
        cache.append(0, *some(2, 2))
    assert cache.length == 4
    torch.testing.assert_close(cache.keys[0, :, :, :4], k, rtol=0, atol=0)


@pytest.mark.parametrize("length", [-1, 5])
def test_truncate_refuses_a_length_the_cache_does_not_have(length):
    cache = cache_of()
    cache.append(0, *some(4, 1))
    cache.advance(4)
    with pytest.raises(ValueError, match=f"length={length}"):
        cache.truncate(length)


@pytest.mark.parametrize("name", ["layers", "batch", "kv_heads", "head_dim", "capacity"])
def test_a_size_below_one_is_refused_by_name(name):
    sizes = {"layers": 2, "batch": 1, "kv_heads": 2, "head_dim": 4, "capacity": 8} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0"):
        ContiguousCache(**sizes)
