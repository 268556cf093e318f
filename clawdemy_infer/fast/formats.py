"""Five formats of a weight: three floats, and integers of 8 and of 4 bits."""

from __future__ import annotations

import torch

from clawdemy_infer.fast.codes import Codes, int4_codes, int8_codes

FORMATS = ("fp32", "fp16", "bf16", "int8", "int4")
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ON_A_CPU = {"fp32": "fp32", "fp16": "fp32", "bf16": "bf16", "int8": "fp32", "int4": "bf16"}
"""What activations and cache are in, by format of the weights. Within a product of int8, a CPU with
AVX512_BF16 rounds activations to bf16 (`cpp/product.h`)."""
ON_A_GPU = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "bf16", "int4": "bf16"}


def computes_in(format: str, device: str) -> str:
    """The name of the activations' dtype for weights in `format`. Raises ValueError for an unknown
    one."""
    known = ON_A_CPU if device == "cpu" else ON_A_GPU
    if format not in known:
        raise ValueError(f"weights={format!r}: on a {device.upper()}, {', '.join(known)} are "
                         "accepted")
    return known[format]


def packable(format: str, weight: torch.Tensor) -> torch.Tensor | Codes:
    """What the kernels of `format` are made of: the weight [O, I] in that dtype, or its codes,
    rounded to nearest."""
    if format in FLOATS:
        return weight.to(FLOATS[format])
    return int8_codes(weight) if format == "int8" else int4_codes(
        weight, 32 if weight.shape[1] % 64 else 64)


def copy_of(source: torch.Tensor | Codes) -> torch.Tensor | Codes:
    if isinstance(source, torch.Tensor):
        return source.clone()
    return Codes(*(part if part is None else part.clone() for part in source))
