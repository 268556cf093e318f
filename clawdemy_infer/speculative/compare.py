"""Speculative beside plain decoding on the clock, and what its rounds should have gained by costs that were measured apart from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.model import Decoder, Sampling, generate
from clawdemy_infer.speculative import theory
from clawdemy_infer.speculative.drafts import Draft, ModelDraft, PromptLookup
from clawdemy_infer.speculative.rounds import Round, speculate_batch
from clawdemy_infer.timing import alternate


@dataclass(frozen=True)
class Costs:
    """Seconds of the target's forward pass by the rows of each sequence, and of one step of each draft; all at one context."""

    reading: dict[int, float]
    drafting: dict[str, float]

    def c(self, draft: str) -> float:
        """A draft step, in steps of the target. 0 for a draft that runs no model."""
        return self.drafting.get(draft, 0.0) / self.reading[1]

    def v(self, rows: int) -> float:
        """A forward pass over so many rows, in steps of the target; between the measured numbers, on a straight line."""
        known = sorted(self.reading)
        above = next((each for each in known if each >= rows), known[-1])
        below = max((each for each in known if each <= rows), default=known[0])
        share = (rows - below) / (above - below) if above > below else 0.0
        return ((1 - share) * self.reading[below] + share * self.reading[above]) / self.reading[1]


def measure_costs(model: Decoder, drafts: Mapping[str, Draft], context: int, rows: Sequence[int] = (1, 2, 4, 8), batch: int = 1,
                  repeats: int = 7) -> Costs:
    """Time the parts of a round, in turn, behind `context` tokens: none of them is a round."""
    models = {name: draft.model for name, draft in drafts.items() if isinstance(draft, ModelDraft)}
    work = {}

    def step(decoder: Decoder, new: int):
        cache = ContiguousCache.for_model(decoder, batch, context + new)
        decoder.step({sequence: [1] * context for sequence in range(batch)}, cache)

        def run() -> None:
            cache.truncate(context)
            decoder.step({sequence: [1] * new for sequence in range(batch)}, cache, last_only=False)
        return run

    for new in sorted({1, *rows}):
        work[new] = step(model, new)
    for name, decoder in models.items():
        work[name] = step(decoder, 1)
    seconds = {name: timing.median for name, timing in alternate(work, repeats).items()}
    return Costs({new: seconds[new] for new in work if isinstance(new, int)}, {name: seconds[name] for name in models})


@dataclass(frozen=True)
class Row:
    """One draft on one prompt. `predicted` and `measured` are speed-ups over plain decoding of the same target: `predicted` knows the
    rounds that were played and the costs, `measured` the clock. `identical`: greedy tokens as in plain decoding; None for sampling.
    """

    draft: str
    prompt: str
    gamma: int
    rounds: list[Round]
    c: float
    v: float
    predicted: float
    measured: float
    identical: bool | None

    @property
    def alpha(self) -> float:
        """Share of the drafted tokens that stood, of those that were looked at."""
        return theory.mean_acceptance(self.rounds)

    @property
    def tokens_per_round(self) -> float:
        return sum(each.accepted + 1 for each in self.rounds) / len(self.rounds)


def compare(model: Decoder, drafts: Mapping[str, Draft], prompts: Mapping[str, str | Sequence[int]], costs: Costs, gamma: int = 4,
            max_tokens: int = 64, sampling: Sampling | None = None, batch: int = 1, repeats: int = 3) -> list[Row]:
    """Decode each prompt plainly and with each draft, in turn, `batch` copies of it at once. Prefills are not in the times.

    What is compared is seconds per token of decoding; a sampled text is another one with each draft.
    """
    sampling = sampling or Sampling()
    rows = []
    for kind, prompt in prompts.items():
        seconds: dict[str, list[float]] = {name: [] for name in ("", *drafts)}
        rounds: dict[str, list[Round]] = {name: [] for name in drafts}
        tokens = {}
        for _ in range(repeats):
            for name in seconds:
                if name or batch > 1:
                    draft, size = (drafts[name], gamma) if name else (PromptLookup(), 0)
                    done = speculate_batch(model, [prompt] * batch, draft, max_tokens, sampling, gamma=size)
                    if name:
                        rounds[name] += [each for one in done for each in one.rounds]
                else:
                    done = [generate(model, prompt, max_tokens, sampling)]
                tokens[name] = [one.tokens for one in done]
                seconds[name].append(median(one.tpot_s for one in done))
        for name in drafts:
            measured = median(plain / fast for plain, fast in zip(seconds[""], seconds[name], strict=True))
            predicted = theory.speedup_of(rounds[name], costs.c(name), costs.v)
            identical = tokens[name] == tokens[""] if sampling.temperature == 0 else None
            rows.append(Row(name, kind, gamma, rounds[name], costs.c(name), costs.v(gamma + 1), predicted, measured, identical))
    return rows
