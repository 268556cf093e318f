"""Nine figures that are on no data sheet, fitted in the open: how much longer things take than a data sheet says.

    an operation    (compute^p + memory^p)^(1/p) + unpack: the larger of the two as p grows, their sum at p = 1
    a row           its operations, a gap after every kernel, and what the devices tell one another

The figures minimise the sum of |ln(predicted / published)| over rows; a source with n rows has the weight sqrt(n), so that a long
table does not drown a short one, and an outlier counts by its distance and not by its square. A spring, hold * ln(figure / start)^2,
keeps each figure near a round number where few rows speak of it: with hold 0.2, a factor of two costs a tenth of one row's 100 %.
It is stiff for the two that set Apple apart, which stay neutral unless the rows insist. No figure belongs to a row, a model or a source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clawdemy_infer.published.plans import Plan


@dataclass(frozen=True)
class Figure:
    """One fitted figure: where the search begins, how firmly it is held there, in which unit, and what it says."""

    start: float
    hold: float
    unit: str
    meaning: str


FIGURES = {
    "bandwidth": Figure(0.8, 0.2, "of the data sheet", "bandwidth that kernels reach"),
    "unified_bandwidth": Figure(1.0, 2.5, "times that", "the same, on Apple's unified memory"),
    "tile": Figure(0.8, 0.2, "of the peak", "FLOP/s inside an output tile of a matrix product"),
    "unified_compute": Figure(1.0, 2.5, "times that", "the same, on Apple's GPU cores, which have no matrix unit"),
    "overlap": Figure(3.0, 0.2, "", "p: how well computing hides behind fetching; 1 not at all, infinity wholly"),
    "gap": Figure(7000.0, 0.2, "clock cycles", "from one kernel to the next: launch, fill, drain"),
    "unpack": Figure(2.0, 0.2, "vector FLOPs", "for each quantized weight, every time a tile needs it; not hidden"),
    "all_reduce": Figure(6.6e-6, 0.2, "s", "for each all-reduce, before a byte of it moves; starts at NCCL's own figure"),
    "link": Figure(0.7, 0.2, "of the data sheet", "bandwidth of the link between devices"),
}
Figures = dict[str, float]
IDEAL: Figures = dict.fromkeys(FIGURES, 1.0) | {"overlap": 64.0, "gap": 0.0, "unpack": 0.0, "all_reduce": 0.0}
"""Every data sheet true and nothing else costing anything: the naive bound, kernel by kernel."""


class Stack:
    """Plans side by side in arrays, so that a few hundred rows are predicted at once."""

    def __init__(self, plans: Sequence[Plan]):
        self.count = len(plans)
        self.row = np.repeat(np.arange(self.count), [len(plan.ops) for plan in plans])
        ops = [op for plan in plans for op in plan.ops]
        self.compute, self.memory, self.unpack, self.filled = (np.array([op[i] for op in ops], dtype=float) for i in range(4))
        self.unified = np.array([plan.chip.unified for plan in plans], dtype=bool)
        self.cycles = np.array([plan.kernels / (1e9 * plan.chip.GHz) for plan in plans])
        self.all_reduces = np.array([plan.all_reduces for plan in plans])
        self.sent = np.array([plan.sent for plan in plans])

    def terms(self, figures: Figures) -> dict[str, np.ndarray]:
        """Seconds of each row by cause; `compute` is what an operation takes beyond its fetching."""
        on_unified = self.unified[self.row]
        memory = self.memory / np.where(on_unified, figures["bandwidth"] * figures["unified_bandwidth"], figures["bandwidth"])
        tile = np.where(on_unified, figures["tile"] * figures["unified_compute"], figures["tile"])
        compute = self.compute / (tile * self.filled)
        longer, shorter = np.maximum(memory, compute), np.minimum(memory, compute)
        share = np.divide(shorter, longer, out=np.zeros_like(longer), where=longer > 0)
        together = longer * (1 + share ** figures["overlap"]) ** (1 / figures["overlap"])    # so that no power overflows

        def by_row(seconds: np.ndarray) -> np.ndarray:
            return np.bincount(self.row, seconds, minlength=self.count)

        return {
            "memory": by_row(memory),
            "compute": by_row(together - memory),
            "unpack": by_row(self.unpack) * figures["unpack"],
            "fixed": self.cycles * figures["gap"],
            "communication": self.all_reduces * figures["all_reduce"] + self.sent / figures["link"],
        }

    def seconds(self, figures: Figures) -> np.ndarray:
        return sum(self.terms(figures).values())


def fit(plans: Sequence[Plan], seconds: Sequence[float], groups: Sequence[str]) -> Figures:
    """The figures that suit `plans` whose sources published `seconds`; `groups` names the source of each.

    A pattern search: one figure at a time is tried a little higher and a little lower, in proportion, and the stride shrinks where
    neither helps. The same rows give the same figures.
    """
    stack, published = Stack(plans), np.log(seconds)
    sizes = {group: groups.count(group) for group in groups}
    weight = np.array([sizes[group] ** -0.5 for group in groups])

    def misfit(figures: Figures) -> float:
        held = sum(figure.hold * np.log(figures[name] / figure.start) ** 2 for name, figure in FIGURES.items())
        return float(weight @ np.abs(np.log(stack.seconds(figures)) - published) + held)

    figures = {name: figure.start for name, figure in FIGURES.items()}
    stride, best = dict.fromkeys(figures, 0.3), misfit(figures)
    for _ in range(80):
        for name in figures:
            for towards in (1, -1):
                tried = figures | {name: figures[name] * np.exp(towards * stride[name])}
                if not (FIGURES[name].unit.startswith("of the") and tried[name] > 1) and (found := misfit(tried)) < best - 1e-9:
                    figures, best = tried, found
                    stride[name] *= 1.2
                    break
            else:
                stride[name] *= 0.6
        if max(stride.values()) < 0.002:
            break
    return {name: float(value) for name, value in figures.items()}
