"""`transformers` configs with the numbers of a ModelShape: the oracle's side of every comparison of
shapes.

Written against the config classes of transformers alone. It shares no line with
`clawdemy_infer.from_config`, which goes the other way.
"""

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    FalconConfig,
    FalconMambaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Starcoder2Config,
)

from clawdemy_infer.arithmetic import MLA, SSM, ModelShape, MoE

# By how a name in models.toml begins; the longest that fits.
CLASSES = {
    "smollm2": LlamaConfig, "tinyllama": LlamaConfig, "llama": LlamaConfig,
    "codellama": LlamaConfig, "yi": LlamaConfig, "mistral": MistralConfig, "phi-4": Phi3Config,
    "phi-3": Phi3Config, "qwen2.5": Qwen2Config, "qwen3": Qwen3Config, "gemma": GemmaConfig,
    "gemma-2-": Gemma2Config, "gemma-3": Gemma3TextConfig, "aya": CohereConfig,
    "mixtral": MixtralConfig, "qwen1.5-moe": Qwen2MoeConfig, "qwen3-30b-a3b": Qwen3MoeConfig,
    "qwen3-235b": Qwen3MoeConfig, "gpt-oss": GptOssConfig, "deepseek-v2": DeepseekV2Config,
    "deepseek-v3": DeepseekV3Config, "kimi-k2": DeepseekV3Config, "mamba": MambaConfig,
    "falcon-mamba": FalconMambaConfig, "mamba-codestral": Mamba2Config, "jamba": JambaConfig,
    "gpt2": GPT2Config, "opt": OPTConfig, "gpt-j": GPTJConfig, "gpt-neox": GPTNeoXConfig,
    "phi-2": PhiConfig, "falcon": FalconConfig, "starcoder2": Starcoder2Config,
}
NOT_IN_TRANSFORMERS = {"hunyuan-large"}


def class_of(name: str) -> type:
    return CLASSES[max((prefix for prefix in CLASSES if name.startswith(prefix)), key=len)]


def config_of(kind: type, s: ModelShape, **more):
    """A config of class `kind` with the numbers of `s`; `more` goes on top."""
    letters = {
        "num_hidden_layers": s.L, "hidden_size": s.D, "vocab_size": s.V,
        "tie_word_embeddings": s.tied
    }
    # Without special tokens, which would have to lie within a small vocabulary.
    letters |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if s.N:
        letters |= {"num_attention_heads": s.N, "max_position_embeddings": s.max_context or 4096}
        # these say it otherwise, or not at all
        if kind not in (GPT2Config, GPTJConfig, OPTConfig, GPTNeoXConfig, FalconConfig):
            letters |= {"num_key_value_heads": s.K, "head_dim": s.H, "intermediate_size": s.F}
    return kind(**letters | OWN.get(kind, lambda s: {})(s) | more)


def layer_types(s: ModelShape) -> dict:
    return {
        "layer_types": [{"local": "sliding_attention", "global": "full_attention"}[kind]
                        for kind in s.kinds]
    }


def of_deepseek(s):
    return {
        "qk_nope_head_dim": s.H - s.mla.rope, "qk_rope_head_dim": s.mla.rope,
        "v_head_dim": s.mla.value, "kv_lora_rank": s.mla.latent, "q_lora_rank": s.mla.q_latent,
        "head_dim": s.mla.rope, "n_routed_experts": s.moe.experts,
        "num_experts_per_tok": s.moe.active, "moe_intermediate_size": s.moe.F,
        "n_shared_experts": s.moe.shared//s.moe.F, "first_k_dense_replace": s.moe.first_dense,
        "n_group": 1, "topk_group": 1
    }


def of_qwen_moe(s):
    return {
        "num_experts": s.moe.experts, "num_experts_per_tok": s.moe.active,
        "moe_intermediate_size": s.moe.F or s.F, "decoder_sparse_step": s.moe.every,
        "mlp_only_layers": list(range(s.moe.first_dense))
    }


def of_mamba(s):
    return {
        "state_size": s.ssm.state, "conv_kernel": s.ssm.conv, "expand": s.ssm.inner//s.D,
        "time_step_rank": s.ssm.dt_rank, "intermediate_size": s.ssm.inner
    }


