"""A linear layer of 4-bit weights in groups of g inputs:

    w[n, k] = (code[n, k] - zero[n, k // g]) * scale[n, k // g]

Byte j of a row holds two weights of one group: of its g inputs, number j % (g/2) in the low half
and number j % (g/2) + g/2 in the high half. So a group is g/2 bytes in one piece, both halves meet
neighbouring inputs, and a thread loads 16 bytes at once.

The scales are kept [K/g, N]: the programs of a GPU walk along N together, and find the scales of
one group one behind the other. Kept [N, K/g], each would drag in a sector of 32 bytes for the 2
that it needs.

One row against 4096 x 4096 weights is 8 MB, which 128 programs of 32 outputs ask for in pieces too
few to keep a GPU's memory busy. So the groups are dealt out among P parts, whose sums are added at
the end.

    bytes asked for = N * K / 2                     the codes
                    + 4 * N * K / g                 scales and zeros, fp16
                    + M * K * e * (N / N_BLOCK)     x
                    + 4 * P * M * N                 the sums
"""

from __future__ import annotations

import torch

from clawdemy_kernels.blocks import blocks
from clawdemy_kernels.decode_split import multiprocessors
from clawdemy_kernels.launch import check, power_of_2, tl, triton


@triton.jit
def linear_int4_kernel(x, packed, scales, zeros, out, x_stride_row, packed_stride_output,
                       scales_stride_group, M, N, K: tl.constexpr, g: tl.constexpr,
                       M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, HALF: tl.constexpr):
    """One group of g inputs at a time; HALF is g/2."""
    m = (tl.program_id(1) * M_BLOCK + tl.arange(0, M_BLOCK)).to(tl.int64)
    n = tl.program_id(0) * N_BLOCK + tl.arange(0, N_BLOCK)
    j = tl.arange(0, HALF)
    acc = tl.zeros([M_BLOCK, N_BLOCK], tl.float32)
    for group in range(tl.program_id(2), K // g, tl.num_programs(2)):
        bytes_ = tl.load(packed + n[:, None].to(tl.int64) * packed_stride_output + group * HALF
                         + j[None, :], mask=(n < N)[:, None], other=0)
        row = group * scales_stride_group + n
        scale = tl.load(scales + row, mask=n < N, other=0.0).to(tl.float32)
        zero = tl.load(zeros + row, mask=n < N, other=0.0).to(tl.float32)
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
    row = tl.program_id(2) * M + m                                      # of [P, M, N]
    tl.store(out + row[:, None] * N + n[None, :], acc, mask=(m < M)[:, None] & (n < N)[None, :])


def pack_int4(codes: torch.Tensor, group: int) -> torch.Tensor:
    """codes [N, K] of 0 to 15 -> bytes [N, K/2]. Raises ValueError for a group below 32, or that
    does not divide K."""
    if group < 32 or group & (group - 1) or codes.shape[1] % group:
        raise ValueError(f"group={group}: powers of 2 from 32 on that divide the "
                         f"K={codes.shape[1]} inputs are accepted")
    low, high = codes.to(torch.uint8).unflatten(1, (-1, 2, group // 2)).unbind(2)
    return (low | high << 4).flatten(1)


def linear_int4(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor,
                zeros: torch.Tensor) -> torch.Tensor:
    """x [M, K], packed [N, K/2] of uint8 (see `pack_int4`), scales and zeros [K/g, N] of fp16 ->
    [M, N]; g is K over their rows.

    Raises ValueError for other shapes and dtypes.
    """
    check("x", x, (None, None))
    M, K = x.shape
    check("packed", packed, (None, K // 2), (torch.uint8,), like=x)
    N = len(packed)
    check("scales", scales, (None, N), (torch.float16,), like=x)
    check("zeros", zeros, tuple(scales.shape), (torch.float16,), like=x)
    g = K // len(scales)
    if g * len(scales) != K or g < 32 or g & (g - 1):
        raise ValueError(f"scales is {list(scales.shape)} for K={K} inputs: groups of a power of 2 "
                         "from 32 on are accepted")
    if zeros.stride(0) != scales.stride(0):
        raise ValueError(f"zeros has strides {zeros.stride()}: those of scales, {scales.stride()}, "
                         "are accepted")
    M_BLOCK, N_BLOCK = rows_of(M), 32
    parts = parts_of(len(scales), M, N, x.device)
    sums = x.new_empty((parts, M, N), dtype=torch.float32)
    linear_int4_kernel[(triton.cdiv(N, N_BLOCK), triton.cdiv(M, M_BLOCK), parts)](
        x, packed, scales, zeros, sums, x.stride(0), packed.stride(0), scales.stride(0), M, N,
        K=K, g=g, M_BLOCK=M_BLOCK, N_BLOCK=N_BLOCK, HALF=g // 2, **blocks("linear_int4", x.dtype))
    return (sums[0] if parts == 1 else sums.sum(0)).to(x.dtype)


def rows_of(M: int) -> int:
    """Rows of a block: `tl.dot` wants 16 at least, and 64 are enough to keep a tensor core busy."""
    return power_of_2(min(M, 64), least=16)


def parts_of(groups: int, M: int, N: int, device: torch.device) -> int:
    """Among how many programs the groups are dealt out: enough for four on each multiprocessor, and
    at least four groups in a part."""
    programs = triton.cdiv(N, 32) * triton.cdiv(M, rows_of(M))
    return max(1, min(groups // 4, 4 * multiprocessors(device) // programs))


def linear_int4_reference(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor,
                          zeros: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch, from codes [N, K] before packing."""
    g = codes.shape[1] // len(scales)
    scale, zero = (of.to(x.dtype).T.repeat_interleave(g, dim=1) for of in (scales, zeros))
    return x @ ((codes.to(x.dtype) - zero) * scale).T
