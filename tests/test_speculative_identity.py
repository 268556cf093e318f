"""Greedy identity on the real model: twenty prompts, every draft, alone and through the engine. The
texts are those of plain decoding."""

import pytest

from clawdemy_infer.batching import Policy, Request
from clawdemy_infer.model import generate
from clawdemy_infer.speculative import speculate_batch
from clawdemy_infer.speculative.engine import engine
from clawdemy_infer.variants.self_drafts import draft_named

DRAFTS = ["lookup", "int8", "int4", "exit:9", "trained"]
VARIED = (
    "The capital of France is", "def area(r):\n    return 3.14 * r * r\n\ndef area(",
    "red, green, blue, red, green, blue, red,", "Once upon a time, in a village by the sea,",
    "1, 2, 3, 4, 5, 6,", "Q: What is photosynthesis?\nA:", "import numpy as np\n\nx = np.",
    "Dear Sir or Madam,\n\nI am writing to", "The three laws of motion are",
    "To make bread you need flour, water,", "<html>\n<head>\n<title>", "SELECT name, age FROM",
    "In 1969, the first", "Roses are red,\nviolets are", "Two plus two is",
    "The opposite of hot is", "for i in range(10):\n    print(", "Monday, Tuesday, Wednesday,",
    "La capitale de la France est", "A")
each_draft = pytest.mark.parametrize("name", DRAFTS)


@pytest.fixture(scope="module")
def plain(smollm):
    """Each text alone, without a draft; as long as it is ever asked for."""
    found = {}

    def alone(prompt, count):
        if len(found.get(prompt, ())) < count:
            found[prompt] = generate(smollm, prompt, count).tokens
        return found[prompt][:count]
    return alone


def serve(smollm, draft, count, policy, prompts=VARIED, **options):
    served = engine(smollm, draft, policy, kv_bytes=2**28, **options)
    report = served.run([Request(i, prompt, count) for i, prompt in enumerate(prompts)])
    assert served.scheduler.tables.pool.used == 0
    return report


@each_draft
def test_the_engine_serves_a_ragged_batch_as_each_would_be_alone(smollm, plain, name):
    """Few tokens of eight prompts, in chunks and pages; prompts join while others are verified."""
    prompts = VARIED[:8]
    report = serve(smollm, draft_named(name, smollm), 4,
                   Policy(max_batch=6, token_budget=48, gamma=3), prompts)
    assert [sequence.tokens
            for sequence in report.sequences] == [plain(prompt, 4) for prompt in prompts]


def test_a_stop_string_and_the_end_inside_an_accepted_run_end_a_request(smollm):
    """The draft is the target, so whole runs are accepted, and the text ends in the middle of
    one."""
    served = engine(smollm, draft_named("int8", smollm), Policy(gamma=6), kv_bytes=2**27)
    chat = smollm.tokenizer.chat([{"role": "user", "content": "Say only: yes"}])
    known = generate(smollm, VARIED[0], 11).text
    asked = {
        "stop": (VARIED[0], 11, (known[3:17], )), "eos": (chat, 40, ()),
        "length": (VARIED[4], 5, ())
    }
    for name, (prompt, most, stop) in asked.items():
        served.add(Request(name, prompt, most, stop=stop))
    for sequence in served.run().sequences:
        prompt, most, stop = asked[sequence.request.id]
        expected = generate(smollm, prompt, most, stop=stop)
        assert (sequence.tokens, sequence.text, sequence.reason) == (expected.tokens, expected.text,
                                                                     expected.finish_reason)
        assert sequence.reason == sequence.request.id and sequence.accepted


@pytest.mark.slow
@each_draft
def test_twenty_texts_of_fifty_tokens_are_those_of_plain_decoding(smollm, plain, name):
    count, draft = 50, draft_named(name, smollm)
    expected = [plain(prompt, count) for prompt in VARIED]
    together = speculate_batch(smollm, VARIED, draft, count, gamma=4, cache="paged")
    assert [each.tokens for each in together] == [
        tokens[:len(each.tokens)] for each, tokens in zip(together, expected, strict=True)
    ]
    for policy in (Policy(gamma=4), Policy(max_batch=7, token_budget=64, gamma=4)):
        assert [sequence.tokens
                for sequence in serve(smollm, draft, count, policy).sequences] == expected
