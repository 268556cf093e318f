"""Mixture of experts: a router sends each token to k of E small MLPs, and only those are read.

    p = softmax over the k largest of x W_r           which experts, and how much of each
    y = sum over those of p_e down_e(silu(gate_e x) * up_e x)

Shazeer et al. 2017, equations 1 to 5; as Mixtral has it: Jiang et al. 2024, section 2.1. The cost
of a step depends on how many *distinct* experts its tokens choose: `arithmetic.MoE.touched`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from clawdemy_infer.arithmetic import ModelShape, MoE
from clawdemy_infer.model.config import ModelConfig
from clawdemy_infer.model.decoder import Decoder, Layer


class Experts(nn.Module):
    """A router and E gated MLPs of width F between vectors of width D. Weights are random until
    others are copied in. Raises ValueError unless 1 <= active <= experts."""

    def __init__(self, D: int, F: int, experts: int, active: int) -> None:
        super().__init__()
        if not 1 <= active <= experts:
            raise ValueError(f"active={active}: 1 to experts={experts} are accepted")
        self.experts, self.active = experts, active
        self.router = nn.Linear(D, experts, bias=False)
        # An expert's matrix is a slice: whoever is not chosen is not touched.
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * F, D).uniform_(-(D**-0.5), D**-0.5))
        self.down = nn.Parameter(torch.empty(experts, D, F).uniform_(-(F**-0.5), F**-0.5))

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The k experts of each token of x [M, D], and its shares of them, summing to 1: [M, k]."""
        logits, chosen = self.router(x).topk(self.active, dim=-1)
        return chosen, logits.float().softmax(-1).to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, D] -> [M, D]. The M·k (token, expert) pairs are sorted by expert, so that each
        expert is read once for all its tokens."""
        chosen, share = self.route(x)
        pairs = chosen.flatten().argsort(stable=True)           # [M*k], grouped by expert
        tokens = pairs // self.active                           # whose pair it is
        counts = chosen.flatten().bincount(minlength=self.experts).tolist()
        weighted = torch.cat([self.expert(e, rows) for e, rows in enumerate(x[tokens].split(counts))
                              if len(rows)]) * share.flatten()[pairs, None]
        return torch.zeros_like(x).index_add_(0, tokens, weighted)

    def expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        """The e-th MLP on the rows that were sent to it."""
        gate, up = F.linear(x, self.gate_up[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down[e])


class ExpertLayer(Layer):
    """The decoder's layer with the experts of `shape.moe` for its MLP."""

    def add_mlp(self, shape: ModelShape) -> None:
        moe = shape.moe
        self.experts = Experts(shape.D, moe.F or shape.F, moe.experts, moe.active)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)


def decoder_with_experts(config: ModelConfig, moe: MoE) -> Decoder:
    """A decoder of random weights that has experts in the layers where `moe` wants them. `config`
    says all the rest and stays dense: count such a model by `dataclasses.replace(config.shape,
    moe=moe)`. Raises ValueError for a `moe` with shared experts."""
    if moe.shared:
        raise ValueError(f"moe.shared={moe.shared}: only 0, no shared expert, is accepted")
    sparse, eps = replace(config.shape, moe=moe), config.norm_eps
    model = Decoder(config, lambda index: ExpertLayer(sparse, eps) if moe.in_layer(index) else
                    Layer(config.shape, eps))
    return model.eval().requires_grad_(False)
