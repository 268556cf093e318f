"""Sliders over a function: move one, and the function draws or prints anew. In a lesson, a cell
that draws the same with fixed values follows, for the places where no kernel runs."""

from collections.abc import Callable

from ipywidgets import Dropdown, HBox, Output, SelectionSlider, VBox, interactive_output

LAYOUT = {"width": "340px"}
STYLE = {"description_width": "90px"}
# JupyterLab takes the arrow keys from a list, and ipywidgets reads out a slider's index.
ACCESS = """(function mend() {
  const box = element.closest(".widget-vbox"), find = (part) => [...box.querySelectorAll(part)];
  if (!box || find(".widget-slider").some((one) => !one.querySelector(".noUi-handle")))
    return setTimeout(mend, 50);                            // not all of it is on the page yet
  find("select").forEach((list) => list.setAttribute("data-lm-suppress-shortcuts", "true"));
  find(".noUi-handle").forEach((handle) => {
    const row = handle.closest(".widget-slider"), shown = row.querySelector(".widget-readout");
    const tell = () => handle.ariaValueText === shown.textContent
      || (handle.ariaValueText = shown.textContent);
    handle.ariaLabel = row.querySelector(".widget-label").textContent;
    new MutationObserver(tell).observe(row, {subtree: true, childList: true, attributes: true});
    tell();
  });
})();"""


def choose(description: str, options: list[str], value: str | None = None) -> Dropdown:
    """A list to choose from."""
    return Dropdown(description=description, options=options, value=value or options[0],
                    layout=LAYOUT, style=STYLE)


def powers_of_two(description: str, low: int, high: int, value: int) -> SelectionSlider:
    """A slider over low, 2 low, 4 low … high: batches and contexts matter by their factor."""
    options = [low]
    while options[-1] < high:
        options.append(options[-1] * 2)
    return SelectionSlider(description=description,
                           options=[(f"{option:,}", option) for option in options], value=value,
                           layout=LAYOUT, style=STYLE, continuous_update=True)


def play(function: Callable[..., object], columns: int = 2, **controls) -> VBox:
    """The controls in rows of `columns`, and below them whatever `function(**values)` draws or
    displays."""
    widgets = list(controls.values())
    rows = [HBox(widgets[i: i + columns]) for i in range(0, len(widgets), columns)]
    script = {"output_type": "display_data", "data": {"application/javascript": ACCESS},
              "metadata": {}}
    return VBox([*rows, interactive_output(function, controls), Output(outputs=(script,))])
