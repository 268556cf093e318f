"""A trace: one request a line, as JSON, so that it can be saved, edited by hand and served again by anybody.

    {"id": "a", "arrival_s": 0.5, "prompt_tokens": 161, "max_tokens": 338}
    {"id": "b", "arrival_s": 0.7, "prompt": "Once upon a time", "max_tokens": 64, "priority": 1, "stop": ["."]}

`prompt` is a text; `prompt_tokens` is how many tokens, or a list of their ids. The other keys are those of `Request`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from clawdemy_infer.batching.request import Request

NEEDED = ("id", "arrival_s", "max_tokens")
OPTIONAL = ("output_tokens", "priority", "deadline_s", "stop")


def save_trace(requests: Iterable[Request], path: str | Path) -> None:
    """Write the requests, in their order. A sampling is not written: a trace is about cost, and is served greedily."""
    lines = []
    for request in requests:
        prompt = request.prompt if isinstance(request.prompt, str | int) else list(request.prompt)
        line = {"id": request.id, "arrival_s": request.arrival_s or 0.0, "prompt" if isinstance(prompt, str) else "prompt_tokens": prompt,
                "max_tokens": request.max_tokens}
        line |= {key: value for key in OPTIONAL if (value := getattr(request, key))}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


def load_trace(path: str | Path) -> list[Request]:
    """The requests of a trace, by arrival. Raises ValueError naming file, line and key for anything that is not as above."""
    found, ids = [], set()
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            request = _request(json.loads(text))
        except ValueError as error:         # what json raises is one too
            raise ValueError(f"trace={str(path)!r}, line {number}: {error}") from error
        if request.id in ids:
            raise ValueError(f"trace={str(path)!r}, line {number}: id={request.id!r} was there before")
        ids.add(request.id)
        found.append(request)
    if not found:
        raise ValueError(f"trace={str(path)!r}: there is no request in it")
    return sorted(found, key=lambda request: request.arrival_s)


def _request(line: object) -> Request:
    if not isinstance(line, dict):
        raise ValueError(f"{line!r} is not an object")
    if unknown := set(line) - {*NEEDED, *OPTIONAL, "prompt", "prompt_tokens"}:
        raise ValueError(f"{sorted(unknown)[0]!r}: accepted are {', '.join((*NEEDED, 'prompt or prompt_tokens', *OPTIONAL))}")
    if missing := [key for key in NEEDED if key not in line]:
        raise ValueError(f"{missing[0]} is missing")
    if ("prompt" in line) == ("prompt_tokens" in line):
        raise ValueError("prompt or prompt_tokens: exactly one of them is needed")
    if "prompt" in line and not isinstance(line["prompt"], str):
        raise ValueError(f"prompt={line['prompt']!r}: a text is accepted; ids and counts are prompt_tokens")
    tokens = line.get("prompt_tokens", 0)
    if type(tokens) is not int and not (isinstance(tokens, list) and all(type(id) is int for id in tokens)):
        raise ValueError(f"prompt_tokens={tokens!r}: a number of tokens or a list of ids is accepted")
    if type(line["id"]) not in (int, str):
        raise ValueError(f"id={line['id']!r}: a text or a whole number is accepted")
    for key in ("arrival_s", "deadline_s", "priority"):
        if key in line and type(line[key]) not in ((int,) if key == "priority" else (int, float)):
            raise ValueError(f"{key}={line[key]!r}: a number is accepted")
    stop = line.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not (isinstance(stop, list) and all(isinstance(text, str) and text for text in stop)):
        raise ValueError(f"stop={stop!r}: a text or a list of texts is accepted")
    optional = {key: line[key] for key in OPTIONAL if key in line and key != "stop"}
    return Request(line["id"], line["prompt"] if "prompt" in line else tokens, line["max_tokens"], line["arrival_s"],
                   stop=tuple(stop), **optional)
