"""Every key of a config.json is used, known to change nothing, or refused by name."""

import json
import re

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from clawdemy_infer.from_config import catalog
from clawdemy_infer.model import ModelConfig
from clawdemy_infer.model.config import RopeScaling

# Small, but with every key that the family's files on the hub have.
LLAMA = {
    "architectures": ["LlamaForCausalLM"
                      ], "model_type": "llama", "hidden_size": 60, "intermediate_size": 84,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 131,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "hidden_act": "silu",
    "rope_theta": 500000.0, "rope_scaling": None, "tie_word_embeddings": True, "bos_token_id": 1,
    "eos_token_id": [2, 5], "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
    "pretraining_tp": 1, "initializer_range": 0.02, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3", "use_cache": True,
}
MISTRAL = {key: LLAMA[key] for key in LLAMA if key not in ("pretraining_tp", "mlp_bias")} | {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 7}
QWEN2 = MISTRAL | {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False,
    "max_window_layers": 3
}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64
}


def test_a_llama_is_read_into_the_letters():
    config = ModelConfig.from_hf(LLAMA, name="tiny")
    shape = config.shape
    assert (shape.L, shape.D, shape.N, shape.K, shape.H, shape.F, shape.V) == (3, 60, 6, 2, 10, 84,
                                                                               131)
    assert (shape.name, shape.tied, shape.window, shape.biases, shape.qk_norm,
            shape.max_context) == ("tiny", True, None, (), False, 256)
    assert (config.norm_eps, config.rope_theta, config.rope_scaling, config.bos_id,
            config.eos_ids) == (1e-5, 5e5, None, 1, (2, 5))


def test_what_a_family_adds_is_read_from_its_type():
    assert ModelConfig.from_hf(MISTRAL).shape.window == 7
    assert ModelConfig.from_hf(MISTRAL | {"sliding_window": None}).shape.window is None
    qwen2, qwen3 = ModelConfig.from_hf(QWEN2).shape, ModelConfig.from_hf(QWEN3).shape
    assert (qwen2.biases, qwen2.qk_norm, qwen2.window, qwen2.H) == (("qkv",), False, None, 10)
    assert (qwen3.biases, qwen3.qk_norm, qwen3.window, qwen3.H) == ((), True, None, 16)


def test_an_absent_key_means_what_it_means_in_the_llama_paper():
    first = {
        key: value
        for key, value in LLAMA.items()
        if key not in ("num_key_value_heads", "rope_theta", "tie_word_embeddings")
    }
    config = ModelConfig.from_hf(first)
    assert (config.shape.K, config.rope_theta, config.shape.tied) == (6, 10_000.0, False)


@pytest.mark.parametrize("old", [True, False],
                         ids=["rope_theta beside rope_scaling", "all in rope_parameters"])
