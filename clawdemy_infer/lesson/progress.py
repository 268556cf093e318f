"""A bar that fills in the time that a measurement is predicted to take, and gives way to its
result. The browser moves the bar by itself: what is measured is not disturbed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from uuid import uuid4

from IPython.display import display

from clawdemy_infer.lesson.tables import si
from clawdemy_infer.machine import in_notebook

BAR = """<div role="progressbar" aria-label="{text}">{text}<div style="width: 480px; height: 10px;
border: 1px solid #767676"><style>@keyframes {name} {{ from {{ width: 0 }} to {{ width: 100% }} }}
</style><div style="height: 100%; background: #2c5aef; animation: {name} {seconds}s linear both">
</div></div></div>"""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or the stop button, while something was measured: one line, no traceback."""

    def _render_traceback_(self) -> list[str]:          # what IPython shows of an exception
        return [str(self)]


@contextmanager
def bar(quantity: str, about_s: float) -> Iterator[Callable[[str], None]]:
    """A bar of `about_s` seconds in a notebook; what it yields puts the result, a line of text, in
    its place, and prints it elsewhere. Raises `Interrupted` for a KeyboardInterrupt."""
    shown = f"measuring {quantity}, about {si(float(f'{about_s:.1g}'), 's')}"
    end = print
    if in_notebook():
        html = BAR.format(text=escape(shown), name=f"b{uuid4().hex[:8]}", seconds=about_s)
        handle = display({"text/html": html, "text/plain": shown}, raw=True, display_id=True)

        def end(line: str) -> None:
            handle.update({"text/html": f"<div>{escape(line)}</div>", "text/plain": line}, raw=True)
    try:
        yield end
    except KeyboardInterrupt as interrupt:
        line = f"○ {quantity!r} was interrupted and does not count yet; run the cell again."
        end(line)
        raise Interrupted(line) from interrupt
