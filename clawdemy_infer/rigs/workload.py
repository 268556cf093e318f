"""Who arrives when, and with how much to do: drawn from published distributions, by the standard
library alone. Arrivals and lengths are independent of each other, and the same seed draws the same
requests on any machine."""

import math
import tomllib
from bisect import bisect_right
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from itertools import accumulate
from random import Random
from statistics import NormalDist

from clawdemy_infer.batching.request import Request
from clawdemy_infer.paths import Refused
from clawdemy_infer.rigs.trace import MAX_ARRIVAL_S, MAX_REQUESTS

SHARES = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1)
"""Where the quantiles of `workloads.toml` lie."""

Length = Callable[[Random], int]
"""Draws a number of tokens."""


def uniform(low: int, high: int) -> Length:
    """Every whole number from `low` to `high` alike."""
    if not 1 <= low <= high:
        raise Refused("", "low and high", (low, high), "1 <= low <= high")
    return lambda random: random.randint(low, high)


def lognormal(mean: float, sigma: float, most: int) -> Length:
    """Lognormal with this mean; `sigma` is the standard deviation of the logarithm. What is above
    `most` is drawn again, and the mean is that of what is left."""
    if not (0 < mean < most and sigma > 0):
        raise Refused("", "mean, sigma and most", (mean, sigma, most), "0 < mean < most, sigma > 0")
    share_below, low, high = NormalDist().cdf, math.log(mean) - sigma**2, math.log(most)
    while high - low > 1e-9:            # the mean of a lognormal cut at `most` rises with mu
        mu = (low + high) / 2
        kept = (math.log(most) - mu) / sigma
        cut = math.exp(mu + sigma**2 / 2) * share_below(kept - sigma) / share_below(kept)
        low, high = (mu, high) if cut < mean else (low, mu)

    def draw(random: Random) -> int:
        while (tokens := random.lognormvariate(mu, sigma)) > most:
            pass
        return max(1, round(tokens))
    return draw


def quantiles(values: list[int]) -> Length:
    """The distribution whose quantiles at `SHARES` are `values`, straight lines between."""
    def draw(random: Random) -> int:
        share = random.random()
        i = bisect_right(SHARES, share) - 1
        along = (share - SHARES[i]) / (SHARES[i + 1] - SHARES[i])
        return max(1, round(values[i] + (values[i + 1] - values[i]) * along))
    return draw


def _length(entry: dict) -> Length:
    if "quantiles" in entry:
        return quantiles(entry["quantiles"])
    return uniform(**entry) if "low" in entry else lognormal(**entry)


@cache
def known_workloads() -> dict[str, dict]:
    """What `workloads.toml` says, by name."""
    return tomllib.loads((files("clawdemy_data") / "workloads.toml").read_text(encoding="utf-8"))


def arrivals(requests: int, rate: float, random: Random, burstiness: float = 1.0) -> list[float]:
    """Arrival times in seconds, `rate` a second in the mean. `burstiness` is the coefficient of
    variation of the gaps, which are gamma-distributed: 1 is a Poisson process, 0 a metronome, and
    above 1 they come in bursts. An infinite rate: all at 0."""
    if not 1 <= requests <= MAX_REQUESTS:
        raise Refused("", "requests", requests, f"1 to {MAX_REQUESTS:,}")
    if not rate > 0 or requests / rate > MAX_ARRIVAL_S:
        raise Refused("", "rate", rate, f"requests per second, more than 0, so that {requests:,} "
                      f"arrive within {MAX_ARRIVAL_S:,} s")
    if burstiness and not 1e-3 <= burstiness <= 1e3:
        raise Refused("", "burstiness", burstiness, "0 (evenly spaced), 0.001 to 1000; Poisson: 1")

    def gap() -> float:
        if not burstiness or math.isinf(rate):
            return 1 / rate
        return random.gammavariate(burstiness**-2, burstiness**2 / rate)

    return [0.0, *accumulate(gap() for _ in range(requests))][:requests]


def workload(prompt: str | Length, output: Length | None = None, *, requests: int,
             rate: float = math.inf, burstiness: float = 1.0, seed: int = 0,
             most: int | None = None) -> list[Request]:
    """`requests` requests whose lengths are those of a known workload, or drawn by `prompt` and
    `output`. `most` caps both together, for a model with a short context: the prompt first, at
    three quarters of it. Raises ValueError for an unknown name."""
    if isinstance(prompt, str):
        if prompt not in known_workloads():
            raise Refused("", "prompt", prompt, ", ".join(known_workloads()))
        entry = known_workloads()[prompt]
        prompt, output = _length(entry["prompt"]), _length(entry["output"])
    elif output is None:
        raise Refused("", "output", ..., "what draws the number of output tokens")
    random = Random(seed)
    found = []
    for id, time in enumerate(arrivals(requests, rate, random, burstiness)):
        P, T = prompt(random), output(random)
        if most:
            P = min(P, most * 3 // 4)
            T = min(T, most - P)
        found.append(Request(id, P, T, time, output_tokens=T))
    return found
