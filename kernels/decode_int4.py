"""Decode attention on 4-bit keys and values, as KIVI rounds them (Liu et al. 2024): keys by channel, values by token.

    key[s, h]   = code * scale_k[s // g, h] + low_k[s // g, h]        a scale for each channel of g neighbouring tokens
    value[s, h] = code * scale_v[s, h // g] + low_v[s, h // g]        a scale for each g numbers of a token

Byte i of a token holds channel i in its low half and channel i + H/2 in its high half. A program takes g tokens at a time, which share
one row of key scales, so that row goes into the queries and the keys are multiplied as they are:

    q · key[s] = (q * scale_k) · code[s]  +  q · low_k

    bytes asked for = 2 * K * S * (H / 2 + 4 * H / g)  instead of  2 * K * S * H * 2          3.2 times less at g = 32
                      and the queries and parts of decode_split

Parts are those of `decode_split`. The newest tokens, which wait unrounded until they are a group, are one more part.
"""

from __future__ import annotations

import torch

from clawdemy_kernels.decode_naive import decode_reference
from clawdemy_kernels.decode_split import decode_split_kernel, empty_parts, join_parts, multiprocessors, parts_for
from clawdemy_kernels.launch import FLOATS, LOG2_E, at_least_1, check, check_attention, check_heads, power_of_2, tl, triton
from clawdemy_kernels.online_softmax import rescale


@triton.jit
def _number(codes, dtype):
    """0 to 15 as numbers, exact in any dtype; by way of fp32, for the interpreter knows no other way from integers to bfloat16."""
    return codes.to(tl.float32).to(dtype)


