"""What the decoder asks of a cache: one interface for every way of keeping keys and values.

One forward pass is a *step*. It may bring a different number of new tokens for each sequence: a chunk of a prompt for one, a
single token for the others (selective batching: Yu et al. 2022, Orca, section 3). For everything but attention that makes no
difference, so the decoder packs the new tokens of all sequences into M rows. Attention alone must know whose row is whose,
and what each sequence has seen before. That knowledge is the cache's:

    step = cache.begin({sequence: its new tokens, ...})     checks, makes room, writes no key and no value
    step.attend(0, q, k, v) ... step.attend(L-1, q, k, v)   each layer keeps its new keys and values, and looks at all it may see
    step.commit()                                           the step is over: the new tokens count

Until `commit`, `lengths` says what it said before. A step that was interrupted half-way has therefore not happened: begin
it again, and it writes over what it had written.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import torch


class KVCache(Protocol):
    """Keys and values of several sequences. A sequence is named by anything hashable; simple caches count 0 ... B-1."""

    capacity: int
    """The most tokens that one sequence may come to hold."""

    span: int | None
    """How far positions go where they are counted within the cache, as in a window with sinks: a text may then go on beyond the
    model's context. None where positions are those in the text."""

    dtype: torch.dtype
    """Of the keys and values that go in, and of the queries."""

    device: torch.device

    @property
    def lengths(self) -> Mapping[Hashable, int]:
        """The sequences, in order, and how many tokens of each are kept and count."""

    def can_append(self, new: Mapping[Hashable, int]) -> bool:
        """Is there room for so many more tokens of each of these sequences? Ask before `begin`."""

    def begin(self, new: Mapping[Hashable, Sequence[int]], window: int | None = None) -> Step:
        """Begin a step that brings these token ids. `window` is the model's own sliding window, in tokens, if it has one.

        Raises ValueError, before anything is changed, where `can_append` would say no.
        """

    def truncate(self, length: int, sequence: Hashable | None = None) -> None:
        """Forget all but the first `length` tokens of one sequence, or of all."""

    @property
    def allocated_bytes(self) -> int:
        """Bytes the cache occupies, whether or not tokens lie in them."""


class Step:
    """One forward pass over M new tokens, packed sequence by sequence in the order of `new`.

    `past` and `new` count, per sequence, the tokens kept before and the tokens brought now; `positions` [M] are the places of
    the new tokens in their sequences, as RoPE wants them.
    """

    def __init__(self, cache: KVCache, new: Mapping[Hashable, Sequence[int]]) -> None:
        lengths = cache.lengths
        if not new:
            raise ValueError("new: at least one sequence is needed")
        for sequence, ids in new.items():
            if sequence not in lengths:
                raise ValueError(f"new: the cache has no sequence {sequence!r}")
            if not ids:
                raise ValueError(f"new: sequence {sequence!r} brings no token, and at least 1 is needed")
            if lengths[sequence] + len(ids) > cache.capacity:
                raise ValueError(f"cache: it holds {lengths[sequence]} tokens of at most {cache.capacity}, "
                                 f"and {len(ids)} more do not fit")
        self.cache, self.ids = cache, new
        self.sequences = list(new)
        self.past = [lengths[sequence] for sequence in new]
        self.new = [len(ids) for ids in new.values()]
        self.positions = positions(self.past, self.new, cache.device)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Keep k, v [M, K, H], turned by RoPE already, and let q [M, N, H] look at all of its sequence up to itself.

        Returns [M, N*H], as `attention.attend` defines it.
        """
        raise NotImplementedError

    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Where a kernel may itself put the new keys and values: slots [M], and the layer's keys and values [tiles, K, C, H], of which
        slot s lies in tile s // C at s % C. `look` then does the rest of `attend`. None where they are kept in another way.
        """
        return None

    def look(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """`attend`, for new keys and values that lie in `pages` already."""
        raise NotImplementedError

    @cached_property
    def pages_of_rows(self) -> Pages | None:
        """Where C++ may itself put the new keys and values of all layers, and look; None where it may not."""
        return None

    def inputs(self) -> tuple[torch.Tensor, ...] | None:
        """Of a step by kernels in which every sequence brings one token: all that another such step has differently, on the device. None
        for any other step.
        """
        return None

    def at(self, *places: torch.Tensor) -> Step:
        """The same step, which finds its `inputs` in these places."""
        raise NotImplementedError

    def commit(self) -> None:
        """Count the new tokens. Once a step, after its last layer."""
        for sequence, count in zip(self.sequences, self.new, strict=True):
            self.cache.lengths[sequence] += count


class Pages(NamedTuple):
    """Keys and values [L, tiles, K, C, H], and for each of M new tokens the blocks of its sequence, a row of `table` [M, most], and
    which token of it this is, counted from 1, `lengths` [M]; both of int32. A tile holds one or several blocks of `block_size` tokens.
    A token sees the last `window` up to itself, or all.
    """

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    block_size: int
    window: int | None


def positions(past: Sequence[int], new: Sequence[int], device: torch.device | str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """past[i] ... past[i] + new[i] - 1 for each sequence i, one behind the other: [M] of `dtype`, in which RoPE is computed."""
    if len(past) == 1:
        return torch.arange(past[0], past[0] + new[0], dtype=dtype, device=device)
    return torch.tensor([start + i for start, count in zip(past, new, strict=True) for i in range(count)], dtype=dtype, device=device)


def at_least_1(**sizes: int) -> None:
    """ValueError naming the first of `sizes` that no cache has."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: a cache needs at least 1")
