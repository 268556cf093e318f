"""The contiguous KV cache: what goes in comes out, and a step counts only once it is over."""

import pytest
import torch

from clawdemy_infer.kv_cache import ContiguousCache


def cache_of(capacity=11, dtype=torch.float32):
    return ContiguousCache(layers=2, batch=3, kv_heads=2, head_dim=5, capacity=capacity,
                           dtype=dtype)


def some(tokens, seed):
    """Keys and values [B, T, K, H] of `tokens` tokens a sequence."""
    return torch.randn(2, 3, tokens, 2, 5, generator=torch.Generator().manual_seed(seed)).unbind()


def remember(cache, layers, k, v):
    """One step over k, v [B, T, K, H] in which nobody attends; what could be seen of the last
    layer. It is not committed."""
    step = cache.begin(dict.fromkeys(range(3), [0] * k.shape[1]))
    part = step.parts[0]
    for layer in layers:
        cache.write(layer, part, k.flatten(0, 1) + layer, v.flatten(0, 1) - layer)
    return step, *cache.read(layers[-1], part)


def test_appended_chunks_come_back_in_order_layer_by_layer():
    cache = cache_of()
    chunks = [some(4, 1), some(1, 2), some(6, 3)]
    for k, v in chunks:
        step, keys, values = remember(cache, (0, 1), k, v)
        step.commit()
    assert cache.length == 11
    torch.testing.assert_close(keys,
                               torch.cat([k for k, _ in chunks], dim=1).transpose(1, 2) + 1, rtol=0,
                               atol=0)
    torch.testing.assert_close(values,
                               torch.cat([v for _, v in chunks], dim=1).transpose(1, 2) - 1, rtol=0,
                               atol=0)


def test_length_moves_only_with_commit_so_that_a_step_can_be_repeated():
    cache = cache_of()
    remember(cache, (0,), *some(4, 1))[0].commit()
    remember(cache, (0,), *some(2, 2))          # a step that never finished
    k, v = some(3, 3)
    _, keys, values = remember(cache, (0,), k, v)
    assert cache.length == 4 and keys.shape == (3, 2, 7, 5)
    torch.testing.assert_close(keys[:, :, 4:], k.transpose(1, 2), rtol=0, atol=0)
    torch.testing.assert_close(values[:, :, 4:], v.transpose(1, 2), rtol=0, atol=0)


def test_truncate_forgets_the_end_and_keeps_the_beginning():
    cache = cache_of()
    first, second = some(5, 1), some(2, 2)
    remember(cache, (0,), *first)[0].commit()
    cache.truncate(3)
    _, keys, _ = remember(cache, (0,), *second)
    assert cache.length == 3
    torch.testing.assert_close(keys,
                               torch.cat([first[0][:, :3], second[0]], dim=1).transpose(1, 2),
                               rtol=0, atol=0)


def test_all_can_be_forgotten_and_through_a_window_no_more_is_read_than_it_shows():
    cache = ContiguousCache(1, 1, 2, 5, capacity=12)
    cache.length = 9
    [part] = cache.begin({0: [1]}, window=4).parts
    assert part.seen(cache.keys[0]).shape == (1, 2, 4, 5)
    [part] = cache.begin({0: [1, 2, 3]}, window=4).parts
    assert part.seen(cache.keys[0]).shape == (1, 2, 6, 5)   # by the first to the last
    cache.truncate(0)
    assert cache.lengths == {0: 0}


def test_one_sequence_can_be_truncated_alone():
    cache = cache_of()
    cache.length = 9
    cache.truncate(4, sequence=1)
    assert cache.lengths == {0: 9, 1: 4, 2: 9} and cache.length == 9
    with pytest.raises(ValueError, match="length=5"):
        cache.truncate(5)
    assert cache.lengths == {0: 9, 1: 4, 2: 9}


def test_whether_there_is_room_can_be_asked():
    cache = cache_of(capacity=11)
    cache.lengths[1] = 10
    assert cache.can_append({0: 11, 1: 1}) and not cache.can_append({0: 1, 1: 2})


@pytest.mark.parametrize(("dtype", "element"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_allocated_bytes_are_both_tensors_at_full_capacity(dtype, element):
    assert cache_of(7, dtype).allocated_bytes == 2 * 2 * 3 * 2 * 7 * 5 * element


def test_llama_2_13b_needs_800_kib_per_token():
    """Kwon et al. 2023 (PagedAttention), section 3: 800 KB per token for a 13B model of 40 layers
    and 40 heads of 128."""
    cache = ContiguousCache(layers=40, batch=1, kv_heads=40, head_dim=128, capacity=3,
                            dtype=torch.float16, device="meta")
    assert cache.allocated_bytes == 3 * 800 * 1024


def test_more_than_the_capacity_is_refused_and_writes_nothing():
    cache = cache_of(capacity=5)
    k, v = some(4, 1)
    remember(cache, (0,), k, v)[0].commit()
    with pytest.raises(ValueError, match="it holds 4 tokens of at most 5, and 2 more do not fit"):
        remember(cache, (0,), *some(2, 2))
    assert cache.length == 4
    torch.testing.assert_close(cache.keys[0, :, :, :4], k.transpose(1, 2), rtol=0, atol=0)


@pytest.mark.parametrize(("new", "message"), [({}, "at least one sequence"),
                                              ({3: [1]}, "no sequence 3"),
                                              ({0: [1], 1: []}, "sequence 1 brings no token"), ],
                         ids=["nobody", "unknown", "nothing"])
def test_a_step_that_brings_nothing_is_refused(new, message):
    with pytest.raises(ValueError, match=message):
        cache_of().begin(new)


@pytest.mark.parametrize("length", [-1, 5])
def test_truncate_refuses_a_length_the_cache_does_not_have(length):
    cache = cache_of()
    cache.length = 4
    with pytest.raises(ValueError, match=f"length={length}"):
        cache.truncate(length)


@pytest.mark.parametrize("name", ["layers", "batch", "kv_heads", "head_dim", "capacity"])
def test_a_size_below_one_is_refused_by_name(name):
    sizes = {"layers": 2, "batch": 1, "kv_heads": 2, "head_dim": 4, "capacity": 8} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0"):
        ContiguousCache(**sizes)
