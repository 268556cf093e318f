"""FLOPs and bytes, and the matrix product that most of them come from.

Letters, here and everywhere in the course:

    B batch   S context   T new tokens   L layers   V vocabulary
    D model width   F feed-forward width   N query heads   K KV heads   H head dimension

A multiply and an add are two FLOPs. Bytes are what must cross the memory bus at least once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

BYTES = {
    "fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5, "int3": 0.375,
    # These names say how the scales are stored, so the scales are counted: mxfp4 has 8 bits for 32 numbers (OCP MX specification 1.0),
    # q8_0 and q4_0 have 16 for 32, the q*_k a tree of scales for 256 (llama.cpp, ggml-common.h).
    "mxfp4": 4.25 / 8, "q8_0": 8.5 / 8, "q6_k": 6.5625 / 8, "q5_k": 5.5 / 8, "q4_k": 4.5 / 8, "q4_0": 4.5 / 8, "q3_k": 3.4375 / 8,
    "q2_k": 2.625 / 8,
}
"""Bytes per element. Scales and zero points of the plain integer formats are not in here: how many there are is the method's choice."""

Format = str | float
"""A name in `BYTES`, or a number of bytes per element, which need not be whole: int4 with a 16-bit scale for 128 weights is 0.515625."""


def element_bytes(name: str, format: Format) -> float:
    """Bytes per element of `format`; `name` is the argument to blame in the ValueError."""
    if format in BYTES:
        return BYTES[format]
    if isinstance(format, int | float) and 0 < format <= 16:
        return format
    raise ValueError(f"{name}={format!r}: accepted are {', '.join(BYTES)}, or a number of bytes per element")


def at_least_1(**sizes: int) -> None:
    """ValueError naming the first of `sizes` that is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: at least 1")


def check_step(batch: int, new: int, context: int) -> None:
    """ValueError for sizes that no forward pass has."""
    at_least_1(batch=batch, new=new, context=context)
    if context < new:
        raise ValueError(f"context={context}: it counts the {new} new tokens too, so it is at least {new}")


class Work(NamedTuple):
    """What a piece of work asks of a machine: `flops` to compute and `bytes` to move.

    `kernel` says what does it ("gemm", "attention", "scan" or "elementwise") and `rows` is M, the number of rows that
    share one read of the weights or of the cache: a machine computes far faster at M = 1,024 than at M = 1.
    `parts` are the operations that a sum was made of, `weights` the format of the matrix in a product and `numbers` how many are in it.
    Of attention in a decode step, `keys` are what each sequence sees, and `heads` the KV heads of all of them.
    """

    flops: float
    bytes: float
    name: str = ""
    dtype: str = "fp32"
    kernel: str = ""
    rows: float = 1
    parts: tuple[Work, ...] = ()
    weights: Format = ""
    keys: float = 0
    heads: float = 0
    numbers: float = 0

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, FLOPs per byte (Williams et al. 2009)."""
        return self.flops / self.bytes if self.bytes else float("inf")

    def __mul__(self, times: float) -> Work:
        """The same work `times` over, with the same rows each time: L layers, or so many steps."""
        parts = tuple([part * times for part in self.parts]) if self.parts else ()
        return self._replace(flops=self.flops * times, bytes=self.bytes * times, parts=parts)

    def operations(self) -> tuple[Work, ...]:
        """The work as single operations: itself, or all that its parts are made of."""
        return tuple([op for part in self.parts for op in part.operations()]) if self.parts else (self,)


def total(name: str, parts: Iterable[Work]) -> Work:
    """The sum of `parts`, which it remembers."""
    parts = tuple(parts)
    return Work(sum([p.flops for p in parts]), sum([p.bytes for p in parts]), name, parts[0].dtype, parts=parts)


def matmul(m: float, k: int, n: int, name: str = "matmul", weights: Format = "fp32", activations: str = "fp32") -> Work:
    """X[m, k] @ W[k, n] -> Y[m, n], each read or written once.

    Intensity 2mkn / (bytes), which tends to m FLOPs per 2-byte weight as k and n grow.
    """
    at_least_1(m=m, k=k, n=n)
    x, w, y = m * k, k * n, m * n
    bytes = w * element_bytes("weights", weights) + (x + y) * element_bytes("activations", activations)
    return Work(2 * m * k * n, bytes, name, activations, "gemm", rows=m, weights=weights, numbers=w)


class Pass(NamedTuple):
    """One forward pass: T new tokens of each of B sequences that hold S in the end, and the formats it runs in.

    `shared`: the attention kernel reads K and V once for all the query heads of a group; else once for each query head.
    `absorbed`: which form multi-head latent attention takes (`LatentAttention`); None is the one with fewer FLOPs.
    """

    B: int
    T: int
    S: int
    weights: Format = "bf16"
    kv: Format = "bf16"
    activations: str = "bf16"
    shared: bool = True
    absorbed: bool | None = None

    @property
    def tokens(self) -> int:
        """B·T: the rows of every matrix product but the experts'."""
        return self.B * self.T

    def matmul(self, name: str, k: int, n: int) -> Work:
        """X[B·T, k] @ W[k, n]."""
        return matmul(self.B * self.T, k, n, name, self.weights, self.activations)

    def elementwise(self, name: str, elements: float) -> Work:
        """One fused kernel that reads and writes so many `elements`: what it has to move at least."""
        return Work(0, elements * element_bytes("activations", self.activations), name, self.activations, "elementwise", rows=self.tokens)
