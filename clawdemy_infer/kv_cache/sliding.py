"""A sliding window with attention sinks: the last W tokens are kept, and the first few, however long the text becomes.

Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks" (StreamingLLM), section 3.2. A trained model puts
much of its attention on the very first tokens, whatever they say, and falls apart when a plain window drops them.

The window is a ring. With s sinks, token p >= s lies in slot s + (p - s) mod W and overwrites token p - W, which neither it nor
any later token may see. Nothing moves, and a step reads s + W tokens at most.

A token's position is its place *in the cache*, as the paper has it: the sinks first, the window right behind them. Within the
window, places in the cache and in the text differ by one shift for keys and queries alike, which RoPE does not notice. Only
from a query to a sink the distance is another one. So a query looks at the window from its place in the text, and at the
sinks turned back to its place in the cache: a few numbers a step, where turning all keys anew would read the cache twice.

So a text has no end. Its positions grow, and the angles of RoPE with them; they are computed in fp64, for an fp32 angle is off
by a sixteenth of a radian at a million tokens. The differences that attention meets stay within sinks + window.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch

from clawdemy_infer.attention import attend
from clawdemy_infer.backends import kernel
from clawdemy_infer.kv_cache.runs import NOTHING, Run, RunStep, mask_by_position, runs
from clawdemy_infer.kv_cache.step import Step, at_least_1, positions


class SlidingWindowCache:
    """The first `sinks` and the last `window` tokens of `batch` sequences, 0 to B-1: two [L, B, K, sinks + window, H] tensors.

    2 * L * B * K * (sinks + window) * H elements, whatever the length. With no sinks it is the cache of a model that has a
    sliding window itself (Jiang et al. 2023, Mistral), and exact for one. Sinks need `frequencies` [H/2], RoPE's radians per
    position. Raises ValueError for sizes below 1, negative sinks, and sinks without frequencies.
    """

    backend = "torch"
    """Whose attention a step of one token is, "torch" or "triton": the model's."""

    def __init__(self, layers: int, batch: int, kv_heads: int, head_dim: int, window: int, sinks: int = 0,
                 frequencies: torch.Tensor | None = None, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> None:
        at_least_1(layers=layers, batch=batch, kv_heads=kv_heads, head_dim=head_dim, window=window)
        if sinks < 0 or (sinks and frequencies is None):
            raise ValueError(f"sinks={sinks}: 0 or more are accepted, and above 0 RoPE's `frequencies` are needed")
        self.batch, self.window, self.sinks, self.span, self.frequencies = batch, window, sinks, sinks + window, frequencies
        self.dtype, self.device, self.capacity = dtype, torch.device(device), sys.maxsize       # a ring is never full
        self.lengths = dict.fromkeys(range(batch), 0)
        self.written = dict.fromkeys(range(batch), 0)           # the longest a sequence has been: what was overwritten by then is gone
        # Zeros, because a mask hides a stale number but not a NaN.
        self.keys = torch.zeros(layers, batch, kv_heads, sinks + window, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    @classmethod
    def for_model(cls, model, batch: int, window: int | None = None, sinks: int = 0) -> SlidingWindowCache:
        """An empty cache in the shape, dtype and place of `model`, a `Decoder`. Without a `window` it is the model's own."""
        shape = model.config.shape
        if (window or shape.window) is None:
            raise ValueError("window=None: this model has no window of its own, so say how many tokens to keep")
        cache = cls(shape.L, batch, shape.K, shape.H, window or shape.window, sinks, model.frequencies, model.dtype, model.device)
        cache.backend = model.backend
        return cache

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """Where the tokens at `positions` lie."""
        return torch.where(positions < self.sinks, positions, self.sinks + (positions - self.sinks) % self.window)

    def places(self, positions: torch.Tensor) -> torch.Tensor:
        """The places in the cache of tokens that are the newest of it."""
        return positions.clamp(max=self.sinks + self.window - 1)

    def can_append(self, new: Mapping[int, int]) -> bool:
        """Always: the oldest make room."""
        return True

    def begin(self, new: Mapping[int, Sequence[int]], window: int | None = None) -> Step:
        """Begin a step that brings these tokens. ValueError if the model's own `window` shows it less than is kept here."""
        if window is not None and self.window + self.sinks > window:
            raise ValueError(f"window={self.window}, sinks={self.sinks}: the model looks at the last {window} tokens only")
        return _Step(self, new)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence, those that are gone included. Set it to move all sequences at once."""
        return max(self.lengths.values())

    @length.setter
    def length(self, length: int) -> None:
        self.lengths, self.written = dict.fromkeys(self.lengths, length), dict.fromkeys(self.lengths, length)

    def truncate(self, length: int, sequence: int | None = None) -> None:
        """Forget all but the first `length` tokens, of all sequences or of one. ValueError if a token that would come into view
        again is gone: once the ring is full that leaves one step back, or 0."""
        chosen = list(self.lengths) if sequence is None else [sequence]
        for each in chosen:
            # The next token looks back to length - W + 1, and the ring to written - W.
            lowest = self.written[each] - 1 if self.written[each] > self.sinks + self.window else 0
            if length != 0 and not lowest <= length <= self.lengths[each]:
                raise ValueError(f"length={length}: 0, or {max(0, lowest)} to {self.lengths[each]}, whose window is still whole")
        for each in chosen:
            self.lengths[each] = length
            self.written[each] *= length > 0

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that is kept, each [L, B, K, sinks + window, H]."""
        return self.keys, self.values

    @property
    def allocated_bytes(self) -> int:
        """Bytes of both tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


class _Step(RunStep):
    """Sequences that bring one token each are computed together, over the ring as it lies. A longer piece of text is computed by
    itself: its first tokens still see what its last ones will overwrite, so it is written only when the step is over."""

    def __init__(self, cache: SlidingWindowCache, new: Mapping[int, Sequence[int]]) -> None:
        super().__init__(cache, new)
        self.positions = positions(self.past, self.new, cache.device, torch.float64)
        self.parts = []
        for run in runs(self):
            self.parts += [_OneToken(cache, run)] if run.new == 1 else [_Piece(cache, one) for one in run.each()]

    def commit(self) -> None:
        super().commit()
        for sequence in self.sequences:
            self.cache.written[sequence] = max(self.cache.written[sequence], self.cache.lengths[sequence])


class _OneToken:
    """B sequences, a token each. The ring is attention's operand as it is: the order of the keys makes no difference to it."""

    def __init__(self, cache: SlidingWindowCache, run: Run) -> None:
        self.cache, self.run = cache, run
        for sequence, past in enumerate(run.past, run.first):
            cache.written[sequence] = max(cache.written[sequence], past + 1)                # even if the step is never finished
        past = torch.tensor(run.past, device=cache.device)                                  # [B]
        self.at = (torch.arange(run.first, run.first + len(past), device=cache.device), slice(None), cache.slots(past))
        self.filled = min(max(run.past) + 1, cache.sinks + cache.window)
        self.sight = _Sight(cache, past[:, None])
        self.lengths = (past + 1).clamp(max=cache.span).int()
        self.mask = None
        if min(run.past) + 1 < self.filled:                     # some sequence has not yet written all the slots that are read
            slots = torch.arange(self.filled, device=cache.device)
            positions = torch.where(slots <= past[:, None], slots, NOTHING)                 # what is there is all in view
            self.mask = mask_by_position(past[:, None], positions, None, 0, cache.dtype)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]                     # [B, K, s + W, H]
        keys[self.at], values[self.at] = k, v
        keys, values = (x[self.run.sequences, :, :self.filled] for x in (keys, values))
        if self.cache.backend == "triton":
            if self.sight.turn is None:
                return kernel("decode_split")(q, keys, values, self.lengths).flatten(1)
            return kernel("decode_sinks")(q, self.sight.turned(q), keys, values, self.lengths, self.cache.sinks).flatten(1)
        return self.sight.attend(q, keys, values, self.mask)

    def commit(self) -> None:
        """All is written."""


class _Piece:
    """T tokens of one sequence, W at a time: each chunk of queries sees the sinks, the W - 1 tokens before it, and itself."""

    def __init__(self, cache: SlidingWindowCache, run: Run) -> None:
        self.cache, self.run = cache, run
        [past], T, s, W = run.past, run.new, cache.sinks, cache.window
        kept = torch.cat((torch.arange(min(past, s)), torch.arange(max(s, past - W + 1), max(s, past))))
        positions = torch.cat((kept, torch.arange(past, past + T))).to(cache.device)        # of all that this piece may see
        self.old = cache.slots(kept.to(cache.device))
        self.chunks = []
        for start in range(past, past + T, W):
            queries = torch.arange(start, min(start + W, past + T), device=cache.device)
            seen = ((positions < s) | (positions > start - W)) & (positions <= queries[-1])
            mask = mask_by_position(queries[None], positions[seen][None], W, s, cache.dtype)
            rows = slice(start - past, start - past + len(queries))
            self.chunks.append((rows, seen.nonzero().flatten(), mask, _Sight(cache, queries[None])))
        stay = (positions >= past) & ((positions < s) | (positions >= past + T - W))        # of the new ones, those to be kept
        self.stay = stay[len(kept):].nonzero().flatten()
        self.slots = cache.slots(positions[stay])
        self.fresh: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.transpose(0, 1), v.transpose(0, 1)                                         # [K, T, H]
        first = self.run.first
        keys = torch.cat((self.cache.keys[layer, first, :, self.old], k), dim=1)[None]
        values = torch.cat((self.cache.values[layer, first, :, self.old], v), dim=1)[None]  # [1, K, P + T, H]
        self.fresh[layer] = k[:, self.stay], v[:, self.stay]
        return torch.cat([sight.attend(q[rows], keys[:, :, seen], values[:, :, seen], mask) for rows, seen, mask, sight in self.chunks])

    def commit(self) -> None:
        for layer, (k, v) in self.fresh.items():
            self.cache.keys[layer, self.run.first, :, self.slots] = k
            self.cache.values[layer, self.run.first, :, self.slots] = v


class _Sight:
    """How the queries at positions [B, T] look at keys of which the first `sinks` are sinks."""

    def __init__(self, cache: SlidingWindowCache, positions: torch.Tensor) -> None:
        self.sinks, self.turn = cache.sinks, None
        back = cache.places(positions) - positions                                          # [B, T], 0 until the ring is full
        if cache.sinks and back.any():
            angles = torch.outer(back.flatten().double(), cache.frequencies.to(back.device))[:, None]                   # [B*T, 1, H/2]
            cos, sin = angles.cos(), angles.sin()
            self.turn = torch.cat((cos, cos), -1).to(cache.dtype), torch.cat((-sin, sin), -1).to(cache.dtype)

    def turned(self, q: torch.Tensor) -> torch.Tensor:
        """RoPE once more, by a negative angle."""
        cos, sin = self.turn
        return torch.addcmul(q * cos, q.roll(q.shape[-1] // 2, dims=-1), sin)

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """q [B*T, N, H], keys and values [B, K, S, H] -> [B*T, N*H]."""
        if self.turn is None:
            return attend(q, keys, values, mask)
        (B, K), (M, N, H), s = keys.shape[:2], q.shape, self.sinks
        q, turned = (x.view(B, M // B, K, N // K, H).permute(0, 2, 3, 1, 4).flatten(2, 3) for x in (q, self.turned(q)))     # [B, K, G*T, H]
        scores = torch.cat((turned @ keys[:, :, :s].mT, q @ keys[:, :, s:].mT), dim=-1) * H**-0.5
        if mask is not None:
            scores = (scores.unflatten(2, (N // K, M // B)) + mask[:, :, None]).flatten(2, 3)
        out = scores.softmax(-1) @ values                                                   # [B, K, G*T, H]
        return out.unflatten(2, (N // K, M // B)).permute(0, 3, 1, 2, 4).reshape(M, N * H)
