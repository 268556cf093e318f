"""The figure of the last lesson: how far off the learner's guesses were, over all lessons."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from clawdemy_infer.lesson.ledger import LedgerRow
from clawdemy_infer.lesson.plots import MEASURED, NAPKIN


def guesses(ax: Axes, rows: Sequence[LedgerRow]) -> None:
    """Each guess over what was measured, above its lesson: 1, the line, is right. A late guess is
    a ring."""
    rows = [row for row in rows if row.ratio_guess]
    lessons = sorted({row.lesson for row in rows})
    places = [lessons.index(row.lesson) for row in rows]
    for late in (False, True):
        dots = [(place, row.ratio_guess)
                for place, row in zip(places, rows, strict=True) if row.late == late]
        ax.plot(*zip(*dots, strict=True) if dots else ([], []), "o", color=MEASURED,
                markerfacecolor="none" if late else MEASURED, label="late" if late else "in time")
    ax.axhline(1, color=NAPKIN, linewidth=0.8)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter("{x:g}×")
    ax.set_xticks(range(len(lessons)), [lesson.split()[0] for lesson in lessons])
    ax.set(xlabel="lesson", ylabel="guess, as a multiple of measured")
    ax.legend()
