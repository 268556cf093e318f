"""AWQ: give the weights that meet large activations a finer grid, at no cost in use (Lin et al. 2023, https://arxiv.org/abs/2306.00978).

A few input channels carry activations many times larger than the rest, and the rounding error of their weights is multiplied by
that. Multiply such a channel's weights by s > 1 before rounding, and its activations by 1/s:

    y = W x = (W diag(s)) (diag(s)⁻¹ x)

The product is the same, but the channel's weights are now s times as large on a grid that has hardly grown, so they lose s times less.
Too large an s stretches the grid of all their neighbours. So s is searched, on a line (equation 5 of the paper):

    s = mean|x|^a,   a from 0 (no scaling: rounding to nearest) to 1, with the least error at the output of the block

The 1/s goes where it costs nothing: into the weights of whatever made x. That is the norm before Q, K and V, and before gate
and up; the rows of up before down; the rows of V before the output projection, where query heads that share a V share its scales.
Then, for each group, the largest weights are clipped as far as that helps the output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization.format import Format
from clawdemy_infer.quantization.gptq import check
from clawdemy_infer.quantization.linears import QuantizedModel, copy_of, linears, with_matrices
from clawdemy_infer.quantization.quantized import Quantized

RATIOS = tuple(i / 10 for i in range(11))
"""The exponents a that are tried."""

CLIPS = tuple(1 - 0.05 * i for i in range(1, 11))
"""Parts of a group's range to which its weights are clipped, beside all of it."""

JUDGES = 512
"""Tokens whose output judges an exponent where each token goes through a block alone. Attention takes all: they look at one another."""

SINK = 4
"""A token whose vector is so many times longer than the median one is a sink: attention rests on it and reads nothing from it. Its
few huge channels would otherwise be all that the statistics see (Sun et al. 2024, Massive activations). But they must come out right,
or no token has anywhere to rest: so sinks are judged by themselves, and count as much as all other tokens together."""


