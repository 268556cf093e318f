"""Many verdicts in a few lines: by category, source and aim, and beside simpler models."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import combinations

import numpy as np

from clawdemy_infer.lesson.tables import MISSING, Table, number
from clawdemy_infer.published.demand import demand
from clawdemy_infer.published.fitting import FIGURES, Figures
from clawdemy_infer.published.judging import Evidence, Verdict, expressible, judge, teaches
from clawdemy_infer.published.rows import PublishedRun

AIMS: dict[str, Callable[[PublishedRun | Verdict], bool]] = {
    "decode at batch 1": lambda row: row.category in ("decode_bs1", "quant_decode_bs1"),
    "GEMM profiles": lambda row: row.category == "gemm_profile",
    "serving, long outputs": lambda row: AIMS["serving, all"](row) and (row.gen_len or 0) >= 1024,
    "serving, all": lambda row: row.category == "serving_throughput",
    "prefill": lambda row: row.category in ("prefill_ttft", "prefill_throughput"),
    "tensor parallel": lambda row: row.category.startswith("tensor_parallel"),
    "CPU decode": lambda row: row.category in ("cpu_decode_bs1", "cpu_kv_cache"),
}
SIMPLER = ("naive", "one efficiency", "affine")


def verdicts(runs: Iterable[PublishedRun], evidence: Evidence | None = None) -> list[Verdict]:
    """Every run judged by figures that its own source had no part in."""
    evidence = evidence or Evidence()
    return [judge(run, evidence.figures(run)) for run in runs]


def errors(rows: Iterable[float]) -> dict:
    """Count, median and 90th percentile of |predicted / published - 1|; the share within 25 %."""
    found = np.array(list(rows))
    measures = {"median_error": np.median, "p90_error": lambda errors: np.quantile(errors, 0.9),
                "within_25": lambda errors: np.mean(errors <= 0.25)}
    return {"n": len(found)} | {name: float(measure(found)) if len(found) else None
                                for name, measure in measures.items()}


def by(rows: list[Verdict], name: str) -> dict[str, dict]:
    """`errors` of the rows that are ok, and how many are not, by the field `name`."""
    groups = defaultdict(list)
    for row in sorted(rows, key=lambda row: getattr(row, name)):
        groups[getattr(row, name)].append(row)
    return {value: errors(row.error for row in mine if row.status == "ok")
            | {status: sum(row.status == status for row in mine)
               for status in ("impossible", "inexpressible")} for value, mine in groups.items()}


def simpler(runs: list[PublishedRun], evidence: Evidence) -> dict[str, dict[str, dict]]:
    """What three simpler models reach on the rows of each aim, their numbers taken from other
    sources' rows with the same aim, or where there are none of any other.

    naive            every byte once at the data sheet's bandwidth, every FLOP at its peak
    one efficiency   the naive time over the median share that other sources reach
    affine           a * naive + t0, the line of least absolute error in proportion
    """
    known = [(run, (asked.bound, seconds)) for run, asked, seconds
             in zip(evidence.runs, evidence.demands, evidence.seconds, strict=True)]
    result = {}
    for aim, belongs in AIMS.items():
        mine = [(run, demand(run)) for run in runs if belongs(run) and comparable(run)]
        lines = {}
        for group in {run.group for run, _ in mine}:
            others = [(run, point) for run, point in known if run.group != group]
            alike = [point for run, point in others if belongs(run)]
            lines[group] = _line(alike or [point for _, point in others])
        found = defaultdict(list)
        for run, asked in mine:
            efficiency, slope, start = lines[run.group]
            for name, seconds in zip(SIMPLER, (asked.bound, asked.bound / efficiency,
                                               slope * asked.bound + start), strict=True):
                found[name].append(abs(asked.value(seconds) / run.value - 1))
        result[aim] = {name: errors(found[name]) for name in SIMPLER}
    return result


def contradictions(runs: Iterable[PublishedRun]) -> list[tuple[PublishedRun, PublishedRun, float]]:
    """Pairs of rows that no count of bytes and FLOPs can tell apart (chips, weights, lengths alike,
    bounds within 5 %), and whose times differ by 1.3 or more. The faster comes first."""
    alike = defaultdict(list)
    for run in runs:
        if comparable(run) and run.category != "quant_gemv":
            asked = demand(run)
            key = (asked.chip, run.tp, run.weight_bits_eff, run.metric, run.batch, run.prompt_len,
                   run.gen_len)
            alike[key].append((asked.seconds(run.value), asked.bound, run))
    found = []
    for group in alike.values():
        group.sort(key=lambda point: point[0])
        found += [(run, other, slower / seconds)
                  for (seconds, bound, run), (slower, slower_bound, other) in combinations(group, 2)
                  if max(bound, slower_bound) <= 1.05 * min(bound, slower_bound)
                  and slower >= 1.3 * seconds]
    return found


def comparable(run: PublishedRun) -> bool:
    """Whether a row has a bound to start from."""
    return teaches(run) or AIMS["CPU decode"](run) and expressible(run)


def _line(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """The median share of the bound, and slope and start of the line through `points` (bound,
    seconds) with the least sum of |ln|, on a grid."""
    bound, seconds = np.array(points).T
    slopes = np.linspace(0.9, 2.5, 81)
    starts = np.concatenate([[0.0], np.geomspace(1e-6, 2e-2, 60)])
    lines = slopes[:, None, None] * bound + starts[:, None]
    misfit = np.abs(np.log(lines / seconds)).sum(axis=-1)
    best = np.unravel_index(misfit.argmin(), misfit.shape)
    return float(np.median(bound / seconds)), float(slopes[best[0]]), float(starts[best[1]])


def aims_table(rows: list[Verdict], simpler: dict[str, dict[str, dict]]) -> Table:
    """Median / 90th percentile of the error by aim: simpler models first, then this one."""
    lines = []
    for aim, belongs in AIMS.items():
        mine = errors(row.error for row in rows if row.status == "ok" and belongs(row))
        if mine["n"]:
            models = (*(simpler[aim][name] for name in SIMPLER), mine)
            lines.append((aim, str(mine["n"]),
                          *(f"{found['median_error']:.1%} / {found['p90_error']:.1%}"
                            if found["n"] else MISSING for found in models),
                          f"{mine['within_25']:.1%}"))
    header = ("median / p90 of the error", "rows", "naive bound", *SIMPLER[1:], "this model",
              "within 25 %")
    return Table(header, lines, header[1:])


def worst(rows: list[Verdict]) -> list[Verdict]:
    """All rows, or of more than 60 the impossible ones and the 15 that were missed by most."""
    if len(rows) <= 60:
        return rows
    ok = sorted((row for row in rows if row.status == "ok"),
                key=lambda row: max(row.ratio, 1 / row.ratio), reverse=True)
    return [row for row in rows if row.status == "impossible"] + ok[:15]


def reasons_table(rows: list[Verdict]) -> Table:
    why = defaultdict(list)
    for row in rows:
        if row.status != "ok":
            why[row.status, row.reason].append(row.id)
    lines = [(status, reason, str(len(ids)), ", ".join(ids[:6]) + (" …" if ids[6:] else ""))
             for (status, reason), ids in why.items()]
    return Table(("status", "why", "rows", "ids"), lines, ("rows",))


def contradictions_table(pairs: list[tuple[PublishedRun, PublishedRun, float]]) -> Table:
    """A row of several pairs is shown with the one it is farthest from."""
    def named(run: PublishedRun) -> tuple[str, str, str]:
        return f"{run.id} {run.model}", run.software, f"{number(run.value)} {run.unit}"

    farthest = {pair[1].id: pair for pair in sorted(pairs, key=lambda pair: pair[2])}
    lines = [(fast.hardware, *named(fast), *named(slow), f"{apart:.2f}")
             for fast, slow, apart in farthest.values()]
    header = ("hardware", "faster", "software", "published", "slower", "software ", "published ",
              "times")
    return Table(header, lines, ("published", "published ", "times"),
                 "The same bytes and FLOPs on the same chip, and far apart")


def figures_table(figures: Figures) -> Table:
    def shown(value: float, unit: str) -> str:
        return f"{value * 1e6:.1f} µs" if unit == "s" else f"{number(value)} {unit}".strip()

    lines = [(name.replace("_", " "), shown(figures[name], figure.unit), figure.meaning)
             for name, figure in FIGURES.items()]
    return Table(("fitted figure", "value", "what it says"), lines, ("value",),
                 "Fitted on all rows that teach; a row is judged without its source")
