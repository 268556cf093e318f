"""Mamba, Mamba-2, and Jamba, which has an attention layer in eight."""

from math import ceil

from clawdemy_infer.arithmetic import SSM, MoE
from clawdemy_infer.from_config.keys import Keys
from clawdemy_infer.from_config.llama import letters, shortest
from clawdemy_infer.from_config.sparse import experts

NO_COST = ("time_step_min", "time_step_max", "time_step_floor", "time_step_scale",
           "time_step_limit", "time_step_init_scheme", "rescale_prenorm_residual",
           "residual_in_fp32", "chunk_size", "use_mambapy", "use_associative_scan",
           "use_mamba_kernels", "fused_add_norm", "pad_vocab_size_multiple")
"""How the mixer's numbers begin, which kernel runs it, and what vocab_size has in it already."""


def mamba(keys: Keys) -> dict:
    """Mamba and Falcon-Mamba: mixers alone, no MLP."""
    numbers = _no_attention(keys, tied=True)
    D, expand = numbers["D"], keys.whole("expand", 2)
    inner = keys.whole("intermediate_size", expand * D)     # Falcon-Mamba's expand says 16, means 2
    keys.only(use_conv_bias=True, d_inner=inner, d_model=D, n_layer=numbers["L"], rms_norm=True,
              ssm_cfg={})
    ssm = SSM(inner, keys.whole("state_size"), keys.whole("conv_kernel", 4),
              dt_rank=_dt_rank(keys, "time_step_rank", D))
    return numbers | {"ssm": ssm}


def mamba2(keys: Keys) -> dict:
    numbers = _no_attention(keys, tied=False)
    heads, size = keys.whole("num_heads"), keys.whole("head_dim")
    inner = keys.whole("expand", 2) * numbers["D"]
    if heads * size != inner:
        keys.refuse("num_heads", heads, f"expand * hidden_size / head_dim = {inner / size:g}")
    keys.only(intermediate_size=inner, use_conv_bias=True, norm_before_gate=True, rms_norm=True)
    keys.drop("time_step_rank")                                         # Mamba-2 has none
    ssm = SSM(inner, keys.whole("state_size"), keys.whole("conv_kernel", 4), heads=heads,
              groups=keys.whole("n_groups"))
    return numbers | {"ssm": ssm}


def jamba(keys: Keys) -> dict:
    """One layer in `attn_layer_period` attends, without positions: the recurrence knows the order.
    Some have experts."""
    keys.only(mamba_conv_bias=True, mamba_proj_bias=False, mamba_inner_layernorms=True)
    keys.drop("num_logits_to_keep", "calc_logits_for_entire_prompt", "n_ctx", *NO_COST)
    numbers = letters(keys) | {"rope": False}
    period, offset = keys.whole("attn_layer_period"), keys.take("attn_layer_offset")
    kinds = ["global" if index % period == offset else "ssm" for index in range(numbers["L"])]
    ssm = SSM(keys.whole("mamba_expand", 2) * numbers["D"], keys.whole("mamba_d_state", 16),
              keys.whole("mamba_d_conv", 4), norms=True,
              dt_rank=_dt_rank(keys, "mamba_dt_rank", numbers["D"]))
    numbers |= {"pattern": shortest(kinds), "ssm": ssm}
    count, active = keys.whole("num_experts"), keys.whole("num_experts_per_tok")
    every, offset = keys.whole("expert_layer_period"), keys.take("expert_layer_offset")
    return experts(numbers, MoE(count, active, every=every,
                                offset=offset)) if count > 1 else numbers


def _no_attention(keys: Keys, tied: bool) -> dict:
    keys.only(use_bias=False)
    keys.drop(*NO_COST)
    return {"L": keys.whole("num_hidden_layers"), "D": keys.whole("hidden_size"), "N": 0, "K": 0,
            "H": 0, "F": 0, "V": keys.whole("vocab_size"), "norms": 1, "pattern": ("ssm",),
            "tied": bool(keys.take("tie_word_embeddings", tied))}


def _dt_rank(keys: Keys, key: str, D: int) -> int:
    rank = keys.take(key, "auto")
    return ceil(D / 16) if rank == "auto" else rank


FAMILIES = {"mamba": mamba, "falcon_mamba": mamba, "mamba2": mamba2, "jamba": jamba}
