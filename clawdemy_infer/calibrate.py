"""Measure this machine once, in a minute or two: the figures from which every calibrated prediction is made.

The probes do the measuring. The result is a `Machine`, kept in the user's cache with the fingerprint of the hardware and the date.
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

from clawdemy_infer.cpp import cpu_name
from clawdemy_infer.linear import FLOATS, computes_in
from clawdemy_infer.linear.choice import remeasure
from clawdemy_infer.paths import cache_dir
from clawdemy_infer.probes import (
    elementwise_rates,
    fixed_cost,
    formats,
    gemm_rates,
    gemm_step,
    gemm_weights,
    peak_flops,
    read_bandwidth,
)
from clawdemy_infer.probes_attention import attention_rates
from clawdemy_infer.roofline import SMALL_GEMM, Machine, interpolate
from clawdemy_infer.timing import Timing, rates, stopwatch

WORKING_SETS = [2**20, 2**22, 2**24, 2**26, 2**28, 2**30]

PROBES = "2026-11l"
"""Changes whenever a probe is added or counts differently: older calibrations are then measured anew."""

PASSES = 3
"""Times that all probes are gone through, some twenty-five seconds each."""

DRIFT = 0.2
"""A kept calibration is used again while main-memory bandwidth is within this fraction of what it was."""
FAR = 1.3
"""… and matrix products run within this factor of what they did."""


def memory_bytes(device: str) -> int:
    """Bytes of memory that the device has."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def fingerprint(device: str) -> dict[str, str]:
    """What a calibration is valid for: another processor, thread count, torch or set of probes, and the figures mean nothing."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {"device": name, "system": platform.system(), "torch": torch.__version__, "probes": PROBES}


def calibrate(device: str | None = None) -> Machine:
    """Measure this machine (about a minute and a half on two cores), keep the result in the user's cache, and return it."""
    device = device or default_device()
    memory = memory_bytes(device)
    path = _path(device)
    path.parent.mkdir(parents=True, exist_ok=True)      # a cache that cannot be written to says so before the measuring, not after
    if device == "cpu":
        remeasure(formats(device))                      # which kernel is fastest, before anything is said of how fast
    sizes = [size for size in WORKING_SETS if size <= memory / 8]
    found = typical([measured(device, sizes) for _ in range(PASSES)])

    def points(kind: str) -> list[dict]:
        return [dict(zip(("dtype", "m", "name"), where, strict=False)) | {"flops_per_s": rate} for where, rate in found[kind].items()]

    fixed = {format: seconds for (format,), seconds in found["fixed"].items()}
    peaks = {format: rate for (format,), rate in found["peak"].items()}
    # A large square product is not always the fastest: a peak is the best rate that anything reached.
    for point in points("gemm"):
        peaks[point["dtype"]] = max(peaks[point["dtype"]], point["flops_per_s"])
    record = {
        "name": fingerprint(device)["device"],
        "bandwidth": [{"bytes": size, "bytes_per_s": rate} for (size,), rate in found["bandwidth"].items()],
        "peak_flops": peaks,
        "gemm": points("gemm"),
        SMALL_GEMM: points(SMALL_GEMM),
        "head": points("head"),
        "attention": points("attention"),
        "elementwise": [{"dtype": dtype, "m": m, "bytes_per_s": rate} for (dtype, m), rate in found["elementwise"].items()],
        "fixed_s_per_op": fixed["fp32"],
        "fixed": fixed,
        "threads": torch.get_num_threads() if device == "cpu" else 1,
        "memory": memory,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "fingerprint": fingerprint(device),
    }
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(record, indent=1))
    os.replace(part, path)
    return from_record(record)


def measured(device: str, sizes: list[int]) -> dict[str, dict[tuple, float]]:
    """All probes once: by kind, the figure of each (format, M, ...)."""
    found: dict[str, dict[tuple, float]] = {"bandwidth": {(size,): rate for size, rate in read_bandwidth(sizes, device)}}
    dtypes = dict.fromkeys(computes_in(format, device) for format in formats(device))
    for format in formats(device):
        for kernel, curve in gemm_rates(format, device).items():
            found.setdefault(kernel, {}).update({(format, m): rate for m, rate in curve})
    found["attention"] = {(dtype, m, name): rate for dtype in dtypes
                          for name, curve in attention_rates(dtype, device).items() for m, rate in curve}
    found["elementwise"] = {(dtype, m): rate for dtype in dtypes for m, rate in elementwise_rates(dtype, device)}
    found["fixed"] = {(format,): fixed_cost(device, format) for format in formats(device)}
    found["peak"] = {(format,): peak_flops(format, device) for format in formats(device)}
    return found


def typical(passes: list[dict[str, dict[tuple, float]]]) -> dict[str, dict[tuple, float]]:
    """Each figure's median over the passes. A shared machine is slow, or fast, for seconds at a time: so that all figures are of the same
    machine, each is measured at several moments, and not all at one."""
    return {kind: {where: statistics.median(one[kind][where] for one in passes) for where in figures}
            for kind, figures in passes[0].items()}


