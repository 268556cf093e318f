"""Attention with a KV cache: multi-head, grouped or multi-query, over all or through a window.

Vaswani et al. 2017; MQA: Shazeer 2019; GQA: Ainslie et al. 2023; windows: Beltagy et al. 2020,
Jiang et al. 2023. A mixer passes information between tokens. This one and the two after it have:

    matrices()          weight matrices as (I, O)
    vectors()           numbers of norms, biases and the like
    window              tokens that a query sees, None for all
    kept(S)             numbers that a sequence of S tokens leaves in memory for the next step
    of_rows(run)        operations of a forward pass that ask only how many rows there are
    of_sequences(run)   those that ask whose row is whose: each row meets its own past
"""

from dataclasses import dataclass

from clawdemy_infer.arithmetic.work import Pass, Work, element_bytes


def visible_pairs(T: int, S: int, window: int | None) -> int:
    """(query, key) pairs of one head: query i of T sees S-T+i+1 tokens, at most the window."""
    # `early` queries see all that came before them, the others a window full.
    early = min(T, max(0, window - (S - T))) if window else T
    return early * (S - T) + early * (early + 1) // 2 + (T - early) * (window or 0)


@dataclass(frozen=True)
class Attention:
    """N query heads, K KV heads, H numbers in each. `window` in tokens, None to see everything.

    Without `owns_kv` the layer projects and stores no keys and values but reads an earlier one's
    (cross-layer attention, Brandon et al. 2024). The other fields are those of `ModelShape`."""

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
    gate: int = 0
    one_kv: bool = False
    per_layer: int = 0
    value: int = 0

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Q, K, V and the gate are one product."""
        made = self.N * (self.H + self.gate) + self._own_kv // (2 if self.one_kv else 1)
        own = {"per_layer": (self.D, 3 * self.per_layer)} if self.per_layer else {}
        return {"qkv": (self.D, made), "out": (self.N * self._value, self.D)} | own

    @property
    def _value(self) -> int:
        return self.value or self.H

    @property
    def _own_kv(self) -> int:
        """Numbers of the K and V of a token that the layer makes and keeps."""
        return self.K * (self.H + self._value) if self.owns_kv else 0

    def vectors(self) -> int:
        biases = sum(O for name, (_, O) in self.matrices().items() if name in self.biases)
        norms = self.qk_norm * (2 if self.owns_kv else 1) * self.H
        return biases + norms + self.sinks * self.N

    def kept(self, S: int) -> int:
        """K and V of each KV head (not query head) and token that the next one can still see."""
        return self._own_kv * (min(S, self.window) if self.window else S)

    def of_rows(self, run: Pass) -> list[Work]:
        products = [run.matmul(name, I, O) for name, (I, O) in self.matrices().items()]
        q_and_k = run.tokens * (self.N + self.K * self.owns_kv) * self.H
        rope = [run.elementwise("rope", 2 * q_and_k)] if self.rope else []      # read and write
        return products + rope

    def of_sequences(self, run: Pass) -> list[Work]:
        """Scores and weighted sum: T new queries see the tokens up to themselves, S in the end.

        FLOPs: 2 (scores) + 2 (values) per query head, head dimension and visible pair. Bytes: Q and
        output once, K and V once per KV head if `run.shared`, else once per query head."""
        B, T, S = run.B, run.T, run.S
        both = self.H + self._value                                  # numbers of a K and a V head
        flops = 2 * B * self.N * both * visible_pairs(T, S, self.window)
        readers = self.K if run.shared else self.N
        seen = min(S, self.window + T - 1) if self.window else S    # keys, by any of the T queries
        kv_read = B * seen * readers * both * element_bytes("kv", run.kv)
        q_and_o = B * T * self.N * both * element_bytes("activations", run.activations)
        rows = T * (self.N // self.K if run.shared else 1)
        keys, heads = (seen, B * readers) if T == 1 else (0, 0)
        return [Work(flops, kv_read + q_and_o, "attention", run.activations, "attention", rows,
                     keys=keys, heads=heads)]
