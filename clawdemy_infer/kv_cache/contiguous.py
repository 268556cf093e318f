"""The plain KV cache: one block of memory, as long as the longest sequence may become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from clawdemy_infer.backends import kernel
from clawdemy_infer.kv_cache.decode_cpp import TYPES, decode_paged
from clawdemy_infer.kv_cache.rectangles import RectangularStep, Stretch
from clawdemy_infer.kv_cache.step import at_least_1


class ContiguousCache:
    """Keys and values of `batch` sequences, 0 to B-1: two preallocated [L, B, K, capacity, H] tensors.

    2 * L * B * K * capacity * H elements are allocated at once, so nothing is ever copied to make room, and the keys of
    one head lie one behind the other, as attention reads them. The price is paid for `capacity` tokens from the first
    one on. Raises ValueError where a size is below 1.
    """

    span = None
    backend = "torch"
    """Who computes decode attention. `for_model` takes the model's."""

    def __init__(self, layers: int, batch: int, kv_heads: int, head_dim: int, capacity: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        at_least_1(layers=layers, batch=batch, kv_heads=kv_heads, head_dim=head_dim, capacity=capacity)
        self.batch, self.capacity, self.dtype, self.device = batch, capacity, dtype, torch.device(device)
        self.lengths = dict.fromkeys(range(batch), 0)
        # Zeros, because a mask hides a stale number but not a NaN.
        self.keys = torch.zeros(layers, batch, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    @classmethod
    def for_model(cls, model, batch: int, capacity: int) -> ContiguousCache:
        """An empty cache in the shape, dtype and place of `model`, a `Decoder`."""
        shape = model.config.shape
        cache = cls(shape.L, batch, shape.K, shape.H, capacity, model.dtype, model.device)
        cache.backend = model.backend
        return cache

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is kept, each [L, B, K, capacity, any]."""
        return self.keys, self.values

    def keep(self, layer: int, stretches: Sequence[Stretch], k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k, v [B*T, K, H] behind the past of `layer`. There is one stretch for each of `tensors`: the part of it that belongs to
        these sequences in this step.
        """
        for stretch, x in zip(stretches, (k, v), strict=True):
            stretch.write(layer, x)

    def remember(self, layer: int, stretches: Sequence[Stretch], k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`keep` k and v; return all keys and values that may be seen, [B, K, S, H]."""
        self.keep(layer, stretches, k, v)
        keys, values = stretches
        return keys.read(layer), values.read(layer)

    def decode(self, layer: int, q: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, window: int | None) -> torch.Tensor:
        """Attention of one token for each of B sequences by a kernel, to which this cache is a pool of one block a sequence.

        q [B, N, H]; `table` [B, 1], which sequences, and `lengths` [B], how long they are, both of int32 -> [B, N*H].
        """
        decode = decode_paged if self.backend == "cpp" else kernel("decode_paged")
        return decode(q, self.keys[layer], self.values[layer], table, lengths, window).flatten(1)

    @property
    def by_kernel(self) -> bool:
        """Is there a kernel for `decode`?"""
        return self.backend == "triton" or self.backend == "cpp" and self.dtype in TYPES

    def can_append(self, new: Mapping[int, int]) -> bool:
        """Does each sequence stay within the capacity?"""
        return all(self.lengths[sequence] + count <= self.capacity for sequence, count in new.items())

    def begin(self, new: Mapping[int, Sequence[int]], window: int | None = None) -> RectangularStep:
        """Begin a step that brings these tokens; ValueError where they do not fit."""
        return RectangularStep(self, new, window)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence; of every sequence, where all grow in step. Set it to move all of them at once."""
        return max(self.lengths.values())

    @length.setter
    def length(self, length: int) -> None:
        self.lengths = dict.fromkeys(self.lengths, length)

    def truncate(self, length: int, sequence: int | None = None) -> None:
        """Forget all but the first `length` tokens, of all sequences or of one. No byte moves."""
        for each in self.that_have(length, sequence):
            self.lengths[each] = length

    def that_have(self, length: int, sequence: int | None) -> list[int]:
        """All sequences, or the one. ValueError where one has not got `length` tokens."""
        chosen = list(self.lengths) if sequence is None else [sequence]
        for each in chosen:
            if not 0 <= length <= self.lengths[each]:
                raise ValueError(f"length={length}: the cache holds {self.lengths[each]} tokens, so 0 to {self.lengths[each]}")
        return chosen

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)
