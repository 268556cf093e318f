"""The real clock: an executor that runs the model, and so spends the time that it reports.

A continuous batch runs over a paged cache. One forward pass serves sequences that decode and chunks of prompts alike (selective
batching: Yu et al. 2022, Orca, section 3.2). A static batch runs as one padded rectangle over a contiguous cache, the fastest way that
there is to run one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random

import torch

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.batching.counted_blocks import CountedBlocks, Pool
from clawdemy_infer.batching.engine import Engine
from clawdemy_infer.batching.plan import Emission, Plan
from clawdemy_infer.batching.policy import Policy
from clawdemy_infer.batching.request import Request, Sequence
from clawdemy_infer.batching.simulator import scheduler_for
from clawdemy_infer.batching.step_cost import Operations
from clawdemy_infer.kv_cache import BlockPool, BlockTables, ContiguousCache, PagedCache
from clawdemy_infer.kv_cache.paged import FEW
from clawdemy_infer.model import Decoder, ModelConfig, Sampling, sample
from clawdemy_infer.model.formats import product_ops
from clawdemy_infer.model.tokenizer import TextStream
from clawdemy_infer.timing import count_ops, now


class TorchExecutor:
    """Runs `model` on the sequences of `tables`: a `BlockTables` whose bytes lie in a `PagedCache`, or for static batches any.

    The cache counts a step's tokens only when all of it is done. A step that breaks off has not happened, and is decided again.
    """

    def __init__(self, model: Decoder, tables) -> None:
        self.model, self.tables = model, tables
        self.start: float | None = None
        self.cache = PagedCache.over(model, tables) if isinstance(tables, BlockTables) else None
        self.swapper = self.cache or tables
        self.rows: list[Sequence] = []                              # of the static batch that `rectangle` belongs to
        self.rectangle: ContiguousCache | None = None
        self.generators: dict[Sequence, torch.Generator] = {}
        self.streams: dict[Sequence, TextStream] = {}

    def now(self) -> float:
        if self.start is None:
            self.start = now()
        return now() - self.start

    def wait_until(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds - self.now()))

    def tokens(self, request: Request) -> tuple[int, list[int]]:
        """The ids of its prompt; drawn at random, always the same for the same id, where only their number is given."""
        V, prompt, tokenizer = self.model.config.shape.V, request.prompt, self.model.tokenizer
        if (isinstance(prompt, str) or request.stop) and tokenizer is None:
            raise ValueError(f"request {request.id!r}: this model has no tokenizer; token ids are accepted, and no stop")
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt)
        elif isinstance(prompt, int):
            random = Random(str(request.id))
            ids = [random.randrange(V) for _ in range(prompt)]
        else:
            ids = [int(token) for token in prompt]
            if ids and not (0 <= min(ids) and max(ids) < V):
                raise ValueError(f"prompt: request {request.id!r} has ids from {min(ids)} to {max(ids)}; 0 to V-1 = {V - 1} are accepted")
        return len(ids), ids

    def run(self, plan: Plan, repeats: int, until: float) -> tuple[list[float], Mapping[Sequence, Emission]]:
        """One step, whatever `repeats` says: only a simulation knows what comes next."""
        if plan.rectangle:
            logits, sequences = self._padded(plan), plan.rectangle.rows
        else:
            logits, sequences = self.model.step(self._brought(plan), self.cache), plan.new
        greedy = logits.argmax(-1).tolist()
        done = [(i, sequence) for i, sequence in enumerate(sequences)
                if sequence in plan.new and self.tables.lengths[sequence] == sequence.total]
        emitted = {sequence: self._emission(sequence, [self._chosen(sequence, greedy[i], logits[i])]) for i, sequence in done}
        return [self.now()], emitted

    def _brought(self, plan: Plan) -> dict[Sequence, list[int]]:
        lengths = self.tables.lengths
        return {sequence: sequence.ids[lengths[sequence]:lengths[sequence] + count] for sequence, count in plan.new.items()}

    def _padded(self, plan: Plan) -> torch.Tensor:
        """The step of a static batch, all of its rows. Logits [B, V] of the last column."""
        rows, T, _ = plan.rectangle
        if rows is not self.rows:
            capacity = max(row.prompt_tokens for row in rows) + max(row.request.max_tokens for row in rows)
            self.rectangle = None                                   # the old one goes before the new one comes
            self.rows, self.rectangle = rows, ContiguousCache.for_model(self.model, len(rows), capacity)
        tokens = []
        for i, row in enumerate(rows):
            length = self.tables.lengths[row]
            # What the cache holds beyond that is padding, or of a row that has ended, or of a step that broke off.
            self.rectangle.truncate(min(length, self.rectangle.lengths[i]), i)
            known = row.ids[length:length + T]
            tokens.append(known + [0] * (T - len(known)))
        logits = self.model(torch.tensor(tokens, device=self.model.device), self.rectangle, last_only=True)[:, -1]
        self.tables.commit(self._brought(plan))
        return logits

    def _chosen(self, sequence: Sequence, greedy: int, logits: torch.Tensor) -> int:
        """The next token of one sequence, as `model.generate` would choose it."""
        sampling = sequence.request.sampling
        return greedy if sampling is None else int(sample(logits[None], sampling, self._generator(sequence), self.model.backend))

    def _generator(self, sequence: Sequence) -> torch.Generator:
        """Its own, so that neighbours change nothing."""
        if sequence not in self.generators:
            self.generators[sequence] = (sequence.request.sampling or Sampling()).generator(self.model.device)
        return self.generators[sequence]

    def _emission(self, sequence: Sequence, run: list[int], drafted: int = 0) -> Emission:
        """What these tokens mean for it, as far as its text goes on."""
        request, tokenizer, text, reason = sequence.request, self.model.tokenizer, "", ""
        forced = request.output_tokens is not None
        if tokenizer and sequence not in self.streams:
            self.streams[sequence] = TextStream(tokenizer, () if forced else request.stop)
        stream = self.streams.get(sequence)
        for count, token in enumerate(run, 1):
            eos = token in self.model.config.eos_ids and not forced
            ends = eos or sequence.generated + count >= sequence.limit
            if stream:
                text += stream.push(token)
                if not stream.stopped and ends:
                    text += stream.close()
            reason = "stop" if stream and stream.stopped else "eos" if eos else ""
            if reason or ends:
                break
        return Emission(run[:count], reason, text, count, drafted)

    def forget(self, sequence: Sequence) -> None:
        self.generators.pop(sequence, None)
        self.streams.pop(sequence, None)


def engine(model: Decoder, policy: Policy | None = None, *, kv_bytes: float = 2**30, host_bytes: float = 0.0,
           block_size: int = 16, executor: Callable[..., TorchExecutor] = TorchExecutor) -> Engine:
    """An engine that serves `model`, with `kv_bytes` of cache, and `host_bytes` to swap sequences to.

    Raises ValueError where not even one tile of blocks fits, or for drafted tokens (`policy.gamma`) without an `executor` that
    drafts: `speculative.engine` has one.
    """
    policy, shape = policy or Policy(), model.config.shape
    if policy.gamma and executor is TorchExecutor:
        raise ValueError(f"gamma={policy.gamma}: drafted tokens need a draft, as `speculative.engine` takes one")
    block_bytes = block_size * shape.kv_bytes_per_token(model.dtype.itemsize)
    blocks = int(kv_bytes // block_bytes) // 8 * 8                  # whole tiles, which attention reads in one go
    if blocks < 8:
        raise ValueError(f"kv_bytes={kv_bytes}: at least {8 * block_bytes}, 8 blocks of {block_size} tokens")
    host_blocks = max(1, int(host_bytes // block_bytes)) if policy.preemption == "swap" else 0
    if policy.batching == "static":
        tables = CountedBlocks(Pool(blocks, block_size))
    else:
        host = BlockPool(host_blocks, block_size) if host_blocks else None
        tables = BlockTables(BlockPool(blocks, block_size), host, policy.prefix_caching)
    return Engine(scheduler_for(policy, tables, shape.max_context), executor(model, tables), block_bytes)


def operations_of(shape: ModelShape, policy: Policy) -> Operations:
    """`count_operations` of a model with this shape, without its weights: how wide it is does not change how many there are. None are
    known of a shape that the decoder does not run.
    """
    narrow = replace(shape, name="narrow", D=8, N=2 * shape.N // shape.K if shape.K else 0, K=2, H=4, F=8, V=16)
    try:
        return count_operations(Decoder(ModelConfig(narrow)), policy)
    except ValueError:
        return Operations()


def count_operations(model: Decoder, policy: Policy) -> Operations:
    """How many operations the steps of this policy dispatch beside their products, whose rates have their starts in them: counted, not
    timed, from steps that decode, bring a prompt, and do both."""
    products = product_ops(model)
    if policy.batching == "static":
        cache = ContiguousCache.for_model(model, 2, 8)
        cache.truncate(0)
        prompt = count_ops(lambda: model(torch.tensor([[1, 2, 3], [4, 5, 6]], device=model.device), cache, last_only=True))
        cache.truncate(2, 1)                                        # rows of different lengths, under a mask
        decode = count_ops(lambda: model(torch.tensor([[1], [2]], device=model.device), cache, last_only=True))
        return Operations(-products, decode, prompt)
    cache, many = PagedCache.over(model, BlockTables(BlockPool(64, 16))), FEW + 1            # enough tiles for each to have its own
    for sequence in range(4):
        cache.add(sequence)

    def ops(**new: int) -> int:
        """Of a step that brings so many tokens of sequence a, b, c and d."""
        return count_ops(lambda: model.step({"abcd".index(name): [1] * count for name, count in new.items()}, cache))

    one, two = ops(a=many), ops(b=many, c=many)
    resumed = ops(a=many) - one
    chunk, decode, mixed = two - one, ops(a=1, b=1, c=1), ops(a=1, b=1, c=1, d=many)
    step = one - chunk
    return Operations(step - products, decode - step, chunk, mixed - decode - chunk, resumed, FEW)
