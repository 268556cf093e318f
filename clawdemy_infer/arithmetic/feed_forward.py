"""The feed-forward half of a layer: an MLP for every token, or experts of which each takes a few.

Gated MLPs: Shazeer 2020. Mixture of experts: Shazeer et al. 2017, Jiang et al. 2024 (Mixtral);
shared experts: Dai et al. 2024. `numbers(tokens)` counts, matrix by matrix, the numbers that
`tokens` tokens are expected to touch: all of an MLP, of the experts only some; for None, all."""

from dataclasses import dataclass, replace

from clawdemy_infer.arithmetic.work import Format, Pass, Work, element_bytes, format_of, matmul


def weigh(numbers: dict[str, float], weights: Format) -> float:
    """Bytes of so many weights in each matrix."""
    return sum(count * element_bytes("weights", format_of(weights, name))
               for name, count in numbers.items())


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

    def numbers(self, tokens: int | None = None) -> dict[str, int]:
        matrices = self.matrices()
        return {name: I * O for name, (I, O) in matrices.items()} | {
            "vectors": sum(O for name, (_, O) in matrices.items() if name in self.biases)}

    def activation(self, run: Pass, rows: float, of: str = "") -> Work:
        """Read what the first product wrote, write F numbers."""
        name, arrays = ("silu(gate)*up", 3) if self.gated else ("activation", 2)
        return run.elementwise(of + name, arrays * rows * self.F)

    def work(self, run: Pass, of: str = "") -> list[Work]:
        products = [run.matmul(of + name, I, O) for name, (I, O) in self.matrices().items()]
        return [*products, self.activation(run, run.tokens, of)]


@dataclass(frozen=True)
class MoE:
    """`active` of `experts` for each token, of width F (None: the model's F), and one more of width
    `shared` for all of them, which a number weighs where there is a `shared_gate` (Qwen2-MoE). The
    first `first_dense` layers have a plain MLP; then every `every`-th, from `offset`, has experts;
    `layers` names those that do, where there is no such rule. With a `latent`, a product goes to
    that width before the experts and one comes back after them (Nemotron 3)."""

    experts: int
    active: int
    F: int | None = None
    shared: int = 0
    shared_gate: bool = False
    first_dense: int = 0
    every: int = 1
    offset: int = 0
    layers: tuple[int, ...] = ()
    latent: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.experts:
            raise ValueError(f"active={self.active}: 1 to {self.experts} experts for each token")
        if not 0 <= self.offset < self.every:
            raise ValueError(f"offset={self.offset}: 0 to every - 1 = {self.every - 1}")

    def in_layer(self, index: int) -> bool:
        if self.layers:
            return index in self.layers
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
    gated: bool = True

    @property
    def expert(self) -> MLP:
        return MLP(self.moe.latent or self.D, self.F, self.gated, self.biases)

    @property
    def shared(self) -> MLP | None:
        return MLP(self.D, self.moe.shared, self.gated) if self.moe.shared else None

    @property
    def common(self) -> dict[str, tuple[int, int]]:
        """Matrices that every token meets, beside the shared expert's."""
        latent = {"latent": (self.D, 2 * self.moe.latent)} if self.moe.latent else {}
        return {"router": (self.D, self.moe.experts)} | latent

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Those a token meets: one expert's are as wide as all its active ones, and the shared one
        where they have the same inputs."""
        moe, apart = self.moe, self.shared.matrices() if self.moe.latent and self.shared else {}
        width = moe.active * self.F + (0 if apart else moe.shared)
        return (self.common | replace(self.expert, F=width).matrices()
                | {f"shared {name}": size for name, size in apart.items()})

    def numbers(self, tokens: int | None = None) -> dict[str, float]:
        moe, shared = self.moe, self.shared.numbers() if self.shared else {}
        read = moe.experts if tokens is None else moe.touched(tokens)
        found = {name: I * O for name, (I, O) in self.common.items()}
        found |= {"vectors expert" if name == "vectors" else f"expert {name}": read * count
                  for name, count in self.expert.numbers().items()}
        vectors = self.D * moe.shared_gate + moe.experts * ("router" in self.biases)
        return found | {f"shared {name}": n for name, n in shared.items()} | {"vectors": vectors}

    def work(self, run: Pass) -> list[Work]:
        """Each token sends `active` rows to its experts. Those touched are read once each."""
        moe, rows, touched = self.moe, run.tokens * self.moe.active, self.moe.touched(run.tokens)
        M = max(1, rows / touched)                          # rows of one expert
        each = [matmul(M, I, O, f"expert {name}", run.weights, run.activations) * touched
                for name, (I, O) in self.expert.matrices().items()]
        gate = self.expert.activation(run, rows)
        shared = self.shared.work(run, "shared ") if self.shared else []
        combine = run.elementwise("combine", (moe.active + 1) * run.tokens * self.D)    # a sum
        common = [run.matmul(name, I, O) for name, (I, O) in self.common.items()]
        return [*common, *each, gate, *shared, combine]
