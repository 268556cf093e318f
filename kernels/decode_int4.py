"""Decode attention on 4-bit keys and values, as KIVI rounds them (Liu et al. 2024): keys by
channel, values by token.

    key[s, h]   = code * scale_k[s // g, h] + low_k[s // g, h]      a scale for each channel of g
                                                                    neighbouring tokens
    value[s, h] = code * scale_v[s, h // g] + low_v[s, h // g]      a scale for each g numbers of
                                                                    a token

Codes lie in blocks of C tokens, whole groups of g, which a table names as in `decode_paged`; a
cache in one piece is a block for each sequence. Byte i of a token holds channel i in its low half
and channel i + H/2 in its high half. A program takes g tokens at a time, which share one row of key
scales, so that row goes into the queries and the keys are multiplied as they are:

    q · key[s] = (q * scale_k) · code[s]  +  q · low_k

    bytes asked for = 2 * K * S * (H / 2 + 4 * H / g), instead of 2 * K * S * H * 2: 3.2 times less
                      at g = 32
                    + the queries and parts of decode_split
                    + 4 for each g tokens and head: an entry of the table

Parts are those of `decode_split`. The newest tokens, which wait unrounded until they are a group,
are one more part, by `decode_paged`. With `window`, a query sees the last `window` tokens only,
those that wait among them; groups before them are not touched.

A head whose halves are not whole groups (H = 80 in groups of 16) has its value scales loaded once
for each number, g times as many bytes asked for, though of the same sectors.
"""

from __future__ import annotations

import torch

from clawdemy_kernels.blocks import blocks
from clawdemy_kernels.decode_paged import decode_paged_kernel, decode_paged_reference
from clawdemy_kernels.decode_split import empty_parts, join_parts, multiprocessors, parts_for
from clawdemy_kernels.launch import (
    FLOATS,
    LOG2_E,
    at_least_1,
    check,
    check_attention,
    check_heads,
    power_of_2,
    tl,
    triton,
)
from clawdemy_kernels.online_softmax import rescale


@triton.jit
def _number(codes, dtype):
    """0 to 15 as numbers, exact in any dtype; by way of fp32, for the interpreter knows no other
    way from integers to bfloat16."""
    return codes.to(tl.float32).to(dtype)


