"""A step of the real model, predicted and measured by the same parts: its products by kind, its
attention, what element-wise operations move, and the launches between them. The clock is read
inside real steps, so the parts and the rest add up to the whole.

    step = StepOf(model, "decode", batch=1, context=512)
    lesson.predict("time per token", napkin=step.napkin(machine), predicted=step.predict(machine))
    lesson.measure("time per token", step.time(machine), parts=step.parts(machine))
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import NamedTuple

from clawdemy_infer.arithmetic import Format, Work, total
from clawdemy_infer.envelope.roofline import PAGED_ATTENTION, Machine, Prediction, part_name
from clawdemy_infer.fast.recorded import RecordedSteps
from clawdemy_infer.fast.watched import Watch, cost_of_watching, is_one_call, products_of, watched
from clawdemy_infer.kv_cache import ContiguousCache, KVCache, PagedCache
from clawdemy_infer.lesson.steps import filled_cache, random_tokens, started, work_of
from clawdemy_infer.machine import probes
from clawdemy_infer.machine.calibrated import only_products
from clawdemy_infer.machine.present import bracketed
from clawdemy_infer.model import Decoder
from clawdemy_infer.timing import Timing, stopwatch

PARTS_S = 3.0
"""Seconds for which the parts of a step are measured, about; once, if it takes longer."""


class Rate(NamedTuple):
    """What a part reached and the most the machine can do, in `unit`; None: no such rate."""

    reached: float | None
    bound: float | None
    unit: str


@dataclass(frozen=True)
class Parts:
    """The parts of a step in seconds: measured, predicted and by the napkin, under the same names.

    whole_s       the step unwatched; what no part accounts for is `rest_s`
    watching_s    how much longer it took while it was watched: taken off all parts in proportion
    rates         what each part reached
    """

    measured: dict[str, float]
    predicted: dict[str, float]
    napkin: dict[str, float]
    rates: dict[str, Rate]
    whole_s: float
    watching_s: float

    @property
    def rest_s(self) -> float:
        return self.whole_s - sum(self.measured.values())

    def __iter__(self) -> Iterator[dict]:
        """A row for each part: name, napkin_s, predicted_s, measured_s, and its rate's fields."""
        for name, seconds in self.measured.items():
            yield {"name": name, "napkin_s": self.napkin[name],
                   "predicted_s": self.predicted[name], "measured_s": seconds,
                   **self.rates[name]._asdict()}


