"""What rounding and sliding caches share: a step in parts, and masks told where each key stands."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from clawdemy_infer.kv_cache.contiguous import RectangularCache
from clawdemy_infer.kv_cache.step import Rectangle, Step

NOWHERE = -1
"""The position of a key that is not there."""


class KernelCache(RectangularCache):
    """A cache whose decode attention is PyTorch's or a Triton kernel's: what the model runs on."""

    backend = "torch"

    @classmethod
    def for_model(cls, model, batch: int, capacity: int, **options):
        """An empty cache in the shape, dtype and place of `model`, a `Decoder`."""
        shape = model.config.shape
        cache = cls(shape.L, batch, shape.K, shape.H, capacity, dtype=model.dtype,
                    device=model.device, **options)
        cache.backend = getattr(model.runner, "backend", "torch")
        return cache


class PartStep(Step):
    """A step in `parts`: each has a `rectangle`, attends for its rows, and ends with `commit`."""

    parts: list

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if len(self.parts) == 1:
            return self.parts[0].attend(layer, q, k, v)
        return torch.cat([part.attend(layer, *(x[part.rectangle.rows] for x in (q, k, v)))
                          for part in self.parts])

    def commit(self) -> None:
        for part in self.parts:
            part.commit()
        super().commit()


def one_by_one(rectangle: Rectangle) -> Iterator[Rectangle]:
    """The same, a sequence at a time."""
    for i, past in enumerate(rectangle.past):
        start = rectangle.rows.start + i * rectangle.T
        rows = slice(start, start + rectangle.T)
        yield Rectangle(rows, rectangle.first + i, [past], rectangle.T)


def position_mask(queries: torch.Tensor, keys: torch.Tensor, window: int | None, sinks: int,
                  dtype: torch.dtype) -> torch.Tensor:
    """Which keys a query sees: those at or before it, of the last `window` or of the first `sinks`
    tokens, and none that is `NOWHERE`.

    queries [B, T] and keys [B, S] are positions in the text; [B, 1, T, S] of 0 and -inf.
    """
    q, k = queries[:, None, :, None], keys[:, None, None, :]
    hidden = (k > q) | (k == NOWHERE)
    if window is not None:
        hidden |= (q - k >= window) & (k >= sinks)
    zeros = torch.zeros(hidden.shape, dtype=dtype, device=queries.device)
    return zeros.masked_fill_(hidden, -torch.inf)
