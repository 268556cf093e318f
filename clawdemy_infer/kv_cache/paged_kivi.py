"""KIVI in pages: a block is a group of tokens, rounded when it is full (`kivi`; Liu et al. 2024, in the blocks of Kwon et al. 2023).

A full block is never written again, so it can be rounded once and shared, known to the prefix cache and evicted as before. Only
the last block of a sequence is not full. Its tokens wait in full precision in a *tail*, and a tail belongs to the block and not
to the sequence: two forks that share the block share its tail, and copy on write copies it.

    block tables    full | full | full | partly filled
    bytes           codes  codes  codes  a tail of block_size tokens in `dtype`
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch

from clawdemy_infer.backends import choose
from clawdemy_infer.kv_cache.block_pool import BlockPool
from clawdemy_infer.kv_cache.block_tables import BlockTables
from clawdemy_infer.kv_cache.kivi import CodesAndTails, GroupedCodes
from clawdemy_infer.kv_cache.paged import PagedCache
from clawdemy_infer.kv_cache.runs import Run, RunStep, runs
from clawdemy_infer.kv_cache.step import at_least_1


class PagedKiviStore:
    """Codes for all blocks of `tables.pool`, and `tails` blocks in full precision. Groups are of block_size numbers.

    2 * L * K * block_size * H * (blocks * (bits / 8 + 4 / block_size) + tails * bytes of dtype); and codes for the blocks of the
    host. Raises ValueError for sizes below 1, bits other than 2, 4 and 8, and an H that block_size does not divide.
    """

    def __init__(self, tables: BlockTables, layers: int, kv_heads: int, head_dim: int, tails: int, bits: int = 4,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        at_least_1(layers=layers, kv_heads=kv_heads, head_dim=head_dim, tails=tails)
        self.tables, self.size, self.tails, self.dtype, self.device = tables, tables.pool.block_size, tails, dtype, torch.device(device)
        self.shape = layers, kv_heads, self.size, head_dim

        def codes(pool: BlockPool | None, device: torch.device | str) -> list[GroupedCodes]:
            """Keys by channel over the tokens of a block, values by token."""
            shape = (layers, pool.blocks if pool else 0, kv_heads, self.size, head_dim)
            return [GroupedCodes(shape, bits, self.size, along, device) for along in (-2, -1)]

        self.codes, self.host_codes = codes(tables.pool, device), codes(tables.host, "cpu")
        self.tail = [torch.zeros(layers, tails, kv_heads, self.size, head_dim, dtype=dtype, device=device) for _ in range(2)]
        self.tail_of: dict[int, int] = {}                       # block -> which tail, for those that were last written to a tail
        self.host_tail_of: dict[int, list[torch.Tensor]] = {}   # block of the host -> its keys and values in full precision

    # ---- tails ----

    def tidy(self) -> None:
        """Take back the tails whose blocks are nobody's last, partly filled one any more."""
        wanted = {self.tables.tail(sequence) for sequence in self.tables.lengths}
        self.tail_of = {block: tail for block, tail in self.tail_of.items() if block in wanted}

    def open(self, block: int) -> int:
        """A tail for `block`: its own, or a free one. ValueError if there is none."""
        if block not in self.tail_of:
            free = set(range(self.tails)).difference(self.tail_of.values())
            if not free:
                raise ValueError(f"tails={self.tails}: one more sequence than that is in the middle of a block")
            self.tail_of[block] = min(free)
        return self.tail_of[block]

    def reopen(self, block: int) -> None:
        """A tail for `block`, which was full and then cut: what it held goes back there, rounded as it is."""
        if block not in self.tail_of:
            tail, layers = self.open(block), self.shape[0]
            for codes, tensor in zip(self.codes, self.tail, strict=True):
                for layer in range(layers):
                    codes.read(layer, slice(block, block + 1), 0, out=tensor[layer, tail:tail + 1])

    # ---- tokens come ----

    def append(self, blocks: Sequence[int], past: int, new: Sequence[torch.Tensor]) -> None:
        """Keep `new`, keys and values [L, K, T, H], behind `past` tokens of a sequence that has these blocks."""
        first, waiting = divmod(past, self.size)
        whole = (past + new[0].shape[2]) // self.size           # blocks that are full now
        if whole > first:
            tail, full = self.tail_of.get(blocks[first]), torch.tensor(blocks[first:whole], device=self.device)
            if waiting:
                new = [torch.cat((tensor[:, tail, :, :waiting], x), dim=2) for tensor, x in zip(self.tail, new, strict=True)]
            tokens, waiting = len(full) * self.size, 0
            for codes, x in zip(self.codes, new, strict=True):
                codes.write(full, 0, x[:, :, :tokens].unflatten(2, (-1, self.size)).transpose(1, 2))            # [L, n, K, size, H]
            new = [x[:, :, tokens:] for x in new]
            if new[0].shape[2]:                                 # the rest needs a tail; else the old one stays until the tokens count
                self.tail_of.pop(blocks[first], None)
        if rest := new[0].shape[2]:
            tail = self.open(blocks[whole])
            for tensor, x in zip(self.tail, new, strict=True):
                tensor[:, tail, :, waiting:waiting + rest] = x

    # ---- whole blocks ----

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks within the pool."""
        self._copy_codes(self.codes, sources, self.codes, targets)
        for source, target in zip(sources, targets, strict=True):
            self.tail_of.pop(target, None)
            if source in self.tail_of:
                tail = self.open(target)
                for tensor in self.tail:
                    tensor[:, tail] = tensor[:, self.tail_of[source]]

    def to_host(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks of the pool to blocks of the host."""
        self._copy_codes(self.codes, sources, self.host_codes, targets)
        host = self.tables.host
        self.host_tail_of = {block: tail for block, tail in self.host_tail_of.items() if host.counts[block] and block not in targets}
        self.host_tail_of |= {target: [tensor[:, self.tail_of[source]].to("cpu", copy=True) for tensor in self.tail]
                              for source, target in zip(sources, targets, strict=True) if source in self.tail_of}

    def from_host(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks of the host to blocks of the pool. ValueError, and nothing has happened, where no tail is free."""
        self.tidy()
        self._copy_codes(self.host_codes, sources, self.codes, targets)
        for source, target in zip(sources, targets, strict=True):
            if source in self.host_tail_of:
                tail = self.open(target)
                for tensor, x in zip(self.tail, self.host_tail_of[source], strict=True):
                    tensor[:, tail] = x.to(self.device)

    def _copy_codes(self, sources: list[GroupedCodes], these: Sequence[int], targets: list[GroupedCodes], those: Sequence[int]) -> None:
        for source, target in zip(sources, targets, strict=True):
            for x, y in zip(source.tensors, target.tensors, strict=True):                   # [L, blocks, K, ...]
                for this, that in zip(these, those, strict=True):
                    y[:, that].copy_(x[:, this])

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the pool and of the tails, without those of the host."""
        return sum(tensor.nbytes for tensor in (*self.codes[0].tensors, *self.codes[1].tensors, *self.tail))

    @property
    def host_bytes(self) -> int:
        """Bytes of the host's blocks, and of the tails that wait there now."""
        waiting = [tensor for block, tails in self.host_tail_of.items() if self.tables.host.counts[block] for tensor in tails]
        return sum(tensor.nbytes for tensor in (*self.host_codes[0].tensors, *self.host_codes[1].tensors, *waiting))


class PagedKiviCache(PagedCache):
    """The sequences of `tables` in `bits` bits, a block of tokens at a time; what a `KiviCache` of groups of block_size computes.

    Neighbours in a step that bring equally many tokens are computed as one rectangle, as far as the longest. On the backend "triton"
    those that bring one are computed by a kernel that follows the tables.
    """

    def __init__(self, tables: BlockTables, store: PagedKiviStore, capacity: int | None = None, backend: str | None = None) -> None:
        super().__init__(tables, store, capacity)
        self.backend = choose(store.device, backend)
        (self.keys, self.values), (self.key_tail, self.value_tail) = store.codes, store.tail

    @classmethod
    def for_model(cls, model, batch: int, capacity: int, block_size: int = 32, bits: int = 4) -> PagedKiviCache:
        """A cache for sequences 0 to B-1 of `model`, with blocks for `capacity` tokens of each, up to a multiple of 8 blocks."""
        return super().for_model(model, batch, capacity, block_size, tails=batch, bits=bits)

    @classmethod
    def over(cls, model, tables: BlockTables, capacity: int | None = None, *, tails: int, bits: int = 4) -> PagedKiviCache:
        """A cache for `model` over tables that a scheduler made. `tails` sequences may be in the middle of a block at a time: as
        many as there will ever be at once are enough."""
        shape = model.config.shape
        store = PagedKiviStore(tables, shape.L, shape.K, shape.H, tails, bits, model.dtype, model.device)
        return cls(tables, store, capacity, model.backend)

    def rounded(self, length: int) -> int:
        """How many of `length` tokens are kept as codes; the rest is in a tail."""
        return length // self.store.size * self.store.size

    def tails_needed(self, new: Mapping[Hashable, int]) -> int:
        """How many tails there must be for this step: one for each sequence in it, and those of others who wait with one."""
        waiting = {self.tables.tail(sequence) for sequence in self.lengths if sequence not in new}
        return len(new) + len(waiting - {None})

    def can_append(self, new: Mapping[Hashable, int]) -> bool:
        """Does each sequence stay within the capacity, and are there blocks and tails for it?"""
        return super().can_append(new) and self.tails_needed(new) <= self.store.tails

    def can_swap_in(self, sequence: Hashable) -> bool:
        """Are there blocks and a tail for what this sequence had?"""
        return self.tables.can_swap_in(sequence) and self.tails_needed({sequence: 0}) <= self.store.tails

    def begin(self, new: Mapping[Hashable, Sequence[int]], window: int | None = None) -> RunStep:
        """Begin a step that brings these tokens; ValueError where they do not fit. Takes blocks, and copies those shared ones
        that will be written to.
        """
        return _Step(self, new, window)


class _Step(RunStep):
    def __init__(self, cache: PagedKiviCache, new: Mapping[Hashable, Sequence[int]], window: int | None) -> None:
        super().__init__(cache, new)
        store, tables = cache.store, cache.tables
        if (needed := cache.tails_needed(new)) > store.tails:
            raise ValueError(f"new: {needed} sequences may be in the middle of a block, and there are {store.tails} tails")
        store.tidy()
        tables.reserve({sequence: len(ids) for sequence, ids in new.items()}, store.copy)
        for sequence in new:
            if (block := tables.tail(sequence)) is not None:
                store.reopen(block)
        self.parts = [_Part(cache, run, window, [tables.blocks[name] for name in self.sequences[run.sequences]])
                      for run in runs(self, range(len(self.new)))]

    def commit(self) -> None:
        for part in self.parts:
            part.commit()
        self.cache.tables.commit(self.ids)
        self.cache.store.tidy()


class _Part(CodesAndTails):
    """Sequences whose codes and tails lie where their `tables`, lists of blocks, say."""

    def __init__(self, cache: PagedKiviCache, run: Run, window: int | None, tables: Sequence[Sequence[int]]) -> None:
        self.tables, self.store = tables, cache.store
        super().__init__(cache, run, window)
        if not self.by_kernel:
            self.blocks, self.tails = (torch.tensor(x, dtype=torch.int64, device=cache.device) for x in self.places())  # [B, most], [B]

    def places(self) -> tuple[list[list[int]], list[int]]:
        """The full blocks of each sequence, as many for all, and its tail. Nobody sees the blocks 0, and tails 0, that are nobody's."""
        blocks, tails, most = [], [], self.codes // self.store.size or int(self.by_kernel)
        for past, table in zip(self.run.past, self.tables, strict=True):
            full, waiting = divmod(past, self.store.size)
            blocks.append([*table[:full], *[0] * (most - full)])
            tails.append(self.store.open(table[full]) if waiting or self.by_kernel else 0)  # the kernel puts the new token there
        return blocks, tails

    def read(self, layer: int, codes: GroupedCodes, tail: torch.Tensor, out: torch.Tensor) -> None:
        in_blocks = out[:, :, :self.codes].unflatten(2, (self.blocks.shape[1], self.cache.store.size))          # [B, K, most, size, H]
        codes.read(layer, self.blocks, 0, out=in_blocks.transpose(1, 2))
        out[:, :, self.codes:] = tail[layer, self.tails, :, :self.tail]

    def commit(self) -> None:
        keys, values = self.fresh_keys_and_values()
        for i, (past, blocks) in enumerate(zip(self.run.past, self.tables, strict=True)):
            self.cache.store.append(blocks, past, (keys[:, i], values[:, i]))
