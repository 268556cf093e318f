"""Bytes and quality of quantized models: a row for each, as a table, and on disk: a line of
JSON for each row behind one that says where they come from."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import torch

from clawdemy_infer.lesson.tables import MISSING, Table, si
from clawdemy_infer.paths import write_atomically
from clawdemy_infer.quantization.linears import QuantizedModel, linears
from clawdemy_infer.rigs.quality import Quality, Reference

UNQUANTIZED = MISSING
"""The method of the reference's own row."""


@dataclass(frozen=True)
class QuantizationRow:
    """One way to hold the weights: effective bits of the layers' matrices; bytes stored, and bytes
    streamed in a decode step."""

    method: str
    format: str
    bits: float
    stored: int
    streamed: int
    quality: Quality


def compare_formats(reference: Reference,
                    candidates: Iterable[QuantizedModel]) -> Iterator[QuantizationRow]:
    """The reference's own row, then one for each candidate. Of a generator, one is in memory."""
    yield judged_row(reference)
    for quantized in candidates:
        yield judged_row(reference, quantized)


def judged_row(reference: Reference, quantized: QuantizedModel | None = None) -> QuantizationRow:
    """Judge `quantized`, or the reference itself. What is not a matrix of a layer (embedding, head,
    norms, biases) counts in the dtype that it has, a tied head once."""
    model = reference.model if quantized is None else quantized.decoder
    matrices = linears(model)
    others = sum(parameter.nbytes for name, parameter in model.named_parameters()
                 if name.removesuffix(".weight") not in matrices)
    looked_up = 0 if model.head is None else model.embed.weight.nbytes
    if quantized is None:
        stored = others + sum(linear.weight.nbytes for linear in matrices.values())
        return QuantizationRow(UNQUANTIZED, model.weights, 8 * model.dtype.itemsize, stored,
                               stored - looked_up, reference.quality)
    stored = others + quantized.matrix_bytes
    return QuantizationRow(quantized.method, quantized.format.name, quantized.bits_per_weight,
                           stored, stored - looked_up, reference.judge(model))


def quantization_table(rows: Iterable[QuantizationRow]) -> Table:
    header = ["method", "format", "bits", "stored", "streamed", "KL", "±", "perplexity", "top-1"]
    return Table(header, [
        [row.method, row.format, f"{row.bits:.2f}", si(row.stored, "B"), si(row.streamed, "B"),
         f"{row.quality.kl:.4f}", f"{row.quality.kl_se:.4f}", f"{row.quality.perplexity:.2f}",
         f"{row.quality.top1:.1%}"] for row in rows], numeric=header[2:])


def shipped_table() -> tuple[dict, list[QuantizationRow]]:
    """The table that comes with the course: SmolLM2, all of it."""
    return read_table(files("clawdemy_data") / "quantization_table.jsonl")


def read_table(path: str | Path) -> tuple[dict, list[QuantizationRow]]:
    """The source, and the rows. Raises ValueError with the number of a line that is neither."""
    found = []
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), start=1):
        try:
            said = json.loads(line)
            found.append(said["source"] if number == 1 else _row_from_json(said))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"table={str(path)!r}: line {number} is not one of a kept table "
                             f"({error!r})") from error
    return (found[0], found[1:]) if found else ({}, [])


def write_table(path: str | Path, source: dict, rows: Iterable[QuantizationRow]) -> None:
    """All of the file at once, or what was there before."""
    lines = [{"source": source}, *map(row_to_json, rows)]
    write_atomically(Path(path), "".join(json.dumps(line, ensure_ascii=False) + "\n"
                                         for line in lines))


def row_to_json(row: QuantizationRow) -> dict:
    """What JSON can hold of a row; of KL, the mean of each sequence."""
    said = asdict(row)
    said["quality"]["kl_by_sequence"] = said["quality"].pop("kls").mean(1).tolist()
    return said


def _row_from_json(said: dict) -> QuantizationRow:
    quality = dict(said["quality"])
    said["quality"] = Quality(kls=torch.tensor(quality.pop("kl_by_sequence"))[:, None], **quality)
    return QuantizationRow(**said)
