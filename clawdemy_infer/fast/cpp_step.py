"""A step of any tokens of any sequences as one call of C++ (`cpp/step.cpp`), over a
`ContiguousCache` or a `PagedCache`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.fast import cpp
from clawdemy_infer.fast.cpp_product import CppProduct
from clawdemy_infer.fast.formats import packable
from clawdemy_infer.fast.layers import PackedLinear
from clawdemy_infer.fast.pages import has_pages, pages_of
from clawdemy_infer.kv_cache import Step
from clawdemy_infer.model.config import ModelConfig
from clawdemy_infer.model.decoder import Decoder, Layer, LogitsToKeep, RMSNorm, wanted_rows
from clawdemy_infer.model.rope import rope_tables
from clawdemy_infer.timing import now

PARTS = ("element-wise", "qkv", "attention", "out", "gate_up", "down")
"""What the C++ can read a clock for: `enum Part` of step.cpp, in that order."""


class CppLayers:
    """Some layers of a decoder and the norm behind them. Matrices in float are packed in `format`;
    those of a `PackedLinear` are shared with it. Weights are taken as they are now: what is done to
    the model later is not seen, or half of it. `compile_s` says how long packing and compiling
    took. Steps add the seconds of each of `PARTS` to `clocks`, [6] of float64, where there are any.

    Products of many rows are C++ too, also where a CPU's matrix registers (AMX) are faster, which
    `kernels` takes for them: it is decodes that a compiled step pays for.

    Raises ValueError for activations in another dtype than fp32 and bf16, for other layers than a
    `Layer`, for matrices of another size or format, or that `CppProduct` refuses, and where there
    is no compiler; CompilerFailed where it fails.
    """

    backend = "cpp"
    clocks: torch.Tensor | None = None

    @torch.inference_mode()
    def __init__(self, layers: Sequence[nn.Module], norm: RMSNorm, config: ModelConfig, format: str,
                 dtype: torch.dtype, frequencies: torch.Tensor) -> None:
        start, shape = now(), config.shape
        if dtype not in cpp.TYPES:
            raise ValueError(f"compile: activations are in {dtype}; float32 or bfloat16 is "
                             "accepted; without compile it runs as PyTorch")
        cpp.tried()                                 # or it says so before anything is packed
        if any(type(layer) is not Layer for layer in layers):
            raise ValueError("compile: a model of plain layers is accepted, and this one has "
                             "experts, latents or others; without compile it runs as PyTorch")
        self.dtype, self.frequencies, self.gain = dtype, frequencies, config.rope_gain
        self.window, self.L = shape.window, len(layers)
        self.kept = []                              # what the pointers point at
        self.layers = torch.tensor([self.pointers_of(layer, format, shape) for layer in layers])
        self.gamma = norm.weight.float()
        made = cpp.library("step", Kept=cpp.TYPES[dtype], FORMAT=format.upper(), D=shape.D,
                           F=shape.F, G=shape.N // shape.K, H=shape.H, K=shape.K,
                           EPS=config.norm_eps)
        self.code = cpp.function(made, "step", arrays=12, numbers=7)
        self.compile_s = now() - start

    def pointers_of(self, layer: Layer, format: str, shape: ModelShape) -> list[int]:
        """The 13 words of `struct Layer` of step.cpp, in its order."""
        D, N, K, H, F = shape.D, shape.N, shape.K, shape.H, shape.F
        matrices = [packed(format, layer.qkv, (N + 2 * K) * H, D),
                    packed(format, layer.out, D, N * H),
                    packed(format, layer.gate_up, 2 * F, D), packed(format, layer.down, D, F)]
        gamma, mlp_gamma, q_gamma, k_gamma = (
            None if norm is None else norm.weight
            for norm in (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm))
        vectors = [None if vector is None else vector.float().contiguous()
                   for vector in (gamma, mlp_gamma, layer.qkv.bias, q_gamma, k_gamma)]
        self.kept += matrices + vectors
        return [*(x for each in matrices for x in (each.panels.data_ptr(), each.group)),
                *(0 if vector is None else vector.data_ptr() for vector in vectors)]

    def takes(self, step: Step) -> bool:
        """Do its keys and values lie plain, in the type of this model's?"""
        return has_pages(step) and step.cache.dtype == self.dtype

    def run(self, x: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """For x [M, D], what goes into the first layer: what the last one leaves, and its norm,
        both [M, D] in fp32. An x in fp32 is written over."""
        pages = pages_of(step)
        cos, sin = rope_tables(self.frequencies, step.positions, torch.float32, self.gain)
        x = x.float().contiguous()
        past, num_new_tokens = torch.tensor(step.past), torch.tensor(step.num_new_tokens)
        y = torch.empty_like(x)
        tensors = cpp.pointers(x, y, self.layers, self.gamma, cos, sin, pages.keys, pages.values,
                               pages.table, past, num_new_tokens)
        clocks = 0 if self.clocks is None else self.clocks.data_ptr()
        self.code(*tensors, clocks, self.L, len(step.sequences), pages.keys.stride(0),
                  pages.table.shape[1], pages.block_size, self.window or cpp.EVERYTHING,
                  torch.get_num_threads())
        return x, y


class CppStep(CppLayers):
    """The whole steps of `model`. Its head may have any size: it is a `PackedLinear`."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model.layers, model.norm, model.config, model.weights, model.dtype,
                         model.frequencies)
        start, head = now(), model.embed if model.head is None else model.head
        self.model = model
        self.head = head if isinstance(head, PackedLinear) else PackedLinear(model.weights,
                                                                             head.weight)
        self.compile_s += now() - start

    def __call__(self, tokens: torch.Tensor, step: Step,
                 logits_to_keep: LogitsToKeep = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """For tokens [M], what the last layer leaves, [M, D], and the logits that are wanted of
        it."""
        x, y = self.run(self.model.embed(tokens), step)
        return x, self.head(wanted_rows(y, step, logits_to_keep).to(self.dtype))


def packed(format: str, matrix: nn.Linear | PackedLinear, O: int, I: int) -> CppProduct:
    """The matrix of a linear layer, which must be [O, I]. ValueError where it is not, or cannot be
    packed: C++ reads what it was told that there is."""
    size = [matrix.out_features, matrix.in_features]
    if size != [O, I]:
        raise ValueError(f"compile: a matrix is {size}, and the config's is [{O}, {I}]")
    if isinstance(matrix, PackedLinear):
        found = [kernel for _, kernel in matrix.kernels
                 if isinstance(kernel, CppProduct) and kernel.format == format]
        if not found:
            raise ValueError(f"compile: a matrix {size} that C++ does not take in {format}; "
                             "without compile it runs as PyTorch")
        return found[0]
    try:
        return CppProduct(format, packable(format, matrix.weight.detach()))
    except NotImplementedError as error:
        raise ValueError(f"compile: {error}; without compile it runs as PyTorch") from error
