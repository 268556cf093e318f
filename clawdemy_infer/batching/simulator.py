"""The other clock: an executor that runs no model and charges what the roofline says.

It serves any model on any machine, because nothing has to fit but the arithmetic. What it leaves out: the scheduler's own time,
the tokenizer, and whatever a real machine loses that its `Machine` does not know of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count as counter
from math import inf
from random import Random

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.batching.counted_blocks import CountedBlocks, Pool
from clawdemy_infer.batching.engine import Engine
from clawdemy_infer.batching.metrics import SLO, Report
from clawdemy_infer.batching.plan import Emission, Plan
from clawdemy_infer.batching.policy import Policy
from clawdemy_infer.batching.request import Request, Sequence
from clawdemy_infer.batching.scheduler import Scheduler
from clawdemy_infer.batching.static import StaticScheduler
from clawdemy_infer.batching.step_cost import Operations, StepCost
from clawdemy_infer.parallel import Layout, fits
from clawdemy_infer.roofline import Machine

SOMETHING = Emission()
"""A token; which one makes no difference to what it costs."""


class RooflineExecutor:
    """Time is a number that steps are added to. Swapped blocks go at `swap_bytes_per_s`, while nothing else is done.

    Equal steps that follow one another are charged one by one, but decided and booked together: that is what makes simulation fast,
    and it changes no figure.

    Of drafted tokens each stands with chance `alpha` if all before it do. A `draft` that runs a model is charged a step of it for
    each; None costs nothing, as a lookup.
    """

    def __init__(self, cost: StepCost, tables, block_bytes: float = 0.0, swap_bytes_per_s: float = inf, alpha: float | None = None,
                 draft: StepCost | None = None) -> None:
        self.cost, self.tables = cost, tables
        self.alpha, self.draft, self.random = alpha, draft, Random(0)
        self.block_bytes, self.swap_bytes_per_s = block_bytes, swap_bytes_per_s
        self.time = 0.0
        self.swapper = self
        self.unknown = counter()

    def now(self) -> float:
        return self.time

    def wait_until(self, seconds: float) -> None:
        self.time = max(self.time, seconds)

    def tokens(self, request: Request) -> tuple[int, list[int] | None]:
        if isinstance(request.prompt, str):
            raise ValueError(f"prompt: request {request.id!r} has a text, and a simulation has no tokenizer: give prompt_tokens")
        tokens = request.prompt if isinstance(request.prompt, int) else len(request.prompt)
        if not self.tables.prefix:
            return tokens, None
        # For a prefix cache, a prompt of which only the length is known is like nobody else's.
        return tokens, [-1 - next(self.unknown)] * tokens if isinstance(request.prompt, int) else list(request.prompt)

    def run(self, plan: Plan, repeats: int, until: float) -> tuple[list[float], Mapping[Sequence, Emission]]:
        if plan.guesses:
            return self._verify(plan)
        lengths, new, shape = self.tables.lengths, plan.new, plan.rectangle
        times, now = [], self.time
        if shape:
            longest = max([lengths[sequence] for sequence in new])          # rows that have ended do not grow
            for step in range(repeats):
                now += self.cost.rectangle(len(shape.rows), shape.T, max(shape.S, longest + 1 + step))
                times.append(now)
                if now >= until:
                    break
        else:
            contexts = [lengths[sequence] + 1 for sequence, count in new.items() if count == 1]
            chunks = [] if plan.steady else [(count, lengths[sequence] + count) for sequence, count in new.items() if count > 1]
            visible, sliding = self.cost.visible(contexts), any(self.cost.windows)
            for _ in range(repeats):
                now += self.cost.seconds(len(contexts), visible, chunks)
                times.append(now)
                if now >= until:
                    break
                if sliding:
                    contexts = [context + 1 for context in contexts]
                    visible = self.cost.visible(contexts)
                else:
                    visible = [keys + len(contexts) for keys in visible]
        self.time = now
        steps = len(times)
        if steps > 1:
            self.tables.reserve(dict.fromkeys(new, steps))
        if not self.tables.prefix:
            emitted = new if plan.steady else [sequence for sequence, count in new.items() if lengths[sequence] + count == sequence.total]
            self.tables.commit({sequence: range(count * steps) for sequence, count in new.items()})
            return times, dict.fromkeys(emitted, SOMETHING)
        return times, self._with_ids(new, steps)

    def _with_ids(self, new: Mapping[Sequence, int], steps: int) -> dict[Sequence, Emission]:
        """Commit and emit for a prefix cache, which wants to know which tokens: those that come out are like nobody else's."""
        brought, emitted = {}, {}
        for sequence, count in new.items():
            begin, end = self.tables.lengths[sequence], self.tables.lengths[sequence] + count
            brought[sequence] = sequence.ids[begin:end]
            if end == sequence.total:
                emitted[sequence] = Emission([-2**32 - sequence.serial] * steps)
                brought[sequence] += emitted[sequence].ids[:-1]         # of several steps, all but the last that came out
        self.tables.commit(brought)
        return emitted

    def _verify(self, plan: Plan) -> tuple[list[float], dict[Sequence, Emission]]:
        """One step in which drafted tokens are read behind those that are known: each such sequence brings a small chunk."""
        lengths, guesses, cost = self.tables.lengths, plan.guesses, self.cost
        for i in range(max(guesses.values()) if self.draft else 0):
            contexts = [lengths[sequence] + 1 + i for sequence, most in guesses.items() if most > i]
            self.time += self.draft.seconds(len(contexts), self.draft.visible(contexts))
        read = {sequence: count + guesses.get(sequence, 0) for sequence, count in plan.new.items()}
        contexts = [lengths[sequence] + 1 for sequence, count in read.items() if count == 1]
        chunks = [(count, lengths[sequence] + count) for sequence, count in read.items() if count > 1]
        self.time += cost.seconds(len(contexts), cost.visible(contexts), chunks, sum(guesses.values()))
        brought, emitted = {}, {}
        for sequence, count in plan.new.items():
            begin, most, stood = lengths[sequence], guesses.get(sequence, 0), 0
            if begin + count == sequence.total:
                while stood < most and self.random.random() < self.alpha:
                    stood += 1
                emitted[sequence] = Emission(run=stood + 1, drafted=most)
            brought[sequence] = range(count + most)
            if self.tables.prefix:
                unlike = [-2**32 - sequence.serial] * (most + 1)        # nobody else's tokens, as in `_with_ids`
                brought[sequence] = sequence.ids[begin:begin + count] + unlike[:most]
                if sequence in emitted:
                    emitted[sequence] = emitted[sequence]._replace(ids=unlike[:stood + 1])
        self.tables.commit(brought)
        return [self.time], emitted

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept."""

    # ---- what swapping costs ----

    def swap_out(self, sequence: Sequence) -> None:
        self.tables.swap_out(sequence)
        self._swapped(sequence, self.tables.swapped[sequence])

    def swap_in(self, sequence: Sequence) -> None:
        self._swapped(sequence, self.tables.swapped[sequence])
        self.tables.swap_in(sequence)

    def _swapped(self, sequence: Sequence, swapped) -> None:
        self.time += self.tables.pool.blocks_for(swapped.length) * self.block_bytes / self.swap_bytes_per_s


def tables_for(policy: Policy, blocks: int, block_size: int, host_blocks: int = 0):
    """Block tables that know no more than `policy` needs."""
    if not policy.prefix_caching:
        return CountedBlocks(Pool(blocks, block_size), Pool(host_blocks, block_size) if host_blocks else None)
    from clawdemy_infer.kv_cache.block_pool import BlockPool  # their package imports torch
    from clawdemy_infer.kv_cache.block_tables import BlockTables

    return BlockTables(BlockPool(blocks, block_size), BlockPool(host_blocks, block_size) if host_blocks else None, prefix_caching=True)


def scheduler_for(policy: Policy, tables, max_context: int | None = None) -> Scheduler:
    """The scheduler that does what `policy` says."""
    return (StaticScheduler if policy.batching == "static" else Scheduler)(policy, tables, max_context)


def simulator(shape: ModelShape, machine: Machine, policy: Policy | None = None, *, weights="bf16", kv="bf16", activations="bf16",
              tp: int = 1, memory: float | None = None, kv_bytes: float | None = None, block_size: int = 16, host_bytes: float = 0.0,
              swap_bytes_per_s: float = 25e9, operations: Operations | None = None, alpha: float | None = None,
              draft: StepCost | None = None) -> Engine:
    """An engine that serves `shape` on `tp` devices like `machine` in the time that the roofline says.

    The cache gets what the weights leave of `memory` bytes a device (default: nine tenths of what it has; the rest is for activations), or
    `kv_bytes` of each device. `host_bytes` is where sequences are swapped to, at `swap_bytes_per_s`. A policy with a `gamma` needs
    `alpha`, the chance that a drafted token stands, and the cost of the `draft` that proposes it; its memory is not counted. Raises
    ValueError where weights and one block do not fit, for an alpha that is no chance, or as `StepCost` does.
    """
    policy, layout = policy or Policy(), Layout(tp)
    if policy.gamma and not (alpha is not None and 0 <= alpha <= 1):
        raise ValueError(f"alpha={alpha}: the chance, 0 to 1, that one of the gamma={policy.gamma} drafted tokens stands is needed")
    cost = StepCost(shape, machine, weights, kv, activations, operations, layout)
    memory = 0.9 * machine.memory if memory is None else memory
    free = memory - fits(shape, layout, memory, 1, 1, weights, kv).weight_bytes - policy.max_batch * cost.shape.state_bytes(kv)
    block_bytes = block_size * cost.shape.kv_bytes_per_token(kv)
    # A model without attention keeps nothing by token, and never runs short of blocks.
    blocks = int((free if kv_bytes is None else kv_bytes) // block_bytes) if block_bytes else 2**40
    if blocks < 1 or free <= 0:
        raise ValueError(f"memory={memory:.4g}: the weights of {shape.name} leave {free:.4g} bytes of it for the cache, "
                         f"and a block needs {block_bytes:.4g}")
    host_blocks = max(1, int(host_bytes // block_bytes)) if policy.preemption == "swap" else 0
    tables = tables_for(policy, blocks, block_size, host_blocks)
    scheduler = scheduler_for(policy, tables, shape.max_context)
    return Engine(scheduler, RooflineExecutor(cost, tables, block_bytes, swap_bytes_per_s, alpha, draft), block_bytes)


def simulate(shape: ModelShape, machine: Machine, requests: Iterable[Request], policy: Policy | None = None, slo: SLO | None = None,
             **options) -> Report:
    """Serve `requests` on a machine that need not exist. `options` as of `simulator`."""
    return simulator(shape, machine, policy, **options).run(requests, slo)
