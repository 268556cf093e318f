"""What a run was like: for each request, and for the whole. Seconds and bytes.

    TTFT   time to first token: from arrival, so queueing is in it
    TPOT   time per output token: (last - first) / (tokens - 1), the mean of one request; None for fewer than two tokens
    ITL    inter-token latency: every single gap, of all requests together; a stall that TPOT averages away is seen here
    E2E    from arrival to the last token
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from clawdemy_infer.batching.request import OUTCOMES, Sequence, State


@dataclass(frozen=True)
class SLO:
    """A service level objective: a request is good if its first token came within `ttft_s` and the others, in the mean, within `tpot_s`."""

    ttft_s: float = float("inf")
    tpot_s: float = float("inf")


def ttft(sequence: Sequence) -> float | None:
    """Seconds from arrival to the first token; None where there is none."""
    return sequence.token_times[0] - sequence.arrival_s if sequence.token_times else None


def tpot(sequence: Sequence) -> float | None:
    """Seconds per output token after the first; None for fewer than two."""
    times = sequence.token_times
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def e2e(sequence: Sequence) -> float | None:
    """Seconds from arrival to the end; None unless it finished."""
    return sequence.token_times[-1] - sequence.arrival_s if sequence.state is State.FINISHED else None


def percentiles(name: str, values: Iterable[float | None]) -> dict[str, float | None]:
    """{name_p50, name_p95, name_p99}, by linear interpolation; of nothing, None."""
    values = [value for value in values if value is not None]
    found = np.percentile(values, (50, 95, 99)) if len(values) else (None,) * 3
    return {f"{name}_p{p}": None if value is None else float(value) for p, value in zip((50, 95, 99), found, strict=True)}


class Report:
    """A run that is over: its `sequences`, and its `steps` in order. There are none of a server that is only seen from outside: then what
    concerns steps, batch and blocks is None in the summary."""

    def __init__(self, sequences: list[Sequence], steps: list, max_batch: int, blocks: int, block_bytes: float = 0.0,
                 slo: SLO | None = None) -> None:
        self.sequences, self.steps, self.slo = sequences, steps, slo or SLO()
        self.max_batch, self.blocks, self.block_bytes = max_batch, blocks, block_bytes

    @property
    def requests(self) -> list[dict]:
        """A row for each request."""
        return [{
            "id": s.request.id, "outcome": str(s.state), "reason": s.reason, "ttft_s": ttft(s), "tpot_s": tpot(s), "e2e_s": e2e(s),
            "tokens": s.generated, "prompt_tokens": s.prompt_tokens, "cached_tokens": s.cached, "preemptions": s.preemptions,
        } for s in self.sequences]

    @cached_property
    def finished(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.state is State.FINISHED]

    @cached_property
    def seconds(self) -> float:
        """From the first arrival to the last step, or where there are no steps, to the last token."""
        arrivals = [sequence.arrival_s for sequence in self.sequences]
        if self.steps:
            return self.steps[-1].end_s - min([self.steps[0].start_s, *arrivals])
        return max([s.token_times[-1] - min(arrivals) for s in self.sequences if s.token_times], default=0.0)

    def good(self, sequence: Sequence, slo: SLO | None = None) -> bool:
        """Did it finish within the SLO, and by its deadline?"""
        slo, deadline = slo or self.slo, sequence.request.deadline_s
        return (sequence.state is State.FINISHED and ttft(sequence) <= slo.ttft_s and (tpot(sequence) or 0.0) <= slo.tpot_s
                and (deadline is None or e2e(sequence) <= deadline))

    def goodput(self, slo: SLO | None = None) -> float:
        """Good requests per second (Zhong et al. 2024, DistServe). Without an SLO: all that finished by their deadlines."""
        return sum(self.good(sequence, slo) for sequence in self.sequences) / self.seconds if self.seconds else 0.0

    def gaps(self) -> np.ndarray:
        """Every inter-token latency of every request."""
        gaps = [np.diff(sequence.token_times) for sequence in self.sequences if len(sequence.token_times) > 1]
        return np.concatenate(gaps) if gaps else np.empty(0)

    @cached_property
    def summary(self) -> dict:
        """The whole run in one dictionary."""
        seconds = self.seconds
        prompts = sum(sequence.prompt_tokens for sequence in self.finished)
        outcomes = {str(state): sum(s.state is state for s in self.sequences) for state in OUTCOMES}

        def rate(count: float) -> float:
            return count / seconds if seconds else 0.0

        return {
            **outcomes, "seconds": seconds,
            "requests_per_s": rate(len(self.finished)),
            "output_tokens_per_s": rate(sum(sequence.generated for sequence in self.sequences)),
            "input_tokens_per_s": rate(prompts),
            **percentiles("ttft", map(ttft, self.sequences)), **percentiles("tpot", map(tpot, self.sequences)),
            **percentiles("itl", self.gaps()), **percentiles("e2e", map(e2e, self.sequences)),
            "goodput": self.goodput(), **self._of_steps,
            "cached": sum(s.cached for s in self.finished) / prompts if prompts else 0.0,
            "preemptions": sum(sequence.preemptions for sequence in self.sequences),
            "drafted": sum(sequence.drafted for sequence in self.sequences),
            "accepted": sum(sequence.accepted for sequence in self.sequences),
        }

    @property
    def _of_steps(self) -> dict:
        steps = self.steps
        if not steps:
            return dict.fromkeys(("steps", "busy", "occupancy", "wasted", "kv_usage", "kv_peak_bytes"))
        busy = sum(step.end_s - step.start_s for step in steps)
        computed = sum(step.computed * step.steps for step in steps)
        counted = sum(step.tokens * step.steps for step in steps)

        def mean(values: Iterable[float]) -> float:
            """Over the time that steps took."""
            weighted = sum(value * (step.end_s - step.start_s) for value, step in zip(values, steps, strict=True))
            return weighted / busy if busy else 0.0

        return {
            "steps": sum(step.steps for step in steps),
            "busy": busy / self.seconds if self.seconds else 0.0,               # share of the time that somebody was served
            "occupancy": mean(step.sequences / self.max_batch for step in steps),
            "wasted": 1 - counted / computed,                                   # share of the computed tokens that was padding
            "kv_usage": mean(step.blocks / self.blocks for step in steps),
            "kv_peak_bytes": max(step.blocks for step in steps) * self.block_bytes,
        }
