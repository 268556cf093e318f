"""Block tables: which blocks hold the tokens of each sequence, in order (Kwon et al. 2023, section 4.3). No torch.

Token i of a sequence lies in its block i // block_size, at offset i % block_size. Only the last block of a sequence may be
partly empty, so a sequence never wastes more than block_size - 1 tokens. The same object serves a scheduler, a simulator and
`paged.PagedCache`: this file decides, the cache moves bytes.

One step goes   can_append?   reserve   (compute)   commit.   Before `commit` no length has changed, and a `reserve` that is
not followed by one may be repeated: it finds the blocks that it took the first time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from clawdemy_infer.kv_cache.block_pool import BlockPool
from clawdemy_infer.kv_cache.prefix_cache import ROOT, PrefixCache

Copy = Callable[[list[int], list[int]], None]
"""Called with source and target blocks, whose bytes must be copied at once."""


def _copy_nothing(sources: list[int], targets: list[int]) -> None:
    """Where there are no bytes, as in a simulator."""


@contextmanager
def _given_back_if_interrupted(pool: BlockPool, blocks: list[int]) -> Iterator[None]:
    """A copy takes a while, and may be stopped. The blocks that were taken for it are then free again, and nothing has happened."""
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            for block in blocks:
                pool.release(block)


class Swapped(NamedTuple):
    """A sequence that waits in the host's memory."""

    blocks: list[int]
    length: int
    ids: list[int]


