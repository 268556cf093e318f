"""Every family of data/families.toml: a small config as `transformers` writes it gives the
parameters of its module; what transformers does not know, those that its authors print. And
whatever stands at whatever key, a config is a shape or one sentence."""

import json

import pytest
import torch
from families import model_of
from huggingface_hub.errors import StrictDataclassError
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_arithmetic_families import tensors
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel
from transformers.cache_utils import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.envelope.parallel import Layout, fits
from clawdemy_infer.from_config import FAMILIES, from_config, keys, stated_formats

COMMON = dict(
    vocab_size=131, hidden_size=64, intermediate_size=84, num_hidden_layers=6,
    num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=64,
    num_experts_per_tok=2, num_experts=6, num_local_experts=6, n_routed_experts=6,
    moe_intermediate_size=36, n_shared_experts=1, first_k_dense_replace=1,
    shared_expert_intermediate_size=52, shared_intermediate_size=40, n_group=1, topk_group=1,
    moe_num_experts=6, moe_k=2, moe_num_shared_experts=2, kv_lora_rank=20, q_lora_rank=24,
    qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=14, index_n_heads=4, index_head_dim=18,
    index_topk=16, linear_num_value_heads=8, linear_num_key_heads=4, linear_value_head_dim=10,
    linear_key_head_dim=14, linear_conv_kernel_dim=3, mamba_n_heads=8, mamba_d_head=16,
    mamba_d_state=10, mamba_d_conv=3, mamba_n_groups=2, mamba_num_heads=8, mamba_head_dim=16,
    ssm_state_size=10, n_groups=2, conv_kernel=3)
"""Sizes that no two letters share; a class takes those that it knows."""

SPLIT = ("llama mistral qwen3 qwen3_moe gemma gemma2 gemma3_text glm glm4 olmo3 smollm3 seed_oss "
         "ernie4_5 hunyuan_v1_dense exaone4 llama4_text minimax_m2 gpt_oss nemotron_h qwen3_next "
         "qwen3_5_text qwen3_5_moe_text ministral dots1 glm4_moe gemma4_text "
         "hunyuan_v1_moe afmoe exaone_moe hy_v3 solar_open mellum cohere2_moe iquestcoder "
         "mimo_v2_flash gemma3n_text minimax").split()
"""Those whose heads may be of another width than D/N."""

