"""One bad request costs itself and nobody else: logits that are NaN or infinite, keys that are
lost, callbacks that raise, Ctrl-C."""

import signal
from dataclasses import replace
from hashlib import sha256
from itertools import product
from math import inf, nan
from random import Random

import pytest
import torch
from small_engine import BLOCK, POLICIES, random_model

from clawdemy_infer.batching import Policy, Request, State
from clawdemy_infer.batching.serving import engine
from clawdemy_infer.batching.torch_executor import TorchExecutor
from clawdemy_infer.kv_cache import ContiguousCache, PagedCache, prefix_cache
from clawdemy_infer.model import Decoder, ModelConfig, Sampling, generate
from clawdemy_infer.model.writing import Writer
from clawdemy_infer.speculative import (
    ModelDraft,
    PromptLookup,
    speculate,
    speculate_batch,
)
from clawdemy_infer.speculative.engine import engine as speculating
from clawdemy_infer.variants.int4_cache import KiviCache
from clawdemy_infer.variants.sliding_cache import SlidingWindowCache

LOST = 96
"""A token whose embedding is NaN: whoever has it in the prompt has NaN in its keys."""
POLICIES = POLICIES | {
    "speculation": Policy(max_batch=4, gamma=3),
    "speculation in few blocks": Policy(max_batch=4, token_budget=9, prefix_caching=True, gamma=3),
}


class Letters:
    """A tokenizer whose tokens are single characters."""

    def decode(self, ids):
        return "".join(chr(33 + token) for token in ids)


@pytest.fixture(scope="module")
def small():
    model = random_model(tied=False)
    model.head.weight[LOST] = 0             # never the likeliest
    model.embed.weight[LOST] = nan
    model.tokenizer = Letters()
    return model


def made(model, policy, blocks=16, draft=None):
    options = {"kv_bytes": blocks * BLOCK, "block_size": 4, "host_bytes": 6 * BLOCK}
    if policy.gamma:
        return speculating(model, draft or PromptLookup(), policy, **options)
    return engine(model, policy, **options)


