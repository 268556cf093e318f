"""Speculation inside the engine: whatever draft, neighbours, chunks, preemptions and interruptions
a request meets, its greedy tokens are those it would get alone, and what is sampled has the
target's distribution."""

import json
from dataclasses import replace
from itertools import count

import pytest
import torch
from chi_square import FALSE_ALARM, p_value, triple_chances
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batching_engine import BLOCK, POLICIES, alone, small, storm  # noqa: F401
from token_prompts import with_tokens

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.batching import Policy, Request, State
from clawdemy_infer.batching import serving as plain
from clawdemy_infer.cli import main as cli
from clawdemy_infer.model import Decoder, ModelConfig, Sampling, generate
from clawdemy_infer.rigs.workload import uniform, workload
from clawdemy_infer.speculative import ModelDraft, PromptLookup
from clawdemy_infer.speculative.engine import engine
from clawdemy_infer.variants.self_drafts import EarlyExit

DRAFTS = ["lookup", "itself", "other", "exit"]


def draft_of(name, model):
    if name == "other":
        torch.manual_seed(5)
        return ModelDraft(
            Decoder(ModelConfig(replace(model.config.shape, L=1))).requires_grad_(False))
    return {
        "lookup": PromptLookup, "itself": lambda: ModelDraft(model),
        "exit": lambda: EarlyExit(model, 1)
    }[name]()


def made(model, policy, draft, blocks=16):
    return engine(model, draft, replace(policy, gamma=3), kv_bytes=blocks*BLOCK, block_size=4,
                  host_bytes=6*BLOCK)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "static"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_tokens_are_those_of_a_request_alone(small, name, draft):  # noqa: F811
    policy = POLICIES[name]
    if draft == "exit" and policy.prefix_caching:
        with pytest.raises(ValueError, match="prefix_caching=False is accepted"):
            made(small, policy, draft_of(draft, small))
        return
    requests = with_tokens(workload(uniform(1, 30), uniform(1, 20), requests=14, seed=4), 97,
                           shared=9)
    served = made(small, policy, draft_of(draft, small))
    summary = served.run(requests[:7]).summary
    report = served.run(requests)  # a second time, over what the first has left
    assert report.summary["finished"] == 14 and served.scheduler.tables.pool.used == 0
    for sequence in report.sequences:
        assert sequence.tokens == alone(small, sequence.request.prompt, sequence.request.max_tokens)
    drafted, accepted = (summary[name] + report.summary[name] for name in ("drafted", "accepted"))
    assert 0 < drafted and (accepted == drafted if draft == "itself" else accepted < drafted)
    # the others are right so often that nobody is preempted
    if draft in ("lookup", "other"):
        # else the test would not show what it is there for
        assert report.summary["preemptions"] > 0
    if policy.prefix_caching:
        assert report.summary["cached"] > 0


@given(st.sampled_from([name for name in POLICIES if name != "static"]), st.sampled_from(DRAFTS),
       st.randoms(use_true_random=False))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_a_storm_leaks_no_block_and_changes_no_token(small, name, drafting, random):  # noqa: F811
    if drafting == "exit" and name == "prefixes":
        return
    draft = draft_of(drafting, small)
    served = made(small, POLICIES[name], draft, blocks=8)
    added = storm(served, small.layers[1], random, rounds=25)
    tables = served.scheduler.tables
    assert tables.pool.free == 8 and not tables.lengths and all(
        sequence.over for sequence in added)
    if drafting in ("itself", "other"):
        assert draft.cache.tables.pool.free == 8 and not draft.names
    assert not served.executor.joined
    assert not served.executor.writers and not served.executor.generators
    for sequence in added:
        if sequence.state is State.FINISHED:
            assert sequence.generated == sequence.request.max_tokens
        assert sequence.tokens == alone(small, sequence.request.prompt, sequence.generated)


