"""One linear layer, five formats of its weights: fp32, fp16, bf16, int8, int4.

In reading order: `codes` (weights as integers), `kernels` (what PyTorch has to multiply by each format), `choice` (which of them is
fastest here, measured once), `layers` (what a model is made of).
"""

from clawdemy_infer.linear.choice import FLOATS, computes_in, copy_of, packable
from clawdemy_infer.linear.codes import Codes, int4_codes, int8_codes
from clawdemy_infer.linear.layers import Fast, Linear, PackedLinear

FORMATS = ("fp32", "fp16", "bf16", "int8", "int4")

__all__ = ["FLOATS", "FORMATS", "Codes", "Fast", "Linear", "PackedLinear", "computes_in", "copy_of", "int4_codes", "int8_codes", "packable"]