BIASED = dict(attention_bias=True, mlp_bias=True)
MORE = {
    "llama": [{}, BIASED], "arcee": [{}, BIASED], "smollm3": [{}, BIASED],
    "seed_oss": [{}, dict(attention_bias=False, attention_out_bias=True, mlp_bias=True)],
    "phimoe": [dict(attention_bias=True, lm_head_bias=True)],
    "qwen2": [{}, dict(use_sliding_window=True, max_window_layers=2, sliding_window=16)],
    "qwen3_moe": [{}, dict(decoder_sparse_step=2), dict(mlp_only_layers=[0, 3])],
    "falcon": [{}, dict(bias=True), dict(new_decoder_architecture=True, num_kv_heads=2)],
    "bloom": [dict(n_layer=3, n_head=8)], "mpt": [dict(d_model=64, n_heads=8, n_layers=3)],
    "gptj": [dict(rotary_dim=4)], "codegen": [dict(rotary_dim=4)],
    "gemma4_text": [
        dict(global_head_dim=16, num_global_key_value_heads=1, attention_k_eq_v=True,
             hidden_size_per_layer_input=0, sliding_window=16),
        dict(global_head_dim=16, hidden_size_per_layer_input=7, num_kv_shared_layers=6,
             use_double_wide_mlp=True, vocab_size_per_layer_input=131, sliding_window=16,
             num_hidden_layers=12),
        dict(global_head_dim=16, hidden_size_per_layer_input=0, enable_moe_block=True,
             top_k_experts=2, sliding_window=16)],
    "gemma4_unified_text": [dict(head_dim=12, global_head_dim=16)],
    "llama4_text": [dict(intermediate_size_mlp=100, interleave_moe_layer_step=2,
                         attention_chunk_size=16), dict(attention_chunk_size=16)],
    "glm_moe_dsa": [{}, dict(indexer_types=["full", "shared", "full"] * 2)],
    "nemotron_h": [dict(layers_block_type=["mamba", "moe", "mamba", "mlp", "attention", "moe"],
                        moe_latent_size=16, moe_shared_expert_intermediate_size=30),
                   dict(layers_block_type=["mamba", "mlp", "attention", "mlp"])],
    "granitemoehybrid": [dict(layer_types=["mamba", "attention", "mamba"] * 2),
                         dict(layer_types=["mamba", "attention"] * 3, num_local_experts=0)],
    "bamba": [dict(attn_layer_indices=[1, 4])], "jamba": [dict(num_experts=4)],
    "mamba": [dict(intermediate_size=128)], "falcon_mamba": [dict(intermediate_size=128)],
    "mamba2": [dict(num_heads=8, head_dim=16, intermediate_size=128)],
    "kimi_linear": [dict(linear_attn_config=dict(
        full_attn_layers=[3, 6], kda_layers=[1, 2, 4, 5], head_dim=12, num_heads=6,
        short_conv_kernel_size=3), q_lora_rank=None, num_key_value_heads=8)],
    "helium": [dict(head_dim=8), dict(head_dim=8, attention_bias=True, mlp_bias=True)],
    "hyperclovax": [{}, BIASED | dict(use_post_norm=False)], "jais2": [{}, dict(mlp_bias=False)],
    "persimmon": [{}, dict(qk_layernorm=False)], "granitemoe_swa": [dict(sliding_window=16)],
    "gpt_neo": [dict(num_heads=8, attention_types=[[["global", "local"], 3]])],
    "aria_text": [dict(moe_topk=2)], "granite_swa": [dict(sliding_window=16)],
    "afmoe": [dict(sliding_window=16, num_dense_layers=2), dict(num_dense_layers=0)],
    "cohere2_moe": [dict(sliding_window=16, num_shared_experts=2), dict(
        mlp_layer_types=["dense"] * 2 + ["sparse"] * 4, prefix_dense_intermediate_size=60)],
    "exaone_moe": [dict(sliding_window=16), dict(first_k_dense_replace=2, num_shared_experts=0)],
    "hy_v3": [dict(mlp_layer_types=["dense", "sparse"] * 3), dict(num_shared_experts=0)],
    "mellum": [dict(layer_types=["sliding_attention", "full_attention"] * 3, sliding_window=16),
               dict(mlp_layer_types=["dense"] * 2 + ["sparse"] * 4)],
    "mimo_v2_flash": [dict(sliding_window=16, v_head_dim=10), dict(attention_bias=True)],
    "gemma3n_text": [dict(num_hidden_layers=10, num_kv_shared_layers=5, sliding_window=16,
                          laurel_rank=6, hidden_size_per_layer_input=7,
                          vocab_size_per_layer_input=99)],
    "lfm2": [dict(layer_types=["conv", "full_attention", "conv"] * 2, block_multiple_of=5),
             dict(full_attn_idxs=[1, 4], block_auto_adjust_ff_dim=False)],
    "lfm2_moe": [dict(layer_types=["conv", "full_attention", "conv"] * 2, num_dense_layers=2)],
    "minimax": [{}, dict(layer_types=["linear_attention", "full_attention", "linear_attention"] * 2,
                         sliding_window=None)],
    "falcon_h1": [dict(mamba_d_ssm=128), BIASED | dict(mamba_d_ssm=128, mamba_rms_norm=True),
                  dict(mamba_d_ssm=None)],
    "olmo_hybrid": [{}, dict(layer_types=["linear_attention", "full_attention"] * 3)],
    "stablelm": [{}, dict(use_parallel_residual=True, use_qkv_bias=True),
                 dict(use_parallel_residual=True, qk_layernorm=True)],
    "deepseek_v32": [dict(num_key_value_heads=8)],
    "deepseek_v2": [dict(num_key_value_heads=8)],
}
UNTRIED = {"cwm", "dbrx", "step3p5", "step3p7", "llava", "qwen2_vl", "qwen2_5_vl", "mistral4",
           "longcat_flash", "glm_ocr_text", "qwen2_5_omni_text"}
