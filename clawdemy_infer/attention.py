"""Attention: N query heads share K KV heads (GQA, Ainslie et al. 2023). MHA: K = N, MQA: K = 1."""

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
           mask: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(H) + mask) v (Vaswani et al. 2017, equation 1) for k, v [B, K, S, H] and
    q [B*T, N, H], the T new tokens of each sequence one behind the other.

    Returns [B*T, N*H]. Query head n reads KV head n // G, where G = N/K. `mask`, 0 or -inf, is
    added to the scores, [B or 1, 1, T, S] or [T, S]; without one, T is 1 and sees all keys, or T is
    S and query i sees the keys up to i. What a query does not see does not matter, NaN included."""
    (B, K), (M, N, H) = k.shape[:2], q.shape
    T = M // B
    if T == 1:
        # Decode is bound by reading K and V, so each KV head must be read once and not G times:
        # its G query heads become G rows of one product. They are one token and see the same keys.
        out = scaled_dot_product_attention(q.reshape(B, K, N // K, H), k, v, mask).reshape(M, -1)
    else:
        rows = q.view(B, T, N, H).transpose(1, 2)                       # [B, N, T, H]
        out = scaled_dot_product_attention(rows, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=True).transpose(1, 2).reshape(M, -1)
    if T == 1 and mask is None or torch.equal(out, out):                # NaN is not equal to itself
        return out
    # NaN - inf and 0 * NaN are NaN: now each query by itself, over nothing but the keys it sees.
    seen = q.new_ones(T, T).tril() if mask is None else mask.exp()      # e^-inf is 0
    seen = seen.expand(B, 1, T, -1).flatten(0, 2) > 0                   # [B*T, S]
    return torch.cat([attend(q[i:i + 1], *(x[i // T, :, seen[i]][None] for x in (k, v)))
                      for i in range(M)])


def visible_keys(T: int, S: int, window: int | None) -> int:
    """How many of the last S keys T new queries see: the first still sees window - 1 before it."""
    return min(S, window + T - 1) if window else S


def causal_mask(past: Sequence[int], T: int, window: int | None, dtype: torch.dtype,
                device: torch.device | str) -> torch.Tensor | None:
    """Which keys the T new queries of sequence b see, which stand behind `past[b]` tokens: those up
    to themselves, and of these the last `window`. [B or 1, 1, T, max(past) + T] to be added to the
    scores: 0 where they do, else -inf. None where causality alone says it: for sequences equally
    long, one query or a square, a window that never bites. SDPA then skips the upper triangle."""
    if len(set(past)) == 1:
        past = past[:1]
        if (T == 1 or not past[0]) and (window is None or past[0] + T <= window):
            return None
    S = max(past) + T
    query = torch.tensor(past, device=device)[:, None, None, None]
    query = query + torch.arange(T, device=device)[:, None]             # [B, 1, T, 1]
    distance = query - torch.arange(S, device=device)                   # [B, 1, T, S]
    hidden = (distance < 0) | (distance >= (window or S))
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
