"""A run as a picture: which request was in which phase when."""

from typing import NamedTuple

from clawdemy_infer.batching.metrics import Report
from clawdemy_infer.batching.request import Sequence, State

PHASES = ("waiting", "prefill", "decode", "preempted")


class Span(NamedTuple):
    """One sequence in one phase, from one time to another."""

    phase: str
    start_s: float
    end_s: float


def spans(sequence: Sequence) -> list[Span]:
    """The phases of one sequence, from its arrival to its end. Running is prefill up to the first
    token, and decode after it; what is computed anew after a preemption counts as decode."""
    found: list[Span] = []
    first = sequence.token_times[0] if sequence.token_times else float("inf")
    for (start, state), (end, _) in zip(sequence.history, sequence.history[1:], strict=False):
        if state is not State.RUNNING:
            found.append(Span(str(state), start, end))
            continue
        if start < first:
            found.append(Span("prefill", start, min(first, end)))
        if first < end:
            found.append(Span("decode", max(first, start), end))
    return found


def draw_gantt(axes, report: Report, colours: dict[str, str]) -> None:
    """A bar for each request, by arrival, on matplotlib `axes`; `colours` for each of `PHASES`."""
    rows = sorted(report.sequences, key=lambda sequence: sequence.arrival_s)
    for row, sequence in enumerate(rows):
        pieces = spans(sequence)
        axes.broken_barh([(start, end - start) for _, start, end in pieces], (row - 0.4, 0.8),
                         facecolors=[colours[phase] for phase, _, _ in pieces])
    axes.set_ylim(len(rows) - 0.5, -0.5)
