"""A sliding window with attention sinks: the first tokens and the last W, however long the text.

Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks" (StreamingLLM), section
3.2. A trained model puts much of its attention on the very first tokens, whatever they say, and
falls apart when a plain window drops them.

The window is a ring. With s sinks, token p >= s lies in slot s + (p - s) mod W and overwrites token
p - W, which neither it nor any later token may see.

A token's position is its place *in the cache*, as the paper has it: the sinks first, the window
right behind them. Within the window, places in the cache and in the text differ by one shift, which
RoPE does not notice. So a query attends to the window from its place in the text, and to the sinks
turned back to its place in the cache. RoPE's angles grow with the text; they are computed in fp64,
for an fp32 angle is off by a sixteenth of a radian at a million tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch

from clawdemy_infer.arithmetic.work import at_least_1
from clawdemy_infer.attention import attend
from clawdemy_infer.fast.backends import kernel
from clawdemy_infer.kv_cache.step import Rectangle, positions, rectangles
from clawdemy_infer.variants.parts import NOWHERE, KernelCache, PartStep, one_by_one, position_mask


class SlidingWindowCache(KernelCache):
    """The first `sinks` and the last `window` tokens of `batch` sequences, 0 to B-1: two [L, B, K,
    sinks + window, H] tensors, whatever the length.

    With no sinks it is the cache of a model that has a sliding window itself (Jiang et al. 2023,
    Mistral), and exact for one. Sinks need `frequencies` [H/2], RoPE's radians per position. Raises
    ValueError for sizes below 1, negative sinks, and sinks without frequencies.
    """

    def __init__(self, layers: int, batch: int, kv_heads: int, head_dim: int, window: int,
                 sinks: int = 0, frequencies: torch.Tensor | None = None,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        at_least_1(layers=layers, kv_heads=kv_heads, head_dim=head_dim, window=window)
        if sinks < 0 or (sinks and frequencies is None):
            raise ValueError(f"sinks={sinks}: 0 or more are accepted, and above 0 RoPE's "
                             "`frequencies` are needed")
        super().__init__(batch, sys.maxsize, dtype, device)     # a ring is never full
        self.window, self.sinks, self.span = window, sinks, sinks + window
        self.frequencies = frequencies
        # The longest a sequence has been: what was overwritten by then is gone.
        self.written = dict.fromkeys(range(batch), 0)
        self.keys = torch.zeros(layers, batch, kv_heads, self.span, head_dim, dtype=dtype,
                                device=device)
        self.values = torch.zeros_like(self.keys)
        self.tensors = self.keys, self.values

    @classmethod
    def for_model(cls, model, batch: int, window: int | None = None,
                  sinks: int = 0) -> SlidingWindowCache:
        """An empty cache for `model`. Without a `window` it is the model's own."""
        shape = model.config.shape
        if (window or shape.window) is None:
            raise ValueError("window=None: this model has no window of its own, so say how many "
                             "tokens to keep")
        return super().for_model(model, batch, window or shape.window, sinks=sinks,
                                 frequencies=model.frequencies)

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """Where the tokens at `positions` lie."""
        return torch.where(positions < self.sinks, positions,
                           self.sinks + (positions - self.sinks) % self.window)

    def begin(self, new: Mapping[int, Sequence[int]], window: int | None = None) -> PartStep:
        """Begin a step that brings these tokens. ValueError if the model's own `window` shows it
        less than is kept here."""
        if window is not None and self.span > window:
            raise ValueError(f"window={self.window}, sinks={self.sinks}: the model looks at the "
                             f"last {window} tokens only")
        step = PartStep(self, new)
        step.positions = positions(step.past, step.num_new_tokens, self.device, torch.float64)
        step.parts = []
        for rectangle in rectangles(step):
            if rectangle.T == 1:
                step.parts.append(_OneToken(self, rectangle))
            else:
                step.parts += [_Piece(self, one) for one in one_by_one(rectangle)]
        return step

    @KernelCache.length.setter
    def length(self, length: int) -> None:
        self.lengths = dict.fromkeys(self.lengths, length)
        self.written = dict.fromkeys(self.lengths, length)

    def truncate(self, length: int, sequence: int | None = None) -> None:
        """Forget all but the first `length` tokens, of all sequences or of one. ValueError if a
        token that would come into view again is gone: a full ring goes one step back, or to 0."""
        chosen = self.lengths if sequence is None else [sequence]
        for each in chosen:
            # The next token looks back to length - W + 1, and the ring to written - W.
            lowest = self.written[each] - 1 if self.written[each] > self.span else 0
            if length != 0 and not lowest <= length <= self.lengths[each]:
                raise ValueError(f"length={length}: 0, or {max(0, lowest)} to "
                                 f"{self.lengths[each]}, whose window is still whole")
        for each in chosen:
            self.lengths[each] = length
            self.written[each] *= length > 0


