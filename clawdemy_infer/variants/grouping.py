"""The same model with fewer KV heads, or more: MHA, GQA and MQA out of one checkpoint.

Fewer: the key and value projections of the heads that become one are averaged (Ainslie et al. 2023,
GQA, section 2.1; the paper then trains on, for 5 % of the original steps). More: each KV head is
copied for some of its query heads: the same numbers, at the price of heads never grouped.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from clawdemy_infer.model.decoder import Decoder


def with_kv_heads(model: Decoder, kv_heads: int) -> Decoder:
    """`model` with `kv_heads` KV heads; all weights but those of Q, K and V are the model's own.
    Raises ValueError unless `kv_heads` divides the N query heads, and divides the K KV heads or is
    divided by them."""
    shape = model.config.shape
    N, K, H = shape.N, shape.K, shape.H
    if kv_heads < 1 or N % kv_heads or (K % kv_heads and kv_heads % K):
        fit = [str(n) for n in range(1, N + 1) if N % n == 0 and (K % n == 0 or n % K == 0)]
        raise ValueError(f"kv_heads={kv_heads}: of {N} query and {K} KV heads one can make "
                         f"{', '.join(fit)}")

    def regrouped(qkv: torch.Tensor) -> torch.Tensor:
        """[(N + 2K) * H, ...] -> [(N + 2 kv_heads) * H, ...], of the weight or the bias."""
        q, k, v = qkv.split((N * H, K * H, K * H))
        k, v = (x.unflatten(0, (K, H)) for x in (k, v))                         # [K, H, ...]
        if kv_heads <= K:
            k, v = (x.unflatten(0, (kv_heads, -1)).mean(1) for x in (k, v))     # neighbours to one
        else:  # query head n reads KV head n // (N / K): side by side, each finds its own copy
            k, v = (x.repeat_interleave(kv_heads // K, dim=0) for x in (k, v))
        return torch.cat((q, k.flatten(0, 1), v.flatten(0, 1)))

    with torch.device("meta"):                          # every weight is put in below
        grouped = Decoder(replace(model.config, shape=replace(shape, K=kv_heads)))
    grouped.load_state_dict({name: regrouped(weight) if ".qkv." in name else weight
                             for name, weight in model.state_dict().items()}, assign=True)
    grouped.tokenizer = model.tokenizer
    return grouped.eval().requires_grad_(False)
