"""The KV cache in 8 bits: each key and each value is H small integers and one scale.

A large key does not spoil its neighbours, and nothing has to be known about the tokens to come (as
in LMDeploy and vLLM, `kv_cache_dtype` per token and head).
"""

from __future__ import annotations

import torch

from clawdemy_infer.arithmetic.work import at_least_1
from clawdemy_infer.fast.backends import kernel
from clawdemy_infer.fast.codes import to_int8
from clawdemy_infer.kv_cache.contiguous import RectanglePart
from clawdemy_infer.variants.parts import KernelCache


class Int8Cache(KernelCache):
    """A cache of H bytes and a 16-bit scale for each key and value: 2 * L * B * K * capacity *
    (H + 2) bytes.

    Attention sees of the new tokens, too, only what 8 bits hold. PyTorch's reads no integers, so
    one layer at a time becomes `dtype` again, in memory, which on a CPU costs more time than the
    bytes save; a Triton kernel scales in registers. ValueError where a size is below 1.
    """

    def __init__(self, layers: int, batch: int, kv_heads: int, head_dim: int, capacity: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        at_least_1(layers=layers, kv_heads=kv_heads, head_dim=head_dim)
        super().__init__(batch, capacity, dtype, device)
        codes = torch.zeros(layers, batch, kv_heads, capacity, head_dim, dtype=torch.int8,
                            device=device)
        scales = torch.zeros(codes.shape[:-1], dtype=torch.float16, device=device)[..., None]
        self.keys, self.key_scales = codes, scales
        self.values, self.value_scales = codes.clone(), scales.clone()
        self.tensors = self.keys, self.key_scales, self.values, self.value_scales
        self.numbers = (None,)

    def write(self, layer: int, part: RectanglePart, k: torch.Tensor, v: torch.Tensor) -> None:
        for tensor, rounded in zip(self.tensors, (*to_int8(k), *to_int8(v)), strict=True):
            part.put(tensor[layer], rounded)

    def read(self, layer: int, part: RectanglePart) -> tuple[torch.Tensor, torch.Tensor]:
        keys, key_scales, values, value_scales = (part.seen(tensor[layer])
                                                  for tensor in self.tensors)
        # 1 byte read, and 4 written and read again twice
        return keys.to(self.dtype).mul_(key_scales), values.to(self.dtype).mul_(value_scales)

    def attend(self, layer: int, part: RectanglePart, q: torch.Tensor, k: torch.Tensor,
               v: torch.Tensor) -> torch.Tensor:
        rectangle = part.rectangle
        if self.backend != "triton" or rectangle.T > 1:
            return super().attend(layer, part, q, k, v)
        self.write(layer, part, k, v)
        if self.numbers[0] is not part:     # once a step: to the kernel, each sequence is one block
            table = [[each] for each in range(rectangle.first, rectangle.sequences.stop)]
            lengths = [past + 1 for past in rectangle.past]
            self.numbers = part, *(torch.tensor(x, dtype=torch.int32, device=self.device)
                                   for x in (table, lengths))
        keys, key_scales, values, value_scales = (tensor[layer] for tensor in self.tensors)
        return kernel("decode_int8")(q, keys, key_scales.squeeze(-1), values,
                                     value_scales.squeeze(-1), *self.numbers[1:],
                                     window=part.window).flatten(1)
