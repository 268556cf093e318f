"""Whole numbers as codes: the plain grid of equal steps, with or without a zero point.

    symmetric          x ~ code * scale                     -2^(b-1) <= code < 2^(b-1)
    integer zero       x ~ (code - zero) * scale                   0 <= code < 2^b
    float zero         x ~ code * scale + zero                     0 <= code < 2^b

A group whose weights are mostly positive wastes codes of a symmetric grid. A zero point moves the grid: by whole steps, so that
the weight 0 stays exactly 0 (GPTQ's and AWQ's files), or by any amount (llama.cpp's Q4_1, PyTorch's packed int4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from clawdemy_infer.quantization.format import TENSOR, Format, Scales

ZEROS = ("none", "integer", "float")


@dataclass(frozen=True, repr=False)
class IntFormat(Format):
    """Integers of 2 to 8 bits. A scale takes 16 bits (fp16), a zero as many as a code ("integer") or 16 ("float").

    Raises ValueError for other bits, groups or zeros.
    """

    bits: int
    group: int | str | None = None
    zero: str = "none"
    scale_kind: ClassVar[str] = "fp16"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: 2 to 8 are accepted")
        if self.zero not in ZEROS:
            raise ValueError(f"zero={self.zero!r}: accepted are {', '.join(ZEROS)}")
        if self.group not in (None, TENSOR) and (not isinstance(self.group, int) or self.group < 1):
            raise ValueError(f"group={self.group!r}: a number of weights, {TENSOR!r}, or None for a whole row is accepted")

    @property
    def name(self) -> str:
        """As `format_named` reads it: int4-g64-asym."""
        group = {None: "", TENSOR: "-tensor"}.get(self.group, f"-g{self.group}")
        return f"int{self.bits}{group}{ {'none': '', 'integer': '-asym', 'float': '-float'}[self.zero]}"

    @property
    def signed(self) -> bool:
        return self.zero == "none"

    @property
    def zero_bits(self) -> int:
        return {"none": 0, "integer": self.bits, "float": 16}[self.zero]

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def highest(self) -> int:
        return self.lowest + 2**self.bits - 1

    @property
    def levels(self) -> torch.Tensor:
        return torch.arange(self.lowest, self.highest + 1, dtype=torch.float32)

    def fit(self, x: torch.Tensor, outer: torch.Tensor | None = None) -> Scales:
        x = x.float()
        if self.signed:
            return Scales(_fp16(x.abs().amax(-1, keepdim=True) / self._reach))
        low, high = x.aminmax(dim=-1, keepdim=True)
        if self.zero == "float":
            low = low.half().float()
            return Scales(_fp16((high - low) / self.highest), low)
        low, high = low.clamp(max=0), high.clamp(min=0)                 # the grid has to hold the weight 0
        scale = _fp16((high - low) / self.highest)
        return Scales(scale, (-low / scale).round().clamp(0, self.highest))

    @property
    def _reach(self) -> float:
        """The code that the largest weight becomes. In few bits the codes on one side are too precious to leave -2^(b-1) out:
        half a step is given up where the largest weight is positive (as GPTQ's and compressed-tensors' symmetric grids do).
        """
        return self.highest if self.bits == 8 else self.highest + 0.5

    def encode(self, x: torch.Tensor, scales: Scales) -> torch.Tensor:
        if self.zero == "float":
            codes = ((x.float() - scales.zero) / scales.scale).round()
        else:
            codes = (x.float() / scales.scale).round()
            codes = codes if scales.zero is None else codes + scales.zero
        return codes.clamp(self.lowest, self.highest).to(torch.int8 if self.signed else torch.uint8)

    def decode(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        if self.signed:
            return codes * scales.scale
        if self.zero == "integer":
            return (codes - scales.zero) * scales.scale
        return codes * scales.scale + scales.zero


def _fp16(scale: torch.Tensor) -> torch.Tensor:
    # Rounded before any code is chosen: codes for a scale that is not the stored one would all be a little off.
    return scale.half().float().clamp(min=2.0**-24)                     # the smallest fp16: 0 / 0 is no code
