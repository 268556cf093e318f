"""A row of a table of published runs: what ran, on what, and what its source says it gave."""

import csv
import math
import re
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Self

from clawdemy_infer.arithmetic import BYTES
from clawdemy_infer.from_config import catalog

RULES = catalog.read("published.toml")
TEXT, NUMBERS = (RULES["columns"][kind].split() for kind in ("text", "numbers"))
LEAST, MOST = 1e-12, 1e12       # what a number other than 0 may be, in the unit of its column


class PublishedRun(SimpleNamespace):
    """One row, with an attribute for each column of `TEXT` and `NUMBERS`, in the column's unit. A
    number is None where the source does not state it; `problem` says what cannot be read."""

    def changed(self, **cells: str | float | None) -> Self:
        """The same row with other cells."""
        return type(self)(**vars(self) | cells)

    def whole(self, column: str, default: int | None = None) -> int:
        """The number of `column`. ValueError if it is not stated or no whole number from 1 up."""
        stated = getattr(self, column)
        if (value := default if stated is None else stated) is None:
            raise ValueError(f"{column} is not stated")
        if value < 1 or value != int(value):
            raise ValueError(f"{column}={value:g}: a whole number, 1 or more, is accepted")
        return int(value)

    @property
    def group(self) -> str:
        """Who measured it: rows of one group are never used to predict each other."""
        return source_group(self.source)

    @property
    def kv_format(self) -> str:
        """Of the cache; 16 bits where the source states none, or one that we do not know."""
        return self.kv_dtype if self.kv_dtype in BYTES else "fp16"


def source_group(source: str) -> str:
    """One name for all that one source published: a repository with its threads, a paper with its
    tables, a table for whoever quotes it. `data/published.toml` has the patterns."""
    for rule in RULES["source"]:
        if found := re.search(rule["match"], source):
            return found.expand(rule["name"])
    return " ".join(source.split())


def read(path: str | Path | None = None) -> list[PublishedRun]:
    """All rows of a CSV file with the columns of `data/published_runs.csv`, or of that file. Raises
    ValueError naming the file for one that cannot be read or has no such columns. A line of another
    length, and a cell that is no number, makes its row a `problem`."""
    where = files("clawdemy_data") / "published_runs.csv" if path is None else Path(path)
    named = f"csv={str(path)!r}"
    try:
        with where.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, restkey="too many")
            there = lines.fieldnames or ()
            if missing := [name for name in (*TEXT, *NUMBERS) if name not in there]:
                more = f" and {len(missing) - 3} more" if missing[3:] else ""
                raise ValueError(f"{named}, line 1: no column {', '.join(missing[:3])}{more}; "
                                 "those of data/published_runs.csv are accepted")
            return [_run(cells, "" if "too many" not in cells and None not in cells.values() else
                         f"line {lines.line_num}: it has not as many cells as the header")
                    for cells in lines]
    except OSError as error:
        raise ValueError(f"{named}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{named}: not a table of text with commas, in UTF-8 ({error})") from error


def _run(cells: dict[str, str | None], problem: str) -> PublishedRun:
    read = {column: (cells[column] or "").strip() for column in (*TEXT, *NUMBERS)}
    for column in NUMBERS:
        text, wrong = read[column], ""
        try:
            value = float(text) if text else None
        except ValueError:
            value = math.nan
        if value is not None and not math.isfinite(value):
            value, wrong = None, "not a number"
        elif value and value < 0:
            wrong = "below zero"
        elif value and not LEAST <= value <= MOST:
            wrong = f"not between {LEAST:g} and {MOST:g}"
        read[column] = value
        problem = problem or wrong and f"{column}={text!r} is {wrong}"
    if not problem and not read["value"]:
        problem = "no published value above zero"
    return PublishedRun(problem=problem, **read)
