"""4-bit pages beside the contiguous 4-bit cache (which numpy vouches for): the same numbers, whatever forks, swaps and cuts happen."""

import random

import pytest
import torch
from tolerances import LOGITS

from clawdemy_infer.kv_cache import BlockPool, BlockTables, KiviCache, PagedCache, PagedKiviCache, PagedKiviStore
from clawdemy_infer.kv_cache.paged_store import PagedStore

L, K, H, SIZE = 2, 2, 8, 4


def paged(blocks=24, tails=4, host=8, prefix_caching=False, bits=4):
    tables = BlockTables(BlockPool(blocks, SIZE), BlockPool(host, SIZE) if host else None, prefix_caching)
    return PagedKiviCache(tables, PagedKiviStore(tables, L, K, H, tails, bits))


def contiguous(bits=4):
    return KiviCache(L, 1, K, H, capacity=96, bits=bits, group=SIZE)


def vectors(ids, start):
    """Keys, values and queries [T, 2 or 4, H] of the tokens ids[start:]: like a model's, each depends on the whole text up to it."""
    made = [torch.randn(8, H, generator=torch.Generator().manual_seed(hash(tuple(ids[:i + 1])) % 2**31)) for i in range(start, len(ids))]
    return torch.stack(made).split([K, K, 2 * K], dim=1)


def bring(cache, new, texts):
    """A step that brings `new`: {sequence: token ids}, behind `texts`. What attention makes of it in both layers, [L, M, 4 * H]."""
    step = cache.begin(new)
    k, v, q = (torch.cat(x) for x in zip(*(vectors(texts[name] + list(ids), len(texts[name])) for name, ids in new.items()), strict=True))
    out = torch.stack([step.attend(layer, q, k + layer, v - layer) for layer in range(L)])
    step.commit()
    return out


class Twins:
    """The sequences of a paged cache, and for each of them a contiguous cache of its own to which the same happens."""

    def __init__(self, cache):
        self.cache, self.alone, self.texts, self.names = cache, {}, {}, 0

    @property
    def tables(self):
        return self.cache.tables

    def add(self, text=()):
        self.names += 1
        found = self.cache.add(self.names, text)
        self.alone[self.names], self.texts[self.names] = contiguous(), []
        if found:
            bring(self.alone[self.names], {0: text[:found]}, {0: []})
            self.texts[self.names] = list(text[:found])
        return self.names

    def append(self, new):
        """False where the cache has no room."""
        counts = {name: len(ids) for name, ids in new.items()}
        if not self.cache.can_append(counts):
            with pytest.raises(ValueError, match="blocks are needed|tails"):
                self.cache.begin(new)
            return False
        ours = bring(self.cache, new, self.texts)
        theirs = [bring(self.alone[name], {0: ids}, {0: self.texts[name]}) for name, ids in new.items()]
        torch.testing.assert_close(ours, torch.cat(theirs, dim=1), **LOGITS[torch.float32])
        for name, ids in new.items():
            self.texts[name] = self.texts[name] + list(ids)
        return True

    def fork(self, parent):
        self.names += 1
        self.cache.fork(parent, self.names)
        self.alone[self.names], self.texts[self.names] = contiguous(), self.texts[parent]
        for mine, theirs in zip(self.alone[self.names].tensors, self.alone[parent].tensors, strict=True):
            mine.copy_(theirs)
        self.alone[self.names].lengths = dict(self.alone[parent].lengths)
        return self.names

    def truncate(self, name, length):
        self.cache.truncate(length, name)
        self.alone[name].truncate(length)
        self.texts[name] = self.texts[name][:length]

    def free(self, name):
        self.cache.free(name)
        del self.alone[name], self.texts[name]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prefix_caching", [False, True], ids=["", "prefix cache"])
def test_any_sequence_of_operations_leaves_each_sequence_what_a_contiguous_cache_has(seed, prefix_caching):
    """Where tokens are cut off, what was rounded stays rounded; a block of such may be known to the prefix cache, and found by somebody
    who would have rounded once. So here the one or the other."""
    dice, twins = random.Random(seed), Twins(paged(prefix_caching=prefix_caching))
    tables, done = twins.tables, set()
    for _ in range(150):
        here, away = list(twins.cache.lengths), list(tables.swapped)
        what = dice.choice(["add", "append", "append", "append", "fork", "truncate", "interrupt", "swap", "swap", "free"])
        one = dice.choice(here) if here else None
        if what == "add" and len(here) < 5:
            text = [dice.randrange(2) for _ in range(dice.randint(1, 12))]
            name = twins.add(text)
            twins.append({name: text[len(twins.texts[name]):]})
        elif what == "append" and here:
            some = [name for name in dice.sample(here, dice.randint(1, len(here))) if len(twins.texts[name]) < 80]
            most = dice.choice([1, 1, 6, 11])
            if some and not twins.append({name: [dice.randrange(2) for _ in range(dice.randint(1, most))] for name in some}):
                twins.free(one)
                done.add("no room")
        elif what == "fork" and here and len(here) < 5:
            twins.fork(one)
        elif what == "truncate" and here and not prefix_caching:
            twins.truncate(one, dice.randint(0, len(twins.texts[one])))
        elif what == "interrupt" and here and twins.cache.can_append({one: 7}):
            twins.cache.begin({one: [0] * 7}).attend(0, *(torch.full((7, heads, H), 9.0) for heads in (2 * K, K, K)))
        elif what == "swap" and away and dice.random() < 0.7:
            if twins.cache.can_swap_in(away[0]):
                twins.cache.swap_in(away[0])
        elif what == "swap" and here and tables.can_swap_out(one):
            twins.cache.swap_out(one)
        elif what == "free" and here and dice.random() < 0.4:
            twins.free(one)
        else:
            continue
        done.add(what)
    assert done >= {"add", "append", "fork", "interrupt", "swap", "free", "no room"}
    for name in [*tables.lengths, *tables.swapped]:
        twins.free(name)
    assert tables.pool.used == tables.host.used == 0


