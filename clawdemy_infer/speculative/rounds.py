"""The loop of speculative decoding: propose, read, verify, keep.

A forward pass at batch 1 streams all the weights for one row. With γ drafted tokens it streams them
once for γ + 1 rows, and brings up to γ + 1 tokens.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from clawdemy_infer.kv_cache import KVCache
from clawdemy_infer.model import Decoder, Generation, Sampling, sample
from clawdemy_infer.model.generate import CACHES, check_generation, prompt_ids, unless_failed
from clawdemy_infer.model.writing import Writer, uninterrupted
from clawdemy_infer.speculative.drafts import Draft
from clawdemy_infer.speculative.verification import verify_rows
from clawdemy_infer.timing import now


class Round(NamedTuple):
    """What was drafted for a sequence, how many of it were accepted, and the token that the target
    put after those, or `NOTHING`. The text may end before all of them."""

    drafted: list[int]
    accepted: int
    token: int


@dataclass(frozen=True)
class Speculation(Generation):
    """A generation, and the rounds that brought `tokens[1:]`: the first token is the prefill's."""

    rounds: list[Round] = field(default_factory=list)


def speculate(model: Decoder, prompt: str | Sequence[int], draft: Draft, max_tokens: int = 64,
              sampling: Sampling | None = None, *, gamma: int = 4, stop: str | Sequence[str] = (),
              on_token: Callable[[str], None] | None = None,
              cache: str | KVCache = "contiguous") -> Speculation:
    """`model.generate` with a `draft` that proposes `gamma` tokens at a time. Greedy: the same
    tokens. Else: the same distribution. `cache` is "contiguous" or "paged", or an empty cache for
    one sequence that can be truncated. Raises ValueError, as `generate`, and for a gamma below 0
    and a draft that does not fit the model."""
    pieces = on_token and (lambda index, piece: on_token(piece))
    return unless_failed(speculate_batch(
        model, [prompt], draft, max_tokens, sampling, gamma=gamma, stop=stop, on_token=pieces,
        cache=cache)[0])


def speculate_batch(model: Decoder, prompts: Sequence[str | Sequence[int]], draft: Draft,
                    max_tokens: int = 64, sampling: Sampling | None = None, *, gamma: int = 4,
                    stop: str | Sequence[str] = (),
                    on_token: Callable[[int, str], None] | None = None,
                    cache: str | KVCache = "contiguous") -> list[Speculation]:
    """The same for several prompts at once: each sequence keeps its own number of tokens a round,
    and leaves when it has ended, or has "failed" since the target's logits leave it nothing to
    choose. `on_token` gets the index of the prompt and a piece of its text; if it raises, what came
    in that round is said of all, and then the first error comes out. All draw from one generator: a
    seed repeats the whole batch."""
    # 1. Check, and make a cache.
    start, sampling = now(), sampling or Sampling()
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    ids = [prompt_ids(model, prompt) for prompt in prompts]
    if not ids:
        raise ValueError("prompts is empty: at least one is needed")
    if type(gamma) is not int or gamma < 0:
        raise ValueError(f"gamma={gamma}: a whole number, 0 (draft nothing) or more, is accepted")
    for prompt in ids:
        check_generation(model, prompt, max_tokens, stop, "contiguous")
    if isinstance(cache, str):
        if cache not in CACHES:
            raise ValueError(f"cache={cache!r}: speculation takes tokens back; accepted are "
                             f"{', '.join(CACHES)}")
        cache = CACHES[cache](model, len(ids), max(map(len, ids)) + max_tokens)
    elif len(cache.lengths) != len(ids) or any(cache.lengths.values()):
        raise ValueError(f"cache: it holds {list(cache.lengths.values())} tokens; {len(ids)} empty "
                         "sequences are accepted")
    generator = sampling.generator(model.device)
    texts = {sequence: _Text(model, index, prompt, max_tokens, stop)
             for index, (sequence, prompt) in enumerate(zip(cache.lengths, ids, strict=True))}
    prompts = {sequence: text.ids for sequence, text in texts.items()}
    try:
        # 2. Prefill, which gives the first token.
        draft.begin(model, cache, prompts)
        first = sample(model.step(prompts, cache), sampling, generator).tolist()
        keep(zip(texts.values(), [Round([], 0, token) for token in first], strict=True), on_token)
        while active := {each: text for each, text in texts.items() if not text.writer.reason}:
            # 3. Propose. The target's own token comes on top of what is drafted.
            known = {sequence: text.ids for sequence, text in active.items()}
            counts = {each: min(gamma, text.writer.left - 1) for each, text in active.items()}
            drafted, q = draft.propose(known, counts, sampling, generator)
            # 4. Read: logits [M, V] behind each text and behind each drafted token.
            new = {sequence: [ids[-1], *tokens] for (sequence, ids), tokens
                   in zip(known.items(), drafted, strict=True)}
            logits = model.step(new, cache, logits_to_keep=0)
            # 5. Verify.
            verdict = verify_rows(logits, drafted, q, sampling, generator)
            accepted, tokens = verdict.accepted.tolist(), verdict.token.tolist()
            # 6. Keep what was accepted and the token after it. All but the last are cached.
            keep(zip(active.values(), map(Round, drafted, accepted, tokens), strict=True), on_token)
            forget_rejected(texts, cache)
    except KeyboardInterrupt:
        for text in texts.values():
            text.writer.reason = text.writer.reason or "interrupted"
    finally:
        forget_rejected(texts, cache)
    return [text.result(start) for text in texts.values()]


class _Text:
    """One sequence: its prompt, what was written, and when which token came."""

    def __init__(self, model: Decoder, index: int, prompt: list[int], max_tokens: int,
                 stop: tuple[str, ...]) -> None:
        self.index, self.ids, self.prompt = index, list(prompt), prompt
        self.writer = Writer(max_tokens, model.config.eos_ids, model.tokenizer, stop)
        self.rounds, self.times = [], []            # the prefill's round first

    def take(self, round: Round) -> str:
        """Take its tokens as far as the text goes on; return the text that they settle."""
        self.rounds.append(round)
        taken, piece = self.writer.take([*round.drafted[:round.accepted], round.token])
        self.ids += taken
        self.times += [now()] * len(taken)
        return piece

    def result(self, start: float) -> Speculation:
        times, stream = self.times, self.writer.stream
        return Speculation(
            prompt_tokens=self.prompt, tokens=self.ids[len(self.prompt):],
            text=stream.text if stream else "", ttft_s=times[0] - start if times else None,
            tpot_s=(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None,
            finish_reason=self.writer.reason, rounds=self.rounds[1:])


def keep(rounds: Iterable[tuple[_Text, Round]],
         on_token: Callable[[int, str], None] | None) -> None:
    """Each text takes what came. Then all of it is said, even if a call raises or Ctrl-C comes."""
    with uninterrupted():
        pieces = [(text.index, text.take(round)) for text, round in rounds]
        unsaid = iter([each for each in pieces if each[1] and on_token])
        try:
            for each in unsaid:
                on_token(*each)
        finally:
            for each in unsaid:                     # behind a call that raised, whose error comes out
                with suppress(Exception):
                    on_token(*each)


def forget_rejected(texts: dict[Hashable, _Text], cache: KVCache) -> None:
    """All but the last token of each text is kept, as far as it was brought."""
    for sequence, text in texts.items():
        cache.truncate(min(cache.lengths[sequence], len(text.ids) - 1), sequence)
