"""A quantized model as a Hugging Face directory: what serving engines load, and we too.

    config.json          the model, and a `quantization_config` that says how its matrices are
                         stored
    model.safetensors    for each matrix its codes and scales (see `layouts`), everything else in
                         fp16
    tokenizer.json       and its settings

Q, K and V are stored apart, as are gate and up: the rows of a quantized matrix do not know of each
other.
"""

from dataclasses import replace
from pathlib import Path

import torch

from clawdemy_infer.files import layouts
from clawdemy_infer.files.directory import (
    FUSED,
    destinations,
    empty_decoder,
    fill,
    read_json,
    stored_tensors,
    to_hf,
    write_json,
    write_model,
    written_whole,
)
from clawdemy_infer.files.layouts import LAYOUTS
from clawdemy_infer.files.tokenizer import Tokenizer
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.quantization.format import Format, Quantized
from clawdemy_infer.quantization.integers import IntFormat
from clawdemy_infer.quantization.linears import QuantizedModel, with_matrices

# ---- saving ----


def save_quantized(model: QuantizedModel, directory: str | Path, layout: str | None = None) -> Path:
    """Write `model` to a new directory, and return it. `layout` is "gptq" or "awq"; unless given,
    "awq" for AWQ in 4 bits.

    All of the directory is there, or nothing. Raises ValueError for a directory that exists, and
    for a format that the layout cannot hold.
    """
    layout = layout or layout_for(model.method, model.format)
    directory = can_save(model.decoder, model.format, directory, layout)
    parts = _apart(model)
    version = layouts.gptq_version(list(parts.values()))
    stored = {name: tensor.half().contiguous()
              for name, tensor in destinations(model.decoder).items()
              if name.removesuffix(".weight") not in parts}
    for name, tensor in parts.items():
        written = layouts.to_gptq(tensor, version) if layout == "gptq" else layouts.to_awq(tensor)
        stored |= {f"{name}.{key}": value for key, value in written.items()}
    settings, tokenizer = _settings(model, layout, version), model.decoder.tokenizer
    about = {}
    if tokenizer is not None:
        about = tokenizer.special | {"chat_template": tokenizer.chat_template}
    with written_whole(directory) as fresh:
        config = to_hf(model.decoder.config) | {"dtype": "float16", "quantization_config": settings}
        write_model(fresh, config, stored, tokenizer and tokenizer.backend, about)
        if layout == "gptq":                                            # AutoGPTQ looks for it
            write_json(fresh / "quantize_config.json", settings)
    return directory


def layout_for(method: str, format: Format) -> str:
    """The layout in which others expect what `method` found."""
    return "awq" if method == "AWQ" and format.bits == 4 else "gptq"


