"""The decoder: the Llama family in one file, as it is run and as the arithmetic counts it.

One step is, in the letters of `arithmetic.work`,

    tokens [M] -> embed -> L x (attention, MLP) -> norm -> head -> logits [M, V]

over M rows, the new tokens of all sequences one behind the other. Only attention must know whose
row is whose, and asks the cache.

Touvron et al. 2023 (Llama); Jiang et al. 2023 (Mistral's sliding window); Qwen2 adds a bias to Q, K
and V, Qwen3 a norm to the heads of Q and K. What one family has and another has not is a field of
the config, never a subclass."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.kv_cache import ContiguousCache, KVCache, Step
from clawdemy_infer.kv_cache.step import Tokens
from clawdemy_infer.model.config import ModelConfig
from clawdemy_infer.model.rope import angular_frequencies, rope_tables, rotate

FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

LogitsToKeep = int | Sequence[int]
"""How many of a sequence's last rows get logits: one number for all, or one each; 0: all rows."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, over the last dimension and in fp32 (Zhang and Sennrich
    2019, equation 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class Layer(nn.Module):
    """One layer: attention and a gated MLP, each behind a norm and added to the residual stream.

    Q, K and V are one matrix, and so are gate and up: the same bytes in fewer operations, each of
    which costs a few microseconds on a CPU whatever its size. A variant replaces one half."""

    def __init__(self, shape: ModelShape, eps: float) -> None:
        super().__init__()
        self.N, self.K, self.H = shape.N, shape.K, shape.H
        self.attention_norm = RMSNorm(shape.D, eps)
        self.add_attention(shape, eps)
        self.mlp_norm = RMSNorm(shape.D, eps)
        self.add_mlp(shape)

    def add_attention(self, shape: ModelShape, eps: float) -> None:
        D, N, K, H = shape.D, shape.N, shape.K, shape.H
        self.qkv = nn.Linear(D, (N + 2 * K) * H, bias="qkv" in shape.biases)
        self.q_norm = RMSNorm(H, eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(H, eps) if shape.qk_norm else None
        self.out = nn.Linear(N * H, D, bias=False)

    def add_mlp(self, shape: ModelShape) -> None:
        self.gate_up = nn.Linear(shape.D, 2 * shape.F, bias=False)
        self.down = nn.Linear(shape.F, shape.D, bias=False)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], step: Step,
                index: int) -> torch.Tensor:
        """x [M, D] -> [M, D]. `rope` and `step` are the same for every layer."""
        x = x + self.attention(self.attention_norm(x), rope, step, index)
        return x + self.mlp(self.mlp_norm(x))

    def attention(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], step: Step,
                  index: int) -> torch.Tensor:
        N, K, H = self.N, self.K, self.H
        heads = self.qkv(x).view(-1, N + 2 * K, H)
        qk, v = heads.split((N + K, K), dim=1)
        if self.q_norm is not None:
            q, k = qk.split((N, K), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = rotate(qk, *rope).split((N, K), dim=1)       # queries and keys turn alike, in one go
        return self.out(step.attend(index, q, k, v))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)                     # [M, F] each
        return self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """A Llama-family language model. `files.load_model` makes one with a checkpoint's weights, and
    with its `tokenizer`. `make_layer` makes other layers than a `Layer`, from their index."""

    def __init__(self, config: ModelConfig,
                 make_layer: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        shape, eps = config.shape, config.norm_eps
        make_layer = make_layer or (lambda index: Layer(shape, eps))
        self.config = config
        self.tokenizer = None
        self.packed: str | None = None      # the format of the matrices, where it is not `dtype`'s
        # A faster way through the steps that it `takes`, made by `fast.faster`: called in the place
        # of `layer_by_layer`, and its equal.
        self.runner = None
        # Called with each step and what its last layer left, [M, D], as some drafts read it.
        self.observer: Callable[[Step, torch.Tensor], None] | None = None
        # Uniform: nn.Embedding's normal costs an import of 2 s on the meta device.
        self.embed = nn.Embedding.from_pretrained(torch.empty(shape.V, shape.D).uniform_(-1, 1))
        self.layers = nn.ModuleList(make_layer(index) for index in range(shape.L))
        self.norm = RMSNorm(shape.D, eps)
        self.head = None if shape.tied else nn.Linear(shape.D, shape.V, bias=False)
        self.frequencies = angular_frequencies(shape.H, config.rope_theta, config.rope_scaling)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def weights(self) -> str:
        """The format of the matrices. `dtype` is that of the activations, and of a cache."""
        return self.packed or FORMATS[self.dtype]

    def forward(self, tokens: torch.Tensor, cache: KVCache | None = None,
                last_only: bool = False) -> torch.Tensor:
        """Logits [B, T, V] of tokens [B, T], which follow on whatever `cache` holds; [B, 1, V] of
        the last if `last_only`, as in a prefill: the head, a D x V product, is spared for the rest.
        Without a cache the keys and values are thrown away. What is raised: see `step`."""
        if tokens.ndim != 2 or not tokens.numel() or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens {list(tokens.shape)} of {tokens.dtype}: whole numbers [B, T] "
                             "are accepted, T at least 1")
        B, T = tokens.shape
        if cache is None:
            cache = ContiguousCache.for_model(self, B, T)
        if B != len(cache.lengths):
            raise ValueError(f"tokens: {B} sequences, but the cache was made for "
                             f"{len(cache.lengths)}")
        new = dict(zip(cache.lengths, tokens.tolist(), strict=True))
        return self.step(new, cache, int(last_only)).view(B, -1, self.config.shape.V)

    @torch.inference_mode()
    def step(self, new: Tokens, cache: KVCache, logits_to_keep: LogitsToKeep = 1) -> torch.Tensor:
        """One forward pass over `new`, the token ids that each of some sequences brings. Returns
        the logits of the last row of each sequence, [B, V] in the order of `new`; of as many of its
        last rows as `logits_to_keep` says; or, for 0, of all M rows, [M, V].

        The cache counts the tokens only when the whole step is done, so an interrupted step can
        simply be run again. Logits come out of inference mode: `clone()` them to write into them.
        Raises ValueError, before any work, for an unknown sequence or token, or for more tokens
        than the cache or the model's context has room for."""
        self._check(new, cache)
        tokens = torch.tensor([token for ids in new.values() for token in ids], device=self.device)
        step = cache.begin(new, self.config.shape.window)
        ready = self.runner and self.runner.takes(step) and not self._varies(step)
        runner = self.runner if ready else self.layer_by_layer
        x, logits = runner(tokens, step, logits_to_keep)
        if self.observer:
            self.observer(step, x)
        step.commit()
        return logits

    def layer_by_layer(self, tokens: torch.Tensor, step: Step,
                       logits_to_keep: LogitsToKeep) -> tuple[torch.Tensor, torch.Tensor]:
        """What the last layer leaves, [M, D], and the logits that are wanted of it."""
        rope = rope_tables(self.frequencies_of(step), step.positions, self.dtype,
                           self.config.rope_gain)
        x = self.embed(tokens)                                          # [M, D]
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, step, index)
        return x, self.logits(self.norm(wanted_rows(x, step, logits_to_keep)))

    def _varies(self, step: Step) -> bool:
        """Do the angles of some row depend on how long its text is?"""
        longest = max(map(sum, zip(step.past, step.num_new_tokens, strict=True)))
        return longest > (self.config.same_angles_until or longest)

    def frequencies_of(self, step: Step) -> torch.Tensor:
        """[H/2], or [M, H/2] for texts whose length has a say (`dynamic`, `longrope`): each has the
        angles that transformers gives it alone. Keys keep those that they were cached with."""
        self.frequencies = self.frequencies.to(self.device)
        if not self._varies(step):
            return self.frequencies
        H, theta, scaling = self.config.shape.H, self.config.rope_theta, self.config.rope_scaling
        return torch.cat([angular_frequencies(H, theta, scaling, past + T).expand(T, -1) for past, T
                          in zip(step.past, step.num_new_tokens, strict=True)]).to(self.device)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Of vectors [M, D] that are normed: [M, V]."""
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)

    def _check(self, new: Tokens, cache: KVCache) -> None:
        shape = self.config.shape
        for sequence, ids in new.items():
            if wrong := [token for token in ids if not 0 <= token < shape.V]:
                raise ValueError(f"tokens hold {wrong[0]}: ids from 0 to V-1 = {shape.V - 1} are "
                                 "accepted")
            past, T = cache.lengths.get(sequence, 0), len(ids)
            # Where a cache counts positions within itself, a text may go on for ever.
            if shape.max_context and min(past + T, cache.span or past + T) > shape.max_context:
                raise ValueError(f"tokens: {past} in the cache and {T} new make {past + T}; "
                                 f"the model's context is {shape.max_context}")
            most, plain = self.config.same_angles_until, isinstance(cache, ContiguousCache)
            if most and past + T > most and (past and T > 1 or not plain):
                raise ValueError(f"tokens: {past} in the cache and {T} new make {past + T}; beyond "
                                 f"{most} this model's RoPE depends on the length of the text: its "
                                 "whole, or one token more, in a contiguous cache is accepted")


def wanted_rows(x: torch.Tensor, step: Step, logits_to_keep: LogitsToKeep) -> torch.Tensor:
    """The rows of a step, of x [M, D], whose logits are wanted."""
    if logits_to_keep == 0 or len(x) == len(step.sequences):
        return x
    if isinstance(logits_to_keep, int):
        logits_to_keep = [min(T, logits_to_keep) for T in step.num_new_tokens]
    return x[[row for end, keep in zip(accumulate(step.num_new_tokens), logits_to_keep, strict=True)
              for row in range(end - keep, end)]]
