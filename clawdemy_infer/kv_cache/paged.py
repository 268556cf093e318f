"""The paged KV cache (Kwon et al. 2023, PagedAttention): sequences grow a block at a time, share
blocks, and give them back when they end.

`block_tables` decides which block is whose; here are the bytes, and the interface that the decoder
knows. To attend, a step gathers: keys and values of a sequence are copied together from their
blocks, then attention is that of any cache. That is one write and one more read of everything kept,
in every layer; a kernel that follows the block table (`fast/`) spares both."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cached_property, partial

import torch

from clawdemy_infer.attention import attend, causal_mask, visible_keys
from clawdemy_infer.kv_cache.block_pool import BlockPool
from clawdemy_infer.kv_cache.block_tables import BlockTables
from clawdemy_infer.kv_cache.step import Step, Tokens


class PagedCache:
    """The sequences of `tables`, in two tensors [L, blocks, K, block_size, H] over their pool.

    Slot s, the s-th token of the pool, lies in block s // block_size at s % block_size. With K
    before the tokens, those of one head within a block lie one behind the other."""

    span = None

    def __init__(self, tables: BlockTables, layers: int, kv_heads: int, head_dim: int,
                 capacity: int | None = None, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> None:
        pool, self.tables, self.kv_heads = tables.pool, tables, kv_heads
        self.lengths = tables.lengths       # the sequences in the pool, and how many tokens count
        self.dtype, self.device = dtype, torch.device(device)
        self.capacity = capacity or pool.blocks * pool.block_size
        self.keys = torch.zeros(layers, pool.blocks, kv_heads, pool.block_size, head_dim,
                                dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    @classmethod
    def for_model(cls, model, batch: int, capacity: int, block_size: int = 16) -> "PagedCache":
        """A cache for sequences 0 to B-1 of `model`, with blocks for `capacity` tokens of each."""
        pool = BlockPool(batch * -(-capacity // block_size), block_size)
        cache = cls.over(model, BlockTables(pool), capacity)
        for sequence in range(batch):
            cache.add(sequence)
        return cache

    @classmethod
    def over(cls, model, tables: BlockTables, capacity: int | None = None) -> "PagedCache":
        """A cache for `model` over tables that a scheduler made: memory for all their blocks."""
        shape = model.config.shape
        return cls(tables, shape.L, shape.K, shape.H, capacity, model.dtype, model.device)

    # ---- the sequences ----

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all blocks, whether or not a sequence has them."""
        return self.keys.nbytes + self.values.nbytes

    def can_append(self, num_new_tokens: Mapping[Hashable, int]) -> bool:
        """Does each sequence stay within the capacity, and has the pool the blocks for it?"""
        return self.tables.can_append(num_new_tokens) and all(
            self.lengths[each] + T <= self.capacity for each, T in num_new_tokens.items())

    def begin(self, new: Tokens, window: int | None = None) -> "PagedStep":
        """Begin a step. Takes blocks, and copies those shared ones that it will write to."""
        return PagedStep(self, new, window)

    def add(self, sequence: Hashable, ids: Sequence[int] = ()) -> int:
        """A new sequence; returns how many of its `ids` are cached already."""
        return self.tables.add(sequence, ids)

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """A new sequence that begins as `parent` is now. No byte moves until one of them writes."""
        self.tables.fork(parent, child)

    def free(self, sequence: Hashable) -> None:
        self.tables.free(sequence)

    def truncate(self, length: int, sequence: Hashable | None = None) -> None:
        """Forget all but the first `length` tokens, of one or all, and give back their blocks."""
        chosen = list(self.lengths) if sequence is None else [sequence]
        # The shortest would refuse, so it is asked first.
        for each in sorted(chosen, key=lambda each: self.lengths.get(each, 0)):
            self.tables.truncate(length, each)

    # ---- the bytes ----

    def head_slots(self, slots: torch.Tensor) -> torch.Tensor:
        """Where the K heads of each of `slots` [...] lie in a layer, counted in heads: [..., K]."""
        size, head = self.tables.pool.block_size, torch.arange(self.kv_heads, device=self.device)
        block, offset = (slots // size)[..., None], (slots % size)[..., None]
        return (block * self.kv_heads + head) * size + offset

    def write(self, layer: int, head_slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put k, v [M, K, H] into `head_slots` [M, K]."""
        for y, x in ((self.keys, k), (self.values, v)):
            y[layer].view(-1, x.shape[-1]).index_copy_(0, head_slots.flatten(), x.flatten(0, 1))

    def gather(self, layer: int, head_slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, K, S, H] of `head_slots` [B, K, S], copied together."""
        keys, values = (x[layer].view(-1, x.shape[-1]).index_select(0, head_slots.flatten())
                        .view(*head_slots.shape, -1) for x in (self.keys, self.values))
        return keys, values


def copy_blocks(here: Iterable[torch.Tensor], there: Iterable[torch.Tensor], sources: list[int],
                targets: list[int]) -> None:
    """Copy blocks `sources` of tensors `here` [L, blocks, ...] to blocks `targets` of `there`."""
    for source, target in zip(sources, targets, strict=True):
        for x, y in zip(here, there, strict=True):
            y[:, target].copy_(x[:, source])


class PagedStep(Step):
    """A step over block tables.

    `block_table[i]` are the blocks of the i-th sequence, in order, and `slot_mapping` [M] is the
    slot that each new token goes to."""

    def __init__(self, cache: PagedCache, new: Tokens, window: int | None) -> None:
        super().__init__(cache, new, window)
        pool = cache.keys, cache.values
        cache.tables.reserve(dict(zip(new, self.num_new_tokens, strict=True)),
                             partial(copy_blocks, pool, pool))
        self.block_table = [cache.tables.blocks[sequence] for sequence in self.sequences]

    def slots(self, i: int, begin: int) -> list[int]:
        """The slots of the i-th sequence's tokens from `begin` on, the new ones included."""
        table, size = self.block_table[i], self.cache.tables.pool.block_size
        return [table[token // size] * size + token % size
                for token in range(begin, self.past[i] + self.num_new_tokens[i])]

    @cached_property
    def slot_mapping(self) -> torch.Tensor:
        slots = [slot for i, past in enumerate(self.past) for slot in self.slots(i, past)]
        return torch.tensor(slots, device=self.cache.device)

    @cached_property
    def head_slot_mapping(self) -> torch.Tensor:
        return self.cache.head_slots(self.slot_mapping)                 # [M, K]

    @cached_property
    def parts(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """For all sequences that bring equally many tokens: their rows of the packed step, the head
        slots [B, K, S] to gather, and the mask. Made when the first layer attends."""
        cache, window, first, members, found = self.cache, self.window, 0, {}, []
        for i, T in enumerate(self.num_new_tokens):
            members.setdefault(T, []).append((i, range(first, first + T)))
            first += T
        for T, some in members.items():
            seen = [visible_keys(T, self.past[i] + T, window) for i, _ in some]
            longest = max(seen)
            slots = [self.slots(i, self.past[i] + T - keys)
                     for (i, _), keys in zip(some, seen, strict=True)]
            # The shorter are filled up with their own last slot: nobody reads what is another's.
            slots = [mine + mine[-1:] * (longest - len(mine)) for mine in slots]
            mask = causal_mask([keys - T for keys in seen], T, window, cache.dtype, cache.device)
            rows = torch.tensor([row for _, mine in some for row in mine], device=cache.device)
            slots = torch.tensor(slots, device=cache.device)
            found.append((rows, cache.head_slots(slots).transpose(1, 2), mask))
        return found

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache = self.cache
        cache.write(layer, self.head_slot_mapping, k, v)
        if len(self.parts) == 1:                                        # all rows, in their order
            [(_, head_slots, mask)] = self.parts
            return attend(q, *cache.gather(layer, head_slots), mask)
        out = q.new_empty(len(q), q.shape[1] * q.shape[2])
        for rows, head_slots, mask in self.parts:
            out[rows] = attend(q[rows], *cache.gather(layer, head_slots), mask)
        return out

    def commit(self) -> None:
        self.cache.tables.commit(self.ids)
