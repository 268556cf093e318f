"""Attention of a prompt's chunk over pages: the chunk's keys are in the pool already, and what came
before it too.

A chunk brings T new tokens of a sequence that holds `past` tokens before them; the chunks of all
sequences lie one behind the other, q [M, N, H], that of sequence b in rows cu_seqlens_q[b] ...
cu_seqlens_q[b + 1] - 1. Token t of a chunk stands at past + t and sees the keys up to itself. A
program takes Q_BLOCK tokens of one sequence with the G query heads of one KV head: Q_BLOCK * G rows
that share each read.

    bytes asked for = 2 * K * H * e * sum over programs of the keys that its last token sees
                    + 2 * M * N * H * e
                    + the table's

A prompt of S tokens reads its keys about S / (2 * Q_BLOCK) times: that is why Q_BLOCK is large
where decode has 1.
"""

from __future__ import annotations

import torch

from clawdemy_kernels.blocks import blocks
from clawdemy_kernels.decode_paged import decode_paged_reference
from clawdemy_kernels.launch import (
    LOG2_E,
    at_least_1,
    check,
    check_attention,
    power_of_2,
    tl,
    tokens_of_block,
    triton,
)
from clawdemy_kernels.online_softmax import rescale


@triton.jit
def prefill_paged_kernel(q, k, v, block_table, out, cu_seqlens_q, past, scale, window,
                         q_stride_token, q_stride_head,
                         k_stride_block, k_stride_head, k_stride_slot,
                         v_stride_block, v_stride_head, v_stride_slot, table_stride_seq,
                         out_stride_token, out_stride_head, C: tl.constexpr, G: tl.constexpr,
                         H: tl.constexpr, H_BLOCK: tl.constexpr, Q_BLOCK: tl.constexpr,
                         R_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr):
    b, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(cu_seqlens_q + b), tl.load(cu_seqlens_q + b + 1)
    before = tl.load(past + b)
    first = tile * Q_BLOCK
    if first >= stop - start:
        return                                          # a shorter chunk than the longest
    r, h = tl.arange(0, R_BLOCK), tl.arange(0, H_BLOCK)
    token = first + r // G                              # row r: this token, query head r % G
    mine = ((r < Q_BLOCK * G) & (token < stop - start))[:, None] & (h < H)[None, :]
    at = (start + token).to(tl.int64)[:, None]
    heads = (head * G + r % G)[:, None]
    queries = tl.load(q + at * q_stride_token + heads * q_stride_head + h[None, :],
                      mask=mine, other=0.0)
    position = before + token

    largest = tl.full([R_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([R_BLOCK], tl.float32)
    acc = tl.zeros([R_BLOCK, H_BLOCK], tl.float32)
    end = before + tl.minimum(first + Q_BLOCK, stop - start)    # what the tile's last token sees
    for begin in range(tl.maximum(before + first - window + 1, 0), end, S_BLOCK):
        s = begin + tl.arange(0, S_BLOCK)
        here = (s < end)[:, None] & (h < H)[None, :]
        block = tl.load(block_table + b * table_stride_seq + s // C,
                        mask=s < end, other=0).to(tl.int64)
        at_k = block * k_stride_block + head * k_stride_head + s % C * k_stride_slot
        keys = tl.load(k + at_k[:, None] + h[None, :], mask=here, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        distance = position[:, None] - s[None, :]
        scores = tl.where((distance >= 0) & (distance < window), scores, -float("inf"))
        weights, shrink, largest, total = rescale(scores, largest, total)
        at_v = block * v_stride_block + head * v_stride_head + s % C * v_stride_slot
        values = tl.load(v + at_v[:, None] + h[None, :], mask=here, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values,
                                             input_precision="ieee")
    tl.store(out + at * out_stride_token + heads * out_stride_head + h[None, :],
             (acc / total[:, None]).to(out.dtype.element_ty), mask=mine)


def prefill_paged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_table: torch.Tensor,
                  cu_seqlens_q: torch.Tensor, past: torch.Tensor, max_seqlen_q: int,
                  window: int | None = None, q_block: int = 16) -> torch.Tensor:
    """q [M, N, H], k, v [blocks, K, C, H], block_table [B, most], cu_seqlens_q [B + 1], past [B]
    of int32 -> [M, N, H].

    `max_seqlen_q` is the longest chunk, which sizes the launch without asking the GPU. Raises
    ValueError for tensors that do not fit together, and for a `max_seqlen_q`, `window` or `q_block`
    below 1.
    """
    check("past", past, (None,), (torch.int32,), like=q)
    check_attention(q, k, v, torch.empty(len(q), dtype=torch.int32, device=q.device))
    check("block_table", block_table, (len(past), None), (torch.int32,), like=q)
    check("cu_seqlens_q", cu_seqlens_q, (len(past) + 1,), (torch.int32,), like=q)
    at_least_1(max_seqlen_q=max_seqlen_q, window=window, q_block=q_block)
    (_, N, H), K, C = q.shape, k.shape[1], tokens_of_block(k, block_table)
    G, out = N // K, torch.empty_like(q)
    prefill_paged_kernel[(len(past), K, -(-max_seqlen_q // q_block))](
        q, k, v, block_table, out, cu_seqlens_q, past, LOG2_E * H**-0.5, window or 2**30,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], block_table.stride(0),
        *out.stride()[:2], C=C, G=G, H=H, H_BLOCK=power_of_2(H, least=16),
        Q_BLOCK=q_block, R_BLOCK=power_of_2(q_block * G, least=16),
        **blocks("prefill_paged", q.dtype, H))
    return out


def prefill_paged_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                            block_table: torch.Tensor, cu_seqlens_q: torch.Tensor,
                            past: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """The same in plain PyTorch: each token is a decode step of its own."""
    out = torch.empty_like(q)
    bounds = cu_seqlens_q.tolist()
    for b, before in enumerate(past.tolist()):
        for row in range(bounds[b], bounds[b + 1]):
            seen = torch.tensor([before + row - bounds[b] + 1], dtype=torch.int32, device=q.device)
            out[row] = decode_paged_reference(q[row:row + 1], k, v, block_table[b:b + 1], seen,
                                              window)[0]
    return out
