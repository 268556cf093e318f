"""`faster`: the one door to speed, and the only place that knows the engines."""

from __future__ import annotations

import copy

import torch
from torch import nn

from clawdemy_infer.fast import cpp
from clawdemy_infer.fast.backends import choose
from clawdemy_infer.fast.cpp_step import CppStep
from clawdemy_infer.fast.formats import FLOATS, computes_in
from clawdemy_infer.fast.layers import PackedLinear
from clawdemy_infer.fast.recorded import RecordedSteps
from clawdemy_infer.fast.triton_step import TritonStep, is_plain
from clawdemy_infer.model.decoder import Decoder

MATRICES = ("qkv", "out", "gate_up", "down")


def faster(model: Decoder, weights: str | None = None, backend: str | None = None,
           compile: bool = False) -> Decoder:
    """A copy of `model`, which shares what it does not pack: its matrices packed in the format
    `weights`, its steps run by `backend`.

        faster(model, weights="int8")                   PyTorch, with matrices of 8 bits
        faster(model, weights="int8", compile=True)     the same, whole steps in one call of C++
        faster(model.to("cuda"), compile=True)          Triton kernels, decode steps recorded

    `backend` is "torch", "cpp" or "triton"; by default "triton" on a CUDA device where it is
    installed, and "torch" elsewhere. On a CPU `compile` and "cpp" are one thing: a few seconds of
    the compiler, once for each shape of model. On a GPU `compile` records the steps of the Triton
    kernels in which every sequence brings one token. A step over a cache whose keys and values do
    not lie plain is run by PyTorch. `.runner.compile_s` says how long it all took.

    Raises ValueError for an unknown format or backend, for a model whose weights are packed
    already, for layers that the engine does not know, for activations in fp16 in C++, and where
    there is no compiler; on a CPU, `cpp.CompilerFailed` where it fails.
    """
    device = model.device.type
    chosen = choose(device, backend)
    in_cpp = device == "cpu" and (compile or chosen == "cpp")
    if weights is not None:
        computes_in(weights, device)                    # refuses an unknown one
    if model.packed and (weights is not None or in_cpp):
        raise ValueError(f"model: its weights are packed in {model.packed}; a model with float "
                         "weights is accepted")
    if in_cpp and backend not in (None, "cpp"):
        raise ValueError(f"compile: on a CPU it is C++, and backend={backend!r}; cpp is accepted")
    if compile and device == "cuda" and chosen != "triton":
        raise ValueError(f"compile: on a GPU steps of Triton kernels are recorded, and "
                         f"backend={chosen!r}; triton is accepted")
    if in_cpp:
        cpp.tried()                                     # or it says so before anything is packed
        if not is_plain(model):
            raise ValueError("compile: a model of plain float layers is accepted, and this one has "
                             "experts, latents or others; without compile it runs as PyTorch")
    made = shallow_copy(model) if weights is None else with_weights(model, weights, backend)
    made.runner = None
    if in_cpp:
        made.runner = CppStep(made)
    elif chosen == "triton" and (backend or is_plain(model)):
        made.runner = TritonStep(made)
        if compile:
            made.runner = RecordedSteps(made.runner)
    return made


def with_weights(model: Decoder, weights: str, backend: str | None = None) -> Decoder:
    """A copy of a float `model` whose matrices, the head among them, are packed in the format
    `weights`.

    Integers are rounded to nearest: int8 with one scale for each output, int4 with scale and zero
    for each group of 64 inputs. Norms, embedding table and tokenizer are shared, or copied where
    their dtype changes: on a CPU activations and cache are in bf16 with bf16 and int4 weights, in
    fp32 with all others. Raises ValueError for layers with other matrices than `MATRICES`.
    """
    dtype = FLOATS[computes_in(weights, model.device.type)]
    made = shallow_copy(model)
    made.packed = weights
    made.embed, made.norm = in_dtype(model.embed, dtype), in_dtype(model.norm, dtype)
    head = model.embed if model.head is None else model.head
    made.head = PackedLinear(weights, head.weight, backend=backend)
    made.layers = nn.ModuleList(shallow_copy(layer) for layer in model.layers)
    for layer in made.layers:
        for name, part in list(layer.named_children()):
            if name in MATRICES:
                bias = None if part.bias is None else part.bias.to(dtype)
                setattr(layer, name, PackedLinear(weights, part.weight, bias, backend))
            elif name.endswith("norm"):
                setattr(layer, name, in_dtype(part, dtype))
            else:
                raise ValueError(f"model: its layers have {name}, and only {', '.join(MATRICES)} "
                                 "can be packed: a model without experts is accepted")
    return made


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module of the same parts, any of which can then be replaced without the original
    noticing."""
    new = copy.copy(module)
    new._modules, new._parameters = dict(module._modules), dict(module._parameters)
    return new


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module itself, or a copy in `dtype`."""
    return module if module.weight.dtype == dtype else copy.deepcopy(module).to(dtype)
