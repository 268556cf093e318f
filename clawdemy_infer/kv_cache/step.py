"""What the decoder asks of a cache: one interface for every way of keeping keys and values.

One forward pass is a *step*. It may bring a different number of new tokens for each sequence: a
chunk of a prompt for one, a single token for the others (selective batching: Yu et al. 2022, Orca,
section 3.2). For everything but attention that makes no difference, so the decoder packs the new
tokens of all sequences into M rows. Attention alone must know whose row is whose, and what each
sequence has seen before. That knowledge is the cache's:

    step = cache.begin({sequence: its new tokens, ...})   checks, makes room, writes no key
    step.attend(0, q, k, v) ... step.attend(L-1, ...)     each layer keeps its new keys and values,
                                                          and attends to all that it may see
    step.commit()                                         the step is over: the new tokens count

Until `commit`, `lengths` says what it said before. A step that was interrupted half-way has
therefore not happened: begin it again, and it writes over what it had written."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch

Tokens = Mapping[Hashable, Sequence[int]]       # token ids by sequence


class KVCache(Protocol):
    """Keys and values of sequences, named by anything hashable; in simple caches, 0 ... B-1."""

    lengths: Mapping[Hashable, int]     # of the sequences, in order: tokens that are kept and count
    capacity: int                       # the most tokens that one sequence may come to hold
    # The most positions, where positions are counted within the cache, as in a window with sinks: a
    # text may then go on beyond the model's context. Otherwise None.
    span: int | None
    dtype: torch.dtype                  # of the keys and values that go in, and of the queries
    device: torch.device

    def can_append(self, num_new_tokens: Mapping[Hashable, int]) -> bool:
        """Is there room for this many more tokens of each sequence? Ask before `begin`."""

    def begin(self, new: Tokens, window: int | None = None) -> "Step":
        """Begin a step that brings these token ids. ValueError, before anything is changed, where
        `can_append` would say no."""

    def truncate(self, length: int, sequence: Hashable | None = None) -> None:
        """Forget all but the first `length` tokens of one sequence, or of all."""


class Step:
    """One forward pass over M new tokens, packed sequence by sequence in the order of `sequences`.

    ids                     the new token ids of each sequence
    past, num_new_tokens    tokens of each sequence that were kept before, and that come now
    positions               [M] fp32: the places of the new tokens in their sequences, for RoPE
    window                  the model's own sliding window in tokens, or None
    """

    def __init__(self, cache: KVCache, new: Tokens, window: int | None = None) -> None:
        lengths = cache.lengths
        if not new:
            raise ValueError("new: at least one sequence is needed")
        for sequence, ids in new.items():
            if sequence not in lengths:
                raise ValueError(f"new: the cache has no sequence {sequence!r}")
            if not ids:
                raise ValueError(f"new: sequence {sequence!r} brings no token; it needs at least 1")
            if lengths[sequence] + len(ids) > cache.capacity:
                raise ValueError(f"cache: it holds {lengths[sequence]} tokens of at most "
                                 f"{cache.capacity}, and {len(ids)} more do not fit")
        self.cache, self.ids, self.sequences, self.window = cache, new, list(new), window
        self.past = [lengths[sequence] for sequence in new]
        self.num_new_tokens = [len(ids) for ids in new.values()]
        self.positions = positions(self.past, self.num_new_tokens, cache.device)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Keep k, v [M, K, H], turned by RoPE already, and let each query of q [M, N, H] attend to
        its sequence up to itself. Returns [M, N*H], as `attention.attend` defines it."""
        raise NotImplementedError

    def commit(self) -> None:
        """Count the new tokens. Once a step, after its last layer."""
        for sequence, count in zip(self.sequences, self.num_new_tokens, strict=True):
            self.cache.lengths[sequence] += count


class Rectangle(NamedTuple):
    """B neighbouring sequences of a cache, `first` and on, that bring T tokens each, `rows` of
    the packed step, behind `past[b]` tokens: one product serves them all."""

    rows: slice
    first: int
    past: list[int]
    T: int

    @property
    def sequences(self) -> slice:
        return slice(self.first, self.first + len(self.past))


def rectangles(step: Step) -> list[Rectangle]:
    """The step over sequences 0 ... B-1 of a cache cut into rectangles, in its own order. Of one,
    the model's window hides the same from all."""
    found, row, places = [], 0, step.sequences
    ends = [past + T for past, T in zip(step.past, step.num_new_tokens, strict=True)]
    # i - place is constant among neighbours in the step that are neighbours in the cache too.
    for (_, T, _), members in groupby(range(len(places)), lambda i: (
            i - places[i], step.num_new_tokens[i], max(0, ends[i] - (step.window or ends[i])))):
        members = list(members)
        rows = slice(row, row := row + len(members) * T)
        found.append(Rectangle(rows, places[members[0]], [step.past[i] for i in members], T))
    return found


def positions(past: Sequence[int], num_new_tokens: Sequence[int], device: torch.device | str,
              dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """past[b], past[b] + 1 ... for the new tokens of each sequence b, one behind the other: [M]."""
    places = [start + t for start, T in zip(past, num_new_tokens, strict=True) for t in range(T)]
    return torch.tensor(places, dtype=dtype, device=device)
