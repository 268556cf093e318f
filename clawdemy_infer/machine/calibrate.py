"""Measure this machine once, in at most 20 seconds: what every calibrated prediction is made from.

The probes do the measuring. The result is a `Calibrated` machine, kept in the user's cache with the
hardware's fingerprint, the date, and the spread of every figure, and never made again unasked.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm import tqdm

from clawdemy_infer.fast import computes_in
from clawdemy_infer.fast.cpp import cpu_name
from clawdemy_infer.machine import in_notebook, present, probes
from clawdemy_infer.machine.calibrated import SMALL_GEMM, Calibrated
from clawdemy_infer.machine.present import default_device
from clawdemy_infer.machine.probes import Probe
from clawdemy_infer.machine.probes_attention import attention_probes
from clawdemy_infer.paths import cache_dir, read_kept, write_atomically

WORKING_SETS = [2**20, 2**22, 2**24, 2**26, 2**28]
PROBES = "2026-12b"             # their version: a calibration with another one is made anew
FORMATS = ("fp32", "bf16")      # of every calibration; others are measured when first asked for
BUDGET_S, FORMAT_BUDGET_S = 17.0, 4.0
"""Seconds that a calibration, and a further format, may take at most; with PyTorch's import, 20."""
ONE_SAMPLE_SPREAD = 0.25        # where there was time to sample only once: nobody knows
LONG_S = 0.15
"""A sample that takes so long has averaged over the noise of the moment: two of them are enough."""

CURVES = {"gemm": "flops_per_s", SMALL_GEMM: "flops_per_s", "head": "flops_per_s",
          "attention": "flops_per_s", "elementwise": "bytes_per_s"}
"""Kinds of work that are measured by rows M, and the unit of their rate."""
TINY = 1e-30
SHAPE = {
    "name": str, "date": str, "threads?": 1, "memory": TINY, "waited?": 0,
    "bandwidth": [{"bytes": TINY, "bytes_per_s": TINY, "spread?": 0}, ...],
    "peak_flops": {**dict.fromkeys(FORMATS, TINY), "": TINY},
    "fixed_s_per_op": TINY, "fixed?": {"": TINY}, "spreads?": {"": {"": 0}},
    "reference?": {"": TINY},
    **{f"{kind}?": [{"dtype": str, "m": TINY, rate: TINY, "name?": str, "spread?": 0}]
       for kind, rate in CURVES.items()}}
"""What a kept calibration must have, as `paths.alike` reads it."""

UNCHANGED = ("name", "device", "memory", "peak_flops", "fixed_s_per_op", "fixed", "threads",
             "reference", "waited")
"""What a `Calibrated` machine has as its calibration has it."""

Figures = dict[tuple[str, str, float], tuple[float, float]]
"""By kind, format and size, the median of the samples and their spread."""


