"""Attention over pages in C++ against softmax(q kᵀ / sqrt(H)) v in fp64, wherever the tokens lie
and however the sequences share them."""

import random
import subprocess
import sys

import pytest
import torch
from cpp_code import attend_pages
from tolerances import KERNEL

from clawdemy_infer.fast import cpp
from clawdemy_infer.fast.backends import choose

pytestmark = pytest.mark.skipif(not cpp.available(), reason="no C++ compiler here")

LENGTHS = [37, 5, 50, 1, 16, 44, 19]


def in_fp64(q, keys, values, slots):
    """[N, H] of one query [N, H] over the tokens in these slots of keys and values [blocks, K,
    size, H]."""
    _, K, size, H = keys.shape
    k, v = (torch.stack([x[slot // size, :, slot % size] for slot in slots], 1).double()
            for x in (keys, values))                                                    # [K, S, H]
    q = q.double().view(K, -1, H)
    return ((q @ k.mT / H**0.5).softmax(-1) @ v).flatten(0, 1)


def scattered(blocks, size, lengths):
    order = random.Random(7).sample(range(blocks), blocks)
    return [[order.pop() for _ in range(-(-length // size))] for length in lengths]


def in_order(blocks, size, lengths):
    free = iter(range(blocks))
    return [[next(free) for _ in range(-(-length // size))] for length in lengths]


def forked(blocks, size, lengths):
    """All begin as the longest does, and the last two blocks of each are its own."""
    order = random.Random(8).sample(range(blocks), blocks)
    root = [order.pop() for _ in range(-(-max(lengths) // size))]
    counts = [-(-length // size) for length in lengths]
    return [[*root[:max(0, count - 2)], *(order.pop() for _ in range(min(2, count)))]
            for count in counts]


def check(table, blocks, size, past, new, K, G, H, window, dtype):
    """The queries of sequences that have `past` tokens and bring `new`."""
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, blocks, K, size, H, generator=generator).to(dtype)
    owned = [[mine[i // size] * size + i % size for i in range(before + count)]
             for mine, before, count in zip(table, past, new, strict=True)]
    # Slots that are nobody's: whoever reads one is found out.
    for slot in set(range(blocks * size)) - {slot for mine in owned for slot in mine}:
        keys[slot // size, :, slot % size] = values[slot // size, :, slot % size] = torch.nan
    q = torch.randn(sum(new), K * G, H, generator=generator).to(dtype)
    most = max(map(len, table))
    padded = torch.tensor([mine + [0] * (most - len(mine)) for mine in table], dtype=torch.int32)
    got = attend_pages(q, keys, values, padded, past, new, window)
    ends = [(mine, before + i + 1) for mine, before, count in zip(owned, past, new, strict=True)
            for i in range(count)]
    right = torch.stack([in_fp64(query, keys, values, mine[max(0, end - (window or end)):end])
                         for query, (mine, end) in zip(q, ends, strict=True)])
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), right, **KERNEL[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize(("K", "G", "H"), [(3, 3, 64), (2, 1, 10), (1, 4, 80)])
@pytest.mark.parametrize(("blocks", "size"), [(24, 16), (70, 5), (220, 1), (7, 64), (43, 7)])
def test_each_query_sees_its_own_tokens_and_no_others(blocks, size, K, G, H, window, dtype):
    table = scattered(blocks, size, LENGTHS)
    check(table, blocks, size, [length - 1 for length in LENGTHS], [1] * len(LENGTHS), K, G, H,
          window, dtype)


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(("blocks", "size"), [(64, 4), (48, 5), (190, 1), (43, 7)])
@pytest.mark.parametrize("lie", [scattered, in_order, forked])
def test_a_few_tokens_see_theirs_up_to_themselves_wherever_blocks_lie(lie, blocks, size, T, window):
    lengths = [length for length in LENGTHS if length >= T]
    past = [length - T for length in lengths]
    check(lie(blocks, size, lengths), blocks, size, past, [T] * len(past), 3, 2, 10, window,
          torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 11, 70])
@pytest.mark.parametrize(("K", "G", "H"), [(3, 3, 64), (2, 1, 10), (1, 4, 80)])
@pytest.mark.parametrize("size", [5, 16, 400])
def test_chunks_of_prompts_among_decodes_see_theirs_up_to_themselves(size, K, G, H, window, dtype):
    """A prompt from its first token, a chunk behind a past of more than a block of keys, one that
    ends within a block of queries, and decodes between."""
    past, new = [0, 40, 130, 7, 64, 0], [90, 1, 33, 2, 64, 17]
    lengths = [before + count for before, count in zip(past, new, strict=True)]
    blocks = sum(-(-length // size) for length in lengths) + 2
    check(scattered(blocks, size, lengths), blocks, size, past, new, K, G, H, window, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new", [1, 40])
def test_scores_of_thousands_that_differ_by_less_than_one_are_told_apart(new, dtype):
    """4096 and some for one query, as far below 0 for the next, and small ones for the third: 2^x
    is taken of their difference from the largest so far, which rises on the way."""
    S, size, H = 150, 16, 64
    keys, values = torch.zeros(2, 10, 1, size, H)
    text = torch.arange(10 * size).view(10, 1, size)
    keys[..., 0], keys[..., 1] = 64, text // 19
    values[...] = torch.randint(-64, 65, values.shape) / 64
    values[..., 0] = keys[..., 1] / 8
    q = torch.zeros(new, 3, H)
    q[:, :, :2] = torch.tensor([[64.0, 1], [-64, 1], [0, 1]])
    q, keys, values = (x.to(dtype) for x in (q, keys, values))
    got = attend_pages(q, keys, values, torch.arange(10).int()[None], [S - new], [new])
    right = torch.stack([in_fp64(query, keys, values, range(S - new + 1 + i))
                         for i, query in enumerate(q)])
    torch.testing.assert_close(got.double(), right, **KERNEL[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new", [1, 40])
def test_small_values_between_two_large_ones_are_summed_in_32_bits(new, dtype):
    """All weights are 1, and the values 2^15, then many times 1/64, then -2^15 at the place of the
    first query."""
    S, size, H = 150, 16, 64
    keys, values = torch.zeros(10, 1, size, H), torch.full((10, 1, size, H), 1 / 64)
    first = S - new
    values[0, 0, 0], values[first // size, 0, first % size] = 2**15, -2**15
    q = torch.ones(new, 3, H)
    got = attend_pages(*(x.to(dtype) for x in (q, keys, values)), torch.arange(10).int()[None],
                       [first], [new])
    right = [(S - new + i - 1) / 64 / (S - new + i + 1) for i in range(new)]
    torch.testing.assert_close(got[:, 0, 0].double(), torch.tensor(right, dtype=torch.float64),
                               rtol=4e-3, atol=0)


def test_pages_beyond_the_2_31st_number_are_found():
    """Only the tokens of the last block that are written to take memory."""
    pool = torch.empty(3, 1, -(-2**31 // 20), 10, dtype=torch.bfloat16)
    pool[2, 0, :5] = torch.randn(5, 10)
    q = torch.randn(1, 1, 10).bfloat16()
    got = attend_pages(q, pool, pool, torch.tensor([[2]], dtype=torch.int32), [4], [1])
    small = pool[2:, :, :5]
    torch.testing.assert_close(got[0].double(), in_fp64(q[0], small, small, range(5)),
                               **KERNEL[torch.bfloat16])


def test_heads_whose_block_has_no_room_on_the_stack_are_refused_by_the_compiler():
    """128 query heads of 256 to a KV head would take 5 MiB of the 8 that a thread has."""
    q, pool = torch.zeros(1, 128, 256), torch.zeros(1, 1, 4, 256)
    with pytest.raises(cpp.CompilerFailed, match="refused: .*the stack has no room for a block"):
        attend_pages(q, pool, pool, torch.zeros(1, 1, dtype=torch.int32), [0], [1])


def test_a_gpu_is_told_that_it_is_for_a_cpu():
    with pytest.raises(ValueError, match="backend='cpp': it is for a CPU, and this is cuda"):
        choose("cuda", "cpp")


def test_the_smallest_numbers_of_the_process_stay_what_they_are():
    """In a process of its own: what a library changes when it is loaded stays changed."""
    code = """if True:
        import torch
        from clawdemy_infer.fast.cpp_product import code
        code("fp32", torch.float32)
        print(float("3e-308") / 4 > 0)
    """
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip() == "True"


def test_what_is_compiled_goes_by_the_text_of_all_files_and_is_kept_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAWDEMY_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cpp"
    folder.mkdir()
    (folder / "half.h").write_text("const int HALF = N / 2;\n")
    (folder / "one.cpp").write_text('#include "half.h"\nextern "C" int half() { return HALF; }\n')
    monkeypatch.setattr(cpp, "FOLDER", folder)

    def load(name, **defines):
        cpp._library.cache_clear()
        return cpp.library(name, **defines)

    def kept():
        return len(list((tmp_path / "cache" / "cpp").glob("*.so")))

    try:
        assert load("one", N=10).half() == 5 and load("one", N=20).half() == 10
        assert kept() == 2 and load("one", N=10).half() == 5
        (folder / "half.h").write_text("const int HALF = N / 2 + 1;\n")
        assert load("one", N=10).half() == 6 and kept() == 3
        (folder / "half.h").write_text("const int HALF = ;\n")
        with pytest.raises(cpp.CompilerFailed, match="(?s)compile: .* refused: .*half.h"):
            load("one", N=10)
        assert kept() == 3 and not list((tmp_path / "cache" / "cpp").glob("unfinished/*.so"))
    finally:
        cpp._library.cache_clear()
