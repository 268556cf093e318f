"""Attention over pages in C++ (`cpp/attention.h`): what `kernels/decode_paged.py` and
`prefill_paged.py` are to a GPU. Whole steps have it in them (`cpp_step`); alone it is tested."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from clawdemy_infer.fast import cpp


def attend_pages(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor,
                 past: Sequence[int], num_new_tokens: Sequence[int],
                 window: int | None = None) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(H)) v for q [M, N, H], the new tokens of each sequence one behind the
    other, over keys and values [blocks, K, block_size, H]: [M, N, H], in fp32 or bf16 as all
    are.

    `table` [B, most] of int32 says which blocks a sequence has, `past[b]` how many tokens it had
    before, `num_new_tokens[b]` how many it brings. A token sees the last `window` of its sequence
    up to itself, or all.
    """
    (_, N, H), (_, K, block_size, _) = q.shape, keys.shape
    q, out = q.contiguous(), torch.empty(q.shape, dtype=q.dtype)
    past, num_new_tokens = torch.tensor(past), torch.tensor(num_new_tokens)
    code(q.dtype, N // K, H)(*cpp.pointers(q, keys, values, table, past, num_new_tokens, out),
                             len(past), K, table.shape[1], block_size, window or 2**40)
    return out


@functools.cache
def code(dtype: torch.dtype, G: int, H: int) -> Callable:
    """The machine code for these sizes, which the compiler unrolls."""
    made = cpp.library("attention", T=cpp.TYPES[dtype], G=G, H=H)
    return cpp.function(made, "attention", pointers=7, numbers=5)