def memory_bytes(device: str) -> int:
    """Bytes of memory that the device has."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fingerprint(device: str) -> dict[str, str]:
    """What a calibration is valid for: processor, thread count, torch and set of probes."""
    name = (torch.cuda.get_device_name(0) if device == "cuda"
            else f"{cpu_name()}, {torch.get_num_threads()} threads")
    return {"device": name, "system": platform.system(), "torch": torch.__version__,
            "probes": PROBES}


def calibrate(device: str | None = None, budget_s: float = BUDGET_S) -> Calibrated:
    """Measure this machine in at most about `budget_s` seconds, keep the result in the user's
    cache, and return it. On a busy machine there are fewer samples, and wider spreads."""
    device = device or default_device()
    _path(device).parent.mkdir(parents=True, exist_ok=True)     # says now if it cannot be kept
    start = time.perf_counter()
    with one_thread():
        wanted = of_machine(device) + of_formats(FORMATS, device)
    record = {"name": fingerprint(device)["device"], "device": device,
              "threads": torch.get_num_threads() if device == "cpu" else 1,
              "memory": memory_bytes(device),
              "date": datetime.now(UTC).isoformat(timespec="seconds"),
              "versions": {"python": platform.python_version(), "torch": torch.__version__},
              "fingerprint": fingerprint(device), "budget_s": budget_s}
    waited = present.waiting()
    found = sampled(wanted, start + budget_s, "calibrating this machine")
    return _keep(record | {"waited": waited()}, found, start)


def calibrate_formats(record: dict, formats: Iterable[str], device: str) -> None:
    """The kept `record` with curves for more `formats`, some `FORMAT_BUDGET_S` seconds each, at
    the speed that the machine had when it was calibrated."""
    for format in formats:
        speeds = present.speeds_now(from_record(record))
        with one_thread():
            wanted = of_formats([format], device)       # its C++ is compiled, once for all
        start = time.perf_counter()
        found = sampled(wanted, start + FORMAT_BUDGET_S, f"calibrating {format}")
        found = {(kind, each, rows): (          # a launch has a price, all else a rate
                     figure * speeds.launches if kind == "launches" else figure / speeds.of(rows),
                     spread) for (kind, each, rows), (figure, spread) in found.items()}
        _keep(record, found, start)


@contextmanager
def one_thread() -> Iterator[None]:
    """Make arrays with one thread: on a busy machine, threads wait for one another at each copy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def of_machine(device: str) -> list[Probe]:
    """The probes of memory, attention, element-wise work, and the machine's present speed."""
    sizes = [size for size in reversed(WORKING_SETS) if size <= memory_bytes(device) / 8]
    found = probes.bandwidth_probes(sizes, device)
    found += [Probe("reference", name, 0, sample) for name, sample in
              zip(present.REFERENCES, present.reference_probes(device), strict=True)]
    for dtype in dict.fromkeys(computes_in(format, device) for format in FORMATS):
        found += [*attention_probes(dtype, device), *probes.elementwise_probes(dtype, device)]
    return found


def of_formats(formats: Iterable[str], device: str) -> list[Probe]:
    """The probes of products with weights in `formats`, and of the launches between them."""
    return [probe for format in formats
            for probe in (*probes.gemm_probes(format, device), probes.launch_probe(format, device))]


def sampled(wanted: Sequence[Probe], deadline: float, what: str) -> Figures:
    """Sample all probes in turn until the `deadline` of `time.perf_counter`, so that a neighbour's
    burst spoils one sample of each and not all of one. The first point of each curve comes first,
    then the last, which every curve has, then those between, for as many as there is time. What is
    left of it goes to the short samples, which scatter most."""
    curves: dict[tuple, list[Probe]] = {}
    for probe in wanted:
        curves.setdefault((probe.kind, probe.format), []).append(probe)
    ranked = [(rank, probe) for curve in curves.values()
              for rank, probe in enumerate([curve[0], *curve[:0:-1]])]
    ranked.sort(key=lambda each: each[0])
    samples: dict[tuple, list[float]] = {}
    start = shown = time.perf_counter()
    with tqdm(total=max(deadline - start, 0.1), desc=what, leave=False,
              file=sys.stdout if in_notebook() else sys.stderr,     # red in a notebook
              bar_format="{desc}: {bar:30} {n:.0f} of at most {total:.0f} s") as bar:
        while ranked and (time.perf_counter() < deadline or not samples):
            for rank, probe in [*ranked]:
                needed = rank < 2 and probe[:3] not in samples
                if time.perf_counter() >= deadline and not needed:
                    break
                if not rank:
                    probe.sample()          # after other kinds of work, cold: it does not count
                began = time.perf_counter()
                samples.setdefault(probe[:3], []).append(probe.sample())
                if time.perf_counter() - began > LONG_S and len(samples[probe[:3]]) > 1:
                    ranked.remove((rank, probe))
                bar.update(min(time.perf_counter() - shown, bar.total - bar.n))
                shown = time.perf_counter()
    return {where: (statistics.median(values), spread(values)) for where, values in samples.items()}