def awq(model: Decoder, tokens: torch.Tensor, format: Format, *, clip: bool = True, progress: bool = False) -> QuantizedModel:
    """A copy of `model` with weights quantized by AWQ to `format`, on the calibration tokens [B, T]; its norms carry scales.

    The model runs once, and each layer is searched on what went through it there. Without `clip` there are scales alone. Raises ValueError
    where a group does not divide a row, or an activation is not finite, naming the layer.
    """
    for linear in linears(model).values():
        check(format, linear.weight.shape[1])
    copy, seen, scales, tensors = _with_own_weights(model), {}, {}, {}
    bar = tqdm(total=len(copy.layers), desc=f"AWQ {format.name}", unit="layer", disable=not progress)

    def search(original: nn.Module, arguments: tuple, y: torch.Tensor) -> None:
        x, rope, step, i = arguments
        if not torch.isfinite(y).all():
            raise ValueError(f"tokens: the output of layer {i} that they lead to is not finite, and AWQ needs its size")
        layer, sink = copy.layers[i], ~(_ordinary(x) & _ordinary(y))    # [M]
        some = torch.cat(((~sink).nonzero()[::-(-len(sink) // JUDGES)], sink.nonzero())).squeeze(1)
        for name, h in seen.items():
            # Q, K and V are judged by what attention makes of them, gate and up by the MLP; out and down end their blocks.
            linear, few = getattr(layer, name), h[some]
            block = {"qkv": lambda h=h: layer.attention(h, rope, step, i), "gate_up": lambda few=few: layer.mlp(few)}.get(
                name, lambda few=few, linear=linear: linear(few))
            size = shared(layer, name, h[~sink].float().abs().mean(dim=0))
            scales[name] = best_scales(linear, size, format, block, sink if name == "qkv" else sink[some])
            fold(layer, name, scales[name])
        for name, h in seen.items():
            weight = getattr(layer, name).weight
            if clip:
                # Not Q and K: their errors meet in a product before the softmax, and a row's own error says little there.
                rows = slice((layer.N + layer.K) * layer.H if name == "qkv" else 0, None)
                weight[rows] = clipped(weight[rows], h / scales[name], format, sink)
            tensors[f"layers.{i}.{name}"] = Quantized.of(format, weight)
        bar.update()

    handles = [linear.register_forward_pre_hook(lambda _, arguments, name=name: seen.__setitem__(name.rpartition(".")[2], arguments[0]))
               for name, linear in linears(model).items()]
    handles += [layer.register_forward_hook(search) for layer in model.layers]
    try:
        with bar:
            model(tokens, last_only=True)
    finally:
        for handle in handles:
            handle.remove()
    return QuantizedModel("AWQ", format, tensors, with_matrices(copy, tensors))


def best_scales(linear: nn.Linear, size: torch.Tensor, format: Format, block: Callable[[], torch.Tensor],
                sink: torch.Tensor) -> torch.Tensor:
    """s [K]: size^a for the a of `RATIOS` that changes the output of `block()`, [M, D], least when `linear` is rounded to `format`
    under it. `size` [K] is how large the inputs are, `sink` [M] which rows are sinks (see `shares`).
    """
    weight, exact = linear.weight.clone(), block()
    counts = shares(exact, sink)
    best, least = torch.ones_like(size), None
    for ratio in RATIOS:
        s = size.clamp(min=1e-4) ** ratio
        s = s / (s.max() * s.min()).sqrt()                              # around 1: only the ratios between channels matter
        linear.weight.copy_(Quantized.of(format, weight * s).dequantize() / s)
        error = float(((block() - exact).square() * counts).sum())
        if least is None or error < least:
            best, least = s, error
    linear.weight.copy_(weight)
    return best


def shares(y: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """[M, 1]: what the squared error of each row of y [M, D] counts, so that sinks and others are each judged by their own size."""
    counts = torch.zeros(len(y), 1, device=y.device)
    for rows in (sink, ~sink):
        counts[rows] = 1 / y[rows].float().square().sum().clamp(min=1e-20)
    return counts


def fold(layer: nn.Module, name: str, s: torch.Tensor) -> None:
    """Multiply the columns of one linear of a layer by s [K], and divide what makes its input by the same: the layer computes what it
    did. For `out`, s must be the same for all query heads that share a V (see `shared`). Changes the weights of `layer`.
    """
    getattr(layer, name).weight.mul_(s)
    if name in ("qkv", "gate_up"):
        getattr(layer, {"qkv": "attention_norm", "gate_up": "mlp_norm"}[name]).weight.div_(s)
    elif name == "down":
        layer.gate_up.weight.chunk(2)[1].div_(s[:, None])               # up, which silu(gate) multiplies; not gate, inside silu
    else:
        v = s.view(layer.K, -1, layer.H)[:, 0].reshape(-1)              # [K*H], of the first query head of each group
        layer.qkv.weight[-len(v):].div_(v[:, None])
        if layer.qkv.bias is not None:
            layer.qkv.bias[-len(v):].div_(v)


def shared(layer: nn.Module, name: str, size: torch.Tensor) -> torch.Tensor:
    """The mean over what must have the same scale: for `out`, the N/K query heads that read one V. Else `size` [K] itself."""
    if name != "out":
        return size
    heads = size.view(layer.K, -1, layer.H)
    return heads.mean(dim=1, keepdim=True).expand_as(heads).reshape(-1)


def clipped(weight: torch.Tensor, x: torch.Tensor, format: Format, sink: torch.Tensor) -> torch.Tensor:
    """weight [N, K] with each group clipped to the part of its range (`CLIPS`) that changes its share of the output least, on x [M, K],
    of which the rows `sink` [M] are sinks.

    A group's share is x_g · w_g, and its squared error over all tokens (w - q) H (w - q)ᵀ with H = X_gᵀ X_g, [g, g].
    """
    w = format.grouped(weight.float())                                  # [N, G, g]
    x = x.float() * shares(F.linear(x, weight), sink).sqrt()
    x = x.unflatten(-1, w.shape[1:]).transpose(0, 1)                    # [G, M, g]
    H = x.transpose(1, 2) @ x                                           # [G, g, g]
    low, high = w.amin(dim=-1, keepdim=True), w.amax(dim=-1, keepdim=True)
    best, least = w, None
    for part in (1.0, *CLIPS):
        tried = w.clamp(low * part, high * part)
        off = (Quantized.of(format, tried.reshape(weight.shape)).dequantize().view(w.shape) - w).transpose(0, 1)    # [G, N, g]
        error = (off @ H * off).sum(dim=-1).T[..., None]                # [N, G, 1]
        least = error if least is None else least
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best.reshape(weight.shape).to(weight.dtype)


def _ordinary(x: torch.Tensor) -> torch.Tensor:
    """[M]: which of the vectors x [M, D] are not sinks."""
    length = x.float().norm(dim=-1)
    return length < SINK * length.median()


def _with_own_weights(model: Decoder) -> Decoder:
    """A copy whose layers have tensors of their own, to be changed; embedding and head are shared. Its linears are plain ones, which
    keep no packed layout of a weight that is about to change.
    """
    copy = copy_of(model)
    for parameter in copy.layers.parameters():
        parameter.data = parameter.data.clone()
    for name, linear in linears(copy).items():
        plain = nn.Linear(*linear.weight.shape[::-1], bias=False, device="meta")
        plain.weight, plain.bias = linear.weight, linear.bias
        copy.set_submodule(name, plain)
    return copy
