"""A text that grows: tokens in, text out, and the one rule for when it ends, for `generate`,
speculative decoding and the engine alike."""

import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from clawdemy_infer.model.sampling import NOTHING


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off to the end of the block. Python delivers it to the main thread alone."""
    pressed, here = [], threading.current_thread() is threading.main_thread()
    handler = here and signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        if here:                                        # None: a handler that Python did not set
            signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def seconds_per_token(times: Sequence[float]) -> float | None:
    """TPOT, time per output token: (last - first) / (tokens - 1); None unless some came later."""
    return (times[-1] - times[0]) / (len(times) - 1) if times and times[-1] > times[0] else None


class Writer:
    """One sequence that is being written.

    A text ends with an end-of-sequence token ("eos"), with a stop string ("stop"), with its
    `limit`-th token ("length"), or where `NOTHING` could be chosen ("failed"); `reason` is empty
    until then, and `left` tokens may still come. No tokenizer: no text, and no stop string.

    >>> writer = Writer(limit=3, eos_ids=(2,))
    >>> writer.take([5, 2, 7]), writer.reason        # 7 comes after the end
    (([5, 2], ''), 'eos')
    """

    def __init__(self, limit: int, eos_ids: Collection[int] = (), tokenizer=None,
                 stop: Sequence[str] = ()) -> None:
        self.left, self.eos_ids, self.reason = limit, eos_ids, ""
        self.stream = TextStream(tokenizer, stop) if tokenizer else None

    def take(self, tokens: Sequence[int]) -> tuple[list[int], str]:
        """Take `tokens` up to the one that ends the text, if one does. Returns those that were
        taken, and the text that they settle."""
        text, taken = "", []
        for token in tokens:
            if self.reason:
                break
            came = [token] if token != NOTHING else []
            taken += came
            self.left -= len(came)
            self.reason = ("failed" if not came else "eos" if token in self.eos_ids
                           else "" if self.left > 0 else "length")
            if self.stream:
                text += self.stream.push(token) if came else ""
                if self.reason:
                    text += self.stream.close()
                if self.stream.stopped:
                    self.reason = "stop"
        return taken, text


class TextStream:
    """Tokens in, text out: each piece is whole characters, and never part of a stop string.

    A character may be spread over several tokens, and a stop string too. What might still become
    either is held back until the next token decides. The pieces joined together are `text`."""

    def __init__(self, tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.text = ""                      # released for good
        self.held = ""                      # decoded, but perhaps the beginning of a stop string
        self.stopped = False
        self._ids: list[int] = []
        # ids before _read are decoded; _start is where the piece before began
        self._start = self._read = 0

    def push(self, token: int) -> str:
        """One more token; the text that it settles, perhaps "". A stop string sets `stopped`."""
        self._ids.append(token)
        fresh = self._undecoded()
        if fresh.endswith("\ufffd"):  # a character that is not yet whole
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._settle(fresh)

    def close(self) -> str:
        """No more tokens: return all that was held back, unless a stop string came."""
        rest = self._settle(self._undecoded()) + self.held      # at a stop string nothing is held
        self.text += self.held
        self.held, self._read = "", len(self._ids)
        return rest

    def _undecoded(self) -> str:
        # Some tokenizers drop the space before the first word of a text. So the new tokens are
        # decoded behind those of the piece before, and what these give alone is cut away.
        known = self.tokenizer.decode(self._ids[self._start:self._read])
        return self.tokenizer.decode(self._ids[self._start:])[len(known):]

    def _settle(self, piece: str) -> str:
        text = self.held + piece
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held, released = True, "", text[:min(found)]
        else:
            kept = max((n for stop in self.stop
                        for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            released, self.held = text[:len(text) - kept], text[len(text) - kept:]
        self.text += released
        return released
