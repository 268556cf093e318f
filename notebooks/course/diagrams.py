"""Pictures of the mechanisms of lessons 00 to 02. Every number in them is computed by the library.

    machine      00   three prices on a picture of a machine
    layer        01   a transformer layer with its bytes and FLOPs, for a decode step and a prompt
    generation   02   naive generation beside cached generation: which rows are computed
    cache        02   the KV cache as memory
"""

from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

from clawdemy_infer.arithmetic import (
    MLP,
    Attention,
    Format,
    Layer,
    ModelShape,
    Pass,
    Work,
    element_bytes,
    matmul,
)
from clawdemy_infer.arithmetic.work import at_least_1
from clawdemy_infer.envelope.roofline import Machine, part_name
from clawdemy_infer.from_config import catalog
from clawdemy_infer.lesson.diagrams import (
    ACTIVATIONS,
    COMPUTE,
    DARK,
    KV,
    LAUNCH,
    MEMORY,
    WEIGHTS,
    Diagram,
)
from clawdemy_infer.lesson.tables import number, si

LAUNCH_S = 10e-6
"""Seconds to launch an operation from Python, where the machine does not say."""


def of(count: int, noun: str) -> str:
    """`of(1, "row")` is 1 row, `of(5, "row")` is 5 rows."""
    return f"{count:,} {noun}" + "s" * (count != 1)


# ---- lesson 00: three prices ----


def machine(machine: Machine | None = None, dtype: str = "bf16", size: int = 4096,
            rows: tuple[int, int] = (1, 1024)) -> Diagram:
    """Memory, bus, caches and cores, the launch, and what two products X[M, size] @ W[size, size]
    cost at each of the three prices. Without `machine`, an H100 as on its data sheet."""
    machine = machine or catalog.machine("h100-sxm")
    launch = machine.fixed_s_per_op or LAUNCH_S
    works = [matmul(M, size, size, of(M, "row"), dtype, dtype) for M in rows]
    bandwidth = machine.bandwidth_at(works[0].bytes)
    prices = [si(bandwidth, "B/s"), si(machine.peak(dtype), "FLOP/s"), si(launch, "s")]
    costs = {work.name: [work.bytes / bandwidth, work.flops / machine.peak(dtype), launch]
             for work in works}
    said = "; ".join(f"{name}: bytes {si(a, 's')}, FLOPs {si(b, 's')}, launch {si(c, 's')}"
                     for name, (a, b, c) in costs.items())
    d = Diagram(800, 430, "A machine and its three prices. Weights lie in memory and cross a narrow "
                f"bus at {prices[0]} into the caches of the processor, whose cores compute at "
                f"{prices[1]}; a program launches each operation, in {prices[2]}. The same weights "
                f"meet {works[0].name} or {works[1].name}: {said}.")
    # 1. the machine
    d.box(20, 66, 190, 164, edge=MEMORY)
    d.text(115, 84, "memory", 15, "middle", bold=True)
    d.box(36, 104, 158, 74, f"weights\n{size:,} × {size:,}", WEIGHTS)
    d.box(36, 186, 158, 30, "activations", ACTIVATIONS)
    d.box(390, 66, 390, 164, edge=MEMORY)
    d.text(585, 84, "processor", 15, "middle", bold=True)
    d.box(406, 104, 96, 112, "caches,\nregisters", MEMORY)
    for row in range(2):
        for column in range(3):
            d.box(524 + 82 * column, 104 + 59 * row, 76, 53, "core", COMPUTE)
    # 2. bandwidth
    d.step()
    d.arrow((210, 141), (390, 141), colour=WEIGHTS, width=5)
    d.arrow((390, 201), (210, 201), colour=ACTIVATIONS, width=2)
    d.text(298, 106, f"bandwidth\n{prices[0]}", 14, "middle", bold=True)
    # 3. arithmetic
    d.step()
    d.arrow((502, 160), (524, 160), colour=MEMORY, width=3)
    d.text(585, 246, f"peak: {prices[1]} in {dtype}", 14, "middle", bold=True)
    # 4. launch
    d.step()
    d.box(20, 10, 190, 34, "program", MEMORY)
    d.arrow((210, 27), (646, 27), (646, 66), colour=LAUNCH, width=3)
    d.text(428, 44, f"launch overhead: {prices[2]} an operation", 14, "middle", bold=True)
    # 5., 6. the same weights for few rows and for many
    longest = max(seconds for each in costs.values() for seconds in each)
    for left, work in zip((20, 410), works, strict=True):
        d.step()
        _three_prices(d, left, work, costs[work.name], longest)
    return d


