"""One launch of each kernel at the size of a real model (Llama-3-8B, a batch of 8, 1,024 tokens): what is compiled ahead and timed.

Tensors are filled with nothing in particular: neither the code nor the time depends on the numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from clawdemy_kernels.decode_grouped import decode_grouped
from clawdemy_kernels.decode_int4 import decode_int4
from clawdemy_kernels.decode_int8 import decode_int8
from clawdemy_kernels.decode_naive import decode_naive
from clawdemy_kernels.decode_paged import decode_paged
from clawdemy_kernels.decode_split import decode_split
from clawdemy_kernels.linear_int4 import linear_int4
from clawdemy_kernels.linear_int8 import linear_int8
from clawdemy_kernels.prefill_paged import prefill_paged
from clawdemy_kernels.rms_norm import rms_norm
from clawdemy_kernels.rope_append import rope_append
from clawdemy_kernels.sample import sample
from clawdemy_kernels.swiglu import swiglu
from clawdemy_kernels.verify import verify


def examples(device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16, batch: int = 8,
             context: int = 1024) -> dict[str, Callable[[], object]]:
    """A launch without arguments for each kernel, by its name."""
    D, F, N, K, H, V, C = 4096, 14336, 32, 8, 128, 128256, 16
    B, S, M, blocks = batch, context, 64, batch * context // C

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def counting(*shape: int) -> torch.Tensor:
        return torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=device).view(shape)

    q, keys, values = zeros(B, N, H), zeros(B, K, S, H), zeros(B, K, S, H)
    lengths = torch.full((B,), S, dtype=torch.int32, device=device)
    table, pool_k, pool_v = counting(B, S // C), keys.view(blocks, K, C, H), values.view(blocks, K, C, H)
    codes, scales = zeros(blocks, K, C, H, dtype=torch.int8), zeros(blocks, K, C, dtype=torch.half)
    nibbles = zeros(B, K, S, H // 2, dtype=torch.uint8)
    by_channel, by_token = zeros(B, K, S // 32, H, dtype=torch.half), zeros(B, K, S, H // 32, dtype=torch.half)
    x, row = zeros(M, D), zeros(1, D)
    angles, slots = zeros(M, H // 2, dtype=torch.float32), torch.arange(M, device=device)
    starts, past = torch.tensor([0, M], dtype=torch.int32, device=device), torch.full((1,), S - M, dtype=torch.int32, device=device)
    uniform, p = zeros(B, 5, dtype=torch.float32), zeros(B, 5, V, dtype=torch.float32)
    return {
        "decode_naive": lambda: decode_naive(q, keys, values, lengths),
        "decode_grouped": lambda: decode_grouped(q, keys, values, lengths),
        "decode_split": lambda: decode_split(q, keys, values, lengths),
        "decode_paged": lambda: decode_paged(q, pool_k, pool_v, table, lengths),
        "decode_int8": lambda: decode_int8(q, codes, scales, codes.clone(), scales, table, lengths),
        "decode_int4": lambda: decode_int4(q, nibbles, by_channel, by_channel, nibbles.clone(), by_token, by_token, lengths),
        "prefill_paged": lambda: prefill_paged(zeros(M, N, H), pool_k, pool_v, table[:1], starts, past, longest=M),
        "rms_norm": lambda: rms_norm(x, x[0], 1e-5, residual=x),
        "rope_append": lambda: rope_append(zeros(M, N + 2 * K, H), angles, angles, slots, pool_k, pool_v),
        "swiglu": lambda: swiglu(zeros(M, 2 * F)),
        "linear_int8": lambda: linear_int8(row, zeros(D, D, dtype=torch.int8), zeros(D, dtype=torch.float32)),
        "linear_int4": lambda: linear_int4(row, zeros(D, D // 2, dtype=torch.uint8), *2 * (zeros(D // 64, D, dtype=torch.half),)),
        "sample": lambda: sample(zeros(B, V), uniform[:, 0].contiguous()),
        "verify": lambda: verify(p, p[:, :4], zeros(B, 4, dtype=torch.int64), uniform),
    }
