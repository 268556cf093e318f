"""How long does work take? A machine is a bandwidth, a compute rate and a fixed cost; time is the larger of the first two, plus the third.

The roofline is from Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (2009).
A `Machine` is either a data sheet or a calibration. Both predict through `time()`; they differ in what they know:

    data sheet    one bandwidth, one peak by dtype, no fixed cost
    calibration   bandwidth by working set, rate of each kernel by the number of rows M, seconds per operation
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from clawdemy_infer.arithmetic import Work

Curve = tuple[tuple[float, float], ...]
"""(x, y) points with rising x."""


def interpolate(curve: Curve, x: float) -> float:
    """y at x, straight lines between the points on log-log axes, flat beyond the ends."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if x <= x1:
            share = math.log(x / x0) / math.log(x1 / x0)
            return y0 ** (1 - share) * y1**share
    return curve[-1][1]


@dataclass(frozen=True)
class Prediction:
    """Seconds, by cause. `compute_s` and `memory_s` are what each would take alone; `seconds` takes the larger, operation by operation."""

    seconds: float
    compute_s: float
    memory_s: float
    fixed_s: float

    @property
    def bound(self) -> str:
        return max(("compute", self.compute_s), ("memory", self.memory_s), ("fixed", self.fixed_s), key=lambda term: term[1])[0]


@dataclass(frozen=True)
class Machine:
    """What a machine can do: bytes, bytes/s, FLOP/s, seconds.

    bandwidth       read bandwidth by working set, (bytes, bytes/s); one point for a data sheet
    peak_flops      dense FLOP/s by dtype, with fp32 accumulation
    memory          bytes that weights and cache may occupy
    rates           FLOP/s by kernel ("gemm", "attention") and dtype, as (rows M, FLOP/s); empty for a data sheet
    elementwise     bytes/s at which element-wise operations go through arrays, by dtype; empty for a data sheet
    fixed_s_per_op  seconds that an operation costs whatever its size
    """

    name: str
    bandwidth: Curve
    peak_flops: dict[str, float]
    memory: float
    rates: dict[str, dict[str, Curve]] = field(default_factory=dict)
    elementwise: dict[str, float] = field(default_factory=dict)
    fixed_s_per_op: float = 0.0
    source: str = ""

    def bandwidth_at(self, working_set: float = math.inf) -> float:
        """Bytes/s when `working_set` bytes are read over and over. Without an argument: main memory, beyond every cache."""
        return interpolate(self.bandwidth, working_set)

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s of `dtype`. Raises ValueError if the machine has no figure for it."""
        if dtype not in self.peak_flops:
            raise ValueError(f"dtype={dtype!r}: {self.name} has figures for {', '.join(self.peak_flops)}")
        return self.peak_flops[dtype]

    def flops_at(self, op: Work) -> float:
        """FLOP/s that `op` can reach: its kernel's measured rate at that dtype and M, or the peak where none was measured."""
        curve = self.rates.get(op.kernel, {}).get(op.dtype)
        return interpolate(curve, op.rows) if curve else self.peak(op.dtype)

    def bytes_at(self, op: Work, working_set: float) -> float:
        """Bytes/s at which `op` moves its bytes: those of memory, or less where it has to do something to every element."""
        bandwidth = self.bandwidth_at(working_set)
        return min(bandwidth, self.elementwise.get(op.dtype, bandwidth)) if op.kernel == "elementwise" else bandwidth

    def ridge(self, dtype: str) -> float:
        """The ridge point, FLOPs per byte: below it memory is the limit, above it compute."""
        return self.peak(dtype) / self.bandwidth_at()

    def napkin(self, work: Work) -> float:
        """Seconds as done by hand: all the FLOPs at peak or all the bytes from memory, whichever is longer."""
        return max(work.flops / self.peak(work.dtype), work.bytes / self.bandwidth_at())

    def time(self, work: Work, ops: int = 0) -> Prediction:
        """Seconds for `work`, each of its operations bound by compute or by memory, plus the fixed cost of `ops` operations.

        The working set is the whole of the work: before a step comes back to the same bytes it has read all the others.
        """
        terms = [(op.flops / self.flops_at(op), op.bytes / self.bytes_at(op, work.bytes)) for op in work.operations()]
        fixed = ops * self.fixed_s_per_op
        return Prediction(sum(max(term) for term in terms) + fixed, sum(c for c, _ in terms), sum(m for _, m in terms), fixed)

    def mbu(self, work: Work, seconds: float) -> float:
        """Memory bandwidth utilisation: bytes that had to move, per second, over what memory can deliver."""
        return work.bytes / seconds / self.bandwidth_at()

    def mfu(self, work: Work, seconds: float) -> float:
        """Model FLOPs utilisation: FLOPs that had to be done, per second, over the peak."""
        return work.flops / seconds / self.peak(work.dtype)