def test_forks_share_codes_and_the_tail_until_one_writes():
    twins = Twins(paged(tails=2))
    twins.append({twins.add(): [1] * 10})
    twins.fork(1)
    store, tables = twins.cache.store, twins.tables
    assert tables.pool.used == 3 and list(store.tail_of) == [tables.blocks[1][2]]
    twins.append({2: [5]})
    assert tables.blocks[1][:2] == tables.blocks[2][:2] and sorted(store.tail_of) == sorted([tables.blocks[1][2], tables.blocks[2][2]])
    twins.append({1: [6], 2: [7]})
    assert tables.pool.used == 4 and len(store.tail_of) == 1            # the second has filled its block


def test_ctrl_c_while_a_block_becomes_full_rounds_nothing(monkeypatch):
    """The step has not happened, so the tokens before it still wait in full precision."""
    cache, alone, text = paged(), contiguous(), list(range(1, SIZE))
    cache.add("one")
    for each, name in ((cache, "one"), (alone, 0)):
        bring(each, {name: text}, {name: []})

    def pressed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache.tables, "commit", pressed)
        bring(cache, {"one": [7]}, {"one": text})
    for more in ([7], [8]):
        torch.testing.assert_close(bring(cache, {"one": more}, {"one": text}), bring(alone, {0: more}, {0: text}))
        text = text + more


def test_a_prefix_hit_and_the_whole_text_find_the_same_codes():
    twins = Twins(paged(prefix_caching=True))
    text = list(range(13))
    twins.append({twins.add(text): text})
    codes = [tensor.clone() for tensor in (*twins.cache.keys.tensors, *twins.cache.values.tensors)]
    assert twins.texts[twins.add(text)] == text[:12]
    assert twins.append({2: text[12:]}) and twins.append({1: [50], 2: [51]})
    for before, after in zip(codes, (*twins.cache.keys.tensors, *twins.cache.values.tensors), strict=True):
        assert torch.equal(before, after)


def test_tails_run_out_as_a_state_that_can_be_asked_about():
    cache = paged(tails=2)
    texts = {name: [] for name in "abc"}
    for name in "abc":
        cache.add(name)
    assert cache.can_append({"a": 1, "b": 1}) and not cache.can_append({"a": 1, "b": 1, "c": 1})
    bring(cache, {"a": [1] * 3, "b": [2] * 5}, texts)
    assert not cache.can_append({"c": 1}) and cache.can_append({"a": 1, "b": 9})
    with pytest.raises(ValueError, match="new: 3 sequences may be in the middle of a block, and there are 2 tails"):
        cache.begin({"c": [1]})
    cache.swap_out("a")
    bring(cache, {"c": [3]}, texts)
    assert cache.tables.can_swap_in("a") and not cache.can_swap_in("a")
    with pytest.raises(ValueError, match="tails=2"):
        cache.swap_in("a")
    cache.free("b")
    cache.swap_in("a")
    assert cache.lengths == {"c": 1, "a": 3}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_are_those_counted_by_hand(bits):
    """2 layers, 2 KV heads, K and V: 8 vectors of 8 numbers for each token; for each 4 of them a scale and a lowest of 2 bytes."""
    cache = paged(blocks=24, tails=3, host=5, bits=bits)
    assert cache.allocated_bytes == 8 * (24 * 4 * (8 * bits // 8 + 2 * 4) + 3 * 4 * 8 * 4)
    assert cache.store.host_bytes == 8 * 5 * 4 * (8 * bits // 8 + 2 * 4)
    cache.add("a")
    bring(cache, {"a": [1] * 6}, {"a": []})
    cache.swap_out("a")
    assert cache.store.host_bytes == 8 * (5 * 4 * (8 * bits // 8 + 2 * 4) + 1 * 4 * 8 * 4)     # a tail waits with it
    cache.free("a")
    assert cache.store.host_bytes == 8 * 5 * 4 * (8 * bits // 8 + 2 * 4)


@pytest.mark.parametrize(("options", "message"), [({"tails": 0}, "tails=0"), ({"bits": 3}, "bits=3: accepted are 2, 4, 8")])
def test_what_cannot_be_kept_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        paged(**options)


def test_blocks_must_divide_a_head():
    tables = BlockTables(BlockPool(4, 5))
    with pytest.raises(ValueError, match="group=5"):
        PagedKiviStore(tables, L, K, H, tails=1)


@pytest.mark.parametrize("kind", [PagedKiviCache, PagedCache])
def test_a_sequence_without_tokens_can_be_swapped(kind):
    cache = paged()
    if kind is PagedCache:
        cache = PagedCache(cache.tables, PagedStore(cache.tables.pool, L, K, H, host=cache.tables.host))
    cache.add("a")
    cache.swap_out("a")
    assert not cache.lengths
    cache.swap_in("a")
    assert cache.lengths == {"a": 0}
