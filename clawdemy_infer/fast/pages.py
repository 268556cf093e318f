"""Where a step's keys and values lie, for those who read and write them there: C++ and Triton.

To them every cache of plain keys and values is a pool of blocks. That of a `PagedCache` is one; a
`ContiguousCache` is a pool of blocks of `capacity` tokens, of which sequence b has the b-th.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from clawdemy_infer.kv_cache import ContiguousCache, PagedCache, Step


class Pages(NamedTuple):
    """Keys and values [L, blocks, K, block_size, H], and the blocks of each of the step's
    sequences, `table` [B, most] of int32, filled up with zeros."""

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor

    @property
    def block_size(self) -> int:
        return self.keys.shape[3]


def has_pages(step: Step) -> bool:
    """Are there `Pages` of it? Not of a cache that rounds, forgets, or keeps something else."""
    cache = step.cache
    return isinstance(cache, ContiguousCache | PagedCache)


def pages_of(step: Step) -> Pages | None:
    """None where a step has none. The tensors are the cache's own."""
    if not has_pages(step):
        return None
    cache = step.cache
    paged = isinstance(cache, PagedCache)
    table = step.block_table if paged else [[sequence] for sequence in step.sequences]
    most = max(map(len, table))
    rows = [[*blocks, *[0] * (most - len(blocks))] for blocks in table]
    return Pages(cache.keys, cache.values,
                 torch.tensor(rows, dtype=torch.int32, device=cache.device))


def slots_of(step: Step) -> torch.Tensor:
    """The slot of the pool that each new token goes to, [M]: slot s is token s % block_size of
    block s // block_size."""
    if isinstance(step.cache, PagedCache):
        return step.slot_mapping
    slots = [sequence * step.cache.capacity + past + i
             for sequence, past, T in zip(step.sequences, step.past, step.num_new_tokens,
                                          strict=True)
             for i in range(T)]
    return torch.tensor(slots, device=step.cache.device)
