"""KV caches: what attention remembers, so that a decode step need not compute it again."""

from clawdemy_infer.kv_cache.block_pool import BlockPool
from clawdemy_infer.kv_cache.block_tables import BlockTables
from clawdemy_infer.kv_cache.contiguous import ContiguousCache
from clawdemy_infer.kv_cache.paged import PagedCache
from clawdemy_infer.kv_cache.step import KVCache, Step

__all__ = ["BlockPool", "BlockTables", "ContiguousCache", "KVCache", "PagedCache", "Step"]
