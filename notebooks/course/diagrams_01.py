"""The diagram of lesson 01: a transformer layer with its bytes and FLOPs."""

from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

from clawdemy_course.diagrams_00 import legend, of
from clawdemy_course.drawing import ACTIVATIONS, DARK, KV, WEIGHTS, Diagram
from clawdemy_infer.arithmetic import MLP, Attention, Layer, ModelShape, Pass, element_bytes
from clawdemy_infer.arithmetic.work import at_least_1
from clawdemy_infer.envelope.roofline import part_name
from clawdemy_infer.from_config import catalog
from clawdemy_infer.lesson.tables import number, si

PARTS = {"qkv": 62, "attention": 100, "out": 138, "gate_up": 206, "up": 206, "down": 244,
         "element-wise": 288}
"""Parts of a layer, each with the height at which it is drawn."""


NAMES = {"qkv": "q, k, v: D×(N+2K)·H", "out": "output: N·H×D", "gate_up": "gate, up: D×2F",
         "up": "up: D×F", "down": "down: F×D"}
"""What the products are called there, and the numbers in their matrices."""


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
    shape, prompt = shape or catalog.model("smollm2-135m"), context if prompt is None else prompt
    at_least_1(batch=batch, context=context, prompt=prompt)
    if not all(isinstance(each.mixer, Attention) and isinstance(each.feed_forward, MLP)
               and not each.parallel for each in shape.layers):
        raise ValueError(f"shape={shape.name}: layers of attention, then a dense MLP, are drawn")
    runs = {f"decode: {of(batch, 'row')}": Pass(batch, 1, context, **formats),
            f"prefill: {of(prompt, 'row')}": Pass(1, prompt, prompt, **formats)}
    parts = [by_part(shape.layers[0], run) for run in runs.values()]
    wholes = [_whole(shape, run) for run in runs.values()]
    said = "; ".join(f"{name}, {_said(whole)}" for name, whole in zip(runs, wholes, strict=True))
    d = Diagram(800, 425, f"One of the {shape.L} layers of {shape.name} with its bytes and FLOPs. "
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
            legend(d, 412, (14, "weights", WEIGHTS, False))
        if only == 1:
            legend(d, 412, (150, "KV cache", KV, True), (290, "activations", ACTIVATIONS, False))
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
            d.box(48, PARTS[name], 160, 30, label, WEIGHTS, size=13)
    d.box(48, PARTS["attention"], 76, 30, "attention", edge=KV)
    d.arrow((136, PARTS["attention"] + 15), (124, PARTS["attention"] + 15))
    d.box(136, PARTS["attention"], 72, 30, "KV cache", KV, size=13)
    d.box(48, PARTS["element-wise"], 160, 30, "element-wise", edge=ACTIVATIONS, dashed=True,
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
        said = si(share.flops, "FLOP") if share.flops else "FLOPs not counted"  # of norms and such
        d.text(left + 110, y + 22, said, 13)
