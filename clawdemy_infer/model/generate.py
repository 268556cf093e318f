"""Generation: prefill the prompt, then decode token by token, and keep the two times apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from clawdemy_infer.kv_cache import (
    ContiguousCache,
    Int8Cache,
    KiviCache,
    KVCache,
    PagedCache,
    PagedInt8Store,
    PagedKiviCache,
    SlidingWindowCache,
)
from clawdemy_infer.model.decoder import Decoder
from clawdemy_infer.model.sampling import Sampling, sample
from clawdemy_infer.model.tokenizer import TextStream
from clawdemy_infer.timing import now

WINDOW, SINKS = 256, 4

KEEPERS = {
    "contiguous": ContiguousCache.for_model, "paged": PagedCache.for_model, "int8": Int8Cache.for_model, "int4": KiviCache.for_model,
    "window": lambda model, batch, capacity: SlidingWindowCache.for_model(model, batch, WINDOW, SINKS),
    "paged-int8": lambda model, batch, capacity: PagedCache.for_model(model, batch, capacity, store=PagedInt8Store),
    "paged-int4": PagedKiviCache.for_model,
}
"""Ways to keep the keys and values, by name: each is called with (model, batch, capacity). A window never fills up."""


@dataclass(frozen=True)
class Generation:
    """What came out, and how long it took.

    `tokens` are the ids of all generated tokens, with the end-of-sequence token or those of a stop string if that is what
    ended it; `text` has neither. `ttft_s`, time to first token, runs from the call to the first token: the prefill and its
    choice. `tpot_s`, time per output token, is (last - first) / (tokens - 1): decode alone; None for fewer than two.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    ttft_s: float | None
    tpot_s: float | None
    finish_reason: str
    """eos, stop (a stop string came), length (max_tokens reached) or interrupted (Ctrl-C, Jupyter's stop button)."""


def generate(model: Decoder, prompt: str | Sequence[int], max_tokens: int = 64, sampling: Sampling | None = None, *,
             stop: str | Sequence[str] = (), on_token: Callable[[str], None] | None = None,
             cache: str | KVCache = "contiguous") -> Generation:
    """Continue `prompt`, a text or its token ids, by up to `max_tokens` tokens; greedily without a `sampling`.

    `on_token` is called with each new piece of text: whole characters, never part of a stop string; joined they are
    `text`. Time spent in it counts. `cache` names one of `KEEPERS`, or is a cache for one sequence, and the prompt follows on
    what that one holds; "none" keeps nothing and runs the whole text anew for every token.
    An interrupt ends the generation: what is there by then comes back, and the model can be used again at once.
    Raises ValueError, before any work, for an empty prompt, a wrong `max_tokens`, `stop` or `cache`, or more than the context
    holds. With a "window" the text may be longer than that.
    """
    start = now()
    ids, stop = _prompt_ids(model, prompt), (stop,) if isinstance(stop, str) else tuple(stop)
    sampling = sampling or Sampling()
    _check(model, ids, max_tokens, stop, cache)
    generator = sampling.generator(model.device)
    cached = cache != "none"
    if isinstance(cache, str):
        cache = KEEPERS[cache](model, 1, len(ids) + max_tokens) if cached else None
    stream = TextStream(model.tokenizer, stop) if model.tokenizer else None
    tokens: list[int] = []
    times: list[float] = []
    reason = "length"

    def release(piece: str) -> None:
        if piece and on_token:
            on_token(piece)

    try:
        fresh = ids                                                     # prefill: the whole prompt at once
        while len(tokens) < max_tokens:
            step = torch.tensor([fresh if cached else ids + tokens], device=model.device)
            token = int(sample(model(step, cache, last_only=True)[:, -1], sampling, generator, model.backend))
            times.append(now())
            tokens.append(token)
            fresh = [token]                                             # decode: one token a step
            if stream:
                release(stream.push(token))
            if stream and stream.stopped:
                reason = "stop"
                break
            if token in model.config.eos_ids:
                reason = "eos"
                break
        if stream:
            release(stream.close())
            reason = "stop" if stream.stopped else reason
    except KeyboardInterrupt:
        reason = "interrupted"

    return Generation(
        prompt_tokens=ids, tokens=tokens, text=stream.text if stream else "",
        ttft_s=times[0] - start if times else None,
        tpot_s=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
        finish_reason=reason,
    )


def _prompt_ids(model: Decoder, prompt: str | Sequence[int]) -> list[int]:
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if model.tokenizer is None:
        raise ValueError("prompt is a text, but this model's directory has no tokenizer.json; token ids are accepted")
    return model.tokenizer.encode(prompt)


def _check(model: Decoder, ids: list[int], max_tokens: int, stop: tuple[str, ...], cache: str | KVCache) -> None:
    if not ids:
        raise ValueError("prompt is empty: at least one token is needed to start from")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: at least 1 is accepted")
    if not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop={stop!r}: texts of at least one character are accepted")
    if stop and model.tokenizer is None:
        raise ValueError(f"stop={stop!r}: this model has no tokenizer, so its tokens have no text")
    past, span = 0, WINDOW + SINKS if cache == "window" else None
    if not isinstance(cache, str):
        if len(cache.lengths) != 1:
            raise ValueError(f"cache: it has {len(cache.lengths)} sequences, and a generation is 1")
        (past,), span = cache.lengths.values(), cache.span
    elif cache not in (*KEEPERS, "none"):
        raise ValueError(f"cache={cache!r}: accepted are {', '.join(KEEPERS)}, none")
    limit, most = model.config.shape.max_context, past + len(ids) + max_tokens
    if limit and min(most, span or most) > limit:
        held = f"the cache holds {past} tokens, the " if past else ""
        raise ValueError(f"{held}prompt has {len(ids)} tokens and max_tokens={max_tokens}: together {most}, "
                         f"but the model's context is {limit}")
