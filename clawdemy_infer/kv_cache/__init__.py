"""KV caches: what attention remembers, so that a decode step need not compute it again.

Every cache here offers the decoder the same few things (`KVCache`); they differ in where the bytes lie.
"""

from __future__ import annotations

from typing import Protocol

import torch

from clawdemy_infer.kv_cache.contiguous import ContiguousCache

__all__ = ["ContiguousCache", "KVCache"]


class KVCache(Protocol):
    """What the decoder asks of a cache. One step over T new tokens goes

        append(0, k, v) … append(L-1, k, v)    each layer writes its T tokens and gets back all it may look at
        advance(T)                             the step is over: the new tokens count

    Between the two, `length` still says what it said before. A step that is interrupted half-way has therefore not
    happened: run it again and it overwrites what it had written.
    """

    batch: int
    capacity: int
    length: int

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v [B, K, T, H] behind the past of `layer`; return keys, values [B, K, length + T, H]."""

    def advance(self, new: int) -> None:
        """Count `new` tokens as part of the past. Once a step, after its last layer."""

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""

    @property
    def allocated_bytes(self) -> int:
        """Bytes the cache occupies, whether or not tokens lie in them."""
