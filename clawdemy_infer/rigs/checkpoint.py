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
from itertools import product
from pathlib import Path

import torch

from clawdemy_infer.files import directory as hf
from clawdemy_infer.files import layouts
from clawdemy_infer.files.layouts import LAYOUTS
from clawdemy_infer.files.tokenizer import Tokenizer
from clawdemy_infer.from_config.keys import Keys, read_object, tables
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.paths import Refused
from clawdemy_infer.quantization.format import Format, Quantized
from clawdemy_infer.quantization.integers import IntFormat
from clawdemy_infer.quantization.linears import QuantizedModel, with_matrices


def save_quantized(model: QuantizedModel, directory: str | Path, layout: str | None = None) -> Path:
    """Write `model` to a new directory, all of it or nothing, and return that. `layout` is "gptq"
    or "awq"; unless given, "awq" for AWQ in 4 bits. Raises ValueError for a directory that exists,
    and for a format that the layout cannot hold."""
    layout = layout or layout_for(model.method, model.format)
    directory = can_save(model.decoder, model.format, directory, layout)
    parts = _apart(model)
    version = layouts.gptq_version(list(parts.values()))
    stored = {name: tensor.half().contiguous()
              for name, tensor in hf.destinations(model.decoder).items()
              if name.removesuffix(".weight") not in parts}
    for name, tensor in parts.items():
        written = layouts.to_gptq(tensor, version) if layout == "gptq" else layouts.to_awq(tensor)
        stored |= {f"{name}.{key}": value for key, value in written.items()}
    settings, tokenizer = _settings(model, layout, version), model.decoder.tokenizer
    about = tokenizer.special | {"chat_template": tokenizer.chat_template} if tokenizer else {}
    with hf.written_whole(directory) as fresh:
        config = hf.to_hf(model.decoder.config)
        config |= {"dtype": "float16", "quantization_config": settings}
        hf.write_model(fresh, config, stored, tokenizer and tokenizer.backend, about)
        if layout == "gptq":                                            # AutoGPTQ looks for it
            hf.write_json(fresh / "quantize_config.json", settings)
    return directory


def layout_for(method: str, format: Format) -> str:
    """The layout in which others expect what `method` found."""
    return "awq" if method == "AWQ" and format.bits == 4 else "gptq"


def can_save(model: Decoder, format: Format, directory: str | Path, layout: str) -> Path:
    """`directory`, if `save_quantized` could write `model` in `format` there; the ValueError that
    it would raise, if not. To ask before the work is done."""
    if layout not in LAYOUTS:
        raise Refused("", "layout", layout, ", ".join(LAYOUTS))
    if Path(directory).exists():
        raise Refused("", "out", str(directory), "a directory that does not exist yet")
    for name, matrix in hf.destinations(model).items():
        if name.endswith("_proj.weight"):
            layouts.accepts(layout, format, *matrix.shape)
        elif not (most := matrix.abs().max()) <= torch.finfo(torch.float16).max:
            raise Refused("", name, float(most), "at most 65504, since it is saved in fp16")
    return Path(directory)


def is_quantized(directory: str | Path) -> bool:
    """Does a config.json there say that its weights are quantized?"""
    config = Path(directory) / "config.json"
    return config.is_file() and read_object(config).get("quantization_config") is not None


