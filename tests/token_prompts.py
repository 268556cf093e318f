"""Requests whose prompts have ids."""

from dataclasses import replace
from random import Random


def with_tokens(requests, vocabulary, seed=0, shared=0):
    """The same requests with token ids for prompts, drawn evenly; the first `shared` tokens are the
    same for all, as a system prompt is."""
    random = Random(seed)
    system = [random.randrange(vocabulary) for _ in range(shared)]
    found = []
    for request in requests:
        own = [random.randrange(vocabulary) for _ in range(request.prompt - shared)]
        found.append(replace(request, prompt=(system + own)[:request.prompt]))
    return found
