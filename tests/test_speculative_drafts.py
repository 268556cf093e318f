"""What drafts propose, worked out by hand, and what they refuse."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.kv_cache import ContiguousCache, PagedCache
from clawdemy_infer.model import Decoder, ModelConfig, Sampling
from clawdemy_infer.speculative import ModelDraft, PromptLookup
from clawdemy_infer.variants.self_drafts import EarlyExit, SelfDraft, draft_named

GREEDY = Sampling()


def copied(text, count=4):
    draft = PromptLookup()
    draft.begin(None, None, {"a": text})
    return draft.propose({"a": text}, {"a": count}, GREEDY, None).tokens[0]


@pytest.mark.parametrize(("text", "expected"), [
    ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5, 1]),
    # two tokens that came before beat one that came later
    ([1, 2, 7, 9, 2, 8, 1, 2], [7, 9, 2, 8]),
    # and three beat two
    ([1, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3], [9, 5, 2, 3]),
    ([5, 1, 5, 2, 5], [2, 5, 2, 5]),  # of equals the latest, and the copy runs into itself
    ([6, 6], [6, 6, 6, 6]),
    ([1, 2, 3], []), ([4], []),
])
def test_prompt_lookup_copies_what_followed_the_longest_repetition(text, expected):
    assert copied(text) == expected


def test_prompt_lookup_keeps_to_its_sizes_and_to_the_count():
    assert copied([1, 2, 3, 1, 2], count=1) == [3]
    # the last four came before 4, and of these the last three before 5
    assert copied([0, 1, 2, 3, 4, 9, 1, 2, 3, 5, 0, 1, 2, 3], count=1) == [5]


def test_prompt_lookup_learns_as_the_text_grows():
    draft, text = PromptLookup(), [1, 2, 3]
    draft.begin(None, None, {"a": text})
    assert draft.propose({"a": text}, {"a": 2}, GREEDY, None).tokens == [[]]
    text += [7, 1, 2]
    assert draft.propose({"a": text}, {"a": 2}, GREEDY, None).tokens == [[3, 7]]
    text += [8, 1, 2]
    assert draft.propose({"a": text}, {"a": 2}, GREEDY, None).tokens == [[8, 1]]


SHAPE = ModelShape(name="tiny", L=3, D=8, N=2, K=1, H=4, F=16, V=11, tied=True, max_context=32)


def tiny(**changes):
    torch.manual_seed(0)
    return Decoder(ModelConfig(replace(SHAPE, **changes))).eval()


def test_q_is_what_the_tokens_were_drawn_from():
    """20,000 sequences draw one token each from the same q, and its frequencies are q's; a filter's
    zeros are zeros in both."""
    model, B = tiny(), 20_000
    draft, prompt = ModelDraft(model), [1, 2, 3]
    texts = dict.fromkeys(range(B), prompt)
    draft.begin(model, SimpleNamespace(capacity=5), texts)
    sampling = Sampling(temperature=0.8, top_k=4)
    tokens, q = draft.propose(texts, dict.fromkeys(texts, 1), sampling,
                              torch.Generator().manual_seed(0))
    assert q.shape == (B, 1, 11) and (q == q[0]).all()
    share = torch.bincount(torch.tensor(tokens)[:, 0], minlength=11) / B
    assert (share > 0).sum() == 4 and ((share - q[0, 0]).abs() <= 5 * (q[0, 0] / B).sqrt()).all()


def test_a_draft_that_was_partly_rejected_goes_on_as_if_it_had_known():
    """Proposals after a rejection, an acceptance of all and a round without a draft are those of a
    draft that begins there."""
    model = tiny()
    old, text = ModelDraft(model), [1, 2, 3, 4]
    old.begin(model, SimpleNamespace(capacity=30), {0: text})

    def proposed(draft, count=3):
        return draft.propose({0: text}, {0: count}, GREEDY, None).tokens[0]

    def fresh():
        draft = ModelDraft(model)
        draft.begin(model, SimpleNamespace(capacity=30), {0: text})
        return proposed(draft)

    guess = proposed(old)
    text += [guess[0], (guess[1] + 1) % 11]                 # the second fell
    assert proposed(old) == (guess := fresh())
    text += [*guess, 7]                                     # all stood
    assert proposed(old) == (guess := fresh())
    text += [(guess[0] + 1) % 11]                           # none stood
    assert proposed(old, 0) == []
    text += [9]
    assert proposed(old) == fresh()


def test_a_draft_of_another_vocabulary_or_too_short_a_context_is_refused():
    target, prompts = tiny(), {0: [1, 2]}
    with pytest.raises(ValueError, match="draft: its vocabulary has 12 tokens and the target's 11"):
        ModelDraft(tiny(V=12)).begin(target, SimpleNamespace(capacity=9), prompts)
    with pytest.raises(ValueError, match="draft: its context is 8 tokens, and 9 may be needed"):
        ModelDraft(tiny(max_context=8)).begin(target, SimpleNamespace(capacity=9), prompts)


def test_a_copy_of_the_target_guesses_from_the_targets_own_keys_and_values():
    """Where they are in one piece and of its dtype; it leaves them as they were, and goes on from
    them whatever fell."""
    target, rough, text = tiny(), tiny(), [1, 2, 3, 4]
    with torch.no_grad():
        rough.layers[0].down.weight.mul_(1.5)
    cache = ContiguousCache.for_model(target, 1, 20)
    draft = SelfDraft(rough)
    draft.begin(target, cache, {0: text})
    target.step({0: text[:-1]}, cache)
    for _ in range(3):
        guess = draft.propose({0: text}, {0: 3}, GREEDY, None).tokens[0]
        assert cache.lengths == {0: len(text) - 1}
        alone = copy.deepcopy(cache)
        for token in [text[-1], *guess[:2]]:
            assert int(rough.step({0: [token]}, alone).argmax()) == guess.pop(0)
        target.step({0: [text[-1], 7, 8]}, cache)
        text += [7, 8, 9]
    draft.begin(target, PagedCache.for_model(target, 1, 20), {0: text})
    assert draft.cache is not cache and draft.shared is None


def test_an_exit_must_leave_layers_out_and_shares_those_it_keeps():
    model = tiny()
    draft = EarlyExit(model, 2)
    assert [layer is mine
            for layer, mine in zip(model.layers, draft.model.layers, strict=False)] == [True, True]
    for layers in (0, 3):
        with pytest.raises(ValueError, match=f"layers={layers}: 1 to 2 are accepted"):
            EarlyExit(model, layers)


@pytest.mark.parametrize("name", ["exit:", "exit:x", "fp4", ""])
def test_an_unknown_draft_is_refused(name):
    with pytest.raises(ValueError, match="draft="):
        draft_named(name, tiny())
