"""The diagram of lesson 04: the rows of a batch, which share one reading of the weights."""

from clawdemy_course.diagrams_00 import legend, of
from clawdemy_course.drawing import ACTIVATIONS, KV, WEIGHTS, Diagram
from clawdemy_infer.arithmetic import Format, ModelShape
from clawdemy_infer.from_config import catalog
from clawdemy_infer.lesson.tables import si

TOP, PITCH, GAP = 78, 32, 12
"""Where the first row stands, and how far apart rows and sequences are."""


def batch(shape: ModelShape | None = None, past: tuple[int, ...] = (511, 255, 0),
          new: tuple[int, ...] = (1, 1, 3), weights: Format = "fp32", kv: Format = "fp32",
          many: tuple[int, int] = (64, 512)) -> Diagram:
    """Selective batching: the new rows of all sequences pass the products together, and each goes
    to its own cache for attention. `past` tokens of each sequence are kept, `new` ones come. Then
    the bytes of this step, and of one of `many` (batch, context). ValueError for other than 2 to 3
    sequences, or more than 5 rows."""
    shape = shape or catalog.model("smollm2-135m")
    if not 2 <= len(new) <= 3 or len(past) != len(new) or min(new) < 1 or sum(new) > 5:
        raise ValueError(f"past={past}, new={new}: 2 or 3 sequences that bring up to 5 tokens are "
                         "drawn")
    held = [P + T for P, T in zip(past, new, strict=True)]
    read = shape.streamed_bytes(weights)
    kept = [sum(shape.kv_bytes(1, S, kv) for S in held), shape.kv_bytes(*many, kv)]
    names = ["this step", f"{many[0]:,} of {many[1]:,} tokens"]
    d = Diagram(800, 424, f"One step of {of(len(new), 'sequence')} of {shape.name}, which bring "
                f"{' + '.join(map(str, new))} = {of(sum(new), 'row')}. All rows pass Q, K and V "
                "together: the weights are read once. For attention each row goes to the cache of "
                f"its own sequence, of {', '.join(f'{S:,}' for S in held)} tokens. Then all pass "
                "output and MLP together, and the last row of each sequence gives its next token. "
                f"Bytes: weights {si(read, 'B')}, caches {si(kept[0], 'B')}; with {names[1]}, "
                f"caches {si(kept[1], 'B')}.")
    # Top and height of each sequence's rows
    tops = [TOP + PITCH * sum(new[:i]) + GAP * i for i in range(len(new))]
    tall = [PITCH * T - 4 for T in new]
    end = tops[-1] + tall[-1]
    # 1. the rows, by their positions
    _heading(d, 98, "new rows", "by position")
    for i, (top, T) in enumerate(zip(tops, new, strict=True)):
        d.text(14, top + tall[i] / 2, "ABC"[i], 16, bold=True)
        for t in range(T):
            d.box(68, top + PITCH * t, 60, PITCH - 4, f"{past[i] + t + 1:,}", ACTIVATIONS, size=13)
    # 2. products
    d.step()
    _heading(d, 232, "products", "all rows together")
    _product(d, 166, TOP, end, f"Q, K, V\nread once\nfor {of(sum(new), 'row')}")
    for row in _rows(tops, new):
        d.arrow((130, row), (164, row))
    # 3. attention
    d.step()
    _heading(d, 424, "attention", "each to its own cache")
    for i, (top, S) in enumerate(zip(tops, held, strict=True)):
        middle = top + tall[i] / 2
        d.arrow((300, middle), (330, middle), colour=KV, width=3)
        d.text(336, middle - 7, f"{'ABC'[i]}: {of(S, 'token')}", 13)
        d.bar(336, middle + 3, 176 * S / max(held), 11, KV, hatch=True)
    # 4. products again, and what comes out
    d.step()
    _heading(d, 612, "products", "together again")
    _product(d, 546, TOP, end, "output, MLP\nread once")
    d.text(740, 20, "next", 15, "middle", bold=True)
    d.text(740, 44, "last row", 13, "middle")
    for i, top in enumerate(tops):
        d.arrow((514, top + tall[i] / 2), (544, top + tall[i] / 2))
        row = top + tall[i] - (PITCH - 4) / 2
        d.arrow((680, row), (710, row))
        d.box(712, row - 14, 56, PITCH - 4, "ABC"[i], ACTIVATIONS, size=13)
    # 5. and 6. bytes, to one scale
    scale = 470 / (read + max(kept))
    for name, bytes, y in zip(names, kept, (320, 364), strict=True):
        d.step()
        if y == 320:
            legend(d, 408, (14, "weights: once for all", WEIGHTS, False),
                   (250, "caches: one for each", KV, True))
        d.text(14, y, name, 14, bold=True)
        at = d.bar(180, y - 11, scale * read, 22, WEIGHTS)
        at = d.bar(at, y - 11, scale * bytes, 22, KV, hatch=True)
        d.text(at + 8, y, f"{si(read, 'B')} + {si(bytes, 'B')}", 13)
    return d


def _rows(tops: list[float], new: tuple[int, ...]) -> list[float]:
    """The middle of each row."""
    return [top + PITCH * t + (PITCH - 4) / 2 for top, T in zip(tops, new, strict=True)
            for t in range(T)]


def _heading(d: Diagram, middle: float, what: str, how: str) -> None:
    d.text(middle, 20, what, 15, "middle", bold=True)
    d.text(middle, 44, how, 13, "middle")


def _product(d: Diagram, left: float, top: float, end: float, text: str) -> None:
    d.box(left, top, 132, end - top, text, WEIGHTS, size=14)
