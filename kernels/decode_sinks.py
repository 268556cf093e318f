"""Decode attention over a ring of the newest tokens, in front of which the first few stay for good:
attention sinks (Xiao et al. 2023).

k, v [B, K, s + W, H] hold s sinks and behind them up to W tokens, in any order: softmax does not
ask for one. But the sinks are attended to from elsewhere. They count as if they stood right before
the window, so queries are turned back for them (`variants/sliding_cache.py`):

    scores[s] = turned · k[s] / sqrt(H)     for a sink
    scores[s] = q · k[s] / sqrt(H)          behind them

The window is cut into parts as in `decode_split`, the sinks are one more part, and all are joined.

    bytes asked for = those of decode_split with one part more, which reads `turned` instead of q
"""

from __future__ import annotations

import torch

from clawdemy_kernels.decode_naive import decode_reference
from clawdemy_kernels.decode_split import (
    empty_parts,
    join_parts,
    launch_parts,
    multiprocessors,
    parts_for,
)
from clawdemy_kernels.launch import at_least_1, check, check_attention


def decode_sinks(q: torch.Tensor, turned: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                 seq_lens: torch.Tensor, sinks: int, parts: int | None = None) -> torch.Tensor:
    """q and turned [B, N, H], k, v [B, K, S, H] with any strides but the last, seq_lens [B] of
    int32 (1 to S) -> [B, N, H].

    Raises ValueError for tensors that do not fit together, and for `sinks` below 1 or not below S.
    """
    check_attention(q, k, v, seq_lens)
    check("turned", turned, tuple(q.shape), (q.dtype,), like=q)
    at_least_1(parts=parts)
    (B, _, _), (_, K, S, _) = q.shape, k.shape
    if not 1 <= sinks < S:
        raise ValueError(f"sinks={sinks}: 1 to {S - 1} of the {S} tokens are accepted")
    if parts is None:
        parts = parts_for(B * K, S - sinks, 64, multiprocessors(q.device))
    made = empty_parts(q, parts + 1)
    launch_parts(q, k[:, :, sinks:], v[:, :, sinks:], (seq_lens - sinks).clamp(min=0), parts, *made)
    launch_parts(turned, k[:, :, :sinks], v[:, :, :sinks], seq_lens.clamp(max=sinks), 1,
                 *(x[-1] for x in made))
    return join_parts(*made, q.dtype)


def decode_sinks_reference(q: torch.Tensor, turned: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                           seq_lens: torch.Tensor, sinks: int) -> torch.Tensor:
    """The same in plain PyTorch. Keys turned the other way would do as well: here each query sees
    twice the numbers, of which half are nothing."""
    nothing = torch.zeros_like(k)
    first = (torch.arange(k.shape[2], device=k.device) < sinks)[:, None]
    keys = torch.cat((torch.where(first, nothing, k), torch.where(first, k, nothing)), -1)
    both = torch.cat((q, turned), -1) * 2 ** 0.5            # the reference divides by sqrt(2 * H)
    return decode_reference(both, keys, torch.cat((v, nothing), -1), seq_lens)[..., :q.shape[-1]]
