"""The paged KV cache (Kwon et al. 2023): sequences grow a block at a time, share blocks, and give them back when they end.

`block_tables` decides which block is whose, `paged_store` holds the bytes, and this file joins the two behind the interface
that the decoder knows.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from clawdemy_infer.attention import attend, causal_mask, visible_keys
from clawdemy_infer.backends import choose
from clawdemy_infer.kv_cache.block_pool import BlockPool
from clawdemy_infer.kv_cache.block_tables import BlockTables
from clawdemy_infer.kv_cache.decode_cpp import TYPES, decode_paged
from clawdemy_infer.kv_cache.paged_attention import Plan, attend_tiles, plan
from clawdemy_infer.kv_cache.paged_store import PagedStore
from clawdemy_infer.kv_cache.paged_triton import STORES, TableStep
from clawdemy_infer.kv_cache.step import Pages, Step

FEW = 16
"""Tokens: a sequence that brings more is gathered. As many as this may bring the drafted tokens of a round."""


class PagedCache:
    """The sequences of `tables`, whose bytes lie in `store`.

    `attention` chooses how a decode step reads the pages: "tiles" where they lie; "triton" and "cpp" by kernels that follow the tables,
    the former the default on a GPU (`over` and `for_model` ask the model's backend); "gather" by copying each sequence together first,
    which is slow and easy to follow.
    """

    span = None

    def __init__(self, tables: BlockTables, store: PagedStore, capacity: int | None = None, attention: str | None = None) -> None:
        attention = attention or ("triton" if choose(store.device) == "triton" and isinstance(store, STORES) else "tiles")
        if attention not in ("tiles", "triton", "cpp", "gather"):
            raise ValueError(f"attention={attention!r}: tiles, triton, cpp, gather are accepted")
        self.tables, self.store, self.attention = tables, store, attention
        self.dtype, self.device = store.dtype, store.device
        self.capacity = capacity or tables.pool.blocks * tables.pool.block_size

    @classmethod
    def for_model(cls, model, batch: int, capacity: int, block_size: int = 16, **options) -> PagedCache:
        """A cache for sequences 0 to B-1 of `model`, with blocks for `capacity` tokens of each, up to the next whole tile."""
        blocks = batch * -(-capacity // block_size)
        cache = cls.over(model, BlockTables(BlockPool(blocks + -blocks % 8, block_size)), capacity, **options)
        for sequence in range(batch):
            cache.add(sequence)
        return cache

    @classmethod
    def over(cls, model, tables: BlockTables, capacity: int | None = None, store: type = PagedStore, **options) -> PagedCache:
        """A cache for `model` over tables that a scheduler made: memory for all blocks of their pools, a `PagedStore` or a
        `PagedInt8Store`."""
        shape = model.config.shape
        kept = store(tables.pool, shape.L, shape.K, shape.H, model.dtype, model.device, tables.host)
        kernels = {"triton": isinstance(kept, STORES), "cpp": type(kept) is PagedStore and kept.dtype in TYPES}
        options.setdefault("attention", model.backend if kernels.get(model.backend) else "tiles")
        return cls(tables, kept, capacity, **options)

    @property
    def lengths(self) -> Mapping[Hashable, int]:
        """The sequences in the pool, and how many tokens of each count."""
        return self.tables.lengths

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths.values(), default=0)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the pool: block_size tokens a block, whether or not a sequence has it."""
        return self.store.allocated_bytes

    def can_append(self, new: Mapping[Hashable, int]) -> bool:
        """Does each sequence stay within the capacity, and has the pool the blocks for it?"""
        return self.tables.can_append(new) and all(self.lengths[sequence] + count <= self.capacity for sequence, count in new.items())

    def begin(self, new: Mapping[Hashable, Sequence[int]], window: int | None = None) -> PagedStep:
        """Begin a step that brings these tokens; ValueError where they do not fit. Takes blocks, and copies those shared ones
        that will be written to.
        """
        return (TableStep if self.attention == "triton" else PagedStep)(self, new, window)

    def add(self, sequence: Hashable, ids: Sequence[int] = ()) -> int:
        """A new sequence; returns how many of its `ids` are cached already and need not be brought."""
        return self.tables.add(sequence, ids)

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """A new sequence that begins as `parent` is now. No byte moves until one of the two writes."""
        self.tables.fork(parent, child)

    def free(self, sequence: Hashable) -> None:
        """Give a sequence's blocks back."""
        self.tables.free(sequence)

    def truncate(self, length: int, sequence: Hashable | None = None) -> None:
        """Forget all but the first `length` tokens, of all sequences or of one, and give back the blocks behind them."""
        chosen = list(self.lengths) if sequence is None else [sequence]
        shortest = min(chosen, key=lambda each: self.lengths.get(each, 0), default=None)
        for each in [shortest, *chosen] if chosen else []:              # the shortest would refuse, so it is asked first
            self.tables.truncate(length, each)

    def swap_out(self, sequence: Hashable) -> None:
        """Move a sequence to the host's memory. ValueError where `tables.can_swap_out` says no."""
        self.tables.swap_out(sequence, self.store.to_host)

    def swap_in(self, sequence: Hashable) -> None:
        """Move it back. ValueError where `tables.can_swap_in` says no."""
        self.tables.swap_in(sequence, self.store.from_host)


class Few(NamedTuple):
    """Sequences that bring T tokens each: their rows of the packed step, block tables, and tokens before. Computed over the tiles."""

    rows: slice | torch.Tensor
    tables: list[list[int]]
    past: list[int]
    T: int


class Table(NamedTuple):
    """Sequences that bring one token each, for a kernel: their blocks [B, most], and how many tokens they have with the new one [B]."""

    blocks: torch.Tensor
    lengths: torch.Tensor
    window: int | None

    def attend(self, q: torch.Tensor, store: PagedStore, layer: int) -> torch.Tensor:
        """q [B, N, H] -> [B, N*H]."""
        return decode_paged(q, store.keys[layer], store.values[layer], *self, store.pool.block_size).flatten(1)


class Chunk(NamedTuple):
    """A sequence that brings many: its rows; those of the store to gather, unless nothing was there before; and its mask."""

    rows: slice
    gather: torch.Tensor | None
    mask: torch.Tensor | None


class PagedStep(Step):
    """Sequences that bring the same few tokens are computed together, over the tiles. Each of the others is gathered first: a
    prompt's chunk does so much work per key that the copy hardly counts.
    """

    def __init__(self, cache: PagedCache, new: Mapping[Hashable, Sequence[int]], window: int | None) -> None:
        super().__init__(cache, new)
        store, tables, size = cache.store, cache.tables, cache.tables.pool.block_size
        tables.reserve({sequence: len(ids) for sequence, ids in new.items()}, store.copy)
        blocks = [tables.blocks[sequence] for sequence in self.sequences]

        def slots(i: int, begin: int) -> list[int]:
            """Of the i-th sequence's tokens from `begin` on."""
            return [blocks[i][token // size] * size + token % size for token in range(begin, self.past[i] + self.new[i])]

        def rows(slots: list[int]) -> torch.Tensor:
            return store.rows(torch.tensor(slots, device=cache.device))

        self.fresh = rows([slot for i, past in enumerate(self.past) for slot in slots(i, past)])
        self.window, self.chunks, few, row = window, [], {}, 0
        for i, (past, T) in enumerate(zip(self.past, self.new, strict=True)):
            if cache.attention != "gather" and (T == 1 or past and T <= FEW):
                few.setdefault(T, []).append((i, row))
            else:
                seen = visible_keys(T, past + T, window)
                gather = rows(slots(i, past + T - seen)) if past else None
                self.chunks.append(Chunk(slice(row, row + T), gather, causal_mask(T, seen, window, cache.dtype, cache.device)))
            row += T
        self.few = [Few(_rows([row + t for _, row in members for t in range(T)], cache.device), [blocks[i] for i, _ in members],
                        [self.past[i] for i, _ in members], T) for T, members in few.items()]
        self.plans: list[Plan | Table] = []

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        store, (M, N, H) = self.cache.store, q.shape
        store.write(layer, self.fresh, k, v)
        if not self.plans:                                      # they are the same in every layer
            self.plans = [self._plan(few, N // store.kv_heads) for few in self.few]
        if len(self.few) == 1 and not self.chunks:
            return self._few(q, layer, self.plans[0])
        out = q.new_empty(M, N * H)
        for few, its in zip(self.few, self.plans, strict=True):
            out[few.rows] = self._few(q[few.rows], layer, its)
        for mine, gather, mask in self.chunks:
            if gather is None:
                keys, values = k[mine].transpose(0, 1), v[mine].transpose(0, 1)
            else:
                keys, values = store.gather(layer, gather)
            out[mine] = attend(q[mine], keys[None], values[None], mask)
        return out

    @cached_property
    def pages_of_rows(self) -> Pages | None:
        store, blocks = self.cache.store, self.cache.tables.blocks
        if self.cache.attention != "cpp" or type(store) is not PagedStore:
            return None
        table = as_table([blocks[sequence] for sequence in self.sequences]).repeat_interleave(torch.tensor(self.new), 0)
        return Pages(store.keys, store.values, table, self.positions.int() + 1, store.pool.block_size, self.window)

    def _plan(self, few: Few, G: int) -> Plan | Table:
        if few.T > 1 or self.cache.attention != "cpp":
            return plan(few.tables, few.past, few.T, G, self.window, self.cache.store)
        return Table(as_table(few.tables), torch.tensor(few.past, dtype=torch.int32) + 1, self.window)

    def _few(self, q: torch.Tensor, layer: int, its: Plan | Table) -> torch.Tensor:
        store = self.cache.store
        return its.attend(q, store, layer) if isinstance(its, Table) else attend_tiles(q, store, layer, its)

    def commit(self) -> None:
        self.cache.tables.commit(self.ids)


def _rows(rows: list[int], device: torch.device) -> slice | torch.Tensor:
    """Rows of a step: a slice, which costs nothing to take, where they are neighbours."""
    neighbours = rows[-1] - rows[0] == len(rows) - 1
    return slice(rows[0], rows[-1] + 1) if neighbours else torch.tensor(rows, device=device)


def as_table(blocks: list[list[int]]) -> torch.Tensor:
    """Lists of blocks as one tensor [B, most] of int32, filled up with zeros."""
    most = max(map(len, blocks))
    return torch.tensor([mine + [0] * (most - len(mine)) for mine in blocks], dtype=torch.int32)
