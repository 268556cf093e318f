"""A trace: one request a line, as JSON, so that it can be saved, edited by hand and served again by
anybody.

    {"id": "a", "arrival_s": 0.5, "prompt_tokens": 161, "max_tokens": 338}
    {"id": "b", "arrival_s": 0.7, "prompt": "Once upon", "max_tokens": 64, "stop": ["."]}

`prompt` is a text; `prompt_tokens` is how many tokens, or a list of their ids. The other keys are
those of `Request`. Lines end at LF alone.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path

from clawdemy_infer.batching.request import Request
from clawdemy_infer.paths import write_atomically
from clawdemy_infer.rigs.stream import MAX_TOKENS

MAX_REQUESTS = 10**6
MAX_ARRIVAL_S = 10**7               # after the first: 116 days
MAX_TRACE_BYTES = 2**28
MAX_ID_CHARACTERS = 200

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
    if (path := Path(path).resolve()).exists() and not path.is_file():
        raise ValueError(f"save={str(path)!r}: a regular file is accepted")
    write_atomically(path, "".join(lines))


def load_trace(path: str | Path) -> list[Request]:
    """The requests of a trace, by arrival. Raises ValueError naming file, line and key for anything
    that is not as above, or longer than the constants allow."""
    found: dict[object, Request] = {}
    if (size := Path(path).stat().st_size) > MAX_TRACE_BYTES:
        raise ValueError(f"trace={str(path)!r}: {size:,} bytes; {MAX_TRACE_BYTES:,} are accepted")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if text := line.decode("utf-8-sig").strip():
                    request = _request(json.loads(text))
                    if request.id in found:
                        raise ValueError(f"id={request.id!r} was there before")
                    if len(found) == MAX_REQUESTS:
                        raise ValueError(f"{MAX_REQUESTS:,} requests are accepted, and no more")
                    found[request.id] = request
            except (ValueError, RecursionError) as error:           # what json raises is of these
                raise ValueError(f"trace={str(path)!r}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"trace={str(path)!r}: there is no request in it")
    return sorted(found.values(), key=lambda request: request.arrival_s)


def _request(line: object) -> Request:
    # 1. Its keys.
    if not isinstance(line, dict):
        raise ValueError(f"{reprlib.repr(line)} is not an object")
    if unknown := sorted(set(line) - {*NEEDED, *OPTIONAL, *PROMPTS}):
        accepted = ", ".join((*NEEDED, " or ".join(PROMPTS), *OPTIONAL))
        raise ValueError(f"{reprlib.repr(unknown[0])}: accepted are {accepted}")
    if missing := [key for key in NEEDED if key not in line]:
        raise ValueError(f"{missing[0]} is missing")
    if len(set(PROMPTS) & set(line)) != 1:
        raise ValueError("prompt or prompt_tokens: exactly one of them is needed")
    # 2. Their values.
    stop, tokens = line.get("stop", []), line.get("prompt_tokens", 0)
    stop = [stop] if isinstance(stop, str) else stop
    ids = isinstance(tokens, list) and all(_whole(id, 0, 2**31 - 1) for id in tokens)
    most = f"a whole number from 1 to {MAX_TOKENS:,}"
    for key, good, accepted in (
            ("id", _whole(line["id"], -2**63, 2**63) or _text(line["id"], MAX_ID_CHARACTERS),
             f"a whole number of 64 bits or a text of at most {MAX_ID_CHARACTERS} characters"),
            ("arrival_s", type(line["arrival_s"]) in (int, float)
             and 0 <= line["arrival_s"] <= MAX_ARRIVAL_S, f"a number from 0 to {MAX_ARRIVAL_S:,}"),
            ("max_tokens", _whole(line["max_tokens"], 1, MAX_TOKENS), most),
            ("output_tokens", line.get("output_tokens") is None
             or _whole(line["output_tokens"], 1, MAX_TOKENS), most),
            ("priority", type(line.get("priority", 0)) is int, "a whole number"),
            ("prompt", _text(line.get("prompt", "")), "a text (ids and counts are prompt_tokens)"),
            ("prompt_tokens", _whole(tokens, 0, MAX_TOKENS) or ids,
             f"a number of tokens, 0 to {MAX_TOKENS:,}, or a list of ids"),
            ("stop", isinstance(stop, list) and all(text and _text(text) for text in stop),
             "a text or a list of texts")):
        if not good:
            raise ValueError(f"{key}={reprlib.repr(line[key])}: {accepted} is accepted")
    optional = {key: line[key] for key in OPTIONAL if key in line and key != "stop"}
    return Request(line["id"], line.get("prompt", tokens), line["max_tokens"], line["arrival_s"],
                   stop=tuple(stop), **optional)


def _whole(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _text(value: object, most: int = MAX_TRACE_BYTES) -> bool:
    """A text that UTF-8 can hold: JSON also spells halves of surrogate pairs."""
    return isinstance(value, str) and len(value) <= most and not re.search("[\ud800-\udfff]", value)
