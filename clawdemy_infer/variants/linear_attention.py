"""Linear attention: without the softmax, attention is a sum, and one matrix a head keeps it:

    out_t = sum over s <= t of (q_t · k_s) γ^(t-s) v_s  =  q_t S_t,      S_t = γ S_(t-1) + k_t v_tᵀ

The state S is [H, H] a head instead of 2·S·H numbers of cache. γ = 1 keeps everything
(Katharopoulos et al. 2020, equations 18 to 20), γ < 1 fades the past (Sun et al. 2023, RetNet,
equations 5 and 6). Two ways to run it give the same numbers:

    step       token by token: each reads all of the state, and writes all of it back
    prefill    chunk by chunk: products among the tokens of a chunk, and the state once a chunk
               (RetNet, equation 7)

Tensors are [B, N, T, H]: every query head has a state of its own.
"""

from __future__ import annotations

import torch


def empty_state(batch: int, heads: int, key_dim: int, value_dim: int,
                dtype: torch.dtype = torch.float32,
                device: torch.device | str = "cpu") -> torch.Tensor:
    """The state before the first token, [B, N, H, value_dim], which the others change in place."""
    return torch.zeros(batch, heads, key_dim, value_dim, dtype=dtype, device=device)


def step(state: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
         decay: torch.Tensor) -> torch.Tensor:
    """One token: q, k, v [B, N, 1, H] and decay γ [N] -> [B, N, 1, H]."""
    state.mul_(decay[:, None, None]).addcmul_(k.transpose(2, 3), v)             # S = γ S + k vᵀ
    return q @ state


def prefill(state: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
            decay: torch.Tensor, chunk: int = 64) -> torch.Tensor:
    """T tokens: q, k, v [B, N, T, H] and decay γ [N] -> [B, N, T, H], after whatever `state` holds.

    FLOPs for each token and head: about 4·H² for the state and 4·H·chunk/2 within the chunk, linear
    in T. Raises ValueError for a chunk below 1, or a decay that is not above 0 and at most 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: at least 1 is accepted")
    if not (0 < decay.min() and decay.max() <= 1):
        raise ValueError(f"decay={decay.tolist()}: each above 0 and at most 1 is accepted")
    log_decay = decay.log()[:, None, None]
    outputs = []
    for q_c, k_c, v_c in zip(*(x.split(chunk, dim=2) for x in (q, k, v)), strict=True):
        t = torch.arange(1, q_c.shape[2] + 1, device=q.device, dtype=q.dtype)
        distance = t[:, None] - t                               # [T, T], below 0 for the future
        fading = (log_decay * distance).exp().masked_fill(distance < 0, 0.0)    # γ^(t-s)
        within = (q_c @ k_c.transpose(2, 3) * fading) @ v_c
        before = (log_decay * t[:, None]).exp() * (q_c @ state)
        outputs.append(within + before)
        to_the_end = (log_decay * (t[-1] - t)[:, None]).exp()                   # γ^(T-s)
        state.mul_((log_decay * t[-1]).exp()).add_((k_c * to_the_end).transpose(2, 3) @ v_c)
    return torch.cat(outputs, dim=2)
