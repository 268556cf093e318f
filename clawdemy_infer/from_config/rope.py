"""How RoPE is stretched to a longer context than a model was first trained on. Each way divides the
frequency theta^(-2j/H) of pair j by a number of its own (`slower`), and computes what transformers
5.23 does (modeling_rope_utils.py):

    linear      factor                                          (Chen et al. 2023)
    llama3      1 where a pair turns often within the original context, factor where less than about
                once, between the two a straight line           (Meta's Llama 3.1, `apply_scaling`)
    yarn        the same, the line being over j; cos and sin are multiplied by `attention_factor`
                                                                (Peng et al. 2023)
    dynamic     1 up to the original context S0; in a text of S tokens beyond it, as the base grows,
                (1 + factor (S/S0 - 1))^(2j/(H-2))              (NTK-aware)
    longrope    one list of numbers up to the original context, another beyond, and
                `attention_factor` too                          (Ding et al. 2024)
"""

import math
from dataclasses import dataclass

from clawdemy_infer.from_config.keys import Keys, above_0


@dataclass(frozen=True)
class RopeScaling:
    """One of these ways, in the words of config.json; data/families.toml has those of each."""

    rope_type: str
    factor: float
    original_max_position_embeddings: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def same_until(self) -> int | None:
        """The tokens of a text beyond which the angles depend on its length."""
        by_length = self.rope_type in ("dynamic", "longrope")
        return self.original_max_position_embeddings if by_length else None

    def slower(self, H: int, theta: float, length: int = 0) -> list[float]:
        """By what the frequency of each of the H/2 pairs is divided, in a text of `length`
        tokens."""
        original, factor = self.original_max_position_embeddings, self.factor
        if self.rope_type == "longrope":
            return list(self.long_factor if length > original else self.short_factor)
        if self.rope_type == "dynamic":
            grown = 1 + factor * (max(length, original) / original - 1)
            return [grown ** (2 * j / (H - 2)) for j in range(H // 2)]
        if self.rope_type == "linear":
            return [factor] * (H // 2)
        # llama3 and yarn: how much of its frequency each pair keeps; the rest is divided by factor.
        if self.rope_type == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            keep = [(original * theta**(-2 * j / H) / (2 * math.pi) - low) / (high - low)
                    for j in range(H // 2)]
        else:   # the pairs that turn beta_fast and beta_slow times within the original context
            first, last = (H * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                           for turns in (self.beta_fast, self.beta_slow))
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, H - 1)
            keep = [1 - (j - first) / ((last - first) or 0.001) for j in range(H // 2)]
        clamped = (min(max(each, 0), 1) for each in keep)
        return [1 / (each + (1 - each) / factor) for each in clamped]


def scaling_of(keys: Keys, kind: str, H: int, theta: float, context: int,
               original: int | None) -> RopeScaling:
    """From the keys of rope_scaling, for heads of H and a file that says `context` tokens and
    maybe, beside rope_scaling, that it was first trained on `original`. Raises Refused."""
    if kind in ("linear", "dynamic"):
        if kind == "dynamic" and H == 2:
            keys.refuse("rope_type", kind, "another for a head_dim of 2")
        return RopeScaling(kind, keys.number("factor"), context)
    within = keys.whole("original_max_position_embeddings", original or context)
    original = original or within
    if kind == "llama3":
        low, high = keys.number("low_freq_factor"), keys.number("high_freq_factor")
        if high <= low:
            keys.refuse("high_freq_factor", high, f"above low_freq_factor = {low}")
        return RopeScaling(kind, keys.number("factor"), original, low_freq_factor=low,
                           high_freq_factor=high)
    factor = keys.number("factor", context / original)
    if kind == "longrope":
        if not 1 < original <= context:
            keys.refuse("original_max_position_embeddings", original, f"2 to {context}")
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        half, accepted = H // 2, f"{H // 2} numbers above 0, half the head_dim"
        short, long = (keys.listed(key, above_0, accepted, least=half, most=half)
                       for key in ("short_factor", "long_factor"))
        return RopeScaling(kind, factor, original, keys.number("attention_factor", usual),
                           short_factor=tuple(short), long_factor=tuple(long))
    # yarn. DeepSeek's mscale: the one for the keys over the one for all dimensions.
    if theta == 1:
        keys.refuse("rope_type", kind, "another for a rope_theta of 1")
    mscales = [keys.number(key) for key in ("mscale", "mscale_all_dim") if keys.left.get(key)]
    keys.drop("mscale", "mscale_all_dim")                       # 0 is as good as none
    grown = [1 + 0.1 * each * math.log(max(factor, 1)) for each in mscales]
    usual = grown[0] / grown[1] if len(grown) == 2 else 1 + 0.1 * math.log(max(factor, 1))
    truncate = keys.flag("truncate", True)
    return RopeScaling(kind, factor, original, keys.number("attention_factor", usual),
                       keys.number("beta_fast", 32.0), keys.number("beta_slow", 1.0), truncate)
