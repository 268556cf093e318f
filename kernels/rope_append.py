"""Turn queries and keys by their positions, and put keys and values into their slots: all that lies
between a product and attention.

Rotary embedding (Su et al. 2021) turns the pairs (x[i], x[i + H/2]) by an angle that grows with the
position:

    x[i]'       = x[i] cos_i - x[i + H/2] sin_i
    x[i + H/2]' = x[i + H/2] cos_i + x[i] sin_i

qkv [M, N + 2K, H] is what one product left. slot_mapping[m] is the place of token m's keys in the
pool: block slot_mapping[m] // C at slot_mapping[m] % C. One program for each row and head; the
angles [M, H/2] are read by each of them, from L2 after the first.

    bytes asked for = M * (N + 2K) * H * e * (1 read + 1 write)
                    + M * (N + K) * H * e'          cos and sin, e' bytes each
                    + 8 * M * 2K                    the slots
"""

from __future__ import annotations

import torch

from clawdemy_kernels.launch import FLOATS, check, power_of_2, tl, triton


@triton.jit
def rope_append_kernel(qkv, cos, sin, slot_mapping, q, k, v, qkv_stride_token, qkv_stride_head,
                       cos_stride_token, sin_stride_token, q_stride_token, q_stride_head,
                       k_stride_block, k_stride_head, k_stride_slot,
                       v_stride_block, v_stride_head, v_stride_slot, C, N: tl.constexpr,
                       K: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    m, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    real = i < HALF
    source = qkv + m * qkv_stride_token + n * qkv_stride_head + i
    low = tl.load(source, mask=real, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=real, other=0.0).to(tl.float32)
    if n < N + K:                                                       # values are not turned
        c = tl.load(cos + m * cos_stride_token + i, mask=real, other=0.0).to(tl.float32)
        s = tl.load(sin + m * sin_stride_token + i, mask=real, other=0.0).to(tl.float32)
        low, high = low * c - high * s, high * c + low * s
    if n < N:
        target = q + m * q_stride_token + n * q_stride_head + i
    else:
        slot = tl.load(slot_mapping + m)
        if n < N + K:
            target = (k + slot // C * k_stride_block + (n - N) * k_stride_head
                      + slot % C * k_stride_slot + i)
        else:
            target = (v + slot // C * v_stride_block + (n - N - K) * v_stride_head
                      + slot % C * v_stride_slot + i)
    tl.store(target, low.to(q.dtype.element_ty), mask=real)
    tl.store(target + HALF, high.to(q.dtype.element_ty), mask=real)


def rope_append(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                slot_mapping: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """qkv [M, N + 2K, H], cos and sin [M, H/2] of any float, slot_mapping [M] of int64, k and v
    [blocks, K, C, H], which are written to.

    Returns the turned queries [M, N, H]. Raises ValueError for tensors that do not fit together; a
    slot outside the pool is the caller's to avoid, for a GPU cannot be asked before the launch.
    """
    check("qkv", qkv, (None, None, None))
    M, heads, H = qkv.shape
    check("k", k, (None, None, None, H), (qkv.dtype,), like=qkv)
    check("v", v, tuple(k.shape), (qkv.dtype,), like=qkv)
    (_, K, C, _), N = k.shape, heads - 2 * k.shape[1]
    if N < 1 or N % K or H % 2:
        raise ValueError(f"qkv is {list(qkv.shape)}: an even H, and a multiple of K={K} query "
                         "heads beside 2K others are accepted")
    check("cos", cos, (M, H // 2), FLOATS, like=qkv)
    check("sin", sin, (M, H // 2), FLOATS, like=qkv)
    check("slot_mapping", slot_mapping, (M,), (torch.int64,), like=qkv)
    q = qkv.new_empty(M, N, H)
    rope_append_kernel[(M, N + 2 * K)](
        qkv, cos, sin, slot_mapping, q, k, v, *qkv.stride()[:2], cos.stride(0), sin.stride(0),
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], C,
        N=N, K=K, HALF=H // 2, BLOCK=power_of_2(H // 2), num_warps=1)
    return q


def rope_append_reference(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                          slot_mapping: torch.Tensor, k: torch.Tensor,
                          v: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch."""
    (_, K, C, _), N = k.shape, qkv.shape[1] - 2 * k.shape[1]
    low, high = qkv[:, :N + K].chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    turned = torch.cat((low * c - high * s, high * c + low * s), -1).to(qkv.dtype)
    block, slot = slot_mapping // C, slot_mapping % C
    k[block, :, slot], v[block, :, slot] = turned[:, N:], qkv[:, N + K:]
    return turned[:, :N]
