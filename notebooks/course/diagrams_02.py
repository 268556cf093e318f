"""The diagrams of lesson 02: generation with and without a KV cache, and the cache as memory."""

from collections.abc import Iterable

from clawdemy_course.diagrams_00 import legend, of
from clawdemy_course.drawing import ACTIVATIONS, KV, LAUNCH, Diagram
from clawdemy_infer.arithmetic import Format, element_bytes
from clawdemy_infer.arithmetic.work import at_least_1
from clawdemy_infer.lesson.tables import si

WIDE = 324
"""Units that the capacity of a cache takes."""

WORDS = "The cat sat on a mat".split()


def generation(prompt: int = 1, steps: int = 5) -> Diagram:
    """Which rows pass through the layers in each step that makes a token: without a cache all
    tokens again, with one only the new. ValueError for more than 6 steps or 10 tokens."""
    at_least_1(prompt=prompt, steps=steps)
    if prompt + steps > 11 or steps > 6:
        raise ValueError(f"prompt={prompt}, steps={steps}: up to 6 steps and 10 tokens are drawn")
    naive = [prompt + step for step in range(steps)]
    cached = [prompt, *[1] * (steps - 1)]
    read = [total - new for total, new in zip(naive, cached, strict=True)]
    sums = [f"{' + '.join(map(str, rows))} = {of(sum(rows), 'row')}" for rows in (naive, cached)]
    d = Diagram(800, 92 + 40 * steps + 96, f"The rows computed in each of {steps} steps. Without a "
                f"cache every step computes all tokens again: {sums[0]}. With a KV cache it "
                f"computes only the new ones: {sums[1]}, and reads "
                f"{' + '.join(map(str, read))} = {of(sum(read), 'cached token')}.")
    below = 92 + 40 * steps
    d.text(20, 20, "without a cache", 16, bold=True)
    d.text(20, 44, "every row again, in every step", 13)
    _rows(d, 20, naive, naive, range(1), prompt)                            # 1. the first step
    legend(d, below + 82, (20, "new row", ACTIVATIONS, False))
    d.step()                                                                # 2. the second
    _rows(d, 20, naive, naive, range(1, min(2, steps)), prompt)
    legend(d, below + 82, (150, "computed again", LAUNCH, True))
    d.step()                                                                # 3. all others
    _rows(d, 20, naive, naive, range(2, steps), prompt)
    d.text(20, below + 8, sums[0], 15, bold=True)
    d.step()                                                                # 4. with a cache
    d.text(420, 20, "with a KV cache", 16, bold=True)
    d.text(420, 44, "only the new row; keys and values are kept", 13)
    _rows(d, 420, naive, cached, range(steps), prompt)
    d.box(420, below + 74, 26, 16, edge=KV)
    d.text(454, below + 82, "read from the cache", 13)
    d.step()                                                                # 5. what it saves
    d.text(420, below + 8, sums[1], 15, bold=True)
    d.step()                                                                # 6. what it costs
    d.text(420, below + 36, f"{' + '.join(map(str, read))} = {of(sum(read), 'cached token')} read",
           14)
    return d


def _rows(d: Diagram, left: float, seen: list[int], computed: list[int], steps: Iterable[int],
          prompt: int) -> None:
    """Of each of `steps`, the tokens it sees: new ones, those computed again, those in the
    cache."""
    width = min(46, 236 / seen[-1])
    for step in steps:
        y = 66 + 40 * step
        d.text(left, y + 16, f"step {step + 1}", 13)
        fresh = prompt if step == 0 else 1
        for at in range(seen[step]):
            word = WORDS[at] if seen[-1] < len(WORDS) else str(at + 1)
            cell = left + 58 + width * at, y, width - 4, 32, word
            if at >= seen[step] - fresh:
                d.box(*cell, ACTIVATIONS, size=13)
            elif computed[step] > fresh:
                d.box(*cell, LAUNCH, hatch=True, size=13)
            else:
                d.box(*cell, edge=KV, size=13)
        d.text(left + 352, y + 16, of(computed[step], "row"), 13, "end")


