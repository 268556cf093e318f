"""Speculative decoding: a draft guesses a few tokens, the target reads them all in one forward pass, and those that stand are kept.

A forward pass at batch 1 streams all the weights for one row. With γ drafted tokens it streams them once for γ + 1 rows, and
brings up to γ + 1 tokens. One round is

    propose     the draft continues each text by at most γ tokens
    read        the target reads the text's last token and the drafted ones, and says what it would have put after each
    verify      which of them stand, and the token after them
    keep        the text grows by those; the cache forgets the rest
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from clawdemy_infer.kv_cache import ContiguousCache, KVCache, PagedCache
from clawdemy_infer.model import Decoder, Generation, Sampling, sample
from clawdemy_infer.model.tokenizer import TextStream
from clawdemy_infer.speculative.drafts import Draft
from clawdemy_infer.speculative.verification import verify_rows
from clawdemy_infer.timing import now

KEEPERS = {"contiguous": ContiguousCache.for_model, "paged": PagedCache.for_model}
"""Caches that can take tokens back, and then hold just what they would if these had never come."""


class Round(NamedTuple):
    """What was drafted for a sequence, how many of it stood, and the token that the target put after those. The text may end
    before all of them: at an end-of-sequence token or a stop string."""

    drafted: list[int]
    accepted: int
    token: int


@dataclass(frozen=True)
class Speculation(Generation):
    """A generation, and the rounds that it took. The first token is the prefill's, so the rounds brought `tokens[1:]`."""

    rounds: list[Round] = field(default_factory=list)


def speculate(model: Decoder, prompt: str | Sequence[int], draft: Draft, max_tokens: int = 64, sampling: Sampling | None = None, *,
              gamma: int = 4, stop: str | Sequence[str] = (), on_token: Callable[[str], None] | None = None,
              cache: str | KVCache = "contiguous") -> Speculation:
    """`model.generate` with a `draft` that guesses `gamma` tokens at a time. Greedy: the same tokens. Else: the same distribution.

    `cache` is "contiguous" or "paged", or an empty cache for one sequence that can be truncated. Raises ValueError, before any
    work, for what `generate` refuses, for a gamma below 0, and for a draft that does not fit the model.
    """
    pieces = on_token and (lambda index, piece: on_token(piece))
    return speculate_batch(model, [prompt], draft, max_tokens, sampling, gamma=gamma, stop=stop, on_token=pieces, cache=cache)[0]


def speculate_batch(model: Decoder, prompts: Sequence[str | Sequence[int]], draft: Draft, max_tokens: int = 64,
                    sampling: Sampling | None = None, *, gamma: int = 4, stop: str | Sequence[str] = (),
                    on_token: Callable[[int, str], None] | None = None, cache: str | KVCache = "contiguous") -> list[Speculation]:
    """The same for several prompts at once: each sequence keeps its own number of tokens a round, and leaves when it has ended.

    `on_token` gets the index of the prompt and a piece of its text. All draw from one generator: a seed repeats the whole batch.
    """
    start, sampling = now(), sampling or Sampling()
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    ids = [model.tokenizer.encode(prompt) if isinstance(prompt, str) and model.tokenizer else prompt for prompt in prompts]
    _check(model, ids, max_tokens, gamma, stop, cache)
    if isinstance(cache, str):
        cache = KEEPERS[cache](model, len(ids), max(map(len, ids)) + max_tokens)
    generator = sampling.generator(model.device)
    writings = {sequence: _Writing(model, index, list(prompt), max_tokens, stop, on_token)
                for index, (sequence, prompt) in enumerate(zip(cache.lengths, ids, strict=True))}
    prompts = {sequence: writing.ids for sequence, writing in writings.items()}
    try:
        draft.begin(model, cache, prompts)
        first = sample(model.step(prompts, cache), sampling, generator, model.backend).tolist()            # prefill
        for writing, token in zip(writings.values(), first, strict=True):
            writing.extend([token])
        while active := {sequence: writing for sequence, writing in writings.items() if not writing.reason}:
            _round(model, active, draft, gamma, sampling, generator, cache)
    except KeyboardInterrupt:
        for sequence, writing in writings.items():
            writing.reason = writing.reason or "interrupted"
            cache.truncate(min(cache.lengths[sequence], len(writing.ids) - 1), sequence)
    return [writing.result(start) for writing in writings.values()]


