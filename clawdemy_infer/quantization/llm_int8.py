"""LLM.int8(): the few columns of the input that hold outliers stay in floating point, all others are multiplied in int8.

    y = sum over k in O of x[k] w[k]  +  scale_x scale_w * sum over k not in O of code_x[k] code_w[k]

O: the columns in which some activation of the batch is 6 or more. Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for
Transformers at Scale", section 3.2 and equation 8. The weights of O are taken out of their 8 bits, as in the authors' library, so
that the model is stored once and in 8 bits.
"""

from __future__ import annotations

import torch

from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization.int8_activations import Int8Activations, in_int8
from clawdemy_infer.quantization.linears import QuantizedModel


class LLMInt8(Int8Activations):
    """An `Int8Activations` that leaves outliers out. `outliers` counts the columns of the last input that were."""

    threshold = 6.0
    outliers = 0

    def product(self, x: torch.Tensor) -> torch.Tensor:
        outlier = x.abs().amax(0) >= self.threshold                                         # [K]
        self.outliers = int(outlier.sum())
        kept = self.codes[:, outlier] * self.scale[:, None]                                 # [N, |O|], fp32
        return super().product(x.masked_fill(outlier, 0)) + x[:, outlier].float() @ kept.t()


def llm_int8(model: Decoder, threshold: float = LLMInt8.threshold) -> QuantizedModel:
    """`model` in 8 bits, weights and activations, with the columns where an activation reaches `threshold` in floating point.

    Raises ValueError for a threshold that is not above 0.
    """
    if not threshold > 0:
        raise ValueError(f"threshold={threshold}: a number above 0 is accepted; the paper's is 6")
    quantized = in_int8(model, "LLM.int8", LLMInt8)
    for name in quantized.tensors:
        quantized.decoder.get_submodule(name).threshold = threshold
    return quantized
