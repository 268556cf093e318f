"""Generation: prefill the prompt, then decode token by token, and keep the two times apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from clawdemy_infer.kv_cache import ContiguousCache, KVCache, PagedCache
from clawdemy_infer.model.decoder import Decoder
from clawdemy_infer.model.sampling import Sampling, sample
from clawdemy_infer.model.writing import Writer, uninterrupted
from clawdemy_infer.timing import now

CACHES = {"contiguous": ContiguousCache.for_model, "paged": PagedCache.for_model}
"""The core's caches by name, each made from (model, batch, capacity)."""


@dataclass(frozen=True)
class Generation:
    """What came out, and how long it took.

    `tokens` are the ids of all generated tokens, with the end-of-sequence token or those of a stop
    string if that is what ended it; `text` has neither. `ttft_s`, time to first token, runs from
    the call to the first token: the prefill and its choice. `tpot_s`, time per output token, is
    (last - first) / (tokens - 1): decode alone; None for fewer than two. `finish_reason` is eos,
    stop (a stop string came), length (max_tokens reached), interrupted (Ctrl-C), or failed (no
    finite logits), which only `speculate_batch` returns.
    """

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
    """Continue `prompt`, a text or its token ids, by up to `max_tokens` tokens; greedily without a
    `sampling`.

    `on_token` is called with each new piece of text; joined they are `text`. `cache` names one of
    `CACHES`, or is a cache for one sequence, and the prompt follows on what that one holds; "none"
    runs the whole text anew for every token. An interrupt ends the generation: what is there by
    then has gone to `on_token`, and comes back. However it ends, the cache holds all but the last
    token. Raises ValueError, before any work, for an empty prompt, a wrong `max_tokens`, `stop` or
    `cache`, or more than the context holds; and where the logits leave nothing to choose.
    """
    # 1) Check, and make a cache.
    start, sampling = now(), sampling or Sampling()
    ids, stop = prompt_ids(model, prompt), (stop,) if isinstance(stop, str) else tuple(stop)
    check_generation(model, ids, max_tokens, stop, cache)
    cached = cache != "none"
    if isinstance(cache, str):
        cache = CACHES[cache](model, 1, len(ids) + max_tokens) if cached else None
    generator = sampling.generator(model.device)
    writer = Writer(max_tokens, model.config.eos_ids, model.tokenizer, stop)
    tokens, times, reason = [], [], ""
    held = (sum(cache.lengths.values()) if cached else 0) + len(ids) - 1
    try:
        new = ids                                       # 2) Prefill: the whole prompt at once.
        while not writer.reason:
            inputs = torch.tensor([new if cached else ids + tokens], device=model.device)
            logits = model(inputs, cache, last_only=True)[:, -1]
            with uninterrupted():                       # What has come is kept, and said.
                new, piece = writer.take(sample(logits, sampling, generator).tolist())
                times += [now()] * len(new)
                tokens += new                           # 3) Decode: one token a step.
                if piece and on_token:
                    on_token(piece)
    except KeyboardInterrupt:
        reason = "interrupted"
    finally:
        if cached:
            cache.truncate(min(held + len(tokens), *cache.lengths.values()))
    return unless_failed(Generation(
        prompt_tokens=ids, tokens=tokens, text=writer.stream.text if writer.stream else "",
        ttft_s=times[0] - start if times else None,
        tpot_s=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
        finish_reason=reason or writer.reason))


def unless_failed(generation: Generation) -> Generation:
    """The same. ValueError where the model gave nothing to choose a token from."""
    if generation.finish_reason == "failed":
        raise ValueError(f"logits: behind {len(generation.prompt_tokens + generation.tokens)} "
                         "tokens there is NaN or +inf among them, or all are -inf: no token can be "
                         "chosen")
    return generation


def prompt_ids(model: Decoder, prompt: str | Sequence[int]) -> list[int]:
    """The token ids of a prompt. ValueError for a text where the model has no tokenizer."""
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if model.tokenizer is None:
        raise ValueError("prompt is a text, but this model's directory has no tokenizer.json; "
                         "token ids are accepted")
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
