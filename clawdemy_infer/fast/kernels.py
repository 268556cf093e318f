"""What multiplies X [M, I] by a weight [O, I] of each format, and the table that says which does.

    format      C++ compiler here       else on a CPU       on a GPU
    -----------------------------------------------------------------------
    fp32        cpp                     plain               plain
    fp16        cpp                     fbgemm_half         plain
    bf16        cpp                     plain               plain
    int8        cpp                     weight_only_int8    triton_int8
    int4        cpp                     weight_only_int4    triton_int4

Nothing is timed to choose. Our own C++ is as fast as memory for few rows on every CPU, and PyTorch
has no kernel for bf16 without AVX512 or for int4 that comes near it; only where the CPU has matrix
registers for bf16 (AMX) does `plain` take over, from AMX_ROWS rows on. A weight that a kernel does
not take, or that this build of PyTorch has no kernel for, goes to the next: the last, `FALLBACK`,
runs everywhere.

A kernel is made of what its format keeps (a float weight, or `Codes`), packs it once, and is called
with x [M, I] in the dtype of the activations; it returns [M, O].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from clawdemy_infer.fast import cpp
from clawdemy_infer.fast.backends import kernel
from clawdemy_infer.fast.codes import Codes
from clawdemy_infer.fast.cpp_product import CppProduct, code
from clawdemy_infer.fast.formats import FLOATS, computes_in

Kernel = Callable[[torch.Tensor], torch.Tensor]

AMX_ROWS = 32
"""Rows of X: for more, matrix registers are faster than reading a strip once."""


def plain(weight: torch.Tensor) -> Kernel:
    """`F.linear`, in the dtype of the weight; the result is in that of x."""
    return lambda x: F.linear(x.to(weight.dtype), weight).to(x.dtype)


def half_to_float(weight: torch.Tensor) -> Kernel:
    """fp16 weights for fp32 activations: converted to fp32 on every call."""
    return lambda x: F.linear(x, weight.float())


def fbgemm_half(weight: torch.Tensor) -> Kernel:
    """FBGEMM reads fp16 weights and computes in fp32: half the bytes, all the precision of the
    activations."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
    run = torch.ops.quantized.linear_dynamic_fp16
    return lambda x: run(x, packed)


def dequantized(codes: Codes) -> Kernel:
    """The integers only save memory: every call makes float weights of them."""
    return lambda x: F.linear(x, codes.dequantized().to(x.dtype))


def weight_only_int8(codes: Codes) -> Kernel:
    """8-bit weights, bf16 activations. (FBGEMM's integer products are faster, but round activations
    too, and overflow on a CPU without VNNI.) Raises NotImplementedError for rows of weights that
    PyTorch's kernel, which loads 16 numbers at a time, would read beyond their end."""
    if codes.codes.shape[1] % 16:
        raise NotImplementedError(f"codes {list(codes.codes.shape)}: a multiple of 16 inputs is "
                                  "accepted")
    weight, scales = codes.codes, codes.scales.bfloat16()
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), weight, scales).to(x.dtype)


def weight_only_int4(codes: Codes) -> Kernel:
    """4-bit weights, bf16 activations, scale and zero of each group in bf16."""
    group = codes.codes.shape[1] // codes.scales.shape[1]
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.codes.int(), 1)
    # The kernel's zero stands for code 8: w = (code - 8) * scale + zero.
    zeros = (8 - codes.zeros.float()) * codes.scales.float()
    both = torch.stack((codes.scales.float(), zeros), dim=-1)               # [O, I/group, 2]
    both = both.transpose(0, 1).contiguous().bfloat16()
    run = torch._weight_int4pack_mm_for_cpu
    return lambda x: run(x.bfloat16(), packed, group, both).to(x.dtype)


def triton_int8(codes: Codes) -> Kernel:
    """Our own, for a GPU: codes become numbers on their way from memory."""
    scales, run = codes.scales.float(), kernel("linear_int8")
    return lambda x: run(x, codes.codes, scales)


def triton_int4(codes: Codes) -> Kernel:
    """Our own, for a GPU: two codes a byte, scale and zero of each group in fp16."""
    group = codes.codes.shape[1] // codes.scales.shape[1]
    packed = kernel("linear_int4", "pack_int4")(codes.codes, group)
    scales, zeros = (x.half().T.contiguous() for x in (codes.scales, codes.zeros))  # [I/group, O]
    run = kernel("linear_int4")
    return lambda x: run(x, packed, scales, zeros)


TRITON = {"int8": triton_int8, "int4": triton_int4}
PYTORCH = {"fp32": plain, "fp16": fbgemm_half, "bf16": plain, "int8": weight_only_int8,
           "int4": weight_only_int4}
FALLBACK = {"fp32": plain, "fp16": half_to_float, "bf16": plain, "int8": dequantized,
            "int4": dequantized}


def table(format: str, device: str = "cpu",
          backend: str = "torch") -> list[tuple[float, list[Callable[..., Kernel]]]]:
    """(up to this many rows, makers): the first of them that takes the weight is the kernel. Rows
    rise, and the last go on for ever."""
    if backend == "triton" and format in TRITON:
        return [(math.inf, [TRITON[format]])]
    if device != "cpu":
        return [(math.inf, [plain if format.startswith(("fp", "bf")) else dequantized])]
    pytorch = [PYTORCH[format], FALLBACK[format]]
    if not cpp.available():
        return [(math.inf, pytorch)]

    def cpp_product(source: torch.Tensor | Codes) -> Kernel:
        product = CppProduct(format, source)
        code(format, FLOATS[computes_in(format, device)])       # or its error, while others can
        return product
    if format == "bf16" and not cpp.isa() and "amx_bf16" in cpp.cpuinfo("flags"):
        return [(AMX_ROWS, [cpp_product, plain]), (math.inf, [plain])]
    return [(math.inf, [cpp_product, *pytorch])]


def kernels_in_words(format: str) -> str:
    """`cpp_product`, or `cpp_product up to 32 rows, then plain`: what multiplies by weights in
    `format` on this CPU."""
    *first, (_, last) = table(format)
    return "".join(f"{makers[0].__name__} up to {rows} rows, then "
                   for rows, makers in first) + last[0].__name__


def made_by(makers: Sequence[Callable[..., Kernel]], source: torch.Tensor | Codes) -> Kernel:
    """The kernel of the first maker that takes `source`."""
    *first, last = makers
    for make in first:
        try:
            return make(source)
        # Not such a weight, not in this PyTorch, or not by this compiler.
        except (RuntimeError, NotImplementedError, AttributeError, cpp.CompilerFailed):
            continue
    return last(source)