def _round(model: Decoder, active: dict, draft: Draft, gamma: int, sampling: Sampling, generator: torch.Generator, cache: KVCache) -> None:
    texts = {sequence: writing.ids for sequence, writing in active.items()}
    counts = {sequence: min(gamma, writing.left - 1) for sequence, writing in active.items()}   # the target's own token comes on top
    drafted, q = draft.propose(texts, counts, sampling, generator)
    logits = model.step({sequence: [text[-1], *guess] for (sequence, text), guess in zip(texts.items(), drafted, strict=True)},
                        cache, last_only=False)                                             # [M, V]
    verdict = verify_rows(logits, drafted, q, sampling, generator, backend=model.backend)
    accepted, tokens = verdict.accepted.tolist(), verdict.token.tolist()
    for (sequence, writing), guess, count, token in zip(active.items(), drafted, accepted, tokens, strict=True):
        writing.rounds.append(Round(guess, count, token))
        writing.extend([*guess[:count], token])
        cache.truncate(len(writing.ids) - 1, sequence)                                      # all but the last token, as ever


class _Writing:
    """One sequence: its text so far, and when which token was there."""

    def __init__(self, model: Decoder, index: int, ids: list[int], max_tokens: int, stop: tuple[str, ...],
                 on_token: Callable[[int, str], None] | None) -> None:
        self.index, self.ids, self.prompt, self.left = index, ids, len(ids), max_tokens
        self.eos, self.on_token = model.config.eos_ids, on_token
        self.stream = TextStream(model.tokenizer, stop) if model.tokenizer else None
        self.rounds: list[Round] = []
        self.times: list[float] = []
        self.reason = ""

    def extend(self, run: list[int]) -> None:
        """Take a run of tokens, as far as the text goes on."""
        at = now()
        for token in run:
            self.ids.append(token)
            self.times.append(at)
            self.left -= 1
            text = self.stream.push(token) if self.stream else ""
            if self.stream and self.stream.stopped:
                self.reason = "stop"
            elif token in self.eos:
                self.reason = "eos"
            elif not self.left:
                self.reason = "length"
            if self.reason and self.stream:
                text += self.stream.close()
                self.reason = "stop" if self.stream.stopped else self.reason
            if text and self.on_token:
                self.on_token(self.index, text)
            if self.reason:
                return

    def result(self, start: float) -> Speculation:
        times, tokens = self.times, self.ids[self.prompt:]
        return Speculation(
            prompt_tokens=self.ids[:self.prompt], tokens=tokens, text=self.stream.text if self.stream else "",
            ttft_s=times[0] - start if times else None,
            tpot_s=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
            finish_reason=self.reason, rounds=self.rounds,
        )


def _check(model: Decoder, ids: list[Sequence[int]], max_tokens: int, gamma: int, stop: tuple[str, ...], cache: str | KVCache) -> None:
    if not ids:
        raise ValueError("prompts is empty: at least one is needed")
    for prompt in ids:
        if not len(prompt):
            raise ValueError("prompt is empty: at least one token is needed to start from")
        if isinstance(prompt, str):
            raise ValueError("prompt is a text, but this model's directory has no tokenizer.json; token ids are accepted")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: at least 1 is accepted")
    if type(gamma) is not int or gamma < 0:
        raise ValueError(f"gamma={gamma}: a whole number, 0 (draft nothing) or more, is accepted")
    if not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop={stop!r}: texts of at least one character are accepted")
    if stop and model.tokenizer is None:
        raise ValueError(f"stop={stop!r}: this model has no tokenizer, so its tokens have no text")
    if isinstance(cache, str):
        if cache not in KEEPERS:
            raise ValueError(f"cache={cache!r}: speculation takes tokens back; accepted are {', '.join(KEEPERS)}")
    elif len(cache.lengths) != len(ids) or any(cache.lengths.values()):
        raise ValueError(f"cache: it holds {list(cache.lengths.values())} tokens; {len(ids)} empty sequences are accepted")
    longest, limit = max(map(len, ids)), model.config.shape.max_context
    if limit and longest + max_tokens > limit:
        raise ValueError(f"prompt has {longest} tokens and max_tokens={max_tokens}: together {longest + max_tokens}, "
                         f"but the model's context is {limit}")
