"""Runs: neighbouring sequences that bring equally many tokens, so that one product serves them all.

And, for keepers whose keys do not lie in the order of the text, masks that are told where each one stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from clawdemy_infer.kv_cache.step import Step

NOTHING = -1
"""The position of a key that is not there."""


class Run(NamedTuple):
    """Sequences `first`, `first` + 1, ... of the cache: `rows` of the packed step, `past` tokens of each, `new` tokens for each."""

    rows: slice
    first: int
    past: list[int]
    new: int

    @property
    def sequences(self) -> slice:
        return slice(self.first, self.first + len(self.past))

    def each(self) -> Iterator[Run]:
        """The same, one sequence at a time."""
        for i, past in enumerate(self.past):
            start = self.rows.start + i * self.new
            yield Run(slice(start, start + self.new), self.first + i, [past], self.new)


def runs(step: Step, places: Sequence[int] | None = None) -> Iterator[Run]:
    """The step cut into runs, in its own order. `places` are those of its sequences in the cache: their names, if not said."""
    row, places = 0, step.sequences if places is None else places
    # i - place is constant among neighbours in the step that are neighbours in the cache too.
    for (_, new), members in groupby(range(len(step.new)), key=lambda i: (i - places[i], step.new[i])):
        members = list(members)
        rows = slice(row, row + len(members) * new)
        yield Run(rows, places[members[0]], [step.past[i] for i in members], new)
        row = rows.stop


class RunStep(Step):
    """A step in `parts`: each has its `run`, attends to what that run may see, and keeps the rest of its business for `commit`."""

    parts: list

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = [part.attend(layer, q[part.run.rows], k[part.run.rows], v[part.run.rows]) for part in self.parts]
        return out[0] if len(out) == 1 else torch.cat(out)

    def commit(self) -> None:
        for part in self.parts:
            part.commit()
        super().commit()


def mask_by_position(queries: torch.Tensor, keys: torch.Tensor, window: int | None, sinks: int, dtype: torch.dtype) -> torch.Tensor:
    """Which keys a query sees: those at or before it, of the last `window` or of the first `sinks` tokens, and none at `NOTHING`.

    queries [B, T] and keys [B, S] are positions in the text; [B, 1, T, S] of 0 and -inf.
    """
    q, k = queries[:, None, :, None], keys[:, None, None, :]
    hidden = (k > q) | (k == NOTHING)
    if window is not None:
        hidden |= (q - k >= window) & (k >= sinks)
    return torch.zeros(hidden.shape, dtype=dtype, device=queries.device).masked_fill_(hidden, -torch.inf)
