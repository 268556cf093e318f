"""Gated MLP, rotary positions, RMSNorm: Llama and what followed it. Each reader takes `Keys` and
gives the fields of a ModelShape."""

from collections.abc import Sequence

from clawdemy_infer.from_config.keys import Keys

PATTERN_OF = {"full_attention": "global", "sliding_attention": "local"}


def letters(keys: Keys, H: int | None = None, tied: bool = False) -> dict:
    """The letters under the names that most families use, with max_context and tied. `H`, `tied`:
    what their absence means."""
    D, N = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    return {"L": keys.whole("num_hidden_layers"), "D": D, "N": N,
            "K": keys.whole("num_key_value_heads", N),
            "H": keys.whole("head_dim", H or (D // N if D % N == 0 else None)),
            "F": keys.whole("intermediate_size"), "V": keys.whole("vocab_size"),
            "max_context": keys.whole("max_position_embeddings"),
            "tied": bool(keys.take("tie_word_embeddings", tied))}


def window_of(keys: Keys) -> int | None:
    """The tokens that a window holds; None where the file names none, or 0."""
    if keys.left.get("sliding_window"):
        return keys.whole("sliding_window")
    return keys.take("sliding_window", None) or None


def windows(keys: Keys, window: int | None, L: int, usual: Sequence[str]) -> dict:
    """`window` and `pattern`. `usual` is the pattern of a file that has no layer_types, and of
    every file where it is a single kind; without a window all layers see everything."""
    kinds = [usual[i % len(usual)] if window else "global" for i in range(L)]
    types = keys.take("layer_types", [])
    if not isinstance(types, list) or len(types) not in (0, L):
        keys.refuse("layer_types", types, f"one for each of the {L} layers")
    for kind in types:
        if kind not in tuple(PATTERN_OF):               # a tuple, for the value may be a list
            keys.refuse("layer_types", kind, ", ".join(PATTERN_OF))
    said = [PATTERN_OF[kind] for kind in types] or kinds
    if said != kinds and (len(usual) == 1 or not window):
        keys.refuse("layer_types", types, f"what agrees with a window of {window}")
    return {"window": window if "local" in said else None, "pattern": shortest(said)}


def shortest(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that gives these layers when repeated; empty where a ModelShape needs
    none."""
    length = next(n for n in range(1, len(kinds) + 1)
                  if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return () if length == 1 and kinds[0] in ("global", "local") else tuple(kinds[:length])


def linear_biases(keys: Keys) -> tuple[str, ...]:
    """The matrices that have biases in the Llama family."""
    attention = ("qkv", "out") if keys.take("attention_bias", False) else ()
    return attention + (("gate_up", "down") if keys.take("mlp_bias", False) else ())


def llama(keys: Keys) -> dict:
    numbers = letters(keys) | {"biases": linear_biases(keys)}
    return numbers | windows(keys, None, numbers["L"], ["global"])


def mistral(keys: Keys) -> dict:
    """Every layer has the window, if the file gives one."""
    numbers = letters(keys)
    return numbers | windows(keys, window_of(keys), numbers["L"], ["local"])


def phi3(keys: Keys) -> dict:
    keys.only(lm_head_bias=False, attention_bias=False, mlp_bias=False, full_attn_mod=1,
              interpolate_factor=1)
    return mistral(keys)


def qwen2(keys: Keys) -> dict:
    """Q, K and V have a bias."""
    return _qwen(keys, letters(keys)) | {"biases": ("qkv",)}


def qwen3(keys: Keys, H: int | None = 128) -> dict:
    """Q and K are normed head by head."""
    return _qwen(keys, letters(keys, H)) | {"qk_norm": True, "biases": linear_biases(keys)}


def _qwen(keys: Keys, numbers: dict) -> dict:
    """A window is named in every file and used in few; where it is, the first `max_window_layers`
    layers have none."""
    L, window, used = numbers["L"], window_of(keys), keys.take("use_sliding_window", False)
    first = keys.take("max_window_layers", None if used and not keys.left.get("layer_types") else L)
    if type(first) is not int or first < 0:
        keys.refuse("max_window_layers", first, "a whole number")
    usual = ["global"] * min(L, first) + ["local"] * (L - first)
    return numbers | windows(keys, window if used else None, L, usual)


def gemma(keys: Keys) -> dict:
    keys.only(use_bidirectional_attention=False)
    return letters(keys, H=256, tied=True) | {"biases": linear_biases(keys)}


def gemma2(keys: Keys) -> dict:
    """Norms before and after each half of a layer; every other layer looks through a window."""
    numbers = gemma(keys) | {"norms": 4}
    keys.drop("sliding_window_size")                                    # the same figure again
    return numbers | windows(keys, keys.whole("sliding_window"), numbers["L"], ["local", "global"])


def gemma3_text(keys: Keys) -> dict:
    """Q and K normed too, and five windows to one layer that sees everything."""
    numbers = gemma(keys) | {"norms": 4, "qk_norm": True}
    of = keys.take("sliding_window_pattern", keys.take("_sliding_window_pattern", 6))
    usual = ["local"] * (of - 1) + ["global"]
    return numbers | windows(keys, keys.whole("sliding_window"), numbers["L"], usual)


def cohere(keys: Keys) -> dict:
    """Attention and MLP side by side behind one norm."""
    keys.only(use_qk_norm=False, attention_bias=False)
    return letters(keys, tied=True) | {"norms": 1, "parallel": True}


FAMILIES = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "phi3": phi3,
            "gemma": gemma, "gemma2": gemma2, "gemma3_text": gemma3_text, "cohere": cohere}
