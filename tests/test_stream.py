"""What a server sends: events as the specification of server-sent events has them, whatever the
lines end with and however the bytes are cut; and whatever comes, `BadAnswer` at worst."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawdemy_infer.rigs import stream
from clawdemy_infer.rigs.stream import Answer, BadAnswer, events, printable, read_events, words

quick = settings(max_examples=100, deadline=None)


def cut(data: bytes, places) -> list[bytes]:
    """`data` in the pieces that lie between `places`, counted modulo its length."""
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def read(*chunks: bytes) -> list[str]:
    waiting = bytearray()
    return [data for chunk in chunks for data in events(waiting, chunk)]


# ---- events ----


lines = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=9)


@quick
@given(st.lists(st.lists(lines, min_size=1, max_size=3), max_size=5),
       st.lists(st.sampled_from(["\r\n", "\n", "\r"]), min_size=1, max_size=7),
       st.lists(st.integers(0, 10**6), max_size=9))
def test_the_lines_of_an_event_are_joined_whatever_ends_them_and_however_they_are_cut(
        wanted, ends, places):
    """U+2028, U+2029 and U+0085 are among the characters of a line."""
    said, count = "", 0
    for event in wanted:
        for text in (": ping", "id: 7", *(f"data: {line}" for line in event), ""):
            end = ends[count % len(ends)]
            if end == "\n" and said.endswith("\r"):         # would be one line end, a CRLF
                end = "\r"
            said, count = said + text + end, count + 1
    found = read(*cut(said.encode(), places))
    assert found == [data for event in wanted if (data := "\n".join(event))]


@pytest.mark.parametrize(("said", "wanted"), [
    (b"\xef\xbb\xbfdata: a\n\n", ["a"]), (b"data:a\n\ndata:  b\n\n", ["a", " b"]),
    (b"data: a\n", []), (b"data: a\r\r", ["a"]), (b"datax: a\n\nx\n\n: data: c\n\n", []),
    (b"event: delta\ndata: a\nid: 1\nretry: 2\n\n", ["a"]),
    ("data: é".encode("latin-1") + b"\n\n", ["�"]), ("data: 日\n\n".encode(), ["日"]),
], ids=repr)
def test_events_by_hand(said, wanted):
    assert read(said) == wanted
    assert read(*(said[i:i + 1] for i in range(len(said)))) == wanted


@pytest.mark.parametrize("said", [b"event: error\ndata: out of memory\n\n",
                                  b'error: {"message": "out of memory"}\n\n',
                                  b'event: error\ndata: {"detail": "out of memory"}\n\n'])
def test_an_event_of_the_kind_error_is_one(said):
    with pytest.raises(BadAnswer, match="the server says out of memory"):
        read(said)


@quick
@given(st.lists(st.binary(max_size=40) | st.sampled_from(
    [b"data: ", b"\n", b"\r", b"\n\n", b'{"choices": [', b"[DONE]", b"event: error\n"])))
def test_any_bytes_are_read_or_refused_and_never_more_is_kept_than_the_limit(chunks):
    waiting = bytearray()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "MAX_EVENT_BYTES", 60)
        try:
            for chunk in chunks:
                list(events(waiting, chunk))
                assert len(waiting) <= 60
        except BadAnswer as error:
            assert "60 bytes" in str(error) or "the server says" in str(error)


def test_the_limit_is_in_the_error():
    with pytest.raises(BadAnswer, match="more than 1,048,576 bytes"):
        read(b"data: ", *[b"x" * 2**16] * 17)


# ---- what an event says ----


def event(*texts, **more):
    return json.dumps({"choices": [{"text": text, "finish_reason": None} for text in texts]} | more)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["choices", "text", "finish_reason", "usage", "completion_tokens", "prompt_tokens", "error",
         "message", "detail", "object", "type", "delta"]) | st.text(max_size=3), inner, max_size=4),
    max_leaves=12)


@quick
@given(st.lists(values, max_size=3) | st.fixed_dictionaries(
    {"choices": values | st.lists(st.fixed_dictionaries({"text": values, "finish_reason": values})),
     "usage": values}).map(lambda value: [value]), st.text(max_size=5))
def test_any_json_gives_checked_values_or_is_refused(found, rest):
    data = "\n".join(map(json.dumps, found)) + rest
    try:
        for one in read_events(data):
            assert all(isinstance(text, str) and text for text in one.texts)
            assert type(one.reason) is str and type(one.tokens) is type(one.prompt_tokens) is int
            assert 0 <= one.tokens <= stream.MAX_TOKENS >= one.prompt_tokens >= 0
    except BadAnswer:
        pass
    assert isinstance(words(data), str)


@pytest.mark.parametrize("data", [
    "null", "5", "[1, 2]", '"error"', "{}", '{"choices": null}', '{"choices": [5, null]}',
    '{"choices": "abc"}', '{"choices": {}}', '{"choices": [{"delta": {"content": "x"}}]}',
    '{"choices": [], "error": null}', '{"choices": [{"text": null, "finish_reason": ""}]}',
    '{"choices": [{"text": "", "finish_reason": 7}]}', '{"id": "x", "usage": 5}'])
def test_what_carries_no_choice_says_nothing(data):
    assert [(one.texts, one.reason, one.tokens) for one in read_events(data)] in (
        [], [([], "", 0)])


@pytest.mark.parametrize("usage", [
    None, 5, "7", [], {}, {"total_tokens": 8}, {"completion_tokens": "7"},
    {"completion_tokens": 2.5}, {"completion_tokens": -5}, {"completion_tokens": None},
    {"completion_tokens": True}, {"completion_tokens": 10**9}, {"completion_tokens": float("nan")}])
def test_usage_that_cannot_be_used_is_not_said(usage):
    [one] = read_events(event(" a", usage=usage))
    assert one == ([" a"], "", 0, 0, False)


@pytest.mark.parametrize(("data", "message"), [
    ('{"error": {"message": "boom", "code": 500}}', "boom"), ('{"error": "boom"}', "boom"),
    ('{"object": "error", "message": "boom"}', "boom"), ('{"detail": "boom"}', "boom"),
    ('{"type": "error", "msg": "boom"}', "boom"), ('{"error": true, "message": "boom"}', "boom"),
    ('{"error": {"code": 5}}', '{"error": {"code": 5}}'), (event("a", error="boom"), "boom")])
def test_an_error_of_the_server_is_told_in_its_own_words(data, message):
    with pytest.raises(BadAnswer, match=re.escape(f"the server says {message}") + "$"):
        list(read_events(data))
    assert words(data) == message or "choices" in data


@pytest.mark.parametrize("data", ["hello", "{", '{"choices": [{"text": 5}]}', "[" * 10**5,
                                  '{"a":' * 10**5, '{"x": ' + "9" * 5000 + "}"],
                         ids=lambda data: data[:12])
def test_what_is_no_json_or_has_no_text_is_refused(data):
    with pytest.raises(BadAnswer):
        list(read_events(data))


def test_events_without_an_empty_line_between_them_are_several():
    found = list(read_events(f"{event(' a')}\n{event(' b', ' c')}\n[DONE]"))
    assert [one.texts for one in found] == [[" a"], [" b", " c"], []] and found[-1].done


# ---- an answer ----


def answer(*said, max_tokens=4):
    """Each event a second after the one before."""
    ticks = iter(range(1, 10**6))
    made = Answer(max_tokens, lambda: next(ticks))
    for one in said:
        made.feed(f"data: {one}\n\n".encode())
    return made


def test_the_first_token_comes_with_the_first_text_and_the_last_with_the_last():
    usage = {"usage": {"completion_tokens": 2, "prompt_tokens": 5}}
    letters = answer(*(event(letter) for letter in "abcdefgh"), event("", **usage), "[DONE]")
    assert letters.token_times() == [1, 8] and letters.prompt_tokens == 5
    assert letters.end("") == "[DONE]" and "".join(letters.pieces) == "abcdefgh"
    late = answer(event(""), event(""), event(" a"), event("", usage={"completion_tokens": 4}))
    assert late.token_times() == [3] * 4
    uneven = answer(*map(event, "abc"), event("", usage={"completion_tokens": 4}))
    assert uneven.token_times() == [1, 1, 2, 3]


def test_a_count_holds_until_more_text_comes():
    counted = answer(*(event(" a", usage={"completion_tokens": 2 * i}) for i in (1, 2, 3)))
    assert len(counted.token_times()) == 6
    assert len(answer(event(" a"), event("", usage={"completion_tokens": 3}), event(" b"))
               .token_times()) == 2
    assert len(answer(event(" a"), event("", usage={"completion_tokens": 5000})).token_times()) == 1


@pytest.mark.parametrize(("said", "message"), [
    ([event(" a")], "broke off"),
    ([event("", usage={"completion_tokens": 3}), "[DONE]"], "no text"),
    ([], "FORM: no answer came$"), (["{}"], "FORM: no answer came$"),
    *(([json.dumps({"choices": [{"text": "a", "finish_reason": reason}]}), "[DONE]"],
       f"ended it with {reason}") for reason in ("error", "abort", "Cancelled", "timeout"))])
def test_an_answer_that_does_not_end_well_says_why(said, message):
    with pytest.raises(BadAnswer, match=message):
        answer(*said).end("FORM")


@pytest.mark.parametrize("tail", [b"", b"\n", b"\r\n", b"\n\n"])
def test_the_last_event_may_lack_its_empty_line(tail):
    made = answer(event(" a"))
    made.feed(b"data: [DONE]" + tail)
    assert made.end("") == "[DONE]"


def test_more_than_was_asked_for_is_refused_with_the_limit():
    with pytest.raises(BadAnswer, match="more than 72 pieces of text"):
        answer(*[event(" a")] * 100, max_tokens=1)
    with pytest.raises(BadAnswer, match="more than 72 pieces of text"):
        answer(event(*"a" * 100), max_tokens=1)
    made = Answer(1, lambda: 0.0)
    with pytest.raises(BadAnswer, match="more than 1,052,672 bytes of answer"):
        for _ in range(2**20):
            made.feed(b": ping\n\n")


@quick
@given(st.lists(values, max_size=6), st.lists(st.integers(0, 10**6), max_size=5), st.binary(
    max_size=5))
def test_whatever_is_streamed_ends_with_a_reason_or_is_refused(said, places, rest):
    made = Answer(2, lambda: 0.0)
    try:
        data = b"".join(b"data: %s\n\n" % json.dumps(one).encode() for one in said) + rest
        for chunk in cut(data, places):
            made.feed(chunk)
        assert made.end("")
    except BadAnswer:
        pass
    assert len(made.token_times()) <= 80


# ---- the terminal ----


@quick
@given(st.text())
def test_what_is_printed_has_nothing_that_a_terminal_obeys(text):
    shown = printable(text)
    assert shown.isprintable() and shown.encode() is not None


def test_escapes_by_hand():
    assert printable("a\x1b[2J\tb\n\x9b\u202e\u2066c\ud800 日") == (
        r"a\x1b[2J b \x9b\u202e\u2066c\ud800 日")
