"""A product in C++ (`cpp/product.h`): x [..., I] by a packed weight of O outputs.

    Y [M, O] = X [M, I] Wᵀ          sums in fp32
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn import functional as F

from clawdemy_infer.fast import cpp
from clawdemy_infer.fast.codes import Codes


class CppProduct:
    """x [..., I] -> [..., O], in fp32 or bf16 as x is, for a float weight [O, I] in `format`, or
    its codes.

    `panels` [O / 16, bytes of a panel] hold 16 outputs side by side, and for int4 the scales of
    `group` inputs each; zeros fill them up to multiples of 16 outputs and 2 inputs. Raises
    NotImplementedError for groups that are no multiple of 8, and where there is no compiler; a
    call, ValueError for an x of another width or type.
    """

    def __init__(self, format: str, source: torch.Tensor | Codes) -> None:
        if not cpp.available():
            raise NotImplementedError("there is no C++ compiler here")
        codes = source.codes if isinstance(source, Codes) else source
        self.format, self.panels = format, panels(format, source)
        self.O, self.I = codes.shape
        self.filled = 16 * len(self.panels), self.I + self.I % 2
        self.group = self.I // source.scales.shape[1] if format == "int4" else self.filled[1]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.I:
            raise ValueError(f"x is {list(x.shape)}: the last dimension must be the I={self.I} "
                             "inputs")
        if x.dtype not in cpp.TYPES:
            raise ValueError(f"x is {x.dtype}: float32 or bfloat16 is accepted")
        O, I = self.filled
        if I > self.I:                              # `pad` copies x even where it adds nothing
            x = F.pad(x, (0, I - self.I))
        x, y = x.contiguous(), x.new_empty(*x.shape[:-1], O)
        run = code(self.format, x.dtype)
        run(*cpp.pointers(x, self.panels, y), y.numel() // O, I, O, self.group,
            torch.get_num_threads())
        return y[..., :self.O].contiguous()


@functools.cache
def code(format: str, dtype: torch.dtype) -> Callable:
    """The machine code for x and y of that type."""
    made = cpp.library("product", FORMAT=format.upper(), Result=cpp.TYPES[dtype])
    return cpp.function(made, "product", arrays=3, numbers=5)


def panels(format: str, source: torch.Tensor | Codes) -> torch.Tensor:
    """The bytes of a float weight [O, I], or of its codes, as `cpp/product.h` lays them out: [O /
    16, bytes of a panel]. Raises NotImplementedError as `CppProduct` does."""
    codes, scales, zeros = source if isinstance(source, Codes) else (source.detach(), None, None)
    O, I = codes.shape
    group = I // scales.shape[1] if format == "int4" else I
    if format == "int4" and group % 8:
        raise NotImplementedError(f"weight [{O}, {I}] in groups of {group}: groups by the eight "
                                  "are accepted")
    rows = -O % 16
    if rows or I % 2:
        codes = F.pad(codes, (0, I % 2, 0, rows))
    codes = codes.contiguous()
    O, I = codes.shape
    if format in ("fp32", "fp16"):
        return as_bytes(codes.view(O // 16, 16, I).mT)
    if format in ("bf16", "int8"):
        pairs = as_bytes(codes.view(O // 16, 16, I // 2, 2).transpose(1, 2))
    if format == "bf16":
        return pairs
    if format == "int8":
        scales = F.pad(scales.float(), (0, rows)).view(-1, 16)
        return torch.cat((as_bytes(scales), pairs), 1).contiguous()
    # A word of 16 bits, low byte first, has the codes of inputs 0, 2, 4, 6 of eight, or of 1, 3, 5,
    # 7: [panels, 16 outputs, groups, eights, byte, nibble, word] -> [panels, groups, bytes].
    nibbles = codes.view(O // 16, 16, I // group, group // 8, 2, 2, 2)
    words = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
    words = words.permute(0, 2, 3, 1, 5, 4).flatten(2)
    scales, zeros = (F.pad(each.float(), (0, 0, 0, rows)) for each in (scales, zeros))
    both = torch.stack((scales, -zeros * scales), -1).half()
    both = both.view(O // 16, 16, I // group, 2).permute(0, 2, 3, 1).flatten(2).contiguous()
    return torch.cat((words, both.view(torch.uint8)), -1).flatten(1).contiguous()


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """[panels, ...] -> [panels, bytes]."""
    return x.contiguous().view(len(x), -1).view(torch.uint8)
