"""The decoder's layer for a few rows of activations, written as sums and element-wise operations only.

At batch 1 a product is a sum over each row of the weight, y[n] = sum over k of W[n, k] x[k], and needs no matrix kernel. Said in this way
the whole layer is something that a compiler of loops can turn into one loop nest: `compiled` has that done. Run as it stands it gives
the same numbers, slowly. All is computed in fp32, whatever weights and cache are in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

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
    """x [M, K] in fp32 by a stored matrix: [M, N] in fp32, whatever the weights are in.

    M sums over the same weights, said one by one: the compiler then makes them in one go, and what it has read of a weight serves all.
    """
    return torch.stack([_product(parts, row) for row in x.unbind()])


def _product(parts: Parts, x: torch.Tensor) -> torch.Tensor:
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


OPTIONS = {"cpp.enable_floating_point_contract_flag": "fast", "size_asserts": False, "alignment_asserts": False}
"""A product and the sum it goes to may be one instruction, and a call does not look once more at the shapes that it is compiled for: a
step of int8 weights then takes 4.5 ms and not 4.9."""


def translated(function: Callable, *arguments, rows: bool = False) -> Callable:
    """`function` as machine code for arguments like these. They are not looked at again in later calls, of which there is one a layer.
    With `rows`, there may be any number of those, 2 or more, in each of the tensors that is not a vector."""
    for tensor in pytree.tree_leaves(arguments) if rows else ():
        if tensor.dim() > 1:
            torch._dynamo.mark_dynamic(tensor, 0)
    code = torch.compile(function, fullgraph=True, dynamic=False, options=OPTIONS).aot_compile((arguments, {}))
    code.disable_guard_check()
    return code


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return once(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight)


def before_attention(x: torch.Tensor, layer: tuple, rope: Parts, N: int, K: int, eps: float, dtype: torch.dtype) -> Parts:
    """q [M, N, H], k and v [M, K, H] of the residual stream x [M, D]."""
    gamma, qkv, bias, q_gamma, k_gamma = layer
    heads = product(qkv, norm(x, gamma, eps))
    heads = (heads if bias is None else heads + bias).view(len(x), N + 2 * K, -1)
    q, k, v = heads.split((N, K, K), dim=1)
    if q_gamma is not None:
        q, k = norm(q, q_gamma, eps), norm(k, k_gamma, eps)
    return rotate(q, *rope).to(dtype), rotate(k, *rope).to(dtype), v.to(dtype).contiguous()


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What M new tokens see: of themselves, k and v [M, K, H], and of the P tokens before them, keys and values [K, P, H].
    Returns [M, N*H].
    """
    M, K, H = k.shape
    q = q.view(M, K, -1, H).float() * H**-0.5                                               # [M, K, G, H]
    past = (q[:, :, :, None] * keys[:, None].float()).sum(-1)                               # [M, K, G, P]
    own = (q[:, None] * k[:, :, None].float()).sum(-1)                                      # [M, M, K, G]
    later = torch.arange(M) > torch.arange(M)[:, None]                                      # a token does not see those after it
    own = own.masked_fill(later[:, :, None, None], -torch.inf)
    largest = torch.maximum(past.amax(-1), own.amax(1))                                     # [M, K, G]
    past, own = (past - largest[..., None]).exp(), (own - largest[:, None]).exp()
    out = (past[..., None] * values[:, None].float()).sum(3) + (own[..., None] * v[:, :, None].float()).sum(1)
    return once(out / (past.sum(-1) + own.sum(1))[..., None]).flatten(1)


def after_attention(x: torch.Tensor, seen: Parts, layer: tuple, eps: float) -> torch.Tensor:
    """The rest of the layer: x [M, D] to the next x [M, D]. `seen` is what `attended` needs, or [M, N*H] that has been worked out
    already."""
    out, gamma, gate_up, down = layer
    x = x + product(out, attended(*seen) if len(seen) > 1 else seen[0].float())
    gate, up = product(gate_up, norm(x, gamma, eps)).chunk(2, -1)
    return x + product(down, once(F.silu(gate) * up))


def parts_of(layer: Layer, format: str) -> tuple[tuple, tuple]:
    """What `before_attention` and `after_attention` need of a layer."""
    small = (None if each is None else each.weight.float() for each in (layer.q_norm, layer.k_norm))
    bias = None if layer.qkv.bias is None else layer.qkv.bias.float()
    into = layer.attention_norm.weight.float(), stored(format, layer.qkv.weight), bias, *small
    rest = (stored(format, each.weight) for each in (layer.gate_up, layer.down))
    return into, (stored(format, layer.out.weight), layer.mlp_norm.weight.float(), *rest)
