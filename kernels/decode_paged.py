"""Decode attention over pages (Kwon et al. 2023): the group shares the read, the parts share the sequence, a table says where it lies.

k, v [blocks, K, C, H] are a pool of blocks of C tokens; table [B, most] names the blocks of each sequence in the order of the text,
and token s of sequence b lies in block table[b, s // C] at s % C. Beside `decode_split` only the addresses change: each block of
keys first loads S_BLOCK / C entries of the table, 4 bytes each.

    bytes asked for = those of decode_split + 4 * K * (tokens seen) (the table, one entry a token here, one sector in fact)

With `window`, a query sees the last `window` tokens only, and the blocks before them are not touched.
"""

from __future__ import annotations

import torch

from clawdemy_kernels.blocks import blocks
from clawdemy_kernels.decode_naive import decode_reference
from clawdemy_kernels.decode_split import empty_parts, join_parts, multiprocessors, parts_for, store_part
from clawdemy_kernels.launch import LOG2_E, at_least_1, block_and_tile, check, check_attention, power_of_2, tl, triton
from clawdemy_kernels.online_softmax import rescale


@triton.jit
def decode_paged_kernel(q, k, v, table, acc_out, largest_out, total_out, lengths, scale, parts, window,
                        q_b, q_n, k_p, k_k, k_c, v_p, v_k, v_c, table_b, N: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
                        G: tl.constexpr, G_BLOCK: tl.constexpr, H: tl.constexpr, H_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr):
    b, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + b)
    first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, S_BLOCK), parts) * S_BLOCK
    begin = first + part * share
    end = tl.minimum(begin + share, length)
    g, h = tl.arange(0, G_BLOCK), tl.arange(0, H_BLOCK)
    mine = (g < G)[:, None] & (h < H)[None, :]
    queries = tl.load(q + b * q_b + (head * G + g)[:, None] * q_n + h[None, :], mask=mine, other=0.0)

    largest = tl.full([G_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([G_BLOCK], tl.float32)
    acc = tl.zeros([G_BLOCK, H_BLOCK], tl.float32)
    for start in range(begin, end, S_BLOCK):
        s = start + tl.arange(0, S_BLOCK)
        seen = s < end
        here = seen[:, None] & (h < H)[None, :]
        block = tl.load(table + b * table_b + s // C, mask=seen, other=0).to(tl.int64)            # the indirection
        slot = block * C + s % C
        keys = tl.load(k + (slot // TILE * k_p + head * k_k + slot % TILE * k_c)[:, None] + h[None, :], mask=here, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))
        weights, shrink, largest, total = rescale(scores, largest, total)
        values = tl.load(v + (slot // TILE * v_p + head * v_k + slot % TILE * v_c)[:, None] + h[None, :], mask=here, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")

    store_part(acc_out, largest_out, total_out, acc, largest, total, (part * tl.num_programs(0) + b) * N + head * G, G, G_BLOCK, H, H_BLOCK)


def decode_paged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor,
                 window: int | None = None, parts: int | None = None, block_size: int | None = None) -> torch.Tensor:
    """q [B, N, H], k, v [blocks, K, C, H], table [B, most] and lengths [B] of int32 -> [B, N, H].

    Entries of the table behind a sequence's last block are never read. `parts` is P, by default what suits the GPU. Where the pool
    keeps several blocks together, so that k and v are [tiles, K, tokens of a tile, H], say the `block_size` that the table counts in.
    Raises ValueError for tensors that do not fit together, for a `window` or `parts` below 1, and for a `block_size` that does not
    divide a tile.
    """
    check_attention(q, k, v, lengths)
    check("table", table, (len(q), None), (torch.int32,), like=q)
    at_least_1(window=window, parts=parts)
    (B, N, H), (_, K, TILE, _) = q.shape, k.shape
    C, TILE = block_and_tile(TILE, block_size, table)
    tokens = table.shape[1] * C
    if parts is None:
        parts = parts_for(B * K, min(tokens, window or tokens), 64, multiprocessors(q.device))
    G, (acc, largest, total) = N // K, empty_parts(q, parts)
    decode_paged_kernel[(B, K, parts)](
        q, k, v, table, acc, largest, total, lengths, LOG2_E * H ** -0.5, parts, window or 2**30,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], table.stride(0), N=N, C=C, TILE=TILE,
        G=G, G_BLOCK=power_of_2(G, least=16), H=H, H_BLOCK=power_of_2(H, least=16), **blocks("decode_paged", q.dtype, H))
    return join_parts(acc, largest, total, q.dtype)


def decode_paged_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor,
                           window: int | None = None) -> torch.Tensor:
    """The same in plain PyTorch: each sequence's blocks are copied together, what the window hides is cut off."""
    out = torch.empty_like(q)
    for b, length in enumerate(lengths.tolist()):
        blocks = table[b, : -(-length // k.shape[2])].long()
        keys, values = (x[blocks].transpose(0, 1).flatten(1, 2)[:, max(0, length - (window or length)):length] for x in (k, v))
        seen = torch.tensor([keys.shape[1]], dtype=torch.int32, device=q.device)
        out[b] = decode_reference(q[b:b + 1], keys[None], values[None], seen)[0]
    return out
