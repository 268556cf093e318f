"""The bytes that kernels ask for, counted in the interpreter, are those of the envelope: to the
byte."""


import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this system")

from clawdemy_infer.arithmetic import MLP, Attention, ModelShape, Pass, Work, matmul
from clawdemy_kernels import checks
from clawdemy_kernels.blocks import using
from clawdemy_kernels.decode_grouped import decode_grouped
from clawdemy_kernels.decode_int4 import decode_int4
from clawdemy_kernels.decode_int8 import decode_int8
from clawdemy_kernels.decode_naive import decode_naive
from clawdemy_kernels.decode_paged import decode_paged
from clawdemy_kernels.decode_split import decode_split
from clawdemy_kernels.examples import GROUP, PARTS, SMALL
from clawdemy_kernels.launch import INTERPRETED, tl, triton
from clawdemy_kernels.linear_int4 import linear_int4
from clawdemy_kernels.linear_int8 import linear_int8
from clawdemy_kernels.prefill_paged import prefill_paged
from clawdemy_kernels.rms_norm import rms_norm
from clawdemy_kernels.rope_append import rope_append
from clawdemy_kernels.sample import sample
from clawdemy_kernels.swiglu import swiglu
from clawdemy_kernels.traffic import counting
from clawdemy_kernels.verify import verify

if not INTERPRETED:
    pytest.skip("kernels are compiled here; with TRITON_INTERPRET=1 they are interpreted and "
                "counted", allow_module_level=True)

B, N, K, H = 3, 6, 2, 64
LENGTHS = [5, 150, 77]
S = sum(LENGTHS)


def problem(dtype=torch.float32):
    k, v = torch.randn(2, B, K, max(LENGTHS), H).to(dtype)
    return torch.randn(B, N, H).to(dtype), k, v, torch.tensor(LENGTHS, dtype=torch.int32)


def test_every_kernel_asks_for_what_its_envelope_says_to_the_byte():
    """All tensors together, outputs and partial results and tables among them: the traffic table of
    `bench --kernels`."""
    rows = checks.traffic(torch.float32)
    assert len(rows) == 15
    for row in rows:
        assert row["asked"] == row["envelope"] and row["distinct"] <= row["asked"], row
        # No layout drags in what it does not ask for.
        assert row["sectors"] <= 1.2 * row["asked"], row


