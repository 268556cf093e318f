"""Steps of a model, layer by layer or on a fast engine, watched part by part: what each takes, or
how many operations it starts."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.batching import Operations, Policy
from clawdemy_infer.fast.cpp_step import PARTS
from clawdemy_infer.fast.launches import op_counter
from clawdemy_infer.fast.layers import PackedLinear
from clawdemy_infer.kv_cache import (
    BlockPool,
    BlockTables,
    ContiguousCache,
    KVCache,
    PagedCache,
    Step,
)
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.timing import now


class Watch:
    """How much of `clock` each part of a step takes, what is watched within it not counted:
    seconds, or operations. `own_s` is what it costs to watch one call; `calls` are counted."""

    def __init__(self, clock: Callable[[], float] = now, own_s: float = 0.0) -> None:
        self.clock, self.own_s = clock, own_s
        self.taken: Counter[str] = Counter()
        self.calls, self.within = 0, 0.0        # `within` the call that is being watched

    def of(self, part: str, function: Callable) -> Callable:
        """`function`, watched as `part`."""
        def run(*arguments, **options):
            outside, self.within = self.within, 0.0
            start = self.clock()
            try:
                return function(*arguments, **options)
            finally:
                took = self.clock() - start
                self.taken[part] += took - self.within
                self.within, self.calls = outside + took + self.own_s, self.calls + 1
        return run

    @property
    def whole_s(self) -> float:
        """All that was watched, and the watching."""
        return sum(self.taken.values()) + self.calls * self.own_s

    def note(self, part: str, took: float) -> None:
        """What `part` took by another clock, within the call that is being watched."""
        self.taken[part] += took
        self.within += took


def cost_of_watching(calls: int = 500) -> float:
    """Seconds that watching adds to a call and does not count as the call's own: the least of a
    few readings, since whatever disturbs one makes it longer."""
    def reading() -> float:
        watch = Watch()
        empty, start = watch.of("", lambda: None), now()
        for _ in range(calls):
            empty()
        return (now() - start - watch.taken[""]) / calls
    return min(reading() for _ in range(5))


@contextmanager
def watched(model: Decoder, cache: KVCache, watch: Watch) -> Iterator[Watch]:
    """While it lasts, `watch` sees the steps of `model` over `cache` part by part: products, named
    as in the layers; "head"; "attention"; "launches", all that the rest of a step does; and "the
    rest", which is no part of a step: checks and bookkeeping. It leaves nothing behind."""
    runner, before = getattr(model.runner, "plain", model.runner), []

    def put(owner: object, name: str, value: object) -> None:
        before.append((owner, name, vars(owner).get(name, before)))
        setattr(owner, name, value)

    def watch_as(part: str, owner: object, *names: str) -> None:
        for name in names:
            put(owner, name, watch.of(part, getattr(owner, name)))

    def begin(*arguments) -> Step:
        step = plain_begin(*arguments)
        watch_as("attention", step, "attend")
        watch_as("the rest", step, "commit")
        return step

    def clocked(*arguments) -> tuple:
        out = plain_run(*arguments)
        for part, seconds in zip(PARTS, runner.clocks.tolist(), strict=True):
            watch.note(part, seconds)
        runner.clocks.zero_()
        return out

    try:
        watch_as("launches", model, "step")
        watch_as("the rest", model, "_check")
        watch_as("head", model, "logits")
        plain_begin = watch.of("the rest", cache.begin)
        put(cache, "begin", begin)
        if hasattr(cache, "write"):
            watch_as("launches", cache, "write")
        for name, module in products_of(model):
            watch_as(name, module, "forward")
        if hasattr(runner, "attention"):            # it attends without `step.attend`
            attention = runner.attention
            put(runner, "attention", lambda *of: watch.of("attention", attention(*of)))
        if is_one_call(model):
            watch_as("head", runner.head, "forward")
            if watch.clock is now:
                plain_run = runner.run
                put(runner, "clocks", torch.zeros(len(PARTS), dtype=torch.float64))
                put(runner, "run", clocked)
        yield watch
    finally:
        for owner, name, value in reversed(before):
            delattr(owner, name) if value is before else setattr(owner, name, value)


