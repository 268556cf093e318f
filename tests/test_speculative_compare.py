"""The comparison with plain decoding: costs are interpolated as drawn by hand, and a row says what
its rounds say."""

from dataclasses import replace

import pytest
import torch

from clawdemy_course.compare_drafts import (
    RoundCosts,
    acceptances,
    compare_drafts,
    greedy_rounds,
    measure_costs,
)
from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.model import Decoder, ModelConfig, Sampling
from clawdemy_infer.speculative import ModelDraft, PromptLookup, speculate_batch
from clawdemy_infer.variants.pruning import without_layers
from clawdemy_infer.variants.self_drafts import EarlyExit

SHAPE = ModelShape(name="tiny", L=3, D=8, N=2, K=1, H=4, F=16, V=11, tied=True, max_context=64)


def test_costs_between_two_measured_numbers_of_rows_lie_on_a_line():
    costs = RoundCosts({1: 2.0, 2: 2.2, 5: 3.4, "small": 0.5})
    assert [costs.v(rows) for rows in (1, 2, 3, 5, 9)] == pytest.approx([1.0, 1.1, 1.3, 1.7, 1.7])
    assert (costs.c("small"), costs.c("lookup")) == (0.25, 0.0)


@pytest.mark.parametrize(("batch", "sampling"), [(1, None), (3, None),
                                                 (1, Sampling(temperature=1.0, seed=0))])
def test_rows_hold_every_draft_on_every_prompt(batch, sampling):
    torch.manual_seed(0)
    model = Decoder(ModelConfig(SHAPE)).eval()
    drafts = {"lookup": PromptLookup(), "itself": ModelDraft(model), "exit": EarlyExit(model, 1),
              "other": ModelDraft(Decoder(ModelConfig(replace(SHAPE, L=1))).eval())}
    costs = measure_costs(model, drafts, 9, rows=(1, 4), batch=batch, repeats=1, sampling=sampling)
    assert set(costs.seconds) == {1, 4, "itself", "exit", "other"}
    rows = compare_drafts(model, drafts, {"a": [1, 2, 3], "b": [4, 5]}, costs, gamma=3,
                          max_tokens=14, sampling=sampling, batch=batch, repeats=1)
    assert [(row.prompt, row.draft)
            for row in rows] == [(prompt, draft) for prompt in "ab" for draft in drafts]
    for row in rows:
        assert row.identical is (None if sampling else True)
        assert row.measured > 0 and row.predicted > 0
        assert sum(each.accepted + 1 for each in row.rounds) == batch * 13
    itself = [row for row in rows if row.draft == "itself"]
    assert all(row.alpha == 1.0 and row.tokens_per_round > 3 for row in itself)


def test_what_is_accepted_token_by_token_makes_the_rounds_that_are_played():
    torch.manual_seed(0)
    model = Decoder(ModelConfig(SHAPE)).eval()
    with torch.no_grad():
        for matrix in [each for each in model.parameters() if each.ndim == 2]:
            matrix *= 6                             # or a greedy text repeats one token
    draft, prompts = EarlyExit(model, 2), [[1, 2, 3], [4, 5]]
    texts, found = acceptances(model, {"exit": draft, "lookup": PromptLookup()}, prompts, 40)
    for gamma in (1, 3):
        played = speculate_batch(model, prompts, draft, 40, gamma=gamma)
        for text, accepted, prompt, each in zip(texts, found["exit"], prompts, played, strict=True):
            assert text == [*prompt, *each.tokens]
            assert {0.0, 1.0} == set(accepted)
            assert [(len(drafted), right) for drafted, right, _ in greedy_rounds(accepted, gamma)
                    ] == [(len(drafted), right) for drafted, right, _ in each.rounds]


def test_a_sampled_token_is_accepted_with_what_both_distributions_have_in_common():
    torch.manual_seed(0)
    model = Decoder(ModelConfig(SHAPE)).eval()
    sampling = Sampling(temperature=1.0, seed=0)
    texts, found = acceptances(model, {"itself": ModelDraft(model), "exit": EarlyExit(model, 1)},
                               [[1, 2, 3]], 8, sampling)
    assert found["itself"][0] == pytest.approx([1.0] * 7, abs=1e-5)
    p, q = (each(torch.tensor([texts[0][:-1]]))[0, 3:].softmax(-1)
            for each in (model, without_layers(model, range(1, 3))))
    assert found["exit"][0] == pytest.approx(torch.minimum(p, q).sum(-1).tolist(), abs=1e-5)
