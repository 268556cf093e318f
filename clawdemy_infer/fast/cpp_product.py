"""A product in C++ (`cpp/product.h`): x [..., K] by a packed weight of N outputs.

    Y [M, N] = X [M, K] Wᵀ          sums in fp32
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from clawdemy_infer.fast import cpp
from clawdemy_infer.fast.codes import Codes


class CppProduct:
    """x [..., K] -> [..., N], in fp32 or bf16 as x is, for a float weight [N, K] in `format`, or
    its codes.

    `panels` [N / 16, bytes of a panel] hold 16 outputs side by side, and for int4 the scales of
    `group` inputs each. Raises NotImplementedError unless N is a multiple of 16, K of 2, a group of
    8, and where there is no compiler; a call, ValueError for an x of another width.
    """

    def __init__(self, format: str, source: torch.Tensor | Codes) -> None:
        if not cpp.available():
            raise NotImplementedError("there is no C++ compiler here")
        codes = source.codes if isinstance(source, Codes) else source
        self.format, self.panels = format, panels(format, source)
        self.N, self.K = codes.shape
        self.group = self.K // source.scales.shape[1] if format == "int4" else self.K

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.K:
            raise ValueError(f"x is {list(x.shape)}: the last dimension must be the K={self.K} "
                             "inputs")
        x, y = x.contiguous(), x.new_empty(*x.shape[:-1], self.N)
        run = code(self.format, x.dtype)
        run(*cpp.pointers(x, self.panels, y), x.numel() // self.K, self.K, self.N, self.group)
        return y


@functools.cache
def code(format: str, dtype: torch.dtype) -> Callable:
    """The machine code for x and y of that type."""
    made = cpp.library("product", FORMAT=format.upper(), Y=cpp.TYPES[dtype])
    return cpp.function(made, "product", pointers=3, numbers=4)


def panels(format: str, source: torch.Tensor | Codes) -> torch.Tensor:
    """The bytes of a float weight [N, K], or of its codes, as `cpp/product.h` lays them out: [N /
    16, bytes of a panel]. Raises NotImplementedError as `CppProduct` does."""
    codes = (source.codes if isinstance(source, Codes) else source.detach()).contiguous()
    N, K = codes.shape
    group = K // source.scales.shape[1] if format == "int4" else 8
    if N % 16 or K % 2 or group % 8:
        raise NotImplementedError(f"weight [{N}, {K}] in groups of {group}: outputs by the "
                                  "sixteen, inputs by the two, groups by the eight are accepted")
    if format in ("fp32", "fp16"):
        return as_bytes(codes.view(N // 16, 16, K).mT)
    if format in ("bf16", "int8"):
        pairs = as_bytes(codes.view(N // 16, 16, K // 2, 2).transpose(1, 2))
        if format == "bf16":
            return pairs
        return torch.cat((as_bytes(source.scales.float().view(-1, 16)), pairs), 1).contiguous()
    # A word of 16 bits, low byte first, has the codes of inputs 0, 2, 4, 6 of eight, or of 1, 3, 5,
    # 7: [panels, 16 outputs, groups, eights, byte, nibble, word] -> [panels, groups, bytes].
    nibbles = codes.view(N // 16, 16, K // group, group // 8, 2, 2, 2)
    words = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
    words = words.permute(0, 2, 3, 1, 5, 4).flatten(2)
    scales = source.scales.float()
    both = torch.stack((scales, -source.zeros.float() * scales), -1).half()
    both = both.view(N // 16, 16, K // group, 2).permute(0, 2, 3, 1).flatten(2).contiguous()
    return torch.cat((words, both.view(torch.uint8)), -1).flatten(1).contiguous()


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """[panels, ...] -> [panels, bytes]."""
    return x.contiguous().view(len(x), -1).view(torch.uint8)
