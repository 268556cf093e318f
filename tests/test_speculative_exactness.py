"""Speculative samples have the target's own distribution, and a test that says so must also be able
to say no.

Chi-square tests in float64 on small vocabularies, of at least 20,000 rounds each, with
`chi_square.FALSE_ALARM` as the chance that a correct sampler fails. Every planted bug must fail by
far more than that.
"""

import copy
from dataclasses import replace

import pytest
import torch
from chi_square import FALSE_ALARM, Chain, Lengths, p_value, triple_chances, triples

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.kv_cache import PagedCache
from clawdemy_infer.model import Decoder, ModelConfig, Sampling, probabilities
from clawdemy_infer.speculative import (
    ModelDraft,
    PromptLookup,
    Proposal,
    Verdict,
    speculate_batch,
    verify,
)
from clawdemy_infer.variants.self_drafts import EarlyExit, SelfDraft

V, G, ROUNDS = 7, 3, 40_000
FILTERS = {
    "none": {}, "cold": {"temperature": 0.4}, "hot": {"temperature": 2.5}, "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.7}, "min-p": {"min_p": 0.15},
    "all": {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
}
each_filter = pytest.mark.parametrize(
    "sampling", [Sampling(**{"temperature": 1.0} | each) for each in FILTERS.values()], ids=FILTERS)


# ---- the rule alone, over all rounds at once ----

def chains(seed=0):
    """Logits [V, V] of two Markov chains of first order: the target's, and those of a draft that
    resembles it."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(V, V, generator=generator, dtype=torch.float64)
    return target, target + torch.randn(V, V, generator=generator, dtype=torch.float64)


def play(sampling, verify=verify, drawn=None, ragged=False):
    """The first two tokens after token 0 of `ROUNDS` texts, by speculation: [ROUNDS, 2]. The draft
    draws as `drawn` says, and claims to draw as `sampling` says."""
    target, draft = chains()
    p, q, really = probabilities(target, sampling), probabilities(draft, sampling), probabilities(
        draft, drawn or sampling)
    generator = torch.Generator().manual_seed(1)
    at = torch.zeros(ROUNDS, dtype=torch.int64)
    texts = torch.full((ROUNDS, 2 * (G + 1)), -1)
    length = torch.zeros(ROUNDS, dtype=torch.int64)
    for _ in range(2):                                  # a round brings one token at least
        drafted = [at]
        for _ in range(G):
            drafted.append(
                torch.multinomial(really[drafted[-1]], 1, generator=generator).squeeze(-1))
        drafted = torch.stack(drafted, 1)
        counts = torch.arange(ROUNDS) % (G + 1) if ragged else torch.full((ROUNDS,), G)
        verdict = verify(p[drafted], q[drafted[:, :-1]], drafted[:, 1:], counts, generator)
        for i in range(G):
            rows = (verdict.accepted > i).nonzero().squeeze(-1)
            texts[rows, length[rows] + i] = drafted[rows, i + 1]
        length += verdict.accepted
        texts[torch.arange(ROUNDS), length] = verdict.token
        length += 1
        at = verdict.token
    return texts[:, :2]


def p_values(sampling, **how):
    """Of the first token, and of the pair."""
    p = probabilities(chains()[0], sampling)
    tokens = play(sampling, **how)
    single = torch.bincount(tokens[:, 0], minlength=V)
    pairs = torch.bincount(tokens[:, 0] * V + tokens[:, 1], minlength=V * V)
    return p_value(single, p[0]), p_value(pairs, (p[0][:, None] * p).flatten())


@each_filter
@pytest.mark.parametrize("ragged", [False, True], ids=["alike", "ragged"])
def test_tokens_and_pairs_are_distributed_as_the_targets_own(sampling, ragged):
    assert min(p_values(sampling, ragged=ragged)) > FALSE_ALARM


def test_a_draft_may_be_certain_of_what_it_says():
    p = probabilities(chains()[0], Sampling(temperature=1.0))[:1].expand(ROUNDS, 2, V)
    drafted = (torch.arange(ROUNDS) % V)[:, None]
    verdict = verify(p, None, drafted, torch.ones(ROUNDS, dtype=torch.int64),
                     torch.Generator().manual_seed(0))
    first = torch.where(verdict.accepted == 1, drafted[:, 0], verdict.token)
    assert p_value(torch.bincount(first, minlength=V), p[0, 0]) > FALSE_ALARM


def residual_dropped(p, q, drafted, counts, generator):
    """After a token fell, draw from p as it is."""
    accepted, token = verify(p, q, drafted, counts, generator)
    again = torch.multinomial(p[torch.arange(len(p)), accepted], 1, generator=generator).squeeze(-1)
    return Verdict(accepted, torch.where(accepted < counts, again, token))


def bonus_off_by_one(p, q, drafted, counts, generator):
    """Draw the bonus from the row before its own."""
    accepted, token = verify(p, q, drafted, counts, generator)
    early = torch.multinomial(p[torch.arange(len(p)), accepted - (accepted == counts).long()], 1,
                              generator=generator).squeeze(-1)
    return Verdict(accepted, torch.where(accepted == counts, early, token))


def always_standing(p, q, drafted, counts, generator):
    """Believe the draft."""
    accepted, token = verify(p, q, drafted, counts, generator)
    return Verdict(counts, token)


@pytest.mark.parametrize("bug", [
    {"verify": residual_dropped}, {"verify": always_standing}, {"drawn": Sampling(temperature=0.7)},
], ids=["residual dropped", "draft believed", "q from another temperature"])
def test_a_planted_bug_is_seen_in_one_token(bug):
    assert p_values(Sampling(temperature=1.0), **bug)[0] < FALSE_ALARM**2


def test_a_bonus_from_the_wrong_row_is_seen_in_what_follows():
    """It is the last token of a round: the first token of a text never shows it, and with G = 3 few
    pairs do. So bring only one."""
    def one_drafted(*arguments):
        p, q, drafted, counts, generator = arguments
        return bonus_off_by_one(p, q, drafted, counts.clamp(max=1), generator)

    single, pair = p_values(Sampling(temperature=1.0), verify=one_drafted)
    assert single > FALSE_ALARM and pair < FALSE_ALARM**2


def test_what_the_target_excludes_is_rejected_also_where_the_random_number_is_0(monkeypatch):
    monkeypatch.setattr(torch, "rand",
                        lambda *size, dtype, **options: torch.zeros(*size, dtype=dtype))
    p = torch.tensor([[[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]])
    q, drafted, one = torch.tensor([[[0.9, 0.1, 0.0]]]), torch.tensor([[0]]), torch.tensor([1])
    for drawn_from in (q, None):
        assert verify(p, drawn_from, drafted, one) == (torch.tensor([0]), torch.tensor([1]))


def test_where_p_and_q_agree_but_for_rounding_there_is_still_a_token():
    p = torch.tensor([[[0.25, 0.75, 0.0]]]).expand(1000, 2, 3)
    q = p[:, :1] * (1 + 2e-7)                           # the residual is 0 everywhere
    drafted = torch.ones(1000, 1, dtype=torch.int64)
    verdict = verify(p*0.5, q, drafted, torch.ones(1000, dtype=torch.int64),
                     torch.Generator().manual_seed(0))
    assert 0 < verdict.accepted.float().mean() < 1 and set(verdict.token.tolist()) == {0, 1}


# ---- the loop: drafts with caches, batches, rollback ----

class ChainDraft(ModelDraft):
    """A chain keeps no bytes, so neither does its cache."""

    def begin(self, target, cache, prompts):
        super().begin(target, cache, prompts)
        self.cache = Lengths(len(prompts))


TARGET = Chain(4, seed=3)
LOOP = {"temperature": 1.2, "min_p": 0.1}
IN_THE_LOOP = Sampling(**LOOP)
DRAFTS = {
    "lookup": lambda: PromptLookup(),
    "second model": lambda: ChainDraft(Chain(4, seed=4, near=TARGET)),
    "itself": lambda: ChainDraft(Chain(4, seed=3)),
}


def loop_p_value(draft, batch, least, sampling=IN_THE_LOOP):
    """Of all tokens after all pairs, in texts from batches of this size, until there were so many
    rounds."""
    texts, rounds = [], 0
    while rounds < least:
        prompts, seeded = [[0, i % 4] for i in range(batch)], replace(sampling, seed=rounds)
        done = speculate_batch(TARGET, prompts, draft, 900, seeded, gamma=2, cache=Lengths(batch))
        texts += [[*each.prompt_tokens, *each.tokens] for each in done]
        rounds += sum(len(each.rounds) for each in done)
    return p_value(triples(texts, 4), probabilities(TARGET.logits, sampling))


@pytest.mark.parametrize(("batch", "least"), [(1, 2_000), (4, 4_000), (64, 20_000)])
@pytest.mark.parametrize("draft", DRAFTS)
def test_the_loop_draws_from_the_target_whatever_the_draft(draft, batch, least):
    assert loop_p_value(DRAFTS[draft](), batch, least) > FALSE_ALARM


@pytest.mark.slow
@each_filter
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("draft", DRAFTS)
def test_the_loop_draws_from_the_target_through_every_filter(draft, batch, sampling):
    """The table: at least 20,000 rounds for each draft, filter and batch; single tokens and pairs
    are margins of these triples."""
    assert loop_p_value(DRAFTS[draft](), batch, 20_000, sampling) > FALSE_ALARM


class Reseeding(ChainDraft):
    def propose(self, texts, counts, sampling, generator):
        generator.manual_seed(len(next(iter(texts.values()))) % 50)
        return super().propose(texts, counts, sampling, generator)


class Boasting(ChainDraft):
    """Draws at its own temperature, and claims another."""

    def propose(self, texts, counts, sampling, generator):
        tokens, q = super().propose(texts, counts, Sampling(**LOOP | {"temperature": 0.8}),
                                    generator)
        claimed = q if q is None else q ** (0.8 / LOOP["temperature"])
        return Proposal(tokens, q if q is None else claimed / claimed.sum(-1, keepdim=True))


@pytest.mark.parametrize("bug", [Reseeding, Boasting])
def test_a_bug_planted_in_a_draft_is_seen_in_the_loop(bug):
    assert loop_p_value(bug(Chain(4, seed=4, near=TARGET)), 4, 4_000) < FALSE_ALARM**2


def test_a_target_that_keeps_rejected_tokens_is_seen_in_the_loop(monkeypatch):
    draft = ChainDraft(Chain(4, seed=4, near=TARGET))
    monkeypatch.setattr(Lengths, "truncate", lambda self, length, sequence: None)
    assert loop_p_value(draft, 4, 2_000) < FALSE_ALARM**2


def rounded(model):
    """The same model with its weights in sixteenths."""
    rough = copy.deepcopy(model)
    with torch.no_grad():
        for weight in rough.parameters():
            weight.mul_(16).round_().div_(16)
    return rough


@pytest.mark.parametrize(("keeper", "dtype", "draft"),
                         [("contiguous", torch.float64, lambda model: EarlyExit(model, 1)),
                          ("paged", torch.float32, lambda model: EarlyExit(model, 1)),
                          ("contiguous", torch.float64, lambda model: SelfDraft(rounded(model))),
                          ("paged", torch.float32, lambda model: SelfDraft(rounded(model))), ],
                         ids=["exit", "exit, paged", "rounded self", "rounded self, paged"])
def test_a_draft_on_the_targets_own_cache_leaves_its_distribution_as_it_is(keeper, dtype, draft):
    """A random decoder of three layers. All triples of tokens after one prompt, against the product
    of its conditional chances."""
    shape = ModelShape(name="tiny", L=3, D=8, N=2, K=1, H=4, F=16, V=5, tied=False)
    torch.manual_seed(0)
    model = Decoder(ModelConfig(shape)).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    sampling, prompt, texts, rounds = Sampling(temperature=1.0, min_p=0.05), [1, 2], [], 0
    while rounds < 5_000:
        batch = 1000
        cache = "contiguous" if keeper == "contiguous" else PagedCache.for_model(
            model, batch, 8, block_size=4)
        seeded = Sampling(temperature=1.0, min_p=0.05, seed=rounds)
        done = speculate_batch(model, [prompt]*batch, draft(model), 3, seeded, gamma=2, cache=cache)
        texts += [each.tokens for each in done]
        rounds += sum(len(each.rounds) for each in done)
    chances = triple_chances(model, prompt, 5, sampling)
    assert p_value(triples(texts, 5).flatten(), chances.flatten()) > FALSE_ALARM
