"""Rotary position embedding (RoPE): a token's position is an angle by which its Q and K turn.

Su et al. 2021, "RoFormer", section 3.4.2: the dimensions of a head form H/2 pairs, and at position
m the pair j turns by m * theta^(-2j/H). A query at m meets a key at n at an angle of m - n alone.

Which dimensions pair up is a convention of the checkpoint. The paper pairs neighbours (0,1), (2,3),
…; Hugging Face's weights pair halves (0, H/2), (1, H/2 + 1), …, and so do we."""

import torch

from clawdemy_infer.from_config.rope import RopeScaling


def angular_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None,
                        length: int = 0) -> torch.Tensor:
    """Radians per position of each pair, [H/2], fp32: theta^(-2j/H), slowed down as `scaling` says
    of a text of `length` tokens."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")             # 2j
    frequencies = 1.0 / theta**(pairs / head_dim)
    if scaling is None:
        return frequencies
    return frequencies / torch.tensor(scaling.slower(head_dim, theta, length), device="cpu")


def rope_tables(frequencies: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype,
                gain: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin of `positions` [M] times `gain`, each [M, 1, H]: made once a step and
    shared by all layers. `frequencies` are [H/2], or [M, H/2] where each row has its own.

    The sine carries the sign of its half, (-sin, +sin), so that `rotate` needs no negation."""
    angles = (positions[:, None] * frequencies)[:, None]                 # [M, 1, H/2]
    cos, sin = angles.cos(), angles.sin()
    if gain != 1:
        cos, sin = cos * gain, sin * gain
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn every head of x [M, heads, H], (a, b) in halves, to (a cos - b sin, b cos + a sin)."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)                         # (b, a)
    return torch.addcmul(x * cos, swapped, sin)
