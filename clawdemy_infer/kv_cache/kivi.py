"""The KV cache in 4 bits or 2: keys rounded by channel, values by token, and the newest tokens not yet rounded.

Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", section 3. A few channels of the keys are large
in every token. A scale for each token would be set by those and lose all others; a scale for each *channel*, over some tokens,
keeps each channel in its own measure. Values have no such channels, and keep a scale for each token.

A channel's scale spans `group` tokens, so it can only be known once all of them are there. Until then they wait in full
precision, in a tail. (The paper lets 128 tokens wait in groups of 32; here the tail is one group.)

    low = min(x)        scale = (max(x) - min(x)) / (2^bits - 1)        code = round((x - low) / scale)        x ~ code * scale + low
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from clawdemy_infer.attention import attend, causal_mask
from clawdemy_infer.backends import kernel
from clawdemy_infer.kv_cache.contiguous import ContiguousCache
from clawdemy_infer.kv_cache.runs import NOTHING, Run, RunStep, mask_by_position, runs
from clawdemy_infer.kv_cache.step import Step, at_least_1

BITS = (2, 4, 8)


class GroupedCodes:
    """Integers of `bits` bits for a tensor [L, B, K, S, H], and a 16-bit scale and lowest value for each `group` numbers: of one
    channel of neighbouring tokens (`along` -2, per channel) or of one token (`along` -1, per token).

    bits / 8 + 4 / group bytes for each number. Raises ValueError for bits other than 2, 4 and 8, and an H that `group` does not
    divide.
    """

    def __init__(self, shape: tuple[int, ...], bits: int, group: int, along: int, device: torch.device | str) -> None:
        *outer, S, H = shape
        if bits not in BITS:
            raise ValueError(f"bits={bits}: accepted are {', '.join(map(str, BITS))}")
        if H % group or H * bits % 8:
            raise ValueError(f"group={group}, bits={bits}: the {H} numbers of a head are not whole groups, or not whole bytes")
        self.bits, self.group, self.along = bits, group, along
        self.codes = torch.zeros(*outer, S, H * bits // 8, dtype=torch.uint8, device=device)
        groups = (S // group, 1, H) if along == -2 else (S, H // group, 1)
        self.scale, self.low = (torch.zeros(*outer, *groups, dtype=torch.float16, device=device) for _ in range(2))

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(self.along, (-1, self.group))

    def _groups(self, start: int, stop: int) -> slice:
        """Those of the tokens `start` to `stop`."""
        return slice(start // self.group, stop // self.group) if self.along == -2 else slice(start, stop)

    def write(self, sequences: slice | torch.Tensor, start: int, x: torch.Tensor) -> None:
        """Round x [L, B, K, n, H], the tokens from `start` on; both are multiples of `group`."""
        x, n = self._grouped(x.float()), x.shape[-2]
        low, high = x.aminmax(dim=self.along, keepdim=True)
        low = low.half()
        scale = ((high - low) / (2**self.bits - 1)).half().clamp(min=2.0**-24)              # the smallest fp16: 0 / 0 is no code
        codes = ((x - low) / scale).round().clamp(0, 2**self.bits - 1).byte()
        codes = codes.flatten(self.along - 1, self.along)                                   # [L, B, K, n, H]
        packed = sum(part << i * self.bits for i, part in enumerate(codes.chunk(8 // self.bits, dim=-1)))
        self.codes[:, sequences, :, start:start + n] = packed
        groups = self._groups(start, start + n)
        self.scale[:, sequences, :, groups], self.low[:, sequences, :, groups] = scale, low

    def read(self, layer: int, sequences: slice | torch.Tensor, start: int, out: torch.Tensor) -> None:
        """Put the tokens from `start` on, a multiple of `group`, into out [B, K, n, H], as numbers again."""
        stop = start + out.shape[-2]
        codes, groups = self.codes[layer, sequences, :, start:stop], self._groups(start, stop)
        for i, part in enumerate(out.chunk(8 // self.bits, dim=-1)):
            part.copy_(codes >> i * self.bits & 2**self.bits - 1)
        x = self._grouped(out)
        torch.addcmul(self.low[layer, sequences, :, groups].to(x.dtype), x, self.scale[layer, sequences, :, groups].to(x.dtype), out=x)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.codes, self.scale, self.low

    @property
    def decodes(self) -> bool:
        """Is there a kernel for these codes? It wants 4 bits, and groups of 16, 32, 64 ... tokens."""
        return self.bits == 4 and self.codes.shape[-2] > 0 and self.group >= 16 and self.group & (self.group - 1) == 0

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, scales and lowest values as the kernel takes them: without the dimension of 1."""
        return self.codes[layer], *(x[layer].squeeze(self.along) for x in (self.scale, self.low))


