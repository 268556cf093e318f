"""A linear layer of 8-bit weights: y[m, n] = (sum over k of x[m, k] * code[n, k]) * scale[n].

A decode step asks for each weight once and multiplies it with a row or a few, so bytes are all that
counts, and a code has one. The scale is that of a whole output, and waits until the sum is done. Up
to 16 rows share the read: `tl.dot` pads to 16 what it gets.

    bytes asked for = N * K                         the codes
                    + N * 4                         the scales
                    + M * K * e * (N / N_BLOCK)     x, from L2 after the first
                    + M * N * e                     the output
"""

from __future__ import annotations

import torch

from clawdemy_kernels.blocks import blocks
from clawdemy_kernels.launch import check, power_of_2, tl, triton


@triton.jit
def linear_int8_kernel(x, codes, scales, out, x_stride_row, codes_stride_output, out_stride_row,
                       M, N, K, M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr,
                       K_BLOCK: tl.constexpr):
    m = (tl.program_id(1) * M_BLOCK + tl.arange(0, M_BLOCK)).to(tl.int64)
    n = tl.program_id(0) * N_BLOCK + tl.arange(0, N_BLOCK)
    acc = tl.zeros([M_BLOCK, N_BLOCK], tl.float32)
    for start in range(0, K, K_BLOCK):
        k = start + tl.arange(0, K_BLOCK)
        w = tl.load(codes + n[:, None].to(tl.int64) * codes_stride_output + k[None, :],
                    mask=(n < N)[:, None] & (k < K)[None, :], other=0)
        rows = tl.load(x + m[:, None] * x_stride_row + k[None, :],
                       mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        # By way of fp32, exactly: the interpreter knows no other way from integers to bfloat16.
        acc += tl.dot(rows, tl.trans(w.to(tl.float32).to(rows.dtype)), input_precision="ieee")
    acc *= tl.load(scales + n, mask=n < N, other=0.0)[None, :]
    tl.store(out + m[:, None] * out_stride_row + n[None, :], acc.to(out.dtype.element_ty),
             mask=(m < M)[:, None] & (n < N)[None, :])


def linear_int8(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x [M, K], codes [N, K] of int8, scales [N] of fp32 -> [M, N]. Raises ValueError for other
    shapes and dtypes."""
    check("x", x, (None, None))
    M, K = x.shape
    check("codes", codes, (None, K), (torch.int8,), like=x)
    N = len(codes)
    check("scales", scales, (N,), (torch.float32,), like=x)
    out, M_BLOCK, N_BLOCK = x.new_empty(M, N), power_of_2(min(M, 64), least=16), 32
    linear_int8_kernel[(triton.cdiv(N, N_BLOCK), triton.cdiv(M, M_BLOCK))](
        x, codes, scales, out, x.stride(0), codes.stride(0), out.stride(0), M, N, K,
        M_BLOCK=M_BLOCK, N_BLOCK=N_BLOCK, **blocks("linear_int8", x.dtype))
    return out


def linear_int8_reference(x: torch.Tensor, codes: torch.Tensor,
                          scales: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch."""
    return x @ (codes.to(x.dtype) * scales.to(x.dtype)[:, None]).T
