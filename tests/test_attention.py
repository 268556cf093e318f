"""Attention against its definition in float64, wherever bf16 on a CPU takes another way than PyTorch's fused kernel."""

import pytest
import torch

from clawdemy_infer import attention
from clawdemy_infer.attention import attend, ragged_mask


def by_definition(q, k, v, past):
    """softmax(q kᵀ / sqrt(H)) v, a query at a time: token t of sequence b sees its first past[b] + t + 1 keys."""
    (B, K, _, H), (M, N, _) = k.shape, q.shape
    out = torch.zeros(M, N, v.shape[-1], dtype=torch.float64)
    for row in range(M):
        b, t = divmod(row, M // B)
        for n in range(N):
            keys, values = (x[b, n // (N // K), :past[b] + t + 1].double() for x in (k, v))
            out[row, n] = torch.softmax(keys @ q[row, n].double() / H**0.5, 0) @ values
    return out.flatten(1)


@pytest.fixture
def ways(monkeypatch):
    """Which of the ways were taken."""
    taken = []
    for name in ("decode_in_products", "prefill_in_products"):
        real = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *args, real=real, name=name: (taken.append(name), real(*args))[1])
    return taken


@pytest.mark.parametrize("B, T, K, G, ragged, way", [
    (11, 1, 3, 3, False, "decode_in_products"), (13, 1, 3, 2, True, "decode_in_products"), (1, 150, 2, 3, False, "prefill_in_products"),
    (3, 67, 1, 4, False, "prefill_in_products"), (2, 1, 3, 3, False, None), (1, 9, 2, 3, False, None),
])
def test_attention_in_bf16_is_its_definition_whichever_way_it_goes(ways, B, T, K, G, ragged, way):
    generator = torch.Generator().manual_seed(B * T)
    longest = 41 if T == 1 else T
    past = [longest - T - (b % 7 if ragged else 0) for b in range(B)]
    q = torch.randn(B * T, K * G, 24, generator=generator).bfloat16()
    k, v = torch.randn(2, B, K, longest + 3, 24, generator=generator).bfloat16()[:, :, :, :longest]       # a cache with room to spare
    v = v[..., :20]                         # values may be narrower than keys
    mask = ragged_mask(past, T, longest, None, q.dtype, q.device) if ragged else None
    got, right = attend(q, k, v, mask), by_definition(q, k, v, past)
    assert ways == ([way] if way else [])
    assert (got - right).norm() <= 0.01 * right.norm() and got.dtype == torch.bfloat16
