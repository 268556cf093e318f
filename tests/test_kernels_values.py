"""Every Triton kernel against plain PyTorch in fp64: in the interpreter without a GPU, on the
device with one."""

import importlib
import importlib.util
import inspect
from math import inf, nan

import pytest
import torch
from tolerances import KERNEL
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("triton", reason="there is no Triton for this system")

from clawdemy_kernels.decode_grouped import decode_grouped
from clawdemy_kernels.decode_int4 import decode_int4, decode_int4_reference
from clawdemy_kernels.decode_int8 import decode_int8, decode_int8_reference
from clawdemy_kernels.decode_naive import decode_naive, decode_reference
from clawdemy_kernels.decode_paged import decode_paged, decode_paged_reference
from clawdemy_kernels.decode_sinks import decode_sinks, decode_sinks_reference
from clawdemy_kernels.decode_split import decode_split
from clawdemy_kernels.linear_int4 import linear_int4, linear_int4_reference, pack_int4
from clawdemy_kernels.linear_int8 import linear_int8, linear_int8_reference
from clawdemy_kernels.prefill_paged import prefill_paged, prefill_paged_reference
from clawdemy_kernels.rms_norm import rms_norm, rms_norm_reference
from clawdemy_kernels.rope_append import rope_append, rope_append_reference
from clawdemy_kernels.sample import sample, sample_reference
from clawdemy_kernels.swiglu import swiglu, swiglu_reference
from clawdemy_kernels.verify import verify, verify_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MARGIN, CANARY = 64, 77
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# B, N, K, S, H: groups of 1 to 8, one token, a block of keys and one more, head dimensions that are
# no powers of two
ATTENTION = [(3, 6, 2, 70, 64), (1, 5, 5, 1, 80), (2, 8, 1, 65, 24), (2, 3, 3, 129, 128)]


def inside(shape, dtype, fill):
    """A tensor of this shape within a larger one full of canaries, its rows not one behind the
    other; and the larger one."""
    *outer, last = shape
    size = torch.Size(outer).numel() * (last + 16)
    whole = torch.full((MARGIN + size + MARGIN,), CANARY, device=DEVICE).to(dtype)
    part = whole[MARGIN:len(whole) - MARGIN].view(*outer, last + 16)[..., :last]
    part.copy_(fill)
    return part, whole


@pytest.fixture
def guarded(monkeypatch):
    """Whatever a launcher allocates lies among canaries. Call it to see that they are all alive."""
    allocated = []

    def allocate(shape, dtype):
        size = torch.Size(shape).numel()
        whole = torch.full((MARGIN + size + MARGIN,), CANARY, device=DEVICE).to(dtype)
        allocated.append((whole, size))
        return whole[MARGIN:MARGIN + size].view(tuple(shape))

    plain = torch.Tensor.new_empty

    def new_empty(tensor, *shape, dtype=None, **options):
        if options or shape == (0,):                            # the interpreter's own
            return plain(tensor, *shape, dtype=dtype, **options)
        if len(shape) == 1 and not isinstance(shape[0], int):
            shape = shape[0]
        return allocate(shape, dtype or tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda tensor: allocate(tensor.shape, tensor.dtype))

    def alive():
        assert allocated
        return all((whole[:MARGIN] == CANARY).all() and (whole[MARGIN + size:] == CANARY).all()
                   for whole, size in allocated)

    return alive


def normal(*shape, dtype):
    """Random numbers among canaries, with strides of their own."""
    return inside(shape, dtype, torch.randn(shape, device=DEVICE))[0]


def integers(low, high, shape, dtype):
    return inside(shape, dtype, torch.randint(low, high, shape, device=DEVICE))[0]


def int32(numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def lengths_of(B, S):
    """1, S and what lies between."""
    return int32([S, 1, *torch.randint(1, S + 1, (max(0, B - 2),)).tolist()][:B])


def pages(B, K, S, C, H, dtype):
    """A pool of blocks and a table that names them in no order; entries behind the last block would
    be found out. Values lie with the heads of a token together, as keys do not: their strides are
    their own."""
    most, blocks = -(-S // C), B * -(-S // C) + 2
    table = torch.randperm(blocks, device=DEVICE)[: B * most].view(B, most).int()
    k = normal(blocks, K, C, H, dtype=dtype)
    return k, normal(blocks, C, K, H, dtype=dtype).transpose(1, 2), table


def agree(got, wanted, dtype):
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted.double(), **KERNEL[dtype])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- the references themselves ----


@pytest.mark.parametrize("B, N, K, S, H", ATTENTION)
def test_the_reference_of_decode_is_torch_s_own_attention(B, N, K, S, H):
    q = torch.randn(B, N, H, dtype=torch.float64)
    k, v = torch.randn(2, B, K, S, H, dtype=torch.float64)
    lengths = lengths_of(B, S).cpu()
    for b, length in enumerate(lengths.tolist()):
        wanted = scaled_dot_product_attention(q[b:b + 1, :, None], k[b:b + 1, :, :length],
                                              v[b:b + 1, :, :length], enable_gqa=True)
        torch.testing.assert_close(decode_reference(q, k, v, lengths)[b], wanted[0, :, 0])


def test_the_reference_of_a_prefill_is_torch_s_causal_attention():
    q = torch.randn(9, 6, 16, dtype=torch.float64)
    k, v = torch.randn(2, 3, 2, 4, 16, dtype=torch.float64)
    table, starts, past = torch.tensor([[2, 0, 1]]), torch.tensor([0, 9]), torch.tensor([0])
    keys, values = (x[table[0]].transpose(0, 1).flatten(1, 2)[None, :, :9] for x in (k, v))
    wanted = scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, is_causal=True,
                                          enable_gqa=True)
    torch.testing.assert_close(prefill_paged_reference(q, k, v, table, starts, past),
                               wanted[0].transpose(0, 1))


