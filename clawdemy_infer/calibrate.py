"""Measure this machine once, in some seconds: the figures from which every calibrated prediction is made.

Five things are measured, none of them on the model that they will predict:

    read bandwidth      the sum of an array, over working sets from 1 MiB to 1 GiB: caches show as steps
    peak FLOP/s         a large square matrix product, by dtype
    GEMM rate by M      X[M, k] @ W[k, n] with W fresh from memory each time: at small M the rate is the reading of W
    attention rate by M the fused attention kernel on M query rows over 1,024 keys and values
    fixed cost          tiny operations between two readings of a weight: what PyTorch charges to start one, with cold caches

The result is a `Machine`, kept in the user's cache with the fingerprint of the hardware and the date.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from clawdemy_infer.paths import cache_dir
from clawdemy_infer.roofline import Machine
from clawdemy_infer.timing import alternate, count_ops, rates, stopwatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORKING_SETS = [2**20, 2**22, 2**24, 2**26, 2**28, 2**30]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
SHAPES = [(640, 640), (640, 2560), (1280, 640)]
"""(inputs, outputs) of the weights in the GEMM measurement: square, wide and tall, of a small model's size but of no model's."""

DRIFT = 0.15
"""A kept calibration is used again while main-memory bandwidth is within this fraction of what it was."""


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def memory_bytes(device: str) -> int:
    """Bytes of memory that the device has."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def fingerprint(device: str) -> dict[str, str]:
    """What a calibration is valid for: another processor, thread count or torch, and the figures mean nothing."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    return {"device": name, "system": platform.system(), "torch": torch.__version__}


def read_bandwidth(sizes: list[int], device: str, rounds: int = 7) -> list[tuple[float, float]]:
    """(bytes, bytes/s) for reading `sizes` bytes again and again. A lower bound on the hardware: it is what a torch sum reaches."""
    data = torch.ones(max(sizes) // 4, device=device)

    def rate(size: int) -> float:
        view = data[: size // 4]

        def read(_: int) -> int:
            view.sum()
            return size
        return rates({"read": read}, rounds=rounds)["read"]
    return [(size, rate(size)) for size in sizes]


def gemm_rates(dtype: str, device: str, rows: list[int] = ROWS) -> list[tuple[float, float]]:
    """(M, FLOP/s) of X[M, k] @ W[k, n], over so many different weights that none is still in a cache when its turn comes."""
    kind = DTYPES[dtype]
    copies = 2**29 // (sum(k * n for k, n in SHAPES) * kind.itemsize)
    weights = [torch.randn(n, k, device=device).to(kind) for _ in range(copies) for k, n in SHAPES]

    def at(m: int):
        inputs = {k: torch.randn(m, k, device=device).to(kind) for k, _ in SHAPES}

        def one_set(i: int) -> int:
            sets = [weights[(i * len(SHAPES) + j) % len(weights)] for j in range(len(SHAPES))]
            for w in sets:
                F.linear(inputs[w.shape[1]], w)
            return 2 * m * sum(w.numel() for w in sets)
        return one_set

    measured = rates({str(m): at(m) for m in rows})
    return [(m, measured[str(m)]) for m in rows]


def attention_rates(dtype: str, device: str, kv_heads: int = 4, head_dim: int = 64) -> list[tuple[float, float]]:
    """(M, FLOP/s) of scaled dot-product attention, M query rows to each KV head.

    Few rows are a decode step: the query heads of a group, over 1,024 keys. Many are a prefill: two heads to a group, and
    M/2 positions that see each other causally.
    """
    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, head_dim, device=device).to(DTYPES[dtype])

    def at(m: int):
        T = 1 if m <= 16 else m // 2
        queries, context, pairs = (m, 1024, m * 1024) if T == 1 else (T, T, T * (T + 1))
        q = tensor(kv_heads if T == 1 else 2 * kv_heads, queries)
        caches = [(tensor(kv_heads, context), tensor(kv_heads, context)) for _ in range(32)]

        def one(i: int) -> int:
            F.scaled_dot_product_attention(q, *caches[i % 32], is_causal=T > 1, enable_gqa=T > 1)
            return 4 * kv_heads * head_dim * pairs
        return one

    rows = [1, 4, 16, 32, 128, 512, 2048]
    measured = rates({str(m): at(m) for m in rows})
    return [(m, measured[str(m)]) for m in rows]


class Norm(nn.Module):
    """RMS norm of a row: six operations, of which none has anything to compute."""

    def __init__(self, device: str):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(512, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.weight


class Glue(nn.Module):
    """What stands between the matrix products of any decoder layer, here of width 512: norms, a rotation, a cache of 16 tokens, a gate.

    The arrays are so small that their bytes and FLOPs are nothing: its time is the price of starting its operations.
    Four `products`, whose results it does not use, run where a layer has its own.
    """

    def __init__(self, device: str):
        super().__init__()
        self.norm, self.mlp_norm = Norm(device), Norm(device)
        self.cos, self.sin = torch.randn(2, 64, device=device)
        self.cache = torch.zeros(1, 2, 16, 64, device=device)

    def forward(self, x: torch.Tensor, products: list[Callable[[], object]]) -> torch.Tensor:
        qkv, out, gate_up, down = products
        qkv()
        q, k = self.norm(x).view(1, 1, 8, 64).split((6, 2), dim=2)
        left, right = q.chunk(2, dim=-1)
        q = q * self.cos + torch.cat((-right, left), dim=-1) * self.sin
        self.cache[:, :, 5:6] = k.transpose(1, 2)
        F.scaled_dot_product_attention(q.reshape(1, 2, 3, 64), self.cache, self.cache)
        out()
        y = self.mlp_norm(x + x)
        gate_up()
        gate, up = y.chunk(2, dim=-1)
        F.silu(gate) * up
        down()
        return x + y


def fixed_cost(device: str) -> float:
    """Seconds to start one operation in the mix of a decode step, Python included: the mean over `Glue`.

    The time of the products alone is taken off. What is left is more than the glue would cost in a loop of its own:
    after a weight has gone through them, the caches hold nothing that the glue needs, and the other threads have gone to sleep.
    """
    layers, x, row = [Glue(device) for _ in range(16)], torch.randn(1, 1, 512, device=device), torch.randn(1, 1024, device=device)
    weights = [torch.randn(1024, 1024, device=device) for _ in range(64)]
    products = [[partial(F.linear, row, w) for w in weights[i: i + 4]] for i in range(0, 64, 4)]

    def with_glue() -> None:
        for layer, four in zip(layers, products, strict=True):
            layer(x, four)

    times = alternate({"products": lambda: [product() for four in products for product in four], "both": with_glue}, repeats=21)
    ops = count_ops(with_glue) - count_ops(lambda: [product() for four in products for product in four])
    return max(0.0, times["both"].median - times["products"].median) / ops


def peak_flops(dtype: str, device: str) -> float:
    """FLOP/s of a square matrix product, the largest rate we know how to ask for."""
    n = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
    return 2 * n**3 / stopwatch(lambda: a @ b, repeats=3).best


def calibrate(device: str | None = None) -> Machine:
    """Measure this machine (at most 20 s on two cores), keep the result in the user's cache, and return it."""
    device = device or default_device()
    dtypes = ["fp32", "bf16"] if device == "cpu" else list(DTYPES)
    memory = memory_bytes(device)
    bandwidth = read_bandwidth([size for size in WORKING_SETS if size <= memory / 8], device)
    gemm = {dtype: gemm_rates(dtype, device) for dtype in dtypes}
    attention = {dtype: attention_rates(dtype, device) for dtype in dtypes}
    # A large square product is not always the fastest: a peak is the best rate that anything reached.
    peaks = {dtype: max([peak_flops(dtype, device), *(rate for _, rate in gemm[dtype])]) for dtype in dtypes}
    record = {
        "name": fingerprint(device)["device"],
        "bandwidth": [{"bytes": size, "bytes_per_s": rate} for size, rate in bandwidth],
        "peak_flops": peaks,
        "gemm": [{"dtype": dtype, "m": m, "flops_per_s": rate} for dtype in dtypes for m, rate in gemm[dtype]],
        "attention": [{"dtype": dtype, "m": m, "flops_per_s": rate} for dtype in dtypes for m, rate in attention[dtype]],
        "fixed_s_per_op": fixed_cost(device),
        "memory": memory,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "fingerprint": fingerprint(device),
    }
    path = _path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(record, indent=1))
    os.replace(part, path)
    return from_record(record)


