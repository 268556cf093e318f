"""The scheduler, on a machine that a reader can do in the head: who runs, who waits, who gives way,
and that nothing is ever lost."""

from itertools import count as counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawdemy_infer.batching import Engine, Policy, Request, Sequence, State
from clawdemy_infer.batching.plan import Emission
from clawdemy_infer.batching.serving import scheduler_for
from clawdemy_infer.batching.simulator import RooflineExecutor


class ByHand:
    """A second for each token that is computed, whoever it belongs to."""

    def seconds(self, contexts, chunks, drafted=0):
        return float(len(contexts) + sum(T for T, _ in chunks))

    def padded(self, B, T, S):
        return float(B * T)


class WithKeys(ByHand):
    """And a 64th of a second for each key that is seen, so that every step takes longer than the
    one before."""

    def seconds(self, contexts, chunks, drafted=0):
        keys = sum(contexts) + sum(S for _, S in chunks)
        return super().seconds(contexts, chunks) + keys / 64

    def padded(self, B, T, S):
        return B * T + B * S / 64


def engine(policy, blocks=64, block_size=4, host=0, executor=RooflineExecutor, max_context=None,
           cost=ByHand, **options):
    """An engine on the clock of `cost`."""
    scheduler = scheduler_for(policy, blocks, block_size, host, max_context)
    made = Engine(scheduler, executor(cost(), scheduler.tables, **options))
    if policy.preemption == "swap":
        scheduler.swapper = made.executor
    steps = counter()

    def step():
        assert next(steps) < 20_000, "it goes round and round"
        return type(made).step(made)

    made.step = step
    return made


def times(report):
    return {sequence.request.id: sequence.token_times for sequence in report.sequences}


# ---- by hand ----


def test_a_static_batch_pads_and_waits_for_its_longest():
    served = engine(Policy("static", max_batch=2))
    report = served.run([Request("a", 4, 3, 0.0), Request("b", 2, 5, 0.0), Request("c", 1, 1, 0.0)])
    # All but the last token of each prompt, as wide as a's 3: 2 rows of 3 tokens, 6 s. Then two
    # rows a step, 2 s, until b has its five. c waits for both. Of 6 + 10 tokens computed, 3 + 1 and
    # 3 + 5 were wanted.
    assert times(report) == {"a": [8, 10, 12], "b": [8, 10, 12, 14, 16], "c": [17]}
    assert report.summary["wasted"] == pytest.approx(1 - (12 + 1) / (16 + 1))
    assert report.summary["seconds"] == 17


def test_a_static_batch_is_as_large_as_its_rectangle_of_blocks_allows():
    """The last token is never brought: 4 + 5 - 1 tokens are two blocks of 4. And a rectangle is as
    long as the longest prompt and the longest output together: 8 + 8 - 1 are four."""
    for blocks, requests, together, taken in (
            (4, [(4, 5)] * 3, 2, 4), (7, [(8, 1), (2, 8)], 1, 2), (8, [(8, 1), (2, 8)], 2, 8)):
        report = engine(Policy("static"), blocks).run(
            [Request(i, prompt, output, 0.0) for i, (prompt, output) in enumerate(requests)])
        assert (report.steps[0].sequences, report.steps[0].blocks) == (together, taken)
        assert [sequence.state for sequence in report.sequences] == [State.FINISHED] * len(requests)


def test_a_static_step_is_charged_for_the_context_that_its_new_token_is_part_of():
    """Four tokens of the prompt over four, then its last over five, and one over six."""
    report = engine(Policy("static"), cost=WithKeys).run([Request("a", 5, 2, 0.0)])
    assert times(report)["a"] == [4 + 4/64 + 1 + 5/64, 4 + 4/64 + 1 + 5/64 + 1 + 6/64]


class Asked(ByHand):
    """What a step is charged for, call by call."""

    def __init__(self):
        self.calls = []

    def seconds(self, contexts, chunks=(), drafted=0):
        self.calls.append((list(contexts), list(chunks), drafted))
        return 1.0


def test_chunks_and_new_tokens_are_charged_for_the_contexts_that_they_end():
    asked = Asked()
    engine(Policy(max_batch=2, token_budget=3), cost=lambda: asked).run([Request("a", 5, 3, 0.0)])
    assert asked.calls == [([], [(3, 3)], 0), ([], [(2, 5)], 0), ([6], [], 0), ([7], [], 0)]


