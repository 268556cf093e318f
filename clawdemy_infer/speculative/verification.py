"""Verification: which drafted tokens stand, so that what comes out is distributed as if the target had written it alone.

Leviathan, Kalman and Matias 2023, algorithm 1; Chen et al. 2023 found it at the same time. At each position the draft drew a
token x from its distribution q, and the target has the distribution p. Then

    x stands with probability min(1, p(x) / q(x));
    if it falls, another is drawn from the residual, max(0, p - q) made to sum to 1, and what was drafted behind it is void;
    if all stand, the target's last row gives one more, the bonus.

Why the result has distribution p: token y comes out of a position with q(y) min(1, p(y) / q(y)) = min(p(y), q(y)) by standing,
and by the residual with what is missing from there to p(y), since a token falls with probability 1 - sum min(p, q) =
sum max(0, p - q), which is just what the residual is divided by.

A bonus is the residual against a draft that said nothing: with q = 0, max(0, p - q) is p. So one formula serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from clawdemy_infer.backends import choose, kernel
from clawdemy_infer.model import Sampling, draw, probabilities


class Verdict(NamedTuple):
    """`accepted` [B] drafted tokens of each row stand, and `token` [B] follows them: a correction, or the bonus."""

    accepted: torch.Tensor
    token: torch.Tensor


def verify(p: torch.Tensor, q: torch.Tensor | None, drafted: torch.Tensor, counts: torch.Tensor,
           generator: torch.Generator | None = None, backend: str | None = None) -> Verdict:
    """Rejection sampling for B sequences at once, of which each has its own number of drafted tokens.

    p [B, G+1, V] are the target's probabilities at the drafted tokens and behind the last; q [B, G, V] the probabilities that
    `drafted` [B, G] were drawn from, None where the draft was certain of each. Row b has drafted[b, :counts[b]]; what lies
    behind is not looked at. The same seed draws other numbers with another `backend` (`backends`).
    """
    B, G = drafted.shape
    if G and choose(p.device, backend) == "triton":
        u = torch.rand(B, G + 1, generator=generator, device=p.device)
        return Verdict(*(x.long() for x in kernel("verify")(p.float(), q if q is None else q.float(), drafted, u, counts)))
    rows = torch.arange(B, device=p.device)
    if q is None:
        q = torch.zeros_like(p[:, :G]).scatter_(-1, drafted[..., None], 1.0)
    p_drafted, q_drafted = (x.gather(-1, drafted[..., None]).squeeze(-1) for x in (p[:, :G], q))                    # [B, G]
    u = torch.rand(B, G, generator=generator, dtype=p.dtype, device=p.device)
    # u < p / q, without the division. The strict sign matters: what the target excludes has p = 0, and u may be 0.
    stands = (u * q_drafted < p_drafted) & (torch.arange(G, device=p.device) < counts[:, None])
    accepted = stands.long().cumprod(-1).sum(-1)                        # the first that falls takes the others with it
    theirs = p[rows, accepted]                                                                                      # [B, V]
    if G:
        fell = (accepted < counts).to(p.dtype)[:, None]
        residual = (theirs - fell * q[rows, accepted.clamp(max=G - 1)]).clamp(min=0)
        # Where p and q are the same but for rounding, a token may fall and leave no residual at all.
        theirs = torch.where(residual.sum(-1, keepdim=True) > 0, residual, theirs)
    return Verdict(accepted, draw(theirs, generator))


def verify_greedy(likeliest: torch.Tensor, drafted: torch.Tensor, counts: torch.Tensor) -> Verdict:
    """The limit of temperature 0, where p and q are each certain of one token: a drafted token stands if it is the target's own.

    likeliest [B, G+1] are the target's tokens, drafted [B, G] as in `verify`.
    """
    B, G = drafted.shape
    stands = (drafted == likeliest[:, :G]) & (torch.arange(G, device=drafted.device) < counts[:, None])
    accepted = stands.long().cumprod(-1).sum(-1)
    return Verdict(accepted, likeliest.gather(-1, accepted[:, None]).squeeze(-1))


def verify_rows(logits: torch.Tensor, drafted: list[list[int]], q: torch.Tensor | None, sampling: Sampling, generator: torch.Generator,
                firsts: Sequence[int] | None = None, backend: str | None = None) -> Verdict:
    """The rows of a step, [M, V], laid out as `verify` wants them, [B, G+1, V], and verified.

    Sequence b has len(drafted[b]) + 1 rows from `firsts[b]` on; if nothing is said, one sequence follows on the other. What it has
    fewer than others is filled up with its last row.
    """
    counts, G, device = [len(guess) for guess in drafted], max(map(len, drafted)), logits.device
    if firsts is None:
        firsts = accumulate([count + 1 for count in counts[:-1]], initial=0)
    rows = torch.tensor([[first + min(i, count) for i in range(G + 1)] for first, count in zip(firsts, counts, strict=True)], device=device)
    guesses = torch.tensor([guess + [0] * (G - len(guess)) for guess in drafted], dtype=torch.int64, device=device)
    counts = torch.tensor(counts, device=device)
    if sampling.temperature == 0:
        return verify_greedy(logits.argmax(-1)[rows], guesses, counts)
    return verify(probabilities(logits[rows], sampling), q if q is None else q[:, :G], guesses, counts, generator, backend)
