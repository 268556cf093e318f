"""A request, and the sequence that it becomes: what was asked for, and how far it has come. Standard library only."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum
from itertools import count


class State(StrEnum):
    """Where a sequence stands. The last four are final, and are what a trace calls the outcome; only somebody else's server fails."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    REFUSED = "refused"
    FAILED = "failed"


OUTCOMES = (State.FINISHED, State.CANCELLED, State.REFUSED, State.FAILED)


@dataclass(frozen=True)
class Request:
    """What somebody asks for: one line of a trace.

    prompt          token ids, or a text, or only how many tokens: the cost depends on nothing else
    max_tokens      most tokens that may be generated; what it could need at most is checked on arrival
    arrival_s       seconds on the engine's clock; None: the moment it is added
    output_tokens   how many tokens are generated, where a trace knows: neither an end-of-sequence token nor a stop ends it before
    priority        0 goes before 1, with a policy that looks at it
    deadline_s      seconds after arrival by which it should be finished: counted in the goodput, enforced by nobody
    sampling        a `model.Sampling`; None is greedy
    stop            texts that end it

    Raises ValueError for numbers that make no sense. Too long a prompt, or none, is refused on arrival and not here.
    """

    id: Hashable
    prompt: str | int | tuple[int, ...] | list[int]
    max_tokens: int
    arrival_s: float | None = None
    output_tokens: int | None = None
    priority: int = 0
    deadline_s: float | None = None
    sampling: object | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_tokens", "output_tokens"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r}: request {self.id!r} needs a whole number, 1 or more")
        if type(self.prompt) is int and self.prompt < 0:
            raise ValueError(f"prompt={self.prompt}: request {self.id!r} needs a number of tokens, token ids or a text")
        if self.arrival_s is not None and not 0 <= self.arrival_s < float("inf"):
            raise ValueError(f"arrival_s={self.arrival_s}: request {self.id!r} arrives at 0 s or later")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ValueError(f"deadline_s={self.deadline_s}: request {self.id!r} needs more than 0 seconds")


_serial = count()


class Sequence:
    """A request that has arrived. Equal to nothing but itself, so that block tables can be kept by sequence.

    prompt_tokens   tokens of the prompt; `generated` more have come since, `total` in all
    ids             token ids of both, or None where nobody needs them
    limit           it ends when it has generated so many
    rank            who comes first: the smaller (priority, arrival, order of being added)
    token_times     when each generated token was there, in seconds on the engine's clock
    history         (seconds, state) whenever the state changed
    cached          tokens of the prompt that were found in the prefix cache on admission
    drafted         tokens that a draft proposed for it; `accepted` of them it has taken
    reason          why it ended: length, eos, stop, cancelled, or what was wrong with it
    text            what was generated, where there is a tokenizer
    """

    def __init__(self, request: Request, prompt_tokens: int, ids: list[int] | None = None, arrival_s: float = 0.0) -> None:
        self.request, self.arrival_s = request, arrival_s
        self.prompt_tokens = self.total = prompt_tokens
        self.ids = ids
        self.generated = 0
        self.limit = min(request.max_tokens, request.output_tokens or request.max_tokens)
        self.serial = next(_serial)
        self.rank = (0, arrival_s, self.serial)
        self.state = State.WAITING
        self.token_times: list[float] = []
        self.history: list[tuple[float, State]] = []
        self.preemptions = self.cached = self.drafted = self.accepted = 0
        self.reason = self.text = ""

    def __repr__(self) -> str:
        return f"<sequence {self.request.id!r}: {self.state}, {self.prompt_tokens} + {self.generated} tokens>"

    @property
    def over(self) -> bool:
        """Has it ended, one way or another?"""
        return self.state in OUTCOMES

    @property
    def longest(self) -> int:
        """The most tokens that the cache may have to hold for it. The last token of all is never brought to the model."""
        return self.prompt_tokens + self.request.max_tokens - 1

    @property
    def tokens(self) -> list[int]:
        """The ids generated so far."""
        return [] if self.ids is None else self.ids[self.prompt_tokens:]

    def enter(self, state: State, now: float, reason: str = "") -> None:
        """Be in `state` from `now` on."""
        self.state = state
        self.reason = reason or self.reason
        self.history.append((now, state))

    def extend(self, times: list[float], ids: list[int] | None = None, text: str = "") -> None:
        """A token more for each of `times`."""
        self.token_times += times
        self.generated += len(times)
        self.total += len(times)
        if self.ids is not None:
            self.ids += ids
        if text:
            self.text += text
