"""Figures of lessons: the waterfall of each explanation, work under a machine's roof (00), latency
and throughput (04), and seconds by napkin, prediction and measurement over the same x (04, 06)."""

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from clawdemy_infer.arithmetic import Work
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.lesson.ledger import LedgerRow
from clawdemy_infer.lesson.plots import COLOURS, MEASURED, NAPKIN, ROOFLINE, TEXT, units
from clawdemy_infer.lesson.tables import si
from clawdemy_infer.lesson.waterfall import COUNTED, REST, Account


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


def waterfall(ax: Axes, row: LedgerRow, found: Account) -> str:
    """Draw the steps from napkin to measured: orange for what is slower, blue for what is faster,
    hatched for what is not explained. Returns the figure's alternative text."""
    moments = {f"{limit} at that moment": kind for kind, (_, limit) in COUNTED.items()}
    bars, level = [("napkin", 0.0, row.napkin, NAPKIN)], row.napkin
    for name, step in found.steps.items():
        bars.append((name, level, step, MEASURED if step > 0 else ROOFLINE))
        level += step
    said = []
    for place, (name, start, step, colour) in enumerate([*bars, ("measured", 0.0, level, NAPKIN)]):
        ax.bar(place, step, bottom=start, color="none" if name == REST else colour, width=0.7,
               edgecolor=colour, hatch="//" if name == REST else None)
        if name in moments:
            name = f"{moments[name]} was {'slower' if step > 0 else 'faster'}"
        shown = 0.0 if abs(step) < 1e-3 * level else step
        value = "+" * (start > 0 and shown > 0) + si(shown, row.unit)
        ax.annotate(value, (place, max(start, start + step)), xytext=(0, 3), ha="center",
                    textcoords="offset points", fontsize=9)
        if place:
            ax.plot([place - 0.65, place - 0.35], [start or level] * 2, color=TEXT, linewidth=0.8)
        said.append((name, value))
    ax.set_xticks(range(len(said)), fontsize=9, labels=[
        re.sub("[ -]", lambda hit: hit[0].strip() + "\n", name, count=1) for name, _ in said])
    ax.set_ylim(0, 1.1 * max(start + max(step, 0) for _, start, step, _ in bars))
    ax.grid(visible=False, axis="x")
    units(ax.yaxis, row.unit)
    if row.guess and row.guess < 2 * ax.get_ylim()[1]:
        ax.axhline(row.guess, color=COLOURS[2], linestyle="--")
        ax.annotate(f"you said {si(row.guess, row.unit)}", (len(said) - 1, row.guess), ha="center",
                    xytext=(0, 3), textcoords="offset points", fontsize=9, color=COLOURS[2])
        ax.set_ylim(0, max(ax.get_ylim()[1], 1.1 * row.guess))
    clause = found.sentence.partition(": the napkin's")[0].partition(" from napkin")[0]
    ax.set_title(f"{row.quantity}\n{clause}")
    return f"Waterfall of {row.quantity}: {'; '.join(map(' '.join, said))}. {found.sentence}"
