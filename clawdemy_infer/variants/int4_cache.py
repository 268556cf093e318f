"""The KV cache in 4 bits or 2: keys rounded by channel, values by token, the newest not at all.

Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", section 3. A few
channels of the keys are large in every token, and would set a token's scale and lose all others.
So keys have a scale for each *channel*. Values have no such channels, and a scale for each token.

A channel's scale spans `group` tokens. Until all of them are there they wait in full precision, in
a tail. (The paper lets 128 tokens wait in groups of 32; here the tail is one group.)

    low = min(x)      scale = (max(x) - min(x)) / (2^bits - 1)      code = round((x - low) / scale)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from clawdemy_infer.arithmetic.work import at_least_1
from clawdemy_infer.attention import attend, causal_mask
from clawdemy_infer.fast.backends import kernel
from clawdemy_infer.kv_cache.step import Rectangle, rectangles
from clawdemy_infer.quantization.integers import SMALLEST_SCALE
from clawdemy_infer.variants.parts import NOWHERE, KernelCache, PartStep, one_by_one, position_mask


class RoundedTensor:
    """Keys or values, [L, B, K, S, H]: whole groups of `group` tokens as integers of `bits` bits,
    and the tokens behind them, fewer than a group, as they are.

    A 16-bit scale and lowest value belong to `group` numbers each: of one channel of neighbouring
    tokens (`along` -2) or of one token (`along` -1). A byte holds code i of each of the 8 / bits
    parts of a head. Raises ValueError for bits other than 2, 4 and 8, and an H that `group` does
    not divide.
    """

    def __init__(self, shape: tuple[int, ...], bits: int, group: int, along: int,
                 dtype: torch.dtype, device: torch.device | str) -> None:
        *outer, S, H = shape
        if bits not in (2, 4, 8):
            raise ValueError(f"bits={bits}: accepted are 2, 4, 8")
        if H % group or H * bits % 8:
            raise ValueError(f"group={group}, bits={bits}: the {H} numbers of a head are not whole "
                             "groups, or not whole bytes")
        S, self.bits, self.group, self.along = S // group * group, bits, group, along
        self.codes = torch.zeros(*outer, S, H * bits // 8, dtype=torch.uint8, device=device)
        groups = (S // group, 1, H) if along == -2 else (S, H // group, 1)
        self.scale = torch.zeros(*outer, *groups, dtype=torch.float16, device=device)
        self.low = torch.zeros_like(self.scale)
        self.tail = torch.zeros(*outer, group, H, dtype=dtype, device=device)
        self.tensors = self.codes, self.scale, self.low, self.tail

    def whole(self, length: int) -> int:
        """Tokens of `length` in whole groups, which are kept as codes."""
        return length // self.group * self.group

    def append(self, rectangle: Rectangle, new: torch.Tensor) -> None:
        """Put new [L, B, K, T, H] into the tails of sequences that are equally long, and round each
        group that is then whole."""
        mine, past = rectangle.sequences, rectangle.past[0]
        start, stop, tail = self.whole(past), self.whole(past + rectangle.T), self.tail[:, mine]
        waiting = past - start
        if stop > start:
            new = torch.cat((tail[:, :, :, :waiting], new), dim=3)
            self.round(mine, start, new[:, :, :, :stop - start])
            new, waiting = new[:, :, :, stop - start:], 0
        tail[:, :, :, waiting:waiting + new.shape[3]] = new

    def round(self, sequences: slice, start: int, x: torch.Tensor) -> None:
        """Keep x [L, B, K, n, H], whole groups from token `start` on, as codes."""
        tokens, groups = self._places(start, x.shape[-2])
        x, most = x.float().unflatten(self.along, (-1, self.group)), 2**self.bits - 1
        low, high = x.aminmax(dim=self.along, keepdim=True)
        low = low.half()
        scale = ((high - low) / most).half().clamp(SMALLEST_SCALE)
        codes = ((x - low) / scale).round().clamp(0, most).byte()
        parts = codes.flatten(self.along - 1, self.along).chunk(8 // self.bits, dim=-1)
        self.codes[:, sequences, :, tokens] = sum(part << i * self.bits
                                                  for i, part in enumerate(parts))
        self.scale[:, sequences, :, groups], self.low[:, sequences, :, groups] = scale, low

    def read(self, layer: int, sequences: slice, start: int, out: torch.Tensor) -> None:
        """Put whole groups from token `start` on, as numbers again, into out [B, K, n, H]."""
        tokens, groups = self._places(start, out.shape[-2])
        codes = self.codes[layer, sequences, :, tokens]
        for i, part in enumerate(out.chunk(8 // self.bits, dim=-1)):
            part.copy_(codes >> i * self.bits & 2**self.bits - 1)
        x = out.unflatten(self.along, (-1, self.group))
        scale, low = (y[layer, sequences, :, groups].to(x.dtype) for y in (self.scale, self.low))
        torch.addcmul(low, x, scale, out=x)

    def seen(self, layer: int, part: _Part, new: torch.Tensor) -> torch.Tensor:
        """All that is kept, and the new [B, K, T, H]: [B, K, S, H]."""
        (B, K, T, H), past, mine = new.shape, part.codes + part.tail, part.rectangle.sequences
        out = new.new_empty(B, K, past + T, H)
        self.read(layer, mine, 0, out=out[:, :, :part.codes])
        out[:, :, part.codes:past] = self.tail[layer, mine, :, :part.tail]
        out[:, :, past:] = new
        return out

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, scales and lowest values as the kernel takes them: without the dimension of 1."""
        return self.codes[layer], *(x[layer].squeeze(self.along) for x in (self.scale, self.low))

    def _places(self, start: int, count: int) -> tuple[slice, slice]:
        """The codes of `count` tokens from `start` on, and their groups."""
        g = self.group if self.along == -2 else 1
        return slice(start, start + count), slice(start // g, (start + count) // g)


class KiviCache(KernelCache):
    """Keys and values of `batch` sequences, 0 to B-1, in `bits` bits each, and a tail of `group`
    tokens in `dtype`.

    2 * L * B * K * H * (tokens * (bits / 8 + 4 / group) + group * bytes of dtype), where `tokens`
    is the capacity in whole groups. New tokens see each other in full precision. Raises ValueError
    for sizes below 1, and for what a `RoundedTensor` refuses.
    """

    def __init__(self, layers: int, batch: int, kv_heads: int, head_dim: int, capacity: int,
                 bits: int = 4, group: int = 32, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> None:
        at_least_1(layers=layers, kv_heads=kv_heads, head_dim=head_dim, group=group)
        super().__init__(batch, capacity, dtype, device)
        shape = layers, batch, kv_heads, capacity, head_dim
        self.keys, self.values = (RoundedTensor(shape, bits, group, along, dtype, device)
                                  for along in (-2, -1))
        self.tensors = *self.keys.tensors, *self.values.tensors
        # The kernel wants 4 bits, and groups of 16, 32, 64 ... tokens.
        self.has_kernel = (bits == 4 and capacity >= group >= 16 and group & (group - 1) == 0)

    def begin(self, new: Mapping[int, Sequence[int]], window: int | None = None) -> PartStep:
        step = PartStep(self, new)
        step.parts = [_Part(self, rectangle, window) for rectangle in rectangles(step)]
        return step

    def truncate(self, length: int, sequence: int | None = None) -> None:
        """Forget all but the first `length` tokens, of all sequences or of one. Those that go back
        into the tail stay rounded."""
        start = self.keys.whole(length)
        for each in self.that_have(length, sequence):
            if start < self.keys.whole(self.lengths[each]) and start < length:
                mine = slice(each, each + 1)
                for rounded in (self.keys, self.values):
                    for layer, tail in enumerate(rounded.tail):
                        rounded.read(layer, mine, start, out=tail[mine])
            self.lengths[each] = length


class _Part:
    """What one rectangle sees: [codes | tail | new tokens]. Nothing is rounded before the step is
    over: a group's scale needs all its tokens."""

    def __init__(self, cache: KiviCache, rectangle: Rectangle, window: int | None) -> None:
        self.cache, self.rectangle, self.window = cache, rectangle, window
        self.fresh: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        past = rectangle.past
        codes = [cache.keys.whole(length) for length in past]
        tails = [length - whole for length, whole in zip(past, codes, strict=True)]
        self.codes, self.tail, self.alike = max(codes), max(tails), len(set(past)) == 1
        self.by_kernel = rectangle.T == 1 and cache.backend == "triton" and cache.has_kernel
        if self.by_kernel:
            mine = [*range(rectangle.first, rectangle.sequences.stop)]  # one block each, and a tail
            self.numbers = [torch.tensor(x, dtype=torch.int32, device=cache.device)
                            for x in ([[each] for each in mine], mine, codes, tails)]
        elif self.alike and not window:
            self.mask = causal_mask(past, rectangle.T, None, cache.dtype, cache.device)
        else:
            past, whole, waiting = (torch.tensor(x, device=cache.device)[:, None]
                                    for x in (past, codes, tails))              # [B, 1]
            in_codes, in_tail, new = (torch.arange(n, device=cache.device).expand(len(past), n)
                                      for n in (self.codes, self.tail, rectangle.T))
            keys = torch.cat((in_codes.where(in_codes < whole, NOWHERE),
                              (whole + in_tail).where(in_tail < waiting, NOWHERE), past + new), 1)
            self.mask = position_mask(past + new, keys, window, 0, cache.dtype)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        B, keys, values = len(self.rectangle.past), self.cache.keys, self.cache.values
        k, v = (x.unflatten(0, (B, -1)).transpose(1, 2) for x in (k, v))        # [B, K, T, H]
        self.fresh[layer] = k, v
        if not self.by_kernel:
            return attend(q, keys.seen(layer, self, k), values.seen(layer, self, v), self.mask)
        # The kernel finds what is new behind what waits in the tails.
        blocks, which, codes, waiting = self.numbers
        tails = keys.tail[layer], values.tail[layer]
        for tail, new in zip(tails, (k, v), strict=True):
            tail[which, :, waiting] = new[:, :, 0]
        return kernel("decode_int4")(q, *keys.of_layer(layer), *values.of_layer(layer), blocks,
                                     codes, tail=(*tails, which, waiting + 1),
                                     window=self.window).flatten(1)

    def commit(self) -> None:
        alone = [self.rectangle] if self.alike else list(one_by_one(self.rectangle))
        fresh = [torch.stack(x) for x in zip(*self.fresh.values(), strict=True)]
        for rounded, x in zip((self.cache.keys, self.cache.values), fresh, strict=True):
            for one, new in zip(alone, [x] if self.alike else x.split(1, dim=1), strict=True):
                rounded.append(one, new)
