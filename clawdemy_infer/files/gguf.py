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
import math
import mmap
import shutil
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from clawdemy_infer.files.directory import (
    destinations,
    empty_decoder,
    fill,
    write_json,
    write_model,
    written_whole,
)
from clawdemy_infer.model import ModelConfig
from clawdemy_infer.paths import cache_dir

CONVERSION_VERSION = 2
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

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
"""GGUF's types of values, those of numbers as `struct` calls them."""

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
    this wants a machine with 4 bytes for each parameter. Raises ValueError naming the file, and the
    key or the tensor, where it is no whole GGUF of a Llama, and where a number is not finite.
    """
    try:
        with source.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        metadata, tensors = Header(data).read()
    except ValueError as error:
        raise ValueError(f"{source}: not a whole GGUF file ({error})") from error
    try:
        config = config_of(metadata, tied="output.weight" not in tensors)
        tokenizer, settings = tokenizer_of(metadata)
    except KeyError as error:
        raise ValueError(f"{source}: its metadata lack {error}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    model = empty_decoder(ModelConfig.from_hf(config, source=str(source)), torch.float32, "cpu",
                          [source])
    fill(destinations(model), weights_of(tensors, config, source), source)
    write_model(directory, config, destinations(model), tokenizer, settings)


class Header:
    """The head of a GGUF file, read value by value. Everything raises ValueError where the file
    ends too early: so nothing is longer than the file is."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data, self.at = memoryview(data), 0

    def read(self) -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, int]]]:
        """The metadata, and each tensor's bytes [rows, bytes of a row] with its ggml type."""
        from gguf import GGML_QUANT_SIZES  # here, since only a first load needs it

        magic, (version,), (tensors, keys) = self.take(4), self.numbers("I"), self.numbers("Q", 2)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {bytes(magic)!r}, version {version}; GGUF 2 and 3 "
                             "are accepted")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            name = self.text()
            if name in metadata:
                raise ValueError(f"{name} comes twice")
            try:
                metadata[name] = self.value(*self.numbers("I"))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        places = {}
        for _ in range(tensors):
            name, (count,) = self.text(), self.numbers("I")
            dims, (kind, offset) = self.numbers("Q", count), self.numbers("IQ")
            block, size = GGML_QUANT_SIZES.get(kind, (0, 0))
            if name in places or not 1 <= count <= 4 or not block or dims[0] % block:
                raise ValueError(f"tensor {name[:200]!r}: {list(dims)} of type {kind} is none, or "
                                 "it comes twice")
            places[name] = dims, kind, offset, dims[0] // block * size
        align = metadata.get("general.alignment", 32)
        if type(align) is not int or align < 1:
            raise ValueError(f"general.alignment={repr(align)[:200]}")
        start, found = -(-self.at // align) * align, {}
        for name, (dims, kind, offset, row) in places.items():
            self.at, shape = start + offset, (*reversed(dims[1:]), row)
            found[name] = np.frombuffer(self.take(math.prod(shape)), np.uint8).reshape(shape), kind
        return metadata, found

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += count
        return self.data[self.at - count:self.at]

    def numbers(self, code: str, count: int = 1) -> tuple:
        content = self.take(count * struct.calcsize(f"<{code}"))
        return struct.unpack("<" + code * count if count < 3 else f"<{count}{code}", content)

    def text(self) -> str:
        return bytes(self.take(*self.numbers("Q"))).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.numbers(SCALARS[kind])[0]
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            raise ValueError(f"there is no type {kind}")
        (kind,), (count,) = self.numbers("I"), self.numbers("Q")
        if kind in SCALARS:
            return list(self.numbers(SCALARS[kind], count))
        if kind != _TEXT:
            raise ValueError(f"a list of type {kind} is not supported; numbers and texts are")
        return [self.text() for _ in range(count)]


def weights_of(tensors: dict[str, tuple[np.ndarray, int]], config: dict[str, Any],
               source: Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """File, Hugging Face's name and values of each tensor. ValueError as of `convert_gguf`."""
    import gguf

    for stored, (content, kind) in tensors.items():
        try:
            name = hf_name(stored)
            with np.errstate(all="ignore"):                     # what is not finite is found later
                value = gguf.quants.dequantize(content, gguf.GGMLQuantizationType(kind))
        except NotImplementedError as error:
            raise ValueError(f"{source}: {stored}: {error}; F32, F16, BF16 and the Q formats of "
                             "gguf-py are accepted") from error
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        if ".q_proj." in name or ".k_proj." in name:
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            value = unpermuted(value, heads)
        yield source, name, torch.from_numpy(np.require(value, None, ("C", "W")))


def config_of(metadata: dict[str, Any], tied: bool) -> dict[str, Any]:
    """The config.json that the metadata of a GGUF amounts to. Raises ValueError for another
    architecture, an unknown key or a value of another kind, KeyError for a key that is missing."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture={architecture!r} is not supported; "
                         f"accepted: 'llama'. {INSTEAD}")
    tokens, id_of = _listed(metadata, "tokens", str), "tokenizer.ggml.{}_token_id".format
    ends = [metadata.get(id_of(short)) for short in ("eos", "eot", "eom")]
    config = {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": tied,
              "vocab_size": len(tokens), "bos_token_id": metadata.get(id_of("bos")),
              "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}
    for key, value in metadata.items():
        if not key.startswith("llama."):
            continue
        name = SHAPE_KEYS.get(key.removeprefix("llama."))
        if name:
            kind = float if name in ("rms_norm_eps", "rope_theta") else int
            if type(value) is not kind or not 0 < value < float("inf"):
                raise ValueError(f"{key}={repr(value)[:200]} is not supported; accepted: "
                                 f"{kind.__name__} above 0")
            if config.setdefault(name, value) != value:
                raise ValueError(f"{key}={value!r}, but elsewhere the file says {config[name]!r}")
        elif key == "llama.attention.value_length":
            if value != metadata.get("llama.attention.key_length"):
                raise ValueError(f"{key}={repr(value)[:200]} is not supported; accepted: the same "
                                 "as attention.key_length")
        elif (key, value) != ("llama.rope.scaling.type", "none"):
            raise ValueError(f"{key}={repr(value)[:200]} is not supported. {INSTEAD}")
    heads = config.setdefault("num_attention_heads", metadata.get("llama.attention.head_count"))
    if heads is None:
        raise KeyError("llama.attention.head_count")
    return {"num_key_value_heads": heads} | config


def tokenizer_of(metadata: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer in the metadata, and a tokenizer_config.json with its special tokens and the
    chat template. Raises as `config_of`."""
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()
            if key.startswith("tokenizer.ggml.")}
    if ggml["model"] != "gpt2" or str(ggml.get("pre")) not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.model={ggml['model']!r} with pre={ggml.get('pre')!r} is "
                         f"not supported; accepted: 'gpt2' with {', '.join(PRE_TOKENIZERS)}. "
                         + INSTEAD)
    tokens, kinds = _listed(metadata, "tokens", str), _listed(metadata, "token_type", int)
    known = set(tokens)
    merges = [tuple(merge.split(" ", 1)) for merge in _listed(metadata, "merges", str)]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= known:
            raise ValueError(f"tokenizer.ggml.merges: {' '.join(merge)[:200]!r} is not supported; "
                             "accepted: two tokens with a space between, which make a third")
    if len(kinds) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type has {len(kinds)} entries; accepted: one for "
                         f"each of the {len(tokens)} tokens")
    special = {}
    for short, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (id := ggml.get(f"{long}_token_id")) is not None:
            if type(id) is not int or not 0 <= id < len(tokens):
                raise ValueError(f"tokenizer.ggml.{long}_token_id={repr(id)[:200]} is not "
                                 f"supported; accepted: 0 to {len(tokens) - 1}")
            special[f"{short}_token"] = tokens[id]
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"tokenizer.chat_template={repr(template)[:200]} is not supported; "
                         "accepted: a text")
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
    return tokenizer, special | ({"chat_template": template} if template else {})


def _listed(metadata: dict[str, Any], name: str, kind: type) -> list:
    """A list in the metadata of the tokenizer, not empty and all of one kind."""
    value = metadata[f"tokenizer.ggml.{name}"]
    if not isinstance(value, list) or not value or any(type(each) is not kind for each in value):
        raise ValueError(f"tokenizer.ggml.{name}={repr(value)[:200]} is not supported; accepted: "
                         f"a list of {kind.__name__}")
    return value


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
    if weight.ndim != 2 or len(weight) % (2 * heads):
        return weight                   # of a shape that is refused when it is put into its place
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
