"""What every number format does, and a matrix of its codes.

    fit(x, outer)            groups x [..., g] -> `Scales`, so that codes reach the largest of each
    encode(x, scales)        -> the nearest codes [..., g], int8 if `signed`, else uint8
    decode(codes, scales)    -> the numbers that they mean, fp32 [..., g]
"""

from dataclasses import dataclass, replace
from typing import Self

import torch


@dataclass(frozen=True)
class Scales:
    """What the codes of groups are measured in, each [..., 1]: fp32, rounded to the bits stored.
    `zero` is None for a symmetric format, `outer` multiplies all scales of a matrix."""

    scale: torch.Tensor
    zero: torch.Tensor | None = None
    outer: torch.Tensor | None = None


class Format:
    """How weights become codes of `bits` bits; its name says all. `group` neighbours of a row share
    a scale, kept as `scale_kind`: fp16, fp32, e4m3, or e8m0 (a power of two). None: a whole row.
    `levels` are the numbers that codes mean under scale 1, from the smallest to the largest."""

    name: str
    bits: int
    group: int | None
    scale_kind: str
    zero_bits: int = 0
    signed: bool = False
    levels: torch.Tensor

    def outer(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The scale of a whole matrix, for a format that has one above those of its groups."""
        return None

    def width(self, columns: int) -> int:
        """Columns that share a scale, in a row of `columns`. ValueError where it is no multiple."""
        g = self.group or columns
        if columns % g:
            fit = ", ".join(str(size) for size in (16, 32, 64, 128, 256) if columns % size == 0)
            raise ValueError(f"format={self.name}: group={g} does not divide the {columns} inputs "
                             f"of a row; {fit or 'none of the usual sizes'} would")
        return g

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """[O, I] -> [O, groups, g]."""
        return x.unflatten(-1, (-1, self.width(x.shape[-1])))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Format) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix as codes [O, I], scale and zero [O, groups] in fp32 (stored in fewer bits), outer a
    scalar. Column k is of group k // width, or where GPTQ has reordered columns, group_of[k]."""

    format: Format
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    outer: torch.Tensor | None = None
    group_of: torch.Tensor | None = None

    @classmethod
    def of(cls, format: Format, weight: torch.Tensor) -> Self:
        """`weight` [O, I] rounded to nearest: in 4 bits (3.75, -3.75, 0.3, -0.8) become 0.5 * (7,
        -8, 1, -2). Raises ValueError for groups that do not divide a row, and for weights that are
        not finite or beyond an fp16 scale."""
        if weight.dim() != 2:
            raise ValueError(f"weight is {list(weight.shape)}: a matrix [O, I] is accepted")
        groups, outer = format.grouped(weight), format.outer(weight)
        scales = format.fit(groups, outer)
        if not scales.scale.isfinite().all() or not weight.isfinite().all():
            raise ValueError(f"{format.name}: the weights are not all finite, or too large for a "
                             "scale")
        codes = format.encode(groups, scales).view(weight.shape)
        zero = None if scales.zero is None else scales.zero.squeeze(-1)
        return cls(format, codes, scales.scale.squeeze(-1), zero, outer)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self) -> torch.Tensor:
        """The weights that the codes mean, fp32 [O, I]."""
        by_column = self.group_of is not None
        part = (slice(None), self.group_of) if by_column else (..., None)
        zero = None if self.zero is None else self.zero[part]
        codes = self.codes if by_column else self.format.grouped(self.codes)
        scales = Scales(self.scale[part], zero, self.outer)
        return self.format.decode(codes, scales).view(self.shape)

    def rows(self, part: slice) -> Self:
        """Some rows: Q out of the fused Q, I and V."""
        return replace(self, codes=self.codes[part], scale=self.scale[part],
                       zero=None if self.zero is None else self.zero[part])

    @property
    def nbytes(self) -> int:
        """Bytes in a file, where rows of codes, scales and zeros each end with a whole byte."""
        (O, I), groups, format = self.shape, self.scale.shape[1], self.format
        scale_bits = {"fp32": 32, "fp16": 16, "e4m3": 8, "e8m0": 8}[format.scale_kind]
        parts = (I, format.bits), (groups, scale_bits), (groups, format.zero_bits)
        rows = O * sum(-(-count * bits // 8) for count, bits in parts)
        return rows + 4 * (self.outer is not None) + 4 * I * (self.group_of is not None)

    @property
    def bits_per_weight(self) -> float:
        """Effective bits: those of the codes, and the share of a weight in its scales and zeros."""
        return 8 * self.nbytes / self.codes.numel()
