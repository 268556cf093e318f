"""How much work? FLOPs and bytes of a transformer, counted step by step. Standard library only.

Letters, here and everywhere in the course:

    B batch   S context   T new tokens   L layers   V vocabulary
    D model width   F feed-forward width   N query heads   K KV heads   H head dimension

A multiply and an add are two FLOPs. Bytes are what must cross the memory bus at least once. Two kinds of weight bytes
differ and are never mixed: *stored* is what the weights occupy, *streamed* is what one step has to read. An embedding
gather reads B*T rows of a table and is not a stream; a tied output head reads the whole table and is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}
"""Bytes per element. Scales and zero points of the integer formats are not in here."""


def element_bytes(name: str, dtype: str) -> float:
    """Bytes per element of `dtype`; `name` is the argument to blame in the ValueError."""
    if dtype not in BYTES:
        raise ValueError(f"{name}={dtype!r}: accepted are {', '.join(BYTES)}")
    return BYTES[dtype]


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


@dataclass(frozen=True)
class Work:
    """What a piece of work asks of a machine: `flops` to compute and `bytes` to move.

    `kernel` says what does it ("gemm", "attention" or "elementwise") and `rows` is M, the number of rows that
    share one read of the weights or of the cache: a machine computes far faster at M = 1,024 than at M = 1.
    `parts` are the operations that a sum was made of.
    """

    flops: float
    bytes: float
    name: str = ""
    dtype: str = "fp32"
    kernel: str = ""
    rows: int = 1
    parts: tuple[Work, ...] = ()

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, FLOPs per byte (Williams et al. 2009)."""
        return self.flops / self.bytes if self.bytes else float("inf")

    def __mul__(self, times: float) -> Work:
        """The same work `times` over, with the same rows each time: L layers, or so many steps."""
        parts = tuple(part * times for part in self.parts)
        return replace(self, flops=self.flops * times, bytes=self.bytes * times, parts=parts)

    def operations(self) -> tuple[Work, ...]:
        """The work as single operations: itself, or all that its parts are made of."""
        return tuple(op for part in self.parts for op in part.operations()) if self.parts else (self,)


def total(name: str, parts: Iterable[Work]) -> Work:
    """The sum of `parts`, which it remembers."""
    parts = tuple(parts)
    return Work(sum(p.flops for p in parts), sum(p.bytes for p in parts), name, parts[0].dtype, parts=parts)


