"""What a decoder of the Llama family is built from: the shape, and the values that cost nothing.

A key that nobody knows may change what the model computes. So every key is used, or known to change
nothing, or refused by a ValueError that names it: a wrong model that runs is worse than none.
"""

from typing import Any

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.from_config.families import read
from clawdemy_infer.from_config.keys import Keys, tables
from clawdemy_infer.from_config.rope import RopeScaling, scaling_of
from clawdemy_infer.paths import Refused


def decoder_from_config(config: dict[str, Any], name: str = "",
                        source: str = "config.json") -> dict[str, Any]:
    """The fields of a `ModelConfig`, from the keys of a config.json of a family that the decoder
    runs: data/families.toml lists them, under `_runs`.

    Raises ValueError naming key, value and what is accepted, for anything that a decoder would not
    compute as it is meant.
    """
    # 1. What kind of model it is, and what it must not say.
    keys, page = Keys(config, source), tables()["_runs"]
    known, family = list(page["families"]), keys.take("model_type")
    if family not in known:
        keys.refuse("model_type", family, ", ".join(known))
    architectures = keys.take("architectures", [])
    for each in architectures if isinstance(architectures, list) else [architectures]:
        if not str(each).endswith("ForCausalLM"):
            keys.refuse("architectures", each, "a causal language model, …ForCausalLM")
    keys.only(**page["only"], **dict.fromkeys(page["absent"].split()))

    # 2. The shape.
    for key in page["families"][family].split():
        keys.left[key] = keys.take(key)                 # it must be there, for the reader to take
    if family == "mistral" and "sliding_window" not in config:
        raise Refused(source, "sliding_window", accepted="a number or null, said by any mistral")
    numbers = read(family, keys)
    if numbers.get("pattern"):
        key = "layer_types" if config.get("layer_types") else "max_window_layers"
        keys.refuse(key, config[key], "one kind for all layers: with a window, or without")
    if numbers["H"] % 2:
        keys.refuse("head_dim", numbers["H"], "an even number, since RoPE turns pairs")
    if numbers["N"] % numbers["K"]:
        keys.refuse("num_key_value_heads", numbers["K"],
                    f"a divisor of the {numbers['N']} query heads")

    # 3. The values, and what is left over.
    theta, scaling = _rope(keys, numbers)
    ends = keys.take("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    begin = keys.take("bos_token_id", None)
    for key, token in [("eos_token_id", end) for end in ends] + [("bos_token_id", begin)]:
        if token is not None and (type(token) is not int or token < 0):
            keys.refuse(key, token, "the number of a token, 0 or more")
    fields = {"shape": ModelShape(name=name, source=source, **numbers),
              "norm_eps": keys.number("rms_norm_eps"), "rope_theta": theta, "rope_scaling": scaling,
              "bos_id": begin, "eos_ids": tuple(end for end in ends if end is not None)}
    keys.drop(*page["harmless"].split())
    keys.end("no such key, since it may change what the model computes")
    return fields


def _rope(keys: Keys, numbers: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base frequency and scaling. transformers 5 writes both into `rope_parameters`, older ones
    `rope_theta` beside `rope_scaling`. A scaling makes the context of `numbers` longer where the
    file says the one before it."""
    old, new = keys.take("rope_scaling", None), keys.take("rope_parameters", None)
    if not isinstance(new or old or {}, dict):
        keys.refuse("rope_parameters" if new else "rope_scaling", new or old, "an object")
    if old and new and old != new:
        keys.refuse("rope_scaling", old,
                    "one of rope_scaling and rope_parameters, not two that differ")
    inner = Keys(new or old or {}, f"{keys.source}: {'rope_parameters' if new else 'rope_scaling'}")
    theta = inner.number("rope_theta", keys.number("rope_theta", 10_000.0))
    # Older files call the type `type`, some say it twice.
    kinds = {str(inner.take(key, "default")) for key in ("rope_type", "type")} - {"default"}
    known = tables()["_rope"]
    if len(kinds) > 1 or kinds - set(known):
        inner.refuse("rope_type", min(kinds - set(known) or kinds), f"default, {', '.join(known)}")
    original = keys.left.get("original_max_position_embeddings") and keys.whole(
        "original_max_position_embeddings")
    scaling, context = None, numbers["max_context"]
    if kinds:
        scaling = scaling_of(inner, kinds.pop(), numbers["H"], theta, context, original)
    if scaling and scaling.rope_type in ("linear", "dynamic", "yarn"):
        longer = int(scaling.factor * scaling.original_max_position_embeddings)
        numbers["max_context"] = max(context, longer)
    inner.only(partial_rotary_factor=1)
    inner.end("no such key with this rope_type")
    return theta, scaling
