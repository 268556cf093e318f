"""Where the time of a step goes: its products, its attention, and all the rest, each beside what
the roofline says of it. The clock is read inside a real step, so the parts add up to the whole."""

import statistics
from collections import defaultdict
from collections.abc import Callable

from torch import nn

from clawdemy_infer.arithmetic import Work, total
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.fast import PackedLinear
from clawdemy_infer.lesson.steps import filled_cache, is_one_call, random_tokens, step_ops, work_of
from clawdemy_infer.model import Decoder
from clawdemy_infer.timing import now

PARTS = ("matrices", "head", "attention", "the rest")


def breakdown(model: Decoder, machine: Machine, phase: str, batch: int, context: int,
              repeats: int = 11) -> list[dict]:
    """The `PARTS` of a step: FLOPs and bytes as counted, seconds as predicted and measured, and the
    residual that the roofline does not explain. "The rest" is what element-wise operations move,
    and all fixed costs. Raises ValueError for a model whose steps are one call."""
    if is_one_call(model):
        raise ValueError("model: its steps are one call of C++; one without compile is accepted")
    predicted = predict_parts(model, machine, phase, batch, context)
    measured = measure_parts(model, phase, batch, context, repeats)
    return [{"name": name, "flops": work.flops, "bytes": work.bytes, "predicted_s": seconds,
             "measured_s": measured[name], "residual_s": measured[name] - seconds}
            for name, (work, seconds) in predicted.items()]


def predict_parts(model: Decoder, machine: Machine, phase: str, batch: int,
                  context: int) -> dict[str, tuple[Work, float]]:
    """Work and seconds of each part, from the calibration alone."""
    work = work_of(model.config.shape, phase, model.weights, batch, context, model.device.type)
    ops = step_ops(model, new=2) if phase == "prefill" else step_ops(model, batch=batch)
    parts: dict[str, list[Work]] = {name: [] for name in PARTS}
    for op in work.operations():
        name = {"gemm": "matrices", "attention": "attention"}.get(op.kernel, "the rest")
        parts["head" if op.name == "head" else name].append(op)
    seconds = {name: sum(machine.operation_s(op, work.bytes) for op in parts[name])
               for name in PARTS}
    seconds["the rest"] += ops * machine.fixed_s(work)
    return {name: (total(name, parts[name]), seconds[name]) for name in PARTS}


def measure_parts(model: Decoder, phase: str, batch: int, context: int,
                  repeats: int) -> dict[str, float]:
    """Median seconds of each part of a step."""
    new = context if phase == "prefill" else 1
    cache = filled_cache(model, batch, context - new, room=new)
    tokens, spent, runs = random_tokens(model, batch, new), defaultdict(float), []

    def timed(name: str, function: Callable) -> Callable:
        def run(*arguments, **options):
            start = now()
            out = function(*arguments, **options)
            spent[name] += now() - start
            return out
        return run

    def begin(*arguments):
        step = type(cache).begin(cache, *arguments)
        step.attend = timed("attention", step.attend)
        return step

    matrices = [part for part in model.layers.modules()
                if isinstance(part, nn.Linear | PackedLinear)]
    for part in matrices:
        part.forward = timed("matrices", part.forward)
    model.logits, cache.begin, runner = timed("head", model.logits), begin, model.runner
    if runner:                                          # it attends without `step.attend`
        attention = runner.attention
        runner.attention = lambda *arguments: timed("attention", attention(*arguments))
    try:
        for _ in range(repeats + 1):                    # the first is a warm-up
            spent.clear()
            cache.truncate(context - new)
            start = now()
            model(tokens, cache, last_only=True)
            whole = now() - start
            parts = {name: spent[name] for name in PARTS[:-1]}
            runs.append(parts | {"the rest": whole - sum(parts.values())})
    finally:
        del model.logits                                # the methods of their classes are back
        for part in matrices:
            del part.forward
        if runner:
            del runner.attention
    return {name: statistics.median(run[name] for run in runs[1:]) for name in PARTS}