class _OneToken:
    """B sequences, a token each, computed together. The ring is attention's operand as it is: the
    order of the keys makes no difference to it."""

    def __init__(self, cache: SlidingWindowCache, rectangle: Rectangle) -> None:
        self.cache, self.rectangle = cache, rectangle
        for sequence, past in enumerate(rectangle.past, rectangle.first):
            # even if the step is never finished
            cache.written[sequence] = max(cache.written[sequence], past + 1)
        past = torch.tensor(rectangle.past, device=cache.device)                    # [B]
        mine = torch.arange(rectangle.first, rectangle.sequences.stop, device=cache.device)
        self.at = mine, slice(None), cache.slots(past)
        self.lengths = (past + 1).clamp(max=cache.span).int()
        self.end = min(max(rectangle.past) + 1, cache.span)
        self.attention, self.mask = _SinkAttention(cache, past[:, None]), None
        if min(rectangle.past) + 1 < self.end:
            # Some sequence has not yet written all the slots that are read.
            slots = torch.arange(self.end, device=cache.device)
            keys = slots.where(slots <= past[:, None], NOWHERE)
            self.mask = position_mask(past[:, None], keys, None, 0, cache.dtype)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]             # [B, K, s+W, H]
        keys[self.at], values[self.at] = k, v
        keys, values = (x[self.rectangle.sequences, :, :self.end] for x in (keys, values))
        if self.cache.backend != "triton":
            return self.attention.attend(q, keys, values, self.mask)
        if self.attention.turn is None:
            return kernel("decode_split")(q, keys, values, self.lengths).flatten(1)
        return kernel("decode_sinks")(q, self.attention.turned(q), keys, values, self.lengths,
                                      self.cache.sinks).flatten(1)

    def commit(self) -> None:
        """All is written."""


class _Piece:
    """T tokens of one sequence, W queries at a time. The first still see what the last will
    overwrite, so all are written when the step is over."""

    def __init__(self, cache: SlidingWindowCache, rectangle: Rectangle) -> None:
        self.cache, self.rectangle = cache, rectangle
        [past], T, s, W = rectangle.past, rectangle.T, cache.sinks, cache.window
        # 1. What is still kept and may be seen, and then the new.
        kept = torch.cat((torch.arange(min(past, s)),
                          torch.arange(max(s, past - W + 1), max(s, past)))).to(cache.device)
        positions = torch.cat((kept, torch.arange(past, past + T, device=cache.device)))
        self.old = cache.slots(kept)
        # 2. What each chunk of queries sees of that.
        self.chunks = []
        for start in range(past, past + T, W):
            queries = torch.arange(start, min(start + W, past + T), device=cache.device)
            seen = ((positions < s) | (positions > start - W)) & (positions <= queries[-1])
            mask = position_mask(queries[None], positions[seen][None], W, s, cache.dtype)
            rows = slice(start - past, start - past + len(queries))
            attention = _SinkAttention(cache, queries[None])
            self.chunks.append((rows, seen.nonzero().flatten(), mask, attention))
        # 3. Of the new ones, those to be kept.
        stay = (positions >= past) & ((positions < s) | (positions >= past + T - W))
        self.stay, self.slots = stay[len(kept):].nonzero().flatten(), cache.slots(positions[stay])
        self.fresh: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache, first = self.cache, self.rectangle.first
        k, v = k.transpose(0, 1), v.transpose(0, 1)                                 # [K, T, H]
        keys, values = (torch.cat((old[layer, first, :, self.old], new), dim=1)[None]
                        for old, new in ((cache.keys, k), (cache.values, v)))
        self.fresh[layer] = k[:, self.stay], v[:, self.stay]
        return torch.cat([attention.attend(q[rows], keys[:, :, seen], values[:, :, seen], mask)
                          for rows, seen, mask, attention in self.chunks])

    def commit(self) -> None:
        cache, (_, first, [past], new) = self.cache, self.rectangle
        for layer, (k, v) in self.fresh.items():
            cache.keys[layer, first, :, self.slots] = k
            cache.values[layer, first, :, self.slots] = v
        cache.written[first] = max(cache.written[first], past + new)


class _SinkAttention:
    """Attention of queries at positions [B, T] to keys of which the first `sinks` are sinks."""

    def __init__(self, cache: SlidingWindowCache, positions: torch.Tensor) -> None:
        self.sinks, self.turn = cache.sinks, None
        # From the place in the text to that in the cache: 0 until the ring is full.
        back = positions.clamp(max=cache.span - 1) - positions                      # [B, T]
        if cache.sinks and back.any():
            angles = torch.outer(back.flatten().double(), cache.frequencies.to(back.device))
            cos, sin = angles.cos()[:, None], angles.sin()[:, None]                 # [B*T, 1, H/2]
            self.turn = [torch.cat(x, -1).to(cache.dtype) for x in ((cos, cos), (-sin, sin))]

    def turned(self, q: torch.Tensor) -> torch.Tensor:
        """RoPE once more, by a negative angle."""
        cos, sin = self.turn
        return torch.addcmul(q * cos, q.roll(q.shape[-1] // 2, dims=-1), sin)

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
               mask: torch.Tensor | None) -> torch.Tensor:
        """q [B*T, N, H], keys and values [B, K, S, H] -> [B*T, N*H]."""
        if self.turn is None:
            return attend(q, keys, values, mask)
        (B, K), (M, N, H), s = keys.shape[:2], q.shape, self.sinks
        # Scores in fp32, as SDPA has them: bf16 would keep 8 bits of each.
        q, turned = (x.view(B, M // B, K, N // K, H).permute(0, 2, 3, 1, 4).flatten(2, 3).float()
                     for x in (q, self.turned(q)))                                  # [B, K, G*T, H]
        sinks, window = keys.float().split((s, keys.shape[2] - s), dim=2)
        scores = torch.cat((turned @ sinks.mT, q @ window.mT), dim=-1) * H**-0.5
        if mask is not None:                            # A weight of 0 would not hide a NaN.
            scores, hidden = scores.unflatten(2, (N // K, M // B)), mask.isneginf()
            scores = scores.masked_fill(hidden[:, :, None], -torch.inf).flatten(2, 3)
            values = values.masked_fill(hidden.all(2)[..., None], 0)
        out = scores.softmax(-1).to(values.dtype) @ values                       # [B, K, G*T, H]
        return out.unflatten(2, (N // K, M // B)).permute(0, 3, 1, 2, 4).reshape(M, N * H)