def spread(values: Sequence[float]) -> float:
    """Half the distance between the samples' quartiles, relative to their median; 1 at most."""
    if len(values) < 2:
        return ONE_SAMPLE_SPREAD
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return min((high - low) / 2 / statistics.median(values), 1.0)


def _keep(record: dict, found: Figures, start: float) -> Calibrated:
    """Write `found` into `record`, beside what it has, and that into the user's cache."""
    spreads: dict[str, dict[str, float]] = {}
    for (kind, format, size), (figure, spread) in sorted(found.items()):
        # A large square product is not always the fastest: a peak is the best rate of any product.
        if kind in ("peak", "gemm"):
            peaks = record.setdefault("peak_flops", {})
            peaks[format] = max(figure, peaks.get(format, 0.0))
        if kind == "bandwidth":
            point = {"bytes": size, "bytes_per_s": figure, "spread": spread}
            record.setdefault(kind, []).append(point)
        elif kind in ("peak", "launches", "reference"):
            spreads.setdefault(kind, {})[format] = spread
            if kind != "peak":
                record.setdefault("fixed" if kind == "launches" else kind, {})[format] = figure
        else:
            curve = "attention" if "attention" in kind else kind    # by several names
            record.setdefault(curve, []).append({"dtype": format, "m": size, "name": kind,
                                                 CURVES[curve]: figure, "spread": spread})
    record.setdefault("spreads", spreads)
    record.setdefault("seconds", round(time.perf_counter() - start, 1))
    record.setdefault("fixed_s_per_op", record["fixed"].get("fp32"))
    write_atomically(_path(record["device"]), json.dumps(record, indent=1))
    return from_record(record)


def _path(device: str) -> Path:
    return cache_dir() / f"calibration-{device}.json"


def from_record(record: dict) -> Calibrated:
    """The machine that a calibration's JSON describes."""
    rates: dict[str, dict[str, tuple]] = {}
    spreads: dict[str, dict[str, list[float]]] = {}
    for kind, rate in CURVES.items():
        for point in sorted(record.get(kind, []), key=lambda point: point["m"]):
            curves = rates.setdefault(point.get("name", kind), {})
            curves[point["dtype"]] = (*curves.get(point["dtype"], ()), (point["m"], point[rate]))
            spreads.setdefault(kind, {}).setdefault(point["dtype"], []).append(
                point.get("spread", 0.0))
    typical = {kind: {format: statistics.median(values) for format, values in curves.items()}
               for kind, curves in spreads.items()}
    return Calibrated(
        bandwidth=tuple(sorted((each["bytes"], each["bytes_per_s"])
                               for each in record["bandwidth"])),
        elementwise=rates.pop("elementwise", {}), rates=rates,
        spreads=typical | record.get("spreads", {}), source=f"measured {record['date']}",
        **{name: record[name] for name in UNCHANGED if name in record})


def kept_record(device: str | None = None) -> dict | None:
    """The kept calibration as JSON, or None if there is none for this hardware, this thread count
    and this torch; or it is damaged, and a warning says so."""
    device = device or default_device()
    record = read_kept(_path(device), {"fingerprint": dict})
    if record is None or record["fingerprint"] != fingerprint(device):
        return None
    return read_kept(_path(device), SHAPE | {"device": device})


def this_machine(device: str | None = None, formats: Sequence[str] = ()) -> Calibrated:
    """This machine at the speed that it has at this moment: the kept calibration, if there is none
    a new one, with curves for `formats` too. If the machine has drifted, it says so in one line and
    measures nothing anew. Raises ValueError for a format that the device has no kernel for."""
    device = device or default_device()
    for format in formats:
        computes_in(format, device)
    record = kept_record(device)
    if record is None:
        calibrate(device)
        record = kept_record(device)
    if missing := [format for format in formats if format not in record["peak_flops"]]:
        calibrate_formats(record, missing, device)
    machine = present.at_present(from_record(record))
    if line := present.drift(machine):
        print(line)
    return machine
