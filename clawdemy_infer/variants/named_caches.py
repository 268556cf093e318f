"""All caches by name, the core's and those that keep fewer bytes."""

from __future__ import annotations

from clawdemy_infer.model.generate import CACHES as CORE
from clawdemy_infer.variants.int4_cache import KiviCache
from clawdemy_infer.variants.int8_cache import Int8Cache
from clawdemy_infer.variants.sliding_cache import SlidingWindowCache

WINDOW, SINKS = 256, 4
"""Tokens that the cache named "window" keeps: the last, and the first."""

CACHES = CORE | {
    "int8": Int8Cache.for_model, "int4": KiviCache.for_model,
    "window": lambda model, batch, _: SlidingWindowCache.for_model(model, batch, WINDOW, SINKS),
}
"""Each is made from (model, batch, capacity). A window never fills up."""
