"""The verdicts as tables."""

from __future__ import annotations

from collections import defaultdict

from clawdemy_infer.published.fitting import FIGURES, Figures
from clawdemy_infer.published.judging import Judged
from clawdemy_infer.published.rows import Run
from clawdemy_infer.published.summary import AIMS, by, errors
from clawdemy_infer.tables import MISSING, Table, number

FEW = 60
"""So many rows are shown one by one; of more, the worst only."""


def percent(share: float | None) -> str:
    return MISSING if share is None else f"{share:.1%}"


def aims_table(rows: list[Judged], simpler: dict[str, dict[str, dict]]) -> Table:
    """Median / 90th percentile of the error by aim: simpler models first, then this one."""
    def both(found: dict) -> str:
        return f"{percent(found['median_error'])} / {percent(found['p90_error'])}" if found["n"] else MISSING

    lines = []
    for aim, belongs in AIMS.items():
        mine = errors(row.error for row in rows if row.status == "ok" and belongs(row))
        if mine["n"]:
            lines.append((aim, str(mine["n"]), *(both(simpler[aim][name]) for name in ("naive", "one efficiency", "affine")), both(mine),
                          percent(mine["within_25"])))
    header = ("median / p90 of the error", "rows", "naive bound", "one efficiency", "affine", "this model", "within 25 %")
    return Table(header, lines, header[1:])


def by_table(rows: list[Judged], name: str) -> Table:
    lines = [(value, str(found["n"]), percent(found["median_error"]), percent(found["p90_error"]), percent(found["within_25"]),
              str(found["impossible"] or ""), str(found["inexpressible"] or "")) for value, found in by(rows, name).items()]
    header = ("source" if name == "group" else name, "ok", "median", "p90", "within 25 %", "impossible", "inexpressible")
    return Table(header, lines, header[1:])


def rows_table(rows: list[Judged]) -> Table:
    """Row by row; of more than `FEW`, the impossible ones and those that were missed by most."""
    title = ""
    if len(rows) > FEW:
        ok = sorted((row for row in rows if row.status == "ok"), key=lambda row: max(row.ratio, 1 / row.ratio), reverse=True)
        rows, title = [row for row in rows if row.status == "impossible"] + ok[:15], "Impossible rows, and those that were missed by most"
    lines = [(row.id, row.category, row.model, row.hardware, row.software, _value(row.predicted, row), _value(row.published, row),
              MISSING if row.ratio is None else f"{row.ratio:.2f}", row.binds or "", {True: "yes", False: "no", None: ""}[row.fits],
              row.status if row.status != "ok" else "") for row in rows]
    header = ("id", "category", "model", "hardware", "software", "predicted", "published", "ratio", "binds", "fits", "status")
    return Table(header, lines, ("predicted", "published", "ratio"), title)


def reasons_table(rows: list[Judged]) -> Table:
    """Why rows have no prediction, and which."""
    why = defaultdict(list)
    for row in rows:
        if row.status != "ok":
            why[row.status, row.reason].append(row.id)
    lines = [(status, reason, str(len(ids)), ", ".join(ids[:6]) + (" …" if ids[6:] else "")) for (status, reason), ids in why.items()]
    return Table(("status", "why", "rows", "ids"), lines, ("rows",))


def contradictions_table(pairs: list[tuple[Run, Run, float]]) -> Table:
    """Rows that no arithmetic tells apart. A row of several pairs is shown with the one it is farthest from."""
    farthest = {slow.id: (fast, slow, apart) for fast, slow, apart in sorted(pairs, key=lambda pair: pair[2])}
    lines = [(fast.hardware, *_named(fast), *_named(slow), f"{apart:.2f}") for fast, slow, apart in farthest.values()]
    header = ("hardware", "faster", "software", "published", "slower", "software ", "published ", "times")
    return Table(header, lines, ("published", "published ", "times"), "The same bytes and FLOPs on the same chip, and far apart")


def _named(run: Run) -> tuple[str, str, str]:
    return f"{run.id} {run.model}", run.software, f"{number(run.value)} {run.unit}"


def figures_table(figures: Figures) -> Table:
    lines = [(name.replace("_", " "), _figure(figures[name], figure.unit), figure.meaning) for name, figure in FIGURES.items()]
    title = "Fitted on all rows that teach; a row is judged without its source"
    return Table(("fitted figure", "value", "what it says"), lines, ("value",), title)


def _figure(value: float, unit: str) -> str:
    return f"{value * 1e6:.1f} µs" if unit == "s" else f"{number(value)} {unit}".strip()


def _value(value: float | None, row: Judged) -> str:
    return MISSING if value is None else f"{number(value)} {row.unit}"
