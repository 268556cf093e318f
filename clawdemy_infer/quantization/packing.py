"""Codes of 2 to 8 bits side by side in bytes: the first code in the lowest bits, no bit unused but at the end of a row."""

from __future__ import annotations

import torch


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes (uint8) [..., ceil(n * bits / 8)] of codes [..., n]; of signed ones, the two's complement. ValueError where one
    does not fit."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if codes.dtype == torch.int8 else (0, 2**bits - 1)
    if codes.numel() and not (low <= int(codes.min()) and int(codes.max()) <= high):
        raise ValueError(f"codes hold {int(codes.min())} to {int(codes.max())}: {bits} bits hold {low} to {high}")
    each = (codes.view(torch.uint8)[..., None] >> _places(bits, codes) & 1).flatten(-2)     # [..., n * bits]
    each = torch.nn.functional.pad(each, (0, -each.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (each << _places(8, codes)).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, bits: int, count: int, signed: bool = False) -> torch.Tensor:
    """The codes [..., count] that `pack` put into bytes: uint8, or int8 if `signed`."""
    each = (packed[..., None] >> _places(8, packed) & 1).flatten(-2)[..., :count * bits].unflatten(-1, (count, bits))
    codes = (each << _places(bits, packed)).sum(-1, dtype=torch.uint8)
    if not signed:
        return codes
    return (codes << 8 - bits).view(torch.int8) >> 8 - bits             # the shift back repeats the sign


def _places(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)
