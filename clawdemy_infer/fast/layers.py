"""A linear layer of which only packed weights are kept."""

from __future__ import annotations

import torch
from torch import nn

from clawdemy_infer.fast.backends import choose
from clawdemy_infer.fast.codes import Codes
from clawdemy_infer.fast.formats import computes_in, packable
from clawdemy_infer.fast.kernels import Kernel, made_by, table


class PackedLinear(nn.Module):
    """x [M, I] -> x Wᵀ + bias [M, O], W kept in `format`: fp32, fp16, bf16, int8 or int4.

    `source` is a float weight [O, I], which is rounded to nearest for integers, or the `Codes` of
    any method that finds better ones. `backend` says whose kernels multiply integers (`backends`).
    Raises ValueError for an unknown format or backend, or for codes of another width.
    """

    def __init__(self, format: str, source: torch.Tensor | Codes, bias: torch.Tensor | None = None,
                 backend: str | None = None) -> None:
        super().__init__()
        matrix = source.codes if isinstance(source, Codes) else source
        computes_in(format, matrix.device.type)                         # refuses an unknown format
        if isinstance(source, Codes) and format != f"int{source.bits}":
            raise ValueError(f"weights={format!r}: the codes are int{source.bits}")
        self.format, self.bias = format, bias
        (self.out_features, self.in_features), self.device = matrix.shape, matrix.device
        source = source if isinstance(source, Codes) else packable(format, source.detach())
        self.kernels: list[tuple[float, Kernel]] = [
            (rows, made_by(makers, source))
            for rows, makers in table(format, matrix.device.type, choose(matrix.device, backend))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = next(kernel for rows, kernel in self.kernels if len(x) <= rows)(x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"format={self.format!r}")
