"""A row as seconds at data-sheet speed: every operation's compute and memory time, the kernels launched, the bytes sent between devices.

Nothing is fitted here. `fitting.Stack` says how much longer each of these really takes, with the same few figures for every row.
A row that cannot be put this way raises ValueError, and its message is the reason that is reported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from clawdemy_infer.arithmetic import BYTES, ModelShape, Work, matmul
from clawdemy_infer.parallel import all_reduce_s, share
from clawdemy_infer.published.rows import Run
from clawdemy_infer.published.setting import Chip, chip, software
from clawdemy_infer.published.shapes import bytes_per_weight, shape_of
from clawdemy_infer.roofline import Link

GENERATED = 128
"""Tokens of a decode run whose source states no lengths."""


class Op(NamedTuple):
    """One kind of operation of a row: all layers, passes and repetitions of it together.

    compute, memory   seconds at the data sheet's peak and bandwidth
    unpack            seconds on the vector units at one FLOP for each quantized weight that a tile needs
    filled            what cutting the output into tiles leaves of the peak
    """

    compute: float
    memory: float
    unpack: float = 0.0
    filled: float = 1.0


@dataclass
class Plan:
    """What a row asks of its machine.

    kernels           launched one after the other
    all_reduces       how many; `sent` is the seconds that they take at the link's speed
    bound             seconds that nothing on this machine can beat: every byte once, the fastest arithmetic it has, no other cost
    amount, rate      the row's value is amount / seconds if it is a rate, else amount * seconds
    """

    chip: Chip
    amount: float
    rate: bool
    ops: list[Op] = field(default_factory=list)
    kernels: float = 0.0
    all_reduces: float = 0.0
    sent: float = 0.0
    bound: float = 0.0

    def value(self, seconds: float) -> float:
        """What the row would state of a run that takes `seconds`."""
        return self.amount / seconds if self.rate else self.amount * seconds

    def seconds(self, value: float) -> float:
        """How long a run takes of which the row states `value`."""
        return self.amount / value if self.rate else value / self.amount


class Bench:
    """The machine and the software of one row, which passes are added to."""

    def __init__(self, run: Run, amount: float, rate: bool):
        self.run, self.chip, self.software = run, chip(run.hardware), software(run.software)
        if not run.peak_bw_GBps_per_device:
            raise ValueError("the bandwidth is not stated")
        self.bandwidth = 1e9 * run.peak_bw_GBps_per_device
        self.peak = 1e12 * run.peak_TFLOPs_per_device if run.peak_TFLOPs_per_device else self.chip.peak_flops
        self.narrow = run.act_dtype in ("fp8", "int8")              # products of the stated peak; attention stays in 16 bits
        self.unpacks = (run.weight_bits_eff or 16) < 16 and not self.narrow
        self.best_peak = self.peak * self.chip.fp16_accumulation
        if self.unpacks and self.software.fp16_accumulation:
            self.peak = self.best_peak
        self.plan = Plan(self.chip, amount, rate)

    def add(self, op: Work, times: float = 1.0, columns: int = 0, seen: float | None = None) -> None:
        """An operation. `columns` of a GEMM's output; `seen` are the bytes of it that any kernel has to read."""
        peak = self.peak / 2 if op.kernel == "attention" and self.narrow else self.peak
        best = self.best_peak / 2 if op.kernel == "attention" and self.narrow else self.best_peak
        compute, memory = (op.flops / peak if peak else 0.0), op.bytes / self.bandwidth
        filled = self.chip.gemm_filled(round(op.rows) or 1, columns) if columns else 1.0
        unpack = 0.0
        if op.kernel == "gemm" and self.unpacks and self.chip.vector_flops:
            weights = op.flops / 2 / op.rows                        # k * n of each product, all of them
            unpack = weights * -(-op.rows // self.chip.tile_rows) / self.chip.vector_flops
        self.plan.ops.append(Op(times * compute, times * memory, times * unpack, filled))
        if op.kernel != "elementwise":                              # those a kernel may fuse away, and a bound must
            least = op.bytes if seen is None else seen
            self.plan.bound += times * max(op.flops / best if best else 0.0, least / self.bandwidth)

    def forward(self, shape: ModelShape, batch: int, new: int, context: int, times: float = 1.0) -> None:
        """A pass of the whole model over `new` tokens of each of `batch` sequences that hold `context` then, `times` over."""
        run, tp = self.run, self.run.whole("tp", 1)
        if shape.N % tp:
            raise ValueError(f"tp={tp} does not divide the {shape.N} query heads")
        part = _part(shape, tp)
        activations = "fp32" if run.act_dtype == "fp32" else "fp16"
        formats = {"weights": bytes_per_weight(run, shape), "kv": kv_format(run), "activations": activations}
        shared = self.software.shared or new > 1
        work = part.step(batch, new, context, shared=shared, **formats)
        least = work if shared else part.step(batch, new, context, shared=True, **formats)
        columns = {name: n for layer, _ in part.groups for name, (_, n) in layer.matrices().items()} | {"head": part.V}
        for op, seen in zip(work.operations(), least.operations(), strict=True):
            self.add(op, times, columns.get(op.name, 0) if op.kernel == "gemm" else 0, seen.bytes)
        self.plan.kernels += times * shape.L * self.software.kernels
        if tp > 1:
            calls = times * shape.L * (1 if shape.parallel else 2)
            array = batch * new * shape.D * (4 if activations == "fp32" else 2)
            self.plan.all_reduces += calls
            self.plan.sent += calls * all_reduce_s(array, tp, Link(1e9 * (self.chip.link or 32)))


def kv_format(run: Run) -> str:
    return run.kv_dtype if run.kv_dtype in BYTES else "fp16"


_part = cache(share)            # so that its layers are worked out once


def plan(run: Run) -> Plan:
    """What `run` asks of its machine. Raises ValueError with the reason for a row that this arithmetic cannot put so."""
    if run.metric not in METRICS:
        raise ValueError(f"metric {run.metric!r} is not a time, and no count of bytes either")
    return METRICS[run.metric](run)


# ---- one function for each kind of measurement ----


def decode(run: Run) -> Plan:
    """One token for each sequence."""
    batch = run.whole("batch", 1)
    amount, rate = {"decode_ms": (1e3, False), "decode_tok_s_per_seq": (1, True), "decode_tok_s_total": (batch, True)}[run.metric]
    bench = Bench(run, amount, rate)
    context = run.decode_context
    if context is None:
        context = (run.prompt_len or 0) + (run.gen_len or GENERATED) / 2
    bench.forward(shape_of(run), batch, 1, max(1, round(context)))
    return bench.plan


def prefill(run: Run) -> Plan:
    """The whole prompt at once."""
    batch, prompt = run.whole("batch", 1), run.whole("prompt_len")
    bench = Bench(run, *((1e3, False) if run.metric == "ttft_ms" else (batch * prompt, True)))
    if not bench.peak:
        raise ValueError("no FLOP/s are stated for this machine, and data/chips.toml has no entry for it: prefill is compute")
    bench.forward(shape_of(run), batch, prompt, prompt)
    return bench.plan


def serving(run: Run) -> Plan:
    """A static batch from end to end: its prompts, then every token at the mean context."""
    batch, prompt, generated = run.whole("batch"), run.whole("prompt_len"), run.whole("gen_len")
    bench = Bench(run, batch * generated / (run.whole("n_devices", 1) if run.metric.endswith("per_gpu") else 1), True)
    shape = shape_of(run)
    bench.forward(shape, batch, prompt, prompt)
    bench.forward(shape, batch, 1, prompt + generated // 2, times=generated)
    return bench.plan


def mixed(run: Run) -> Plan:
    """Requests of mean lengths through as many places as the memory has room for."""
    requests, prompt, generated = run.whole("batch"), run.whole("prompt_len"), run.whole("gen_len")
    bench, shape = Bench(run, requests * generated, True), shape_of(run)
    context = round(run.decode_context or prompt + generated / 2)
    room = 1e9 * (run.mem_GB_per_device or 0) * run.whole("n_devices", 1)
    kv = kv_format(run)
    places = min(requests, shape.fits(room, 1, context, bytes_per_weight(run, shape), kv).max_batch) if room else requests
    if places < 1:
        raise ValueError("not one of the requests fits beside the weights")
    bench.forward(shape, requests, prompt, prompt)
    bench.forward(shape, places, 1, context, times=requests * generated / places)
    return bench.plan


def gemm(run: Run) -> Plan:
    """One product, [M, K] x [K, N] as the notes say; the batch column is M."""
    found = re.search(r"\[(\d+), ?(\d+)\] ?x ?\[(\d+), ?(\d+)\]", run.notes)
    if not found or found[2] != found[3]:
        raise ValueError("the notes do not say the product as [M,K]x[K,N]")
    m, k, n = int(found[1]), int(found[2]), int(found[4])
    if run.weight_bits_eff is None:
        raise ValueError("the width of the weights is not stated")
    bench = Bench(run, 1e3, False)
    bench.add(matmul(m, k, n, weights=run.weight_bits_eff / 8, activations="fp16"), columns=n)
    bench.plan.kernels = 1
    return bench.plan


def attention(run: Run) -> Plan:
    """Decode attention of one layer; the notes say the heads where the columns do not."""
    found = re.search(r"(\d+) query heads,? (?:and )?(\d+) KV heads.*?head_dim (\d+)", run.notes, re.IGNORECASE)
    N, K, H = map(int, found.groups()) if found else map(run.whole, ("n_heads", "n_kv_heads", "head_dim"))
    layer = ModelShape(run.model or "attention", 1, N * H, N, K, H, 1, 1)
    batch, context = run.whole("batch", 1), run.whole("decode_context")
    bench = Bench(run, 1e6, False)
    least = layer.attention(batch, 1, context, kv=kv_format(run))
    each = layer.attention(batch, 1, context, kv=kv_format(run), shared=False)
    if "eager" in run.software:                 # K and V are copied out for every query head, written and read again
        each, kernels, filled = each._replace(bytes=2 * each.bytes + least.bytes), 5, 1.0
    elif re.search(r"FlashAttention 2\.0", run.software):       # a block for each sequence and query head, however long the context
        kernels, filled = 1, bench.chip.filled(batch * N)
    else:
        each, kernels, filled = least, 2, 1.0   # the context is split, the group shares its reads, a second kernel sums up
    bench.add(each._replace(bytes=each.bytes / filled), seen=least.bytes)
    bench.plan.kernels = kernels
    return bench.plan


def all_reduce(run: Run) -> Plan:
    """One sum over all devices, of the message that the notes state."""
    found = re.search(r"message ([\d.]+) ([KMG])iB", run.notes)
    if not found:
        raise ValueError("the notes do not say the size of the message")
    bench = Bench(run, 1e3, False)
    message = float(found[1]) * 1024 ** ("KMG".index(found[2]) + 1)
    bench.plan.all_reduces = 1
    bench.plan.sent = bench.plan.bound = all_reduce_s(message, run.whole("tp"), Link(1e9 * (bench.chip.link or 32)))
    return bench.plan


METRICS = {
    "decode_ms": decode, "decode_tok_s_per_seq": decode, "decode_tok_s_total": decode,
    "ttft_ms": prefill, "prefill_tok_s": prefill,
    "e2e_out_tok_s_per_gpu": serving, "e2e_out_tok_s_total": serving, "e2e_out_tok_s_total_mixed": mixed,
    "gemm_ms": gemm, "attn_kernel_us": attention, "allreduce_ms": all_reduce,
}
