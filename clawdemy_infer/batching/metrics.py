"""What serving was like: for each request, and for the whole. Seconds and bytes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NamedTuple

import numpy as np

from clawdemy_infer.batching.plan import Emission, Plan
from clawdemy_infer.batching.request import OUTCOMES, Sequence, State
from clawdemy_infer.model.writing import seconds_per_token


@dataclass(frozen=True)
class SLO:
    """A service level objective: the most seconds of TTFT, and of TPOT."""

    ttft_s: float = inf
    tpot_s: float = inf


class StepRecord(NamedTuple):
    """A step: sequences alive in it, tokens that counted and that were computed, blocks in use."""

    start_s: float
    end_s: float
    sequences: int
    tokens: int
    computed: int
    blocks: int

    @classmethod
    def of(cls, start_s: float, end_s: float, plan: Plan, emitted: Mapping[Sequence, Emission],
           blocks: int) -> "StepRecord":
        tokens = sum(plan.num_new_tokens.values())
        computed = len(plan.padded[0]) * plan.padded[1] if plan.padded else tokens
        tokens += sum(emission.num_tokens - 1 for emission in emitted.values())
        computed += sum(emission.num_draft_tokens for emission in emitted.values())
        return cls(start_s, end_s, len(plan.num_new_tokens), tokens, computed, blocks)


def ttft(sequence: Sequence) -> float | None:
    """Time to first token: from arrival, so queueing is in it; None where there is none."""
    return sequence.token_times[0] - sequence.arrival_s if sequence.token_times else None


def tpot(sequence: Sequence) -> float | None:
    """Time per output token, the mean of one request: see `seconds_per_token`."""
    return seconds_per_token(sequence.token_times)


def e2e(sequence: Sequence) -> float | None:
    """From arrival to the last token; None unless it finished."""
    finished = sequence.state is State.FINISHED
    return sequence.token_times[-1] - sequence.arrival_s if finished else None


def percentiles(name: str, values: Iterable[float | None]) -> dict[str, float | None]:
    """{name_p50, name_p95, name_p99}, by linear interpolation; of nothing, None."""
    values = [value for value in values if value is not None]
    found = np.percentile(values, (50, 95, 99)).tolist() if values else (None,) * 3
    return {f"{name}_p{p}": value for p, value in zip((50, 95, 99), found, strict=True)}


class Report:
    """What became of `sequences`, and the `steps` in their order. A server that is only seen from
    outside has no steps: what concerns steps, batch and blocks is then None."""

    def __init__(self, sequences: list[Sequence], steps: list[StepRecord], max_batch: int,
                 blocks: int, block_bytes: float = 0.0, slo: SLO | None = None) -> None:
        self.sequences, self.steps, self.slo = sequences, steps, slo or SLO()
        self.max_batch, self.blocks, self.block_bytes = max_batch, blocks, block_bytes

    @property
    def requests(self) -> list[dict]:
        return [{"id": s.request.id, "outcome": str(s.state), "reason": s.reason,
                 "ttft_s": ttft(s), "tpot_s": tpot(s), "e2e_s": e2e(s), "tokens": s.generated,
                 "prompt_tokens": s.prompt_tokens, "cached_tokens": s.num_cached_tokens,
                 "preemptions": s.preemptions} for s in self.sequences]

    @cached_property
    def finished(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.state is State.FINISHED]

    @cached_property
    def seconds(self) -> float:
        """From the first arrival to the last step; where there are no steps, to the last token."""
        arrivals = [sequence.arrival_s for sequence in self.sequences]
        if self.steps:
            return self.steps[-1].end_s - min([self.steps[0].start_s, *arrivals])
        return max([s.token_times[-1] - min(arrivals) for s in self.sequences if s.token_times],
                   default=0.0)

    def good(self, sequence: Sequence, slo: SLO | None = None) -> bool:
        """Did it finish within the SLO?"""
        slo = slo or self.slo
        return (sequence.state is State.FINISHED and ttft(sequence) <= slo.ttft_s
                and (tpot(sequence) or 0.0) <= slo.tpot_s)

    def goodput(self, slo: SLO | None = None) -> float:
        """Good requests per second (Zhong et al. 2024, DistServe)."""
        return self._rate(sum(self.good(sequence, slo) for sequence in self.sequences))

    @cached_property
    def summary(self) -> dict:
        """By name, over all requests unless it says otherwise:

            finished, cancelled, refused, failed    how many ended so
            seconds, *_per_s                        of the whole, and rates over it: requests and
                                                    input tokens of finished ones, output of all
            ttft_*, tpot_*, itl_*, e2e_*            seconds: p50, p95, p99. Inter-token latency is
                                                    every gap: a stall shows that TPOT averages away
            goodput                                 requests per second that met the SLO
            steps, busy                             how many; share of the seconds spent in them
            occupancy, kv_usage                     share of max_batch, of blocks: means over steps
            wasted                                  share of computed tokens: padding, failed drafts
            kv_peak_bytes                           most bytes in blocks in use
            cached                                  share of prompt tokens found in the prefix cache
            preemptions, drafted, accepted          times; draft tokens
        """
        sequences, prompts = self.sequences, sum(s.prompt_tokens for s in self.finished)
        gaps = [gap for s in sequences if tpot(s) for gap in np.diff(s.token_times)]
        return {
            **{str(state): sum(s.state is state for s in sequences) for state in OUTCOMES},
            "seconds": self.seconds, "requests_per_s": self._rate(len(self.finished)),
            "output_tokens_per_s": self._rate(sum(s.generated for s in sequences)),
            "input_tokens_per_s": self._rate(prompts), **percentiles("ttft", map(ttft, sequences)),
            **percentiles("tpot", map(tpot, sequences)), **percentiles("itl", gaps),
            **percentiles("e2e", map(e2e, sequences)), "goodput": self.goodput(), **self._of_steps,
            "cached": sum(s.num_cached_tokens for s in self.finished) / prompts if prompts else 0.0,
            **{name: sum(getattr(s, name) for s in sequences)
               for name in ("preemptions", "drafted", "accepted")},
        }

    def _rate(self, count: float) -> float:
        return count / self.seconds if self.seconds else 0.0

    @property
    def _of_steps(self) -> dict:
        names = "steps", "busy", "occupancy", "wasted", "kv_usage", "kv_peak_bytes"
        if not self.steps:
            return dict.fromkeys(names)
        start, end, alive, counted, computed, blocks = np.array(self.steps).T
        took, busy = end - start, float((end - start).sum())
        occupancy, usage = (float(took @ (x / most) / busy) if busy else 0.0     # means over time
                            for x, most in ((alive, self.max_batch), (blocks, self.blocks)))
        wasted = float(1 - counted.sum() / computed.sum())
        return dict(zip(names, (len(took), self._rate(busy), occupancy, wasted, usage,
                                int(blocks.max()) * self.block_bytes), strict=True))
