"""A machine that was measured: the roofline's `Machine` with a rate for each kernel at its own
format and number of rows, and with the price of starting an operation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from clawdemy_infer.arithmetic import Work
from clawdemy_infer.envelope.roofline import PAGED_ATTENTION, Curve, Machine, interpolate

ATTENTION_KEYS = (64, 384, 2048)
"""Keys that each sequence of the decode-attention probes sees."""
PROBE_KV_HEADS = {"few": 4, "many": 64}
"""B*K of the two decode-attention probes."""
MANY_KV_HEADS = 32
"""B*K from which a decode step is predicted by the probe of many KV heads."""
SMALL_GEMM = "gemm of small matrices"
"""Products of matrices a quarter as large as in "gemm": to start one costs something too."""
GEMM_NUMBERS = 2**20
"""Numbers in a matrix of the "gemm" probe, about."""
PRODUCTS = ("gemm", SMALL_GEMM, "head")
"""Rates of matrix products."""


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
    """

    rates: dict[str, dict[str, Curve]] = field(default_factory=dict)
    elementwise: dict[str, Curve] = field(default_factory=dict)
    fixed: dict[str, float] = field(default_factory=dict)
    threads: int = 1

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
        weights = next((op.weights for op in work.operations() if op.weights), "")
        return self.fixed.get(weights, self.fixed_s_per_op)


def only_products(machine: Machine) -> Machine:
    """`machine` with nothing but matrix products costing more than their bytes and FLOPs: as where
    one piece of code does all that is between them."""
    if not isinstance(machine, Calibrated):
        return machine
    rates = {name: rate for name, rate in machine.rates.items() if name in PRODUCTS}
    return replace(machine, elementwise={}, rates=rates)


def slowed(machine: Calibrated, speed: float) -> Calibrated:
    """The same machine at `speed` times its calibrated speed."""
    def scaled(curve: Curve) -> Curve:
        return tuple((x, y * speed) for x, y in curve)

    return replace(
        machine, bandwidth=scaled(machine.bandwidth), fixed_s_per_op=machine.fixed_s_per_op / speed,
        fixed={format: seconds / speed for format, seconds in machine.fixed.items()},
        peak_flops={dtype: rate * speed for dtype, rate in machine.peak_flops.items()},
        elementwise={dtype: scaled(curve) for dtype, curve in machine.elementwise.items()},
        rates={kernel: {dtype: scaled(curve) for dtype, curve in curves.items()}
               for kernel, curves in machine.rates.items()})
