"""The trained draft: exact with any weights, never confused about whose feature is whose, and made
by a script that runs."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from chi_square import FALSE_ALARM, p_value, triple_chances, triples
from safetensors import safe_open
from torch.nn import functional as F

from clawdemy_data import draft_samples, train_draft
from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.files.load import PACKAGED
from clawdemy_infer.kv_cache import ContiguousCache, PagedCache
from clawdemy_infer.model import Decoder, ModelConfig, Sampling, generate
from clawdemy_infer.speculative import speculate, speculate_batch
from clawdemy_infer.variants.self_drafts import draft_named
from clawdemy_infer.variants.trained import SHIPPED, FeatureLayer, TrainedDraft, load_draft

SHAPE = ModelShape(name="tiny", L=3, D=8, N=2, K=1, H=4, F=16, V=5, tied=False, max_context=64)


def tiny(**changes):
    torch.manual_seed(0)
    model = Decoder(ModelConfig(replace(SHAPE, **changes))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model


def random_draft(model, vocabulary=(0, 1, 3, 4)):
    torch.manual_seed(1)
    draft = TrainedDraft(model,
                         FeatureLayer(model).to(model.dtype).eval(), torch.tensor(vocabulary))
    weight = (model.embed
              if model.config.shape.tied else model.head).weight[draft.vocabulary].detach()
    # PyTorch's int8 kernel, which may be the fastest, crashes on 8 inputs
    draft.head = lambda x: F.linear(x, weight)
    return draft


@pytest.mark.parametrize("keeper", ["contiguous", "paged"])
def test_tokens_are_distributed_as_the_targets_own_though_the_draft_lacks_one(keeper):
    """All triples of tokens after one prompt, against the product of their conditional chances."""
    model, prompt, texts, rounds = tiny(), [1, 2], [], 0
    sampling = Sampling(temperature=1.0, min_p=0.05)
    while rounds < 5_000:
        cache = keeper if keeper == "contiguous" else PagedCache.for_model(
            model, 1000, 8, block_size=4)
        done = speculate_batch(model, [prompt]*1000, random_draft(model), 3,
                               replace(sampling, seed=rounds), gamma=2, cache=cache)
        texts += [each.tokens for each in done]
        rounds += sum(len(each.rounds) for each in done)
    chances = triple_chances(model, prompt, 5, sampling)
    assert p_value(triples(texts, 5).flatten(), chances.flatten()) > FALSE_ALARM


def test_q_is_what_was_drawn_from_and_zero_outside_the_vocabulary():
    model, B = tiny(), 4_000
    draft, texts = random_draft(model), dict.fromkeys(range(B), [1, 2, 3])
    cache = ContiguousCache.for_model(model, B, 6)
    draft.begin(model, cache, texts)
    model.step({sequence: text[:-1] for sequence, text in texts.items()}, cache)
    tokens, q = draft.propose(texts, dict.fromkeys(texts, 1), Sampling(temperature=0.8, top_k=3),
                              torch.Generator().manual_seed(0))
    share = torch.bincount(torch.tensor(tokens)[:, 0], minlength=5) / B
    assert q.shape == (B, 1, 5) and (q == q[0]).all() and q[0, 0, 2] == 0 and (q[0, 0]
                                                                               > 0).sum() == 3
    assert ((share - q[0, 0]).abs() <= 5 * (q[0, 0] / B).sqrt()).all()


def test_guesses_do_not_depend_on_what_was_rejected_nor_on_the_neighbours():
    """A draft that was partly rejected, in a batch, has the q of one that begins there, alone."""
    model = tiny(V=50, max_context=200)
    sampling, prompts = Sampling(temperature=3.0, seed=3), [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]
    seen = []

    class Watched(TrainedDraft):
        def propose(self, texts, counts, sampling, generator):
            proposal = super().propose(texts, counts, sampling, generator)
            if proposal.q is not None:
                seen.extend((list(text), q) for text, q, count in zip(
                    texts.values(), proposal.q, counts.values(), strict=True) if count)
            return proposal

    draft = Watched(model, random_draft(model, range(50)).model, torch.arange(50))
    draft.head = model.head  # a packed one rounds all rows of a batch to one scale
    done = speculate_batch(model, prompts, draft, 40, sampling, gamma=3)
    assert sum(each.accepted for one in done for each in one.rounds) > 5
    for text, q in seen:
        alone, cache = random_draft(model, range(50)), ContiguousCache.for_model(model, 1, 80)
        alone.head = model.head
        alone.begin(model, cache, {0: text})
        model.step({0: text[:-1]}, cache)
        torch.testing.assert_close(
            alone.propose({0: text}, {0: 1}, sampling, sampling.generator()).q[0, 0], q[0])


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_a_target_in_cpp_gets_a_draft_in_cpp_that_says_the_same():
    model, text = tiny(V=50, D=64, H=32), [1, 2, 3, 4, 1, 0, 2, 7, 9]
    proposals, sampling = [], Sampling(temperature=1.0)
    for target in (model, faster(model, compile=True)):
        draft, cache = random_draft(target, range(50)), ContiguousCache.for_model(target, 1, 20)
        assert bool(draft.model.in_cpp) == (target is not model)
        draft.begin(target, cache, {0: text})
        for read, known in ((text[:5], text[:6]), (text[5:8], text)):
            target.step({0: read}, cache)
            proposals.append(draft.propose({0: known}, {0: 3}, sampling,
                                           torch.Generator().manual_seed(len(known))))
    for eager, fast in zip(proposals[:2], proposals[2:], strict=True):
        assert eager.tokens == fast.tokens
        torch.testing.assert_close(fast.q, eager.q, rtol=1e-4, atol=1e-5)


def test_a_prompt_may_come_in_pieces():
    model = tiny()
    text, guesses = [1, 2, 3, 4, 1, 0, 2], []
    for pieces in ([text[:6]], [text[:1], text[1:4], text[4:6]]):
        draft, cache = random_draft(model), ContiguousCache.for_model(model, 1, 20)
        draft.begin(model, cache, {0: text})
        for piece in pieces:
            model.step({0: piece}, cache)
        guesses.append(
            draft.propose({0: text}, {0: 4}, Sampling(temperature=1.0),
                          torch.Generator().manual_seed(0)))
    assert guesses[0].tokens == guesses[1].tokens
    torch.testing.assert_close(guesses[0].q, guesses[1].q)


def test_another_target_is_refused(tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match="draft: it goes on from the vectors of the model"):
        random_draft(model).begin(tiny(), SimpleNamespace(capacity=9), {0: [1]})
    with pytest.raises(ValueError, match="trained for a target of another shape"):
        load_draft(model)


def test_the_script_writes_learns_and_saves(tmp_path, smollm, monkeypatch):
    target = tiny(V=smollm.config.shape.V, D=64, H=32, tied=True, max_context=1024)
    target.tokenizer, out = smollm.tokenizer, tmp_path / "draft.safetensors"
    target.config = replace(target.config, bos_id=1, eos_ids=(2,))
    monkeypatch.setattr(draft_samples, "SHARD_TOKENS", 400)
    monkeypatch.setattr(draft_samples, "TEXTS_AT_ONCE", 6)
    train_draft.make(target, out, tokens=1200, steps=3)
    with safe_open(out, "pt") as file:
        assert file.metadata()["steps"] == "3" and int(file.metadata()["tokens"]) >= 1000
    draft = load_draft(target, out)
    assert len(draft.vocabulary) == train_draft.VOCABULARY
    assert speculate(target, [5, 6, 7], draft, 8, gamma=3).tokens == generate(target, [5, 6, 7],
                                                                              8).tokens


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_the_shipped_draft_leaves_greedy_text_as_it_is(smollm, cache):
    prompts = [
        "The capital of France is", "def area(r):\n    return 3.14 * r * r\n\ndef area(",
        "red, green, blue, red, green, blue, red,"
    ]
    done = speculate_batch(smollm, prompts, draft_named("trained", smollm), 11, gamma=3,
                           cache=cache)
    assert [each.tokens
            for each in done] == [generate(smollm, prompt, 11).tokens for prompt in prompts]
    rounds = [each for one in done for each in one.rounds]
    assert sum(each.accepted for each in rounds) > 0.2 * len(rounds)  # far more than by chance


def test_the_shipped_draft_is_small_and_says_how_it_was_made():
    assert SHIPPED.stat().st_size <= 12_000_000
    with safe_open(SHIPPED, "pt") as file:
        about = file.metadata()
    assert about["target"] == "smollm2-135m" and about["target_sha256"] == PACKAGED["smollm2-135m"][
        2]
    assert {"tokens", "steps", "batch", "rate", "seed", "alpha"} <= set(about)
    program, *options = about["command"].split()[2:]
    # the script has moved since
    assert program.rpartition(".")[2] == train_draft.__name__.rpartition(".")[2]
    assert dict(zip(options[::2], options[1::2],
                    strict=True)).items() >= {(f"--{key}", about[key])
                                              for key in ("steps", "rate", "seed")}
