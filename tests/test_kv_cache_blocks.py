"""Blocks, tables and the prefix cache: what each operation does, one at a time. Random sequences of
them: test_kv_cache_machine.py."""

import pytest
import torch

from clawdemy_infer.batching.swapping import SwappingCache, SwappingTables
from clawdemy_infer.kv_cache import BlockPool, BlockTables, PagedCache


def tables_of(blocks=12, block_size=4, host=0, prefix_caching=False):
    pool = BlockPool(blocks, block_size)
    if not host:
        return BlockTables(pool, prefix_caching)
    return SwappingTables(pool, BlockPool(host, block_size), prefix_caching)


def bring(tables, sequence, ids):
    """A whole step of one sequence. Returns the blocks that were copied."""
    copies = []
    tables.reserve({sequence: len(ids)},
                   lambda sources, targets: copies.extend(zip(sources, targets, strict=True)))
    tables.commit({sequence: list(ids)})
    return copies


# ---- the pool ----


def test_a_block_that_nobody_holds_cannot_be_released():
    pool = BlockPool(4)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(ValueError, match=f"block={block}: it is released, but nobody holds it"):
        pool.release(block)
    with pytest.raises(ValueError, match=f"block={block}: it is empty"):
        pool.touch(block)
    assert (pool.free, pool.used) == (4, 0)


def test_a_full_pool_can_be_asked_and_refuses():
    pool = BlockPool(3)
    assert len({pool.allocate() for _ in range(3)}) == 3
    assert pool.free == 0
    with pytest.raises(ValueError, match="blocks: all 3 are in use"):
        pool.allocate()


def test_a_shared_block_is_free_after_its_last_holder():
    pool = BlockPool(2)
    block = pool.allocate()
    pool.touch(block)
    pool.release(block)
    assert pool.used == 1
    pool.release(block)
    assert pool.used == 0


def test_every_block_of_a_pool_can_be_given_out_whatever_was_released_before():
    pool = BlockPool(7)
    first = [pool.allocate() for _ in range(7)]
    for block in first[1::2]:
        pool.release(block, keep=block == first[3])
    assert sorted(first[::2] + [pool.allocate() for _ in range(3)]) == list(range(7))
    assert pool.free == 0


@pytest.mark.parametrize(("sizes", "message"), [({"blocks": 0}, "blocks=0"),
                                                ({"blocks": 4, "block_size": 0}, "block_size=0")])
def test_a_pool_of_nothing_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        BlockPool(**sizes)


# ---- tables ----


def test_the_table_of_the_paper():
    """Kwon et al. 2023, figure 6: a prompt of 7 tokens in blocks of 4 takes two; the 8th token
    fills the second, the 9th opens a third."""
    tables = tables_of()
    tables.add("A")
    bring(tables, "A", range(7))
    assert len(tables.blocks["A"]) == 2
    assert tables.blocks_needed({"A": 1}) == 0
    bring(tables, "A", [7])
    assert tables.blocks_needed({"A": 1}) == 1
    bring(tables, "A", [8])
    assert (len(tables.blocks["A"]), tables.lengths["A"], tables.pool.used) == (3, 9, 3)


def test_two_samples_of_one_prompt_share_it_and_copy_one_block_when_they_part():
    """Figure 8: the last, half-filled block is copied by whoever writes first; the other then
    writes in place."""
    tables = tables_of()
    tables.add("A1")
    bring(tables, "A1", range(7))
    tables.fork("A1", "A2")
    assert tables.pool.used == 2
    assert tables.blocks_needed({"A1": 1}) == tables.blocks_needed({"A1": 1, "A2": 1}) == 1
    old = tables.blocks["A1"][1]
    assert bring(tables, "A1", [7]) == [(old, tables.blocks["A1"][1])]
    assert bring(tables, "A2", [9]) == []
    assert tables.blocks["A1"][0] == tables.blocks["A2"][0]
    assert tables.blocks["A2"][1] == old != tables.blocks["A1"][1]
    assert tables.pool.used == 3


def test_who_brings_nothing_needs_no_copy_of_a_shared_block():
    tables = tables_of()
    tables.add("A")
    bring(tables, "A", range(5))
    tables.fork("A", "B")
    assert tables.blocks_needed({"A": 0, "B": 0}) == 0 and tables.blocks_needed({"B": 1}) == 1


def test_chunks_of_a_prompt_fill_the_blocks_that_were_reserved_for_all_of_it():
    tables = tables_of()
    tables.add("A")
    tables.reserve({"A": 10})
    reserved = list(tables.blocks["A"])
    for chunk, holding in ((range(3), 1), (range(3, 6), 2), (range(6, 10), 3)):
        bring(tables, "A", chunk)
        assert tables.pool.blocks_for(tables.lengths["A"]) == holding
        assert tables.blocks["A"] == reserved and len(reserved) == 3


