"""Speculative beside plain decoding on the clock, and what its rounds should have gained by costs that were known apart from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.model import Decoder, Sampling, generate
from clawdemy_infer.speculative import theory
from clawdemy_infer.speculative.drafts import Draft, PromptLookup
from clawdemy_infer.speculative.rounds import Round, speculate_batch
from clawdemy_infer.speculative.verification import verify_rows
from clawdemy_infer.timing import alternate

Parts = dict[str | int, Callable[[], object]]
"""What a round is made of: the target reading so many rows, and by name a step of each draft."""


@dataclass(frozen=True)
class Costs:
    """Seconds of the target's forward pass by the rows of each sequence, and of one step of each draft; all at one context."""

    reading: dict[int, float]
    drafting: dict[str, float]

    @classmethod
    def of(cls, seconds: Mapping[str | int, float]) -> Costs:
        """From the seconds of each of the `parts`."""
        return cls({key: value for key, value in seconds.items() if isinstance(key, int)},
                   {key: value for key, value in seconds.items() if isinstance(key, str)})

    def c(self, draft: str) -> float:
        """A draft step, in steps of the target. 0 for a draft that runs no model."""
        return self.drafting.get(draft, 0.0) / self.reading[1]

    def v(self, rows: int) -> float:
        """A forward pass over so many rows, in steps of the target; between the known numbers, on a straight line."""
        known = sorted(self.reading)
        above = next((each for each in known if each >= rows), known[-1])
        below = max((each for each in known if each <= rows), default=known[0])
        share = (rows - below) / (above - below) if above > below else 0.0
        return ((1 - share) * self.reading[below] + share * self.reading[above]) / self.reading[1]


def parts(model: Decoder, drafts: Mapping[str, Draft], context: int, rows: Sequence[int] = (1, 2, 5, 9), batch: int = 1,
          sampling: Sampling | None = None) -> Parts:
    """The parts of a round behind `context` tokens, with the choosing that belongs to each; none of them is a round."""
    sampling = sampling or Sampling()
    generator = Sampling(seed=0).generator(model.device)
    made: Parts = {}

    def reading(new: int) -> Callable[[], object]:
        cache = ContiguousCache.for_model(model, batch, context + new)
        model.step({sequence: [1] * context for sequence in range(batch)}, cache)

        def run() -> None:
            cache.truncate(context)
            logits = model.step({sequence: [1] * new for sequence in range(batch)}, cache, last_only=False)
            verify_rows(logits, [[1] * (new - 1)] * batch, None, sampling, generator)
        return run

    def drafting(draft: Draft) -> Callable[[], object]:
        cache = ContiguousCache.for_model(model, batch, context + 16)
        texts = {sequence: [1] * (context + 1) for sequence in range(batch)}

        def run() -> None:
            draft.propose(texts, dict.fromkeys(texts, 1), sampling, generator)

        def begin() -> None:
            draft.begin(model, cache, texts)
            model.step({sequence: text[:-1] for sequence, text in texts.items()}, cache)
            run()                               # the first reads what it may not have read yet
        begin()
        return run

    for new in sorted({1, *rows}):
        made[new] = reading(new)
    for name, draft in drafts.items():
        if not isinstance(draft, PromptLookup):
            made[name] = drafting(draft)
    return made


def measure_costs(model: Decoder, drafts: Mapping[str, Draft], context: int, rows: Sequence[int] = (1, 2, 5, 9), batch: int = 1,
                  repeats: int = 7, sampling: Sampling | None = None) -> Costs:
    """Time the parts of a round, in turn."""
    made = parts(model, drafts, context, rows, batch, sampling)
    return Costs.of({name: timing.median for name, timing in alternate(made, repeats).items()})


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
    plain_s: float
    """Seconds per token of plain decoding, and the tokens that came out last of the first copy."""
    tokens: list[int]

    @property
    def alpha(self) -> float:
        """Share of the drafted tokens that stood, of those that were looked at."""
        return theory.mean_acceptance(self.rounds)

    @property
    def drafted_per_round(self) -> float:
        return sum(len(each.drafted) for each in self.rounds) / len(self.rounds)

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
            rows.append(Row(name, kind, gamma, rounds[name], costs.c(name), costs.v(gamma + 1), predicted, measured, identical,
                            median(seconds[""]), tokens[name][0]))
    return rows
