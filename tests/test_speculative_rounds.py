"""Speculative decoding with the real model: greedy tokens are those of plain decoding, whoever
drafts and however keys are kept."""

import json

import pytest

from clawdemy_infer.cli import main as cli
from clawdemy_infer.kv_cache import BlockPool, BlockTables, ContiguousCache, PagedCache
from clawdemy_infer.model import Sampling, generate
from clawdemy_infer.speculative import (
    ModelDraft,
    PromptLookup,
    Proposal,
    speculate,
    speculate_batch,
)
from clawdemy_infer.variants.self_drafts import EarlyExit, draft_named

PROMPTS = [
    "The capital of France is", "def area(r):\n    return 3.14 * r * r\n\ndef area(",
    "red, green, blue, red, green, blue, red,"
]
TOKENS = 11


@pytest.fixture(scope="module")
def plain(smollm):
    return [generate(smollm, prompt, TOKENS) for prompt in PROMPTS]


@pytest.fixture(scope="module", params=["lookup", "int8", "int4", "exit:9"])
def draft(smollm, request):
    return draft_named(request.param, smollm)


class Oracle:
    """Knows the text, and is wrong wherever it is told to be."""

    def __init__(self, texts, wrong=()):
        self.texts, self.wrong = texts, wrong

    def begin(self, target, cache, prompts):
        self.known = dict(zip(prompts, self.texts, strict=True))

    def propose(self, texts, counts, sampling, generator):
        tokens = []
        for name, text in texts.items():
            rest = self.known[name][len(text):len(text) + counts[name]]
            tokens.append([token + (len(text) + i in self.wrong) for i, token in enumerate(rest)])
        return Proposal(tokens)


def oracle(generations, wrong=()):
    return Oracle([each.prompt_tokens + each.tokens for each in generations], wrong)


def test_greedy_tokens_of_a_ragged_batch_in_pages_are_those_of_plain_decoding(smollm, plain, draft):
    together = speculate_batch(smollm, PROMPTS, draft, TOKENS, gamma=3, cache="paged")
    assert [each.tokens for each in together] == [each.tokens for each in plain]
    assert [each.text for each in together] == [each.text for each in plain]


def test_greedy_tokens_of_one_sequence_are_those_of_plain_decoding(smollm, plain, draft):
    alone = speculate(smollm, PROMPTS[1], draft, TOKENS, gamma=4)
    assert alone.tokens == plain[1].tokens
    # the first came from the prefill
    assert sum(each.accepted + 1 for each in alone.rounds) == TOKENS - 1


def test_a_draft_that_is_right_brings_all_its_tokens_and_one_more(smollm, plain):
    result = speculate(smollm, PROMPTS[0], oracle(plain[:1]), TOKENS, gamma=3)
    assert result.tokens == plain[0].tokens
    assert [(len(each.drafted), each.accepted) for each in result.rounds] == [(3, 3), (3, 3),
                                                                              (1, 1)]
    assert [each.token for each in result.rounds] == [result.tokens[i] for i in (4, 8, 10)]


def test_a_draft_that_is_wrong_brings_one_token_a_round_and_costs_no_other(smollm, plain):
    start = len(plain[0].prompt_tokens)
    wrong = oracle(plain[:1], wrong=range(start, start + TOKENS))
    result = speculate(smollm, PROMPTS[0], wrong, TOKENS, gamma=2, cache="paged")
    assert result.tokens == plain[0].tokens
    assert [each.accepted for each in result.rounds] == [0] * (TOKENS - 1)