def _three_prices(d: Diagram, left: float, work: Work, costs: list[float], longest: float) -> None:
    """Three bars, as long as what each price comes to, from `left` to 370 units further."""
    d.text(left, 276, f"{work.name}: {si(work.bytes, 'B')}, {si(work.flops, 'FLOP')}", bold=True)
    for row, (name, seconds, colour) in enumerate(zip(
            ("bytes / bandwidth", "FLOPs / peak", "launch"), costs, (WEIGHTS, COMPUTE, LAUNCH),
            strict=True)):
        y = 292 + 28 * row
        d.text(left, y + 10, name, 13)
        end = d.bar(left + 136, y, 160 * seconds / longest, 20, colour)
        d.text(end + 6, y + 10, si(seconds, "s"), 13)
    memory, compute, launch = costs
    bound = "memory-bound" if memory > compute else "compute-bound"
    total = si(max(memory, compute) + launch, "s")
    d.text(left, 388, f"max(bytes, FLOPs) + launch = {total}", 14)
    d.text(left, 410, bound, 14, bold=True)


# ---- lesson 01: a layer ----

PARTS = {"qkv": 62, "attention": 100, "out": 138, "gate_up": 206, "up": 206, "down": 244,
         "element-wise": 288}
"""Parts of a layer, each with the height at which it is drawn."""


NAMES = {"qkv": "Q, K, V", "out": "output", "gate_up": "gate, up", "up": "up", "down": "down"}
"""What the products are called there."""


class Share(NamedTuple):
    """What one part of a layer moves, by kind, and computes."""

    weights: float = 0.0
    kv: float = 0.0
    activations: float = 0.0
    flops: float = 0.0

    @property
    def bytes(self) -> float:
        return self.weights + self.kv + self.activations


def add(shares: Iterable[Share]) -> Share:
    return Share(*map(sum, zip(*shares, strict=True)))


def by_part(layer: Layer, run: Pass) -> dict[str, Share]:
    """The work of a layer, by the parts of the picture."""
    found = dict.fromkeys(PARTS, Share())
    for op in layer.work(run).operations():
        weights = op.numbers * element_bytes("weights", run.weights)
        q_and_o = 2 * run.tokens * layer.mixer.N * layer.mixer.H
        kv = (op.bytes - q_and_o * element_bytes("activations", run.activations)
              if op.kernel == "attention" else 0)
        share = Share(weights, kv, op.bytes - weights - kv, op.flops)
        found[part_name(op)] = add([found[part_name(op)], share])
    return {name: share for name, share in found.items() if share.bytes}


def layer(shape: ModelShape | None = None, batch: int = 1, context: int = 512,
          prompt: int | None = None, **formats) -> Diagram:
    """A layer in a decode step of `batch` sequences that hold `context` tokens, beside the same
    layer in the prefill of one prompt, of `context` tokens too unless `prompt` says otherwise.
    Bytes are bars on one scale. `formats`: weights, kv and activations, bf16 each if not given.

    Raises ValueError for a shape with other layers than attention and a dense MLP.
    """
    shape, prompt = shape or catalog.model("smollm2-135m"), prompt or context
    if not all(isinstance(each.mixer, Attention) and isinstance(each.feed_forward, MLP)
               for each in shape.layers):
        raise ValueError(f"shape={shape.name}: layers of attention and a dense MLP are drawn")
    runs = {f"decode: {of(batch, 'row')}": Pass(batch, 1, context, **formats),
            f"prefill: {of(prompt, 'row')}": Pass(1, prompt, prompt, **formats)}
    parts = [by_part(shape.layers[0], run) for run in runs.values()]
    wholes = [_whole(shape, run) for run in runs.values()]
    said = "; ".join(f"{name}, {_said(whole)}" for name, whole in zip(runs, wholes, strict=True))
    d = Diagram(800, 430, f"One of the {shape.L} layers of {shape.name} with its bytes and FLOPs. "
                "Norm, Q, K, V, attention over the KV cache and output, then norm, gate and up, "
                "and down, each half added to the residual stream. All rows of a step share one "
                f"reading of the weights. All layers and the head: {said}.")
    _flow(d, parts[0])
    longest = max(share.bytes for part in parts for share in part.values())
    biggest = max(whole.bytes for whole in wholes)
    # 2. to 4. a decode step: weights, what else is moved, FLOPs
    for only, names in enumerate((["weights"], ["kv", "activations"], ["flops"])):
        d.step()
        if not only:
            _title(d, 222, list(runs)[0])
            _legend(d, 416, (14, "weights", WEIGHTS, False))
        if only == 1:
            _legend(d, 416, (150, "KV cache", KV, True), (290, "activations", ACTIVATIONS, False))
        for name, share in parts[0].items():
            _bars(d, 222, PARTS[name], share, 276 / longest, names)
    # 5. a prompt
    d.step()
    _title(d, 514, list(runs)[1])
    for name, share in parts[1].items():
        _bars(d, 514, PARTS[name], share, 276 / longest, Share._fields)
    # 6. the whole step
    d.step()
    d.line((14, 328), (790, 328))
    d.text(14, 348, f"{of(shape.L, 'layer')} + head", bold=True)
    for left, whole in ((222, wholes[0]), (514, wholes[1])):
        _bars(d, left, 338, whole, 276 / biggest, Share._fields)
        d.text(left, 388, f"{number(whole.flops / whole.bytes)} FLOPs per byte", 15, bold=True)
    return d


