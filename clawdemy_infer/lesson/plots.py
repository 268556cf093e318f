"""How the course draws: one style, and the same colour for the same thing in every figure."""

import base64
from html import escape
from io import BytesIO

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure

from clawdemy_infer.lesson.tables import si

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