def test_a_batch_keeps_another_number_of_each_sequence(smollm, plain):
    cache = PagedCache.for_model(smollm, 3, 64, block_size=4)
    wrong = set(range(len(plain[1].prompt_tokens) + 2, 40, 3))
    results = speculate_batch(smollm, PROMPTS, oracle(plain, wrong), TOKENS, gamma=4, cache=cache)
    assert [each.tokens for each in results] == [each.tokens for each in plain]
    assert len({len(each.rounds) for each in results}) > 1
    # As after `generate`: all but the last token is kept, and blocks for no more than that.
    lengths = [len(each.prompt_tokens) + TOKENS - 1 for each in plain]
    assert list(cache.lengths.values()) == lengths
    assert cache.tables.pool.used == sum(-(-length // 4) for length in lengths)


def test_a_stop_string_inside_an_accepted_run_ends_the_text_before_it(smollm, plain):
    stop = plain[0].text[3:17]
    expected = generate(smollm, PROMPTS[0], TOKENS, stop=stop)
    pieces = []
    result = speculate(smollm, PROMPTS[0], oracle(plain[:1]), TOKENS, gamma=12, stop=stop,
                       on_token=pieces.append)
    assert result.rounds[0].accepted == TOKENS - 2           # it could have gone on
    assert (result.text, result.tokens, result.finish_reason) == (expected.text, expected.tokens,
                                                                  "stop")
    assert "".join(pieces) == result.text


def test_an_end_of_sequence_token_inside_an_accepted_run_ends_the_text(smollm):
    ids = smollm.tokenizer.chat([{"role": "user", "content": "Say only: yes"}])
    expected = generate(smollm, ids, 60)
    assert expected.finish_reason == "eos"
    beyond = Oracle([[*ids, *expected.tokens, 5, 5, 5]])
    result = speculate(smollm, ids, beyond, 60, gamma=len(expected.tokens) + 2)
    assert (result.tokens, result.text, result.finish_reason) == (expected.tokens, expected.text,
                                                                  "eos")
    assert len(result.rounds) == 1


@pytest.mark.parametrize("name", ["itself", "exit"])
def test_the_context_can_be_filled_to_its_last_token_and_no_further(smollm, name):
    from dataclasses import replace

    from clawdemy_infer.variants.pruning import without_layers

    small = without_layers(smollm, range(6, 30))  # a model of its own with a short context
    small.config = replace(small.config, shape=replace(small.config.shape, max_context=24))
    draft = ModelDraft(small) if name == "itself" else EarlyExit(small, 5)
    prompt = [17, 4, 998, 17, 4]
    expected = generate(small, prompt, 19)
    assert len(expected.tokens) == 19
    tables = BlockTables(BlockPool(3, 8))                   # and not a block more than that
    cache = PagedCache.over(small, tables, 24)
    cache.add(0)
    assert speculate(small, prompt, draft, 19, gamma=5, cache=cache).tokens == expected.tokens
    with pytest.raises(ValueError, match="together 25, but the model's context is 24"):
        speculate(small, prompt, draft, 20, gamma=5)


def test_sampling_from_a_seed_can_be_repeated(smollm, draft):
    def sampled(seed):
        return speculate(smollm, PROMPTS[0], draft, 5, Sampling(temperature=0.9, top_k=40,
                                                                seed=seed)).tokens

    assert sampled(3) == sampled(3)


def test_the_last_tokens_are_not_drafted_in_vain(smollm, plain):
    """Beyond max_tokens nothing is needed, and one token always is the target's own."""
    result = speculate(smollm, PROMPTS[0], oracle(plain[:1]), 4, gamma=8)
    assert [len(each.drafted) for each in result.rounds] == [2]
    assert speculate(smollm, PROMPTS[0], oracle(plain[:1]), 1, gamma=8).rounds == []


def test_without_drafted_tokens_it_is_plain_decoding(smollm, plain):
    result = speculate(smollm, PROMPTS[0], PromptLookup(), 5, gamma=0)
    assert result.tokens == plain[0].tokens[:5] and len(result.rounds) == 4


def test_an_interrupt_keeps_text_and_cache_in_step(smollm, plain):
    cache, shown = ContiguousCache.for_model(smollm, 1, 64), []

    def impatient(piece):
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    result = speculate(smollm, PROMPTS[0], oracle(plain[:1]), TOKENS, gamma=2, cache=cache,
                       on_token=impatient)
    assert result.finish_reason == "interrupted" and result.tokens == plain[0].tokens[:len(result.
                                                                                           tokens)]
    assert cache.lengths[0] == len(result.prompt_tokens) + len(result.tokens) - 1
    rest = generate(smollm, result.tokens[-1:], TOKENS - len(result.tokens), cache=cache)
    assert result.tokens + rest.tokens == plain[0].tokens


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [("", {}, "prompt is empty"), ("hi", {"gamma": -1}, "gamma=-1"),
     ("hi", {"max_tokens": 0}, "max_tokens=0"),
     ("hi", {"cache": "window"
             }, "cache='window': speculation takes tokens back; accepted are contiguous, paged"),
     ("hi", {"stop": ""}, "stop="), ([3, 49152], {}, "tokens hold 49152"), ])
def test_what_cannot_be_generated_is_refused_by_value(smollm, prompt, arguments, message):
    with pytest.raises(ValueError, match=message):
        speculate(smollm, prompt, PromptLookup(), **arguments)


def test_a_cache_that_holds_tokens_already_is_refused(smollm):
    cache = ContiguousCache.for_model(smollm, 1, 40)
    generate(smollm, PROMPTS[0], 2, cache=cache)
    with pytest.raises(ValueError, match="cache: it holds"):
        speculate(smollm, PROMPTS[0], PromptLookup(), cache=cache)


def test_the_command_speculates_and_lists_its_rounds(smollm, plain, monkeypatch, capsys):
    monkeypatch.setattr("clawdemy_infer.files.load_model", lambda *_, **__: smollm)
    line = [
        "generate", "--prompt", PROMPTS[2], "--max-tokens",
        str(TOKENS), "--draft", "lookup", "--gamma", "3"
    ]
    assert cli.main([*line, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["tokens"] == plain[2].tokens
    assert sum(each["accepted"] + 1 for each in out["rounds"]) == TOKENS - 1
    assert cli.main(line) == 0
    assert f"{len(out['rounds'])} rounds after the first token" in capsys.readouterr().err


def test_the_command_refuses_an_unknown_draft_before_it_loads_anything(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "--prompt", "a", "--draft", "magic"])
    assert stop.value.code == 2 and "--draft: 'magic': accepted are lookup" in capsys.readouterr(
    ).err
