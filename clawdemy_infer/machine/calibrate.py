"""Measure this machine once, in a minute or two: the figures from which every calibrated prediction
is made.

The probes do the measuring. The result is a `Calibrated` machine, kept in the user's cache with the
fingerprint of the hardware and the date.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch

from clawdemy_infer.envelope.roofline import interpolate
from clawdemy_infer.fast import FLOATS, computes_in
from clawdemy_infer.fast.cpp import cpu_name
from clawdemy_infer.machine import probes
from clawdemy_infer.machine.calibrated import SMALL_GEMM, Calibrated
from clawdemy_infer.machine.probes_attention import attention_rates
from clawdemy_infer.paths import cache_dir, write_atomically
from clawdemy_infer.timing import Timing, rates, stopwatch

WORKING_SETS = [2**20, 2**22, 2**24, 2**26, 2**28, 2**30]
PROBES = "2026-11m"
"""Version of the probes: a kept calibration of another one is measured anew."""
PASSES = 3
"""Times that all probes are gone through, some twenty-five seconds each."""
MAX_BANDWIDTH_DRIFT = 0.2
"""Fraction by which main-memory bandwidth may differ from a kept calibration that is used again."""
MAX_GEMM_DRIFT = 1.3
"""Factor by which matrix products may differ from it."""

Figures = dict[str, dict[tuple, float]]
"""What the probes found, by kind and then by (format, M, ...)."""


def memory_bytes(device: str) -> int:
    """Bytes of memory that the device has."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def fingerprint(device: str) -> dict[str, str]:
    """What a calibration is valid for: another processor, thread count, torch or set of probes, and
    the figures mean nothing."""
    name = (torch.cuda.get_device_name(0) if device == "cuda"
            else f"{cpu_name()}, {torch.get_num_threads()} threads")
    return {"device": name, "system": platform.system(), "torch": torch.__version__,
            "probes": PROBES}


def calibrate(device: str | None = None) -> Calibrated:
    """Measure this machine (about a minute and a half on two cores), keep the result in the user's
    cache, and return it."""
    device = device or default_device()
    path, memory = _path(device), memory_bytes(device)
    path.parent.mkdir(parents=True, exist_ok=True)      # says before measuring if it cannot be
    sizes = [size for size in WORKING_SETS if size <= memory / 8]
    found = typical([measured(device, sizes) for _ in range(PASSES)])

    def points(kind: str, rate: str = "flops_per_s") -> list[dict]:
        return [dict(zip(("dtype", "m", "name"), where, strict=False)) | {rate: value}
                for where, value in found[kind].items()]

    fixed = {format: seconds for (format,), seconds in found["fixed"].items()}
    # A large square product is not always the fastest: a peak is the best rate of any product.
    peaks = {format: max(rate, *(value for (each, _), value in found["gemm"].items()
                                 if each == format))
             for (format,), rate in found["peak"].items()}
    record = {
        "name": fingerprint(device)["device"],
        "bandwidth": [{"bytes": size, "bytes_per_s": rate}
                      for (size,), rate in found["bandwidth"].items()],
        "peak_flops": peaks,
        **{kind: points(kind) for kind in ("gemm", SMALL_GEMM, "head", "attention")},
        "elementwise": points("elementwise", "bytes_per_s"),
        "fixed_s_per_op": fixed["fp32"], "fixed": fixed,
        "threads": torch.get_num_threads() if device == "cpu" else 1, "memory": memory,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "fingerprint": fingerprint(device),
    }
    write_atomically(path, json.dumps(record, indent=1))
    return from_record(record)


def measured(device: str, sizes: list[int]) -> Figures:
    """All probes once."""
    found: Figures = {"bandwidth": {(size,): rate
                                    for size, rate in probes.read_bandwidth(sizes, device)}}
    formats = probes.formats(device)
    dtypes = dict.fromkeys(computes_in(format, device) for format in formats)
    for format in formats:
        for kernel, curve in probes.gemm_rates(format, device).items():
            found.setdefault(kernel, {}).update({(format, m): rate for m, rate in curve})
    found["attention"] = {(dtype, m, name): rate for dtype in dtypes
                          for name, curve in attention_rates(dtype, device).items()
                          for m, rate in curve}
    found["elementwise"] = {(dtype, m): rate for dtype in dtypes
                            for m, rate in probes.elementwise_rates(dtype, device)}
    found["fixed"] = {(format,): probes.fixed_cost(device, format) for format in formats}
    found["peak"] = {(format,): probes.peak_flops(format, device) for format in formats}
    return found


def typical(passes: list[Figures]) -> Figures:
    """Each figure's median over the passes. A shared machine is slow, or fast, for seconds at a
    time; each figure is measured at several moments, so that all are of the same machine."""
    return {kind: {where: statistics.median(one[kind][where] for one in passes)
                   for where in figures}
            for kind, figures in passes[0].items()}


