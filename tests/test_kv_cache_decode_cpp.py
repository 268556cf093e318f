"""Decode attention in C++ against softmax(q kᵀ / sqrt(H)) v in fp64, wherever the tokens lie; and models that decode by it."""

import random
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tolerances import KERNEL, LOGITS

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.kv_cache import BlockPool, BlockTables, ContiguousCache, Int8Cache, PagedCache, PagedInt8Store
from clawdemy_infer.kv_cache.decode_cpp import decode_paged
from clawdemy_infer.model import Decoder, ModelConfig, with_backend

if not shutil.which("g++"):
    pytest.skip("no C++ compiler here", allow_module_level=True)

LENGTHS = [37, 5, 50, 1, 16, 44, 19]


def in_fp64(q, keys, values, slots):
    """[N, H] of one query [N, H] over the tokens in these slots of keys and values [tiles, K, C, H]."""
    C, K = keys.shape[2], keys.shape[1]
    k, v = (torch.stack([x[slot // C, :, slot % C] for slot in slots], 1).double() for x in (keys, values))    # [K, S, H]
    q = q.double().view(K, -1, q.shape[-1])
    return ((q @ k.mT / q.shape[-1]**0.5).softmax(-1) @ v).flatten(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize(("K", "G", "H"), [(3, 3, 64), (2, 1, 10), (1, 4, 80)])
@pytest.mark.parametrize(("tiles", "C", "size"), [(12, 32, 16), (10, 35, 5), (220, 1, 1), (6, 64, 64)])
def test_each_query_sees_its_own_tokens_and_no_others(tiles, C, size, K, G, H, window, dtype):
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, tiles, K, C, H, generator=generator).to(dtype)
    lengths = [length for length in LENGTHS if C != 64 or length > 30 or length == 1][:6 if C == 64 else None]
    blocks = random.Random(7).sample(range(tiles * C // size), tiles * C // size)
    most = -(-max(lengths) // size)
    table = [[blocks.pop() for _ in range(-(-length // size))] for length in lengths]
    taken = {block for mine in table for block in mine}
    for block in set(range(tiles * C // size)) - taken:     # nobody's: whoever reads one is found out
        keys[block * size // C, :, block * size % C:block * size % C + size] = torch.nan
    q = torch.randn(len(lengths), K * G, H, generator=generator).to(dtype)
    padded = torch.tensor([mine + [0] * (most - len(mine)) for mine in table], dtype=torch.int32)
    got = decode_paged(q, keys, values, padded, torch.tensor(lengths, dtype=torch.int32), window, size)
    slots = [[mine[i // size] * size + i % size for i in range(max(0, length - (window or length)), length)]
             for mine, length in zip(table, lengths, strict=True)]
    right = torch.stack([in_fp64(query, keys, values, each) for query, each in zip(q, slots, strict=True)])
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), right, **KERNEL[dtype])


SHAPE = ModelShape(name="small", D=48, F=64, N=6, K=2, H=8, L=2, V=61, tied=True, max_context=64)
KEEPERS = {
    "contiguous": lambda model: ContiguousCache.for_model(model, 4, 50), "int8": lambda model: Int8Cache.for_model(model, 4, 50),
    "paged": lambda model: PagedCache.for_model(model, 4, 48, block_size=4),
    "paged int8": lambda model: PagedCache.for_model(model, 4, 48, block_size=4, store=PagedInt8Store),
}


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("keeper", KEEPERS)
def test_a_model_says_the_same_with_it(keeper, window):
    """Ragged decode, sequences apart, and a chunk among decodes. Where keys and values are not floats, PyTorch goes on."""
    torch.manual_seed(0)
    plain = Decoder(ModelConfig(replace(SHAPE, window=window))).eval()
    models = plain, with_backend(plain, "cpp")
    caches = [KEEPERS[keeper](model) for model in models]
    prompts = {sequence: [(7 * i + sequence) % 61 for i in range(length)] for sequence, length in enumerate((13, 1, 30, 13))}
    for new in (prompts, {0: [5], 1: [6], 2: [7], 3: [8]}, {0: [9], 3: [10]}, {0: [5], 1: [1, 2, 3], 3: [4]}, {2: [3]}):
        wanted, got = (model.step(new, cache) for model, cache in zip(models, caches, strict=True))
        torch.testing.assert_close(got, wanted, **LOGITS[torch.float32])


def test_a_paged_cache_follows_the_tables_of_forks():
    torch.manual_seed(0)
    model = Decoder(ModelConfig(SHAPE)).eval()
    caches = [PagedCache.over(model, BlockTables(BlockPool(40, 4)), attention=attention) for attention in ("gather", "cpp")]
    for cache in caches:
        cache.add(0)
        model.step({0: list(range(30))}, cache)
        cache.fork(0, 1)
    for token in range(3):
        new = {0: [token], 1: [token + 9]}
        torch.testing.assert_close(*(model.step(new, cache) for cache in caches), **LOGITS[torch.float32])


def test_a_gpu_is_told_that_it_is_for_a_cpu():
    from clawdemy_infer.backends import choose

    with pytest.raises(ValueError, match="backend='cpp': it is for a CPU, and this is cuda"):
        choose("cuda", "cpp")


def test_the_smallest_numbers_of_the_process_stay_what_they_are():
    """In a process of its own: what a library changes when it is loaded stays changed."""
    code = """if True:
        import torch
        from clawdemy_infer.kv_cache.decode_cpp import built
        built(torch.float32, 1, 16)
        print(float("3e-308") / 4 > 0)
    """
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "True"
