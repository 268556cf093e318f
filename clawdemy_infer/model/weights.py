"""From a Hugging Face directory to a `Decoder`: each stored tensor is copied to its place in the fused matrices."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from clawdemy_infer.model.config import ModelConfig
from clawdemy_infer.model.decoder import Decoder
from clawdemy_infer.model.tokenizer import Tokenizer


def read_directory(directory: Path, dtype: torch.dtype, device: torch.device | str, name: str = "") -> Decoder:
    """The model in `directory` (config.json, *.safetensors, tokenizer.json), its weights in `dtype` on `device`.

    Raises ValueError for a config this decoder does not run, for weights that are missing, left over, of another shape or
    in a damaged file, and for weights in any format but safetensors, which alone cannot carry code.
    """
    config_file = directory / "config.json"
    settings = _json(config_file)
    # What ends a generation is said in generation_config.json where there is one: a chat model may have several such tokens.
    generation = directory / "generation_config.json"
    if generation.exists() and (eos := _json(generation).get("eos_token_id")) is not None:
        settings["eos_token_id"] = eos
    config = ModelConfig.from_hf(settings, name=name or directory.name, source=str(config_file))
    files = weight_files(directory)

    with torch.device("meta"):          # no memory, and no time spent on random numbers that would be overwritten
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    missing = destinations(model)
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    if _not_a_weight(key, config):
                        continue
                    if key not in missing:
                        raise ValueError(f"{file}: {key} has no place in this model")
                    target, value = missing.pop(key), tensors.get_tensor(key)
                    if target.shape != value.shape:
                        raise ValueError(f"{file}: {key} is {list(value.shape)}, but config.json makes it {list(target.shape)}")
                    target.copy_(value)
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged, or not in safetensors format ({error})") from error
    if missing:
        raise ValueError(f"{directory}: no weights for {', '.join(sorted(missing)[:5])}{' and more' * (len(missing) > 5)}")
    model.tokenizer = Tokenizer.from_directory(directory)
    return model


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights: those named in the index of a sharded model, else model.safetensors."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    files = sorted({directory / file for file in _json(index)["weight_map"].values()}) if index.exists() else [single]
    if absent := [file.name for file in files if not file.exists()]:
        pickled = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in directory.glob(kind))
        instead = f" {', '.join(pickled)} is a pickle, which can run code when it is read." if pickled else ""
        raise ValueError(f"{directory}: {', '.join(absent)} is missing.{instead} Only safetensors weights are accepted")
    return files


def destinations(model: Decoder) -> dict[str, torch.Tensor]:
    """Hugging Face's name of every tensor, and where it goes: a parameter, or the rows of a fused one."""
    shape = model.config.shape
    places = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    if model.head is not None:
        places["lm_head.weight"] = model.head.weight
    heads = [shape.N * shape.H, shape.K * shape.H, shape.K * shape.H]
    for i, layer in enumerate(model.layers):
        parts = {
            "input_layernorm.weight": layer.attention_norm.weight,
            **dict(zip((f"self_attn.{x}_proj.weight" for x in "qkv"), layer.qkv.weight.split(heads), strict=True)),
            "self_attn.o_proj.weight": layer.out.weight,
            "post_attention_layernorm.weight": layer.mlp_norm.weight,
            **dict(zip((f"mlp.{x}_proj.weight" for x in ("gate", "up")), layer.gate_up.weight.chunk(2), strict=True)),
            "mlp.down_proj.weight": layer.down.weight,
        }
        if shape.qkv_bias:
            parts |= zip((f"self_attn.{x}_proj.bias" for x in "qkv"), layer.qkv.bias.split(heads), strict=True)
        if shape.qk_norm:
            parts |= {"self_attn.q_norm.weight": layer.q_norm.weight, "self_attn.k_norm.weight": layer.k_norm.weight}
        places |= {f"model.layers.{i}.{key}": value for key, value in parts.items()}
    return places


def _not_a_weight(key: str, config: ModelConfig) -> bool:
    """A copy of the embedding table that a tied model stores as its head, and RoPE's frequencies, which old files stored."""
    return (key == "lm_head.weight" and config.shape.tied) or key.endswith(".rotary_emb.inv_freq")


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.parent}: {file.name} is missing; a Hugging Face model directory is accepted") from None
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