@pytest.mark.parametrize("dtype, e", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_naive_kernel_asks_for_the_cache_once_for_each_query_head_of_a_group(dtype, e):
    q, k, v, lengths = problem(dtype)
    with counting(q=q, k=k, v=v) as traffic:
        decode_naive(q, k, v, lengths)
    assert traffic["k"].asked == traffic["v"].asked == S * N * H * e
    assert traffic["k"].distinct == traffic["v"].distinct == S * K * H * e
    assert traffic["q"].asked == traffic["q"].distinct == B * N * H * e
    assert traffic.flops == 0                                           # it needs no tensor cores


@pytest.mark.parametrize("dtype, e", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_grouped_kernel_asks_for_the_cache_once_and_pads_its_group_to_16_rows(dtype, e):
    q, k, v, lengths = problem(dtype)
    with counting(q=q, k=k, v=v) as traffic:
        decode_grouped(q, k, v, lengths)
    assert traffic["k"].asked == traffic["k"].distinct == traffic["k"].sectors == S * K * H * e
    assert traffic["q"].asked == B * N * H * e
    block = 128 // e
    padded = sum(-(-length // block) * block for length in LENGTHS)
    assert traffic.flops == 2 * 2 * K * 16 * padded * H     # two products, 16 rows for a group of 3


def test_arithmetic_and_the_counter_agree_on_the_cache_s_bytes():
    """A model of one layer with these heads: what `ModelShape` says a decode step reads is what the
    kernel asked for."""
    q, k, v, lengths = problem(torch.bfloat16)
    shape = ModelShape(name="one layer", D=N * H, F=4 * N * H, N=N, K=K, H=H, L=1, V=100, tied=True)
    with counting(k=k, v=v) as traffic:
        decode_grouped(q, k, v, lengths)
    assert traffic["k"].asked + traffic["v"].asked == S * shape.kv_bytes_per_token("bf16")


def test_arithmetic_and_the_counter_agree_to_the_byte_on_every_kernel():
    """What the envelope of the course says that an operation moves, and what a kernel asks for
    beside it, and why."""
    B, S, M, _, D, F, N, K, H, *_ = vars(SMALL).values()
    e = 2
    def attend(run: Pass) -> Work:
        return Attention(D, N, K, H).of_sequences(run)[0]

    decode = Pass(B, 1, S)                                          # all in bf16
    again = B * N * H * e                                           # the queries once more
    parts = 2 * PARTS * B * N * (H + 2) * 4                         # partial results, both ways
    split = (PARTS - 1) * again + parts + 4 * B * K * PARTS         # a program asks for its length
    table = 4 * K * B * S
    seen = [S - M + min(at + 16, M) for at in range(0, M, 16)]      # by the last token of each tile
    chunk = Pass(1, M, S)
    wanted = {
        "decode_naive": attend(decode._replace(shared=False)).bytes + 4 * B * N,
        "decode_grouped": attend(decode).bytes + 4 * B * K,
        "decode_split": attend(decode).bytes + split,
        "decode_sinks": attend(decode).bytes + split + again + parts / PARTS + 4 * B * K,
        "decode_paged": attend(decode).bytes + split + table,
        "decode_int8": attend(decode._replace(kv=1 + 2 / H)).bytes + split + table,
        "decode_int4": attend(decode._replace(kv=1 / 2 + 4 / GROUP)).bytes + split + table // GROUP,
        "prefill_paged": (attend(chunk).bytes + (sum(seen) - S) * 2 * K * H * e
                          + 4 * K * sum(seen) + 12 * K * len(seen)),
        # A norm and a sum apart move 2 and 3 times the residual stream; fused they spare one read,
        # and read the weights for each row.
        "rms_norm": (Pass(1, M, M).elementwise("norm and sum", (2 + 3 - 1) * M * D).bytes
                     + M * D * e),
        "swiglu": MLP(D, F).activation(chunk, M).bytes,
        # Beside queries and keys the kernel moves the values; cos and sin are fp32, slots 8 bytes.
        "rope_append": (chunk.elementwise("rope", 2 * M * (N + K) * H + 2 * M * K * H).bytes
                        + M * (N + K) * H * 4 + 8 * M * 2 * K),
        # Every 32 outputs read the row anew; int4 leaves sums in fp32 and rounds them later.
        "linear_int8": (matmul(1, D, D, weights=1 + 4 / D, activations="bf16").bytes
                        + (D // 32 - 1) * D * e),
        "linear_int4": (matmul(1, D, D, weights=1 / 2 + 4 / 64, activations="bf16").bytes
                        + (D // 32 - 1) * D * e + (4 - e) * D),
    }
    counted = {row["kernel"]: row["asked"] for row in checks.traffic() if row["kernel"] in wanted}
    assert counted == wanted


def test_a_group_of_3_padded_to_16_rows_does_5_7_times_its_own_work():
    """Counted by hand: 16 rows for 3, and 304 tokens in blocks of 16 for 282."""
    N, K, H, lengths = 9, 3, 64, torch.tensor([5, 200, 77], dtype=torch.int32)
    pool, table = torch.zeros(2, 39, K, 16, H), torch.arange(39).view(3, 13).int()
    with using("decode_paged", {"S_BLOCK": 16, "num_warps": 4}), counting() as traffic:
        decode_paged(torch.zeros(3, N, H), *pool, table, lengths)
    assert (traffic.flops, 4 * N * H * 282) == (3_735_552, 649_728)
    assert round(3_735_552 / 649_728, 1) == 5.7


@triton.jit
def _scales_of(scales, out, stride_n, stride_g, N_BLOCK: tl.constexpr):
    n = tl.program_id(0) * N_BLOCK + tl.arange(0, N_BLOCK)
    tl.store(out + n, tl.load(scales + n * stride_n + tl.program_id(1) * stride_g))


def test_scales_kept_output_by_output_would_drag_in_nine_times_their_bytes():
    """Why `linear_int4` wants [K/g, N]: the same numbers, asked for by the same programs, from both
    layouts of 576 x 576 weights."""
    scales, out = torch.ones(576, 9).half(), torch.empty(576).half()
    for kept, sectors in ((scales, 93_312), (scales.T.contiguous().T, 10_368)):
        with counting(scales=kept) as traffic:
            _scales_of[(18, 9)](kept, out, *kept.stride(), N_BLOCK=32)
        assert (traffic["scales"].asked, traffic["scales"].sectors) == (10_368, sectors)


@pytest.mark.parametrize("parts", [1, 3])
def test_splitting_repeats_the_queries_and_adds_the_partial_results(parts):
    q, k, v, lengths = problem()
    with counting(q=q, k=k, v=v, lengths=lengths) as traffic:
        decode_split(q, k, v, lengths, parts)
    assert traffic["k"].asked == traffic["k"].distinct == S * K * H * 4
    assert traffic["q"].asked == parts * B * N * H * 4
    assert traffic["other"].asked == 2 * parts * B * N * (H + 2) * 4 + B * N * H * 4


def test_paging_adds_the_table_and_nothing_else():
    q, _, _, lengths = problem()
    (k, v), table = torch.randn(2, 40, K, 16, H), torch.randperm(40)[:30].view(3, 10).int()
    with counting(q=q, k=k, v=v, table=table) as traffic:
        decode_paged(q, k, v, table, lengths, parts=3)
    assert traffic["k"].asked == traffic["k"].distinct == traffic["v"].sectors == S * K * H * 4
    assert traffic["table"].asked == 4 * K * S
    assert traffic["table"].distinct == 4 * sum(-(-length // 16) for length in LENGTHS)


def test_a_window_leaves_the_blocks_before_it_untouched():
    q, _, _, lengths = problem()
    (k, v), table = torch.randn(2, 40, K, 16, H), torch.randperm(40)[:30].view(3, 10).int()
    with counting(k=k) as traffic:
        decode_paged(q, k, v, table, lengths, window=50, parts=2)
    assert traffic["k"].asked == sum(min(length, 50) for length in LENGTHS) * K * H * 4


def test_8_bit_pages_are_read_at_a_byte_a_number_and_2_for_each_scale():
    q, _, _, lengths = problem(torch.bfloat16)
    codes, scale = torch.zeros(30, K, 16, H, dtype=torch.int8), torch.ones(30, K, 16).half()
    table = torch.arange(30).view(3, 10).int()
    with counting(k=codes, k_scale=scale) as traffic:
        decode_int8(q, codes, scale, codes.clone(), scale.clone(), table, lengths, parts=2)
    assert traffic["k"].asked == S * K * H
    assert traffic["k_scale"].asked == S * K * 2


def test_4_bit_keys_are_read_at_half_a_byte_and_a_row_of_scales_for_each_group():
    q, _, _, lengths = problem(torch.bfloat16)
    groups = sum(-(-length // 32) for length in LENGTHS)
    k, v = torch.zeros(2, 15, K, 32, H // 2, dtype=torch.uint8)
    table = torch.randperm(15).view(B, 5).int()
    by_channel, by_token = torch.ones(4, 15, K, 1, H).half(), torch.ones(2, 15, K, 32, 2).half()
    with counting(k=k, v=v, k_scale=by_channel[0], v_scale=by_token[0], table=table) as traffic:
        decode_int4(q, k, by_channel[0], by_channel[1], v, by_token[0], by_token[1], table, lengths)
    assert traffic["k"].asked == traffic["v"].asked == S * K * H // 2
    assert traffic["k_scale"].asked == 2 * K * H * groups
    assert traffic["v_scale"].asked == 2 * K * S * H // 32
    assert (traffic["table"].asked, traffic["table"].distinct) == (4 * K * groups, 4 * groups)


def test_a_prompt_reads_its_keys_once_for_each_tile_of_queries():
    (k, v), table = torch.randn(2, 12, K, 16, H), torch.arange(10).view(1, 10).int()
    starts, past = torch.tensor([0, 40], dtype=torch.int32), torch.tensor([30], dtype=torch.int32)
    with counting(k=k) as traffic:
        prefill_paged(torch.randn(40, N, H), k, v, table, starts, past, max_seqlen_q=40, q_block=16)
    assert traffic["k"].asked == (46 + 62 + 70) * K * H * 4     # each tile's last token sees these


def test_a_norm_reads_and_writes_its_rows_once():
    x, residual, weight = torch.randn(3, 72), torch.randn(3, 72), torch.ones(72)
    with counting(x=x, residual=residual, weight=weight) as traffic:
        rms_norm(x, weight, 1e-5, residual)
    assert [traffic[name].asked for name in ("x", "residual", "other")] == [
        3 * 72 * 4, 2 * 3 * 72 * 4, 3 * 72 * 4]


def test_swiglu_reads_both_halves_once():
    x = torch.randn(3, 144)
    with counting(x=x) as traffic:
        swiglu(x)
    assert (traffic["x"].asked, traffic["other"].asked) == (3 * 144 * 4, 3 * 72 * 4)


def test_rope_and_append_move_each_head_once():
    qkv, angles, slots = torch.randn(5, N + 2 * K, H), torch.ones(5, H // 2), torch.arange(5)
    k, v = torch.zeros(2, 2, K, 16, H)
    with counting(qkv=qkv, angles=angles, slots=slots, k=k, v=v) as traffic:
        rope_append(qkv, angles, angles, slots, k, v)
    assert traffic["qkv"].asked == 5 * (N + 2 * K) * H * 4
    assert traffic["angles"].asked == 5 * (N + K) * H * 4
    assert traffic["k"].asked == traffic["v"].asked == 5 * K * H * 4
    assert traffic["slots"].asked == 5 * 2 * K * 8


def test_low_bit_products_read_each_code_once_and_their_scales_without_waste():
    x = torch.randn(1, 512)
    codes, scales = torch.zeros(96, 512, dtype=torch.int8), torch.ones(96)
    with counting(codes=codes, scales=scales) as traffic:
        linear_int8(x, codes, scales)
    assert (traffic["codes"].asked, traffic["scales"].asked) == (96 * 512, 96 * 4)
    packed, (scales, zeros) = torch.zeros(96, 256, dtype=torch.uint8), torch.ones(2, 8, 96).half()
    with counting(packed=packed, scales=scales, zeros=zeros) as traffic:
        linear_int4(x, packed, scales, zeros)
    assert traffic["packed"].asked == traffic["packed"].distinct == 96 * 256
    # [K/g, N]: neighbours are neighbours.
    assert traffic["scales"].asked == traffic["scales"].sectors == 8 * 96 * 2


def test_a_draw_reads_the_logits_twice_and_a_greedy_one_once():
    logits, uniform = torch.randn(2, 1500), torch.rand(2)
    for temperature, walks in ((1.0, 2), (0.0, 1)):
        with counting(logits=logits) as traffic:
            sample(logits, uniform, temperature)
        assert traffic["logits"].asked == walks * 2 * 1500 * 4


def test_verification_walks_over_one_position_however_long_the_draft():
    V, T = 1500, 4
    p, q = torch.full((1, T + 1, V), 1 / V), torch.full((1, T, V), 1 / V)
    uniform = torch.zeros(1, T + 1)
    with counting(p=p, q=q) as traffic:
        verify(p, q, torch.zeros(1, T, dtype=torch.int64), uniform)         # all kept
    assert (traffic["p"].asked, traffic["q"].asked) == (T * 4 + 2 * V * 4, T * 4)
