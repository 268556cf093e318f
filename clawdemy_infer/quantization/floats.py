"""Codes that are not equally spaced: fp8, mxfp4, nvfp4 and nf4. A group's scale brings its largest weight to the largest code.

They differ in the numbers that a code may mean, in how many weights share a scale, and in how that scale is itself rounded:

    fp8       E4M3 or E5M2    a row           fp32
    mxfp4     E2M1            32 weights      a power of two, 8 bits       OCP MX Specification 1.0, sections 5.2, 5.3.3 and 6.3
    nvfp4     E2M1            16 weights      E4M3, under one fp32 scale of the matrix       NVIDIA 2025, arXiv 2509.25149, section 4
    nf4       16 quantiles    64 weights      fp32                         Dettmers et al. 2023 (QLoRA), section 3
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clawdemy_infer.quantization.format import TENSOR, Format, Scales
from clawdemy_infer.quantization.minifloat import E2M1, E4M3, E5M2, Minifloat

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
"""nf4's numbers, as the authors' library bitsandbytes publishes them: what a file in nf4 means."""


@dataclass(frozen=True)
class NormalFloat:
    """4 bits for weights drawn from a bell curve: the 16 codes are quantiles, so that each is used about as often as any other.

    8 quantiles above zero and 7 below, evenly spaced in probability, zero itself, and all divided by the largest. The outermost
    probability, the same on both sides, is the mean of 1 - 1/32 and 1 - 1/30.
    """

    name: str = "nf4"
    bits: int = 4
    largest: float = 1.0

    @property
    def levels(self) -> torch.Tensor:
        """[16], from -1 to 1; the code is the place."""
        return torch.tensor(NF4)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        levels = self.levels.to(x.device)
        return torch.bucketize(x.float().contiguous(), (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.levels.to(codes.device)[codes.int()]


@dataclass(frozen=True, repr=False)
class FloatFormat(Format):
    """Codes of `numbers`, with a scale for each `group` that is kept as `scale_kind`: fp32, e8m0 (a power of two) or e4m3."""

    name: str
    numbers: Minifloat | NormalFloat
    group: int | str | None
    scale_kind: str = "fp32"

    @property
    def bits(self) -> int:
        return self.numbers.bits

    @property
    def levels(self) -> torch.Tensor:
        return self.numbers.levels

    def outer(self, weight: torch.Tensor) -> torch.Tensor | None:
        """nvfp4: what brings the largest scale of the matrix to E4M3's largest number."""
        if self.scale_kind != "e4m3":
            return None
        largest = weight.float().abs().max() / (self.numbers.largest * E4M3.largest)
        return largest if largest > 0 else torch.ones_like(largest)

    def fit(self, x: torch.Tensor, outer: torch.Tensor | None = None) -> Scales:
        largest = x.float().abs().amax(-1, keepdim=True)
        if self.scale_kind == "e8m0":
            # The largest power of two that is not above the largest weight, over that of the codes (4 of 6). So weights come to
            # lie below 8, and those above 6 become 6.
            of_codes = self.numbers.largest
            power = _floor_log2(largest) - _floor_log2(torch.tensor(of_codes))
            return Scales(torch.ldexp(torch.ones_like(largest), power.clamp(-126, 127)))
        scale = largest / self.numbers.largest
        if self.scale_kind == "e4m3":
            return Scales(E4M3.decode(E4M3.encode(scale / outer)), outer=outer)
        return Scales(scale)

    def encode(self, x: torch.Tensor, scales: Scales) -> torch.Tensor:
        step = scales.step
        return self.numbers.encode(x.float() / step.where(step > 0, 1.0))                   # of scale 0, any code is 0

    def decode(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        return self.numbers.decode(codes) * scales.step


def _floor_log2(x: torch.Tensor) -> torch.Tensor:
    return torch.frexp(x).exponent - 1                                                      # exact, which log2 is not


def fp8(numbers: Minifloat, group: int | str | None = None) -> FloatFormat:
    """fp8 per row, or for the whole matrix."""
    return FloatFormat(f"fp8-{numbers.name}{'-tensor' if group == TENSOR else ''}", numbers, group)


FLOATS = {each.name: each for each in (
    fp8(E4M3), fp8(E4M3, TENSOR), fp8(E5M2), fp8(E5M2, TENSOR),
    FloatFormat("mxfp4", E2M1, 32, "e8m0"), FloatFormat("nvfp4", E2M1, 16, "e4m3"), FloatFormat("nf4", NormalFloat(), 64),
)}
