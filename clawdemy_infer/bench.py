"""Prefill and decode of the real model on the stopwatch, with the two predictions made before the clock starts.

    napkin      all the bytes from main memory, or all the FLOPs at peak: what one can do by hand
    predicted   the calibrated roofline: each operation's own bound, at its M and its working set, plus its fixed cost
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from clawdemy_infer.arithmetic import ModelShape, Work
from clawdemy_infer.calibrate import Pulse
from clawdemy_infer.kv_cache.contiguous import ContiguousCache
from clawdemy_infer.linear import computes_in
from clawdemy_infer.model import Decoder
from clawdemy_infer.model.compiled import product_rate
from clawdemy_infer.model.formats import product_ops
from clawdemy_infer.model.step_cpp import StepInCpp
from clawdemy_infer.roofline import Machine
from clawdemy_infer.timing import Timing, count_ops, stopwatch

SLOW = 0.7

Watch = Callable[[Callable[[], object], int], Timing]
"""What times a piece of work so many times: `timing.stopwatch`, or the one of a `Pulse`."""


@dataclass(frozen=True)
class BenchRow:
    """One configuration. Seconds are per prefill (the TTFT without tokenisation) or per decode step of the whole batch.

    `ratio` is measured over predicted. `fraction_of_bound` is napkin over measured: how near to the roofline the run came.
    `speed` is how fast the machine ran meanwhile, as a fraction of its calibration: below `SLOW`, something else runs on it.
    """

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


def errors(rows: Sequence[BenchRow]) -> dict:
    """How far the prediction was off, as a fraction of it: the median over the rows, the largest, and which row that was."""
    worst = max(rows, key=lambda row: abs(row.ratio - 1))
    return {"rows": len(rows), "median": statistics.median(abs(row.ratio - 1) for row in rows), "worst": abs(worst.ratio - 1),
            "worst_row": f"{worst.phase} {worst.weights} B={worst.batch} S={worst.context}"}


def random_tokens(model: Decoder, batch: int, length: int) -> torch.Tensor:
    """[B, T] token ids. A step costs the same whatever the tokens say."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.shape.V, (batch, length), generator=generator).to(model.device)


def time_prefill(model: Decoder, batch: int, prompt: int, repeats: int = 5, watch: Watch = stopwatch) -> Timing:
    """Seconds from a prompt of `prompt` tokens to its first logits, by `stopwatch` or by a `Pulse`'s."""
    tokens = random_tokens(model, batch, prompt)
    cache = ContiguousCache.for_model(model, batch, prompt)

    def prefill() -> None:
        cache.truncate(0)
        model(tokens, cache, last_only=True)
    return watch(prefill, repeats)


def time_decode(model: Decoder, cache: ContiguousCache, context: int, repeats: int = 15, watch: Watch = stopwatch) -> Timing:
    """Seconds for one more token of each sequence, the `context`-th.

    `cache` holds at least context - 1 tokens, and is cut to `context`: measure several contexts from the longest down.
    """
    tokens = random_tokens(model, cache.batch, 1)

    def one_token() -> None:
        cache.truncate(context - 1)
        model(tokens, cache, last_only=True)
    return watch(one_token, repeats)


def filled_cache(model: Decoder, batch: int, tokens: int) -> ContiguousCache:
    """A cache that really holds `tokens` tokens of each sequence, with room for one more."""
    cache = ContiguousCache.for_model(model, batch, tokens + 1)
    for start in range(0, tokens, 512):
        model(random_tokens(model, batch, min(512, tokens - start)), cache, last_only=True)
    return cache


