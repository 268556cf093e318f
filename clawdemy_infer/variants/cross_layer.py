"""Cross-layer attention: some layers have no keys and values, and look at those of the layer below.

Brandon et al. 2024, "Reducing Transformer Key-Value Cache Size with Cross-Layer Attention", section
2. Which layers share is the shape's `pattern`: with ("global", "global shared"), CLA2, half as many
keys and values are kept. They are *read* as often as before: each layer still looks at all of them.
"""

from __future__ import annotations

import torch
from torch import nn

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.attention import attend
from clawdemy_infer.kv_cache import ContiguousCache, Step
from clawdemy_infer.model.config import RUNS, ModelConfig
from clawdemy_infer.model.decoder import Decoder, Layer
from clawdemy_infer.model.rope import rotate


class CrossLayerConfig(ModelConfig):
    """A `ModelConfig` whose shape has a `pattern`."""

    runs = RUNS | {"pattern"}


class OwnLayer(Layer):
    """A `Layer` that keeps its keys and values as layer `place` of the cache, which has fewer."""

    def __init__(self, shape: ModelShape, eps: float, place: int) -> None:
        super().__init__(shape, eps)
        self.place = place

    def attention(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], step: Step,
                  index: int) -> torch.Tensor:
        return super().attention(x, rope, step, self.place)


class SharingLayer(OwnLayer):
    """A layer with queries alone, for what the owner has just written to layer `place`."""

    def add_attention(self, shape: ModelShape, eps: float) -> None:
        self.q = nn.Linear(shape.D, shape.N * shape.H, bias=False)
        self.out = nn.Linear(shape.N * shape.H, shape.D, bias=False)

    def attention(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], step: Step,
                  index: int) -> torch.Tensor:
        q = rotate(self.q(x).view(-1, self.N, self.H), *rope)
        return self.out(torch.cat([
            attend(q[part.rectangle.rows], *step.cache.read(self.place, part), part.mask)
            for part in step.parts]))


class CrossLayerDecoder(Decoder):
    """A `Decoder` of `OwnLayer`s and `SharingLayer`s, over the caches of `new_cache`. Raises
    ValueError where the first layer shares, or the pattern has other than global layers."""

    def __init__(self, config: CrossLayerConfig) -> None:
        kinds = config.shape.kinds
        if kinds[0] != "global" or set(kinds) - {"global", "global shared"}:
            raise ValueError(f"pattern={config.shape.pattern}: of global and global shared layers, "
                             "the first global, is accepted")

        def make_layer(index: int) -> Layer:
            kind = OwnLayer if kinds[index] == "global" else SharingLayer
            return kind(config.shape, config.norm_eps, kinds[:index + 1].count("global") - 1)

        super().__init__(config, make_layer)

    def new_cache(self, batch: int, capacity: int) -> ContiguousCache:
        """An empty cache with keys and values of those layers only that own some."""
        shape = self.config.shape
        return ContiguousCache(shape.kinds.count("global"), batch, shape.K, shape.H, capacity,
                               self.dtype, self.device)
