"""Decode attention that shares the read: one program for each KV head serves all G query heads of its group.

The queries of the group are G rows of one small matrix, so the scores are a product [G, H] x [H, S] and each key is read once:

    bytes asked for = 2 * K * S * H * e + 2 * B * N * H * e                                S the sum of the lengths

That is G times less than the naive kernel. The price is in arithmetic that would else idle: tensor cores multiply 16 rows at least,
so a group of 3 is padded to 16 and does 5.3 times its own work.  (Ainslie et al. 2023 (GQA) promise the saving; a kernel must take it.)
"""

from __future__ import annotations

import torch

from clawdemy_kernels.blocks import blocks
from clawdemy_kernels.launch import LOG2_E, check_attention, power_of_2, tl, triton
from clawdemy_kernels.online_softmax import rescale


@triton.jit
def decode_grouped_kernel(q, k, v, out, lengths, scale,
                          q_b, q_n, k_b, k_k, k_s, v_b, v_k, v_s, out_b, out_n,
                          G: tl.constexpr, G_BLOCK: tl.constexpr, H: tl.constexpr, H_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr):
    b, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + b)
    g, h = tl.arange(0, G_BLOCK), tl.arange(0, H_BLOCK)
    mine = (g < G)[:, None] & (h < H)[None, :]
    k += b.to(tl.int64) * k_b + head * k_k
    v += b.to(tl.int64) * v_b + head * v_k
    queries = tl.load(q + b * q_b + (head * G + g)[:, None] * q_n + h[None, :], mask=mine, other=0.0)   # [G, H]

    largest = tl.full([G_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([G_BLOCK], tl.float32)
    acc = tl.zeros([G_BLOCK, H_BLOCK], tl.float32)
    for start in range(0, length, S_BLOCK):
        s = start + tl.arange(0, S_BLOCK)
        here = (s < length)[:, None] & (h < H)[None, :]
        keys = tl.load(k + s[:, None] * k_s + h[None, :], mask=here, other=0.0)                  # S_BLOCK * H * e bytes, once
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale                # [G, S_BLOCK]
        scores = tl.where((s < length)[None, :], scores, -float("inf"))
        weights, shrink, largest, total = rescale(scores, largest, total)
        values = tl.load(v + s[:, None] * v_s + h[None, :], mask=here, other=0.0)                # as many again
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    tl.store(out + b * out_b + (head * G + g)[:, None] * out_n + h[None, :],
             (acc / total[:, None]).to(out.dtype.element_ty), mask=mine)


def decode_grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """q [B, N, H], k, v [B, K, S, H] with any strides but the last, lengths [B] of int32 (1 to S) -> [B, N, H].

    Raises ValueError for tensors that do not fit together. The reference is `decode_naive.decode_reference`.
    """
    check_attention(q, k, v, lengths)
    (B, N, H), K = q.shape, k.shape[1]
    G, out = N // K, torch.empty_like(q)
    decode_grouped_kernel[(B, K)](
        q, k, v, out, lengths, LOG2_E * H ** -0.5, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *out.stride()[:2],
        G=G, G_BLOCK=power_of_2(G, least=16), H=H, H_BLOCK=power_of_2(H, least=16), **blocks("decode_grouped", q.dtype, H))
    return out
