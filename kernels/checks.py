"""What can be proved of each kernel without a GPU, as three tables: its numbers, its bytes, its
machine code.

The first two run in Triton's interpreter at small sizes. The third compiles for GPUs that are not
there, in a process of its own, since in this one kernels are interpreted; `data/kernels_code.jsonl`
keeps it, so that a test sees when a kernel gets worse. It is made by

    TRITON_INTERPRET=0 python -m clawdemy_kernels.ahead > data/kernels_code.jsonl
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from clawdemy_kernels.examples import SMALL, Example, examples
from clawdemy_kernels.tolerance import KERNEL
from clawdemy_kernels.traffic import counting

WHOLE = {"sample", "verify"}
"""Kernels that give whole numbers, which must be the same."""


def values(dtypes: tuple[torch.dtype, ...] = tuple(KERNEL), device: str = "cpu") -> list[dict]:
    """The largest error of each kernel against fp64, by dtype, and the largest share of what
    `tolerance` allows: below 1 is right."""
    rows = []
    for dtype in dtypes:
        torch.manual_seed(0)
        for name, example in examples(SMALL, device, dtype).items():
            if name == "verify" and dtype != torch.float32:
                continue                                        # probabilities are fp32
            allowed = {"rtol": 0.0, "atol": 1e-9} if name in WHOLE else KERNEL[dtype]
            largest, share = error(example, **allowed)
            rows.append({"kernel": name, "dtype": str(dtype).removeprefix("torch."),
                         "error": largest, "share": share, "ok": share <= 1})
    return rows


def error(example: Example, rtol: float, atol: float) -> tuple[float, float]:
    """The largest error of `launch()` against `reference()` in fp64, and the largest share of what
    may be."""
    got, wanted = (x if isinstance(x, tuple) else (x,)
                   for x in (example.launch(), example.reference()))
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(got, wanted, strict=True)]
    errors = [((a - b).abs(), atol + rtol * b.abs()) for a, b in pairs]
    return (max(float(error.max()) for error, _ in errors),
            max(float((error / allowed).max()) for error, allowed in errors))


def traffic(dtype: torch.dtype = torch.bfloat16) -> list[dict]:
    """Bytes of each kernel: its envelope, what it asked for, how many of them differ, and the
    32-byte sectors that its loads and stores touch. And the FLOPs that its products do, padding
    included, beside those that are of use. RuntimeError where kernels are compiled."""
    rows = []
    for name, example in examples(SMALL, dtype=dtype).items():
        with counting() as counted:
            example.launch()
        rows.append({"kernel": name, "envelope": example.asked, "asked": counted.asked,
                     "distinct": counted.distinct, "sectors": counted.sectors,
                     "flops": example.flops, "dot_flops": counted.flops,
                     "ok": counted.asked == example.asked})
    return rows


def code(*targets: str) -> list[dict]:
    """Registers, spills, shared memory, loads by their bytes a thread, and tensor-core instructions
    of each kernel and target."""
    ran = subprocess.run([sys.executable, "-m", "clawdemy_kernels.ahead", *targets],
                         capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    if ran.returncode:
        raise RuntimeError("the kernels could not be compiled: "
                           f"{ran.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in ran.stdout.splitlines()][1:]
