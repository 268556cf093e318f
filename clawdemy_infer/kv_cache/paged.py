"""The paged KV cache (Kwon et al. 2023): sequences grow a block at a time, share blocks, and give them back when they end.

`block_tables` decides which block is whose, `paged_store` holds the bytes, and this file joins the two behind the interface
that the decoder knows.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial

import torch

from clawdemy_infer.attention import attend, causal_mask, visible_keys
from clawdemy_infer.kv_cache.block_pool import BlockPool
from clawdemy_infer.kv_cache.block_tables import BlockTables
from clawdemy_infer.kv_cache.paged_attention import attend_tiles, plan
from clawdemy_infer.kv_cache.paged_store import PagedStore
from clawdemy_infer.kv_cache.paged_triton import TableAttention, with_triton
from clawdemy_infer.kv_cache.step import Step


class PagedCache:
    """The sequences of `tables`, whose bytes lie in `store`.

    `attention` chooses how a decode step reads the pages: "tiles" where they lie; "triton" by a kernel that follows the tables, the
    default on a GPU; "gather" by copying each sequence together first, which is slow and easy to follow.
    """

    span = None

    def __init__(self, tables: BlockTables, store: PagedStore, capacity: int | None = None, attention: str | None = None) -> None:
        attention = attention or ("triton" if with_triton(store) else "tiles")
        if attention not in ("tiles", "triton", "gather"):
            raise ValueError(f"attention={attention!r}: tiles, triton, gather are accepted")
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
        return PagedStep(self, new, window)

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


class PagedStep(Step):
    """Sequences that bring one token are computed together, over the tiles. Each of the others is gathered first: a prompt's
    chunk does so much work per key that the copy hardly counts.
    """

    def __init__(self, cache: PagedCache, new: Mapping[Hashable, Sequence[int]], window: int | None) -> None:
        super().__init__(cache, new)
        store, tables, size = cache.store, cache.tables, cache.tables.pool.block_size
        tables.reserve({sequence: len(ids) for sequence, ids in new.items()}, store.copy)
        ends = [past + T for past, T in zip(self.past, self.new, strict=True)]
        begins = [end - visible_keys(T, end, window) for end, T in zip(ends, self.new, strict=True)]
        blocks = [tables.blocks[sequence] for sequence in self.sequences]

        def slots(i: int, begin: int) -> torch.Tensor:
            """Of tokens begin ... end - 1 of the i-th sequence."""
            first = begin // size
            mine = torch.tensor(blocks[i][first:], device=cache.device)[:, None] * size + torch.arange(size, device=cache.device)
            return mine.flatten()[begin - first * size:ends[i] - first * size]

        if max(self.new) == 1:
            last = [end - 1 for end in ends]
            fresh = torch.tensor([mine[i // size] * size + i % size for mine, i in zip(blocks, last, strict=True)], device=cache.device)
        else:
            fresh = torch.cat([slots(i, past) for i, past in enumerate(self.past)])
        self.fresh = store.rows(fresh)
        self.chunks, decodes, decode_rows, at = [], [], [], 0
        for i, T in enumerate(self.new):
            if T == 1 and cache.attention != "gather":
                decodes.append(i)
                decode_rows.append(at)
            else:
                mask = causal_mask(T, ends[i] - begins[i], window, cache.dtype, cache.device)
                self.chunks.append((slice(at, at + T), store.rows(slots(i, begins[i])) if self.past[i] else None, mask))
            at += T
        self.decode, mine = None, [blocks[i] for i in decodes]
        if decodes and cache.attention == "triton":
            self.decode = TableAttention(mine, [ends[i] for i in decodes], window, store)
        elif decodes:
            self.decode = partial(attend_tiles, runs=plan(mine, [(begins[i], ends[i]) for i in decodes], store))
        self.decode_rows = torch.tensor(decode_rows, device=cache.device)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        store = self.cache.store
        store.write(layer, self.fresh, k, v)
        if not self.chunks:
            return self.decode(q, store, layer)
        out = q.new_empty(len(q), q.shape[1] * q.shape[2])
        if self.decode:
            out[self.decode_rows] = self.decode(q[self.decode_rows], store, layer)
        for mine, past, mask in self.chunks:
            if past is None:
                keys, values = k[mine].transpose(0, 1), v[mine].transpose(0, 1)             # nothing to gather
            else:
                keys, values = store.gather(layer, past)
            out[mine] = attend(q[mine], keys[None], values[None], mask)
        return out

    def commit(self) -> None:
        self.cache.tables.commit(self.ids)
