"""Lesson 00's build task: a bandwidth probe. It is tried on simulated machines, whose memory has a
known speed and whose clock moves only while something is done."""

from collections.abc import Mapping

from clawdemy_infer.lesson.build import Task, Wrong
from clawdemy_infer.lesson.tables import si
from clawdemy_infer.machine.probes import bandwidth, rate_of

SPEED = 10e9
"""Bytes/s of the simulated memories, unless said otherwise."""
CLOCK_S = 20e-9
"""Simulated seconds that reading the clock takes."""
MOST_S = 5.0
"""Simulated seconds that a probe may take on a machine that nothing disturbs."""
MOST_LOOKS = 3_000_000
UNITS = {1 / 4: "numbers of 4 bytes, not bytes", 8: "bits, not bytes", 1e-9: "GB/s, not bytes/s",
         2**-30: "GiB/s, not bytes/s", 1e-6: "MB/s, not bytes/s", 1e-3: "bytes per millisecond",
         2**-20: "MiB/s, not bytes/s", 1e9 / 2**30: "GB where GiB are meant, or the reverse",
         SPEED**-2: "seconds per byte"}
"""What a bandwidth was counted in that is off by this factor."""


class Simulated:
    """A machine that reads `nbytes` bytes at `speed` bytes/s. `slower` says which calls take how
    many times as long; the first call is call 0. The clock shows whole ticks of `tick_s` seconds,
    0 for any; more than `most_s` seconds raise `Wrong`."""

    def __init__(self, nbytes: float, speed: float = SPEED, slower: Mapping[int, float] = (),
                 tick_s: float = 0.0, start_s: float = 7.3, most_s: float = 1000.0) -> None:
        self.nbytes, self.read_s, self.slower = nbytes, nbytes / speed, dict(slower)
        self.tick_s, self.start_s, self.most_s = tick_s, start_s, most_s
        self.time_s, self.calls, self.looks = start_s, 0, 0

    def read(self) -> None:
        self.time_s += self.read_s * self.slower.get(self.calls, 1.0)
        self.calls += 1
        if self.time_s - self.start_s > self.most_s:
            raise Wrong(f"One read took {si(self.read_s, 's')}, and after {self.calls:,} reads and "
                        f"{self.most_s:.0f} s the probe was still not done.")

    def clock(self) -> float:
        self.time_s, self.looks = self.time_s + CLOCK_S, self.looks + 1
        if self.looks > MOST_LOOKS:
            raise Wrong(f"The probe looked at the clock more than {MOST_LOOKS:,} times.")
        return self.time_s // self.tick_s * self.tick_s if self.tick_s else self.time_s

    def answered(self, answer, told: str) -> float:
        """What `answer` returns on this machine. `Wrong`, beginning with `told`, if it returns
        nothing, or divides by a time of zero."""
        try:
            got = answer(self.read, self.nbytes, self.clock)
        except ZeroDivisionError:
            raise Wrong(f"{told} You divided by zero: both readings of the clock fell in the same "
                        "tick, so it saw no time pass.") from None
        if got is None:
            raise Wrong("It returned None: is there a `return` at its end?")
        return float(got)

    def asked(self, answer, within: float, told: str) -> None:
        """`Wrong`, beginning with `told`, if `answer` is off by more than `within`."""
        got, speed = self.answered(answer, told), self.nbytes / self.read_s
        if not speed / (1 + within) <= got <= speed * (1 + within):
            raise Wrong(f"{told} So the memory reads {si(speed, 'B/s')}; you returned "
                        f"{got:.4g}, {got / speed:.3g} times as much.")


def the_answer_is_in_bytes_per_second(answer):
    machine = Simulated(8e6)
    got = machine.answered(answer, "Reading 8,000,000 bytes took 0.8 ms.")
    for factor, unit in UNITS.items():
        if abs(got / (SPEED * factor) - 1) < 0.02:
            raise Wrong(f"Reading 8,000,000 bytes took 0.8 ms, so 1e10 bytes per second; you "
                        f"returned {got:.4g}: that counts {unit}.")
    Simulated(8e6).asked(answer, 0.02, "Reading 8,000,000 bytes took 0.8 ms.")


def twice_the_bytes_in_twice_the_time_is_the_same_bandwidth(answer):
    for nbytes in (2**15, 2**16, 2**20, 2**28):
        Simulated(nbytes).asked(
            answer, 0.02, f"Reading {nbytes:,} bytes took {si(nbytes / SPEED, 's')}.")


def the_cold_first_call_does_not_count(answer):
    Simulated(64e6, slower={0: 10}).asked(
        answer, 0.02, "Reading 64 MB took 64 ms the first time, and 6.4 ms each time after.")


def a_coarse_clock_is_enough(answer):
    for start_s in (5.0, 5.0003, 5.00071):
        Simulated(500e3, tick_s=1e-3, start_s=start_s).asked(
            answer, 0.1, "One read took 50 µs, on a clock that ticks once in 1 ms.")


def one_interrupted_call_does_not_count(answer):
    for call in range(9):
        Simulated(256e6, slower={call: 50}).asked(
            answer, 0.02, f"Each read took 25.6 ms, but call {call} took 1.28 s: a neighbour had "
                          "the core.")


def one_lucky_call_does_not_count_either(answer):
    for call in range(9):
        Simulated(256e6, slower={call: 0.1}).asked(
            answer, 0.02, f"Each read took 25.6 ms, but call {call} took 2.56 ms: it found its "
                          "array in a cache.")


def it_is_done_after_5_seconds(answer):
    for nbytes in (2**15, 2e6, 1e9, 2.5e9):
        Simulated(nbytes, most_s=MOST_S).asked(
            answer, 0.02, f"Reading {nbytes:,.0f} bytes took {si(nbytes / SPEED, 's')}.")


def _smoke(answer):
    machine = Simulated(1e6)
    return [answer(machine.read, machine.nbytes, machine.clock)]


TASK = Task(
    name="bandwidth", student="my_bandwidth", smoke=_smoke, library=bandwidth,
    where="clawdemy_infer/machine/probes.py", shown=(bandwidth, rate_of), seconds=30,
    properties=(the_answer_is_in_bytes_per_second,
                twice_the_bytes_in_twice_the_time_is_the_same_bandwidth,
                the_cold_first_call_does_not_count, a_coarse_clock_is_enough,
                one_interrupted_call_does_not_count, one_lucky_call_does_not_count_either,
                it_is_done_after_5_seconds))
