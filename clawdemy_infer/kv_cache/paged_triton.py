"""Decode attention over a block pool by a kernel that follows the block tables, where `paged_attention` asks each tile whose it is.

The kernel is `clawdemy_kernels.decode_paged`: on a GPU it is the default; on a CPU it runs in Triton's interpreter, for those who want
to watch it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clawdemy_infer.kv_cache.paged_store import PagedStore


def with_triton(store: PagedStore) -> bool:
    """Should the kernel be used for this store? On a CUDA device, for keys and values in full precision, where Triton is installed."""
    if store.device.type != "cuda" or type(store) is not PagedStore:
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


class TableAttention:
    """One query for each of some sequences, with these block tables and so many tokens each, of which `window` are seen."""

    def __init__(self, tables: Sequence[Sequence[int]], ends: Sequence[int], window: int | None, store: PagedStore) -> None:
        from clawdemy_kernels.decode_paged import decode_paged

        most = max(map(len, tables))
        rows = [[*blocks, *[0] * (most - len(blocks))] for blocks in tables]
        self.kernel, self.window, self.block_size = decode_paged, window, store.pool.block_size
        self.table = torch.tensor(rows, dtype=torch.int32, device=store.device)             # [B, most], copied once a step
        self.lengths = torch.tensor(ends, dtype=torch.int32, device=store.device)

    def __call__(self, q: torch.Tensor, store: PagedStore, layer: int) -> torch.Tensor:
        """q [B, N, H] -> [B, N*H]."""
        out = self.kernel(q, store.keys[layer], store.values[layer], self.table, self.lengths, self.window, block_size=self.block_size)
        return out.flatten(1)
