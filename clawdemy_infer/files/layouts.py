"""How a quantized matrix lies in a file: the layouts of GPTQ and of AWQ, in words of 32 bits, which
serving engines read.

For codes u from 0 to 2^b - 1 and weights (u - zero) · scale, of a matrix W [O, I] in G groups:

    GPTQ    qweight int32 [I·b/32, O]    a word holds neighbouring *inputs* i of one output, the
                                         first in the lowest bits
            qzeros  int32 [G, O·b/32]    zero in version 2; in version 1, the usual one, each word
                                         less 1 in every code, as whole numbers modulo 2^32
            scales  fp16  [G, O]         g_idx int32 [I]: the group of each input
    AWQ     qweight int32 [I, O/8]       a word holds eight neighbouring *outputs* o, in the order
                                         0 2 4 6 1 3 5 7; 4 bits only
            qzeros  int32 [G, O/8]       in the same order
            scales  fp16  [G, O]

(IST-DASLab/gptq and AutoGPTQ's qlinear; mit-han-lab/llm-awq and AutoAWQ's "gemm".) A symmetric
format's codes are moved up by 2^(b-1), which then is their zero. Four bytes make a word on any
machine that runs torch."""

import torch

from clawdemy_infer.fast.codes import pack, unpack
from clawdemy_infer.paths import Refused
from clawdemy_infer.quantization.format import Format, Quantized
from clawdemy_infer.quantization.integers import IntFormat

LAYOUTS = {"gptq": ("qweight", "qzeros", "scales", "g_idx"), "awq": ("qweight", "qzeros", "scales")}
"""What each stores of a matrix; g_idx may be absent."""
LAYOUT_BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight outputs lies in each four bits of a word, from the lowest: a GPU takes them apart
in pairs."""


def accepts(layout: str, format: Format, O: int, I: int) -> None:
    """Refused where `layout` cannot hold a matrix [O, I] of `format` without loss."""
    bits = LAYOUT_BITS[layout]
    if not isinstance(format, IntFormat) or format.bits not in bits or format.zero == "float":
        raise Refused("", "format", format.name, (
            f"integers of {', '.join(map(str, bits))} bits, symmetric or with a whole zero point, "
            f"with a scale for each row or group, as the {layout} layout holds them"))
    if format.group and I % format.group:
        raise Refused("", "group_size", format.group, f"a divisor of the {I} inputs of a row")
    codes = 32 // format.bits if 32 % format.bits == 0 else 32          # end where a word ends
    for size, what in ((O, "outputs"), (I, "inputs")):
        if size % codes:
            raise Refused("", "weight", [O, I], f"a multiple of {codes} {what}, since the {layout} "
                          f"layout packs codes of {format.bits} bits in words of 32")


def gptq_version(quantized: list[Quantized]) -> int:
    """2 where some zero is 0, which version 1 cannot say: it would store -1."""
    return 2 if any(each.zero is not None and bool((each.zero == 0).any())
                    for each in quantized) else 1


def to_gptq(quantized: Quantized, version: int = 1) -> dict[str, torch.Tensor]:
    """The four tensors of the GPTQ layout. Raises ValueError for what it cannot hold."""
    accepts("gptq", quantized.format, *quantized.shape)
    codes, zeros = _unsigned(quantized)
    bits, I, group_of = quantized.format.bits, codes.shape[1], quantized.group_of
    if group_of is None:
        group_of = torch.arange(I) // quantized.format.width(I)
    return {"qweight": pack(codes, bits).view(torch.int32).T.contiguous(),
            "qzeros": pack(zeros.T - (1 if version == 1 else 0), bits).view(torch.int32),
            "scales": quantized.scale.T.half().contiguous(), "g_idx": group_of.int()}


def from_gptq(stored: dict[str, torch.Tensor], format: IntFormat, version: int = 1) -> Quantized:
    """The matrix in the GPTQ layout, as `to_gptq` or another program wrote it. `format` is what its
    quantization_config says. Raises ValueError naming a tensor that does not fit, or is damaged."""
    bits = format.bits
    words, O = _matrix(stored)
    I = words * 32 // bits
    accepts("gptq", format, O, I)
    G = I // format.width(I)
    _expect(stored, qweight=(I * bits // 32, O), qzeros=(G, O * bits // 32), scales=(G, O),
            g_idx=(I,))
    codes = unpack(stored["qweight"].T, bits, I)                                            # [O, I]
    raw = unpack(stored["qzeros"], bits, O)                                                 # [G, O]
    zeros = raw if version == 2 else _plus_one(raw, bits)
    middle = 2 ** (bits - 1)
    if format.zero == "none" and bool((raw == middle).all() or (raw == middle - 1).all()):
        zeros = torch.full_like(raw, middle)        # as in either version, whatever the label says
    group_of = stored["g_idx"].long() if "g_idx" in stored else None
    if group_of is not None:
        if not bool(((group_of >= 0) & (group_of < G)).all()):
            raise Refused("", "g_idx", int(group_of.max()), f"groups 0 to {G - 1}")
        # Zeros for all inputs are what is left where nobody filled them in: no reordering.
        if not group_of.any() or torch.equal(group_of, torch.arange(I) // (I // G)):
            group_of = None
    return _restored(format, codes, zeros.T, stored["scales"], group_of)


def _plus_one(raw: torch.Tensor, bits: int) -> torch.Tensor:
    """The zero points [G, O] of version 1, from its codes: what was taken off whole words is added
    to whole words, carries included (GPTQModel, `convert_gptq_v1_to_v2_format_module`). A zero of 0
    was borrowed from its neighbour. Codes of 3 bits lie across words: three words count as one.

    AutoGPTQ lets a zero of 0, as -1, set all bits above it instead. Raises ValueError for such a
    file: no code of all ones is then followed by another, and its neighbours are lost."""
    per, most = (32 // bits if 32 % bits == 0 else 32), 2**bits - 1
    fields = raw.unflatten(-1, (-1, per)).int()                                 # [G, words, per]
    ones, inside = fields == most, torch.ones(per - 1, dtype=torch.bool)
    if bits == 3:
        inside[[9, 10, 20, 21]] = False                     # the neighbour begins in another word
    before, after = ones[..., :-1][..., inside], ones[..., 1:][..., inside]
    if bool((before & after).any()) and not bool((before & ~after).any()):
        raise Refused("", "qzeros", accepted="the model saved as gptq_v2", why=(
            "has zero points of 0 that have written over their neighbours (packed as -1)"))
    carry = torch.zeros_like(fields[..., 0])
    for i in range(per):
        total = fields[..., i] + 1 + carry
        fields[..., i], carry = total & most, total >> bits
    return fields.flatten(-2).to(torch.uint8)


def _matrix(stored: dict[str, torch.Tensor]) -> tuple[int, int]:
    shape = tuple(stored["qweight"].shape)
    if len(shape) != 2 or 0 in shape:
        raise Refused("", "qweight", shape, "a matrix")
    return shape


def _expect(stored: dict[str, torch.Tensor], **shapes: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape or kind, and a scale that is not finite."""
    for name, tensor in stored.items():
        kinds = ((torch.float16, torch.bfloat16, torch.float32) if name == "scales" else
                 (torch.int32, torch.int64) if name == "g_idx" else (torch.int32,))
        if tuple(tensor.shape) != shapes[name] or tensor.dtype not in kinds:
            raise Refused("", name, (tuple(tensor.shape), tensor.dtype),
                          f"{(shapes[name], kinds[0])}, as quantization_config makes it")
    if not stored["scales"].isfinite().all():
        raise Refused("", "scales", why="holds a number that is not finite")


