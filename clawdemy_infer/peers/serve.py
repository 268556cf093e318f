"""The child's side of the talk with an engine: one JSON object a line in, one a line out.

It runs in the engine's own virtual environment, which does not have this package; so it is started
as a script, `serve.py serve_vllm SETTINGS`, and finds the `Engine` in a file beside it. What it is
asked:

    {"prompts": [[ids], …], "new": N}
        -> {"tokens": [[ids], …], "prefill_s", "decode_s", "decode_tokens"}

The first line has the engine's `version`. `decode_s` starts when every sequence has its first
token, and `decode_tokens` come after that. Every run is greedy, to exactly N tokens a sequence.
"""

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def serve(start: Callable[..., Any]) -> None:
    """Start an engine with its settings, JSON in the last argument, and let it generate."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)        # each line is sent at once
    os.dup2(2, 1)                               # what an engine prints would garble the answers
    engine = start(**json.loads(sys.argv[-1]))
    engine.generate([[1, 2, 3, 4, 5, 6, 7, 8]] * 2, 4)      # sets up what later calls find ready

    ready = {"version": engine.version, "weight_bytes": getattr(engine, "weight_bytes", None)}
    print(json.dumps(ready), file=answers)
    for line in sys.stdin:
        print(json.dumps(engine.generate(**json.loads(line))), file=answers)


if __name__ == "__main__":
    serve(import_module(sys.argv[1]).Engine)
