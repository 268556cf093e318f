"""Generation with the real model: what ends it, what it reports, and what it refuses."""

import sys

import pytest

from clawdemy_infer.kv_cache import ContiguousCache, PagedCache
from clawdemy_infer.model import Sampling, generate

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def greedy(smollm):
    return generate(smollm, PROMPT, max_tokens=12)


def test_a_text_and_its_ids_are_the_same_prompt(smollm, greedy):
    ids = smollm.tokenizer.encode(PROMPT)
    assert greedy.prompt_tokens == ids
    assert generate(smollm, ids, max_tokens=12).tokens == greedy.tokens
    assert "Paris" in greedy.text and greedy.finish_reason == "length"


@pytest.mark.parametrize("cache", ["none", "paged"])
def test_however_keys_and_values_are_kept_the_tokens_are_the_same(smollm, greedy, cache):
    assert generate(smollm, PROMPT, max_tokens=12, cache=cache).tokens == greedy.tokens


def test_a_cache_of_ones_own_goes_on_where_it_was(smollm, greedy):
    cache = PagedCache.for_model(smollm, batch=1, capacity=40, block_size=5)
    first = generate(smollm, PROMPT, max_tokens=5, cache=cache)
    # the last token was chosen, and not yet brought
    assert cache.lengths == {0: len(first.prompt_tokens) + 4}
    rest = generate(smollm, first.tokens[-1:], max_tokens=7, cache=cache)
    assert first.tokens + rest.tokens == greedy.tokens


def test_streamed_pieces_join_to_the_text(smollm):
    pieces = []
    hot = Sampling(temperature=1.5, seed=1)
    generation = generate(smollm, "Emoji: 🙂🙂🏽 日本語 🙂", max_tokens=24, sampling=hot,
                          on_token=pieces.append)
    assert "".join(pieces) == generation.text == smollm.tokenizer.decode(generation.tokens)
    assert len(pieces) > 3 and all(pieces)


def test_a_stop_string_ends_the_text_before_it_and_the_generation_with_its_last_token(
        smollm, greedy):
    stop = greedy.text[3:17]                # begins and ends in the middle of tokens
    assert len(smollm.tokenizer.encode(stop)) > 2
    pieces = []
    generation = generate(smollm, PROMPT, max_tokens=12, stop=(stop, "never"),
                          on_token=pieces.append)
    assert (generation.text, generation.finish_reason) == (greedy.text[:3], "stop")
    assert "".join(pieces) == generation.text
    assert generation.tokens == greedy.tokens[:len(generation.tokens)]
    assert stop in smollm.tokenizer.decode(generation.tokens)
    assert stop not in smollm.tokenizer.decode(generation.tokens[:-1])
    # one string will do
    assert generate(smollm, PROMPT, max_tokens=12, stop=stop).text == greedy.text[:3]


def test_what_looks_like_a_stop_string_and_is_none_comes_out_in_the_end(smollm, greedy):
    almost = greedy.text[-3:] + "#"
    generation = generate(smollm, PROMPT, max_tokens=12, stop=almost)
    assert (generation.text, generation.finish_reason) == (greedy.text, "length")


def test_the_end_of_sequence_token_ends_and_is_not_text(smollm):
    ids = smollm.tokenizer.chat([{"role": "user", "content": "Say only: yes"}])
    generation = generate(smollm, ids, max_tokens=60)
    assert generation.finish_reason == "eos"
    assert generation.tokens[-1] in smollm.config.eos_ids and "<|" not in generation.text


def test_a_seed_repeats_a_sampled_generation(smollm):
    def sampled(seed):
        return generate(smollm, PROMPT, max_tokens=10, sampling=Sampling(
            temperature=1.2, top_k=50, seed=seed)).tokens

    assert sampled(7) == sampled(7) != sampled(8)


def test_times_are_those_of_the_clock(smollm, monkeypatch):
    """With a clock that ticks once a reading: start 0, tokens at 1, 2, 3, 4."""
    ticks = iter(range(100))
    # the package's `generate` is the function
    module = sys.modules["clawdemy_infer.model.generate"]
    monkeypatch.setattr(module, "now", lambda: float(next(ticks)))
    generation = generate(smollm, PROMPT, max_tokens=4)
    assert (generation.ttft_s, generation.tpot_s) == (1.0, 1.0)
    assert generate(smollm, PROMPT, max_tokens=1).tpot_s is None


@pytest.mark.parametrize(("prompt", "arguments", "message"), [
    ("", {}, "prompt is empty"), ([], {}, "prompt is empty"), ([3, 49152], {}, "tokens hold 49152"),
    ("hi", {"max_tokens": 0}, "max_tokens=0: at least 1 is accepted"),
    ("hi", {"stop": ""}, "stop="), ("hi", {"stop": ("a", "")}, "stop="),
    ("hi", {"cache": "shoebox"},
     "cache='shoebox': accepted are contiguous, paged, none, or a cache"),
    ([5]*8000, {"max_tokens": 193},
     "prompt has 8000 tokens and max_tokens=193: together 8193, but the model's context is 8192"),
], ids=[
    "empty", "no ids", "unknown id", "no tokens", "empty stop", "one empty stop", "no such cache",
    "too long"
])
def test_what_cannot_be_generated_is_refused_by_value(smollm, prompt, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(smollm, prompt, **arguments)


def test_a_cache_of_several_sequences_is_refused(smollm):
    with pytest.raises(ValueError, match="cache: it has 2 sequences"):
        generate(smollm, PROMPT, cache=ContiguousCache.for_model(smollm, batch=2, capacity=40))


def test_an_error_in_the_callback_comes_out_and_the_model_goes_on(smollm, greedy):
    def broken(piece):
        raise RuntimeError("no more paper")

    with pytest.raises(RuntimeError, match="no more paper"):
        generate(smollm, PROMPT, on_token=broken)
    assert generate(smollm, PROMPT, max_tokens=12).tokens == greedy.tokens


def test_an_interrupt_in_the_callback_returns_what_was_shown(smollm, greedy):
    shown = []

    def impatient(piece):
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    generation = generate(smollm, PROMPT, max_tokens=12, on_token=impatient)
    assert generation.finish_reason == "interrupted"
    assert generation.text == "".join(shown) and greedy.text.startswith(generation.text)
