"""How long does work take? A machine moves bytes, computes, and has a fixed cost; time is the
larger of the first two, plus the third (the roofline: Williams, Waterman and Patterson 2009).

A `Machine` is a data sheet: one bandwidth, one peak by dtype. One that was measured
(`machine.calibrated`) predicts through the same `time()` and knows more: bandwidth by working set,
the rate of each kernel by its rows, seconds per operation."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from clawdemy_infer.arithmetic import Format, Work

Curve = tuple[tuple[float, float], ...]         # (x, y) points with rising x
PAGED_ATTENTION = "paged attention"     # the kernel of a decode step over a block table


def part_name(op: Work) -> str:
    """The part of a step that `op` belongs to: a product's own name, else that of its kernel."""
    if op.kernel in ("", "gemm"):
        return op.name
    return {PAGED_ATTENTION: "attention", "elementwise": "element-wise"}.get(op.kernel, op.kernel)


def interpolate(curve: Curve, x: float) -> float:
    """y at x, straight lines between the points on log-log axes, flat beyond the ends."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if x <= x1:
            share = math.log(x / x0) / math.log(x1 / x0)
            return y0 ** (1 - share) * y1**share
    return curve[-1][1]


class Part(NamedTuple):
    """One kind of work in a prediction. Its interval is [seconds / (1 + spread), seconds * (1 +
    spread)]; `bound` is what it waits for: memory, compute, launches or communication."""

    seconds: float
    spread: float = 0.0
    bound: str = "memory"


@dataclass(frozen=True)
class Prediction:
    """Seconds, as an interval and part by part. `compute_s`, `memory_s`: each alone; an operation
    takes the larger. A part is named like its product, or "attention", "scan", "element-wise",
    "launches", "communication". The errors of parts are taken as common to all, so widths add."""

    parts: dict[str, Part]
    compute_s: float
    memory_s: float

    @property
    def seconds(self) -> float:
        return sum([part.seconds for part in self.parts.values()])

    @property
    def spread(self) -> float:
        """Half-width of the interval, relative: 0.1 reaches from seconds / 1.1 to seconds * 1.1."""
        off = sum([part.seconds * part.spread for part in self.parts.values()])
        return off / (self.seconds or 1)

    @property
    def low_s(self) -> float:
        return self.seconds / (1 + self.spread)

    @property
    def high_s(self) -> float:
        return self.seconds * (1 + self.spread)

    @property
    def fixed_s(self) -> float:
        return self._of("launches").seconds

    @property
    def bound(self) -> str:
        terms = {"compute": self.compute_s, "memory": self.memory_s, "fixed": self.fixed_s,
                 "communication": self._of("communication").seconds}
        return max(terms, key=terms.get)

    def __sub__(self, less: "Prediction") -> "Prediction":
        """What more work takes longer: part by part, as equal parts are equally wrong. Above 0
        always: where the figures cannot tell the two apart, the interval is very wide."""
        parts = {name: part._replace(seconds=max(part.seconds - less._of(name).seconds, 0.0))
                 for name, part in self.parts.items()}
        if not any(part.seconds for part in parts.values()):
            parts = {"difference": Part(self.seconds / 100, spread=10.0)}
        return Prediction(parts, max(self.compute_s - less.compute_s, 0.0),
                          max(self.memory_s - less.memory_s, 0.0))

    def _of(self, name: str) -> Part:
        return self.parts.get(name, Part(0.0))


@dataclass(frozen=True)
class Link:
    """What joins a device with others: bytes/s that it sends while it receives as many. A transfer
    costs `latency_s` whatever its size, to launch it and to wait for the others, and `hop_s` for
    each step from device to device (the alpha of Hockney's model)."""

    bytes_per_s: float
    latency_s: float = 0.0
    hop_s: float = 0.0
    kind: str = ""


@dataclass(frozen=True)
class Machine:
    """What a machine can do: bytes, bytes/s, FLOP/s, seconds.

    bandwidth          read bandwidth by working set, (bytes, bytes/s); one point on a data sheet
    peak_flops         dense FLOP/s by dtype, with fp32 accumulation (int32 for integers)
    memory             bytes that weights and cache may occupy
    fixed_s_per_op     seconds that an operation costs whatever its size; 0 on a data sheet
    link               to other devices of its kind
    dollars_per_hour   a public list price, of the date `priced`

    >>> machine = Machine("sheet", ((1.0, 100.0),), {"fp32": 1000.0}, memory=1e6)
    >>> machine.napkin(Work(flops=500, bytes=200)), machine.ridge("fp32")
    (2.0, 10.0)
    """

    name: str
    bandwidth: Curve
    peak_flops: dict[str, float]
    memory: float
    fixed_s_per_op: float = 0.0
    source: str = ""
    link: Link | None = None
    watts: float | None = None
    dollars_per_hour: float | None = None
    priced: str = ""

    def bandwidth_at(self, working_set: float = math.inf) -> float:
        """Bytes/s when `working_set` bytes are read over and over; by default those of memory."""
        return interpolate(self.bandwidth, working_set)

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s of `dtype`. Raises ValueError if the machine has no figure for it."""
        if dtype not in self.peak_flops:
            raise ValueError(f"dtype={dtype!r}: {self.name} has figures for "
                             f"{', '.join(self.peak_flops)}")
        return self.peak_flops[dtype]

    def ridge(self, dtype: str) -> float:
        """The ridge point, FLOPs per byte: below it memory is the limit, above it compute."""
        return self.peak(dtype) / self.bandwidth_at()

    def napkin(self, work: Work) -> float:
        """Seconds by hand: all FLOPs at peak or all bytes from memory, whichever is longer."""
        return max(work.flops / self.peak(work.dtype), work.bytes / self.bandwidth_at())

    # ---- operation by operation; a measured machine knows better rates for these four ----

    def flops_at(self, op: Work) -> float:
        """FLOP/s that `op` can reach: the peak."""
        return self.peak(op.dtype)

    def handles_at(self, op: Work) -> float:
        """Most bytes/s that `op` can handle, however fast they come: no limit."""
        return math.inf

    def fixed_s(self, work: Work) -> float:
        """Seconds that each operation of `work` costs whatever its size."""
        return self.fixed_s_per_op

    def spread_at(self, kernel: str, format: Format) -> float:
        """How far the figures of `kernel` in `format` may be off, relative: 0 on a sheet."""
        return 0.0

    def time(self, work: Work, ops: int = 0, communication_s: float = 0.0) -> Prediction:
        """Seconds for `work`, each of its operations bound by compute or by memory, plus the fixed
        cost of `ops` operations and the time that devices talk, which nothing hides. The working
        set is the whole work: before a step reads the same bytes again it has read all others."""
        compute_s, memory_s, parts = 0.0, 0.0, {}
        for op in work.operations():
            compute = op.flops / self.flops_at(op)
            memory = op.bytes / min(self.bandwidth_at(work.bytes), self.handles_at(op))
            compute_s, memory_s = compute_s + compute, memory_s + memory
            name, spread = part_name(op), self.spread_at(op.kernel, op.weights or op.dtype)
            bound = "compute" if op.intensity > self.ridge(op.dtype) else "memory"
            seconds = parts.get(name, Part(0.0)).seconds + max(compute, memory)
            parts[name] = Part(seconds, spread, bound)
        launches = Part(ops * self.fixed_s(work), self.spread_at("launches", ""), "launches")
        talk = Part(communication_s, bound="communication")
        parts |= {"launches": launches} if ops else {}
        parts |= {"communication": talk} if communication_s else {}
        return Prediction(parts, compute_s, memory_s)

    def mbu(self, work: Work, seconds: float) -> float:
        """Memory bandwidth utilisation: bytes that had to move, a second, over the bandwidth."""
        return work.bytes / seconds / self.bandwidth_at()

    def mfu(self, work: Work, seconds: float) -> float:
        """Model FLOPs utilisation: FLOPs that had to be done, a second, over the peak."""
        return work.flops / seconds / self.peak(work.dtype)
