"""The shape of a model from what describes it to Hugging Face: a config.json, its keys, or a
`transformers` config object.

The files in reading order: `keys` reads JSON and asks for each key once; `families` makes numbers
of them, by the tables of data/families.toml; `formats` reads what a file says of weights and cache.
`decoder` reads, besides the shape, what a decoder computes by. `catalog` has the shapes and
machines of `data/`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clawdemy_infer.arithmetic import Format, ModelShape
from clawdemy_infer.from_config import families
from clawdemy_infer.from_config.formats import stated
from clawdemy_infer.from_config.keys import TEXT, Keys, check_values, read_object, tables
from clawdemy_infer.paths import Refused

MAX_CONFIG_BYTES = 4 * 2**20            # of a config.json; the longest published ones have 0.2 MB

FAMILIES = sorted(name for name in tables() if not name.startswith("_"))
"""What `model_type` may be."""

LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How an architecture ends that has a head over the vocabulary."""


def from_config(config: Any, name: str = "") -> ModelShape:
    """The `ModelShape` that `config` describes: the path of a config.json or of a folder with one,
    a dict of its keys, or any `transformers` config object. `transformers` itself is not imported.
    Of a model that sees or hears too it is the shape of the language model, whose name then ends in
    ", text".

    Raises Refused for every key that is not known to leave the cost as it is, for a `model_type`
    outside `FAMILIES`, and for a size that is missing or beyond its range; FileNotFoundError where
    there is no such file."""
    # 1. The keys of the language model.
    keys, part = text_keys(*keys_of(config))

    # 2. Its numbers, and what is left over.
    family, called = keys.take("model_type"), keys.left.get("_name_or_path")
    numbers, says = families.read(family, keys), families.family(family)
    keys.settle(says.get("harmless", ()),
                f"no such key for {family}, since it may change what the model costs")
    name = (name or keys.name(str(called or family))) + ", text" * (part or "part" in says)
    try:
        return ModelShape(name=name, source=keys.source, **numbers)
    except ValueError as error:                         # numbers that do not go together
        raise Refused(keys.source, None, why=str(error)) from None


def stated_formats(config: Any, shape: ModelShape) -> tuple[Format, Format]:
    """Formats of weights and KV cache of a config, of which `from_config` gave `shape`."""
    return stated(keys_of(config)[0], shape, shape.source)


def keys_of(config: Any) -> tuple[dict[str, Any], str]:
    """The keys of a config in one of its three forms, and what to call it in an error."""
    source = "config"
    if isinstance(config, str | Path):
        path = Path(config).expanduser()
        path = path / "config.json" if path.is_dir() else path
        found, beside = read_object(path, MAX_CONFIG_BYTES), path.with_name("hf_quant_config.json")
        if beside.is_file() and not found.get("quantization_config"):       # ModelOpt's, of 2024
            found["quantization_config"] = read_object(beside, MAX_CONFIG_BYTES).get("quantization")
        return found, str(path)
    config = config if isinstance(config, dict) else config.to_dict()
    check_values(config, source)
    return config, source


def text_keys(config: dict[str, Any], source: str) -> tuple[Keys, bool]:
    """The keys of the language model, and whether they are a part of the file's."""
    keys = Keys(config, source)
    inner = next((key for key in TEXT if isinstance(config.get(key), dict)), "")
    if inner:
        text = Keys({"model_type": config.get("model_type")} | keys.take(inner),
                    f"{source}: {inner}")
        if config.get("tie_word_embeddings") is not None:           # the outer one is what is used
            text.left["tie_word_embeddings"] = config["tie_word_embeddings"]
        around = tables()["_around"]["words"].split()
        keys.drop(*(key for key in config if any(word in key for word in around)))
        _check_architectures(keys, ())
        keys.settle((), "no such key beside a language model")
        keys = text
    family = keys.left.get("model_type")
    for kind in (config.get("model_type"), family):
        if why := tables()["_refused"].get(str(kind)):
            keys.refuse("model_type", kind, f"a decoder that is counted here; this is {why}")
    if family not in FAMILIES:
        keys.refuse("model_type", keys.take("model_type"), ", ".join(FAMILIES))
    _check_architectures(keys, families.family(family).get("architectures", ()))
    return keys, bool(inner)


def _check_architectures(keys: Keys, more: Sequence[str]) -> None:
    keys.only(is_encoder_decoder=False)
    keys.listed("architectures", lambda one: one in more or str(one).endswith(LANGUAGE_MODELS),
                f"a language model of its own, …{', …'.join(LANGUAGE_MODELS)}; this is a part or a "
                "draft of one", [])
