"""Multi-head latent attention: one short vector a token is kept for all heads (DeepSeek-V2, 2024, section 2.1 and appendix C).

    latent  c = x W_kv_a           [latent + rope] numbers a token: all that the cache holds, in every layer once
    keys    k = (c W_uk, rope)     N heads of H = nope + rope
    values  v = c W_uv             N heads of `value`

W_uk and W_uv lie in one matrix, kv_b. There are two ways to use the cache, and they give the same numbers:

    naive      make the keys and values of all S tokens again, then attend as usual
    absorbed   q·(c W_uk) = (q W_uk^T)·c, so multiply the new queries by W_uk and attend to the latents themselves:
               every head reads the same `latent + rope` numbers, as in multi-query attention with a very wide head

A decode step is far cheaper absorbed, a long prompt naive.
"""

from __future__ import annotations

from dataclasses import dataclass

from clawdemy_infer.arithmetic.attention import visible_pairs
from clawdemy_infer.arithmetic.work import Pass, Work, element_bytes, matmul


@dataclass(frozen=True)
class MLA:
    """Widths: `latent` is kept for all heads with `rope` rotated numbers, `value` is a head's output.
    `q_latent`: queries come through a bottleneck of this width, None if straight from D."""

    latent: int
    rope: int
    value: int
    q_latent: int | None = None


@dataclass(frozen=True)
class LatentAttention:
    """N heads whose queries and keys have H numbers, of which the last `mla.rope` are rotated."""

    D: int
    N: int
    H: int
    mla: MLA

    def matrices(self) -> dict[str, tuple[int, int]]:
        D, N, H, mla = self.D, self.N, self.H, self.mla
        q = {"q_a": (D, mla.q_latent), "q_b": (mla.q_latent, N * H)} if mla.q_latent else {"q": (D, N * H)}
        return q | {"kv_a": (D, mla.latent + mla.rope), "kv_b": (mla.latent, N * (H - mla.rope + mla.value)), "out": (N * mla.value, D)}

    def parameters(self) -> int:
        return sum(k * n for k, n in self.matrices().values()) + self.mla.latent + (self.mla.q_latent or 0)     # and the two norms

    def kept_tokens(self, S: int) -> int:
        return S

    def kept(self, S: int) -> int:
        """Latent and rotated part, once for all heads; values are made from the latent."""
        return (self.mla.latent + self.mla.rope) * S

    def work(self, run: Pass) -> list[Work]:
        products = [run.matmul(name, k, n) for name, (k, n) in self.matrices().items() if name != "kv_b"]
        return [*products, *self.attend(run), run.elementwise("rope", 2 * run.tokens * (self.N + 1) * self.mla.rope)]

    def attend(self, run: Pass) -> list[Work]:
        """What lies between the queries and the output matrix, kv_b included, in the form that `run.absorbed` says."""
        if run.absorbed is None:
            k, n = self.matrices()["kv_b"]
            pairs, heads = visible_pairs(run.T, run.S, None), 2 * self.N
            naive = heads * (self.H + self.mla.value) * pairs + 2 * run.S * k * n
            absorbed = heads * (2 * self.mla.latent + self.mla.rope) * pairs + 2 * run.T * k * n
            return self._absorbed(run) if absorbed <= naive else self._naive(run)
        return self._absorbed(run) if run.absorbed else self._naive(run)

    def _naive(self, run: Pass) -> list[Work]:
        """kv_b runs over all S tokens, then attention with N KV heads. What kv_b writes is read back once."""
        B, T, S, H, value = run.B, run.T, run.S, self.H, self.mla.value
        kv, e = element_bytes("kv", run.kv), element_bytes("activations", run.activations)
        k, n = self.matrices()["kv_b"]
        expand = matmul(B * S, k, n, "kv_b", run.weights, run.activations)
        expand = Work(expand.flops, expand.bytes + B * S * k * (kv - e), "kv_b", run.activations, "gemm", B * S)    # latents in `kv`
        read = B * S * (n * e + self.mla.rope * kv)                     # keys and values as kv_b wrote them; the rotated part is cached
        return [expand, self._attention(run, read, H, value, T)]

    def _absorbed(self, run: Pass) -> list[Work]:
        """Two small products for each head instead of kv_b over the context; then the latents are keys and values at once."""
        B, S, N, latent, rope, value = run.B, run.S, self.N, self.mla.latent, self.mla.rope, self.mla.value
        readers = 1 if run.shared else N
        read = B * S * readers * (latent + rope) * element_bytes("kv", run.kv)
        return [
            self._per_head(run, "absorb_k", self.H - rope, latent),
            self._attention(run, read, latent + rope, latent, run.T * (N if run.shared else 1)),
            self._per_head(run, "absorb_v", latent, value),
        ]

    def _per_head(self, run: Pass, name: str, k: int, n: int) -> Work:
        """N products X[B·T, k] @ W[k, n], a head each: all of W is read, by B·T rows."""
        one = run.matmul(name, k, n)
        return Work(self.N * one.flops, self.N * one.bytes, name, run.activations, "gemm", run.tokens)

    def _attention(self, run: Pass, read: float, key: int, value: int, rows: int) -> Work:
        """Scores of `key` numbers and sums of `value` numbers for each head and visible pair; `read` bytes of keys and values."""
        flops = 2 * run.B * self.N * (key + value) * visible_pairs(run.T, run.S, None)
        q_and_o = run.tokens * self.N * (key + value) * element_bytes("activations", run.activations)
        return Work(flops, read + q_and_o, "attention", run.activations, "attention", rows)
