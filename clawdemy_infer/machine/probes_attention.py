"""The probes of attention with M query rows to each KV head, of one sequence or many, over few keys
or many: over keys and values that lie in one piece, and over those of a block pool."""

from collections.abc import Callable, Iterator

import torch

from clawdemy_infer.attention import attend
from clawdemy_infer.envelope.roofline import PAGED_ATTENTION
from clawdemy_infer.fast import FLOATS
from clawdemy_infer.kv_cache import BlockPool, BlockTables, PagedCache
from clawdemy_infer.kv_cache.paged import PagedStep
from clawdemy_infer.machine.calibrated import ATTENTION_KEYS, PROBE_KV_HEADS, decode_attention
from clawdemy_infer.machine.probes import Probe, beyond, rate_of

KV_HEADS, HEAD_DIM = 4, 64
DECODE_ROWS = [1, 3, 8, 16]                     # query heads to a KV head in a decode step
PREFILL_ROWS = [48, 192, 768, 1536, 3072]
"""Three for each position of a prompt. PyTorch's kernel for CPUs takes larger blocks from 192
positions on, and again from 768 on."""
PAGED_ROWS = [1, 3, 16]
RING_KEYS = 2**19       # and values, of the decode probes: 128 MB of fp32, more than caches hold
PAGED_KEYS = 384        # mean of a sequence in the probe of paged attention


def attention_probes(dtype: str, device: str) -> Iterator[Probe]:
    """FLOP/s of attention, M query rows to each KV head, by the names of `decode_attention`, and
    "attention" for any.

    Decode steps are of one sequence and of 16, over few keys and many, of which "attention" has
    those in the middle. Their keys and values come from memory: a step reads all other layers
    before it comes back to them. Prefills have three heads to a group, and M/3 positions that see
    each other causally, over keys that were just made.
    """
    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, HEAD_DIM, device=device).to(FLOATS[dtype])

    kept = tensor(RING_KEYS // 16).repeat(16, 1)

    def decode(m: int, batch: int, keys: int) -> Callable[[int], int]:
        q, size = tensor(batch, m * KV_HEADS), 2 * batch * KV_HEADS * keys

        def one(i: int) -> int:
            first = i % (len(kept) // size) * size
            attend(q, *kept[first:first + size].view(2, batch, KV_HEADS, keys, HEAD_DIM))
            return 4 * KV_HEADS * HEAD_DIM * batch * m * keys
        return one

    def prefill(m: int) -> Callable[[int], float]:
        T = m // 3
        q, (k, v) = tensor(T, 3 * KV_HEADS), tensor(2, 1, KV_HEADS, T)

        def one(_: int) -> float:
            attend(q, k, v)
            return 4 * KV_HEADS * HEAD_DIM * 3 * T * (T + 1) / 2
        return one

    for probe, heads in PROBE_KV_HEADS.items():
        for keys in ATTENTION_KEYS:
            for m in DECODE_ROWS:
                yield Probe(decode_attention(probe, keys), dtype, m,
                            rate_of(decode(m, heads // KV_HEADS, keys)))
    for m in PREFILL_ROWS:
        yield Probe("attention", dtype, m, rate_of(prefill(m)))
    if device == "cpu":
        yield from paged_probes(dtype)


def paged_probes(dtype: str) -> Iterator[Probe]:
    """FLOP/s of a decode step's attention over the blocks of a pool, M query heads to a KV head,
    for sequences of half as many to half as many again as `PAGED_KEYS`; beyond what it costs them
    to see one key each, which is the price of starting its operations."""
    batch = 8
    lengths = [PAGED_KEYS // 2 + PAGED_KEYS * i // (batch - 1) for i in range(batch)]
    layers = 12                                         # in fp32 75 MB: caches do not hold it
    flops = 4 * HEAD_DIM * KV_HEADS * (sum(lengths) - batch) * layers   # at M = 1

    def step_over(lengths: list[int]) -> PagedStep:
        pool = BlockPool(sum(-(-length // 16) for length in lengths), 16)
        cache = PagedCache(BlockTables(pool), layers, KV_HEADS, HEAD_DIM, dtype=FLOATS[dtype])
        for sequence, length in enumerate(lengths):
            cache.add(sequence)
            if length > 1:
                cache.begin({sequence: range(length - 1)}).commit()
        return cache.begin({sequence: [0] for sequence in range(batch)})

    def decode(m: int, step: PagedStep) -> Callable[[], None]:
        q, k, v = (torch.randn(batch, heads, HEAD_DIM).to(FLOATS[dtype])
                   for heads in (KV_HEADS * m, KV_HEADS, KV_HEADS))

        @torch.inference_mode()
        def run() -> None:
            for layer in range(layers):
                step.attend(layer, q, k, v)
        return run

    def sample(m: int) -> Callable[[], float]:
        keys, none = decode(m, many), decode(m, few)
        return lambda: m * flops / beyond(keys, none)

    many, few = step_over(lengths), step_over([1] * batch)
    for m in PAGED_ROWS:
        yield Probe(PAGED_ATTENTION, dtype, m, sample(m))
