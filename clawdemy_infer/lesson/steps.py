"""Steps of the real model: on the stopwatch, and the operations and work they are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from clawdemy_infer.arithmetic import ModelShape, Work
from clawdemy_infer.batching import Operations, Policy
from clawdemy_infer.fast import PackedLinear, computes_in
from clawdemy_infer.kv_cache import BlockPool, BlockTables, ContiguousCache, PagedCache
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.timing import Timing, count_ops, stopwatch


def random_tokens(model: Decoder, batch: int, length: int) -> torch.Tensor:
    """[B, T] token ids. A step costs the same whatever the tokens say."""
    ids = torch.randint(model.config.shape.V, (batch, length),
                        generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def filled_cache(model: Decoder, batch: int, tokens: int, room: int = 1) -> ContiguousCache:
    """A cache that really holds `tokens` tokens of each sequence, with `room` for more."""
    cache = ContiguousCache.for_model(model, batch, tokens + room)
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


def time_decode(model: Decoder, cache: ContiguousCache, context: int, repeats: int = 15,
                watch: Callable[..., Timing] = stopwatch) -> Timing:
    """Seconds for one more token of each sequence, the `context`-th. `cache` holds context - 1
    tokens at least and is cut to `context`: measure several contexts from the longest down."""
    tokens = random_tokens(model, len(cache.lengths), 1)

    def one_token() -> None:
        cache.truncate(context - 1)
        model(tokens, cache, last_only=True)
    return watch(one_token, repeats)


# ---- what a step is made of ----


def is_one_call(model: nn.Module) -> bool:
    """Does a step run as one piece of code, in which only products cost more than their bytes?"""
    return getattr(model.runner, "backend", None) == "cpp"


@torch.inference_mode()
def step_ops(model: Decoder, new: int = 1, batch: int = 1) -> int:
    """How many operations one forward pass over `batch` x `new` tokens dispatches beside its matrix
    products, whose rates have what it costs to start them: counted, not timed.

    The context does not change it, and the batch only where attention goes another way for many
    sequences; a prefill of two tokens takes as many as a long one.
    """
    cache, tokens = ContiguousCache.for_model(model, batch, new), random_tokens(model, batch, new)
    model(tokens, cache, last_only=True)                # the first step may compile or record
    cache.truncate(0)
    ops = count_ops(lambda: model(tokens, cache, last_only=True))
    return ops if is_one_call(model) else ops - product_ops(model, batch * new)


@torch.inference_mode()
def product_ops(model: Decoder, rows: int = 2) -> int:
    """How many operations the products of one step over `rows` rows dispatch."""
    products = [(part, part.in_features) for part in model.modules()
                if isinstance(part, nn.Linear | PackedLinear)]
    if model.head is None:
        products.append((model.logits, model.config.shape.D))
    like = {"dtype": model.dtype, "device": model.device}
    return sum(count_ops(partial(product, torch.ones(rows, width, **like)))
               for product, width in products)


def work_of(shape: ModelShape, phase: str, weights: str, batch: int, context: int,
            device: str = "cpu") -> Work:
    """The work of one row: cache and activations in the dtype that goes with such weights."""
    dtype = computes_in(weights, device)
    step = {"prefill": shape.prefill, "decode": shape.decode}[phase]
    return step(batch, context, weights=weights, kv=dtype, activations=dtype)


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
    products = 0 if is_one_call(model) else product_ops(model)
    if policy.batching == "static":
        cache = ContiguousCache.for_model(model, 2, 8)
        cache.length = 2
        cache.truncate(1, 1)                        # rows of different lengths, under a mask
        tokens = torch.tensor([[1], [2]], device=model.device)
        return Operations(count_ops(lambda: model(tokens, cache, last_only=True)) - products)
    cache = PagedCache.over(model, BlockTables(BlockPool(blocks=16)))
    for sequence in range(4):
        cache.add(sequence)
    model.step({0: [1], 1: [1, 1], 2: [1], 3: [1]}, cache)

    def ops(*chunks: int) -> int:
        """Of a step in which two sequences decode and others bring `chunks` of prompts."""
        new = {0: 1, 1: 1} | dict(enumerate(chunks, 2))
        return count_ops(lambda: model.step({each: [1] * T for each, T in new.items()}, cache))

    split = ops(2, 3) - ops(2)
    step = ops(2) - 2 * split
    return Operations(step - products, ops() - step, split)
