"""A trace: one request a line, as JSON, so that it can be saved, edited by hand and served again by
anybody.

    {"id": "a", "arrival_s": 0.5, "prompt_tokens": 161, "max_tokens": 338}
    {"id": "b", "arrival_s": 0.7, "prompt": "Once upon", "max_tokens": 64, "stop": ["."]}

`prompt` is a text; `prompt_tokens` is how many tokens, or a list of their ids. The other keys are
those of `Request`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from clawdemy_infer.batching.request import Request

NEEDED = ("id", "arrival_s", "max_tokens")
OPTIONAL = ("output_tokens", "priority", "stop")
PROMPTS = ("prompt", "prompt_tokens")


def save_trace(requests: Iterable[Request], path: str | Path) -> None:
    """Write the requests, in their order. A sampling is not written: a trace is about cost, and is
    served greedily."""
    lines = []
    for request in requests:
        prompt = request.prompt if isinstance(request.prompt, str | int) else list(request.prompt)
        line = {"id": request.id, "arrival_s": request.arrival_s or 0.0,
                PROMPTS[not isinstance(prompt, str)]: prompt, "max_tokens": request.max_tokens}
        line |= {key: value for key in OPTIONAL if (value := getattr(request, key))}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


def load_trace(path: str | Path) -> list[Request]:
    """The requests of a trace, by arrival. Raises ValueError naming file, line and key for anything
    that is not as above."""
    found: dict[object, Request] = {}
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            request = _request(json.loads(text))
            if request.id in found:
                raise ValueError(f"id={request.id!r} was there before")
        except ValueError as error:         # what json raises is one too
            raise ValueError(f"trace={str(path)!r}, line {number}: {error}") from error
        found[request.id] = request
    if not found:
        raise ValueError(f"trace={str(path)!r}: there is no request in it")
    return sorted(found.values(), key=lambda request: request.arrival_s)


def _request(line: object) -> Request:
    # 1. Its keys.
    if not isinstance(line, dict):
        raise ValueError(f"{line!r} is not an object")
    if unknown := sorted(set(line) - {*NEEDED, *OPTIONAL, *PROMPTS}):
        accepted = ", ".join((*NEEDED, " or ".join(PROMPTS), *OPTIONAL))
        raise ValueError(f"{unknown[0]!r}: accepted are {accepted}")
    if missing := [key for key in NEEDED if key not in line]:
        raise ValueError(f"{missing[0]} is missing")
    if len(set(PROMPTS) & set(line)) != 1:
        raise ValueError("prompt or prompt_tokens: exactly one of them is needed")
    # 2. Their values; those of whole numbers `Request` checks.
    stop, tokens = line.get("stop", []), line.get("prompt_tokens", 0)
    stop = [stop] if isinstance(stop, str) else stop
    ids = isinstance(tokens, list) and all(type(id) is int for id in tokens)
    texts = isinstance(stop, list) and all(isinstance(text, str) and text for text in stop)
    for key, good, accepted in (
            ("id", type(line["id"]) in (int, str), "a text or a whole number"),
            ("arrival_s", type(line["arrival_s"]) in (int, float), "a number"),
            ("priority", type(line.get("priority", 0)) is int, "a number"),
            ("prompt", isinstance(line.get("prompt", ""), str),
             "a text (ids and counts are prompt_tokens)"),
            ("prompt_tokens", type(tokens) is int or ids, "a number of tokens or a list of ids"),
            ("stop", texts, "a text or a list of texts")):
        if not good:
            raise ValueError(f"{key}={line[key]!r}: {accepted} is accepted")
    optional = {key: line[key] for key in OPTIONAL if key in line and key != "stop"}
    return Request(line["id"], line.get("prompt", tokens), line["max_tokens"], line["arrival_s"],
                   stop=tuple(stop), **optional)
