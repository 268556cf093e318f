"""Both sides in 8 bits: weights with a scale for each row, activations with one for each token, and
a product of whole numbers ("vector-wise quantization", Dettmers et al. 2022, section 3.1).

    y[m, o] = sum over i of a[m, i] w[o, i]
            ~ scale_a[m] scale_w[o] * sum over i of code_a[m, i] code_w[o, i]

The scales stand outside of the sum: all I products are of integers, which int8 units multiply at
several times the rate of floats. Where a few activations are much larger than the rest of their
token, the scale is theirs, and the rest is lost. `smoothquant` is one answer, LLM.int8() another:
the columns with an activation of 6 or more, outliers, stay in floating point (equation 8):

    y = sum over outliers of x[i] w[i]
      + scale_x scale_w * sum over all other i of code_x[i] code_w[i]
"""

from __future__ import annotations

import torch
from torch import nn

from clawdemy_infer.fast.codes import to_int8
from clawdemy_infer.fast.quantized import with_modules
from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization.format import Quantized
from clawdemy_infer.quantization.integers import IntFormat
from clawdemy_infer.quantization.linears import QuantizedModel, linears

MAX_EXACT_PRODUCTS = 2**24 // 128**2
"""Products of two int8 codes that fp32 adds up exactly, as whole numbers up to 2^24 are."""


def integer_product(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """a [M, I] times w [O, I] transposed, both int8: int32 [M, O], exact. By fp32, some columns at
    a time: the values are those of an int8 kernel, on every machine, and not its speed."""
    columns = zip(*(x.split(MAX_EXACT_PRODUCTS, dim=1) for x in (a, w)), strict=True)
    return sum((x.float() @ y.float().t()).int() for x, y in columns)


class Int8Activations(nn.Module):
    """A linear layer that rounds its input, token by token, and multiplies in int8."""

    def __init__(self, weight: Quantized, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.codes, self.scale, self.bias = weight.codes, weight.scale.squeeze(1), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, I] -> [M, O]."""
        y = self.product(x)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = to_int8(x)                                               # [M, I], [M, 1]
        return integer_product(codes, self.codes) * scale.float() * self.scale


class LLMInt8(Int8Activations):
    """`Int8Activations` but for outliers; `outliers` counts such columns of the last input."""

    threshold = 6.0
    outliers = 0

    def product(self, x: torch.Tensor) -> torch.Tensor:
        outlier = (x.abs() >= self.threshold).any(0)            # [I]; a NaN hides nobody else's
        self.outliers = int(outlier.sum())
        kept = self.codes[:, outlier] * self.scale[:, None]             # [O, outliers], fp32
        return super().product(x.masked_fill(outlier, 0)) + x[:, outlier].float() @ kept.t()


def in_int8(model: Decoder, method: str, module: type[Int8Activations]) -> QuantizedModel:
    """`model` with every matrix of its layers as a `module` of 8-bit weights."""
    format, originals = IntFormat(8), linears(model)
    tensors = {name: Quantized.of(format, linear.weight) for name, linear in originals.items()}
    modules = {name: module(tensors[name], linear.bias) for name, linear in originals.items()}
    return QuantizedModel(method, format, tensors, with_modules(model, modules))


def int8_activations(model: Decoder) -> QuantizedModel:
    """Weights and activations rounded to nearest, and nothing done about outliers."""
    return in_int8(model, "int8 activations", Int8Activations)


def llm_int8(model: Decoder, threshold: float = LLMInt8.threshold) -> QuantizedModel:
    """`model` in 8 bits, weights and activations, with the columns where an activation reaches
    `threshold` in floating point. Raises ValueError for a threshold that is not above 0."""
    if not threshold > 0:
        raise ValueError(f"threshold={threshold}: a number above 0 is accepted; the paper's is 6")
    quantized = in_int8(model, "LLM.int8", LLMInt8)
    for name in quantized.tensors:
        quantized.decoder.get_submodule(name).threshold = threshold
    return quantized
