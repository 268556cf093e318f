"""A quantized model as a Hugging Face directory: what serving engines load, and we too.

    config.json          the model, and a `quantization_config` that says how its matrices are stored
    model.safetensors    for each matrix its codes and scales (see `layouts`), everything else in fp16
    tokenizer.json       and its settings

Q, K and V are stored apart, as are gate and up: the rows of a quantized matrix do not know of each other. What neither of their two
layouts can hold, nf4 or mxfp4, is stored as `Quantized.packed` says, the layout "packed", for us alone to read.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clawdemy_infer.model import Decoder, ModelConfig, Tokenizer
from clawdemy_infer.model.weights import destinations, weight_files
from clawdemy_infer.quantization.format import TENSOR, Format
from clawdemy_infer.quantization.formats import format_named
from clawdemy_infer.quantization.hf_config import to_hf
from clawdemy_infer.quantization.integers import IntFormat
from clawdemy_infer.quantization.layouts import accepts, from_awq, from_gptq, gptq_version, holds, to_awq, to_gptq
from clawdemy_infer.quantization.linears import QuantizedModel, linears, with_matrices
from clawdemy_infer.quantization.quantized import Quantized

LAYOUTS = {"gptq": ("qweight", "qzeros", "scales", "g_idx"), "awq": ("qweight", "qzeros", "scales"),
           "packed": ("codes", "scale", "zero", "outer", "group_of")}
"""What each stores of a matrix: codes first."""
OPTIONAL = ("g_idx", "zero", "outer", "group_of")


def save_quantized(model: QuantizedModel, directory: str | Path, layout: str | None = None) -> Path:
    """Write `model` to a new directory, and return it. `layout` is "gptq", "awq" or "packed"; unless given, "awq" for AWQ in 4 bits, and
    "packed" for what "gptq" cannot hold.

    All of the directory is there, or nothing. Raises ValueError for a directory that exists, and for a format that the layout
    cannot hold.
    """
    layout = layout or layout_for(model.method, model.format)
    directory = can_save(model.decoder, model.format, directory, layout)
    parts = _apart(model)
    version = gptq_version(list(parts.values()))
    stored = {name: tensor.half().contiguous() for name, tensor in destinations(model.decoder).items()
              if name.removesuffix(".weight") not in parts}
    write = {"gptq": lambda tensor: to_gptq(tensor, version), "awq": to_awq, "packed": Quantized.packed}[layout]
    for name, tensor in parts.items():
        stored |= {f"{name}.{key}": value.clone() for key, value in write(tensor).items()}      # nvfp4's Q, K and V share a number
    settings = _settings(model, layout, version)

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".unfinished-") as scratch:
        fresh = Path(scratch) / directory.name
        fresh.mkdir()
        save_file(stored, fresh / "model.safetensors", metadata={"format": "pt"})
        config = to_hf(model.decoder.config) | {"dtype": "float16", "quantization_config": settings}
        (fresh / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
        if layout == "gptq":                                            # where AutoGPTQ looks for it
            (fresh / "quantize_config.json").write_text(json.dumps(settings, indent=2), "utf-8")
        if (tokenizer := model.decoder.tokenizer) is not None:
            tokenizer.backend.save(str(fresh / "tokenizer.json"))
            chat = {} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template}
            (fresh / "tokenizer_config.json").write_text(
                json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special, **chat}, indent=2), "utf-8")
        fresh.rename(directory)
    return directory


def layout_for(method: str, format: Format) -> str:
    """The layout in which others expect what `method` found, or "packed" where they know none."""
    if not holds("gptq", format):
        return "packed"
    return "awq" if method == "AWQ" and format.bits == 4 else "gptq"


def can_save(model: Decoder, format: Format, directory: str | Path, layout: str) -> Path:
    """`directory`, if `save_quantized` could write `model` in `format` there; the ValueError that it would raise, if not. To ask before
    the work is done.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: accepted are {', '.join(LAYOUTS)}")
    if Path(directory).exists():
        raise ValueError(f"out={str(directory)!r}: it exists already; the name of a new directory is accepted")
    for name, linear in linears(model).items():
        for height in _heights(model, name):
            accepts(layout, format, height, linear.weight.shape[1])
    return Path(directory)


def is_quantized(directory: str | Path) -> bool:
    """Does a config.json there say that its weights are quantized?"""
    config = Path(directory) / "config.json"
    return config.is_file() and '"quantization_config"' in config.read_text("utf-8")


