"""Decode attention with the sequence split among programs: flash decoding (Dao et al. 2023).

A batch of one has only K programs in the kernels before this one, and an H100 has 132
multiprocessors: most of them idle while a few read the whole cache. Here each sequence is cut into
P parts, and part p of each KV head is a program of its own, which leaves

    acc_p [G, H] (unnormalised, fp32)        largest_p, total_p [G]

A second, small kernel joins the parts: with M = max over p of largest_p,

    out = sum over p of 2^(largest_p - M) acc_p  /  sum over p of 2^(largest_p - M) total_p

    bytes asked for = 2 * K * S * H * e             S the sum of the lengths
                    + P * B * N * H * e             the queries, once a part
                    + B * N * H * e                 the output
                    + 2 * P * B * N * (H + 2) * 4   the parts, written and read
"""

from __future__ import annotations

import torch

from clawdemy_kernels.blocks import blocks
from clawdemy_kernels.launch import LOG2_E, at_least_1, check_attention, power_of_2, tl, triton
from clawdemy_kernels.online_softmax import rescale


@triton.jit
def store_part(acc_out, largest_out, total_out, acc, largest, total, first, G: tl.constexpr,
               G_BLOCK: tl.constexpr, H: tl.constexpr, H_BLOCK: tl.constexpr):
    """Leave what a part has summed in rows first ... first + G - 1 of [P * B * N]: G * (H + 2) * 4
    bytes."""
    g, h = tl.arange(0, G_BLOCK), tl.arange(0, H_BLOCK)
    tl.store(acc_out + (first + g)[:, None] * H + h[None, :], acc,
             mask=(g < G)[:, None] & (h < H)[None, :])
    tl.store(largest_out + first + g, largest, mask=g < G)
    tl.store(total_out + first + g, total, mask=g < G)


@triton.jit
def decode_split_kernel(q, k, v, acc_out, largest_out, total_out, seq_lens, scale, parts,
                        q_stride_seq, q_stride_head, k_stride_seq, k_stride_head, k_stride_token,
                        v_stride_seq, v_stride_head, v_stride_token, N: tl.constexpr,
                        G: tl.constexpr, G_BLOCK: tl.constexpr, H: tl.constexpr,
                        H_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr):
    b, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(seq_lens + b)
    # Parts are whole blocks of S_BLOCK tokens, so that no block is cut; the last parts of a short
    # sequence are empty.
    share = tl.cdiv(tl.cdiv(length, S_BLOCK), parts) * S_BLOCK
    begin, end = part * share, tl.minimum(part * share + share, length)
    g, h = tl.arange(0, G_BLOCK), tl.arange(0, H_BLOCK)
    mine = (g < G)[:, None] & (h < H)[None, :]
    k += b.to(tl.int64) * k_stride_seq + head * k_stride_head
    v += b.to(tl.int64) * v_stride_seq + head * v_stride_head
    queries = tl.load(q + b * q_stride_seq + (head * G + g)[:, None] * q_stride_head + h[None, :],
                      mask=mine, other=0.0)

    largest = tl.full([G_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([G_BLOCK], tl.float32)
    acc = tl.zeros([G_BLOCK, H_BLOCK], tl.float32)
    for start in range(begin, end, S_BLOCK):
        s = start + tl.arange(0, S_BLOCK)
        here = (s < end)[:, None] & (h < H)[None, :]
        keys = tl.load(k + s[:, None] * k_stride_token + h[None, :], mask=here, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where((s < end)[None, :], scores, -float("inf"))
        weights, shrink, largest, total = rescale(scores, largest, total)
        values = tl.load(v + s[:, None] * v_stride_token + h[None, :], mask=here, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values,
                                             input_precision="ieee")

    store_part(acc_out, largest_out, total_out, acc, largest, total,
               (part * tl.num_programs(0) + b) * N + head * G, G, G_BLOCK, H, H_BLOCK)


@triton.jit
def join_parts_kernel(acc_in, largest_in, total_in, out, rows, parts,
                      H: tl.constexpr, H_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr):
    """One program for each of the B * N rows: all its parts at once, [P, H]."""
    row = tl.program_id(0)
    p, h = tl.arange(0, P_BLOCK), tl.arange(0, H_BLOCK)
    largest = tl.load(largest_in + p * rows + row, mask=p < parts, other=-float("inf"))
    weight = tl.exp2(largest - tl.max(largest, 0))                      # 0 for an empty part
    total = tl.load(total_in + p * rows + row, mask=p < parts, other=0.0)
    acc = tl.load(acc_in + (p * rows + row)[:, None] * H + h[None, :],
                  mask=(p < parts)[:, None] & (h < H)[None, :], other=0.0)
    joined = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + row * H + h, joined.to(out.dtype.element_ty), mask=h < H)


def parts_for(programs: int, tokens: int, block: int, multiprocessors: int) -> int:
    """How many parts: enough programs for two on each multiprocessor, and no part shorter than two
    blocks of keys."""
    return max(1, min(-(-2 * multiprocessors // programs), tokens // (2 * block)))


def decode_split(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq_lens: torch.Tensor,
                 parts: int | None = None) -> torch.Tensor:
    """q [B, N, H], k, v [B, K, S, H] with any strides but the last, seq_lens [B] of int32 (1 to S)
    -> [B, N, H].

    `parts` is P; by default it suits the GPU. Raises ValueError for tensors that do not fit
    together, or `parts` below 1. The reference is `decode_naive.decode_reference`.
    """
    check_attention(q, k, v, seq_lens)
    at_least_1(parts=parts)
    if parts is None:
        parts = parts_for(len(q) * k.shape[1], k.shape[2], 64, multiprocessors(q.device))
    made = empty_parts(q, parts)
    launch_parts(q, k, v, seq_lens, parts, *made)
    return join_parts(*made, q.dtype)


def launch_parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq_lens: torch.Tensor,
                 parts: int, acc: torch.Tensor, largest: torch.Tensor, total: torch.Tensor) -> None:
    """Fill acc [P, B, N, H], largest and total [P, B, N]. A sequence of length 0 leaves parts that
    weigh nothing."""
    (B, N, H), K = q.shape, k.shape[1]
    decode_split_kernel[(B, K, parts)](
        q, k, v, acc, largest, total, seq_lens, LOG2_E * H**-0.5, parts,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        N=N, G=N // K, G_BLOCK=power_of_2(N // K, least=16), H=H, H_BLOCK=power_of_2(H, least=16),
        **blocks("decode_split", q.dtype, H))


def empty_parts(q: torch.Tensor, parts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for acc [P, B, N, H], largest and total [P, B, N] of queries [B, N, H], in fp32."""
    acc = q.new_empty((parts, *q.shape), dtype=torch.float32)
    return acc, acc.new_empty(acc.shape[:-1]), acc.new_empty(acc.shape[:-1])


def join_parts(acc: torch.Tensor, largest: torch.Tensor, total: torch.Tensor,
               dtype: torch.dtype) -> torch.Tensor:
    """acc [P, B, N, H], largest and total [P, B, N], all of fp32 -> [B, N, H] of `dtype`."""
    P, B, N, H = acc.shape
    out = acc.new_empty((B, N, H), dtype=dtype)
    join_parts_kernel[(B * N,)](acc, largest, total, out, B * N, P, H=H, H_BLOCK=power_of_2(H),
                                P_BLOCK=power_of_2(P), num_warps=4)
    return out


def multiprocessors(device: torch.device) -> int:
    """Of this GPU; without one, of an H100, so that the interpreter walks the same parts."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
