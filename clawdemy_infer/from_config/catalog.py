"""The figures in `data/`, as shapes and machines. Every one of them keeps its source."""

import difflib
import tomllib
from functools import cache
from importlib.resources import files

from clawdemy_infer.arithmetic import MLA, SSM, ModelShape, MoE
from clawdemy_infer.envelope.roofline import Link, Machine


@cache
def read(filename: str) -> dict[str, dict]:
    """The entries of a file in `data/`, by name."""
    return tomllib.loads(files("clawdemy_data").joinpath(filename).read_text(encoding="utf-8"))


def _find(kind: str, name: str, filename: str) -> dict:
    entries = read(filename)
    if name not in entries:
        near = difflib.get_close_matches(name.lower(), entries, n=3, cutoff=0.4) or ["none"]
        raise ValueError(f"{kind}={name!r} is not in {filename}; near matches: {', '.join(near)}")
    return dict(entries[name])


def model_names() -> list[str]:
    return list(read("models.toml"))


def machine_names() -> list[str]:
    return list(read("machines.toml"))


def model(name: str) -> ModelShape:
    """The shape of the model called `name`. ValueError with near matches for an unknown one."""
    entry = _find("model", name, "models.toml")
    parts = {field: kind(**entry[field])
             for field, kind in (("moe", MoE), ("mla", MLA), ("ssm", SSM)) if field in entry}
    lists = {field: tuple(entry[field]) for field in ("pattern", "biases") if field in entry}
    return ModelShape(**entry | parts | lists)


def machine(name: str) -> Machine:
    """The data sheet of the machine called `name`. ValueError as for `model`."""
    entry = _find("machine", name, "machines.toml")
    for figure in ("kind", "cache_bytes", "peak_flops_fp16_accumulation"):      # for readers alone
        entry.pop(figure, None)
    sources = "; ".join(f"{figure}: {source}" for figure, source in entry.pop("sources").items())
    link = Link(**entry.pop("link")) if "link" in entry else None
    # A data sheet has one bandwidth, whatever the working set.
    return Machine(bandwidth=((1.0, entry.pop("bandwidth")),), link=link, source=sources, **entry)
