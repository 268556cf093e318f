"""Prefill and decode of the real model on the stopwatch, beside two predictions made before it.

    napkin      all the bytes from main memory, or all the FLOPs at peak
    predicted   the calibrated roofline: each operation's own bound, plus its fixed cost
"""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.fast import computes_in
from clawdemy_infer.lesson import steps
from clawdemy_infer.machine.calibrate import Pulse
from clawdemy_infer.machine.calibrated import only_products
from clawdemy_infer.model import Decoder

MIN_SPEED = 0.7
"""Fraction of its calibrated speed below which a machine has something else to do."""


@dataclass(frozen=True)
class BenchRow:
    """One configuration. Seconds are per prefill or per decode step of the whole batch; `speed` is
    the machine's meanwhile, as a fraction of its calibration."""

    phase: str
    weights: str
    batch: int
    context: int
    napkin_s: float
    predicted_s: float
    measured_s: float
    spread: float
    speed: float

    @property
    def ratio(self) -> float:
        return self.measured_s / self.predicted_s

    @property
    def fraction_of_bound(self) -> float:
        return self.napkin_s / self.measured_s

    def as_dict(self) -> dict:
        return {**asdict(self), "ratio": self.ratio, "fraction_of_bound": self.fraction_of_bound}


def prediction_errors(rows: Sequence[BenchRow]) -> dict:
    """How far the prediction was off, as a fraction of it: the median of `rows`, and the worst."""
    worst = max(rows, key=lambda row: abs(row.ratio - 1))
    return {"rows": len(rows), "median": statistics.median(abs(row.ratio - 1) for row in rows),
            "worst": abs(worst.ratio - 1),
            "worst_row": f"{worst.phase} {worst.weights} B={worst.batch} S={worst.context}"}


def bounds(shape: ModelShape, machine: Machine, memory: float,
           wanted: Iterable[tuple[str, str, int, int]], device: str = "cpu") -> list[dict]:
    """What is known of each (phase, weights, batch, context) before anything runs; no time for what
    does not fit in `memory` bytes. Raises ValueError for a format that the machine has no figure
    for."""
    rows = []
    for phase, weights, batch, context in wanted:
        work = steps.work_of(shape, phase, weights, batch, context, device)._replace(dtype=weights)
        capacity = shape.fits(memory, batch, context, weights, computes_in(weights, device))
        rows.append({
            "phase": phase, "weights": weights, "batch": batch, "context": context,
            "fits": bool(capacity), "memory_bytes": capacity.weight_bytes + capacity.kv_bytes,
            "flops": work.flops, "bytes": work.bytes, "intensity": work.intensity,
            "bound": "compute" if work.intensity > machine.ridge(weights) else "memory",
            "napkin_s": machine.napkin(work) if capacity else None,
        })
    return rows


def measure(model: Decoder, machine: Machine, rows: Iterable[dict]) -> Iterator[BenchRow]:
    """Time the rows of `bounds` that have the format of `model`. Predictions are made at the speed
    of that moment, by a `Pulse` between the runs that knows nothing of them."""
    prefill_ops, device = steps.step_ops(model, new=2), model.device.type
    as_run = only_products(machine) if steps.is_one_call(model) else machine
    pulse, pulse_rows = None, None
    for row in rows:
        setting = phase, weights, batch, context = (
            row["phase"], row["weights"], row["batch"], row["context"])
        # 1. A pulse at this row's M: the rows of activations that share a read of the weights.
        prefill = phase == "prefill"
        m = batch * context if prefill else batch
        if m != pulse_rows:
            pulse, pulse_rows = Pulse(machine, weights, m, device), m
        # 2. The prediction, which the run cannot change.
        ops = prefill_ops if prefill else steps.step_ops(model, batch=batch)
        calibrated_s = as_run.time(steps.work_of(model.config.shape, *setting, device), ops).seconds
        # 3. The run: short ones feel a burst most, and cost least to repeat.
        watch = pulse.stopwatch
        timing = (steps.time_prefill(model, batch, context, 5 if m > 256 else 11, watch) if prefill
                  else steps.time_decode(model, steps.filled_cache(model, batch, context - 1),
                                         context, watch=watch))
        yield BenchRow(*setting, row["napkin_s"], calibrated_s / pulse.speed, timing.median,
                       timing.spread, pulse.speed)
