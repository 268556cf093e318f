"""A linear layer of 8-bit weights: y[m, o] = (sum over i of x[m, i] * code[o, i]) * scale[o].

A decode step asks for each weight once and multiplies it with a row or a few, so bytes are all that
counts, and a code has one. The scale is that of a whole output, and waits until the sum is done. Up
to 16 rows share the read: `tl.dot` pads to 16 what it gets.

    bytes asked for = O * I                         the codes
                    + O * 4                         the scales
                    + M * I * e * (O / O_BLOCK)     x, from L2 after the first
                    + M * O * e                     the output
"""

from __future__ import annotations

import torch

from clawdemy_kernels.blocks import blocks
from clawdemy_kernels.launch import check, power_of_2, tl, triton


@triton.jit
def linear_int8_kernel(x, codes, scales, out, x_stride_row, codes_stride_output, out_stride_row,
                       M, O, I, M_BLOCK: tl.constexpr, O_BLOCK: tl.constexpr,
                       I_BLOCK: tl.constexpr):
    m = (tl.program_id(1) * M_BLOCK + tl.arange(0, M_BLOCK)).to(tl.int64)
    o = tl.program_id(0) * O_BLOCK + tl.arange(0, O_BLOCK)
    acc = tl.zeros([M_BLOCK, O_BLOCK], tl.float32)
    for start in range(0, I, I_BLOCK):
        i = start + tl.arange(0, I_BLOCK)
        w = tl.load(codes + o[:, None].to(tl.int64) * codes_stride_output + i[None, :],
                    mask=(o < O)[:, None] & (i < I)[None, :], other=0)
        rows = tl.load(x + m[:, None] * x_stride_row + i[None, :],
                       mask=(m < M)[:, None] & (i < I)[None, :], other=0.0)
        # By way of fp32, exactly: the interpreter knows no other way from integers to bfloat16.
        acc += tl.dot(rows, tl.trans(w.to(tl.float32).to(rows.dtype)), input_precision="ieee")
    acc *= tl.load(scales + o, mask=o < O, other=0.0)[None, :]
    tl.store(out + m[:, None] * out_stride_row + o[None, :], acc.to(out.dtype.element_ty),
             mask=(m < M)[:, None] & (o < O)[None, :])


def linear_int8(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x [M, I], codes [O, I] of int8, scales [O] of fp32 -> [M, O]. Raises ValueError for other
    shapes and dtypes."""
    check("x", x, (None, None))
    M, I = x.shape
    check("codes", codes, (None, I), (torch.int8,), like=x)
    O = len(codes)
    check("scales", scales, (O,), (torch.float32,), like=x)
    out, M_BLOCK, O_BLOCK = x.new_empty(M, O), power_of_2(min(M, 64), least=16), 32
    linear_int8_kernel[(triton.cdiv(O, O_BLOCK), triton.cdiv(M, M_BLOCK))](
        x, codes, scales, out, x.stride(0), codes.stride(0), out.stride(0), M, O, I,
        M_BLOCK=M_BLOCK, O_BLOCK=O_BLOCK, **blocks("linear_int8", x.dtype))
    return out


def linear_int8_reference(x: torch.Tensor, codes: torch.Tensor,
                          scales: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch."""
    return x @ (codes.to(x.dtype) * scales.to(x.dtype)[:, None]).T
