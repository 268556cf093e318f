"""How a number and a table look: SI units at the edge, columns that line up, in a terminal and in a
notebook."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from clawdemy_infer.lesson.ledger import LedgerRow

PREFIXED = ("s", "B", "FLOP")
"""Units that take a prefix; `B/s` and `FLOP/s` begin with one of them."""
PREFIXES = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E"}
MISSING = "–"


def number(value: float) -> str:
    """Three figures, or every digit before the point: 0.0512, 26.1, 1,024."""
    rounded = float(f"{value:.3g}")
    if rounded == 0 or abs(rounded) >= 100:
        return f"{value:,.0f}"
    return f"{rounded:.{2 - math.floor(math.log10(abs(rounded)))}f}"


def si(value: float | None, unit: str = "") -> str:
    """A quantity as one says it: `si(0.0261, "s")` is 26.1 ms, `si(131072, "B")` is 131 kB (of 10^3
    bytes), `si(None)` is a dash."""
    if value is None:
        return MISSING
    if unit.split("/")[0] not in PREFIXED or not math.isfinite(value) or value == 0:
        return f"{number(value) if math.isfinite(value) else value} {unit}".strip()
    rounded = float(f"{value:.3g}")                     # first: 999.9 µs is 1.00 ms
    highest = 0 if unit == "s" else max(PREFIXES)       # nobody says kiloseconds
    exponent = 3 * math.floor(math.log10(abs(rounded)) / 3)
    exponent = max(min(PREFIXES), min(exponent, highest))
    return f"{number(value / 10**exponent)} {PREFIXES[exponent]}{unit}"


@dataclass(frozen=True)
class Table:
    """Rows of text under a header. Shows itself: HTML in a notebook, aligned text in a terminal and
    on a page that cannot show HTML.

    `numeric` names the columns that are set flush right; `title` stands above.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[str] = ()
    title: str = ""

    def __rich__(self) -> RichTable:
        table = RichTable(title=self.title or None, title_justify="left", box=box.SIMPLE_HEAD,
                          show_edge=False, pad_edge=False)
        for name in self.header:
            numeric = name in self.numeric
            table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric,
                             overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def __repr__(self) -> str:
        # As a file and never as Jupyter's display: this text is for the places that show no HTML.
        console = Console(file=StringIO(), width=120, color_system=None, force_jupyter=False)
        console.print(self)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def _repr_html_(self) -> str:
        left = "text-align: left"
        right = "text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap"
        styles = [right if name in self.numeric else left for name in self.header]

        def line(tag: str, cells: Sequence[str]) -> str:
            return "".join(f'<{tag} style="{style}">{escape(cell)}</{tag}>'
                           for style, cell in zip(styles, cells, strict=True))

        title = f'<caption style="{left}">{escape(self.title)}</caption>\n' if self.title else ""
        head = f"<thead><tr>{line('th', self.header)}</tr></thead>"
        body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in self.rows)
        return f"<table>\n{title}{head}\n<tbody>\n{body}\n</tbody>\n</table>"


def ledger_table(rows: Iterable[LedgerRow], lessons: bool = False) -> Table:
    """Predicted beside measured. `lessons` adds the lesson's column; a column that no row fills is
    left out."""

    def ratio(value: float | None) -> str:
        return MISSING if value is None else f"{value:.2f}"

    rows = list(rows)
    columns = {"lesson": [row.lesson for row in rows]} if lessons else {}
    columns |= {
        "quantity": [row.quantity for row in rows],
        "guess": [si(row.guess, row.unit) for row in rows],
        "napkin": [si(row.napkin, row.unit) for row in rows],
        "roofline": [si(row.predicted, row.unit) for row in rows],
        "measured": [si(row.measured, row.unit) for row in rows],
        "speed": ["" if row.speed == 1 else ratio(row.speed) for row in rows],
        "÷ napkin": [ratio(row.ratio_napkin) for row in rows],
        "÷ roofline": [ratio(row.ratio) for row in rows],
        "why": [row.why for row in rows],
    }
    optional = ("guess", "roofline", "÷ napkin", "÷ roofline", "speed", "why")
    columns = {name: cells for name, cells in columns.items()
               if name not in optional or set(cells) - {MISSING, ""}}
    numeric = [name for name in columns if name not in ("lesson", "quantity", "why")]
    return Table(list(columns), list(zip(*columns.values(), strict=True)), numeric)
