"""The matrices of a model: which they are, what goes into them, and a copy of the model with others in their place.

Only the matrices of the layers are quantized. The embedding, which is the head too in a tied model, and the norms stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization.format import Format
from clawdemy_infer.quantization.quantized import Quantized


def linears(model: Decoder) -> dict[str, nn.Linear]:
    """Every matrix of the layers by name, `layers.0.qkv`, in the order in which they run: qkv, out, gate_up, down.

    Raises ValueError for a model whose weights are packed already.
    """
    if model.packed:
        raise ValueError(f"model: its weights are packed in {model.packed}; a model with float weights is accepted")
    return {f"layers.{i}.{name}": module for i, layer in enumerate(model.layers)
            for name, module in layer.named_children() if isinstance(module, nn.Linear)}


def copy_of(model: Decoder) -> Decoder:
    """A decoder whose modules are its own, and whose tensors are those of `model`: it takes no memory until some are replaced."""
    with torch.device("meta"):
        copy = Decoder(model.config)
    copy.load_state_dict(model.state_dict(), assign=True)
    copy.tokenizer = model.tokenizer
    return copy.eval().requires_grad_(False)


def with_modules(model: Decoder, modules: Mapping[str, nn.Module]) -> Decoder:
    """A copy of `model` with these modules, by name (`layers.0.qkv`), in the place of its own. All else is shared."""
    copy = copy_of(model)
    for name, module in modules.items():
        copy.set_submodule(name, module)
    return copy


def with_matrices(model: Decoder, weights: Mapping[str, torch.Tensor | Quantized]) -> Decoder:
    """A copy of `model` with these weights, by the name of their module; quantized ones as the numbers their codes mean. It runs at
    the speed of `model` and is there to judge by.
    """
    copy = copy_of(model)
    for name, weight in weights.items():
        values = weight.dequantize() if isinstance(weight, Quantized) else weight
        copy.get_submodule(name).weight = nn.Parameter(values.to(model.dtype), requires_grad=False)
    return copy


def observe(model: Decoder, tokens: torch.Tensor, see: Callable[[str, torch.Tensor], None]) -> None:
    """Run `model` on tokens [B, T], a sequence at a time, and show `see` the name and the input x [M, K] of each matrix.

    Raises ValueError where an input is not finite: what is learnt from it would be void.
    """
    def look(name: str) -> Callable:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            if not inputs[0].isfinite().all():
                raise ValueError(f"{name}: its input is not finite; are the weights, or {model.dtype}, too large?")
            see(name, inputs[0])
        return hook

    handles = [module.register_forward_pre_hook(look(name)) for name, module in linears(model).items()]
    try:
        for row in tokens:
            model(row[None], last_only=True)
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A method's result: what is stored of each matrix, and a `decoder` that computes as a quantized one would, at fp32's speed."""

    method: str
    format: Format
    tensors: dict[str, Quantized]
    decoder: Decoder

    @property
    def bits_per_weight(self) -> float:
        """Effective bits, over all matrices."""
        return 8 * self.matrix_bytes / sum(each.codes.numel() for each in self.tensors.values())

    @property
    def matrix_bytes(self) -> int:
        return sum(each.nbytes for each in self.tensors.values())


def round_to_nearest(model: Decoder, format: Format) -> QuantizedModel:
    """RTN: every weight becomes the nearest number that its format has. No data is looked at."""
    tensors = {name: Quantized.of(format, module.weight) for name, module in linears(model).items()}
    return QuantizedModel("RTN", format, tensors, with_matrices(model, tensors))
