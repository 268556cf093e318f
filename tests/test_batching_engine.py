"""The engine on a model that runs: whatever neighbours, chunks, preemptions and interruptions a
request meets, its tokens are those it would get alone."""

import os
import signal
import threading
import time
import tracemalloc
from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engine import BLOCK, POLICIES, random_model
from token_prompts import with_tokens

from clawdemy_infer.batching import Policy, Request, State
from clawdemy_infer.batching.serving import engine
from clawdemy_infer.batching.torch_executor import TorchExecutor
from clawdemy_infer.fast.launches import count_ops
from clawdemy_infer.fast.watched import count_operations
from clawdemy_infer.model import Sampling, generate
from clawdemy_infer.rigs.workload import uniform, workload


@pytest.fixture(scope="module")
def small():
    return random_model()


def alone(model, prompt, count):
    """Greedy tokens without any cache or neighbour: the whole text anew for each."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt):]


def made(model, policy, blocks=16, **options):
    return engine(model, policy, kv_bytes=blocks*BLOCK, block_size=4, host_bytes=6*BLOCK, **options)


every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@every_policy
def test_tokens_are_those_of_a_request_alone(small, policy):
    requests = with_tokens(workload(uniform(1, 30), uniform(1, 20), requests=14, seed=4), 97,
                           shared=9)
    report = made(small, policy).run(requests)
    assert report.summary["finished"] == 14
    for sequence in report.sequences:
        assert sequence.tokens == alone(small, sequence.request.prompt, sequence.request.max_tokens)
    if policy.batching == "continuous":
        # else the test would not show what it is there for
        assert report.summary["preemptions"] > 0
    if policy.prefix_caching:
        assert report.summary["cached"] > 0


def storm(served, layer, random, rounds):
    """Requests come, go and are cancelled, and now and then Ctrl-C falls into the middle of a step.
    Returns all sequences, all over."""
    added, original = [], layer.forward

    def breaks(*args):
        if random.random() < 0.1:
            raise KeyboardInterrupt
        return original(*args)

    layer.forward = breaks
    try:
        for _ in range(rounds):
            for _ in range(random.choice([0, 0, 1, 2])):
                prompt = [random.randrange(3) for _ in range(random.randrange(24))]
                added.append(served.add(Request(len(added), prompt, random.randint(1, 14))))
            if added and random.random() < 0.15:
                served.cancel(random.randrange(len(added)))
            try:
                served.step()
            except KeyboardInterrupt:
                pass
        layer.forward = original
        served.run()
    finally:
        layer.__dict__.pop("forward", None)
    return added


@given(st.sampled_from(list(POLICIES)), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_storm_on_the_model_leaks_no_block_and_changes_no_token(small, name, random):
    served = made(small, POLICIES[name], blocks=8)
    added = storm(served, small.layers[1], random, rounds=30)
    tables = served.scheduler.tables
    assert tables.pool.free == 8 and not tables.lengths and all(
        sequence.over for sequence in added)
    for sequence in added:
        if sequence.state is State.FINISHED:
            assert sequence.generated == sequence.request.max_tokens
        assert sequence.tokens == alone(small, sequence.request.prompt, sequence.generated)
    assert not served.executor.writers and not served.executor.generators


def pressed(work, seconds):
    """Do `work()`, press Ctrl-C after so many seconds, and say whether it was interrupted."""
    pressing = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    try:
        pressing.start()
        work()
        pressing.join()  # too late for the work: it strikes here
    except KeyboardInterrupt:
        return True
    return False


@every_policy
def test_ctrl_c_stops_between_two_steps_and_all_goes_on_after_it(small, policy):
    requests = with_tokens(workload(uniform(1, 30), uniform(10, 20), requests=12, seed=4), 97)
    served = made(small, policy)
    sequences = [served.add(request) for request in requests]
    assert all(pressed(lambda: [served.step() for _ in range(3)], 0.003 * i) for i in range(1, 9))
    served.run()
    assert served.scheduler.tables.pool.free == 16
    for sequence in sequences:
        assert sequence.tokens == alone(small, sequence.request.prompt, sequence.request.max_tokens)


def test_ctrl_c_in_the_middle_of_a_step_waits_for_its_end(small):
    served, layer = made(small, POLICIES["continuous"]), small.layers[0]
    one = served.add(Request("one", [1, 2, 3], 5))

    def pressing(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return type(layer).forward(layer, *arguments)

    layer.forward = pressing
    try:
        with pytest.raises(KeyboardInterrupt):
            served.step()
    finally:
        del layer.forward
    assert one.generated == len(served.steps) == 1                  # the step was done, all of it
    served.run()
    assert one.tokens == alone(small, [1, 2, 3], 5)


def test_two_thousand_requests_leave_nothing_behind(small):
    """With cancels, and interrupts in the middle of steps. The memory of Python's objects is flat
    once the first hundreds are over."""
    random, served, layer, held = Random(0), made(small, POLICIES["prefixes"],
                                                  blocks=24), small.layers[1], []

    def breaks(*arguments):
        if random.random() < 0.03:
            raise KeyboardInterrupt
        return type(layer).forward(layer, *arguments)

    layer.forward = breaks
    tracemalloc.start()
    try:
        for batch in range(20):
            for i in range(100):
                served.add(
                    Request((batch, i), [random.randrange(5) for _ in range(random.randint(1, 12))],
                            random.randint(1, 5)))
            while served.busy:
                if random.random() < 0.1:
                    served.cancel((batch, random.randrange(100)))
                try:
                    served.step()
                except KeyboardInterrupt:
                    pass
            summary = served.report().summary
            assert summary["finished"] + summary["cancelled"] == 100 and summary["finished"] > 50
            assert served.scheduler.tables.pool.free == 24
            assert not served.sequences and not served.executor.writers
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        del layer.forward
    assert max(held[10:]) < 1.1 * max(held[:10]) + 20_000


def test_an_interrupted_engine_can_be_cleared(small):
    served = made(small, POLICIES["chunked"])
    for request in with_tokens(workload(uniform(1, 30), uniform(1, 20), requests=14, seed=4), 97):
        served.add(request)
    for _ in range(7):
        served.step()
    served.cancel_all()
    assert not served.busy and served.scheduler.tables.pool.free == 16
    assert {sequence.state
            for sequence in served.sequences.values()} <= {State.FINISHED, State.CANCELLED}
    prompt = [5, 6, 7]
    assert served.run([Request("next", prompt, 4)]).sequences[-1].tokens == alone(small, prompt, 4)


def test_sampling_draws_as_generate_does_whoever_is_beside(small):
    hot = [Sampling(1.0, seed=seed) for seed in range(5)]
    served = made(small, POLICIES["chunked"])
    report = served.run(
        [Request(i, [i, 7, 8, 9]*3, 12, sampling=sampling) for i, sampling in enumerate(hot)])
    for sequence in report.sequences:
        request = sequence.request
        assert sequence.tokens == generate(small, request.prompt, 12, request.sampling).tokens
    assert report.summary["preemptions"] > 0


def test_requests_come_when_they_say_and_tokens_take_time(small):
    report = made(small, POLICIES["continuous"]).run(
        [Request("a", [1, 2], 3, 0.0), Request("b", [3], 2, 0.15)])
    a, b = sorted(report.sequences, key=lambda sequence: sequence.arrival_s)
    assert b.arrival_s == pytest.approx(
        0.15, abs=0.05) and b.token_times[0] > 0.15 and a.token_times[0] > 0
    assert report.summary["seconds"] == pytest.approx(max(a.token_times[-1], b.token_times[-1]),
                                                      abs=1e-3)
    # two, if the machine was so slow that they met
    assert report.summary["kv_peak_bytes"] in (BLOCK, 2 * BLOCK)


def test_a_second_run_counts_its_arrivals_from_its_own_beginning(small):
    served = made(small, POLICIES["continuous"])
    served.run([Request("a", [1, 2], 3, 0.0)])
    time.sleep(0.2)
    [b] = served.run([Request("b", [1, 2], 3, 0.0)]).sequences
    assert b.arrival_s > 0.2 and b.token_times[0] > b.arrival_s


def test_the_engine_holds_what_it_was_given(small):
    served = made(small, POLICIES["continuous"])
    assert served.executor.cache.allocated_bytes == 16 * BLOCK
    swapping = made(small, POLICIES["swap"]).executor.cache
    assert swapping.allocated_bytes == 16 * BLOCK
    assert sum(each.nbytes for each in swapping.host) == 6 * BLOCK
    with pytest.raises(ValueError, match="kv_bytes"):
        made(small, Policy(), blocks=0.9)
    with pytest.raises(ValueError, match="no tokenizer"):
        served.add(Request("text", "Hello", 3))
    with pytest.raises(ValueError, match="0 to V-1 = 96"):
        served.add(Request("far", [97], 3))
    assert not served.busy


@pytest.mark.parametrize("name", ["continuous", "chunked", "static"])
def test_operations_are_counted_as_the_steps_dispatch_them(small, name):
    """Of steps of other sizes than those that were counted."""
    counted, served, seen = count_operations(small, POLICIES[name]), made(
        small, POLICIES[name], blocks=64), []
    for request in with_tokens(workload(uniform(5, 9), uniform(9, 9), requests=6, seed=4), 97):
        served.add(request)

    def run(plan):
        result = []
        expected = counted.of(1 if plan.padded else len(set(plan.num_new_tokens.values())))
        ops = count_ops(lambda: result.append(TorchExecutor.run(served.executor, plan)))
        seen.append((expected, ops))
        return result[0]

    served.executor.run = run
    served.run()
    assert len(seen) > 12
    for expected, ops in seen:
        # choosing tokens takes some, and in two layers that shows
        assert ops == pytest.approx(expected, rel=0.12)


# ---- the real model ----


def test_text_stops_as_generate_says_and_comes_in_pieces(smollm):
    prompts = {
        "a": "The capital of France is", "b": "Once upon a time, there was",
        "c": "1, 2, 3, 4, 5, 6,"
    }
    served = engine(smollm, Policy(max_batch=2, token_budget=8), kv_bytes=2**25)
    served.add(Request("b", prompts["b"], 7))
    served.add(Request("a", prompts["a"], 10, stop=("Paris",)))
    asked, texts = served.add(Request("c", prompts["c"], 6)), [""]
    while not asked.over:
        served.step()
        texts += [asked.text] * (asked.text != texts[-1])
    found = {sequence.request.id: sequence for sequence in served.run().sequences}
    for id, sequence in found.items():
        stop = sequence.request.stop
        expected = generate(smollm, prompts[id], sequence.request.max_tokens, stop=stop)
        assert (sequence.tokens, sequence.text, sequence.reason) == (expected.tokens, expected.text,
                                                                     expected.finish_reason)
    assert found["a"].reason == "stop" and len(texts) > 3
    assert all(text.startswith(before) for before, text in pairwise(texts))


def test_an_end_of_sequence_token_ends_a_request_unless_its_length_is_given(smollm):
    chat = smollm.tokenizer.chat([{"role": "user", "content": "Say only: yes"}])
    served = engine(smollm, Policy(max_batch=2), kv_bytes=2**26)
    free, forced = served.run(
        [Request("free", chat, 40),
         Request("forced", chat, 40, output_tokens=25)]).sequences
    assert free.reason == "eos" and free.tokens[-1] in smollm.config.eos_ids and free.generated < 25
    assert forced.reason == "length" and forced.generated == 25
    assert forced.tokens[:free.generated] == free.tokens
