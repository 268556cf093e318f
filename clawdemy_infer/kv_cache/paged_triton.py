"""A step over a block pool by kernels that follow the block tables, where `paged` asks of each tile whose it is, and gathers prompts.

Sequences that bring one token go through `decode_paged`, or `decode_int8` on 8-bit pages; chunks of prompts through `prefill_paged`.
It is the default on a GPU (`backends`); on a CPU the kernels run in Triton's interpreter, for those who want to watch.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence

import torch

from clawdemy_infer.attention import attend, causal_mask
from clawdemy_infer.backends import kernel
from clawdemy_infer.kv_cache.paged_quantized import PagedInt8Store
from clawdemy_infer.kv_cache.paged_store import PagedStore
from clawdemy_infer.kv_cache.step import Step

STORES = (PagedStore, PagedInt8Store)
"""What there are kernels for."""


class TableStep(Step):
    """Every table, length and slot is copied to the device once a step, for all layers."""

    def __init__(self, cache, new: Mapping[Hashable, Sequence[int]], window: int | None) -> None:
        super().__init__(cache, new)
        self.store, self.window, tables = cache.store, window, cache.tables
        self.size = tables.pool.block_size
        tables.reserve({sequence: len(ids) for sequence, ids in new.items()}, self.store.copy)
        self.blocks = [tables.blocks[sequence] for sequence in self.sequences]
        slots = [self._slots(i, past, past + T) for i, (past, T) in enumerate(zip(self.past, self.new, strict=True))]
        self.slots = torch.tensor(sum(slots, []), device=cache.device)
        self.rows = self.store.rows(self.slots)
        first = torch.tensor([0, *self.new]).cumsum(0).tolist()
        ones, chunks = ([i for i, T in enumerate(self.new) if (T > 1) == many] for many in (False, True))
        self.parts = []                                         # rows of the step, and what is done with their queries
        if ones:
            self.parts.append(([first[i] for i in ones], Decode(self, ones)))
        if chunks and isinstance(self.store, PagedStore):
            self.parts.append(([row for i in chunks for row in range(first[i], first[i + 1])], Chunks(self, chunks)))
        elif chunks:
            self.parts += [([*range(first[i], first[i + 1])], Gathered(self, i, first[i])) for i in chunks]
        self.parts = [(torch.tensor(rows, device=cache.device), part) for rows, part in self.parts]

    def _slots(self, i: int, begin: int, end: int) -> list[int]:
        """Of tokens begin ... end - 1 of the i-th sequence."""
        return [self.blocks[i][at // self.size] * self.size + at % self.size for at in range(begin, end)]

    def numbers(self, x: Sequence) -> torch.Tensor:
        return torch.tensor(x, dtype=torch.int32, device=self.store.device)

    def table(self, which: Sequence[int]) -> torch.Tensor:
        """The blocks of some sequences, [B, most]."""
        tables = [self.blocks[i] for i in which]
        most = max(map(len, tables))
        return self.numbers([[*blocks, *[0] * (most - len(blocks))] for blocks in tables])

    def pages(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        return (self.slots, self.store.keys[layer], self.store.values[layer]) if isinstance(self.store, PagedStore) else None

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.brought = k, v
        self.store.write(layer, self.rows, k, v)
        return self.look(layer, q)

    def look(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        if len(self.parts) == 1:
            return self.parts[0][1](layer, q)
        out = q.new_empty(len(q), q.shape[1] * q.shape[2])
        for rows, part in self.parts:
            out[rows] = part(layer, q[rows])
        return out

    def inputs(self) -> tuple[torch.Tensor, ...] | None:
        (_, first), *more = self.parts
        if more or not isinstance(first, Decode) or not isinstance(self.store, PagedStore):
            return None
        return self.positions, self.slots, first.table, first.lengths

    def at(self, positions: torch.Tensor, slots: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> TableStep:
        step, [(rows, part)] = copy.copy(self), self.parts
        step.positions, step.slots, step.parts = positions, slots, [(rows, copy.copy(part))]
        step.parts[0][1].table, step.parts[0][1].lengths = table, lengths
        return step

    def commit(self) -> None:
        self.cache.tables.commit(self.ids)


class Decode:
    """Sequences that bring one token each."""

    def __init__(self, step: TableStep, which: Sequence[int]) -> None:
        self.store, self.table = step.store, step.table(which)
        self.lengths = step.numbers([step.past[i] + 1 for i in which])
        self.options = {"window": step.window, "block_size": step.size}

    def __call__(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """q [B, N, H] -> [B, N*H]."""
        store = self.store
        if isinstance(store, PagedStore):
            out = kernel("decode_paged")(q, store.keys[layer], store.values[layer], self.table, self.lengths, **self.options)
        else:
            k, v, k_scale, v_scale = (of[layer] for of in (store.codes.keys, store.codes.values, store.scales.keys, store.scales.values))
            out = kernel("decode_int8")(q, k, k_scale.squeeze(-1), v, v_scale.squeeze(-1), self.table, self.lengths, **self.options)
        return out.flatten(1)


class Chunks:
    """Sequences that bring more, one behind the other."""

    def __init__(self, step: TableStep, which: Sequence[int]) -> None:
        new = [step.new[i] for i in which]
        self.store, self.table = step.store, step.table(which)
        self.starts = step.numbers([0, *new]).cumsum(0, dtype=torch.int32)
        self.past = step.numbers([step.past[i] for i in which])
        self.options = {"window": step.window, "block_size": step.size, "longest": max(new)}

    def __call__(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """q [M, N, H] -> [M, N*H]."""
        store = self.store
        out = kernel("prefill_paged")(q, store.keys[layer], store.values[layer], self.table, self.starts, self.past, **self.options)
        return out.flatten(1)


class Gathered:
    """One sequence that brings more over 8-bit pages: copied together as numbers first, if anything lies there."""

    def __init__(self, step: TableStep, i: int, first: int) -> None:
        self.step, self.store, past, T = step, step.store, step.past[i], step.new[i]
        self.mine = slice(first, first + T)
        slots = torch.tensor(step._slots(i, 0, past + T), device=self.store.device)
        self.rows = self.store.rows(slots) if past else None
        self.mask = causal_mask(T, past + T, step.window, self.store.dtype, self.store.device)

    def __call__(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """q [T, N, H] -> [T, N*H]."""
        if self.rows is None:
            keys, values = (x[self.mine].transpose(0, 1) for x in self.step.brought)
        else:
            keys, values = self.store.gather(layer, self.rows)
        return attend(q, keys[None], values[None], self.mask)
