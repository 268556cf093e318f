"""Decode attention over pages (Kwon et al. 2023): the group shares the read, the parts share the
sequence, a table says where it lies.

k, v [blocks, K, C, H] are a pool of blocks of C tokens; block_table [B, most] names the blocks of
each sequence in the order of the text, and token s of sequence b lies in block block_table[b, s //
C] at slot s % C. Beside `decode_split` only the addresses change: each block of keys first loads
S_BLOCK / C entries of the table, 4 bytes each.

    bytes asked for = those of decode_split
                    + 4 * K * (tokens seen)     the table: here an entry a token, in fact a sector

With `window`, a query sees the last `window` tokens only, and the blocks before them are not
touched.
"""

from __future__ import annotations

import torch

from clawdemy_kernels.blocks import blocks
from clawdemy_kernels.decode_naive import decode_reference
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
    check_attention,
    power_of_2,
    tl,
    tokens_of_block,
    triton,
)
from clawdemy_kernels.online_softmax import rescale


@triton.jit
def decode_paged_kernel(q, k, v, block_table, acc_out, largest_out, total_out, seq_lens, scale,
                        parts, window, q_stride_seq, q_stride_head,
                        k_stride_block, k_stride_head, k_stride_slot,
                        v_stride_block, v_stride_head, v_stride_slot, table_stride_seq,
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
        block = tl.load(block_table + b * table_stride_seq + s // C,    # the indirection
                        mask=seen, other=0).to(tl.int64)
        at_k = block * k_stride_block + head * k_stride_head + s % C * k_stride_slot
        keys = tl.load(k + at_k[:, None] + h[None, :], mask=here, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))
        weights, shrink, largest, total = rescale(scores, largest, total)
        at_v = block * v_stride_block + head * v_stride_head + s % C * v_stride_slot
        values = tl.load(v + at_v[:, None] + h[None, :], mask=here, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values,
                                             input_precision="ieee")

    store_part(acc_out, largest_out, total_out, acc, largest, total,
               (part * tl.num_programs(0) + b) * N + head * G, G, G_BLOCK, H, H_BLOCK)


def decode_paged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_table: torch.Tensor,
                 seq_lens: torch.Tensor, window: int | None = None,
                 parts: int | None = None) -> torch.Tensor:
    """q [B, N, H], k, v [blocks, K, C, H], block_table [B, most] and seq_lens [B] of int32 ->
    [B, N, H].

    Entries of the table behind a sequence's last block are never read. `parts` is P, by default
    what suits the GPU. Raises ValueError for tensors that do not fit together, and for a `window`
    or `parts` below 1.
    """
    check_attention(q, k, v, seq_lens)
    check("block_table", block_table, (len(q), None), (torch.int32,), like=q)
    at_least_1(window=window, parts=parts)
    (B, N, H), K, C = q.shape, k.shape[1], tokens_of_block(k, block_table)
    tokens = block_table.shape[1] * C
    if parts is None:
        parts = parts_for(B * K, min(tokens, window or tokens), 64, multiprocessors(q.device))
    G, (acc, largest, total) = N // K, empty_parts(q, parts)
    decode_paged_kernel[(B, K, parts)](
        q, k, v, block_table, acc, largest, total, seq_lens, LOG2_E * H**-0.5, parts,
        window or 2**30, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], block_table.stride(0),
        N=N, C=C, G=G, G_BLOCK=power_of_2(G, least=16), H=H, H_BLOCK=power_of_2(H, least=16),
        **blocks("decode_paged", q.dtype, H))
    return join_parts(acc, largest, total, q.dtype)


def decode_paged_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                           block_table: torch.Tensor, seq_lens: torch.Tensor,
                           window: int | None = None) -> torch.Tensor:
    """The same in plain PyTorch: each sequence's blocks are copied together, what the window hides
    is cut off."""
    out = torch.empty_like(q)
    for b, length in enumerate(seq_lens.tolist()):
        blocks = block_table[b, : -(-length // k.shape[2])].long()
        first = max(0, length - (window or length))
        keys, values = (x[blocks].transpose(0, 1).flatten(1, 2)[:, first:length] for x in (k, v))
        seen = torch.tensor([keys.shape[1]], dtype=torch.int32, device=q.device)
        out[b] = decode_reference(q[b:b + 1], keys[None], values[None], seen)[0]
    return out
