"""A table on disk, a line of JSON for each row: what was judged once need not be judged again.

The first line is the source: the command, the model, the text, the machine and the date. KL is kept for each sequence of the text,
so that a check need not read all of it again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

import torch

from clawdemy_infer.quantization.evaluate import Quality
from clawdemy_infer.quantization.report import Row


def ours() -> tuple[dict, list[Row]]:
    """The table that comes with the course: SmolLM2, all of it."""
    return read(files("clawdemy_data") / "quantization_table.jsonl")


def read(path: str | Path) -> tuple[dict, list[Row]]:
    """The source, and the rows. Raises ValueError with the line number for a line that is neither."""
    source, rows = {}, []
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), start=1):
        try:
            said = json.loads(line)
            if number == 1:
                source = said["source"]
            else:
                rows.append(_row(said))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"table={str(path)!r}: line {number} is not one of a kept table ({error!r})") from error
    return source, rows


def write(path: str | Path, source: dict, rows: Iterable[Row]) -> None:
    """All of the file at once, or what was there before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ({"source": source}, *map(as_dict, rows))), "utf-8")
    os.replace(part, path)


def as_dict(row: Row) -> dict:
    """What JSON can hold of a row; of KL, the mean of each sequence."""
    quality = row.quality
    said = asdict(row) | {"quality": {"kl": quality.kl, "kl_se": quality.kl_se, "perplexity": quality.perplexity, "top1": quality.top1,
                                      "kl_by_sequence": quality.kls.mean(1).tolist()}}
    return {key: value for key, value in said.items() if value not in ({}, "")}


def _row(said: dict) -> Row:
    quality = dict(said["quality"])
    quality = Quality(kls=torch.tensor(quality.pop("kl_by_sequence"))[:, None], **quality)
    times = {name: {int(batch): seconds for batch, seconds in said.get(name, {}).items()} for name in ("predicted", "measured")}
    return Row(**said | times | {"quality": quality})
