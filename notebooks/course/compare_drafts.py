"""Speculative beside plain decoding on the clock, and what its rounds should gain by the parts of a
round, which are timed apart from them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import nan
from statistics import median

import numpy as np
import torch

from clawdemy_course import theory
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.model import Decoder, Sampling, generate, probabilities, sample
from clawdemy_infer.speculative.drafts import Draft, PromptLookup
from clawdemy_infer.speculative.rounds import Round, speculate_batch
from clawdemy_infer.speculative.verification import verify_rows
from clawdemy_infer.timing import alternate


@dataclass(frozen=True)
class RoundCosts:
    """Seconds of the parts of a round: the target's pass by its rows of each sequence, a step of
    each draft by its name.

    >>> costs = RoundCosts({1: 2.0, 5: 3.0, "int8": 0.5})
    >>> costs.c("int8"), costs.v(3)
    (0.25, 1.25)
    """

    seconds: dict[str | int, float]

    def c(self, draft: str) -> float:
        """A draft step, in steps of the target. 0 for a draft that runs no model."""
        return self.seconds.get(draft, 0.0) / self.seconds[1]

    def v(self, rows: int) -> float:
        """A pass over `rows` rows, in steps of the target; on a line between the known ones."""
        known = sorted(part for part in self.seconds if isinstance(part, int))
        seconds = np.interp(rows, known, [self.seconds[part] for part in known])
        return float(seconds) / self.seconds[1]


@torch.inference_mode()
def acceptances(model: Decoder, drafts: Mapping[str, Draft], prompts: Sequence[Sequence[int]],
                max_tokens: int, sampling: Sampling | None = None,
                ) -> tuple[list[list[int]], dict[str, list[list[float]]]]:
    """The target writes up to `max_tokens` tokens behind each prompt: the texts. By draft, for each
    text and each token but its first, the chance that a token drafted in its place is accepted, the
    sum of min(p, q): 0 or 1 where greedy, NaN where nothing is drafted.

    All places count, as rounds look at a token only behind what the target has written.
    """
    sampling = sampling or Sampling()
    generator = sampling.generator(model.device)
    cache = ContiguousCache.for_model(model, len(prompts), max(map(len, prompts)) + max_tokens)
    texts = {sequence: list(prompt) for sequence, prompt in enumerate(prompts)}
    found: dict[str, list[list[float]]] = {name: [[] for _ in prompts] for name in drafts}
    for draft in drafts.values():
        draft.begin(model, cache, texts)
    active, logits = texts, model.step(texts, cache)
    for left in reversed(range(max_tokens)):
        for text, token in zip(active.values(), sample(logits, sampling, generator).tolist(),
                               strict=True):
            text.append(token)
        active = {sequence: text for sequence, text in active.items()
                  if left and text[-1] not in model.config.eos_ids}
        if not active:
            break
        proposals = {name: draft.propose(active, dict.fromkeys(active, 1), sampling, generator)
                     for name, draft in drafts.items()}
        logits = model.step({sequence: text[-1:] for sequence, text in active.items()}, cache)
        p = probabilities(logits, sampling)                                     # [B, V]
        for name, (tokens, q) in proposals.items():
            for row, (sequence, drafted) in enumerate(zip(active, tokens, strict=True)):
                chance = (p[row, drafted] if q is None else torch.minimum(p[row], q[row, 0])).sum()
                found[name][sequence].append(float(chance) if drafted else nan)
    return list(texts.values()), found


def greedy_rounds(accepted: Sequence[float], gamma: int) -> list[Round]:
    """The rounds of a text of which we know, of each token but the first, whether one drafted in
    its place is accepted: 1, 0, or NaN where nothing is drafted. Tokens of a round are not named.

    >>> greedy_rounds([1, 1, 0, 1], gamma=4)            # 2 of 3, a correction; none, the last token
    [Round(drafted=[0, 0, 0], accepted=2, token=0), Round(drafted=[], accepted=0, token=0)]
    """
    rounds, place = [], 0
    while place < len(accepted):
        most = accepted[place:place + min(gamma, len(accepted) - place - 1)]
        known = list(takewhile(lambda each: each == each, most))
        right = len(list(takewhile(bool, known)))
        rounds.append(Round([0] * len(known), right, 0))
        place += right + 1
    return rounds


def round_parts(model: Decoder, drafts: Mapping[str, Draft], context: int,
                rows: Sequence[int] = (1, 2, 5, 9), batch: int = 1,
                sampling: Sampling | None = None) -> dict[str | int, Callable[[], None]]:
    """The parts of a round behind `context` tokens, each with its sampling; none is a round."""
    sampling = sampling or Sampling()
    generator = Sampling(seed=0).generator(model.device)

    def target_pass(new: int) -> Callable[[], None]:
        cache = ContiguousCache.for_model(model, batch, context + new)
        model.step({sequence: [1] * context for sequence in range(batch)}, cache)
        tokens = {sequence: [1] * new for sequence in range(batch)}

        def run() -> None:
            cache.truncate(context)
            logits = model.step(tokens, cache, logits_to_keep=0)
            verify_rows(logits, [[1] * (new - 1)] * batch, None, sampling, generator)
        return run

    def draft_step(draft: Draft) -> Callable[[], None]:
        cache = ContiguousCache.for_model(model, batch, context + 16)
        texts = {sequence: [1] * (context + 1) for sequence in range(batch)}

        def run() -> None:
            draft.propose(texts, dict.fromkeys(texts, 1), sampling, generator)
        draft.begin(model, cache, texts)
        model.step({sequence: text[:-1] for sequence, text in texts.items()}, cache)
        run()                                   # the first reads what it may not have read yet
        return run

    return {new: target_pass(new) for new in sorted({1, *rows})} | {
        name: draft_step(draft) for name, draft in drafts.items()
        if not isinstance(draft, PromptLookup)}


def measure_costs(model: Decoder, drafts: Mapping[str, Draft], context: int,
                  rows: Sequence[int] = (1, 2, 5, 9), batch: int = 1, repeats: int = 7,
                  sampling: Sampling | None = None) -> RoundCosts:
    """Time the parts of a round, in turn."""
    timings = alternate(round_parts(model, drafts, context, rows, batch, sampling), repeats)
    return RoundCosts({part: timing.median for part, timing in timings.items()})


@dataclass(frozen=True)
class DraftRow:
    """One draft on one prompt. Speed-ups are over plain decoding: `predicted` by the rounds played
    and the costs, `measured` by the clock. `plain_s`: seconds per token of plain decoding;
    `identical`: are the greedy tokens the same? None for sampling."""

    draft: str
    prompt: str
    gamma: int
    rounds: list[Round]
    c: float
    v: float
    predicted: float
    measured: float
    identical: bool | None
    plain_s: float
    tokens: list[int]

    @property
    def alpha(self) -> float:
        """The acceptance rate: accepted tokens over those that were verified."""
        return theory.acceptance_rate(self.rounds)

    @property
    def tokens_per_round(self) -> float:
        return sum(each.accepted + 1 for each in self.rounds) / len(self.rounds)


def compare_drafts(model: Decoder, drafts: Mapping[str, Draft],
                   prompts: Mapping[str, str | Sequence[int]], costs: RoundCosts, gamma: int = 4,
                   max_tokens: int = 64, sampling: Sampling | None = None, batch: int = 1,
                   repeats: int = 3) -> list[DraftRow]:
    """Decode each prompt plainly and with each draft, in turn, `batch` copies of it at once.
    Seconds are per token of decoding, without prefills; sampled texts differ by draft."""
    sampling, rows, plain = sampling or Sampling(), [], ""
    for kind, prompt in prompts.items():
        seconds: dict[str, list[float]] = {name: [] for name in (plain, *drafts)}
        rounds: dict[str, list[Round]] = {name: [] for name in seconds}
        tokens = {}
        for _ in range(repeats):
            for name in seconds:
                if name == plain and batch == 1:
                    done = [generate(model, prompt, max_tokens, sampling)]
                else:                           # plain decoding of a batch is a draft of 0 tokens
                    draft, size = (PromptLookup(), 0) if name == plain else (drafts[name], gamma)
                    done = speculate_batch(model, [prompt] * batch, draft, max_tokens, sampling,
                                           gamma=size)
                    rounds[name] += [each for one in done for each in one.rounds]
                tokens[name] = [one.tokens for one in done]
                seconds[name].append(median(one.tpot_s for one in done))
        for name in drafts:
            measured = median(slow / fast for slow, fast in
                              zip(seconds[plain], seconds[name], strict=True))
            rows.append(DraftRow(
                name, kind, gamma, rounds[name], costs.c(name), costs.v(gamma + 1),
                theory.speedup_of(rounds[name], costs.c(name), costs.v), measured,
                tokens[name] == tokens[plain] if sampling.temperature == 0 else None,
                median(seconds[plain]), tokens[name][0]))
    return rows