def _path(device: str) -> Path:
    return cache_dir() / f"calibration-{device}.json"


def from_record(record: dict) -> Calibrated:
    """The machine that a calibration's JSON describes."""
    def curves(kind: str, rate: str = "flops_per_s") -> dict[str, dict[str, tuple]]:
        """By name, then by dtype."""
        found: dict[str, dict[str, tuple]] = {}
        for point in record.get(kind, []):
            by_dtype = found.setdefault(point.get("name", kind), {})
            by_dtype.setdefault(point["dtype"], ())
            by_dtype[point["dtype"]] += ((point["m"], point[rate]),)
        return found

    rates = curves("gemm") | curves(SMALL_GEMM) | curves("head") | curves("attention")
    return Calibrated(
        name=record["name"],
        bandwidth=tuple((point["bytes"], point["bytes_per_s"]) for point in record["bandwidth"]),
        peak_flops=record["peak_flops"], memory=record["memory"], rates=rates,
        elementwise=curves("elementwise", "bytes_per_s").get("elementwise", {}),
        fixed_s_per_op=record["fixed_s_per_op"], fixed=record.get("fixed", {}),
        threads=record.get("threads", 1), source=f"measured {record['date']}")


def kept_record(device: str | None = None) -> dict | None:
    """The kept calibration as JSON, or None if there is none for this hardware, this thread count
    and this torch."""
    device = device or default_device()
    try:
        record = json.loads(_path(device).read_text())
    except (FileNotFoundError, ValueError):             # none yet, or torn
        return None
    valid = isinstance(record, dict) and record.get("fingerprint") == fingerprint(device)
    return record if valid else None


def this_machine(device: str | None = None) -> Calibrated:
    """This machine's calibration: the kept one while the machine is still as fast as it was then,
    else a new one.

    A shared machine can lose half its speed to a neighbour within minutes; a prediction from its
    figures then explains nothing. The check takes a second.
    """
    device = device or default_device()
    if record := kept_record(device):
        kept = from_record(record)
        [(_, rate)] = probes.read_bandwidth([int(kept.bandwidth[-1][0])], device, rounds=5)
        if abs(rate / kept.bandwidth_at() - 1) <= MAX_BANDWIDTH_DRIFT and all(
                1 / MAX_GEMM_DRIFT < pulse_now(kept, rows, device) < MAX_GEMM_DRIFT
                for rows in (1, 256)):
            return kept
    return calibrate(device)


def pulse_now(machine: Calibrated, rows: int, device: str) -> float:
    """One reading of the `Pulse` in fp32."""
    pulse = Pulse(machine, "fp32", rows, device)
    pulse.sample(0.2)
    return pulse.speed


class Pulse:
    """How fast the machine runs *now*, as a fraction of its calibration: the GEMM probe at one M,
    between the timed runs of something.

    A laptop throttles, a rented core has neighbours. What a prediction says of the calibrated
    machine is divided by `speed` to say it of the machine at that moment. The probe is not the run,
    and never sees it.
    """

    def __init__(self, machine: Calibrated, format: str, rows: int,
                 device: str | None = None) -> None:
        self.expected = interpolate(machine.rates["gemm"][format], rows)
        device = device or default_device()
        dtype = FLOATS[computes_in(format, device)]
        self.step = probes.gemm_step(probes.gemm_weights(format, device), rows, dtype)
        self.samples: list[float] = []
        self.runs: tuple[float, ...] = ()

    def sample(self, seconds: float = 0.03) -> None:
        """Take the pulse for `seconds`."""
        self.runs = ()
        self.samples.append(rates({"now": self.step}, sample_s=seconds, rounds=1)["now"])

    @property
    def speed(self) -> float:
        """1 for a machine as fast as when it was calibrated; for timed runs, the speed at which
        their median was reached. A neighbour's burst slows one run and the pulses around it, so
        each run is first put beside its own two pulses."""
        if not self.runs:
            return statistics.median(self.samples) / self.expected
        around = [(before + after) / 2 for before, after in pairwise(self.samples)]
        done = statistics.median(seconds * rate
                                 for seconds, rate in zip(self.runs, around, strict=True))
        return done / statistics.median(self.runs) / self.expected

    def stopwatch(self, work: Callable[[], object], repeats: int = 5) -> Timing:
        """Time `work()` as `timing.stopwatch` does, with a pulse before the first run, between the
        runs and after the last."""
        self.samples, seconds = [], []
        warmup = stopwatch(work, repeats=1, warmup=0).median
        pulse_s = min(0.5, max(0.05, warmup / 4))       # longer runs get longer pulses
        self.sample(pulse_s)
        for _ in range(repeats):
            seconds += stopwatch(work, repeats=1, warmup=0).seconds
            self.sample(pulse_s)
        self.runs = tuple(seconds)
        return Timing(self.runs)
