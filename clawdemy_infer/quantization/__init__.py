"""Quantization: fewer bits for each weight."""

from clawdemy_infer.quantization.awq import awq
from clawdemy_infer.quantization.floats import format_named
from clawdemy_infer.quantization.format import Format, Quantized, Scales
from clawdemy_infer.quantization.gptq import gptq
from clawdemy_infer.quantization.integers import IntFormat
from clawdemy_infer.quantization.linears import QuantizedModel, linears, observe, round_to_nearest

__all__ = ["Format", "IntFormat", "Quantized", "QuantizedModel", "Scales", "awq", "format_named",
           "gptq", "linears", "observe", "round_to_nearest"]
