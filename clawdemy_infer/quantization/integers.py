"""Integers as codes: the plain grid of equal steps, with or without a zero point.

    symmetric          x ~ code * scale                     -2^(b-1) <= code < 2^(b-1)
    integer zero       x ~ (code - zero) * scale                   0 <= code < 2^b
    float zero         x ~ code * scale + zero                     0 <= code < 2^b

Mostly positive weights waste codes of a symmetric grid. A zero point moves it: by whole steps, so
that 0 stays 0 (GPTQ's and AWQ's files), or freely (llama.cpp's Q4_1, PyTorch's packed int4)."""

import torch

from clawdemy_infer.quantization.format import Format, Scales

ZEROS = {"none": "", "integer": "-asym", "float": "-float"}     # zero points in a format's name
SMALLEST_SCALE = 2.0**-24       # fp16 above 0; zeros need a scale too, since 0 / 0 is no code


class IntFormat(Format):
    """Integers of 2 to 8 bits. An "integer" zero takes as many bits as a code, a "float" one 16.
    Raises ValueError for other bits, groups or zeros."""

    scale_kind = "fp16"

    def __init__(self, bits: int, group: int | None = None, zero: str = "none") -> None:
        if not 2 <= bits <= 8:
            raise ValueError(f"bits={bits}: 2 to 8 are accepted")
        if zero not in ZEROS:
            raise ValueError(f"zero={zero!r}: accepted are {', '.join(ZEROS)}")
        if group is not None and group < 1:
            raise ValueError(f"group={group}: a number of weights, or None for a whole row, is "
                             "accepted")
        self.bits, self.group, self.zero, self.signed = bits, group, zero, zero == "none"
        self.name = f"int{bits}{f'-g{group}' if group else ''}{ZEROS[zero]}"
        self.zero_bits = {"none": 0, "integer": bits, "float": 16}[zero]
        self.lowest = -(2 ** (bits - 1)) if self.signed else 0
        self.highest = self.lowest + 2**bits - 1
        self.levels = torch.arange(self.lowest, self.highest + 1, dtype=torch.float32)

    def fit(self, x: torch.Tensor, outer: torch.Tensor | None = None) -> Scales:
        x, most = x.float(), self.highest
        if self.signed:
            # Few bits cannot leave -2^(b-1) out: half a step is given up where the largest weight
            # is positive (as GPTQ's and compressed-tensors' grids do).
            return Scales(_fp16(x.abs().amax(-1, True) / (most if self.bits == 8 else most + 0.5)))
        low, high = x.aminmax(dim=-1, keepdim=True)
        if self.zero == "float":
            low = low.half().float()
            return Scales(_fp16((high - low) / most), low)
        low, high = low.clamp(max=0), high.clamp(min=0)     # the grid has to hold the weight 0
        scale = _fp16((high - low) / most)
        return Scales(scale, (-low / scale).round().clamp(0, most))

    def encode(self, x: torch.Tensor, scales: Scales) -> torch.Tensor:
        x = x.float() - scales.zero if self.zero == "float" else x.float()
        codes = (x / scales.scale).round() + (scales.zero if self.zero == "integer" else 0)
        return codes.clamp(self.lowest, self.highest).to(torch.int8 if self.signed else torch.uint8)

    def decode(self, codes: torch.Tensor, scales: Scales) -> torch.Tensor:
        if self.zero == "integer":
            return (codes - scales.zero) * scales.scale
        return codes * scales.scale + (0 if self.signed else scales.zero)


def _fp16(scale: torch.Tensor) -> torch.Tensor:
    """As it is stored, before any code is chosen: else all codes would be a little off."""
    return scale.half().float().clamp(SMALLEST_SCALE)
