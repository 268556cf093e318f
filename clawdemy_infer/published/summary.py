"""Many verdicts in a few lines: by category, source and aim, and beside simpler models."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from itertools import combinations

import numpy as np

from clawdemy_infer.lesson.tables import MISSING, Table, number
from clawdemy_infer.published.demand import demand
from clawdemy_infer.published.fitting import FIGURES, Figures
from clawdemy_infer.published.judging import Evidence, Verdict, judge, teaches
from clawdemy_infer.published.rows import RULES, PublishedRun

SIMPLER = ("naive", "one efficiency", "affine")


def _belongs(row: PublishedRun | Verdict, category: str, gen_len: int = 0) -> bool:
    return bool(re.fullmatch(category, row.category)) and (row.gen_len or 0) >= gen_len


AIMS = {aim: partial(_belongs, **rule) for aim, rule in RULES["aims"].items()}


def verdicts(runs: Iterable[PublishedRun], evidence: Evidence) -> list[Verdict]:
    """Every run judged by figures that its own source had no part in."""
    return [judge(run, evidence.figures(run)) for run in runs]


def errors(rows: Iterable[float]) -> dict:
    """Count, median and 90th percentile of |predicted / published - 1|; the share within 25 %."""
    found = np.array(list(rows))
    if not len(found):
        return {"n": 0, "median_error": None, "p90_error": None, "within_25": None}
    return {"n": len(found), "median_error": float(np.median(found)),
            "p90_error": float(np.quantile(found, 0.9)), "within_25": float((found <= 0.25).mean())}


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
    known = [(run, (asked.bound, asked.seconds(run.value)))
             for run, asked in zip(evidence.runs, evidence.demands, strict=True)]
    result = {}
    for aim, belongs in AIMS.items():
        mine = [(run, demand(run)) for run in runs if belongs(run) and teaches(run)]
        models = {}
        for group in {run.group for run, _ in mine}:
            others = [(run, point) for run, point in known if run.group != group]
            alike = [point for run, point in others if belongs(run)]
            models[group] = _simpler(alike or [point for _, point in others])
        result[aim] = {name: errors(
            abs(asked.value(models[run.group][name](asked.bound)) / run.value - 1)
            for run, asked in mine) for name in SIMPLER}
    return result


def _simpler(points: list[tuple[float, float]]) -> dict[str, Callable[[float], float]]:
    """Seconds for a bound by each model, from `points` (bound, seconds); the line is on a grid."""
    bound, seconds = np.array(points).T
    slopes = np.linspace(0.9, 2.5, 81)
    starts = np.concatenate([[0.0], np.geomspace(1e-6, 2e-2, 60)])
    lines = slopes[:, None, None] * bound + starts[:, None]
    misfit = np.abs(np.log(lines / seconds)).sum(axis=-1)
    slope, start = np.unravel_index(misfit.argmin(), misfit.shape)
    efficiency = np.median(bound / seconds)
    return {"naive": lambda bound: bound, "one efficiency": lambda bound: bound / efficiency,
            "affine": lambda bound: slopes[slope] * bound + starts[start]}


def contradictions(runs: Iterable[PublishedRun]) -> list[tuple[PublishedRun, PublishedRun, float]]:
    """Pairs of rows that no count of bytes and FLOPs can tell apart (chips, weights, lengths alike,
    bounds within 5 %), and whose times differ by 1.3 or more. The faster comes first."""
    alike = defaultdict(list)
    for run in runs:
        if run.category != "quant_gemv" and teaches(run):
            asked = demand(run)
            alike[asked.chip, run.tp, run.weight_bits_eff, run.metric, run.batch, run.prompt_len,
                  run.gen_len].append((asked.seconds(run.value), asked.bound, run))
    pairs = (pair for group in alike.values()
             for pair in combinations(sorted(group, key=lambda point: point[0]), 2))
    return [(run, other, slower / seconds)
            for (seconds, bound, run), (slower, slower_bound, other) in pairs
            if max(bound, slower_bound) <= 1.05 * min(bound, slower_bound)
            and slower >= 1.3 * seconds]


def aims_table(rows: list[Verdict], simpler: dict[str, dict[str, dict]]) -> Table:
    """Median / 90th percentile of the error by aim: simpler models first, then this one."""
    lines = []
    for aim, belongs in AIMS.items():
        mine = errors(row.error for row in rows if row.status == "ok" and belongs(row))
        if mine["n"]:
            models = [f"{found['median_error']:.1%} / {found['p90_error']:.1%}" if found["n"]
                      else MISSING for found in (*simpler[aim].values(), mine)]
            lines.append((aim, str(mine["n"]), *models, f"{mine['within_25']:.1%}"))
    header = ("median / p90 of the error", "rows", "naive bound", *SIMPLER[1:], "this model",
              "within 25 %")
    return Table(header, lines, header[1:])


def worst(rows: list[Verdict]) -> list[Verdict]:
    """All rows, or of more than 60 the impossible ones and the 15 that were missed by most."""
    ok = sorted((row for row in rows if row.status == "ok"),
                key=lambda row: max(row.ratio, 1 / row.ratio), reverse=True)
    impossible = [row for row in rows if row.status == "impossible"]
    return impossible + ok[:15] if len(rows) > 60 else rows


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

    farthest = {slow.id: (fast.hardware, *named(fast), *named(slow), f"{apart:.2f}")
                for fast, slow, apart in sorted(pairs, key=lambda pair: pair[2])}
    return Table(("hardware", "faster", "software", "published", "slower", "software ",
                  "published ", "times"), [*farthest.values()],
                 ("published", "published ", "times"),
                 "The same bytes and FLOPs on the same chip, and far apart")


def figures_table(figures: Figures) -> Table:
    lines = [(name.replace("_", " "), f"{figures[name] * 1e6:.1f} µs" if figure.unit == "s" else
              f"{number(figures[name])} {figure.unit}".strip(), figure.meaning)
             for name, figure in FIGURES.items()]
    return Table(("fitted figure", "value", "what it says"), lines, ("value",),
                 "Fitted on all rows that teach; a row is judged without its source")
