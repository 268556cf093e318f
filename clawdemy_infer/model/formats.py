"""The same model with its matrices in another format: fp32, fp16, bf16, int8 or int4, each on the fastest kernels of this CPU."""

from __future__ import annotations

import copy

import torch
from torch import nn

from clawdemy_infer.linear import FLOATS, PackedLinear, computes_in
from clawdemy_infer.model.decoder import Decoder

MATRICES = ("qkv", "out", "gate_up", "down")


def with_weights(model: Decoder, weights: str) -> Decoder:
    """A copy of a float `model` whose matrices, the head among them, are packed in the format `weights`.

    Integers are rounded to nearest: int8 with one scale for each output, int4 with scale and zero for each group of 64 inputs.
    Norms, embedding table and tokenizer are shared, or copied where their dtype changes: on a CPU activations and cache are in
    bf16 with bf16 and int4 weights, in fp32 with all others. Raises ValueError for an unknown format, for a model whose weights are
    packed already, and for layers that have experts.
    """
    dtype = FLOATS[computes_in(weights, model.device.type)]
    if model.packed:
        raise ValueError(f"model: its weights are packed in {model.packed}; a model with float weights is accepted")
    made = twin(model)
    made.packed, made.compiled_step = weights, None
    made.head = PackedLinear(weights, model.embed.weight if model.head is None else model.head.weight, backend=model.backend)
    made.embed, made.norm = in_dtype(model.embed, dtype), in_dtype(model.norm, dtype)
    made.layers = nn.ModuleList(twin(layer) for layer in model.layers)
    for layer in made.layers:
        for name, part in list(layer.named_children()):
            if name in MATRICES:
                bias = None if part.bias is None else part.bias.to(dtype)
                setattr(layer, name, PackedLinear(weights, part.weight, bias, model.backend))
            elif name.endswith("norm"):
                setattr(layer, name, in_dtype(part, dtype))
            else:
                raise ValueError(f"model: its layers have {name}, and only {', '.join(MATRICES)} can be packed")
    return made


def twin(module: nn.Module) -> nn.Module:
    """A module of the same parts, any of which can then be replaced without the original noticing."""
    new = copy.copy(module)
    new._modules, new._parameters = dict(module._modules), dict(module._parameters)
    return new


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module itself, or a copy in `dtype`."""
    return module if module.weight.dtype == dtype else copy.deepcopy(module).to(dtype)
