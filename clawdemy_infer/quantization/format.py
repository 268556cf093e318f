"""What every number format does: find the scales of a group of weights, turn weights into codes, and codes back into numbers.

    fit       numbers -> scale, and a zero where the format has one
    encode    numbers, scale -> codes, the nearest ones; what lies beyond the last code becomes that one
    decode    codes, scale -> numbers

`integers` and `floats` are the two families. Whatever chooses codes by another rule than the nearest one (GPTQ) or
scales by another rule than the largest weight (AWQ) uses the same three functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

TENSOR = "tensor"
"""The group that is a whole matrix."""


@dataclass(frozen=True)
class Scales:
    """What the codes of a group are measured in, each [..., 1], as fp32 but already rounded to the bits that are stored.

    `zero` is None for a format that is symmetric; `outer` is the one number by which all scales of a matrix are multiplied.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None = None
    outer: torch.Tensor | None = None

    @property
    def step(self) -> torch.Tensor:
        """[..., 1]: the size of code 1."""
        return self.scale if self.outer is None else self.scale * self.outer


class Format(ABC):
    """How weights become codes of `bits` bits. `group` neighbours of a row share a scale: a number, None for a whole row
    (per channel), or `TENSOR`.
    """

    name: str
    bits: int
    group: int | str | None
    scale_kind: str
    """How a scale is stored: fp16, fp32, e4m3, or e8m0 (a power of two)."""
    zero_bits: int = 0
    signed: bool = False

    @property
    def scale_bits(self) -> int:
        return {"fp32": 32, "fp16": 16, "e4m3": 8, "e8m0": 8}[self.scale_kind]

    @property
    def parameter_bits(self) -> int:
        """Bits that one group stores beside its codes."""
        return self.scale_bits + self.zero_bits

    @property
    @abstractmethod
    def levels(self) -> torch.Tensor:
        """All numbers that a code can mean when its scale is 1, from the smallest to the largest."""

    @abstractmethod
    def fit(self, x: torch.Tensor, outer: torch.Tensor | None = None) -> Scales:
        """The scales of groups x [..., g], so that the largest of each is among the codes."""

    @abstractmethod
    def encode(self, x: torch.Tensor, scales: Scales) -> torch.Tensor:
        """Codes [..., g] of x [..., g]: int8 where the format is `signed`, else uint8."""

    @abstractmethod
    def decode(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        """The numbers, fp32 [..., g], that codes [..., g] mean."""

    def outer(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The scale of a whole matrix, for a format that has one above those of its groups."""
        return None

    def width(self, columns: int) -> int:
        """Columns that share a scale, of a row of `columns`. ValueError where the groups would not be whole."""
        if self.group is None or self.group == TENSOR:
            return columns
        if columns % self.group:
            fit = ", ".join(str(size) for size in (16, 32, 64, 128, 256) if columns % size == 0) or "none of the usual sizes"
            raise ValueError(f"{self.name}: group={self.group} does not divide the {columns} inputs of a row; {fit} would")
        return self.group

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """[N, K] -> [N, groups, g]; [1, 1, N*K] where the matrix is one group."""
        width = self.width(x.shape[-1])
        return x.reshape(1, 1, -1) if self.group == TENSOR else x.unflatten(-1, (-1, width))

    def __repr__(self) -> str:
        return self.name
