"""A request, and the `Sequence` it becomes when it is added: a request that is being served, in
vLLM's word. What was asked for, and how far it has come. Standard library only."""

from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from math import inf


class State(StrEnum):
    """Where a sequence stands. The last four are final."""

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
    max_tokens      most tokens that may be generated
    arrival_s       seconds on the engine's clock; None: the moment it is added
    output_tokens   tokens that are generated, where a trace knows: nothing ends it before
    priority        0 goes before 1, with a policy that looks at it
    sampling        a `model.Sampling`; None is greedy
    stop            texts that end it

    Raises ValueError for senseless numbers; an empty or too long prompt is refused on arrival."""

    id: Hashable
    prompt: str | int | tuple[int, ...] | list[int]
    max_tokens: int
    arrival_s: float | None = None
    output_tokens: int | None = None
    priority: int = 0
    sampling: object | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_tokens", "output_tokens"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r}: request {self.id!r} needs a whole number >= 1")
        if type(self.prompt) is int and self.prompt < 0:
            raise ValueError(f"prompt={self.prompt}: request {self.id!r} needs 0 tokens or more")
        if self.arrival_s is not None and not 0 <= self.arrival_s < inf:
            raise ValueError(f"arrival_s={self.arrival_s}: {self.id!r} arrives at 0 s or later")


_serial = count()


class Sequence:
    """A request that is being served. Equal to nothing but itself: block tables are kept by it.

    prompt_tokens       tokens of the prompt; `generated` more have come since, `total` in all
    ids                 token ids of both, or None where nobody needs them
    limit               it ends when it has generated this many tokens
    rank                who comes first: the smaller (priority, arrival, order of being added)
    token_times         seconds on the engine's clock when each generated token was there
    history             (seconds, state) whenever the state changed
    num_cached_tokens   tokens of the prompt that the prefix cache had on admission
    digests             of its first blocks, as far as the prefix cache has looked for them
    drafted, accepted   tokens that a draft proposed for it, and those that it has taken
    reason, text        why it ended, or what was wrong with it; and what was generated
    """

    def __init__(self, request: Request, prompt_tokens: int, ids: list[int] | None = None,
                 arrival_s: float = 0.0) -> None:
        self.request, self.arrival_s, self.ids = request, arrival_s, ids
        self.prompt_tokens = self.total = prompt_tokens
        self.limit = min(request.max_tokens, request.output_tokens or request.max_tokens)
        self.serial = next(_serial)
        self.rank = (0, arrival_s, self.serial)
        self.state, self.reason, self.text, self.num_cached_tokens = State.WAITING, "", "", 0
        self.digests: list[bytes] = []
        self.token_times: list[float] = []
        self.history: list[tuple[float, State]] = []
        self.generated = self.preemptions = self.drafted = self.accepted = 0

    def __repr__(self) -> str:
        return (f"<sequence {self.request.id!r}: {self.state}, {self.prompt_tokens} + "
                f"{self.generated} tokens>")

    @property
    def over(self) -> bool:
        return self.state in OUTCOMES

    @property
    def tokens(self) -> list[int]:
        """The ids generated so far."""
        return [] if self.ids is None else self.ids[self.prompt_tokens:]

    def enter(self, state: State, now: float, reason: str = "") -> None:
        """Be in `state` from `now` on."""
        self.state, self.reason = state, reason or self.reason
        self.history.append((now, state))

    def extend(self, times: list[float], ids: list[int] | None = None, text: str = "") -> None:
        """A token more for each of `times`."""
        self.token_times += times
        self.generated += len(times)
        self.total += len(times)
        if self.ids is not None:
            self.ids += ids
        self.text += text
