"""Draw a token from each row of logits: temperature, softmax and the draw in one kernel that reads
the logits twice.

The first walk over the V logits finds the largest and the sum, as attention's softmax does. A
uniform number u in [0, 1) then names a point of the line on which each token has a piece as long as
its weight; the second walk finds whose piece it is, by inversion of the distribution:

    token = the first v with  weight[0] + ... + weight[v] > u * sum

Temperature 0 is greedy: the first of the largest logits. Where NaN or +inf is among the logits, or
all are -inf, the sum is no number above 0, and the token is -1: there is none to choose.

    bytes asked for = 2 * B * V * e (once for greedy) + B * (8 + 4)
"""

from __future__ import annotations

import torch

from clawdemy_kernels.launch import LOG2_E, check, tl, triton, warps


@triton.jit
def sample_kernel(logits, uniform, out, scale, logits_stride_row, V, GREEDY: tl.constexpr,
                  BLOCK: tl.constexpr):
    b = tl.program_id(0)
    row = logits + b.to(tl.int64) * logits_stride_row
    largest, total, token = -float("inf"), 0.0, V
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
        top = tl.max(x, 0)
        if GREEDY:
            if top > largest:
                token = tl.min(tl.where(x == top, v, V), 0)
        new = tl.maximum(largest, top)
        # exp2 of the difference times the scale: -inf - -inf can only come in a block of nothing
        # but -inf.
        known = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp2((largest - known) * scale) + tl.sum(tl.exp2((x - known) * scale), 0)
        largest = new
    if not GREEDY:
        point, before, last = tl.load(uniform + b) * total, 0.0, -1
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
            weights = tl.exp2((x - largest) * scale)
            passed = before + tl.cumsum(weights, 0) > point
            token = tl.minimum(token, tl.min(tl.where(passed & (weights > 0), v, V), 0))
            last = tl.maximum(last, tl.max(tl.where(weights > 0, v, -1), 0))
            before += tl.sum(weights, 0)
        # The two walks may round their sums apart, and the point lie behind the last piece: then it
        # is that piece's.
        token = tl.minimum(token, last)
    tl.store(out + b, tl.where(total > 0, token, -1))


def sample(logits: torch.Tensor, uniform: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """logits [B, V] (-inf where a filter struck a token out), uniform [B] of fp32 in [0, 1) ->
    tokens [B] of int32, -1 where there is none to choose.

    Raises ValueError for other shapes, and for a temperature below 0.
    """
    check("logits", logits, (None, None))
    check("uniform", uniform, (len(logits),), (torch.float32,), like=logits)
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature}: 0 (greedy) or above is accepted")
    out = logits.new_empty(len(logits), dtype=torch.int32)
    sample_kernel[(len(logits),)](logits, uniform, out, LOG2_E / (temperature or 1.0),
                                  logits.stride(0), logits.shape[1], GREEDY=temperature == 0,
                                  BLOCK=1024, num_warps=warps(128))
    return out


def sample_reference(logits: torch.Tensor, uniform: torch.Tensor,
                     temperature: float = 1.0) -> torch.Tensor:
    """The same in plain PyTorch, in fp64."""
    sums = (logits.double() / (temperature or 1.0)).softmax(-1).cumsum(-1)
    points = uniform.double()[:, None] * sums[:, -1:]
    found = torch.searchsorted(sums, points, right=True)[:, 0] if temperature else logits.argmax(-1)
    return torch.where(sums[:, -1] > 0, found, -1).int()
