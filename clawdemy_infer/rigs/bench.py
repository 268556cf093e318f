"""Prefill and decode of the real model on the stopwatch, beside two predictions made before it.

    napkin      all the bytes from main memory, or all the FLOPs at peak
    predicted   the calibrated roofline: each operation's own bound, plus its fixed cost
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.fast import computes_in
from clawdemy_infer.lesson.ledger import half_width
from clawdemy_infer.lesson.parts import StepOf
from clawdemy_infer.lesson.steps import work_of
from clawdemy_infer.machine.present import at_present, widened
from clawdemy_infer.model import Decoder

HELD_OUT = [(phase, weights, *sizes) for phase, weights, several in (
    ("decode", "fp32", ((1, 97), (3, 333), (6, 700))),
    ("prefill", "fp32", ((1, 37), (1, 150), (3, 90), (1, 600))),
    ("decode", "bf16", ((1, 200), (5, 150), (12, 600))),
    ("prefill", "bf16", ((1, 45), (2, 200), (1, 777))),
    ("decode", "int8", ((1, 450), (7, 120))), ("prefill", "int8", ((1, 100), (2, 333))),
    ("decode", "int4", ((1, 801), (3, 90))), ("prefill", "int4", ((1, 300),))) for sizes in several]
"""Phase, weights, batch and context of twenty steps whose numbers of rows and of keys no probe has:
how often does the interval of a prediction hold?"""


def prediction_errors(rows: Sequence[dict]) -> dict:
    """How far the prediction was off, as a fraction of it: the median of `rows`, and the worst;
    the share of measurements inside their interval, and the median width of one, either way."""
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1))
    return {"rows": len(rows), "median": statistics.median(abs(row["ratio"] - 1) for row in rows),
            "worst": abs(worst["ratio"] - 1),
            "coverage": statistics.mean(row["inside"] for row in rows),
            "width": statistics.median(half_width(row["predicted_low_s"], row["predicted_high_s"])
                                       for row in rows),
            "worst_row": "{phase} {weights} B={batch} S={context}".format(**worst)}


def bounds(shape: ModelShape, machine: Machine, memory: float,
           wanted: Iterable[tuple[str, str, int, int]], device: str = "cpu") -> list[dict]:
    """What is known of each (phase, weights, batch, context) before anything runs; no time for what
    does not fit in `memory` bytes. ValueError for a format that the machine has no figure for."""
    rows = []
    for phase, weights, batch, context in wanted:
        work = work_of(shape, phase, weights, batch, context, device)._replace(dtype=weights)
        capacity = shape.fits(memory, batch, context, weights, computes_in(weights, device))
        rows.append({
            "phase": phase, "weights": weights, "batch": batch, "context": context,
            "fits": bool(capacity), "memory_bytes": capacity.weight_bytes + capacity.kv_bytes,
            "flops": work.flops, "bytes": work.bytes, "intensity": work.intensity,
            "bound": "compute" if work.intensity > machine.ridge(weights) else "memory",
            "napkin_s": machine.napkin(work) if capacity else None})
    return rows


def measure(model: Decoder, machine: Machine, rows: Iterable[dict]) -> Iterator[dict]:
    """Time the rows of `bounds` that have the format of `model`; seconds are per prefill or per
    decode step of the whole batch. Each is predicted right before it runs, at the speed that the
    machine has then; the interval is from probes before and after the run, never from the run."""
    for row in rows:
        step = StepOf(model, row["phase"], row["batch"], row["context"])
        # The prediction comes first: the run cannot change it.
        at_once = at_present(machine)
        predicted, timing = step.predict(at_once), step.time(at_once)
        low, high = widened(predicted, at_once, timing.around)
        yield row | {"predicted_s": predicted.seconds, "predicted_low_s": low,
                     "predicted_high_s": high, "measured_s": timing.median,
                     "spread": timing.spread, "ratio": timing.median / predicted.seconds,
                     "inside": low <= timing.median <= high,
                     "fraction_of_bound": row["napkin_s"] / timing.median}
