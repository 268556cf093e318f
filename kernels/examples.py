"""One problem for each kernel: what to launch, what must come out, and the envelope. All checks are
made of these.

    values      small sizes, random numbers: `launch()` beside `reference()` in fp64
    traffic     small sizes: the bytes counted while `launch()` runs beside `asked`, to the byte
    code        the sizes of a real model (Llama-3-8B, a batch of 8, 1,024 tokens): what would be
                launched is compiled
    time        the same on a GPU, beside `least` over the bandwidth, and beside `torch()`,
                PyTorch's own way
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from clawdemy_kernels.decode_grouped import decode_grouped
from clawdemy_kernels.decode_int4 import decode_int4, decode_int4_reference
from clawdemy_kernels.decode_int8 import decode_int8, decode_int8_reference
from clawdemy_kernels.decode_naive import decode_naive, decode_reference
from clawdemy_kernels.decode_paged import decode_paged, decode_paged_reference
from clawdemy_kernels.decode_sinks import decode_sinks, decode_sinks_reference
from clawdemy_kernels.decode_split import decode_split, multiprocessors, parts_for
from clawdemy_kernels.linear_int4 import linear_int4, linear_int4_reference, pack_int4, parts_of
from clawdemy_kernels.linear_int8 import linear_int8, linear_int8_reference
from clawdemy_kernels.prefill_paged import prefill_paged, prefill_paged_reference
from clawdemy_kernels.rms_norm import rms_norm, rms_norm_reference
from clawdemy_kernels.rope_append import rope_append, rope_append_reference
from clawdemy_kernels.sample import sample, sample_reference
from clawdemy_kernels.swiglu import swiglu, swiglu_reference
from clawdemy_kernels.verify import verify, verify_reference


@dataclass(frozen=True)
class Sizes:
    """B sequences of S tokens decode; M rows, which stand for a chunk of a prompt, a batch, or T
    drafted tokens. C is a block of pages, `g` a group of 4-bit weights; rows of logits have V, and
    one row meets a matrix of D x D."""

    B: int = 8
    S: int = 1024
    M: int = 64
    T: int = 4
    D: int = 4096
    F: int = 14336
    N: int = 32
    K: int = 8
    H: int = 128
    V: int = 128256
    C: int = 16
    g: int = 64


LLAMA_3_8B = Sizes()
SMALL = Sizes(B=2, S=96, M=20, T=3, D=192, F=40, N=6, K=2, H=64, V=1500, C=16)
SINKS = 4
PARTS = 2
"""Parts of a sequence of small sizes, which would not be split."""
GROUP = 32
"""Numbers of a group of 4-bit keys and values."""


@dataclass(frozen=True)
class Example:
    """`asked` are the bytes that the kernel's instructions name, `least` those that must come from
    memory or go there once."""

    launch: Callable[[], object]
    reference: Callable[[], object]
    asked: int
    least: int
    flops: int = 0
    torch: Callable[[], object] | None = None

    def __call__(self) -> object:
        return self.launch()


def examples(sizes: Sizes = LLAMA_3_8B, device: torch.device | str = "cpu",
             dtype: torch.dtype = torch.bfloat16) -> dict[str, Example]:
    """By the kernel's name. Real sizes are filled with zeros: neither the code nor the time depends
    on the numbers."""
    B, S, M, T, D, Ff, N, K, H, V, C, g = vars(sizes).values()
    small, e = sizes.V < 10_000, dtype.itemsize

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        if small:
            return torch.randn(shape, device=device).to(dtype)
        return torch.zeros(shape, dtype=dtype, device=device)

    def halves(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, device=device) / 50).half()

    def codes(low: int, high: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, device=device, dtype=dtype)

    def wide(function: Callable, *tensors: object, **options: object) -> Callable[[], object]:
        """`function` in fp64."""
        return lambda: function(
            *(x.double() if isinstance(x, torch.Tensor) and x.dtype == dtype else x
              for x in tensors), **options)

    made = {}
    # ---- decode attention ----
    q, k, v = normal(B, N, H), normal(B, K, S, H), normal(B, K, S, H)
    seq_lens = torch.full((B,), S, dtype=torch.int32, device=device)
    table = torch.randperm(B * S // C, device=device).int().view(B, S // C)
    pool_k, pool_v = normal(B * S // C, K, C, H), normal(B * S // C, K, C, H)
    parts = PARTS if small else parts_for(B * K, S, 64, multiprocessors(q.device))
    queries, cache = B * N * H * e, 2 * B * S * K * H * e

    def split_among(parts: int) -> int:
        """Bytes beside those of the cache: queries once a part, the output, partial results written
        and read, and the lengths."""
        return (parts + 1) * queries + 2 * parts * B * N * (H + 2) * 4 + 4 * B * K * parts

    split = split_among(parts)
    attention = {"flops": 4 * B * N * S * H, "least": cache + 2 * queries,
                 "torch": lambda: F.scaled_dot_product_attention(q.view(B, K, N // K, H), k, v)}
    reference = wide(decode_reference, q, k, v, seq_lens)
    made["decode_naive"] = Example(
        lambda: decode_naive(q, k, v, seq_lens), reference,
        N // K * cache + 2 * queries + 4 * B * N, **attention)
    made["decode_grouped"] = Example(
        lambda: decode_grouped(q, k, v, seq_lens), reference,
        cache + 2 * queries + 4 * B * K, **attention)
    made["decode_split"] = Example(
        lambda: decode_split(q, k, v, seq_lens, parts), reference, cache + split, **attention)
    turned = normal(B, N, H)
    made["decode_sinks"] = Example(
        lambda: decode_sinks(q, turned, k, v, seq_lens, SINKS, parts),
        wide(decode_sinks_reference, q, turned, k, v, seq_lens, sinks=SINKS),
        cache + split_among(parts + 1), **attention | {"least": cache + 3 * queries, "torch": None})
    made["decode_paged"] = Example(
        lambda: decode_paged(q, pool_k, pool_v, table, seq_lens, parts=parts),
        wide(decode_paged_reference, q, pool_k, pool_v, table, seq_lens),
        cache + split + 4 * K * B * S, **attention)
    in8 = [codes(-127, 128, B * S // C, K, C, H, dtype=torch.int8) for _ in "kv"]
    scales = [halves(B * S // C, K, C) for _ in "kv"]
    pages, of_8_bits = (in8[0], scales[0], in8[1], scales[1], table, seq_lens), 2*B*S*K * (H + 2)
    made["decode_int8"] = Example(
        lambda: decode_int8(q, *pages, parts=parts), wide(decode_int8_reference, q, *pages),
        of_8_bits + split + 4 * K * B * S, **attention | {"least": of_8_bits + 2 * queries})
    few = B * S // GROUP                                        # blocks of one group each
    in4 = [codes(0, 256, few, K, GROUP, H // 2, dtype=torch.uint8) for _ in "kv"]
    by_channel = [halves(few, K, 1, H) for _ in "sl"]           # scales and lowest values
    by_token = [halves(few, K, GROUP, H // GROUP) for _ in "sl"]
    groups = torch.randperm(few, device=device).int().view(B, -1)
    nibbles = in4[0], *by_channel, in4[1], *by_token, groups, seq_lens
    of_4_bits = B * S * K * (H + 8 * H // GROUP)
    made["decode_int4"] = Example(
        lambda: decode_int4(q, *nibbles, parts=parts), wide(decode_int4_reference, q, *nibbles),
        of_4_bits + split + 4 * K * few, **attention | {"least": of_4_bits + 2 * queries})
    # ---- a chunk of a prompt, the last M of S tokens ----
    chunk = normal(M, N, H)
    starts = torch.tensor([0, M], dtype=torch.int32, device=device)
    past = torch.full((1,), S - M, dtype=torch.int32, device=device)
    over = pool_k, pool_v, table[:1].contiguous(), starts, past
    seen = [S - M + min(at + 16, M) for at in range(0, M, 16)]  # keys of each tile's last token
    hidden = torch.ones(M, S, dtype=torch.bool, device=device).tril(S - M)
    made["prefill_paged"] = Example(
        lambda: prefill_paged(chunk, *over, max_seqlen_q=M),
        wide(prefill_paged_reference, chunk, *over),
        asked=2*K*H*e * sum(seen) + 2*M*N*H*e + 4*K * sum(seen) + 12*K * len(seen),
        least=2*S*K*H*e + 2*M*N*H*e, flops=4*N*H * (M * (S - M) + M * (M + 1) // 2),
        torch=lambda: F.scaled_dot_product_attention(
            chunk.transpose(0, 1)[None], k[:1], v[:1], attn_mask=hidden, enable_gqa=True))
    # ---- between the products ----
    x, residual, weight, both = normal(M, D), normal(M, D), normal(D), normal(M, 2 * Ff)
    before = residual.double()                                  # the kernel adds x to it, in place
    made["rms_norm"] = Example(
        lambda: rms_norm(x, weight, 1e-5, residual),
        lambda: rms_norm_reference(x.double(), weight.double(), 1e-5, before.clone()),
        5*M*D*e, 4*M*D*e + D*e, torch=lambda: F.rms_norm(x + residual, (D,), weight, 1e-5))
    made["swiglu"] = Example(lambda: swiglu(both), wide(swiglu_reference, both), 3*M*Ff*e, 3*M*Ff*e,
                             torch=lambda: swiglu_reference(both))
    heads, slots = normal(M, N + 2 * K, H), torch.randperm(B * S, device=device)[:M]
    angles = 6 * torch.rand(M, H // 2, device=device)
    cos, sin, moved = angles.cos(), angles.sin(), 2 * M * (N + 2 * K) * H * e
    made["rope_append"] = Example(
        lambda: rope_append(heads, cos, sin, slots, pool_k, pool_v),
        lambda: rope_append_reference(heads.double(), cos.double(), sin.double(), slots,
                                      pool_k.double(), pool_v.double()),
        moved + M * (N + K) * H * 4 + 8 * M * 2 * K, moved + M * H * 4 + 8 * M,
        torch=lambda: rope_append_reference(heads, cos, sin, slots, pool_k, pool_v))
    # ---- one row against D x D weights of few bits ----
    row, dense = normal(1, D), normal(D, D)
    in_16 = -(-D // 32) * D * e                                 # each 32 outputs read the row anew
    bits8, scale8 = codes(-127, 128, D, D, dtype=torch.int8), torch.rand(D, device=device) / 1000
    product = {"flops": 2 * D * D, "torch": partial(F.linear, row, dense)}
    made["linear_int8"] = Example(
        lambda: linear_int8(row, bits8, scale8), wide(linear_int8_reference, row, bits8, scale8),
        D*D + 4*D + in_16 + D*e, D*D + 4*D + 2*D*e, **product)
    bits4, scale4 = codes(0, 16, D, D, dtype=torch.uint8), halves(D // g, D)
    zero4, packed = codes(0, 16, D // g, D, dtype=torch.uint8).half(), pack_int4(bits4, g)
    stream = D * D // 2 + 4 * D * D // g
    made["linear_int4"] = Example(
        lambda: linear_int4(row, packed, scale4, zero4),
        wide(linear_int4_reference, row, bits4, scale4, zero4),
        stream + in_16 + 4 * parts_of(D // g, 1, D, row.device) * D, stream + 2*D*e, **product)
    # ---- a token ----
    logits, once = 3 * normal(B, V), torch.rand(B, device=device)
    made["sample"] = Example(
        lambda: sample(logits, once), wide(sample_reference, logits, once),
        2*B*V*e + 8*B, B*V*e + 8*B, torch=lambda: torch.multinomial(logits.float().softmax(-1), 1))
    uniform = torch.rand(B, T + 1, device=device)
    p = torch.softmax(normal(B, T + 1, V, dtype=torch.float32), -1)
    drafted = codes(0, V, B, T, dtype=torch.int64)
    same = p[:, :T].contiguous()                                # p = q: every token is accepted
    made["verify"] = Example(
        lambda: verify(p, same, drafted, uniform),
        wide(verify_reference, p, same, drafted, uniform),
        B * (T*20 + 8*V + 20), B * (T*20 + 4*V + 20))
    return made
