"""Sliders over a function: move one, and the function draws or prints anew. In a lesson, a cell
that draws the same with fixed values follows, for the places where no kernel runs."""

from collections.abc import Callable
from importlib.resources import files

from ipywidgets import Dropdown, HBox, Output, SelectionSlider, VBox, interactive_output

LOOK = {"layout": {"width": "340px"}, "style": {"description_width": "90px"}}
ACCESS = (files("clawdemy_infer.lesson") / "widgets.js").read_text(encoding="utf-8")
"""For keys and screen readers."""


def choose(description: str, options: list[str], value: str | None = None) -> Dropdown:
    """A list to choose from."""
    return Dropdown(description=description, options=options, value=value or options[0], **LOOK)


def powers_of_two(description: str, low: int, high: int, value: int) -> SelectionSlider:
    """A slider over low, 2 low, 4 low … high: batches and contexts matter by their factor."""
    values = [low * 2**i for i in range((high // low).bit_length())]
    return SelectionSlider(description=description, options=[(f"{x:,}", x) for x in values],
                           value=value, **LOOK)


def play(function: Callable[..., object], **controls) -> VBox:
    """The controls in rows of two, above whatever `function(**values)` draws or displays."""
    widgets = list(controls.values())
    rows = [HBox(widgets[i:i + 2]) for i in range(0, len(widgets), 2)]
    script = {"output_type": "display_data", "data": {"application/javascript": ACCESS},
              "metadata": {}}
    return VBox([*rows, interactive_output(function, controls), Output(outputs=(script,))])
