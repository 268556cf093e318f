"""A whole model: its numbers, the layers that they make, and what those cost together.

Two kinds of weight bytes differ and are never mixed: *stored* is what the weights occupy, *streamed* is what one step has to
read. An embedding gather reads B*T rows of a table and is not a stream; a tied output head reads the whole table and is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from clawdemy_infer.arithmetic.attention import Attention
from clawdemy_infer.arithmetic.feed_forward import MLP, Experts, MoE
from clawdemy_infer.arithmetic.latent import MLA, LatentAttention
from clawdemy_infer.arithmetic.layer import Layer
from clawdemy_infer.arithmetic.state_space import SSM, StateSpace
from clawdemy_infer.arithmetic.work import Format, Pass, Work, at_least_1, check_step, element_bytes, matmul, total

KINDS = ("global", "local", "global shared", "local shared", "ssm")
"""Mixers that a pattern may name: attention to everything or through the window, with its own KV cache or an earlier layer's;
a state space."""

BIASES = ("qkv", "out", "gate_up", "up", "down", "router", "head", "norm")
"""Matrices that may add a bias to their outputs, and the norms."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder-only language model that its cost depends on. The defaults are those of the dense Llama family
    (Touvron et al. 2023; GQA: Ainslie et al. 2023); what other families do differently is a field each.

    H is stated, never derived: Qwen3 and Gemma have N*H different from D. `tied` says that the output head is the
    embedding table itself. `window` is the sliding window in tokens, of all layers or of those that the pattern calls local.

    pattern     mixers by layer, of `KINDS`, repeated as often as L asks for; empty: all "local" with a window, else all "global"
    moe         experts in the place of the MLP
    mla         latent attention in the place of K KV heads; H is then the width of a query head
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
    qkv_bias: bool = False
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
        if unknown := kinds - set(KINDS):
            raise ValueError(f"pattern={sorted(unknown)[0]!r}: accepted are {', '.join(KINDS)}")
        if unknown := set(self.biases) - set(BIASES):
            raise ValueError(f"biases={sorted(unknown)[0]!r}: accepted are {', '.join(BIASES)}")
        if "ssm" in kinds and not self.ssm:
            raise ValueError("pattern='ssm' needs the numbers of `ssm`")
        if (self.window is not None) != any(kind.startswith("local") for kind in kinds):
            raise ValueError(f"window={self.window}: layers of the pattern are local if and only if there is a window")
        attends = kinds != {"ssm"}
        for letter in "LDV" + "NKH" * attends + "F" * attends:          # a state-space layer may do without the rest
            if getattr(self, letter) < 1:
                raise ValueError(f"{letter}={getattr(self, letter)}: a model needs at least 1")
        if attends and self.N % self.K:
            raise ValueError(f"K={self.K}: the KV heads must divide the N={self.N} query heads")

    # ---- the layers ----

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The mixer of each layer."""
        pattern = self.pattern or (("local",) if self.window else ("global",))
        return tuple(pattern[index % len(pattern)] for index in range(self.L))

    @cached_property
    def groups(self) -> tuple[tuple[Layer, int], ...]:
        """Each kind of layer with how many there are of it."""
        return tuple((self._layer(*slot), count) for slot, count in Counter(self._slots()).items())

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Layer by layer."""
        return tuple(self._layer(*slot) for slot in self._slots())

    def _slots(self) -> list[tuple[str, bool]]:
        """The mixer of each layer, and whether it has experts: all that layers of one model differ in."""
        return [(kind, self.moe is not None and self.moe.in_layer(index)) for index, kind in enumerate(self.kinds)]

    def _layer(self, kind: str, has_experts: bool) -> Layer:
        biases = (*self.biases, "qkv") if self.qkv_bias else self.biases
        if kind == "ssm":
            mixer = StateSpace(self.D, self.ssm)
        elif self.mla:
            mixer = LatentAttention(self.D, self.N, self.H, self.mla)
        else:
            window = self.window if kind.startswith("local") else None
            mixer = Attention(self.D, self.N, self.K, self.H, window, "shared" not in kind, self.rope, self.qk_norm, self.sinks, biases)
        if has_experts:
            feed_forward = Experts(self.D, self.moe.F or self.F, self.moe, biases)
        else:
            feed_forward = MLP(self.D, self.F, self.gated, biases) if self.F else None
        return Layer(self.D, mixer, feed_forward, self.norms, "norm" in self.biases, self.parallel)

    def matrices(self, layer: int = 0) -> dict[str, tuple[int, int]]:
        """The weight matrices that a token is multiplied by in one layer, as (inputs, outputs)."""
        return self.layers[layer].matrices()

    def layer_parameters(self, layer: int = 0) -> int:
        """Matrices, norms, and the biases and head norms that some families add."""
        return self.layers[layer].parameters()

    # ---- parameters and what they weigh ----

    def parameters(self) -> int:
        """Every stored number: embedding, layers, final norm, and the head where it is not tied."""
        tables = self.V * self.D * (1 if self.tied else 2) + self.positions * self.D
        return tables + self._layer_parameters() + self._ends()

    def active_parameters(self) -> int:
        """The parameters without the experts that a token is not sent to, as the authors of MoE models count (Jiang et al. 2024)."""
        return self.parameters() - self._layer_parameters() + round(self._layer_parameters(tokens=1))

    def matrix_parameters(self) -> int:
        """w: numbers in the matrices of all layers that one token is multiplied by, two FLOPs each. The head is not among them."""
        return sum(count * sum(k * n for k, n in layer.matrices().values()) for layer, count in self.groups)

    def _layer_parameters(self, tokens: int | None = None) -> float:
        return sum(count * layer.parameters(tokens) for layer, count in self.groups)

    def _ends(self) -> int:
        """The final norm, and the head's bias."""
        return self.D * (2 if "norm" in self.biases else 1) + self.V * ("head" in self.biases)

    def stored_bytes(self, weights: Format = "bf16") -> float:
        """Bytes the weights occupy in memory."""
        return self.parameters() * element_bytes("weights", weights)

    def streamed_bytes(self, weights: Format = "bf16", tokens: int = 1) -> float:
        """Weight bytes that one forward pass over `tokens` tokens must read: all of it but the tables from which it only gathers rows,
        and but the experts that none of the tokens goes to. Without experts it is the same for any number of tokens."""
        at_least_1(tokens=tokens)
        return (self._layer_parameters(tokens) + self._ends() + self.V * self.D) * element_bytes("weights", weights)

    # ---- the KV cache, and states ----

    def kv_bytes_per_token(self, kv: Format = "bf16") -> float:
        """Bytes that one more token adds while every window has room: 2 (K and V) * L * K * H * bytes for plain attention."""
        return sum(count * (layer.mixer.kept(1) - layer.mixer.kept(0)) for layer, count in self.groups) * element_bytes("kv", kv)

    def state_bytes(self, kv: Format = "bf16") -> float:
        """Bytes of a sequence's state-space layers, whatever its context."""
        return sum(count * layer.mixer.kept(0) for layer, count in self.groups) * element_bytes("kv", kv)

    def kept_tokens(self, context: int) -> float:
        """Tokens of a `context` that attention can still see: the mean over the layers that keep a cache, so that
        kv_bytes = batch * (kept_tokens * kv_bytes_per_token + state_bytes)."""
        kept = [(layer.mixer.kept_tokens(context), count) for layer, count in self.groups if layer.mixer.kept(1) > layer.mixer.kept(0)]
        tokens, layers = sum(tokens * count for tokens, count in kept), sum(count for _, count in kept) or 1
        return tokens // layers if tokens % layers == 0 else tokens / layers

    def kv_bytes(self, batch: int, context: int, kv: Format = "bf16") -> float:
        """Bytes of the KV cache and the states of `batch` sequences of `context` tokens."""
        return batch * sum(count * layer.mixer.kept(context) for layer, count in self.groups) * element_bytes("kv", kv)

    # ---- work ----

    def attention(self, batch: int, new: int, context: int, kv: Format = "bf16", activations: str = "bf16", shared: bool = True,
                  layer: int = 0) -> Work:
        """Scores and weighted sum of one layer with KV heads (`Attention.attend`)."""
        check_step(batch, new, context)
        return self.layers[layer].mixer.attend(Pass(batch, new, context, kv=kv, activations=activations, shared=shared))

    def head(self, rows: int, weights: Format = "bf16", activations: str = "bf16") -> Work:
        """The output head on `rows` positions: D x V, read whole even when tied to the embedding."""
        return matmul(rows, self.D, self.V, "head", weights, activations)

    def step(self, batch: int, new: int, context: int, weights: Format = "bf16", kv: Format = "bf16", activations: str = "bf16",
             shared: bool = True, absorbed: bool | None = None) -> Work:
        """One forward pass over `new` tokens of each sequence, of which only the last needs logits. See `Pass` for the arguments."""
        check_step(batch, new, context)
        run = Pass(batch, new, context, weights, kv, activations, shared, absorbed)
        return total("step", [*(layer.work(run) * count for layer, count in self.groups), self.head(batch, weights, activations)])

    def prefill(self, batch: int, prompt: int, **formats) -> Work:
        """Read the prompt, give the first token."""
        at_least_1(prompt=prompt)
        return self.step(batch, prompt, prompt, **formats)

    def decode(self, batch: int, context: int, **formats) -> Work:
        """One more token for each of `batch` sequences, whose context is `context` tokens with the new one."""
        return self.step(batch, 1, context, **formats)

    # ---- capacity comes before speed ----

    def fits(self, memory: float, batch: int, context: int, weights: Format = "bf16", kv: Format = "bf16") -> Capacity:
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
