"""Cross-layer attention: some layers project no keys and values, and look at those of the layer below.

Brandon et al. 2024, "Reducing Transformer Key-Value Cache Size with Cross-Layer Attention", section 2. With every other layer
sharing (CLA2) half as many keys and values are kept. They are *read* as often as before: each layer still looks at all of them.
Which layers share is the shape's `pattern`: ("global", "global shared") is CLA2.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from clawdemy_infer.attention import attend
from clawdemy_infer.kv_cache import ContiguousCache, Step
from clawdemy_infer.linear import Linear
from clawdemy_infer.model.config import RUNS, ModelConfig
from clawdemy_infer.model.decoder import Decoder, Layer
from clawdemy_infer.model.rope import rotate


class CrossLayerConfig(ModelConfig):
    """A `ModelConfig` whose shape has a `pattern` of global layers that own keys and values, or share."""

    runs = RUNS | {"pattern"}


class OwnLayer(Layer):
    """A `Layer` that keeps its keys and values as number `place` of the cache, which has fewer layers than the model."""

    def __init__(self, config: CrossLayerConfig, place: int) -> None:
        super().__init__(config.shape, config.norm_eps)
        self.place = place

    def attention(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], step: Step, index: int) -> torch.Tensor:
        return super().attention(x, rope, step, self.place)


class SharingLayer(OwnLayer):
    """A layer with queries alone. It looks at number `place` of the cache, to which the layer that owns it has just written."""

    def __init__(self, config: CrossLayerConfig, place: int) -> None:
        super().__init__(config, place)
        self.q = Linear(config.shape.D, self.N * self.H)
        del self.qkv

    def attention(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], step: Step, index: int) -> torch.Tensor:
        q = rotate(self.q(x).view(-1, self.N, self.H), *rope)
        out = []
        for part in step.rectangles:
            keys, values = (stretch.read(self.place) for stretch in part.stretches)
            out.append(attend(q[part.rows], keys, values, part.mask))
        return self.out(out[0] if len(out) == 1 else torch.cat(out))


class CrossLayerDecoder(Decoder):
    """A `Decoder` in which the layers that the shape's pattern calls "global shared" are `SharingLayer`s.

    Raises ValueError where the first layer shares, or the pattern has anything but attention to everything.
    """

    def __init__(self, config: CrossLayerConfig) -> None:
        kinds = config.shape.kinds
        if kinds[0] != "global" or set(kinds) - {"global", "global shared"}:
            raise ValueError(f"pattern={config.shape.pattern}: of global and global shared layers, the first global, is accepted")
        super().__init__(replace(config, shape=replace(config.shape, pattern=(), L=1)))
        self.config = config
        self.layers, place = nn.ModuleList(), -1
        for kind in kinds:
            place += kind == "global"
            self.layers.append((OwnLayer if kind == "global" else SharingLayer)(config, place))

    def new_cache(self, batch: int, capacity: int) -> ContiguousCache:
        """An empty cache with keys and values of those layers only that own some."""
        shape = self.config.shape
        return ContiguousCache(shape.kinds.count("global"), batch, shape.K, shape.H, capacity, self.dtype, self.device)
