"""What a server sends, read without trust: server-sent events (WHATWG HTML, section 9.2) that speak
OpenAI's completions. All readers raise `BadAnswer` and nothing else. Standard library only."""

import json
import re
import reprlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

MAX_EVENT_BYTES = 2**20         # of one event, comments before it included
MAX_ERROR_BYTES = 2**16         # read of an answer that is no stream, for what it says
MAX_ANSWER_BYTES = 2**28        # of a stream; and less, where few tokens were asked for:
MAX_TOKEN_BYTES = 2**12         # for each token, beside one event
MAX_TOKEN_PIECES = 8            # pieces of text for each token (some servers send single letters)
SPARE_PIECES = 64               # and some more
MAX_TOKENS = 10**7              # of a prompt or an answer; the longest published context is as long
FAILED = ("abort", "cancel", "error", "fail", "timeout")
"""What a `finish_reason` begins with when the server gave up."""
DECODER, SPACE = json.JSONDecoder(), re.compile(r"\s*")


def printable(text: str) -> str:
    """`text` on one line, with escapes for what a terminal would obey: control characters of C0 and
    C1, marks that turn the direction of writing, halves of surrogate pairs."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


class BadAnswer(ValueError):
    """What came cannot be used, or is an error of the server; the message says which."""


class EventReader:
    """Bytes in, as they come; the data of whole events out. Lines end at CR, LF or CRLF; the text
    is UTF-8, whatever the server calls it.

    >>> list(EventReader().feed(b'data: {"a":\\r\\ndata: 1}\\r\\n\\r\\n'))
    ['{"a":\\n1}']
    """

    def __init__(self) -> None:
        self.line, self.data, self.kind = bytearray(), [], ""
        self.size, self.after_cr = 0, False

    def feed(self, chunk: bytes) -> Iterator[str]:
        """Raises BadAnswer for an event that is too long, or of the kind `error`."""
        if self.after_cr and chunk.startswith(b"\n"):           # the other half of a CRLF
            chunk, self.after_cr = chunk[1:], False
        self.after_cr = chunk.endswith(b"\r") if chunk else self.after_cr
        *ends, rest = re.split(rb"\r\n|\r|\n", chunk)
        for part in ends:
            self._extend(part)
            line = self.line.decode(errors="replace").removeprefix("\ufeff")
            self.line.clear()
            field, _, value = line.partition(":")
            if field in ("data", "error"):                      # `error: …` is llama.cpp's own
                self.data.append(value.removeprefix(" "))
            if field in ("event", "error"):
                self.kind = value.strip() if field == "event" else field
            if not line:
                data, kind = "\n".join(self.data), self.kind
                self.data, self.kind, self.size = [], "", 0
                if kind == "error":
                    raise BadAnswer(f"the server says {words(data)}")
                if data:
                    yield data
        self._extend(rest)

    def _extend(self, part: bytes) -> None:
        self.line += part
        self.size += len(part)
        if self.size > MAX_EVENT_BYTES:
            raise BadAnswer(f"an event of more than {MAX_EVENT_BYTES:,} bytes")


class Event(NamedTuple):
    """Pieces of text, why the answer ended, tokens by the server's count; "" and 0: not said."""

    texts: list[str]
    reason: str = ""
    tokens: int = 0
    prompt_tokens: int = 0


def read_events(data: str) -> Iterator[Event | None]:
    """What the data of one event says; several, if a server forgets the empty lines between them.
    None is `[DONE]`. Raises BadAnswer for what is not JSON, for text of another type, and for an
    error of the server; what carries no choice says nothing, and usage that cannot be is ignored.
    """
    data, at = data.strip(), 0
    while at < len(data):
        if data.startswith("[DONE]", at):
            yield None
            return
        try:
            found, end = DECODER.raw_decode(data, at)
        except (ValueError, RecursionError) as error:
            raise BadAnswer(f"an event is not JSON: {data[at:at + 200]}") from error
        at = SPACE.match(data, end).end()
        yield _event(found if isinstance(found, dict) else {"choices": None})