def matmul(m: int, k: int, n: int, name: str = "matmul", weights: str = "fp32", activations: str = "fp32") -> Work:
    """X[m, k] @ W[k, n] -> Y[m, n], each read or written once.

    Intensity 2mkn / (bytes), which tends to m FLOPs per 2-byte weight as k and n grow.
    """
    at_least_1(m=m, k=k, n=n)
    x, w, y = m * k, k * n, m * n
    bytes = w * element_bytes("weights", weights) + (x + y) * element_bytes("activations", activations)
    return Work(2 * m * k * n, bytes, name, activations, "gemm", rows=m)


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a dense Llama-family decoder that its cost depends on (Touvron et al. 2023; GQA: Ainslie et al. 2023).

    H is stated, never derived: Qwen3 and Gemma have N*H different from D. `tied` says that the output head is the
    embedding table itself. `window` is the sliding window in tokens, where every layer has one.
    """

    name: str
    L: int
    D: int
    N: int
    K: int
    H: int
    F: int
    V: int
    tied: bool = False
    window: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    max_context: int | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for letter in "LDNKHFV":
            if getattr(self, letter) < 1:
                raise ValueError(f"{letter}={getattr(self, letter)}: a model needs at least 1")
        if self.N % self.K:
            raise ValueError(f"K={self.K}: the KV heads must divide the N={self.N} query heads")

    # ---- parameters and what they weigh ----

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The weight matrices of one layer as (inputs, outputs). Q, K, V are one product here, and so are gate and up."""
        D, N, K, H, F = self.D, self.N, self.K, self.H, self.F
        return {"qkv": (D, (N + 2 * K) * H), "out": (N * H, D), "gate_up": (D, 2 * F), "down": (F, D)}

    def layer_parameters(self) -> int:
        """Matrices, two norms of width D, and the biases and head norms that some families add."""
        vectors = 2 * self.D + self.qkv_bias * (self.N + 2 * self.K) * self.H + self.qk_norm * 2 * self.H
        return sum(k * n for k, n in self.matrices().values()) + vectors

    def parameters(self) -> int:
        """Every stored number: embedding, layers, final norm, and the head where it is not tied."""
        tables = self.V * self.D * (1 if self.tied else 2)
        return tables + self.L * self.layer_parameters() + self.D

    def stored_bytes(self, weights: str = "bf16") -> float:
        """Bytes the weights occupy in memory."""
        return self.parameters() * element_bytes("weights", weights)

    def streamed_bytes(self, weights: str = "bf16") -> float:
        """Weight bytes one forward pass must read: all of it but the embedding table, from which it only gathers rows."""
        head = self.V * self.D
        return (self.L * self.layer_parameters() + self.D + head) * element_bytes("weights", weights)

    # ---- the KV cache ----

    def kv_bytes_per_token(self, kv: str = "bf16") -> float:
        """2 (K and V) * L * K * H * bytes: KV heads, not query heads, and the stated head dimension."""
        return 2 * self.L * self.K * self.H * element_bytes("kv", kv)

    def kept_tokens(self, context: int) -> int:
        """Tokens of a `context` that attention can still see."""
        return min(context, self.window) if self.window else context

    def kv_bytes(self, batch: int, context: int, kv: str = "bf16") -> float:
        """Bytes of the KV cache for `batch` sequences of `context` tokens."""
        return batch * self.kept_tokens(context) * self.kv_bytes_per_token(kv)

    # ---- work ----

    def _layer(self, B: int, T: int, S: int, weights: str, kv: str, activations: str, shared: bool) -> list[Work]:
        """One layer on T new tokens of each of B sequences that hold S tokens in the end."""
        e = element_bytes("activations", activations)
        matmuls = [matmul(B * T, k, n, name, weights, activations) for name, (k, n) in self.matrices().items()]
        # Element-wise work as if each line were one fused kernel: what has to be read and written at least.
        arrays = {
            "norms": 2 * 2 * B * T * self.D,                    # read and write the residual stream, twice
            "rope": 2 * B * T * (self.N + self.K) * self.H,     # read and write Q and K
            "silu(gate)*up": 3 * B * T * self.F,                # read two, write one
            "residual": 2 * 3 * B * T * self.D,                 # read two, write one, twice
        }
        glue = [Work(0, elements * e, name, activations, "elementwise") for name, elements in arrays.items()]
        return [*matmuls, self.attention(B, T, S, kv, activations, shared), *glue]

    def attention(self, batch: int, new: int, context: int, kv: str = "bf16", activations: str = "bf16", shared: bool = True) -> Work:
        """Scores and weighted sum of one layer: T new queries see the tokens up to themselves, S in the end.

        FLOPs: 2 (scores) + 2 (values) per query head, head dimension and visible pair. Bytes: Q and output once, and K and
        V once per KV head if the kernel shares the read within a group (`shared`), else once per query head.
        """
        check_step(batch, new, context)
        B, T, S = batch, new, context
        # Query i of T sees S-T+i+1 tokens, at most the window: `early` of them see all that came before, the others a window full.
        early = min(T, max(0, self.window - (S - T))) if self.window else T
        pairs = early * (S - T) + early * (early + 1) // 2 + (T - early) * (self.window or 0)
        flops = 4 * B * self.N * self.H * pairs
        readers = self.K if shared else self.N
        seen = min(S, self.window + T - 1) if self.window else S
        kv_read = 2 * B * seen * readers * self.H * element_bytes("kv", kv)
        q_and_o = 2 * B * T * self.N * self.H * element_bytes("activations", activations)
        return Work(flops, kv_read + q_and_o, "attention", activations, "attention", rows=T * (self.N // self.K if shared else 1))

    def head(self, rows: int, weights: str = "bf16", activations: str = "bf16") -> Work:
        """The output head on `rows` positions: D x V, read whole even when tied to the embedding."""
        return matmul(rows, self.D, self.V, "head", weights, activations)

    def step(self, batch: int, new: int, context: int, weights: str = "bf16", kv: str = "bf16", activations: str = "bf16",
             shared: bool = True) -> Work:
        """One forward pass over `new` tokens of each sequence, of which only the last needs logits."""
        check_step(batch, new, context)
        layer = total("layer", self._layer(batch, new, context, weights, kv, activations, shared))
        return total("step", [layer * self.L, self.head(batch, weights, activations)])

    def prefill(self, batch: int, prompt: int, **dtypes) -> Work:
        """Read the prompt, give the first token."""
        at_least_1(prompt=prompt)
        return self.step(batch, prompt, prompt, **dtypes)

    def decode(self, batch: int, context: int, **dtypes) -> Work:
        """One more token for each of `batch` sequences, whose context is `context` tokens with the new one."""
        return self.step(batch, 1, context, **dtypes)

    # ---- capacity comes before speed ----

    def fits(self, memory: float, batch: int, context: int, weights: str = "bf16", kv: str = "bf16") -> Capacity:
        """Do weights and KV cache fit into `memory` bytes?"""
        at_least_1(batch=batch, context=context)
        return Capacity(memory, self.stored_bytes(weights), self.kv_bytes(batch, context, kv), batch)


@dataclass(frozen=True)
class Capacity:
    """What a configuration occupies, in bytes. Truthy when it fits. Activations and the allocator's overhead come on top."""

    memory: float
    weight_bytes: float
    kv_bytes: float
    batch: int

    def __bool__(self) -> bool:
        return self.weight_bytes + self.kv_bytes <= self.memory

    @property
    def max_batch(self) -> int:
        """The largest batch of this context that still fits."""
        return max(0, int((self.memory - self.weight_bytes) // (self.kv_bytes / self.batch)))
