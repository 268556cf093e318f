"""Multi-head latent attention: one short vector a token is kept for all heads (DeepSeek-V2, 2024,
section 2.1 and appendix C).

    latent  c = x W_kv_a           [latent + rope] numbers a token and layer: all that is cached
    keys    k = (c W_uk, rope)     N heads of H = nope + rope
    values  v = c W_uv             N heads of `value`

W_uk and W_uv lie in one matrix, kv_b. Two ways to use the cache give the same numbers:

    naive      make the keys and values of all S tokens again, then attend as usual
    absorbed   q·(c W_uk) = (q W_uk^T)·c, so multiply the new queries by W_uk and attend to the
               latents themselves: every head reads the same `latent + rope` numbers, as in
               multi-query attention with a very wide head

A decode step is far cheaper absorbed, a long prompt naive."""

from dataclasses import dataclass

from clawdemy_infer.arithmetic.attention import visible_pairs
from clawdemy_infer.arithmetic.work import Pass, Work, element_bytes, matmul


@dataclass(frozen=True)
class MLA:
    """Widths: `latent` and `rope` rotated numbers are kept for all heads, `value` is a head's
    output. `q_latent`: queries come through a bottleneck of this width, None if straight from D.

    Sparse attention (DeepSeek-V3.2, 2025): `index_heads` cheap heads of `index` numbers, whose keys
    are kept too, choose the `chosen` tokens that the others attend to."""

    latent: int
    rope: int
    value: int
    q_latent: int | None = None
    index_heads: int = 0
    index: int = 0
    chosen: int = 0


@dataclass(frozen=True)
class LatentAttention:
    """N heads whose queries and keys have H numbers, of which the last `mla.rope` are rotated.
    Without `indexes` it takes the tokens that a layer before it chose."""

    D: int
    N: int
    H: int
    mla: MLA
    indexes: bool = False
    window = None

    def matrices(self) -> dict[str, tuple[int, int]]:
        D, N, H, mla = self.D, self.N, self.H, self.mla
        q = ({"q_a": (D, mla.q_latent), "q_b": (mla.q_latent, N * H)} if mla.q_latent
             else {"q": (D, N * H)})
        if self.indexes:
            q |= {"index_q": (mla.q_latent or D, mla.index_heads * mla.index),
                  "index": (D, mla.index + mla.index_heads)}
        return q | {"kv_a": (D, mla.latent + mla.rope),
                    "kv_b": (mla.latent, N * (H - mla.rope + mla.value)),
                    "out": (N * mla.value, D)}

    def vectors(self) -> int:
        return self.mla.latent + (self.mla.q_latent or 0) + 2 * self.mla.index * self.indexes

    def kept(self, S: int) -> int:
        """Latent, which values are made from, and rotated part, for all heads; the index's keys."""
        return (self.mla.latent + self.mla.rope + self.mla.index * self.indexes) * S

    def of_rows(self, run: Pass) -> list[Work]:
        products = [run.matmul(name, I, O)
                    for name, (I, O) in self.matrices().items() if name != "kv_b"]
        return [*products, run.elementwise("rope", 2 * run.tokens * (self.N + 1) * self.mla.rope)]

    def of_sequences(self, run: Pass) -> list[Work]:
        """What lies between the queries and the output matrix, kv_b included, in the form that
        `run.absorbed` says; for None, the one with fewer FLOPs. Before it, the index."""
        forms = ([self._absorbed, self._naive] if run.absorbed is None
                 else [self._absorbed if run.absorbed else self._naive])
        best = min((form(run) for form in forms), key=lambda ops: sum(op.flops for op in ops))
        if not self.indexes:
            return best
        # Scores of every earlier token's index, read once for all the heads.
        heads, width = self.mla.index_heads, self.mla.index
        flops = 2 * run.B * heads * width * visible_pairs(run.T, run.S, None)
        moved = run.B * run.S * width * element_bytes("kv", run.kv)
        return [Work(flops, moved, "index", run.activations, "attention", run.T * heads), *best]

    def _naive(self, run: Pass) -> list[Work]:
        """kv_b over all S tokens, then attention with N KV heads, which reads once what kv_b wrote,
        and the rotated part from the cache."""
        rows, (I, O) = run.B * run.S, self.matrices()["kv_b"]
        kv, e = element_bytes("kv", run.kv), element_bytes("activations", run.activations)
        product = matmul(rows, I, O, "kv_b", run.weights, run.activations)
        moved = product.bytes + rows * I * (kv - e)             # the latents lie in the cache
        read = rows * (O * e + self.mla.rope * kv)
        return [product._replace(bytes=moved),
                self._attention(run, read, self.H, self.mla.value, run.T)]

    def _absorbed(self, run: Pass) -> list[Work]:
        """Two small products a head instead of kv_b; the latents are keys and values at once."""
        latent, rope = self.mla.latent, self.mla.rope
        readers, rows = (1, run.T * self.N) if run.shared else (self.N, run.T)
        seen = min(run.S, run.T * self.mla.chosen) if self.mla.chosen else run.S
        read = run.B * seen * readers * (latent + rope) * element_bytes("kv", run.kv)
        return [run.matmul("absorb_k", self.H - rope, latent) * self.N,
                self._attention(run, read, latent + rope, latent, rows),
                run.matmul("absorb_v", latent, self.mla.value) * self.N]

    def _attention(self, run: Pass, read: float, key: int, value: int, rows: int) -> Work:
        """Scores of `key` numbers, sums of `value`, by head and visible pair; `read` K, V bytes."""
        width = self.N * (key + value)                          # of Q and the output together
        flops = 2 * run.B * width * visible_pairs(run.T, run.S, self.mla.chosen or None)
        q_and_o = run.tokens * width * element_bytes("activations", run.activations)
        return Work(flops, read + q_and_o, "attention", run.activations, "attention", rows)
