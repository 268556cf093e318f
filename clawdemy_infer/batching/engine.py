"""The loop around a scheduler: requests come in, steps are run, tokens go out.

It knows no clock but its executor's: `TorchExecutor` runs the model and reads the clock,
`RooflineExecutor` charges what the roofline says. The scheduler that decides is the same, so what
an engine does, a simulation does."""

from bisect import insort
from collections.abc import Hashable, Iterable, Mapping
from operator import attrgetter
from typing import Protocol

from clawdemy_infer.batching.metrics import SLO, Report, StepRecord
from clawdemy_infer.batching.plan import Emission, Plan
from clawdemy_infer.batching.request import Request, Sequence
from clawdemy_infer.batching.scheduler import Scheduler
from clawdemy_infer.model.writing import uninterrupted


class Executor(Protocol):
    """What spends time."""

    def now(self) -> float:
        """Seconds since this clock was first looked at."""

    def wait_until(self, seconds: float) -> None:
        """Let time pass; nobody is there."""

    def tokens(self, request: Request) -> tuple[int, list[int] | None]:
        """How many tokens its prompt has, and which; None where nobody needs them."""

    def run(self, plan: Plan) -> Mapping[Sequence, Emission]:
        """Do the step, and commit its tokens to the block tables, drafted ones too. Returns what
        follows each sequence whose tokens have all been read."""

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""


class Engine:
    """Serves requests with `executor` as `scheduler` says. `block_bytes` are for the report.

    Ctrl-C or Jupyter's stop button takes effect between two steps, so that nothing is ever half
    done: each `Sequence` has what the step brought, and the engine goes on with the next `step` or
    `run`, or `cancel_all` clears it. A request whose logits leave nothing to choose fails alone."""

    def __init__(self, scheduler: Scheduler, executor: Executor, block_bytes: float = 0.0) -> None:
        self.scheduler, self.executor, self.block_bytes = scheduler, executor, block_bytes
        self.pending: list[Sequence] = []                   # not yet arrived, by time
        self.sequences: dict[Hashable, Sequence] = {}       # all that no report has had yet
        self.steps: list[StepRecord] = []

    @property
    def busy(self) -> bool:
        return bool(self.pending) or self.scheduler.busy

    def step(self) -> Mapping[Sequence, Emission]:
        """Do one step, or wait for the next arrival if nobody is there. Returns who got what."""
        if self.pending and not self.scheduler.busy:
            self.executor.wait_until(self.pending[0].arrival_s)
        with uninterrupted():
            start = self.executor.now()
            while self.pending and self.pending[0].arrival_s <= start:
                self._arrive(self.pending[0])
            plan = self.scheduler.schedule(start)           # who brings how many tokens
            if not plan.num_new_tokens:
                return {}
            emitted = self.executor.run(plan)               # the step: time passes
            end, blocks = self.executor.now(), self.scheduler.tables.pool.used
            ended = self.scheduler.update(emitted, end)     # the tokens that came out
            self.steps.append(StepRecord.of(start, end, plan, emitted, blocks))
            for sequence in ended:
                self.executor.forget(sequence)
        return emitted

    def _arrive(self, sequence: Sequence) -> None:
        self.pending.remove(sequence)
        self.scheduler.add(sequence, sequence.arrival_s)

    def add(self, request: Request, start_s: float = 0.0) -> Sequence:
        """Take a request, now or for when it arrives, `start_s` later than it says. One that could
        never run is refused on arrival, with a `reason`. ValueError for an id that is in use."""
        if request.id in self.sequences:
            raise ValueError(f"id={request.id!r}: there is a request of this name")
        count, ids = self.executor.tokens(request)
        with uninterrupted():
            later = request.arrival_s is not None
            arrival_s = start_s + request.arrival_s if later else self.executor.now()
            self.sequences[request.id] = sequence = Sequence(request, count, ids, arrival_s)
            if later:
                insort(self.pending, sequence, key=attrgetter("arrival_s"))
            else:
                self.scheduler.add(sequence, arrival_s)
        return sequence

    def cancel(self, id: Hashable) -> None:
        """Give a request up, unless it has ended. Raises ValueError for an unknown id."""
        if id not in self.sequences:
            raise ValueError(f"id={id!r}: there is no request of this name")
        sequence = self.sequences[id]
        with uninterrupted():
            if sequence in self.pending:
                self._arrive(sequence)
            self.scheduler.cancel(sequence, max(self.executor.now(), sequence.arrival_s))
            self.executor.forget(sequence)

    def cancel_all(self) -> None:
        """Give up whatever is unfinished."""
        for id, sequence in self.sequences.items():
            if not sequence.over:
                self.cancel(id)

    def run(self, requests: Iterable[Request] = (), slo: SLO | None = None) -> Report:
        """Serve `requests`, whose arrivals count from now, and whatever else is there, to the end;
        report on all of it. Interrupted, it can be called again, without them, to go on."""
        start = self.executor.now()
        for request in requests:
            self.add(request, start_s=start)
        while self.busy:
            self.step()
        return self.report(slo)

    def report(self, slo: SLO | None = None) -> Report:
        """What became of all that has ended since the last report; it is then forgotten."""
        over = [sequence for sequence in self.sequences.values() if sequence.over]
        report = Report(over, self.steps, self.scheduler.policy.max_batch,
                        self.scheduler.tables.pool.blocks, self.block_bytes, slo)
        for sequence in over:
            del self.sequences[sequence.request.id]
        self.steps = []
        return report
