"""A pool of blocks, and who holds them (Kwon et al. 2023, sections 4.2 and 4.4). Standard library only; no byte lies here.

A block is room for `block_size` tokens. Each is in one of three states, and free + used = total at any time:

    used    `counts[block]` tables point at it
    idle    nobody's, but what lies in it may still be wanted (`prefix_cache`): free, and taken last, oldest first
    empty   nobody's
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class BlockPool:
    """`blocks` blocks of `block_size` tokens.

    Where a block lies does not matter for what attention computes, but for how fast: neighbours can be read in one go. So
    neighbouring blocks form *tiles*, and a sequence is given the rest of its tile, then an empty tile, then what there is.
    A tile is 8 blocks where that divides the pool.
    """

    def __init__(self, blocks: int, block_size: int = 16) -> None:
        for name, size in {"blocks": blocks, "block_size": block_size}.items():
            if size < 1:
                raise ValueError(f"{name}={size}: a pool needs at least 1")
        self.blocks, self.block_size = blocks, block_size
        self.tile = next(tile for tile in (8, 4, 2, 1) if blocks % tile == 0)
        self.counts = [0] * blocks
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.on_evict: Callable[[int], None] = lambda block: None
        # Sets that remember their order: the last one in is the first one out, and in the beginning that is block 0.
        self._empty = dict.fromkeys(reversed(range(blocks)))
        self._empty_tiles = dict.fromkeys(reversed(range(blocks // self.tile)))
        self._empty_in_tile = [self.tile] * (blocks // self.tile)

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

    def allocate(self, after: int | None = None) -> int:
        """Give out a block, if possible the neighbour of block `after`. Ask `free` first: an empty pool is a ValueError."""
        block = self._choose(after)
        if block is None:
            if not self.idle:
                raise ValueError(f"blocks: all {self.blocks} are in use")
            block, _ = self.idle.popitem(last=False)            # least recently used
            self.on_evict(block)
        else:
            self._take(block)
        self.counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more table points at `block`, which is in use or idle."""
        if block in self.idle:
            del self.idle[block]
        elif not self.counts[block]:
            raise ValueError(f"block={block}: it is empty, and an empty block cannot be shared")
        self.counts[block] += 1

    def release(self, block: int, keep: bool = False) -> None:
        """One table fewer points at `block`. After the last it is empty; or idle, if what lies in it is to be kept."""
        if not self.counts[block]:
            raise ValueError(f"block={block}: it is released, but nobody holds it")
        self.counts[block] -= 1
        if self.counts[block]:
            return
        if keep:
            self.idle[block] = None
        else:
            self._put_back(block)

    def _choose(self, after: int | None) -> int | None:
        if after is not None:
            if (after + 1) % self.tile and after + 1 in self._empty:
                return after + 1
            if (after + 1) // self.tile in self._empty_tiles:
                return (after + 1) // self.tile * self.tile
        if self._empty_tiles:
            return next(reversed(self._empty_tiles)) * self.tile
        return next(reversed(self._empty), None)

    def _take(self, block: int) -> None:
        del self._empty[block]
        self._empty_in_tile[block // self.tile] -= 1
        self._empty_tiles.pop(block // self.tile, None)

    def _put_back(self, block: int) -> None:
        tile = block // self.tile
        self._empty[block] = None
        self._empty_in_tile[tile] += 1
        if self._empty_in_tile[tile] == self.tile:
            self._empty_tiles[tile] = None
