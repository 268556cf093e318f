"""An engine from a model and a policy: the scheduler, the executor and the memory that fit them."""

from collections.abc import Callable

from clawdemy_infer.batching.engine import Engine
from clawdemy_infer.batching.policy import Policy
from clawdemy_infer.batching.scheduler import Scheduler
from clawdemy_infer.batching.static import StaticExecutor, StaticScheduler
from clawdemy_infer.batching.swapping import SwappingCache, SwappingScheduler, SwappingTables
from clawdemy_infer.batching.torch_executor import TorchExecutor
from clawdemy_infer.kv_cache import BlockPool, BlockTables, PagedCache
from clawdemy_infer.model import Decoder


def scheduler_for(policy: Policy, blocks: int, block_size: int = 16, host_blocks: int = 0,
                  max_context: int | None = None) -> Scheduler:
    """The scheduler that does what `policy` says, over a pool of `blocks`; with `host_blocks` in
    the host's memory, at least 1, where it swaps."""
    pool = BlockPool(blocks, block_size)
    if policy.batching == "static":
        return StaticScheduler(policy, BlockTables(pool), max_context)
    if policy.preemption == "swap":
        tables = SwappingTables(pool, BlockPool(max(1, host_blocks), block_size),
                                policy.prefix_caching)
        return SwappingScheduler(policy, tables, max_context)
    return Scheduler(policy, BlockTables(pool, policy.prefix_caching), max_context)


def engine(model: Decoder, policy: Policy | None = None, *, kv_bytes: float = 2**30,
           host_bytes: float = 0.0, block_size: int = 16,
           executor: Callable[[Decoder, PagedCache], TorchExecutor] = TorchExecutor) -> Engine:
    """An engine that serves `model`, with `kv_bytes` of cache and `host_bytes` to swap to. Raises
    ValueError where no block fits, or for drafted tokens (`policy.gamma`) without an `executor`
    that drafts: `speculative.engine` has one."""
    policy, shape = policy or Policy(), model.config.shape
    if policy.gamma and executor is TorchExecutor:
        raise ValueError(f"gamma={policy.gamma}: drafted tokens need a draft, as "
                         "`speculative.engine` takes one")
    block_bytes = block_size * shape.kv_bytes_per_token(model.dtype.itemsize)
    blocks = int(kv_bytes // block_bytes)
    if blocks < 1:
        raise ValueError(f"kv_bytes={kv_bytes}: a block of {block_size} tokens needs {block_bytes}")
    host_blocks = int(host_bytes // block_bytes)
    scheduler = scheduler_for(policy, blocks, block_size, host_blocks,
                              model.config.same_angles_until or shape.max_context)
    if policy.batching == "static":
        return Engine(scheduler, StaticExecutor(model, scheduler.tables), block_bytes)
    if policy.preemption == "swap":
        cache = scheduler.swapper = SwappingCache.over(model, scheduler.tables)
    else:
        cache = PagedCache.over(model, scheduler.tables)
    return Engine(scheduler, executor(model, cache), block_bytes)
