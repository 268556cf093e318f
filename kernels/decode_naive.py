"""Decode attention, the plain way: one program for each query head of each sequence.

    out[b, n] = softmax(q[b, n] · k[b, n // G]ᵀ / sqrt(H)) v[b, n // G]
    (Vaswani et al. 2017, equation 1)

q [B, N, H], the one new token of each sequence; k, v [B, K, S, H] of which the first seq_lens[b]
tokens count; G = N / K.

Each of the G query heads that share a KV head walks over its keys and values by itself, so they are
asked for G times. With e bytes a number, and S the sum of the lengths:

    bytes asked for = 2 * N * S * H * e         keys and values; K/N of them would do
                    + 2 * B * N * H * e         queries and output
"""

from __future__ import annotations

import torch

from clawdemy_kernels.blocks import blocks
from clawdemy_kernels.launch import LOG2_E, check_attention, power_of_2, tl, triton
from clawdemy_kernels.online_softmax import rescale


@triton.jit
def decode_naive_kernel(q, k, v, out, seq_lens, scale, q_stride_seq, q_stride_head,
                        k_stride_seq, k_stride_head, k_stride_token,
                        v_stride_seq, v_stride_head, v_stride_token,
                        out_stride_seq, out_stride_head, G: tl.constexpr, H: tl.constexpr,
                        H_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr):
    b, n = tl.program_id(0), tl.program_id(1)
    length = tl.load(seq_lens + b)
    h = tl.arange(0, H_BLOCK)
    k += b.to(tl.int64) * k_stride_seq + (n // G) * k_stride_head
    v += b.to(tl.int64) * v_stride_seq + (n // G) * v_stride_head
    query = tl.load(q + b * q_stride_seq + n * q_stride_head + h,       # H * e bytes
                    mask=h < H, other=0.0).to(tl.float32) * scale

    largest = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([H_BLOCK], tl.float32)
    for start in range(0, length, S_BLOCK):
        s = start + tl.arange(0, S_BLOCK)
        here = (s < length)[:, None] & (h < H)[None, :]
        keys = tl.load(k + s[:, None] * k_stride_token + h[None, :],    # S_BLOCK * H * e bytes
                       mask=here, other=0.0).to(tl.float32)
        scores = tl.where(s < length, tl.sum(query[None, :] * keys, 1), -float("inf"))
        weights, shrink, largest, total = rescale(scores[None, :], largest, total)
        values = tl.load(v + s[:, None] * v_stride_token + h[None, :],  # as many again
                         mask=here, other=0.0).to(tl.float32)
        acc = acc * shrink + tl.sum(tl.trans(weights) * values, 0)
    tl.store(out + b * out_stride_seq + n * out_stride_head + h,        # H * e bytes
             (acc / total).to(out.dtype.element_ty), mask=h < H)


def decode_naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                 seq_lens: torch.Tensor) -> torch.Tensor:
    """q [B, N, H], k, v [B, K, S, H] with any strides but the last, seq_lens [B] of int32 (1 to S)
    -> [B, N, H].

    Raises ValueError for tensors that do not fit together. The reference is `decode_reference`.
    """
    check_attention(q, k, v, seq_lens)
    (B, N, H), K = q.shape, k.shape[1]
    out = torch.empty_like(q)
    decode_naive_kernel[(B, N)](
        q, k, v, out, seq_lens, LOG2_E * H**-0.5,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *out.stride()[:2],
        G=N // K, H=H, H_BLOCK=power_of_2(H), **blocks("decode_naive", q.dtype, H))
    return out


def decode_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                     seq_lens: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch, in the dtype of its arguments, a sequence at a time: what every
    decode kernel must give."""
    G, out = q.shape[1] // k.shape[1], torch.empty_like(q)
    for b, length in enumerate(seq_lens.tolist()):
        keys, values = (x[b, :, :length].repeat_interleave(G, dim=0) for x in (k, v))  # [N, S, H]
        scores = torch.einsum("nh,nsh->ns", q[b], keys) * q.shape[-1] ** -0.5
        out[b] = torch.einsum("ns,nsh->nh", scores.softmax(-1), values)
    return out
