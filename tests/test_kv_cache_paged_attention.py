"""Attention over tiles against softmax(q kᵀ / sqrt(H)) v in fp64, however the blocks of the sequences lie among each other."""

import random

import pytest
import torch
from tolerances import LOGITS

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.kv_cache import BlockPool, BlockTables, PagedCache
from clawdemy_infer.kv_cache.paged_attention import attend_tiles, plan
from clawdemy_infer.kv_cache.paged_store import PagedStore
from clawdemy_infer.model import Decoder, ModelConfig

L, K, G, H = 2, 3, 2, 10
LENGTHS = [37, 5, 50, 1, 28, 44, 19]


def store_of(blocks, block_size):
    store = PagedStore(BlockPool(blocks, block_size), L, K, H)
    for tensor in (store.keys, store.values):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    return store


def in_fp64(q, store, layer, table, begin, end):
    """[N*H] of one query [N, H] over tokens begin ... end - 1."""
    size, tile = store.pool.block_size, store.pool.tile
    where = [(table[i // size] // tile, table[i // size] % tile * size + i % size) for i in range(begin, end)]
    k, v = (torch.stack([tensor[layer, at, :, offset] for at, offset in where], dim=1).double() for tensor in (store.keys, store.values))
    weights = (q.double().view(K, G, H) @ k.mT / H**0.5).softmax(-1)
    return (weights @ v).flatten().float()


def scattered(blocks, size):
    order = random.Random(7).sample(range(blocks), blocks)
    return [[order.pop() for _ in range(-(-length // size))] for length in LENGTHS]


def in_order(blocks, size):
    free = iter(range(blocks))
    return [[next(free) for _ in range(-(-length // size))] for length in LENGTHS]


def forked(blocks, size):
    """All begin as the longest does, and the last two blocks of each are its own."""
    order = random.Random(8).sample(range(blocks), blocks)
    root = [order.pop() for _ in range(-(-50 // size))]
    return [[*root[:max(0, -(-length // size) - 2)], *(order.pop() for _ in range(min(2, -(-length // size))))] for length in LENGTHS]


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(("blocks", "size"), [(64, 4), (48, 5), (190, 1), (43, 7)])
@pytest.mark.parametrize("lie", [scattered, in_order, forked])
def test_each_query_sees_its_own_tokens_up_to_itself_wherever_they_lie(lie, blocks, size, T, window):
    store, tables = store_of(blocks, size), lie(blocks, size)
    rows = [i for i, length in enumerate(LENGTHS) if length >= T]
    past = [LENGTHS[i] - T for i in rows]
    q = torch.randn(len(rows), T, K * G, H, generator=torch.Generator().manual_seed(2))
    ours = attend_tiles(q.flatten(0, 1), store, 1, plan([tables[i] for i in rows], past, T, G, window, store))
    expected = []
    for queries, i, before in zip(q, rows, past, strict=True):
        for t, query in enumerate(queries):
            end = before + t + 1
            expected.append(in_fp64(query, store, 1, tables[i], max(0, end - window) if window else 0, end))
    torch.testing.assert_close(ours, torch.stack(expected), **LOGITS[torch.float32])


def test_no_token_is_computed_for_two_who_do_not_share_it_and_shared_tiles_are_computed_once():
    store, past = store_of(64, 4), [length - 1 for length in LENGTHS]
    [product] = plan(scattered(64, 4), past, 1, G, None, store).products
    assert product.owners.shape == (8, K, 8, 1)                         # every block is a piece, with one owner
    [product] = plan([list(range(16))] * 7, [63] * 7, 1, G, None, store).products
    assert product.owners.shape == (2, K, 1, 7)                         # seven see all of both tiles: two pieces, not sixteen
    alone, shared = plan([[*range(8), 8 * i] for i in range(2, 6)], [35] * 4, 1, G, None, store).products
    assert alone.owners.shape == (4, K, 1, 1) and shared.owners.shape == (1, K, 1, 4)


def test_neighbouring_tiles_are_read_where_they_lie_and_tiles_far_apart_are_copied_together():
    store = store_of(64, 4)
    [near] = plan([[8, 9], [16], [32]], [7, 3, 3], 1, G, None, store).products
    assert near.tiles == slice(1, 5)                                    # one tile of four is read along
    assert store.tiles(1, near.tiles)[0].data_ptr() == store.keys[1, 1].data_ptr()
    [far] = plan([[8, 9], [48]], [7, 3], 1, G, None, store).products
    assert far.tiles.tolist() == [1, 6]


@pytest.mark.parametrize("window", [None, 9])
def test_the_kernel_that_follows_the_tables_gives_a_model_the_same_logits(window):
    """Ragged decode steps of a small model over blocks in tiles, scattered by forks: Triton (interpreted without a GPU) and tiles."""
    pytest.importorskip("triton", reason="there is no Triton for this system")
    shape = ModelShape(name="small", D=48, F=64, N=6, K=2, H=8, L=2, V=61, tied=True, window=window, max_context=64)
    torch.manual_seed(0)
    model = Decoder(ModelConfig(shape)).eval()
    caches = [PagedCache.over(model, BlockTables(BlockPool(40, 4)), attention=attention) for attention in ("tiles", "triton")]
    for cache in caches:
        for sequence, length in enumerate((13, 1, 30)):
            cache.add(sequence)
            model.step({sequence: [(7 * i + sequence) % 61 for i in range(length)]}, cache)
        cache.fork(2, 3)
    for token in range(3):
        new = {sequence: [token + sequence] for sequence in range(4)}
        tiles, triton = (model.step(new, cache) for cache in caches)
        torch.testing.assert_close(triton, tiles, **LOGITS[torch.float32])
    mixed = {0: [5], 1: [1, 2, 3], 3: [4]}                                  # a chunk among decodes
    torch.testing.assert_close(*(model.step(mixed, cache) for cache in caches), **LOGITS[torch.float32])
