"""The tokenizer rebuilt from the GGUF against transformers' and llama.cpp's, and text that arrives
in pieces."""

import pytest
import regex
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clawdemy_infer.files.gguf import PRE_TOKENIZERS
from clawdemy_infer.files.load import PACKAGED, packaged_file
from clawdemy_infer.files.tokenizer import Tokenizer
from clawdemy_infer.model.writing import TextStream

TEXTS = [
    "", " ", "hello", " hello", "Hello, world!", "it's we'll I'd", "3.14159 and 1,000,000",
    "12345678901234567890", "x=1;y = 22\n", "tabs\tand\r\nlines\n\n\n",
    "   leading and trailing   ", "Straße café naïve Ångström", "日本語のテキスト", "Привет мир",
    "مرحبا بالعالم", "🙂🏽 👩‍👩‍👧‍👦 🇪🇺", "e\u0301 vs é", "\u200bzero\u00a0width",
    "def f(x):\n    return x**2  # ok\n", "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>",
    "<|im_start", "<repo_name>a/b<file_sep>", "a<|im_end|><|im_end|>b", "\x00\x07\x1b",
    "ﬁ ligature", "supercalifragilisticexpialidocious"*3, "(((]]]{{{",
    "http://example.org/?q=1&r=%20",
]
DIGITS_AFTER_SPACE = [
    "List:\n\n1. one\n\n2. two", "a   12", "x\n\n\n2", "rows:\t\t3", "½ + ¼ = ¾", "a ½ cup",
    "٣٤٥ १२३", "x² + y³", " Ⅷ ⑨"
]


@pytest.fixture(scope="module")
def theirs():
    from transformers import AutoTokenizer

    file = packaged_file(*PACKAGED["smollm2-135m"][:2])
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_ids_and_text_are_those_of_transformers(smollm, theirs, text):
    ids = smollm.tokenizer.encode(text)
    assert ids == theirs(text).input_ids
    assert smollm.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert smollm.tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS + DIGITS_AFTER_SPACE, ids=repr)
def test_text_is_split_as_llama_cpp_splits_it_for_smollm(text):
    """src/llama-vocab.cpp of ggml-org/llama.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM: two expressions, one
    after the other."""
    digits = regex.compile(r"\p{N}|[^\p{N}]+")
    words = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    expected = [word for part in digits.findall(text) for word in words.findall(part)]
    spans = [span for _, span in PRE_TOKENIZERS["smollm"].pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == expected


def test_a_numbered_list_keeps_its_blank_line_whole(smollm, theirs):
    """Where transformers 5.23 reads this file otherwise: it knows no `smollm` splitting and uses
    GPT-2's, which cuts the white space before a digit in two. The model was trained with each digit
    apart."""
    blank_line, = smollm.tokenizer.encode("\n\n")
    assert smollm.tokenizer.encode("\n\n1.")[0] == blank_line
    assert theirs("\n\n1.").input_ids[0] != blank_line
    theirs.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS["smollm"]
    try:
        for text in TEXTS + DIGITS_AFTER_SPACE:
            assert smollm.tokenizer.encode(text) == theirs(text).input_ids
    finally:
        theirs.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS["gpt-2"]


@pytest.mark.parametrize(
    "messages",
    [[{"role": "user", "content": "Hi"}],
     [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "2 + 2?"}],
     [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
      {"role": "user", "content": "  c\n"}], ], ids=["user", "system", "three turns"])
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_is_that_of_transformers(smollm, theirs, messages, prompt):
    ours = smollm.tokenizer
    assert ours.chat_text(messages, prompt) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt)
    assert ours.chat(messages, prompt) == theirs.apply_chat_template(
        messages, add_generation_prompt=prompt)["input_ids"]


def test_chat_without_a_template_or_with_one_that_refuses_is_a_value_error(smollm):
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(smollm.tokenizer.backend).chat([{"role": "user", "content": "Hi"}])
    strict = Tokenizer(smollm.tokenizer.backend, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="roles must alternate"):
        strict.chat([{"role": "user", "content": "Hi"}])


def streamed(tokenizer, ids, stop=()):
    stream, pieces = TextStream(tokenizer, stop), []
    for id in ids:
        pieces.append(stream.push(id))
        if stream.stopped:
            break
    pieces.append(stream.close())
    return stream, pieces


@given(st.lists(st.integers(0, 49151) | st.integers(17, 272), max_size=40))
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_decoded_text_for_any_tokens(smollm, ids):
    stream, pieces = streamed(smollm.tokenizer, ids)
    assert "".join(pieces) == stream.text == smollm.tokenizer.decode(ids)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_no_piece_holds_half_a_character(smollm, text):
    ids = smollm.tokenizer.encode(text)
    # this vocabulary lacks a few rare bytes
    assume(smollm.tokenizer.decode(ids) == text and "\ufffd" not in text)
    _, pieces = streamed(smollm.tokenizer, ids)
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.text("ab<>\n é🙂", max_size=30),
       st.lists(st.text("ab<>\n é🙂", min_size=1, max_size=4), max_size=3))
@settings(max_examples=500, deadline=None)
def test_text_ends_before_the_first_stop_string_however_tokens_cut_it(smollm, text, stop):
    """The oracle decodes everything anew after each token and looks for stop strings in the
    whole."""
    ids = smollm.tokenizer.encode(text)
    expected, stopped = text, False
    for n in range(1, len(ids) + 1):
        so_far = smollm.tokenizer.decode(ids[:n])
        found = [so_far.find(s) for s in stop if s in so_far]
        if found and not so_far.endswith("\ufffd"):
            expected, stopped = so_far[:min(found)], True
            break
    stream, pieces = streamed(smollm.tokenizer, ids, stop)
    assert (stream.text, stream.stopped) == (expected, stopped)
    assert "".join(pieces) == expected


def test_a_stop_string_over_several_tokens_is_never_shown_in_part(smollm):
    ids = smollm.tokenizer.encode("one two END three")
    assert len(smollm.tokenizer.encode(" two END")) == 2
    _, pieces = streamed(smollm.tokenizer, ids, [" two END"])
    assert "".join(pieces) == "one"