def spoiled(served, spoil):
    """Before each step of the model, NaN goes to all slots of the pool that hold no token; behind
    it, `spoil(sequence, tokens it has)` may name a number that takes the place of its logits."""
    executor, step = served.executor, served.executor.model.step

    def run(new, cache, logits_to_keep=1):
        if isinstance(cache, PagedCache) and cache is executor.cache:
            size, tables = cache.tables.pool.block_size, cache.tables
            owned = {(tables.blocks[name][i // size], i % size)
                     for name, length in tables.lengths.items() for i in range(length)}
            blocks = set(range(tables.pool.blocks)) - set(tables.pool.idle)     # which may be found
            for block, offset in set(product(blocks, range(size))) - owned:
                cache.keys[:, block, :, offset] = cache.values[:, block, :, offset] = nan
        logits = step(new, cache, logits_to_keep)
        if cache is not executor.cache:                         # a draft's
            return logits
        wanted = logits_to_keep if isinstance(logits_to_keep, list) else [1] * len(new)
        names = served.scheduler.running if isinstance(cache, ContiguousCache) else new
        rows = logits.clone().split(wanted)
        for name, mine in zip(names, rows, strict=True):
            for i, row in enumerate(mine):
                value = spoil(name, served.scheduler.tables.lengths[name] - len(mine) + 1 + i
                              + isinstance(cache, ContiguousCache))
                if value is not None:
                    row[:] = value if value == -inf else row
                    row[7] = value
        return torch.cat(rows)

    executor.model.step = run
    return served


def alone(model, request):
    return generate(model, request.prompt, request.max_tokens, request.sampling).tokens


@pytest.fixture(autouse=True)
def as_it_was(small):
    yield
    small.__dict__.pop("step", None)
    small.layers[1].__dict__.pop("forward", None)


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("name", POLICIES)
def test_a_request_without_finite_logits_fails_and_no_other_does(small, name, value):
    """Each at another place: at the first token, in the middle; one of them draws."""
    requests = [Request(i, [i, 5, 6, 7, i, 5, 6], 8, sampling=Sampling(1.0, top_k=5, seed=3)
                        if i == 5 and not POLICIES[name].gamma else None) for i in range(7)]
    expected = {each.id: alone(small, each) for each in requests}
    bad = {1: 0, 4: 3, 5: 2}
    served = spoiled(made(small, POLICIES[name]), lambda sequence, length: value if (
        length == 7 + bad.get(sequence.request.id, 99)) else None)
    report = served.run(requests)
    for sequence in report.sequences:
        id = sequence.request.id
        if id in bad:
            assert sequence.state is State.FAILED and "NaN or +inf, or are all -inf" in (
                sequence.reason)
            assert sequence.tokens == expected[id][:bad[id]]
            assert sequence.text == small.tokenizer.decode(sequence.tokens)
        else:
            assert sequence.state is State.FINISHED and sequence.tokens == expected[id]
    assert report.summary["failed"] == 3 and report.summary["finished"] == 4
    assert served.scheduler.tables.pool.used == 0 and not served.executor.writers


@pytest.mark.parametrize("name", POLICIES)
def test_keys_that_are_nan_harm_their_own_request_alone_also_in_blocks_used_again(small, name):
    """Prompts begin alike, so that those behind share blocks where there is a prefix cache."""
    random = Random(1)
    requests = []
    for i in range(14):
        prompt = [1, 2, 3, 4, 5, 6, 7, 8, *random.choices(range(9), k=random.randint(1, 9))]
        if i % 3 == 1:
            prompt[random.randrange(8 if i < 8 else len(prompt))] = LOST
        requests.append(Request(i, prompt, 6))
    healthy = {each.id: alone(small, each) for each in requests if LOST not in each.prompt}
    report = spoiled(made(small, POLICIES[name], blocks=9), lambda *_: None).run(requests)
    for sequence in report.sequences:
        if sequence.request.id in healthy:
            assert sequence.tokens == healthy[sequence.request.id]
        else:
            assert sequence.state is State.FAILED and sequence.generated == 0


def test_blocks_of_a_request_that_failed_are_not_found_again(small):
    served, prompt = made(small, POLICIES["prefixes"]), [1, 2, 3, 4, 5, 6, 7, 8, 9]
    first = served.add(Request("first", prompt, 9))
    served.step()
    blocks = served.scheduler.tables.blocks[first]
    served.executor.cache.keys[:, blocks[0]] = nan              # a bit has fallen over
    served.run()
    assert first.state is State.FAILED
    [again] = served.run([Request("again", prompt, 9)]).sequences
    assert (again.num_cached_tokens, again.tokens) == (0, alone(small, again.request))
    [third] = served.run([Request("third", prompt, 9)]).sequences
    assert third.num_cached_tokens == 8 and third.tokens == again.tokens


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", POLICIES)
def test_a_storm_of_failures_and_interrupts_changes_no_other_token(small, name, seed):
    random, layer = Random(seed), small.layers[1]
    requests = [Request(i, random.choices(range(4), k=random.randint(1, 14)), random.randint(1, 9))
                for i in range(12)]
    expected = {each.id: alone(small, each) for each in requests}
    bad = {each.id: (random.randrange(each.max_tokens), random.choice([nan, inf, -inf]))
           for each in requests if random.random() < 0.4}
    original = layer.forward

    def spoil(sequence, length):
        at, value = bad.get(sequence.request.id, (99, nan))
        return value if length == sequence.prompt_tokens + at else None

    def breaks(*arguments):
        if random.random() < 0.15:
            raise KeyboardInterrupt
        return original(*arguments)

    served = spoiled(made(small, POLICIES[name], blocks=8), spoil)
    layer.forward = breaks
    for request in requests:
        served.add(request)
    while served.busy:
        try:
            served.step()
        except KeyboardInterrupt:
            pass
    report = served.report()
    for sequence in report.sequences:
        id, failed = sequence.request.id, sequence.request.id in bad
        assert sequence.state is (State.FAILED if failed else State.FINISHED)
        assert sequence.tokens == expected[id][:bad[id][0] if failed else None]
    assert served.scheduler.tables.pool.used == 0 and not served.executor.generators


# ---- drafts ----


class Lost(ModelDraft):
    """Its logits are NaN for one sequence, from its second drafted token on."""

    calls = 0

    def _step(self, new):
        logits = super()._step(new)
        if logits is None:
            return None
        self.calls += 1
        logits = logits.clone()
        if self.calls % 2 == 0:
            logits[0] = nan
        return logits


@pytest.mark.parametrize("sampling", [None, Sampling(1.0, top_k=9, seed=1)])
def test_a_draft_that_has_lost_its_way_is_gone_on_without(small, sampling):
    torch.manual_seed(8)
    draft = Lost(Decoder(ModelConfig(replace(small.config.shape, L=1))).requires_grad_(False))
    prompts = [[1, 2, 3], [4, 5]]
    results = speculate_batch(small, prompts, draft, 9, sampling, gamma=3)
    assert all(0 <= token < 97 for each in results for token in each.tokens)
    assert [len(each.tokens) for each in results] == [9, 9]
    assert {len(each.drafted) for each in results[0].rounds} >= {1}
    if sampling is None:
        assert [each.tokens for each in results] == [generate(small, prompt, 9).tokens
                                                     for prompt in prompts]


# ---- one generation ----


@pytest.mark.parametrize("sampling", [None, Sampling(0.7, top_k=9, seed=1)])
def test_a_generation_without_finite_logits_is_one_clear_line(small, sampling):
    for write in (generate, lambda *rest: speculate(*rest[:2], PromptLookup(), *rest[2:])):
        with pytest.raises(ValueError, match="behind 3 tokens they hold NaN or .inf, or are all"):
            write(small, [1, LOST, 3], 5, sampling)
    lost, fine = speculate_batch(small, [[LOST], [1, 2]], PromptLookup(), 5)
    assert (lost.finish_reason, lost.tokens) == ("failed", [])
    assert fine.tokens == generate(small, [1, 2], 5).tokens


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("keeper", [
    lambda model: ContiguousCache.for_model(model, 1, 40),
    lambda model: PagedCache.for_model(model, 1, 40, block_size=4),
    lambda model: KiviCache.for_model(model, 1, 40, group=8),
    lambda model: SlidingWindowCache.for_model(model, 1, window=5, sinks=2),
], ids=["contiguous", "paged", "int4", "ring with sinks"])
def test_a_cache_is_never_ahead_of_the_text_however_a_generation_ends(small, keeper, at):
    """Ctrl-C right behind a step of the model, before its token is chosen."""
    cache, step, count = keeper(small), small.step, [0]

    def breaks(*arguments):
        logits = step(*arguments)
        count[0] += 1
        if count[0] == 1 + at:
            raise KeyboardInterrupt
        return logits

    small.step = breaks
    found = generate(small, [1, 2, 3, 4, 5, 6, 7, 8], 9, cache=cache)
    del small.step
    assert (len(found.tokens), found.finish_reason) == (at, "interrupted")
    assert list(cache.lengths.values()) == [8 + at - 1]
    cached = [*found.prompt_tokens, *found.tokens]
    whole = generate(small, cached[:8], 9, cache=keeper(small)).tokens
    if not isinstance(cache, KiviCache):                        # whose rounded tokens stay rounded
        assert found.tokens + generate(small, cached[-1:], 9 - at, cache=cache).tokens == whole


def pressing(pieces, at):
    def said(piece):
        pieces.append(piece)
        if len(pieces) == at:
            signal.raise_signal(signal.SIGINT)
    return said


def test_ctrl_c_in_a_callback_or_a_step_loses_no_piece(small):
    pieces = []
    found = generate(small, [1, 2, 3], 9, on_token=pressing(pieces, 3))
    assert found.finish_reason == "interrupted" and found.text == "".join(pieces)
    assert len(found.tokens) == 3
    said = {0: "", 1: "", 2: ""}

    def tell(index, piece):
        said[index] += piece
        if index == 0 and len(said[0]) > 2:
            signal.raise_signal(signal.SIGINT)

    results = speculate_batch(small, [[1], [2], [3]], PromptLookup(), 9, on_token=tell)
    assert {each.finish_reason for each in results} == {"interrupted"}
    assert [each.text for each in results] == list(said.values())
    assert len({len(each.tokens) for each in results} - {9}) >= 1


def test_a_callback_that_raises_takes_nobody_elses_piece(small):
    said = {0: "", 1: "", 2: ""}

    def tell(index, piece):
        said[index] += piece
        if index < 2 and len(said[0]) > 1:
            raise RuntimeError(f"no more paper for {index}")

    with pytest.raises(RuntimeError, match="no more paper for 0"):
        speculate_batch(small, [[1], [2], [3]], PromptLookup(), 9, gamma=0, on_token=tell)
    assert [len(text) for text in said.values()] == [2, 2, 2]
    assert generate(small, [1], 9).text.startswith(said[0])


def test_ctrl_c_in_a_step_of_the_engine_leaves_what_it_brought_with_its_sequences(small):
    served = made(small, POLICIES["continuous"])
    sequences = [served.add(Request(i, [i, 2], 4)) for i in range(3)]
    choose = TorchExecutor._choose

    def presses(self, *arguments):
        signal.raise_signal(signal.SIGINT)
        return choose(self, *arguments)

    served.executor._choose = presses.__get__(served.executor)
    with pytest.raises(KeyboardInterrupt):
        served.step()
    assert [(len(each.tokens), len(each.text)) for each in sequences] == [(1, 1)] * 3
    del served.executor._choose
    served.run()
    for sequence in sequences:
        assert sequence.tokens == alone(small, sequence.request)


def test_what_a_failed_text_held_back_comes_out():
    writer = Writer(limit=9, tokenizer=Letters(), stop=("AB",))
    assert writer.take([31, 32]) == ([31, 32], "@") and writer.take([-1, 33]) == ([], "A")
    assert writer.reason == "failed" and writer.stream.text == "@A"


# ---- statistics ----


def test_a_request_counts_once_in_the_statistics_and_is_hashed_once_however_long_it_waits(
        small, monkeypatch):
    hashed = []
    monkeypatch.setattr(prefix_cache, "sha256", lambda block: (
        hashed.append(block), sha256(block))[1])
    served = made(small, Policy(max_batch=1, prefix_caching=True), blocks=12)
    requests = [Request(i, [i, *range(1, 30)], 12) for i in range(2)]
    assert served.run(requests).summary["finished"] == 2
    assert served.scheduler.tables.prefix.asked == 60
    # 7 full blocks of a prompt, and 3 of what was generated; of the first block, what is asked for
    assert len(hashed) <= 2 * (10 + 1)

    served = made(small, Policy(max_batch=4, prefix_caching=True), blocks=9)
    report = served.run([Request(i, [i, *range(1, 9)], 12) for i in range(4)])
    assert report.summary["preemptions"] > 0
    assert served.scheduler.tables.prefix.asked == 4 * 9
