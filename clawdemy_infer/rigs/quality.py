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

BLOCK = 64
"""Tokens that are averaged before a standard error is taken: neighbours are wrong together."""


@dataclass(frozen=True, eq=False)
class Quality:
    """Against the reference, on one text: KL in nats per token, its standard error; `top1`,
    how often both put one token first. `kls`: the KL of each position [B, T] or sequence [B, 1]."""

    kl: float
    kl_se: float
    perplexity: float
    top1: float
    kls: torch.Tensor = field(repr=False)

    def difference(self, other: "Quality") -> tuple[float, float]:
        """How much larger the KL of `other` is, and its standard error: they rise together."""
        return mean_and_error(other.kls - self.kls)


class Reference:
    """What `model` says about tokens [B, T]: the yardstick for models made of it. It keeps the last
    vectors and not the logits, 9 MB for 4,096 tokens and not 805. ValueError for wrong tokens."""

    def __init__(self, model: Decoder, tokens: torch.Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[1] < 2:
            raise ValueError(f"tokens {list(tokens.shape)}: [B, T], T at least 2, are accepted")
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
        """`model` makes logits [1, T, V] of tokens [1, T]: ValueError where one is not finite."""
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
