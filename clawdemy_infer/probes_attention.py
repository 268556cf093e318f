"""The probes of attention: its rate over keys and values that lie in one piece, and over those of a block pool.

    attention        `attend` with M query rows to each KV head: of one sequence or many, over few keys or many
    paged attention  the same of a decode step that follows block tables
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from clawdemy_infer.attention import attend
from clawdemy_infer.kv_cache import BlockPool, BlockTables
from clawdemy_infer.kv_cache.paged_attention import attend_tiles, plan
from clawdemy_infer.kv_cache.paged_store import PagedStore
from clawdemy_infer.linear import FLOATS
from clawdemy_infer.roofline import ATTENTION_KEYS, PAGED_ATTENTION, attention_of
from clawdemy_infer.timing import alternate, rates

ATTENTION_ROWS = [1, 2, 4, 8, 16, 48, 192, 432, 768, 1536, 2112, 3072]
"""Many rows are three for each position of a prompt. PyTorch's kernel for CPUs takes larger blocks from 192 positions on, and again from
768 on."""
PAGED_ROWS = [1, 4, 16]


def attention_rates(dtype: str, device: str, kv_heads: int = 4, head_dim: int = 64) -> dict[str, list[tuple[float, float]]]:
    """(M, FLOP/s) of attention, M query rows to each KV head, by the names of `roofline.attention_of`, and "attention" for any.

    Few rows are a decode step, the query heads of a group; of one sequence and of 16, and over few keys and many, of which "attention"
    has those in the middle. Their keys and values come from memory: a step reads all other layers before it comes back to them.
    Many rows are a prefill: three heads to a group, and M/3 positions that see each other causally, keys that were just made.
    """
    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, head_dim, device=device).to(FLOATS[dtype])

    kept = tensor(2**20)                                                # 256 MB of fp32: more than caches hold

    def at(m: int, batch: int, keys: int):
        T, group = (1, m) if keys else (m // 3, 3)
        q = tensor(batch * T, group * kv_heads)
        shape = 2, batch, kv_heads, keys or T                           # of keys and values
        size = 2 * batch * kv_heads * (keys or T)
        places = len(kept) // size if keys else 1

        def one(i: int) -> int:
            attend(q, *kept[i % places * size:][:size].view(*shape, head_dim))
            return 4 * kv_heads * head_dim * batch * group * (keys or T * (T + 1) / 2)
        return one

    few = [m for m in ATTENTION_ROWS if m <= 16]
    steps = {(attention_of(batch * kv_heads, keys), m): at(m, batch, keys) for batch in (1, 16) for keys in ATTENTION_KEYS for m in few}
    measured = rates(steps | {("attention", m): at(m, 1, 0) for m in ATTENTION_ROWS if m > 16}, sample_s=0.015, rounds=3)
    curves = {name: [(m, measured[name, m]) for m in few] for name, _ in steps}
    middle = curves[attention_of(kv_heads, ATTENTION_KEYS[1])]
    curves["attention"] = middle + [(m, measured["attention", m]) for m in ATTENTION_ROWS if m > 16]
    return curves | {PAGED_ATTENTION: paged_rates(dtype)} if device == "cpu" else curves


@torch.inference_mode()
def paged_rates(dtype: str, batch: int = 8, keys: int = 384, kv_heads: int = 4, head_dim: int = 64) -> list[tuple[float, float]]:
    """(M, FLOP/s) of a decode step's attention over the tiles of a block pool, M query heads to a KV head, for sequences of half as many
    to half as many again as `keys`; beyond what it costs them to see one key each, which is the price of starting its operations."""
    def at(m: int, lengths: list[int], layers: int) -> Callable[[], None]:
        pool = BlockPool(-(-(sum(lengths) + 16 * batch) // 128) * 8, 16)
        tables = BlockTables(pool)
        for sequence, length in enumerate(lengths):
            tables.add(sequence)
            tables.reserve({sequence: length})
        store = PagedStore(pool, layers, kv_heads, head_dim, FLOATS[dtype])
        its = plan(list(tables.blocks.values()), [length - 1 for length in lengths], 1, m, None, store)
        q = torch.randn(batch, kv_heads * m, head_dim).to(FLOATS[dtype])

        def run() -> None:
            for layer in range(layers):
                attend_tiles(q, store, layer, its)
        return run

    lengths, layers = [keys // 2 + keys * i // (batch - 1) for i in range(batch)], 24       # in fp32 151 MB: caches do not hold it
    flops = 4 * head_dim * kv_heads * (sum(lengths) - batch) * layers                       # of one query head to a KV head
    pairs = [(m, alternate({"keys": at(m, lengths, layers), "none": at(m, [1] * batch, layers)}, repeats=5)) for m in PAGED_ROWS]
    return [(m, m * flops / max(times["keys"].beyond(times["none"]), 1e-9)) for m, times in pairs]
