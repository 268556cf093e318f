"""Speculative verification: keep or reject a draft's tokens, and draw the one that follows them (Leviathan et al. 2023, algorithm 1).

For each drafted token x_i with target probability p_i(x_i) and draft probability q_i(x_i), and uniform numbers u:

    keep x_i while u_i <= p_i(x_i) / q_i(x_i)        that is, while u_i * q_i(x_i) <= p_i(x_i)
    after n kept: draw from norm(max(0, p_n - q_n)) if one was rejected, else from p_n, the token that comes for free

One program for each sequence. To keep or reject touches 2 numbers a token; only the last draw walks over the vocabulary, twice, and
only at the position where the run ended: (1 to 2) * 2 * V * e bytes, however long the draft was.
"""

from __future__ import annotations

import torch

from clawdemy_kernels.launch import check, tl, triton


@triton.jit
def verify_kernel(p, q, drafted, uniform, kept_out, token_out, p_b, p_t, q_b, q_t, V, T: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(0)
    kept, going = 0, True
    for i in range(T):
        x = tl.load(drafted + b * T + i)
        sure = tl.load(uniform + b * (T + 1) + i) * tl.load(q + b * q_b + i * q_t + x) <= tl.load(p + b * p_b + i * p_t + x)
        going = going & sure
        kept += tl.where(going, 1, 0)
    target = p + b * p_b + kept * p_t
    draft = q + b * q_b + kept * q_t
    rejected = kept < T                                                     # with none rejected there is no draft to take away

    total = 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        taken = tl.load(draft + v, mask=(v < V) & rejected, other=0.0)
        total += tl.sum(tl.maximum(tl.load(target + v, mask=v < V, other=0.0) - taken, 0.0), 0)
    point, before, last, token = tl.load(uniform + b * (T + 1) + T) * total, 0.0, -1, V
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        taken = tl.load(draft + v, mask=(v < V) & rejected, other=0.0)
        weights = tl.maximum(tl.load(target + v, mask=v < V, other=0.0) - taken, 0.0)
        passed = before + tl.cumsum(weights, 0) > point
        token = tl.minimum(token, tl.min(tl.where(passed & (weights > 0), v, V), 0))
        last = tl.maximum(last, tl.max(tl.where(weights > 0, v, -1), 0))
        before += tl.sum(weights, 0)
    tl.store(kept_out + b, kept)
    tl.store(token_out + b, tl.minimum(token, last))


def verify(p: torch.Tensor, q: torch.Tensor, drafted: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """p [B, T + 1, V] of the target, q [B, T, V] of the draft, probabilities in fp32; drafted [B, T] of int64, drawn from q; uniform
    [B, T + 1] of fp32 in [0, 1) -> how many are kept [B], and the token that follows [B], of int32. Raises ValueError for other shapes.
    """
    check("q", q, (None, None, None), (torch.float32,))
    B, T, V = q.shape
    check("p", p, (B, T + 1, V), (torch.float32,), like=q)
    check("drafted", drafted, (B, T), (torch.int64,), like=q)
    check("uniform", uniform, (B, T + 1), (torch.float32,), like=q)
    kept, token = q.new_empty(B, dtype=torch.int32), q.new_empty(B, dtype=torch.int32)
    verify_kernel[(B,)](p, q, drafted.contiguous(), uniform.contiguous(), kept, token, *p.stride()[:2], *q.stride()[:2], V,
                        T=T, BLOCK=1024, num_warps=4)
    return kept, token


def verify_reference(p: torch.Tensor, q: torch.Tensor, drafted: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch, a sequence at a time, in fp64."""
    kept, token = [], []
    for target, draft, ids, u in zip(p.double(), q.double(), drafted.tolist(), uniform.tolist(), strict=True):
        n = 0
        while n < len(ids) and u[n] * draft[n, ids[n]] <= target[n, ids[n]]:
            n += 1
        weights = (target[n] - draft[n]).clamp(min=0) if n < len(ids) else target[n]
        sums = weights.cumsum(0)
        kept.append(n)
        token.append(int(torch.searchsorted(sums, u[-1] * sums[-1], right=True)))
    return torch.tensor(kept, dtype=torch.int32), torch.tensor(token, dtype=torch.int32)