def test_both_spellings_of_rope_are_read(old):
    config = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    config |= {"rope_theta": 5e5, "rope_scaling": LLAMA3
               } if old else {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    read = ModelConfig.from_hf(config)
    assert read.rope_theta == 5e5
    assert read.rope_scaling == RopeScaling("llama3", 8.0, 64, low_freq_factor=1.0,
                                            high_freq_factor=4.0)


@pytest.mark.parametrize(
    "made", [
        LlamaConfig(),
        LlamaConfig(rope_parameters={**LLAMA3, "rope_theta": 5e5}),
        MistralConfig(),
        Qwen2Config(),
        Qwen3Config(),
        Qwen2Config(use_sliding_window=True, max_window_layers=0),
        Qwen3Config(use_sliding_window=True, max_window_layers=99),
    ], ids=[
        "llama", "llama 3.1", "mistral", "qwen2", "qwen3", "qwen2 all windows", "qwen3 no windows"
    ])
def test_what_transformers_writes_is_read(made):
    shape = ModelConfig.from_hf(json.loads(made.to_json_string())).shape
    assert (shape.D, shape.K, shape.F) == (made.hidden_size, made.num_key_value_heads,
                                           made.intermediate_size)
    windows = set(
        getattr(made, "layer_types", None)
        or ["sliding_attention" if made.model_type == "mistral" else "full_attention"])
    assert windows == {"full_attention" if shape.window is None else "sliding_attention"}


def test_smollm2s_own_keys_change_nothing():
    extra = {
        "is_llama_config": True, "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}
    }
    assert ModelConfig.from_hf(LLAMA | extra) == ModelConfig.from_hf(LLAMA)


REFUSED = [
    (LLAMA, {"model_type": "gemma2"}, "model_type='gemma2'"),
    (LLAMA, {"model_type": "mixtral", "num_local_experts": 8}, "model_type='mixtral'"),
    (LLAMA, {"architectures": ["LlamaForSequenceClassification"]
             }, "architectures='LlamaForSequenceClassification'"),
    (LLAMA, {"num_experts": 8}, "num_experts=8"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; accepted: 'silu'"),
    (LLAMA, {"attention_bias": True}, "attention_bias=True is not supported; accepted: False"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias=True"),
    (LLAMA, {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    (LLAMA, {"pretraining_tp": 2}, "pretraining_tp=2"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
    (LLAMA, {"auto_map": {"AutoModel": "modeling.py"}}, "auto_map="),
    (LLAMA, {"sliding_window": 512}, "sliding_window=512"),
    (LLAMA, {"logit_scale": 0.0625}, "logit_scale=0.0625"),
    (LLAMA, {"rope_scaling": {"type": "ntk", "factor": 2.0}},
     "rope_type='ntk' is not supported; accepted: default, linear"),
    (LLAMA, {"rope_scaling": {"rope_type": "proportional", "factor": 4.0}},
     "rope_type='proportional'"),
    (LLAMA, {"rope_scaling": LLAMA3 | {"attention_factor": 2.0}},
     "rope_scaling: attention_factor=2.0"),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
    (LLAMA, {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor=1.0"),
    (LLAMA, {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, "rope_scaling="),
    (LLAMA, {"hidden_size": "60"}, "hidden_size='60' is not supported; accepted: a whole number"),
    (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers=0"),
    (LLAMA, {"num_key_value_heads": 4},
     "num_key_value_heads=4 is not supported; accepted: a divisor of the 6 query heads"),
    (LLAMA, {"head_dim": 11}, "head_dim=11"), (LLAMA, {"hidden_size": 64}, "head_dim is missing"),
    (LLAMA, {"rms_norm_eps": None}, "rms_norm_eps is missing"),
    (MISTRAL, {"sliding_window": -5}, "sliding_window=-5"),
    (MISTRAL, {"layer_types": ["full_attention"] * 3}, "layer_types="),
    (MISTRAL, {"layer_types": ["sliding_attention", "full_attention",
                               "sliding_attention"]}, "layer_types="),
    (QWEN2, {"use_sliding_window": True, "max_window_layers": 1}, "max_window_layers=1"),
    (QWEN2, {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers=None"),
    (QWEN2, {"layer_types": ["sliding_attention"] * 3}, "layer_types="),
    (QWEN3, {"head_dim": None}, "head_dim is missing"),
    (QWEN3, {"attention_bias": True}, "attention_bias=True"),
    (QWEN3, {"num_experts": 128, "norm_topk_prob": True}, "num_experts=128"),
]


@pytest.mark.parametrize(("config", "change", "message"), REFUSED,
                         ids=[f"{c['model_type']} {next(iter(x))}" for c, x, _ in REFUSED])
def test_what_the_decoder_would_not_compute_is_refused_by_key_and_value(config, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig.from_hf(config | change)


def test_a_mistral_that_does_not_say_its_window_is_refused():
    with pytest.raises(ValueError, match="sliding_window is missing"):
        ModelConfig.from_hf(
            {key: value
             for key, value in MISTRAL.items()
             if key != "sliding_window"})


@pytest.mark.parametrize(("name", "field"), [("gemma-2-2b", "pattern"), ("mixtral-8x7b", "moe"),
                                             ("deepseek-v2-lite", "moe"), ("mamba-130m", "pattern"),
                                             ("jamba-v0.1", "pattern"), ("gpt2-124m", "gated"),
                                             ("gemma-3-1b", "pattern"), ("aya-23-8b", "norms"),
                                             ("gpt-oss-20b", "pattern"), ])
def test_a_shape_that_the_decoder_cannot_run_is_refused_before_anything_is_built(name, field):
    """The catalogue counts more than the decoder runs."""
    with pytest.raises(ValueError,
                       match="the decoder runs dense Llama-family models, which have ") as error:
        ModelConfig(catalog.model(name))
    assert f"{field}=" in str(error.value)


def test_every_dense_shape_of_the_catalogue_is_accepted():
    accepted = []
    for name in catalog.model_names():
        try:
            accepted.append(ModelConfig(catalog.model(name)) and name)
        except ValueError:
            pass
    assert {"smollm2-135m", "llama-3.1-405b", "mistral-7b", "qwen2.5-0.5b",
            "qwen3-32b"} <= set(accepted)
    assert not {"mixtral-8x7b", "opt-13b", "falcon-7b"} & set(accepted)
