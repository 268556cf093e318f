"""The decoder: the Llama family in one file, as it is run and as the arithmetic counts it.

Letters as everywhere: B batch, S context, T new tokens, D width, F feed-forward width, N query heads, K KV heads, H head
dimension, L layers, V vocabulary. One step is

    tokens [M] -> embed -> L x (attention, MLP) -> norm -> head -> logits [M, V]

over M rows, the new tokens of all sequences one behind the other: B * T where each of B sequences brings T, and any sum where
each brings its own. Only attention must know whose row is whose, and asks the cache.

Touvron et al. 2023 (Llama); Jiang et al. 2023 (Mistral's sliding window); Qwen2 adds a bias to Q, K and V, Qwen3 a norm to
the heads of Q and K. What one family has and another has not is a field of the config, never a subclass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.kv_cache import KVCache, Step, Uncached
from clawdemy_infer.linear import Fast, Linear
from clawdemy_infer.model.config import ModelConfig
from clawdemy_infer.model.rope import angular_frequencies, rope_tables, rotate


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, over the last dimension (Zhang and Sennrich 2019, equation 4), in fp32.

    PyTorch has a layer norm in one kernel, and on a CPU makes six of an RMS norm. The two are the same for (x, -x), whose mean is
    zero: so twice the numbers, and a third less time.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        D = x.shape[-1]
        return F.layer_norm(torch.cat((x, -x), dim=-1), (2 * D,), eps=self.eps)[..., :D] * self.weight


class Layer(nn.Module):
    """One transformer layer: attention and a gated MLP, each behind a norm and added to the residual stream.

    Q, K and V are one matrix, and so are gate and up: the same bytes in fewer operations, each of which costs a few
    microseconds on a CPU whatever its size.
    """

    def __init__(self, shape: ModelShape, eps: float) -> None:
        super().__init__()
        D, N, K, H = shape.D, shape.N, shape.K, shape.H
        self.N, self.K, self.H = N, K, H
        self.attention_norm = RMSNorm(D, eps)
        self.qkv = Linear(D, (N + 2 * K) * H, bias=shape.qkv_bias)
        self.q_norm = RMSNorm(H, eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(H, eps) if shape.qk_norm else None
        self.out = Linear(N * H, D)
        self.mlp_norm = RMSNorm(D, eps)
        self.gate_up = Linear(D, 2 * shape.F)
        self.down = Linear(shape.F, D)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], step: Step, index: int) -> torch.Tensor:
        """x [M, D] -> [M, D]. `rope` and `step` are the same for every layer."""
        x = x + self.attention(self.attention_norm(x), rope, step, index)
        return x + self.mlp(self.mlp_norm(x))

    def attention(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], step: Step, index: int) -> torch.Tensor:
        N, K, H = self.N, self.K, self.H
        heads = self.qkv(x).view(-1, N + 2 * K, H)
        qk, v = heads.split((N + K, K), dim=1)
        if self.q_norm is not None:
            q, k = qk.split((N, K), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = rotate(qk, *rope).split((N, K), dim=1)                   # queries and keys turn alike, so in one go
        return self.out(step.attend(index, q, k, v))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)                                         # [M, F] each
        return self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """A Llama-family language model. `load_model` makes one with a checkpoint's weights, and with its `tokenizer`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = config.shape
        self.config = config
        self.tokenizer = None
        self.packed: str | None = None
        self.backend = "torch"                              # what its caches ask; `with_backend` changes it, and the parts below
        self.compiled_step: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None      # for a few rows: see `compiled`
        self.between: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None            # and for any number of them
        # Called with each step and what its last layer left, [M, D]: a draft that was trained on these vectors reads them here.
        self.observer: Callable[[Step, torch.Tensor], None] | None = None
        # Uniform, not nn.Embedding's normal: on the meta device, where `load_model` builds, that one costs an import of 2 s.
        self.embed = nn.Embedding.from_pretrained(torch.empty(shape.V, shape.D).uniform_(-1, 1))
        self.layers = nn.ModuleList(Layer(shape, config.norm_eps) for _ in range(shape.L))
        self.norm = RMSNorm(shape.D, config.norm_eps)
        self.head = None if shape.tied else Linear(shape.D, shape.V)
        self.tied_head = Fast()                             # the embedding table as a head
        self.frequencies = angular_frequencies(shape.H, config.rope_theta, config.rope_scaling)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def weights(self) -> str:
        """The format of the matrices. `dtype` is that of the activations, and of a cache."""
        return self.packed or {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def compile_s(self) -> float:
        """Seconds that were spent on compiling it; 0 where nothing was compiled."""
        return sum(code.compile_s for code in (self.compiled_step, self.between) if code)

    def forward(self, tokens: torch.Tensor, cache: KVCache | None = None, last_only: bool = False) -> torch.Tensor:
        """Logits [B, T, V] of tokens [B, T], which follow on whatever `cache` holds; [B, 1, V] of the last if `last_only`.

        Row b belongs to the cache's sequence b. With `last_only` the head, a D x V product for each position, is spared for all
        positions but one: that is how a prefill is run. See `step` for the rest.
        """
        if tokens.dim() != 2 or tokens.numel() == 0 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens {list(tokens.shape)} of {tokens.dtype}: whole numbers [B, T] are accepted, T at least 1")
        (B, T), shape = tokens.shape, self.config.shape
        if cache is None:
            cache = Uncached(B, shape.max_context or T, self.dtype, self.device)
        if B != len(cache.lengths):
            raise ValueError(f"tokens: {B} sequences, but the cache was made for {len(cache.lengths)}")
        new = dict(zip(cache.lengths, tokens.tolist(), strict=True))
        return self._run(new, tokens.flatten(), cache, last_only).view(B, -1, shape.V)

    def step(self, new: Mapping[Hashable, Sequence[int]], cache: KVCache, last_only: bool | Sequence[int] = True) -> torch.Tensor:
        """One forward pass over `new`, the token ids that each of some sequences brings: as many as it likes, and each its own
        number. Returns the logits that follow each sequence, [B, V] in the order of `new`; of all M rows, [M, V], if not
        `last_only`; or of the last so many rows of each sequence, if that is a list.

        The cache counts the tokens only when the whole step is done, so an interrupted step can simply be run again. Logits
        come out of inference mode: `clone()` them to write into them. Raises ValueError, before any work, for an unknown
        sequence or token, or for more tokens than the cache or the model's context has room for.
        """
        tokens = [token for ids in new.values() for token in ids]
        return self._run(new, torch.tensor(tokens, dtype=torch.int64, device=self.device), cache, last_only)

    @torch.inference_mode()
    def _run(self, new: Mapping[Hashable, Sequence[int]], tokens: torch.Tensor, cache: KVCache,
             last_only: bool | Sequence[int]) -> torch.Tensor:
        self._check(new, cache)
        step = cache.begin(new, self.config.shape.window)
        if self.compiled_step and self.compiled_step.takes(step):
            run = self.compiled_step
        else:
            run = self.between if self.between and len(tokens) > 1 else self._layer_by_layer
        x, logits = run(tokens, step, last_only)
        if self.observer:
            self.observer(step, x)
        step.commit()
        return logits

    def _layer_by_layer(self, tokens: torch.Tensor, step: Step, last_only: bool | Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the last layer leaves, [M, D], and the logits that are wanted of it."""
        self.frequencies = self.frequencies.to(self.device)
        rope = rope_tables(self.frequencies, step.positions, self.dtype)
        x = left = self.embed(tokens)                                                       # [M, D]
        for index, layer in enumerate(self.layers):
            x = left = layer(x, rope, step, index)
        return left, self.logits(self.norm(wanted_rows(x, step, last_only)))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Of vectors [M, D] that are normed: [M, V]."""
        return self.head(x) if self.head is not None else self.tied_head(x, self.embed.weight)

    def _check(self, new: Mapping[Hashable, Sequence[int]], cache: KVCache) -> None:
        shape = self.config.shape
        for sequence, ids in new.items():
            if ids and not (0 <= min(ids) and max(ids) < shape.V):
                wrong = min(ids) if min(ids) < 0 else max(ids)
                raise ValueError(f"tokens hold {wrong}: ids from 0 to V-1 = {shape.V - 1} are accepted")
            past, T = cache.lengths.get(sequence, 0), len(ids)
            # Where a cache counts positions within itself, a text may go on for ever.
            if shape.max_context and min(past + T, cache.span or past + T) > shape.max_context:
                raise ValueError(f"tokens: {past} in the cache and {T} new make {past + T}; "
                                 f"the model's context is {shape.max_context}")


def wanted_rows(x: torch.Tensor, step: Step, last_only: bool | Sequence[int]) -> torch.Tensor:
    """Of a step's rows [M, D], the last of each sequence, all, or the last so many of each: see `Decoder.step`."""
    if not last_only or len(x) == len(step.new):
        return x
    counts = [1] * len(step.new) if last_only is True else last_only
    return x[[row for end, count in zip(accumulate(step.new), counts, strict=True) for row in range(end - count, end)]]
