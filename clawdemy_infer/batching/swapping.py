"""Preemption that keeps what was computed: a sequence's blocks are copied to the host's memory and,
when there is room again, back (Kwon et al. 2023, PagedAttention, section 4.5)."""

from collections.abc import Hashable
from functools import partial
from typing import NamedTuple

import torch

from clawdemy_infer.batching.request import Sequence, State
from clawdemy_infer.batching.scheduler import Scheduler
from clawdemy_infer.kv_cache import BlockPool, BlockTables, PagedCache
from clawdemy_infer.kv_cache.block_tables import Copy, copied, copy_nothing
from clawdemy_infer.kv_cache.paged import copy_blocks


class Swapped(NamedTuple):
    """A sequence that waits in the host's memory."""

    blocks: list[int]
    length: int
    ids: list[int]


class SwappingTables(BlockTables):
    """`BlockTables` of which sequences can be swapped out to the `host` pool."""

    def __init__(self, pool: BlockPool, host: BlockPool, prefix_caching: bool = False) -> None:
        if host.block_size != pool.block_size:
            raise ValueError(f"host: its blocks hold {host.block_size} tokens, and those of the "
                             f"pool {pool.block_size}")
        super().__init__(pool, prefix_caching)
        self.host = host
        self.swapped: dict[Hashable, Swapped] = {}

    def free(self, sequence: Hashable) -> None:
        if sequence not in self.swapped:
            return super().free(sequence)
        for block in self.swapped.pop(sequence).blocks:
            self.host.release(block)

    def can_swap_out(self, sequence: Hashable) -> bool:
        """Has the host room for this sequence?"""
        self._known(sequence)
        return self.pool.blocks_for(self.lengths[sequence]) <= self.host.free

    def swap_out(self, sequence: Hashable, copy: Copy = copy_nothing) -> None:
        """Copy a sequence to the host and free its blocks; ValueError unless `can_swap_out`."""
        if not self.can_swap_out(sequence):
            raise ValueError(f"sequence={sequence!r}: the host has no room for "
                             f"{self.lengths[sequence]} tokens")
        sources = self.blocks[sequence][:self.pool.blocks_for(self.lengths[sequence])]
        targets = copied(self.host, sources, copy)
        self.swapped[sequence] = Swapped(targets, self.lengths[sequence], self._ids[sequence])
        super().free(sequence)

    def can_swap_in(self, sequence: Hashable) -> bool:
        """Has the pool room for what this sequence had?"""
        if sequence not in self.swapped:
            raise ValueError(f"sequence={sequence!r}: it is not swapped out")
        return len(self.swapped[sequence].blocks) <= self.pool.free

    def swap_in(self, sequence: Hashable, copy: Copy = copy_nothing) -> None:
        """Bring a sequence back; ValueError unless `can_swap_in`."""
        if not self.can_swap_in(sequence):
            raise ValueError(f"sequence={sequence!r}: {len(self.swapped[sequence].blocks)} blocks "
                             f"are needed, and {self.pool.free} of {self.pool.blocks} are free")
        sources, length, ids = self.swapped[sequence]
        targets = copied(self.pool, sources, copy)
        del self.swapped[sequence]
        self._enter(sequence, targets, length, ids, [])
        for block in sources:
            self.host.release(block)

    def _check_new(self, argument: str, sequence: Hashable) -> None:
        super()._check_new(argument, sequence)
        if sequence in self.swapped:
            raise ValueError(f"{argument}={sequence!r}: there is one of this name")


class SwappingCache(PagedCache):
    """A `PagedCache` over `SwappingTables` that moves the bytes, to memory of the host and back."""

    def __init__(self, tables: SwappingTables, *sizes, **options) -> None:
        super().__init__(tables, *sizes, **options)
        pinned = self.device.type == "cuda"     # page-locked: a GPU copies from it at full speed
        size = self.keys.shape[0], tables.host.blocks, *self.keys.shape[2:]
        self.host = [torch.zeros(size, dtype=self.dtype, pin_memory=pinned) for _ in range(2)]

    def swap_out(self, sequence: Hashable) -> None:
        self.tables.swap_out(sequence, partial(copy_blocks, (self.keys, self.values), self.host))

    def swap_in(self, sequence: Hashable) -> None:
        self.tables.swap_in(sequence, partial(copy_blocks, self.host, (self.keys, self.values)))


class SwappingScheduler(Scheduler):
    """A `Scheduler` that swaps a sequence out to make room, where the host has some. Whoever makes
    it sets `swapper`, which moves the bytes: a `SwappingCache`, or a simulation's executor."""

    swapper: SwappingCache

    def _give_up_blocks(self, sequence: Sequence) -> None:
        if self.tables.can_swap_out(sequence):
            self.swapper.swap_out(sequence)
        else:
            super()._give_up_blocks(sequence)

    def _make_room(self, sequence: Sequence) -> bool:
        if sequence not in self.tables.swapped:
            return super()._make_room(sequence)
        pool = self.tables.pool
        if pool.blocks_for(sequence.total) > pool.free - len(self.running):
            return False
        self.swapper.swap_in(sequence)
        self.tables.reserve({sequence: sequence.total - self.tables.lengths[sequence]})
        return True

    def _end(self, sequence: Sequence, state: State, reason: str, now: float) -> None:
        if sequence in self.tables.swapped:
            self.tables.free(sequence)
        super()._end(sequence, state, reason, now)
