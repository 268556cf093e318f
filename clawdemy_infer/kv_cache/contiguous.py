"""The plain KV cache: one block of memory, as long as the longest sequence may become."""

from __future__ import annotations

import torch


class ContiguousCache:
    """Keys and values of `batch` sequences that grow in step, each a preallocated [L, B, K, capacity, H] tensor.

    2 * L * B * K * capacity * H elements are allocated at once, so nothing is ever copied to make room, and the keys of
    one head lie one behind the other, as attention reads them. The price is paid for `capacity` tokens from the first
    one on. Raises ValueError where a size is below 1.
    """

    def __init__(self, layers: int, batch: int, kv_heads: int, head_dim: int, capacity: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        sizes = {"layers": layers, "batch": batch, "kv_heads": kv_heads, "head_dim": head_dim, "capacity": capacity}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size}: a cache needs at least 1")
        self.batch, self.capacity, self.length = batch, capacity, 0
        self.keys = torch.empty(layers, batch, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self._layers = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))     # views, taken once and not each step

    @classmethod
    def for_model(cls, model, batch: int, capacity: int) -> ContiguousCache:
        """An empty cache in the shape, dtype and place of `model`, a `Decoder`."""
        shape = model.config.shape
        return cls(shape.L, batch, shape.K, shape.H, capacity, model.dtype, model.device)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v [B, K, T, H] behind the past; return views of all of it, [B, K, length + T, H].

        Raises ValueError, and writes nothing, where T more tokens exceed the capacity.
        """
        new = self.length + k.shape[2]
        if new > self.capacity:
            raise ValueError(f"k brings {k.shape[2]} tokens on top of {self.length}: the cache holds {self.capacity}")
        keys, values = (of_layer[:, :, :new] for of_layer in self._layers[layer])
        keys[:, :, self.length:] = k
        values[:, :, self.length:] = v
        return keys, values

    def advance(self, new: int) -> None:
        """Count `new` tokens as part of the past."""
        self.length += new

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens. No byte moves."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length}: the cache holds {self.length} tokens, so 0 to {self.length}")
        self.length = length

    @property
    def allocated_bytes(self) -> int:
        """Bytes of both tensors."""
        return self.keys.nbytes + self.values.nbytes