def test_drafted_tokens_are_charged_to_the_draft_one_by_one_and_to_the_step_at_once():
    """a may have two drafted tokens and b, which ends with its third token, one; all are accepted.
    Then a has one token to go beside its own."""
    asked, draft = Asked(), Asked()
    engine(Policy(gamma=2), cost=lambda: asked, alpha=1.0, draft=draft).run(
        [Request("a", 4, 6, 0.0), Request("b", 4, 3, 0.0)])
    assert asked.calls == [([], [(4, 4), (4, 4)], 0), ([], [(3, 7), (2, 6)], 3),
                           ([], [(2, 9)], 1)]
    assert [contexts for contexts, _, _ in draft.calls] == [[5, 5], [6], [8]]


def test_time_does_not_run_back_to_an_arrival_that_was_missed():
    made = engine(Policy())
    report = made.run([Request("a", 4, 1, 0.0), Request("b", 4, 1, 1.0)])
    assert times(report) == {"a": [4.0], "b": [8.0]}


def test_blocks_are_paid_for_on_their_way_out_and_on_their_way_back():
    """A block takes a second. b is swapped out before the second step, and back after a's end."""
    report = engine(Policy(preemption="swap"), blocks=3, host=3, block_bytes=10.0,
                    swap_bytes_per_s=10.0).run([Request("a", 4, 3, 0.0), Request("b", 4, 3, 0.0)])
    assert times(report) == {"a": [8, 8 + 1 + 1, 11], "b": [8, 11 + 1 + 1, 14]}


@pytest.mark.parametrize("blocks, joins", [(4, False), (5, True)])
def test_a_swapped_sequence_comes_back_where_a_block_stays_free_for_each_that_runs(blocks, joins):
    """One runs with two blocks, and the other needs two."""
    scheduler = scheduler_for(Policy(preemption="swap"), blocks, 4, host_blocks=2)
    scheduler.swapper = tables = scheduler.tables
    runs, waits = (Sequence(Request(name, tokens, 9), tokens + 1) for name, tokens in
                   (("runs", 7), ("waits", 4)))
    for sequence in (waits, runs):
        tables.add(sequence)
        tables.reserve({sequence: sequence.total - 1})
        tables.commit({sequence: range(sequence.total - 1)})
        if sequence is waits:
            tables.swap_out(waits)
    scheduler.running, scheduler.waiting = [runs], [waits]
    assert set(scheduler.schedule(0.0).num_new_tokens) == ({runs, waits} if joins else {runs})


def test_a_known_length_ends_a_request_no_later_than_its_limit():
    report = engine(Policy()).run([Request("short", 4, 9, 0.0, output_tokens=2),
                                   Request("long", 4, 3, 0.0, output_tokens=9)])
    assert [each["tokens"] for each in report.requests] == [2, 3]


def test_who_is_given_up_before_arriving_is_given_up_on_arrival():
    made = engine(Policy())
    sequence = made.add(Request("late", 4, 3, 5.0))
    made.cancel("late")
    assert sequence.history == [(5.0, State.WAITING), (5.0, State.CANCELLED)]


def test_a_report_tells_of_what_no_report_has_told_before():
    made = engine(Policy())
    first, second = (made.run([Request(name, 4, 2, 0.0)]) for name in "ab")
    assert [len(report.steps) for report in (first, second)] == [2, 2]
    assert [[each["id"] for each in report.requests] for report in (first, second)] == [["a"],
                                                                                        ["b"]]


def test_a_request_that_just_fills_the_context_is_served():
    report = engine(Policy(), max_context=12).run([Request("fits", 8, 4, 0.0),
                                                   Request("does not", 9, 4, 0.0)])
    assert [sequence.state for sequence in report.sequences] == [State.FINISHED, State.REFUSED]


def test_what_the_prefix_cache_had_on_admission_is_not_counted_anew_after_a_preemption():
    """Both need a second block, and one is free: b gives way, and finds its first block again."""
    report = engine(Policy(prefix_caching=True), blocks=3).run(
        [Request("a", [1, 2, 3, 4], 3, 0.0), Request("b", [5, 6, 7, 8], 3, 0.0)])
    assert [(each["preemptions"], each["cached_tokens"]) for each in report.requests] == [(0, 0),
                                                                                          (1, 0)]


