"""Where the bytes of a block pool lie, and how they are moved. Which block is whose is decided elsewhere (`block_tables`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clawdemy_infer.kv_cache.block_pool import BlockPool


class PagedStore:
    """Keys and values of all blocks of `pool`: two tensors [L, tiles, K, C, H], C the tokens of a tile of neighbouring blocks.

    Slot s, the s-th token of the pool, lies in tile s // C at s % C. With K before C, the tokens of one head within a tile lie
    one behind the other, and a tile is a matrix that attention reads where it lies. Nothing else is allocated but the same for
    the blocks of a `host` pool, in the host's memory.
    """

    def __init__(self, pool: BlockPool, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu", host: BlockPool | None = None) -> None:
        self.pool, self.dtype, self.device = pool, dtype, torch.device(device)
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        tiles, self.tile_tokens = pool.blocks // pool.tile, pool.tile * pool.block_size
        # Zeros, because a mask hides a stale number but not a NaN.
        self.keys = torch.zeros(layers, tiles, kv_heads, self.tile_tokens, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        shape = (host.blocks if host else 0, layers, kv_heads, pool.block_size, head_dim)
        pinned = self.device.type == "cuda"                     # page-locked memory, which a GPU copies from at full speed
        self.host_keys, self.host_values = (torch.zeros(shape, dtype=dtype, pin_memory=pinned) for _ in range(2))
        self._rows = [tensor.view(layers, -1, head_dim).unbind() for tensor in (self.keys, self.values)]
        self._tiles = [tensor.unbind() for tensor in (self.keys, self.values)]
        self._by_block = [tensor.unflatten(3, (pool.tile, pool.block_size)) for tensor in (self.keys, self.values)]

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Where the H numbers of each KV head of `slots` [M] lie, in a layer seen as rows of H: [M, K]."""
        tile, offset = slots // self.tile_tokens, slots % self.tile_tokens
        head = torch.arange(self.kv_heads, device=self.device)
        return (tile[:, None] * self.kv_heads + head) * self.tile_tokens + offset[:, None]

    def write(self, layer: int, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put k, v [M, K, H] into the slots whose `rows` are given."""
        index = rows.view(-1)
        for of_layer, x in zip(self._rows, (k, v), strict=True):
            of_layer[layer].index_copy_(0, index, x.reshape(-1, self.head_dim))

    def gather(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [K, S, H] of S slots, copied together, one behind the other."""
        index = rows.t().reshape(-1)
        keys, values = (of_layer[layer].index_select(0, index).view(self.kv_heads, -1, self.head_dim) for of_layer in self._rows)
        return keys, values

    def tiles(self, layer: int, which: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [P, K, C, H] of neighbouring tiles, where they lie; or of any, copied together."""
        if isinstance(which, slice):
            keys, values = (tensor[layer][which] for tensor in self._tiles)
        else:
            keys, values = (tensor[layer].index_select(0, which) for tensor in self._tiles)
        return keys, values

    # ---- whole blocks, in all layers at once: each a strided copy, which is read once and written once ----

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks within the pool."""
        for source, target in zip(sources, targets, strict=True):
            for mine, x in zip(self._block(target), self._block(source), strict=True):
                mine.copy_(x)

    def to_host(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks of the pool to blocks of the host."""
        for source, target in zip(sources, targets, strict=True):
            for host, x in zip((self.host_keys, self.host_values), self._block(source), strict=True):
                host[target].copy_(x)

    def from_host(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks of the host to blocks of the pool."""
        for source, target in zip(sources, targets, strict=True):
            for host, x in zip((self.host_keys, self.host_values), self._block(target), strict=True):
                x.copy_(host[source])

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the pool, without those of the host."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def host_bytes(self) -> int:
        """Bytes of the host's blocks."""
        return self.host_keys.nbytes + self.host_values.nbytes

    def _block(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one block, [L, K, block_size, H] each: views."""
        tile, place = divmod(block, self.pool.tile)
        keys, values = (tensor[:, tile, :, place] for tensor in self._by_block)
        return keys, values
