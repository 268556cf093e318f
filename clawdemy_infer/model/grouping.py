"""The same model with fewer KV heads, or more: MHA, GQA and MQA out of one checkpoint.

Fewer: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", section 2.1:
the key and value projections of the heads that become one are averaged. That is where training goes on from, not the end: the
paper trains for another 5 % of the original steps before the model is good again.

More: each KV head is copied for some of its query heads. It computes the same numbers, and pays for them as a model would whose
heads were never grouped.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from clawdemy_infer.model.decoder import Decoder


def with_kv_heads(model: Decoder, kv_heads: int) -> Decoder:
    """`model` with `kv_heads` KV heads: averages of its own where they are fewer, copies where they are more.

    All weights but those of Q, K and V are the model's own, not copied. Raises ValueError unless `kv_heads` divides the N query
    heads, and divides the K KV heads or is divided by them.
    """
    shape = model.config.shape
    N, K, H = shape.N, shape.K, shape.H
    if kv_heads < 1 or N % kv_heads or (K % kv_heads and kv_heads % K):
        fit = [n for n in range(1, N + 1) if N % n == 0 and (K % n == 0 or n % K == 0)]
        raise ValueError(f"kv_heads={kv_heads}: of {N} query and {K} KV heads one can make {', '.join(map(str, fit))}")

    def regrouped(qkv: torch.Tensor) -> torch.Tensor:
        """[(N + 2K) * H, ...] -> [(N + 2 kv_heads) * H, ...]: rows of the weight, or numbers of the bias."""
        q, k, v = qkv.split((N * H, K * H, K * H))
        k, v = (x.unflatten(0, (K, H)) for x in (k, v))                                     # [K, H, ...]
        if kv_heads <= K:
            k, v = (x.unflatten(0, (kv_heads, -1)).mean(1) for x in (k, v))                 # neighbours become one
        else:
            # Query head n reads KV head n // (N / K): copies lie side by side, so that it finds its own.
            k, v = (x.repeat_interleave(kv_heads // K, dim=0) for x in (k, v))
        return torch.cat((q, k.flatten(0, 1), v.flatten(0, 1)))

    with torch.device("meta"):                          # every weight is put in below
        grouped = Decoder(replace(model.config, shape=replace(shape, K=kv_heads)))
    weights = {name: regrouped(weight) if ".qkv." in name else weight for name, weight in model.state_dict().items()}
    grouped.load_state_dict(weights, assign=True)
    grouped.tokenizer = model.tokenizer
    return grouped.eval().requires_grad_(False)
