"""A shape from what describes a model to Hugging Face: the same as by hand, and what is not known
is refused by name."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from families import NOT_IN_TRANSFORMERS, SMALL, class_of, config_of, model_of
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MixtralConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from clawdemy_infer.from_config import FAMILIES, catalog, from_config


def plain(shape):
    """A shape without what no config says in the same words."""
    return replace(shape, name="", source="", max_context=None)


# ---- what transformers writes ----


@pytest.mark.parametrize(
    "name", [name for name in catalog.model_names() if name not in NOT_IN_TRANSFORMERS])
def test_a_config_of_transformers_gives_the_shape_of_the_catalogue(name):
    shape = catalog.model(name)
    assert plain(from_config(config_of(class_of(name), shape))) == plain(shape)


@pytest.mark.parametrize("kind, shape", SMALL.values(), ids=SMALL)
def test_a_small_config_of_every_kind_gives_its_shape(kind, shape):
    found = from_config(config_of(kind, shape))
    assert plain(found) == plain(shape)
    assert found.max_context == (shape.max_context or None)


@pytest.mark.parametrize("made", [
    LlamaConfig(),
    Qwen2Config(),
    Gemma2Config(),
    MixtralConfig(),
    DeepseekV3Config(),
    Qwen3MoeConfig(),
    GPT2Config(),
    Mamba2Config(),
    Qwen2Config(use_sliding_window=True, max_window_layers=20),
    Qwen3MoeConfig(decoder_sparse_step=2, mlp_only_layers=[0, 1, 2]),
    GPT2Config(n_inner=1000),
], ids=lambda config: config.model_type)
def test_a_config_that_only_transformers_knows_counts_the_parameters_of_its_module(made):
    """By way of an object, of its dict, and of the file it saves."""
    assert from_config(made) == from_config(json.loads(made.to_json_string(use_diff=False)))
    assert from_config(made).parameters() == model_of(made, "meta").num_parameters()


# ---- files, as they lie on the hub ----

MIXTRAL = {  # mistralai/Mixtral-8x7B-v0.1
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
    "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
}
DEEPSEEK_V2 = {  # deepseek-ai/DeepSeek-V2
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "x.y"}, "aux_loss_alpha": 0.001, "bos_token_id": 100000,
    "eos_token_id": 100001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 12288, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1536,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 160, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 128, "num_experts_per_tok": 6,
    "num_hidden_layers": 60, "num_key_value_heads": 128, "pretraining_tp": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "yarn", "factor": 40}, "rope_theta": 10000,
    "routed_scaling_factor": 16.0, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 3, "topk_method": "group_limited_greedy",
    "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}
GEMMA_3 = {  # google/gemma-3-1b-it
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 262144,
}
FALCON = {  # tiiuae/falcon-7b
    "alibi": False, "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"], "attention_dropout": 0.0, "bias": False,
    "bos_token_id": 11, "eos_token_id": 11, "hidden_dropout": 0.0, "hidden_size": 4544,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "falcon",
    "multi_query": True, "new_decoder_architecture": False, "num_attention_heads": 71,
    "num_hidden_layers": 32, "num_kv_heads": 71, "parallel_attn": True, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 65024,
}
GPT_J = {  # EleutherAI/gpt-j-6B
    "activation_function": "gelu_new", "architectures": ["GPTJForCausalLM"], "attn_pdrop": 0.0,
    "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256,
    "gradient_checkpointing": False, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gptj", "n_embd": 4096, "n_head": 16, "n_inner": None, "n_layer": 28,
    "n_positions": 2048, "resid_pdrop": 0.0, "rotary": True, "rotary_dim": 64,
    "scale_attn_weights": True, "summary_activation": None, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True}}, "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer", "use_cache": True, "vocab_size": 50400,
}
FALCON_MAMBA = {  # tiiuae/falcon-mamba-7b
    "architectures": ["FalconMambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4,
    "eos_token_id": 11, "expand": 16, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.1, "intermediate_size": 8192, "layer_norm_epsilon": 1e-05,
    "model_type": "falcon_mamba", "num_hidden_layers": 64, "pad_token_id": 11,
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "state_size": 16,
    "tie_word_embeddings": False, "time_step_floor": 0.0001, "time_step_init_scheme": "random",
    "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256, "time_step_scale": 1.0,
    "torch_dtype": "bfloat16", "use_bias": False, "use_cache": True, "use_conv_bias": True,
    "vocab_size": 65024,
}
HUNYUAN = {  # tencent/Tencent-Hunyuan-Large
    "model_type": "hunyuan", "cla_share_factor": 2, "hidden_size": 6400, "intermediate_size": 18304,
    "max_position_embeddings": 131072, "moe_topk": 1, "num_attention_heads": 80, "num_experts": 16,
    "num_hidden_layers": 64, "num_key_value_heads": 8, "num_shared_expert": 1, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    "rope_theta": 10000.0, "tie_word_embeddings": True, "use_cache": True, "use_cla": True,
    "use_qk_norm": True, "vocab_size": 129024,
}
GPT_OSS = {  # openai/gpt-oss-20b
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02,
    "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
    "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
    "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
    "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05, "rope_scaling": {"rope_type": "yarn", "factor": 32.0},
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "use_cache": True, "vocab_size": 201088,
}
KIMI_K2 = {  # moonshotai/Kimi-K2-Instruct
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "vocab_size": 163840,
    "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
    "num_attention_heads": 64, "num_key_value_heads": 64, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "hidden_act": "silu", "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "moe_intermediate_size": 2048, "n_routed_experts": 384, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "first_k_dense_replace": 1, "moe_layer_freq": 1,
}
FILES = {
    "mixtral-8x7b": MIXTRAL, "deepseek-v2": DEEPSEEK_V2, "gemma-3-1b": GEMMA_3, "falcon-7b": FALCON,
    "gpt-j-6b": GPT_J, "falcon-mamba-7b": FALCON_MAMBA, "hunyuan-large": HUNYUAN,
    "gpt-oss-20b": GPT_OSS, "kimi-k2": KIMI_K2
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_hub_gives_the_shape_of_the_catalogue(name, tmp_path):
    """Older keys and absent ones included. As a dict, as a path, and as the folder that the file
    lies in."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FILES[name]))
    shape = from_config(FILES[name])
    assert plain(shape) == plain(catalog.model(name))
    assert plain(from_config(path)) == plain(from_config(str(tmp_path))) == plain(shape)
    assert from_config(path).source == str(path)
    assert from_config(path, name="mine").name == "mine"


