"""A quantized matrix: its codes, their scales, and the format that says what they mean."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from clawdemy_infer.quantization.format import Format, Scales
from clawdemy_infer.quantization.minifloat import E4M3
from clawdemy_infer.quantization.packing import pack, unpack


@dataclass(frozen=True, eq=False)
class Quantized:
    """codes [N, K], scale and zero [N, groups] in fp32 (of what is stored in fewer bits), outer a scalar.

    Column k belongs to group k // width; where GPTQ has reordered columns and kept no order of groups, to group_of[k].
    """

    format: Format
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    outer: torch.Tensor | None = None
    group_of: torch.Tensor | None = None

    @classmethod
    def of(cls, format: Format, weight: torch.Tensor) -> Quantized:
        """Round `weight` [N, K] to nearest, with the scales that its largest weights ask for.

        Raises ValueError for groups that do not divide a row, and for weights that are not finite or beyond an fp16 scale.
        """
        if weight.dim() != 2:
            raise ValueError(f"weight is {list(weight.shape)}: a matrix [N, K] is accepted")
        groups, outer = format.grouped(weight), format.outer(weight)
        scales = format.fit(groups, outer)
        if not scales.scale.isfinite().all() or not weight.isfinite().all():
            raise ValueError(f"{format.name}: the weights are not all finite, or too large for a scale")
        codes = format.encode(groups, scales).view(weight.shape)
        return cls(format, codes, scales.scale.squeeze(-1), None if scales.zero is None else scales.zero.squeeze(-1), outer)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self) -> torch.Tensor:
        """The weights that the codes mean, fp32 [N, K]."""
        if self.group_of is None:
            scales = Scales(self.scale[..., None], None if self.zero is None else self.zero[..., None], self.outer)
            return self.format.decode(self.format.grouped(self.codes), scales).view(self.shape)
        scale, zero = (None if x is None else x[:, self.group_of] for x in (self.scale, self.zero))         # [N, K]: one a column
        return self.format.decode(self.codes, Scales(scale, zero, self.outer))

    def rows(self, part: slice) -> Quantized:
        """Some rows: Q out of the fused Q, K and V. A matrix with one scale keeps it."""
        if self.scale.shape[0] == 1:
            return replace(self, codes=self.codes[part])
        return replace(self, codes=self.codes[part], scale=self.scale[part], zero=None if self.zero is None else self.zero[part])

    def packed(self) -> dict[str, torch.Tensor]:
        """The tensors that are stored, each in its own few bits."""
        stored = {"codes": pack(self.codes, self.format.bits)}
        stored["scale"] = {
            "fp16": lambda x: x.half(), "fp32": lambda x: x, "e4m3": E4M3.encode,
            "e8m0": lambda x: (torch.frexp(x).exponent + 126).to(torch.uint8),              # 2^(code - 127)
        }[self.format.scale_kind](self.scale)
        if self.zero is not None:
            whole = self.format.zero_bits == self.format.bits
            stored["zero"] = pack(self.zero.to(torch.uint8), self.format.bits) if whole else self.zero.half()
        if self.outer is not None:
            stored["outer"] = self.outer
        if self.group_of is not None:
            stored["group_of"] = self.group_of.int()
        return stored

    @classmethod
    def unpacked(cls, format: Format, shape: tuple[int, int], stored: dict[str, torch.Tensor]) -> Quantized:
        """What `packed` stored, of a matrix of `shape` [N, K]."""
        scale, zero = stored["scale"], stored.get("zero")
        if format.scale_kind == "e4m3":
            scale = E4M3.decode(scale)
        elif format.scale_kind == "e8m0":
            scale = torch.ldexp(torch.ones(scale.shape, device=scale.device), scale.int() - 127)
        if zero is not None and zero.dtype == torch.uint8:
            zero = unpack(zero, format.bits, scale.shape[-1])
        codes, group_of = unpack(stored["codes"], format.bits, shape[1], format.signed), stored.get("group_of")
        return cls(format, codes, scale.float(), None if zero is None else zero.float(), stored.get("outer"),
                   None if group_of is None else group_of.long())

    @property
    def nbytes(self) -> int:
        """Bytes of what `packed` stores: codes, scales, zeros. Counted, not packed."""
        (N, K), (rows, groups), format = self.shape, self.scale.shape, self.format
        size = N * _bytes(K, format.bits) + rows * groups * format.scale_bits // 8
        if self.zero is not None:
            size += rows * _bytes(groups, format.zero_bits)
        return size + (4 if self.outer is not None else 0) + (4 * K if self.group_of is not None else 0)

    @property
    def bits_per_weight(self) -> float:
        """Effective bits: those of the codes, and the share of a weight in its scales and zeros."""
        return 8 * self.nbytes / self.codes.numel()


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)                                        # a row ends with a whole byte
