"""One stopwatch for lessons, benchmarks and the calibration, so that their numbers can be compared:
warm up, synchronise, repeat, take the median and show the spread."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass


def now() -> float:
    """Seconds on a monotonic clock, once every queued GPU kernel has finished: a GPU call returns
    before its kernel runs, and without the wait we would time the launch and not the work."""
    torch = sys.modules.get("torch")                    # whoever queued a kernel has imported it
    if torch and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Timing:
    """Repeated times of one piece of work, in seconds: we quote `median`, `spread` says how far to
    trust it. `around`: the machine's speeds before and after, where a stopwatch took them."""

    seconds: tuple[float, ...]
    around: tuple = ()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the gap between the quartiles over the median; above 0.1 the machine was busy."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def stopwatch(work: Callable[[], object], repeats: int = 5, warmup: int = 1) -> Timing:
    """Time `work()`: `warmup` calls are thrown away, then `repeats` calls are timed one by one."""
    return alternate({"": work}, repeats, warmup)[""]


def alternate(works: dict[str, Callable[[], object]], repeats: int = 5,
              warmup: int = 1) -> dict[str, Timing]:
    """Time works in turn, A B C A B C …, so that a drift of the machine falls on all alike."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: at least one timed call is needed")
    for work in works.values():
        for _ in range(warmup):
            work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = now()
            work()
            seconds[name].append(now() - start)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}