def test_a_continuous_batch_lets_go_and_lets_in_after_every_step():
    report = engine(Policy(max_batch=2)).run(
        [Request("a", 4, 3, 0.0),
         Request("b", 2, 5, 0.0),
         Request("c", 1, 1, 0.0)])
    # Both prompts whole: 6 s, and two first tokens. Two steps of 2 s end a; c joins b for one step,
    # and b is alone for one more.
    assert times(report) == {"a": [6, 8, 10], "b": [6, 8, 10, 12, 13], "c": [12]}
    assert report.summary["wasted"] == 0
    assert report.summary["output_tokens_per_s"] == pytest.approx(9 / 13)


def test_chunks_keep_a_long_prompt_from_stalling_the_others():
    requests = [Request("short", 2, 6, 0.0), Request("long", 20, 2, 1.0)]
    whole, chunked = (times(engine(Policy(max_batch=2, token_budget=budget)).run(requests))
                      for budget in (None, 5))
    assert whole == {"short": [2, 23, 25, 26, 27, 28], "long": [23, 25]}        # a gap of 21 s
    # One token of `short` and four of the prompt a step, 5 s; the fifth chunk brings the first
    # token.
    assert chunked == {"short": [2, 7, 12, 17, 22, 27], "long": [27, 28]}


def test_a_chunk_of_one_token_is_a_chunk():
    report = engine(Policy(max_batch=2, token_budget=2)).run(
        [Request("a", 1, 6, 0.0), Request("b", 5, 1, 0.0)])
    # Two tokens a step, 2 s: one of a, and one of b's prompt, which is whole after five of them.
    assert times(report) == {"a": [2, 4, 6, 8, 10, 11], "b": [10]}


def test_who_cannot_grow_preempts_whoever_came_last():
    # Three blocks of four tokens. Both prompts fill a block; a takes the third for its 5th token,
    # and then b finds none for its own.
    requests = [Request("a", 4, 6, 0.0), Request("b", 4, 6, 0.0)]
    report = engine(Policy(max_batch=2), blocks=3).run(requests)
    # Step 2 needs two blocks where one is free. b gives way before it has a second token; a goes on
    # alone, 1 s a step, and ends after its sixth token at 13. b brings its 4 + 1 tokens anew: 5 s,
    # and then four more of 1 s.
    assert times(report) == {"a": [8, 9, 10, 11, 12, 13], "b": [8, 18, 19, 20, 21, 22]}
    assert [sequence.preemptions for sequence in report.sequences] == [0, 1]


def test_a_swapped_sequence_brings_nothing_anew():
    requests = [Request("a", 4, 6, 0.0), Request("b", 4, 6, 0.0)]
    report = engine(Policy(max_batch=2, preemption="swap"), blocks=3, host=4).run(requests)
    assert times(report) == {"a": [8, 9, 10, 11, 12, 13], "b": [8, 14, 15, 16, 17, 18]}


def test_whoever_waits_first_takes_the_place_of_a_preempted_one():
    policy = Policy(max_batch=3, order="priority")
    served = engine(policy, blocks=9)
    report = served.run([
        Request("a", 4, 4, 0.0, priority=1),
        Request("b", 4, 4, 0.0, priority=1),
        Request("big", 20, 6, 0.0, priority=2),
        Request("urgent", 1, 1, 1.0)
    ])
    # The prompts take 28 s and seven blocks. Three more are needed, so `big` gives up its five. a
    # and b go on, 2 s; `urgent` joins, 3 s.
    found = times(report)
    assert found["a"] == found["b"] == [28, 30, 33, 35] and found["urgent"] == [33]
    assert len(found["big"]) == 6


def test_cancelling_a_swapped_sequence_gives_the_host_its_blocks_back():
    served = engine(Policy(max_batch=2, preemption="swap"), blocks=3, host=4)
    a, b = (served.add(Request(name, 4, 6)) for name in "ab")
    while b.state is not State.PREEMPTED:
        served.step()
    assert served.scheduler.tables.host.free == 3
    served.cancel("b")
    assert served.scheduler.tables.host.free == 4 and b.generated == 1
    served.run()
    assert a.generated == 6 and served.scheduler.tables.pool.free == 3


