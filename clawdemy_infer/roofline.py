"""How long does work take? A machine is a bandwidth, a compute rate and a fixed cost; time is the larger of the first two, plus the third.

The roofline is from Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (2009).
A `Machine` is either a data sheet or a calibration. Both predict through `time()`; they differ in what they know:

    data sheet    one bandwidth, one peak by dtype, no fixed cost; what it is linked with, draws and costs
    calibration   bandwidth by working set, rate of each kernel by the number of rows M, seconds per operation
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from clawdemy_infer.arithmetic import Work

Curve = tuple[tuple[float, float], ...]
"""(x, y) points with rising x."""

ATTENTION_KEYS = (64, 384, 2048)
"""A calibration times the attention of decode steps over so many keys …"""
MANY = 32
"""… of few KV heads and of many: from so many on, of all sequences together, decode in products gains (`attention`)."""


PROBED = {"few": 4, "many": 64}
"""So many are the few, and the many."""
PAGED_ATTENTION = "paged attention"
"""Decode steps over a block table, beyond what starting their operations costs."""
SMALL_GEMM = "gemm of small matrices"
"""Products of matrices a quarter as large as in "gemm": to start one costs something too."""
MATRIX = 2**20
"""Numbers in a matrix of the calibration's "gemm", about."""


def attention_of(kv_heads: float, keys: int) -> str:
    """The name under which a calibration has the rate of a decode step's attention over so many keys of each sequence, with few
    `kv_heads`, those of all sequences together, or many."""
    return f"attention of {'many' if kv_heads >= MANY else 'few'} heads over {keys} keys"


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
    communication_s: float = 0.0

    @property
    def bound(self) -> str:
        """The largest term: compute, memory, fixed or communication."""
        return max(("compute", "memory", "fixed", "communication"), key=lambda term: getattr(self, f"{term}_s"))


@dataclass(frozen=True)
class Link:
    """What joins one device with the others: bytes/s that it can send while it receives as many.

    latency_s   what a transfer costs whatever its size: launch it, wait for the others
    hop_s       what each step from device to device adds (the alpha of Hockney's model)
    """

    bytes_per_s: float
    latency_s: float = 0.0
    hop_s: float = 0.0
    kind: str = ""


