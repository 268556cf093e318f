"""Figures that one or two lessons draw: work under a machine's roof (00), latency and throughput
(04), and seconds by napkin, prediction and measurement over the same x (04, 06)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from clawdemy_infer.arithmetic import Work
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.lesson.plots import MEASURED, NAPKIN, ROOFLINE, units


def roofline(ax: Axes, machine: Machine, dtype: str, colour: str | None = None,
             intensities: Sequence[float] = (0.1, 10_000)) -> None:
    """Draw min(peak, intensity * bandwidth) and mark the ridge point; FLOPs per byte against
    FLOP/s, both logarithmic."""
    x = np.geomspace(*intensities, 200)
    [line] = ax.loglog(x, np.minimum(machine.peak(dtype), x * machine.bandwidth_at()),
                       color=colour, label=machine.name)
    ridge = machine.ridge(dtype)
    ax.plot([ridge], [machine.peak(dtype)], "o", color=line.get_color(), markersize=5)
    ax.set(xlabel="arithmetic intensity, FLOPs per byte", ylabel="attainable rate")
    ax.xaxis.set_major_formatter("{x:,g}")
    units(ax.yaxis, "FLOP/s")


def mark(ax: Axes, machine: Machine, work: Work, seconds: float | None = None,
         label: str = "") -> None:
    """A dot where `work` stands in the roofline of `machine`, and its label: under the roof at the
    rate it ran at, or on it where `seconds` is not given. Raises ValueError if the machine has no
    figure for the dtype of `work`."""
    rate = work.flops / (machine.napkin(work) if seconds is None else seconds)
    ax.plot([work.intensity], [rate], "o", color=MEASURED, markersize=8, markeredgecolor="white",
            zorder=5)
    ax.annotate(label, (work.intensity, rate), textcoords="offset points", fontsize=9,
                xytext=(8, -3), va="top")


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
    ax.set(xlabel="time per token, of each user", ylabel="tokens/s, of all users")
    units(ax.xaxis, "s")
    ax.yaxis.set_major_formatter("{x:,g}")


def beside(ax: Axes, x: Sequence[float], napkin: Sequence[float],
           predicted: Sequence[float] | None, measured: Sequence[float]) -> None:
    """Seconds by napkin (grey, dashed), calibrated roofline (blue) and measurement (orange dots)
    over the same x, on a y axis that starts at zero."""
    ax.plot(x, napkin, "--", color=NAPKIN, label="napkin")
    if predicted is not None:
        ax.plot(x, predicted, color=ROOFLINE, label="calibrated roofline")
    ax.plot(x, measured, "o", color=MEASURED, label="measured")
    ax.set_ylim(bottom=0)
    units(ax.yaxis, "s")
    ax.legend()
