"""The ways in which PyTorch can multiply X [M, K] by a weight [N, K], each with its own layout of the weight.

A kernel is made of what its format keeps (a float weight, or `Codes`), packs it once, and is called with x in the dtype of the
activations. `FALLBACK` runs everywhere; the `CANDIDATES` belong to libraries that a CPU or a build of PyTorch may lack.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch.nn import functional as F

from clawdemy_infer.backends import kernel
from clawdemy_infer.linear.codes import Codes
from clawdemy_infer.linear.cpp_strips import in_strips

Kernel = Callable[[torch.Tensor], torch.Tensor]


def plain(weight: torch.Tensor) -> Kernel:
    """`F.linear`: the weight as it is, in the dtype of the activations."""
    return lambda x: F.linear(x, weight)


def onednn(weight: torch.Tensor) -> Kernel:
    """oneDNN on a weight in the blocked layout that it likes best. `F.linear` leaves fp32 to MKL, which does not do its best on
    every maker's CPU, and lets oneDNN reorder a bf16 weight anew for each product."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    run = torch.ops.mkldnn._linear_pointwise
    return lambda x: run(x, packed, None, "none", [], "")


def half_to_float(weight: torch.Tensor) -> Kernel:
    """fp16 weights for fp32 activations: converted to fp32 on every call."""
    return lambda x: F.linear(x, weight.float())


def fbgemm_half(weight: torch.Tensor) -> Kernel:
    """FBGEMM reads fp16 weights and computes in fp32: half the bytes, all the precision of the activations."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
    run = torch.ops.quantized.linear_dynamic_fp16
    return lambda x: run(x, packed)


def dequantized(codes: Codes) -> Kernel:
    """The integers only save memory: every call makes float weights of them."""
    return lambda x: F.linear(x, codes.dequantized().to(x.dtype))


def fbgemm_int8(codes: Codes) -> Kernel:
    """Integer products (VNNI): activations are rounded to 8 bits too, on the fly.

    The kernel has one scale for all of x, and one token with an outlier would take the precision of all others. So each row is
    first divided by its own largest number (Dettmers et al. 2022, LLM.int8, section 2.1: vector-wise quantization).
    """
    zeros = torch.zeros(len(codes.scales), dtype=torch.int64)
    with warnings.catch_warnings(category=UserWarning, action="ignore"):       # quantized tensors are deprecated; no other way leads here
        weight = torch._make_per_channel_quantized_tensor(codes.codes, codes.scales.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    run = torch.ops.quantized.linear_dynamic

    def product(x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            return run(x, packed)
        largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True)
        return run(x / largest, packed).mul_(largest)
    return product


def in_bf16(run: Kernel) -> Kernel:
    """A kernel for bf16, also for other activations. Even a conversion that has nothing to do costs a microsecond, so it is not asked."""
    return lambda x: run(x) if x.dtype == torch.bfloat16 else run(x.bfloat16()).to(x.dtype)


def weight_only_int8(codes: Codes) -> Kernel:
    """8-bit weights, bf16 activations. Raises NotImplementedError for rows of weights that PyTorch's kernel would read beyond their end."""
    if codes.codes.shape[1] < 16:
        raise NotImplementedError(f"codes {list(codes.codes.shape)}: 16 inputs or more are accepted")
    weight, scales = codes.codes, codes.scales.bfloat16()
    return in_bf16(lambda x: torch._weight_int8pack_mm(x, weight, scales))


def weight_only_int4(codes: Codes) -> Kernel:
    """4-bit weights, bf16 activations, scale and zero of each group in bf16."""
    group = codes.codes.shape[1] // codes.scales.shape[1]
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.codes.int(), 1)
    # The kernel's zero stands for code 8: w = (code - 8) * scale + zero.
    zeros = (8 - codes.zeros.float()) * codes.scales.float()
    both = torch.stack((codes.scales.float(), zeros), dim=-1).transpose(0, 1).contiguous().bfloat16()      # [K/group, N, 2]
    run = torch._weight_int4pack_mm_for_cpu
    return in_bf16(lambda x: run(x, packed, group, both))


def bf16_copy(codes: Codes) -> Kernel:
    """A bf16 copy of the weights, for so many rows that reading them is not what costs."""
    return in_bf16(onednn(codes.dequantized().bfloat16()))


def cpp_fp32(weight: torch.Tensor) -> Kernel:
    """Our own, in C++."""
    return in_strips("fp32", weight)


def cpp_fp16(weight: torch.Tensor) -> Kernel:
    """The same with fp16 weights, in fp32."""
    return in_strips("fp16", weight)


def cpp_bf16(weight: torch.Tensor) -> Kernel:
    """The same with bf16 weights, and bf16 activations in the product."""
    return in_strips("bf16", weight)


def cpp_int8(codes: Codes) -> Kernel:
    """The same with 8-bit weights, and bf16 activations in the product."""
    return in_strips("int8", codes)


def cpp_int4(codes: Codes) -> Kernel:
    """The same with 4-bit weights, scale and offset of each group in fp16."""
    return in_strips("int4", codes)


def cpp_bf16_copy(codes: Codes) -> Kernel:
    """A bf16 copy of the weights, for so many rows that reading them is not what costs."""
    return in_bf16(cpp_bf16(codes.dequantized().bfloat16()))


def triton_int8(codes: Codes) -> Kernel:
    """Our own, for a GPU: codes become numbers on their way from memory."""
    scales, run = codes.scales.float(), kernel("linear_int8")
    return lambda x: run(x, codes.codes, scales)


def triton_int4(codes: Codes) -> Kernel:
    """Our own, for a GPU: two codes a byte, scale and zero of each group in fp16."""
    packed = kernel("linear_int4", "pack_int4")(codes.codes, codes.codes.shape[1] // codes.scales.shape[1])
    scales, zeros = (x.half().T.contiguous() for x in (codes.scales, codes.zeros))           # [K/group, N]
    run = kernel("linear_int4")
    return lambda x: run(x, packed, scales, zeros)


TRITON = {"int8": triton_int8, "int4": triton_int4}
"""By format; floats are PyTorch's own there, whose library has had GPUs in mind for longer."""
FALLBACK: dict[str, Callable[..., Kernel]] = {
    "fp32": plain, "fp16": half_to_float, "bf16": plain, "int8": dequantized, "int4": dequantized,
}
CANDIDATES: dict[str, list[Callable[..., Kernel]]] = {
    "fp32": [plain, onednn, cpp_fp32], "fp16": [fbgemm_half, cpp_fp16], "bf16": [plain, onednn, cpp_bf16],
    "int8": [fbgemm_int8, weight_only_int8, cpp_int8], "int4": [weight_only_int4, bf16_copy, cpp_int4, cpp_bf16_copy],
}
"""By format."""
