"""Attention of a prompt's chunk over pages: the chunk's keys are in the pool already, and what came before it too.

A chunk brings T new tokens of a sequence that holds `past` tokens before them; the chunks of all sequences lie one behind the other,
q [M, N, H], that of sequence b in rows starts[b] ... starts[b + 1] - 1. Token t of a chunk stands at past + t and sees the keys up to
itself. A program takes Q_BLOCK tokens of one sequence with the G query heads of one KV head: Q_BLOCK * G rows that share each read.

    bytes asked for = 2 * K * H * e * sum over programs of the keys that its last token sees  +  2 * M * N * H * e  + the table's

A prompt of S tokens reads its keys about S / (2 * Q_BLOCK) times: that is why Q_BLOCK is large where decode has 1.
"""

from __future__ import annotations

import torch

from clawdemy_kernels.blocks import blocks
from clawdemy_kernels.decode_paged import decode_paged_reference
from clawdemy_kernels.launch import LOG2_E, at_least_1, block_and_tile, check, check_attention, power_of_2, tl, triton
from clawdemy_kernels.online_softmax import rescale


@triton.jit
def prefill_paged_kernel(q, k, v, table, out, starts, past, scale, window,
                         q_m, q_n, k_p, k_k, k_c, v_p, v_k, v_c, table_b, out_m, out_n, C: tl.constexpr, TILE: tl.constexpr,
                         G: tl.constexpr, H: tl.constexpr, H_BLOCK: tl.constexpr, Q_BLOCK: tl.constexpr, R_BLOCK: tl.constexpr,
                         S_BLOCK: tl.constexpr):
    b, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, stop, before = tl.load(starts + b), tl.load(starts + b + 1), tl.load(past + b)
    first = tile * Q_BLOCK
    if first >= stop - start:
        return                                                              # a shorter chunk than the longest
    r, h = tl.arange(0, R_BLOCK), tl.arange(0, H_BLOCK)                     # row r: token first + r // G, query head r % G
    token = first + r // G
    mine = ((r < Q_BLOCK * G) & (token < stop - start))[:, None] & (h < H)[None, :]
    at = (start + token).to(tl.int64)[:, None]
    heads = (head * G + r % G)[:, None]
    queries = tl.load(q + at * q_m + heads * q_n + h[None, :], mask=mine, other=0.0)
    position = before + token

    largest = tl.full([R_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([R_BLOCK], tl.float32)
    acc = tl.zeros([R_BLOCK, H_BLOCK], tl.float32)
    end = before + tl.minimum(first + Q_BLOCK, stop - start)                # what the last token of this tile sees
    for begin in range(tl.maximum(before + first - window + 1, 0), end, S_BLOCK):
        s = begin + tl.arange(0, S_BLOCK)
        here = (s < end)[:, None] & (h < H)[None, :]
        block = tl.load(table + b * table_b + s // C, mask=s < end, other=0).to(tl.int64)
        slot = block * C + s % C
        keys = tl.load(k + (slot // TILE * k_p + head * k_k + slot % TILE * k_c)[:, None] + h[None, :], mask=here, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        distance = position[:, None] - s[None, :]
        scores = tl.where((distance >= 0) & (distance < window), scores, -float("inf"))
        weights, shrink, largest, total = rescale(scores, largest, total)
        values = tl.load(v + (slot // TILE * v_p + head * v_k + slot % TILE * v_c)[:, None] + h[None, :], mask=here, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    tl.store(out + at * out_m + heads * out_n + h[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=mine)


def prefill_paged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, starts: torch.Tensor, past: torch.Tensor,
                  longest: int, window: int | None = None, q_block: int = 16, block_size: int | None = None) -> torch.Tensor:
    """q [M, N, H], k, v [blocks, K, C, H], table [B, most], starts [B + 1], past [B] of int32 -> [M, N, H].

    `longest` is the longest chunk, which sizes the launch without asking the GPU; `block_size` as in `decode_paged`. Raises ValueError
    for tensors that do not fit together, and for a `longest`, `window` or `q_block` below 1.
    """
    check("past", past, (None,), (torch.int32,), like=q)
    check_attention(q, k, v, torch.empty(len(q), dtype=torch.int32, device=q.device))
    check("table", table, (len(past), None), (torch.int32,), like=q)
    check("starts", starts, (len(past) + 1,), (torch.int32,), like=q)
    at_least_1(longest=longest, window=window, q_block=q_block)
    (_, N, H), (_, K, TILE, _) = q.shape, k.shape
    C, TILE = block_and_tile(TILE, block_size, table)
    G, out = N // K, torch.empty_like(q)
    prefill_paged_kernel[(len(past), K, -(-longest // q_block))](
        q, k, v, table, out, starts, past, LOG2_E * H ** -0.5, window or 2**30,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], table.stride(0), *out.stride()[:2], C=C, TILE=TILE,
        G=G, H=H, H_BLOCK=power_of_2(H, least=16), Q_BLOCK=q_block, R_BLOCK=power_of_2(q_block * G, least=16),
        **blocks("prefill_paged", q.dtype, H))
    return out


def prefill_paged_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, starts: torch.Tensor,
                            past: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """The same in plain PyTorch: each token is a decode step of its own."""
    out = torch.empty_like(q)
    bounds = starts.tolist()
    for b, before in enumerate(past.tolist()):
        for row in range(bounds[b], bounds[b + 1]):
            seen = torch.tensor([before + row - bounds[b] + 1], dtype=torch.int32, device=q.device)
            out[row] = decode_paged_reference(q[row:row + 1], k, v, table[b:b + 1], seen, window)[0]
    return out
