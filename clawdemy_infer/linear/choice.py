"""Which kernel? Measured once on this CPU, for each format, shape and number of rows M, when the machine is calibrated; then kept
in the user's cache. Until then, `UNTIL_THEN`.

What is fastest differs from CPU to CPU, and from one row to many. The shapes that are timed are of a small model's size but of
no model's; a matrix takes the choice of the one that is most like it.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch

from clawdemy_infer.cpp import cpu_name
from clawdemy_infer.linear.codes import Codes, int4_codes, int8_codes
from clawdemy_infer.linear.kernels import CANDIDATES, FALLBACK
from clawdemy_infer.paths import cache_dir
from clawdemy_infer.timing import rates

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ACTIVATIONS = {"fp32": "fp32", "fp16": "fp32", "bf16": "bf16", "int8": "fp32", "int4": "bf16"}
"""What the activations are in, by format of the weights, on a CPU: what its kernels take."""
ON_A_GPU = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "bf16", "int4": "bf16"}
"""And on a GPU, which computes in 16 bits where weights are, or are less."""

SHAPES = [(640, 640), (640, 2560), (1280, 640), (640, 16384)]
"""(inputs K, outputs N): square, wide, tall, and a head."""
ROWS = [1, 2, 4, 16, 64]
EARNS = 0.85
"""Another layout of the weights than the one for M = 1 takes memory for a second copy: it must need less than this of the time."""
WRONG = 0.03
"""A kernel whose result is off by more, relative to the largest number in it, is not a candidate."""
UNTIL_THEN = {
    "fp32": [(math.inf, "plain")], "fp16": [(math.inf, "fbgemm_half")], "bf16": [(math.inf, "onednn")],
    "int8": [(math.inf, "fbgemm_int8")], "int4": [(8, "weight_only_int4"), (math.inf, "bf16_copy")],
}
"""(up to so many rows, kernel) where nothing was measured: what would be chosen on most."""
KERNELS = 4
"""Raise it when the candidates change: older choices are then measured anew."""


def computes_in(format: str, device: str) -> str:
    """The name of the activations' dtype for weights in `format`. Raises ValueError for an unknown one."""
    known = ACTIVATIONS if device == "cpu" else ON_A_GPU
    if format not in known:
        raise ValueError(f"weights={format!r}: on a {device.upper()}, {', '.join(known)} are accepted")
    return known[format]


def packable(format: str, weight: torch.Tensor) -> torch.Tensor | Codes:
    """What the kernels of `format` are made of: the weight in that dtype, or its codes."""
    if format in FLOATS:
        return weight.to(FLOATS[format])
    return int8_codes(weight) if format == "int8" else int4_codes(weight, 32 if weight.shape[1] % 64 else 64)


def copy_of(source: torch.Tensor | Codes) -> torch.Tensor | Codes:
    return source.clone() if isinstance(source, torch.Tensor) else Codes(*(part if part is None else part.clone() for part in source))


