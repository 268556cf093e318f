"""A model: its numbers, the layers that they make, and what those cost together.

*Stored* weights occupy memory, *streamed* ones are what a step has to read: not the table of which
an embedding gathers B*T rows, but all of it where it is the output head too."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from clawdemy_infer.arithmetic.attention import Attention
from clawdemy_infer.arithmetic.feed_forward import MLP, Experts, MoE
from clawdemy_infer.arithmetic.latent import MLA, LatentAttention
from clawdemy_infer.arithmetic.state_space import SSM, StateSpace
from clawdemy_infer.arithmetic.work import Format, Pass, Work, at_least_1, element_bytes, total

KINDS = ("global", "local", "global shared", "local shared", "ssm")
"""Mixers: attention to all or through a window, with its own cache or an earlier one's; a state."""

BIASES = ("qkv", "out", "gate_up", "up", "down", "router", "head", "norm")
"""Matrices that may add a bias to their outputs, and the norms."""


@dataclass(frozen=True)
class Layer:
    """A mixer, a feed-forward part, and `norms` and sums of width D around them. In a `parallel`
    layer both parts read the same input, and one sum adds both (Wang and Komatsuzaki 2021)."""

    D: int
    mixer: Attention | LatentAttention | StateSpace
    feed_forward: MLP | Experts | None
    norms: int
    norm_bias: bool
    parallel: bool

    def matrices(self) -> dict[str, tuple[int, int]]:
        return self.mixer.matrices() | (self.feed_forward.matrices() if self.feed_forward else {})

    def parameters(self, tokens: int | None = None) -> float:
        norms = self.norms * self.D * (2 if self.norm_bias else 1)
        feed_forward = self.feed_forward.parameters(tokens) if self.feed_forward else 0
        return self.mixer.parameters() + feed_forward + norms

    def of_rows(self, run: Pass) -> list[Work]:
        """All but the mixer's `of_sequences`."""
        feed_forward = self.feed_forward.work(run) if self.feed_forward else []
        # A norm reads and writes the residual stream, a sum reads one array more: 3, or 4 with two.
        sums = 4 if self.parallel else 3 * (2 if self.feed_forward else 1)
        norms = run.elementwise("norms", 2 * self.norms * run.tokens * self.D)
        residual = run.elementwise("residual", sums * run.tokens * self.D)
        return [*self.mixer.of_rows(run), *feed_forward, norms, residual]

    def work(self, run: Pass) -> Work:
        return total("layer", [*self.of_rows(run), *self.mixer.of_sequences(run)])


