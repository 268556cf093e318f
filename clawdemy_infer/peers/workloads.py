"""What the engines are asked to do: decode at a batch and a context, prefill, or serve a trace. The same tokens for all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data import topics

from tokenizers import Tokenizer

from clawdemy_infer.batching import uniform, workload

DEFAULT = ["decode-1", "decode-8", "decode-16", "decode-32", "decode-1@2000", "prefill-512"]
"""A minute each for a few engines. The trace takes minutes for one, so it is asked for by name."""

RUNNING = 16
"""How many requests of the trace are served at a time."""


@dataclass(frozen=True)
class Workload:
    """`phase` is decode, prefill or trace; a prompt has `context` tokens, and `new` tokens are generated for each of `batch` sequences."""

    name: str
    phase: str
    batch: int = 1
    context: int = 128
    new: int = 32

    @property
    def middle(self) -> float:
        """The context of the mean decode step, with the new token."""
        return self.context + (self.new + 1) / 2


def parse(name: str) -> Workload:
    """`decode-8` (B = 8 at context 128), `decode-1@2000`, `prefill-512` or `trace`. Raises ValueError for anything else."""
    if name == "trace":
        return Workload(name, "trace", RUNNING, 256, 192)                  # at most
    if found := re.fullmatch(r"decode-([1-9]\d*)(?:@([1-9]\d*))?", name):
        return Workload(name, "decode", int(found[1]), int(found[2] or 128))
    if found := re.fullmatch(r"prefill-([1-9]\d*)", name):
        return Workload(name, "prefill", 1, int(found[1]), 1)
    raise ValueError(f"workloads={name!r}: accepted are decode-B, decode-B@S, prefill-S and trace")


def asked(work: Workload, directory: Path) -> dict:
    """The command for a worker (see `serve`), its prompts cut from a long text by the tokenizer in `directory`.

    The trace: 64 requests that are all there from the start, prompts of 16 to 256 tokens and outputs of 8 to 192, drawn evenly.
    """
    if work.phase == "trace":
        requests = workload(uniform(16, 256), uniform(8, 192), requests=64, seed=0)
        return {"do": "trace", "prompts": prompts([request.prompt for request in requests], directory),
                "new": [request.output_tokens for request in requests], "running": work.batch}
    return {"do": "generate", "prompts": prompts([work.context] * work.batch, directory), "new": work.new}


def prompts(lengths: list[int], directory: Path) -> list[list[int]]:
    """So many tokens of the text for each prompt, one after the other; from its beginning again where it ends."""
    ids, start, found = text(directory), 0, []
    for length in lengths:
        start = start if start + length <= len(ids) else 0
        found.append(ids[start:start + length])
        start += length
    return found


@cache
def text(directory: Path) -> list[int]:
    """The token ids of Python's own help: plain English that every machine has, so greedy choices are seldom close calls."""
    written = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))[:200_000]
    return Tokenizer.from_file(str(directory / "tokenizer.json")).encode(written, add_special_tokens=False).ids