@dataclass
class StepOf:
    """A prefill of `batch` prompts of `context` tokens, or a decode step that brings each of
    `batch` sequences its `context`-th token.

    A `cache` of one's own has room for these tokens, holds those before them and is cut to them;
    `kv` is the format of its numbers, by default the model's. Raises ValueError for another phase,
    for sizes below 1 and for a context that is longer than the model's.
    """

    model: Decoder
    phase: str
    batch: int = 1
    context: int = 64
    cache: KVCache | None = None
    kv: Format | None = None

    def __post_init__(self) -> None:
        if self.phase not in ("prefill", "decode"):
            raise ValueError(f"phase={self.phase!r}: prefill and decode are accepted")
        most = self.model.config.shape.max_context
        if most and self.context > most:
            raise ValueError(f"context={self.context}: the model's context is {most}")
        assert self.work                                    # refuses sizes below 1
        self.new = self.context if self.phase == "prefill" else 1
        self.tokens = random_tokens(self.model, self.batch, self.new)

    @cached_property
    def filled(self) -> KVCache:
        return self.cache or filled_cache(self.model, self.batch, self.context - self.new, self.new)

    @property
    def run(self) -> Callable[[], None]:
        """The step as a call; its cache is filled by now."""
        cache, past = self.filled, self.context - self.new

        def run() -> None:
            cache.truncate(past)
            self.model(self.tokens, cache, last_only=True)
        return run

    @cached_property
    def work(self) -> Work:
        work = work_of(self.model.config.shape, self.phase, self.model.weights, self.batch,
                       self.context, self.model.device.type, self.kv)
        if not self.paged:
            return work
        return total(work.name, [op._replace(kernel=PAGED_ATTENTION) if op.keys else op
                                 for op in work.operations()])

    @property
    def paged(self) -> bool:
        """Does its attention gather keys from a pool? Its rate is without the launches."""
        return isinstance(self.cache, PagedCache) and not is_one_call(self.model)

    @cached_property
    def started(self) -> Counter[str]:
        """Operations by part."""
        kind = type(self.cache) if self.cache else ContiguousCache
        return started(self.model, min(self.new, 2), self.batch, kind)

    @property
    def ops(self) -> int:
        """Launches: operations beside products, and beside an attention whose rate has its own."""
        parts = ("launches", "the rest", "attention")
        return sum(self.started[part] for part in parts[:3 if self.paged else 2])

    def predict(self, machine: Machine) -> Prediction:
        as_run = only_products(machine) if is_one_call(self.model) else machine
        return as_run.time(self.work, self.ops)

    def napkin(self, machine: Machine) -> float:
        """Seconds by hand: all bytes from memory, or all FLOPs at peak."""
        return machine.napkin(self.work._replace(dtype=self._peak(machine)))

    def _peak(self, machine: Machine) -> str:
        weights = self.model.weights
        return weights if weights in machine.peak_flops else self.work.dtype

    def _works(self) -> dict[str, Work]:
        """The work of each part."""
        parts: dict[str, list[Work]] = {}
        for op in self.work.operations():
            parts.setdefault(part_name(op), []).append(op)
        return {name: total(name, ops) for name, ops in parts.items()}

    @property
    def repeats(self) -> int:
        return 3 if self.batch * self.new > 256 else 11

    def about_s(self, seconds: float, watched: bool) -> float:
        """How long it is measured if it takes `seconds`: by `time`, and by `parts` too."""
        return 1.0 + (self.repeats + 1) * seconds + watched * max(PARTS_S, 2 * seconds)

    def time(self, machine: Machine, repeats: int | None = None) -> Timing:
        """Seconds of the whole step, unwatched, between two looks at the machine."""
        return bracketed(machine)(self.run, repeats or self.repeats)

    def parts(self, machine: Machine, repeats: int | None = None) -> Parts:
        """Each part of the step, from watched and unwatched runs by turns, for some `PARTS_S`.

        Products and attention are read off the clock within the step. Launches are measured by
        themselves, between the runs: so many, at the price that one has then. Element-wise is what
        a step takes between its products beyond what a step of one token takes there, which starts
        as many operations and moves next to nothing. What the whole takes beyond these is the rest.
        Raises ValueError, before any work, for a step whose parts no clock can tell apart.
        """
        works = self._works()
        self._refuse(works.keys() - {"attention", "scan", "element-wise"})
        # 1. By turns: the step, the step watched, one token watched, the price. The first warms up.
        own_s, one = cost_of_watching(), self
        price = probes.launch_probe(self.model.weights, self.model.device.type).sample
        if self.batch * self.new > 1:
            small = filled_cache(self.model, 1, 1, kind=type(self.filled))
            one = StepOf(self.model, "decode", 1, 2, small)

        def turn() -> tuple[float, Watch, list[Watch], list[float]]:
            plain_s, watch = stopwatch(self.run, 1, warmup=0).median, self.look(own_s)
            of_one = [watch] if one is self else [one.look(own_s) for _ in range(3)]
            return plain_s, watch, of_one, [price() for _ in range(5)]

        first_s = stopwatch(turn, 1, warmup=0).median
        turns = [turn() for _ in range(repeats or max(1, min(15, int(PARTS_S / first_s))))]
        whole_s = median(plain_s for plain_s, *_ in turns)
        seconds = {part: median(watch.taken[part] for _, watch, *_ in turns)
                   for part in turns[0][1].taken}
        # 2. Watching is taken off in proportion.
        scale = whole_s / sum(seconds.values())
        seconds = {name: scale * each for name, each in seconds.items()}
        # 3. One call of C++ has clocks for all; what Python does between products has none.
        if not is_one_call(self.model):
            launch_s = median(each for *_, prices in turns for each in prices)
            one_s = median(watch.taken["launches"] for _, _, some, _ in turns for watch in some)
            seconds["element-wise"] = max(seconds["launches"] - scale * one_s, 0.0)
            seconds["launches"] = launch_s * self.ops
            if self.paged:                              # its launches were timed with it
                seconds["attention"] = max(
                    seconds["attention"] - launch_s * self.started["attention"], 0.0)
        measured = {name: seconds[name] for name in (*works, "launches")}
        watching_s = median(watch.whole_s - plain_s for plain_s, watch, *_ in turns)
        return Parts(measured, *self._expected(machine, works, measured), whole_s, watching_s)

    def look(self, own_s: float) -> Watch:
        """One run, watched."""
        with watched(self.model, self.filled, Watch(own_s=own_s)) as watch:
            watch.of("the rest", self.run)()
        return watch

    def _refuse(self, products: set[str]) -> None:
        if isinstance(self.model.runner, RecordedSteps):
            raise ValueError("model: its decode steps are replayed as one recording, in which no "
                             "clock can be read; one without compile is accepted")
        found = {"head", *(name for name, _ in products_of(self.model))}
        if found != products:
            raise ValueError(f"model: its products are {', '.join(sorted(found))}; only those that "
                             f"are counted are accepted, {', '.join(sorted(products))}")

    def _expected(self, machine: Machine, works: dict[str, Work],
                  measured: dict[str, float]) -> tuple[dict, dict, dict]:
        """Of each part: seconds as predicted and by the napkin, and the rate that it reached."""
        predicted = {name: part.seconds for name, part in self.predict(machine).parts.items()}
        peak, bandwidth = machine.peak(self._peak(machine)), machine.bandwidth_at()
        in_memory = self.work.bytes / bandwidth > self.work.flops / peak
        napkin, rates = {"launches": 0.0}, {}
        for name, work in works.items():
            by_bytes, by_flops = work.bytes / bandwidth, work.flops / peak
            napkin[name] = by_bytes if in_memory else by_flops
            amount, bound, unit = ((work.bytes, bandwidth, "B/s") if by_bytes > by_flops else
                                   (work.flops, peak, "FLOP/s"))
            rates[name] = Rate(_ratio(amount, measured[name]), bound, unit)
        rates["launches"] = Rate(_ratio(self.ops, measured["launches"]),
                                 _ratio(1, machine.fixed_s(self.work)), "launches/s")
        return predicted, napkin, rates


def _ratio(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds else None
