"""The bytes that kernels ask for, counted in the interpreter, are those of the envelope: to the byte."""


import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this system")
if torch.cuda.is_available():
    pytest.skip("on a GPU kernels are compiled, and the interpreter counts nothing", allow_module_level=True)

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_kernels import checks
from clawdemy_kernels.decode_grouped import decode_grouped
from clawdemy_kernels.decode_int4 import decode_int4
from clawdemy_kernels.decode_int8 import decode_int8
from clawdemy_kernels.decode_naive import decode_naive
from clawdemy_kernels.decode_paged import decode_paged
from clawdemy_kernels.decode_split import decode_split
from clawdemy_kernels.linear_int4 import linear_int4
from clawdemy_kernels.linear_int8 import linear_int8
from clawdemy_kernels.prefill_paged import prefill_paged
from clawdemy_kernels.rms_norm import rms_norm
from clawdemy_kernels.rope_append import rope_append
from clawdemy_kernels.sample import sample
from clawdemy_kernels.swiglu import swiglu
from clawdemy_kernels.traffic import counting
from clawdemy_kernels.verify import verify

B, N, K, H = 3, 6, 2, 64
LENGTHS = [5, 150, 77]
S = sum(LENGTHS)


def problem(dtype=torch.float32):
    q, k, v = torch.randn(B, N, H).to(dtype), torch.randn(B, K, max(LENGTHS), H).to(dtype), torch.randn(B, K, max(LENGTHS), H).to(dtype)
    return q, k, v, torch.tensor(LENGTHS, dtype=torch.int32)


def test_every_kernel_asks_for_what_its_envelope_says_to_the_byte():
    """All tensors together, outputs and partial results and tables among them: the traffic table of `bench --kernels`."""
    rows = checks.traffic(torch.float32)
    assert len(rows) == 14
    for row in rows:
        assert row["asked"] == row["envelope"] and row["distinct"] <= row["asked"], row
        assert row["sectors"] <= 1.2 * row["asked"], row                    # no layout drags in what it does not ask for


