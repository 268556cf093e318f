"""A step over tensors [L, B, K, capacity, any]: sequences that bring equally many tokens are computed as one rectangle.

A batch that decodes in step is a single rectangle. So is one whose sequences have different lengths, under a mask that hides
what is not theirs: it reads as far as the longest, which is the price of a rectangle.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from clawdemy_infer.attention import attend, causal_mask, ragged_mask, visible_keys
from clawdemy_infer.kv_cache.runs import runs
from clawdemy_infer.kv_cache.step import Pages, Step


class Stretch:
    """What one rectangle writes and reads of one tensor [L, B, K, capacity, X]. Views are taken once a step for all layers."""

    def __init__(self, tensor: torch.Tensor, first: int, past: list[int], new: int, window: int | None) -> None:
        end, alike = max(past) + new, len(set(past)) == 1
        mine = tensor[:, first:first + len(past)]
        begin = end - visible_keys(new, end, window) if alike else 0
        self.visible = mine[:, :, :, begin:end].unbind()                                    # L x [B, K, S, X]
        if alike:
            places = mine[:, :, :, past[0]:end].transpose(2, 3)                             # [L, B, T, K, X]
            if len(past) == 1 or new == 1:
                places = places.flatten(1, 2)                                               # a view: one of the two is 1
            self.places = places.unbind()
        else:
            rows = torch.arange(len(past), device=tensor.device)[:, None]
            at = torch.tensor(past, device=tensor.device)[:, None] + torch.arange(new, device=tensor.device)
            self.places, self.index = None, (rows, slice(None), at)                         # [B, 1] and [B, T]

    def write(self, layer: int, x: torch.Tensor) -> None:
        """Put x [B*T, K, X] behind the past."""
        if self.places:
            place = self.places[layer]
            place.copy_(x if place.dim() == 3 else x.view(place.shape))
        else:
            self.visible[layer][self.index] = x.view(*self.index[2].shape, *x.shape[1:])    # [B, T, K, X]

    def read(self, layer: int) -> torch.Tensor:
        """All that these sequences may see, the new tokens included: a view [B, K, S, X]."""
        return self.visible[layer]


class Rectangle(NamedTuple):
    """B neighbouring sequences that bring T tokens each: `rows` of the packed step.

    A kernel that decodes wants no mask, but which sequences they are, `table` [B, 1], and their `lengths` [B].
    """

    rows: slice
    mask: torch.Tensor | None
    stretches: list[Stretch]
    table: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


class RectangularStep(Step):
    """A step over the sequences of a `ContiguousCache`, or of any cache that has its `tensors` and its `remember`."""

    def __init__(self, cache, new: Mapping[int, Sequence[int]], window: int | None) -> None:
        super().__init__(cache, new)
        self.window = window

    @property
    def rectangles(self) -> list[Rectangle]:
        return self._laid_out[0]

    @property
    def slots(self) -> torch.Tensor | None:
        return self._laid_out[1]

    @cached_property
    def _laid_out(self) -> tuple[list[Rectangle], torch.Tensor | None]:
        """Views of all layers and masks, made when somebody looks through them: compiled code does not."""
        cache, window, fused = self.cache, self.window, self.cache.by_kernel
        rectangles: list[Rectangle] = []
        slots = []                                              # to a kernel the cache is a pool of tiles, one for each sequence
        for run in runs(self):
            stretches = [Stretch(tensor, run.first, run.past, run.new, window) for tensor in cache.tensors]
            places = [*range(run.first, run.first + len(run.past))]
            slots += [place * cache.capacity + past + i for place, past in zip(places, run.past, strict=True) for i in range(run.new)]
            if fused and run.new == 1:
                numbers = places, [past + 1 for past in run.past]
                table, lengths = (torch.tensor(x, dtype=torch.int32, device=cache.device) for x in numbers)
                rectangles.append(Rectangle(run.rows, None, stretches, table[:, None], lengths))
                continue
            if len(set(run.past)) == 1:
                past = run.past[0]
                mask = causal_mask(run.new, visible_keys(run.new, past + run.new, window), window, cache.dtype, cache.device)
            else:
                mask = ragged_mask(run.past, run.new, max(run.past) + run.new, window, cache.dtype, cache.device)
            rectangles.append(Rectangle(run.rows, mask, stretches))
        return rectangles, torch.tensor(slots, device=cache.device) if fused and len(cache.tensors) == 2 else None

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if len(self.rectangles) == 1:
            return self._attend(self.rectangles[0], layer, q, k, v)
        return torch.cat([self._attend(each, layer, q[each.rows], k[each.rows], v[each.rows]) for each in self.rectangles])

    def _attend(self, rectangle: Rectangle, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if rectangle.table is not None:
            self.cache.keep(layer, rectangle.stretches, k, v)
            return self.cache.decode(layer, q, rectangle.table, rectangle.lengths, self.window)
        keys, values = self.cache.remember(layer, rectangle.stretches, k, v)
        return attend(q, keys, values, rectangle.mask)

    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        return None if self.slots is None else (self.slots, *(tensor[layer] for tensor in self.cache.tensors))

    def look(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        out = []
        for rows, mask, stretches, table, lengths in self.rectangles:
            if table is not None:
                out.append(self.cache.decode(layer, q[rows], table, lengths, self.window))
            else:
                out.append(attend(q[rows], *(stretch.read(layer) for stretch in stretches), mask))
        return torch.cat(out) if len(out) > 1 else out[0]

    @cached_property
    def pages_of_rows(self) -> Pages | None:
        cache = self.cache
        if cache.backend != "cpp" or not cache.by_kernel or len(cache.tensors) != 2:
            return None
        places = [place for place, new in zip(self.sequences, self.new, strict=True) for _ in range(new)]
        table, lengths = torch.tensor(places, dtype=torch.int32)[:, None], self.positions.int() + 1
        return Pages(*cache.tensors, table, lengths, cache.capacity, self.window)

    def inputs(self) -> tuple[torch.Tensor, ...] | None:
        (first, *more), slots = self._laid_out
        return None if more or slots is None or first.table is None else (self.positions, slots, first.table, first.lengths)

    def at(self, positions: torch.Tensor, slots: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> RectangularStep:
        step = copy.copy(self)
        step.positions, step._laid_out = positions, ([self.rectangles[0]._replace(table=table, lengths=lengths)], slots)
        return step
