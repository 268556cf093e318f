"""AWQ: give the weights that meet large activations a finer grid, at no cost in use (Lin et al.
2023, https://arxiv.org/abs/2306.00978).

A few input channels carry activations many times larger than the rest, which multiply the rounding
error of their weights. Multiply such weights by s > 1 before rounding, and the activations by 1/s:

    y = W x = (W diag(s)) (diag(s)⁻¹ x)

Weights s times as large on a grid that has hardly grown lose s times less, but too large an s
stretches the grid of all neighbours. So s = mean|x|^a is searched (equation 5), with the a from 0
to 1 of least error at the block's output; `fold` puts 1/s into what made x. Groups are clipped."""

from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization.format import Format, Quantized
from clawdemy_infer.quantization.gptq import narrowed
from clawdemy_infer.quantization.linears import QuantizedModel, watchable, watched, with_matrices

RATIOS = tuple(i / 10 for i in range(11))       # the exponents a that are tried
MAX_JUDGES = 512        # tokens whose output judges an exponent, but for attention: all of them

# A token of at least SINK times the median length is a sink, on which attention rests (Sun et al.
# 2024, Massive activations): it is judged apart, and sinks count as much as all other tokens.
SINK = 4


def awq(model: Decoder, tokens: torch.Tensor, format: Format, *,
        progress: bool = False) -> QuantizedModel:
    """A copy of `model` quantized by AWQ to `format`, its norms with scales, on the calibration
    tokens [B, T], which go through the model once. Raises ValueError as `watchable`, and where a
    group does not divide a row or an activation is not finite."""
    for linear in watchable(model).values():
        format.width(linear.weight.shape[1])
    copy, inputs, tensors = with_matrices(model, {}), {}, {}
    copy.layers = deepcopy(copy.layers)         # with weights of their own, to be changed

    def keep(name: str, linear: nn.Linear, x: torch.Tensor) -> None:
        inputs[name.rpartition(".")[2]] = x

    def search(original: nn.Module, arguments: tuple, y: torch.Tensor) -> None:
        x, rope, step, i = arguments
        if not torch.isfinite(y).all():
            raise ValueError(f"tokens: the output of layer {i} that they lead to is not finite")
        # 1. The tokens that judge: all sinks, and some of the others.
        layer, sink = copy.layers[i], ~(_ordinary(x) & _ordinary(y))            # [M]
        some = (~sink).nonzero()[::-(-len(sink) // MAX_JUDGES)]
        some = torch.cat((some, sink.nonzero())).squeeze(1)
        # 2. Scales. Q, K and V are judged by what attention makes of them, gate and up by the MLP.
        for name, h in inputs.items():
            linear, judges = getattr(layer, name), slice(None) if name == "qkv" else some
            block = {"qkv": lambda h: layer.attention(h, rope, step, i),
                     "gate_up": layer.mlp}.get(name, linear)
            size = shared(layer, name, h[~sink].float().abs().mean(dim=0))
            s = best_scales(linear, size, format, partial(block, h[judges]), sink[judges])
            fold(layer, name, s)
            inputs[name] = h / s
        # 3. Clips and codes. Q and K are not clipped: their errors meet in a product before the
        #    softmax, and a row's own error says little there.
        for name, h in inputs.items():
            weight = getattr(layer, name).weight
            rows = slice((layer.N + layer.K) * layer.H if name == "qkv" else 0, None)
            weight[rows] = clipped(weight[rows], h, format, sink)
            tensors[f"layers.{i}.{name}"] = rounded = Quantized.of(format, weight)
            weight.copy_(rounded.dequantize())

    with watched(model, keep, f"AWQ {format.name}" if progress else None), ExitStack() as stack:
        for layer in model.layers:
            stack.enter_context(layer.register_forward_hook(search))
        model(tokens, last_only=True)
    return QuantizedModel("AWQ", format, tensors, copy)


def best_scales(linear: nn.Linear, size: torch.Tensor, format: Format,
                block: Callable[[], torch.Tensor], sink: torch.Tensor) -> torch.Tensor:
    """s [I]: size^a for the a of `RATIOS` under which rounding `linear` changes `block()` [M, D]
    least. `size` [I]: the mean inputs; `sink` [M]: which rows are sinks."""
    weight, exact = linear.weight.clone(), block()
    counts, best, least = shares(exact, sink), torch.ones_like(size), float("inf")
    for ratio in RATIOS:
        s = size.clamp(min=1e-4) ** ratio
        s = s / (s.max() * s.min()).sqrt()      # around 1: only the ratios between channels matter
        linear.weight.copy_(Quantized.of(format, weight * s).dequantize() / s)
        error = float(((block() - exact).square() * counts).sum())
        best, least = (s, error) if error < least else (best, least)
    linear.weight.copy_(weight)
    return best


def shares(y: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """[M, 1]: what the squared error of each row of y [M, D] counts: sinks as much as others."""
    counts = torch.zeros(len(y), 1, device=y.device)
    for rows in (sink, ~sink):
        counts[rows] = 1 / y[rows].float().square().sum().clamp(min=1e-20)
    return counts


def shared(layer: nn.Module, name: str, size: torch.Tensor) -> torch.Tensor:
    """`size` [I]; for `out` its mean over the N/K query heads that read one V and share a scale."""
    if name != "out":
        return size
    heads = size.view(layer.K, -1, layer.H)
    return heads.mean(dim=1, keepdim=True).expand_as(heads).reshape(-1)


def fold(layer: nn.Module, name: str, s: torch.Tensor) -> None:
    """Multiply the columns of one matrix of a layer by s [I], and divide what makes its input."""
    getattr(layer, name).weight.mul_(s)
    if name in ("qkv", "gate_up"):              # the norm before it
        (layer.attention_norm if name == "qkv" else layer.mlp_norm).weight.div_(s)
    elif name == "down":                        # up, which silu(gate) multiplies
        layer.gate_up.weight.chunk(2)[1].div_(s[:, None])
    else:                                       # V; query heads that share one share its scales
        v = s.view(layer.K, -1, layer.H)[:, 0].reshape(-1)                      # [K*H]
        layer.qkv.weight[-len(v):].div_(v[:, None])
        if layer.qkv.bias is not None:
            layer.qkv.bias[-len(v):].div_(v)


def clipped(weight: torch.Tensor, x: torch.Tensor, format: Format,
            sink: torch.Tensor) -> torch.Tensor:
    """weight [O, I] with each group clipped to the part of its range that changes its share x_g ·
    w_g of the output least, on x [M, I], of which the rows `sink` [M] are sinks. The squared error
    over all tokens is (w - q) H (w - q)ᵀ with H = X_gᵀ X_g, [g, g]."""
    w = format.grouped(weight.float())                                          # [O, G, g]
    x = x.float() * shares(F.linear(x, weight), sink).sqrt()
    x = x.unflatten(-1, w.shape[1:]).transpose(0, 1)                            # [G, M, g]
    H = x.transpose(1, 2) @ x                                                   # [G, g, g]

    def error_of(tried: torch.Tensor) -> torch.Tensor:
        rounded = Quantized.of(format, tried.reshape(weight.shape)).dequantize().view(w.shape)
        off = (rounded - w).transpose(0, 1)                                     # [G, O, g]
        return (off @ H * off).sum(dim=-1).T[..., None]                         # [O, G, 1]

    return narrowed(w, error_of).reshape(weight.shape).to(weight.dtype)


def _ordinary(x: torch.Tensor) -> torch.Tensor:
    """[M]: which of the vectors x [M, D] are not sinks."""
    length = x.float().norm(dim=-1)
    return length < SINK * length.median()
