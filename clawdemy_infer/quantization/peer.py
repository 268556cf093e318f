"""Our GPTQ beside that of llm-compressor, vLLM's own tool, on the same matrices, Hessians and grids; and our number formats beside
those of compressed-tensors, which it stores them in. Nothing else in the project needs them.

    make peer-llmcompressor
    .peers/llm-compressor/bin/python -m clawdemy_infer.quantization.peer

Its `quantize_weight` is the loop that it runs on each matrix. Both get the scales of round to nearest, without a search, so that what is
left to differ is the loop.
"""

from __future__ import annotations

import torch

from clawdemy_infer.model import load_model
from clawdemy_infer.quantization.format import Format
from clawdemy_infer.quantization.formats import format_named
from clawdemy_infer.quantization.gptq import gptq_matrix, hessian_of, output_error
from clawdemy_infer.quantization.linears import linears, observe
from clawdemy_infer.quantization.quantized import Quantized
from clawdemy_infer.quantization.text import calibration_tokens
from clawdemy_infer.tables import Table, si
from clawdemy_infer.timing import now

LAYERS = ("layers.4.out", "layers.9.down", "layers.14.qkv")
FORMAT = format_named("int4-g64")

FORMATS = {
    "int8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "int4-g64": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64},
    "int4-g64-asym": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64},
    "fp8-e4m3": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
    "nvfp4": {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16},
}
"""Formats that both have, by our name, as compressed-tensors describes them."""


def theirs(weight: torch.Tensor, hessian: torch.Tensor, format: Format, act_order: bool) -> torch.Tensor:
    """weight [N, K] by llm-compressor, as the numbers that its codes mean. It works on a batch of matrices: here of one."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    scale = Quantized.of(format, weight).scale
    settings = QuantizationArgs(num_bits=format.bits, symmetric=True, strategy="group", group_size=format.group,
                                actorder="weight" if act_order else None)
    zeros = torch.zeros_like(scale, dtype=torch.int8)
    return quantize_weight(weight[None].clone(), hessian[None].clone(), scale[None], zeros[None], None, settings)[0][0]


def rounded(weight: torch.Tensor, name: str) -> torch.Tensor:
    """weight [N, K] rounded to nearest by compressed-tensors, with the scales and zeros that ours has found."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    ours = Quantized.of(format_named(name), weight)
    zero = None if ours.zero is None else (ours.zero - 2 ** (ours.format.bits - 1)).to(torch.int8)      # theirs counts from the middle
    outer = None if ours.outer is None else 1 / ours.outer
    return fake_quantize(weight, ours.scale, zero, QuantizationArgs(**FORMATS[name]), global_scale=outer)


def formats_table(weight: torch.Tensor) -> Table:
    """In how many weights the two differ: those half-way between two numbers, which may become either."""
    rows = []
    for name in FORMATS:
        ours, other = Quantized.of(format_named(name), weight).dequantize(), rounded(weight, name)
        errors = [float((each - weight).norm() / weight.norm()) for each in (ours, other)]
        differ = int(((ours - other).abs() > 1e-6 * weight.abs().max()).sum())
        rows.append([name, *(f"{error:.4%}" for error in errors), f"{differ:,} of {weight.numel():,}"])
    header = ["format", "error, ours", "theirs", "weights that differ"]
    return Table(header, rows, numeric=header[1:], title="Rounding to nearest, beside compressed-tensors")


def main() -> None:
    try:
        from llmcompressor import __version__
    except ImportError:
        raise SystemExit("llm-compressor is not set up for this Python: run `make peer-llmcompressor`, then "
                         "`.peers/llm-compressor/bin/python -m clawdemy_infer.quantization.peer`") from None
    model = load_model("smollm2-135m")
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in LAYERS}
    observe(model, calibration_tokens(model.tokenizer, 8, 256), lambda name, x: inputs[name].append(x) if name in inputs else None)
    rows = []
    for name, xs in inputs.items():
        weight, H = linears(model)[name].weight, hessian_of(torch.cat(xs))
        theirs(weight[:64], H, FORMAT, True)                            # the first call imports
        for act_order in (True, False):
            start = now()
            ours = gptq_matrix(weight, H, FORMAT, act_order=act_order, search=False).dequantize()
            between = now()
            other = theirs(weight, H, FORMAT, act_order)
            seconds = between - start, now() - between
            errors = [output_error(weight, q, H) for q in (Quantized.of(FORMAT, weight).dequantize(), ours, other)]
            rows.append([name, "act-order" if act_order else "in order", *(f"{error:.4%}" for error in errors),
                         f"{errors[1] / errors[2]:.5f}", *(si(each, "s") for each in seconds)])
    header = ["matrix", "columns", "error of RTN", "ours", "theirs", "ours ÷ theirs", "time, ours", "time, theirs"]
    print(Table(header, rows, numeric=header[2:], title=f"GPTQ, {FORMAT}, beside llm-compressor {__version__}"))
    print(formats_table(linears(model)[LAYERS[0]].weight))


if __name__ == "__main__":
    main()