def _path(device: str) -> Path:
    return cache_dir() / f"calibration-{device}.json"


def from_record(record: dict) -> Machine:
    """The `Machine` that a calibration's JSON describes."""
    curves: dict[str, dict[str, tuple]] = {"gemm": {}, "attention": {}}
    for kernel, by_dtype in curves.items():
        for point in record[kernel]:
            by_dtype[point["dtype"]] = (*by_dtype.get(point["dtype"], ()), (point["m"], point["flops_per_s"]))
    return Machine(
        name=record["name"],
        bandwidth=tuple((point["bytes"], point["bytes_per_s"]) for point in record["bandwidth"]),
        peak_flops=record["peak_flops"],
        memory=record["memory"],
        rates=curves,
        fixed_s_per_op=record["fixed_s_per_op"],
        source=f"measured {record['date']}",
    )


def kept_record(device: str | None = None) -> dict | None:
    """The kept calibration as JSON, or None if there is none for this hardware, this thread count and this torch."""
    device = device or default_device()
    try:
        record = json.loads(_path(device).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record if record.get("fingerprint") == fingerprint(device) else None


def this_machine(device: str | None = None) -> Machine:
    """This machine's calibration: the kept one while main memory still reads as fast as it did then, else a new one.

    A shared machine can lose half its bandwidth to a neighbour within minutes, and a prediction from the morning's
    figures then explains nothing. The check takes a fraction of a second.
    """
    device = device or default_device()
    record = kept_record(device)
    if record:
        kept = from_record(record)
        [(_, now)] = read_bandwidth([int(kept.bandwidth[-1][0])], device, rounds=5)
        if abs(now / kept.bandwidth_at() - 1) <= DRIFT:
            return kept
    return calibrate(device)
