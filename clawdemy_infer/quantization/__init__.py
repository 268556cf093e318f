"""Quantization: fewer bits for each weight, and what they cost in quality.

In reading order: `format` is the interface, `integers` and `floats` (on `minifloat`) are the number formats, `formats` finds them
by name; `quantized` is a matrix of codes, `packing` puts them into bytes; `linears` finds a model's matrices and rounds them to nearest.
Both sides in 8 bits: `int8_activations`, `llm_int8`, `smoothquant`. `text` and `evaluate` judge, `report` puts bytes, quality and
speed side by side, `fast` runs the codes. Better codes: `gptq`, and better scales: `awq`. `checkpoint` (on `layouts` and `hf_config`)
writes and reads the files of serving engines. `grid` is all of this in one large table, `clock` its times, `kept` the table on disk.
"""

from clawdemy_infer.quantization.awq import awq
from clawdemy_infer.quantization.checkpoint import is_quantized, load_quantized, save_quantized
from clawdemy_infer.quantization.evaluate import Quality, Reference, kl_by_layer, output_errors
from clawdemy_infer.quantization.fast import on_kernels, running
from clawdemy_infer.quantization.format import TENSOR, Format, Scales
from clawdemy_infer.quantization.formats import format_named
from clawdemy_infer.quantization.gptq import gptq
from clawdemy_infer.quantization.int8_activations import int8_activations
from clawdemy_infer.quantization.integers import IntFormat
from clawdemy_infer.quantization.linears import QuantizedModel, linears, observe, round_to_nearest, with_matrices, with_modules
from clawdemy_infer.quantization.llm_int8 import llm_int8
from clawdemy_infer.quantization.quantized import Quantized
from clawdemy_infer.quantization.report import Row, compare, draw, table
from clawdemy_infer.quantization.smoothquant import smoothed, smoothquant
from clawdemy_infer.quantization.text import calibration_tokens, evaluation_tokens, own_samples

__all__ = [
    "TENSOR", "Format", "IntFormat", "Quality", "Quantized", "QuantizedModel", "Reference", "Row", "Scales", "awq",
    "calibration_tokens", "compare", "draw", "evaluation_tokens", "format_named", "gptq", "int8_activations", "is_quantized",
    "kl_by_layer", "linears", "llm_int8", "load_quantized", "observe", "on_kernels", "output_errors", "own_samples", "round_to_nearest",
    "running", "save_quantized", "smoothed", "smoothquant", "table", "with_matrices", "with_modules",
]