"""Their classes in transformers demand more than sizes, are no language models alone, or hold more
than the model has: of LongCat's experts also those that do nothing."""


def classes():
    for name in FAMILIES:
        if name in CONFIG_MAPPING and name not in UNTRIED and not name.endswith("vl_text") \
                and "_vl_" not in name and "4v" not in name:
            for index, more in enumerate(MORE.get(name, [{}])):
                yield pytest.param(name, more, id=f"{name}{index or ''}")


def tiny(name, more):
    kind = CONFIG_MAPPING[name]
    known = set(kind.__dataclass_fields__) | set(getattr(kind, "attribute_map", ()))
    own = {key: value for key, value in COMMON.items() if key in known}
    if name in SPLIT:
        own["head_dim"] = 12
    if name == "nemotron_h":
        own.pop("num_hidden_layers", None)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return kind(**own | ids | more)


def as_file(config):
    found = json.loads(config.to_json_string(use_diff=False))
    return found | {"architectures": None}


@pytest.mark.parametrize("name, more", list(classes()))
def test_a_small_config_of_the_family_counts_the_parameters_of_its_module(name, more):
    config = tiny(name, more)
    shape = from_config(as_file(config))
    assert shape.parameters() == sum(p.numel() for p in model_of(config, "meta").parameters())
    assert shape.active_parameters() <= shape.parameters()


@pytest.mark.parametrize("name", [
    "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "glm4v_text",
    "glm4v_moe_text", "glm_ocr_text"])
def test_the_text_part_of_a_model_that_sees_counts_its_module_and_a_head(name):
    config = tiny(name, {})
    with torch.device("meta"):
        module = AutoModel.from_config(config)
    shape = from_config(as_file(config) | {"tie_word_embeddings": False})
    assert shape.parameters() == 131 * 64 + sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name, index", [
    ("qwen3_5_text", 0), ("nemotron_h", 0), ("gemma4_text", 0), ("gemma4_text", 1),
    ("deepseek_v32", 0), ("llama4_text", 0), ("kimi_linear", 0), ("olmo3", 0), ("lfm2", 0),
    ("falcon_h1", 0), ("olmo_hybrid", 0), ("mimo_v2_flash", 0), ("gemma3n_text", 0), ("afmoe", 0),
    ("mellum", 0), ("cohere2_moe", 0)])
def test_what_a_new_kind_of_layer_keeps_are_the_tensors_of_transformers(name, index):
    """After 30 tokens, in a window of 16 of which transformers keeps all but the next one's."""
    config = tiny(name, MORE.get(name, [{}])[index] | (
        {"sliding_window": 16} if name == "olmo3" else {}))
    shape, model = from_config(as_file(config)), model_of(config)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(60).view(2, 30), use_cache=True, past_key_values=cache)
    windows = sum(layer.mixer.kept(1) for layer in shape.layers if layer.mixer.window)
    assert shape.kv_bytes(2, 30, "fp32") == tensors(cache) + 4 * 2 * windows


@pytest.mark.parametrize("name, more", [
    ("lfm2", MORE["lfm2"][0]), ("olmo_hybrid", {}), ("persimmon", {}), ("hyperclovax", BIASED),
    ("mimo_v2_flash", dict(v_head_dim=10, mlp_layer_types=["dense"] * 6))])
