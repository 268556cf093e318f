"""How far a model has moved from the one that it was made of: KL divergence, perplexity, top-1 agreement, and where it moved.

    KL(p || q) = sum over V of p (log p - log q)        mean over all positions; p the reference, q the quantized model
    perplexity = exp(mean of -log q(next token))

KL sees every change of the distribution, and in a few thousand tokens; perplexity only what happens to the one token that
comes next, and it may even fall by luck.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization.linears import QuantizedModel, linears, observe, with_matrices

BLOCK = 64
"""Tokens that are averaged before a standard error is taken: neighbours share a context and are wrong together."""


@dataclass(frozen=True, eq=False)
class Quality:
    """Against the reference, on the same text. `kl` is in nats per token, with its standard error; `top1` the share of positions
    where both put the same token first. `kls` [B, T] keeps the KL of each position, or [B, 1] of each sequence."""

    kl: float
    kl_se: float
    perplexity: float
    top1: float
    kls: torch.Tensor = field(repr=False)

    def difference(self, other: Quality) -> tuple[float, float]:
        """By how much the KL of `other` is larger, and the standard error of that. On the same text the two rise and fall
        together, and so their difference is known better than either.
        """
        return mean_and_error(other.kls - self.kls)


class Reference:
    """What `model` says about tokens [B, T]: the yardstick for models made of it. Raises ValueError for wrong tokens.

    The last vectors are kept, D numbers a position, and not the V logits: 9 MB for 4,096 tokens in place of 805 MB. The head runs
    again for each model that is judged.
    """

    def __init__(self, model: Decoder, tokens: torch.Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[1] < 2:
            raise ValueError(f"tokens {list(tokens.shape)}: whole numbers [B, T], T at least 2, are accepted")
        self.model, self.tokens = model, tokens.to(model.device)
        seen: list[torch.Tensor] = []
        handle = model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            for row in self.tokens:
                model(row[None])
        finally:
            handle.remove()
        self.vectors = torch.stack(seen)                                                    # [B, T, D]
        losses = torch.cat([self._losses(self.logits(i).log_softmax(-1), i) for i in range(len(self.tokens))])
        self.quality = Quality(0.0, 0.0, float(losses.mean().exp()), 1.0, torch.zeros(self.tokens.shape))

    @torch.inference_mode()
    def logits(self, index: int) -> torch.Tensor:
        """[T, V] of sequence `index`."""
        head = self.model.embed.weight if self.model.head is None else self.model.head.weight
        return F.linear(self.vectors[index], head).float()

    @torch.inference_mode()
    def judge(self, model: Callable[[torch.Tensor], torch.Tensor]) -> Quality:
        """`model`, a decoder or whatever makes logits [1, T, V] of tokens [1, T], on the same tokens. Raises ValueError where its
        logits are not finite."""
        kls, losses, agreed = [], [], []
        for index, row in enumerate(self.tokens):
            logits, expected = model(row[None])[0].float(), self.logits(index)              # [T, V]
            if not logits.isfinite().all():
                raise ValueError("model: its logits are not finite")
            agreed.append(logits.argmax(-1) == expected.argmax(-1))
            q, p = logits.log_softmax(-1), expected.log_softmax(-1)
            losses.append(self._losses(q, index))
            kls.append((p.exp() * (p - q)).sum(-1).cpu())
        kls = torch.stack(kls)
        kl, error = mean_and_error(kls)
        return Quality(kl, error, float(torch.cat(losses).mean().exp()), float(torch.cat(agreed).float().mean()), kls)

    def _losses(self, logarithms: torch.Tensor, index: int) -> torch.Tensor:
        """-log q of the token that comes next, [T - 1], for log q [T, V]."""
        return -logarithms[:-1].gather(1, self.tokens[index, 1:, None]).squeeze(1)


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean of values [B, T], and its standard error from the means of blocks of `BLOCK` neighbours."""
    parts = max(1, values.shape[1] // BLOCK)
    blocks = torch.stack([part.mean() for row in values for part in row.tensor_split(parts)])
    error = blocks.std() / len(blocks) ** 0.5 if len(blocks) > 1 else torch.tensor(float("nan"))
    return float(values.mean()), float(error)


def output_errors(model: Decoder, quantized: QuantizedModel, tokens: torch.Tensor) -> dict[str, float]:
    """How far the outputs of each matrix move, |x (W - W')ᵀ|² / |x Wᵀ|², on the inputs of the unquantized model; the worst first.

    One pass over tokens [B, T]; the errors of the matrices before are not in it.
    """
    originals, wrong, right = linears(model), {}, {}

    def see(name: str, x: torch.Tensor) -> None:
        new = quantized.tensors[name].dequantize().to(x.dtype)
        wrong[name] = wrong.get(name, 0) + F.linear(x, new - originals[name].weight).double().square().sum()
        right[name] = right.get(name, 0) + F.linear(x, originals[name].weight).double().square().sum()

    observe(model, tokens, see)
    errors = {name: float(wrong[name] / right[name]) for name in quantized.tensors}
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def kl_by_layer(reference: Reference, quantized: QuantizedModel) -> dict[int, float]:
    """The KL that each layer costs when it alone is quantized. A run of the model for each of L layers."""
    layers: dict[int, dict] = {}
    for name, tensor in quantized.tensors.items():
        layers.setdefault(int(name.split(".")[1]), {})[name] = tensor
    return {layer: reference.judge(with_matrices(reference.model, tensors)).kl for layer, tensors in layers.items()}
