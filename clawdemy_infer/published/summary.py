"""Many verdicts in a few lines: by category, by source, by aim, and beside simpler models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import combinations

import numpy as np

from clawdemy_infer.published.judging import Evidence, Judged, judge, teaches
from clawdemy_infer.published.plans import plan
from clawdemy_infer.published.rows import Run

LONG = 1024
"""Generated tokens from which on a served output is called long: decode then outweighs prefill."""

AIMS: dict[str, Callable[[Run | Judged], bool]] = {
    "decode at batch 1": lambda row: row.category in ("decode_bs1", "quant_decode_bs1"),
    "GEMM profiles": lambda row: row.category == "gemm_profile",
    "serving, long outputs": lambda row: row.category == "serving_throughput" and (_generated(row) or 0) >= LONG,
    "serving, all": lambda row: row.category == "serving_throughput",
    "prefill": lambda row: row.category in ("prefill_ttft", "prefill_throughput"),
    "tensor parallel": lambda row: row.category.startswith("tensor_parallel"),
    "CPU decode": lambda row: row.category in ("cpu_decode_bs1", "cpu_kv_cache"),
}


def _generated(row: Run | Judged) -> float | None:
    return row.gen_len if isinstance(row, Run) else row.generated


def verdicts(runs: Iterable[Run], evidence: Evidence | None = None) -> list[Judged]:
    """Every run judged with figures that no row of its own source had a part in."""
    evidence = evidence or Evidence()
    return [judge(run, evidence.figures(run)) for run in runs]


def errors(rows: Iterable[float]) -> dict:
    """Count, median and 90th percentile of |predicted / published - 1|, and the share within 25 %."""
    found = np.array(list(rows))
    if not len(found):
        return {"n": 0, "median_error": None, "p90_error": None, "within_25": None}
    return {"n": len(found), "median_error": float(np.median(found)), "p90_error": float(np.quantile(found, 0.9)),
            "within_25": float(np.mean(found <= 0.25))}


def by(rows: list[Judged], name: str) -> dict[str, dict]:
    """`errors` of the rows that are ok, and how many are not, for each value of the field `name`."""
    result = {}
    for value in sorted({getattr(row, name) for row in rows}):
        mine = [row for row in rows if getattr(row, name) == value]
        result[value] = errors(row.error for row in mine if row.status == "ok") | {
            status: sum(row.status == status for row in mine) for status in ("impossible", "inexpressible")}
    return result


def simpler(runs: list[Run], evidence: Evidence) -> dict[str, dict[str, dict]]:
    """What three simpler models reach on the rows of each aim, their numbers taken from the rows of other sources with the same aim.

    naive            every byte once at the data sheet's bandwidth, every FLOP at its peak
    one efficiency   the naive time over the median share that other sources reach
    affine           a * naive + t0, the line of least absolute error in proportion
    """
    result = {}
    known = list(zip(evidence.runs, [made.bound for made in evidence.plans], evidence.seconds, strict=True))
    for aim, belongs in AIMS.items():
        mine = [(run, made) for run in runs if belongs(run) and comparable(run) for made in [plan(run)]]
        lines = {}
        for group in {run.group for run, _ in mine}:
            others = [(belongs(run), bound, seconds) for run, bound, seconds in known if run.group != group]
            alike = [point for point in others if point[0]]
            lines[group] = _line([point[1:] for point in alike or others])      # no other source: whatever others measured
        found: dict[str, list[float]] = {"naive": [], "one efficiency": [], "affine": []}
        for run, made in mine:
            efficiency, (slope, start) = lines[run.group]
            guesses = {"naive": made.bound, "one efficiency": made.bound / efficiency, "affine": slope * made.bound + start}
            for name, seconds in guesses.items():
                found[name].append(abs(made.value(seconds) / run.value - 1))
        result[aim] = {name: errors(values) for name, values in found.items()}
    return result


def contradictions(runs: Iterable[Run], apart: float = 1.3) -> list[tuple[Run, Run, float]]:
    """Pairs of rows that no count of bytes and FLOPs can tell apart, and whose times still differ by the factor `apart` or more.

    The same kind of chip, as many of them, weights as wide, the same measurement and lengths, bounds within 5 %. The faster comes first.
    """
    alike = defaultdict(list)
    for run in runs:
        if comparable(run) and run.category != "quant_gemv":
            made = plan(run)
            key = (made.chip, run.tp, run.weight_bits_eff, run.metric, run.batch, run.prompt_len, run.gen_len)
            alike[key].append((made.bound, made.seconds(run.value), run))
    found = []
    for group in alike.values():
        for (bound, seconds, run), (other_bound, other_seconds, other) in combinations(sorted(group, key=lambda point: point[1]), 2):
            if max(bound, other_bound) <= 1.05 * min(bound, other_bound) and other_seconds >= apart * seconds:
                found.append((run, other, other_seconds / seconds))
    return found


def comparable(run: Run) -> bool:
    """Whether a row has a bound to start from."""
    return teaches(run) or AIMS["CPU decode"](run)


def _line(points: list[tuple[float, float]]) -> tuple[float, tuple[float, float]]:
    """The median share of the bound, and slope and start of the line through `points` with the least sum of |ln|, on a grid."""
    bound, seconds = np.array(points).T
    efficiency = float(np.median(bound / seconds))
    slopes = np.linspace(0.9, 2.5, 81)
    starts = np.concatenate([[0.0], np.geomspace(1e-6, 2e-2, 60)])
    misfit = np.abs(np.log((slopes[:, None, None] * bound + starts[:, None]) / seconds)).sum(axis=-1)
    best = np.unravel_index(misfit.argmin(), misfit.shape)
    return efficiency, (float(slopes[best[0]]), float(starts[best[1]]))
