"""How a quantized matrix lies in a file: the layouts of GPTQ and of AWQ, in words of 32 bits, that serving engines read.

For codes u from 0 to 2^b - 1 and weights (u - zero) · scale, of a matrix W [N, K] in G groups:

    GPTQ    qweight int32 [K·b/32, N]    a word holds neighbouring *inputs* k of one output, the first in the lowest bits
            qzeros  int32 [G, N·b/32]    zero - 1 in version 1, the usual one; zero in version 2
            scales  fp16  [G, N]         g_idx int32 [K]: the group of each input
    AWQ     qweight int32 [K, N/8]       a word holds eight neighbouring *outputs* n, in the order 0 2 4 6 1 3 5 7; 4 bits only
            qzeros  int32 [G, N/8]       in the same order
            scales  fp16  [G, N]

(IST-DASLab/gptq and AutoGPTQ's qlinear; mit-han-lab/llm-awq and AutoAWQ's "gemm".) A symmetric format's codes are moved up by 2^(b-1),
which then is their zero.
"""

from __future__ import annotations

import torch

from clawdemy_infer.quantization.format import TENSOR, Format
from clawdemy_infer.quantization.integers import IntFormat
from clawdemy_infer.quantization.packing import pack, unpack
from clawdemy_infer.quantization.quantized import Quantized

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight outputs lies in each four bits of a word, from the lowest: a GPU takes them apart in pairs."""


BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}


def holds(layout: str, format: Format) -> bool:
    """Can `layout`, "gptq" or "awq", say what `format` means?"""
    return isinstance(format, IntFormat) and format.bits in BITS[layout] and format.group != TENSOR and format.zero != "float"


def accepts(layout: str, format: Format, N: int, K: int) -> None:
    """ValueError where `layout` ("gptq", "awq" or "packed") cannot hold a matrix [N, K] of `format` without loss, naming which of them."""
    if layout == "packed":
        format.width(K)
        return
    if not holds(layout, format):
        raise ValueError(f"format={format.name}: the {layout} layout holds integers of {', '.join(map(str, BITS[layout]))} bits, symmetric "
                         "or with a whole zero point, with a scale for each row or group; the layout packed holds any format")
    whole = 32 // format.bits if 32 % format.bits == 0 else 32          # so many codes end where a word ends
    for size, what in ((N, "outputs"), (K, "inputs")):
        if size % whole:
            raise ValueError(f"weight {[N, K]}: the {layout} layout packs codes of {format.bits} bits in words of 32; a multiple of "
                             f"{whole} {what} is accepted")


def unsigned(quantized: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] and zeros [N, G] as both layouts count them, from 0: uint8."""
    if quantized.zero is not None:
        return quantized.codes, quantized.zero.to(torch.uint8)
    middle = 2 ** (quantized.format.bits - 1)
    return (quantized.codes.int() + middle).to(torch.uint8), torch.full_like(quantized.scale, middle, dtype=torch.uint8)


def gptq_version(quantized: list[Quantized]) -> int:
    """2 where some zero is 0, which version 1 cannot say: it would store -1."""
    return 2 if any(each.zero is not None and bool((each.zero == 0).any()) for each in quantized) else 1


def to_gptq(quantized: Quantized, version: int = 1) -> dict[str, torch.Tensor]:
    """The four tensors of the GPTQ layout. Raises ValueError for what it cannot hold."""
    accepts("gptq", quantized.format, *quantized.shape)
    codes, zeros = unsigned(quantized)
    bits, K = quantized.format.bits, codes.shape[1]
    group_of = torch.arange(K) // quantized.format.width(K) if quantized.group_of is None else quantized.group_of
    return {"qweight": _words(codes, bits).T.contiguous(), "qzeros": _words(zeros.T - (1 if version == 1 else 0), bits),
            "scales": quantized.scale.T.half().contiguous(), "g_idx": group_of.int()}


def from_gptq(stored: dict[str, torch.Tensor], format: IntFormat, version: int = 1) -> Quantized:
    """The matrix in the GPTQ layout, as `to_gptq` or another program wrote it. `format` is what its quantization_config says."""
    (G, N), bits, K = stored["scales"].shape, format.bits, stored["qweight"].shape[0] * 32 // format.bits
    codes = unpack(_bytes(stored["qweight"].T), bits, K)                                    # [N, K]
    zeros = unpack(_bytes(stored["qzeros"]), bits, N).T                                     # [N, G]
    zeros = zeros + 1 if version == 1 else zeros
    group_of = stored["g_idx"].long() if "g_idx" in stored else None
    if group_of is not None and torch.equal(group_of, torch.arange(K) // (K // G)):
        group_of = None
    return _restored(format, codes, zeros, stored["scales"], group_of)


def to_awq(quantized: Quantized) -> dict[str, torch.Tensor]:
    """The three tensors of the AWQ layout. Raises ValueError for what it cannot hold."""
    accepts("awq", quantized.format, *quantized.shape)
    if quantized.group_of is not None:
        raise ValueError("static_groups=False: the awq layout has no index of groups; GPTQ with static groups is accepted")
    codes, zeros = unsigned(quantized)

    def packed(x: torch.Tensor) -> torch.Tensor:
        return _words(x.T.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2), 4)

    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": quantized.scale.T.half().contiguous()}


def from_awq(stored: dict[str, torch.Tensor], format: IntFormat) -> Quantized:
    """The matrix in the AWQ layout."""
    N, order = stored["scales"].shape[1], torch.tensor(AWQ_ORDER).argsort()
    codes, zeros = (unpack(_bytes(stored[name]), 4, N).unflatten(-1, (-1, 8))[..., order].flatten(-2).T for name in ("qweight", "qzeros"))
    return _restored(format, codes, zeros, stored["scales"], None)


def _restored(format: IntFormat, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor,
              group_of: torch.Tensor | None) -> Quantized:
    scale, middle = scales.T.float().contiguous(), 2 ** (format.bits - 1)
    if format.zero == "none":
        if not bool((zeros == middle).all()):
            raise ValueError(f"qzeros: the config says that the weights are symmetric, but not every zero point is {middle}")
        return Quantized(format, (codes.int() - middle).to(torch.int8), scale, group_of=group_of)
    return Quantized(format, codes.contiguous(), scale, zeros.float().contiguous(), group_of=group_of)


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [..., n·bits/32] of codes [..., n], the first in the lowest bits. Four bytes make a word on any machine that runs torch."""
    return pack(codes.contiguous(), bits).view(torch.int32)


def _bytes(words: torch.Tensor) -> torch.Tensor:
    return words.contiguous().view(torch.uint8)
