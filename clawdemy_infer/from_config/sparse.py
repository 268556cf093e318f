"""Mixtures of experts, and the two ways to share a cache that came with them: latent attention and
cross-layer attention."""

from dataclasses import replace

from clawdemy_infer.arithmetic import MLA, MoE
from clawdemy_infer.from_config.keys import Keys
from clawdemy_infer.from_config.llama import letters, mistral, qwen2, qwen3, shortest, windows


def experts(numbers: dict, moe: MoE) -> dict:
    """The numbers with their experts. Where no layer has a plain MLP, F is the experts' own width
    and `moe` need not say it."""
    plain = any(not moe.in_layer(index) for index in range(numbers["L"]))
    width = moe.F or numbers["F"]
    own = width if plain and width != numbers["F"] else None
    return numbers | {"F": numbers["F"] if plain else width, "moe": replace(moe, F=own)}


def mixtral(keys: Keys) -> dict:
    moe = MoE(keys.whole("num_local_experts"), keys.whole("num_experts_per_tok"))
    return experts(mistral(keys), moe)


def qwen2_moe(keys: Keys) -> dict:
    """A shared expert, weighed by a gate of its own."""
    keys.only(qkv_bias=True)
    shared = keys.whole("shared_expert_intermediate_size")
    return experts(qwen2(keys), _qwen_experts(keys, shared=shared, shared_gate=True))


def qwen3_moe(keys: Keys) -> dict:
    return experts(qwen3(keys, H=None), _qwen_experts(keys))


def _qwen_experts(keys: Keys, **shared) -> MoE:
    every, plain = keys.whole("decoder_sparse_step", 1), keys.take("mlp_only_layers", [])
    if plain != list(range(len(plain))):
        keys.refuse("mlp_only_layers", plain, "the first layers, if any")
    count = keys.take("num_experts", None) or keys.whole("num_local_experts")
    return MoE(count, keys.whole("num_experts_per_tok"), keys.whole("moe_intermediate_size"),
               first_dense=len(plain), every=every, offset=every - 1, **shared)


def gpt_oss(keys: Keys) -> dict:
    """Every other layer looks through a window; each head has a learned logit to attend to nothing
    by."""
    keys.only(attention_bias=True)
    keys.drop("experts_per_token", "initial_context_length")            # say the same again
    numbers = letters(keys) | {"sinks": True, "biases": ("qkv", "out", "router", "gate_up", "down")}
    numbers |= windows(keys, keys.whole("sliding_window"), numbers["L"], ["local", "global"])
    return experts(numbers, MoE(keys.whole("num_local_experts"), keys.whole("num_experts_per_tok")))


def deepseek(keys: Keys) -> dict:
    """V2, V3 and Kimi K2. `num_nextn_predict_layers` names draft layers that are stored beside the
    model and not run in its steps."""
    keys.only(attention_bias=False, mlp_bias=False, moe_layer_freq=1)
    keys.drop("num_nextn_predict_layers", "num_mtp_layers", "head_dim", "qk_head_dim",
              "num_local_experts")
    rope, nope = keys.whole("qk_rope_head_dim"), keys.whole("qk_nope_head_dim")
    mla = MLA(keys.whole("kv_lora_rank"), rope, keys.whole("v_head_dim"),
              keys.take("q_lora_rank", None))
    width = keys.whole("moe_intermediate_size")
    moe = MoE(keys.whole("n_routed_experts"), keys.whole("num_experts_per_tok"), width,
              shared=keys.take("n_shared_experts", 0) * width,
              first_dense=keys.take("first_k_dense_replace", 0))
    return experts(letters(keys, H=nope + rope) | {"mla": mla}, moe)


def hunyuan(keys: Keys) -> dict:
    """Hunyuan-Large (Sun et al. 2024): of `cla_share_factor` layers the first makes keys and
    values, the others attend to its cache."""
    keys.only(attention_bias=False, mlp_bias=False, use_mixed_mlp_moe=True)
    numbers = letters(keys, tied=True) | {"qk_norm": bool(keys.take("use_qk_norm", False))}
    factor = keys.whole("cla_share_factor", 1) if keys.take("use_cla", False) else 1
    kinds = ["global shared" if index % factor else "global" for index in range(numbers["L"])]
    moe = MoE(keys.whole("num_experts"), keys.whole("moe_topk"),
              shared=keys.take("num_shared_expert", 0) * numbers["F"])
    return experts(numbers | {"pattern": shortest(kinds)}, moe)


FAMILIES = {"mixtral": mixtral, "qwen2_moe": qwen2_moe, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss,
            "deepseek_v2": deepseek, "deepseek_v3": deepseek, "kimi_k2": deepseek,
            "hunyuan": hunyuan}