def _whole(shape: ModelShape, run: Pass) -> Share:
    """A step: every layer, and the head on one row of each sequence."""
    layers = [Share(*[count * x for x in add(by_part(layer, run).values())])
              for layer, count in shape.groups]
    head = shape.head(run.B, run.weights, run.activations)
    weights = head.numbers * element_bytes("weights", run.weights)
    return add([*layers, Share(weights, 0, head.bytes - weights, head.flops)])


def _said(share: Share) -> str:
    return (f"{si(share.bytes, 'B')} and {si(share.flops, 'FLOP')}, "
            f"{number(share.flops / share.bytes)} FLOPs per byte")


def _flow(d: Diagram, parts: dict[str, Share]) -> None:
    """The operations of a layer, from top to bottom along the residual stream."""
    d.text(14, 14, "residual stream", 13)
    d.arrow((22, 28), (22, 318))
    for norm, last in ((38, "out"), (182, "down")):
        d.arrow((22, norm + 9), (48, norm + 9))
        d.box(48, norm, 160, 18, "norm", edge=ACTIVATIONS, size=13)
        end = PARTS[last] + 15
        d.arrow((48, end), (31, end))
        d.box(15, end - 7, 14, 14, fill=ACTIVATIONS)
        d.line((18, end), (26, end), colour=DARK)
        d.line((22, end - 4), (22, end + 4), colour=DARK)
    for name, label in NAMES.items():
        if name in parts:
            d.box(48, PARTS[name], 160, 30, label, WEIGHTS)
    d.box(48, PARTS["attention"], 76, 30, "attention", edge=KV)
    d.arrow((136, PARTS["attention"] + 15), (124, PARTS["attention"] + 15))
    d.box(136, PARTS["attention"], 72, 30, "KV cache", KV, size=13)
    d.box(48, PARTS["element-wise"], 160, 30, "norms, SiLU, sums", edge=ACTIVATIONS, dashed=True,
          size=13)


def _title(d: Diagram, left: float, run: str) -> None:
    d.text(left, 14, run, 15, bold=True)
    d.text(left, 34, "reads every weight" if run.endswith(" row")
           else "share one reading of the weights", 13)


def _bars(d: Diagram, left: float, y: float, share: Share, scale: float, names) -> None:
    """Bytes by kind as bars behind each other, and numbers under them: those of `names`."""
    ends = list(accumulate(share[:3], initial=0))
    for name, start, end, colour in zip(Share._fields, ends, ends[1:], (WEIGHTS, KV, ACTIVATIONS),
                                        strict=False):
        if name in names and end > start:
            d.bar(left + scale * start, y, scale * (end - start), 12, colour, hatch=name == "kv")
    if "activations" in names:
        d.text(left, y + 22, si(share.bytes, "B"), 13)
    if "flops" in names:
        d.text(left + 110, y + 22, si(share.flops, "FLOP"), 13)


def _legend(d: Diagram, y: float, *entries: tuple[float, str, str, bool]) -> None:
    """Swatches from left to right: where, what, its colour, and whether it is hatched."""
    for left, name, colour, hatch in entries:
        d.bar(left, y - 8, 26, 16, colour, hatch=hatch)
        d.text(left + 34, y, name, 13)


# ---- lesson 02: generation and the cache ----

WIDE = 324
"""Units that the capacity of a cache takes."""

WORDS = "The cat sat on a mat".split()