def test_priority_goes_before_arrival_and_is_ignored_by_fcfs():
    requests = [
        Request("first", 1, 2, 0.0),
        Request("slow", 1, 1, 0.0, priority=2),
        Request("urgent", 1, 1, 0.5)
    ]
    assert times(engine(
        Policy(max_batch=1)).run(requests)) == {"first": [1, 2], "slow": [3], "urgent": [4]}
    assert times(engine(
        Policy(max_batch=1,
               order="priority")).run(requests)) == {"first": [1, 2], "slow": [4], "urgent": [3]}


def test_a_shared_prefix_is_computed_once():
    system, policy = list(range(100, 108)), Policy(max_batch=2, prefix_caching=True)
    report = engine(policy).run(
        [Request("a", [*system, 1, 2], 1, 0.0),
         Request("b", [*system, 3], 1, 20.0)])
    # two blocks of four are found: one token is left
    assert times(report) == {"a": [10], "b": [21]}
    assert [row["cached_tokens"] for row in report.requests] == [0, 8]


def test_a_request_that_waits_ten_steps_asks_the_prefix_cache_once():
    served = engine(Policy(max_batch=2, prefix_caching=True), blocks=4)
    # a's prompt fills a block of four, and is the beginning of b's twelve tokens. These need three
    # blocks, or two behind a's, and one must stay free for a, which grows to four: b waits for it.
    report = served.run([Request("a", [1, 2, 3, 4], 10, 0.0),
                         Request("b", [1, 2, 3, 4, *range(10, 18)], 1, 0.0)])
    assert [step.tokens for step in report.steps] == [4, *[1] * 9, 8]
    prefix = served.scheduler.tables.prefix
    assert (prefix.asked, prefix.found, prefix.hit_rate) == (4 + 12, 4, 4 / 16)


@pytest.mark.parametrize("prompt, most, words", [
    (0, 5, "the prompt is empty"),
    (10, 11, "prompt has 10 tokens and max_tokens=11: together 21, but the model's context is 20"),
    (9, 9,
     "prompt has 9 tokens and max_tokens=9: together 18, for which 5 blocks of 4 tokens may be "
     "needed, but there are 4"),
])
def test_what_can_never_run_is_refused_on_arrival_with_the_numbers(prompt, most, words):
    served = engine(Policy(), blocks=4, max_context=20)
    report = served.run([Request("never", prompt, most, 1.0), Request("fine", 9, 8, 0.0)])
    never, fine = sorted(report.sequences, key=lambda sequence: sequence.state, reverse=True)
    assert never.state is State.REFUSED and words in never.reason
    assert fine.generated == 8


@pytest.mark.parametrize("wrong, named",
                         [({"batching": "magic"}, "batching='magic'"),
                          ({"max_batch": 0}, "max_batch=0"),
                          ({"token_budget": 15}, "token_budget=15"),
                          ({"order": "lifo"}, "order='lifo'"),
                          ({"preemption": "drop"}, "preemption='drop'"),
                          ({"batching": "static", "prefix_caching": True}, "prefix_caching=True"),
                          ({"batching": "static", "gamma": 2}, "gamma=2"),
                          ({"gamma": -1}, "gamma=-1"), ])
def test_a_policy_that_makes_no_sense_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        Policy(**wrong)


@pytest.mark.parametrize("caching", [False, True])
def test_accepted_tokens_come_at_once_and_none_is_drafted_beyond_the_end(caching):
    policy = Policy(max_batch=1, gamma=3, prefix_caching=caching)
    # The prompt takes 4 s. All accepted: twice four rows, 4 s, bring four tokens. All rejected: the
    # same 4 s bring one, until fewer are left.
    accepted, rejected = (engine(policy, alpha=alpha).run([Request("a", 4, 9, 0.0)])
                          for alpha in (1.0, 0.0))
    assert times(accepted) == {"a": [4, 8, 8, 8, 8, 12, 12, 12, 12]}
    assert times(rejected) == {"a": [4, 8, 12, 16, 20, 24, 27, 29, 30]}
    both = [report.summary for report in (accepted, rejected)]
    assert [summary["wasted"] for summary in both] == pytest.approx([0, 1 - 12/30])
    assert [(summary["drafted"], summary["accepted"]) for summary in both] == [(6, 6), (18, 0)]


