"""Every number format by every method that makes sense for it: the rows of one large table, one at a time.

    RTN                          any format
    LLM.int8, SmoothQuant        8 bits, of the activations too: what they are for
    GPTQ, AWQ                    3 and 4 bits: at 8 nothing is left to win
    KV cache                     the weights as they are, keys and values rounded
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from clawdemy_infer.kv_cache import ContiguousCache, Int8Cache, KiviCache, KVCache
from clawdemy_infer.model import Decoder, with_weights
from clawdemy_infer.quantization.awq import awq
from clawdemy_infer.quantization.evaluate import Reference
from clawdemy_infer.quantization.formats import format_named
from clawdemy_infer.quantization.gptq import gptq
from clawdemy_infer.quantization.int8_activations import int8_activations
from clawdemy_infer.quantization.linears import QuantizedModel, round_to_nearest
from clawdemy_infer.quantization.llm_int8 import llm_int8
from clawdemy_infer.quantization.report import UNQUANTIZED, Row, row_of, unquantized_row
from clawdemy_infer.quantization.smoothquant import smoothquant

INTEGERS, FLOATS = ("int4-g64", "int4-g32", "int3-g64"), ("nf4", "mxfp4", "nvfp4")

CALIBRATION = {"GPTQ": 12, "GPTQ act-order": 12, "AWQ": 4, "SmoothQuant": 4}
"""Sequences of calibration text that a method takes: AWQ fits few numbers, and runs each block many times."""

KV = "KV cache"
CACHES: dict[str, tuple[type[KVCache], int]] = {"fp32": (ContiguousCache, 512), "int8": (Int8Cache, 512), "int4-g32": (KiviCache, 32)}
"""By format, and how many tokens go in at a time. `KiviCache` shows new tokens in full and rounds each 32: in steps of 32 every token
sees just what it would see if it came alone."""


class Cell(NamedTuple):
    """One place of the table, by its two names; `make(reference, calibration)` fills it."""

    method: str
    format: str
    make: Callable[[Reference, Callable[[int], torch.Tensor]], Row]


def cells() -> Iterator[Cell]:
    """All places, those that take longest last."""
    yield Cell(UNQUANTIZED, "fp32", lambda reference, calibration: unquantized_row(reference))
    yield Cell(UNQUANTIZED, "bf16", lambda reference, calibration: _bf16_row(reference))
    for format, (cache, step) in CACHES.items():
        yield Cell(KV, format, lambda reference, calibration, of=(format, cache, step): cache_row(reference, *of))
    for format in ("int8", *INTEGERS, *FLOATS):
        yield _cell("RTN", format, lambda model, tokens, format: round_to_nearest(model, format))
    yield _cell("int8 activations", "int8", lambda model, tokens, format: int8_activations(model))
    yield _cell("LLM.int8", "int8", lambda model, tokens, format: llm_int8(model))
    yield _cell("SmoothQuant", "int8", lambda model, tokens, format: smoothquant(model, tokens))
    for format in (*INTEGERS, *FLOATS):
        yield _cell("GPTQ act-order", format, gptq)
    for format in INTEGERS:
        yield _cell("GPTQ", format, partial(gptq, act_order=False))
    for format in INTEGERS:
        yield _cell("AWQ", format, awq)


def _cell(method: str, name: str, quantize: Callable[..., QuantizedModel]) -> Cell:
    def make(reference: Reference, calibration: Callable[[int], torch.Tensor]) -> Row:
        tokens = calibration(CALIBRATION[method]) if method in CALIBRATION else None
        return row_of(reference, quantize(reference.model, tokens, format_named(name)))
    return Cell(method, name, make)


def _bf16_row(reference: Reference) -> Row:
    """All of the model in bf16, activations too."""
    shape = reference.model.config.shape
    return Row(UNQUANTIZED, "bf16", 16, int(shape.stored_bytes("bf16")), int(shape.streamed_bytes("bf16")),
               reference.judge(with_weights(reference.model, "bf16")))


def cache_row(reference: Reference, format: str, cache: type[KVCache], step: int) -> Row:
    """The reference with its keys and values in `format`. `bits` are those of a number in the cache, and the bytes those of the cache of
    one sequence: scales, and tokens that are not rounded yet, are counted in.
    """
    shape, T = reference.model.config.shape, reference.tokens.shape[1]
    size = cache.for_model(reference.model, 1, T).allocated_bytes
    quality = reference.quality if cache is ContiguousCache else reference.judge(through(reference.model, cache, step))
    return Row(KV, format, 8 * size / shape.kv_bytes(1, T, 1.0), size, size, quality)


def through(model: Decoder, cache: type[KVCache], step: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """tokens [1, T] to logits [1, T, V], `step` tokens at a time through a cache."""
    def run(tokens: torch.Tensor) -> torch.Tensor:
        kept = cache.for_model(model, 1, tokens.shape[1])
        return torch.cat([model(part, kept) for part in tokens.split(step, dim=1)], dim=1)
    return run
