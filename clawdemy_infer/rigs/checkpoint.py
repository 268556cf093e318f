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
    settings_in,
    stored_tensors,
    to_hf,
    weight_files,
    write_json,
    write_model,
    written_whole,
)
from clawdemy_infer.files.layouts import LAYOUTS
from clawdemy_infer.files.tokenizer import Tokenizer
from clawdemy_infer.from_config.keys import Keys, read_object
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
        elif not (most := matrix.abs().max()) <= torch.finfo(torch.float16).max:
            raise ValueError(f"{name}: it holds {most:g}; it is saved in fp16, where at most 65504 "
                             "is accepted")
    return Path(directory)


# ---- loading ----


def is_quantized(directory: str | Path) -> bool:
    """Does a config.json there say that its weights are quantized?"""
    config = Path(directory) / "config.json"
    return config.is_file() and read_object(config).get("quantization_config") is not None


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
    settings = settings_in(directory)
    said = settings.pop("quantization_config", None)
    if said is None:
        raise ValueError(f"directory={str(directory)!r}: no quantization_config in its config.json;"
                         " `load_model` reads models without")
    keys = Keys(said if isinstance(said, dict) else {}, f"{file}: quantization_config")
    method, (format, layout, version) = keys.take("method", None), _format_of(keys)
    config = ModelConfig.from_hf(settings, directory.name, str(file))

    # 2. The matrices, each of several tensors.
    files = weight_files(directory)
    found = {key: (file, value) for file, key, value in stored_tensors(files, config)}
    decoder = empty_decoder(config, dtype, "cpu", files)
    wanted, parts = destinations(decoder), {}
    for stem in [name.removesuffix(".qweight") for name in found if name.endswith(".qweight")]:
        stored = {key: found.pop(f"{stem}.{key}")[1] for key in LAYOUTS[layout]
                  if f"{stem}.{key}" in found}
        for key in LAYOUTS[layout]:
            if key not in stored and key != "g_idx":
                raise ValueError(f"{directory}: {stem}.{key}: missing")
        if f"{stem}.weight" not in wanted:
            raise ValueError(f"{directory}: {stem}: without a place in this model")
        place = wanted.pop(f"{stem}.weight")
        try:
            part = (layouts.from_gptq(stored, format, version) if layout == "gptq"
                    else layouts.from_awq(stored, format))
        except ValueError as error:
            raise ValueError(f"{directory}: {stem}.{error}") from error
        if part.shape != place.shape:
            raise ValueError(f"{directory}: {stem} is {list(part.shape)}, "
                             f"but config.json makes it {list(place.shape)}")
        if stem in ("lm_head", "model.embed_tokens"):       # used, as the numbers its codes mean
            wanted[f"{stem}.weight"] = place
            found[f"{stem}.weight"] = directory, part.dequantize()
        else:
            parts[stem] = part

    # 3. All the rest.
    fill(wanted, ((file, key, value) for key, (file, value) in found.items()), directory)
    decoder.tokenizer = Tokenizer.from_directory(directory)
    tensors = _together(parts, config)
    return QuantizedModel(str(method or layout.upper()), format, tensors,
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


CHANGES_NOTHING = frozenset(
    # How the codes were found, what they were found for, and how other programs run them.
    "damp_percent damp_auto_increment true_sequential static_groups mse dataset batch_size "
    "tokenizer model_name_or_path model_file_base_name model_seqlen block_name_to_quantize "
    "pad_token_id module_name_preceding_first_block modules_in_block_to_quantize "
    "cache_block_outputs meta uri exllama_config use_exllama disable_exllama max_input_length "
    "use_cuda_fp16 backend quantizer parallel offload_to_disk offload_to_disk_path "
    "act_group_aware desc_act lm_head vram_strategy modules_to_not_convert modules_to_fuse "
    "do_fuse fuse_max_seq_len act_order hyb_act gptaq gptaq_alpha fail_safe "
    "auto_forward_data_parallel compute_device_filter is_marlin_format".split())
"""Keys of a quantization_config. Whether the order was changed, and whether the head has codes, is
seen in the tensors."""


def _format_of(keys: Keys) -> tuple[IntFormat, str, int]:
    """Format, layout and version of GPTQ's. Raises ValueError naming any key that is neither used
    nor known to change nothing."""
    layout, versions = keys.take("quant_method", None), {"gptq": 1, "gptq_v2": 2}
    if layout not in tuple(LAYOUTS):                    # a tuple, for the value may be a list
        raise ValueError(
            f"{keys.source}: quant_method={layout!r}: accepted are {', '.join(LAYOUTS)}")
    kernels = keys.take("version", "gemm") if layout == "awq" else "gemm"
    if str(kernels).lower() != "gemm":
        raise ValueError(f"{keys.source}: version={kernels!r}: 'gemm' is accepted")
    written_as = keys.take("checkpoint_format", keys.left.get("format") or layout)
    keys.only(format=written_as, pack_dtype="int32", is_marlin_format=False, zero_point=True)
    if written_as not in ((*versions, "awq", "gemm") if layout == "awq" else tuple(versions)):
        raise ValueError(f"{keys.source}: checkpoint_format={written_as!r}: accepted are "
                         f"{', '.join(versions)}")
    bits, group = keys.whole("bits", 4), keys.take("group_size", 128)
    if type(group) is not int or (group < 1 and group != -1):
        keys.refuse("group_size", group, "a whole number, 1 or more, or -1 for a row")
    symmetric = keys.flag("sym", layout == "gptq")
    for key, value in keys.left.items():
        if value not in (None, False, {}, []) and key not in CHANGES_NOTHING:
            keys.refuse(key, value, "no such key, since it may change what the codes mean")
    return (IntFormat(bits, None if group == -1 else group, "none" if symmetric else "integer"),
            layout, versions.get(written_as, 1))
