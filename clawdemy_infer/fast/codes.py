"""Integers for weights: round to nearest, and bytes without a gap between them. How the integers
were found does not matter to the kernels that run them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from clawdemy_infer.quantization.integers import SMALLEST_SCALE


class Codes(NamedTuple):
    """A matrix of O outputs and I inputs as integers: w = (code - zero) * scale.

    int8: codes [O, I] int8 in -127..127, scales [O], zeros None. int4: codes [O, I] uint8 in 0..15,
    scales and zeros [O, I/group]; zeros are codes too, and need not be whole.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    @property
    def bits(self) -> int:
        return 8 if self.zeros is None else 4

    def dequantized(self) -> torch.Tensor:
        """The weights that the codes stand for, [O, I] in fp32."""
        if self.zeros is None:
            return self.codes.float() * self.scales.float()[:, None]
        groups = self.codes.float().view(*self.scales.shape, -1)  # [O, I/group, group]
        return ((groups - self.zeros.float()[..., None])*self.scales.float()[..., None]).flatten(1)


def to_int8(x: torch.Tensor, scale_dtype: torch.dtype = torch.float16
            ) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., n] rounded to 8 bits, symmetric, with a scale for each vector: codes int8 [..., n]
    from -127 to 127, and scales [..., 1]."""
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).to(scale_dtype).clamp(SMALLEST_SCALE)
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


def int8_codes(weight: torch.Tensor) -> Codes:
    """Weights [O, I] to int8, one scale for each output: its largest weight becomes 127."""
    codes, scales = to_int8(weight.float(), torch.float32)
    return Codes(codes, scales.squeeze(1))


def int4_codes(weight: torch.Tensor, group: int = 64) -> Codes:
    """Weights [O, I] to int4: in each `group` of inputs of an output, 0 and 15 stand for the
    smallest and the largest weight.

    Raises ValueError for a group that PyTorch's kernel does not know or that does not divide I.
    """
    I = weight.shape[1]
    if group not in (32, 64, 128, 256) or I % group:
        raise ValueError(
            f"group={group}: 32, 64, 128, 256 are accepted, where they divide the I={I} inputs")
    groups = weight.float().unflatten(1, (-1, group))
    # zero keeps a code of its own
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    # the kernel keeps them in bf16
    scales = ((high - low) / 15).clamp(min=1e-12).bfloat16().float()
    zeros = (-low / scales).round().clamp(0, 15)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return Codes(codes.to(torch.uint8).flatten(1), scales, zeros)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes (uint8) [..., ceil(n * bits / 8)] of codes (uint8) [..., n], the first in the lowest
    bits, no bit unused but at the end of a row. ValueError where one does not fit.

        4 bits: (1, 2, 15)  ->  (0x21, 0x0F)
    """
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes hold {int(codes.max())}: {bits} bits hold 0 to {2**bits - 1}")
    each = np.unpackbits(codes.cpu().numpy()[..., None], -1, bits, "little")    # [..., n, bits]
    return torch.from_numpy(np.packbits(each.reshape(*codes.shape[:-1], -1), -1, "little"))


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The codes [..., count], uint8, that `pack` put into bytes, or words."""
    each = np.unpackbits(packed.contiguous().view(torch.uint8).numpy(), -1, count * bits, "little")
    each = each.reshape(*packed.shape[:-1], count, bits)
    return torch.from_numpy(np.packbits(each, -1, "little")[..., 0])
