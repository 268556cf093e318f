"""Bytes and quality of quantized models: a row for each, as a table, and on disk: a line of
JSON for each row behind one that says where they come from.

The large table has every number format by every method that makes sense for it: LLM.int8 and
SmoothQuant for 8 bits, of activations too; GPTQ and AWQ for 3 and 4: at 8 nothing is left to win.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch

from clawdemy_infer.fast.faster import faster
from clawdemy_infer.kv_cache import ContiguousCache, KVCache
from clawdemy_infer.lesson.tables import MISSING, Table, si
from clawdemy_infer.model import Decoder
from clawdemy_infer.paths import write_atomically
from clawdemy_infer.quantization import awq, format_named, gptq, round_to_nearest
from clawdemy_infer.quantization.linears import QuantizedModel, linears
from clawdemy_infer.rigs.quality import Quality, Reference
from clawdemy_infer.variants.int4_cache import KiviCache
from clawdemy_infer.variants.int8_activations import int8_activations, llm_int8
from clawdemy_infer.variants.int8_cache import Int8Cache
from clawdemy_infer.variants.smoothquant import smoothquant

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
            raise ValueError(f"{path}: line {number} is not one of a kept table") from error
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


INTEGERS, FLOATS = ("int4-g64", "int4-g32", "int3-g64"), ("nf4", "mxfp4", "nvfp4")

METHODS: dict[str, tuple[tuple[str, ...], int, Callable]] = {
    "RTN": (("int8", *INTEGERS, *FLOATS), 0,
            lambda model, tokens, format: round_to_nearest(model, format)),
    "int8 activations": (("int8",), 0, lambda model, tokens, format: int8_activations(model)),
    "LLM.int8": (("int8",), 0, lambda model, tokens, format: llm_int8(model)),
    "SmoothQuant": (("int8",), 4, lambda model, tokens, format: smoothquant(model, tokens)),
    "GPTQ act-order": ((*INTEGERS, *FLOATS), 12, gptq),
    "GPTQ": (INTEGERS, 12, partial(gptq, act_order=False)),
    "AWQ": (INTEGERS, 4, awq)}
"""Methods, the longest last: formats, sequences of calibration text, what is done to a model."""
KV_CACHE = "KV cache"
JUDGED_CACHES: dict[str, tuple[type[KVCache], int]] = {
    "fp32": (ContiguousCache, 512), "int8": (Int8Cache, 512), "int4-g32": (KiviCache, 32)}
"""Caches by format, and how many tokens go in at a time. `KiviCache` shows new tokens in full and
rounds each 32: in steps of 32 every token sees just what it would see if it came alone."""


class Cell(NamedTuple):
    """One place of the table, by its two names."""

    method: str
    format: str

    def make(self, reference: Reference,
             calibration: Callable[[int], torch.Tensor]) -> QuantizationRow:
        """What goes there, with as many sequences of `calibration` as the method takes."""
        if self.method == KV_CACHE:
            return _cache_row(self.format, reference)
        if self.method == UNQUANTIZED:
            return judged_row(reference) if self.format == "fp32" else _bf16_row(reference)
        _, sequences, quantize = METHODS[self.method]
        tokens = calibration(sequences) if sequences else None
        return judged_row(reference, quantize(reference.model, tokens, format_named(self.format)))


def cells() -> list[Cell]:
    return [Cell(UNQUANTIZED, "fp32"), Cell(UNQUANTIZED, "bf16"),
            *(Cell(KV_CACHE, format) for format in JUDGED_CACHES),
            *(Cell(method, format) for method, (formats, *_) in METHODS.items()
              for format in formats)]


def _bf16_row(reference: Reference) -> QuantizationRow:
    """All of the model in bf16, activations too."""
    shape = reference.model.config.shape
    return QuantizationRow(UNQUANTIZED, "bf16", 16, int(shape.stored_bytes("bf16")),
                           int(shape.streamed_bytes("bf16")),
                           reference.judge(faster(reference.model, "bf16")))


def _cache_row(format: str, reference: Reference) -> QuantizationRow:
    """The reference with its keys and values in `format`; bits and bytes are those of the cache of
    one sequence, with scales and tokens that are not rounded yet."""
    cache, step = JUDGED_CACHES[format]
    shape, T = reference.model.config.shape, reference.tokens.shape[1]
    size = cache.for_model(reference.model, 1, T).allocated_bytes
    quality = reference.quality if cache is ContiguousCache else reference.judge(
        through_cache(reference.model, cache, step))
    bits = 8 * size / shape.kv_bytes(1, T, 1.0)
    return QuantizationRow(KV_CACHE, format, bits, size, size, quality)


def through_cache(model: Decoder, cache: type[KVCache],
                  step: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """tokens [1, T] to logits [1, T, V], `step` tokens at a time through a cache."""
    def run(tokens: torch.Tensor) -> torch.Tensor:
        kept = cache.for_model(model, 1, tokens.shape[1])
        return torch.cat([model(part, kept) for part in tokens.split(step, dim=1)], dim=1)
    return run
