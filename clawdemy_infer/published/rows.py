"""A row of a table of published runs: what ran, on what, and what its source says it gave."""

import csv
import math
import re
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Self

TEXT = ("id category model weight_dtype act_dtype kv_dtype hardware metric unit draft_model "
        "software notes source").split()
NUMBERS = ("params_B active_params_B layers d_model n_heads n_kv_heads head_dim d_ff vocab tied "
           "weight_bits_eff weight_GB n_devices tp peak_bw_GBps_per_device peak_TFLOPs_per_device "
           "mem_GB_per_device batch prompt_len gen_len decode_context value draft_params_B gamma "
           "alpha").split()
LEAST, MOST = 1e-12, 1e12
"""What a number other than 0 may be, in the unit of its column."""


@dataclass(frozen=True)
class PublishedRun:
    """One row, with an attribute for each column of `TEXT` and `NUMBERS`, in the column's unit. A
    number is None where the source does not state it; `problem` says what cannot be read."""

    cells: dict[str, str | float | None] = field(repr=False)
    problem: str = ""

    def __getattr__(self, name: str) -> str | float | None:
        if name in TEXT or name in NUMBERS:
            return self.cells[name]
        raise AttributeError(name)

    def changed(self, **cells: str | float | None) -> Self:
        """The same row with other cells."""
        return replace(self, cells=self.cells | cells)

    def whole(self, column: str, default: int | None = None) -> int:
        """The number of `column`. ValueError if it is not stated or no whole number from 1 up."""
        value = self.cells[column] if self.cells[column] is not None else default
        if value is None:
            raise ValueError(f"{column} is not stated")
        if value < 1 or value != int(value):
            raise ValueError(f"{column}={value:g}: a whole number, 1 or more, is accepted")
        return int(value)

    @property
    def group(self) -> str:
        """Who measured it: rows of one group are never used to predict each other."""
        return source_group(self.source)


ALIASES = {"ggerganov/llama.cpp": "ggml-org/llama.cpp",
           "pytorch-labs/gpt-fast": "meta-pytorch/gpt-fast",
           "arXiv:2210.17323": "IST-DASLab/gptq"}
"""Repositories that have moved, and a paper with the repository of its authors."""
SOURCES = ((r"quoting (TensorRT-LLM)", "NVIDIA/{}"),
           (r"vidur\S*[ /]data/profiling/\w+/([a-z]+\d+)", "microsoft/vidur {}"),
           (r"arXiv:\s*(\d{4}\.\d+)", "arXiv:{}"),
           (r"^(?:https?://github\.com/)?([\w.-]+/[\w.-]+)(?=[/ ]|$)", "{}"),
           (r"^https?://([^\s?#]*[^\s?#/])", "{}"))
"""Patterns that name a source, of which the first counts, and the name."""


def source_group(source: str) -> str:
    """One name for all that one source published: a repository with its threads, a paper with its
    tables, a table for whoever quotes it. One exception, because nothing else profiles GEMMs:
    Vidur's profiles are one source per machine."""
    for pattern, name in SOURCES:
        if found := re.search(pattern, source):
            named = name.format(found[1])
            return ALIASES.get(named, named)
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
            missing = [name for name in (*TEXT, *NUMBERS) if name not in (lines.fieldnames or ())]
            if missing:
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
        text = read[column]
        try:
            read[column] = float(text) if text else None
        except ValueError:
            read[column] = math.nan
        if read[column] is not None and not math.isfinite(read[column]):
            read[column], problem = None, problem or f"{column}={text!r} is not a number"
        elif (read[column] or 0) < 0:
            problem = problem or f"{column}={text!r} is below zero"
        elif read[column] and not LEAST <= read[column] <= MOST:
            problem = problem or f"{column}={text!r} is not between {LEAST:g} and {MOST:g}"
    if not problem and not (read["value"] or 0) > 0:
        problem = "no published value above zero"
    return PublishedRun(read, problem)
