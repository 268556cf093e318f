"""The other clock: an executor that runs no model and charges what the roofline says.

It leaves out the scheduler's own time, the tokenizer, and whatever a `Machine` does not know of."""

from collections.abc import Iterable, Mapping
from itertools import count as counter
from math import inf
from random import Random

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.batching.engine import Engine
from clawdemy_infer.batching.metrics import SLO, Report
from clawdemy_infer.batching.plan import Emission, Plan
from clawdemy_infer.batching.policy import Policy
from clawdemy_infer.batching.request import Request, Sequence
from clawdemy_infer.batching.serving import scheduler_for
from clawdemy_infer.batching.step_cost import Operations, StepCost
from clawdemy_infer.envelope.parallel import Layout, fits
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.kv_cache import BlockTables


class RooflineExecutor:
    """Time is a number that steps are added to. Swapped blocks go at `swap_bytes_per_s`, while
    nothing else is done. A drafted token is accepted with chance `alpha` if all before it are, and
    costs a step of `draft`; None costs nothing, as a lookup."""

    def __init__(self, cost: StepCost, tables: BlockTables, block_bytes: float = 0.0,
                 swap_bytes_per_s: float = inf, alpha: float | None = None,
                 draft: StepCost | None = None) -> None:
        self.cost, self.tables, self.draft = cost, tables, draft
        self.block_bytes, self.swap_bytes_per_s = block_bytes, swap_bytes_per_s
        self.alpha, self.random, self.unlike = alpha, Random(0), counter(1)
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def wait_until(self, seconds: float) -> None:
        self.time = max(self.time, seconds)

    def tokens(self, request: Request) -> tuple[int, list[int] | None]:
        prompt = request.prompt
        if isinstance(prompt, str):
            raise ValueError(f"prompt: request {request.id!r} has a text, and a simulation has no "
                             "tokenizer: give prompt_tokens")
        tokens = prompt if isinstance(prompt, int) else len(prompt)
        if not self.tables.prefix:
            return tokens, None
        # For a prefix cache, a prompt of which only the length is known is like nobody else's.
        return tokens, [-next(self.unlike)] * tokens if isinstance(prompt, int) else list(prompt)

    def run(self, plan: Plan) -> Mapping[Sequence, Emission]:
        """Commit what is brought, and emit what follows: for a prefix cache, ids like no other."""
        self.time += self._seconds(plan)
        lengths, drafts, brought, emitted = self.tables.lengths, plan.num_lookahead_tokens, {}, {}
        for sequence, count in plan.num_new_tokens.items():
            end, drafted, accepted = lengths[sequence] + count, drafts.get(sequence, 0), 0
            while accepted < drafted and self.random.random() < self.alpha:
                accepted += 1
            mine = [-2**32 - sequence.serial] if self.tables.prefix else None
            brought[sequence] = (sequence.ids[end - count:end] + mine * drafted if mine
                                 else range(count + drafted))
            if end == sequence.total:
                ids = mine and mine * (accepted + 1)
                emitted[sequence] = Emission(ids, "", "", accepted + 1, drafted)
        self.tables.commit(brought)
        return emitted

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept."""

    def _seconds(self, plan: Plan) -> float:
        if plan.padded:
            sequences, T, S = plan.padded
            return self.cost.padded(len(sequences), T, S)
        lengths, drafts, seconds = self.tables.lengths, plan.num_lookahead_tokens, 0.0
        # 1. The draft takes a step for each token that it proposes.
        for i in range(max(drafts.values(), default=0) if self.draft else 0):
            seconds += self.draft.seconds([lengths[sequence] + 1 + i
                                           for sequence, count in drafts.items() if count > i])
        # 2. Drafted tokens are read behind the known ones.
        contexts, chunks = [], []
        for sequence, count in plan.num_new_tokens.items():
            count += drafts.get(sequence, 0)
            if count == 1:
                contexts.append(lengths[sequence] + 1)
            else:
                chunks.append((count, lengths[sequence] + count))
        return seconds + self.cost.seconds(contexts, chunks, sum(drafts.values()))

    def swap_out(self, sequence: Sequence) -> None:
        self.tables.swap_out(sequence, self._copy)

    def swap_in(self, sequence: Sequence) -> None:
        self.tables.swap_in(sequence, self._copy)

    def _copy(self, sources: list[int], targets: list[int]) -> None:
        self.time += len(sources) * self.block_bytes / self.swap_bytes_per_s


def simulator(shape: ModelShape, machine: Machine, policy: Policy | None = None, *, weights="bf16",
              kv="bf16", activations="bf16", tp: int = 1, memory: float | None = None,
              kv_bytes: float | None = None, block_size: int = 16, host_bytes: float = 0.0,
              swap_bytes_per_s: float = 25e9, operations: Operations | None = None,
              alpha: float | None = None, draft: StepCost | None = None) -> Engine:
    """An engine that serves `shape` on `tp` devices like `machine` in the roofline's time.

    The cache gets what the weights leave of `memory` bytes a device (default: nine tenths of what
    it has; the rest is for activations), or `kv_bytes` of each; `host_bytes` are to swap to. The
    rest is as in `RooflineExecutor` and `StepCost`; a draft's memory is not counted. Raises
    ValueError where weights and one block do not fit, for a wrong alpha, or as `StepCost` does."""
    policy, layout = policy or Policy(), Layout(tp)
    if policy.gamma and not (alpha is not None and 0 <= alpha <= 1):
        raise ValueError(f"alpha={alpha}: the chance, 0 to 1, that one of the gamma={policy.gamma} "
                         "drafted tokens is accepted is needed")
    cost = StepCost(shape, machine, weights, kv, activations, operations, layout)
    memory = 0.9 * machine.memory if memory is None else memory
    free = (memory - fits(shape, layout, memory, 1, 1, weights, kv).weight_bytes
            - policy.max_batch * cost.shape.state_bytes(kv))
    block_bytes = block_size * cost.shape.kv_bytes_per_token(kv)
    # A model without attention keeps nothing by token, and never runs short of blocks.
    blocks = int((free if kv_bytes is None else kv_bytes) // block_bytes) if block_bytes else 2**20
    if blocks < 1 or free <= 0:
        raise ValueError(f"memory={memory:.4g}: the weights of {shape.name} leave {free:.4g} bytes "
                         f"of it for the cache, and a block needs {block_bytes:.4g}")
    host_blocks = int(host_bytes // block_bytes) if block_bytes else 0
    scheduler = scheduler_for(policy, blocks, block_size, host_blocks, shape.max_context)
    executor = RooflineExecutor(cost, scheduler.tables, block_bytes, swap_bytes_per_s, alpha, draft)
    if policy.preemption == "swap":
        scheduler.swapper = executor
    return Engine(scheduler, executor, block_bytes)


def simulate(shape: ModelShape, machine: Machine, requests: Iterable[Request],
             policy: Policy | None = None, slo: SLO | None = None, **options) -> Report:
    """Serve `requests` on a machine that need not exist. `options` as of `simulator`."""
    return simulator(shape, machine, policy, **options).run(requests, slo)
