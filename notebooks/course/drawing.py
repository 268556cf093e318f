"""A small language for pictures of mechanisms, drawn as SVG in steps, so that slides can show them
piece by piece. A unit of the picture is a pixel in a notebook and two on a slide.

What tells two things apart is never their colour alone: each has its label, or a hatch. Text stands
in filled boxes, white or black; outside of them, in `plots.TEXT`, legible on either background.
"""

import base64
from html import escape

from clawdemy_infer.lesson.plots import COLOURS, TEXT, as_html

WEIGHTS, KV, ACTIVATIONS, COMPUTE, LAUNCH, MEMORY = COLOURS
"""Blue, orange, green, pink (FLOPs), red (launches, work done again), grey (the machine)."""

DARK, WHITE = "#111111", "#ffffff"
FONT = "'DejaVu Sans', Verdana, sans-serif"     # the second is about as wide as the first


def contrast(one: str, other: str) -> float:
    """Contrast of two colours "#rrggbb", 1 to 21 (WCAG 2: relative luminances, each plus 0.05)."""
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05 for r, g, b in (
        [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
         for c in (byte / 255 for byte in bytes.fromhex(colour[1:]))] for colour in (one, other)))
    return high / low


def ink(fill: str) -> str:
    """The colour of text on `fill`: white or black, whichever stands out more."""
    return max(WHITE, DARK, key=lambda colour: contrast(colour, fill))


class Diagram:
    """A picture of `width` x `height` units. `alt` says what is seen; its first sentence is the
    title. What is drawn belongs to the current step, 1 at first.

    >>> picture = Diagram(200, 60, "A box of weights.")
    >>> picture.box(10, 10, 180, 40, "weights", WEIGHTS)
    """

    def __init__(self, width: float, height: float, alt: str) -> None:
        self.width, self.height, self.alt = width, height, alt
        self.steps: list[list[str]] = [[]]

    def step(self) -> None:
        """What is drawn from here on appears one step later."""
        self.steps.append([])

    def _draw(self, tag: str, content: str = "", **attributes) -> None:
        said = " ".join(f'{name.replace("_", "-")}="{f"{x:.5g}" if isinstance(x, float) else x}"'
                        for name, x in attributes.items() if x is not None)
        self.steps[-1].append(f"<{tag} {said}>{content}</{tag}>")

    def text(self, x: float, y: float, text: str, size: float = 14, anchor: str = "start",
             fill: str = TEXT, bold: bool = False) -> None:
        """Lines of text, the first at the height y; `anchor` (start, middle, end) is at x."""
        for row, line in enumerate(text.split("\n")):
            self._draw("text", escape(line), x=x, y=y + 1.25 * size * row + 0.36 * size, fill=fill,
                       font_size=size, text_anchor=anchor, font_weight="bold" if bold else None)

    def box(self, x: float, y: float, width: float, height: float, text: str = "",
            fill: str | None = None, *, edge: str | None = None, hatch: bool = False,
            dashed: bool = False, size: float = 14, bold: bool = False) -> None:
        """A rectangle with text in its middle; without `fill`, its outline."""
        line = edge or fill or TEXT
        self._draw("rect", x=x, y=y, width=width, height=height, rx=min(4, width / 4, height / 4),
                   fill=fill or "none", stroke=line, stroke_width=1.5,
                   stroke_dasharray="5 4" if dashed else None)
        if hatch:
            self._hatch(x, y, width, height, fill)
            wide, tall = 0.7 * size * len(text), 1.4 * size         # no stripes there
            self._draw("rect", x=x + (width - wide) / 2, y=y + (height - tall) / 2, width=wide,
                       height=tall, fill=fill)
        if text:
            middle = y + height / 2 - 0.625 * size * text.count("\n")
            colour = ink(fill) if fill else TEXT
            self.text(x + width / 2, middle, text, size, "middle", colour, bold)

    def _hatch(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """Stripes that rise to the right, 8 units apart, cut at the edges of the rectangle."""
        path = ""
        for at in range(8, int(width + height), 8):
            left, right = max(0, at - height), min(at, width)
            path += f"M{x + left:.5g} {y + at - left:.5g}L{x + right:.5g} {y + at - right:.5g}"
        self._draw("path", d=path, stroke=ink(fill), stroke_width=1.5, stroke_opacity=0.45)

    def bar(self, x: float, y: float, width: float, height: float, fill: str, *,
            hatch: bool = False) -> float:
        """A bar as wide as what it stands for, at least a hair; returns where it ends."""
        width = max(width, 1.5)
        self._draw("rect", x=x, y=y, width=width, height=height, fill=fill)
        if hatch:
            self._hatch(x, y, width, height, fill)
        return x + width

    def line(self, *points: tuple[float, float], colour: str = TEXT, width: float = 1.5,
             dashed: bool = False) -> None:
        """A line through `points`, (x, y) each."""
        self._draw("polyline", points=" ".join(f"{x:.5g},{y:.5g}" for x, y in points), fill="none",
                   stroke=colour, stroke_width=width, stroke_dasharray="5 4" if dashed else None)

    def arrow(self, *points: tuple[float, float], colour: str = TEXT, width: float = 1.5) -> None:
        """A line with a head at its last point. The last stretch is horizontal or vertical."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        long, half = 5 + 2 * width, 2 + 1.5 * width
        a, b = x - long * dx, y - long * dy
        self.line(*points[:-1], (a, b), colour=colour, width=width)
        left, right = (f"{a + side * dy:.5g} {b + side * dx:.5g}" for side in (half, -half))
        self._draw("path", d=f"M{x:.5g} {y:.5g}L{left}L{right}Z", fill=colour)

    def brace(self, x0: float, x1: float, y: float, text: str) -> None:
        """A bracket under what lies from x0 to x1, and its text."""
        self.line((x0, y), (x0, y + 6), (x1, y + 6), (x1, y))
        self.text((x0 + x1) / 2, y + 18, text, 13, "middle")

    def svg(self) -> str:
        """The picture with all its steps, which are groups of the class `step`."""
        groups = "\n".join(f'<g class="step" data-step="{number}">{"".join(drawn)}</g>'
                           for number, drawn in enumerate(self.steps, 1))
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'role="img" aria-label="{escape(self.alt)}" font-family="{FONT}">\n'
                f"<title>{escape(self.alt.partition('. ')[0])}</title>\n{groups}\n</svg>")

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        svg = self.svg()
        source = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
        return {"image/svg+xml": svg, "text/plain": self.alt,
                "text/html": as_html(source, self.alt, self.width)}
