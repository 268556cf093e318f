"""The matrices of a model: which they are, what goes into them, and a copy of the model with others
in their place. Those of the layers are quantized; embedding, head and norms stay as they are."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization.format import Format, Quantized


def linears(model: Decoder) -> dict[str, nn.Linear]:
    """The layers' matrices by name, `layers.0.qkv`, in the order of use: qkv, out, gate_up, down.
    Raises ValueError for a model whose weights are packed already."""
    if model.weights not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"model: its weights are packed in {model.weights}; a model with float "
                         "weights is accepted")
    return {f"layers.{i}.{name}": module for i, layer in enumerate(model.layers)
            for name, module in layer.named_children() if isinstance(module, nn.Linear)}


def watchable(model: Decoder) -> dict[str, nn.Linear]:
    """`linears`, whose inputs are to be seen as they run. Raises ValueError for a model whose steps
    a fast engine runs, past its modules."""
    if model.runner:
        raise ValueError(f"model: {type(model.runner).__name__} runs its steps, and shows no "
                         "inputs: quantize the model first, then make it `faster`")
    return linears(model)


def with_matrices(model: Decoder, weights: Mapping[str, Quantized]) -> Decoder:
    """A copy of `model` with these weights, by the name of their matrix, as the numbers their codes
    mean, so it is no faster. All other tensors are those of `model`."""
    with torch.device("meta"):
        copy = Decoder(model.config)
    state = model.state_dict()
    for name, weight in weights.items():
        state[f"{name}.weight"] = weight.dequantize().to(model.dtype)
    copy.load_state_dict(state, assign=True)
    copy.tokenizer = model.tokenizer
    return copy.eval().requires_grad_(False)


@contextmanager
def watched(model: Decoder, see: Callable[[str, nn.Linear, torch.Tensor], None],
            title: str | None = None) -> Iterator[None]:
    """While this lasts, `see` gets each matrix that is about to run, as name, module and input x
    [M, I]. With a `title`, a bar counts them."""
    found = watchable(model)
    with tqdm(total=len(found), desc=title, disable=title is None) as bar, ExitStack() as stack:
        for name, linear in found.items():
            def before(linear: nn.Linear, inputs: tuple[torch.Tensor], name: str = name) -> None:
                see(name, linear, inputs[0])
                bar.update()
            stack.enter_context(linear.register_forward_pre_hook(before))
        yield


def observe(model: Decoder, tokens: torch.Tensor, see: Callable[[str, torch.Tensor], None]) -> None:
    """Run `model` on tokens [B, T], a sequence at a time, and show `see` the name and the input x
    [M, I] of each matrix. Raises ValueError as `watchable`, and where an input is not finite."""
    def checked(name: str, linear: nn.Linear, x: torch.Tensor) -> None:
        if not x.isfinite().all():
            raise ValueError(f"{name}: its input is not finite; are the weights, or {model.dtype}, "
                             "too large?")
        see(name, x)

    with watched(model, checked):
        for row in tokens:
            model(row[None], last_only=True)


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A method's result: what is stored of each matrix, and a `decoder` that computes with it."""

    method: str
    format: Format
    tensors: dict[str, Quantized]
    decoder: Decoder

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.matrix_bytes / sum(each.codes.numel() for each in self.tensors.values())

    @property
    def matrix_bytes(self) -> int:
        return sum(each.nbytes for each in self.tensors.values())


def round_to_nearest(model: Decoder, format: Format) -> QuantizedModel:
    """RTN: every weight becomes the nearest number that its format has. No data is looked at."""
    tensors = {name: Quantized.of(format, linear.weight) for name, linear in linears(model).items()}
    return QuantizedModel("RTN", format, tensors, with_matrices(model, tensors))
