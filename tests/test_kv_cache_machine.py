"""Random operations on block tables. In place of keys and values, each slot remembers the whole
text up to its token, as its digest: that is what a key depends on. Whatever happens, a sequence
must find its own text in its blocks.
"""

from collections import Counter

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from clawdemy_infer.batching.swapping import SwappingTables
from clawdemy_infer.kv_cache import BlockPool

SIZE, BLOCKS, HOST = 3, 16, 5
TOKENS = st.integers(0, 1)              # two tokens only, so that prompts often begin alike


def digests(ids):
    return [hash(tuple(ids[:i + 1])) for i in range(len(ids))]


class Blocks(RuleBasedStateMachine):
    Tables = SwappingTables
    sequences = Bundle("sequences")
    swapped = Bundle("swapped")

    operations = 0

    def __init__(self):
        super().__init__()
        type(self).operations -= 1      # what always holds is asked once before the first
        self.tables = self.Tables(BlockPool(BLOCKS, SIZE), BlockPool(HOST, SIZE),
                                  prefix_caching=True)
        self.slots, self.host_slots = {}, {}
        self.ids = {}                   # the oracle: what each sequence holds
        self.names = 0

    # ---- bytes, as a cache would move them ----

    def copy(self, into, out_of):
        def move(sources, targets):
            for source, target in zip(sources, targets, strict=True):
                for offset in range(SIZE):
                    into[target, offset] = out_of.get((source, offset))
        return move

    def write(self, sequence, ids, written):
        """The first `written` of the new tokens reach their slots."""
        start = len(self.ids[sequence])
        for i, digest in enumerate(digests(self.ids[sequence] + ids)[start:start + written], start):
            self.slots[self.tables.blocks[sequence][i // SIZE], i % SIZE] = digest

    # ---- operations ----

    @rule(target=sequences, prompt=st.lists(TOKENS, max_size=14))
    def add(self, prompt):
        self.names += 1
        free, wanted = self.tables.pool.free, self.tables.blocks_to_add(len(prompt), prompt)
        found = self.tables.add(self.names, prompt)
        assert found <= max(0, len(prompt) - 1)
        needed = self.tables.blocks_needed({self.names: len(prompt) - found})
        assert wanted == free - self.tables.pool.free + needed      # found ones may have lain idle
        self.ids[self.names] = prompt[:found]
        return self.names

    @rule(sequence=sequences, ids=st.lists(TOKENS, min_size=1, max_size=14))
    def append(self, sequence, ids):
        self.step({sequence: ids})

    @rule(one=sequences, other=sequences, ids=st.lists(TOKENS, min_size=1, max_size=3))
    def append_to_two(self, one, other, ids):
        self.step({one: ids, other: [*ids[1:], 0]})

    def step(self, new):
        counts = {sequence: len(ids) for sequence, ids in new.items()}
        free, needed = self.tables.pool.free, self.tables.blocks_needed(counts)
        if not self.tables.can_append(counts):
            assert needed > free
            with pytest.raises(ValueError, match="more blocks are needed"):
                self.tables.reserve(counts)
            return
        self.tables.reserve(counts, self.copy(self.slots, self.slots))
        assert free - self.tables.pool.free == needed
        for sequence, ids in new.items():
            self.write(sequence, ids, len(ids))
        self.tables.commit(new)
        for sequence, ids in new.items():
            self.ids[sequence] = self.ids[sequence] + ids

    @rule(sequence=sequences, ids=st.lists(TOKENS, min_size=1, max_size=9), written=st.integers(
        0, 9))
    def interrupted_step(self, sequence, ids, written):
        if self.tables.can_append({sequence: len(ids)}):
            self.tables.reserve({sequence: len(ids)}, self.copy(self.slots, self.slots))
            self.write(sequence, ids, written)

    @rule(target=sequences, parent=sequences, children=st.integers(1, 3))
    def fork(self, parent, children):
        fresh = range(self.names + 1, self.names + 1 + children)
        for child in fresh:
            self.tables.fork(parent, child)
            self.ids[child] = self.ids[parent]
        self.names += children
        return multiple(*fresh)

    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        """It has ended, or is preempted to be computed anew."""
        self.tables.free(sequence)
        del self.ids[sequence]

    @rule(sequence=sequences, fraction=st.floats(0, 1))
    def truncate(self, sequence, fraction):
        length = int(fraction * len(self.ids[sequence]))
        self.tables.truncate(length, sequence)
        self.ids[sequence] = self.ids[sequence][:length]

    @rule(target=swapped, sequence=consumes(sequences))
    def swap_out(self, sequence):
        if self.tables.can_swap_out(sequence):
            self.tables.swap_out(sequence, self.copy(self.host_slots, self.slots))
        else:
            self.tables.free(sequence)
            self.tables.add(sequence)
            self.tables.swap_out(sequence)
            self.ids[sequence] = []
        return sequence

    @rule(target=sequences, sequence=consumes(swapped))
    def swap_in(self, sequence):
        if self.tables.can_swap_in(sequence):
            self.tables.swap_in(sequence, self.copy(self.slots, self.host_slots))
        else:
            self.tables.free(sequence)
            self.tables.add(sequence)
            self.ids[sequence] = []
        return sequence

    # ---- what always holds ----

    @invariant()
    def one_operation_more(self):
        type(self).operations += 1

    @invariant()
    def every_sequence_finds_its_own_text(self):
        for sequence, blocks in self.tables.blocks.items():
            ids = self.ids[sequence]
            assert self.tables.lengths[sequence] == len(ids)
            assert [self.slots.get((blocks[i//SIZE], i % SIZE))
                    for i in range(len(ids))] == digests(ids)

    @invariant()
    def free_and_used_are_all_there_is(self):
        for pool, blocks in ((self.tables.pool, BLOCKS), (self.tables.host, HOST)):
            assert pool.free + pool.used == blocks
            assert pool.used == sum(count > 0 for count in pool.ref_counts)

    @invariant()
    def a_block_counts_the_tables_that_point_at_it(self):
        pointers = Counter(block for blocks in self.tables.blocks.values() for block in blocks)
        assert self.tables.pool.ref_counts == [pointers[block] for block in range(BLOCKS)]
        host = Counter(
            block for swapped in self.tables.swapped.values() for block in swapped.blocks)
        assert self.tables.host.ref_counts == [host[block]
                                           for block in range(HOST)] and set(host.values()) <= {1}

    @invariant()
    def no_table_points_at_a_free_block(self):
        pool = self.tables.pool
        held = {block for blocks in self.tables.blocks.values() for block in blocks}
        assert held.isdisjoint(pool.idle) and len(pool.idle) <= pool.free

    @invariant()
    def a_sequence_has_blocks_for_all_its_tokens(self):
        for sequence, blocks in self.tables.blocks.items():
            assert len(blocks) >= self.tables.pool.blocks_for(len(self.ids[sequence]))

    def teardown(self):
        for sequence in [*self.tables.blocks, *self.tables.swapped]:
            self.tables.free(sequence)
        assert (self.tables.pool.used, self.tables.host.used) == (0, 0)
        taken = {self.tables.pool.allocate() for _ in range(BLOCKS)}
        assert taken == set(range(BLOCKS))              # and every block can be had again


# not every example takes all of its steps
BUDGET = settings(max_examples=250, stateful_step_count=60, deadline=None)


def test_blocks_are_conserved_and_hold_the_right_text_under_10_000_operations_in_any_sequence():
    run_state_machine_as_test(Blocks, settings=BUDGET)
    assert Blocks.operations >= 10_000


class DoubleFree(SwappingTables):
    def free(self, sequence):
        last = self.blocks.get(sequence, [])[-1:]
        super().free(sequence)
        for block in last:
            self.pool.release(block)


class ForkWithoutCounting(SwappingTables):
    def fork(self, parent, child):
        super().fork(parent, child)
        for block in self.blocks[child]:
            self.pool.ref_counts[block] -= 1


class NeverForgets(SwappingTables):
    """Writes into a block that the prefix cache knows, and leaves it known."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.prefix.forget = lambda block: None
        self.pool.on_evict = lambda block: None


class WritesToShared(SwappingTables):
    """No copy on write."""

    def reserve(self, num_new_tokens, copy=None):
        if not self.can_append(num_new_tokens):
            raise ValueError("num_new_tokens: there is no room")
        for sequence, T in num_new_tokens.items():
            blocks = self.blocks[sequence]
            while self.lengths[sequence] + T > len(blocks) * self.pool.block_size:
                blocks.append(self.pool.allocate())


class KeepsAfterTruncate(SwappingTables):
    """Takes a sequence that was cut for the text it had."""

    def truncate(self, length, sequence):
        self.lengths[sequence] = length


@pytest.mark.parametrize(
    "broken", [DoubleFree, ForkWithoutCounting, NeverForgets, WritesToShared, KeepsAfterTruncate])
def test_a_planted_mistake_is_caught(broken):
    machine = type("Broken", (Blocks,), {"Tables": broken})
    with pytest.raises((AssertionError, ValueError, IndexError)):
        run_state_machine_as_test(machine, settings=settings(BUDGET, database=None,
                                                             phases=[Phase.generate]))
