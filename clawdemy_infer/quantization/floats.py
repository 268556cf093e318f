"""Codes that are not equally spaced, and all formats by name. A group's scale brings its largest
weight to the largest code:

    fp8      E4M3, E5M2     a row         fp32
    mxfp4    E2M1           32 weights    a power of two, 8 bits (OCP MX 1.0, sections 5.2 to 6.3)
    nvfp4    E2M1           16 weights    E4M3, under one fp32 scale of the matrix (NVIDIA 2025,
                                          arXiv 2509.25149, section 4)
    nf4      16 quantiles   64 weights    fp32 (Dettmers et al. 2023, QLoRA, section 3)
"""

import difflib
import math
import re

import torch

from clawdemy_infer.quantization.format import Format, Scales
from clawdemy_infer.quantization.integers import IntFormat


class Minifloat:
    """Floating point in 4 or 8 bits: a sign, a few bits of exponent, a few of mantissa.

        exponent 0    ±      mantissa / 2^m  * 2^(1 - bias)          (subnormal)
        above         ± (1 + mantissa / 2^m) * 2^(exponent - bias)

    `specials` are the codes of largest magnitude that are no numbers: 1 (NaN alone) or IEEE's
    2^mantissa (infinity, NaNs)."""

    def __init__(self, exponent: int, mantissa: int, specials: int = 0) -> None:
        self.bits, bias = 1 + exponent + mantissa, 2 ** (exponent - 1) - 1
        values = [((e > 0) + m / 2**mantissa) * 2.0 ** (max(e, 1) - bias)      # rise with the code
                  for e in range(2**exponent) for m in range(2**mantissa)]
        self.finite = torch.tensor(values[:len(values) - specials])
        self.largest = float(self.finite[-1])
        self.levels = torch.cat((-self.finite.flip(0)[:-1], self.finite))       # zero once
        nans = torch.full((specials,), math.nan)
        nans[:specials > 1] = math.inf
        magnitudes = torch.cat((self.finite, nans))
        self.meanings = torch.cat((magnitudes, -magnitudes))                    # by code

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes (uint8) of the numbers nearest to x, the largest for what is too large; of two, the
        one whose last bit is 0."""
        x, finite = x.float().contiguous(), self.finite.to(x.device)
        between = (finite[1:] + finite[:-1]) / 2  # exact: one bit more than a mantissa has
        # A number on a border gets the lower code; where that is odd, the border moves just below.
        between[1::2] = torch.nextafter(between[1::2], torch.zeros_like(between[1::2]))
        code = torch.bucketize(x.abs(), between, out_int32=True).to(torch.uint8)
        return code + (x.signbit() * 2 ** (self.bits - 1)).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.meanings.to(codes.device)[codes.int()]


E2M1 = Minifloat(2, 1)                  # OCP Microscaling Formats (MX) 1.0, section 5.3.3
E4M3 = Minifloat(4, 3, specials=1)      # Micikevicius et al. 2022, "FP8 Formats for Deep Learning"
E5M2 = Minifloat(5, 2, specials=4)      # table 1

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)
"""As the authors' library bitsandbytes publishes them: what a file in nf4 means."""


class NormalFloat:
    """4 bits for weights drawn from a bell curve: the codes are quantiles, each used about as often
    as any other. 8 lie above zero and 7 below, evenly spaced in probability, the outermost at the
    mean of 1 - 1/32 and 1 - 1/30; all are divided by the largest."""

    bits, largest, levels = 4, 1.0, torch.tensor(NF4)       # the code is the place

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        between = (self.levels[1:] + self.levels[:-1]).to(x.device) / 2
        return torch.bucketize(x.float().contiguous(), between, out_int32=True).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.levels.to(codes.device)[codes.int()]


class FloatFormat(Format):
    """Codes of `numbers`, with a scale for each `group`."""

    def __init__(self, name: str, numbers: Minifloat | NormalFloat, group: int | None,
                 scale_kind: str = "fp32") -> None:
        self.name, self.numbers, self.group, self.scale_kind = name, numbers, group, scale_kind
        self.bits, self.levels = numbers.bits, numbers.levels

    def outer(self, weight: torch.Tensor) -> torch.Tensor | None:
        """nvfp4: what brings the largest scale of the matrix to E4M3's largest number."""
        if self.scale_kind != "e4m3":
            return None
        largest = weight.float().abs().max() / (self.numbers.largest * E4M3.largest)
        return largest if largest > 0 else torch.ones_like(largest)

    def fit(self, x: torch.Tensor, outer: torch.Tensor | None = None) -> Scales:
        largest = x.float().abs().amax(-1, keepdim=True)
        if self.scale_kind == "e8m0":
            # The power of two below the largest weight, over that below the largest code (4 of 6):
            # weights come to lie below 8, and those above 6 become 6.
            power = torch.frexp(largest).exponent - math.frexp(self.numbers.largest)[1]
            return Scales(torch.ldexp(torch.ones_like(largest), power.clamp(-126, 127)))
        scale = largest / self.numbers.largest
        if self.scale_kind == "e4m3":
            return Scales(E4M3.decode(E4M3.encode(scale / outer)), outer=outer)
        return Scales(scale)

    def encode(self, x: torch.Tensor, scales: Scales) -> torch.Tensor:
        step = _step(scales)
        return self.numbers.encode(x.float() / step.where(step > 0, 1.0))   # of scale 0, all are 0

    def decode(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        return self.numbers.decode(codes) * _step(scales)


def _step(scales: Scales) -> torch.Tensor:
    return scales.scale if scales.outer is None else scales.scale * scales.outer


FLOATS = {each.name: each for each in (
    FloatFormat("fp8-e4m3", E4M3, None), FloatFormat("fp8-e5m2", E5M2, None),
    FloatFormat("mxfp4", E2M1, 32, "e8m0"), FloatFormat("nvfp4", E2M1, 16, "e4m3"),
    FloatFormat("nf4", NormalFloat(), 64))}
NAMED = {**FLOATS, "q4_1": IntFormat(4, 32, "float")}       # llama.cpp's Q4_1
USUAL = ("int8", "int4-g32", "int4-g64", "int4-g64-asym", "int3-g64", *NAMED)


def format_named(name: str) -> Format:
    """int<bits>, then -g<group> (else a scale for each row), then -asym (a whole zero point) or
    -float (the lowest weight itself); or one of `NAMED`. Raises ValueError naming near ones."""
    if name in NAMED:
        return NAMED[name]
    if found := re.fullmatch(r"int(\d+)(?:-g(\d+))?(?:-(asym|float))?", name):
        bits, group, zero = found.groups()
        return IntFormat(int(bits), int(group) if group else None,
                         {None: "none", "asym": "integer", "float": "float"}[zero])
    near = difflib.get_close_matches(name, USUAL, n=3, cutoff=0.4) or USUAL
    raise ValueError(f"format={name!r} is not known; near ones: {', '.join(near)}")