def cache(layers: int = 30, kv_heads: int = 3, head_dim: int = 64, length: int = 5,
          capacity: int = 12, kv: Format = "bf16") -> Diagram:
    """The KV cache of one sequence as memory: keys and values [L, K, capacity, H], of which
    `length` tokens are used; where a token is appended, and what `truncate` does. ValueError where
    no further token fits, or for a capacity below 3."""
    at_least_1(layers=layers, kv_heads=kv_heads, head_dim=head_dim, length=length)
    if length >= capacity or capacity < 3:
        raise ValueError(f"length={length}, capacity={capacity}: a capacity of at least 3, and "
                         "room for one more token")
    width = element_bytes("kv", kv)
    one = 2 * layers * kv_heads * head_dim * width
    kept = length // 2
    rows, places = min(kv_heads, 4), (64, 452)
    bottom, each = 96 + 32 * rows, WIDE / capacity
    d = Diagram(800, bottom + 168, "The KV cache of one sequence. Keys and values are two blocks "
                f"of memory, [L = {layers}, K = {kv_heads}, capacity = {capacity}, H = {head_dim}]."
                f" The first {of(length, 'token')} are used, append writes behind them, and "
                f"truncate({kept}) only sets the length back. A token takes 2 · L · K · H · "
                f"{width:g} bytes = {si(one, 'B')}: {si(length * one, 'B')} are used, "
                f"{si((length + 1) * one, 'B')} after the append, of {si(capacity * one, 'B')}.")
    # 1. keys of one layer
    _sheet(d, places[0], "keys", rows, length, capacity)
    d.text(58, 96 + 16 * rows, f"K = {kv_heads}", 13, "end")
    d.brace(places[0], places[0] + WIDE, bottom + 36, f"capacity: {of(capacity, 'token')}")
    d.text(places[0] + WIDE / 2, bottom + 74, f"each token and head: H = {head_dim} numbers", 13,
           "middle")
    # 2. values, and the other layers behind
    d.step()
    _sheet(d, places[1], "values", rows, length, capacity)
    for left in places:
        for back in (8, 16)[:layers - 1]:
            d.line((left + back, 96 - back + 6), (left + back, 96 - back),
                   (left + WIDE + back, 96 - back), (left + WIDE + back, bottom - back),
                   (left + WIDE + back - 6, bottom - back), colour=KV)
    d.text(places[1] + WIDE / 2, bottom + 54, f"L = {of(layers, 'layer')}"
           + ", one behind the other" * (layers > 1), 13, "middle")
    if rows < kv_heads:
        d.text(places[1] + WIDE / 2, bottom + 74, f"{rows} of {kv_heads} KV heads are drawn", 13,
               "middle")
    # 3. append
    d.step()
    for left, what in zip(places, "kv", strict=True):
        at = left + each * length
        for row in range(rows):
            d.box(at + 1, 97 + 32 * row, max(each - 2, 3), 30, fill=ACTIVATIONS)
        d.arrow((at + each / 2, 32), (at + each / 2, 95), colour=ACTIVATIONS, width=3)
        d.text(min(at + each / 2, 746), 18, f"append {what}", 14, "middle", bold=True)
    # 4. truncate
    d.step()
    said, right = f"truncate({kept})", length + 1 < 0.68 * capacity    # where there is room for it
    for left in places:
        start, end, y = left + each * kept, left + each * (length + 1), bottom + 18
        d.line((start, 84), (start, y + 8), colour=LAUNCH, width=2.5, dashed=True)
        d.arrow((end, y), (start, y), colour=LAUNCH, width=3)
        d.text(end + 8 if right else start - 8, y, said, 14, "start" if right else "end", bold=True)
    # 5. bytes, after the append
    d.step()
    used, y = 712 * length / capacity, bottom + 102
    d.box(64, y, 712, 24, edge=KV)
    d.box(64, y, used, 24, fill=KV)
    d.box(64 + used, y, 712 / capacity, 24, fill=ACTIVATIONS)
    d.text(64, y + 44, f"a token: 2 · L · K · H · {width:g} bytes = {si(one, 'B')}")
    d.text(776, y + 44, f"{of(length + 1, 'token')}: {si((length + 1) * one, 'B')} of "
           f"{si(capacity * one, 'B')}", 14, "end", bold=True)
    return d


def _sheet(d: Diagram, left: float, name: str, rows: int, length: int, capacity: int) -> None:
    """One layer of keys or values: a row for each KV head (four at most), a column for each
    position, the used ones filled. More than 24 positions are drawn without their borders."""
    near = length < 0.6 * capacity              # where there is room for the name
    d.text(left + WIDE * near, 66, name, 15, "end" if near else "start", bold=True)
    each = WIDE / capacity
    for row in range(rows):
        y = 97 + 32 * row
        if capacity > 24:
            d.box(left, y, each * length, 30, fill=KV)
            d.box(left + each * length, y, each * (capacity - length), 30, edge=KV)
            continue
        for at in range(capacity):
            d.box(left + each * at + 1, y, each - 2, 30, fill=KV if at < length else None, edge=KV)
