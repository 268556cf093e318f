"""Floating point in 4 or 8 bits: a sign, a few bits of exponent, a few of mantissa.

    exponent 0:   ±       mantissa / 2^m  * 2^(1 - bias)          (subnormal)
    above:        ± (1 + mantissa / 2^m) * 2^(exponent - bias)

E4M3 and E5M2: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", table 1. E2M1: OCP Microscaling Formats (MX)
Specification 1.0, section 5.3.3. Each step is the same *fraction* of a number, where an integer grid has the same step everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Minifloat:
    """`specials` are the codes of largest magnitude that are no numbers: 1 (NaN alone) or IEEE's 2^mantissa (infinity, NaNs)."""

    name: str
    exponent: int
    mantissa: int
    specials: int = 0

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @cached_property
    def magnitudes(self) -> torch.Tensor:
        """The numbers that codes 0 to 2^(bits-1) - 1 mean; they grow with the code. Above half of all codes is the sign."""
        bias, steps = 2 ** (self.exponent - 1) - 1, 2**self.mantissa
        values = []
        for code in range(2 ** (self.bits - 1)):
            exponent, mantissa = divmod(code, steps)
            if exponent == 0:
                values.append(mantissa / steps * 2.0 ** (1 - bias))
            else:
                values.append((1 + mantissa / steps) * 2.0 ** (exponent - bias))
        if self.specials:
            values[-self.specials:] = ([math.inf] if self.specials > 1 else []) + [math.nan] * max(1, self.specials - 1)
        return torch.tensor(values)

    @property
    def _finite(self) -> torch.Tensor:
        return self.magnitudes[:len(self.magnitudes) - self.specials]

    @property
    def largest(self) -> float:
        return float(self._finite[-1])

    @property
    def levels(self) -> torch.Tensor:
        """All numbers, from the smallest to the largest; zero once."""
        return torch.cat((-self._finite.flip(0)[:-1], self._finite))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes (uint8) of the numbers nearest to x; of two equally near, the one whose last bit is 0. Saturates: beyond the
        largest number is the largest.
        """
        x, finite = x.float().contiguous(), self._finite.to(x.device)
        between = (finite[1:] + finite[:-1]) / 2                                            # exact: one bit more than a mantissa has
        # On a border a number gets the lower code; where that is odd, the border is moved below it by the least there is.
        between[1::2] = torch.nextafter(between[1::2], torch.zeros_like(between[1::2]))
        code = torch.bucketize(x.abs(), between, out_int32=True).to(torch.uint8)
        return code + (x.signbit() * 2 ** (self.bits - 1)).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """fp32 of codes (uint8)."""
        table = torch.cat((self.magnitudes, -self.magnitudes)).to(codes.device)
        return table[codes.int()]


E2M1 = Minifloat("e2m1", 2, 1)
E4M3 = Minifloat("e4m3", 4, 3, specials=1)
E5M2 = Minifloat("e5m2", 5, 2, specials=4)
