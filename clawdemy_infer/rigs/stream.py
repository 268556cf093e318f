"""What a server sends, read without trust: server-sent events (WHATWG HTML, section 9.2) that speak
OpenAI's completions. All readers raise `BadAnswer` and nothing else. Standard library only."""

import json
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

MAX_EVENT_BYTES = 2**20         # of one event, with comments and empty space before it
MAX_ERROR_BYTES = 2**16         # read of an answer that is no stream, for what it says
MAX_ANSWER_BYTES = 2**28        # of a stream; less where few tokens were asked for: one event, and
MAX_TOKEN_BYTES = 2**12         # so much for each token
MAX_TOKEN_PIECES = 8            # pieces of text for each token, since some servers send letters,
SPARE_PIECES = 64               # and so many more
MAX_TOKENS = 10**7              # of a prompt or an answer; the longest published context is as long
FIELDS = ("ignore_eos", "stream_options")
"""Of a request: what not every server knows."""
FAILED = ("abort", "cancel", "error", "fail", "timeout")
"""What a `finish_reason` begins with when the server gave up."""
EMPTY_LINE = re.compile(rb"(?:\r\n|\r(?!\n)|\n){2}")
FIELD = re.compile(r"(?:^|[\r\n])(data|error|event): ?([^\r\n]*)")      # error: of llama.cpp
STRING = r'"(?!")[^"\\]*(?:\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4})[^"\\]*)*"'
MESSAGE = re.compile(rf'"(?:message|detail|msg|error)"\s*:\s*({STRING})')
SPACE, DECODER = re.compile(r"\s*"), json.JSONDecoder()


class BadAnswer(ValueError):
    """What came cannot be used, or is an error of the server; the message says which."""


def events(waiting: bytearray, chunk: bytes) -> Iterator[str]:
    """The data of each event that `chunk` completes; the rest of it stays in `waiting`. Lines end
    at CR, LF or CRLF, and are UTF-8 whatever the server calls it. Raises BadAnswer for an event of
    the kind `error`, and for one that is too long.

    >>> list(events(bytearray(b'data: {"a":'), b"\\r\\ndata: 1}\\r\\n\\r\\n:"))
    ['{"a":\\n1}']
    """
    start = max(0, len(waiting) - 3)            # an empty line is at most 4 bytes
    waiting += chunk
    while found := EMPTY_LINE.search(waiting, start):
        event, start = waiting[:found.start()], 0
        del waiting[:found.end()]
        fields = FIELD.findall(event.decode(errors="replace").removeprefix("\ufeff"))
        data = "\n".join(value for name, value in fields if name != "event")
        if ("event", "error") in fields or any(name == "error" for name, _ in fields):
            raise BadAnswer(f"the server says {words(data)}")
        if data:
            yield data
    if len(waiting) > MAX_EVENT_BYTES:
        raise BadAnswer(f"an event of more than {MAX_EVENT_BYTES:,} bytes")


def printable(text: str) -> str:
    """`text` on one line, with escapes for what a terminal would obey: control characters of C0 and
    C1, and marks that turn the direction of writing. Halves of surrogate pairs are escaped too."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


class Event(NamedTuple):
    """Pieces of text, why the answer ended, tokens by the server's count; "" and 0: not said."""

    texts: list[str]
    reason: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    done: bool = False


def read_events(data: str) -> Iterator[Event]:
    """What the data of one event says; of several, if a server forgets the empty lines between.
    Raises BadAnswer for what is not JSON, for text of another type, and for an error of the server;
    what carries no choice says nothing, and usage that cannot be is not said."""
    data, at = data.strip(), 0
    while at < len(data):
        if data.startswith("[DONE]", at):
            yield Event([], done=True)
            return
        try:
            found, end = DECODER.raw_decode(data, at)
        except (ValueError, RecursionError) as error:
            raise BadAnswer(f"an event is not JSON: {data[at:]}") from error
        at = SPACE.match(data, end).end()
        if not isinstance(found, dict):
            continue
        choices = found.get("choices")
        if (found.get("error") or "error" in (found.get("object"), found.get("type"))
                or "choices" not in found and words(data) != data):
            raise BadAnswer(f"the server says {words(data)}")
        texts, reason = [], ""
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                text, end = choice.get("text"), choice.get("finish_reason")
                if not isinstance(text, str | None):
                    raise BadAnswer(f"an event has text of another type: {data}")
                texts += [text] if text else []
                reason = end if isinstance(end, str) and end else reason
        usage = found["usage"] if isinstance(found.get("usage"), dict) else {}
        counts = [usage.get(f"{of}_tokens") for of in ("completion", "prompt")]
        yield Event(texts, reason, *(count if type(count) is int and 0 < count <= MAX_TOKENS else 0
                                     for count in counts))


def words(body: str) -> str:
    """The message in what a server sends as an error, in any of its usual forms; else all of it."""
    found = MESSAGE.search(body, 0, MAX_ERROR_BYTES)
    return json.loads(found[1], strict=False) if found else body


class Answer:
    """A streamed answer to a request of `max_tokens`, as far as it has come: `pieces` of text, the
    seconds of each on the clock `now`, `tokens` and `prompt_tokens` by the server's count or 0."""

    def __init__(self, max_tokens: int, now: Callable[[], float]) -> None:
        self.most_bytes = min(MAX_EVENT_BYTES + MAX_TOKEN_BYTES * max_tokens, MAX_ANSWER_BYTES)
        self.most_pieces = MAX_TOKEN_PIECES * max_tokens + SPARE_PIECES
        self.now, self.pieces, self.times, self.reason, self.done = now, [], [], "", False
        self.tokens = self.prompt_tokens = self.size = 0
        self.waiting = bytearray()

    def feed(self, chunk: bytes) -> None:
        """Raises BadAnswer as the readers do, and for more than was asked for."""
        self.size += len(chunk)
        if self.size > self.most_bytes:
            raise BadAnswer(f"more than {self.most_bytes:,} bytes of answer")
        for data in events(self.waiting, chunk):
            for event in read_events(data):
                self.pieces += event.texts
                self.times += [self.now()] * len(event.texts)
                if len(self.pieces) > self.most_pieces:
                    raise BadAnswer(f"more than {self.most_pieces:,} pieces of text")
                if event.texts or event.tokens:         # a count holds until more text comes
                    self.tokens = event.tokens if event.tokens <= self.most_pieces else 0
                self.prompt_tokens = event.prompt_tokens or self.prompt_tokens
                self.reason, self.done = event.reason or self.reason, event.done

    def end(self, form: str) -> str:
        """Why it ended. BadAnswer if it has not, or not well; `form` is status and content type."""
        left = self.waiting.decode(errors="replace").strip()
        if not self.done:
            self.feed(b"\n\n")                  # the last event may lack its empty line
        if not (self.pieces or self.reason or self.done):
            raise BadAnswer(f"{form}: no answer came{f', but {words(left)}' if left else ''}")
        if self.reason.lower().startswith(FAILED):
            raise BadAnswer(f"the server ended it with {self.reason}")
        if not (self.done or self.reason):
            raise BadAnswer("the answer broke off")
        if not self.pieces:
            raise BadAnswer("no text came")
        return self.reason or "[DONE]"

    def token_times(self) -> list[float]:
        """When each token came: the first and the last with a piece, the others evenly between; of
        4 tokens in 2 pieces, 2 came with each."""
        P, T = len(self.times), self.tokens or len(self.times)
        steps, of = (P, T) if T >= P else (P - 1, max(1, T - 1))
        return [self.times[i * steps // of] for i in range(T if P else 0)]
