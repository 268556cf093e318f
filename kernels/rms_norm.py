"""RMSNorm, and the residual that is added just before it: one pass over memory instead of six.

    y   = x + residual                              written back: the next residual
    out = y / sqrt(mean(y²) + eps) * weight         (Zhang and Sennrich 2019, equation 4)

One program for each row of D numbers, which stays in registers. The square and the sum are taken in
fp32: in 16 bits a sum of a few thousand squares loses the small ones.

    bytes asked for = M * D * e * (2 reads + 2 writes)      without a residual 2 less
                    + M * D * e                             the weight, which L2 keeps
"""

from __future__ import annotations

import torch

from clawdemy_kernels.launch import check, power_of_2, tl, triton


@triton.jit
def rms_norm_kernel(x, residual, weight, out, eps, x_stride_row, residual_stride_row,
                    out_stride_row, D: tl.constexpr, D_BLOCK: tl.constexpr, ADD: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_BLOCK)
    y = tl.load(x + m * x_stride_row + d, mask=d < D, other=0.0).to(tl.float32)
    if ADD:
        at = residual + m * residual_stride_row + d
        y += tl.load(at, mask=d < D, other=0.0).to(tl.float32)
        y = y.to(residual.dtype.element_ty)             # what is normalised is what is kept
        tl.store(at, y, mask=d < D)
        y = y.to(tl.float32)
    y = y * (1 / tl.sqrt(tl.sum(y * y, 0) / D + eps))
    gamma = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    y = y.to(out.dtype.element_ty).to(tl.float32) * gamma
    tl.store(out + m * out_stride_row + d, y.to(out.dtype.element_ty), mask=d < D)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float,
             residual: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, D], weight [D] -> [M, D]. A `residual` [M, D] becomes x + residual in place. Raises
    ValueError for other shapes."""
    check("x", x, (None, None))
    check("weight", weight, (x.shape[1],), (x.dtype,), like=x)
    if residual is not None:
        check("residual", residual, tuple(x.shape), (x.dtype,), like=x)
    (M, D), out = x.shape, torch.empty_like(x)
    added = x if residual is None else residual
    rms_norm_kernel[(M,)](x, added, weight, out, eps, x.stride(0), added.stride(0), out.stride(0),
                          D=D, D_BLOCK=power_of_2(D), ADD=residual is not None, num_warps=4)
    return out


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float,
                       residual: torch.Tensor | None = None) -> torch.Tensor:
    """The same in plain PyTorch."""
    if residual is not None:
        x = residual.add_(x)
    y = x.float() if x.dtype != torch.float64 else x
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
