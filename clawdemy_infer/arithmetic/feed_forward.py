"""The feed-forward half of a layer: one MLP for every token, or many experts of which each token takes a few.

Gated MLPs: Shazeer 2020. Mixture of experts: Shazeer et al. 2017, Jiang et al. 2024 (Mixtral); shared experts: Dai et al. 2024.
`parameters(tokens)` counts the numbers that so many tokens touch: all of an MLP, but of the experts only some.
"""

from __future__ import annotations

from dataclasses import dataclass

from clawdemy_infer.arithmetic.work import Pass, Work, matmul


@dataclass(frozen=True)
class MLP:
    """D -> F -> D; `gated` ones have two matrices into F, whose outputs are multiplied."""

    D: int
    F: int
    gated: bool = True
    biases: tuple[str, ...] = ()

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Gate and up are one product."""
        into = {"gate_up": (self.D, 2 * self.F)} if self.gated else {"up": (self.D, self.F)}
        return into | {"down": (self.F, self.D)}

    def parameters(self, tokens: int | None = None) -> int:
        return sum(k * n + n * (name in self.biases) for name, (k, n) in self.matrices().items())

    def activation(self, run: Pass, rows: float) -> Work:
        """Read what the first product wrote, write F numbers."""
        name, arrays = ("silu(gate)*up", 3) if self.gated else ("activation", 2)
        return run.elementwise(name, arrays * rows * self.F)

    def work(self, run: Pass) -> list[Work]:
        return [*(run.matmul(name, k, n) for name, (k, n) in self.matrices().items()), self.activation(run, run.tokens)]


@dataclass(frozen=True)
class MoE:
    """`active` of `experts` for each token, of width F (None: the model's F), and one more of width `shared` for all of them.

    The first `first_dense` layers have a plain MLP; after them every `every`-th has experts, counted from layer `offset`.
    `shared_gate`: each token weighs the shared expert by one number (Qwen2-MoE).
    """

    experts: int
    active: int
    F: int | None = None
    shared: int = 0
    shared_gate: bool = False
    first_dense: int = 0
    every: int = 1
    offset: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.experts:
            raise ValueError(f"active={self.active}: 1 to {self.experts} experts for each token")
        if not 0 <= self.offset < self.every:
            raise ValueError(f"offset={self.offset}: 0 to every - 1 = {self.every - 1}")

    def in_layer(self, index: int) -> bool:
        return index >= self.first_dense and index % self.every == self.offset

    def touched(self, tokens: float) -> float:
        """Distinct experts that `tokens` tokens need, if each chooses evenly: an expert is missed by all of them with
        probability (1 - active/experts)^tokens."""
        return self.experts * (1 - (1 - self.active / self.experts) ** tokens)


@dataclass(frozen=True)
class Experts:
    """A router and its experts in a model of width D. The experts' biases are those of "gate_up" and "down"; "router" has its own."""

    D: int
    F: int
    moe: MoE
    biases: tuple[str, ...] = ()

    @property
    def expert(self) -> MLP:
        return MLP(self.D, self.F, biases=self.biases)

    @property
    def shared(self) -> MLP | None:
        return MLP(self.D, self.moe.shared) if self.moe.shared else None

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Those a token is multiplied by: the router's, and one expert's as wide as all its active ones together."""
        active = MLP(self.D, self.moe.active * self.F + self.moe.shared)
        return {"router": (self.D, self.moe.experts)} | active.matrices()

    def parameters(self, tokens: int | None = None) -> float:
        """The numbers that `tokens` tokens are expected to touch; all of them for None."""
        moe = self.moe
        router = self.D * moe.experts + moe.experts * ("router" in self.biases) + self.D * moe.shared_gate
        read = moe.experts if tokens is None else moe.touched(tokens)
        return router + read * self.expert.parameters() + (self.shared.parameters() if self.shared else 0)

    def work(self, run: Pass) -> list[Work]:
        """Each token's rows go to its experts: `active` rows a token, spread over the experts touched, each of which is read once."""
        moe, rows = self.moe, run.tokens * self.moe.active
        touched = moe.touched(run.tokens)
        # M is what one expert sees: its weights are read for so few rows, however large the batch.
        each = [matmul(max(1, rows / touched), k, n, f"expert {name}", run.weights, run.activations)
                for name, (k, n) in self.expert.matrices().items()]
        shared = [op._replace(name=f"shared {op.name}") for op in self.shared.work(run)] \
            if self.shared else []
        router, gate = run.matmul("router", self.D, moe.experts), self.expert.activation(run, rows)
        combine = run.elementwise("combine", (moe.active + 1) * run.tokens * self.D)     # read `active` outputs, write their sum
        return [router, *(op * touched for op in each), gate, *shared, combine]
