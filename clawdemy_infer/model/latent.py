"""Multi-head latent attention (MLA): a decoder that keeps one short vector a token, for all its heads.

DeepSeek-V2 (2024), section 2.1 and appendix C, whose names are W^DKV, W^UK, W^UV. What is kept of a token is

    c = norm(x W_dkv)  [latent]      and      r = rope(x W_kr)  [rope], one rotated key for all heads

and head n has the keys (c W_uk[n], r) and the values c W_uv[n]. Two ways to use them, equal because (q W_uk[n]ᵀ) c = q (c W_uk[n]):

    naive       make the keys and values of all S tokens again, and attend with N KV heads
    absorbed    multiply the few new queries by W_uk[n]ᵀ and attend to (c, r) itself: one KV head for all of them, which is key
                and value at once; W_uv[n] comes after the weighted sum, on T rows

The paper's queries come through a bottleneck of their own, which has nothing to do with the cache; here they do not.
`arithmetic/latent.py` counts both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from clawdemy_infer.attention import attend
from clawdemy_infer.kv_cache import ContiguousCache, Step
from clawdemy_infer.kv_cache.rectangles import Stretch
from clawdemy_infer.linear import Linear
from clawdemy_infer.model.config import RUNS, ModelConfig
from clawdemy_infer.model.decoder import Decoder, Layer, RMSNorm
from clawdemy_infer.model.rope import angular_frequencies, rotate


class LatentConfig(ModelConfig):
    """A `ModelConfig` whose shape has `mla`."""

    runs = RUNS | {"mla"}


class LatentCache(ContiguousCache):
    """(c, r) of every token: one [L, B, 1, capacity, latent + rope] tensor."""

    def __init__(self, layers: int, batch: int, width: int, capacity: int, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> None:
        super().__init__(layers, batch, 1, width, capacity, dtype, "meta")
        self.device = torch.device(device)
        self.latents = torch.zeros(self.keys.shape, dtype=dtype, device=device)
        del self.keys, self.values                          # there are none

    @classmethod
    def for_model(cls, model: LatentDecoder, batch: int, capacity: int) -> LatentCache:
        """An empty cache in the shape, dtype and place of `model`."""
        shape = model.config.shape
        return cls(shape.L, batch, shape.mla.latent + shape.mla.rope, capacity, model.dtype, model.device)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is kept."""
        return (self.latents,)

    def remember(self, layer: int, stretches: Sequence[Stretch], k: torch.Tensor, v: torch.Tensor | None = None) -> torch.Tensor:
        """Write k [B*T, 1, latent + rope] behind the past of `layer`; return all that may be seen, [B, 1, S, latent + rope]."""
        [latents] = stretches
        latents.write(layer, k)
        return latents.read(layer)


class LatentLayer(Layer):
    """A layer whose attention is MLA; all else is a `Layer`'s."""

    def __init__(self, config: LatentConfig, absorbed: bool) -> None:
        shape, mla = config.shape, config.shape.mla
        super().__init__(replace(shape, mla=None, K=1), config.norm_eps)
        self.absorbed, self.latent, self.rope, self.nope = absorbed, mla.latent, mla.rope, shape.H - mla.rope
        self.q = Linear(shape.D, shape.N * shape.H)
        self.kv_a = Linear(shape.D, mla.latent + mla.rope)
        self.latent_norm = RMSNorm(mla.latent, config.norm_eps)
        self.kv_b = Linear(mla.latent, shape.N * (self.nope + mla.value))
        self.out = Linear(shape.N * mla.value, shape.D)
        del self.qkv

    def attention(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], step: Step, index: int) -> torch.Tensor:
        """x [M, D] -> [M, D]. `step` is a `LatentCache`'s."""
        plain, turning = self.q(x).view(-1, self.N, self.H).split((self.nope, self.rope), dim=-1)
        c, r = self.kv_a(x)[:, None].split((self.latent, self.rope), dim=-1)                # [M, 1, latent], [M, 1, rope]
        turning, r = rotate(torch.cat((turning, r), dim=1), *rope).split((self.N, 1), dim=1)
        q, kept = torch.cat((plain, turning), dim=-1), torch.cat((self.latent_norm(c), r), dim=-1)
        look = self.absorbed_attention if self.absorbed else self.naive_attention
        out = [look(q[part.rows], step.cache.remember(index, part.stretches, kept[part.rows]), part.mask) for part in step.rectangles]
        return self.out(out[0] if len(out) == 1 else torch.cat(out))

    @property
    def up(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W_uk [N, nope, latent] and W_uv [N, value, latent]."""
        w = self.kv_b.weight.unflatten(0, (self.N, -1))
        return w[:, :self.nope], w[:, self.nope:]

    def naive_attention(self, q: torch.Tensor, kept: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """q [M, N, H], kept [B, 1, S, latent + rope] -> [M, N * value]. Keys and values of all S tokens are made and dropped again."""
        c, r = kept.split((self.latent, self.rope), dim=-1)
        keys, values = self.kv_b(c[:, 0]).unflatten(-1, (self.N, -1)).transpose(1, 2).split((self.nope, self.up[1].shape[1]), dim=-1)
        keys = torch.cat((keys, r.expand(-1, self.N, -1, -1)), dim=-1)                      # [B, N, S, H]
        return attend(q, keys, values, mask)

    def absorbed_attention(self, q: torch.Tensor, kept: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The same numbers. Nothing is made of the S tokens: they are one KV head of latent + rope numbers, key and value at once."""
        up_k, up_v = self.up
        plain, turning = q.split((self.nope, self.rope), dim=-1)
        plain = (plain.transpose(0, 1) @ up_k).transpose(0, 1)                              # [M, N, latent]
        q = torch.cat((plain, turning), dim=-1) * ((self.latent + self.rope) / self.H) ** 0.5       # `attend` divides by its own width
        out = attend(q, kept, kept, mask).view(len(q), self.N, -1)[..., :self.latent]       # the sum of the r is of no use
        return (out.transpose(0, 1) @ up_v.mT).transpose(0, 1).flatten(1)


class LatentDecoder(Decoder):
    """A `Decoder` of `LatentLayer`s. `absorbed` chooses the way. It runs on a `LatentCache`, and needs one."""

    def __init__(self, config: LatentConfig, absorbed: bool = True) -> None:
        if config.shape.mla is None or config.shape.mla.q_latent:
            raise ValueError(f"config: mla={config.shape.mla}; widths for a latent, and none for a latent of the queries, are accepted")
        super().__init__(replace(config, shape=replace(config.shape, mla=None, L=1)))
        self.config = config
        self.layers = nn.ModuleList(LatentLayer(config, absorbed) for _ in range(config.shape.L))
        self.frequencies = angular_frequencies(config.shape.mla.rope, config.rope_theta, config.rope_scaling)
