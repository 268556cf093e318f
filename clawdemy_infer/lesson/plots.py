"""How the course draws: one style, and the same colour for the same thing in every figure."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from clawdemy_infer.arithmetic import Work
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.lesson.ledger import LedgerRow
from clawdemy_infer.lesson.tables import si

NAPKIN, ROOFLINE, MEASURED = "#9a9a9a", "#2f6db5", "#d9541e"
"""Grey for the napkin, blue for the calibrated roofline, orange for what was measured."""

COLOURS = ["#2f6db5", "#d9541e", "#3a8f4d", "#8a4fa3", "#b8860b", "#5b6770"]
"""For machines, models and kinds of work, in order."""


def use_style() -> None:
    """Set the course's look for every figure that follows. Text is at least 9 pt at the size it is
    shown."""
    plt.rcParams.update({
        "figure.figsize": (7.2, 4.0), "figure.dpi": 110, "figure.constrained_layout.use": True,
        "savefig.dpi": 110, "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "legend.fontsize": 9, "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6,
        "lines.linewidth": 2.0, "lines.markersize": 6, "legend.frameon": False,
        "axes.prop_cycle": plt.cycler(color=COLOURS),
    })


def units(axis, unit: str) -> None:
    """Label the ticks of `axis` (`ax.xaxis` or `ax.yaxis`) with prefixes: 10 ms, 1 GB/s."""
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: si(value, unit).replace(".00 ", " ").replace(".0 ", " ")))


def roofline(ax: Axes, machine: Machine, dtype: str, colour: str | None = None,
             label: str | None = None, intensities: Sequence[float] = (0.1, 10_000)) -> None:
    """Draw min(peak, intensity * bandwidth) and mark the ridge point; FLOPs per byte against
    FLOP/s, both logarithmic."""
    low, high = intensities
    x = np.geomspace(low, high, 200)
    [line] = ax.loglog(x, np.minimum(machine.peak(dtype), x * machine.bandwidth_at()),
                       color=colour, label=label or machine.name)
    ridge = machine.ridge(dtype)
    ax.plot([ridge], [machine.peak(dtype)], "o", color=line.get_color(), markersize=5)
    ax.set_xlabel("arithmetic intensity, FLOPs per byte")
    ax.set_ylabel("attainable rate")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    units(ax.yaxis, "FLOP/s")


def mark(ax: Axes, machine: Machine, work: Work, seconds: float | None = None, label: str = "",
         left: bool = False, colour: str = MEASURED) -> None:
    """A dot where `work` stands in the roofline of `machine`: under the roof at the rate it ran at,
    or on it where `seconds` is not given.

    `label` stands at the lower right of the dot; with `left`, at its upper left, where the slope
    leaves room. Raises ValueError if the machine has no figure for the dtype of `work`.
    """
    rate = work.flops / (machine.napkin(work) if seconds is None else seconds)
    ax.plot([work.intensity], [rate], "o", color=colour, markersize=8, markeredgecolor="white",
            zorder=5)
    offset, ha, va = ((-7, 3), "right", "bottom") if left else ((8, -3), "left", "top")
    ax.annotate(label, (work.intensity, rate), textcoords="offset points", fontsize=9,
                xytext=offset, ha=ha, va=va)


def pareto(ax: Axes, rows: Sequence[dict], label: str | None = None,
           colour: str | None = None) -> None:
    """Latency against throughput: time per token and tokens/s of all users together, for the rows
    of `napkin.sweep` that fit.

    The batch stands beside its dot. Up and to the left is better, and a larger batch buys the one
    with the other.
    """
    rows = [row for row in rows if row["fits"]]
    [line] = ax.semilogy([row["seconds"] for row in rows], [row["tokens_per_s"] for row in rows],
                         "o-", color=colour, label=label)
    for row in rows:
        ax.annotate(f"{row['batch']:,}", (row["seconds"], row["tokens_per_s"]),
                    textcoords="offset points", xytext=(5, -11), fontsize=9, color=line.get_color())
    ax.autoscale(axis="x")                  # over this curve too, if others were drawn before
    ax.set_xlim(left=0)
    ax.set_xlabel("time per token, of each user")
    ax.set_ylabel("tokens/s, of all users")
    units(ax.xaxis, "s")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def ratios(ax: Axes, rows: Sequence[LedgerRow]) -> None:
    """Measured over predicted, a line for each row of the ledger: grey over the napkin, blue over
    the roofline, 1 is a perfect prediction.

    The band is a quarter either way. Rows that were not measured are left out.
    """
    rows = [row for row in rows if row.measured]
    places = range(len(rows), 0, -1)
    ax.axvspan(1 / 1.25, 1.25, color=ROOFLINE, alpha=0.10, linewidth=0)
    ax.axvline(1, color="black", linewidth=0.8)
    for attribute, colour, label in (("ratio_napkin", NAPKIN, "over the napkin"),
                                     ("ratio", ROOFLINE, "over the calibrated roofline")):
        drawn = [(value, place) for row, place in zip(rows, places, strict=True)
                 if (value := getattr(row, attribute))]
        ax.plot([value for value, _ in drawn], [place for _, place in drawn], "o", color=colour,
                markersize=8, label=label)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    ax.set_yticks(list(places), [row.quantity for row in rows])
    ax.set_ylim(0.4, len(rows) + 0.6)
    ax.set_xlabel("measured, as a multiple of predicted")
    ax.legend()


def beside(ax: Axes, x: Sequence[float], napkin: Sequence[float] | None,
           predicted: Sequence[float] | None, measured: Sequence[float], unit: str = "s") -> None:
    """Napkin (grey, dashed), calibrated roofline (blue) and measurement (orange dots) over the same
    x, on a y axis that starts at zero."""
    if napkin is not None:
        ax.plot(x, napkin, "--", color=NAPKIN, label="napkin")
    if predicted is not None:
        ax.plot(x, predicted, color=ROOFLINE, label="calibrated roofline")
    ax.plot(x, measured, "o", color=MEASURED, label="measured")
    ax.set_ylim(bottom=0)
    units(ax.yaxis, unit)
    ax.legend()