def test_an_interrupted_step_has_not_happened():
    tables = tables_of()
    tables.add("A")
    bring(tables, "A", range(3))
    tables.reserve({"A": 6})                # and no commit
    assert tables.lengths["A"] == 3 and tables.blocks_needed({"A": 6}) == 0
    tables.fork("A", "B")                   # shares what counts, not what was reserved
    assert tables.blocks["B"] == tables.blocks["A"][:1]
    tables.free("A")
    tables.free("B")
    assert tables.pool.used == 0


@pytest.mark.parametrize("operation", [
    lambda tables, copy: tables.reserve({"B": 1}, copy),
    lambda tables, copy: tables.swap_out("A", copy),
    lambda tables, copy: tables.swap_in("C", copy),
], ids=["copy on write", "swap out", "swap in"])
def test_a_copy_that_is_interrupted_has_not_happened(operation):
    tables = tables_of(host=9)
    for sequence in "AC":
        tables.add(sequence)
        bring(tables, sequence, range(7))
    tables.fork("A", "B")
    tables.swap_out("C")

    def state():
        return tables.pool.used, tables.host.used, dict(
            tables.lengths), {name: list(blocks)
                              for name, blocks in tables.blocks.items()}

    def interrupted(sources, targets):
        raise KeyboardInterrupt

    before = state()
    with pytest.raises(KeyboardInterrupt):
        operation(tables, interrupted)
    assert state() == before
    operation(tables, lambda sources, targets: None)
    assert state() != before


def test_exhaustion_is_a_state_that_can_be_asked_about():
    tables = tables_of(blocks=4)
    tables.add("A")
    tables.add("B")
    bring(tables, "A", range(9))
    assert tables.can_append({"A": 3, "B": 4}) and not tables.can_append({"A": 4, "B": 1})
    with pytest.raises(ValueError,
                       match="num_new_tokens: 2 more blocks are needed, and 1 of 4 are free"):
        tables.reserve({"B": 1, "A": 4})
    assert tables.blocks["B"] == [] and tables.pool.used == 3          # nothing was taken
    tables.free("A")
    assert tables.can_append({"B": 16})


def test_truncate_gives_back_the_blocks_behind():
    tables = tables_of()
    tables.add("A")
    bring(tables, "A", range(11))
    tables.truncate(4, "A")
    assert (tables.lengths["A"], tables.pool.used) == (4, 1)
    with pytest.raises(ValueError, match="length=5: sequence 'A' has 4 tokens"):
        tables.truncate(5, "A")


def test_a_truncate_that_one_sequence_refuses_leaves_all_as_they_were():
    cache = PagedCache(tables_of(), 1, 1, 4)
    for sequence, count in (("long", 11), ("short", 3), ("middle", 6)):
        cache.add(sequence)
        bring(cache.tables, sequence, range(count))
    before = dict(cache.lengths), {each: list(mine) for each, mine in cache.tables.blocks.items()}
    for length, said in ((5, "length=5: sequence 'short' has 3 tokens"), (-1, "length=-1")):
        with pytest.raises(ValueError, match=said):
            cache.truncate(length)
        assert (cache.lengths, cache.tables.blocks) == before and cache.tables.pool.used == 6
    cache.truncate(3)
    assert cache.lengths == dict.fromkeys(("long", "short", "middle"), 3)
    assert cache.tables.pool.used == 3


def test_a_sequence_can_grow_to_the_capacity_and_no_further():
    cache = PagedCache(tables_of(), 1, 1, 4, capacity=6)
    cache.add("A")
    bring(cache.tables, "A", range(2))
    assert cache.can_append({"A": 4}) and not cache.can_append({"A": 5})


def test_a_short_sequence_beside_a_long_one_reads_nothing_of_a_third():
    """Whose numbers are none."""
    cache = PagedCache(tables_of(block_size=2), 1, 1, 4)
    for sequence, count in (("third", 2), ("long", 7), ("short", 1)):
        cache.add(sequence)
        bring(cache.tables, sequence, range(count))
    cache.keys[:, cache.tables.blocks["third"]] = torch.nan
    cache.values[:, cache.tables.blocks["third"]] = torch.nan
    step = cache.begin({"long": [1], "short": [1]})
    assert step.attend(0, *torch.randn(3, 2, 1, 4)).isfinite().all()


def test_a_swapped_sequence_comes_back_as_it_was():
    tables = tables_of(blocks=4, host=3)
    tables.add("A")
    tables.add("B")
    bring(tables, "A", range(10))
    tables.swap_out("A")
    assert (tables.pool.used, tables.host.used, "A" in tables.lengths) == (0, 3, False)
    bring(tables, "B", range(5))
    assert not tables.can_swap_in("A") and not tables.can_swap_out("B")
    with pytest.raises(ValueError, match="3 blocks are needed, and 2 of 4 are free"):
        tables.swap_in("A")
    with pytest.raises(ValueError, match="the host has no room for 5 tokens"):
        tables.swap_out("B")
    tables.free("B")
    tables.swap_in("A")
    assert (tables.lengths["A"], tables.pool.used, tables.host.used) == (10, 3, 0)
    tables.swap_out("A")
    tables.free("A")                        # cancelled while it waits
    assert tables.host.used == 0