def products_of(model: Decoder) -> list[tuple[str, nn.Module]]:
    """The linear layers of its layers, each by the name that it has there."""
    return [(name.rpartition(".")[2], module) for name, module in model.layers.named_modules()
            if isinstance(module, nn.Linear | PackedLinear)]


def is_one_call(model: nn.Module) -> bool:
    """Does a step run as one piece of code, in which only products cost more than their bytes?"""
    return getattr(model.runner, "backend", None) == "cpp"


def ops_by_part(model: Decoder, cache: KVCache, run: Callable[[], object]) -> Counter[str]:
    """Operations that each part of the step `run()` starts, as `watched` names them: counted, not
    timed."""
    with op_counter() as ops, watched(model, cache, Watch(lambda: ops.count)) as watch:
        watch.of("the rest", run)()
    return watch.taken


def random_tokens(model: Decoder, batch: int, length: int) -> torch.Tensor:
    """[B, T] token ids. A step costs the same whatever the tokens say."""
    ids = torch.randint(model.config.shape.V, (batch, length),
                        generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def started(model: Decoder, new: int = 1, batch: int = 1,
            kind: type = ContiguousCache) -> Counter[str]:
    """Operations that each part of one forward pass over `batch` x `new` tokens starts.

    The context does not change them, and the batch only where attention goes another way for many
    sequences; a prefill of two tokens takes as many as a long one. A decode step has a past.
    """
    past = 1 if new == 1 else 0
    cache, tokens = kind.for_model(model, batch, past + new), random_tokens(model, batch, new)
    model(tokens, cache, last_only=True)                # the first step may compile or record
    cache.truncate(past)
    return ops_by_part(model, cache, lambda: model(tokens, cache, last_only=True))


# ---- the steps of an engine ----


def operations_of(shape: ModelShape, policy: Policy) -> Operations:
    """`count_operations` of a model with this shape, without its weights: how wide it is does not
    change how many there are. None are known of a shape that the decoder does not run."""
    narrow = replace(shape, name="narrow", D=8, N=2 * shape.N // shape.K if shape.K else 0, K=2,
                     H=4, F=8, V=16)
    try:
        return count_operations(Decoder(ModelConfig(narrow)), policy)
    except ValueError:
        return Operations()


def count_operations(model: Decoder, policy: Policy) -> Operations:
    """The operations of the steps of this policy beside their products, whose rates have their
    starts in them."""
    def ops(cache: KVCache, run: Callable[[], object]) -> int:
        by_part = ops_by_part(model, cache, run)
        return sum(by_part[part] for part in ("launches", "attention", "the rest"))

    if policy.batching == "static":
        rows = ContiguousCache.for_model(model, 2, 8)
        rows.length = 2
        rows.truncate(1, 1)                         # rows of different lengths, under a mask
        tokens = torch.tensor([[1], [2]], device=model.device)
        return Operations(ops(rows, lambda: model(tokens, rows, last_only=True)))
    cache = PagedCache.over(model, BlockTables(BlockPool(blocks=16)))
    for sequence in range(4):
        cache.add(sequence)
    model.step({0: [1], 1: [1, 1], 2: [1], 3: [1]}, cache)

    def chunked(*chunks: int) -> int:
        """Of a step in which two sequences decode and others bring `chunks` of prompts."""
        new = {0: 1, 1: 1} | dict(enumerate(chunks, 2))
        return ops(cache, lambda: model.step({each: [1] * T for each, T in new.items()}, cache))

    split = chunked(2, 3) - chunked(2)
    step = chunked(2) - 2 * split
    return Operations(step, chunked() - step, split)