def load_quantized(directory: str | Path, dtype: torch.dtype = torch.float32) -> QuantizedModel:
    """The model in a directory of the GPTQ or AWQ layout, ours or another program's, or of our own; `.decoder` computes in `dtype`.

    Raises ValueError for a directory that holds something else, naming what.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise ValueError(f"directory={str(directory)!r}: there is no config.json in it; a quantized model's directory is accepted")
    settings = json.loads((directory / "config.json").read_text("utf-8"))
    said = settings.pop("quantization_config", None)
    if said is None:
        raise ValueError(f"directory={str(directory)!r}: no quantization_config in its config.json; `load_model` reads models without")
    format, layout, version = _format_of(said)
    config = ModelConfig.from_hf(settings, name=directory.name, source=str(directory / "config.json"))

    found: dict[str, torch.Tensor] = {}
    for file in weight_files(directory):
        try:
            found |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged, or not in safetensors format ({error})") from error
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    wanted = destinations(decoder)
    keys, parts = LAYOUTS[layout], {}
    read = {"gptq": lambda stored, shape: from_gptq(stored, format, version), "awq": lambda stored, shape: from_awq(stored, format),
            "packed": lambda stored, shape: Quantized.unpacked(format, shape, stored)}[layout]
    for stem in [name.removesuffix(f".{keys[0]}") for name in found if name.endswith(f".{keys[0]}")]:
        stored = {key: found.pop(f"{stem}.{key}") for key in keys if f"{stem}.{key}" in found}
        if absent := [key for key in keys if key not in stored and key not in OPTIONAL]:
            raise ValueError(f"{directory}: {stem}.{absent[0]}: missing")
        if f"{stem}.weight" not in wanted:
            raise ValueError(f"{directory}: {stem}: without a place in this model")
        parts[stem] = read(stored, wanted.pop(f"{stem}.weight").shape)
    found = {name: tensor for name, tensor in found.items() if not (name == "lm_head.weight" and config.shape.tied)}
    if wanted.keys() != found.keys():
        raise ValueError(f"{directory}: {', '.join(sorted(wanted.keys() ^ found.keys())[:5])}: missing, or without a place in this model")
    for name, place in wanted.items():
        place.copy_(found[name])
    decoder.tokenizer = Tokenizer.from_directory(directory)
    tensors = _together(parts, config)
    return QuantizedModel(said.get("method", layout.upper()), format, tensors, with_matrices(decoder, tensors))


# ---- names ----

FUSED = {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "out": ("self_attn.o_proj",),
         "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)}
"""Our matrices, and those of a Hugging Face checkpoint of which they are made."""


def _apart(model: QuantizedModel) -> dict[str, Quantized]:
    parts = {}
    for name, tensor in model.tensors.items():
        _, index, kind = name.split(".")
        start = 0
        for part, height in zip(FUSED[kind], _heights(model.decoder, name), strict=True):
            parts[f"model.layers.{index}.{part}"] = tensor.rows(slice(start, start + height))
            start += height
    return parts


def _heights(model: Decoder, name: str) -> list[int]:
    """Rows of each part of a matrix of ours."""
    shape = model.config.shape
    return {"qkv": [shape.N * shape.H, shape.K * shape.H, shape.K * shape.H], "out": [shape.D], "gate_up": [shape.F, shape.F],
            "down": [shape.D]}[name.rpartition(".")[2]]


def _together(parts: dict[str, Quantized], config: ModelConfig) -> dict[str, Quantized]:
    tensors = {}
    for index in range(config.shape.L):
        for kind, names in FUSED.items():
            absent = [name for name in names if f"model.layers.{index}.{name}" not in parts]
            if absent:
                raise ValueError(f"model.layers.{index}.{absent[0]}: it is not quantized; a model with all matrices quantized is accepted")
            rows = [parts[f"model.layers.{index}.{name}"] for name in names]
            first = rows[0]
            if any(not _same(first.group_of, row.group_of) for row in rows):
                raise ValueError(f"model.layers.{index}: {', '.join(names)} read one input, but their g_idx differ")
            tensors[f"layers.{index}.{kind}"] = first = replace(first, codes=torch.cat([row.codes for row in rows]))
            if first.format.group != TENSOR:                            # else all have the same one
                tensors[f"layers.{index}.{kind}"] = replace(
                    first, scale=torch.cat([row.scale for row in rows]),
                    zero=None if first.zero is None else torch.cat([row.zero for row in rows]))
    return tensors


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


# ---- quantization_config ----


def _settings(model: QuantizedModel, layout: str, version: int) -> dict:
    format = model.format
    if layout == "packed":
        return {"quant_method": layout, "format": format.name, "method": model.method}
    group = -1 if format.group is None else format.group
    common = {"quant_method": layout, "bits": format.bits, "group_size": group, "method": model.method}
    if layout == "awq":
        # The kernels read zero points always; those of a symmetric format are all 8.
        return common | {"zero_point": True, "version": "gemm", "sym": format.zero == "none"}
    return common | {"sym": format.zero == "none", "desc_act": any(each.group_of is not None for each in model.tensors.values()),
                     "checkpoint_format": "gptq" if version == 1 else "gptq_v2", "lm_head": False}


def _format_of(said: dict) -> tuple[Format, str, int]:
    layout, versions = said.get("quant_method"), {"gptq": 1, "gptq_v2": 2}
    if layout not in LAYOUTS:
        raise ValueError(f"quantization_config: quant_method={layout!r}: accepted are {', '.join(LAYOUTS)}")
    if layout == "packed":
        return format_named(str(said.get("format"))), layout, 1
    if layout == "awq" and str(said.get("version", "gemm")).lower() != "gemm":
        raise ValueError(f"quantization_config: version={said['version']!r}: 'gemm' is accepted")
    if said.get("checkpoint_format", "gptq") not in versions:
        raise ValueError(f"quantization_config: checkpoint_format={said['checkpoint_format']!r}: accepted are {', '.join(versions)}")
    group = said.get("group_size", 128)
    symmetric = said.get("sym", layout == "gptq")
    return (IntFormat(said.get("bits", 4), None if group == -1 else group, "none" if symmetric else "integer"), layout,
            versions[said.get("checkpoint_format", "gptq")])