def test_the_products_of_a_new_kind_of_layer_are_those_of_transformers(name, more):
    """X W of all layers and of the head, for 30 tokens; as transformers multiplies them."""
    config = tiny(name, more)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model_of(config)(torch.arange(30)[None], use_cache=False)
    counted = counter.get_flop_counts()["Global"]
    products = sum(counted.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    step = from_config(as_file(config)).step(1, 30, 30, logits=30)
    assert products == sum(op.flops for op in step.operations() if op.kernel == "gemm")


VARIED = {
    "num_key_value_heads": [1, 4, 8], "n_shared_experts": [1, 2], "num_shared_experts": [1, 2],
    "moe_num_shared_experts": [1, 3], "first_k_dense_replace": [0, 2], "hidden_size": [96],
    "decoder_sparse_step": [1, 2, 3], "q_lora_rank": [None, 24], "sliding_window": [None, 16],
    "num_experts_per_tok": [1, 3], "index_head_dim": [12], "num_nextn_predict_layers": [1],
} | dict.fromkeys("""tie_word_embeddings attention_bias attention_out_bias mlp_bias bias use_bias
    use_qkv_bias qkv_bias use_conv_bias mamba_conv_bias mamba_proj_bias projectors_bias conv_bias
    lm_head_bias use_qk_norm qk_layernorm use_post_norm use_parallel_residual parallel_attn
    multi_query alibi mamba_rms_norm use_sliding_window attention_k_eq_v use_double_wide_mlp
    attn_output_gate altup_correct_scale norm_topk_prob enable_bias""".split(), [False, True])
"""What a config of a family may say otherwise."""


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([case.values for case in classes()]), st.data())
def test_what_a_config_says_otherwise_counts_or_is_refused_by_its_key(case, data):
    name, more = case
    known = set(CONFIG_MAPPING[name].__dataclass_fields__) - set(more)
    change = data.draw(st.fixed_dictionaries({}, optional={
        key: st.sampled_from(values) for key, values in VARIED.items() if key in known}))
    try:
        config = tiny(name, more | change)
        module = model_of(config, "meta")
    except (StrictDataclassError, ValueError, TypeError, ZeroDivisionError, AttributeError):
        assume(False)                                   # transformers makes no model of it
    try:
        shape = from_config(as_file(config))
    except ValueError as error:
        assert any(key in str(error) for key in [*change, "layer_types", "max_window_layers",
                                                        "KV heads"])
    else:
        assert shape.parameters() == sum(p.numel() for p in module.parameters())


