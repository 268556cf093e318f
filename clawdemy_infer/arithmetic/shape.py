"""A model: its numbers, the layers that they make, and what those cost together.

*Stored* weights occupy memory, *streamed* ones are what a step has to read: not the table of which
an embedding gathers B*T rows, but all of it where it is the output head too."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from clawdemy_infer.arithmetic.attention import Attention
from clawdemy_infer.arithmetic.feed_forward import MLP, Experts, MoE, weigh
from clawdemy_infer.arithmetic.latent import MLA, LatentAttention
from clawdemy_infer.arithmetic.state_space import SSM, StateSpace
from clawdemy_infer.arithmetic.work import Format, Pass, Work, at_least_1, element_bytes, total

KINDS = ("global", "local", "global shared", "local shared", "ssm", "global alone", "ssm alone",
         "mlp alone")
"""Mixers: attention to all or through a window, with its own cache (of sparse latent attention, its
own index) or an earlier one's; a state. Alone: a layer without a feed-forward part, or only it."""

BIASES = ("qkv", "out", "gate_up", "up", "down", "router", "head", "norm")
"""Matrices that may add a bias to their outputs, and the norms."""


class NoMixer:
    """In the place of a mixer, where a layer is a feed-forward part alone."""

    window, matrices, vectors = None, staticmethod(dict), staticmethod(int)
    kept = staticmethod(lambda S: 0)
    of_rows = of_sequences = staticmethod(lambda run: [])


NO_MIXER = NoMixer()


