"""The same model with its matrices in another format: fp32, fp16, bf16, int8 or int4, each on the fastest kernels of this CPU."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from clawdemy_infer.linear import FLOATS, PackedLinear, computes_in
from clawdemy_infer.model.decoder import Decoder
from clawdemy_infer.timing import count_ops

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
    made.packed, made.compiled_step, made.between = weights, None, None
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


@torch.inference_mode()
def product_ops(model: Decoder, rows: int = 2) -> int:
    """How many operations the products of one step over so many `rows` dispatch. A product's rate has what it costs to start it, so a
    prediction counts the other operations alone."""
    def input_of(width: int) -> torch.Tensor:
        return torch.ones(rows, width, dtype=model.dtype, device=model.device)

    products = [partial(part, input_of(part.in_features)) for part in model.modules() if isinstance(part, nn.Linear | PackedLinear)]
    if model.head is None:
        products.append(partial(model.tied_head, input_of(model.config.shape.D), model.embed.weight))
    for product in products:
        product()                                           # the first call packs the weight
    return sum(count_ops(product) for product in products)