PUBLISHED = {
    "THUDM/chatglm3-6b, 6,243,584,000 weights": (6_243_584_000, {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "add_bias_linear": False,
        "add_qkv_bias": True, "ffn_hidden_size": 13696, "hidden_size": 4096, "kv_channels": 128,
        "multi_query_attention": True, "multi_query_group_num": 2, "num_attention_heads": 32,
        "num_layers": 28, "padded_vocab_size": 65024, "post_layer_norm": True, "rmsnorm": True,
        "seq_length": 8192, "tie_word_embeddings": False}),
    "baichuan-inc/Baichuan2-7B-Base, 7,505,973,248 weights": (7_505_973_248, {
        "model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32,
        "model_max_length": 4096, "vocab_size": 125696, "tie_word_embeddings": False}),
    "Qwen/Qwen-7B, 7,721,324,544 weights": (7_721_324_544, {
        "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "hidden_size": 4096,
        "intermediate_size": 22016, "kv_channels": 128, "num_attention_heads": 32, "no_bias": True,
        "num_hidden_layers": 32, "seq_length": 8192, "vocab_size": 151936, "rotary_pct": 1.0,
        "tie_word_embeddings": False}),
    "inclusionAI/Ling-flash-2.0, 100 billion": (103e9, {
        "model_type": "bailing_moe", "hidden_size": 4096, "intermediate_size": 9216,
        "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 256,
        "num_hidden_layers": 32, "num_experts_per_tok": 8, "moe_intermediate_size": 1024,
        "num_shared_experts": 1, "first_k_dense_replace": 1, "vocab_size": 157184,
        "max_position_embeddings": 32768, "use_qk_norm": True, "use_bias": False}),
    "IEITYuan/Yuan2-2B, 2.1 billion": (2.1e9, {
        "model_type": "yuan", "architectures": ["YuanForCausalLM"], "hidden_size": 2048,
        "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 24,
        "model_max_length": 8192, "vocab_size": 135040, "tie_word_embeddings": True}),
    "XiaomiMiMo/MiMo-7B-Base, 7.6 billion without its draft layer": (7.62e9, {
        "model_type": "mimo", "hidden_size": 4096, "intermediate_size": 11008, "head_dim": 128,
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "vocab_size": 151680, "max_position_embeddings": 32768, "attention_bias": True,
        "num_nextn_predict_layers": 1, "tie_word_embeddings": False}),
    "meituan-longcat/LongCat-Flash-Chat, 560 billion": (560e9, {
        "model_type": "longcat_flash", "attention_method": "MLA", "hidden_size": 6144,
        "num_layers": 28, "num_attention_heads": 64, "ffn_hidden_size": 12288, "moe_topk": 12,
        "expert_ffn_hidden_size": 2048, "n_routed_experts": 512, "zero_expert_num": 256,
        "zero_expert_type": "identity", "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 131072,
        "max_position_embeddings": 131072, "mla_scale_q_lora": True, "router_bias": False}),
    "mistralai/Mistral-Small-4-119B": (119e9, {
        "model_type": "mistral4", "hidden_size": 4096, "intermediate_size": 12288,
        "moe_intermediate_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 32, "n_shared_experts": 1, "n_routed_experts": 128,
        "num_experts_per_tok": 4, "first_k_dense_replace": 0, "q_lora_rank": 1024,
        "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "vocab_size": 131072, "max_position_embeddings": 1048576}),
    "XiaomiMiMo/MiMo-V2-Flash, 309 billion": (309e9, {
        "model_type": "mimo_v2_flash", "hidden_size": 4096, "intermediate_size": 16384,
        "num_hidden_layers": 48, "num_attention_heads": 64, "num_key_value_heads": 4,
        "head_dim": 192, "v_head_dim": 128, "swa_num_attention_heads": 64, "swa_head_dim": 192,
        "swa_num_key_value_heads": 8, "swa_v_head_dim": 128, "sliding_window": 128,
        "hybrid_layer_pattern": [0, *[1] * 4, *[0, *[1] * 5] * 7, 0],
        "moe_layer_freq": [0] + [1] * 47, "moe_intermediate_size": 2048, "n_routed_experts": 256,
        "n_shared_experts": None, "num_experts_per_tok": 8, "vocab_size": 152576,
        "max_position_embeddings": 262144, "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False, "tie_word_embeddings": False}),
    "MiniMaxAI/MiniMax-M1-80k, 456 billion": (456e9, {
        "model_type": "minimax_m1", "hidden_size": 6144, "intermediate_size": 9216,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 128, "num_local_experts": 32, "num_experts_per_tok": 2, "postnorm": True,
        "attn_type_list": [*[0] * 7, 1] * 10, "shared_intermediate_size": 0, "vocab_size": 200064,
        "max_position_embeddings": 10240000}),
    "LiquidAI/LFM2-1.2B, 1,170,340,608 weights": (1_170_340_608, {
        "model_type": "lfm2", "block_auto_adjust_ff_dim": True, "block_dim": 2048,
        "block_ff_dim": 12288, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256,
        "block_use_swiglu": True, "conv_L_cache": 3, "conv_bias": False, "conv_dim": 2048,
        "conv_dim_out": 2048, "full_attn_idxs": [2, 5, 8, 10, 12, 14], "hidden_size": 2048,
        "max_position_embeddings": 128000, "norm_eps": 1e-05, "num_attention_heads": 32,
        "num_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "use_pos_enc": True,
        "vocab_size": 65536}),
    "stepfun-ai/Step-3.5-Flash, 196 billion": (196e9, {
        "model_type": "step3p5", "hidden_size": 4096, "intermediate_size": 11264, "head_dim": 128,
        "num_attention_heads": 64, "num_hidden_layers": 45, "num_key_value_heads": 8,
        "num_experts": 288, "num_experts_per_tok": 8, "moe_intermediate_size": 1280,
        "share_expert_dim": 1280, "sliding_window": 512, "vocab_size": 128896,
        "max_position_embeddings": 65536, "first_k_dense_replace": 3}),
}


@pytest.mark.parametrize("published, config", PUBLISHED.values(), ids=PUBLISHED)
def test_what_transformers_does_not_know_counts_what_its_authors_print(published, config):
    assert from_config(config).parameters() == pytest.approx(
        published, abs=0.012 * published if isinstance(published, float) else 0)


# ---- parts of files ----

TEXT = {"model_type": "qwen3_vl_text", "hidden_size": 64, "intermediate_size": 84, "head_dim": 12,
        "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
        "vocab_size": 131, "max_position_embeddings": 64}


def test_a_text_config_is_counted_as_text_and_says_so():
    around = {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"],
              "vision_config": {"depth": 3}, "image_token_id": 7, "tie_word_embeddings": True}
    shape = from_config(around | {"text_config": TEXT})
    assert shape.name.endswith(", text") and shape.tied
    assert shape.parameters() == from_config(TEXT | {"tie_word_embeddings": True}).parameters()
    with pytest.raises(ValueError, match="reasoning=7 is not supported"):
        from_config(around | {"text_config": TEXT, "reasoning": 7})


@pytest.mark.parametrize("change, message", [
    ({"architectures": ["LlamaForCausalLMEagle3"]}, "a part or a draft"),
    ({"architectures": ["LlamaModel"]}, "a part or a draft"),
    ({"architectures": 7}, "architectures=7 is not supported"),
    ({"model_type": "t5"}, "an encoder with a decoder"),
    ({"model_type": "deepseek_v4"}, "compressed attention and hyper-connections"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 is not supported; accepted: 1000 "),
    ({"hidden_size": 10**12}, "hidden_size=1000000000000 is not supported"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True is not supported"),
    ({"rope_theta": float("nan")}, "rope_theta=nan is not supported; accepted: a finite"),
    ({"rope_theta": "1e6"}, "rope_theta='1e6' is not supported; accepted: a number above 0"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06 is not supported"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' is not supported"),
    ({"use_cache": 1}, "use_cache=1 is not supported; accepted: true, false"),
    ({"sliding_window": -5, "use_sliding_window": True, "max_window_layers": 0},
     "sliding_window=-5 is not supported"),
    ({"rope_scaling": 5}, "rope_scaling=5 is not supported; accepted: an object"),
])
def test_every_key_has_a_kind_and_a_range(change, message):
    with pytest.raises(ValueError, match=message):
        from_config(TEXT | {"model_type": "qwen3"} | change)


@pytest.mark.parametrize("none", [None, False, 0, "", [], {}])
def test_an_unknown_key_that_says_none_is_harmless(none):
    assert from_config(TEXT | {"some_feature": none}) == from_config(TEXT)


# ---- files ----


@pytest.mark.parametrize("text, message", [
    (b"[1]", r"\[1\]; accepted: a JSON object"), (b"7", "7; accepted: a JSON object"),
    (b"", "not valid JSON in UTF-8"), (b'{"a": "\xff"}', "not valid JSON in UTF-8"),
    (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "32 levels deep"),
    (b'{"a": ' + b"[" * 50 + b"]" * 50 + b"}", "32 levels deep"),
    (b'{"a": [NaN]}', "a=nan is not supported; accepted: a finite number"),
    (b'{"a": 1e999}', "a=inf is not supported; accepted: a finite number"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON in UTF-8"),
    (b'{"a": ' + b"9" * 50 + b"}", r"a is beyond 2\^63"),
    (b'{"a": 1, "a": 2}', "'a' stands twice, with values that differ"),
    (b'{"a": [' + b"0," * 10**6 + b"0]}", "more than 1,000,000 values"),
    (b" " * 5 * 2**20, "more than 4,194,304 bytes"),
], ids=lambda value: "" if isinstance(value, bytes) else value)
def test_a_file_that_is_no_config_is_refused_in_one_line_that_names_it(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message) as error:
        from_config(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_may_say_the_same_twice_and_an_open_range(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('\ufeff{"a": 1, "a": 1, "time_step_limit": [0.0, Infinity]}', encoding="utf-8")
    assert keys.read_object(path)["a"] == 1


def test_a_folder_or_a_pipe_is_no_config(tmp_path):
    import os
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder").mkdir()
    for name in ("pipe.json", "folder"):
        with pytest.raises(ValueError, match="a regular file is accepted"):
            keys.read_object(tmp_path / name)


# ---- formats ----

MOE = {"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
       "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 128,
       "max_position_embeddings": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS, ATTENTION = 4 * 4 * 3 * 64 * 96, 4 * (64 * (64 + 2 * 16) + 64 * 64)
HEAD = 128 * 64
ALL = EXPERTS + ATTENTION + 4 * 64 * 4 + 2 * HEAD + 9 * 64          # and routers, tables, norms
GROUP = {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}


@pytest.mark.parametrize("quantization, stored, kv", [
    ({"quant_method": "mxfp4"}, 2 * ALL - EXPERTS * (2 - 17 / 32), "bf16"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]},
     2 * ALL - (EXPERTS + ATTENTION) * (1 - 4 / 2**14), "bf16"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*self_attn*"],
      "config_groups": {"group_0": GROUP}, "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
     2 * ALL - EXPERTS * (2 - 9 / 16), "fp8"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8",
      "exclude_modules": ["model.layers.0*", "re:.*self_attn.*"]},
     2 * ALL - (EXPERTS * 3 / 4 + HEAD) * (2 - 9 / 16), "fp8"),
    ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
        f"model.layers.{i}.{name}": {"quant_algo": algorithm} for i in range(4)
        for name, algorithm in (("self_attn.q_proj", "FP8"), ("mlp.experts.3.down_proj", "NVFP4"))}
      }, 2 * ALL - ATTENTION - EXPERTS * (2 - 9 / 16), "bf16"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
     2 * ALL - (EXPERTS + ATTENTION) * (2 - (4 + 20 / 128) / 8), "bf16"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": [
        "re:.*self_attn.*", "re:.*(lm_head|embed)"], "config_groups": {"g": {
            "weights": {"num_bits": 8, "type": "int", "group_size": -1, "strategy": "channel"},
            "targets": ["Linear"]}}}, 2 * ALL - EXPERTS, "bf16"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
      "bnb_4bit_quant_type": "nf4"}, 2 * ALL - (EXPERTS + ATTENTION) * (2 - 4.5 / 8), "bf16"),
], ids=lambda value: value.get("quant_method") if isinstance(value, dict) else "")
def test_a_stated_format_weighs_what_a_count_by_hand_does(quantization, stored, kv):
    config = MOE | {"dtype": "bfloat16", "quantization_config": quantization}
    shape = from_config(config)
    weights, cache = stated_formats(config, shape)
    assert shape.parameters() == ALL
    assert (shape.stored_bytes(weights), cache) == (pytest.approx(stored), kv)


def test_a_step_reads_each_part_in_its_own_format_and_devices_hold_it_so():
    """One token meets 2 of the 4 experts, which lie in mxfp4; two devices hold a half each."""
    shape = from_config(MOE)
    mxfp4, _ = stated_formats(MOE | {"quantization_config": {"quant_method": "mxfp4"}}, shape)
    saved = EXPERTS / 2 * (2 - 17 / 32)
    steps = [shape.decode(1, 9, weights=weights).bytes for weights in ("bf16", mxfp4)]
    assert steps[0] - steps[1] == pytest.approx(saved)
    assert shape.streamed_bytes() - shape.streamed_bytes(mxfp4) == pytest.approx(saved)
    held = [fits(shape, Layout(pp=2), 1e9, 1, 9, weights).weight_bytes
            for weights in ("bf16", mxfp4)]
    assert held[0] - held[1] == pytest.approx(EXPERTS / 2 * (2 - 17 / 32))


def test_a_state_is_kept_in_the_format_that_the_file_says():
    """Qwen3.5's mamba_ssm_dtype: the state in fp32, whatever format the cache of the rest has."""
    config = SEEDS["qwen3_next"]
    states = [from_config(config | more).state_bytes(kv) for more, kv in (
        ({}, "bf16"), ({"mamba_ssm_dtype": "float32"}, "bf16"),
        ({"mamba_ssm_dtype": "float32"}, "fp8"))]
    assert states[1] == states[2] == 2 * states[0] > 0


@pytest.mark.parametrize("quantization, message", [
    ({"quant_method": "aqlm"}, "quant_method='aqlm' is not supported; accepted: awq"),
    ({"quant_method": "modelopt", "quant_algo": "FP3"}, "quant_algo='FP3'"),
    ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
    ({"quant_method": "fp8", "rotate": 7}, "rotate=7"),
    ({"quant_method": "gptq", "bits": "4"}, "bits='4'"),
    ({"quant_method": "bitsandbytes"}, "one of load_in_4bit and load_in_8bit"),
    ({"quant_method": "compressed-tensors", "config_groups": {"g": GROUP | {
        "targets": ["Linear"] * 6000}}}, "5,000 names of modules"),
    ({"quant_method": "fp8", "kv_cache_quant_algo": "FP2"}, "kv_cache_quant_algo='FP2'"),
    ("fp8", "quantization_config='fp8' is not supported; accepted: an object"),
])
def test_a_format_that_is_not_known_is_refused_by_name(quantization, message):
    with pytest.raises(ValueError, match=message):
        stated_formats(MOE | {"quantization_config": quantization}, from_config(MOE))


# ---- anything at any key ----

ONE = (st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=9)
       | st.sampled_from([0, 1, -1, 2**24, 2**24 + 1, 2.0, "auto", "full_attention", "fp8", "*M"]))