@triton.jit
def _scaled(codes, scale, low, known, g: tl.constexpr, HALF: tl.constexpr):
    """Values [tokens, HALF] of codes, with a scale and a lowest value for each g of them: [tokens,
    HALF / g] pointers."""
    # Masked once more: what goes to a product and nowhere else is fetched in its layout, on AMD by
    # 64 loads of 2 bytes instead of one.
    scale = tl.where(known, tl.load(scale, mask=known, other=0.0), 0.0).to(tl.float32)
    low = tl.where(known, tl.load(low, mask=known, other=0.0), 0.0).to(tl.float32)
    grouped = tl.reshape(codes.to(tl.float32), (codes.shape[0], HALF // g, g))
    return tl.reshape(grouped * scale[:, :, None] + low[:, :, None], (codes.shape[0], HALF))


@triton.jit
def decode_int4_kernel(q, k, k_scale, k_low, v, v_scale, v_low, block_table, acc_out, largest_out,
                       total_out, seq_lens, waiting, scale, parts, window,
                       q_stride_seq, q_stride_head, k_stride_block, k_stride_head,
                       k_scale_stride_block, k_scale_stride_head,
                       v_scale_stride_block, v_scale_stride_head, table_stride_seq, C,
                       N: tl.constexpr, WINDOW: tl.constexpr, G: tl.constexpr,
                       G_BLOCK: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr,
                       S_BLOCK: tl.constexpr):
    """S_BLOCK is the group g; v has the strides of k, and lows have those of their scales."""
    b, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(seq_lens + b)
    first = 0
    if WINDOW:
        first = tl.minimum(tl.maximum(length + tl.load(waiting + b) - window, 0), length)
    whole = first // S_BLOCK * S_BLOCK                                  # whole groups of the keys
    share = tl.cdiv(tl.cdiv(length - whole, S_BLOCK), parts) * S_BLOCK
    begin = whole + part * share
    end = tl.minimum(begin + share, length)
    dtype = q.dtype.element_ty              # the products are taken in it, and summed in fp32
    g, i = tl.arange(0, G_BLOCK), tl.arange(0, HALF)    # i: a byte of H/2, channels i and i + H/2
    real = i < H // 2
    mine = (g < G)[:, None] & real[None, :]
    at = q + b * q_stride_seq + (head * G + g)[:, None] * q_stride_head + i[None, :]
    q_lo = tl.load(at, mask=mine, other=0.0).to(tl.float32)
    q_hi = tl.load(at + H // 2, mask=mine, other=0.0).to(tl.float32)

    largest = tl.full([G_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([G_BLOCK], tl.float32)
    acc_lo = tl.zeros([G_BLOCK, HALF], tl.float32)
    acc_hi = tl.zeros([G_BLOCK, HALF], tl.float32)
    for start in range(begin, end, S_BLOCK):
        block, inner = tl.load(block_table + b * table_stride_seq + start // C).to(
            tl.int64), start % C
        s = tl.arange(0, S_BLOCK)
        seen = (start + s >= first) & (start + s < end)
        here = seen[:, None] & real[None, :]
        # 1. Scores. The keys' scales are one row for S_BLOCK tokens, 4 * H bytes with their lows.
        row = (block * k_scale_stride_block + head * k_scale_stride_head
               + inner // S_BLOCK * H + i)
        scale_lo = tl.load(k_scale + row, mask=real, other=0.0).to(tl.float32)
        scale_hi = tl.load(k_scale + row + H // 2, mask=real, other=0.0).to(tl.float32)
        low_lo = tl.load(k_low + row, mask=real, other=0.0).to(tl.float32)
        low_hi = tl.load(k_low + row + H // 2, mask=real, other=0.0).to(tl.float32)
        place = (block * k_stride_block + head * k_stride_head
                 + (inner + s)[:, None] * (H // 2) + i[None, :])
        codes = tl.load(k + place, mask=here, other=0)                  # H / 2 bytes a key
        scores = tl.dot((q_lo * scale_lo[None, :]).to(dtype), tl.trans(_number(codes & 15, dtype)),
                        input_precision="ieee")
        scores += tl.dot((q_hi * scale_hi[None, :]).to(dtype), tl.trans(_number(codes >> 4, dtype)),
                         input_precision="ieee")
        scores += tl.sum(q_lo * low_lo[None, :] + q_hi * low_hi[None, :], 1)[:, None]
        scores = tl.where(seen[None, :], scores * scale, -float("inf"))
        weights, shrink, largest, total = rescale(scores, largest, total)
        # 2. Values. Their scales are H / g a token.
        codes = tl.load(v + place, mask=here, other=0)
        row = (block * v_scale_stride_block + head * v_scale_stride_head
               + (inner + s)[:, None] * (H // S_BLOCK))
        if H // 2 % S_BLOCK == 0:
            t = tl.arange(0, HALF // S_BLOCK)                           # groups in half a token
            known, row = seen[:, None] & (t < H // 2 // S_BLOCK)[None, :], row + t[None, :]
            lo = _scaled(codes & 15, v_scale + row, v_low + row, known, S_BLOCK, HALF).to(dtype)
            row += H // 2 // S_BLOCK
            hi = _scaled(codes >> 4, v_scale + row, v_low + row, known, S_BLOCK, HALF).to(dtype)
        else:                                                           # a group in both halves
            lo_row, hi_row = row + (i // S_BLOCK)[None, :], row + ((i + H // 2) // S_BLOCK)[None, :]
            lo = _scaled(codes & 15, v_scale + lo_row, v_low + lo_row, here, 1, HALF).to(dtype)
            hi = _scaled(codes >> 4, v_scale + hi_row, v_low + hi_row, here, 1, HALF).to(dtype)
        acc_lo = acc_lo * shrink[:, None] + tl.dot(weights.to(dtype), lo, input_precision="ieee")
        acc_hi = acc_hi * shrink[:, None] + tl.dot(weights.to(dtype), hi, input_precision="ieee")

    row = (part * tl.num_programs(0) + b) * N + head * G + g
    tl.store(acc_out + row[:, None] * H + i[None, :], acc_lo, mask=mine)
    tl.store(acc_out + row[:, None] * H + H // 2 + i[None, :], acc_hi, mask=mine)
    tl.store(largest_out + row, largest, mask=g < G)
    tl.store(total_out + row, total, mask=g < G)


def decode_int4(q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, k_low: torch.Tensor,
                v: torch.Tensor, v_scale: torch.Tensor, v_low: torch.Tensor,
                block_table: torch.Tensor, seq_lens: torch.Tensor, parts: int | None = None,
                tail: tuple[torch.Tensor, ...] | None = None,
                window: int | None = None) -> torch.Tensor:
    """q [B, N, H]; k, v [blocks, K, C, H/2] of uint8; k_scale, k_low [blocks, K, C/g, H] and
    v_scale, v_low [blocks, K, C, H/g] of fp16; each head's part is in one piece; block_table
    [B, most], seq_lens [B] of int32 -> [B, N, H].

    A `tail` is keys and values [tails, K, any, H] that come behind and are not rounded, which of
    them is a sequence's, and how many tokens count, both [B] of int32; `seq_lens` may then be 0.
    `window` as in `decode_paged`. Raises ValueError for tensors that do not fit together, and for
    an H that is not whole groups of g.
    """
    # 1. What fits together.
    check("q", q, (None, None, None), FLOATS)
    B, N, H = q.shape
    check("k", k, (None, None, None, H // 2), (torch.uint8,), like=q)
    K, C = k.shape[1:3]
    check("k_scale", k_scale, (len(k), K, None, H), (torch.float16,), like=q)
    g = C // k_scale.shape[2]
    if g < 16 or g * k_scale.shape[2] != C or H % g or g & (g - 1):
        raise ValueError(f"k_scale is {list(k_scale.shape)} for blocks of {C} tokens of H={H}: "
                         "groups of 16, 32, 64 ... that divide a block and H are accepted")
    check("v", v, tuple(k.shape), (torch.uint8,), like=q)
    check("k_low", k_low, tuple(k_scale.shape), (torch.float16,), like=q)
    for name, tensor in (("v_scale", v_scale), ("v_low", v_low)):
        check(name, tensor, (len(k), K, C, H // g), (torch.float16,), like=q)
    for name, tensor, its in (("v", v, k), ("k_low", k_low, k_scale), ("v_low", v_low, v_scale)):
        if tensor.stride() != its.stride():
            raise ValueError(f"{name} has strides {tensor.stride()}: {its.stride()}, those of its "
                             "twin, are accepted")
    for name, tensor in (("k", k), ("k_scale", k_scale), ("v_scale", v_scale)):
        if tensor.stride(2) != tensor.shape[3]:
            raise ValueError(f"{name} has strides {tensor.stride()}: each head's part in one piece "
                             "is accepted")
    check("block_table", block_table, (B, None), (torch.int32,), like=q)
    check("seq_lens", seq_lens, (B,), (torch.int32,), like=q)
    check_heads(N, K)
    at_least_1(parts=parts, window=window)
    # Without a window the kernel does not read `waiting`.
    waiting = torch.zeros_like(seq_lens) if tail is None and window else seq_lens
    if tail is not None:
        keys, values, which, waiting = tail
        check_attention(q, keys, values, waiting)
        check("which", which, (B,), (torch.int32,), like=q)
    # 2. The rounded tokens in parts.
    parts = parts or parts_for(B * K, min(block_table.shape[1] * C, window or 2**30), 64,
                               multiprocessors(q.device))
    acc, largest, total = empty_parts(q, parts + (tail is not None))
    sizes = {"N": N, "G": N // K, "G_BLOCK": power_of_2(N // K, least=16), "H": H}
    decode_int4_kernel[(B, K, parts)](
        q, k, k_scale, k_low, v, v_scale, v_low, block_table, acc, largest, total, seq_lens,
        waiting, LOG2_E * H**-0.5, parts, window or 0, *q.stride()[:2], *k.stride()[:2],
        *k_scale.stride()[:2], *v_scale.stride()[:2], block_table.stride(0), C,
        WINDOW=window is not None, HALF=power_of_2(H // 2, least=16), S_BLOCK=g, **sizes,
        **blocks("decode_int4", q.dtype))
    # 3. The tail as one more part: a sequence has one block of them, of which fewer tokens count.
    if tail is not None:
        most = power_of_2(keys.shape[2])
        decode_paged_kernel[(B, K, 1)](
            q, keys, values, which, acc[-1], largest[-1], total[-1], waiting, LOG2_E * H**-0.5, 1,
            window or 2**30, *q.stride()[:2], *keys.stride()[:3], *values.stride()[:3], 1,
            C=most, H_BLOCK=power_of_2(H, least=16), S_BLOCK=32, **sizes, num_warps=4)
    return join_parts(acc, largest, total, q.dtype)


def decode_int4_reference(q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor,
                          k_low: torch.Tensor, v: torch.Tensor, v_scale: torch.Tensor,
                          v_low: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor,
                          window: int | None = None) -> torch.Tensor:
    """The same in plain PyTorch: make numbers of the codes first."""
    k_scale, k_low, v_scale, v_low = (x.to(q.dtype) for x in (k_scale, k_low, v_scale, v_low))
    keys, values = (torch.cat((codes & 15, codes >> 4), -1).to(q.dtype) for codes in (k, v))
    keys = keys.unflatten(2, (k_scale.shape[2], -1)) * k_scale[..., None, :] + k_low[..., None, :]
    values = values.unflatten(3, (v_scale.shape[3], -1)) * v_scale[..., None] + v_low[..., None]
    return decode_paged_reference(q, keys.flatten(2, 3), values.flatten(3, 4), block_table,
                                  seq_lens, window)
