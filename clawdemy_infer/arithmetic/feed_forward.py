"""The feed-forward half of a layer: an MLP for every token, or experts of which each takes a few.

Gated MLPs: Shazeer 2020. Mixture of experts: Shazeer et al. 2017, Jiang et al. 2024 (Mixtral);
shared experts: Dai et al. 2024. `parameters(tokens)` counts the numbers that `tokens` tokens are
expected to touch: all of an MLP, of the experts only some; for None, all of them.
"""

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
        return sum(I * O + O * (name in self.biases) for name, (I, O) in self.matrices().items())

    def activation(self, run: Pass, rows: float) -> Work:
        """Read what the first product wrote, write F numbers."""
        name, arrays = ("silu(gate)*up", 3) if self.gated else ("activation", 2)
        return run.elementwise(name, arrays * rows * self.F)

    def work(self, run: Pass) -> list[Work]:
        products = [run.matmul(name, I, O) for name, (I, O) in self.matrices().items()]
        return [*products, self.activation(run, run.tokens)]


@dataclass(frozen=True)
class MoE:
    """`active` of `experts` for each token, of width F (None: the model's F), and one more of width
    `shared` for all of them, which a number weighs where there is a `shared_gate` (Qwen2-MoE). The
    first `first_dense` layers have a plain MLP; then every `every`-th, from `offset`, has experts.
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
        """Distinct experts that `tokens` tokens need, if each chooses evenly: all miss an expert
        with probability (1 - active/experts)^tokens."""
        return self.experts * (1 - (1 - self.active / self.experts) ** tokens)


@dataclass(frozen=True)
class Experts:
    """A router and its experts. `biases`: the experts' "gate_up" and "down", and "router"."""

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
        """Those a token meets: the router's, and one expert's as wide as all its active ones."""
        active = MLP(self.D, self.moe.active * self.F + self.moe.shared)
        return {"router": (self.D, self.moe.experts)} | active.matrices()

    def parameters(self, tokens: int | None = None) -> float:
        moe = self.moe
        router = (self.D + ("router" in self.biases)) * moe.experts + self.D * moe.shared_gate
        read = moe.experts if tokens is None else moe.touched(tokens)
        shared = self.shared.parameters() if self.shared else 0
        return router + read * self.expert.parameters() + shared

    def work(self, run: Pass) -> list[Work]:
        """Each token sends `active` rows to its experts. Those touched are read once each."""
        moe, rows, touched = self.moe, run.tokens * self.moe.active, self.moe.touched(run.tokens)
        M = max(1, rows / touched)                          # rows of one expert
        each = [matmul(M, I, O, f"expert {name}", run.weights, run.activations) * touched
                for name, (I, O) in self.expert.matrices().items()]
        gate = self.expert.activation(run, rows)
        shared = [op._replace(name=f"shared {op.name}")
                  for op in (self.shared.work(run) if self.shared else [])]
        combine = run.elementwise("combine", (moe.active + 1) * run.tokens * self.D)    # a sum
        return [run.matmul("router", self.D, moe.experts), *each, gate, *shared, combine]
