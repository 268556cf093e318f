"""How a command speaks: results on stdout, as tables or as one JSON object, and words on stderr."""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console

from clawdemy_infer.lesson.tables import MISSING, Table, number, si

UNITS = {"per_s": "", "s": "s", "seconds": "s", "bytes": "B", "flops": "FLOP"}
"""What the name of a field ends with, and its unit."""


def say(sentence: str) -> None:
    """A word to whoever waits, on stderr: stdout is for results. Who cannot hear it, need not."""
    with suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


def show(*blocks: Table | str, stderr: bool = False) -> None:
    """Tables and sentences, an empty line between."""
    console = Console(stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160                 # a file has no edge to wrap at
    for block in blocks:
        if block is not blocks[0]:
            console.print()
        console.print(block)


def answer(as_json: bool, result: dict, *blocks: Table | str) -> None:
    """What a command found: one JSON object on one line, or the same in `blocks` for a person."""
    if as_json:
        print(json.dumps(result, allow_nan=False), flush=True)  # ASCII: any terminal can show it
    else:
        show(*blocks)


def table_of(rows: Sequence[dict], keys: str | dict[str, str], title: str = "") -> Table:
    """Fields of the rows that JSON has, a column each, without those that no row fills:
    `table_of(rows, "phase batch napkin_s")`, or with a header for each key. The name of a field
    says its unit; numbers go to the right."""
    def cell(key: str, value: object) -> str:
        if value is None or isinstance(value, str):
            return value or MISSING
        if isinstance(value, bool):
            return "yes" if value else "NO"
        for end, unit in UNITS.items():
            if f"_{key}".endswith(f"_{end}"):
                return si(value, unit)
        return f"{value:,}" if isinstance(value, int) else number(value)

    if isinstance(keys, str):
        keys = {key: key.replace("_per_", "/").removesuffix("_s").replace("_", " ")
                for key in keys.split()}
    shown = [key for key in keys if any(row.get(key) is not None for row in rows)]
    left = [key for key in shown if any(isinstance(row.get(key), str | bool) for row in rows)]
    return Table([keys[key] for key in shown],
                 [[cell(key, row.get(key)) for key in shown] for row in rows],
                 [keys[key] for key in shown if key not in left], title)
