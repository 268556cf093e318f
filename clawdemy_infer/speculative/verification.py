"""Verification: which drafted tokens are accepted, so that what comes out is distributed as if the
target had written it alone.

Leviathan, Kalman and Matias 2023, algorithm 1; Chen et al. 2023 found it at the same time. At each
position the draft drew a token x from its distribution q, and the target has the distribution p.

    x is accepted with probability min(1, p(x) / q(x));
    if it is rejected, another is drawn from the residual, max(0, p - q) made to sum to 1, and what
    was drafted behind it is void;
    if all are accepted, the target's last row gives one more, the bonus: the residual of q = 0.

Why the result has distribution p: token y comes out of a position with q(y) min(1, p(y) / q(y)) =
min(p(y), q(y)) by being accepted, and by the residual with what is missing from there to p(y),
since a token is rejected with probability 1 - sum min(p, q) = sum max(0, p - q), which is just what
the residual is divided by."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from clawdemy_infer.model import Sampling, draw, probabilities
from clawdemy_infer.model.sampling import likeliest


class Verdict(NamedTuple):
    """`accepted` [B]: how many drafted tokens of each row, and `token` [B], which follows them: a
    correction, or the bonus; `NOTHING` where the target has none, as behind a NaN."""

    accepted: torch.Tensor
    token: torch.Tensor


def verify(p: torch.Tensor, q: torch.Tensor | None, drafted: torch.Tensor, counts: torch.Tensor,
           generator: torch.Generator | None = None) -> Verdict:
    """Rejection sampling for B sequences, each with its own number of drafted tokens: row b has
    drafted[b, :counts[b]], and what lies behind is not looked at. p [B, G+1, V] are the target's
    probabilities at the drafted tokens and behind the last; q [B, >= G, V] those that `drafted`
    [B, G] were drawn from, None where the draft was certain of each.

    >>> p = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]])    # after the text; after one more
    >>> q, one = torch.tensor([[[0.5, 0.0, 0.5]]]), torch.tensor([1])
    >>> verify(p, q, torch.tensor([[0]]), one)          # p/q = 1: accepted; token 2 is the bonus
    Verdict(accepted=tensor([1]), token=tensor([2]))
    >>> verify(p, q, torch.tensor([[2]]), one)          # p/q = 0: rejected; the residual is 0 0.5 0
    Verdict(accepted=tensor([0]), token=tensor([1]))
    """
    B, G = drafted.shape
    rows = torch.arange(B, device=p.device)
    if q is None:
        q = torch.zeros_like(p[:, :G]).scatter_(-1, drafted[..., None], 1.0)
    # 1. Accept u < p / q, without the division. The strict sign matters: what the target excludes
    #    has p = 0, and u may be 0.
    p_drafted, q_drafted = (x.gather(-1, drafted[..., None]).squeeze(-1) for x in (p[:, :G], q))
    u = torch.rand(B, G, generator=generator, dtype=p.dtype, device=p.device)
    accepted = _leading(u * q_drafted < p_drafted, counts)
    # 2. Draw from the residual, or behind the last drafted token from p.
    after = p[rows, accepted]                                           # [B, V]
    if G:
        rejected = (accepted < counts)[:, None]             # else q is not to be looked at
        excess = after - q[rows, accepted.clamp(max=G - 1)]
        residual = torch.where(rejected, excess, after).clamp(min=0)
        # Where p and q are the same but for rounding, a rejected token may leave no residual.
        after = torch.where(residual.sum(-1, keepdim=True) > 0, residual, after)
    return Verdict(accepted, draw(after, generator))


def verify_greedy(likeliest: torch.Tensor, drafted: torch.Tensor, counts: torch.Tensor) -> Verdict:
    """The limit of temperature 0, where p and q are each certain of one token: a drafted token
    [B, G] is accepted if it is the target's own, likeliest [B, G+1]."""
    accepted = _leading(drafted == likeliest[:, :drafted.shape[1]], counts)
    return Verdict(accepted, likeliest.gather(-1, accepted[:, None]).squeeze(-1))


def _leading(passed: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """How many drafted tokens of each row passed [B, G] before the first that did not: [B]."""
    drafted = torch.arange(passed.shape[1], device=passed.device) < counts[:, None]
    return (passed & drafted).long().cumprod(-1).sum(-1)


def verify_rows(logits: torch.Tensor, drafted: list[list[int]], q: torch.Tensor | None,
                sampling: Sampling, generator: torch.Generator,
                firsts: Sequence[int] | None = None) -> Verdict:
    """The rows of a step, [M, V], laid out as `verify` wants them and verified. Sequence b has
    len(drafted[b]) + 1 of them from `firsts[b]` on, by default one sequence behind the other; what
    it has fewer than others is filled up with its last row."""
    counts, device = [len(tokens) for tokens in drafted], logits.device
    G = max(counts)
    firsts = firsts or accumulate([count + 1 for count in counts[:-1]], initial=0)
    rows = torch.tensor([[first + min(i, count) for i in range(G + 1)]
                         for first, count in zip(firsts, counts, strict=True)], device=device)
    tokens = torch.tensor([mine + [0] * (G - len(mine)) for mine in drafted], device=device).long()
    counts = torch.tensor(counts, device=device)
    if sampling.temperature == 0:
        return verify_greedy(likeliest(logits)[rows], tokens, counts)
    return verify(probabilities(logits[rows], sampling), q, tokens, counts, generator)