OWN = {
    LlamaConfig: lambda s: {"attention_bias": "qkv" in s.biases, "mlp_bias": "down" in s.biases},
    MistralConfig: lambda s: {"sliding_window": s.window},
    Phi3Config: lambda s: {"sliding_window": s.window},
    Gemma2Config: lambda s: {"sliding_window": s.window, **layer_types(s)},
    Gemma3TextConfig: lambda s: {"sliding_window": s.window, **layer_types(s)},
    GptOssConfig: lambda s: {
        "sliding_window": s.window, "num_local_experts": s.moe.experts, "num_experts_per_tok": s.moe
        .active, **layer_types(s)
    }, MixtralConfig: lambda s: {
        "sliding_window": s.window, "num_local_experts": s.moe.experts, "num_experts_per_tok": s.moe
        .active
    },
    Qwen2MoeConfig: lambda s: {**of_qwen_moe(s), "shared_expert_intermediate_size": s.moe.shared},
    Qwen3MoeConfig: of_qwen_moe, DeepseekV2Config: of_deepseek, DeepseekV3Config: of_deepseek,
    MambaConfig: of_mamba, FalconMambaConfig: of_mamba, Mamba2Config: lambda s: {
        "state_size": s.ssm.state, "conv_kernel": s.ssm.conv, "expand": s.ssm.inner//s.D,
        "num_heads": s.ssm.heads, "head_dim": s.ssm.inner//s.ssm.heads, "n_groups": s.ssm.groups
    }, JambaConfig: lambda s: {
        "mamba_d_state": s.ssm.state, "mamba_d_conv": s.ssm.conv, "mamba_expand": s.ssm.inner//s.D,
        "mamba_dt_rank": s.ssm.dt_rank, "attn_layer_period": len(
            s.pattern), "attn_layer_offset": s.pattern.index("global"), "num_experts": s.moe.
        experts, "num_experts_per_tok": s.moe.active, "expert_layer_period": s.moe.every,
        "expert_layer_offset": s.moe.offset, "use_mamba_kernels": False
    }, GPT2Config: lambda s: {"n_inner": s.F},
    GPTJConfig: lambda s: {"n_inner": s.F, "rotary_dim": s.H//2},
    OPTConfig: lambda s: {"ffn_dim": s.F, "word_embed_proj_dim": s.D},
    GPTNeoXConfig: lambda s: {"intermediate_size": s.F, "use_parallel_residual": s.parallel},
    FalconConfig: lambda s: {
        "ffn_hidden_size": s.F, "new_decoder_architecture": s.norms == 2, "num_kv_heads": s.K,
        "multi_query": s.K == 1, "num_ln_in_parallel_attn": s.norms
    }, Starcoder2Config: lambda s: {"sliding_window": s.window},
}


def model_of(config, device="cpu", **more):
    """The module of transformers, weights random (none on the meta device), attention by plain
    products that a counter can see."""
    torch.manual_seed(5)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", **more).eval()


# ---- a small model of every kind, odd sizes throughout ----

_DENSE = dict(L=3, D=60, N=6, K=2, H=14, F=84, V=131, max_context=64)
_GPT = _DENSE | dict(K=6, H=10, gated=False)
_LINEAR = ("qkv", "out", "up", "down")
_MAMBA = dict(D=56, N=0, K=0, H=0, F=0, V=97, norms=1, pattern=("ssm",))

SMALL = {
    "llama, mha, tied": (LlamaConfig, ModelShape("", **_DENSE | dict(K=6, tied=True))),
    "llama, biases": (LlamaConfig, ModelShape("", **_DENSE,
                                              biases=("qkv", "out", "gate_up", "down"))),
    "mistral, window": (MistralConfig, ModelShape(
        "", **_DENSE,
        window=9)), "phi3": (Phi3Config, ModelShape("", **_DENSE | dict(H=10), window=9)),
    "qwen2": (Qwen2Config, ModelShape(
        "", **_DENSE | dict(H=10),
        biases=("qkv",))), "qwen3": (Qwen3Config, ModelShape("", **_DENSE, qk_norm=True)),
    "gemma, mqa": (GemmaConfig, ModelShape(
        "", **_DENSE | dict(K=1), tied=True)), "gemma2": (Gemma2Config,
                                                          ModelShape("", **_DENSE, tied=True,
                                                                     norms=4, window=9,
                                                                     pattern=("local", "global"))),
    "gemma3": (Gemma3TextConfig,
               ModelShape("", **_DENSE | dict(L=7), tied=True, norms=4, qk_norm=True, window=9,
                          pattern=("local", )*5 + ("global", ))),
    "cohere": (CohereConfig, ModelShape(
        "", **_DENSE | dict(H=10), tied=True, norms=1,
        parallel=True)), "mixtral": (MixtralConfig, ModelShape("", **_DENSE, moe=MoE(
            5, 2))), "qwen2_moe": (Qwen2MoeConfig,
                                   ModelShape("", **_DENSE | dict(H=10), biases=("qkv",), moe=MoE(
                                       7, 3, shared=52, shared_gate=True))),
    "qwen3_moe, dense layers": (Qwen3MoeConfig,
                                ModelShape("", **_DENSE, qk_norm=True, moe=MoE(
                                    7, 3, F=36, first_dense=1))),
    "qwen3_moe, every other": (Qwen3MoeConfig,
                               ModelShape("", **_DENSE | dict(L=4), qk_norm=True, moe=MoE(
                                   7, 3, F=36, every=2, offset=1))),
    "gpt_oss": (GptOssConfig,
                ModelShape("", **_DENSE, window=9, pattern=("local", "global"), sinks=True, moe=MoE(
                    5, 2), biases=("qkv", "out", "router", "gate_up", "down"))),
    "deepseek_v2, no query latent": (DeepseekV2Config,
                                     ModelShape("", **_DENSE | dict(K=6, H=22), mla=MLA(26, 8, 12),
                                                moe=MoE(7, 3, F=36, shared=72, first_dense=1))),
    "deepseek_v3": (DeepseekV3Config,
                    ModelShape("", **_DENSE | dict(K=6, H=22), mla=MLA(26, 8, 12, 34), moe=MoE(
                        7, 3, F=36, shared=36,
                        first_dense=2))), "gpt2": (GPT2Config,
                                                   ModelShape("", **_GPT, tied=True, rope=False,
                                                              positions=64,
                                                              biases=(*_LINEAR, "norm"))),
    "opt": (OPTConfig,
            ModelShape(
                "", **_GPT, tied=True, rope=False, positions=66,
                biases=(*_LINEAR, "norm"))), "gptj": (GPTJConfig,
                                                      ModelShape(
                                                          "", **_GPT | dict(D=72, H=12), norms=1,
                                                          parallel=True,
                                                          biases=("up", "down", "norm", "head"))),
    "gpt_neox": (GPTNeoXConfig,
                 ModelShape("", **_GPT | dict(D=96, H=16), parallel=True,
                            biases=(*_LINEAR, "norm"))), "falcon, mqa": (FalconConfig,
                                                                         ModelShape(
                                                                             "", **_GPT | dict(K=1),
                                                                             tied=True, norms=1,
                                                                             parallel=True,
                                                                             biases=("norm", ))),
    "falcon, gqa": (FalconConfig,
                    ModelShape("", **_GPT | dict(K=2), tied=True, norms=2, parallel=True,
                               biases=("norm", ))), "phi": (PhiConfig,
                                                            ModelShape(
                                                                "", **_GPT | dict(D=96, H=16),
                                                                norms=1, parallel=True,
                                                                biases=(*_LINEAR, "norm", "head"))),
    "starcoder2": (Starcoder2Config,
                   ModelShape("", **_GPT | dict(K=2), tied=True, window=9,
                              biases=(*_LINEAR, "norm"))), "mamba": (MambaConfig,
                                                                     ModelShape(
                                                                         "", L=3, **_MAMBA,
                                                                         tied=True, ssm=SSM(
                                                                             112, 7, 4,
                                                                             dt_rank=5))),
    "falcon_mamba": (FalconMambaConfig, ModelShape("", L=2, **_MAMBA, ssm=SSM(
        112, 6, 3,
        dt_rank=4))), "mamba2": (Mamba2Config,
                                 ModelShape("", L=2, **_MAMBA, ssm=SSM(
                                     112, 10, 4, heads=14,
                                     groups=2))), "jamba": (JambaConfig,
                                                            ModelShape(
                                                                "", **_DENSE | dict(L=5, H=10),
                                                                rope=False,
                                                                pattern=("ssm", "global", "ssm"),
                                                                ssm=SSM(
                                                                    120, 7, 4, dt_rank=5,
                                                                    norms=True), moe=MoE(
                                                                        5, 2, every=2, offset=1))),
}
"""Names of families and what is special: (config class, shape)."""
