"""Decode attention that shares the read: one program for each KV head serves all G query heads of
its group.

The queries of the group are G rows of one small matrix, so the scores are a product [G, H] x [H, S]
and each key is read once. With S the sum of the lengths:

    bytes asked for = 2 * K * S * H * e + 2 * B * N * H * e

That is G times less than the naive kernel. The price is in arithmetic that would else idle: tensor
cores multiply 16 rows at least, so a group of 3 is padded to 16 and does 5.3 times its own work.
(Ainslie et al. 2023 (GQA) promise the saving; a kernel must take it.)
"""

from __future__ import annotations

import torch

from clawdemy_kernels.blocks import blocks
from clawdemy_kernels.launch import LOG2_E, check_attention, power_of_2, tl, triton
from clawdemy_kernels.online_softmax import rescale


@triton.jit
def decode_grouped_kernel(q, k, v, out, seq_lens, scale, q_stride_seq, q_stride_head,
                          k_stride_seq, k_stride_head, k_stride_token,
                          v_stride_seq, v_stride_head, v_stride_token,
                          out_stride_seq, out_stride_head, G: tl.constexpr, G_BLOCK: tl.constexpr,
                          H: tl.constexpr, H_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr):
    b, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(seq_lens + b)
    g, h = tl.arange(0, G_BLOCK), tl.arange(0, H_BLOCK)
    mine = (g < G)[:, None] & (h < H)[None, :]
    k += b.to(tl.int64) * k_stride_seq + head * k_stride_head
    v += b.to(tl.int64) * v_stride_seq + head * v_stride_head
    heads = (head * G + g)[:, None]                                     # of the queries, [G, 1]
    queries = tl.load(q + b * q_stride_seq + heads * q_stride_head + h[None, :],
                      mask=mine, other=0.0)                             # [G, H]

    largest = tl.full([G_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([G_BLOCK], tl.float32)
    acc = tl.zeros([G_BLOCK, H_BLOCK], tl.float32)
    for start in range(0, length, S_BLOCK):
        s = start + tl.arange(0, S_BLOCK)
        here = (s < length)[:, None] & (h < H)[None, :]
        keys = tl.load(k + s[:, None] * k_stride_token + h[None, :],    # S_BLOCK * H * e bytes,
                       mask=here, other=0.0)                            # once
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where((s < length)[None, :], scores, -float("inf"))     # [G, S_BLOCK]
        weights, shrink, largest, total = rescale(scores, largest, total)
        values = tl.load(v + s[:, None] * v_stride_token + h[None, :],  # as many again
                         mask=here, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values,
                                             input_precision="ieee")
    tl.store(out + b * out_stride_seq + heads * out_stride_head + h[None, :],
             (acc / total[:, None]).to(out.dtype.element_ty), mask=mine)


def decode_grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                   seq_lens: torch.Tensor) -> torch.Tensor:
    """q [B, N, H], k, v [B, K, S, H] with any strides but the last, seq_lens [B] of int32 (1 to S)
    -> [B, N, H].

    Raises ValueError for tensors that do not fit together. The reference is
    `decode_naive.decode_reference`.
    """
    check_attention(q, k, v, seq_lens)
    (B, N, H), K = q.shape, k.shape[1]
    G, out = N // K, torch.empty_like(q)
    decode_grouped_kernel[(B, K)](
        q, k, v, out, seq_lens, LOG2_E * H**-0.5,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *out.stride()[:2],
        G=G, G_BLOCK=power_of_2(G, least=16), H=H, H_BLOCK=power_of_2(H, least=16),
        **blocks("decode_grouped", q.dtype, H))
    return out
