"""A machine that was measured: the roofline's `Machine` with a rate for each kernel at its own
format and number of rows, the price of launching an operation, and how far each may be off."""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

from clawdemy_infer.arithmetic import Format, Work
from clawdemy_infer.envelope.roofline import PAGED_ATTENTION, Curve, Machine, interpolate

ATTENTION_KEYS = (64, 384, 2048)                # of each sequence of the decode-attention probes
PROBE_KV_HEADS = {"few": 4, "many": 64}         # B*K of the two decode-attention probes
MANY_KV_HEADS = 32      # B*K from which a decode step is predicted by the probe of many
SMALL_GEMM = "gemm of small matrices"
"""Products of matrices a quarter as large as in "gemm": to start one costs something too."""
GEMM_NUMBERS = 2**20    # in a matrix of the "gemm" probe, about
PRODUCTS = ("gemm", SMALL_GEMM, "head")         # their rates
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


def decode_attention(kv_heads: float, keys: int) -> str:
    """Name of the rate of decode attention over `keys` keys of each sequence; `kv_heads` is B*K."""
    return f"attention of {_probe(kv_heads)} heads over {keys} keys"


def _probe(kv_heads: float) -> str:
    return "many" if kv_heads >= MANY_KV_HEADS else "few"


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
        rates = self.rates.get(op.name) or self.rates.get(op.kernel, {})
        curve = rates.get(op.weights) or rates.get(op.dtype)
        if not curve:
            return self.peak(op.dtype)
        rate, small = interpolate(curve, op.rows), self.rates.get(SMALL_GEMM, {}).get(op.weights)
        if small and op.numbers and op.name not in self.rates:
            sizes = (GEMM_NUMBERS / 4, interpolate(small, op.rows)), (GEMM_NUMBERS, rate)
            return interpolate(sizes, op.numbers)
        return rate

    def _decode_attention(self, op: Work) -> float | None:
        """FLOP/s of attention in a decode step, between the numbers of keys that were measured."""
        curves = {keys: self.rates.get(decode_attention(op.heads, keys), {}).get(op.dtype)
                  for keys in ATTENTION_KEYS}
        points = tuple((keys, interpolate(curve, op.rows))
                       for keys, curve in curves.items() if curve)
        probe_heads = PROBE_KV_HEADS[_probe(op.heads)]
        busy = self._thread_utilisation(op.heads) / self._thread_utilisation(probe_heads)
        return interpolate(points, op.keys) * busy if points else None

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
    rates = {name: rate for name, rate in machine.rates.items() if name in PRODUCTS}
    return replace(machine, elementwise={}, rates=rates)