def load_quantized(directory: str | Path) -> QuantizedModel:
    """The model in a directory of the GPTQ or AWQ layout, ours or another program's, to compute in
    fp32. ValueError naming what is something else; FileNotFoundError without a config.json."""
    # 1. What it says of itself.
    directory, file = Path(directory), Path(directory) / "config.json"
    settings = hf.settings_in(directory)
    said = settings.pop("quantization_config", None)
    if said is None:
        raise Refused(file, "quantization_config")      # `load_model` reads models without
    keys = Keys(said if isinstance(said, dict) else {}, f"{file}: quantization_config")
    method, (format, layout, version) = keys.take("method", None), _format_of(keys)
    config = ModelConfig.from_hf(settings, directory.name, str(file))

    # 2. The matrices, each of several tensors.
    files = hf.weight_files(directory)
    found = {key: (file, value) for file, key, value in hf.stored_tensors(files, config)}
    decoder = hf.empty_decoder(config, torch.float32, "cpu", files)
    wanted, parts = hf.destinations(decoder), {}
    stems = [name.removesuffix(".weight") for name in wanted]
    for stem in [stem for stem in stems if f"{stem}.qweight" in found]:
        stored = {key: found.pop(f"{stem}.{key}")[1] for key in LAYOUTS[layout]
                  if f"{stem}.{key}" in found}
        if absent := [key for key in LAYOUTS[layout] if key not in stored and key != "g_idx"]:
            raise Refused(directory, f"{stem}.{absent[0]}")
        place = wanted.pop(f"{stem}.weight")
        try:
            part = (layouts.from_gptq(stored, format, version) if layout == "gptq"
                    else layouts.from_awq(stored, format))
        except Refused as error:
            raise Refused(directory, f"{stem}.{error.key}", error.value, error.accepted,
                          error.why) from error
        if part.shape != place.shape:
            raise Refused(directory, stem, list(part.shape),
                          f"{list(place.shape)}, as config.json makes it")
        if stem in ("lm_head", "model.embed_tokens"):       # used, as the numbers its codes mean
            wanted[f"{stem}.weight"] = place
            found[f"{stem}.weight"] = directory, part.dequantize()
        else:
            parts[stem] = part

    # 3. All the rest.
    hf.fill(wanted, ((file, key, value) for key, (file, value) in found.items()), directory)
    decoder.tokenizer = Tokenizer.from_directory(directory)
    tensors = _together(parts, config)
    return QuantizedModel(str(method or layout.upper()), format, tensors,
                          with_matrices(decoder, tensors))


def _apart(model: QuantizedModel) -> dict[str, Quantized]:
    places, parts = hf.destinations(model.decoder), {}
    for name, tensor in model.tensors.items():
        _, index, kind = name.split(".")
        start = 0
        for part in (f"model.layers.{index}.{part}" for part in hf.FUSED[kind]):
            end = start + len(places[f"{part}.weight"])
            parts[part], start = tensor.rows(slice(start, end)), end
    return parts


def _together(parts: dict[str, Quantized], config: ModelConfig) -> dict[str, Quantized]:
    tensors = {}
    for index, (kind, names) in product(range(config.shape.L), hf.FUSED.items()):
        stems = [f"model.layers.{index}.{name}" for name in names]
        if unquantized := [stem for stem in stems if stem not in parts]:
            raise Refused(config.shape.source, unquantized[0], why="is not quantized, as all are")
        rows = [parts[stem] for stem in stems]
        orders = [None if row.group_of is None else row.group_of.tolist() for row in rows]
        if any(order != orders[0] for order in orders):
            raise Refused(config.shape.source, "g_idx", why=f"differs between {', '.join(stems)}")
        zero = None if rows[0].zero is None else torch.cat([row.zero for row in rows])
        tensors[f"layers.{index}.{kind}"] = replace(
            rows[0], codes=torch.cat([row.codes for row in rows]),
            scale=torch.cat([row.scale for row in rows]), zero=zero)
    return tensors


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


def _format_of(keys: Keys) -> tuple[IntFormat, str, int]:
    """Format, layout and GPTQ's version. ValueError for a key that may change what codes mean."""
    layout, versions = keys.take("quant_method", None), {"gptq": 1, "gptq_v2": 2}
    if layout not in tuple(LAYOUTS):                    # a tuple, for the value may be a list
        keys.refuse("quant_method", layout, ", ".join(LAYOUTS))
    kernels = keys.take("version", "gemm") if layout == "awq" else "gemm"
    if str(kernels).lower() != "gemm":
        keys.refuse("version", kernels, "gemm")
    written_as = keys.take("checkpoint_format", keys.left.get("format") or layout)
    keys.only(format=written_as, pack_dtype="int32", is_marlin_format=False, zero_point=True)
    if written_as not in ((*versions, "awq", "gemm") if layout == "awq" else tuple(versions)):
        keys.refuse("checkpoint_format", written_as, ", ".join(versions))
    bits, group = keys.whole("bits", 4, 2, 8), keys.take("group_size", 128)
    if type(group) is not int or (group < 1 and group != -1):
        keys.refuse("group_size", group, "a whole number, 1 or more, or -1 for a row")
    zero = "none" if keys.flag("sym", layout == "gptq") else "integer"
    keys.drop(*tables()["_quantization"]["same_codes"].split())
    for key, value in keys.left.items():
        if value not in (None, False, {}, []):
            keys.refuse(key, value, "no such key, since it may change what the codes mean")
    return IntFormat(bits, group if group > 0 else None, zero), layout, versions.get(written_as, 1)
