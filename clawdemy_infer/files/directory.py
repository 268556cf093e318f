"""A Hugging Face directory: config.json, *.safetensors, tokenizer.json. Read, each stored tensor
goes to its place in the decoder's fused matrices; written, all of it is there or nothing."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clawdemy_infer.files.tokenizer import Tokenizer
from clawdemy_infer.from_config.keys import read_object, tables
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.paths import Refused, unfinished

MAX_PARAMETERS_PER_BYTE = 4     # in any layout that is read: codes have 2 bits or more

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def read_directory(directory: Path, dtype: torch.dtype, device: torch.device | str,
                   name: str = "") -> Decoder:
    """The model in `directory`, its weights in `dtype` on `device`.

    Raises Refused for a config that this decoder does not run, for weights that are missing, left
    over, stored twice, of another shape or in a damaged file, and for weights in any format but
    safetensors, which alone cannot carry code."""
    config = ModelConfig.from_hf(settings_in(directory), name or directory.name,
                                 str(directory / "config.json"))
    files = weight_files(directory)
    model = empty_decoder(config, dtype, device, files)
    fill(destinations(model), stored_tensors(files, config), directory)
    model.tokenizer = Tokenizer.from_directory(directory)
    return model


def settings_in(directory: Path) -> dict[str, Any]:
    """The keys of config.json. What ends a generation is said in generation_config.json where there
    is one: a chat model may have several such tokens."""
    settings = read_object(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.exists() and (eos := read_object(generation).get("eos_token_id")) is not None:
        settings["eos_token_id"] = eos
    return settings


def empty_decoder(config: ModelConfig, dtype: torch.dtype, device: torch.device | str,
                  files: Sequence[Path]) -> Decoder:
    """A decoder whose weights are still to be filled in from `files`. Raises Refused, before
    anything is allocated, where they cannot hold as many."""
    shape, held = config.shape, sum(file.stat().st_size for file in files)
    if (count := shape.parameters()) > MAX_PARAMETERS_PER_BYTE * held:
        raise Refused(shape.source, None, why=(
            f"num_hidden_layers={shape.L}, hidden_size={shape.D}, num_attention_heads={shape.N}, "
            f"intermediate_size={shape.F} and vocab_size={shape.V} make {count:,} parameters, "
            f"which {files[0]} and the like, {held:,} bytes, cannot hold"))
    with torch.device("meta"):          # no time spent on random numbers that would be overwritten
        model = Decoder(config)
    return model.to(dtype).to_empty(device=device).eval().requires_grad_(False)


def stored_tensors(files: Sequence[Path],
                   config: ModelConfig) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """File, name and tensor of all that `files` hold, but for what is no weight: the
    embedding table that a tied model stores again as its head, and RoPE's frequencies, which old
    files stored. Raises Refused for a damaged file, and for a name that comes twice."""
    seen = set()
    for file in files:
        with opened(file) as tensors:
            for key in tensors.keys():
                if key in seen:
                    raise Refused(file, key, why="is stored twice")
                seen.add(key)
                if not (key == "lm_head.weight" and config.shape.tied
                        or key.endswith(".rotary_emb.inv_freq")):
                    yield file, key, tensors.get_tensor(key)


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise Refused(file, None, why=f"damaged, or not in safetensors format ({error})") from error


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights: those named in the index of a sharded model, else
    model.safetensors."""
    index, names = directory / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        said = read_object(index).get("weight_map")
        names = list(said.values()) if said and isinstance(said, dict) else [None]
        for name in names:
            if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise Refused(index, "weight_map", name or said,
                              "for each tensor a file in the same folder")
    files = sorted({directory / name for name in names})
    for file in files:
        if not file.is_file():                                          # a FIFO is none
            pickled = [each.name for each in directory.iterdir() if each.suffix in PICKLES]
            raise Refused(directory, file.name, accepted="safetensors weights alone", why=(
                f"is missing. {min(pickled)} is a pickle, which can run code when it is read"
                if pickled else "is missing"))
        with opened(file):              # or it says that the file is torn
            pass
    return files


FUSED = {"qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
         "out": ("self_attn.o_proj",), "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
         "down": ("mlp.down_proj",)}
"""Our matrices, and those of a Hugging Face checkpoint of which they are made, in order."""


