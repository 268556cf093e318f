"""GPT-2 and its kind: LayerNorm with a bias, biases in the linear layers, an MLP without a gate,
and no rotary positions at first."""

from clawdemy_infer.from_config.keys import Keys
from clawdemy_infer.from_config.llama import letters, window_of, windows

LINEAR = ("qkv", "out", "up", "down")


def gpt2(keys: Keys) -> dict:
    keys.only(add_cross_attention=False, n_special=0)
    numbers = _letters_of_gpt2(keys)
    return numbers | {"tied": keys.take("tie_word_embeddings", True), "rope": False,
                      "positions": numbers["max_context"], "biases": (*LINEAR, "norm")}


def gptj(keys: Keys) -> dict:
    """Rotary, with attention and MLP side by side behind one norm; biases in the MLP and the head
    alone."""
    return _letters_of_gpt2(keys) | {
        "tied": keys.take("tie_word_embeddings", False), "norms": 1, "parallel": True,
        "biases": ("up", "down", "norm", "head")}


def _letters_of_gpt2(keys: Keys) -> dict:
    D, N, context = keys.whole("n_embd"), keys.whole("n_head"), keys.whole("n_positions")
    keys.only(n_ctx=context)
    if D % N:
        keys.refuse("n_head", N, f"a divisor of n_embd = {D}")
    return {"L": keys.whole("n_layer"), "D": D, "N": N, "K": N, "H": D // N,
            "F": keys.whole("n_inner", 4 * D), "gated": False, "V": keys.whole("vocab_size"),
            "max_context": context}


def opt(keys: Keys) -> dict:
    """As GPT-2. The table of positions has two rows that are never used (Zhang et al. 2022)."""
    keys.left["intermediate_size"] = keys.take("ffn_dim")
    numbers = letters(keys, tied=True)
    keys.only(word_embed_proj_dim=numbers["D"], do_layer_norm_before=True,
              _remove_final_layer_norm=False, enable_bias=True, layer_norm_elementwise_affine=True,
              prefix="</s>")
    return numbers | {"gated": False, "rope": False, "positions": numbers["max_context"] + 2,
                      "biases": (*LINEAR, "norm")}


def gpt_neox(keys: Keys) -> dict:
    """Side by side, but each behind a norm of its own."""
    biases = LINEAR if keys.take("attention_bias", True) else LINEAR[2:]
    return letters(keys) | {"gated": False, "biases": (*biases, "norm"),
                            "parallel": bool(keys.take("use_parallel_residual", True))}


def falcon(keys: Keys) -> dict:
    """One KV head at first (7B), then some (40B, 180B, which call that the new architecture and
    have two norms)."""
    keys.left.setdefault("intermediate_size",
                         keys.take("ffn_hidden_size", 4 * keys.left.get("hidden_size", 0)))
    keys.left.setdefault("max_position_embeddings", 2048)
    numbers = letters(keys, tied=True)
    new, parallel = keys.take("new_decoder_architecture", False), keys.take("parallel_attn", True)
    groups, multi_query = keys.take("num_kv_heads", numbers["N"]), keys.take("multi_query", True)
    norms = keys.take("num_ln_in_parallel_attn", 2 if new else 1) if parallel else 2
    keys.drop("apply_residual_connection_post_layernorm")               # no class reads it
    return numbers | {
        "K": groups if new else 1 if multi_query else numbers["N"], "gated": False, "norms": norms,
        "parallel": bool(parallel or new), "rope": not keys.take("alibi", False),
        "biases": (*LINEAR, "norm") if keys.take("bias", False) else ("norm",)}


def phi(keys: Keys) -> dict:
    keys.only(qk_layernorm=False)
    return letters(keys) | {"gated": False, "norms": 1, "parallel": True,
                            "biases": (*LINEAR, "norm", "head")}


def starcoder2(keys: Keys) -> dict:
    keys.only(mlp_type="default", norm_type="layer_norm")
    biases = (*LINEAR, "norm") if keys.take("use_bias", True) else ("norm",)
    numbers = letters(keys, tied=True) | {"gated": False, "biases": biases}
    return numbers | windows(keys, window_of(keys), numbers["L"], ["local"])


FAMILIES = {"gpt2": gpt2, "gptj": gptj, "opt": opt, "gpt_neox": gpt_neox, "falcon": falcon,
            "phi": phi, "starcoder2": starcoder2}