class KiviCache(ContiguousCache):
    """Keys and values of `batch` sequences, 0 to B-1, in `bits` bits each, and a tail of `group` tokens in `dtype`.

    2 * L * B * K * H * (tokens * (bits / 8 + 4 / group) + group * bytes of dtype), where `tokens` is the capacity without what
    is over a multiple of `group`. New tokens see each other in full precision and are rounded when their step is over. Raises
    ValueError for sizes below 1, bits other than 2, 4 and 8, and an H that `group` does not divide.
    """

    def __init__(self, layers: int, batch: int, kv_heads: int, head_dim: int, capacity: int, bits: int = 4, group: int = 32,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        at_least_1(layers=layers, batch=batch, kv_heads=kv_heads, head_dim=head_dim, capacity=capacity, group=group)
        self.batch, self.capacity, self.group, self.dtype, self.device = batch, capacity, group, dtype, torch.device(device)
        self.lengths = dict.fromkeys(range(batch), 0)
        shape = (layers, batch, kv_heads, capacity // group * group, head_dim)
        self.keys = GroupedCodes(shape, bits, group, along=-2, device=device)
        self.values = GroupedCodes(shape, bits, group, along=-1, device=device)
        self.key_tail, self.value_tail = (torch.zeros(*shape[:3], group, head_dim, dtype=dtype, device=device) for _ in range(2))

    @classmethod
    def for_model(cls, model, batch: int, capacity: int, bits: int = 4, group: int = 32) -> KiviCache:
        """An empty cache in the shape, dtype and place of `model`, a `Decoder`."""
        shape = model.config.shape
        cache = cls(shape.L, batch, shape.K, shape.H, capacity, bits, group, model.dtype, model.device)
        cache.backend = model.backend
        return cache

    def rounded(self, length: int) -> int:
        """How many of `length` tokens are kept as codes; the rest is in the tail."""
        return length // self.group * self.group

    def begin(self, new: Mapping[int, Sequence[int]], window: int | None = None) -> Step:
        """Begin a step that brings these tokens; ValueError where they do not fit."""
        return _Step(self, new, window)

    def truncate(self, length: int, sequence: int | None = None) -> None:
        """Forget all but the first `length` tokens, of all sequences or of one. Those that go back into the tail stay rounded."""
        chosen = self.that_have(length, sequence)
        start = self.rounded(length)
        for each in chosen:
            if start < self.rounded(self.lengths[each]) and start < length:
                for codes, tail in ((self.keys, self.key_tail), (self.values, self.value_tail)):
                    for layer in range(len(tail)):
                        codes.read(layer, slice(each, each + 1), start, out=tail[layer, each:each + 1])
            self.lengths[each] = length

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is kept, each [L, B, K, ...]: codes, scales and lowest values of keys and of values, and the tails."""
        return *self.keys.tensors, *self.values.tensors, self.key_tail, self.value_tail


class _Step(RunStep):
    """Each run sees [codes | tail | new tokens]. Nothing is written before the step is over: a group's scale needs all its tokens."""

    def __init__(self, cache: KiviCache, new: Mapping[int, Sequence[int]], window: int | None) -> None:
        super().__init__(cache, new)
        self.parts = [_Part(cache, run, window) for run in runs(self)]


class CodesAndTails:
    """What one run sees. Where codes and tails lie, and how new tokens come to lie there, a subclass says: `read` and `commit`; and
    `places` for a kernel, which takes runs of one token."""

    def __init__(self, cache, run: Run, window: int | None) -> None:
        self.cache, self.run, self.window = cache, run, window
        self.alike = len(set(run.past)) == 1
        codes = [cache.rounded(past) for past in run.past]
        tails = [past - rounded for past, rounded in zip(run.past, codes, strict=True)]
        self.codes, self.tail = max(codes), max(tails)
        self.fresh: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.by_kernel = run.new == 1 and cache.backend == "triton" and cache.keys.decodes
        if self.by_kernel:
            self.numbers = [torch.tensor(x, dtype=torch.int32, device=cache.device) for x in (*self.places(), codes, tails)]
            return
        if self.alike and not window:
            self.mask = causal_mask(run.new, run.past[0] + run.new, None, cache.dtype, cache.device)
            return
        past, rounded, waiting = (torch.tensor(x, device=cache.device)[:, None] for x in (run.past, codes, tails))      # [B, 1]
        in_codes, in_tail = (torch.arange(n, device=cache.device).expand(len(past), n) for n in (self.codes, self.tail))
        new = past + torch.arange(run.new, device=cache.device)
        keys = torch.cat((in_codes.where(in_codes < rounded, NOTHING), (rounded + in_tail).where(in_tail < waiting, NOTHING), new), 1)
        self.mask = mask_by_position(new, keys, window, 0, cache.dtype)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.unflatten(0, (len(self.run.past), -1)).transpose(1, 2) for x in (k, v))   # [B, K, T, H]
        self.fresh[layer:] = [(k, v)]                       # a layer begun anew leaves no second copy
        if self.by_kernel:
            return self.decode(layer, q, k, v)
        keys = self.all(layer, self.cache.keys, self.cache.key_tail, k)
        values = self.all(layer, self.cache.values, self.cache.value_tail, v)
        return attend(q, keys, values, self.mask)

    def decode(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """By a kernel that reads codes. New keys and values k, v [B, K, 1, H] go behind those that wait, where nobody looks until they
        count."""
        cache, (blocks, which, rounded, waiting) = self.cache, self.numbers
        tails = cache.key_tail[layer], cache.value_tail[layer]
        for tail, new in zip(tails, (k, v), strict=True):
            tail[which, :, waiting] = new[:, :, 0]
        codes = *cache.keys.of_layer(layer), *cache.values.of_layer(layer)
        return kernel("decode_int4")(q, *codes, blocks, rounded, tail=(*tails, which, waiting + 1), window=self.window).flatten(1)

    def all(self, layer: int, codes: GroupedCodes, tail: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """[B, K, S, H] of all that is kept, and the new."""
        (B, K, T, H), past = new.shape, self.codes + self.tail
        seen = new.new_empty(B, K, past + T, H)
        self.read(layer, codes, tail, seen[:, :, :past])
        seen[:, :, past:] = new
        return seen

    def fresh_keys_and_values(self) -> list[torch.Tensor]:
        """What is to be kept: [L, B, K, T, H] each."""
        return [torch.stack(x) for x in zip(*self.fresh, strict=True)]


class _Part(CodesAndTails):
    """The sequences of a `KiviCache` lie one behind the other."""

    def places(self) -> tuple[list[list[int]], list[int]]:
        """Each sequence is one block, and has its own tail."""
        mine = range(self.run.first, self.run.first + len(self.run.past))
        return [[sequence] for sequence in mine], [*mine]

    def read(self, layer: int, codes: GroupedCodes, tail: torch.Tensor, out: torch.Tensor) -> None:
        codes.read(layer, self.run.sequences, 0, out=out[:, :, :self.codes])
        out[:, :, self.codes:] = tail[layer, self.run.sequences, :, :self.tail]

    def commit(self) -> None:
        for codes, tail, new in zip((self.cache.keys, self.cache.values), (self.cache.key_tail, self.cache.value_tail),
                                    self.fresh_keys_and_values(), strict=True):
            if self.alike:
                self._keep(codes, tail, self.run, new)
            else:
                for i, run in enumerate(self.run.each()):
                    self._keep(codes, tail, run, new[:, i:i + 1])

    def _keep(self, codes: GroupedCodes, tail: torch.Tensor, run: Run, new: torch.Tensor) -> None:
        """Append `new` to the tail, and make codes of every group that is now whole."""
        past, tail = run.past[0], tail[:, run.sequences]
        start, stop = self.cache.rounded(past), self.cache.rounded(past + run.new)
        waiting = past - start
        if stop > start:
            new = torch.cat((tail[:, :, :, :waiting], new), dim=3)
            codes.write(run.sequences, start, new[:, :, :, :stop - start])
            new, waiting = new[:, :, :, stop - start:], 0
        tail[:, :, :, waiting:waiting + new.shape[3]] = new
