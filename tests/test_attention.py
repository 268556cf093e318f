"""Attention against its definition in float64, at irregular shapes."""

import pytest
import torch
from tolerances import LOGITS

from clawdemy_infer.attention import attend, causal_mask, visible_keys


def by_definition(q, k, v, past, window=None):
    """softmax(q kᵀ / sqrt(H)) v, a query at a time: token t of sequence b sees its first past[b] +
    t + 1 keys, or the last `window` of them."""
    (B, K, _, H), (M, N, _) = k.shape, q.shape
    out = torch.zeros(M, N, v.shape[-1], dtype=torch.float64)
    for row in range(M):
        b, t = divmod(row, M // B)
        end = past[b] + t + 1
        for n in range(N):
            keys, values = (x[b, n // (N // K), max(0, end - (window or end)):end].double()
                            for x in (k, v))
            out[row, n] = torch.softmax(keys @ q[row, n].double() / H**0.5, 0) @ values
    return out.flatten(1)


def normal(B, T, K, G, S, dtype):
    """q [B*T, N, 24], k [B, K, S, 24] with room behind it, v [B, K, S, 20]: values may be narrower
    than keys."""
    generator = torch.Generator().manual_seed(B * T)
    q = torch.randn(B * T, K * G, 24, generator=generator).to(dtype)
    k, v = torch.randn(2, B, K, S + 3, 24, generator=generator).to(dtype)[:, :, :, :S]
    return q, k, v[..., :20]


@pytest.mark.parametrize("B, T, K, G, ragged", [
    (11, 1, 3, 3, False), (13, 1, 3, 2, True), (1, 150, 2, 3, False), (3, 67, 1, 4, False),
    (2, 1, 3, 3, False), (1, 9, 2, 3, False), (4, 5, 2, 3, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_its_definition(B, T, K, G, ragged, dtype):
    longest = 41 if T == 1 or ragged else T
    past = [longest - T - (b % 7 if ragged else 0) for b in range(B)]
    q, k, v = normal(B, T, K, G, longest, dtype)
    mask = causal_mask(past, T, None, q.dtype, q.device)
    got, right = attend(q, k, v, mask), by_definition(q, k, v, past)
    error = 0.01 if dtype == torch.bfloat16 else 1e-5
    assert (got - right).norm() <= error * right.norm() and got.dtype == dtype


@pytest.mark.parametrize("past", [0, 3, 20])
@pytest.mark.parametrize("window", [None, 1, 6, 50])
@pytest.mark.parametrize("T", [1, 4])
def test_a_query_sees_the_last_keys_of_its_window_up_to_itself(T, window, past):
    S = past + T
    q, k, v = normal(1, T, 2, 2, S, torch.float32)
    seen = visible_keys(T, S, window)
    mask = causal_mask([seen - T], T, window, q.dtype, q.device)
    got = attend(q, k[:, :, S - seen:], v[:, :, S - seen:], mask)
    torch.testing.assert_close(got, by_definition(q, k, v, [past], window).float(),
                               **LOGITS[torch.float32])
