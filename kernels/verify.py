"""Speculative verification: accept or reject a draft's tokens, and draw the one that follows them
(Leviathan et al. 2023, algorithm 1).

For each drafted token x_i with target probability p_i(x_i) and draft probability q_i(x_i), and
uniform numbers u:

    accept x_i while u_i < p_i(x_i) / q_i(x_i)          that is, while u_i * q_i(x_i) < p_i(x_i)
    after n accepted: draw from norm(max(0, p_n - q_n)) if one was rejected,
                      else from p_n, the token that comes for free

The sign is strict: what the target excludes has p = 0, and u may be 0. Where p and q are the same
but for rounding, a token may be rejected and leave nothing of max(0, p - q): then the draw is from
p_n.

One program for each sequence. To accept or reject touches 2 numbers a token; only the last draw
walks over the vocabulary, twice, and only at the position where the run ended: (1 to 2) * 2 * V * e
bytes, however long the draft was.
"""

from __future__ import annotations

import torch

from clawdemy_kernels.launch import check, tl, triton


@triton.jit
def verify_kernel(p, q, drafted, counts, uniform, accepted_out, token_out,
                  p_stride_seq, p_stride_token, q_stride_seq, q_stride_token, V,
                  T: tl.constexpr, CERTAIN: tl.constexpr, BLOCK: tl.constexpr):
    # 1. Accept tokens until one is rejected.
    b = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + b)
    accepted, going = 0, True
    for i in range(T):
        x = tl.load(drafted + b * T + i)
        said = 1.0 if CERTAIN else tl.load(q + b * q_stride_seq + i * q_stride_token + x)
        wanted = tl.load(p + b * p_stride_seq + i * p_stride_token + x)
        going = going & (i < count) & (tl.load(uniform + b * (T + 1) + i) * said < wanted)
        accepted += tl.where(going, 1, 0)
    target = p + b * p_stride_seq + accepted * p_stride_token
    draft = q + b * q_stride_seq + accepted * q_stride_token
    rejected = accepted < count             # with none rejected there is no draft to take away
    wrong = tl.load(drafted + b * T + accepted, mask=rejected, other=-1)
    # 2. How much is left of the target's distribution, without the draft's share.
    total, whole = 0.0, 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        mass = tl.load(target + v, mask=v < V, other=0.0)
        taken = (v == wrong).to(tl.float32) if CERTAIN else tl.load(
            draft + v, mask=(v < V) & rejected, other=0.0)
        total += tl.sum(tl.maximum(mass - taken, 0.0), 0)
        whole += tl.sum(mass, 0)
    rejected = rejected & (total > 0)
    total, wrong = tl.where(rejected, total, whole), tl.where(rejected, wrong, -1)
    # 3. Draw from it, as `sample` does.
    point, before, last, token = tl.load(uniform + b * (T + 1) + T) * total, 0.0, -1, V
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        taken = (v == wrong).to(tl.float32) if CERTAIN else tl.load(
            draft + v, mask=(v < V) & rejected, other=0.0)
        weights = tl.maximum(tl.load(target + v, mask=v < V, other=0.0) - taken, 0.0)
        passed = before + tl.cumsum(weights, 0) > point
        token = tl.minimum(token, tl.min(tl.where(passed & (weights > 0), v, V), 0))
        last = tl.maximum(last, tl.max(tl.where(weights > 0, v, -1), 0))
        before += tl.sum(weights, 0)
    tl.store(accepted_out + b, accepted)
    tl.store(token_out + b, tl.minimum(token, last))


def verify(p: torch.Tensor, q: torch.Tensor | None, drafted: torch.Tensor, uniform: torch.Tensor,
           counts: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """p [B, T + 1, V] of the target, q [B, T, V] of the draft, probabilities in fp32; drafted
    [B, T] of int64, drawn from q; uniform [B, T + 1] of fp32 in [0, 1) -> how many are accepted
    [B], and the token that follows [B], of int32.

    Without q the draft was certain of each; with `counts` [B] of int64, sequence b drafted the
    first counts[b] only. Raises ValueError for other shapes.
    """
    check("drafted", drafted, (None, None), (torch.int64,))
    B, T = drafted.shape
    check("p", p, (B, T + 1, None), (torch.float32,), like=drafted)
    V = p.shape[2]
    if q is not None:
        check("q", q, (B, T, V), (torch.float32,), like=drafted)
    check("uniform", uniform, (B, T + 1), (torch.float32,), like=drafted)
    if counts is None:
        counts = torch.full((B,), T, device=p.device)
    check("counts", counts, (B,), (torch.int64,), like=drafted)
    accepted, token = p.new_empty(B, dtype=torch.int32), p.new_empty(B, dtype=torch.int32)
    verify_kernel[(B,)](
        p, p if q is None else q, drafted.contiguous(), counts, uniform.contiguous(), accepted,
        token, *p.stride()[:2], *((0, 0) if q is None else q.stride()[:2]), V, T=T,
        CERTAIN=q is None, BLOCK=1024, num_warps=4)
    return accepted, token


def verify_reference(p: torch.Tensor, q: torch.Tensor, drafted: torch.Tensor,
                     uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch, a sequence at a time, in fp64."""
    accepted, token = [], []
    for target, draft, ids, u in zip(p.double(), q.double(), drafted.tolist(), uniform.tolist(),
                                     strict=True):
        n = 0
        while n < len(ids) and u[n] * draft[n, ids[n]] < target[n, ids[n]]:
            n += 1
        weights = (target[n] - draft[n]).clamp(min=0) if n < len(ids) else target[n]
        weights = weights if weights.sum() > 0 else target[n]
        sums = weights.cumsum(0)
        accepted.append(n)
        token.append(int(torch.searchsorted(sums, u[-1] * sums[-1], right=True)))
    return torch.tensor(accepted, dtype=torch.int32), torch.tensor(token, dtype=torch.int32)