def test_drafted_tokens_take_what_blocks_and_budget_leave_and_nobody_gives_way_for_one():
    requests = [Request("a", 3, 6, 0.0), Request("b", 3, 3, 0.0)]
    report = engine(Policy(max_batch=2, gamma=4), blocks=3, alpha=1.0).run(requests)
    # Three blocks of four tokens. The prompts, 6 s, leave a place in each of two. a drafts four and
    # takes the third block for them; one draft would be of use to b, but its own place is for its
    # own token. Six rows, 6 s, end a, and b has its last a second later.
    assert times(report) == {"a": [6, 12, 12, 12, 12, 12], "b": [6, 12, 13]}
    assert report.summary["preemptions"] == 0
    # Four tokens a step. A prompt goes first: a row of a's and three of b's prompt. Then a's row
    # and b's leave two for a's drafts.
    report = engine(Policy(max_batch=2, token_budget=4, gamma=4),
                    alpha=0.0).run([Request("a", 2, 5, 0.0),
                                    Request("b", 3, 2, 1.0)])
    assert times(report) == {"a": [2, 6, 10, 12, 13], "b": [6, 10]}


def test_an_id_is_used_once_and_an_unknown_one_is_not_cancelled():
    served = engine(Policy())
    served.add(Request("a", 1, 1))
    with pytest.raises(ValueError, match="id='a'"):
        served.add(Request("a", 1, 1))
    with pytest.raises(ValueError, match="id='b'"):
        served.cancel("b")


# ---- whatever happens ----


class Remembers(RooflineExecutor):
    """A fake model over real blocks: tokens are written to the slots that the tables say, and the
    next one depends on all that can be read back from them. It can be made to break off a step,
    before its tokens count or after.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.memory, self.host_memory, self.breaks = {}, {}, None

    def tokens(self, request):
        return len(request.prompt), list(request.prompt)

    def run(self, plan):
        tables, size, brought, emitted = self.tables, self.tables.pool.block_size, {}, {}
        drafts = plan.num_lookahead_tokens
        tables.reserve({sequence: count + drafts.get(sequence, 0)
                        for sequence, count in plan.num_new_tokens.items()})
        for sequence, count in plan.num_new_tokens.items():
            begin, most, guess = tables.lengths[sequence], drafts.get(sequence, 0), []
            for i in range(most):               # right, but for one in three
                guess.append(following(sequence.ids + guess) + (sequence.total + i) % 3 // 2)
            brought[sequence] = sequence.ids[begin:begin + count] + guess
            for i, token in enumerate(brought[sequence], begin):
                self.memory[tables.blocks[sequence][i // size], i % size] = token
            held = [
                self.memory[tables.blocks[sequence][i//size], i % size]
                for i in range(begin + count + most)
            ]
            if begin + count == sequence.total:
                said = [following(held[:begin + count + i]) for i in range(most + 1)]
                accepted = next((i for i in range(most) if guess[i] != said[i]), most)
                emitted[sequence] = Emission(said[:accepted + 1], num_tokens=accepted + 1,
                                             num_draft_tokens=most)
        self._maybe("before")
        self.time += len(plan.num_new_tokens)
        tables.commit(brought)
        self._maybe("after")
        return emitted

    def _maybe(self, moment):
        if self.breaks == moment:
            self.breaks = None
            raise KeyboardInterrupt

    def swap_out(self, sequence):
        self.tables.swap_out(sequence,
                             lambda old, new: self._copy(self.memory, old, self.host_memory, new))

    def swap_in(self, sequence):
        self.tables.swap_in(sequence,
                            lambda old, new: self._copy(self.host_memory, old, self.memory, new))

    def _copy(self, here, old, there, new):
        for source, target in zip(old, new, strict=True):
            for offset in range(self.tables.pool.block_size):
                there[target, offset] = here.get((source, offset))


def following(tokens):
    """What the fake model says after these tokens."""
    value = 7
    for token in tokens:
        value = (value * 31 + token) % 10_007
    return value % 50


def alone(prompt, count):
    """What it says to somebody who is alone."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens[len(prompt):]


