"""The loop around a scheduler: requests come in, steps are run, tokens go out. It knows no clock but its executor's.

Two executors spend the time of a step: `TorchExecutor` runs the model and reads the clock, `RooflineExecutor` charges what the
roofline says. The scheduler that decides is the same object in both cases, so what a simulation does, an engine does.
"""

from __future__ import annotations

import signal
import threading
from bisect import insort
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from clawdemy_infer.batching.metrics import Report
from clawdemy_infer.batching.plan import Emission, Plan
from clawdemy_infer.batching.request import Request, Sequence
from clawdemy_infer.batching.scheduler import Scheduler


class Executor(Protocol):
    """What spends time."""

    def now(self) -> float:
        """Seconds since this clock was first looked at."""

    def wait_until(self, seconds: float) -> None:
        """Let time pass; nobody is there."""

    def tokens(self, request: Request) -> tuple[int, list[int] | None]:
        """How many tokens its prompt has, and which; None where nobody needs them."""

    def run(self, plan: Plan, repeats: int, until: float) -> tuple[list[float], Mapping[Sequence, Emission]]:
        """One step, or up to `repeats` equal ones of which the last is the first to end at `until` or later.

        Commits the tokens to the block tables, drafted ones too. Returns when each step ended, and for each sequence that has come
        to the end of its tokens what follows: one token for each step, or a run.
        """

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""


class StepRecord(NamedTuple):
    """`steps` equal steps between two times: sequences that were alive in them, tokens that counted and tokens that were computed
    in each, and blocks in use."""

    start_s: float
    end_s: float
    steps: int
    sequences: int
    tokens: int
    computed: int
    blocks: int


class Engine:
    """Serves requests with `executor` as `scheduler` says. `block_bytes` are the bytes of one block, for the report.

    Ctrl-C or Jupyter's stop button takes effect between two steps, so that nothing is ever half done: the engine goes on with
    the next `step`, `run` or `stream`, or `cancel_all` clears it.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, block_bytes: float = 0.0) -> None:
        self.scheduler, self.executor, self.block_bytes = scheduler, executor, block_bytes
        scheduler.swapper = getattr(executor, "swapper", scheduler.swapper)
        self.pending: list[Sequence] = []               # not yet arrived, by time
        self.sequences: dict[Hashable, Sequence] = {}   # all that have been added and not been reported on
        self.steps: list[StepRecord] = []
        self._callbacks: dict[Sequence, Callable[[str], None]] = {}

    # ---- requests ----

    def add(self, request: Request, on_token: Callable[[str], None] | None = None, start_s: float = 0.0) -> Sequence:
        """Take a request, now or for when it arrives, `start_s` later than it says. `on_token` is called with each new piece of text.

        A request that could never run is refused when it arrives: its state says so, and its reason gives the numbers. Raises
        ValueError for an id that is in use.
        """
        if request.id in self.sequences:
            raise ValueError(f"id={request.id!r}: there is a request of this name")
        count, ids = self.executor.tokens(request)
        with uninterrupted():
            if later := request.arrival_s is not None:
                sequence = Sequence(request, count, ids, start_s + request.arrival_s)
                insort(self.pending, sequence, key=_arrival)
            else:
                sequence = Sequence(request, count, ids, self.executor.now())
            self.sequences[request.id] = sequence
            if on_token:
                self._callbacks[sequence] = on_token
            if not later:
                self.scheduler.add(sequence, sequence.arrival_s)
        return sequence

    def cancel(self, id: Hashable) -> None:
        """Give a request up, wherever it stands. Nothing happens to one that has ended. Raises ValueError for an unknown id."""
        if id not in self.sequences:
            raise ValueError(f"id={id!r}: there is no request of this name")
        sequence = self.sequences[id]
        with uninterrupted():
            if sequence in self.pending:
                self.pending.remove(sequence)
                self.scheduler.add(sequence, sequence.arrival_s)
            self.scheduler.cancel(sequence, max(self.executor.now(), sequence.arrival_s))
            self.executor.forget(sequence)

    def cancel_all(self) -> None:
        """Give up whatever is unfinished."""
        for id, sequence in self.sequences.items():
            if not sequence.over:
                self.cancel(id)

    @property
    def busy(self) -> bool:
        """Is anybody there, or still to come?"""
        return bool(self.pending) or self.scheduler.busy

    # ---- time passes ----

    def step(self) -> Mapping[Sequence, Emission]:
        """Do one step, or wait for the next arrival if nobody is there. Returns who got what."""
        if self.pending and not self.scheduler.busy:
            self.executor.wait_until(self.pending[0].arrival_s)
        with uninterrupted():
            start = self.executor.now()
            while self.pending and self.pending[0].arrival_s <= start:
                sequence = self.pending.pop(0)
                self.scheduler.add(sequence, sequence.arrival_s)
            plan = self.scheduler.schedule(start)
            if not plan.new:
                return {}
            until = self.pending[0].arrival_s if self.pending and not self.scheduler.full else float("inf")
            times, emitted = self.executor.run(plan, self.scheduler.repeats(plan), until)
            blocks = self.scheduler.tables.pool.used
            ended = self.scheduler.update(emitted, times)
            counted, shape = sum(plan.new.values()), plan.rectangle
            computed = len(shape.rows) * shape.T if shape else counted
            if plan.guesses:
                counted += sum(emission.run - 1 for emission in emitted.values())
                computed += sum(emission.drafted for emission in emitted.values())
            self.steps.append(StepRecord(start, times[-1], len(times), len(plan.new), counted, computed, blocks))
            for sequence in ended:
                self.executor.forget(sequence)
        for sequence, callback in list(self._callbacks.items()):
            if sequence in emitted and emitted[sequence].text:
                callback(emitted[sequence].text)
        return emitted

    def run(self, requests: Iterable[Request] = (), slo=None) -> Report:
        """Serve `requests`, whose arrivals count from now, and whatever else is there, to the end; report on all of it.

        Interrupted, it can be called again, without them, to go on.
        """
        requests = list(requests)
        start = self.executor.now()
        for request in requests:
            self.add(request, start_s=start)
        while self.busy:
            self.step()
        return self.report(slo)

    def stream(self, request: Request) -> Iterator[str]:
        """Serve `request` beside all others, and give its text piece by piece."""
        pieces: list[str] = []
        sequence = self.add(request, pieces.append)
        while not sequence.over:
            self.step()
            yield from pieces
            pieces.clear()
        yield from pieces

    def report(self, slo=None) -> Report:
        """What became of all that has ended since the last report; it is then forgotten."""
        over = [sequence for sequence in self.sequences.values() if sequence.over]
        pool = self.scheduler.tables.pool
        report = Report(over, self.steps, self.scheduler.policy.max_batch, pool.blocks, self.block_bytes, slo)
        for sequence in over:
            del self.sequences[sequence.request.id]
            self._callbacks.pop(sequence, None)
        self.steps = []
        return report


def _arrival(sequence: Sequence) -> float:
    return sequence.arrival_s


@contextmanager
def uninterrupted():
    """Put Ctrl-C off until the end of the block. (Python delivers it to the main thread; elsewhere there is nothing to do.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True

    handler = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)         # None: one that Python did not set
        if pressed:
            signal.raise_signal(signal.SIGINT)
