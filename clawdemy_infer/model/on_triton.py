"""The decoder's layer on Triton kernels: what lies between its products is four launches where PyTorch makes about twenty-five.

    norm                                    rms_norm
    qkv
    turn, keep, look                        rope_append, then what the cache has (decode_paged, prefill_paged ...)
    out, residual, norm                     rms_norm with the residual
    gate and up, gate, down                 swiglu
    residual

`decoder.py` stays as it is: a model on another backend is made of twins of its parts, which share its weights.
"""

from __future__ import annotations

import torch
from torch import nn

from clawdemy_infer.backends import choose, kernel
from clawdemy_infer.kv_cache import Step
from clawdemy_infer.model.decoder import Decoder, Layer, RMSNorm
from clawdemy_infer.model.formats import twin


class TritonNorm(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernel("rms_norm")(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)


class TritonLayer(Layer):
    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], step: Step, index: int) -> torch.Tensor:
        y = self.attention(self.attention_norm(x), rope, step, index)
        y = kernel("rms_norm")(y, self.mlp_norm.weight, self.mlp_norm.eps, residual=x)      # x becomes x + y
        return x + self.mlp(y)

    def attention(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], step: Step, index: int) -> torch.Tensor:
        pages = step.pages(index)
        if pages is None:                                       # a cache that rounds, or forgets: it wants keys and values turned already
            return super().attention(x, rope, step, index)
        N, K, H = self.N, self.K, self.H
        heads = self.qkv(x).view(-1, N + 2 * K, H)
        if self.q_norm is not None:
            heads = torch.cat((self.q_norm(heads[:, :N]), self.k_norm(heads[:, N:N + K]), heads[:, N + K:]), dim=1)
        cos, sin = (table[:, 0] for table in rope)              # (cos, cos) and (-sin, sin), [M, H]
        q = kernel("rope_append")(heads, cos[:, H // 2:], sin[:, H // 2:], *pages)
        return self.out(step.look(index, q))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(kernel("swiglu")(self.gate_up(x)))


TWINS = {RMSNorm: TritonNorm, Layer: TritonLayer}
"""Other parts, such as layers with experts, stay PyTorch's."""


def with_backend(model: Decoder, backend: str | None = None) -> Decoder:
    """A copy of `model` that computes with PyTorch or with the Triton kernels, as `backends.choose` says; so do its caches.

    All weights are the model's own. Raises ValueError for an unknown backend, and for a model whose weights are packed already:
    choose the backend first, then `with_weights`.
    """
    backend = choose(model.device, backend)
    if model.packed:
        raise ValueError(f"model: its weights are packed in {model.packed}; a model with float weights is accepted")
    if backend == "triton":
        kernel("rms_norm")                                      # imports Triton, so that `count_ops` finds it before the first launch
    twins = TWINS if backend == "triton" else {other: part for part, other in TWINS.items()}

    def rebuilt(module: nn.Module) -> nn.Module:
        made = twin(module)
        made.__class__ = twins.get(type(module), type(module))
        made._modules = {name: part if part is None else rebuilt(part) for name, part in module._modules.items()}
        return made

    made = rebuilt(model)
    made.backend = backend
    return made
