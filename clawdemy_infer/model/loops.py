"""The decoder's layer for one row of activations, written as sums and element-wise operations only.

At batch 1 a product is a sum over each row of the weight, y[n] = sum over k of W[n, k] x[k], and needs no matrix kernel. Said in this way
the whole layer is something that a compiler of loops can turn into one loop nest: `compiled` has that done. Run as it stands it gives
the same numbers, slowly. All is computed in fp32, whatever weights and cache are in.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from clawdemy_infer.linear import Codes, packable
from clawdemy_infer.model.decoder import Layer
from clawdemy_infer.model.rope import rotate

Parts = tuple[torch.Tensor, ...]
"""A stored matrix [N, K]: (float weight), (int8 codes, scales), or (pairs of int4 codes, scales, smallest weights)."""


def stored(format: str, weight: torch.Tensor) -> Parts:
    """A float weight as the compiled loops read it. Floats of the right dtype are not copied."""
    source = packable(format, weight)
    if not isinstance(source, Codes):
        return (source,)
    if source.zeros is None:
        return source.codes, source.scales
    low, high = source.codes.unflatten(1, (*source.scales.shape[1:], 2, -1)).unbind(2)      # halves of a group [N, K/group, group/2]
    return low | high << 4, source.scales, -source.zeros * source.scales


def product(parts: Parts, x: torch.Tensor) -> torch.Tensor:
    """x [K] in fp32 by a stored matrix: [N] in fp32, whatever the weights are in."""
    weight, *scales = parts
    if not scales:
        return (weight.float() * x).sum(-1)
    if len(scales) == 1:
        return (weight.float() * x).sum(-1) * scales[0]
    low, high = x.view(weight.shape[1], 2, -1).unbind(1)                                    # [K/group, group/2] each
    # A byte is low + 16 high. Its upper half alone is one `and`: so low x + high y = byte x + (byte & 240) (y/16 - x).
    high = once(high / 16 - low)
    scale, smallest = scales
    sums = ((weight.float() * low + (weight & 240).float() * high) * scale[..., None]).sum((1, 2))
    return sums + (smallest * x.view(weight.shape[1], -1).sum(-1)).sum(-1)


def once(x: torch.Tensor) -> torch.Tensor:
    """x itself, written out here: the compiler would otherwise work it out anew for every row of the matrix it is multiplied by."""
    return x.as_strided(x.shape, x.stride())


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return once(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight)


def before_attention(x: torch.Tensor, layer: tuple, rope: Parts, N: int, K: int, eps: float, dtype: torch.dtype) -> Parts:
    """q [1, N, H], k and v [1, K, H] of the residual stream x [D]."""
    gamma, qkv, bias, q_gamma, k_gamma = layer
    heads = product(qkv, norm(x, gamma, eps))
    heads = (heads if bias is None else heads + bias).view(1, N + 2 * K, -1)
    q, k, v = heads.split((N, K, K), dim=1)
    if q_gamma is not None:
        q, k = norm(q, q_gamma, eps), norm(k, k_gamma, eps)
    return rotate(q, *rope).to(dtype), rotate(k, *rope).to(dtype), v.to(dtype)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What one new token sees: of itself, k and v [1, K, H], and of the P tokens before it, keys and values [K, P, H]. Returns [N*H]."""
    K, _, H = keys.shape
    q = q.view(K, -1, H).float() * H**-0.5                                                  # [K, G, H]
    past = (q[:, :, None] * keys[:, None].float()).sum(-1)                                  # [K, G, P]
    own = (q * k[0][:, None].float()).sum(-1, keepdim=True)                                 # [K, G, 1]
    largest = torch.maximum(past.amax(-1, keepdim=True), own)
    past, own = (past - largest).exp(), (own - largest).exp()
    out = (past[..., None] * values[:, None].float()).sum(2) + own * v[0][:, None].float()  # [K, G, H]
    return (out / (past.sum(-1, keepdim=True) + own)).flatten()


def after_attention(x: torch.Tensor, seen: Parts, layer: tuple, eps: float) -> torch.Tensor:
    """The rest of the layer: x [D] to the next x [D]. `seen` is what `attended` needs, or [1, N*H] that has been worked out already."""
    out, gamma, gate_up, down = layer
    x = x + product(out, attended(*seen) if len(seen) > 1 else seen[0][0].float())
    gate, up = product(gate_up, norm(x, gamma, eps)).chunk(2)
    return x + product(down, once(F.silu(gate) * up))


def parts_of(layer: Layer, format: str) -> tuple[tuple, tuple]:
    """What `before_attention` and `after_attention` need of a layer."""
    small = (None if each is None else each.weight.float() for each in (layer.q_norm, layer.k_norm))
    bias = None if layer.qkv.bias is None else layer.qkv.bias.float()
    into = layer.attention_norm.weight.float(), stored(format, layer.qkv.weight), bias, *small
    rest = (stored(format, each.weight) for each in (layer.gate_up, layer.down))
    return into, (stored(format, layer.out.weight), layer.mlp_norm.weight.float(), *rest)
