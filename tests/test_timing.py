"""The stopwatch on a clock that we turn ourselves, and the counter of operations on functions
counted by hand."""

import pytest
import torch

from clawdemy_infer import timing
from clawdemy_infer.fast.launches import count_ops
from clawdemy_infer.timing import Timing, alternate, stopwatch


class Clock:
    """Time passes only where `spend` is called."""

    def __init__(self):
        self.time = 1000.0

    def spend(self, seconds):
        self.time += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "now", lambda: clock.time)
    return clock


# ---- the stopwatch ----


def test_each_call_is_timed_by_itself_and_the_warm_up_is_not(clock):
    durations = iter([100, 50, 3, 1, 2, 8])                             # the first two are warm-up
    timed = stopwatch(lambda: clock.spend(next(durations)), repeats=4, warmup=2)
    assert timed.seconds == (3, 1, 2, 8)


def test_median_and_spread():
    """Quartiles by hand (exclusive, n = 7): the 2nd and the 6th of 1, 2, 3, 4, 10, 20, 40."""
    timed = Timing((40, 1, 10, 3, 2, 20, 4))
    assert timed.median == 4
    assert timed.spread == pytest.approx((20 - 2) / 2 / 4)
    assert Timing((2.0, 2.0, 2.0)).spread == 0
    assert Timing((7.0,)).spread == 0


def test_one_outlier_moves_neither_median_nor_spread():
    assert Timing((1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 500.0)).median == 1
    assert Timing((1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 500.0)).spread == 0


def test_nothing_is_run_when_no_repeat_is_asked_for():
    ran = []
    with pytest.raises(ValueError, match="repeats=0"):
        stopwatch(lambda: ran.append(1), repeats=0)
    assert ran == []


def test_works_take_turns_so_that_a_drift_falls_on_all(clock):
    """The machine slows down by a second with each call: taken in turns, a and b differ by one
    step, and not by five."""
    order, cost = [], [0]

    def work(name):
        def run():
            order.append(name)
            cost[0] += 1
            clock.spend(cost[0])
        return run

    timed = alternate({"a": work("a"), "b": work("b")}, repeats=5, warmup=0)
    assert order == ["a", "b"] * 5
    assert timed["b"].median - timed["a"].median == 1


# ---- operations ----


def test_operations_are_counted_as_they_are_dispatched():
    x, w = torch.ones(3, 5), torch.ones(7, 5)
    with torch.inference_mode():                                        # as the decoder runs
        assert count_ops(lambda: None) == 0
        assert count_ops(lambda: x + x) == 1
        assert count_ops(lambda: (x * 2 + x).relu()) == 3
        assert count_ops(lambda: torch.nn.functional.linear(x, w)) == 1
        assert count_ops(lambda: x[1:].view(-1).softmax(0)) == 3        # a view costs its call too


@pytest.mark.parametrize("n", [1, 4, 9])
def test_the_count_grows_with_the_operations_and_not_with_their_size(n):
    def chain(size):
        x = torch.ones(size)
        for _ in range(n):
            x = x.sin()

    # and the one that makes x
    assert count_ops(lambda: chain(3)) == count_ops(lambda: chain(3000)) == n + 1


def test_the_counter_gives_back_what_the_work_computes():
    out = []
    count_ops(lambda: out.append(torch.arange(4) * 3))
    assert out[0].tolist() == [0, 3, 6, 9]


def test_the_clock_runs():
    before = timing.now()
    assert timing.now() >= before
