"""Properties of a build task that hold for whatever is drawn."""

import functools
import os
from collections.abc import Callable

from hypothesis import HealthCheck, configuration, given, settings


def for_all(examples: int = 50, **strategies) -> Callable:
    """Makes a property of `f(answer, **drawn)`: it holds for what the hypothesis `strategies` draw,
    the same in each run. What fails is the smallest example."""
    def decorate(f: Callable) -> Callable:
        @functools.wraps(f)
        def check(answer: object) -> None:
            @settings(database=None, derandomize=True, deadline=None, max_examples=examples,
                      report_multiple_bugs=False, suppress_health_check=list(HealthCheck))
            @given(**strategies)
            def holds(**drawn) -> None:
                f(answer, **drawn)

            configuration.set_hypothesis_home_dir(os.devnull)   # it shall write no files
            holds()
        return check
    return decorate