@dataclass(frozen=True)
class Capacity:
    """What a configuration occupies, in bytes, without activations. Truthy when it fits."""

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


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder-only language model that its cost depends on. The defaults are those
    of the dense Llama family (Touvron et al. 2023); what other families do is a field each. H is
    stated, never derived: Qwen3 and Gemma have N*H different from D.

    tied        the output head is the embedding table itself
    window      in tokens, of all layers or of those that the pattern calls local
    pattern     mixers by layer, of `KINDS`, repeated up to L; empty: local if windowed, else global
    moe         experts in the place of the MLP
    mla         latent attention in the place of K KV heads; H is the width of a query head
    ssm         the state-space mixers of a pattern that names them
    gated       whether the MLP has a gate
    norms       norms of width D in a layer
    parallel    attention and MLP side by side
    rope        whether positions are rotations; else `positions` rows of a learned table, or none
    biases      what adds one, of `BIASES`
    sinks       a learned logit for each query head
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
    qk_norm: bool = False
    max_context: int | None = None
    source: str = ""
    pattern: tuple[str, ...] = ()
    moe: MoE | None = None
    mla: MLA | None = None
    ssm: SSM | None = None
    gated: bool = True
    norms: int = 2
    parallel: bool = False
    rope: bool = True
    positions: int = 0
    biases: tuple[str, ...] = ()
    sinks: bool = False

    def __post_init__(self) -> None:
        kinds = set(self.kinds)
        for name, given, known in (("pattern", kinds, KINDS), ("biases", self.biases, BIASES)):
            if unknown := set(given) - set(known):
                raise ValueError(f"{name}={sorted(unknown)[0]!r}: accepted are {', '.join(known)}")
        if "ssm" in kinds and not self.ssm:
            raise ValueError("pattern='ssm' needs the numbers of `ssm`")
        if (self.window is not None) != any(kind.startswith("local") for kind in kinds):
            raise ValueError(f"window={self.window}: layers of the pattern are local if and only "
                             "if there is a window")
        attends = kinds != {"ssm"}          # a state-space layer may do without the rest
        for letter in "LDV" + "NKHF" * attends:
            if getattr(self, letter) < 1:
                raise ValueError(f"{letter}={getattr(self, letter)}: a model needs at least 1")
        if attends and self.N % self.K:
            raise ValueError(f"K={self.K}: the KV heads must divide the N={self.N} query heads")

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        pattern = self.pattern or (("local",) if self.window else ("global",))
        return tuple(pattern[index % len(pattern)] for index in range(self.L))

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(self._layer(kind, self.moe is not None and self.moe.in_layer(index))
                     for index, kind in enumerate(self.kinds))

    @cached_property
    def groups(self) -> tuple[tuple[Layer, int], ...]:
        """Each kind of layer with how many there are of it."""
        return tuple(Counter(self.layers).items())

    def _layer(self, kind: str, has_experts: bool) -> Layer:
        if kind == "ssm":
            mixer = StateSpace(self.D, self.ssm)
        elif self.mla:
            mixer = LatentAttention(self.D, self.N, self.H, self.mla)
        else:
            window = self.window if kind.startswith("local") else None
            mixer = Attention(self.D, self.N, self.K, self.H, window, "shared" not in kind,
                              self.rope, self.qk_norm, self.sinks, self.biases)
        feed_forward = MLP(self.D, self.F, self.gated, self.biases) if self.F else None
        if has_experts:
            feed_forward = Experts(self.D, self.moe.F or self.F, self.moe, self.biases)
        return Layer(self.D, mixer, feed_forward, self.norms, "norm" in self.biases, self.parallel)

    # ---- parameters and what they weigh ----

    def parameters(self) -> int:
        """Every stored number: embedding, layers, final norm, and the head where it is not tied."""
        tables = self.V * self.D * (1 if self.tied else 2) + self.positions * self.D
        return tables + self._met_by()

    def active_parameters(self) -> int:
        """Those without the experts that a token is not sent to (Jiang et al. 2024)."""
        return self.parameters() - self._met_by() + round(self._met_by(tokens=1))

    def matrix_parameters(self) -> int:
        """w: numbers that a token meets in the layers' matrices, two FLOPs each; not the head's."""
        return sum(count * I * O for layer, count in self.groups
                   for I, O in layer.matrices().values())

    def _met_by(self, tokens: int | None = None) -> float:
        """Numbers that `tokens` tokens meet in the layers, the final norm and the head's bias."""
        ends = self.D * (2 if "norm" in self.biases else 1) + self.V * ("head" in self.biases)
        return sum(count * layer.parameters(tokens) for layer, count in self.groups) + ends

    def stored_bytes(self, weights: Format = "bf16") -> float:
        """Bytes the weights occupy in memory."""
        return self.parameters() * element_bytes("weights", weights)

    def streamed_bytes(self, weights: Format = "bf16", tokens: int = 1) -> float:
        """Weight bytes that a pass over `tokens` tokens must read: not the tables from which it
        gathers rows, nor the experts that none of the tokens goes to."""
        at_least_1(tokens=tokens)
        return (self._met_by(tokens) + self.V * self.D) * element_bytes("weights", weights)

    # ---- the KV cache, the states, and whether they fit ----

    def kv_bytes_per_token(self, kv: Format = "bf16") -> float:
        """Bytes that a token adds while windows have room: 2·L·K·H numbers in plain attention."""
        return (self._kept(1) - self._kept(0)) * element_bytes("kv", kv)

    def state_bytes(self, kv: Format = "bf16") -> float:
        """Bytes of a sequence's state-space layers, whatever its context."""
        return self._kept(0) * element_bytes("kv", kv)

    def kv_bytes(self, batch: int, context: int, kv: Format = "bf16") -> float:
        """Bytes of the KV cache and the states of `batch` sequences of `context` tokens."""
        return batch * self._kept(context) * element_bytes("kv", kv)

    def fits(self, memory: float, batch: int, context: int, weights: Format = "bf16",
             kv: Format = "bf16") -> Capacity:
        """Do weights and KV cache fit into `memory` bytes?"""
        at_least_1(batch=batch, context=context)
        held = self.kv_bytes(batch, context, kv)
        return Capacity(memory, self.stored_bytes(weights), held, batch)

    def _kept(self, context: int) -> int:
        return sum(count * layer.mixer.kept(context) for layer, count in self.groups)

    # ---- work ----

    def attention(self, batch: int, new: int, context: int, **options) -> Work:
        """`of_sequences` of the first layer, summed up where they are several operations."""
        ops = self.layers[0].mixer.of_sequences(_pass(batch, new, context, options))
        return ops[0] if len(ops) == 1 else total("attention", ops)

    def head(self, rows: int, weights: Format = "bf16", activations: str = "bf16") -> Work:
        """The output head on `rows` positions: D x V, read whole even when tied."""
        return Pass(rows, 1, 1, weights, activations=activations).matmul("head", self.D, self.V)

    def step(self, batch: int, new: int, context: int, logits: int = 1, **options) -> Work:
        """One forward pass over `new` tokens of each of `batch` sequences, which hold `context` in
        the end. The last `logits` of each need logits. `options`: formats and the other fields of
        `Pass`. ValueError for other sizes than 1 <= logits <= new <= context, unknown formats."""
        run = _pass(batch, new, context, options)
        if not 1 <= logits <= new:
            raise ValueError(f"logits={logits}: 1 to new={new} tokens of each sequence")
        layers = [layer.work(run) * count for layer, count in self.groups]
        return total("step", [*layers, self.head(batch * logits, run.weights, run.activations)])

    def prefill(self, batch: int, prompt: int, **options) -> Work:
        """Read the prompt, give the first token."""
        at_least_1(prompt=prompt)
        return self.step(batch, prompt, prompt, **options)

    def decode(self, batch: int, context: int, **options) -> Work:
        """One more token for each of `batch` sequences, whose context counts the new one."""
        return self.step(batch, 1, context, **options)


def _pass(batch: int, new: int, context: int, options: dict) -> Pass:
    at_least_1(batch=batch, new=new, context=context)
    if context < new:
        raise ValueError(f"context={context}: it counts the {new} new tokens too, so it is at "
                         f"least {new}")
    return Pass(batch, new, context, **options)
