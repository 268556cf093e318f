"""Attention with a KV cache: multi-head, grouped or multi-query, over all the context or through a sliding window.

Vaswani et al. 2017; MQA: Shazeer 2019; GQA: Ainslie et al. 2023; windows: Beltagy et al. 2020, Jiang et al. 2023.
A mixer, here and in the two files after this one, is what passes information between tokens. It counts four things:

    matrices()      its weight matrices as (inputs, outputs)
    parameters()    those and its vectors
    kept(S)         numbers that a sequence of S tokens leaves in memory for the next step
    work(run)       the operations of one forward pass
"""

from __future__ import annotations

from dataclasses import dataclass

from clawdemy_infer.arithmetic.work import Pass, Work, element_bytes


def visible_pairs(T: int, S: int, window: int | None) -> int:
    """(query, key) pairs of one head: query i of T sees S-T+i+1 tokens, at most the window."""
    # `early` queries see all that came before them, the others a window full.
    early = min(T, max(0, window - (S - T))) if window else T
    return early * (S - T) + early * (early + 1) // 2 + (T - early) * (window or 0)


def visible_keys(T: int, S: int, window: int | None) -> int:
    """Keys that any of the last T queries of S sees."""
    return min(S, window + T - 1) if window else S


@dataclass(frozen=True)
class Attention:
    """N query heads, K KV heads, H numbers in each. `window` in tokens, None to see everything.

    With `owns_kv` false the layer attends to the cache of an earlier one: it projects no keys and values, stores none,
    but still reads them (Brandon et al. 2024, cross-layer attention). `sinks` are one learned logit a head (gpt-oss).
    """

    D: int
    N: int
    K: int
    H: int
    window: int | None = None
    owns_kv: bool = True
    rope: bool = True
    qk_norm: bool = False
    sinks: bool = False
    biases: tuple[str, ...] = ()

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Q, K, V are one product."""
        return {"qkv": (self.D, (self.N + self._kv_heads) * self.H), "out": (self.N * self.H, self.D)}

    @property
    def _kv_heads(self) -> int:
        return 2 * self.K if self.owns_kv else 0

    def parameters(self) -> int:
        matrices = self.matrices()
        biases = sum(n for name, (_, n) in matrices.items() if name in self.biases)
        norms = self.qk_norm * (2 if self.owns_kv else 1) * self.H
        return sum(k * n for k, n in matrices.values()) + biases + norms + self.sinks * self.N

    def kept_tokens(self, S: int) -> int:
        """Tokens of S that the next one can still see."""
        return min(S, self.window) if self.window else S

    def kept(self, S: int) -> int:
        """K and V of each KV head and visible token: KV heads, not query heads."""
        return self._kv_heads * self.H * self.kept_tokens(S)

    def work(self, run: Pass) -> list[Work]:
        products = [run.matmul(name, k, n) for name, (k, n) in self.matrices().items()]
        rope = [run.elementwise("rope", 2 * run.tokens * (self.N + self._kv_heads // 2) * self.H)] if self.rope else []
        return [*products, self.attend(run), *rope]                     # rope: read and write Q and K

    def attend(self, run: Pass) -> Work:
        """Scores and weighted sum: T new queries see the tokens up to themselves, S in the end.

        FLOPs: 2 (scores) + 2 (values) per query head, head dimension and visible pair. Bytes: Q and output once, and K and
        V once per KV head if the kernel shares the read within a group, else once per query head.
        """
        B, T, S = run.B, run.T, run.S
        flops = 4 * B * self.N * self.H * visible_pairs(T, S, self.window)
        readers = self.K if run.shared else self.N
        seen = visible_keys(T, S, self.window)
        kv_read = 2 * B * seen * readers * self.H * element_bytes("kv", run.kv)
        q_and_o = 2 * B * T * self.N * self.H * element_bytes("activations", run.activations)
        rows = T * (self.N // self.K if run.shared else 1)
        keys, heads = (seen, B * readers) if T == 1 else (0, 0)
        return Work(flops, kv_read + q_and_o, "attention", run.activations, "attention", rows, keys=keys, heads=heads)
