"""A token's time on the kernels that read codes, predicted and measured, for the rows of a table.

A kernel sees codes, and not who chose them: each format is timed once, with round-to-nearest's, for all of its methods. The head
stays in fp32, as in all that is judged here, and is predicted so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from clawdemy_infer.arithmetic import ModelShape, Work
from clawdemy_infer.arithmetic.work import total
from clawdemy_infer.bench import filled_cache, step_ops, time_decode
from clawdemy_infer.bench import work_of as uniform
from clawdemy_infer.calibrate import Pulse
from clawdemy_infer.model import Decoder, with_weights
from clawdemy_infer.quantization.fast import on_kernels
from clawdemy_infer.quantization.formats import format_named
from clawdemy_infer.quantization.grid import KV
from clawdemy_infer.quantization.linears import round_to_nearest
from clawdemy_infer.quantization.report import Row
from clawdemy_infer.roofline import Machine

BATCHES, CONTEXT = (1, 8), 128

UNTIMED = {
    ("RTN", "int8"): "the fast int8 kernel rounds activations too, and that is the row `int8 activations`",
    ("LLM.int8", "int8"): "its outliers are taken out in plain PyTorch, which shows their effect and not its speed",
}


def why_not(row: Row) -> str:
    """Why a row can have no time here; empty where it can."""
    if row.method == KV:
        return "caches are timed by lesson 03"
    if row.format not in ("fp32", "bf16", "int8", "int4-g32", "int4-g64"):
        return "PyTorch has no kernel for it on a CPU"
    return UNTIMED.get((row.method, row.format), "")


def timed(rows: Iterable[Row], model: Decoder, machine: Machine) -> Iterator[Row]:
    """The rows with the times of a decode step of `model` at each of `BATCHES`, or with the reason why there are none. What is timed
    already is passed on.
    """
    known: dict[str, tuple[dict, dict]] = {}
    for row in rows:
        if why := why_not(row):
            yield replace(row, untimed=why)
            continue
        if not row.measured and row.format not in known:
            known[row.format] = times(model, machine, row.format)
        predicted, measured = known.get(row.format, (row.predicted, row.measured))
        yield replace(row, predicted=predicted, measured=measured)


def times(model: Decoder, machine: Machine, format: str) -> tuple[dict[int, float], dict[int, float]]:
    """Seconds of a decode step at context `CONTEXT` with the matrices in `format`: predicted and measured, by batch."""
    running = with_weights(model, format) if format in ("fp32", "bf16") else on_kernels(round_to_nearest(model, format_named(format)))
    weights = format.partition("-")[0]
    predicted, measured = {}, {}
    for batch in BATCHES:
        pulse = Pulse(machine, weights, batch, "cpu")
        timing = time_decode(running, filled_cache(running, batch, CONTEXT - 1), CONTEXT, watch=pulse.stopwatch)
        ops = step_ops(running, batch=batch)
        predicted[batch] = machine.time(work_of(model.config.shape, weights, batch), ops).seconds / pulse.speed
        measured[batch] = timing.median
    return predicted, measured


def work_of(shape: ModelShape, weights: str, batch: int) -> Work:
    """The work of such a step: all in fp32 or bf16, or the layers' matrices in integers and the rest in fp32."""
    if weights in ("fp32", "bf16"):
        return uniform(shape, "decode", weights, batch, CONTEXT)
    step = shape.decode(batch, CONTEXT, weights=weights, kv="fp32", activations="fp32")
    return total("step", [*(op for op in step.operations() if op.name != "head"), shape.head(batch, "fp32", "fp32")])
