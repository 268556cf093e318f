"""The figures in `data/`, as shapes and machines. Every one of them keeps its source."""

from __future__ import annotations

import difflib
import tomllib
from functools import cache
from importlib.resources import files

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.roofline import Machine


@cache
def _read(filename: str) -> dict[str, dict]:
    return tomllib.loads(files("clawdemy_data").joinpath(filename).read_text(encoding="utf-8"))


def _find(kind: str, name: str, filename: str) -> dict:
    entries = _read(filename)
    if name not in entries:
        near = difflib.get_close_matches(name.lower(), entries, n=3, cutoff=0.4) or sorted(entries)
        raise ValueError(f"{kind}={name!r} is not in {filename}; near matches: {', '.join(near)}")
    return entries[name]


def model_names() -> list[str]:
    return list(_read("models.toml"))


def machine_names() -> list[str]:
    return list(_read("machines.toml"))


def model(name: str) -> ModelShape:
    """The shape of the model called `name`. Raises ValueError with near matches for an unknown one."""
    return ModelShape(**_find("model", name, "models.toml"))


def machine(name: str) -> Machine:
    """The data sheet of the machine called `name`. Raises ValueError with near matches for an unknown one."""
    entry = _find("machine", name, "machines.toml")
    sources = "; ".join(f"{figure}: {source}" for figure, source in entry["sources"].items())
    # A data sheet has one bandwidth, whatever the working set.
    return Machine(entry["name"], ((1.0, entry["bandwidth"]),), entry["peak_flops"], entry["memory"], source=sources)
