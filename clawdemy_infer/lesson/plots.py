"""How the course draws: one style, and the same colour for the same thing in every figure."""

import base64
import re
from html import escape
from io import BytesIO

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clawdemy_infer.lesson.ledger import LedgerRow
from clawdemy_infer.lesson.tables import si
from clawdemy_infer.lesson.waterfall import COUNTED, REST, Account

COLOURS = ["#3f52d6", "#e37700", "#1ca671", "#cb73d2", "#ce122d", "#646271"]
"""For machines, models and kinds of work, in order: far apart for every kind of colour vision, and
at a contrast of 3 : 1 on white and on #111111."""

NAPKIN, ROOFLINE, MEASURED = "#8e8e8e", *COLOURS[:2]
"""Grey for the napkin, blue for the prediction, orange for what was measured."""

TEXT = "#797979"
"""Text on the transparent background: 4.35 : 1 on white, 4.34 : 1 on JupyterLab's dark #111111, and
no colour does better on both: the two multiply to 18.9, that of white on #111111."""

BRIGHTNESS = {"true": 0.95, "false": 1.05}
"""What colours are multiplied by where JupyterLab's theme is light, and where it is dark: text then
has 4.7 : 1 on either. Where nothing knows the theme, a picture is shown as it is."""


def use_style() -> None:
    """Set the course's look for every figure that follows. Text is shown at 9 pt or more."""
    plt.style.use("clawdemy_infer.lesson.course")
    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLOURS)
    plt.rcParams.update(dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color",
         "ytick.color", "grid.color"), TEXT))


def units(axis, unit: str) -> None:
    """Label the ticks of `axis` (`ax.xaxis` or `ax.yaxis`) with prefixes: 10 ms, 1 GB/s."""
    axis.set_major_formatter(
        lambda value, _: si(value, unit).replace(".00 ", " ").replace(".0 ", " "))


def show(figure: Figure, alt: str) -> None:
    """Show `figure`, or `alt`, its alternative text, where no picture can be; and close it."""
    png = BytesIO()
    figure.savefig(png, format="png")
    plt.close(figure)
    picture = base64.b64encode(png.getvalue()).decode()
    html = as_html(f"data:image/png;base64,{picture}", alt)
    display({"text/html": html, "image/png": picture, "text/plain": alt}, raw=True)


def as_html(source: str, alt: str, width: float | None = None) -> str:
    """The picture at the address `source` in HTML, with its `BRIGHTNESS`, `width` pixels wide."""
    size = f' width="{width}"' if width else ""
    rules = "".join(f"[data-jp-theme-light={light}] .drawn{{filter:brightness({factor})}}"
                    for light, factor in BRIGHTNESS.items())
    return (f'<img alt="{escape(alt)}"{size} class="drawn" src="{source}">'
            f"<style>{rules}</style>")


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