class BlockTables:
    """The sequences that live in `pool`. With a `host` pool, sequences can be swapped out to it.

    `lengths[sequence]` are its tokens, `blocks[sequence]` its blocks, of which the last may be reserved and still empty.
    """

    def __init__(self, pool: BlockPool, host: BlockPool | None = None, prefix_caching: bool = False) -> None:
        if host and host.block_size != pool.block_size:
            raise ValueError(f"host: its blocks hold {host.block_size} tokens, and those of the pool {pool.block_size}")
        self.pool, self.host = pool, host
        self.prefix = PrefixCache(pool.block_size) if prefix_caching else None
        if self.prefix:
            pool.on_evict = self.prefix.evict
        self.lengths: dict[Hashable, int] = {}
        self.blocks: dict[Hashable, list[int]] = {}
        self.swapped: dict[Hashable, Swapped] = {}
        self._ids: dict[Hashable, list[int]] = {}               # what the blocks hold, and its digests: for the prefix cache
        self._digests: dict[Hashable, list[bytes]] = {}

    # ---- sequences come and go ----

    def add(self, sequence: Hashable, ids: Sequence[int] = ()) -> int:
        """A new sequence, which will bring the token `ids`. Returns how many of them are in the pool already: those count as
        its own from now on and need not be brought. 0 without a prefix cache.
        """
        if sequence in self.lengths or sequence in self.swapped:
            raise ValueError(f"sequence={sequence!r}: there is one of this name")
        found, digests = self.prefix.find(ids) if self.prefix else ([], [])
        for block in found:
            self.pool.share(block)
        length = len(found) * self.pool.block_size
        self._digests[sequence], self._ids[sequence] = digests, list(ids[:length])
        self.blocks[sequence], self.lengths[sequence] = found, length
        return length

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """A sequence that begins as `parent` is now, and shares all its blocks until one of the two writes (section 4.4)."""
        self._known(parent)
        if child in self.lengths or child in self.swapped:
            raise ValueError(f"child={child!r}: there is one of this name")
        shared = self.blocks[parent][:self.pool.blocks_for(self.lengths[parent])]
        for block in shared:
            self.pool.share(block)
        self._digests[child], self._ids[child] = list(self._digests[parent]), list(self._ids[parent])
        self.blocks[child], self.lengths[child] = shared, self.lengths[parent]

    def free(self, sequence: Hashable) -> None:
        """The sequence has ended, or is preempted to be computed anew. What was full stays known as long as there is room."""
        if sequence in self.swapped:
            for block in self.swapped.pop(sequence).blocks:
                self.host.release(block)
            return
        self._known(sequence)
        blocks = self.blocks.pop(sequence)
        del self.lengths[sequence], self._ids[sequence], self._digests[sequence]
        self._release(blocks)

    def truncate(self, length: int, sequence: Hashable) -> None:
        """Forget all but the first `length` tokens."""
        self._known(sequence)
        if not 0 <= length <= (most := self.lengths[sequence]):
            raise ValueError(f"length={length}: sequence {sequence!r} has {most} tokens, so 0 to {most}")
        keep = self.pool.blocks_for(length)
        self.lengths[sequence] = length
        del self._ids[sequence][length:], self._digests[sequence][length // self.pool.block_size:]
        rest = self.blocks[sequence][keep:]
        del self.blocks[sequence][keep:]
        self._release(rest)

    # ---- a step ----

    def tail(self, sequence: Hashable) -> int | None:
        """The block that is partly filled, which the next token will be written to; None after a full one."""
        full, rest = divmod(self.lengths[sequence], self.pool.block_size)
        return self.blocks[sequence][full] if rest else None

    def blocks_needed(self, new: Mapping[Hashable, int]) -> int:
        """How many blocks a step takes that brings so many tokens for each of these sequences."""
        needed, writers = 0, Counter()
        for sequence, count in new.items():
            self._known(sequence)
            needed += max(0, self.pool.blocks_for(self.lengths[sequence] + count) - len(self.blocks[sequence]))
            if (tail := self.tail(sequence)) is not None and count:
                writers[tail] += 1
        # Each writer to a shared block needs a copy of its own; where all who hold it write, the last one may keep it.
        return needed + sum(min(count, self.pool.counts[block] - 1) for block, count in writers.items())

    def can_append(self, new: Mapping[Hashable, int]) -> bool:
        """Is there room for this step? If not: wait, or preempt somebody."""
        return self.blocks_needed(new) <= self.pool.free

    def reserve(self, new: Mapping[Hashable, int], copy: Copy = _copy_nothing) -> None:
        """Take the blocks that the step needs, and copy those that it would write to and somebody else reads (copy on write).

        Raises ValueError, before anything is taken, where `can_append` says no.
        """
        if (needed := self.blocks_needed(new)) > self.pool.free:
            raise ValueError(f"new: {needed} more blocks are needed, and {self.pool.free} of {self.pool.blocks} are free")
        for sequence, count in new.items():
            blocks = self.blocks[sequence]
            if (tail := self.tail(sequence)) is not None and count:
                if self.pool.counts[tail] > 1:
                    own = self.pool.allocate()
                    with _given_back_if_interrupted(self.pool, [own]):
                        copy([tail], [own])
                    blocks[self.lengths[sequence] // self.pool.block_size] = own
                    self.pool.release(tail)
                elif self.prefix:
                    self.prefix.forget(tail)        # it was full and known once, before a `truncate`
            while len(blocks) < self.pool.blocks_for(self.lengths[sequence] + count):
                blocks.append(self.pool.allocate(after=blocks[-1] if blocks else None))

    def commit(self, new: Mapping[Hashable, Sequence[int]]) -> None:
        """The step is over: these token ids count. Without a prefix cache only their number matters."""
        for sequence, ids in new.items():
            self.lengths[sequence] += len(ids)
            if self.prefix:
                self._ids[sequence] += ids
                self._learn(sequence)

    # ---- swapping: preemption that keeps what was computed (section 4.5) ----

    def can_swap_out(self, sequence: Hashable) -> bool:
        """Has the host room for this sequence?"""
        self._known(sequence)
        return self.host is not None and self.pool.blocks_for(self.lengths[sequence]) <= self.host.free

    def swap_out(self, sequence: Hashable, copy: Copy = _copy_nothing) -> None:
        """Copy a sequence to the host and release its blocks. ValueError where `can_swap_out` says no."""
        if not self.can_swap_out(sequence):
            raise ValueError(f"sequence={sequence!r}: the host has no room for {self.lengths[sequence]} tokens")
        sources = self.blocks[sequence][:self.pool.blocks_for(self.lengths[sequence])]
        targets = [self.host.allocate() for _ in sources]
        with _given_back_if_interrupted(self.host, targets):
            copy(sources, targets)
        swapped = Swapped(targets, self.lengths[sequence], self._ids[sequence])
        self.free(sequence)
        self.swapped[sequence] = swapped

    def can_swap_in(self, sequence: Hashable) -> bool:
        """Has the pool room for what this sequence had?"""
        if sequence not in self.swapped:
            raise ValueError(f"sequence={sequence!r}: it is not swapped out")
        return len(self.swapped[sequence].blocks) <= self.pool.free

    def swap_in(self, sequence: Hashable, copy: Copy = _copy_nothing) -> None:
        """Bring a sequence back. ValueError where `can_swap_in` says no."""
        if not self.can_swap_in(sequence):
            raise ValueError(f"sequence={sequence!r}: {len(self.swapped[sequence].blocks)} blocks are needed, "
                             f"and {self.pool.free} of {self.pool.blocks} are free")
        sources, length, ids = self.swapped[sequence]
        targets: list[int] = []
        for _ in sources:
            targets.append(self.pool.allocate(after=targets[-1] if targets else None))
        with _given_back_if_interrupted(self.pool, targets):
            copy(sources, targets)
        del self.swapped[sequence]
        self.blocks[sequence], self.lengths[sequence], self._ids[sequence], self._digests[sequence] = targets, length, ids, []
        for block in sources:
            self.host.release(block)
        if self.prefix:
            self._learn(sequence)

    # ---- details ----

    def _known(self, sequence: Hashable) -> None:
        if sequence not in self.lengths:
            raise ValueError(f"sequence={sequence!r}: there is none of this name here")

    def _learn(self, sequence: Hashable) -> None:
        size, ids, digests = self.pool.block_size, self._ids[sequence], self._digests[sequence]
        for i in range(len(digests), len(ids) // size):
            digests.append(self.prefix.digest(digests[-1] if digests else ROOT, ids[i * size:(i + 1) * size]))
            self.prefix.learn(digests[i], self.blocks[sequence][i])

    def _release(self, blocks: list[int]) -> None:
        """The last block first: it is then evicted first, and the beginning, which others may share, stays longest."""
        for block in reversed(blocks):
            self.pool.release(block, keep=self.prefix is not None and block in self.prefix)
