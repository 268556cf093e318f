"""A pool of blocks, without bytes: how many hold each (Kwon et al. 2023, PagedAttention, 4.2, 4.4).

A block is room for `block_size` tokens, in one of three states, and free + used = total always:

    used    `ref_counts[block]` block tables point at it
    idle    nobody's, but may be wanted again (`prefix_cache`): free, and taken last, oldest first
    empty   nobody's
"""

from collections import OrderedDict
from collections.abc import Callable

from clawdemy_infer.arithmetic.work import at_least_1


class BlockPool:
    """`blocks` blocks of `block_size` tokens. ValueError where one of the two is below 1."""

    def __init__(self, blocks: int, block_size: int = 16) -> None:
        at_least_1(blocks=blocks, block_size=block_size)
        self.blocks, self.block_size = blocks, block_size
        self.ref_counts = [0] * blocks
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.on_evict: Callable[[int], None] = lambda block: None
        self._empty = list(reversed(range(blocks)))     # the last of them is given out first

    @property
    def free(self) -> int:
        """Blocks that `allocate` can still give out."""
        return len(self._empty) + len(self.idle)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.blocks - self.free

    def blocks_for(self, tokens: int) -> int:
        """How many blocks `tokens` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.block_size)

    def allocate(self) -> int:
        """Give out a block. Ask `free` first: an empty pool is a ValueError."""
        if self._empty:
            block = self._empty.pop()
        elif self.idle:
            block, _ = self.idle.popitem(last=False)            # least recently used
            self.on_evict(block)
        else:
            raise ValueError(f"blocks: all {self.blocks} are in use")
        self.ref_counts[block] = 1
        return block

    def touch(self, block: int) -> None:
        """One more table points at `block`, which is used or idle."""
        if block in self.idle:
            del self.idle[block]
        elif not self.ref_counts[block]:
            raise ValueError(f"block={block}: it is empty; one that is used or idle is accepted")
        self.ref_counts[block] += 1

    def release(self, block: int, keep: bool = False) -> None:
        """One table fewer points at `block`; after the last it is empty, or with `keep` idle."""
        if not self.ref_counts[block]:
            raise ValueError(f"block={block}: it is released, but nobody holds it")
        self.ref_counts[block] -= 1
        if self.ref_counts[block]:
            return
        if keep:
            self.idle[block] = None
        else:
            self._empty.append(block)
