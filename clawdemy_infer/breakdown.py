"""Where the time of a step goes: its products, its attention, and all the rest, each beside what the roofline says of it.

The clock is read inside a real step, around every linear layer and every look of attention, so the parts add up to the whole.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from clawdemy_infer.arithmetic import Work, total
from clawdemy_infer.bench import filled_cache, random_tokens, step_ops, work_of
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.linear import Fast, PackedLinear
from clawdemy_infer.model import Decoder
from clawdemy_infer.roofline import Machine
from clawdemy_infer.timing import now

PARTS = ("matrices", "head", "attention", "the rest")


@dataclass(frozen=True)
class Part:
    """One part of a step: FLOPs and bytes as counted, seconds as predicted and as measured."""

    name: str
    flops: float
    bytes: float
    predicted_s: float
    measured_s: float

    @property
    def residual_s(self) -> float:
        """What the roofline does not explain."""
        return self.measured_s - self.predicted_s


def breakdown(model: Decoder, machine: Machine, phase: str, batch: int, context: int, repeats: int = 11) -> list[Part]:
    """The `PARTS` of one prefill or decode step. "The rest" is what element-wise operations move, and the fixed cost of all operations."""
    predicted = predict(model, machine, phase, batch, context)
    measured = watch(model, phase, batch, context, repeats)
    return [Part(name, work.flops, work.bytes, seconds, measured[name]) for name, (work, seconds) in predicted.items()]


def predict(model: Decoder, machine: Machine, phase: str, batch: int, context: int) -> dict[str, tuple[Work, float]]:
    """Work and seconds of each part, from the calibration alone."""
    work = work_of(model.config.shape, phase, model.weights, batch, context, model.device.type)
    parts = defaultdict(list)
    for op in work.operations():
        name = {"gemm": "matrices", "attention": "attention"}.get(op.kernel, "the rest")
        parts["head" if op.name == "head" else name].append((op, machine.operation_s(op, work.bytes)))
    fixed = machine.fixed_s(work) * (step_ops(model, new=2) if phase == "prefill" else step_ops(model, batch=batch))
    return {name: (total(name, [op for op, _ in parts[name]]), sum(s for _, s in parts[name]) + fixed * (name == "the rest"))
            for name in PARTS}


def watch(model: Decoder, phase: str, batch: int, context: int, repeats: int) -> dict[str, float]:
    """Median seconds of each part of a step."""
    new = context if phase == "prefill" else 1
    cache = ContiguousCache.for_model(model, batch, context) if phase == "prefill" else filled_cache(model, batch, context - 1)
    tokens, begin, spent = random_tokens(model, batch, new), cache.begin, defaultdict(float)

    def started(module: nn.Module, inputs: object) -> None:
        spent["started"] = now()

    def counter(name: str):
        def done(module: nn.Module, inputs: object, output: object) -> None:
            spent[name] += now() - spent["started"]
        return done

    def begin_watched(*arguments):
        step = begin(*arguments)
        attend = step.attend

        def watched(*qkv):
            start = now()
            out = attend(*qkv)
            spent["attention"] += now() - start
            return out
        step.attend = watched
        return step

    hooks, runs = [], []
    for layer in [model.head or model.tied_head, *model.layers.modules()]:
        if isinstance(layer, nn.Linear | PackedLinear | Fast):
            name = "head" if layer in (model.head, model.tied_head) else "matrices"
            hooks += [layer.register_forward_pre_hook(started), layer.register_forward_hook(counter(name))]
    cache.begin = begin_watched
    try:
        for _ in range(repeats + 1):                        # the first is a warm-up
            spent.clear()
            cache.truncate(context - new)
            start = now()
            model(tokens, cache, last_only=True)
            whole = now() - start
            parts = {name: spent[name] for name in PARTS[:-1]}
            runs.append(parts | {PARTS[-1]: whole - sum(parts.values())})
    finally:
        for hook in hooks:
            hook.remove()
    return {name: statistics.median(run[name] for run in runs[1:]) for name in PARTS}