# ---- attention ----


@pytest.mark.parametrize("B, N, K, S, H, dtype", [
    *((*shape, dtype) for shape in ATTENTION for dtype in FLOATS[:2]),
    (*ATTENTION[0], torch.float16)])
@pytest.mark.parametrize("kernel", [decode_naive, decode_grouped, decode_split],
                         ids=lambda kernel: kernel.__name__)
def test_decode_equals_fp64_and_writes_nothing_beside_its_output(guarded, kernel, B, N, K, S, H,
                                                                 dtype):
    q, k = normal(B, N, H, dtype=dtype), normal(B, S, K, H, dtype=dtype).transpose(1, 2)
    v, lengths = normal(B, K, S, H, dtype=dtype), lengths_of(B, S)
    options = {"parts": 3} if kernel is decode_split else {}
    agree(kernel(q, k, v, lengths, **options),
          decode_reference(q.double(), k.double(), v.double(), lengths), dtype)
    assert guarded()


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_sinks_are_seen_by_queries_that_were_turned_back_and_all_else_by_the_others(guarded, dtype):
    """Sequences with a full ring, with a few tokens behind the sinks, and with not even all the
    sinks."""
    B, N, K, S, H, sinks = 3, 6, 2, 90, 24, 5
    q, turned = normal(B, N, H, dtype=dtype), normal(B, N, H, dtype=dtype)
    k, v = normal(B, S, K, H, dtype=dtype).transpose(1, 2), normal(B, K, S, H, dtype=dtype)
    lengths = lengths_of(B, S)
    lengths[1:] = torch.tensor([9, 3])
    got = decode_sinks(q, turned, k, v, lengths, sinks, parts=2)
    for b, length in enumerate(lengths.tolist()):
        keys, values = (x[b, :, :length].double().repeat_interleave(N // K, 0)   # [N, length, H]
                        for x in (k, v))
        theirs = torch.where(torch.arange(length, device=DEVICE)[:, None] < sinks,
                             turned[b, :, None].double(), q[b, :, None].double())
        weights = ((theirs * keys).sum(-1) / H ** 0.5).softmax(-1)
        agree(got[b], (weights[..., None] * values).sum(1), dtype)
    wide = (x.double() for x in (q, turned, k, v))
    agree(got, decode_sinks_reference(*wide, lengths, sinks), dtype)
    assert guarded()


@pytest.mark.parametrize("C", [1, 7, 16, 64])
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_paged_decode_equals_fp64_for_any_block_size_and_window(guarded, C, window, dtype):
    B, N, K, S, H = 2, 6, 2, 70, 80
    q, (k, v, table) = normal(B, N, H, dtype=dtype), pages(B, K, S, C, H, dtype)
    lengths = lengths_of(B, S)
    wanted = decode_paged_reference(q.double(), k.double(), v.double(), table, lengths, window)
    agree(decode_paged(q, k, v, table, lengths, window, parts=2), wanted, dtype)
    assert guarded()


@pytest.mark.parametrize("dtype, window", [(torch.float32, None), (torch.bfloat16, None),
                                           (torch.float32, 30)])
def test_decode_on_8_bit_pages_equals_fp64_on_what_the_codes_stand_for(guarded, dtype, window):
    B, N, K, S, H, C = 2, 6, 2, 70, 80, 7
    _, _, table = pages(B, K, S, C, H, dtype)
    shape = (int(table.max()) + 1, K, C)
    k, v = (integers(-127, 128, (*shape, H), torch.int8) for _ in "kv")
    k_scale, v_scale = (inside(shape, torch.float16, torch.rand(shape, device=DEVICE) / 50)[0]
                        for _ in "kv")
    q, lengths = normal(B, N, H, dtype=dtype), lengths_of(B, S)
    wanted = decode_int8_reference(q.double(), k, k_scale, v, v_scale, table, lengths, window)
    got = decode_int8(q, k, k_scale, v, v_scale, table, lengths, parts=2, window=window)
    agree(got, wanted, dtype)
    assert guarded()


def test_a_sequence_of_one_block_is_read_as_a_cache_in_one_piece_is():
    q, k, v = torch.randn(2, 4, 16, device=DEVICE), *torch.randn(2, 5, 2, 12, 16, device=DEVICE)
    table, lengths = int32([[3], [0]]), int32([11, 1])
    wanted = decode_reference(*(x.double() for x in (q, k[[3, 0]], v[[3, 0]])), lengths)
    agree(decode_paged(q, k, v, table, lengths), wanted, torch.float32)


def nibbles(blocks, K, C, H, g):
    """Codes, scales and lowest values of 4-bit keys and values in `blocks` of C tokens, as
    `decode_int4` takes them."""
    made = []
    for groups in ((blocks, K, C // g, H), (blocks, K, C, H // g)):     # keys by channel, values
        codes = torch.randint(0, 256, (blocks, K, C, H // 2), dtype=torch.uint8, device=DEVICE)
        scale, low = torch.rand(2, *groups, device=DEVICE)              # by token
        made += [codes, (scale / 8).half(), -low.half()]
    return made


@pytest.mark.parametrize("C, H, g, window", [
    (32, 64, 32, None), (64, 128, 32, None), (96, 96, 16, None), (32, 80, 16, None),
    (64, 64, 64, 41), (32, 64, 16, 33), (32, 64, 16, 1)])
@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_decode_on_4_bit_keys_and_values_equals_fp64_on_what_the_codes_stand_for(
        guarded, C, H, g, window, dtype):
    """H = 80 in groups of 16 and H = 64 in groups of 64 have a group that lies in both halves of a
    head."""
    B, N, K, S = 2, 6, 2, 96
    most = -(-S // C)
    codes = nibbles(7, K, C, H, g)
    table = torch.randperm(7, device=DEVICE)[:B * most].view(B, most).int()
    q, lengths = normal(B, N, H, dtype=dtype), lengths_of(B, S - 1)
    wanted = decode_int4_reference(q.double(), *codes, table, lengths, window)
    agree(decode_int4(q, *codes, table, lengths, parts=2, window=window), wanted, dtype)
    assert guarded()


@pytest.mark.parametrize("window", [None, 8, 3])
def test_tokens_that_wait_unrounded_are_one_more_part_of_4_bit_attention(window):
    """One sequence has codes and a tail, the other a tail alone; each has its own tail of three, in
    no order."""
    B, N, K, H, g, W = 2, 4, 2, 64, 16, 9
    q, codes = normal(B, N, H, dtype=torch.float32), nibbles(3, K, g, H, g)
    tail_k, tail_v = torch.randn(2, 3, K, W, H, device=DEVICE)
    table, which, rounded, waiting = map(int32, ([[2, 1], [0, 0]], [2, 0], [19, 0], [4, 9]))
    got = decode_int4(q, *codes, table, rounded, tail=(tail_k, tail_v, which, waiting),
                      window=window)
    halves = [torch.cat((of & 15, of >> 4), -1).double() for of in (codes[0], codes[3])]
    keys = halves[0] * codes[1] + codes[2]          # [3, K, g, H], a scale for a channel of a block
    values = halves[1].unflatten(-1, (-1, g)) * codes[4][..., None] + codes[5][..., None]
    for b in range(B):
        seen = []
        for of, tail in ((keys, tail_k), (values.flatten(-2), tail_v)):
            own = of[table[b].long()].transpose(0, 1).flatten(1, 2)[:, :rounded[b]]
            text = torch.cat((own, tail[which[b], :, :waiting[b]]), dim=1)
            seen.append(text[None, :, -(window or 99):].double())
        length = (rounded + waiting)[b:b + 1].clamp(max=window or 99)
        agree(got[b:b + 1], decode_reference(q[b:b + 1].double(), *seen, length), torch.float32)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_a_chunk_over_pages_equals_fp64_beside_chunks_of_other_lengths(guarded, window, dtype):
    N, K, S, H, C = 6, 2, 60, 24, 7
    k, v, table = pages(3, K, S, C, H, dtype)
    starts, past = int32([0, 20, 21, 28]), int32([0, 50, 3])            # chunks of 20, 1 and 7
    q = normal(28, N, H, dtype=dtype)
    wanted = prefill_paged_reference(q.double(), k.double(), v.double(), table, starts, past,
                                     window)
    agree(prefill_paged(q, k, v, table, starts, past, max_seqlen_q=20, window=window, q_block=8),
          wanted, dtype)
    assert guarded()


@pytest.mark.parametrize("G, H, C", [(1, 64, 1), (2, 80, 16), (3, 128, 64), (4, 64, 7), (5, 80, 1),
                                     (6, 128, 32), (7, 64, 64), (8, 80, 33)])
def test_groups_of_1_to_8_heads_and_blocks_of_any_size_on_every_kernel_that_shares_a_read(G, H, C):
    """Two sequences, of 1 and of 37 tokens."""
    B, K, S, dtype = 2, 1, 37, torch.float32
    q, turned = normal(B, G, H, dtype=dtype), normal(B, G, H, dtype=dtype)
    k, v, table = pages(B, K, S, C, H, dtype)
    lengths, wide = int32([37, 1]), [x.double() for x in (q, k, v)]
    agree(decode_paged(q, k, v, table, lengths, parts=2),
          decode_paged_reference(*wide, table, lengths), dtype)
    starts, past = int32([0, 1, 2]), lengths - 1
    agree(prefill_paged(q, k, v, table, starts, past, max_seqlen_q=1),
          prefill_paged_reference(*wide, table, starts, past), dtype)
    codes = integers(-127, 128, k.shape, torch.int8)
    scale = (torch.rand(k.shape[:3], device=DEVICE) / 50).half()
    in8 = codes, scale, codes.flip(0).contiguous(), scale.flip(0), table, lengths
    agree(decode_int8(q, *in8, parts=2), decode_int8_reference(wide[0], *in8), dtype)
    k, v = normal(B, K, S, H, dtype=dtype), normal(B, S, K, H, dtype=dtype).transpose(1, 2)
    wide = wide[0], k.double(), v.double()
    agree(decode_grouped(q, k, v, lengths), decode_reference(*wide, lengths), dtype)
    agree(decode_split(q, k, v, lengths, parts=2), decode_reference(*wide, lengths), dtype)
    agree(decode_sinks(q, turned, k, v, lengths, 3),
          decode_sinks_reference(wide[0], turned.double(), *wide[1:], lengths, 3), dtype)
    if H != 80:                                     # half of which, 40, is not whole groups of 16
        in4 = *nibbles(5, K, 32, H, 32), int32([[3, 0], [1, 1]]), lengths
        agree(decode_int4(q, *in4, parts=2), decode_int4_reference(wide[0], *in4), dtype)


# ---- numbers that are hard on attention ----


def in_8_bits(x):
    """Codes and scales that are just x, where its numbers have few bits."""
    scale = x.float().abs().amax(-1).clamp(min=2**-14).log2().ceil().exp2() / 64
    return (x / scale[..., None]).round().to(torch.int8), scale.half()


def in_4_bits(x, dim):
    """Codes, scales and lowest values of x [1, 1, S, H], 16 neighbours along `dim` alike."""
    groups = x.float().unflatten(dim, (-1, 16))
    low, high = groups.aminmax(dim=dim)
    scale = ((high - low) / 15).half()
    codes = ((groups - low.unsqueeze(dim)) / scale.unsqueeze(dim).float().clamp(min=1e-9)).round()
    halves = codes.flatten(dim - 1, dim).to(torch.uint8).chunk(2, -1)
    return halves[0] | halves[1] << 4, scale, low.half()


ONE_BLOCK = int32([[0]])
HARD = {
    "decode_naive": decode_naive, "decode_grouped": decode_grouped,
    "decode_split": lambda *all: decode_split(*all, parts=1),
    "decode_sinks": lambda q, *rest: decode_sinks(q, q, *rest, sinks=1, parts=1),
    "decode_paged": lambda q, k, v, n: decode_paged(q, k, v, ONE_BLOCK, n, parts=1),
    "prefill_paged": lambda q, k, v, n: prefill_paged(q, k, v, ONE_BLOCK, int32([0, 1]), n - 1, 1),
    "decode_int8": decode_int8, "decode_int4": decode_int4,
}


def attended(kernel, q, k, v):
    """Of a kernel, and in fp64 of the same numbers or codes: queries [1, N, H] on one sequence
    [1, 1, S, H]."""
    lengths = int32([k.shape[2]])
    if kernel == "decode_int8":
        codes = *in_8_bits(k), *in_8_bits(v), ONE_BLOCK, lengths
        return decode_int8(q, *codes, parts=1), decode_int8_reference(q.double(), *codes)
    if kernel == "decode_int4":
        codes = *in_4_bits(k, -2), *in_4_bits(v, -1), ONE_BLOCK, lengths
        return decode_int4(q, *codes, parts=1), decode_int4_reference(q.double(), *codes)
    wanted = decode_reference(q.double(), k.double(), v.double(), lengths)
    return HARD[kernel](q, k, v, lengths), wanted


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kernel", HARD)
def test_scores_of_thousands_that_differ_by_less_than_one_are_told_apart(kernel, dtype):
    """One query's scores are 4096 and some, too large for 2^x, and the other's as far below 0: what
    is exponentiated is their difference from the largest so far, which rises from block to block.
    In 16 bits they would be all alike."""
    S, H = 144, 32
    q, k = torch.zeros(1, 2, H, device=DEVICE), torch.zeros(1, 1, S, H, device=DEVICE)
    q[0, 0, :2], q[0, 1, :2] = torch.tensor([64.0, 1]), torch.tensor([-64.0, 1])
    k[..., 0], k[..., 1] = 64, torch.arange(S, device=DEVICE) // 18
    v = torch.randint(-64, 65, (1, 1, S, H), device=DEVICE) / 64
    v[..., 0] = k[..., 1] / 8
    got, wanted = attended(kernel, *(x.to(dtype) for x in (q, k, v)))
    agree(got, wanted, dtype)
    alike = v.mean(2).to(wanted.dtype)
    assert not torch.allclose(wanted, alike.expand_as(wanted), **KERNEL[dtype])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kernel", HARD)
def test_small_values_between_two_large_ones_are_summed_in_32_bits(kernel, dtype):
    """All weights are 1, and the values 2^15, then 142 times 1/64, then -2^15: a sum in 16 bits
    would lose all that is small on its way."""
    S, H = 144, 32
    k, v = torch.zeros(1, 1, S, H, device=DEVICE), torch.full((1, 1, S, H), 1 / 64, device=DEVICE)
    v[:, :, 0], v[:, :, -1] = 2**15, -2**15
    got, _ = attended(kernel, *(x.to(dtype) for x in (torch.ones(1, 2, H, device=DEVICE), k, v)))
    wanted = torch.full((1, 2, H), 142 / 64 / 144, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(got.double(), wanted, rtol=4e-3, atol=0)


@pytest.mark.parametrize("kernel", HARD)
def test_sums_of_values_may_be_beyond_fp16_where_their_mean_is_not(kernel):
    """144 times 1024 is; parts of a sequence hand on such sums."""
    q, k = torch.ones(1, 2, 32, device=DEVICE).half(), torch.zeros(1, 1, 144, 32, device=DEVICE)
    got, _ = attended(kernel, q, k.half(), torch.full_like(k, 1024).half())
    torch.testing.assert_close(got, torch.full_like(got, 1024))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kernel", HARD)
def test_what_an_attention_sink_leaves_to_the_others_is_not_lost(kernel, dtype):
    """The first token takes all attention but some 1e-5 a token, and has nothing to say (Xiao et
    al. 2023): what comes out is of the others."""
    S, H = 144, 32
    q, k = torch.randn(1, 2, H, device=DEVICE) / 3, torch.randn(1, 1, S, H, device=DEVICE) / 3
    q[..., 0], k[..., 0] = 8, 0
    k[:, :, 0, 0] = 12 * H**0.5 / 8
    v = torch.randn(1, 1, S, H, device=DEVICE) / 5
    v[:, :, 0] = 0
    got, wanted = attended(kernel, *(x.to(dtype) for x in (q, k, v)))
    assert 0 < wanted.abs().max() < 1e-3
    assert (got.double() - wanted).abs().max() < 0.02 * wanted.abs().max()


# ---- what lies between the products ----


@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norm_with_and_without_a_residual_equals_fp64(guarded, dtype):
    x, weight = normal(3, 70, dtype=dtype), normal(1, 70, dtype=dtype)[0]
    agree(rms_norm(x, weight, 0.5), rms_norm_reference(x.double(), weight.double(), 0.5), dtype)
    residual, whole = inside((3, 70), dtype, torch.randn(3, 70, device=DEVICE))
    wanted_residual = residual.double()
    wanted = rms_norm_reference(x.double(), weight.double(), 1e-5, wanted_residual)
    agree(rms_norm(x, weight, 1e-5, residual), wanted, dtype)
    agree(residual, wanted_residual, dtype)
    assert guarded() and (whole.view(-1)[MARGIN:-MARGIN].view(3, 86)[:, 70:] == CANARY).all()


@pytest.mark.parametrize("F", [5, 1030])
@pytest.mark.parametrize("dtype", FLOATS)
def test_swiglu_equals_fp64(guarded, F, dtype):
    x = normal(3, 2 * F, dtype=dtype)
    agree(swiglu(x), swiglu_reference(x.double()), dtype)
    assert guarded()


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_rope_and_append_turn_queries_and_keys_and_write_their_slots_only(guarded, dtype):
    M, N, K, H, C = 5, 6, 2, 24, 7
    qkv, angles = normal(M, N + 2 * K, H, dtype=dtype), 6 * torch.rand(M, H // 2, device=DEVICE)
    slots = torch.tensor([27, 0, 3, 9, 8], device=DEVICE)
    empty = torch.zeros(4, K, C, H, device=DEVICE)
    (k, whole_k), (v, whole_v) = (inside(empty.shape, dtype, empty) for _ in "kv")
    wanted_k, wanted_v, cos, sin = k.double(), v.double(), angles.cos(), angles.sin()
    wanted = rope_append_reference(qkv.double(), cos.double(), sin.double(), slots, wanted_k,
                                   wanted_v)
    agree(rope_append(qkv, cos, sin, slots, k, v), wanted, dtype)
    agree(k, wanted_k, dtype)
    agree(v, wanted_v, dtype)
    assert guarded()
    for whole in (whole_k, whole_v):
        assert (whole == CANARY).sum() == len(whole) - 4 * K * C * H


# ---- products ----


@pytest.mark.parametrize("M", [1, 17])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_linear_layer_of_8_bits_equals_fp64_on_what_the_codes_stand_for(guarded, M, dtype):
    x, codes = normal(M, 150, dtype=dtype), integers(-127, 128, (70, 150), torch.int8)
    scales = torch.rand(70, device=DEVICE) / 1000
    agree(linear_int8(x, codes, scales), linear_int8_reference(x.double(), codes, scales), dtype)
    assert guarded()


@pytest.mark.parametrize("M, K, g", [(1, 192, 64), (17, 96, 32), (2, 1024, 64)])
@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_a_linear_layer_of_4_bits_equals_fp64_on_what_the_codes_stand_for(guarded, M, K, g, dtype):
    x, codes = normal(M, K, dtype=dtype), torch.randint(0, 16, (70, K), device=DEVICE)
    scales = (torch.rand(K // g, 70, device=DEVICE) / 100).half()
    zeros = torch.randint(0, 16, (K // g, 70), device=DEVICE).half()
    got = linear_int4(x, pack_int4(codes, g), scales, zeros)
    agree(got, linear_int4_reference(x.double(), codes, scales, zeros), dtype)
    assert guarded()


@pytest.mark.parametrize("dtype", FLOATS)
def test_small_terms_of_a_product_between_two_large_ones_are_summed_in_32_bits(dtype):
    """2^15, then some hundred times 1/64, then -2^15."""
    x = torch.full((1, 384), 1 / 64, device=DEVICE).to(dtype)
    x[0, 0] = x[0, -1] = x[0, 95] = 2**15
    codes = torch.ones(32, 384, dtype=torch.int8, device=DEVICE)
    codes[:, [95, 383]] = torch.tensor([0, -1], dtype=torch.int8, device=DEVICE)
    in8 = linear_int8(x, codes, torch.ones(32, device=DEVICE))
    codes[:, 95] = -1
    zeros = torch.full((3, 32), 8.0, device=DEVICE).half()
    in4 = linear_int4(x[:, :96].contiguous(), pack_int4(codes[:, :96] + 8, 32),
                      torch.ones_like(zeros), zeros)
    for got, count in ((in8, 384 - 3), (in4, 96 - 2)):
        torch.testing.assert_close(got.double(), torch.full_like(got, count / 64).double(),
                                   rtol=4e-3, atol=0)


def test_the_squares_of_a_norm_may_be_beyond_fp16():
    """1000^2 is, and so is the sum of 70 of them."""
    x = torch.full((2, 70), 1000.0, device=DEVICE).half()
    x[1, ::2] = -1000
    got = rms_norm(x, torch.ones(70, device=DEVICE).half(), 1e-5)
    torch.testing.assert_close(got, x.sign())


# ---- sampling ----


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_sampling_draws_the_token_that_inversion_in_fp64_draws(guarded, temperature):
    logits, uniform = 3 * torch.randn(12, 2500, device=DEVICE), torch.rand(12, device=DEVICE)
    logits[:6, 5:1500] = -torch.inf                 # half of them filtered,
    logits[0, 1:] = -torch.inf                      # and a row with one token left
    uniform[1:3], uniform[6:] = torch.tensor([0, 1 - 2**-24]), torch.linspace(0.05, 0.99, 6)
    assert torch.equal(sample(logits, uniform, temperature),
                       sample_reference(logits, uniform, temperature))
    assert guarded()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_that_leaves_nothing_to_choose_gives_no_token(temperature):
    logits = torch.randn(6, 2100, device=DEVICE)
    logits[1, 1500], logits[2, 3], logits[3], logits[5, 7] = nan, inf, -inf, -inf
    uniform = torch.rand(6, device=DEVICE)
    got = sample(logits, uniform, temperature)
    assert got.tolist() == sample_reference(logits, uniform, temperature).tolist()
    assert got[[1, 2, 3]].tolist() == [-1] * 3 and (got[[0, 4, 5]] >= 0).all()


@pytest.mark.parametrize("lost", [nan, inf])
def test_slots_behind_a_sequence_do_not_matter_and_its_own_are_never_passed_over(lost):
    """To every kernel of attention: what lies behind is NaN or infinite, and what comes out is what
    came out before. One such key of its own, and what comes out is NaN."""
    B, N, K, S, H, C = 2, 4, 2, 40, 32, 16
    q, turned = torch.randn(2, B, N, H, device=DEVICE)
    clean = torch.randn(2, B, K, S + 8, H, device=DEVICE)
    table, lengths, starts = int32([[1, 2, 3], [4, 5, 6]]), int32([S, 19]), int32([0, 1, 2])
    paged = torch.randn(2, 8, K, C, H, device=DEVICE)
    halves = [(torch.rand(2, 8, K, C, device=DEVICE) / 50).half() for _ in "kv"]
    codes = torch.randint(-127, 128, (2, 8, K, C, H), dtype=torch.int8, device=DEVICE)
    behind = torch.arange(S + 8, device=DEVICE) >= lengths[:, None]             # [B, S + 8]
    free = torch.ones(8, C, dtype=torch.bool, device=DEVICE)                    # [blocks, C]
    for blocks, length in zip(table.tolist(), lengths.tolist(), strict=True):
        for token in range(length):
            free[blocks[token // C], token % C] = False

    def out(fill, own=None):
        plain, pages, scales = (x.clone() for x in (clean, paged, torch.stack(halves)[:, 0]))
        if fill is not None:
            plain.masked_fill_(behind[:, None, :, None], fill)
            pages.masked_fill_(free[:, None, :, None], fill)
            scales.masked_fill_(free[:, None], fill)
        if own is not None:
            plain[0, 0, :, 3, 5] = pages[0, 1, :, 3, 5] = scales[0, 1, :, 3] = own
        return [decode_naive(q, *plain, lengths), decode_grouped(q, *plain, lengths),
                decode_split(q, *plain, lengths, parts=3),
                decode_sinks(q, turned, *plain, lengths, 4, parts=2),
                decode_paged(q, *pages, table, lengths, parts=2),
                prefill_paged(q, *pages, table, starts, lengths - 1, max_seqlen_q=1),
                decode_int8(q, codes[0], scales[0], codes[1], scales[1], table, lengths, parts=2)]

    for was, now, hurt in zip(out(None), out(lost), out(None, nan), strict=True):
        assert was.isfinite().all() and torch.equal(was, now)
        assert hurt[0].isnan().all() and torch.equal(hurt[1], was[1])


def test_of_equals_greedy_takes_the_first_and_a_point_on_a_border_belongs_to_the_second_piece():
    """A half of four equal weights: the first two make just that half, and what is drawn must be
    equally likely for all."""
    nothing = torch.zeros(1, device=DEVICE)
    assert sample(torch.zeros(1, 2500, device=DEVICE), nothing, 0.0).tolist() == [0]
    points = torch.tensor([0, 0.25, 0.5, 0.75], device=DEVICE)
    assert sample(torch.zeros(4, 4, device=DEVICE), points).tolist() == [0, 1, 2, 3]


def test_verification_accepts_and_draws_what_the_algorithm_in_fp64_does():
    B, T, V = 30, 3, 2500
    p = torch.softmax(2 * torch.randn(B, T + 1, V, device=DEVICE), -1)
    q = torch.softmax(p[:, :T].log() + torch.randn(B, T, V, device=DEVICE) / 2, -1)
    drafted = torch.multinomial(q.view(-1, V), 1).view(B, T)
    uniform = torch.rand(B, T + 1, device=DEVICE)
    accepted, token = verify(p, q, drafted, uniform)
    wanted = verify_reference(p.cpu(), q.cpu(), drafted.cpu(), uniform.cpu())
    assert (accepted.tolist(), token.tolist()) == (wanted[0].tolist(), wanted[1].tolist())
    assert set(accepted.tolist()) == {0, 1, 2, 3}
    # A draft that was certain of each, of which some are shorter.
    counts = torch.arange(B, device=DEVICE) % (T + 1)
    q = torch.nn.functional.one_hot(drafted, V).float()
    certain, token = verify(p, None, drafted, uniform, counts)
    for b, count in enumerate(counts.tolist()):
        own = torch.cat((uniform[b:b + 1, :count], uniform[b:b + 1, T:]), 1)
        wanted = verify_reference(*(x.cpu() for x in (
            p[b:b + 1, :count + 1], q[b:b + 1, :count], drafted[b:b + 1, :count], own)))
        assert (certain[b].item(), token[b].item()) == (wanted[0].item(), wanted[1].item()), b
    assert accepted.tolist() != certain.tolist()


def test_verification_never_accepts_what_the_target_excludes_and_draws_where_no_residual_is_left():
    p = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]], device=DEVICE)
    drafted, nothing = torch.tensor([[0]], device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    assert [x.item() for x in verify(p, p[:, 1:], drafted, nothing)] == [0, 1]  # p = 0 and u = 0
    almost = torch.tensor([[[0.5, 0.5, 0.0]]], device=DEVICE)
    p, q = torch.cat((almost, almost), 1), almost.nextafter(torch.ones_like(almost))
    sure = torch.tensor([[1 - 2**-24, 0.75]], device=DEVICE)
    accepted, token = verify(p, q * 1.001, drafted, sure)
    assert (accepted.item(), token.item()) == (0, 1)    # max(0, p - q) is 0 everywhere: from p


# ---- the interpreter's trap ----


def far(x):
    """The same numbers, but the third of the first dimension begins 2^31 numbers on. Only the pages
    that are touched take memory."""
    x = x.contiguous()
    room = torch.empty(2**31 + x[0].numel(), dtype=x.dtype, device=DEVICE)
    made = room.as_strided(x.shape, (2**30, *x[0].stride()))
    made[:] = x
    return made


def rope_appended(qkv, angles, slots, pool):
    """Turned queries, and the keys and values that were put to these slots of a pool."""
    values = pool.clone() if pool.is_contiguous() else far(pool)
    return (rope_append(qkv, angles, angles, slots, pool, values), pool.contiguous(),
            values.contiguous())


@pytest.mark.parametrize("name", [
    "swiglu", "rms_norm", "linear_int8", "linear_int4", "sample", "verify", "rope_append",
    "decode_naive", "decode_grouped", "decode_split", "decode_sinks", "decode_paged", "decode_int8",
    "decode_int4", "prefill_paged"])
def test_numbers_beyond_the_2_31st_are_found(name):
    """Where an offset is a product of 32-bit numbers it wraps round, and the kernel reads what lies
    elsewhere."""
    x, q = normal(3, 64, dtype=torch.half), normal(3, 1, 16, dtype=torch.half)
    codes = torch.randint(-9, 9, (3, 64), device=DEVICE).to(torch.int8)
    pool = normal(3, 1, 8, 16, dtype=torch.half)
    whole, ones = (9 * pool).to(torch.int8), torch.ones(3, 1, 8, dtype=torch.half, device=DEVICE)
    table, lengths = int32([[2], [0], [1]]), int32([7, 7, 5])
    p = torch.softmax(torch.randn(3, 2, 8, device=DEVICE), -1)
    drafted, slots = torch.tensor([[1], [2], [3]], device=DEVICE), int32([1, 9, 17]).long()
    fours = nibbles(3, 1, 16, 32, 16)
    run = {
        "verify": lambda of: verify(of(p), of(p[:, :1].roll(1, -1)), drafted,
                                    p[0, 0, :6].view(3, 2).contiguous()),
        "rope_append": lambda of: rope_appended(of(normal(3, 3, 16, dtype=torch.half)),
                                                p[:, 0].contiguous(), slots, of(pool.clone())),
        "decode_naive": lambda of: decode_naive(q, of(pool), of(pool), lengths),
        "decode_split": lambda of: decode_split(q, of(pool), of(pool), lengths, parts=1),
        "decode_sinks": lambda of: decode_sinks(q, q, of(pool), of(pool), lengths, 2, parts=1),
        "decode_int4": lambda of: decode_int4(normal(3, 1, 32, dtype=torch.half),
                                              of(fours[0]), *fours[1:3], of(fours[3]), *fours[4:],
                                              table, lengths, parts=1),
        "prefill_paged": lambda of: prefill_paged(of(q), of(pool), of(pool), table,
                                                  int32([0, 1, 2, 3]), lengths - 1, 1),
        "swiglu": lambda of: swiglu(of(x)),
        "rms_norm": lambda of: rms_norm(of(x), x[0], 1e-5),
        "linear_int8": lambda of: linear_int8(x, of(codes), torch.ones(3, device=DEVICE)),
        "linear_int4": lambda of: linear_int4(x[:, :64], of(codes[:, :32].to(torch.uint8)),
                                              *[x[:2, :3].contiguous()] * 2),
        "sample": lambda of: sample(of(x), torch.full((3,), 0.4, device=DEVICE)),
        "decode_grouped": lambda of: decode_grouped(q, of(pool), of(pool), lengths),
        "decode_paged": lambda of: decode_paged(q, of(pool), of(pool), table, lengths),
        "decode_int8": lambda of: decode_int8(q, of(whole), ones, of(whole), ones, table, lengths),
    }[name]
    beyond, wanted = (torch.manual_seed(1) and run(of) for of in (far, lambda near: near))
    torch.testing.assert_close(beyond, wanted)


def test_a_product_of_bf16_multiplies_numbers_and_not_their_bits(monkeypatch):
    """What our `_create_dot` is there for. Is the plain one right one day, this test says so, and
    it can go."""
    if DEVICE == "cuda":
        pytest.skip("a GPU multiplies numbers")
    from clawdemy_kernels import launch

    q, (k, v) = torch.randn(1, 2, 16).bfloat16(), torch.randn(2, 1, 1, 20, 16).bfloat16()
    lengths = torch.tensor([20], dtype=torch.int32)
    wanted = decode_reference(q.double(), k.double(), v.double(), lengths)
    agree(decode_grouped(q, k, v, lengths), wanted, torch.bfloat16)
    monkeypatch.setattr(launch.interpreter.InterpreterBuilder, "create_dot",
                        launch._create_dot.__kwdefaults__["plain"])
    bits = decode_grouped(q, k, v, lengths)
    assert not torch.allclose(bits.double(), wanted, **KERNEL[torch.bfloat16])


# ---- these tests can fail ----


def mutant(name, tmp_path, old, new):
    """The kernel `name` with one piece of its source changed."""
    source = inspect.getsource(importlib.import_module(f"clawdemy_kernels.{name}"))
    assert source.count(old) >= 1
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return getattr(made, name)


@pytest.mark.parametrize("old, new", [("s < length", "s <= length"), ("n // G", "n % G"),
                                      ("range(0, length,", "range(0, length - 1,")])
def test_a_planted_slip_in_a_mask_a_bound_or_a_head_is_caught(tmp_path, old, new):
    B, N, K, S, H = 2, 6, 2, 65, 24
    q, lengths = normal(B, N, H, dtype=torch.float32), lengths_of(B, S)
    k, v = (normal(B, K, S + 1, H, dtype=torch.float32) for _ in "kv")
    wanted = decode_reference(q.double(), k.double(), v.double(), lengths)
    got = mutant("decode_naive", tmp_path, old, new)(q, k, v, lengths)
    assert not torch.allclose(got.double(), wanted, **KERNEL[torch.float32])


def test_a_planted_store_beside_the_output_is_caught(guarded, tmp_path):
    x = normal(3, 70, dtype=torch.float32)
    store = ".to(out.dtype.element_ty), mask=f "
    mutant("swiglu", tmp_path, store + "< F", store + "<= F")(x)
    assert not guarded()


# ---- errors ----


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 5, 16)}, "N=5 heads and k has K=2"),
        ({"q": torch.zeros(2, 16)}, r"q is \[2, 16\]: \[any, any, any\] is accepted"),
        ({"k": torch.zeros(2, 2, 9, 8)}, r"k is \[2, 2, 9, 8\]: \[any, any, any, 16\]"),
        ({"v": torch.zeros(2, 2, 8, 16)}, r"v is \[2, 2, 8, 16\]: \[2, 2, 9, 16\]"),
        ({"k": torch.zeros(2, 2, 9, 16, dtype=torch.half)}, "k is of torch.float16: torch.float32"),
        ({"seq_lens": torch.zeros(2, dtype=torch.int64)}, "seq_lens is of torch.int64"),
        ({"v": torch.zeros(2, 2, 16, 9).transpose(2, 3)}, "v has strides .*: the last must be 1"),
        ({"q": torch.zeros(0, 4, 16)}, "q is .*: it is empty"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name_before_the_launch(change, message):
    given = {"q": torch.zeros(2, 4, 16), "k": torch.zeros(2, 2, 9, 16),
             "v": torch.zeros(2, 2, 9, 16), "seq_lens": torch.ones(2, dtype=torch.int32)}
    given = {name: tensor.to(DEVICE) for name, tensor in (given | change).items()}
    with pytest.raises(ValueError, match=message):
        decode_grouped(**given)


def of(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, device=DEVICE)


def whole(*shape):
    return of(*shape, dtype=torch.int32)


Q, Q4, KEYS, POOL = of(1, 2, 16), of(1, 2, 32), of(1, 1, 9, 16), of(3, 1, 4, 16)
CODES, HALVES = of(2, 1, 32, 16, dtype=torch.uint8), of(2, 1, 2, 32, dtype=torch.half)
BY_TOKEN, GROUPS = HALVES.view(2, 1, 32, 2), of(2, 4, dtype=torch.half)
REST = HALVES, HALVES, CODES, BY_TOKEN, BY_TOKEN, whole(1, 1), whole(1)


@pytest.mark.parametrize("launch, message", [
    (lambda: decode_split(Q, KEYS, KEYS, whole(1), parts=0), "parts=0: 1 or more"),
    (lambda: decode_sinks(Q, Q, KEYS, KEYS, whole(1), sinks=9), "sinks=9: 1 to 8 of the 9 tokens"),
    (lambda: decode_sinks(Q, Q4, KEYS, KEYS, whole(1), sinks=2),
     r"turned is \[1, 2, 32\]: \[1, 2, 16\]"),
    (lambda: decode_paged(Q, POOL, POOL, whole(2, 1), whole(1)),
     r"block_table is \[2, 1\]: \[1, any\]"),
    (lambda: decode_int8(Q, POOL, POOL, POOL, POOL, whole(1, 2), whole(1)),
     "k is of torch.float32: torch.int8"),
    (lambda: decode_int4(of(1, 2, 64), CODES, *REST), r"k is .*: \[any, any, any, 32\]"),
    (lambda: decode_int4(Q4, CODES[:, :, :8], *REST),
     "groups of 16, 32, 64 ... that divide a block"),
    (lambda: decode_int4(Q4, CODES.repeat(1, 1, 1, 2)[..., :16], *REST),
     "v has strides .*, those of its twin"),
    (lambda: prefill_paged(Q, POOL, POOL, whole(1, 2), whole(1), whole(1), 4),
     r"cu_seqlens_q is \[1\]: \[2\]"),
    (lambda: rms_norm(of(2, 8), of(9), 1e-5), r"weight is \[9\]: \[8\]"),
    (lambda: rope_append(of(2, 4, 16), of(2, 8), of(2, 8), of(2, dtype=torch.int64),
                         of(3, 2, 4, 16), of(3, 2, 4, 16)), "a multiple of K=2 query heads"),
    (lambda: swiglu(of(2, 7)), "an even number of columns"),
    (lambda: linear_int8(of(1, 8), of(4, 8), of(4)), "codes is of torch.float32: torch.int8"),
    (lambda: linear_int4(of(1, 96), of(4, 48, dtype=torch.uint8), GROUPS, GROUPS),
     "groups of a power of 2 from 32 on"),
    (lambda: pack_int4(of(4, 64), 16), "group=16: powers of 2 from 32 on"),
    (lambda: sample(of(2, 8), of(3)), r"uniform is \[3\]: \[2\]"),
    (lambda: sample(of(2, 8), of(2), -1.0), "temperature=-1.0"),
    (lambda: verify(of(1, 2, 8), of(1, 2, 8), of(1, 1, dtype=torch.int64), of(1, 2)),
     r"q is \[1, 2, 8\]: \[1, 1, 8\]"),
])
def test_every_launcher_says_what_does_not_fit(launch, message):
    with pytest.raises(ValueError, match=message):
        launch()