def to_awq(quantized: Quantized) -> dict[str, torch.Tensor]:
    """The three tensors of the AWQ layout. Raises ValueError for what it cannot hold."""
    accepts("awq", quantized.format, *quantized.shape)
    if quantized.group_of is not None:
        raise Refused("", "static_groups", False,
                      "GPTQ with static groups, since the awq layout has no index of groups")
    eights = (x.T.unflatten(-1, (-1, 8))[..., AWQ_ORDER] for x in _unsigned(quantized))
    qweight, qzeros = (pack(x.flatten(-2), 4).view(torch.int32) for x in eights)
    return {"qweight": qweight, "qzeros": qzeros, "scales": quantized.scale.T.half().contiguous()}


def from_awq(stored: dict[str, torch.Tensor], format: IntFormat) -> Quantized:
    """The matrix in the AWQ layout. Raises ValueError naming a tensor that does not fit."""
    I, words = _matrix(stored)
    O = words * 8
    accepts("awq", format, O, I)
    G, order = I // format.width(I), torch.tensor(AWQ_ORDER).argsort()
    _expect(stored, qweight=(I, O // 8), qzeros=(G, O // 8), scales=(G, O))
    eights = (unpack(stored[name], 4, O).unflatten(-1, (-1, 8))
              for name in ("qweight", "qzeros"))
    codes, zeros = (each[..., order].flatten(-2).T for each in eights)
    return _restored(format, codes, zeros, stored["scales"], None)


def _unsigned(quantized: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [O, I] and zeros [O, G] as GPTQ and AWQ count them, from 0: uint8."""
    if quantized.zero is not None:
        return quantized.codes, quantized.zero.to(torch.uint8)
    middle = 2 ** (quantized.format.bits - 1)
    return ((quantized.codes.int() + middle).to(torch.uint8),
            torch.full_like(quantized.scale, middle, dtype=torch.uint8))


def _restored(format: IntFormat, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor,
              group_of: torch.Tensor | None) -> Quantized:
    scale, middle = scales.T.float().contiguous(), 2 ** (format.bits - 1)
    if format.zero != "none":
        return Quantized(format, codes.contiguous(), scale, zeros.float().contiguous(),
                         group_of=group_of)
    if not bool((zeros == middle).all()):
        raise Refused("", "qzeros", why="holds other zero points than symmetric weights have",
                      accepted=f"{middle}, since the config says sym")
    return Quantized(format, (codes.int() - middle).to(torch.int8), scale, group_of=group_of)