@dataclass(frozen=True)
class Layer:
    """A mixer, a feed-forward part, and `norms` and sums of width D around them. In a `parallel`
    layer both parts read the same input, and one sum adds both (Wang and Komatsuzaki 2021)."""

    D: int
    mixer: Attention | LatentAttention | StateSpace | NoMixer
    feed_forward: MLP | Experts | None
    norms: int
    norm_bias: bool
    parallel: bool
    format: Format = ""         # of what the mixer keeps, "" for that of the cache

    @property
    def parts(self) -> int:
        """Of mixer and feed-forward part, those that it has."""
        return (self.mixer is not NO_MIXER) + (self.feed_forward is not None)

    def matrices(self) -> dict[str, tuple[int, int]]:
        return self.mixer.matrices() | (self.feed_forward.matrices() if self.feed_forward else {})

    def numbers(self, tokens: int | None = None) -> dict[str, float]:
        """What `tokens` tokens meet of it, None for all, by matrix; norms and biases: "vectors"."""
        feed = self.feed_forward.numbers(tokens) if self.feed_forward else {"vectors": 0}
        own = {name: I * O for name, (I, O) in self.mixer.matrices().items()}
        norms = self.norms * self.D * (2 if self.norm_bias else 1)
        return own | feed | {"vectors": self.mixer.vectors() + feed["vectors"] + norms}

    def held(self, context: int, kv: Format) -> float:
        """Bytes that a sequence leaves in memory for the next step."""
        return self.mixer.kept(context) * element_bytes("kv", self.format or kv)

    def of_rows(self, run: Pass) -> list[Work]:
        """All but the mixer's `of_sequences`."""
        feed_forward = self.feed_forward.work(run) if self.feed_forward else []
        # A norm reads and writes the residual stream, a sum reads one array more: 3, or 4 with two.
        sums = 4 if self.parallel else 3 * self.parts
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
    sinks       a learned logit for each query head (gpt-oss)
    gate        numbers of a query head that weigh its output (Qiu et al. 2025)
    full        K and H of the layers without a window, where theirs are others
    one_kv      there a product makes K, and V is a copy of it (Gemma 4)
    value       width of a value head, where it is not H (MiMo-V2)
    wide        twice the width F in the layers that use another's cache
    per_layer   width of the input that each layer has of its own, from its own table (Gemma 4)
    extra       numbers beside all these: norms of an unusual width, scales
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
    gate: int = 0
    full: tuple[int, ...] = ()
    one_kv: bool = False
    value: int = 0
    wide: bool = False
    per_layer: int = 0
    extra: int = 0

    def __post_init__(self) -> None:
        kinds = set(self.kinds)
        for name, given, known in (("pattern", kinds, KINDS), ("biases", self.biases, BIASES)):
            if unknown := set(given) - set(known):
                raise ValueError(f"{name}={sorted(unknown)[0]!r}: accepted are {', '.join(known)}")
        if kinds & {"ssm", "ssm alone"} and not self.ssm:
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
        kind, _, manner = kind.partition(" ")
        if kind == "ssm":
            mixer = StateSpace(self.D, self.ssm)
        elif kind == "mlp":
            mixer = NO_MIXER
        elif self.mla:
            mixer = LatentAttention(self.D, self.N, self.H, self.mla,
                                    bool(self.mla.index) and manner != "shared")
        else:
            (K, H), own = (self.K, self.H), kind == "local" or not self.full
            mixer = Attention(self.D, self.N, *((K, H) if own else self.full),
                              self.window if kind == "local" else None, manner != "shared",
                              self.rope, self.qk_norm, self.sinks, self.biases, self.gate,
                              self.one_kv and kind == "global", self.per_layer, self.value)
        F = self.F * (2 if self.wide and manner == "shared" else 1)
        feed_forward = MLP(self.D, F, self.gated, self.biases) if F else None
        if has_experts:
            feed_forward = Experts(self.D, self.moe.F or self.F, self.moe, self.biases, self.gated)
        if manner == "alone" and kind != "mlp":
            feed_forward = None
        return Layer(self.D, mixer, feed_forward, self.norms, "norm" in self.biases, self.parallel,
                     self.ssm.format if kind == "ssm" else "")

    # ---- parameters and what they weigh ----

    def parameters(self) -> int:
        """Every stored number: embedding, layers, final norm, and the head where it is not tied."""
        return sum(self.numbers().values()) + self.gathered

    def active_parameters(self) -> int:
        """Those without the experts that a token is not sent to (Jiang et al. 2024)."""
        return round(sum(self.numbers(tokens=1).values())) + self.gathered

    def matrix_parameters(self) -> int:
        """w: numbers that a token meets in the layers' matrices, two FLOPs each; not the head's."""
        return sum(count * I * O for layer, count in self.groups
                   for I, O in layer.matrices().values())

    @property
    def gathered(self) -> int:
        """Numbers of the tables of which a step takes B*T rows, and not all: what is no head."""
        return (0 if self.tied else self.V * self.D) + self.positions * self.D + (
            self.L * self.V * self.per_layer)

    @property
    def ends(self) -> dict[str, int]:
        """Numbers of what follows the layers, by matrix."""
        norm = self.D * (2 if "norm" in self.biases else 1)
        return {"head": self.V * self.D,
                "vectors": norm + self.V * ("head" in self.biases) + self.extra}

    def numbers(self, tokens: int | None = None) -> dict[str, float]:
        """Numbers that `tokens` tokens meet, None for all, by matrix: those of the layers, "head"
        (or the table that it is tied to), "vectors". Not `gathered`."""
        found = Counter(self.ends)
        for layer, count in self.groups:
            found.update({name: count * n for name, n in layer.numbers(tokens).items()})
        return dict(found)

    def stored_bytes(self, weights: Format = "bf16") -> float:
        """Bytes the weights occupy in memory."""
        return weigh(self.numbers() | {"embedding": self.gathered}, weights)

    def streamed_bytes(self, weights: Format = "bf16", tokens: int = 1) -> float:
        """Weight bytes that a pass over `tokens` tokens must read: not the tables from which it
        gathers rows, nor the experts that none of the tokens goes to."""
        at_least_1(tokens=tokens)
        return weigh(self.numbers(tokens), weights)

    # ---- the KV cache, the states, and whether they fit ----

    def kv_bytes_per_token(self, kv: Format = "bf16") -> float:
        """Bytes that a token adds while windows have room: 2·L·K·H numbers in plain attention."""
        return self._held(1, kv) - self._held(0, kv)

    def state_bytes(self, kv: Format = "bf16") -> float:
        """Bytes of a sequence's state-space layers, whatever its context."""
        return self._held(0, kv)

    def kv_bytes(self, batch: int, context: int, kv: Format = "bf16") -> float:
        """Bytes of the KV cache and the states of `batch` sequences of `context` tokens."""
        return batch * self._held(context, kv)

    def fits(self, memory: float, batch: int, context: int, weights: Format = "bf16",
             kv: Format = "bf16") -> Capacity:
        """Do weights and KV cache fit into `memory` bytes?"""
        at_least_1(batch=batch, context=context)
        held = self.kv_bytes(batch, context, kv)
        return Capacity(memory, self.stored_bytes(weights), held, batch)

    def _held(self, context: int, kv: Format) -> float:
        return sum(count * layer.held(context, kv) for layer, count in self.groups)

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
        raise ValueError(f"context={context}: it counts the {new} new tokens too; at least {new}")
    return Pass(batch, new, context, **options)
