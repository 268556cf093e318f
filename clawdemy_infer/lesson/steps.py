"""Steps of the real model: what they are fed with, and the operations and work they are made of."""

from clawdemy_infer.arithmetic import Format, ModelShape, Work
from clawdemy_infer.fast import computes_in
from clawdemy_infer.fast.watched import random_tokens, started
from clawdemy_infer.kv_cache import ContiguousCache, KVCache
from clawdemy_infer.model import Decoder


def filled_cache(model: Decoder, batch: int, tokens: int, room: int = 1,
                 kind: type = ContiguousCache) -> KVCache:
    """A cache that really holds `tokens` tokens of each sequence, with `room` for more."""
    cache = kind.for_model(model, batch, tokens + room)
    for start in range(0, tokens, 512):
        model(random_tokens(model, batch, min(512, tokens - start)), cache, last_only=True)
    return cache


def step_ops(model: Decoder, new: int = 1, batch: int = 1) -> int:
    """Operations that it starts beside products and attention, whose rates include their own."""
    ops = started(model, new, batch)
    return ops["launches"] + ops["the rest"]


def work_of(shape: ModelShape, phase: str, weights: str, batch: int, context: int,
            device: str = "cpu", kv: Format | None = None) -> Work:
    """A step's work; activations and, without `kv`, the cache are in the dtype of computing."""
    dtype = computes_in(weights, device)
    step = {"prefill": shape.prefill, "decode": shape.decode}[phase]
    return step(batch, context, weights=weights, kv=kv or dtype, activations=dtype)
