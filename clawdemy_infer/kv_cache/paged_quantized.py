"""Pages of 8-bit keys and values: two block pools' worth of tensors in step, one of codes and one of scales.

A scale for each token and head lies in the same slot as its codes, so blocks are shared, copied and swapped as before, and
`block_tables` need not know.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clawdemy_infer.kv_cache.block_pool import BlockPool
from clawdemy_infer.kv_cache.paged_store import PagedStore
from clawdemy_infer.kv_cache.quantized import SCALE, to_int8


class PagedInt8Store:
    """In the place of a `PagedStore`: `PagedCache.for_model(model, batch, capacity, store=PagedInt8Store)`.

    H bytes and a 16-bit scale for each key and value. What attention is given is of `dtype`, made anew for each layer.
    """

    def __init__(self, pool: BlockPool, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu", host: BlockPool | None = None) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.codes = PagedStore(pool, layers, kv_heads, head_dim, torch.int8, device, host)
        self.scales = PagedStore(pool, layers, kv_heads, 1, SCALE, device, host)
        self.pool, self.kv_heads, self.tile_tokens, self.rows = pool, kv_heads, self.codes.tile_tokens, self.codes.rows

    @property
    def stores(self) -> tuple[PagedStore, PagedStore]:
        return self.codes, self.scales

    def write(self, layer: int, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Round k, v [M, K, H] and put them into the slots whose `rows` are given."""
        for store, keys, values in zip(self.stores, to_int8(k), to_int8(v), strict=True):
            store.write(layer, rows, keys, values)

    def gather(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [K, S, H] of S slots, one behind the other."""
        return self._numbers(self.codes.gather(layer, rows), self.scales.gather(layer, rows))

    def tiles(self, layer: int, which: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [P, K, C, H] of these tiles."""
        return self._numbers(self.codes.tiles(layer, which), self.scales.tiles(layer, which))

    def _numbers(self, codes: Sequence[torch.Tensor], scales: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (each.to(self.dtype).mul_(scale) for each, scale in zip(codes, scales, strict=True))
        return keys, values

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks within the pool."""
        for store in self.stores:
            store.copy(sources, targets)

    def to_host(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks of the pool to blocks of the host."""
        for store in self.stores:
            store.to_host(sources, targets)

    def from_host(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks of the host to blocks of the pool."""
        for store in self.stores:
            store.from_host(sources, targets)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the pool, without those of the host."""
        return sum(store.allocated_bytes for store in self.stores)

    @property
    def host_bytes(self) -> int:
        """Bytes of the host's blocks."""
        return sum(store.host_bytes for store in self.stores)
