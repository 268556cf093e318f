"""From llama.cpp's GGUF to an ordinary Hugging Face directory, so that everything else knows one format only.

GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) holds weights, shape and tokenizer in one file. Three things
differ from Hugging Face's layout: names; weights in blocks of 32 that share a scale, which are written out as fp32 here; and
the rows of Q and K, which llama.cpp permutes because it turns neighbouring pairs where Hugging Face turns halves (rope.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

TENSORS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's tensor names and Hugging Face's, without the layer's prefix (`blk.7.` and `model.layers.7.`)."""

SHAPE_KEYS = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim", "rope.dimension_count": "head_dim", "rope.freq_base": "rope_theta", "vocab_size": "vocab_size",
}
"""Metadata under `llama.` and what config.json calls it. Any other key is refused, but for two that `config` checks."""

_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
PRE_TOKENIZERS = {
    "gpt-2": _BYTE_LEVEL,
    # llama.cpp splits "\p{N}" off first (src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM): each digit stands alone, as in
    # training. It matters where white space precedes a digit, as in "\n\n1." of a numbered list.
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
}
"""How text is split before byte pairs are merged: the value of tokenizer.ggml.pre."""

_CONTROL, _USER_DEFINED = 3, 4          # tokenizer.ggml.token_type


def convert_gguf(source: Path, directory: Path) -> None:
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json of `source` into `directory`.

    Weights come out in fp32, exactly as the blocks mean them. All of them are in memory once, so this wants a machine with
    4 bytes for each parameter. Raises ValueError naming the file where it is no whole GGUF of a Llama.
    """
    import gguf  # here, since only a first load needs it

    try:
        reader = gguf.GGUFReader(source)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:     # what the reader says at the end of a torn file
        raise ValueError(f"{source}: not a whole GGUF file ({error})") from error
    try:
        tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    except NotImplementedError as error:
        raise ValueError(f"{source}: {error}; F32, F16, BF16 and the Q formats of gguf-py are accepted") from error
    try:
        config = config_of(metadata, tied="output.weight" not in tensors)
        tokenizer, settings = tokenizer_of(metadata)
        weights = {hf_name(name): value for name, value in tensors.items()}
    except KeyError as error:
        raise ValueError(f"{source}: its metadata lack {error}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    for name, value in weights.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{source}: {name} holds a number that is not finite; the file is damaged")
        if ".q_proj." in name or ".k_proj." in name:
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            weights[name] = unpermuted(value, heads)

    (directory / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")
    tokenizer.save(str(directory / "tokenizer.json"))
    save_file({name: torch.from_numpy(np.require(value, requirements=("C", "W"))) for name, value in weights.items()},
              directory / "model.safetensors", metadata={"format": "pt"})


def config_of(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
    """The config.json that the metadata of a GGUF amounts to. Raises ValueError for another architecture or an unknown key."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture={architecture!r} is not supported; accepted: 'llama'. "
                         "Load the model's Hugging Face directory instead")
    config = {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": tied,
              "vocab_size": len(metadata["tokenizer.ggml.tokens"]), "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
              "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id")}
    for key, value in metadata.items():
        if not key.startswith("llama."):
            continue
        key = key.removeprefix("llama.")
        if key in SHAPE_KEYS:
            name = SHAPE_KEYS[key]
            if config.setdefault(name, value) != value:
                raise ValueError(f"llama.{key}={value!r}, but elsewhere the file says {config[name]!r}")
        elif key == "attention.value_length":
            if value != metadata.get("llama.attention.key_length"):
                raise ValueError(f"llama.{key}={value!r} is not supported; accepted: the same as attention.key_length")
        elif (key, value) != ("rope.scaling.type", "none"):
            raise ValueError(f"llama.{key}={value!r} is not supported. Load the model's Hugging Face directory instead")
    return config


def tokenizer_of(metadata: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer in the metadata, and a tokenizer_config.json with its special tokens and the chat template."""
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items() if key.startswith("tokenizer.ggml.")}
    if ggml["model"] != "gpt2" or ggml.get("pre") not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.model={ggml['model']!r} with pre={ggml.get('pre')!r} is not supported; accepted: 'gpt2' "
                         f"with {', '.join(PRE_TOKENIZERS)}. Load the model's Hugging Face directory instead")
    tokens = ggml["tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in ggml["merges"]]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[ggml["pre"]]
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, ggml["token_type"], strict=True))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == _CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == _USER_DEFINED])
    if ggml.get("add_bos_token"):
        bos = ggml["bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)])

    ids = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id", "unk_token": "unknown_token_id"}
    settings = {name: tokens[ggml[key]] for name, key in ids.items() if key in ggml}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return tokenizer, settings


def hf_name(name: str) -> str:
    """`blk.7.attn_q.weight` -> `model.layers.7.self_attn.q_proj.weight`. Raises ValueError for a tensor a Llama has not."""
    stem, _, kind = name.rpartition(".")
    layer, _, part = stem.rpartition(".")
    if kind != "weight" or part not in TENSORS:
        raise ValueError(f"tensor {name} is not supported. Load the model's Hugging Face directory instead")
    prefix = f"model.layers.{layer.removeprefix('blk.')}." if layer else ""
    return f"{prefix}{TENSORS[part]}.weight"


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of Q or K, [heads*H, D]: pairs (j, j + H/2) of a head lie side by side there
    (`permute` in conversion/llama.py of ggml-org/llama.cpp).
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
