"""Formats by name: int8, int4-g64, int4-g64-asym, nf4, …"""

from __future__ import annotations

import difflib
import re

from clawdemy_infer.quantization.floats import FLOATS
from clawdemy_infer.quantization.format import TENSOR, Format
from clawdemy_infer.quantization.integers import IntFormat

ALIASES = {"q4_1": IntFormat(4, 32, "float")}
"""llama.cpp's Q4_1: 4 bits, and an fp16 scale and lowest weight for each 32."""

USUAL = ("int8", "int8-tensor", "int4-g32", "int4-g64", "int4-g64-asym", "int3-g64", "q4_1", *FLOATS)


def format_named(name: str) -> Format:
    """The format that `name` says: "int<bits>", then "-g<group>" or "-tensor" (else a scale for each row), then "-asym" (a whole
    zero point) or "-float" (the lowest weight itself); or one of fp8-e4m3, fp8-e5m2 (and -tensor), mxfp4, nvfp4, nf4, q4_1.

    Raises ValueError naming near ones.
    """
    if name in FLOATS or name in ALIASES:
        return FLOATS.get(name) or ALIASES[name]
    if found := re.fullmatch(r"int(\d+)(?:-g(\d+)|-(tensor))?(?:-(asym|float))?", name):
        bits, group, whole, zero = found.groups()
        return IntFormat(int(bits), int(group) if group else TENSOR if whole else None,
                         {None: "none", "asym": "integer", "float": "float"}[zero])
    near = difflib.get_close_matches(name, USUAL, n=3, cutoff=0.4) or USUAL
    raise ValueError(f"format={name!r} is not known; near ones: {', '.join(near)}")