@pytest.mark.parametrize("dtype, e", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_naive_kernel_asks_for_the_cache_once_for_each_query_head_of_a_group(dtype, e):
    q, k, v, lengths = problem(dtype)
    with counting(q=q, k=k, v=v) as traffic:
        decode_naive(q, k, v, lengths)
    assert traffic["k"].asked == traffic["v"].asked == S * N * H * e
    assert traffic["k"].distinct == traffic["v"].distinct == S * K * H * e
    assert traffic["q"].asked == traffic["q"].distinct == B * N * H * e
    assert traffic.flops == 0                                               # it needs no tensor cores


@pytest.mark.parametrize("dtype, e", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_grouped_kernel_asks_for_the_cache_once_and_pads_its_group_to_16_rows(dtype, e):
    q, k, v, lengths = problem(dtype)
    with counting(q=q, k=k, v=v) as traffic:
        decode_grouped(q, k, v, lengths)
    assert traffic["k"].asked == traffic["k"].distinct == traffic["k"].sectors == S * K * H * e
    assert traffic["q"].asked == B * N * H * e
    blocks = sum(-(-length // 64) for length in LENGTHS)
    assert traffic.flops == 2 * 2 * K * 16 * blocks * 64 * H                # two products, 16 rows for a group of 3


def test_arithmetic_and_the_counter_agree_on_the_cache_s_bytes():
    """A model of one layer with these heads: what `ModelShape` says a decode step reads is what the kernel asked for."""
    q, k, v, lengths = problem(torch.bfloat16)
    shape = ModelShape(name="one layer", D=N * H, F=4 * N * H, N=N, K=K, H=H, L=1, V=100, tied=True)
    with counting(k=k, v=v) as traffic:
        decode_grouped(q, k, v, lengths)
    assert traffic["k"].asked + traffic["v"].asked == S * shape.kv_bytes_per_token("bf16")


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
    k, v, table = torch.randn(40, K, 16, H), torch.randn(40, K, 16, H), torch.randperm(40)[:30].view(3, 10).int()
    with counting(q=q, k=k, v=v, table=table) as traffic:
        decode_paged(q, k, v, table, lengths, parts=3)
    assert traffic["k"].asked == traffic["k"].distinct == traffic["v"].sectors == S * K * H * 4
    assert traffic["table"].asked == 4 * K * S
    assert traffic["table"].distinct == 4 * sum(-(-length // 16) for length in LENGTHS)


def test_a_window_leaves_the_blocks_before_it_untouched():
    q, _, _, lengths = problem()
    k, v, table = torch.randn(40, K, 16, H), torch.randn(40, K, 16, H), torch.randperm(40)[:30].view(3, 10).int()
    with counting(k=k) as traffic:
        decode_paged(q, k, v, table, lengths, window=50, parts=2)
    assert traffic["k"].asked == sum(min(length, 50) for length in LENGTHS) * K * H * 4


def test_8_bit_pages_are_read_at_a_byte_a_number_and_2_for_each_scale():
    q, _, _, lengths = problem(torch.bfloat16)
    codes, scale, table = torch.zeros(30, K, 16, H, dtype=torch.int8), torch.ones(30, K, 16).half(), torch.arange(30).view(3, 10).int()
    with counting(k=codes, k_scale=scale) as traffic:
        decode_int8(q, codes, scale, codes.clone(), scale.clone(), table, lengths, parts=2)
    assert traffic["k"].asked == S * K * H
    assert traffic["k_scale"].asked == S * K * 2


def test_4_bit_keys_are_read_at_half_a_byte_and_a_row_of_scales_for_each_group():
    q, _, _, lengths = problem(torch.bfloat16)
    k, v = torch.zeros(2, B, K, 160, H // 2, dtype=torch.uint8)
    by_channel, by_token = torch.ones(4, B, K, 5, H).half(), torch.ones(2, B, K, 160, 2).half()
    with counting(k=k, v=v, k_scale=by_channel[0], v_scale=by_token[0]) as traffic:
        decode_int4(q, k, by_channel[0], by_channel[1], v, by_token[0], by_token[1], lengths)
    assert traffic["k"].asked == traffic["v"].asked == S * K * H // 2
    assert traffic["k_scale"].asked == 2 * K * H * sum(-(-length // 32) for length in LENGTHS)
    assert traffic["v_scale"].asked == 2 * K * S * H // 32


def test_a_prompt_reads_its_keys_once_for_each_tile_of_queries():
    k, v, table = torch.randn(12, K, 16, H), torch.randn(12, K, 16, H), torch.arange(10).view(1, 10).int()
    starts, past = torch.tensor([0, 40], dtype=torch.int32), torch.tensor([30], dtype=torch.int32)
    with counting(k=k) as traffic:
        prefill_paged(torch.randn(40, N, H), k, v, table, starts, past, longest=40, q_block=16)
    assert traffic["k"].asked == (46 + 62 + 70) * K * H * 4                 # what the last token of each tile sees


def test_a_norm_reads_and_writes_its_rows_once():
    x, residual, weight = torch.randn(3, 72), torch.randn(3, 72), torch.ones(72)
    with counting(x=x, residual=residual, weight=weight) as traffic:
        rms_norm(x, weight, 1e-5, residual)
    assert (traffic["x"].asked, traffic["residual"].asked, traffic["other"].asked) == (3 * 72 * 4, 2 * 3 * 72 * 4, 3 * 72 * 4)


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
    packed, scales, zeros = torch.zeros(96, 256, dtype=torch.uint8), torch.ones(8, 96).half(), torch.ones(8, 96).half()
    with counting(packed=packed, scales=scales, zeros=zeros) as traffic:
        linear_int4(x, packed, scales, zeros)
    assert traffic["packed"].asked == traffic["packed"].distinct == 96 * 256
    assert traffic["scales"].asked == traffic["scales"].sectors == 8 * 96 * 2       # [K/g, N]: neighbours are neighbours


def test_a_draw_reads_the_logits_twice_and_a_greedy_one_once():
    logits, uniform = torch.randn(2, 1500), torch.rand(2)
    for temperature, walks in ((1.0, 2), (0.0, 1)):
        with counting(logits=logits) as traffic:
            sample(logits, uniform, temperature)
        assert traffic["logits"].asked == walks * 2 * 1500 * 4


def test_verification_walks_over_one_position_however_long_the_draft():
    V, T = 1500, 4
    p, q, uniform = torch.full((1, T + 1, V), 1 / V), torch.full((1, T, V), 1 / V), torch.zeros(1, T + 1)
    with counting(p=p, q=q) as traffic:
        verify(p, q, torch.zeros(1, T, dtype=torch.int64), uniform)         # all kept
    assert (traffic["p"].asked, traffic["q"].asked) == (T * 4 + 2 * V * 4, T * 4)
