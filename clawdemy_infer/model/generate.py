"""Generation: prefill the prompt, then decode token by token, and keep the two times apart."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from clawdemy_infer.kv_cache import ContiguousCache, KVCache, PagedCache
from clawdemy_infer.model.decoder import Decoder
from clawdemy_infer.model.sampling import Sampling, sample
from clawdemy_infer.model.writing import Writer, seconds_per_token, uninterrupted
from clawdemy_infer.timing import now

CACHES = {"contiguous": ContiguousCache.for_model, "paged": PagedCache.for_model}
"""The core's caches by name, each made from (model, batch, capacity)."""


@dataclass(frozen=True)
class Generation:
    """What came out, and how long it took.

    `tokens` are the ids of all generated tokens, with the end-of-sequence token or those of a stop
    string if that is what ended it; `text` has neither. `ttft_s`, time to first token, runs from
    the call to the first token: the prefill and its choice. `tpot_s`, time per output token, is
    that of decode alone: see `seconds_per_token`. `finish_reason` is eos, stop (a stop string
    came), length (max_tokens reached), interrupted (Ctrl-C), or failed (no finite logits), which
    only `speculate_batch` returns."""

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    ttft_s: float | None
    tpot_s: float | None
    finish_reason: str


def generate(model: Decoder, prompt: str | Sequence[int], max_tokens: int = 64,
             sampling: Sampling | None = None, *, stop: str | Sequence[str] = (),
             on_token: Callable[[str], None] | None = None,
             cache: str | KVCache = "contiguous") -> Generation:
    """Continue `prompt`, a text or its ids, by up to `max_tokens` tokens; greedily by default.

    `on_token` is called with each new piece of text; joined they are `text`. `cache` names one of
    `CACHES`, or is a cache for one sequence, and the prompt follows on what that one holds; "none"
    runs the whole text anew for every token. An interrupt ends the generation: what is there by
    then has gone to `on_token`, and comes back. However it ends, the cache holds all but the last
    token. Raises ValueError, before any work, for an empty prompt, a wrong `max_tokens`, `stop` or
    `cache`, or more than the context holds; and where the logits leave nothing to choose."""
    # 1) Check, and make a cache.
    start, sampling = now(), sampling or Sampling()
    ids, stop = prompt_ids(model, prompt), (stop,) if isinstance(stop, str) else tuple(stop)
    check_generation(model, ids, max_tokens, stop, cache)
    cached = cache != "none"
    if isinstance(cache, str):
        cache = CACHES[cache](model, 1, len(ids) + max_tokens) if cached else None
    past = sum(cache.lengths.values()) if cached else 0
    generator = sampling.generator(model.device)
    text = Text(model, ids, max_tokens, stop, on_token)
    try:
        new = ids                                       # 2) Prefill: the whole prompt at once.
        while not text.writer.reason:
            inputs = torch.tensor([new if cached else text.ids], device=model.device)
            logits = model(inputs, cache, last_only=True)[:, -1]
            keep([(text, sample(logits, sampling, generator).tolist())])
            new = text.ids[-1:]                         # 3) Decode: one token a step.
    except KeyboardInterrupt:
        text.writer.reason = "interrupted"
    finally:
        if cached:
            cache.truncate(min(past + len(text.ids) - 1, *cache.lengths.values()))
    return checked(text.result(start))


class Text:
    """What is being written behind a prompt: all `ids`, when each token came, and whom to tell."""

    def __init__(self, model: Decoder, prompt: list[int], max_tokens: int, stop: tuple[str, ...],
                 say: Callable[[str], None] | None) -> None:
        self.prompt, self.ids, self.times, self.say = prompt, list(prompt), [], say
        self.writer = Writer(max_tokens, model.config.eos_ids, model.tokenizer, stop)

    def result(self, start: float, kind: type[Generation] = Generation, **more) -> Generation:
        times, stream = self.times, self.writer.stream
        return kind(
            prompt_tokens=self.prompt, tokens=self.ids[len(self.prompt):],
            text=stream.text if stream else "", ttft_s=times[0] - start if times else None,
            tpot_s=seconds_per_token(times), finish_reason=self.writer.reason, **more)


def keep(came: Iterable[tuple[Text, list[int]]]) -> None:
    """Each text takes its tokens as far as it goes on, and then each piece is said, though Ctrl-C
    comes or somebody who is told raises: the first error comes out at the end."""
    with uninterrupted():
        pieces = []
        for text, tokens in came:
            taken, piece = text.writer.take(tokens)
            text.ids += taken
            text.times += [now()] * len(taken)
            pieces += [(text.say, piece)] if piece and text.say else []
        unsaid = iter(pieces)
        try:
            for say, piece in unsaid:
                say(piece)
        finally:
            for say, piece in unsaid:
                with suppress(Exception):
                    say(piece)


def checked(generation: Generation) -> Generation:
    """The same. ValueError where the model gave nothing to choose a token from."""
    if generation.finish_reason == "failed":
        raise ValueError(f"logits: behind {len(generation.prompt_tokens + generation.tokens)} "
                         "tokens they hold NaN or +inf, or are all -inf: no token can be chosen")
    return generation


def prompt_ids(model: Decoder, prompt: str | Sequence[int]) -> list[int]:
    """The token ids of a prompt. ValueError for a text where the model has no tokenizer."""
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if model.tokenizer is None:
        raise ValueError("prompt is a text, and there is no tokenizer.json; ids are accepted")
    return model.tokenizer.encode(prompt)


def check_generation(model: Decoder, ids: list[int], max_tokens: int, stop: tuple[str, ...],
                     cache: str | KVCache) -> None:
    """ValueError where `generate` would refuse this."""
    if not ids:
        raise ValueError("prompt is empty: at least one token is needed to start from")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: at least 1 is accepted")
    if not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop={stop!r}: texts of at least one character are accepted")
    if stop and model.tokenizer is None:
        raise ValueError(f"stop={stop!r}: this model has no tokenizer, so its tokens have no text")
    past, span = 0, None
    if not isinstance(cache, str):
        if len(cache.lengths) != 1:
            raise ValueError(f"cache: it has {len(cache.lengths)} sequences, and a generation is 1")
        (past,), span = cache.lengths.values(), cache.span
    elif cache not in (*CACHES, "none"):
        raise ValueError(f"cache={cache!r}: accepted are {', '.join(CACHES)}, none, or a cache")
    limit, most = model.config.shape.max_context, past + len(ids) + max_tokens
    if limit and min(most, span or most) > limit:
        held = f"the cache holds {past} tokens, the " if past else ""
        raise ValueError(f"{held}prompt has {len(ids)} tokens and max_tokens={max_tokens}: "
                         f"together {most}, but the model's context is {limit}")