def test_a_sequence_that_comes_back_is_found_by_prompts_that_begin_like_it():
    tables = tables_of(blocks=4, host=3, prefix_caching=True)
    tables.add("A", range(9))
    bring(tables, "A", range(9))
    tables.swap_out("A")
    tables.add("B")
    bring(tables, "B", range(100, 116))                     # takes the room of what A left behind
    assert tables.prefix.find(range(9), []) == []
    tables.free("B")
    tables.swap_in("A")
    assert tables.add("C", range(9)) == 8 and tables.blocks["C"] == tables.blocks["A"][:2]
    bring(tables, "A", range(9, 12))                        # and goes on being learned
    assert tables.add("D", range(13)) == 12


def test_a_sequence_without_tokens_can_be_swapped():
    tables = tables_of(host=3)
    cache = SwappingCache(tables, 1, 1, 4)
    cache.add("A")
    cache.swap_out("A")
    assert not cache.lengths
    cache.swap_in("A")
    assert cache.lengths == {"A": 0}


@pytest.mark.parametrize(
    "misuse", [
        lambda tables: tables.add("A"), lambda tables: tables.fork("A", "A"),
        lambda tables: tables.fork("C", "D"), lambda tables: tables.free("C"),
        lambda tables: tables.reserve({"C": 1}), lambda tables: tables.swap_in("A"),
        lambda tables: tables.truncate(0, "C"),
    ], ids=[
        "twice", "fork to itself", "fork of nobody", "free of nobody", "step of nobody",
        "swap in what is here", "truncate nobody"
    ])
def test_a_sequence_that_is_not_there_or_there_twice_is_refused_by_name(misuse):
    tables = tables_of(host=3)
    tables.add("A")
    with pytest.raises(ValueError, match="(sequence|child)='[ACD]'"):
        misuse(tables)


# ---- the prefix cache ----


def test_a_prompt_that_begins_alike_finds_the_whole_blocks_of_the_first():
    tables = tables_of(prefix_caching=True)
    tables.add("A", range(10))
    bring(tables, "A", range(10))
    assert tables.add("B", [0, 1, 2, 3, 4, 5, 6, 7, 99]) == 8
    assert tables.blocks["B"] == tables.blocks["A"][:2]
    assert tables.add("C", [0, 1, 2, 3, 4, 5, 6, 99, 8]) == 4
    assert tables.add("D", [1, 2, 3, 4]) == 0
    assert (tables.prefix.asked, tables.prefix.found) == (10 + 9 + 9 + 4, 12)
    assert tables.prefix.hit_rate == 12 / 32


def test_the_same_block_behind_another_beginning_is_another_block():
    tables = tables_of(prefix_caching=True)
    tables.add("A", [1] * 8)
    bring(tables, "A", [1] * 8)
    assert tables.add("B", [2] * 4 + [1] * 4 + [0]) == 0
    assert tables.add("C", [1] * 12) == 8


def test_a_prompt_that_is_known_whole_still_brings_its_last_token():
    tables = tables_of(prefix_caching=True)
    tables.add("A", range(8))
    bring(tables, "A", range(8))
    assert tables.add("B", range(8)) == 4
    assert tables.add("C", range(9)) == 8


def test_what_an_ended_sequence_left_is_found_until_its_room_is_needed_and_the_oldest_goes_first():
    tables = tables_of(blocks=4, prefix_caching=True)
    for name, start in (("A", 0), ("B", 50)):
        tables.add(name, range(start, start + 8))
        bring(tables, name, range(start, start + 8))
        tables.free(name)
    assert (tables.pool.free, len(tables.pool.idle)) == (4, 4)
    tables.add("C")
    bring(tables, "C", range(90, 98))  # takes A's room, its end first, then its beginning
    assert len(tables.pool.idle) == 2
    assert tables.add("A again", range(9)) == 0 and tables.add("B again", range(50, 59)) == 8


def test_of_one_prompt_the_end_is_given_up_before_the_beginning():
    tables = tables_of(blocks=4, prefix_caching=True)
    tables.add("A", range(12))
    bring(tables, "A", range(12))
    tables.free("A")
    tables.add("B")
    bring(tables, "B", range(90, 98))
    assert tables.add("A", range(13)) == 8


def test_a_block_that_is_cut_and_written_anew_is_not_taken_for_what_it_was():
    tables = tables_of(prefix_caching=True)
    tables.add("A", range(8))
    bring(tables, "A", range(8))
    tables.truncate(6, "A")
    bring(tables, "A", [77, 78, 79])
    assert tables.add("B", range(9)) == 4
    assert tables.add("C", [0, 1, 2, 3, 4, 5, 77, 78, 0]) == 8