@torch.inference_mode()
def step_ops(model: Decoder, new: int = 1, batch: int = 1) -> int:
    """How many operations one forward pass dispatches beside its matrix products: counted, not timed. What it costs to start a
    product is in the products' own rate. The context does not change it, and the batch only where attention goes another way for many
    sequences; a prefill of two tokens takes as many as a long one, and a few more than a decode step.
    """
    cache, tokens = ContiguousCache.for_model(model, batch, 2 * new), random_tokens(model, batch, new)
    model(tokens, cache, last_only=True)                # the first step also packs the weights
    cache.truncate(0)
    if isinstance(model.compiled_step, StepInCpp):
        return count_ops(lambda: model(tokens, cache, last_only=True))
    if model.compiled_step and batch * new == 1:
        cache = filled_cache(model, 1, 3)               # compiled attention wants a past
        # What is compiled has no operations, but must be called.
        return count_ops(lambda: model(tokens, cache, last_only=True)) + model.config.shape.L + 1
    whole = count_ops(lambda: model(tokens, cache, last_only=True))
    return whole + (model.between.calls if model.between else 0) - product_ops(model, batch * new)


# ---- the bench command: what the roofline allows, then what the clock says ----


def work_of(shape: ModelShape, phase: str, weights: str, batch: int, context: int, device: str = "cpu") -> Work:
    """The work of one row: cache and activations in the dtype that goes with such weights."""
    step, dtype = {"prefill": shape.prefill, "decode": shape.decode}[phase], computes_in(weights, device)
    return step(batch, context, weights=weights, kv=dtype, activations=dtype)


def card(shape: ModelShape, machine: Machine, memory: float, wanted: Iterable[tuple[str, str, int, int]],
         device: str = "cpu") -> list[dict]:
    """What is known of each wanted (phase, weights, batch, context) before anything runs. Capacity, `memory` bytes, comes first:
    what does not fit has no time. Raises ValueError for a format that the machine has no figure for.
    """
    rows = []
    for phase, weights, batch, context in wanted:
        work = work_of(shape, phase, weights, batch, context, device)._replace(dtype=weights)       # the peak is that of the format
        capacity = shape.fits(memory, batch, context, weights, computes_in(weights, device))
        rows.append({
            "phase": phase, "weights": weights, "batch": batch, "context": context, "fits": bool(capacity),
            "memory_bytes": capacity.weight_bytes + capacity.kv_bytes, "flops": work.flops, "bytes": work.bytes,
            "intensity": work.intensity, "bound": "compute" if work.intensity > machine.ridge(weights) else "memory",
            "napkin_s": machine.napkin(work) if capacity else None,
        })
    return rows


def measure(model: Decoder, machine: Machine, rows: Iterable[dict]) -> Iterator[BenchRow]:
    """Time the rows of a card, all of the format that `model` has its weights in. `predicted_s` is the calibrated roofline at the
    speed that the machine has at that moment, by a `Pulse` that is taken between the runs and knows nothing of them.
    """
    prefill_ops = step_ops(model, new=2)
    device, pulse, pulse_rows = model.device.type, None, None
    for row in rows:
        phase, weights, batch, context = (row[key] for key in ("phase", "weights", "batch", "context"))
        m = batch * (context if phase == "prefill" else 1)              # rows of activations that share a read of the weights
        if m != pulse_rows:
            pulse, pulse_rows = Pulse(machine, weights, m, device), m
        ops = prefill_ops if phase == "prefill" else step_ops(model, batch=batch)
        as_run = machine
        if isinstance(model.compiled_step, StepInCpp):
            as_run = machine.with_only_products()
        elif model.compiled_step and phase == "decode" and batch == 1:
            as_run = machine.with_products_at(weights, product_rate(weights))
        calibrated = as_run.time(work_of(model.config.shape, phase, weights, batch, context, device), ops).seconds
        if phase == "prefill":
            repeats = 5 if m > 256 else 11                              # short runs feel a burst most, and cost least to repeat
            timing = time_prefill(model, batch, context, repeats, watch=pulse.stopwatch)
        else:
            timing = time_decode(model, filled_cache(model, batch, context - 1), context, watch=pulse.stopwatch)
        predicted, speed = calibrated / pulse.speed, pulse.speed
        yield BenchRow(phase, weights, batch, context, row["napkin_s"], predicted, timing.median, timing.spread, speed)
