"""How fast the machine is now: three probes of a tenth of a second, beside its calibration's.

A laptop throttles, a rented core has neighbours. The probes run before a prediction is made and
right before and right after the run that it predicts, never within it, and they know nothing of it.
"""

import statistics
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from clawdemy_infer.envelope.roofline import Machine, Prediction
from clawdemy_infer.machine import probes
from clawdemy_infer.machine.calibrated import WAIT_SPREAD, Calibrated, Speeds
from clawdemy_infer.timing import Timing, alternate, now

REFERENCE_ROWS = 1, 256
"""Rows M of a product that is bound by memory, and of one that is bound by arithmetic, on a CPU."""
SAMPLES = 7             # of each of the three probes, of some 20 ms
REFERENCES = Speeds._fields[:3]


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def reference_probes(device: str) -> tuple[Callable[[], float], ...]:
    """A function for each of `REFERENCES` that samples it once, in units/s: FLOPs of a product with
    one row, of one with many, and operations started. The weights come from memory, sample after
    sample, however large the caches are: in a calibration other probes come between."""
    ring_bytes = max(probes.RING_BYTES, 2 * probes.largest_cache())
    weights = probes.gemm_weights("fp32", device, ring_bytes)
    memory, compute = (probes.rate_of(probes.gemm_step(weights, m, torch.float32), sample_s=0.02)
                       for m in REFERENCE_ROWS)
    layer, x = probes.Glue(device, torch.float32), torch.randn(1, 1, 512, device=device)

    @torch.inference_mode()
    def start(_: int) -> int:
        layer(x, [lambda: None] * 4)
        return 1
    return memory, compute, probes.rate_of(start)


def waiting() -> Callable[[], float]:
    """A function that says for which share of the time since now a thread of this process, that
    which waited longest, was ready to run and had no core. Linux keeps count; elsewhere it is 0."""
    def waits() -> Counter[str]:
        found = Counter()
        for file in Path("/proc/self/task").glob("*/schedstat"):
            with suppress(OSError):                     # the thread has ended meanwhile
                found[file.parent.name] = int(file.read_text().split()[1]) / 1e9
        return found

    before, start = waits(), now()
    return lambda: max((waits() - before).values(), default=0.0) / (now() - start)


def speeds_now(machine: Machine) -> Speeds:
    """The machine's speeds at this moment, as fractions of its calibration: medians of `SAMPLES`
    samples, taken in turn. 1 for a machine that was not measured here."""
    if not {*REFERENCES} <= {*getattr(machine, "reference", ())}:
        return Speeds()
    references, waited = reference_probes(machine.device), waiting()
    found = [[sample() for sample in references] for _ in range(SAMPLES)]
    medians = map(statistics.median, zip(*found, strict=True))
    return Speeds(*(rate / machine.reference[name]
                    for name, rate in zip(REFERENCES, medians, strict=True)), waited())


def at_present(machine: Machine) -> Machine:
    """`machine` at the speeds that it has at this moment; a data sheet stays as it is."""
    return machine.at(speeds_now(machine)) if isinstance(machine, Calibrated) else machine


def bracketed(machine: Machine) -> Callable[..., Timing | dict]:
    """A stopwatch, called like `timing.stopwatch`, or like `timing.alternate` with several works,
    that keeps in `Timing.around` the machine's speeds right before and right after the runs."""
    def watch(work: Callable | dict, repeats: int = 5, warmup: int = 1) -> Timing | dict:
        several = work if isinstance(work, dict) else {"": work}
        before = speeds_now(machine)
        timings = alternate(several, repeats, warmup)
        around = before, speeds_now(machine)
        timings = {name: replace(timing, around=around) for name, timing in timings.items()}
        return timings if isinstance(work, dict) else timings[""]
    return watch


def widened(prediction: Prediction, machine: Machine, around: tuple[Speeds, ...]
            ) -> tuple[float, float]:
    """Seconds from and to: the interval of `prediction`, and what it would be at the speeds seen
    `around` the run. The run itself is not looked at."""
    said = getattr(machine, "now", Speeds())
    low, high = [prediction.low_s], [prediction.high_s]
    for seen in around:
        seconds = sum(part.seconds * getattr(said, part.bound, 1) / getattr(seen, part.bound, 1)
                      for part in prediction.parts.values())
        half = 1 + prediction.spread + WAIT_SPREAD * max(0.0, seen.waited - said.waited)
        low, high = [*low, seconds / half], [*high, seconds * half]
    return min(low), max(high)


def drift(machine: Calibrated) -> str:
    """One line, with what to do, if the machine is off its calibration by over a fifth; or none."""
    memory, compute, launches, _ = machine.now
    if all(1 / 1.2 <= speed <= 1.2 for speed in (memory, compute, launches)):
        return ""
    return (f"The machine is not as it was calibrated ({machine.source}): it reads memory at "
            f"{memory:.0%}, computes at {compute:.0%} and launches operations at {launches:.0%} of "
            "the speed it had. Predictions are made for today's speed; `clawdemy-infer calibrate` "
            "measures it anew.")
