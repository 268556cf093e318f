"""SmoothQuant: the activations become easy to round, the weights a little harder, at no cost.

    (x / s) (W diag(s))ᵀ = x Wᵀ            s[i] = max|x[:, i]|^alpha / max|W[:, i]|^(1 - alpha)

Activations have columns a hundred times larger than others, always the same ones; weights have not.
So each column of the input is divided by s, and that of the weight multiplied. Q, K, V and gate, up
read the output of a norm: dividing its weight by s is all. Xiao et al. 2022, "SmoothQuant: Accurate
and Efficient Post-Training Quantization for Large Language Models", equations 3 and 4.
"""

from __future__ import annotations

import torch
from torch import nn

from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization.linears import QuantizedModel, observe, with_matrices
from clawdemy_infer.variants.int8_activations import Int8Activations, in_int8

NORM_OF = {"qkv": "attention_norm", "gate_up": "mlp_norm"}
"""The matrices that read a norm's output, and that norm. `out` and `down` stay as they are."""


def input_maxima(model: Decoder, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The largest |x| in each column of every matrix's input, [I], over tokens [B, T]."""
    largest: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:
        of_x = x.abs().amax(0).float()
        largest[name] = torch.maximum(largest.get(name, of_x), of_x)

    observe(model, tokens, see)
    return largest


def smoothed(model: Decoder, largest: dict[str, torch.Tensor], alpha: float = 0.5) -> Decoder:
    """A copy of `model` that computes the same with smoother activations. `largest` is what
    `input_maxima` saw, `alpha` how much moves into the weights, 0 to 1; else ValueError."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: 0 to 1 is accepted; the paper's is 0.5")
    copy = with_matrices(model, {})
    for i, layer in enumerate(copy.layers):
        for name, norm in NORM_OF.items():
            linear, norm = getattr(layer, name), getattr(layer, norm)
            weight = linear.weight.float()
            of_weight = weight.abs().amax(0).clamp(min=1e-5)
            s = largest[f"layers.{i}.{name}"] ** alpha / of_weight ** (1 - alpha)
            s = s.clamp(min=1e-5)               # a column that was never used: 0 / 0 is no scale
            norm.weight = nn.Parameter((norm.weight / s).to(model.dtype), requires_grad=False)
            linear.weight = nn.Parameter((weight * s).to(model.dtype), requires_grad=False)
    return copy


def smoothquant(model: Decoder, tokens: torch.Tensor, alpha: float = 0.5) -> QuantizedModel:
    """`model` in 8 bits, weights and activations, smoothed for what `tokens` [B, T] show."""
    smooth = smoothed(model, input_maxima(model, tokens), alpha)
    return in_int8(smooth, "SmoothQuant", Int8Activations)