MANY = st.lists(ONE, max_size=4) | st.dictionaries(st.text(max_size=9), ONE, max_size=3)
JSON = ONE | MANY | st.lists(MANY, max_size=2) | st.dictionaries(st.text(max_size=9), MANY,
                                                                 max_size=2)
SEEDS = {name: as_file(tiny(name, MORE.get(name, [{}])[0])) for name in (
    "llama", "qwen2", "gemma4_text", "llama4_text", "glm_moe_dsa", "nemotron_h", "qwen3_next",
    "kimi_linear", "jamba", "granitemoehybrid", "falcon", "mpt", "gpt2", "mamba")}
KEYS = sorted({key for seed in SEEDS.values() for key in seed}
              | {"architectures", "text_config", "quantization_config", "model_type", "torch_dtype",
                 "mlp_only_layers", "sliding_window_pattern", "hybrid_override_pattern", "new"})


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(SEEDS)), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
@example("jamba", {"attn_layer_period": 0})
@example("mamba", {"time_step_rank": 0})
@example("granitemoehybrid", {"mamba_n_heads": 0})
@example("kimi_linear", {"linear_attn_config": {"full_attn_layers": [0]}})
@example("llama", {"quantization_config": {"quant_method": ["fp8"]}})
@example("llama", {"model_type": []})
@example("gemma4_text", {"per_layer_config": {"5": 7}})
@example("llama", {"layer_types": ["full_attention"], "num_nextn_predict_layers": "one"})
def test_anything_at_any_key_is_a_shape_or_one_sentence(name, change):
    config = SEEDS[name] | change
    try:
        shape = from_config(config)
        weights, kv = stated_formats(config, shape)
        assert isinstance(shape, ModelShape) and shape.parameters() > 0
        assert shape.stored_bytes(weights) > 0 and shape.kv_bytes(1, 9, kv) >= 0
    except ValueError as error:
        assert len(str(error)) < 5000 and "\n" not in str(error)


QUANTIZATION = [
    {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["gate"]},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "lm_head": False},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": [], "ignore": ["*a*"],
     "kv_cache_scheme": {"num_bits": 8, "type": "float"}, "kv_cache_quant_algo": "FP8"},
    {"quant_method": "modelopt", "quantized_layers": {"lm_head": {"quant_algo": "FP8"}}},
    {"quant_method": "compressed-tensors", "config_groups": {"g": GROUP}}]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(QUANTIZATION), st.data())
def test_anything_in_quantization_config_is_a_format_or_one_sentence(seed, data):
    change = data.draw(st.dictionaries(st.sampled_from(sorted(seed)), JSON, max_size=2))
    config = MOE | {"quantization_config": seed | change}
    try:
        shape = from_config(config)
        weights, kv = stated_formats(config, shape)
        assert 0 < shape.stored_bytes(weights) <= 4 * ALL and shape.kv_bytes(1, 9, kv) > 0
    except ValueError as error:
        assert len(str(error)) < 5000 and "\n" not in str(error)
