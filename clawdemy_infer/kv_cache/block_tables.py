"""Block tables: which blocks hold the tokens of each sequence, in order (Kwon et al. 2023,
PagedAttention, section 4.3). No torch.

Token t of a sequence lies in its block t // block_size, at offset t % block_size. Of the blocks
that hold tokens only the last may be partly empty. Empty ones may lie behind it: reserved for later
chunks of a prompt, or by a step that was interrupted. This file decides, for a scheduler, a
simulator and `paged.PagedCache`; the cache moves the bytes.

One step goes   can_append?   reserve   (compute)   commit.   Before `commit` no length has changed,
and a `reserve` that is not followed by one may be repeated: it finds the blocks that it took."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence

from clawdemy_infer.kv_cache.block_pool import BlockPool
from clawdemy_infer.kv_cache.prefix_cache import PrefixCache

Copy = Callable[[list[int], list[int]], None]
"""Copies the bytes of source blocks to target blocks, at once."""


def copy_nothing(sources: list[int], targets: list[int]) -> None:
    """The `Copy` of a simulator, which has no bytes."""


class BlockTables:
    """The sequences that live in `pool`.

    `lengths[sequence]` are its tokens, `blocks[sequence]` its blocks, reserved ones last.

    >>> tables = BlockTables(BlockPool(blocks=4, block_size=2))
    >>> tables.add("a")                                 # nothing of it is cached
    0
    >>> tables.reserve({"a": 3}); tables.commit({"a": [7, 8, 9]})
    >>> tables.blocks["a"]                              # the second block holds 1 token of 2
    [0, 1]
    >>> tables.fork("a", "b"); tables.pool.ref_counts   # no byte has moved: both share both blocks
    [2, 2, 0, 0]
    >>> tables.reserve({"b": 1}); tables.blocks["b"]    # b will write: it gets a copy of block 1
    [0, 2]
    """

    def __init__(self, pool: BlockPool, prefix_caching: bool = False) -> None:
        self.pool = pool
        self.prefix = PrefixCache(pool.block_size) if prefix_caching else None
        if self.prefix:
            pool.on_evict = self.prefix.forget
        self.on_proof = False           # full blocks are learned by `learn` alone, not by `commit`
        self.lengths: dict[Hashable, int] = {}
        self.blocks: dict[Hashable, list[int]] = {}
        # For the prefix cache: what the blocks hold, and the digests of those that are full.
        self._ids: dict[Hashable, list[int]] = {}
        self._digests: dict[Hashable, list[bytes]] = {}

    # ---- sequences come and go ----

    def blocks_to_add(self, tokens: int, ids: Sequence[int] = (),
                      digests: list[bytes] | None = None) -> int:
        """Free blocks that `add` and `reserve` take for a sequence of `tokens` tokens, the first of
        them `ids`: all but those that are found and used. Found and idle, a block is free too.
        `digests` as of `PrefixCache.find`."""
        found = self.prefix.find(ids, [] if digests is None else digests) if self.prefix else []
        return self.pool.blocks_for(tokens) - sum(self.pool.ref_counts[each] > 0 for each in found)

    def add(self, sequence: Hashable, ids: Sequence[int] = (), digests: list[bytes] | None = None,
            again: bool = False) -> int:
        """A new sequence, which will bring the token `ids`. Returns how many of them are in the
        pool already: those count as its own from now on. 0 without a prefix cache, whose statistics
        leave out who comes `again`."""
        self._check_new("sequence", sequence)
        digests = [] if digests is None else digests
        found = self.prefix.find(ids, digests) if self.prefix else []
        for block in found:
            self.pool.touch(block)
        length = len(found) * self.pool.block_size
        if self.prefix and not again:
            self.prefix.asked += len(ids)
            self.prefix.found += length
        self._enter(sequence, found, length, list(ids[:length]), digests[:len(found)])
        return length

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """A sequence that begins as `parent` is, and shares its blocks until one writes (4.4)."""
        self._known(parent)
        self._check_new("child", child)
        blocks = self.blocks[parent][:self.pool.blocks_for(self.lengths[parent])]
        for block in blocks:
            self.pool.touch(block)
        self._enter(child, blocks, self.lengths[parent], list(self._ids[parent]),
                    list(self._digests[parent]))

    def free(self, sequence: Hashable) -> None:
        """It has ended, or gives way. The prefix cache knows its full blocks as room allows."""
        self._known(sequence)
        blocks = self.blocks.pop(sequence)
        del self.lengths[sequence], self._ids[sequence], self._digests[sequence]
        self._release(blocks)

    def learn(self, sequence: Hashable) -> None:
        """Tell the prefix cache of the blocks that have become full."""
        ids, digests = self._ids[sequence], self._digests[sequence]
        for i in range(len(digests), len(ids) // self.pool.block_size if self.prefix else 0):
            self.prefix.learn(self.prefix.digest(i, ids, digests), self.blocks[sequence][i])

    def forget(self, sequence: Hashable) -> None:
        """What it has computed is in doubt: nobody is to find its blocks from now on."""
        for block in self.blocks[sequence] if self.prefix else ():
            self.prefix.forget(block)

    def truncate(self, length: int, sequence: Hashable) -> None:
        """Forget all but the first `length` tokens."""
        self._known(sequence)
        most = self.lengths[sequence]
        if not 0 <= length <= most:
            raise ValueError(f"length={length}: sequence {sequence!r} has {most} tokens, "
                             f"so 0 to {most}")
        keep = self.pool.blocks_for(length)
        self.lengths[sequence] = length
        del self._ids[sequence][length:], self._digests[sequence][length // self.pool.block_size:]
        rest = self.blocks[sequence][keep:]
        del self.blocks[sequence][keep:]
        self._release(rest)

    # ---- a step ----

    def blocks_needed(self, num_new_tokens: Mapping[Hashable, int]) -> int:
        """Blocks that a step takes which brings so many tokens of each of these sequences."""
        needed, writers = 0, Counter()
        for sequence, T in num_new_tokens.items():
            self._known(sequence)
            after = self.pool.blocks_for(self.lengths[sequence] + T)
            needed += max(0, after - len(self.blocks[sequence]))
            full, rest = divmod(self.lengths[sequence], self.pool.block_size)
            if rest and T:                                  # its last block will be written to
                writers[self.blocks[sequence][full]] += 1
        # Each writer to a shared block needs a copy; where all who hold it write, one keeps it.
        return needed + sum(min(count, self.pool.ref_counts[block] - 1)
                            for block, count in writers.items())

    def can_append(self, num_new_tokens: Mapping[Hashable, int]) -> bool:
        """Is there room for this step? If not: wait, or preempt somebody."""
        # No token takes more than one block, which mostly settles it.
        return (sum(num_new_tokens.values()) <= self.pool.free
                or self.blocks_needed(num_new_tokens) <= self.pool.free)

    def reserve(self, num_new_tokens: Mapping[Hashable, int], copy: Copy = copy_nothing) -> None:
        """Take the blocks that the step needs, and copy those that it would write to and somebody
        else reads (copy on write).

        Raises ValueError, before anything is taken, where `can_append` says no."""
        for sequence in num_new_tokens.keys() - self.lengths.keys():
            self._known(sequence)
        if not self.can_append(num_new_tokens):
            needed = self.blocks_needed(num_new_tokens)
            raise ValueError(f"num_new_tokens: {needed} more blocks are needed, and "
                             f"{self.pool.free} of {self.pool.blocks} are free")
        size = self.pool.block_size
        for sequence, T in num_new_tokens.items():
            blocks, length = self.blocks[sequence], self.lengths[sequence]
            if length % size and T:                         # its last block will be written to
                tail = blocks[length // size]
                if self.pool.ref_counts[tail] > 1:
                    [blocks[length // size]] = copied(self.pool, [tail], copy)
                    self.pool.release(tail)
                elif self.prefix:
                    self.prefix.forget(tail)        # it was full and known once, before a truncate
            while length + T > len(blocks) * size:
                blocks.append(self.pool.allocate())

    def commit(self, new: Mapping[Hashable, Sequence[int]]) -> None:
        """The step is over: these ids count, or without a prefix cache only their number."""
        for sequence, ids in new.items():
            self.lengths[sequence] += len(ids)
            if self.prefix:
                self._ids[sequence] += ids
            if not self.on_proof:
                self.learn(sequence)

    # ---- details ----

    def _known(self, sequence: Hashable) -> None:
        if sequence not in self.lengths:
            raise ValueError(f"sequence={sequence!r}: there is none of this name here")

    def _check_new(self, argument: str, sequence: Hashable) -> None:
        if sequence in self.lengths:
            raise ValueError(f"{argument}={sequence!r}: there is one of this name")

    def _enter(self, sequence: Hashable, blocks: list[int], length: int, ids: list[int],
               digests: list[bytes]) -> None:
        self.blocks[sequence], self.lengths[sequence] = blocks, length
        self._ids[sequence], self._digests[sequence] = ids, digests
        if not self.on_proof:
            self.learn(sequence)

    def _release(self, blocks: list[int]) -> None:
        """The last block first: so it is evicted first, and the beginning stays longest."""
        for block in reversed(blocks):
            self.pool.release(block, keep=self.prefix is not None and block in self.prefix)


def copied(pool: BlockPool, sources: list[int], copy: Copy) -> list[int]:
    """Blocks taken from `pool` for a copy of `sources`; should it be interrupted, free again."""
    targets, done = [pool.allocate() for _ in sources], False
    try:
        copy(sources, targets)
        done = True
    finally:
        for block in () if done else targets:
            pool.release(block)
    return targets