def can_save(model: Decoder, format: Format, directory: str | Path, layout: str) -> Path:
    """`directory`, if `save_quantized` could write `model` in `format` there; the ValueError that
    it would raise, if not. To ask before the work is done."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: accepted are {', '.join(LAYOUTS)}")
    if Path(directory).exists():
        raise ValueError(
            f"out={str(directory)!r}: it exists already; the name of a new directory is accepted")
    for name, matrix in destinations(model).items():
        if name.endswith("_proj.weight"):
            layouts.accepts(layout, format, *matrix.shape)
    return Path(directory)


# ---- loading ----


def is_quantized(directory: str | Path) -> bool:
    """Does a config.json there say that its weights are quantized?"""
    config = Path(directory) / "config.json"
    return config.is_file() and '"quantization_config"' in config.read_text("utf-8")


def load_quantized(directory: str | Path, dtype: torch.dtype = torch.float32) -> QuantizedModel:
    """The model in a directory of the GPTQ or AWQ layout, ours or another program's; `.decoder`
    computes in `dtype`.

    Raises ValueError for a directory that holds something else, naming what.
    """
    # 1. What it says of itself.
    directory, file = Path(directory), Path(directory) / "config.json"
    if not file.is_file():
        raise ValueError(f"directory={str(directory)!r}: there is no config.json in it; "
                         "a quantized model's directory is accepted")
    settings = read_json(file)
    said = settings.pop("quantization_config", None)
    if said is None:
        raise ValueError(f"directory={str(directory)!r}: no quantization_config in its config.json;"
                         " `load_model` reads models without")
    format, layout, version = _format_of(said)
    config = ModelConfig.from_hf(settings, directory.name, str(file))

    # 2. The matrices, each of several tensors.
    found = {key: (file, value) for file, key, value in stored_tensors(directory, config)}
    decoder = empty_decoder(config, dtype, "cpu")
    wanted, parts = destinations(decoder), {}
    for stem in [name.removesuffix(".qweight") for name in found if name.endswith(".qweight")]:
        stored = {key: found.pop(f"{stem}.{key}")[1] for key in LAYOUTS[layout]
                  if f"{stem}.{key}" in found}
        for key in LAYOUTS[layout]:
            if key not in stored and key != "g_idx":
                raise ValueError(f"{directory}: {stem}.{key}: missing")
        if f"{stem}.weight" not in wanted:
            raise ValueError(f"{directory}: {stem}: without a place in this model")
        shape = wanted.pop(f"{stem}.weight").shape
        parts[stem] = (layouts.from_gptq(stored, format, version) if layout == "gptq"
                       else layouts.from_awq(stored, format))
        if parts[stem].shape != shape:
            raise ValueError(f"{directory}: {stem} is {list(parts[stem].shape)}, "
                             f"but config.json makes it {list(shape)}")

    # 3. All the rest.
    fill(wanted, ((file, key, value) for key, (file, value) in found.items()), directory)
    decoder.tokenizer = Tokenizer.from_directory(directory)
    tensors = _together(parts, config)
    return QuantizedModel(said.get("method", layout.upper()), format, tensors,
                          with_matrices(decoder, tensors))


# ---- fused and apart ----


def _apart(model: QuantizedModel) -> dict[str, Quantized]:
    places, parts = destinations(model.decoder), {}
    for name, tensor in model.tensors.items():
        _, index, kind = name.split(".")
        start = 0
        for part in (f"model.layers.{index}.{part}" for part in FUSED[kind]):
            end = start + len(places[f"{part}.weight"])
            parts[part], start = tensor.rows(slice(start, end)), end
    return parts


def _together(parts: dict[str, Quantized], config: ModelConfig) -> dict[str, Quantized]:
    tensors = {}
    for prefix in (f"layers.{index}" for index in range(config.shape.L)):
        for kind, names in FUSED.items():
            for name in names:
                if f"model.{prefix}.{name}" not in parts:
                    raise ValueError(f"model.{prefix}.{name}: it is not quantized; a model with "
                                     "all matrices quantized is accepted")
            rows = [parts[f"model.{prefix}.{name}"] for name in names]
            first = rows[0]
            orders = [None if row.group_of is None else row.group_of.tolist() for row in rows]
            if any(order != orders[0] for order in orders):
                raise ValueError(f"model.{prefix}: {', '.join(names)} read one input, but their "
                                 "g_idx differ")
            zero = None if first.zero is None else torch.cat([row.zero for row in rows])
            tensors[f"{prefix}.{kind}"] = replace(
                first, codes=torch.cat([row.codes for row in rows]),
                scale=torch.cat([row.scale for row in rows]), zero=zero)
    return tensors


# ---- quantization_config ----


def _settings(model: QuantizedModel, layout: str, version: int) -> dict:
    format = model.format
    common = {"quant_method": layout, "bits": format.bits, "method": model.method,
              "group_size": -1 if format.group is None else format.group,
              "sym": format.zero == "none"}
    if layout == "awq":
        # The kernels read zero points always; those of a symmetric format are all 8.
        return common | {"zero_point": True, "version": "gemm"}
    reordered = any(each.group_of is not None for each in model.tensors.values())
    return common | {"desc_act": reordered, "lm_head": False,
                     "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}


def _format_of(said: dict) -> tuple[IntFormat, str, int]:
    """Format, layout and version of GPTQ's."""
    layout, versions = said.get("quant_method"), {"gptq": 1, "gptq_v2": 2}
    if layout not in LAYOUTS:
        raise ValueError(
            f"quantization_config: quant_method={layout!r}: accepted are {', '.join(LAYOUTS)}")
    if layout == "awq" and str(said.get("version", "gemm")).lower() != "gemm":
        raise ValueError(f"quantization_config: version={said['version']!r}: 'gemm' is accepted")
    written_as = said.get("checkpoint_format", "gptq")
    if written_as not in versions:
        raise ValueError(f"quantization_config: checkpoint_format={written_as!r}: accepted are "
                         f"{', '.join(versions)}")
    group = said.get("group_size", 128)
    zero = "none" if said.get("sym", layout == "gptq") else "integer"
    return (IntFormat(said.get("bits", 4), None if group == -1 else group, zero), layout,
            versions[written_as])