def test_transformers_is_not_needed():
    script = ("import sys; from clawdemy_infer.from_config import from_config; "
              f"from_config({MIXTRAL!r}); sys.exit('transformers' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


# ---- what is refused ----

LLAMA = {
    "model_type": "llama", "hidden_size": 60, "intermediate_size": 84, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 131,
    "max_position_embeddings": 64
}


@pytest.mark.parametrize(
    "config, change, message",
    [(LLAMA, {"model_type": "lama"
              }, "model_type='lama' is not supported; accepted: afmoe, apertus, arcee"),
     (LLAMA, {"model_type": "rwkv"}, "model_type='rwkv' is not supported; accepted: a decoder"),
     (LLAMA, {"model_type": None}, "model_type is missing"),
     (LLAMA, {"sliding_window": 512}, "sliding_window=512"),
     (LLAMA, {"num_local_experts": 8
              }, "num_local_experts=8 is not supported; accepted: no such key for llama"),
     (LLAMA, {"num_kv_shared_layers": 2}, "num_kv_shared_layers=2"),
     (LLAMA, {"kv_lora_rank": 512}, "kv_lora_rank=512"),
     (LLAMA, {"is_encoder_decoder": True
              }, "is_encoder_decoder=True is not supported; accepted: False"),
     (LLAMA, {"hidden_size": 60.0}, "hidden_size=60.0 is not supported; accepted: a whole number"),
     (LLAMA, {"intermediate_size": None}, "intermediate_size is missing"),
     (LLAMA, {"hidden_size": 64}, "head_dim is missing"),
     (LLAMA, {"model_type": "lfm2_moe", "num_experts": 4, "num_experts_per_tok": 2,
              "moe_intermediate_size": 32}, "layer_types is missing"),
     (MIXTRAL, {"num_experts_per_tok": 9}, "active=9 is not supported; accepted: 1 to 8 experts"),
     (GEMMA_3, {"layer_types": ["full_attention"]*25 + ["chunked_attention"]
                }, "layer_types='chunked_attention'"),
     (GEMMA_3, {"layer_types": ["full_attention"]*25}, "accepted: one for each of the 26 layers"),
     (GEMMA_3, {"layer_types": 5}, "layer_types=5 is not supported; accepted: one for each"),
     (GEMMA_3, {"layer_types": [[1]] * 26}, "layer_types=[1] is not supported"),
     (MIXTRAL, {"sliding_window": -5}, "sliding_window=-5 is not supported; accepted: a whole"),
     (MIXTRAL, {"layer_types": ["sliding_attention"]*32}, "agrees with a window of None"),
     (GEMMA_3, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
     (GEMMA_3, {"model_type": "gemma3"}, "model_type='gemma3'"),
     (DEEPSEEK_V2, {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported; accepted: 1"),
     (DEEPSEEK_V2, {"index_topk": 2048}, "index_topk=2048"),
     (FALCON_MAMBA, {"use_bias": True}, "use_bias=True is not supported; accepted: False"),
     (GPT_J, {"n_head": 3}, "n_head=3 is not supported; accepted: a divisor of n_embd = 4096"),
     (GPT_J, {"add_cross_attention": True}, "add_cross_attention=True"), ], ids=lambda value: ""
    if isinstance(value, dict) and len(value) > 2 else str(value)[:60])
def test_what_is_not_known_is_refused_by_key_and_value(config, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_config(config | change)


@pytest.mark.parametrize("kind, shape", SMALL.values(), ids=SMALL)
def test_no_family_overlooks_a_key_that_it_does_not_know(kind, shape):
    keys = config_of(kind, shape).to_dict()
    with pytest.raises(ValueError, match="state_of_the_art=7"):
        from_config(keys | {"state_of_the_art": 7})


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        from_config(tmp_path)


def test_every_kind_of_shape_is_of_a_family():
    tried = {config_of(kind, shape).model_type for kind, shape in SMALL.values()}
    assert tried < set(FAMILIES)
