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
import shutil
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from clawdemy_infer.files import directory as hf
from clawdemy_infer.from_config.keys import Keys, is_text, tables
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.paths import Refused, cache_dir, short

CONVERSION_VERSION = 2
"""Raise it when `convert_gguf` writes something else than before: older conversions are then no
longer found."""

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

SPECIAL = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "pad": "padding",
           "unk": "unknown"}
"""Special tokens, and GGUF's words for them."""

INSTEAD = ". Load the model's Hugging Face directory instead"


def converted(source: Path, expected_sha256: str | None = None) -> Path:
    """The Hugging Face directory of the GGUF file `source`: found in the cache, or converted now.

    A damaged cache entry is made anew, with a warning. Raises Refused where `source` is not the
    file of `expected_sha256`, or is not a GGUF that `convert_gguf` takes."""
    digest = sha256(source)
    if expected_sha256 not in (None, digest):
        raise Refused(source, None, why="damaged, or another file than expected (its sha256 is "
                                        f"{digest}, not {expected_sha256}); install it again")
    place = cache_dir() / "models" / f"{digest[:32]}-{CONVERSION_VERSION}"
    if is_whole(place):
        return place
    if place.exists():
        warnings.warn(f"the converted model in {place} was damaged and is being made anew",
                      stacklevel=2)
        shutil.rmtree(place)
    try:
        with hf.written_whole(place) as fresh:
            convert_gguf(source, fresh)
            hf.write_json(fresh / "manifest.json",
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


def convert_gguf(source: Path, directory: Path) -> None:
    """Write the Hugging Face files of `source` into `directory`.

    Weights come out in fp32, exactly as the blocks mean them. All of them are in memory once, so
    this wants a machine with 4 bytes for each parameter. Raises Refused, with the key or the
    tensor, where it is no whole GGUF of a Llama, and where a number is not finite."""
    try:
        metadata, tensors = Header(np.memmap(source, mode="r")).read()
    except ValueError as error:
        raise Refused(source, None, why=f"not a whole GGUF file ({error})") from error
    keys = Keys(metadata, str(source))
    keys.one_of("general.architecture", ("llama",), instead=INSTEAD)
    tokenizer, settings, ids = tokenizer_of(keys)
    keys.left["vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    config = config_of(keys, ids, tied="output.weight" not in tensors)
    model = hf.empty_decoder(ModelConfig.from_hf(config, source=str(source)), torch.float32, "cpu",
                             [source])
    places = hf.destinations(model)
    hf.fill(places, weights_of(tensors, model, source), source)
    hf.write_model(directory, config, places, tokenizer, settings)


class Header:
    """The head of a GGUF file, read value by value. Everything raises ValueError where the file
    ends too early: so nothing is longer than the file is."""

    def __init__(self, data: bytes | np.memmap) -> None:
        self.data, self.at = memoryview(data), 0

    def read(self) -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, int]]]:
        """The metadata, and each tensor's bytes [rows, bytes of a row] with its ggml type."""
        from gguf import GGML_QUANT_SIZES  # here, since only a first load needs it

        magic, (version,), (tensors, keys) = self.take(4), self.numbers("I"), self.numbers("Q", 2)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {bytes(magic)!r}, version {version}; GGUF 2 and 3 "
                             "are accepted")
        metadata, places, found = {}, {}, {}
        for _ in range(keys):
            if (name := self.text()) in metadata:
                raise ValueError(f"{name} comes twice")
            try:
                metadata[name] = self.value(*self.numbers("I"))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        for _ in range(tensors):
            name, (count,) = self.text(), self.numbers("I")
            dims, (kind, offset) = self.numbers("Q", count), self.numbers("IQ")
            block, size = GGML_QUANT_SIZES.get(kind, (0, 0))
            if name in places or not 1 <= count <= 4 or not block or dims[0] % block:
                raise ValueError(f"tensor {short(name)}: {list(dims)} of type {kind} is none, or "
                                 "it comes twice")
            places[name] = (*reversed(dims[1:]), dims[0] // block * size), kind, offset
        align = Keys(metadata, "").whole("general.alignment", 32)
        start = -(-self.at // align) * align
        for name, (shape, kind, offset) in places.items():
            self.at = start + offset
            found[name] = np.frombuffer(self.take(math.prod(shape)), np.uint8).reshape(shape), kind
        return metadata, found

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += count
        return self.data[self.at - count:self.at]

    def numbers(self, code: str, count: int = 1) -> tuple:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def text(self) -> str:
        return bytes(self.take(*self.numbers("Q"))).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind in SCALARS:
            return self.numbers(SCALARS[kind])[0]
        if kind != _LIST:
            raise ValueError(f"there is no type {kind}")
        (kind,), (count,) = self.numbers("I"), self.numbers("Q")
        if kind == _TEXT:
            return [self.text() for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"a list of type {kind} is not supported; numbers and texts are")
        return list(self.numbers(SCALARS[kind], count))


def weights_of(tensors: dict[str, tuple[np.ndarray, int]], model: Decoder,
               source: Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """File, Hugging Face's name and values of each tensor. Refused as of `convert_gguf`."""
    import gguf

    shape = model.config.shape
    called = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.L)
    names = {called.get_name(name, (".weight",)): name for name in hf.destinations(model)}
    heads = {"q_proj": shape.N, "k_proj": shape.K}
    for stored, (content, kind) in tensors.items():
        if stored not in names:
            raise Refused(source, stored, why=f"has no place in this model{INSTEAD}")
        kind, name = gguf.GGMLQuantizationType(kind), names[stored]
        try:
            with np.errstate(all="ignore"):                     # what is not finite is found later
                value = gguf.quants.dequantize(content, kind)
        except NotImplementedError as error:
            raise Refused(source, stored, kind.name,
                          "F32, F16, BF16 and the Q formats of gguf-py") from error
        if (part := name.split(".")[-2]) in heads:
            value = unpermuted(value, heads[part])
        yield source, name, torch.from_numpy(np.require(value, None, ("C", "W")))


def config_of(keys: Keys, ids: dict[str, int], tied: bool) -> dict[str, Any]:
    """The config.json that the metadata of a GGUF amounts to, with the special tokens `ids`. Raises
    Refused for a key that is missing, unknown or of another kind."""
    for key, usual in tables()["_gguf"].items():
        keys.rename(f"llama.{key}", usual)
        if usual not in (*keys.left, "num_key_value_heads", "head_dim", "rope_theta"):
            raise Refused(keys.source, f"llama.{key}")
    shape = {usual: keys.number(usual) if usual in ("rms_norm_eps", "rope_theta")
             else keys.whole(usual) for usual in tables()["_gguf"].values() if usual in keys.left}
    keys.only(**{"llama.attention.value_length": shape.get("head_dim"),
                 "llama.rope.scaling.type": "none"})
    for key, value in keys.left.items():
        if key.startswith("llama."):
            keys.refuse(key, value, f"no such key{INSTEAD}")
    return {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": tied,
            "bos_token_id": ids.get("bos"), "eos_token_id": list(dict.fromkeys(
                ids[end] for end in ("eos", "eot", "eom") if end in ids))} | shape


def tokenizer_of(keys: Keys) -> tuple[Tokenizer, dict[str, Any], dict[str, int]]:
    """The tokenizer in the metadata, a tokenizer_config.json with its special tokens and the chat
    template, and the ids of the special tokens. Raises as `config_of`."""
    # 1. What the metadata say.
    ggml = "tokenizer.ggml.{}".format
    keys.one_of(ggml("model"), ("gpt2",), instead=INSTEAD)
    pre = keys.one_of(ggml("pre"), PRE_TOKENIZERS, instead=INSTEAD)
    tokens = keys.listed(ggml("tokens"), is_text, "a list of texts", least=1)
    V, known = len(tokens), set(tokens)
    kinds = keys.listed(ggml("token_type"), lambda one: type(one) is int,
                        f"a number for each of the {V} tokens", least=V, most=V)
    merges = keys.listed(
        ggml("merges"), lambda one: is_text(one) and " " in one
        and {*one.split(" ", 1), one.replace(" ", "", 1)} <= known,
        "two tokens with a space between, which make a third", least=1)
    ids = {short: keys.whole(ggml(f"{long}_token_id"), least=0, most=V - 1)
           for short, long in SPECIAL.items() if ggml(f"{long}_token_id") in keys.left}
    special = {f"{short}_token": tokens[ids[short]]
               for short in ("bos", "eos", "pad", "unk") if short in ids}

    # 2. What it makes.
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)},
                                     [tuple(merge.split(" ", 1)) for merge in merges]))
    tokenizer.pre_tokenizer, tokenizer.decoder = PRE_TOKENIZERS[pre], decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL)
                          for token, kind in zip(tokens, kinds, strict=True)
                          if kind in (_CONTROL, _USER_DEFINED)])
    if keys.flag(ggml("add_bos_token"), False):
        if "bos" not in ids:
            raise Refused(keys.source, ggml("bos_token_id"))
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, ids["bos"])])
    template = keys.text("tokenizer.chat_template") or None
    return tokenizer, special | {"chat_template": template}, ids


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of Q or K, [heads*H, D]: pairs (j, j + H/2) of a head lie
    side by side there (`permute` in conversion/llama.py of ggml-org/llama.cpp)."""
    if weight.ndim != 2 or len(weight) % (2 * heads):
        return weight                   # of a shape that is refused when it is put into its place
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
