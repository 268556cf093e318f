"""Bytes, quality and speed in one table, and one figure of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization.evaluate import Quality, Reference
from clawdemy_infer.quantization.linears import QuantizedModel, linears
from clawdemy_infer.tables import MISSING, Table, si

UNQUANTIZED = MISSING
"""The method of the reference's own row."""


@dataclass(frozen=True)
class Row:
    """One way to hold the weights.

    `bits` is the effective number for each weight of the layers' matrices. `stored` is the bytes of the whole model; `streamed` those
    that a decode step reads, without an embedding table that is only looked up. `predicted` and `measured` are seconds for each step of
    a decode, by batch; empty where nothing was timed, and where nothing can be, `untimed` says why.
    """

    method: str
    format: str
    bits: float
    stored: int
    streamed: int
    quality: Quality
    predicted: Mapping[int, float] = field(default_factory=dict)
    measured: Mapping[int, float] = field(default_factory=dict)
    untimed: str = ""


def row_of(reference: Reference, quantized: QuantizedModel) -> Row:
    """Judge `quantized`. What is not a matrix of a layer counts in the dtype that it has."""
    others = _other_bytes(quantized.decoder)
    looked_up = 0 if quantized.decoder.head is None else quantized.decoder.embed.weight.nbytes
    stored = quantized.matrix_bytes + others
    return Row(quantized.method, quantized.format.name, quantized.bits_per_weight, stored, stored - looked_up,
               reference.judge(quantized.decoder))


def unquantized_row(reference: Reference) -> Row:
    """The reference itself: what all others are measured by."""
    model = reference.model
    matrices = sum(linear.weight.nbytes for linear in linears(model).values())
    looked_up = 0 if model.head is None else model.embed.weight.nbytes
    stored, bits = matrices + _other_bytes(model), 8 * model.dtype.itemsize
    return Row(UNQUANTIZED, {16: str(model.dtype)[6:], 32: "fp32"}[bits], bits, stored, stored - looked_up, reference.quality)


def _other_bytes(model: Decoder) -> int:
    """All but the matrices of the layers: embedding, head, norms, biases. A tied head is the embedding, once."""
    matrices = {f"layers.{i}.{part}.weight" for i in range(len(model.layers)) for part in ("qkv", "out", "gate_up", "down")}
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if name not in matrices)


def compare(reference: Reference, candidates: Iterable[QuantizedModel]) -> Iterator[Row]:
    """The reference's own row, then one for each candidate as soon as it is judged. Pass a generator, and only one is in memory."""
    yield unquantized_row(reference)
    for quantized in candidates:
        yield row_of(reference, quantized)


def table(rows: Iterable[Row]) -> Table:
    """Bits, bytes, quality and, where something was timed, the time of a token at each batch, predicted and measured."""
    rows = list(rows)
    batches = sorted({batch for row in rows for batch in (*row.predicted, *row.measured)})
    timed = [(f"{name} B={batch}", name, batch) for batch in batches for name in ("predicted", "measured")]
    header = ["method", "format", "bits", "stored", "streamed", "KL", "±", "perplexity", "top-1", *(title for title, _, _ in timed)]
    body = [[row.method, row.format, f"{row.bits:.2f}", si(row.stored, "B"), si(row.streamed, "B"),
             f"{row.quality.kl:.4f}", f"{row.quality.kl_se:.4f}",
             f"{row.quality.perplexity:.2f}", f"{row.quality.top1:.1%}",
             *(si(getattr(row, name).get(batch), "s") for _, name, batch in timed)] for row in rows]
    return Table(header, body, numeric=header[2:])


def untimed(rows: Iterable[Row]) -> list[str]:
    """Why rows have no time, a sentence for each reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.untimed:
            names = reasons.setdefault(row.untimed, [])
            names += [name for name in (f"{row.method} {row.format}",) if name not in names]
    return [f"Not timed: {', '.join(names)}: {why}." for why, names in reasons.items()]


def draw(axes, rows: Iterable[Row], colours: list[str]) -> None:
    """Bytes streamed for a token against KL, a dot for each row and a colour for each method, on matplotlib `axes`.

    Further to the left is faster, further down is better. The reference, of KL 0, has no place on the logarithm.
    """
    rows = [row for row in rows if row.method != UNQUANTIZED]
    methods = list(dict.fromkeys(row.method for row in rows))
    for method, colour in zip(methods, colours, strict=False):
        chosen = [row for row in rows if row.method == method]
        axes.errorbar([row.streamed / 1e6 for row in chosen], [row.quality.kl for row in chosen],
                      yerr=[row.quality.kl_se for row in chosen], fmt="o", color=colour, label=method)
        for row in chosen if len(chosen) > 1 else ():                  # a method of one row is named by the legend
            close = any(0 < other.quality.kl - row.quality.kl < 0.2 * row.quality.kl for other in chosen)      # names would meet
            axes.annotate(row.format, (row.streamed / 1e6, row.quality.kl), textcoords="offset points", fontsize=9,
                          xytext=(-7 if close else 7, -3), horizontalalignment="right" if close else "left")
    axes.set_yscale("log")
    axes.set_xlabel("MB read for each token")
    axes.set_ylabel("KL to the reference, nats a token")
    axes.legend()
