"""Decode attention, the plain way: one program for each query head of each sequence.

    out[b, n] = softmax(q[b, n] · k[b, n // G]ᵀ / sqrt(H)) v[b, n // G]                    (Vaswani et al. 2017, equation 1)

q [B, N, H], the one new token of each sequence; k, v [B, K, S, H] of which the first lengths[b] tokens count; G = N / K.

Each of the G query heads that share a KV head walks over its keys and values by itself, so they are asked for G times. With e bytes a
number, and S the sum of the lengths:

    bytes asked for = 2 * N * S * H * e + 2 * B * N * H * e        of which K/N of the first term would do
"""

from __future__ import annotations

import torch

from clawdemy_kernels.blocks import blocks
from clawdemy_kernels.launch import LOG2_E, check_attention, power_of_2, tl, triton
from clawdemy_kernels.online_softmax import rescale


@triton.jit
def decode_naive_kernel(q, k, v, out, lengths, scale,
                        q_b, q_n, k_b, k_k, k_s, v_b, v_k, v_s, out_b, out_n,
                        G: tl.constexpr, H: tl.constexpr, H_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr):
    b, n = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + b)
    h = tl.arange(0, H_BLOCK)
    k += b.to(tl.int64) * k_b + (n // G) * k_k
    v += b.to(tl.int64) * v_b + (n // G) * v_k
    query = tl.load(q + b * q_b + n * q_n + h, mask=h < H, other=0.0).to(tl.float32) * scale    # H * e bytes

    largest = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([H_BLOCK], tl.float32)
    for start in range(0, length, S_BLOCK):
        s = start + tl.arange(0, S_BLOCK)
        here = (s < length)[:, None] & (h < H)[None, :]
        keys = tl.load(k + s[:, None] * k_s + h[None, :], mask=here, other=0.0).to(tl.float32)    # S_BLOCK * H * e bytes
        scores = tl.where(s < length, tl.sum(query[None, :] * keys, 1), -float("inf"))
        weights, shrink, largest, total = rescale(scores[None, :], largest, total)
        values = tl.load(v + s[:, None] * v_s + h[None, :], mask=here, other=0.0).to(tl.float32)  # as many again
        acc = acc * shrink + tl.sum(tl.trans(weights) * values, 0)
    tl.store(out + b * out_b + n * out_n + h, (acc / total).to(out.dtype.element_ty), mask=h < H)  # H * e bytes


def decode_naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """q [B, N, H], k, v [B, K, S, H] with any strides but the last, lengths [B] of int32 (1 to S) -> [B, N, H].

    Raises ValueError for tensors that do not fit together. The reference is `decode_reference`.
    """
    check_attention(q, k, v, lengths)
    (B, N, H), K = q.shape, k.shape[1]
    out = torch.empty_like(q)
    decode_naive_kernel[(B, N)](
        q, k, v, out, lengths, LOG2_E * H ** -0.5, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *out.stride()[:2],
        G=N // K, H=H, H_BLOCK=power_of_2(H), **blocks("decode_naive", q.dtype, H))
    return out


def decode_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch, in the dtype of its arguments, a sequence at a time: what every decode kernel must give."""
    out = torch.empty_like(q)
    for b, length in enumerate(lengths.tolist()):
        G = q.shape[1] // k.shape[1]
        keys, values = (x[b, :, :length].repeat_interleave(G, dim=0) for x in (k, v))                 # [N, S, H]
        scores = torch.einsum("nh,nsh->ns", q[b], keys) * q.shape[-1] ** -0.5
        out[b] = torch.einsum("ns,nsh->nh", scores.softmax(-1), values)
    return out
