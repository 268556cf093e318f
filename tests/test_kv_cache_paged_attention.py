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
@pytest.mark.parametrize(("blocks", "size"), [(64, 4), (48, 5), (190, 1), (43, 7)])
@pytest.mark.parametrize("lie", [scattered, in_order, forked])
def test_each_query_sees_its_own_tokens_wherever_they_lie(lie, blocks, size, window):
    store, tables = store_of(blocks, size), lie(blocks, size)
    spans = [(max(0, length - window) if window else 0, length) for length in LENGTHS]
    q = torch.randn(len(LENGTHS), K * G, H, generator=torch.Generator().manual_seed(2))
    ours = attend_tiles(q, store, 1, plan(tables, spans, store))
    expected = torch.stack([in_fp64(one, store, 1, table, *span) for one, table, span in zip(q, tables, spans, strict=True)])
    torch.testing.assert_close(ours, expected, **LOGITS[torch.float32])


def test_a_tile_is_cut_into_blocks_where_its_owners_have_a_block_each_and_only_there():
    store = store_of(64, 4)
    runs = plan(scattered(64, 4), [(0, length) for length in LENGTHS], store)
    assert sum(run.mask.numel() for run in runs) <= 64 * 4              # no token is computed for two who do not share it
    shared = [list(range(16))] * 7
    [run] = plan(shared, [(0, 64)] * 7, store)
    assert run.mask.shape == (2, 1, 1, 7, 1, 32)                        # seven see all of both tiles: two products, not sixteen


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
