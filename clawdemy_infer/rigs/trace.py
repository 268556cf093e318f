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
from collections.abc import Iterable
from pathlib import Path

from clawdemy_infer.batching.request import Request
from clawdemy_infer.paths import Refused, write_atomically
from clawdemy_infer.rigs.stream import MAX_TOKENS

MAX_REQUESTS = 10**6
MAX_ARRIVAL_S = 10**7               # after the first: 116 days
MAX_TRACE_BYTES = 2**28
MAX_ID_CHARACTERS = 200

NEEDED = ("id", "arrival_s", "max_tokens")
OPTIONAL = ("output_tokens", "priority", "stop")
PROMPTS = ("prompt", "prompt_tokens")


def save_trace(requests: Iterable[Request], path: str | Path) -> None:
    """Write the requests in their order, without sampling: a trace is served greedily."""
    lines = []
    for request in requests:
        prompt = request.prompt if isinstance(request.prompt, str | int) else list(request.prompt)
        line = {"id": request.id, "arrival_s": request.arrival_s or 0.0,
                PROMPTS[not isinstance(prompt, str)]: prompt, "max_tokens": request.max_tokens}
        line |= {key: value for key in OPTIONAL if (value := getattr(request, key))}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    if (path := Path(path).resolve()).exists() and not path.is_file():
        raise Refused("", "save", str(path), "a regular file")
    write_atomically(path, "".join(lines))


def load_trace(path: str | Path) -> list[Request]:
    """The requests of a trace, by arrival. Raises ValueError naming file, line and key for anything
    that is not as above, or longer than the constants allow."""
    found: dict[object, Request] = {}
    if (size := Path(path).stat().st_size) > MAX_TRACE_BYTES:
        raise Refused(path, "size", size, f"at most {MAX_TRACE_BYTES:,} bytes")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            source = f"{path}, line {number}"
            try:
                if not (text := line.decode("utf-8-sig").strip()):
                    continue
                said = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise Refused(source, None, why=str(error)) from error
            request = _request(said, source)
            if request.id in found:
                raise Refused(source, "id", request.id, "one that was not there before")
            if len(found) == MAX_REQUESTS:
                raise Refused(source, "requests", len(found) + 1, f"at most {MAX_REQUESTS:,}")
            found[request.id] = request
    if not found:
        raise Refused(path, "request")
    return sorted(found.values(), key=lambda request: request.arrival_s)


def _request(line: object, source: str) -> Request:
    # 1. Its keys.
    if not isinstance(line, dict):
        raise Refused(source, "request", line, "an object")
    if unknown := sorted(set(line) - {*NEEDED, *OPTIONAL, *PROMPTS}):
        accepted = ", ".join((*NEEDED, " or ".join(PROMPTS), *OPTIONAL))
        raise Refused(source, unknown[0], line[unknown[0]], f"the keys {accepted}")
    if missing := [key for key in NEEDED if key not in line]:
        raise Refused(source, missing[0])
    if len(set(PROMPTS) & set(line)) != 1:
        raise Refused(source, " and ".join(PROMPTS), [line.get(key) for key in PROMPTS],
                      "exactly one of them")
    # 2. Their values.
    id, arrival_s, tokens = line["id"], line["arrival_s"], line.get("prompt_tokens", 0)
    stop = [line["stop"]] if isinstance(line.get("stop"), str) else line.get("stop", [])
    ids = isinstance(tokens, list) and all(_whole(id, 0, 2**31 - 1) for id in tokens)
    most = f"a whole number, 1 to {MAX_TOKENS:,}"
    for key, good, accepted in (
            ("id", _whole(id, -2**63, 2**63) or _text(id, MAX_ID_CHARACTERS),
             f"a whole number of 64 bits, or a text of at most {MAX_ID_CHARACTERS} characters"),
            ("arrival_s", type(arrival_s) in (int, float) and 0 <= arrival_s <= MAX_ARRIVAL_S,
             f"a number, 0 to {MAX_ARRIVAL_S:,}"),
            ("max_tokens", _whole(line["max_tokens"]), most),
            ("output_tokens",
             line.get("output_tokens") is None or _whole(line["output_tokens"]), most),
            ("priority", type(line.get("priority", 0)) is int, "a whole number"),
            ("prompt", _text(line.get("prompt", "")), "a text (ids and counts are prompt_tokens)"),
            ("prompt_tokens", _whole(tokens, 0) or ids,
             f"a number of tokens, 0 to {MAX_TOKENS:,}, or a list of ids"),
            ("stop", isinstance(stop, list) and all(text and _text(text) for text in stop),
             "a text or a list of texts")):
        if not good:
            raise Refused(source, key, line[key], accepted)
    optional = {key: line[key] for key in OPTIONAL if key in line} | {"stop": tuple(stop)}
    return Request(id, line.get("prompt", tokens), line["max_tokens"], arrival_s, **optional)


def _whole(value: object, least: int = 1, most: int = MAX_TOKENS) -> bool:
    return type(value) is int and least <= value <= most


def _text(value: object, most: int = MAX_TRACE_BYTES) -> bool:
    """A text that UTF-8 can hold: JSON also spells halves of surrogate pairs."""
    return isinstance(value, str) and len(value) <= most and not re.search("[\ud800-\udfff]", value)
