"""The child's side of the talk with an engine: one JSON object a line in, one a line out. Standard library only.

It runs in the engine's own virtual environment, which does not have this package; so the `serve_*.py` are started as scripts and find
this file beside them. What they are asked:

    {"do": "generate", "prompts": [[ids], …], "new": N}         -> {"tokens": [[ids], …], "prefill_s", "decode_s", "decode_tokens"}
    {"do": "trace", "prompts": [[ids], …], "new": [N, …], "running": R}   -> {"seconds"}: at most R requests at a time

The first line says that it is ready, and its `version`. `decode_s` starts when every sequence has its first token, and
`decode_tokens` come after that. Every run is greedy, and a sequence gets exactly the tokens that it asks for.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def serve(start: Callable[..., Any]) -> None:
    """Start an engine with the settings that the command line has as JSON, then do what is asked until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                               # what an engine prints would garble the answers
    engine = start(**json.loads(sys.argv[1]))
    engine.generate([[1, 2, 3, 4, 5, 6, 7, 8]] * 2, 4)                  # a first call sets up what later ones find ready

    def answer(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    answer(version=engine.version, weight_bytes=getattr(engine, "weight_bytes", None))
    for line in sys.stdin:
        asked = json.loads(line)
        answer(**getattr(engine, asked.pop("do"))(**asked))