@dataclass(frozen=True)
class Machine:
    """What a machine can do: bytes, bytes/s, FLOP/s, seconds.

    bandwidth       read bandwidth by working set, (bytes, bytes/s); one point for a data sheet
    peak_flops      dense FLOP/s by dtype, with fp32 accumulation (int32 for integers)
    memory          bytes that weights and cache may occupy
    rates           FLOP/s by kernel ("gemm", "attention", `PAGED_ATTENTION`) or by name (the "head", `SMALL_GEMM`, `attention_of`), and by
                    format, as (rows M, FLOP/s); empty for a data sheet
    elementwise     bytes/s at which element-wise operations go through arrays, by dtype, as (rows M, bytes/s); empty for a data sheet
    fixed_s_per_op  seconds that an operation costs whatever its size
    fixed           the same by format of the weights between which it runs, where that was measured
    threads         that share the heads of an attention, as those of a CPU do

    What only some data sheets tell, for one device:

    peak_flops_fp16_accumulation   dense FLOP/s by dtype where sums are kept in fp16: faster on some consumer cards
    cache_bytes                    the last cache before memory
    link                           to other devices of its kind
    watts                          power it may draw
    dollars_per_hour, priced       a public list price, and its date
    """

    name: str
    bandwidth: Curve
    peak_flops: dict[str, float]
    memory: float
    rates: dict[str, dict[str, Curve]] = field(default_factory=dict)
    elementwise: dict[str, Curve] = field(default_factory=dict)
    fixed_s_per_op: float = 0.0
    fixed: dict[str, float] = field(default_factory=dict)
    threads: int = 1
    source: str = ""
    peak_flops_fp16_accumulation: dict[str, float] = field(default_factory=dict)
    cache_bytes: float | None = None
    link: Link | None = None
    watts: float | None = None
    dollars_per_hour: float | None = None
    priced: str = ""

    def bandwidth_at(self, working_set: float = math.inf) -> float:
        """Bytes/s when `working_set` bytes are read over and over. Without an argument: main memory, beyond every cache."""
        return interpolate(self.bandwidth, working_set)

    def peak(self, dtype: str, accumulation: str = "fp32") -> float:
        """Peak FLOP/s of `dtype` with sums kept in `accumulation`. Raises ValueError if the machine has no figure for it."""
        if accumulation == "fp16":
            if dtype not in self.peak_flops_fp16_accumulation:
                raise ValueError(f"accumulation='fp16': {self.name} has no figure of its own for {dtype}")
            return self.peak_flops_fp16_accumulation[dtype]
        if dtype not in self.peak_flops:
            raise ValueError(f"dtype={dtype!r}: {self.name} has figures for {', '.join(self.peak_flops)}")
        return self.peak_flops[dtype]

    def flops_at(self, op: Work) -> float:
        """FLOP/s that `op` can reach: its kernel's measured rate at that format or dtype and M, or the peak where none was measured.
        Rates of its own may also have what has a name: the head, which is as wide as the vocabulary."""
        if op.keys and (rate := self._attention_at(op)):
            return rate
        rates = self.rates.get(op.name) or self.rates.get(op.kernel, {})
        curve = rates.get(op.weights) or rates.get(op.dtype)
        if not curve:
            return self.peak(op.dtype)
        rate, small = interpolate(curve, op.rows), self.rates.get(SMALL_GEMM, {}).get(op.weights)
        if small and op.numbers and op.name not in self.rates:
            return interpolate(((MATRIX / 4, interpolate(small, op.rows)), (MATRIX, rate)), op.numbers)
        return rate

    def _attention_at(self, op: Work) -> float | None:
        """FLOP/s of attention in a decode step, between the numbers of keys over which it was measured."""
        measured = {keys: self.rates.get(attention_of(op.heads, keys), {}).get(op.dtype) for keys in ATTENTION_KEYS}
        points = tuple((keys, interpolate(curve, op.rows)) for keys, curve in measured.items() if curve)
        evenly = self._evenly(op.heads) / self._evenly(PROBED["many" if op.heads >= MANY else "few"])
        return interpolate(points, op.keys) * evenly if points else None

    def _evenly(self, heads: float) -> float:
        """Which part of the time the threads are at work that share so many KV heads, each of them one thread's: of two, three heads
        keep one waiting for a fourth of it."""
        return heads / self.threads / math.ceil(heads / self.threads)

    def with_products_at(self, format: str, flops_per_s: float) -> Machine:
        """The same machine, on which all products with weights in `format`, the head among them, run at so many FLOP/s."""
        found = {kernel: self.rates.get(kernel, {}) | {format: ((1, flops_per_s),)} for kernel in ("gemm", SMALL_GEMM, "head")}
        return replace(self, rates=self.rates | found)

    def with_only_products(self) -> Machine:
        """The same machine, on which nothing but products costs more than its bytes and its FLOPs: as where one piece of code goes
        through all that is between them."""
        products = {kernel: rate for kernel, rate in self.rates.items() if kernel in ("gemm", SMALL_GEMM, "head")}
        return replace(self, elementwise={}, rates=products)

    def bytes_at(self, op: Work, working_set: float) -> float:
        """Bytes/s at which `op` moves its bytes: those of memory, or less where it has to do something to every element."""
        return min(self.bandwidth_at(working_set), self.handles_at(op))

    def handles_at(self, op: Work) -> float:
        """Most bytes/s that `op` can handle, however fast they come: a limit that was measured of element-wise operations only."""
        curve = self.elementwise.get(op.dtype) if op.kernel == "elementwise" else None
        return interpolate(curve, op.rows) if curve else math.inf

    def operation_s(self, op: Work, working_set: float) -> float:
        """Seconds of one operation, among others that read `working_set` bytes with it, without its fixed cost."""
        return max(op.flops / self.flops_at(op), op.bytes / self.bytes_at(op, working_set))

    def fixed_s(self, work: Work) -> float:
        """Seconds that each operation of `work` costs whatever its size."""
        return self.fixed.get(next((op.weights for op in work.operations() if op.weights), ""), self.fixed_s_per_op)

    def ridge(self, dtype: str) -> float:
        """The ridge point, FLOPs per byte: below it memory is the limit, above it compute."""
        return self.peak(dtype) / self.bandwidth_at()

    def napkin(self, work: Work) -> float:
        """Seconds as done by hand: all the FLOPs at peak or all the bytes from memory, whichever is longer."""
        return max(work.flops / self.peak(work.dtype), work.bytes / self.bandwidth_at())

    def time(self, work: Work, ops: int = 0, communication_s: float = 0.0) -> Prediction:
        """Seconds for `work`, each of its operations bound by compute or by memory, plus the fixed cost of `ops` operations
        and the time that devices spend on talking, which nothing is assumed to hide.

        The working set is the whole of the work: before a step comes back to the same bytes it has read all the others.
        """
        terms = [(op.flops / self.flops_at(op), op.bytes / self.bytes_at(op, work.bytes)) for op in work.operations()]
        fixed = ops * self.fixed_s(work)
        seconds = sum(max(term) for term in terms) + fixed + communication_s
        return Prediction(seconds, sum(c for c, _ in terms), sum(m for _, m in terms), fixed, communication_s)

    def mbu(self, work: Work, seconds: float) -> float:
        """Memory bandwidth utilisation: bytes that had to move, per second, over what memory can deliver."""
        return work.bytes / seconds / self.bandwidth_at()

    def mfu(self, work: Work, seconds: float) -> float:
        """Model FLOPs utilisation: FLOPs that had to be done, per second, over the peak."""
        return work.flops / seconds / self.peak(work.dtype)
