"""Attention with grouped queries: N query heads share K KV heads (Ainslie et al. 2023, GQA). MHA is
K = N, MQA is K = 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
           mask: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(H) + mask) v (Vaswani et al. 2017, equation 1) for k, v [B, K, S, H] and
    q [B*T, N, H], the T new tokens of each sequence one behind the other.

    Returns [B*T, N*H]. Query head n reads KV head n // G, where G = N/K. `mask` is added to the
    scores, [B or 1, 1, T, S] or [T, S]; without one, T is 1 and sees all keys, or T is S and query
    i sees the keys up to i.
    """
    (B, K), (M, N, H) = k.shape[:2], q.shape
    T = M // B
    if T == 1:
        # Decode is bound by reading K and V, so each KV head must be read once and not G times:
        # its G query heads become G rows of one product. They are one token and see the same keys.
        out = scaled_dot_product_attention(q.reshape(B, K, N // K, H), k, v, attn_mask=mask)
        return out.reshape(M, -1)                                       # [B, K, G, H] before
    q = q.view(B, T, N, H).transpose(1, 2)                              # [B, N, T, H]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                       enable_gqa=True)
    return out.transpose(1, 2).reshape(M, -1)


def visible_keys(new: int, context: int, window: int | None) -> int:
    """How many of the last keys T new queries can see between them: the first of them still sees
    window - 1 before it."""
    return min(context, window + new - 1) if window else context


def causal_mask(new: int, keys: int, window: int | None, dtype: torch.dtype,
                device: torch.device | str) -> torch.Tensor | None:
    """Which of the last `keys` keys each of T new queries sees, [T, keys]: 0 where it does, -inf
    where not, to be added to the scores. None where causality alone says it: for one query, and for
    a square in which the window never bites. SDPA then skips the upper triangle.
    """
    if new == 1 or (new == keys and (window is None or new <= window)):
        return None
    return ragged_mask([keys - new], new, keys, window, dtype, device)[0, 0]


def ragged_mask(past: Sequence[int], new: int, keys: int, window: int | None, dtype: torch.dtype,
                device: torch.device | str) -> torch.Tensor:
    """The same for sequences of different lengths: sequence b has `past[b]` tokens before its T new
    ones, and the rest of the `keys` keys is not its own. [B, 1, T, keys], of 0 and -inf.
    """
    query = torch.tensor(past, device=device)[:, None, None, None]
    query = query + torch.arange(new, device=device)[:, None]           # [B, 1, T, 1]
    distance = query - torch.arange(keys, device=device)                # [B, 1, T, keys]
    hidden = (distance < 0) | (distance >= (window or keys))
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
