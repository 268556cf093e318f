"""FLOPs and bytes, and the matrix product that most of them come from. A multiply and an add are
two FLOPs. Bytes are what must cross the memory bus at least once. The letters of the course:

    B batch   S context   T new tokens   M rows of a product, as B·T   L layers   V vocabulary
    D model width   F feed-forward width   N query heads   K KV heads   H head dimension
    I, O features that go into and come out of a weight [O, I], or of the [I, O] it multiplies as
"""

from collections.abc import Iterable
from typing import NamedTuple

BYTES = {
    "fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5, "int3": 0.375,
    # With their scales, which these names fix: mxfp4 has 8 bits for 32 numbers (OCP MX 1.0), q8_0
    # and q4_0 have 16 for 32, the q*_k a tree of scales for 256 (llama.cpp, ggml-common.h).
    "mxfp4": 4.25 / 8, "q8_0": 8.5 / 8, "q6_k": 6.5625 / 8, "q5_k": 5.5 / 8, "q4_k": 4.5 / 8,
    "q4_0": 4.5 / 8, "q3_k": 3.4375 / 8, "q2_k": 2.625 / 8,
}
"""Bytes per element, for plain integers without scales, which are the method's choice."""


class Mixed(NamedTuple):
    """A format `name`: `parts` by the first word of a matrix's name, `rest` for all others."""

    name: str
    rest: "Format"
    parts: tuple[tuple[str, "Format"], ...] = ()


Format = str | float | Mixed
"""A name in `BYTES`, or bytes per element: int4 with a 16-bit scale for 128 weights is 0.515625."""


def format_of(format: Format, matrix: str) -> Format:
    """The format of one matrix, or of the "vectors"."""
    if isinstance(format, Mixed):
        return dict(format.parts).get(matrix.partition(" ")[0], format.rest)
    return format


def element_bytes(name: str, format: Format) -> float:
    """Bytes per element of `format`. Raises ValueError, which names the argument `name`."""
    if format in BYTES:
        return BYTES[format]
    if isinstance(format, int | float) and 0 < format <= 16:
        return format
    raise ValueError(f"{name}={format!r}: accepted are {', '.join(BYTES)}, or a number of bytes "
                     "per element")


def at_least_1(**sizes: int) -> None:
    """ValueError naming the first of `sizes` that is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: at least 1")


class Work(NamedTuple):
    """What a piece of work asks of a machine: `flops` to compute and `bytes` to move.

    kernel     what does it: "gemm", "attention", "scan" or "elementwise"
    rows       M, rows that share one read of the weights or of the cache: a machine computes far
               faster at M = 1,024 than at M = 1
    parts      the operations that a sum was made of
    weights    format of the matrix in a product, which holds `numbers`
    keys       that each sequence of a decode step sees, with `heads` KV heads in all of them
    """

    flops: float
    bytes: float
    name: str = ""
    dtype: str = "fp32"
    kernel: str = ""
    rows: float = 1
    parts: tuple["Work", ...] = ()
    weights: Format = ""
    keys: float = 0
    heads: float = 0
    numbers: float = 0

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, FLOPs per byte (Williams et al. 2009)."""
        return self.flops / self.bytes if self.bytes else float("inf")

    def __mul__(self, times: float) -> "Work":
        """The same work `times` over, with the same rows each time: L layers, or steps."""
        parts = tuple([part * times for part in self.parts]) if self.parts else ()
        return self._replace(flops=self.flops * times, bytes=self.bytes * times, parts=parts)

    def operations(self) -> tuple["Work", ...]:
        """The work as single operations: itself, or all that its parts are made of."""
        if not self.parts:
            return (self,)
        return tuple([op for part in self.parts for op in part.operations()])


def total(name: str, parts: Iterable[Work]) -> Work:
    """The sum of `parts`, which it remembers."""
    parts = tuple(parts)
    flops, bytes = sum([part.flops for part in parts]), sum([part.bytes for part in parts])
    return Work(flops, bytes, name, parts[0].dtype, parts=parts)


def matmul(M: float, I: int, O: int, name: str = "matmul", weights: Format = "fp32",
           activations: str = "fp32") -> Work:
    """X[M, I] @ W[I, O] -> Y[M, O], each read or written once. With 2-byte weights the intensity
    tends to M FLOPs per byte as I and O grow. Raises ValueError for sizes below 1."""
    at_least_1(M=M, I=I, O=O)
    w, x_and_y, weights = I * O, M * I + M * O, format_of(weights, name)
    moved = w * element_bytes("weights", weights) + x_and_y * element_bytes("activations",
                                                                            activations)
    return Work(2 * M * I * O, moved, name, activations, "gemm", M, weights=weights, numbers=w)


class Pass(NamedTuple):
    """A forward pass: T new tokens of each of B sequences that hold S in the end, and its formats.

    `shared`: the attention kernel reads K and V once for all the query heads of a group, else once
    for each. `absorbed`: the form of latent attention; None is the one with fewer FLOPs."""

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

    def matmul(self, name: str, I: int, O: int) -> Work:
        """X[B·T, I] @ W[I, O]."""
        return matmul(self.tokens, I, O, name, self.weights, self.activations)

    def elementwise(self, name: str, elements: float) -> Work:
        """One fused kernel that reads and writes `elements` elements: what it moves at least."""
        return Work(0, elements * element_bytes("activations", self.activations), name,
                    self.activations, "elementwise", rows=self.tokens)
