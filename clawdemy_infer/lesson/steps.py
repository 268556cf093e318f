"""Steps of the real model: on the stopwatch, and the operations and work they are made of."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch

from clawdemy_infer.arithmetic import Format, ModelShape, Work
from clawdemy_infer.batching import Operations, Policy
from clawdemy_infer.fast import computes_in
from clawdemy_infer.fast.watched import ops_by_part
from clawdemy_infer.kv_cache import BlockPool, BlockTables, ContiguousCache, KVCache, PagedCache
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.timing import Timing, stopwatch


def random_tokens(model: Decoder, batch: int, length: int) -> torch.Tensor:
    """[B, T] token ids. A step costs the same whatever the tokens say."""
    ids = torch.randint(model.config.shape.V, (batch, length),
                        generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def filled_cache(model: Decoder, batch: int, tokens: int, room: int = 1,
                 kind: type = ContiguousCache) -> KVCache:
    """A cache that really holds `tokens` tokens of each sequence, with `room` for more."""
    cache = kind.for_model(model, batch, tokens + room)
    for start in range(0, tokens, 512):
        model(random_tokens(model, batch, min(512, tokens - start)), cache, last_only=True)
    return cache


def time_prefill(model: Decoder, batch: int, prompt: int, repeats: int = 5,
                 watch: Callable[..., Timing] = stopwatch) -> Timing:
    """Seconds from prompts of `prompt` tokens to their first logits, by `timing.stopwatch` or the
    one of a `Pulse`."""
    tokens = random_tokens(model, batch, prompt)
    cache = ContiguousCache.for_model(model, batch, prompt)

    def prefill() -> None:
        cache.truncate(0)
        model(tokens, cache, last_only=True)
    return watch(prefill, repeats)


# ---- what a step is made of ----


def started(model: Decoder, new: int = 1, batch: int = 1,
            kind: type = ContiguousCache) -> Counter[str]:
    """Operations that each part of one forward pass over `batch` x `new` tokens starts.

    The context does not change them, and the batch only where attention goes another way for many
    sequences; a prefill of two tokens takes as many as a long one. A decode step has a past.
    """
    past = 1 if new == 1 else 0
    cache, tokens = kind.for_model(model, batch, past + new), random_tokens(model, batch, new)
    model(tokens, cache, last_only=True)                # the first step may compile or record
    cache.truncate(past)
    return ops_by_part(model, cache, lambda: model(tokens, cache, last_only=True))


def step_ops(model: Decoder, new: int = 1, batch: int = 1) -> int:
    """How many operations such a pass starts beside its products and its attention, whose rates
    have their starts in them."""
    ops = started(model, new, batch)
    return ops["launches"] + ops["the rest"]


def work_of(shape: ModelShape, phase: str, weights: str, batch: int, context: int,
            device: str = "cpu", kv: Format | None = None) -> Work:
    """The work of one row: activations, and the cache unless `kv` says otherwise, in the dtype that
    goes with such weights."""
    dtype = computes_in(weights, device)
    step = {"prefill": shape.prefill, "decode": shape.decode}[phase]
    return step(batch, context, weights=weights, kv=kv or dtype, activations=dtype)


# ---- the steps of an engine ----


def operations_of(shape: ModelShape, policy: Policy) -> Operations:
    """`count_operations` of a model with this shape, without its weights: how wide it is does not
    change how many there are. None are known of a shape that the decoder does not run."""
    narrow = replace(shape, name="narrow", D=8, N=2 * shape.N // shape.K if shape.K else 0, K=2,
                     H=4, F=8, V=16)
    try:
        return count_operations(Decoder(ModelConfig(narrow)), policy)
    except ValueError:
        return Operations()


def count_operations(model: Decoder, policy: Policy) -> Operations:
    """The operations of the steps of this policy beside their products, whose rates have their
    starts in them."""
    def ops(cache: KVCache, run: Callable[[], object]) -> int:
        by_part = ops_by_part(model, cache, run)
        return sum(by_part[part] for part in ("launches", "attention", "the rest"))

    if policy.batching == "static":
        rows = ContiguousCache.for_model(model, 2, 8)
        rows.length = 2
        rows.truncate(1, 1)                         # rows of different lengths, under a mask
        tokens = torch.tensor([[1], [2]], device=model.device)
        return Operations(ops(rows, lambda: model(tokens, rows, last_only=True)))
    cache = PagedCache.over(model, BlockTables(BlockPool(blocks=16)))
    for sequence in range(4):
        cache.add(sequence)
    model.step({0: [1], 1: [1, 1], 2: [1], 3: [1]}, cache)

    def chunked(*chunks: int) -> int:
        """Of a step in which two sequences decode and others bring `chunks` of prompts."""
        new = {0: 1, 1: 1} | dict(enumerate(chunks, 2))
        return ops(cache, lambda: model.step({each: [1] * T for each, T in new.items()}, cache))

    split = chunked(2, 3) - chunked(2)
    step = chunked(2) - 2 * split
    return Operations(step, chunked() - step, split)
