"""Decode attention over a block pool, in which the keys and values are read where they lie (Kwon et al. 2023, section 4.3).

To gather a sequence's blocks first is the plain way (`paged.py` does it for prompts): one read, one write and one more read of
all its keys and values in every layer of every step. Here nothing is moved. A GPU kernel would follow the block table; PyTorch
has no such operation, but it can take many small matrices in one product. So the question is turned round: not "where are my
tiles?" but "whose is this tile?", and each tile is multiplied with the queries of its owners:

    scores[p] = q[owners of p] k[p]ᵀ / sqrt(H)                  p a tile, k[p], v[p] its C tokens
    largest[i] = max over the tiles of sequence i               softmax needs the largest score and the sum over a whole
    weights[p] = exp(scores[p] - largest[owner])                sequence, which is spread over tiles: three small sums by owner
    out[i] = sum over its tiles of weights[p] v[p]  /  sum over its tiles of weights[p]

It is the split of FlashDecoding (Dao et al. 2023), cut at the tiles. A tile that R sequences share is read once, for R times as
many queries. Where several sequences have a block each of a tile, as in a pool that is old and full, the blocks stand for p.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from clawdemy_infer.kv_cache.paged_store import PagedStore

GAP = 3
"""So many unneeded tiles are read along rather than begin another run of products: a product costs as much to start."""


class Run(NamedTuple):
    """Neighbouring tiles that are computed in one product: first ... last - 1, P of them, each cut into `n` pieces of `C` tokens."""

    first: int
    last: int
    owners: torch.Tensor
    """[P*K*n*R]: for each tile, KV head, piece and owner, which row of the queries [B*K, G, H]. Every piece of a run has R owners;
    where it has fewer, any will do, for the mask hides all."""
    mask: torch.Tensor
    """[P, 1, n, R, 1, C], to be added to the scores: 0 for a token that this owner sees, -inf for all others."""


def plan(tables: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]], store: PagedStore) -> list[Run]:
    """The runs for sequences with these block tables, of which tokens begin ... end - 1 are seen. Made once a step."""
    pool, size = store.pool, store.pool.block_size
    seen: dict[int, dict[int, list[tuple[int, int, int]]]] = {}     # tile -> owner -> (block in the tile, from token, to token)
    for owner, (table, (begin, end)) in enumerate(zip(tables, spans, strict=True)):
        for i in range(begin // size, -(-end // size)):
            tile, place = divmod(table[i], pool.tile)
            part = place, max(begin - i * size, 0), min(end - i * size, size)
            seen.setdefault(tile, {}).setdefault(owner, []).append(part)

    # Tiles with one owner and shared tiles go apart: in a run, every piece has as many rows as the one with most owners. But a few
    # tiles with one owner go along with the shared ones behind them.
    shared = {tile for tile, owners in seen.items() if len(owners) > 1}
    runs: list[list[int]] = []
    before = None
    for tile in sorted(seen):
        kind = any(tile + ahead in shared for ahead in range(GAP + 1))
        if not runs or kind != before or tile - runs[-1][-1] > GAP + 1:
            runs.append([])
        runs[-1].append(tile)
        before = kind
    return [_run(tiles, seen, store) for tiles in runs]


def _run(tiles: list[int], seen: dict, store: PagedStore) -> Run:
    pool, size, first, last = store.pool, store.pool.block_size, tiles[0], tiles[-1] + 1
    # Owners who have a block each of a tile would each compute all of it. Then every block is a piece; else a tile is.
    of_block = Counter((tile, place) for tile in tiles for spans in seen[tile].values() for place, _, _ in spans)
    pieces = pool.tile if max(of_block.values()) < max(len(seen[tile]) for tile in tiles) else 1
    blocks = pool.tile // pieces                                                            # of a piece
    parts: dict[int, dict[int, list[tuple[int, int, int]]]] = {}    # piece -> owner -> (block in the piece, from token, to token)
    for tile in tiles:
        for owner, spans in seen[tile].items():
            for place, begin, end in spans:
                piece, place = divmod(place, blocks)
                parts.setdefault((tile - first) * pieces + piece, {}).setdefault(owner, []).append((place, begin, end))

    P, R = last - first, max(map(len, parts.values()))
    owners = [0] * (P * pieces * R)
    mask = torch.full((len(owners) * blocks, size), -torch.inf)
    whole = []
    for piece, spans_of in parts.items():
        for at, (owner, spans) in enumerate(spans_of.items(), piece * R):
            owners[at] = owner
            for place, begin, end in spans:
                if end - begin == size:
                    whole.append(at * blocks + place)
                else:
                    mask[at * blocks + place, begin:end] = 0
    mask[whole] = 0
    heads = torch.arange(store.kv_heads)
    rows = torch.tensor(owners).view(P, 1, pieces, R) * store.kv_heads + heads[:, None, None]                   # [P, K, n, R]
    return Run(first, last, rows.flatten().to(store.device), mask.view(P, 1, pieces, R, 1, -1).to(store.device))


def attend_tiles(q: torch.Tensor, store: PagedStore, layer: int, runs: Sequence[Run]) -> torch.Tensor:
    """One query for each of B sequences, q [B, N, H], over the tiles of `runs`. Returns [B, N*H]."""
    (B, N, H), K = q.shape, store.kv_heads
    G = N // K
    q = q.reshape(B * K, G, H)
    largest = q.new_full((B * K, G), -torch.inf, dtype=torch.float32)
    scored = []
    for first, last, owners, mask in runs:
        P, _, n, R, _, C = mask.shape
        keys, values = (tensor.view(P * K * n, C, H) for tensor in store.tiles(layer, first, last))
        products = torch.bmm(q[owners].view(P * K * n, R * G, H), keys.transpose(1, 2))     # [P*K*n, R*G, C]
        scores = torch.add(mask, products.view(P, K, n, R, G, C), alpha=H ** -0.5).view(-1, G, C)   # [P*K*n*R, G, C], fp32
        largest.scatter_reduce_(0, owners[:, None].expand(-1, G), scores.amax(-1), "amax")
        scored.append((owners, scores, values))

    total, out = torch.zeros_like(largest), q.new_zeros((B * K, G, H), dtype=torch.float32)
    for owners, scores, values in scored:
        weights = scores.sub_(largest[owners].unsqueeze(-1)).exp_()
        total.index_add_(0, owners, weights.sum(-1))
        parts = torch.bmm(weights.to(q.dtype).view(len(values), -1, values.shape[1]), values)               # [P*K*n, R*G, H]
        out.index_add_(0, owners, parts.view(-1, G, H).float())
    return out.div_(total.unsqueeze(-1)).to(q.dtype).view(B, N * H)
