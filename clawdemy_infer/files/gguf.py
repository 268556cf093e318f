"""From llama.cpp's GGUF to an ordinary Hugging Face directory, once, so that everything else knows
one format only.

GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) holds weights, shape and tokenizer
in one file. Three things differ from Hugging Face's layout: names; weights in blocks of 32 that
share a scale, which are written out as fp32 here; and the rows of Q and K, which llama.cpp permutes
because it turns neighbouring pairs where Hugging Face turns halves (rope.py).

A conversion is kept, and a manifest beside it says the sha256 of each file; every load compares.

    <cache_dir>/models/<sha256 of the source>-<CONVERSION_VERSION>/
"""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from clawdemy_infer.files.directory import write_json, write_model, written_whole
from clawdemy_infer.paths import cache_dir

CONVERSION_VERSION = 1
"""Raise it when `convert_gguf` writes something else than before: older conversions are then no
longer found."""

TENSORS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's tensor names and Hugging Face's, without the layer's prefix (`blk.7.` and
`model.layers.7.`)."""

SHAPE_KEYS = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.key_length": "head_dim",
    "rope.dimension_count": "head_dim", "rope.freq_base": "rope_theta", "vocab_size": "vocab_size",
}
"""Metadata under `llama.` and what config.json calls it. Any other key is refused, but for two that
`config_of` checks."""

_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
PRE_TOKENIZERS = {
    "gpt-2": _BYTE_LEVEL,
    # llama.cpp splits "\p{N}" off first (src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM): each
    # digit stands alone, as in training. It matters where white space precedes a digit, as in
    # "\n\n1." of a numbered list.
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
}
"""How text is split before byte pairs are merged: the value of tokenizer.ggml.pre."""

_CONTROL, _USER_DEFINED = 3, 4          # tokenizer.ggml.token_type

INSTEAD = "Load the model's Hugging Face directory instead"


# ---- the cache of conversions ----


def converted(source: Path, expected_sha256: str | None = None) -> Path:
    """The Hugging Face directory of the GGUF file `source`: found in the cache, or converted now.

    A damaged cache entry is made anew, with a warning. Raises ValueError naming the file where
    `source` is not the file of `expected_sha256`, or is not a GGUF that `convert_gguf` takes.
    """
    digest = sha256(source)
    if expected_sha256 not in (None, digest):
        raise ValueError(f"{source}: damaged, or another file than expected (its sha256 is "
                         f"{digest}, not {expected_sha256}); install it again")
    place = cache_dir() / "models" / f"{digest[:32]}-{CONVERSION_VERSION}"
    if place.exists():
        if is_whole(place):
            return place
        warnings.warn(f"the converted model in {place} was damaged and is being made anew",
                      stacklevel=2)
        shutil.rmtree(place)
    try:
        with written_whole(place) as fresh:
            convert_gguf(source, fresh)
            write_json(fresh / "manifest.json",
                       {file.name: sha256(file) for file in sorted(fresh.iterdir())})
    except OSError:
        if not is_whole(place):         # unless another process was faster
            raise
    return place


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_whole(directory: Path) -> bool:
    """Does every file that the manifest names have the content it had when it was written?"""
    try:
        manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
        return bool(manifest) and all(sha256(directory / name) == digest
                                      for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


# ---- one conversion ----


def convert_gguf(source: Path, directory: Path) -> None:
    """Write the Hugging Face files of `source` into `directory`.

    Weights come out in fp32, exactly as the blocks mean them. All of them are in memory once, so
    this wants a machine with 4 bytes for each parameter. Raises ValueError naming the file where it
    is no whole GGUF of a Llama.
    """
    import gguf  # here, since only a first load needs it

    try:
        reader = gguf.GGUFReader(source)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:          # of a torn file
        raise ValueError(f"{source}: not a whole GGUF file ({error})") from error
    try:
        tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                   for tensor in reader.tensors}
    except NotImplementedError as error:
        raise ValueError(f"{source}: {error}; F32, F16, BF16 and the Q formats of gguf-py are "
                         "accepted") from error
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
            raise ValueError(f"{source}: {name} holds a number that is not finite; "
                             "the file is damaged")
        if ".q_proj." in name or ".k_proj." in name:
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            weights[name] = unpermuted(value, heads)
    write_model(directory, config, {name: torch.from_numpy(np.require(value, None, ("C", "W")))
                                    for name, value in weights.items()}, tokenizer, settings)


def config_of(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
    """The config.json that the metadata of a GGUF amounts to. Raises ValueError for another
    architecture or an unknown key."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture={architecture!r} is not supported; "
                         f"accepted: 'llama'. {INSTEAD}")
    config = {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": tied,
              "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
              "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
              "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id")}
    for key, value in metadata.items():
        if not key.startswith("llama."):
            continue
        name = SHAPE_KEYS.get(key.removeprefix("llama."))
        if name:
            if config.setdefault(name, value) != value:
                raise ValueError(f"{key}={value!r}, but elsewhere the file says {config[name]!r}")
        elif key == "llama.attention.value_length":
            if value != metadata.get("llama.attention.key_length"):
                raise ValueError(f"{key}={value!r} is not supported; accepted: the same as "
                                 "attention.key_length")
        elif (key, value) != ("llama.rope.scaling.type", "none"):
            raise ValueError(f"{key}={value!r} is not supported. {INSTEAD}")
    return config


def tokenizer_of(metadata: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer in the metadata, and a tokenizer_config.json with its special tokens and the
    chat template."""
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()
            if key.startswith("tokenizer.ggml.")}
    if ggml["model"] != "gpt2" or ggml.get("pre") not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.model={ggml['model']!r} with pre={ggml.get('pre')!r} is "
                         f"not supported; accepted: 'gpt2' with {', '.join(PRE_TOKENIZERS)}. "
                         + INSTEAD)
    tokens, kinds = ggml["tokens"], ggml["token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in ggml["merges"]]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[ggml["pre"]]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)
                                  for token, kind in zip(tokens, kinds, strict=True)
                                  if kind == _CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False)
                          for token, kind in zip(tokens, kinds, strict=True)
                          if kind == _USER_DEFINED])
    if ggml.get("add_bos_token"):
        bos = ggml["bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)])

    settings = {f"{short}_token": tokens[ggml[f"{long}_token_id"]]
                for short, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"),
                                    ("unk", "unknown")) if f"{long}_token_id" in ggml}
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return tokenizer, settings


def hf_name(name: str) -> str:
    """`blk.7.attn_q.weight` -> `model.layers.7.self_attn.q_proj.weight`. Raises ValueError for a
    tensor a Llama has not."""
    stem, _, kind = name.rpartition(".")
    layer, _, part = stem.rpartition(".")
    if kind != "weight" or part not in TENSORS:
        raise ValueError(f"tensor {name} is not supported. {INSTEAD}")
    prefix = f"model.layers.{layer.removeprefix('blk.')}." if layer else ""
    return f"{prefix}{TENSORS[part]}.weight"


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of Q or K, [heads*H, D]: pairs (j, j + H/2) of a head lie
    side by side there (`permute` in conversion/llama.py of ggml-org/llama.cpp)."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
