"""How numbers and tables look in a terminal and in a notebook: SI units, columns that line up."""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from clawdemy_infer.lesson.ledger import LedgerRow
from clawdemy_infer.machine.calibrated import Calibrated, Speeds

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
    """`si(0.0261, "s")` is 26.1 ms, `si(131072, "B")` 131 kB (of 10^3 bytes), `si(None)` a dash."""
    if value is None:
        return MISSING
    if unit.split("/")[0] not in PREFIXED or not math.isfinite(value) or value == 0:
        return f"{number(value) if math.isfinite(value) else value} {unit}".strip()
    rounded = float(f"{value:.3g}")                     # first: 999.9 µs is 1.00 ms
    highest = 0 if unit == "s" else max(PREFIXES)       # nobody says kiloseconds
    exponent = 3 * math.floor(math.log10(abs(rounded)) / 3)
    exponent = max(min(PREFIXES), min(exponent, highest))
    return f"{number(value / 10**exponent)} {PREFIXES[exponent]}{unit}"


def interval(low: float, high: float, unit: str = "") -> str:
    """`interval(0.0121, 0.015, "s")` is 12.1 – 15.0 ms."""
    first, last = si(low, unit), si(high, unit)
    value, _, said = first.partition(" ")
    return f"{value if said == last.partition(' ')[2] else first} – {last}"


ALIASES = {"byte": ("B", 1), "bytes": ("B", 1), "bit": ("B", 1 / 8), "bits": ("B", 1 / 8),
           "bit/s": ("B/s", 1 / 8), "bytes/s": ("B/s", 1), "min": ("s", 60), "minutes": ("s", 60),
           "seconds": ("s", 1), "h": ("s", 3600), "hours": ("s", 3600), "x": ("×", 1),
           "times": ("×", 1)}
"""Other ways to say a unit, and how much of ours it is."""


def from_si(text: str) -> tuple[float, str]:
    """What `text` says in plain units: "20 ms" is (0.02, "s"), "3 GiB" (3 * 2**30, "B"), "64"
    (64.0, ""), "2 min" (120.0, "s"), "$3" (3.0, "$"). `ValueError` for what is no quantity."""
    said = re.sub(r",(?=\d{3}\b)", "", text.strip())
    found = re.fullmatch(r"(\$?)(\d*\.?\d+(?:e[+-]?\d+)?) *"
                         r"(?:(|[KMGT]i|[numµμkKMGTPE])(s|B|FLOP|bits?(?=/|$))(S|/s)?|([^\d.,]*))",
                         said)
    if not found:
        raise ValueError(f"{text!r} is no number, nor one with a unit like 20 ms or 50 GB/s")
    dollar, value, prefix, base, per, other = found.groups()
    if base is None:
        unit, factor = ALIASES.get(other, (dollar or other, 1))
        return float(value) * factor, unit
    exponents = {said: exponent for exponent, said in PREFIXES.items()} | {"u": -6, "μ": -6, "K": 3}
    scale = (1024.0 ** (1 + "KMGT".index(prefix[0])) if prefix.endswith("i") else
             10.0 ** exponents[prefix])
    unit, factor = ALIASES.get(base, (base, 1))
    return float(value) * scale * factor, unit + "/s" * bool(per)


@dataclass(frozen=True)
class Table:
    """Rows of text under a header, in HTML or as aligned text. Columns named in `numeric` are flush
    right; `title` stands above."""

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


def card(machine: Calibrated) -> Table:
    """What the calibration found of this machine, and what the machine does at this moment."""
    header = ["", "reads memory at", "computes in fp32", "computes in bf16",
              "kernel-launch overhead"]
    rows = [[when, si(at.bandwidth_at(), "B/s"), si(at.peak("fp32"), "FLOP/s"),
             si(at.peak("bf16"), "FLOP/s"), si(at.fixed_s_per_op, "s")] for when, at in (
        (machine.source[:25].replace("T", " "), machine.at(Speeds())), ("at this moment", machine))]
    return Table(header, rows, header[1:], f"This machine: {machine.name}")


def ledger_table(rows: Iterable[LedgerRow], lessons: bool = False,
                 widened: Collection[str] = ()) -> Table:
    """Predicted beside measured. `lessons` adds the lesson's column; a column that no row fills is
    left out. `widened`: quantities that are inside since their interval was widened."""
    rows = list(rows)
    columns = {"lesson": [row.lesson for row in rows]} if lessons else {}
    columns |= {
        "quantity": [row.quantity for row in rows],
        "guess": [_guess(row) for row in rows],
        "napkin": [si(row.napkin, row.unit) for row in rows],
        "predicted": [predicted(row) for row in rows],
        "measured": [si(row.measured, row.unit) for row in rows],
        "inside?": ["yes, widened" if row.quantity in widened else row.inside or MISSING
                    for row in rows],
        "explained": [percent(row.explained) for row in rows],
    }
    optional = ("guess", "predicted", "inside?", "explained")
    columns = {name: cells for name, cells in columns.items()
               if name not in optional or set(cells) - {MISSING, ""}}
    numeric = [name for name in columns if name not in ("lesson", "quantity", "inside?")]
    return Table(list(columns), list(zip(*columns.values(), strict=True)), numeric)


def reveal_table(rows: Iterable[LedgerRow]) -> Table:
    """What was said so far of quantities that are not measured yet."""
    header = ("quantity", "guess", "napkin", "predicted")
    return Table(header, [
        (row.quantity, _guess(row) if row.guess else "open", si(row.napkin, row.unit),
         predicted(row)) for row in rows], numeric=header[1:])


def _guess(row: LedgerRow) -> str:
    return si(row.guess, row.unit) + " (late)" * row.late


def predicted(row: LedgerRow) -> str:
    """Its interval, or the number alone where there is none."""
    return interval(row.low, row.high, row.unit) if row.low else si(row.predicted, row.unit)


def percent(share: float | None) -> str:
    return MISSING if share is None else f"{share:.0%}"


def scoreboard_table(board: dict) -> Table:
    """How good the predictions, the guesses and the causes were, from `ledger.scoreboard`."""
    judged = sum(row["inside"] is not None for row in board["rows"])
    rows = [("measurements inside their interval", f"{percent(board['coverage'])} of {judged}"),
            ("half-width of an interval, median", f"± {percent(board['median_width'])}"),
            ("error of a prediction, median", percent(board["median_ratio_error"])),
            ("error of the napkin, median", percent(board["median_ratio_error_napkin"])),
            ("error of your guesses, median", percent(board["median_ratio_error_guess"])),
            ("causes that you named rightly", "{causes_right} of {causes_named}".format(**board)),
            ("share of a difference explained, median", percent(board["median_explained"]))]
    if row := board["worst"]:
        rows.append(("worst prediction", "{lesson}, {quantity}: it took {ratio:.2f} times as much"
                                         .format(**row)))
    return Table(("", "so far"), rows)
