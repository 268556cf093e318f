"""How far a model has moved from the one that it was made of.

    KL(p || q) = mean over positions of sum over V of p (log p - log q), p the reference
    perplexity = exp(mean of -log q(next token))

KL sees every change of the distribution; perplexity only what happens to the one token that comes
next, and it may even fall by luck.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization.linears import QuantizedModel, linears, observe, with_matrices

BLOCK = 64
"""Tokens that are averaged before a standard error is taken: neighbours are wrong together."""


@dataclass(frozen=True, eq=False)
class Quality:
    """Against the reference, on the same text: KL in nats per token with its standard error, and
    `top1`, the share of positions where both put the same token first. `kls` is the KL of each
    position [B, T], or of each sequence [B, 1]."""

    kl: float
    kl_se: float
    perplexity: float
    top1: float
    kls: torch.Tensor = field(repr=False)

    def difference(self, other: "Quality") -> tuple[float, float]:
        """By how much the KL of `other` is larger, and the standard error of that: on the same text
        the two rise and fall together."""
        return mean_and_error(other.kls - self.kls)


class Reference:
    """What `model` says about tokens [B, T]: the yardstick for models made of it. It keeps the last
    vectors and not the logits, 9 MB for 4,096 tokens and not 805. ValueError for wrong tokens."""

    def __init__(self, model: Decoder, tokens: torch.Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[1] < 2:
            raise ValueError(f"tokens {list(tokens.shape)}: whole numbers [B, T], T at least 2, "
                             "are accepted")
        self.model, self.tokens, seen = model, tokens.to(model.device), []
        with model.norm.register_forward_hook(lambda _, inputs, output: seen.append(output)):
            for row in self.tokens:
                model(row[None])
        self.vectors = torch.stack(seen)                                        # [B, T, D]
        self.quality = self._judge(map(self.logits, range(len(self.tokens))))

    @torch.inference_mode()
    def logits(self, index: int) -> torch.Tensor:
        """[T, V] of sequence `index`."""
        return self.model.logits(self.vectors[index]).float()

    def judge(self, model: Callable[[torch.Tensor], torch.Tensor]) -> Quality:
        """`model`, whatever makes logits [1, T, V] of tokens [1, T], on the same tokens. Raises
        ValueError where its logits are not finite."""
        return self._judge(model(row[None])[0].float() for row in self.tokens)

    @torch.inference_mode()
    def _judge(self, all_logits: Iterable[torch.Tensor]) -> Quality:
        kls, losses, agreed = [], [], []
        for index, (logits, row) in enumerate(zip(all_logits, self.tokens, strict=True)):
            if not logits.isfinite().all():
                raise ValueError("model: its logits are not finite")
            expected = self.logits(index)                                       # [T, V]
            q, p = logits.log_softmax(-1), expected.log_softmax(-1)
            kls.append((p.exp() * (p - q)).sum(-1).cpu())
            losses.append(F.nll_loss(q[:-1], row[1:], reduction="none"))        # -log q of the next
            agreed.append(logits.argmax(-1) == expected.argmax(-1))
        kls = torch.stack(kls)
        return Quality(*mean_and_error(kls), float(torch.cat(losses).mean().exp()),
                       float(torch.cat(agreed).float().mean()), kls)


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean of values [B, T], and its standard error from the means of blocks of `BLOCK`."""
    parts = max(1, values.shape[1] // BLOCK)
    blocks = torch.stack([part.mean() for row in values for part in row.tensor_split(parts)])
    error = float(blocks.std()) / len(blocks) ** 0.5 if len(blocks) > 1 else float("nan")
    return float(values.mean()), error


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
