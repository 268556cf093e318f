"""SwiGLU between the two products of an MLP: out = silu(gate) * up, of gate and up as one product
left them (Shazeer 2020).

x [M, 2F] holds gate [M, F] and up [M, F] side by side. One program for each F_BLOCK numbers of a
row.

    bytes asked for = M * F * e * (2 reads + 1 write)
"""

from __future__ import annotations

import torch

from clawdemy_kernels.launch import check, tl, triton, warps


@triton.jit
def swiglu_kernel(x, out, x_stride_row, out_stride_row, F, F_BLOCK: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)   # a prompt of 75,000 rows has more than 2^31 numbers here
    f = tl.program_id(1) * F_BLOCK + tl.arange(0, F_BLOCK)
    gate = tl.load(x + m * x_stride_row + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(x + m * x_stride_row + F + f, mask=f < F, other=0.0).to(tl.float32)
    tl.store(out + m * out_stride_row + f,
             (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=f < F)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x [M, 2F] -> [M, F]. Raises ValueError for an odd number of columns."""
    check("x", x, (None, None))
    if x.shape[1] % 2:
        raise ValueError(f"x is {list(x.shape)}: an even number of columns is accepted, half of "
                         "them the gate")
    M, F, F_BLOCK = x.shape[0], x.shape[1] // 2, 1024
    out = x.new_empty(M, F)
    swiglu_kernel[(M, triton.cdiv(F, F_BLOCK))](x, out, x.stride(0), out.stride(0), F,
                                                F_BLOCK=F_BLOCK, num_warps=warps(128))
    return out


def swiglu_reference(x: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
