"""Decode attention over a block pool, in which the keys and values are read where they lie (Kwon et al. 2023, section 4.3).

To gather a sequence's blocks first is the plain way (`paged.py` does it for prompts): one read, one write and one more read of
all its keys and values in every layer of every step. A GPU kernel would follow the block table instead. PyTorch has no such
operation, but it can take many small matrices in one product, and it can put rows in another order. So keys and values stay where
they are, and it is the scores that follow the block table: of one token, key and value are 2H numbers, and the scores are G.

    q[owner of p] k[p]ᵀ              p a tile of the pool, k[p] and v[p] its C tokens: scores in the order of the pool
    scores[in_text]                  in the order of the text: here the block table is looked up
    softmax(scores / sqrt(H) + mask)
    weights[in_pool]                 back in the order of the pool
    out[i] = sum over the tiles of sequence i of weights[p] v[p]

A tile that R sequences share is read once, for R times as many queries. Where several sequences have a block each of a tile, as
in a pool that is old and full, the blocks stand for p. What is the same in every layer is worked out once a step: the `Plan`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from clawdemy_infer.attention import ragged_mask
from clawdemy_infer.kv_cache.paged_store import PagedStore

ALONG = 0.5
"""So many unneeded tiles are read along for each that is needed, rather than copy the needed ones together."""


class Product(NamedTuple):
    """P tiles that are computed in one product, each cut into n pieces, and each piece for R sequences."""

    tiles: slice | torch.Tensor
    """Neighbours, which are read where they lie; or a list of any, which are copied together."""
    owners: torch.Tensor
    """[P, K, n, R]: whose queries take part, of q [B*K, T*G, H]. A piece that fewer than R sequences see has some for whom it
    is computed in vain: their weights will be 0."""


class Plan(NamedTuple):
    """What to multiply, for B sequences that bring T tokens each, and where the scores then are: a *strip* is those of one query head
    for the tokens of one block, and S tokens are as many strips as the longest sequence needs, and one more."""

    products: list[Product]
    owners: torch.Tensor
    """Those of all products, one behind the other."""
    in_text: torch.Tensor
    """[B*K*T*G * S / block_size]: for each strip in the order of the text, which it is in the order of the pool."""
    in_pool: torch.Tensor
    """The other way round. What belongs to nobody is sent to a strip that the mask has made 0."""
    mask: torch.Tensor
    """[B, 1, T, 1, S], to be added to the scores: 0 for a token that this query sees, -inf for all others."""


class Seen(NamedTuple):
    """A block that somebody sees: its tile and its place there; whose it is, and which of his blocks."""

    tile: int
    place: int
    owner: int
    index: int


def plan(tables: Sequence[Sequence[int]], past: Sequence[int], T: int, G: int, window: int | None, store: PagedStore) -> Plan:
    """For sequences with these block tables, which have `past` tokens each and bring T. Made once a step."""
    size, tile, K, B, Q = store.pool.block_size, store.pool.tile, store.kv_heads, len(tables), T * G
    first = [max(0, tokens + 1 - window) // size if window else 0 for tokens in past]       # blocks before that are out of sight
    blocks = [table[begin:-(-(tokens + T) // size)] for table, begin, tokens in zip(tables, first, past, strict=True)]
    seen = [Seen(*divmod(block, tile), owner, i) for owner, mine in enumerate(blocks) for i, block in enumerate(mine)]
    owners = Counter(tile for tile, _ in {(block.tile, block.owner) for block in seen})
    # Tiles of one sequence and of several go into two products: in one, all would have as many rows as the tile with most owners.
    parts = [[block for block in seen if owners[block.tile] == 1], [block for block in seen if owners[block.tile] > 1]]

    strips = max(map(len, blocks)) + 1                                                      # the last one is hidden from everybody
    in_text = torch.zeros(B, strips, K, Q, dtype=torch.int64)
    text = torch.arange(in_text.numel()).view(B, K, Q, strips).permute(0, 3, 1, 2)          # a strip's number in the order of the text
    products, in_pool = [], torch.empty(0, dtype=torch.int64)
    for part in filter(None, parts):
        product, pool = _product(part, Q, store)                                            # pool [len(part), K, Q]: their numbers there
        begin, n = len(in_pool), product.owners.shape[2]
        owner, index = torch.tensor([(block.owner, block.index) for block in part]).unbind(1)
        in_text[owner, index] = begin + pool
        in_pool = torch.cat((in_pool, torch.full((product.owners.numel() * Q * tile // n,), strips - 1)))
        in_pool[begin + pool] = text[owner, index]
        products.append(product)
    mask = ragged_mask([tokens - begin * size for tokens, begin in zip(past, first, strict=True)], T, strips * size, window,
                       torch.float32, store.device)
    whole = torch.cat([product.owners.flatten() for product in products]), in_text.permute(0, 2, 3, 1).flatten(), in_pool
    return Plan(products, *(each.to(store.device) for each in whole), mask.unsqueeze(3))


def _product(part: Sequence[Seen], Q: int, store: PagedStore) -> tuple[Product, torch.Tensor]:
    """The product of these blocks' tiles; and for each block, where its strips of scores are in it: [len(part), K, Q]."""
    tiles, tile, K = sorted({block.tile for block in part}), store.pool.tile, store.kv_heads
    first, P = tiles[0], tiles[-1] + 1 - tiles[0]
    where, number = slice(first, first + P), {each: each - first for each in tiles}
    if P > (1 + ALONG) * len(tiles):
        where, number, P = torch.tensor(tiles, device=store.device), {each: p for p, each in enumerate(tiles)}, len(tiles)
    # Owners who have a block each of a tile would each compute all of it. Then every block is a piece; else a tile is.
    of_tile = Counter(tile for tile, _ in {(block.tile, block.owner) for block in part})
    of_block = Counter((block.tile, block.place) for block in part)
    n = tile if max(of_block.values()) < max(of_tile.values()) else 1
    c = tile // n                                                                           # blocks of a piece

    sharers: dict[tuple[int, int], dict[int, int]] = {}                                     # piece -> owner -> which of its R
    found = []
    for block in part:
        mine = sharers.setdefault((number[block.tile], block.place // c), {})
        found.append((number[block.tile], block.place // c, mine.setdefault(block.owner, len(mine)), block.place % c, block.owner))
    R = max(map(len, sharers.values()))
    p, piece, sharer, place, owner = torch.tensor(found).t()[:, :, None, None]              # [len(part), 1, 1] each
    k, q = torch.arange(K)[:, None], torch.arange(Q)
    owners = torch.zeros(P, K, n, R, dtype=torch.int64)
    owners[p, k, piece, sharer] = owner * K + k
    return Product(where, owners), ((((p * K + k) * n + piece) * R + sharer) * Q + q) * c + place


def attend_tiles(q: torch.Tensor, store: PagedStore, layer: int, plan: Plan) -> torch.Tensor:
    """The queries of B sequences that bring T tokens each, q [B*T, N, H], over the tiles of `plan`. Returns [B*T, N*H]."""
    (M, N, H), K, size = q.shape, store.kv_heads, store.pool.block_size
    B, _, T, _, S = plan.mask.shape
    Q = T * N // K
    rows = q.view(B, T, K, -1, H).transpose(1, 2).reshape(B * K, Q, H).index_select(0, plan.owners)
    scores, values = [], []
    for (tiles, owners), mine in zip(plan.products, rows.split([product.owners.numel() for product in plan.products]), strict=True):
        P, _, n, R = owners.shape
        k, v = (tensor.view(P * K * n, -1, H) for tensor in store.tiles(layer, tiles))                      # [P*K*n, C, H]
        scores.append(torch.bmm(mine.view(-1, R * Q, H), k.transpose(1, 2)).view(-1, size))       # strips: in the order of the pool
        values.append(v)

    in_text = _joined(scores).index_select(0, plan.in_text).view(B, K, T, -1, S)                            # of the text
    weights = torch.add(plan.mask, in_text, alpha=H ** -0.5).softmax(-1).to(q.dtype)
    in_pool = weights.view(-1, size).index_select(0, plan.in_pool).split([len(each) for each in scores])    # of the pool again
    parts = [torch.bmm(mine.view(len(v), -1, v.shape[1]), v).view(-1, Q, H) for mine, v in zip(in_pool, values, strict=True)]
    out = q.new_zeros((B * K, Q, H), dtype=torch.float32).index_add_(0, plan.owners, _joined(parts).float())
    return out.to(q.dtype).view(B, K, T, -1, H).transpose(1, 2).reshape(M, N * H)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
