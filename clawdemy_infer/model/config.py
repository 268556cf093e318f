"""What a checkpoint's config.json says, and nothing it says ignored.

A key this file does not know may change what the model computes. So every key is used, or known to change nothing, or
refused by a ValueError that names it: a wrong model that runs is worse than none.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.from_config.keys import Keys
from clawdemy_infer.model.rope import Llama3Scaling

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

CHANGES_NOTHING = frozenset({
    "_name_or_path", "torch_dtype", "dtype", "transformers_version", "unsloth_version", "unsloth_fixed", "transformers.js_config",
    "is_llama_config", "initializer_range", "use_cache", "pad_token_id", "return_dict", "output_attentions", "output_hidden_states",
})
"""Where the file came from, how it was trained, what Hugging Face's own classes return: nothing this decoder computes."""

ONLY_AS = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0, "pretraining_tp": 1,
    "partial_rotary_factor": 1, "rope_interleaved": False, "use_mrope": False, "quantization_config": None, "auto_map": None,
}
"""Keys that are accepted with this one value, which is also what their absence means."""

RUNS = frozenset({"name", "source", "L", "D", "N", "K", "H", "F", "V", "tied", "window", "qkv_bias", "qk_norm", "max_context"})
"""Fields of a ModelShape that the decoder gives effect to. The others it runs only as they are by default."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything the decoder is built from: the shape its cost depends on, and what only its values depend on."""

    shape: ModelShape
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    runs: ClassVar[frozenset[str]] = RUNS
    """A decoder that runs more has a config of its own that says so."""

    def __post_init__(self) -> None:
        """Raises ValueError for a shape that the arithmetic can count and the decoder cannot run, naming the field."""
        for field in fields(ModelShape):
            value = getattr(self.shape, field.name)
            if field.name not in self.runs and value != field.default:
                raise ValueError(f"shape {self.shape.name!r}: {field.name}={value}: the decoder runs dense Llama-family models, "
                                 f"which have {field.name}={field.default}")

    @classmethod
    def from_hf(cls, config: dict[str, Any], name: str = "", source: str = "config.json") -> ModelConfig:
        """Read a Hugging Face config.json of model_type llama, mistral, qwen2 or qwen3.

        Raises ValueError naming key, value and what is accepted, for anything the decoder would not compute as meant.
        """
        keys = Keys(config, source)
        family = keys.take("model_type")
        if family not in FAMILIES:
            keys.refuse("model_type", family, ", ".join(FAMILIES))
        for architecture in keys.take("architectures", None) or ():
            if not architecture.endswith("ForCausalLM"):
                keys.refuse("architectures", architecture, "a causal language model, …ForCausalLM")
        for key, only in ONLY_AS.items():
            if (value := keys.take(key, only)) != only:
                keys.refuse(key, value, repr(only))

        L, D, N = keys.whole("num_hidden_layers"), keys.whole("hidden_size"), keys.whole("num_attention_heads")
        # Where a family's own default is not the usual one, an absent key is refused and not guessed.
        K = keys.whole("num_key_value_heads", N) if family == "llama" else keys.whole("num_key_value_heads")
        H = keys.whole("head_dim") if family == "qwen3" else keys.whole("head_dim", D // N if D % N == 0 else None)
        if H % 2:
            keys.refuse("head_dim", H, "an even number, since RoPE turns pairs")
        if N % K:
            keys.refuse("num_key_value_heads", K, f"a divisor of the {N} query heads")
        theta, scaling = _rope(keys)
        eos = keys.take("eos_token_id", None)
        shape = ModelShape(
            name=name, source=source, L=L, D=D, N=N, K=K, H=H, F=keys.whole("intermediate_size"), V=keys.whole("vocab_size"),
            tied=bool(keys.take("tie_word_embeddings", False)), window=_window(keys, family, L),
            qkv_bias=family == "qwen2", qk_norm=family == "qwen3", max_context=keys.whole("max_position_embeddings"),
        )
        read = cls(shape, keys.number("rms_norm_eps"), theta, scaling, bos_id=keys.take("bos_token_id", None),
                   eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
        for key, value in keys.left.items():
            if key not in CHANGES_NOTHING:
                keys.refuse(key, value, "no such key, since it may change what the model computes")
        return read


def _rope(keys: Keys) -> tuple[float, Llama3Scaling | None]:
    """Base frequency and scaling. transformers 5 writes both into `rope_parameters`, older ones `rope_theta` beside `rope_scaling`."""
    old, new = keys.take("rope_scaling", None), keys.take("rope_parameters", None)
    if old and new and old != new:
        keys.refuse("rope_scaling", old, "one of rope_scaling and rope_parameters, not two that differ")
    theta = keys.number("rope_theta", 10_000.0)
    inner = Keys(new or old or {}, f"{keys.source}: {'rope_parameters' if new else 'rope_scaling'}")
    theta = inner.number("rope_theta", theta)
    # Older files call the type `type`, some say it twice.
    kinds = {inner.take("rope_type", "default"), inner.take("type", "default")} - {"default"}
    scaling = None
    if kinds == {"llama3"}:
        scaling = Llama3Scaling(inner.number("factor"), inner.number("low_freq_factor"), inner.number("high_freq_factor"),
                                inner.whole("original_max_position_embeddings"))
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            inner.refuse("high_freq_factor", scaling.high_freq_factor, f"above low_freq_factor = {scaling.low_freq_factor}")
    elif kinds:
        inner.refuse("rope_type", *sorted(kinds, key=str)[:1], "default, llama3")
    if inner.take("partial_rotary_factor", 1) != 1:
        inner.refuse("partial_rotary_factor", (new or old)["partial_rotary_factor"], "1")
    for key, value in inner.left.items():
        inner.refuse(key, value, "no such key with this rope_type")
    return theta, scaling


def _window(keys: Keys, family: str, layers: int) -> int | None:
    """The sliding window in tokens, if all layers have one; None if none has. Some with and some without are refused."""
    if family == "mistral" and "sliding_window" not in keys.left:
        raise ValueError(f"{keys.source}: sliding_window is missing; a mistral config says it, if only as null")
    size, used = keys.take("sliding_window", None), keys.take("use_sliding_window", family == "mistral")
    first, types = keys.take("max_window_layers", None), keys.take("layer_types", None)
    if family == "llama" and size is not None:
        keys.refuse("sliding_window", size, "None for llama")
    if size is not None and (type(size) is not int or size < 1):
        keys.refuse("sliding_window", size, "a whole number, 1 or more")
    window = size if used else None
    if types is None and window is not None and family != "mistral":
        # Qwen counts the layers before the first window. Where layer_types is given it has the last word.
        if type(first) is not int or 0 < first < layers:
            keys.refuse("max_window_layers", first, f"0 (all layers have a window) or at least {layers} (none has)")
        return window if first <= 0 else None
    kinds = set(types or ["full_attention" if window is None else "sliding_attention"])
    if kinds == {"full_attention"} and family != "mistral":
        return None
    if kinds != {"full_attention" if window is None else "sliding_attention"}:
        keys.refuse("layer_types", types, "one type for all layers, and a sliding_window that agrees")
    return window
