"""A machine that was measured: the roofline's `Machine` with a rate for each kernel at its own
format and number of rows, the price of launching an operation, and how far each may be off."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

from clawdemy_infer.arithmetic import Format, Work
from clawdemy_infer.envelope.roofline import PAGED_ATTENTION, Curve, Machine, interpolate

ATTENTION_KEYS = (64, 384, 2048)                # of each sequence of the decode-attention probes
PROBE_KV_HEADS = {"few": 4, "many": 64}         # B*K of the two decode-attention probes
SMALL_GEMM = "gemm of small matrices"
PRODUCT_NUMBERS = {SMALL_GEMM: 2**18, "gemm": 2**20, "head": 25 * 2**20}
"""Numbers in a matrix of each probe of products, about. To start a product costs something: the
larger the matrix, the higher the rate."""
SHAPE_SPREAD = 0.08
"""What a probe cannot know of an operation whose sizes are not its own: relative, added to the
spread of its samples. From settings that no probe used (`clawdemy-infer bench --coverage`)."""
WAIT_SPREAD = 0.5
"""What waiting for a core adds, for each second of it in a second: where other processes hold the
cores, it is chance which operations wait. From the same settings, with one core taken."""
COMPUTE_ROWS = 32       # M from which a product is slowed with the arithmetic, not the memory


class Speeds(NamedTuple):
    """How fast the machine is, as fractions of its calibration: reading, computing, and starting
    operations; and the share of the time for which a thread `waited` for a core."""

    memory: float = 1.0
    compute: float = 1.0
    launches: float = 1.0
    waited: float = 0.0

    def of(self, rows: float) -> float:
        """That of a product with so many rows."""
        return self.compute if rows >= COMPUTE_ROWS else self.memory


def decode_attention(probe: str, keys: int) -> str:
    """Name of the rate of decode attention over `keys` keys of each sequence, with "few" or "many"
    KV heads in all of them (`PROBE_KV_HEADS`)."""
    return f"attention of {probe} heads over {keys} keys"


def between(points: Sequence[tuple[float, float | None]], x: float) -> float | None:
    """The rate at `x` between those of `points` that were measured; None where none was."""
    known = tuple(point for point in points if point[1])
    return interpolate(known, x) if known else None


@dataclass(frozen=True)
class Calibrated(Machine):
    """What was measured beyond the data sheet's figures.

    rates         FLOP/s by kernel ("gemm", "attention", `PAGED_ATTENTION`) or by name ("head",
                  `SMALL_GEMM`, `decode_attention`), then by format, as (rows M, FLOP/s)
    elementwise   bytes/s at which element-wise operations go through arrays, by dtype, as (rows M,
                  bytes/s)
    fixed         seconds that an operation costs between products of weights in that format
    threads       threads that share the heads of an attention, as those of a CPU do
    spreads       half-width of what the probes found, relative, by kernel and then by format
    device        "cpu" or "cuda"
    reference     units/s of the probes of `present` when the machine was calibrated
    now           the speeds that the figures are scaled to
    waited        share of its calibration for which a thread waited for a core
    """

    rates: dict[str, dict[str, Curve]] = field(default_factory=dict)
    elementwise: dict[str, Curve] = field(default_factory=dict)
    fixed: dict[str, float] = field(default_factory=dict)
    threads: int = 1
    device: str = "cpu"
    spreads: dict[str, dict[str, float]] = field(default_factory=dict)
    reference: dict[str, float] = field(default_factory=dict)
    now: Speeds = Speeds()
    waited: float = 0.0

    def flops_at(self, op: Work) -> float:
        """FLOP/s that `op` can reach: the measured rate of its name or kernel at its format or
        dtype and its rows, else the peak."""
        if op.kernel == PAGED_ATTENTION:
            if curve := self.rates.get(PAGED_ATTENTION, {}).get(op.dtype):
                return interpolate(curve, op.rows)
            op = op._replace(kernel="attention")
        if op.keys and (rate := self._decode_attention(op)):
            return rate
        if op.numbers and (rate := between([(numbers, self._rate(name, op)) for name, numbers
                                            in PRODUCT_NUMBERS.items()], op.numbers)):
            return rate
        return self._rate(op.kernel, op) or self.peak(op.dtype)

    def _rate(self, name: str, op: Work) -> float | None:
        """FLOP/s measured under `name`, at the format or dtype of `op` and its rows."""
        curves = self.rates.get(name, {})
        curve = curves.get(op.weights) or curves.get(op.dtype)
        return interpolate(curve, op.rows) if curve else None

    def _decode_attention(self, op: Work) -> float | None:
        """FLOP/s of attention in a decode step, between the numbers of keys and of KV heads that
        were measured."""
        by_heads = []
        for probe, heads in PROBE_KV_HEADS.items():
            rate = between([(keys, self._rate(decode_attention(probe, keys), op))
                            for keys in ATTENTION_KEYS], op.keys)
            by_heads.append((heads, rate and rate / self._thread_utilisation(heads)))
        rate = between(by_heads, op.heads)
        return rate and rate * self._thread_utilisation(op.heads)

    def _thread_utilisation(self, heads: float) -> float:
        """Share of the threads at work when heads are dealt whole: 3 heads on 2 threads -> 0.75."""
        return heads / self.threads / math.ceil(heads / self.threads)

    def handles_at(self, op: Work) -> float:
        """Most bytes/s that `op` can handle: measured of element-wise operations only."""
        curve = self.elementwise.get(op.dtype) if op.kernel == "elementwise" else None
        return interpolate(curve, op.rows) if curve else math.inf

    def fixed_s(self, work: Work) -> float:
        """Seconds to start each operation beside products of the weights in `work`."""
        formats = {op.weights for op in work.operations()} & self.fixed.keys()
        return self.fixed[formats.pop()] if len(formats) == 1 else self.fixed_s_per_op

    def spread_at(self, kernel: str, format: Format) -> float:
        """The samples' spread, what a probe cannot know, and what a busy machine adds."""
        spreads = self.spreads.get("attention" if kernel == PAGED_ATTENTION else kernel, {})
        of_samples = spreads.get(format, max(spreads.values(), default=0.0))
        return of_samples + SHAPE_SPREAD + WAIT_SPREAD * max(self.waited, self.now.waited)

    def at(self, speeds: Speeds) -> Self:
        """The same machine at other `speeds`, as fractions of its calibration."""
        change = Speeds(*(new / old for new, old in zip(speeds[:3], self.now[:3], strict=True)))

        def scaled(curve: Curve, by_rows: bool = False) -> Curve:
            return tuple((x, y * (change.of(x) if by_rows else change.memory)) for x, y in curve)

        return replace(
            self, now=speeds, bandwidth=scaled(self.bandwidth),
            fixed_s_per_op=self.fixed_s_per_op / change.launches,
            fixed={format: seconds / change.launches for format, seconds in self.fixed.items()},
            peak_flops={dtype: rate * change.compute for dtype, rate in self.peak_flops.items()},
            elementwise={dtype: scaled(curve) for dtype, curve in self.elementwise.items()},
            rates={kernel: {dtype: scaled(curve, by_rows=True) for dtype, curve in curves.items()}
                   for kernel, curves in self.rates.items()})


def only_products(machine: Machine) -> Machine:
    """`machine` with nothing but matrix products costing more than their bytes and FLOPs: as where
    one piece of code does all that is between them."""
    if not isinstance(machine, Calibrated):
        return machine
    rates = {name: rate for name, rate in machine.rates.items() if name in PRODUCT_NUMBERS}
    return replace(machine, elementwise={}, rates=rates)