@triton.jit
def _scaled(codes, scale, low, known, g: tl.constexpr, HALF: tl.constexpr):
    """Values [g tokens, HALF] of codes, with a scale and a lowest value for each g of them: [g, HALF / g] pointers."""
    scale = tl.load(scale, mask=known, other=0.0).to(tl.float32)
    low = tl.load(low, mask=known, other=0.0).to(tl.float32)
    grouped = tl.reshape(codes.to(tl.float32), (g, HALF // g, g))
    return tl.reshape(grouped * scale[:, :, None] + low[:, :, None], (g, HALF))


@triton.jit
def decode_int4_kernel(q, k, k_scale, k_low, v, v_scale, v_low, acc_out, largest_out, total_out, lengths, scale, parts,
                       q_b, q_n, k_head, ks_head, v_head, vs_head, N: tl.constexpr, K: tl.constexpr,
                       G: tl.constexpr, G_BLOCK: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, S_BLOCK: tl.constexpr):
    b, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + b)
    share = tl.cdiv(tl.cdiv(length, S_BLOCK), parts) * S_BLOCK
    begin, end = part * share, tl.minimum(part * share + share, length)
    each = (b * K + head).to(tl.int64)
    dtype = q.dtype.element_ty                                              # the products are taken in, and summed in fp32
    g, i = tl.arange(0, G_BLOCK), tl.arange(0, HALF)                        # i: a byte of H/2, that is channels i and i + H/2
    real = i < H // 2
    mine = (g < G)[:, None] & real[None, :]
    at = q + b * q_b + (head * G + g)[:, None] * q_n + i[None, :]
    q_lo = tl.load(at, mask=mine, other=0.0).to(tl.float32)
    q_hi = tl.load(at + H // 2, mask=mine, other=0.0).to(tl.float32)
    t = tl.arange(0, HALF // S_BLOCK)                                       # groups of values in half a token

    largest = tl.full([G_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([G_BLOCK], tl.float32)
    acc_lo = tl.zeros([G_BLOCK, HALF], tl.float32)
    acc_hi = tl.zeros([G_BLOCK, HALF], tl.float32)
    for start in range(begin, end, S_BLOCK):                                # S_BLOCK is the group of the keys
        s = start + tl.arange(0, S_BLOCK)
        here = (s < end)[:, None] & real[None, :]
        row = each * ks_head + start // S_BLOCK * H + i                     # of the keys' scales: 4 * H bytes for S_BLOCK tokens
        scale_lo = tl.load(k_scale + row, mask=real, other=0.0).to(tl.float32)
        scale_hi = tl.load(k_scale + row + H // 2, mask=real, other=0.0).to(tl.float32)
        low_lo = tl.load(k_low + row, mask=real, other=0.0).to(tl.float32)
        low_hi = tl.load(k_low + row + H // 2, mask=real, other=0.0).to(tl.float32)
        codes = tl.load(k + each * k_head + s[:, None] * (H // 2) + i[None, :], mask=here, other=0)         # H / 2 bytes a key
        scores = tl.dot((q_lo * scale_lo[None, :]).to(dtype), tl.trans(_number(codes & 15, dtype)), input_precision="ieee")
        scores += tl.dot((q_hi * scale_hi[None, :]).to(dtype), tl.trans(_number(codes >> 4, dtype)), input_precision="ieee")
        scores += tl.sum(q_lo * low_lo[None, :] + q_hi * low_hi[None, :], 1)[:, None]
        scores = tl.where((s < end)[None, :], scores * scale, -float("inf"))
        weights, shrink, largest, total = rescale(scores, largest, total)

        codes = tl.load(v + each * v_head + s[:, None] * (H // 2) + i[None, :], mask=here, other=0)
        row = each * vs_head + s[:, None] * (H // S_BLOCK) + t[None, :]                                     # H / g scales a token
        known = (s < end)[:, None] & (t < H // 2 // S_BLOCK)[None, :]
        lo = _scaled(codes & 15, v_scale + row, v_low + row, known, S_BLOCK, HALF).to(dtype)
        row += H // 2 // S_BLOCK
        hi = _scaled(codes >> 4, v_scale + row, v_low + row, known, S_BLOCK, HALF).to(dtype)
        acc_lo = acc_lo * shrink[:, None] + tl.dot(weights.to(dtype), lo, input_precision="ieee")
        acc_hi = acc_hi * shrink[:, None] + tl.dot(weights.to(dtype), hi, input_precision="ieee")

    row = (part * tl.num_programs(0) + b) * N + head * G + g
    tl.store(acc_out + row[:, None] * H + i[None, :], acc_lo, mask=mine)
    tl.store(acc_out + row[:, None] * H + H // 2 + i[None, :], acc_hi, mask=mine)
    tl.store(largest_out + row, largest, mask=g < G)
    tl.store(total_out + row, total, mask=g < G)


def decode_int4(q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, k_low: torch.Tensor,
                v: torch.Tensor, v_scale: torch.Tensor, v_low: torch.Tensor, lengths: torch.Tensor, parts: int | None = None,
                tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """q [B, N, H]; k, v [B, K, S, H/2] of uint8; k_scale, k_low [B, K, S/g, H] and v_scale, v_low [B, K, S, H/g] of fp16, each head's
    part in one piece; lengths [B] of int32 -> [B, N, H]. A `tail` is keys and values [B, K, any, H] that come behind and are not rounded,
    and how many of them count, [B] of int32; `lengths` may then be 0. Raises ValueError for tensors that do not fit together, and for
    an H of which a half is not whole groups of g.
    """
    check("q", q, (None, None, None), FLOATS)
    B, N, H = q.shape
    check("k", k, (B, None, None, H // 2), (torch.uint8,), like=q)
    K, S = k.shape[1:3]
    check("k_scale", k_scale, (B, K, None, H), (torch.float16,), like=q)
    g = S // k_scale.shape[2]
    if g < 16 or g * k_scale.shape[2] != S or (H // 2) % g or g & (g - 1):
        raise ValueError(f"k_scale is {list(k_scale.shape)} for S={S} tokens of H={H}: groups of 16, 32, 64 ... that divide S and H/2 "
                         "are accepted")
    check("v", v, (B, K, S, H // 2), (torch.uint8,), like=q)
    check("k_low", k_low, tuple(k_scale.shape), (torch.float16,), like=q)
    for name, tensor in (("v_scale", v_scale), ("v_low", v_low)):
        check(name, tensor, (B, K, S, H // g), (torch.float16,), like=q)
    check("lengths", lengths, (B,), (torch.int32,), like=q)
    check_heads(N, K)
    at_least_1(parts=parts)
    if tail is not None:
        check_attention(q, *tail)
    parts = parts or parts_for(B * K, S, 64, multiprocessors(q.device))
    k, k_scale, k_low, v, v_scale, v_low = (x.contiguous() for x in (k, k_scale, k_low, v, v_scale, v_low))
    G, (acc, largest, total) = N // K, empty_parts(q, parts + (tail is not None))
    decode_int4_kernel[(B, K, parts)](
        q, k, k_scale, k_low, v, v_scale, v_low, acc, largest, total, lengths, LOG2_E * H ** -0.5, parts, *q.stride()[:2],
        k.stride(1), k_scale.stride(1), v.stride(1), v_scale.stride(1), N=N, K=K,
        G=G, G_BLOCK=power_of_2(G, least=16), H=H, HALF=power_of_2(H // 2, least=16), S_BLOCK=g, num_warps=4)
    if tail is not None:
        keys, values, waiting = tail
        decode_split_kernel[(B, K, 1)](
            q, keys, values, acc[-1], largest[-1], total[-1], waiting, LOG2_E * H ** -0.5, 1,
            *q.stride()[:2], *keys.stride()[:3], *values.stride()[:3], N=N,
            G=G, G_BLOCK=power_of_2(G, least=16), H=H, H_BLOCK=power_of_2(H, least=16), S_BLOCK=32, num_warps=4)
    return join_parts(acc, largest, total, q.dtype)


def decode_int4_reference(q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, k_low: torch.Tensor,
                          v: torch.Tensor, v_scale: torch.Tensor, v_low: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch: make numbers of the codes first."""
    codes_k, codes_v = (torch.cat((codes & 15, codes >> 4), -1).to(q.dtype) for codes in (k, v))
    keys = codes_k.unflatten(2, (k_scale.shape[2], -1)) * k_scale.to(q.dtype)[..., None, :] + k_low.to(q.dtype)[..., None, :]
    values = codes_v.unflatten(3, (v_scale.shape[3], -1)) * v_scale.to(q.dtype)[..., None] + v_low.to(q.dtype)[..., None]
    return decode_reference(q, keys.flatten(2, 3), values.flatten(3, 4), lengths)
