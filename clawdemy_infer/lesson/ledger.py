"""The ledger: predicted beside measured, one line for each quantity, on disk for good.

The file is append-only JSON lines. A row is one `write`, so two kernels may append at once. If a
machine dies in the middle of that write, the last line is torn: `read` passes over it, and the next
`append` closes it with the word `#torn`, so that it stays recognisable when it is no longer last.
Any other line that is not a row is an error: somebody edited the file, and should know where.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from clawdemy_infer import __version__
from clawdemy_infer.paths import cache_dir

TORN = b" #torn"


def versions() -> dict[str, str]:
    """The versions that a measured number depends on."""
    return {"clawdemy-infer": __version__, "python": platform.python_version(),
            "torch": version("torch")}


def today() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class LedgerRow:
    """One quantity of one lesson, all in `unit`: plain seconds and bytes, never milliseconds.

    guess       what the learner said, if anything
    napkin      what two or three numbers say by hand
    predicted   the calibrated roofline at `speed`; None where a lesson has only a napkin
    measured    what the clock said; None until then
    speed       how fast the machine ran meanwhile, as a fraction of its calibration, by a probe
                that is not the run; of the calibrated machine was said `predicted * speed`

    Raises `ValueError` for a number that is not positive and finite.
    """

    lesson: str
    quantity: str
    unit: str
    napkin: float
    predicted: float | None = None
    measured: float | None = None
    guess: float | None = None
    speed: float = 1.0
    why: str = ""
    machine: str = ""
    versions: dict[str, str] = field(default_factory=versions)
    date: str = field(default_factory=today)

    def __post_init__(self) -> None:
        for name in ("napkin", "predicted", "measured", "guess", "speed"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r} for {self.quantity!r}: a positive, finite "
                                 "number is needed, or its ratio means nothing")

    @property
    def ratio(self) -> float | None:
        """Measured over the calibrated roofline: above 1, the machine was slower than predicted."""
        return self.measured / self.predicted if self.measured and self.predicted else None

    @property
    def ratio_napkin(self) -> float | None:
        """Measured over the napkin."""
        return self.measured / self.napkin if self.measured else None

    def to_json(self) -> dict:
        return asdict(self) | {"ratio": self.ratio, "ratio_napkin": self.ratio_napkin}


def ratio_error(ratio: float) -> float:
    """How wrong a ratio is, the same for twice too much as for half: max(r, 1/r) - 1, so 0 is
    perfect and 1 is a factor of two."""
    return max(ratio, 1 / ratio) - 1


# -- on disk --------------------------------------------------------------------------------------


def ledger_path() -> Path:
    """`$CLAWDEMY_LEDGER`, else `ledger.jsonl` in the user's cache."""
    return Path(os.environ.get("CLAWDEMY_LEDGER") or cache_dir() / "ledger.jsonl")


def append(row: LedgerRow, path: Path | None = None) -> None:
    """Add one measured row to the end of the ledger. Raises `ValueError` if it was never
    measured."""
    if row.measured is None:
        raise ValueError(f"{row.quantity!r} of lesson {row.lesson!r} has not been measured yet: "
                         "only measured rows go into the ledger")
    path = path or ledger_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(row), allow_nan=False).encode() + b"\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, _closing(path.read_bytes().rpartition(b"\n")[2]) + line)
    finally:
        os.close(file)


def read(path: Path | None = None) -> list[LedgerRow]:
    """All rows, oldest first; an absent file has none. Raises `ValueError` with the line number for
    a line that is not a row."""
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
            rows.append(LedgerRow(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"line {number} of {path} is not a row of the ledger: {error}"
                             ) from error
    return rows


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _closing(tail: bytes) -> bytes:
    """What must follow an unfinished last line before a new row: nothing, a newline if only that
    was lost, or the torn mark."""
    if not tail:
        return b""
    return b"\n" if _is_json(tail) else TORN + b"\n"


# -- how good were we? ----------------------------------------------------------------------------


def latest(rows: Iterable[LedgerRow]) -> list[LedgerRow]:
    """The last row of each quantity of each lesson: a cell that ran twice counts once."""
    return list({(row.lesson, row.quantity): row for row in rows}.values())


@dataclass(frozen=True)
class Scoreboard:
    """The ledger of one run, judged. An error of 0.25 means 1.25 times too much or too little; None
    means nothing to judge."""

    rows: tuple[LedgerRow, ...]
    napkin_error: float | None
    predicted_error: float | None
    worst: LedgerRow | None

    def to_json(self) -> dict:
        return {"rows": [row.to_json() for row in self.rows],
                "median_ratio_error": self.predicted_error,
                "median_ratio_error_napkin": self.napkin_error,
                "worst": self.worst.to_json() if self.worst else None}


def scoreboard(rows: Iterable[LedgerRow]) -> Scoreboard:
    """Median ratio error of the napkin and of the calibrated roofline, and the row that the
    calibrated roofline got most wrong."""
    rows = tuple(latest(rows))
    napkin = [ratio_error(row.ratio_napkin) for row in rows if row.ratio_napkin]
    predicted = [ratio_error(row.ratio) for row in rows if row.ratio]
    worst = max((row for row in rows if row.ratio), key=lambda row: ratio_error(row.ratio),
                default=None)
    return Scoreboard(rows, statistics.median(napkin) if napkin else None,
                      statistics.median(predicted) if predicted else None, worst)
