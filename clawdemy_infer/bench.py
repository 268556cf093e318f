"""Prefill and decode of the real model on the stopwatch, with the two predictions made before the clock starts.

    napkin      all the bytes from main memory, or all the FLOPs at peak: what one can do by hand
    predicted   the calibrated roofline: each operation's own bound, at its M and its working set, plus its fixed cost
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from clawdemy_infer.arithmetic import ModelShape, Work
from clawdemy_infer.kv_cache.contiguous import ContiguousCache
from clawdemy_infer.model import Decoder
from clawdemy_infer.roofline import Machine
from clawdemy_infer.timing import Timing, count_ops, now, stopwatch


@dataclass(frozen=True)
class BenchRow:
    """One configuration. Seconds are per prefill (the TTFT without tokenisation) or per decode step of the whole batch.

    `ratio` is measured over predicted. `fraction_of_bound` is napkin over measured: how near to the roofline the run came.
    """

    phase: str
    weights: str
    batch: int
    context: int
    napkin_s: float
    predicted_s: float
    measured_s: float
    spread: float

    @property
    def ratio(self) -> float:
        return self.measured_s / self.predicted_s

    @property
    def fraction_of_bound(self) -> float:
        return self.napkin_s / self.measured_s

    def as_dict(self) -> dict:
        return {**asdict(self), "ratio": self.ratio, "fraction_of_bound": self.fraction_of_bound}


def random_tokens(model: Decoder, batch: int, length: int) -> torch.Tensor:
    """[B, T] token ids. A step costs the same whatever the tokens say."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.shape.V, (batch, length), generator=generator).to(model.device)


def time_prefill(model: Decoder, batch: int, prompt: int, repeats: int = 3) -> Timing:
    """Seconds from a prompt of `prompt` tokens to its first logits."""
    tokens = random_tokens(model, batch, prompt)
    cache = ContiguousCache.for_model(model, batch, prompt)

    def prefill() -> None:
        cache.truncate(0)
        model(tokens, cache, last_only=True)
    return stopwatch(prefill, repeats)


def time_decode(model: Decoder, cache: ContiguousCache, context: int, repeats: int = 15) -> Timing:
    """Seconds for one more token of each sequence, the `context`-th. `cache` holds at least context - 1 tokens, and keeps as many."""
    tokens = random_tokens(model, cache.batch, 1)

    def one_token() -> None:
        cache.truncate(context - 1)
        model(tokens, cache, last_only=True)
    return stopwatch(one_token, repeats, warmup=2)


def filled_cache(model: Decoder, batch: int, tokens: int) -> ContiguousCache:
    """A cache that really holds `tokens` tokens of each sequence, with room for one more."""
    cache = ContiguousCache.for_model(model, batch, tokens + 1)
    for chunk in random_tokens(model, batch, tokens).split(512, dim=1):
        model(chunk, cache, last_only=True)
    return cache


def step_ops(model: Decoder, new: int = 1) -> int:
    """How many operations one forward pass dispatches: counted, not timed. It depends neither on the batch nor on the context."""
    cache = ContiguousCache.for_model(model, 1, new)
    return count_ops(lambda: model(random_tokens(model, 1, new), cache, last_only=True))
