"""A row of a table of published runs: what ran, on what, and what its source says it gave. No prediction in here."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

TEXT = ("id", "category", "model", "weight_dtype", "act_dtype", "kv_dtype", "hardware", "metric", "unit", "draft_model", "software",
        "notes", "source", "verification", "ms_per_token_or_step")
NUMBERS = ("params_B", "active_params_B", "layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab", "tied",
           "weight_bits_eff", "weight_GB", "n_devices", "tp", "peak_bw_GBps_per_device", "peak_TFLOPs_per_device", "mem_GB_per_device",
           "batch", "prompt_len", "gen_len", "decode_context", "value", "draft_params_B", "gamma", "alpha")


@dataclass(frozen=True)
class Run:
    """One row. A number is None where the source does not state it; the columns keep their names and units.

    `problem` says what cannot be read, for a row that is kept so that it can be reported.
    """

    id: str
    category: str
    model: str
    weight_dtype: str
    act_dtype: str
    kv_dtype: str
    hardware: str
    metric: str
    unit: str
    draft_model: str
    software: str
    notes: str
    source: str
    verification: str
    ms_per_token_or_step: str
    numbers: dict[str, float | None] = field(repr=False)
    problem: str = ""

    def __getattr__(self, name: str) -> float | None:
        if name in NUMBERS:
            return self.numbers[name]
        raise AttributeError(name)

    def whole(self, column: str, default: int | None = None) -> int:
        """The number of `column` as a count. Raises ValueError if it is not stated or not a whole number from 1 up."""
        value = self.numbers[column] if self.numbers[column] is not None else default
        if value is None:
            raise ValueError(f"{column} is not stated")
        if value < 1 or value != int(value):
            raise ValueError(f"{column}={value:g}: a whole number, 1 or more, is accepted")
        return int(value)

    @property
    def group(self) -> str:
        """Who measured it: rows of one group are never used to predict each other. See `source_group`."""
        return source_group(self.source)


ALIASES = {"ggerganov/llama.cpp": "ggml-org/llama.cpp", "pytorch-labs/gpt-fast": "meta-pytorch/gpt-fast",
           "arXiv:2210.17323": "IST-DASLab/gptq"}
"""Repositories that have moved, and a paper with the repository of its authors."""


def source_group(source: str) -> str:
    """One name for all that one source published.

    A repository counts as one source with its files, scripts, threads and pull requests; a paper with its tables; a table that somebody
    quotes, as the table. One exception, because nothing else profiles GEMMs: Vidur's profiles are one source per machine.
    """
    named = _named(source)
    return ALIASES.get(named, named)


def _named(source: str) -> str:
    if quoted := re.search(r"quoting (TensorRT-LLM)", source):
        return f"NVIDIA/{quoted[1]}"
    if profiled := re.search(r"vidur\S*[ /]data/profiling/\w+/([a-z]+\d+)", source):
        return f"microsoft/vidur {profiled[1]}"
    if paper := re.search(r"arXiv:\s*(\d{4}\.\d+)", source):
        return f"arXiv:{paper[1]}"
    if repository := re.match(r"(?:https?://github\.com/)?([\w.-]+/[\w.-]+)(?=[/ ]|$)", source):
        return repository[1]
    if site := re.match(r"https?://([^\s?#]+)", source):
        return site[1].rstrip("/")
    return " ".join(source.split())


def read(path: str | Path | None = None) -> list[Run]:
    """The rows of a CSV file with the columns of `data/published_runs.csv`, or of that file. None is left out.

    Raises ValueError naming the file, and the line, for one that cannot be read, has no such columns, or a line of another length.
    A cell that should be a number and is not makes the row a `problem`, and no more.
    """
    where = files("clawdemy_data") / "published_runs.csv" if path is None else Path(path)
    try:
        with where.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, restkey="too many")
            missing = [name for name in (*TEXT, *NUMBERS) if name not in (lines.fieldnames or ())]
            if missing:
                named = f"{', '.join(missing[:3])}{f' and {len(missing) - 3} more' if missing[3:] else ''}"
                raise ValueError(f"csv={str(path)!r}, line 1: no column {named}; those of data/published_runs.csv are accepted")
            runs = []
            for cells in lines:
                if "too many" in cells or None in cells.values():
                    raise ValueError(f"csv={str(path)!r}, line {lines.line_num}: it has not as many cells as the header")
                runs.append(_run(cells))
    except OSError as error:
        raise ValueError(f"csv={str(path)!r}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"csv={str(path)!r}: not a table of text with commas, in UTF-8 ({error})") from error
    return runs


def _run(cells: dict[str, str]) -> Run:
    numbers, problem = {}, ""
    for column in NUMBERS:
        text = cells[column].strip()
        try:
            numbers[column] = float(text) if text else None
        except ValueError:
            numbers[column] = math.nan
        if numbers[column] is not None and not math.isfinite(numbers[column]):
            numbers[column] = None
            problem = problem or f"{column}={text!r} is not a number"
        elif (numbers[column] or 0) < 0:
            problem = problem or f"{column}={text!r} is below zero"
    if not problem and not (numbers["value"] or 0) > 0:
        problem = "no published value above zero"
    return Run(**{column: cells[column].strip() for column in TEXT}, numbers=numbers, problem=problem)