def destinations(model: Decoder) -> dict[str, torch.Tensor]:
    """Hugging Face's name of every tensor, and where it goes: a parameter, or the rows of a fused
    one."""
    shape = model.config.shape
    heads = [shape.N * shape.H, shape.K * shape.H, shape.K * shape.H]
    places = {"model.embed_tokens.weight": model.embed.weight,
              "model.norm.weight": model.norm.weight}
    if model.head is not None:
        places["lm_head.weight"] = model.head.weight
    for i, layer in enumerate(model.layers):
        parts = {"input_layernorm.weight": layer.attention_norm.weight,
                 "post_attention_layernorm.weight": layer.mlp_norm.weight}
        if shape.qk_norm:
            parts |= {"self_attn.q_norm.weight": layer.q_norm.weight,
                      "self_attn.k_norm.weight": layer.k_norm.weight}
        for matrix, names in FUSED.items():
            for kind, tensor in getattr(layer, matrix).named_parameters():  # weight, maybe a bias
                rows = tensor.split(heads) if matrix == "qkv" else tensor.chunk(len(names))
                parts |= {f"{name}.{kind}": each for name, each in zip(names, rows, strict=True)}
        places |= {f"model.layers.{i}.{key}": value for key, value in parts.items()}
    return places


def fill(places: dict[str, torch.Tensor], tensors: Iterable[tuple[Path, str, torch.Tensor]],
         directory: Path) -> None:
    """Copy each tensor to its place. Refused for one that has none or another shape, and for a
    place that is left empty: so every parameter is written exactly once. Refused, too, for what is
    no float or not finite, which takes another pass over each tensor, as long as its copy."""
    missing = dict(places)
    for file, key, value in tensors:
        if key not in missing:
            if key.endswith(".bias") and value.dtype in FLOATS and not value.any():
                continue                                        # AutoGPTQ gives all matrices one
            raise Refused(file, key, why="has no place in this model")
        place = missing.pop(key)
        if place.shape != value.shape:
            raise Refused(file, key, list(value.shape),
                          f"{list(place.shape)}, as config.json makes it")
        if value.dtype not in FLOATS:
            raise Refused(file, key, value.dtype, ", ".join(map(str, FLOATS)))
        if not place.copy_(value).isfinite().all():
            raise Refused(file, key, why=f"holds a number that is not finite in {place.dtype}")
    if missing:
        raise Refused(directory, min(missing), why=f"has no weights, one of {len(missing)} such")


@contextmanager
def written_whole(directory: Path) -> Iterator[Path]:
    """A fresh directory to write into, which becomes `directory` in one rename at the end of the
    block: a reader sees all of it or nothing, and a failure leaves nothing."""
    fresh = unfinished(directory)
    try:
        fresh.mkdir()
        yield fresh
        fresh.rename(directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_model(directory: Path, config: dict[str, Any], weights: dict[str, torch.Tensor],
                tokenizer: tokenizers.Tokenizer | None, settings: dict[str, Any]) -> None:
    """The files of a Hugging Face directory; `settings` are those of tokenizer_config.json."""
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", config)
    if tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))
        settings = {key: value for key, value in settings.items() if value is not None}
        write_json(directory / "tokenizer_config.json",
                   {"tokenizer_class": "PreTrainedTokenizerFast"} | settings)


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2), "utf-8")


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a `ModelConfig`: what transformers, serving engines and
    `ModelConfig.from_hf` read."""
    shape, rope = config.shape, config.rope_scaling
    context = (rope.original_max_position_embeddings     # which such a config says, not the longer
               if rope and rope.rope_type in ("linear", "dynamic") else shape.max_context)
    family = ("qwen3" if shape.qk_norm else "qwen2" if shape.biases else
              "mistral" if shape.window else "llama")
    said = {
        "_name_or_path": shape.name, "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family, "hidden_act": "silu", **{
            key: getattr(shape, field) for field, key in tables()["_decoder"]["shape"].items()},
        "max_position_embeddings": context,
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "rope_scaling": rope and {"rope_type": rope.rope_type} | {
            key: getattr(rope, key) for key in tables()["_rope"][rope.rope_type].split()},
        "bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids) or None,
    }
    if family in ("llama", "qwen3"):
        said["attention_bias"] = False
    if family != "llama":
        said["sliding_window"] = shape.window
    if family in ("qwen2", "qwen3"):
        said |= {"use_sliding_window": shape.window is not None,
                 "max_window_layers": 0 if shape.window else shape.L}
    return said