BLOCKS = 7
policies = st.builds(Policy, batching=st.just("continuous"), max_batch=st.integers(
    1, 5), token_budget=st.none() | st.integers(5, 9), order=st.sampled_from(
        ["fcfs", "priority"]), preemption=st.sampled_from(["recompute", "swap"]),
                     prefix_caching=st.booleans(), gamma=st.integers(0, 5),
                     ) | st.builds(Policy, batching=st.just("static"), max_batch=st.integers(1, 5))
prompts = st.lists(st.integers(0, 2), max_size=20)  # few different tokens: prefixes meet
events = st.lists(
    st.tuples(st.just("add"), prompts, st.integers(1, 12), st.integers(0, 2))
    | st.tuples(st.just("cancel"), st.integers(0, 30))
    | st.tuples(st.just("steps"), st.integers(1, 6))
    | st.tuples(st.just("break"), st.sampled_from(["before", "after"])),
    max_size=40,
)


@given(policies, events)
@settings(max_examples=150, deadline=None)
def test_a_storm_leaks_no_block_sticks_nowhere_and_changes_no_token(policy, events):
    served = engine(policy, BLOCKS, 4, host=3, executor=Remembers, max_context=26)
    tables, added = served.scheduler.tables, []
    for kind, *what in events:
        if kind == "add":
            added.append(served.add(Request(len(added), what[0], what[1], priority=what[2])))
        elif kind == "cancel" and what[0] < len(added):
            served.cancel(what[0])
        elif kind == "steps":
            for _ in range(what[0]):
                served.step()
        elif kind == "break" and served.busy:
            served.executor.breaks = what[0]
            with pytest.raises(KeyboardInterrupt):
                while served.busy:
                    served.step()
                raise KeyboardInterrupt  # nothing was left to be broken
            served.executor.breaks = None
        assert tables.pool.free + sum(count > 0 for count in tables.pool.ref_counts) == BLOCKS
    for _ in range(3000):
        if not served.busy:
            break
        served.step()
    assert not served.busy and all(sequence.over for sequence in added)
    if policy.batching == "static":
        served.step()
    assert tables.pool.free == BLOCKS and not tables.lengths
    assert policy.preemption != "swap" or (tables.host.free == 3 and not tables.swapped)
    for sequence in added:
        prompt, most = sequence.request.prompt, sequence.request.max_tokens
        never = not prompt or len(prompt) + most > 26 or -(-(len(prompt) + most - 1) // 4) > BLOCKS
        assert (sequence.state is State.REFUSED) == never
        if sequence.state is State.FINISHED:
            assert sequence.generated == most
        assert sequence.tokens == alone(prompt, sequence.generated)
        assert sequence.token_times == sorted(sequence.token_times)


traces = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 12), st.floats(0, 60), st.integers(0, 2)),
    min_size=1, max_size=14)
simulated = st.builds(Policy, batching=st.just("continuous"), max_batch=st.integers(
    1, 5), token_budget=st.none() | st.integers(5, 9), order=st.sampled_from(["fcfs", "priority"]),
                      preemption=st.sampled_from(["recompute", "swap"])
                      ) | st.builds(Policy, batching=st.just("static"), max_batch=st.integers(1, 5))


def served_by(policy, trace):
    made = engine(policy, 8, 4, host=3, cost=WithKeys)
    return made, made.run(
        [Request(i, P, T, at, priority=first) for i, (P, T, at, first) in enumerate(trace)])


@given(simulated, traces)
@settings(max_examples=60, deadline=None)
def test_no_step_breaks_the_limits_and_all_work_is_done(policy, trace):
    made, report = served_by(policy, trace)
    assert all(step.sequences <= policy.max_batch for step in report.steps)
    assert all(step.blocks <= 8 for step in report.steps)
    if policy.token_budget:
        assert all(step.tokens <= policy.token_budget for step in report.steps)
    if policy.batching == "static":
        assert report.summary["preemptions"] == 0
    # every token of every prompt once, and every output but the last
    if not report.summary["preemptions"]:
        assert sum(step.tokens for step in report.steps) == sum(
            P + T - 1 for P, T, *_ in trace)
    assert all(first.end_s <= second.start_s
               for first, second in zip(report.steps, report.steps[1:], strict=False))
    if policy.order == "fcfs" and policy.token_budget is None and policy.batching == "continuous":
        begun = [s.history[1][0] for s in sorted(report.sequences, key=lambda s: s.rank)]
        assert begun == sorted(begun)
    assert made.scheduler.tables.pool.free == 8
