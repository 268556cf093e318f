"""Decode attention over pages of 8-bit keys and values: half the bytes of 16 bits, and the scales applied to scores, not to keys.

codes k, v [blocks, K, C, H] of int8 and scales [blocks, K, C] of fp16, one for each token and head: k ~ codes * scale. The scale of a
key is the same for all H numbers, so it can wait until after the product, and that of a value can go into its weight before it:

    scores[s] = (q · codes_k[s]) * scale_k[s] / sqrt(H)              out = sum over s of (weights[s] * scale_v[s]) * codes_v[s]

    bytes asked for = 2 * K * S * (H + 2) + ...  instead of  2 * K * S * H * 2            (the rest as in decode_paged)
"""

from __future__ import annotations

import torch

from clawdemy_kernels.blocks import blocks
from clawdemy_kernels.decode_paged import decode_paged_reference
from clawdemy_kernels.decode_split import empty_parts, join_parts, multiprocessors, parts_for, store_part
from clawdemy_kernels.launch import LOG2_E, at_least_1, block_and_tile, check, check_heads, power_of_2, tl, triton
from clawdemy_kernels.online_softmax import rescale


@triton.jit
def decode_int8_kernel(q, k, v, k_scale, v_scale, table, acc_out, largest_out, total_out, lengths, scale, parts, window,
                       q_b, q_n, k_p, k_k, k_c, v_p, v_k, v_c, ks_p, ks_k, vs_p, vs_k, table_b,
                       N: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
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
        block = tl.load(table + b * table_b + s // C, mask=seen, other=0).to(tl.int64)
        slot = block * C + s % C
        tile, row = slot // TILE, slot % TILE
        keys = tl.load(k + (tile * k_p + head * k_k + row * k_c)[:, None] + h[None, :], mask=here, other=0)         # H bytes a key
        key_scale = tl.load(k_scale + tile * ks_p + head * ks_k + row, mask=seen, other=0.0).to(tl.float32)         # 2 bytes a key
        scores = tl.dot(queries, tl.trans(keys.to(tl.float32).to(queries.dtype)), input_precision="ieee") * key_scale[None, :] * scale
        scores = tl.where(seen[None, :], scores, -float("inf"))
        weights, shrink, largest, total = rescale(scores, largest, total)
        values = tl.load(v + (tile * v_p + head * v_k + row * v_c)[:, None] + h[None, :], mask=here, other=0)
        value_scale = tl.load(v_scale + tile * vs_p + head * vs_k + row, mask=seen, other=0.0).to(tl.float32)
        scaled = (weights * value_scale[None, :]).to(queries.dtype)
        # Masked once more: codes that go to a product and nowhere else would be fetched in its layout, 8 bytes at a time.
        values = tl.where(here, values, 0).to(tl.float32).to(queries.dtype)
        acc = acc * shrink[:, None] + tl.dot(scaled, values, input_precision="ieee")

    store_part(acc_out, largest_out, total_out, acc, largest, total, (part * tl.num_programs(0) + b) * N + head * G, G, G_BLOCK, H, H_BLOCK)


def decode_int8(q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, v: torch.Tensor, v_scale: torch.Tensor,
                table: torch.Tensor, lengths: torch.Tensor, parts: int | None = None,
                block_size: int | None = None, window: int | None = None) -> torch.Tensor:
    """q [B, N, H]; k, v [blocks, K, C, H] of int8; k_scale, v_scale [blocks, K, C] of fp16; table [B, most], lengths [B] of int32
    -> [B, N, H]. `block_size` and `window` as in `decode_paged`. Raises ValueError as that does.
    """
    check("q", q, (None, None, None))
    B, N, H = q.shape
    check("k", k, (None, None, None, H), (torch.int8,), like=q)
    check("v", v, tuple(k.shape), (torch.int8,), like=q)
    for name, tensor in (("k_scale", k_scale), ("v_scale", v_scale)):
        check(name, tensor, tuple(k.shape[:3]), (torch.float16,), like=q)
    check("table", table, (B, None), (torch.int32,), like=q)
    check("lengths", lengths, (B,), (torch.int32,), like=q)
    _, K, TILE, _ = k.shape
    C, TILE = block_and_tile(TILE, block_size, table)
    check_heads(N, K)
    at_least_1(parts=parts, window=window)
    if parts is None:
        parts = parts_for(B * K, min(table.shape[1] * C, window or 2**30), 64, multiprocessors(q.device))
    G, (acc, largest, total) = N // K, empty_parts(q, parts)
    decode_int8_kernel[(B, K, parts)](
        q, k, v, k_scale, v_scale, table, acc, largest, total, lengths, LOG2_E * H ** -0.5, parts, window or 2**30,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *k_scale.stride()[:2], *v_scale.stride()[:2], table.stride(0),
        N=N, C=C, TILE=TILE,
        G=G, G_BLOCK=power_of_2(G, least=16), H=H, H_BLOCK=power_of_2(H, least=16), **blocks("decode_int8", q.dtype, H))
    return join_parts(acc, largest, total, q.dtype)


def decode_int8_reference(q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, v: torch.Tensor, v_scale: torch.Tensor,
                          table: torch.Tensor, lengths: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """The same in plain PyTorch: make numbers of the codes first."""
    keys, values = (codes.to(q.dtype) * scale.to(q.dtype)[..., None] for codes, scale in ((k, k_scale), (v, v_scale)))
    return decode_paged_reference(q, keys, values, table, lengths, window)
