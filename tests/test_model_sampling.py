"""The distribution we draw from is transformers' after the same filters, and the draws follow
it."""

import re
from math import inf, nan

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from clawdemy_infer.model import Sampling, draw, probabilities, sample
from clawdemy_infer.model.sampling import NOTHING

LOGITS = torch.randn(7, 331, generator=torch.Generator().manual_seed(5)) * 3

SETTINGS = [{"temperature": 0.7}, {"temperature": 1.0,
                                   "top_k": 5}, {"temperature": 1.3,
                                                 "top_p": 0.9}, {"temperature": 1.0, "min_p": 0.1},
            {"temperature": 0.8, "top_k": 50,
             "top_p": 0.95}, {"temperature": 2.0, "top_k": 40, "top_p": 0.6,
                              "min_p": 0.05}, {"temperature": 1.0, "top_k": 100_000},
            {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}, {"temperature": 0.5, "top_p": 1e-6}, ]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_probabilities_are_those_of_transformers_filters_in_its_order(settings):
    warpers = [TemperatureLogitsWarper(settings["temperature"])]
    if "top_k" in settings:
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        warpers.append(MinPLogitsWarper(settings["min_p"]))
    expected = LOGITS.clone()
    for warper in warpers:
        expected = warper(None, expected)
    torch.testing.assert_close(probabilities(LOGITS, Sampling(**settings)), expected.softmax(-1),
                               rtol=1e-5, atol=1e-7)


def test_greedy_is_certain_of_the_likeliest_and_the_limit_of_a_low_temperature():
    greedy = probabilities(LOGITS, Sampling())
    assert greedy.argmax(-1).tolist() == LOGITS.argmax(-1).tolist() == sample(LOGITS,
                                                                              Sampling()).tolist()
    assert greedy.sum() == 7 and greedy.max() == 1
    torch.testing.assert_close(probabilities(LOGITS, Sampling(temperature=1e-6)), greedy)
    assert torch.isfinite(probabilities(LOGITS * 1e30, Sampling(temperature=1e-30))).all()


def test_bf16_logits_give_fp32_probabilities_that_sum_to_one():
    p = probabilities(LOGITS.bfloat16(), Sampling(temperature=0.9, top_p=0.8))
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.sum(-1), torch.ones(7))


def test_draws_follow_the_distribution():
    """Pearson's chi-square over 20,000 draws, 30 kept tokens: 29 degrees of freedom, 58.3 at p =
    0.001."""
    sampling = Sampling(temperature=1.5, top_k=30, seed=11)
    logits = LOGITS[:1].expand(20_000, -1)
    drawn = sample(logits, sampling, sampling.generator()).bincount(minlength=331).double()
    expected = probabilities(LOGITS[0], sampling).double() * 20_000
    kept = expected > 0
    assert drawn[~kept].sum() == 0
    assert ((drawn - expected)[kept] ** 2 / expected[kept]).sum() < 58.3


def test_a_seed_repeats_and_none_does_not():
    def draws(seed):
        sampling = Sampling(temperature=1.0, seed=seed)
        generator = sampling.generator()
        return [sample(LOGITS, sampling, generator).tolist() for _ in range(20)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert draws(None) != draws(None)
    assert len(set(map(str, draws(3)))) > 1         # one seed per generation, not per token


@pytest.mark.parametrize(
    "wrong", [{"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
              {"top_k": 0}, {"top_k": 2.5}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1},
              {"min_p": 1.5}, {"seed": -1}, {"seed": "x"}, {"seed": 2**63}, ], ids=str)
def test_a_setting_that_makes_no_sense_is_refused_by_name_and_value(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value}: ")):
        Sampling(**wrong)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.7, top_k=3),
                                      Sampling(1.0, top_p=0.9), Sampling(2.0, min_p=0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_that_leaves_nothing_to_choose_gives_no_token_and_the_others_theirs(sampling, dtype):
    logits = torch.randn(6, 50, dtype=dtype)
    logits[1, 7], logits[2, 8], logits[3], logits[5, 1:] = nan, inf, -inf, -inf
    drawn = sample(logits, sampling, torch.Generator().manual_seed(0)).tolist()
    assert [token == NOTHING for token in drawn] == [False, True, True, True, False, False]
    assert drawn[5] == 0 and all(NOTHING <= token < 50 for token in drawn)
    p = probabilities(logits, sampling)
    assert p[1:4].isnan().any(-1).all() and p[[0, 4, 5]].sum(-1).tolist() == pytest.approx([1] * 3)


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-38, 5e-324])
def test_a_tiny_temperature_is_greedy_and_no_failure(temperature):
    logits = torch.randn(20, 50)
    assert sample(logits, Sampling(temperature)).tolist() == logits.argmax(-1).tolist()


def test_weights_that_sum_to_no_number_give_no_token():
    weights = torch.tensor([[0.0, 0, 0], [1, nan, 1], [inf, 1, 1], [0, 2, 0]])
    assert draw(weights).tolist() == [NOTHING] * 3 + [1]