@torch.inference_mode()
def measure(format: str) -> list[dict]:
    """The fastest kernel for each shape and M: rows of `k, n, m, kernel, seconds`, and the `others` with their seconds.

    A candidate that this CPU's PyTorch has not, or that computes something else, is left out.
    """
    generator, rows = torch.Generator().manual_seed(0), []
    for k, n in SHAPES:
        source = packable(format, torch.randn(n, k, generator=generator))
        copies = max(2, 2**26 // (n * k * 4))               # 64 MiB of fp32: each weight has left the nearer caches when its turn comes
        made = {}
        x = torch.randn(ROWS[-1], k, generator=generator).to(FLOATS[ACTIVATIONS[format]])
        right = x[:4].float() @ (source.dequantized() if isinstance(source, Codes) else source.float()).T
        for make in [*CANDIDATES[format], FALLBACK[format]]:
            if make is FALLBACK[format] and made:
                break
            try:
                products = [make(copy_of(source)) for _ in range(copies)]
                if (products[0](x[:4]).float() - right).abs().max() <= WRONG * right.abs().max():
                    made[make.__name__] = products
            except (RuntimeError, NotImplementedError, AttributeError):     # not in this build, or not for this CPU
                continue
        first = None
        for m in ROWS:
            # The best sample of each: whatever else runs on the machine can only slow one down, and those that wait for all threads most.
            measured = rates({name: _calls(products, x[:m]) for name, products in made.items()}, 0.003, rounds=5, of=max)
            seconds = {name: 1 / rate for name, rate in measured.items()}
            best = min(seconds, key=seconds.get)
            first = first or best
            kernel = best if seconds[best] < EARNS * seconds[first] else first
            rows.append({"k": k, "n": n, "m": m, "kernel": kernel, "seconds": seconds.pop(kernel), "others": seconds})
    return rows


def _calls(products: list, x: torch.Tensor) -> Callable[[int], int]:
    """The i-th call of a kernel, on the next of its weights."""
    def call(i: int) -> int:
        products[i % len(products)](x)
        return 1
    return call


def _path() -> Path:
    return cache_dir() / f"kernels-cpu-{torch.get_num_threads()}.json"


def _fingerprint() -> dict[str, str | int]:
    return {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__, "kernels": KERNELS}


def kept() -> dict[str, list[dict]]:
    """The choices that were made on this CPU, by format; empty where none were."""
    try:
        record = json.loads(_path().read_text())
    except (FileNotFoundError, ValueError):                 # none yet, or torn
        return {}
    return record["formats"] if record.get("fingerprint") == _fingerprint() else {}


def remeasure(formats: list[str]) -> None:
    """Choose anew for these formats, and keep the choices."""
    chosen = kept() | {format: measure(format) for format in formats}
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({"fingerprint": _fingerprint(), "formats": chosen}, indent=1))
    os.replace(part, path)
    by_rows.cache_clear()


@functools.cache
def by_rows(format: str, k: int, n: int) -> list[tuple[float, str]]:
    """(up to so many rows, kernel) for a matrix of k inputs and n outputs, with rising rows; the last goes on for ever.

    Between two numbers of rows that were timed the border is half-way, as ratios go.
    """
    if format not in (chosen := kept()):
        return UNTIL_THEN[format]
    near = min(SHAPES, key=lambda shape: abs(math.log(shape[0] / k)) + abs(math.log(shape[1] / n)))
    rows = [row for row in chosen[format] if (row["k"], row["n"]) == near]
    borders = [math.sqrt(low * high) for low, high in zip(ROWS, ROWS[1:], strict=False)] + [math.inf]
    steps = [(border, row["kernel"]) for border, row in zip(borders, rows, strict=True)]
    return [(list(same)[-1][0], kernel) for kernel, same in groupby(steps, key=lambda step: step[1])]


# ---- in words ----


def in_words(format: str) -> list[str]:
    """`640x2560 onednn`, or `640x2560 weight_only_int4 up to 8 rows, then bf16_copy`, for each shape that was timed."""
    def steps(k: int, n: int) -> str:
        *first, (_, last) = by_rows(format, k, n)
        return "".join(f"{kernel} up to {int(rows)} rows, then " for rows, kernel in first) + last
    alike: dict[str, list[str]] = {}
    for k, n in SHAPES:
        alike.setdefault(steps(k, n), []).append(f"{k}x{n}")
    return [f"{', '.join(shapes)}: {words}" if len(alike) > 1 else words for words, shapes in alike.items()]


def against_fp32(format: str) -> str:
    """How its time compares with that of fp32, over all shapes that were timed; a format that loses says so."""
    chosen = kept()

    def seconds(of: str, m: int) -> float:
        return sum(row["seconds"] for row in chosen[of] if row["m"] == m)
    if format == "fp32":
        return "what the other formats are compared with"
    gains = {m: seconds("fp32", m) / seconds(format, m) for m in ROWS}
    said = ", ".join(f"{gain:.1f} at {m} rows" for m, gain in gains.items())
    lost = [str(m) for m, gain in gains.items() if gain < 1]
    return f"times as fast as fp32: {said}" + (f". It LOSES at {', '.join(lost)}" if lost else "")
