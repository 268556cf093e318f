"""The plain KV cache: one block of memory, as long as the longest sequence may become.

A step cuts the batch into rectangles: neighbouring sequences that bring equally many tokens are
computed together. A batch that decodes in step is a single rectangle. So is one whose sequences
have different lengths, under a mask of what is not theirs: it reads as far as the longest."""

from collections.abc import Mapping
from functools import cached_property

import torch

from clawdemy_infer.arithmetic.work import at_least_1
from clawdemy_infer.attention import attend, causal_mask, visible_keys
from clawdemy_infer.kv_cache.step import Rectangle, Step, Tokens, rectangles


class RectangularCache:
    """A cache of sequences 0 ... B-1 with room for `capacity` tokens each. A kind of it has

    tensors [L, B, K, capacity, X]    what it keeps
    write(layer, part, k, v)          keep k, v [B*T, K, H] behind the past of these sequences
    read(layer, part)                 all keys and values [B, K, S, H] that may be seen, also new
    """

    span = None
    tensors: tuple[torch.Tensor, ...] = ()

    def __init__(self, batch: int, capacity: int, dtype: torch.dtype,
                 device: torch.device | str) -> None:
        at_least_1(batch=batch, capacity=capacity)
        self.batch, self.capacity = batch, capacity
        self.dtype, self.device = dtype, torch.device(device)
        self.lengths = dict.fromkeys(range(batch), 0)

    def attend(self, layer: int, part: "RectanglePart", q: torch.Tensor, k: torch.Tensor,
               v: torch.Tensor) -> torch.Tensor:
        """`Step.attend` for one rectangle: q [B*T, N, H], k and v [B*T, K, H] -> [B*T, N*H]."""
        self.write(layer, part, k, v)
        return attend(q, *self.read(layer, part), part.mask)

    def can_append(self, num_new_tokens: Mapping[int, int]) -> bool:
        """Does each sequence stay within the capacity?"""
        return all(self.lengths[each] + T <= self.capacity for each, T in num_new_tokens.items())

    def begin(self, new: Tokens, window: int | None = None) -> "RectangularStep":
        """Begin a step; ValueError where the tokens do not fit."""
        return RectangularStep(self, new, window)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence. Set it to move all at once."""
        return max(self.lengths.values())

    @length.setter
    def length(self, length: int) -> None:
        self.lengths = dict.fromkeys(self.lengths, length)

    def truncate(self, length: int, sequence: int | None = None) -> None:
        """Forget all but the first `length` tokens, of all sequences or of one."""
        for each in self.that_have(length, sequence):
            self.lengths[each] = length

    def that_have(self, length: int, sequence: int | None) -> list[int]:
        """All sequences, or the one. ValueError where one has not got `length` tokens."""
        chosen = list(self.lengths) if sequence is None else [sequence]
        shortest = min(self.lengths[each] for each in chosen)
        if not 0 <= length <= shortest:
            raise ValueError(f"length={length}: the cache holds {shortest} tokens; as many at most")
        return chosen

    @property
    def allocated_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class ContiguousCache(RectangularCache):
    """Keys and values of `batch` sequences: two [L, B, K, capacity, H] tensors, allocated at once,
    so that nothing is ever copied to make room. The keys of one head lie one behind the other, as
    attention reads them. Raises ValueError where a size is below 1."""

    def __init__(self, layers: int, batch: int, kv_heads: int, head_dim: int, capacity: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        at_least_1(layers=layers, kv_heads=kv_heads, head_dim=head_dim)
        super().__init__(batch, capacity, dtype, device)
        self.keys = torch.zeros(layers, batch, kv_heads, capacity, head_dim, dtype=dtype,
                                device=device)
        self.values = torch.zeros_like(self.keys)
        self.tensors = self.keys, self.values

    @classmethod
    def for_model(cls, model, batch: int, capacity: int) -> "ContiguousCache":
        """An empty cache in the shape, dtype and place of `model`, a `Decoder`."""
        shape = model.config.shape
        return cls(shape.L, batch, shape.K, shape.H, capacity, model.dtype, model.device)

    def write(self, layer, part, k, v) -> None:
        part.put(self.keys[layer], k)
        part.put(self.values[layer], v)

    def read(self, layer, part) -> tuple[torch.Tensor, torch.Tensor]:
        return part.seen(self.keys[layer]), part.seen(self.values[layer])


class RectanglePart:
    """A rectangle of a step over a `RectangularCache`: where its new keys and values go, which it
    may see, and the mask over these."""

    def __init__(self, rectangle: Rectangle, cache: RectangularCache, window: int | None) -> None:
        past, T, device = rectangle.past, rectangle.T, cache.device
        self.rectangle, self.window, self.end = rectangle, window, max(past) + T
        self.alike = len(set(past)) == 1                    # the sequences are equally long
        self.begin = self.end - visible_keys(T, self.end, window) if self.alike else 0
        self.mask = causal_mask([each - self.begin for each in past], T, window, cache.dtype,
                                device)
        if not self.alike:
            b = torch.arange(len(past), device=device)[:, None]
            places = torch.tensor(past, device=device)[:, None] + torch.arange(T, device=device)
            self.index = b, slice(None), places             # [B, 1] and [B, T]

    def put(self, tensor: torch.Tensor, x: torch.Tensor) -> None:
        """Write x [B*T, K, X] to the tensor [all sequences, K, capacity, X] of a layer."""
        mine, (past, T) = tensor[self.rectangle.sequences], self.rectangle[2:]
        x = x.view(len(past), T, *x.shape[1:])
        if self.alike:
            mine[:, :, past[0]:self.end] = x.transpose(1, 2)
        else:
            mine[self.index] = x

    def seen(self, tensor: torch.Tensor) -> torch.Tensor:
        """What these sequences may see of it: a view [B, K, S, X]."""
        return tensor[self.rectangle.sequences, :, self.begin:self.end]


class RectangularStep(Step):
    """A step over the sequences of a `RectangularCache`."""

    @cached_property
    def parts(self) -> list[RectanglePart]:
        """The rectangles; made when the first layer attends."""
        return [RectanglePart(each, self.cache, self.window) for each in rectangles(self)]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if len(self.parts) == 1:
            return self.cache.attend(layer, self.parts[0], q, k, v)
        return torch.cat([self.cache.attend(layer, part, q[rows], k[rows], v[rows])
                          for part in self.parts for rows in [part.rectangle.rows]])
