"""A linear layer of 4-bit weights in groups of g inputs:

    w[o, i] = (code[o, i] - zero[o, i // g]) * scale[o, i // g]

Byte j of a row holds two weights of one group: of its g inputs, number j % (g/2) in the low half
and number j % (g/2) + g/2 in the high half. So a group is g/2 bytes in one piece, both halves meet
neighbouring inputs, and a thread loads 16 bytes at once.

The scales are kept [I/g, O]: the programs of a GPU walk along O together, and find the scales of
one group one behind the other. Kept [O, I/g], each would drag in a sector of 32 bytes for the 2
that it needs.

One row against 4096 x 4096 weights is 8 MB, which 128 programs of 32 outputs ask for in pieces too
few to keep a GPU's memory busy. So the groups are dealt out among P parts, whose sums are added at
the end.

    bytes asked for = O * I / 2                     the codes
                    + 4 * O * I / g                 scales and zeros, fp16
                    + M * I * e * (O / O_BLOCK)     x
                    + 4 * P * M * O                 the sums
"""

from __future__ import annotations

import torch

from clawdemy_kernels.blocks import blocks
from clawdemy_kernels.decode_split import multiprocessors
from clawdemy_kernels.launch import check, power_of_2, tl, triton


@triton.jit
def linear_int4_kernel(x, packed, scales, zeros, out, x_stride_row, packed_stride_output,
                       scales_stride_group, M, O, I: tl.constexpr, g: tl.constexpr,
                       M_BLOCK: tl.constexpr, O_BLOCK: tl.constexpr, HALF: tl.constexpr):
    """One group of g inputs at a time; HALF is g/2."""
    m = (tl.program_id(1) * M_BLOCK + tl.arange(0, M_BLOCK)).to(tl.int64)
    o = tl.program_id(0) * O_BLOCK + tl.arange(0, O_BLOCK)
    j = tl.arange(0, HALF)
    acc = tl.zeros([M_BLOCK, O_BLOCK], tl.float32)
    for group in range(tl.program_id(2), I // g, tl.num_programs(2)):
        bytes_ = tl.load(packed + o[:, None].to(tl.int64) * packed_stride_output + group * HALF
                         + j[None, :], mask=(o < O)[:, None], other=0)
        row = group * scales_stride_group + o
        scale = tl.load(scales + row, mask=o < O, other=0.0).to(tl.float32)
        zero = tl.load(zeros + row, mask=o < O, other=0.0).to(tl.float32)
        at = x + m[:, None] * x_stride_row + group * g + j[None, :]
        low = tl.load(at, mask=(m < M)[:, None], other=0.0)
        high = tl.load(at + HALF, mask=(m < M)[:, None], other=0.0)
        # Codes of 0 to 15 are exact in any dtype; so are differences from a whole zero. The scale
        # waits until the group is summed.
        w_low = ((bytes_ & 15).to(tl.float32) - zero[:, None]).to(low.dtype)
        w_high = ((bytes_ >> 4).to(tl.float32) - zero[:, None]).to(high.dtype)
        sums = (tl.dot(low, tl.trans(w_low), input_precision="ieee")
                + tl.dot(high, tl.trans(w_high), input_precision="ieee"))
        acc += sums * scale[None, :]
    row = tl.program_id(2) * M + m                                      # of [P, M, O]
    tl.store(out + row[:, None] * O + o[None, :], acc, mask=(m < M)[:, None] & (o < O)[None, :])


def pack_int4(codes: torch.Tensor, group: int) -> torch.Tensor:
    """codes [O, I] of 0 to 15 -> bytes [O, I/2]. Raises ValueError for a group below 32, or that
    does not divide I."""
    if group < 32 or group & (group - 1) or codes.shape[1] % group:
        raise ValueError(f"group={group}: powers of 2 from 32 on that divide the "
                         f"I={codes.shape[1]} inputs are accepted")
    low, high = codes.to(torch.uint8).unflatten(1, (-1, 2, group // 2)).unbind(2)
    return (low | high << 4).flatten(1)


def linear_int4(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor,
                zeros: torch.Tensor) -> torch.Tensor:
    """x [M, I], packed [O, I/2] of uint8 (see `pack_int4`), scales and zeros [I/g, O] of fp16 ->
    [M, O]; g is I over their rows.

    Raises ValueError for other shapes and dtypes.
    """
    check("x", x, (None, None))
    M, I = x.shape
    check("packed", packed, (None, I // 2), (torch.uint8,), like=x)
    O = len(packed)
    check("scales", scales, (None, O), (torch.float16,), like=x)
    check("zeros", zeros, tuple(scales.shape), (torch.float16,), like=x)
    g = I // len(scales)
    if g * len(scales) != I or g < 32 or g & (g - 1):
        raise ValueError(f"scales is {list(scales.shape)} for I={I} inputs: groups of a power of 2 "
                         "from 32 on are accepted")
    if zeros.stride(0) != scales.stride(0):
        raise ValueError(f"zeros has strides {zeros.stride()}: those of scales, {scales.stride()}, "
                         "are accepted")
    M_BLOCK, O_BLOCK = rows_of(M), 32
    parts = parts_of(len(scales), M, O, x.device)
    sums = x.new_empty((parts, M, O), dtype=torch.float32)
    linear_int4_kernel[(triton.cdiv(O, O_BLOCK), triton.cdiv(M, M_BLOCK), parts)](
        x, packed, scales, zeros, sums, x.stride(0), packed.stride(0), scales.stride(0), M, O,
        I=I, g=g, M_BLOCK=M_BLOCK, O_BLOCK=O_BLOCK, HALF=g // 2, **blocks("linear_int4", x.dtype))
    return (sums[0] if parts == 1 else sums.sum(0)).to(x.dtype)


def rows_of(M: int) -> int:
    """Rows of a block: `tl.dot` wants 16 at least, and 64 are enough to keep a tensor core busy."""
    return power_of_2(min(M, 64), least=16)


def parts_of(groups: int, M: int, O: int, device: torch.device) -> int:
    """Among how many programs the groups are dealt out: enough for four on each multiprocessor, and
    at least four groups in a part."""
    programs = triton.cdiv(O, 32) * triton.cdiv(M, rows_of(M))
    return max(1, min(groups // 4, 4 * multiprocessors(device) // programs))


def linear_int4_reference(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor,
                          zeros: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch, from codes [O, I] before packing."""
    g = codes.shape[1] // len(scales)
    scale, zero = (of.to(x.dtype).T.repeat_interleave(g, dim=1) for of in (scales, zeros))
    return x @ ((codes.to(x.dtype) - zero) * scale).T
