"""Where a quantized model is hurt: at which matrix, in which layer."""

import torch
from torch.nn import functional as F

from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization.linears import QuantizedModel, linears, observe, with_matrices
from clawdemy_infer.rigs.quality import Reference


def output_errors(model: Decoder, quantized: QuantizedModel,
                  tokens: torch.Tensor) -> dict[str, float]:
    """How far the outputs of each matrix move, |x (W - W')ᵀ|² / |x Wᵀ|², on what the unquantized
    model puts into it for tokens [B, T]; the worst first."""
    originals, energies = linears(model), {}

    def see(name: str, x: torch.Tensor) -> None:
        old, new = originals[name].weight, quantized.tensors[name].dequantize().to(x.dtype)
        both = [F.linear(x, weight).double().square().sum() for weight in (new - old, old)]
        energies[name] = energies.get(name, 0) + torch.stack(both)

    observe(model, tokens, see)
    errors = {name: float(moved / whole) for name, (moved, whole) in energies.items()}
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def kl_by_layer(reference: Reference, quantized: QuantizedModel) -> dict[int, float]:
    """The KL that each layer costs when it alone is quantized: a run of the model for each."""
    layers: dict[int, dict] = {}
    for name, tensor in quantized.tensors.items():
        layers.setdefault(int(name.split(".")[1]), {})[name] = tensor
    return {layer: reference.judge(with_matrices(reference.model, tensors)).kl
            for layer, tensors in layers.items()}
