"""Linear layers that run on the kernels of their format."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from clawdemy_infer.backends import choose
from clawdemy_infer.linear.choice import FLOATS, by_rows, computes_in, packable
from clawdemy_infer.linear.codes import Codes
from clawdemy_infer.linear.kernels import CANDIDATES, FALLBACK, TRITON, plain

SMALL = 2**17
"""A matrix of fewer numbers stays in the nearest caches, and is multiplied as it is."""


class Product:
    """x [M, K] -> x Wᵀ [M, N] by the kernel that was chosen for this format, this shape and M. Layouts are packed when first needed."""

    def __init__(self, format: str, source: torch.Tensor | Codes, backend: str | None = None) -> None:
        self.source = source
        matrix = source.codes if isinstance(source, Codes) else source
        N, K = matrix.shape
        self.fallback = FALLBACK[format]
        if format in TRITON and choose(matrix.device, backend) == "triton":
            self.steps = [(math.inf, TRITON[format].__name__)]
        elif matrix.device.type == "cpu":
            self.steps = by_rows(format, K, N)
        else:
            self.steps = [(math.inf, "plain" if format in FLOATS else self.fallback.__name__)]
        ours = [TRITON[format]] if format in TRITON else []
        self.makers = {make.__name__: make for make in [plain, FALLBACK[format], *CANDIDATES[format], *ours]}
        self.kernels = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        M = len(x)
        for rows, name in self.steps:
            if rows >= M:
                kernel = self.kernels.get(name) or self.packed(name)
                return kernel(x)

    def packed(self, name: str):
        try:
            kernel = self.makers[name](self.source)
        except (RuntimeError, NotImplementedError, AttributeError):         # it does not take this shape, or is not in this PyTorch
            kernel = self.fallback(self.source)
        self.kernels[name] = kernel
        return kernel

    def drop_source(self) -> None:
        """Pack all layouts that may be needed, and keep nothing else."""
        for _, name in self.steps:
            self.packed(name)
        self.source = None


class Fast(nn.Module):
    """`F.linear` by the chosen kernel, for a weight that is kept as it is beside its packed layout.

    When the weight has been written to or is another one, it is packed anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stamp = self.product = None

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if weight.numel() < SMALL or weight.dtype == torch.float16 or weight.device.type != "cpu":
            return F.linear(x, weight)
        stamp = weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version
        if stamp != self.stamp:
            self.product = Product("fp32" if weight.dtype == torch.float32 else "bf16", weight.detach())
            self.stamp = stamp
        return self.product(x)

    def __deepcopy__(self, memo: dict) -> Fast:
        return Fast()                   # a copy's weight is another one, and a packed layout cannot be copied


class Linear(nn.Linear):
    """`nn.Linear`, with its weight in sight, on the fastest kernel of this CPU."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias)
        self.fast = Fast()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fast.forward(x, self.weight)
        return y if self.bias is None else y + self.bias


class PackedLinear(nn.Module):
    """A linear layer of which only packed weights are kept, in `format`: fp32, fp16, bf16, int8 or int4.

    `source` is a float weight [N, K], which is rounded to nearest for integers, or the `Codes` of any method that finds better
    ones. `backend` says whose kernels multiply integers (`backends`). Raises ValueError for an unknown format or backend, or for codes
    of another width.
    """

    def __init__(self, format: str, source: torch.Tensor | Codes, bias: torch.Tensor | None = None, backend: str | None = None) -> None:
        super().__init__()
        computes_in(format, (source.codes if isinstance(source, Codes) else source).device.type)       # refuses what it does not know
        if isinstance(source, Codes) and format != f"int{source.bits}":
            raise ValueError(f"weights={format!r}: the codes are int{source.bits}")
        self.format, self.bias = format, bias
        matrix = source.codes if isinstance(source, Codes) else source
        (self.out_features, self.in_features), self.device = matrix.shape, matrix.device
        self.product = Product(format, source if isinstance(source, Codes) else packable(format, source.detach()), backend)
        self.product.drop_source()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format!r}"
