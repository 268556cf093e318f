"""A row as seconds at data-sheet speed: every operation's compute and memory time, the kernels
launched, the bytes sent between devices. Nothing here is fitted: `fitting.Stack` says how much
longer each of these really takes. ValueError, with the reason, for what cannot be put this way."""

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from clawdemy_infer.arithmetic import BYTES, ModelShape, Work, matmul
from clawdemy_infer.envelope.parallel import all_reduce_s, share
from clawdemy_infer.envelope.roofline import Link
from clawdemy_infer.published.rows import PublishedRun
from clawdemy_infer.published.setting import Chip, bytes_per_weight, chip, shape_of, software

GENERATED = 128     # tokens of a decode run whose source states no lengths


class Op(NamedTuple):
    """All operations of one kind in a row, in seconds at the data sheet's peak and bandwidth;
    `unpack` at one vector FLOP for each quantized weight that a tile needs; `filled` is what
    cutting the output into tiles leaves of the peak."""

    compute: float
    memory: float
    unpack: float = 0.0
    filled: float = 1.0


@dataclass
class Demand:
    """What a row asks of its machine.

    amount, rate   the row's value is amount / seconds if it is a rate, else amount * seconds
    kernels        launched one after the other
    all_reduces    how many; `sent` is the seconds that they take at the link's speed
    bound          seconds that nothing can beat: every byte once, at the fastest arithmetic
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
        return self.amount / seconds if self.rate else self.amount * seconds

    def seconds(self, value: float) -> float:
        return self.amount / value if self.rate else value / self.amount


class Account(Demand):
    """The demand of `run` while it is added up, for the machine and the software of that row."""

    def __init__(self, run: PublishedRun) -> None:
        unit = {"ms": 1e3, "us": 1e6}.get(run.metric.rpartition("_")[2])    # else it is a rate
        super().__init__(chip(run.hardware), unit or 1.0, rate=unit is None)
        self.run, self.software = run, software(run.software)
        if not run.peak_bw_GBps_per_device:
            raise ValueError("the bandwidth is not stated")
        self.bandwidth = 1e9 * run.peak_bw_GBps_per_device
        self.peak = 1e12 * (run.peak_TFLOPs_per_device or 0) or self.chip.peak_flops or math.inf
        # Products of 8 bits run at the stated peak; attention stays in 16 bits.
        self.narrow = run.act_dtype in ("fp8", "int8")
        self.unpacks = (run.weight_bits_eff or 16) < 16 and not self.narrow
        self.best_peak = self.peak * self.chip.fp16_accumulation
        if self.unpacks and self.software.fp16_accumulation:
            self.peak = self.best_peak

    def add(self, op: Work, times: float = 1.0, columns: int = 0, seen: float = 0.0) -> None:
        """An operation; `columns` of a GEMM's output, the bytes `seen` by any kernel, if fewer."""
        halved = 2 if op.kernel == "attention" and self.narrow else 1
        compute, memory = op.flops / (self.peak / halved), op.bytes / self.bandwidth
        filled = self.chip.gemm_filled(round(op.rows) or 1, columns) if columns else 1.0
        unpack = 0.0
        if op.kernel == "gemm" and self.unpacks and self.chip.vector_flops:
            weights = op.flops / 2 / op.rows            # k * n of each product, all of them
            tile = 32 if self.chip.unified else 128     # rows that share an unpacking (llama.cpp)
            unpack = weights * -(-op.rows // tile) / self.chip.vector_flops
        self.ops.append(Op(times * compute, times * memory, times * unpack, filled))
        if op.kernel != "elementwise":                  # which a kernel may fuse away
            fetch = (seen or op.bytes) / self.bandwidth
            self.bound += times * max(op.flops / (self.best_peak / halved), fetch)

    def forward(self, batch: int, new: int, context: int, times: float = 1.0) -> None:
        """`times` passes over `new` tokens of each of `batch` sequences, then of `context`."""
        run, shape, tp = self.run, shape_of(self.run), self.run.whole("tp", 1)
        if shape.N % tp:
            raise ValueError(f"tp={tp} does not divide the {shape.N} query heads")
        part = share(shape, tp) if tp > 1 else shape
        activations = "fp32" if run.act_dtype == "fp32" else "fp16"
        work, least = (part.step(batch, new, context, weights=bytes_per_weight(run, shape),
                                 kv=run.kv_format, activations=activations, shared=shared)
                       for shared in (self.software.shared or new > 1, True))
        columns = {name: n for layer, _ in part.groups for name, (_, n) in layer.matrices().items()}
        columns["head"] = part.V
        for op, seen in zip(work.operations(), least.operations(), strict=True):
            self.add(op, times, columns.get(op.name, 0) if op.kernel == "gemm" else 0, seen.bytes)
        self.kernels += times * shape.L * self.software.kernels
        if tp > 1:
            self.send(batch * new * shape.D * BYTES[activations], tp,
                      times * shape.L * (1 if shape.parallel else 2))

    def send(self, bytes: float, tp: int, calls: float) -> None:
        """`calls` all-reduces of `bytes`, without what each costs before a byte moves."""
        self.all_reduces += calls
        self.sent += calls * all_reduce_s(bytes, tp, Link(1e9 * (self.chip.link or 32)))


def demand(run: PublishedRun) -> Demand:
    """What `run` asks of its machine. Raises ValueError with the reason where it cannot be said."""
    if run.metric not in METRICS:
        raise ValueError(f"metric {run.metric!r} is not a time, and no count of bytes either")
    account = Account(run)
    METRICS[run.metric](account, run)
    return account


def decode(account: Account, run: PublishedRun) -> None:
    batch, context = run.whole("batch", 1), run.decode_context
    if run.metric == "decode_tok_s_total":
        account.amount = batch
    if context is None:
        context = (run.prompt_len or 0) + (run.gen_len or GENERATED) / 2
    account.forward(batch, 1, max(1, round(context)))


def prefill(account: Account, run: PublishedRun) -> None:
    batch, prompt = run.whole("batch", 1), run.whole("prompt_len")
    if account.rate:
        account.amount = batch * prompt
    if account.peak == math.inf:
        raise ValueError("no FLOP/s are stated for this machine, and data/chips.toml has no entry "
                         "for it: prefill is compute")
    account.forward(batch, prompt, prompt)


def serving(account: Account, run: PublishedRun) -> None:
    """A static batch from end to end: its prompts, then every token at the mean context. Mixed:
    requests of mean lengths through as many places as the memory has room for."""
    batch, prompt, generated = map(run.whole, ("batch", "prompt_len", "gen_len"))
    shape, devices = shape_of(run), run.whole("n_devices", 1)
    account.amount = batch * generated / (devices if run.metric.endswith("per_gpu") else 1)
    places, context = batch, prompt + generated // 2
    if run.metric.endswith("mixed"):
        context = round(run.decode_context or prompt + generated / 2)
        if room := 1e9 * (run.mem_GB_per_device or 0) * devices:
            places = min(batch, shape.fits(room, 1, context, bytes_per_weight(run, shape),
                                           run.kv_format).max_batch)
        if places < 1:
            raise ValueError("not one of the requests fits beside the weights")
    account.forward(batch, prompt, prompt)
    account.forward(places, 1, context, times=batch * generated / places)


def gemm(account: Account, run: PublishedRun) -> None:
    """One product, [M, K] x [K, N] as the notes say; the batch column is M."""
    found = re.search(r"\[(\d+), ?(\d+)\] ?x ?\[\2, ?(\d+)\]", run.notes)
    if not found:
        raise ValueError("the notes do not say the product as [M,K]x[K,N]")
    if run.weight_bits_eff is None:
        raise ValueError("the width of the weights is not stated")
    m, k, n = map(int, found.groups())
    account.add(matmul(m, k, n, weights=run.weight_bits_eff / 8, activations="fp16"), columns=n)
    account.kernels = 1


def attention(account: Account, run: PublishedRun) -> None:
    """Decode attention of one layer; the notes say the heads where the columns do not."""
    found = re.search(r"(\d+) query heads,? (?:and )?(\d+) KV heads.*?head_dim (\d+)", run.notes,
                      re.IGNORECASE)
    N, K, H = (map(int, found.groups()) if found
               else map(run.whole, ("n_heads", "n_kv_heads", "head_dim")))
    shape = ModelShape("attention", 1, N * H, N, K, H, 1, 1)
    batch, context = run.whole("batch", 1), run.whole("decode_context")
    least, each = (shape.attention(batch, 1, context, kv=run.kv_format, shared=shared)
                   for shared in (True, False))
    if "eager" in run.software:         # K and V are copied for every query head, and read again
        bytes, account.kernels = 2 * each.bytes + least.bytes, 5
    elif "FlashAttention 2.0" in run.software:  # a block per sequence and query head
        bytes, account.kernels = each.bytes / account.chip.filled(batch * N), 1
    else:                               # the context is split, and a second kernel sums up
        bytes, account.kernels = least.bytes, 2
    account.add(each._replace(bytes=bytes), seen=least.bytes)


def all_reduce(account: Account, run: PublishedRun) -> None:
    """One sum over all devices, of the message that the notes state."""
    found = re.search(r"message ([\d.]+) ([KMG])iB", run.notes)
    if not found:
        raise ValueError("the notes do not say the size of the message")
    account.send(float(found[1]) * 1024 ** ("KMG".index(found[2]) + 1), run.whole("tp"), 1)
    account.bound = account.sent


METRICS = {
    "decode_ms": decode, "decode_tok_s_per_seq": decode, "decode_tok_s_total": decode,
    "ttft_ms": prefill, "prefill_tok_s": prefill, "e2e_out_tok_s_per_gpu": serving,
    "e2e_out_tok_s_total": serving, "e2e_out_tok_s_total_mixed": serving,
    "gemm_ms": gemm, "attn_kernel_us": attention, "allreduce_ms": all_reduce}
