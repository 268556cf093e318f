"""The ledger: predicted beside measured, one line for each quantity, on disk for good.

The file is append-only JSON lines. A row is one `write`, so two kernels may append at once. If a
machine dies in the middle of that write, the last line is torn: `read` passes over it, and the next
`append` closes it with the word `#torn`, so that it stays recognisable when it is no longer last.
Of any other line that is not a row a warning says where it is: somebody edited the file.
"""

import errno
import json
import math
import os
import platform
import statistics
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from numbers import Real
from pathlib import Path

from clawdemy_infer import __version__
from clawdemy_infer.paths import alike, cache_dir

TORN = b" #torn"
OLD = {"speed", "why"}          # fields of earlier ledgers, which are passed over
PART = {"name": object, **dict.fromkeys(("napkin_s", "predicted_s", "measured_s"),
                                        (int, float, type(None)))}
POSITIVE, NUMBER = 5e-324, "a positive number below 1e30 is needed, or its ratio means nothing"
FIELDS = {
    "napkin": (POSITIVE, NUMBER),
    **dict.fromkeys(("predicted", "low", "high", "measured", "guess"),
                    ((POSITIVE, type(None)), NUMBER)),
    **dict.fromkeys(("lesson", "quantity", "unit", "cause", "sentence", "machine", "date"),
                    (str, "it is a text")),
    **dict.fromkeys(("spread", "explained", "cause_right"), ((Real, type(None)), "it is a number")),
    "late": (bool, "it is true or false"),
    "parts": ([PART], f"a part has {', '.join(sorted(PART))}")}
"""What a row may have, as `paths.alike` reads it, and how an error says so."""


def versions() -> dict[str, str]:
    """The versions that a measured number depends on."""
    return {"clawdemy-infer": __version__, "python": platform.python_version(),
            "torch": version("torch")}


def today() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class LedgerRow:
    """One quantity of one lesson, all in `unit`: plain seconds and bytes, never milliseconds.

    napkin       what two or three numbers say by hand
    predicted    the calibrated prediction, `low` to `high` its interval; None where there is none
    measured     what the clock said, None until then; `spread` is that of its repeats, relative,
                 None for what was derived from other measurements
    guess        what the learner said, `late` if the prediction had been shown by then
    cause        what the learner took for the largest difference; `cause_right` once explained
    parts        of each part of a step: name, napkin_s, predicted_s, measured_s
    explained    share of measured - napkin that the parts account for; `sentence` is computed too

    Raises `ValueError` for a number not in 0 to 1e30, half an interval, or what is no text.
    """

    lesson: str
    quantity: str
    unit: str
    napkin: float
    predicted: float | None = None
    low: float | None = None
    high: float | None = None
    measured: float | None = None
    spread: float | None = None
    guess: float | None = None
    late: bool = False
    cause: str = ""
    cause_right: bool | None = None
    parts: tuple[dict, ...] = ()
    explained: float | None = None
    sentence: str = ""
    machine: str = ""
    versions: dict[str, str] = field(default_factory=versions)
    date: str = field(default_factory=today)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))        # JSON knows lists alone
        for name, (shape, accepted) in FIELDS.items():
            if not alike(value := getattr(self, name), shape):
                raise ValueError(f"{name}={value!r} for {self.quantity!r}: {accepted}")
        ends = (self.low, self.predicted, self.high)
        if ends != (None, self.predicted, None) and (None in ends or list(ends) != sorted(ends)):
            raise ValueError(f"low={self.low}, high={self.high} for {self.quantity!r}: an interval "
                             f"has both, around predicted={self.predicted}")

    @property
    def ratio(self) -> float | None:
        """Measured over the centre of the prediction: above 1, slower than predicted."""
        return self.measured / self.predicted if self.measured and self.predicted else None

    @property
    def ratio_napkin(self) -> float | None:
        """Measured over the napkin."""
        return self.measured / self.napkin if self.measured else None

    @property
    def ratio_guess(self) -> float | None:
        """The guess over measured."""
        return self.guess / self.measured if self.measured and self.guess else None

    @property
    def inside(self) -> str | None:
        """Where the measurement lies: "yes" in the interval, else "below" or "above" it."""
        if self.measured is None or self.low is None:
            return None
        where = "below" if self.measured < self.low else "above"
        return "yes" if self.low <= self.measured <= self.high else where

    @property
    def width(self) -> float | None:
        """The `half_width` of the interval."""
        return half_width(self.low, self.high) if self.low else None

    def to_json(self) -> dict:
        return asdict(self) | {"ratio": self.ratio, "ratio_napkin": self.ratio_napkin,
                               "inside": self.inside}


