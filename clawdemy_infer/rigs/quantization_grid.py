"""Every number format by every method that makes sense for it: the rows of one large table, one at
a time. LLM.int8 and SmoothQuant are for 8 bits, of activations too; GPTQ and AWQ for 3 and 4, as at
8 nothing is left to win."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from clawdemy_infer.fast.faster import faster
from clawdemy_infer.kv_cache import ContiguousCache, KVCache
from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization import awq, format_named, gptq, round_to_nearest
from clawdemy_infer.rigs.quality import Reference
from clawdemy_infer.rigs.quantization_table import UNQUANTIZED, QuantizationRow, judged_row
from clawdemy_infer.variants.int4_cache import KiviCache
from clawdemy_infer.variants.int8_activations import int8_activations, llm_int8
from clawdemy_infer.variants.int8_cache import Int8Cache
from clawdemy_infer.variants.smoothquant import smoothquant

INTEGERS, FLOATS = ("int4-g64", "int4-g32", "int3-g64"), ("nf4", "mxfp4", "nvfp4")

METHODS: list[tuple[str, tuple[str, ...], int, Callable]] = [
    ("RTN", ("int8", *INTEGERS, *FLOATS), 0,
     lambda model, tokens, format: round_to_nearest(model, format)),
    ("int8 activations", ("int8",), 0, lambda model, tokens, format: int8_activations(model)),
    ("LLM.int8", ("int8",), 0, lambda model, tokens, format: llm_int8(model)),
    ("SmoothQuant", ("int8",), 4, lambda model, tokens, format: smoothquant(model, tokens)),
    ("GPTQ act-order", (*INTEGERS, *FLOATS), 12, gptq),
    ("GPTQ", INTEGERS, 12, partial(gptq, act_order=False)),
    ("AWQ", INTEGERS, 4, awq),
]
"""Methods that round weights, the longest last: their formats, the sequences of calibration text
that they take, and what they do to a model."""
KV_CACHE = "KV cache"
JUDGED_CACHES: dict[str, tuple[type[KVCache], int]] = {
    "fp32": (ContiguousCache, 512), "int8": (Int8Cache, 512), "int4-g32": (KiviCache, 32)}
"""Caches by format, and how many tokens go in at a time. `KiviCache` shows new tokens in full and
rounds each 32: in steps of 32 every token sees just what it would see if it came alone."""


class Cell(NamedTuple):
    """One place of the table, by its two names; `make(reference, calibration)` fills it."""

    method: str
    format: str
    make: Callable[[Reference, Callable[[int], torch.Tensor]], QuantizationRow]


def cells() -> Iterator[Cell]:
    yield Cell(UNQUANTIZED, "fp32", lambda reference, calibration: judged_row(reference))
    yield Cell(UNQUANTIZED, "bf16", lambda reference, calibration: _bf16_row(reference))
    for format in JUDGED_CACHES:
        yield Cell(KV_CACHE, format, partial(_cache_row, format))
    for method, formats, sequences, quantize in METHODS:
        for format in formats:
            yield Cell(method, format, partial(_quantized_row, format, sequences, quantize))


def _quantized_row(format: str, sequences: int, quantize: Callable, reference: Reference,
                   calibration: Callable[[int], torch.Tensor]) -> QuantizationRow:
    tokens = calibration(sequences) if sequences else None
    return judged_row(reference, quantize(reference.model, tokens, format_named(format)))


def _bf16_row(reference: Reference) -> QuantizationRow:
    """All of the model in bf16, activations too."""
    shape = reference.model.config.shape
    return QuantizationRow(UNQUANTIZED, "bf16", 16, int(shape.stored_bytes("bf16")),
                           int(shape.streamed_bytes("bf16")),
                           reference.judge(faster(reference.model, "bf16")))


def _cache_row(format: str, reference: Reference, calibration: Callable) -> QuantizationRow:
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
