"""Decode of one sequence as compiled code: a layer becomes one loop nest.

At batch 1 a step reads every weight once, for one row of activations. `loops` says so in sums, and PyTorch's compiler makes of them, and of
all the small operations between, a single piece of C++ on all cores. Two things are gained: weights are streamed as fast as memory
gives them, and some forty operations a layer lose their fixed cost.

Only a region is compiled, with the weights as its arguments: so the same code serves all layers, and is compiled once. Three pieces
make a step:

    enter      embedding -> norm, QKV, RoPE of the first layer
    between    attention of layer i, the rest of layer i -> norm, QKV, RoPE of layer i + 1                  L - 1 times
    leave      attention of the last layer, the rest of it -> norm, head

Over a `ContiguousCache` attention is a part of the loop nest too. Any other cache looks for itself, between two pieces.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable

import torch

from clawdemy_infer.kv_cache import ContiguousCache, Step
from clawdemy_infer.model.decoder import Decoder, Layer
from clawdemy_infer.model.formats import twin, with_weights
from clawdemy_infer.model.loops import Parts, after_attention, before_attention, norm, parts_of, product, stored
from clawdemy_infer.model.rope import rope_tables
from clawdemy_infer.timing import now, rates

OPTIONS = {"cpp.enable_floating_point_contract_flag": "fast"}
"""A product and the sum it goes to may be one instruction."""


def translated(function: Callable, *arguments) -> Callable:
    """`function` as machine code for arguments like these. They are not looked at again in later calls, of which there is one a layer."""
    code = torch.compile(function, fullgraph=True, dynamic=False, options=OPTIONS).aot_compile((arguments, {}))
    code.disable_guard_check()
    return code


class CompiledStep:
    """The decode step of `model` for one new token of one sequence, its matrices kept in `format`."""

    @torch.inference_mode()
    def __init__(self, model: Decoder, format: str, dtype: torch.dtype) -> None:
        shape, eps, start = model.config.shape, model.config.norm_eps, now()
        self.embed, self.frequencies, self.window = model.embed.weight, model.frequencies, shape.window
        self.into, self.out_of = zip(*(parts_of(layer, format) for layer in model.layers), strict=True)
        self.last = model.norm.weight.float(), stored(format, model.embed.weight if model.head is None else model.head.weight)

        def enter(x, rope, into):
            return before_attention(x, into, rope, shape.N, shape.K, eps, dtype)

        def between(x, seen, rope, out_of, into):
            x = after_attention(x, seen, out_of, eps)
            return x, *enter(x, rope, into)

        def leave(x, seen, out_of, last):
            x = after_attention(x, seen, out_of, eps)
            return x, product(last[1], norm(x, last[0], eps))

        x, rope = self.embed[0].float(), rope_tables(self.frequencies, torch.zeros(1), torch.float32)
        q, k, v = (torch.zeros(1, heads, shape.H, dtype=dtype) for heads in (shape.N, shape.K, shape.K))
        # As a cache's: not as long as its capacity, and so long that the compiler finds it worth sharing among the cores.
        keys, values = torch.zeros(2, shape.K, 512, shape.H, dtype=dtype)[:, :, :500]
        torch._dynamo.mark_dynamic(keys, 1)
        torch._dynamo.mark_dynamic(values, 1)
        self.enter = translated(enter, x, rope, self.into[0])
        # The last two pieces twice: for attention that has been worked out, and with attention in them.
        self.between, self.leave = zip(*((translated(between, x, seen, rope, self.out_of[0], self.into[-1]),
                                          translated(leave, x, seen, self.out_of[-1], self.last))
                                         for seen in ((q.flatten(1),), (q, k, v, keys, values))), strict=True)
        self.compile_s = now() - start

    def __call__(self, tokens: torch.Tensor, step: Step, last_only: object = True) -> tuple[torch.Tensor, torch.Tensor]:
        """For tokens [1], what the last layer leaves, [1, D], and the logits, [1, V]."""
        rope = rope_tables(self.frequencies, step.positions, torch.float32)
        x = self.embed[tokens[0]].float()                                                   # [D], in fp32 from here to the logits
        qkv, past, new = self.enter(x, rope, self.into[0]), self.past(step), []
        for index, out_of in enumerate(self.out_of):
            seen = (*qkv, *past[index]) if past else (step.attend(index, *qkv),)
            new.append(qkv[1:])
            if index + 1 < len(self.into):
                x, *qkv = self.between[bool(past)](x, seen, rope, out_of, self.into[index + 1])
        x, logits = self.leave[bool(past)](x, seen, out_of, self.last)
        if past:
            row, at = step.sequences[0], step.past[0]
            for tensor, of_layers in zip(step.cache.tensors, zip(*new, strict=True), strict=True):
                tensor[:, row, :, at] = torch.cat(of_layers)                                # [L, K, H]
        return x[None], logits[None]

    def past(self, step: Step) -> list[Parts]:
        """The keys and values [K, P, H] before the new token, by layer, where they lie plain in one piece; else nothing."""
        end = step.past[0]
        begin = max(0, end + 1 - (self.window or end + 1))
        if type(step.cache) is not ContiguousCache or end - begin < 2:                  # 1 token would be compiled as a constant
            return []
        return list(zip(*(tensor[:, step.sequences[0], :, begin:end].unbind() for tensor in step.cache.tensors), strict=True))


def compiler() -> str:
    """The C++ compiler that PyTorch would call. Raises ValueError where there is none."""
    name = os.environ.get("CXX", "g++")
    if not shutil.which(name):
        raise ValueError(f"compile: there is no C++ compiler here ({name}); install one, or do without `compile`")
    return name


def compiled(model: Decoder, weights: str | None = None) -> Decoder:
    """A copy of a float `model` that decodes one sequence by compiled code, its matrices in the format `weights`, or as they are.

    All else it does, prompts and batches, is done as before, on layouts of its own: so there are two copies of the matrices, in fp32
    as in any other format. Compiling takes some ten seconds on two cores, `compiled(...).compile_s`, and less where PyTorch
    remembers it. Raises ValueError for an unknown format, for a model on a GPU or with other layers than a `Layer`, and where there is no
    C++ compiler.
    """
    if model.device.type != "cpu":
        raise ValueError(f"compile: the model is on {model.device}; only a CPU's code is compiled here")
    if any(type(layer) is not Layer for layer in model.layers) or model.packed:
        raise ValueError("compile: a model of plain float layers is accepted, and this one has experts, latents or packed weights")
    compiler()
    made = twin(model) if weights is None else with_weights(model, weights)
    made.compiled_step = CompiledStep(model, weights or model.weights, made.dtype)
    return made


@functools.cache
@torch.inference_mode()
def product_rate(format: str) -> float:
    """FLOP/s of compiled products of one row, with weights from memory: a matrix of no model's shape, in copies that no cache holds.

    Compiled and measured once a process.
    """
    weight = torch.randn(2560, 640, generator=torch.Generator().manual_seed(0))
    first, x = stored(format, weight), torch.ones(640)
    copies = [tuple(part.clone() for part in first) for _ in range(2**27 // sum(part.nbytes for part in first))]
    code = translated(product, first, x)

    def step(i: int) -> int:
        code(copies[i % len(copies)], x)
        return 2 * weight.numel()
    return rates({"product": step}, sample_s=0.1)["product"]