def _event(found: dict) -> Event:
    said = own_words(found)
    if (found.get("error") or "error" in (found.get("object"), found.get("type"))
            or said and "choices" not in found):
        raise BadAnswer(f"the server says {said or reprlib.repr(found)}")
    texts, reason = [], ""
    choices = found.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict):
            text, end = choice.get("text"), choice.get("finish_reason")
            if not isinstance(text, str | None):
                raise BadAnswer(f"an event has text={reprlib.repr(text)}")
            texts += [text] if text else []
            reason = end if isinstance(end, str) and end else reason
    usage = found["usage"] if isinstance(found.get("usage"), dict) else {}
    counts = (usage.get(f"{of}_tokens") for of in ("completion", "prompt"))
    return Event(texts, reason, *(count if type(count) is int and 0 < count <= MAX_TOKENS else 0
                                  for count in counts))


def own_words(found: object) -> str:
    """The message in an object that tells of an error, in any of its usual forms; else ""."""
    for one in (found.get("error"), found) if isinstance(found, dict) else ():
        keys = ("message", "detail", "msg")
        said = [one.get(key) for key in keys] if isinstance(one, dict) else [one]
        if texts := [text for text in said if text and isinstance(text, str)]:
            return texts[0]
    return ""


def words(body: str) -> str:
    """What a server says in `body`: the message of an error, or all of it."""
    try:
        return own_words(json.loads(body)) or body
    except (ValueError, RecursionError):
        return body


class Answer:
    """A streamed answer of at most `max_tokens` tokens, as far as it has come; `now` is the clock,
    and `form` what its header says it is.

    pieces, times           of text, and seconds at which each came
    tokens, prompt_tokens   by the server's count, or 0
    reason, done            why it ended, in the server's word; and whether it said `[DONE]`
    head                    its first bytes, until an event has come
    """

    def __init__(self, max_tokens: int, now: Callable[[], float], form: str = "") -> None:
        self.reader, self.now, self.form = EventReader(), now, form
        self.most_bytes = min(MAX_EVENT_BYTES + MAX_TOKEN_BYTES * max_tokens, MAX_ANSWER_BYTES)
        self.most_pieces = MAX_TOKEN_PIECES * max_tokens + SPARE_PIECES
        self.pieces, self.times, self.head = [], [], bytearray()
        self.tokens = self.prompt_tokens = self.size = 0
        self.reason, self.done, self.begun = "", False, False

    def feed(self, chunk: bytes) -> None:
        """Raises BadAnswer as the readers do, and for more than was asked for."""
        self.size += len(chunk)
        if self.size > self.most_bytes:
            raise BadAnswer(f"more than {self.most_bytes:,} bytes of answer")
        self.head += b"" if self.begun else chunk[:MAX_ERROR_BYTES - len(self.head)]
        for data in self.reader.feed(chunk):
            self.begun = True
            for event in read_events(data):
                if event is None:
                    self.done = True
                    return
                self.pieces += event.texts
                self.times += [self.now()] * len(event.texts)
                if len(self.pieces) > self.most_pieces:
                    raise BadAnswer(f"more than {self.most_pieces:,} pieces of text")
                self.reason = event.reason or self.reason
                self.prompt_tokens = event.prompt_tokens or self.prompt_tokens
                if event.texts or event.tokens:             # a count holds until more text comes
                    self.tokens = event.tokens if event.tokens <= self.most_pieces else 0

    def end(self) -> str:
        """No more comes. Returns why it ended; raises BadAnswer if it has not, or not well."""
        if not self.done:
            self.feed(b"\n\n")                  # the last event may lack its empty line
        if not self.begun:
            said = words(self.head.decode(errors="replace").strip())
            raise BadAnswer(f"{self.form}: no event came{f', but {said}' if said else ''}")
        if self.reason.lower().startswith(FAILED):
            raise BadAnswer(f"the server ended it with {self.reason}")
        if not (self.done or self.reason):
            raise BadAnswer("the answer broke off")
        if not self.pieces:
            raise BadAnswer("no text came")
        return self.reason or "[DONE]"

    @property
    def token_times(self) -> list[float]:
        """When each token came: the first and the last with a piece, and evenly between; of 4
        tokens in 2 pieces, 2 came with each."""
        P, T = len(self.times), self.tokens or len(self.times)
        spread = (P, T) if T >= P else (P - 1, max(1, T - 1))
        return [self.times[i * spread[0] // spread[1]] for i in range(T if P else 0)]
