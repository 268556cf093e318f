"""The KV cache in 8 bits: each key and each value is 64 or 128 small integers and one scale.

Every token and head has a scale of its own, so that nothing has to be known about the tokens to come and a large key does not
spoil its neighbours (as in LMDeploy and vLLM, `kv_cache_dtype` per token and head). The numbers are symmetric about zero:

    scale = max|x| / 127        code = round(x / scale)        x ~ code * scale
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clawdemy_infer.backends import kernel
from clawdemy_infer.kv_cache.contiguous import ContiguousCache
from clawdemy_infer.kv_cache.rectangles import Stretch
from clawdemy_infer.kv_cache.step import at_least_1

SCALE = torch.float16
"""Of scales: 11 bits of precision, where the codes have 8."""


def to_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., H] and scales [..., 1] of the vectors x [..., H]."""
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).to(SCALE).clamp(min=2.0**-24)     # the smallest fp16: 0 / 0 is no code
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


class Int8Cache(ContiguousCache):
    """A `ContiguousCache` of H bytes and a 16-bit scale for each key and value: 2 * L * B * K * capacity * (H + 2) bytes.

    Attention sees what was kept: of the new tokens, too, only what 8 bits hold. It is PyTorch's, which reads no integers, so
    one layer at a time becomes `dtype` again, in memory. On a CPU that costs more time than the bytes save; a Triton kernel, where the
    model's backend is "triton", scales in registers.
    """

    def __init__(self, layers: int, batch: int, kv_heads: int, head_dim: int, capacity: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        at_least_1(layers=layers, batch=batch, kv_heads=kv_heads, head_dim=head_dim, capacity=capacity)
        self.batch, self.capacity, self.dtype, self.device = batch, capacity, dtype, torch.device(device)
        self.lengths = dict.fromkeys(range(batch), 0)
        tokens = (layers, batch, kv_heads, capacity)
        self.keys, self.values = (torch.zeros(*tokens, head_dim, dtype=torch.int8, device=device) for _ in range(2))
        self.key_scales, self.value_scales = (torch.zeros(*tokens, 1, dtype=SCALE, device=device) for _ in range(2))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is kept, each [L, B, K, capacity, H or 1]."""
        return self.keys, self.key_scales, self.values, self.value_scales

    def keep(self, layer: int, stretches: Sequence[Stretch], k: torch.Tensor, v: torch.Tensor) -> None:
        """Round k, v [B*T, K, H] and write them behind the past of `layer`."""
        for stretch, rounded in zip(stretches, (*to_int8(k), *to_int8(v)), strict=True):
            stretch.write(layer, rounded)

    def remember(self, layer: int, stretches: Sequence[Stretch], k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`keep` k and v; return all that may be seen, as `dtype` [B, K, S, H]."""
        self.keep(layer, stretches, k, v)
        keys, key_scales, values, value_scales = (stretch.read(layer) for stretch in stretches)
        # 1 byte read, and 4 written and read again twice: what a kernel that scales in registers spares
        return keys.to(self.dtype).mul_(key_scales), values.to(self.dtype).mul_(value_scales)

    @property
    def by_kernel(self) -> bool:
        return self.backend == "triton"

    def decode(self, layer: int, q: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, window: int | None) -> torch.Tensor:
        """As in a `ContiguousCache`, on the codes."""
        keys, key_scales, values, value_scales = (tensor[layer] for tensor in self.tensors)
        scales = key_scales.squeeze(-1), value_scales.squeeze(-1)                           # [B, K, capacity]
        return kernel("decode_int8")(q, keys, scales[0], values, scales[1], table, lengths, window=window).flatten(1)
