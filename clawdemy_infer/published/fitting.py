"""Nine figures that are on no data sheet: how much longer things take than a data sheet says.

    an operation   (compute^p + memory^p)^(1/p) + unpack: the larger as p grows, the sum at p = 1
    a row          its operations, a gap after every kernel, and what the devices tell one another

The figures minimise the sum of |ln(predicted / published)| over rows; a source with n rows has the
weight sqrt(n), so that a long table does not drown a short one. A spring, hold * ln(figure /
start)^2, keeps each figure near a round number where few rows speak of it: with hold 0.2, a factor
of two costs a tenth of one row's 100 %. No figure belongs to a row, a model or a source.
"""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import numpy as np

from clawdemy_infer.published.demand import Demand
from clawdemy_infer.published.rows import RULES

Figures = dict[str, float]
FIGURES = {name: SimpleNamespace(**stated) for name, stated in RULES["figures"].items()}
START: Figures = {name: figure.start for name, figure in FIGURES.items()}


class Stack:
    """Demands side by side in arrays, so that a few hundred rows are predicted at once."""

    def __init__(self, demands: Sequence[Demand]) -> None:
        self.count = len(demands)
        self.row = np.repeat(np.arange(self.count), [len(one.ops) for one in demands])
        ops = np.array([op for one in demands for op in one.ops], dtype=float).reshape(-1, 4)
        self.compute, self.memory, self.unpack, self.filled = ops.T
        self.unified, self.cycles, self.all_reduces, self.sent = np.array([
            (one.chip.unified, one.kernels / (1e9 * one.chip.GHz), one.all_reduces, one.sent)
            for one in demands]).T

    def terms(self, figures: Figures) -> dict[str, np.ndarray]:
        """Seconds of each row by cause; `compute` is what operations take beyond fetching."""
        def of(name: str, unified: str) -> np.ndarray:
            return figures[name] * np.where(self.unified[self.row], figures[unified], 1.0)

        memory = self.memory / of("bandwidth", "unified_bandwidth")
        compute = self.compute / (of("tile", "unified_compute") * self.filled)
        # The larger one is factored out, so that no power overflows.
        longer, shorter = np.maximum(memory, compute), np.minimum(memory, compute)
        share = np.divide(shorter, longer, out=np.zeros_like(longer), where=longer > 0)
        together = longer * (1 + share ** figures["overlap"]) ** (1 / figures["overlap"])
        by_row = partial(np.bincount, self.row, minlength=self.count)
        return {
            "memory": by_row(memory), "compute": by_row(together - memory),
            "unpack": by_row(self.unpack) * figures["unpack"],
            "fixed": self.cycles * figures["gap"],
            "communication": self.all_reduces * figures["all_reduce"] + self.sent / figures["link"]}

    def seconds(self, figures: Figures) -> np.ndarray:
        return sum(self.terms(figures).values())


def fit(demands: Sequence[Demand], seconds: Sequence[float], groups: Sequence[str]) -> Figures:
    """The figures that suit `demands` whose sources, named by `groups`, published `seconds`. A
    pattern search: one figure at a time is tried a little higher and a little lower, in proportion,
    and its stride shrinks where neither helps."""
    stack, published = Stack(demands), np.log(seconds)
    weight = np.array([groups.count(group) ** -0.5 for group in groups])

    def misfit(figures: Figures) -> float:
        held = sum(figure.hold * np.log(figures[name] / figure.start)**2
                   for name, figure in FIGURES.items())
        return float(weight @ np.abs(np.log(stack.seconds(figures)) - published) + held)

    figures, stride, best = START, dict.fromkeys(START, 0.3), misfit(START)
    for _ in range(80):
        for name in figures:
            for towards in (1, -1):
                tried = figures | {name: figures[name] * np.exp(towards * stride[name])}
                if FIGURES[name].unit.startswith("of the") and tried[name] > 1:
                    continue
                if (found := misfit(tried)) < best - 1e-9:
                    figures, best = tried, found
                    stride[name] *= 1.2
                    break
            else:
                stride[name] *= 0.6
        if max(stride.values()) < 0.002:
            break
    return {name: float(value) for name, value in figures.items()}
