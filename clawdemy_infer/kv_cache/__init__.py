"""KV caches: what attention remembers, so that a decode step need not compute it again.

In reading order: `step` is the interface; `uncached` keeps nothing; `contiguous` keeps everything in one piece, computed in
`rectangles`; `paged` keeps it in blocks: `block_pool`, `prefix_cache` and `block_tables` decide which block is whose, and know
nothing of torch, `paged_store` holds the bytes, `paged_attention` reads them. Fewer bytes: `sliding` keeps the last tokens and
a few sinks, `quantized` rounds to 8 bits, `kivi` to 4 or 2 (`paged_quantized` and `paged_kivi` in pages); `runs` cuts their steps.
"""

from clawdemy_infer.kv_cache.block_pool import BlockPool
from clawdemy_infer.kv_cache.block_tables import BlockTables
from clawdemy_infer.kv_cache.contiguous import ContiguousCache
from clawdemy_infer.kv_cache.kivi import KiviCache
from clawdemy_infer.kv_cache.paged import PagedCache
from clawdemy_infer.kv_cache.paged_kivi import PagedKiviCache, PagedKiviStore
from clawdemy_infer.kv_cache.paged_quantized import PagedInt8Store
from clawdemy_infer.kv_cache.quantized import Int8Cache
from clawdemy_infer.kv_cache.sliding import SlidingWindowCache
from clawdemy_infer.kv_cache.step import KVCache, Step
from clawdemy_infer.kv_cache.uncached import Uncached

__all__ = [
    "BlockPool", "BlockTables", "ContiguousCache", "Int8Cache", "KVCache", "KiviCache", "PagedCache", "PagedInt8Store",
    "PagedKiviCache", "PagedKiviStore", "SlidingWindowCache", "Step", "Uncached",
]