def _path(device: str) -> Path:
    return cache_dir() / f"calibration-{device}.json"


def from_record(record: dict) -> Machine:
    """The `Machine` that a calibration's JSON describes."""
    curves: dict[str, dict[str, tuple]] = {}
    for kernel in ("gemm", SMALL_GEMM, "head", "attention"):
        for point in record.get(kernel, []):
            by_dtype = curves.setdefault(point.get("name", kernel), {})
            by_dtype[point["dtype"]] = (*by_dtype.get(point["dtype"], ()), (point["m"], point["flops_per_s"]))
    elementwise: dict[str, tuple] = {}
    for point in record["elementwise"]:
        elementwise[point["dtype"]] = (*elementwise.get(point["dtype"], ()), (point["m"], point["bytes_per_s"]))
    return Machine(
        name=record["name"],
        bandwidth=tuple((point["bytes"], point["bytes_per_s"]) for point in record["bandwidth"]),
        peak_flops=record["peak_flops"],
        memory=record["memory"],
        rates=curves,
        elementwise=elementwise,
        fixed_s_per_op=record["fixed_s_per_op"],
        fixed=record.get("fixed", {}),
        threads=record.get("threads", 1),
        source=f"measured {record['date']}",
    )


def kept_record(device: str | None = None) -> dict | None:
    """The kept calibration as JSON, or None if there is none for this hardware, this thread count and this torch."""
    device = device or default_device()
    try:
        record = json.loads(_path(device).read_text())
    except (FileNotFoundError, ValueError):             # none yet, or torn
        return None
    return record if isinstance(record, dict) and record.get("fingerprint") == fingerprint(device) else None


def this_machine(device: str | None = None) -> Machine:
    """This machine's calibration: the kept one while the machine is still as fast as it was then, else a new one.

    A shared machine can lose half its speed to a neighbour within minutes, and a calibration may have been made at such a
    moment; a prediction from its figures then explains nothing. The check takes a second.
    """
    device = device or default_device()
    record = kept_record(device)
    if record:
        kept = from_record(record)
        [(_, rate)] = read_bandwidth([int(kept.bandwidth[-1][0])], device, rounds=5)
        if abs(rate / kept.bandwidth_at() - 1) <= DRIFT and all(1 / FAR < pulse_now(kept, rows, device) < FAR for rows in (1, 256)):
            return kept
    return calibrate(device)


def pulse_now(machine: Machine, rows: int, device: str) -> float:
    """One reading of the `Pulse` in fp32."""
    pulse = Pulse(machine, "fp32", rows, device)
    pulse.sample(0.2)
    return pulse.speed


class Pulse:
    """How fast the machine runs *now*, as a fraction of its calibration: the GEMM probe at one M, between the timed runs of something.

    A laptop throttles, a rented core has neighbours: within seconds a machine may be half as fast as it was. What a prediction
    says of the calibrated machine is divided by `speed` to say it of the machine at that moment. The probe is not the run, and
    never sees it.
    """

    def __init__(self, machine: Machine, format: str, rows: int, device: str | None = None):
        self.expected = interpolate(machine.rates["gemm"][format], rows)
        device = device or default_device()
        self.step = gemm_step(gemm_weights(format, device), rows, FLOATS[computes_in(format, device)])
        self.samples: list[float] = []
        self.runs: tuple[float, ...] = ()

    def sample(self, seconds: float = 0.03) -> None:
        """Take the pulse for so many seconds."""
        self.runs = ()
        self.samples.append(rates({"now": self.step}, sample_s=seconds, rounds=1)["now"])

    @property
    def speed(self) -> float:
        """1 for a machine as fast as when it was calibrated; for timed runs, the speed at which their median was reached.

        A neighbour's burst slows one run and the pulses around it. So each run is first put beside its own two pulses, and only
        then is the median taken.
        """
        if not self.runs:
            return statistics.median(self.samples) / self.expected
        around = [(before + after) / 2 for before, after in pairwise(self.samples)]
        done = statistics.median(seconds * rate for seconds, rate in zip(self.runs, around, strict=True))
        return done / statistics.median(self.runs) / self.expected

    def stopwatch(self, work: Callable[[], object], repeats: int = 5) -> Timing:
        """Time `work()` as `timing.stopwatch` does, with a pulse before the first run, between the runs and after the last."""
        self.samples, seconds = [], []
        warmup = stopwatch(work, repeats=1, warmup=0).median            # its length sets the length of a pulse
        pulse_s = min(0.5, max(0.05, warmup / 4))
        self.sample(pulse_s)
        for _ in range(repeats):
            seconds += stopwatch(work, repeats=1, warmup=0).seconds
            self.sample(pulse_s)
        self.runs = tuple(seconds)
        return Timing(self.runs)
