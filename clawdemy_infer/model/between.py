"""A step of any number of rows: the products packed, and compiled code for all that stands between them.

Where many rows share a read of the weights, a product is a matter for a matrix kernel, and what is left of a layer is small: some forty
operations that each go through memory, and cost a few microseconds to start. PyTorch's compiler makes three loop nests of them, for any
number of rows, which serve all layers:

    normed      residual, norm                  before QKV and before gate and up
    turned      norms of Q and K, RoPE          between QKV and attention
    gated       silu(gate) * up                 between gate and up and down

Attention looks at whatever the cache keeps, and over pages is C++ (`kv_cache.decode_cpp`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from clawdemy_infer.kv_cache import Step
from clawdemy_infer.model.decoder import Decoder, wanted_rows
from clawdemy_infer.model.loops import norm, translated
from clawdemy_infer.model.rope import rope_tables, rotate
from clawdemy_infer.timing import now


class BetweenProducts:
    """A step of `model`, whose own products it calls. The residual stream and all sums are in fp32."""

    @torch.inference_mode()
    def __init__(self, model: Decoder) -> None:
        start = now()
        shape, eps, dtype = model.config.shape, model.config.norm_eps, model.dtype
        D, N, K, H = shape.D, shape.N, shape.K, shape.H

        def normed(x, y, gamma):
            x = x + y.float()
            return x, norm(x, gamma, eps).to(dtype)

        def turned(heads, rope, gammas):
            q, k, v = heads.float().view(-1, N + 2 * K, H).split((N, K, K), dim=1)
            if gammas:
                q, k = norm(q, gammas[0], eps), norm(k, gammas[1], eps)
            return rotate(q, *rope).to(dtype), rotate(k, *rope).to(dtype), v.to(dtype).contiguous()

        def gated(gate_up):
            gate, up = gate_up.float().chunk(2, -1)
            return (F.silu(gate) * up).to(dtype)

        self.model, layers = model, model.layers
        self.gammas = [part.weight.float() for layer in layers for part in (layer.attention_norm, layer.mlp_norm)]
        self.gammas.append(model.norm.weight.float())
        self.head_gammas = [(layer.q_norm.weight.float(), layer.k_norm.weight.float()) if layer.q_norm else () for layer in layers]
        x, rope = torch.zeros(8, D), rope_tables(model.frequencies, torch.zeros(8), torch.float32)
        self.normed = translated(normed, x, torch.zeros(8, D, dtype=dtype), self.gammas[0], rows=True)
        self.turned = translated(turned, torch.zeros(8, (N + 2 * K) * H, dtype=dtype), rope, self.head_gammas[0], rows=True)
        self.gated = translated(gated, torch.zeros(8, 2 * shape.F, dtype=dtype), rows=True)
        self.calls = 1 + 4 * shape.L                                    # of this code in a step: no operations, but each must be started
        self.compile_s = now() - start

    def __call__(self, tokens: torch.Tensor, step: Step, last_only: bool | Sequence[int] = True) -> tuple[torch.Tensor, torch.Tensor]:
        """For tokens [M], M at least 2, what the last layer leaves, [M, D], and the logits that are wanted of it."""
        model, gammas = self.model, iter(self.gammas)
        rope = rope_tables(model.frequencies, step.positions, torch.float32)
        embedded = model.embed(tokens)
        x, y = self.normed(embedded.float(), torch.zeros_like(embedded), next(gammas))
        for index, layer in enumerate(model.layers):
            seen = step.attend(index, *self.turned(layer.qkv(y), rope, self.head_gammas[index]))
            x, y = self.normed(x, layer.out(seen), next(gammas))
            x, y = self.normed(x, layer.down(self.gated(layer.gate_up(y))), next(gammas))
        return x, model.logits(wanted_rows(y, step, last_only))
