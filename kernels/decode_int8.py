"""Decode attention over pages of 8-bit keys and values: half the bytes of 16 bits, and the scales
applied to scores, not to keys.

codes k, v [blocks, K, C, H] of int8 and scales [blocks, K, C] of fp16, one for each token and head:
k ~ codes * scale. The scale of a key is the same for all H numbers, so it can wait until after the
product, and that of a value can go into its weight before it:

    scores[s] = (q · codes_k[s]) * scale_k[s] / sqrt(H)
    out = sum over s of (weights[s] * scale_v[s]) * codes_v[s]

    bytes asked for = 2 * K * S * (H + 2), instead of 2 * K * S * H * 2
                    + the rest as in decode_paged
"""

from __future__ import annotations

import torch

from clawdemy_kernels.blocks import blocks
from clawdemy_kernels.decode_paged import decode_paged_reference
from clawdemy_kernels.decode_split import (
    empty_parts,
    join_parts,
    multiprocessors,
    parts_for,
    store_part,
)
from clawdemy_kernels.launch import (
    LOG2_E,
    at_least_1,
    check,
    check_heads,
    power_of_2,
    tl,
    tokens_of_block,
    triton,
)
from clawdemy_kernels.online_softmax import rescale


@triton.jit
def decode_int8_kernel(q, k, v, k_scale, v_scale, block_table, acc_out, largest_out, total_out,
                       seq_lens, scale, parts, window, q_stride_seq, q_stride_head,
                       k_stride_block, k_stride_head, k_stride_slot,
                       v_stride_block, v_stride_head, v_stride_slot,
                       k_scale_stride_block, k_scale_stride_head,
                       v_scale_stride_block, v_scale_stride_head, table_stride_seq,
                       N: tl.constexpr, C: tl.constexpr, G: tl.constexpr, G_BLOCK: tl.constexpr,
                       H: tl.constexpr, H_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr):
    b, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(seq_lens + b)
    first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, S_BLOCK), parts) * S_BLOCK
    begin = first + part * share
    end = tl.minimum(begin + share, length)
    g, h = tl.arange(0, G_BLOCK), tl.arange(0, H_BLOCK)
    mine = (g < G)[:, None] & (h < H)[None, :]
    queries = tl.load(q + b * q_stride_seq + (head * G + g)[:, None] * q_stride_head + h[None, :],
                      mask=mine, other=0.0)

    largest = tl.full([G_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([G_BLOCK], tl.float32)
    acc = tl.zeros([G_BLOCK, H_BLOCK], tl.float32)
    for start in range(begin, end, S_BLOCK):
        s = start + tl.arange(0, S_BLOCK)
        seen = s < end
        here = seen[:, None] & (h < H)[None, :]
        block = tl.load(block_table + b * table_stride_seq + s // C,
                        mask=seen, other=0).to(tl.int64)
        slot = s % C
        at_k = block * k_stride_block + head * k_stride_head + slot * k_stride_slot
        keys = tl.load(k + at_k[:, None] + h[None, :], mask=here, other=0)      # H bytes a key
        key_scale = tl.load(k_scale + block * k_scale_stride_block + head * k_scale_stride_head
                            + slot, mask=seen, other=0.0).to(tl.float32)        # 2 bytes a key
        scores = tl.dot(queries, tl.trans(keys.to(tl.float32).to(queries.dtype)),
                        input_precision="ieee") * key_scale[None, :] * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))
        weights, shrink, largest, total = rescale(scores, largest, total)
        at_v = block * v_stride_block + head * v_stride_head + slot * v_stride_slot
        values = tl.load(v + at_v[:, None] + h[None, :], mask=here, other=0)
        value_scale = tl.load(v_scale + block * v_scale_stride_block + head * v_scale_stride_head
                              + slot, mask=seen, other=0.0).to(tl.float32)
        # A weight beside a sink's, times a scale, is below what fp16 has: the largest scale waits.
        top = 1.0
        if queries.dtype == tl.float16:
            top = tl.maximum(tl.max(value_scale, 0), 2.0**-24)
        scaled = (weights * (value_scale * (1.0 / top))[None, :]).to(queries.dtype)
        # Masked once more: codes that go to a product and nowhere else would be fetched in its
        # layout, 8 bytes at a time.
        values = tl.where(here, values, 0).to(tl.float32).to(queries.dtype)
        acc = acc * shrink[:, None] + tl.dot(scaled, values, input_precision="ieee") * top

    store_part(acc_out, largest_out, total_out, acc, largest, total,
               (part * tl.num_programs(0) + b) * N + head * G, G, G_BLOCK, H, H_BLOCK)


def decode_int8(q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, v: torch.Tensor,
                v_scale: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor,
                parts: int | None = None, window: int | None = None) -> torch.Tensor:
    """q [B, N, H]; k, v [blocks, K, C, H] of int8; k_scale, v_scale [blocks, K, C] of fp16;
    block_table [B, most], seq_lens [B] of int32 -> [B, N, H]. `window` as in `decode_paged`.
    Raises ValueError as that does.
    """
    check("q", q, (None, None, None))
    B, N, H = q.shape
    check("k", k, (None, None, None, H), (torch.int8,), like=q)
    check("v", v, tuple(k.shape), (torch.int8,), like=q)
    for name, tensor in (("k_scale", k_scale), ("v_scale", v_scale)):
        check(name, tensor, tuple(k.shape[:3]), (torch.float16,), like=q)
    check("block_table", block_table, (B, None), (torch.int32,), like=q)
    check("seq_lens", seq_lens, (B,), (torch.int32,), like=q)
    K, C = k.shape[1], tokens_of_block(k, block_table)
    check_heads(N, K)
    at_least_1(parts=parts, window=window)
    if parts is None:
        parts = parts_for(B * K, min(block_table.shape[1] * C, window or 2**30), 64,
                          multiprocessors(q.device))
    G, (acc, largest, total) = N // K, empty_parts(q, parts)
    decode_int8_kernel[(B, K, parts)](
        q, k, v, k_scale, v_scale, block_table, acc, largest, total, seq_lens, LOG2_E * H**-0.5,
        parts, window or 2**30, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        *k_scale.stride()[:2], *v_scale.stride()[:2], block_table.stride(0),
        N=N, C=C, G=G, G_BLOCK=power_of_2(G, least=16), H=H, H_BLOCK=power_of_2(H, least=16),
        **blocks("decode_int8", q.dtype, H))
    return join_parts(acc, largest, total, q.dtype)


def decode_int8_reference(q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, v: torch.Tensor,
                          v_scale: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor,
                          window: int | None = None) -> torch.Tensor:
    """The same in plain PyTorch: make numbers of the codes first."""
    keys, values = (codes.to(q.dtype) * scale.to(q.dtype)[..., None]
                    for codes, scale in ((k, k_scale), (v, v_scale)))
    return decode_paged_reference(q, keys, values, block_table, seq_lens, window)
