"""Attention with grouped queries: N query heads share K KV heads (Ainslie et al. 2023). MHA is K = N, MQA is K = 1."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(H)) v (Vaswani et al. 2017, equation 1) for q [B, T, N, H] and k, v [B, K, S, H].

    Returns [B, T, N*H]. Query head n reads KV head n // G, where G = N/K.
    """
    B, T, N, H = q.shape
    if T == 1:
        # Decode is bound by reading K and V, so each KV head must be read once and not G times: its G query heads become
        # G rows of one product. They are one token, which sees all of the past, so no mask is needed.
        K = k.shape[1]
        out = scaled_dot_product_attention(q.reshape(B, K, N // K, H), k, v)                # [B, K, G, H]
        return out.reshape(B, 1, N * H)
    out = scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2).reshape(B, T, N * H)                                         # from [B, N, T, H]


def visible_keys(new: int, context: int, window: int | None) -> int:
    """How many of the last keys T new queries can see between them: the first of them still sees window - 1 before it."""
    return min(context, window + new - 1) if window else context


def causal_mask(new: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which of the last `keys` keys each of T new queries sees, [T, keys] of bool. None where causality alone says it:
    for one query, and for a square in which the window never bites. SDPA then skips the upper triangle.
    """
    if new == 1 or (new == keys and (window is None or new <= window)):
        return None
    query = torch.arange(keys - new, keys, device=device)[:, None]
    distance = query - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < (window or keys))