def half_width(low: float, high: float) -> float:
    """Relative half-width of an interval: 0.1 is from s / 1.1 to s * 1.1."""
    return math.sqrt(high / low) - 1


def ratio_error(ratio: float) -> float:
    """How wrong a ratio is: max(r, 1/r) - 1, so 0 is perfect and 1 is twice too much or half."""
    return max(ratio, 1 / ratio) - 1


def ledger_path() -> Path:
    """`$CLAWDEMY_LEDGER`, else `ledger.jsonl` in the user's cache."""
    return Path(os.environ.get("CLAWDEMY_LEDGER") or cache_dir() / "ledger.jsonl")


def append(row: LedgerRow, path: Path | None = None) -> None:
    """Add one measured row to the end of the ledger. Raises `ValueError` if it was never
    measured, `OSError` if the disk did not take all of it: the next row closes what it took."""
    if row.measured is None:
        raise ValueError(f"{row.quantity!r} of lesson {row.lesson!r} has not been measured yet: "
                         "only measured rows go into the ledger")
    path = path or ledger_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(row), allow_nan=False).encode() + b"\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if tail := path.read_bytes().rpartition(b"\n")[2]:     # unfinished: a row, or torn
            line = (b"" if _is_json(tail) else TORN) + b"\n" + line
        if os.write(file, line) < len(line):
            raise OSError(errno.ENOSPC, "only a part of the row was written: is the disk full?",
                          str(path))
    finally:
        os.close(file)


def read(path: Path | None = None) -> list[LedgerRow]:
    """All rows, oldest first; an absent file has none. A warning names a line that is no row."""
    path = path or ledger_path()
    if not path.exists():
        return []
    *lines, tail = path.read_bytes().split(b"\n")
    if _is_json(tail):
        lines.append(tail)
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.endswith(TORN):
            continue
        try:
            rows.append(LedgerRow(**{name: value for name, value in json.loads(line).items()
                                     if name not in OLD}))
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            warnings.warn(f"line {number} of {path} is not a row of the ledger and is passed over: "
                          f"{error}", stacklevel=2)
    return rows


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def latest(rows: Iterable[LedgerRow]) -> list[LedgerRow]:
    """The last row of each quantity of each lesson: a cell that ran twice counts once."""
    return list({(row.lesson, row.quantity): row for row in rows}.values())


def scoreboard(rows: Iterable[LedgerRow]) -> dict:
    """The ledger of one run, judged by the latest row of each quantity, as JSON has it.

    `coverage` is the share of measurements inside their interval; widths, errors and the share
    explained are medians; causes are counted, those named rightly and all. An error of 0.25 means
    1.25 times too much or too little. Only guesses made in time count. None: nothing to judge.
    """
    rows = latest(rows)
    inside = [row.inside == "yes" for row in rows if row.inside]
    named = [row.cause_right for row in rows if row.cause_right is not None]
    worst = max((row for row in rows if row.ratio), key=lambda row: ratio_error(row.ratio),
                default=None)

    def median(values: Iterable[float | None]) -> float | None:
        values = [value for value in values if value is not None]
        return statistics.median(values) if values else None

    def error(ratios: Iterable[float | None]) -> float | None:
        return median(ratio and ratio_error(ratio) for ratio in ratios)

    return {
        "rows": [row.to_json() for row in rows],
        "coverage": sum(inside) / len(inside) if inside else None,
        "median_width": median(row.width for row in rows if row.inside),
        "median_ratio_error": error(row.ratio for row in rows),
        "median_ratio_error_napkin": error(row.ratio_napkin for row in rows),
        "median_ratio_error_guess": error(row.ratio_guess for row in rows if not row.late),
        "median_explained": median(row.explained for row in rows),
        "causes_right": sum(named), "causes_named": len(named),
        "worst": worst.to_json() if worst else None}
