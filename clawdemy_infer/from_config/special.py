"""What a table cannot say of a family: each function takes its keys, and gives fields of the
ModelShape that go before those of the table. Besides: `usual`, the kind of every layer; `shared`,
the layers that use another's cache or index; `sparse`, whether a layer has experts; `of_moe`, more
fields of MoE."""

from math import ceil

from clawdemy_infer.arithmetic import SSM
from clawdemy_infer.from_config.keys import Keys


def qwen(keys: Keys, says: dict) -> dict:
    """A window is named in every file and used in few; where it is, the first `max_window_layers`
    layers have none."""
    L, used = keys.peek("num_hidden_layers"), keys.flag("use_sliding_window", False)
    by_layer = keys.left.get("layer_types")
    first = keys.whole("max_window_layers", None if used and not by_layer else L, least=0)
    keys.left["sliding_window"] = keys.whole("sliding_window", 0, least=0) if used else 0
    return {"usual": ["global"] * min(L, first) + ["local"] * (L - first)}


def falcon(keys: Keys, says: dict) -> dict:
    """One KV head at first (7B), then some (40B, 180B, which call that the new architecture and
    have two norms)."""
    new, parallel = keys.flag("new_decoder_architecture", False), keys.flag("parallel_attn", True)
    N = keys.peek("num_attention_heads")
    groups, multi_query = keys.whole("num_kv_heads", N), keys.flag("multi_query", True)
    norms = keys.whole("num_ln_in_parallel_attn", 2 if new else 1) if parallel else 2
    return {"K": groups if new else 1 if multi_query else N, "norms": norms,
            "parallel": parallel or new, "rope": not keys.flag("alibi", False)}


def gpt_bigcode(keys: Keys, says: dict) -> dict:
    return {"K": 1} if keys.flag("multi_query", True) else {}


