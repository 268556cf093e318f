"""The codes on the kernels that read them: bytes saved become time saved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from clawdemy_infer.fast import Codes, PackedLinear
from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization.format import Quantized
from clawdemy_infer.quantization.integers import IntFormat
from clawdemy_infer.quantization.linears import QuantizedModel, with_matrices


def with_modules(model: Decoder, modules: Mapping[str, nn.Module]) -> Decoder:
    """A copy of `model` with these modules in the place of its matrices, by name."""
    copy = with_matrices(model, {})
    for name, module in modules.items():
        copy.set_submodule(name, module)
    return copy


def on_kernels(quantized: QuantizedModel) -> Decoder:
    """A decoder that streams the codes of `quantized`, and nothing else of its layers' matrices.
    The head stays as it is.

    There are kernels for int8 with a scale for each row, and for int4 in groups of 32, 64, 128 or
    256; ValueError for another format. They round what they like, as int4's scales to 16 bits. So
    the logits differ a little from those of `quantized.decoder`, and a judgement of what runs is a
    judgement of this decoder.
    """
    if not has_kernel(quantized):
        raise ValueError(f"format={quantized.format.name}: no kernel runs it here; int8, int4-g32, "
                         "-g64, -g128 (and -asym, -float) are accepted, with groups of "
                         "neighbouring columns")
    format, decoder = f"int{quantized.format.bits}", quantized.decoder
    modules = {name: PackedLinear(format, codes(tensor), decoder.get_submodule(name).bias)
               for name, tensor in quantized.tensors.items()}
    decoder = with_modules(decoder, modules)
    decoder.packed = quantized.format.name
    return decoder


def has_kernel(quantized: QuantizedModel) -> bool:
    """Is there a kernel that reads these codes?"""
    format = quantized.format
    fits = isinstance(format, IntFormat) and (
        (format.bits, format.group, format.zero) == (8, None, "none")
        or (format.bits == 4 and format.group in (32, 64, 128, 256)))
    return fits and all(each.group_of is None for each in quantized.tensors.values())


def running(quantized: QuantizedModel) -> Decoder:
    """A decoder to use: on the kernels where there are some, else one that has the codes' numbers
    in floating point."""
    return on_kernels(quantized) if has_kernel(quantized) else quantized.decoder


def codes(tensor: Quantized) -> Codes:
    """As the kernels want them: for int4, w = (code - zero) * scale with codes from 0 to 15."""
    if tensor.format.bits == 8:
        return Codes(tensor.codes, tensor.scale.squeeze(1))
    if tensor.format.zero == "none":
        eight = torch.full_like(tensor.scale, 8)
        return Codes((tensor.codes + 8).byte(), tensor.scale, eight)
    zero = tensor.zero if tensor.format.zero == "integer" else -tensor.zero / tensor.scale
    return Codes(tensor.codes, tensor.scale, zero)
