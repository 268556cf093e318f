"""Multi-head latent attention (MLA): one short vector is kept of a token, for all heads.

DeepSeek-V2 (2024), section 2.1 and appendix C, whose names are W^DKV, W^UK, W^UV. Kept are

    c = norm(x W_dkv)  [latent]      and      r = rope(x W_kr)  [rope], one for all heads

and head n has the keys (c W_uk[n], r) and the values c W_uv[n]. Two ways to use them, equal because
(q W_uk[n]ᵀ) c = q (c W_uk[n]):

    naive       make the keys and values of all S tokens again, and attend with N KV heads
    absorbed    multiply the few new queries by W_uk[n]ᵀ and attend to (c, r) itself: one KV head
                for all of them, key and value at once; W_uv[n] comes after the weighted sum

The paper's queries come through a bottleneck of their own; here they do not.
"""

from __future__ import annotations

import torch
from torch import nn

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.attention import attend
from clawdemy_infer.kv_cache import Step
from clawdemy_infer.kv_cache.contiguous import RectanglePart, RectangularCache
from clawdemy_infer.model.config import RUNS, ModelConfig
from clawdemy_infer.model.decoder import Decoder, Layer, RMSNorm
from clawdemy_infer.model.rope import angular_frequencies, rotate


class LatentConfig(ModelConfig):
    """A `ModelConfig` whose shape has `mla`."""

    runs = RUNS | {"mla"}


class LatentCache(RectangularCache):
    """(c, r) of every token: one [L, B, 1, capacity, latent + rope] tensor."""

    def __init__(self, layers: int, batch: int, width: int, capacity: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        super().__init__(batch, capacity, dtype, device)
        self.latents = torch.zeros(layers, batch, 1, capacity, width, dtype=dtype, device=device)
        self.tensors = (self.latents,)

    @classmethod
    def for_model(cls, model: LatentDecoder, batch: int, capacity: int) -> LatentCache:
        """An empty cache in the shape, dtype and place of `model`."""
        shape = model.config.shape
        width = shape.mla.latent + shape.mla.rope
        return cls(shape.L, batch, width, capacity, model.dtype, model.device)

    def write(self, layer: int, part: RectanglePart, k: torch.Tensor,
              v: torch.Tensor | None = None) -> None:
        """Write k [B*T, 1, latent + rope]. There are no values."""
        part.put(self.latents[layer], k)

    def read(self, layer: int, part: RectanglePart) -> tuple[torch.Tensor, torch.Tensor]:
        """All that may be seen, [B, 1, S, latent + rope]: key and value at once."""
        return (part.seen(self.latents[layer]),) * 2


class LatentLayer(Layer):
    """A layer whose attention is MLA, over a `LatentCache`; all else is a `Layer`'s."""

    def __init__(self, config: LatentConfig, absorbed: bool) -> None:
        super().__init__(config.shape, config.norm_eps)
        self.absorbed = absorbed

    def add_attention(self, shape: ModelShape, eps: float) -> None:
        D, N, H, mla = shape.D, shape.N, shape.H, shape.mla
        self.latent, self.rope, self.nope = mla.latent, mla.rope, H - mla.rope
        self.q = nn.Linear(D, N * H, bias=False)
        self.kv_a = nn.Linear(D, mla.latent + mla.rope, bias=False)
        self.latent_norm = RMSNorm(mla.latent, eps)
        self.kv_b = nn.Linear(mla.latent, N * (self.nope + mla.value), bias=False)
        self.out = nn.Linear(N * mla.value, D, bias=False)

    def attention(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], step: Step,
                  index: int) -> torch.Tensor:
        # 1. What is kept, [M, 1, latent + rope], and the queries, [M, N, H].
        plain, turning = self.q(x).view(-1, self.N, self.H).split((self.nope, self.rope), dim=-1)
        c, r = self.kv_a(x)[:, None].split((self.latent, self.rope), dim=-1)
        turning, r = rotate(torch.cat((turning, r), dim=1), *rope).split((self.N, 1), dim=1)
        q, kept = torch.cat((plain, turning), dim=-1), torch.cat((self.latent_norm(c), r), dim=-1)

        # 2. Attention, one of the two ways.
        way, out = self.absorbed_attention if self.absorbed else self.naive_attention, []
        for part in step.parts:
            mine = part.rectangle.rows
            step.cache.write(index, part, kept[mine])
            out.append(way(q[mine], step.cache.read(index, part)[0], part.mask))
        return self.out(torch.cat(out))

    def naive_attention(self, q: torch.Tensor, kept: torch.Tensor,
                        mask: torch.Tensor | None) -> torch.Tensor:
        """q [M, N, H], kept [B, 1, S, latent + rope] -> [M, N * value]."""
        c, r = kept.split((self.latent, self.rope), dim=-1)
        both = self.kv_b(c[:, 0]).unflatten(-1, (self.N, -1)).transpose(1, 2)
        keys, values = both[..., :self.nope], both[..., self.nope:]             # [B, N, S, each]
        keys = torch.cat((keys, r.expand(-1, self.N, -1, -1)), dim=-1)          # [B, N, S, H]
        return attend(q, keys, values, mask)

    def absorbed_attention(self, q: torch.Tensor, kept: torch.Tensor,
                           mask: torch.Tensor | None) -> torch.Tensor:
        """The same numbers. Nothing is made of the S tokens: they are one KV head."""
        up = self.kv_b.weight.unflatten(0, (self.N, -1))
        up_k, up_v = up[:, :self.nope], up[:, self.nope:]       # [N, nope or value, latent]
        plain, turning = q.split((self.nope, self.rope), dim=-1)
        plain = (plain.transpose(0, 1) @ up_k).transpose(0, 1)                  # [M, N, latent]
        # `attend` divides by its own width.
        q = torch.cat((plain, turning), dim=-1) * ((self.latent + self.rope) / self.H) ** 0.5
        out = attend(q, kept, kept, mask).view(len(q), self.N, -1)
        out = out[..., :self.latent]                            # the sum of the r is of no use
        return (out.transpose(0, 1) @ up_v.mT).transpose(0, 1).flatten(1)


class LatentDecoder(Decoder):
    """A `Decoder` of `LatentLayer`s, over a `LatentCache`. `absorbed` chooses the way."""

    def __init__(self, config: LatentConfig, absorbed: bool = True) -> None:
        mla = config.shape.mla
        if mla is None or mla.q_latent:
            raise ValueError(f"config: mla={mla}; widths for a latent, and none for a latent of "
                             "the queries, are accepted")
        super().__init__(config, lambda index: LatentLayer(config, absorbed))
        self.frequencies = angular_frequencies(mla.rope, config.rope_theta, config.rope_scaling)