def gpt_neo(keys: Keys, says: dict) -> dict:
    """Every other layer looks through a window, as a list says by layer or by how often."""
    types, window = keys.take("attention_types", None), keys.whole("window_size", 256)
    if types and types != [[["global", "local"], keys.peek("num_hidden_layers") // 2]]:
        keys.refuse("attention_types", types, "global and local in turn")
    keys.only(attention_layers=["global", "local"] * (keys.peek("num_hidden_layers") // 2))
    return {"usual": ["global", "local"], "window": window}


def opt(keys: Keys, says: dict) -> dict:
    """The table of positions has two rows that are never used (Zhang et al. 2022)."""
    return {"positions": keys.peek("max_position_embeddings") + 2}


def bloom(keys: Keys, says: dict) -> dict:
    return {"extra": 2 * keys.peek("hidden_size")}          # a norm behind the embedding


def mpt(keys: Keys, says: dict) -> dict:
    attention = keys.inner("attn_config")
    attention.only(alibi=True, attn_type="multihead_attention", qk_ln=False, prefix_lm=False)
    attention.drop("alibi_bias_max", "attn_impl", "attn_pdrop", "clip_qkv", "softmax_scale")
    attention.none_left()
    keys.left["intermediate_size"] = keys.whole("expansion_ratio", 4) * keys.peek("hidden_size")
    return {}


def dbrx(keys: Keys, says: dict) -> dict:
    attention, feed = keys.inner("attn_config"), keys.inner("ffn_config")
    keys.left["intermediate_size"] = feed.whole("ffn_hidden_size")
    for key in ("moe_num_experts", "moe_top_k"):
        keys.left[key] = feed.whole(key)
    feed.only(ffn_act_fn={"name": "silu"}, hidden_size=keys.peek("hidden_size"))
    feed.drop("moe_jitter_eps", "moe_loss_weight", "moe_normalize_expert_weights",
              "uniform_expert_assignment")
    attention.drop("attn_pdrop", "clip_qkv", "rope_theta")
    K = attention.whole("kv_n_heads", 1)
    for inner in (attention, feed):
        inner.none_left()
    return {"K": K}


def stablelm(keys: Keys, says: dict) -> dict:
    parallel = keys.flag("use_parallel_residual", False)
    return {"norms": 1, "parallel": True} if parallel else {}


def chatglm(keys: Keys, says: dict) -> dict:
    groups = keys.whole("multi_query_group_num", keys.peek("num_attention_heads"))
    return {"K": groups} if keys.flag("multi_query_attention", False) else {}


def yuan(keys: Keys, says: dict) -> dict:
    """Two convolutions over two tokens, D to D/2 and back, go before Q and K (Wu et al. 2023): as
    many weights as two gates, with their biases and a norm."""
    D = keys.peek("hidden_size")
    return {"gate": 2 * D // keys.peek("num_attention_heads"),
            "extra": keys.peek("num_hidden_layers") * (2 * D + D // 2)}


def hunyuan(keys: Keys, says: dict) -> dict:
    """Hunyuan-Large (Sun et al. 2024): of `cla_share_factor` layers the first makes keys and
    values, the others attend to its cache."""
    factor = keys.whole("cla_share_factor", 1) if keys.flag("use_cla", False) else 1
    return {"usual": ["global"] + ["global shared"] * (factor - 1)}


def apertus(keys: Keys, says: dict) -> dict:
    return {"extra": 2 * keys.peek("num_hidden_layers")}    # two numbers of each activation


def gemma4_text(keys: Keys, says: dict) -> dict:
    """Layers that see all have heads of their own; the last ones may use the caches of earlier
    ones; a layer may have an input of its own, or experts beside its MLP."""
    L, D, K = (keys.peek(key) for key in ("num_hidden_layers", "hidden_size",
                                          "num_key_value_heads"))
    one_kv = keys.flag("attention_k_eq_v", False)
    heads = keys.whole("num_global_key_value_heads", K)
    full = (heads if one_kv else K, keys.whole("global_head_dim", 512))
    reused = keys.whole("num_kv_shared_layers", 0, least=0, most=L - 1)
    own, wide = keys.whole("hidden_size_per_layer_input", 256, least=0), keys.flag(
        "use_double_wide_mlp", False)
    fields = {"full": full, "one_kv": one_kv, "shared": range(L - reused, L), "wide": wide,
              "per_layer": own, "norms": 4 + bool(own), "extra": own}
    usual = [*(("local",) * 5 + ("global",)) * (L // 6 + 1)][:L - 1] + ["global"]
    if keys.flag("enable_moe_block", False):
        keys.left["shared_expert"] = keys.peek("intermediate_size")
        fields |= {"norms": fields["norms"] + 3,
                   "extra": own + L * (D + keys.peek("num_experts"))}
    else:
        keys.left |= {"num_experts": 0, "top_k_experts": 0}
    return fields | {"usual": usual}


gemma4_unified_text = gemma4_text


def llama4_text(keys: Keys, says: dict) -> dict:
    """Layers without positions see all, the others a chunk, which here is a window; an expert for
    all has the width of the others, a plain MLP its own."""
    L, width = keys.peek("num_hidden_layers"), keys.whole("intermediate_size")
    keys.left |= {"intermediate_size": keys.whole("intermediate_size_mlp", width),
                  "moe_intermediate_size": width, "shared_expert_intermediate_size": width}
    every = keys.whole("no_rope_layer_interval", 4)
    turned = keys.bits("no_rope_layers", L) or [(i + 1) % every != 0 for i in range(L)]
    fields = {"usual": ["local" if one else "global" for one in turned]}
    if (chosen := keys.take("moe_layers", None)) is not None:
        fields["sparse"] = [i in keys.indices("moe_layers", chosen, L) for i in range(L)]
    return fields


def indexed(keys: Keys, says: dict) -> dict:
    """A layer may take the tokens that an earlier one chose."""
    L = keys.peek("num_hidden_layers")
    types = keys.one_each("indexer_types", L, ("full", "shared"))
    return {"shared": [i for i, kind in enumerate(types) if kind == "shared"]}


def delta(keys: Keys, says: dict) -> dict:
    """Gated delta networks, in each layer but every fourth; there the output has a gate."""
    heads, groups = keys.whole("linear_num_value_heads"), keys.whole("linear_num_key_heads")
    inner = heads * keys.whole("linear_value_head_dim")
    ssm = SSM(inner, keys.whole("linear_key_head_dim"), keys.whole("linear_conv_kernel_dim", 4),
              heads=heads, groups=groups, delta=True)
    every = keys.whole("full_attention_interval", 4, most=1000)
    return {"ssm": ssm, "gate": keys.peek("head_dim"), "usual": ["ssm"] * (every - 1) + ["global"]}


def kimi_linear(keys: Keys, says: dict) -> dict:
    """Kimi's delta attention (2025), in all layers but those that the file counts from 1."""
    L, own = keys.peek("num_hidden_layers"), keys.inner("linear_attn_config")
    heads, size = own.whole("num_heads"), own.whole("head_dim")
    full = own.indices("full_attn_layers", own.take("full_attn_layers"), L + 1)
    own.indices("kda_layers", own.take("kda_layers", []), L + 1)
    ssm = SSM(heads * size, size, own.whole("short_conv_kernel_size", 4), dt_rank=size,
              heads=heads, groups=heads, delta=True)
    own.none_left()
    return {"ssm": ssm, "usual": ["global" if i + 1 in full else "ssm" for i in range(L)]}


def mamba(keys: Keys, says: dict) -> dict:
    """Mamba and Falcon-Mamba: mixers alone, no MLP."""
    D, expand = keys.peek("hidden_size"), keys.whole("expand", 2)
    inner = keys.whole("intermediate_size", expand * D)     # Falcon-Mamba's expand says 16, means 2
    keys.only(d_inner=inner, d_model=D, n_layer=keys.peek("num_hidden_layers"))
    ssm = SSM(inner, keys.whole("state_size"), keys.whole("conv_kernel", 4),
              dt_rank=_dt_rank(keys, "time_step_rank", D))
    return {"ssm": ssm, "norms": 1, "usual": ["ssm"]}


def mamba2(keys: Keys, says: dict) -> dict:
    inner = keys.whole("expand", 2) * keys.peek("hidden_size")
    keys.only(intermediate_size=inner)
    names = ("num_heads", "head_dim", "state_size", "conv_kernel", "n_groups")
    return {"ssm": _second(keys, inner, *names), "norms": 1, "usual": ["ssm"]}


def bamba(keys: Keys, says: dict) -> dict:
    """Mamba-2 in all layers but some. Granite 4 has an MLP for all beside its experts, or alone."""
    L, heads = keys.peek("num_hidden_layers"), keys.peek("mamba_n_heads")
    inner = keys.whole("mamba_expand", 2) * keys.peek("hidden_size")
    if keys.left.get("mamba_d_head", "auto") == "auto":
        keys.left["mamba_d_head"] = max(1, inner // heads)
    names = ("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_d_conv", "mamba_n_groups")
    if "shared_intermediate_size" in keys.left and not keys.left["num_local_experts"]:
        keys.left["intermediate_size"] = keys.take("shared_intermediate_size")
    attends = keys.indices("attn_layer_indices", keys.take("attn_layer_indices", []), L)
    return {"ssm": _second(keys, inner, *names),
            "usual": ["global" if i in attends else "ssm" for i in range(L)]}


def jamba(keys: Keys, says: dict) -> dict:
    """One layer in `attn_layer_period` attends, without positions: the recurrence knows the order.
    Some have experts."""
    L, D = keys.peek("num_hidden_layers"), keys.peek("hidden_size")
    (period, offset), (every, first) = (
        (keys.whole(f"{what}_layer_period"), keys.whole(f"{what}_layer_offset", least=0))
        for what in ("attn", "expert"))
    ssm = SSM(keys.whole("mamba_expand", 2) * D, keys.whole("mamba_d_state", 16),
              keys.whole("mamba_d_conv", 4), norms=True, dt_rank=_dt_rank(keys, "mamba_dt_rank", D))
    return {"ssm": ssm, "sparse": [i % every == first for i in range(L)],
            "usual": ["global" if i % period == offset else "ssm" for i in range(L)]}


def nemotron_h(keys: Keys, says: dict) -> dict:
    """Each layer is a mixer or a feed-forward part, as letters or words say."""
    letters = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    words = {"mamba": "ssm alone", "linear_attention": "ssm alone", "attention": "global alone",
             "full_attention": "global alone", "mlp": "mlp alone", "moe": "mlp alone"}
    text, found = keys.take("hybrid_override_pattern", ""), keys.take("layers_block_type", [])
    if not isinstance(text, str) or set(text) - set(letters):
        keys.refuse("hybrid_override_pattern", text, f"letters of {' '.join(letters)}")
    keys.left["layers_block_type"] = found or [letters[letter] for letter in text]
    L = keys.left["num_hidden_layers"] or len(keys.left["layers_block_type"])
    keys.left["num_hidden_layers"] = L
    kinds = keys.one_each("layers_block_type", keys.peek("num_hidden_layers"), tuple(words))
    if not kinds:
        keys.refuse("hybrid_override_pattern", text, "a letter for each layer")
    sparse = [kind == "moe" for kind in kinds]
    names = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "conv_kernel", "n_groups")
    inner = keys.peek(names[0]) * keys.peek(names[1])
    latent = keys.whole("moe_latent_size", 0, least=0)
    return {"ssm": _second(keys, inner, *names), "usual": [words[kind] for kind in kinds],
            "sparse": sparse, "of_moe": {"latent": latent}}


def _second(keys: Keys, inner: int, heads: str, size: str, state: str, conv: str,
            groups: str) -> SSM:
    """Mamba-2's numbers, from keys of these names."""
    count, width = keys.whole(heads), keys.whole(size)
    if count * width != inner:
        keys.refuse(heads, count, f"a number of heads of {width} that make {inner} channels")
    return SSM(inner, keys.whole(state), keys.whole(conv, 4), heads=count,
               groups=keys.whole(groups, 1))


def _dt_rank(keys: Keys, key: str, D: int) -> int:
    if keys.left.get(key, "auto") == "auto":
        keys.left[key] = ceil(D / 16)
    return keys.whole(key)
