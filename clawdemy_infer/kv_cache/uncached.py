"""The keeper that keeps nothing: attention over the new tokens alone. What a decoder without a cache does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from clawdemy_infer.attention import attend, causal_mask
from clawdemy_infer.kv_cache.step import Step


class Uncached:
    """`batch` sequences that are always empty. They bring equally many tokens each."""

    span = None

    def __init__(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity, self.dtype, self.device = capacity, dtype, device
        self.lengths = dict.fromkeys(range(batch), 0)

    def begin(self, new: Mapping[int, Sequence[int]], window: int | None = None) -> Step:
        """Begin a step in which every token sees the new tokens of its sequence up to itself."""
        return _Step(self, new, window)


class _Step(Step):
    def __init__(self, cache: Uncached, new: Mapping[int, Sequence[int]], window: int | None) -> None:
        super().__init__(cache, new)
        T = self.new[0]
        self.mask = causal_mask(T, T, window, cache.dtype, cache.device)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.unflatten(0, (len(self.new), -1)).transpose(1, 2) for x in (k, v))        # [B, K, T, H]
        return attend(q, k, v, self.mask)

    def commit(self) -> None:
        """Nothing was kept, and nothing counts."""
