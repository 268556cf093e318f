"""The loop of speculative decoding: propose, read, verify, keep.

A forward pass at batch 1 streams all the weights for one row. With γ drafted tokens it streams them
once for γ + 1 rows, and brings up to γ + 1 tokens."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from clawdemy_infer.kv_cache import KVCache
from clawdemy_infer.model import Decoder, Generation, Sampling, sample
from clawdemy_infer.model.generate import CACHES, Text, check_generation, checked, keep, prompt_ids
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
    return checked(speculate_batch(
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
    texts = {sequence: Text(model, prompt, max_tokens, stop, on_token and partial(on_token, index))
             for index, (sequence, prompt) in enumerate(zip(cache.lengths, ids, strict=True))}
    prompts = {sequence: text.ids for sequence, text in texts.items()}
    rounds: dict[Hashable, list[Round]] = {sequence: [] for sequence in texts}
    try:
        # 2. Prefill, which gives the first token.
        draft.begin(model, cache, prompts)
        first = sample(model.step(prompts, cache), sampling, generator)[:, None]
        keep(zip(texts.values(), first.tolist(), strict=True))
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
            # 6. Keep what was accepted and the token after it. All but the last are cached.
            came = dict(zip(active, map(Round, drafted, verdict.accepted.tolist(),
                                        verdict.token.tolist()), strict=True))
            for sequence, round in came.items():
                rounds[sequence].append(round)
            keep((texts[sequence], [*mine[:count], token])
                 for sequence, (mine, count, token) in came.items())
            forget_rejected(active, cache)
    except KeyboardInterrupt:
        for text in texts.values():
            text.writer.reason = text.writer.reason or "interrupted"
    finally:
        forget_rejected(texts, cache)
    return [text.result(start, Speculation, rounds=rounds[sequence])
            for sequence, text in texts.items()]


def forget_rejected(texts: dict[Hashable, Text], cache: KVCache) -> None:
    """All but the last token of each text stays, as far as it was brought."""
    for sequence, text in texts.items():
        cache.truncate(min(cache.lengths[sequence], len(text.ids) - 1), sequence)