def generation(prompt: int = 1, steps: int = 5) -> Diagram:
    """Which rows pass through the layers in each step that makes a token: without a cache all
    tokens again, with one only the new. ValueError for sizes below 1 or a text that does not fit
    (prompt + steps above 13)."""
    at_least_1(prompt=prompt, steps=steps)
    if prompt + steps > 13 or steps > 7:
        raise ValueError(f"prompt={prompt}, steps={steps}: up to 7 steps and 12 tokens are drawn")
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
    _legend(d, below + 82, (20, "new row", ACTIVATIONS, False))
    d.step()                                                                # 2. the second
    _rows(d, 20, naive, naive, range(1, min(2, steps)), prompt)
    _legend(d, below + 82, (150, "computed again", LAUNCH, True))
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
    no further token fits."""
    at_least_1(layers=layers, kv_heads=kv_heads, head_dim=head_dim, length=length)
    if not length < capacity:
        raise ValueError(f"length={length}: less than capacity={capacity}, so that a token can be "
                         "appended")
    one = 2 * layers * kv_heads * head_dim * element_bytes("kv", kv)
    kept = length // 2
    d = Diagram(800, 264 + 32 * min(kv_heads, 4), f"The KV cache of one sequence. Keys and values are two blocks of "
                f"memory, [L = {layers}, K = {kv_heads}, capacity = {capacity}, H = {head_dim}]; "
                f"each cell holds the {head_dim} numbers of one KV head for one token. The first "
                f"{of(length, 'token')} are used, append writes behind them, and truncate({kept}) "
                "only sets the length back. A token takes 2 · L · K · H · "
                f"{number(element_bytes('kv', kv))} bytes = {si(one, 'B')}: "
                f"{si(length * one, 'B')} are used of {si(capacity * one, 'B')}.")
    rows, places = min(kv_heads, 4), (64, 452)
    middle, bottom = 96 + 16 * rows, 96 + 32 * rows
    # 1. keys of one layer
    _sheet(d, places[0], "keys", rows, length, capacity)
    d.text(54, middle - 8, f"K\n{kv_heads}", 13, "end")
    d.brace(places[0], places[0] + WIDE, bottom + 8, f"capacity: {of(capacity, 'token')}")
    d.text(places[0] + WIDE / 2, bottom + 50, f"each cell: H = {head_dim} numbers", 13, "middle")
    # 2. values, and the other layers behind
    d.step()
    _sheet(d, places[1], "values", rows, length, capacity)
    for left in places:
        for back in (8, 16):
            d.line((left + back, 96 - back + 6), (left + back, 96 - back),
                   (left + WIDE + back, 96 - back), (left + WIDE + back, bottom - back),
                   (left + WIDE + back - 6, bottom - back), colour=KV)
    d.text(places[1] + WIDE / 2, bottom + 26, f"L = {of(layers, 'layer')}, one behind the other",
           13, "middle")
    # 3. append
    d.step()
    each = WIDE / capacity
    for left, what in zip(places, "kv", strict=True):
        at = left + each * length
        for row in range(rows):
            d.box(at + 1, 97 + 32 * row, max(each - 2, 3), 30, fill=ACTIVATIONS)
        d.arrow((at + each / 2, 52), (at + each / 2, 95), colour=ACTIVATIONS, width=3)
        d.text(at + each / 2, 38, f"append {what}", 14, "middle", bold=True)
    # 4. truncate
    d.step()
    down = bottom + 84
    for left in places:
        start, end = left + each * kept, left + each * (length + 1)
        d.line((start, 84), (start, down), colour=LAUNCH, width=2.5, dashed=True)
        d.arrow((end, down), (start, down), colour=LAUNCH, width=3)
        d.text(end + 8, down, f"truncate({kept})", 14, bold=True)
    # 5. bytes
    d.step()
    used = 712 * length / capacity
    d.box(64, down + 28, 712, 24, edge=KV)
    d.bar(64, down + 28, used, 24, KV)
    d.text(64, down + 70, f"a token: 2 · L · K · H · {number(element_bytes('kv', kv))} bytes = "
           f"{si(one, 'B')}", 14)
    d.text(776, down + 70, f"{si(length * one, 'B')} used of {si(capacity * one, 'B')}", 14, "end",
           bold=True)
    return d


def _sheet(d: Diagram, left: float, name: str, rows: int, length: int, capacity: int) -> None:
    """One layer of keys or values: a row for each KV head (four at most), a column for each
    position, the used ones filled. More than 24 positions are drawn without their borders."""
    d.text(left, 70, name, 15, bold=True)
    each = WIDE / capacity
    for row in range(rows):
        y = 96 + 32 * row
        if capacity > 24:
            d.box(left, y, WIDE, 32, edge=KV)
            d.bar(left, y, each * length, 32, KV)
            continue
        for at in range(capacity):
            d.box(left + each * at + 1, y + 1, each - 2, 30, fill=KV if at < length else None,
                  edge=KV)