@pytest.mark.parametrize("draft", ["lookup", "other"])
def test_samples_of_requests_with_and_without_a_seed_are_the_targets_own(draft, monkeypatch):
    """A random decoder of two layers. All triples of tokens after one prompt, against the product
    of its conditional chances; beside them greedy requests, which stay greedy."""
    serial = count()
    monkeypatch.setattr(
        Sampling, "generator", lambda self, device: torch.Generator(device).manual_seed(
            next(serial) if self.seed is None else self.seed))  # so that it fails always or never
    torch.manual_seed(0)
    model = Decoder(
        ModelConfig(ModelShape(name="tiny", L=2, D=8, N=2, K=1, H=4, F=16, V=5,
                               tied=False))).requires_grad_(False)
    for weight in model.parameters():
        weight.mul_(3)
    prompt, plainly = [1, 2], Sampling(1.0, min_p=0.05)
    served = engine(model, draft_of(draft, model), Policy(max_batch=500, gamma=2), kv_bytes=2**21)
    requests = [
        Request(i, prompt, 3, sampling=replace(plainly, seed=i if i % 50 == 0 else None))
        for i in range(2500)
    ]
    greedy = [Request(f"greedy {i}", prompt, 3) for i in range(5)]
    report = served.run([*greedy, *requests])
    counts = torch.zeros(5, 5, 5)
    for sequence in report.sequences:
        if isinstance(sequence.request.id, int):
            counts[tuple(sequence.tokens)] += 1
        else:
            assert sequence.tokens == generate(model, prompt, 3).tokens
    chances = triple_chances(model, prompt, 5, plainly)
    assert p_value(counts.flatten(), chances.flatten()) > FALSE_ALARM


def test_a_seed_draws_the_same_whoever_is_beside(small):  # noqa: F811
    def sampled(*others):
        served = made(small, POLICIES["continuous"], draft_of("other", small))
        return served.run([Request("mine", [5, 6, 7], 12, sampling=Sampling(1.0, seed=7)),
                           *others]).sequences[0].tokens

    others = [
        Request(i, [i, 1, 2], 9, sampling=Sampling(1.0, seed=i) if i % 2 else None)
        for i in range(5)
    ]
    assert sampled() == sampled(*others)


def test_a_draft_whose_own_cache_is_full_drafts_for_whom_it_has_room(small):  # noqa: F811
    """The target's sequences share the blocks of a prefix, and those of the draft do not."""
    draft, policy, found = draft_of("itself", small), POLICIES["prefixes"], []
    served, propose = made(small, replace(policy, token_budget=99), draft), draft.propose

    def proposed(texts, counts, *how):
        found.append(list(zip(counts.values(), (made := propose(texts, counts, *how)).tokens,
                              strict=True)))
        return made

    draft.propose, prefix = proposed, [*range(24)]
    assert served.run([Request("first", prefix, 2)]).summary["finished"] == 1
    report = served.run([Request(i, [*prefix, i], 8) for i in range(4)])
    for sequence in report.sequences:
        assert sequence.tokens == alone(small, sequence.request.prompt, 8)
    assert any(count > 0 and not tokens for round in found for count, tokens in round)
    assert any(tokens for round in found for _, tokens in round if len(round) == 4)


def test_guesses_need_a_draft(small):  # noqa: F811
    with pytest.raises(ValueError, match="gamma=3: drafted tokens need a draft"):
        plain.engine(small, Policy(gamma=3), kv_bytes=16 * BLOCK, block_size=4)


def test_the_command_simulates_a_draft_and_asks_for_its_alpha(capsys):
    line = [
        "replay", "alpaca", "--machine", "h100-sxm", "--model", "llama-3-8b", "--requests", "6",
        "--draft", "int8", "--gamma", "3"
    ]
    assert cli.main([*line, "--alpha", "0.9", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    # 0.9 + 0.81 + 0.73 of 3
    assert out["policy"][
        "gamma"] == 3 and 0.7 < out["summary"]["accepted"]/out["summary"]["drafted"] < 0.95
    assert cli.main([*line, "--alpha", "0.9"]) == 0
    assert "drafted tokens were accepted" in capsys.readouterr().out
    assert cli.main(line) == 2 and "alpha=None" in capsys.readouterr().err
