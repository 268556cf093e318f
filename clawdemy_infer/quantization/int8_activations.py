"""Both sides in 8 bits: weights with a scale for each row, activations with one for each token, and a product of whole numbers.

    y[m, n] = sum over k of a[m, k] w[n, k] = scale_a[m] scale_w[n] * sum over k of code_a[m, k] code_w[n, k]

The scales stand outside of the sum, so that all K products are of integers: what int8 units compute, at several times the rate of
floats. ("Vector-wise quantization", Dettmers et al. 2022, section 3.1.) Where a few activations are much larger than the rest of
their token, the scale is theirs, and the rest becomes zeros and ones: `llm_int8` and `smoothquant` are two answers.
"""

from __future__ import annotations

import torch
from torch import nn

from clawdemy_infer.kv_cache.quantized import to_int8
from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization.integers import IntFormat
from clawdemy_infer.quantization.linears import QuantizedModel, linears, with_modules
from clawdemy_infer.quantization.quantized import Quantized

INT8 = IntFormat(8)
"""Of the weights: one scale for each row."""

EXACT = 2**24 // 128**2
"""Products of two int8 codes that fp32 adds up without an error, whatever they are: whole numbers up to 2^24 are exact."""


def integer_product(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """a [M, K] times w [N, K] transposed, both int8: int32 [M, N], exact.

    In fp32, on whole numbers, a stretch of K at a time, because that runs on every machine. The values are those of an int8 kernel,
    not its speed.
    """
    stretches = zip(a.split(EXACT, dim=1), w.split(EXACT, dim=1), strict=True)
    return sum((x.float() @ y.float().t()).int() for x, y in stretches)


class Int8Activations(nn.Module):
    """A linear layer that rounds its input, token by token, and multiplies in int8."""

    def __init__(self, weight: Quantized, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.codes, self.scale, self.bias = weight.codes, weight.scale.squeeze(1), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] -> [M, N]."""
        y = self.product(x)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = to_int8(x)                                                           # [M, K], [M, 1]
        return integer_product(codes, self.codes) * scale.float() * self.scale


def in_int8(model: Decoder, method: str, module: type[Int8Activations]) -> QuantizedModel:
    """`model` with every matrix of its layers as a `module` of 8-bit weights."""
    tensors = {name: Quantized.of(INT8, linear.weight) for name, linear in linears(model).items()}
    modules = {name: module(tensors[name], linear.bias) for name, linear in linears(model).items()}
    return QuantizedModel(method, INT8, tensors, with_modules(model, modules))


def int8_activations(model: Decoder) -> QuantizedModel:
    """Weights and activations rounded to nearest, and nothing done about outliers."""
    return in_int8(model, "int8 activations", Int8Activations)
