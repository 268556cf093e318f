"""The shape of a model from what describes it to Hugging Face: a config.json, its keys, or a
`transformers` config object.

The files in reading order: `keys`, then a file for each kind of model: `llama` (gated, rotary,
RMSNorm: Llama, Mistral, Qwen, Gemma, Phi-3, Command R), `gpt` (what was usual before), `sparse`
(experts, latent attention), `recurrent` (state spaces). `decoder` reads, besides the shape, what a
decoder computes by. `catalog` has the shapes and machines of `data/`.
"""

import json
from pathlib import Path
from typing import Any

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.from_config import gpt, llama, recurrent, sparse
from clawdemy_infer.from_config.decoder import CHANGES_NOTHING
from clawdemy_infer.from_config.keys import Keys

FAMILIES = llama.FAMILIES | gpt.FAMILIES | sparse.FAMILIES | recurrent.FAMILIES
"""What reads each `model_type`: from keys to the fields of a ModelShape."""

COSTS_NOTHING = CHANGES_NOTHING.union(
    # How the model was trained, what Hugging Face's own classes do with it.
    "_attn_implementation architectures attn_implementation auto_map aux_loss_alpha bos_token_id "
    "cache_implementation chunk_size_feed_forward eod_token_id eos_token_id ep_size "
    "gradient_checkpointing id2label init_std is_decoder label2id output_router_logits "
    "predict_special_tokens pretraining_tp problem_type router_aux_loss_coef router_jitter_noise "
    "sep_token_id seq_aux summary_activation summary_first_dropout summary_proj_to_labels "
    "summary_type summary_use_proj task_specific_params tokenizer_class "
    # Off in inference.
    "activation_dropout attention_dropout attn_pdrop classifier_dropout dropout embd_pdrop "
    "embedding_dropout hidden_dropout layerdrop resid_pdrop residual_dropout "
    # Values, not sizes: an activation function, a scale, an angle or an epsilon costs the same
    # whatever it is.
    "activation activation_function hidden_act hidden_activation layer_norm_eps layer_norm_epsilon "
    "mixer_rms_eps norm_eps norm_epsilon rms_norm_eps original_max_position_embeddings "
    "partial_rotary_factor rope_interleave rope_interleaved rope_local_base_freq rope_parameters "
    "rope_scaling rope_theta rotary rotary_dim rotary_emb_base rotary_pct use_mrope "
    "attention_softmax_in_fp32 attn_logit_softcapping final_logit_softcapping logit_scale "
    "query_pre_attn_scalar reorder_and_upcast_attn scale_attention_softmax_in_fp32 "
    "scale_attn_by_inverse_layer_idx scale_attn_weights n_group norm_topk_prob "
    "routed_scaling_factor scoring_func swiglu_alpha swiglu_limit topk_group topk_method "
    # The format of the weights is no part of a shape: `weights=` says it, step by step.
    "quantization_config".split())


def from_config(config: Any, name: str = "") -> ModelShape:
    """The `ModelShape` that `config` describes: the path of a config.json or of a folder with one,
    a dict of its keys, or any `transformers` config object. `transformers` itself is not imported.

    Raises ValueError naming the key, its value and what is accepted for every key that is not known
    to leave the cost as it is, for a `model_type` outside `FAMILIES`, and for a size that is
    missing; FileNotFoundError where there is no such file.
    """
    source = "config"
    if isinstance(config, str | Path):
        path = Path(config).expanduser()
        path = path / "config.json" if path.is_dir() else path
        config, source = json.loads(path.read_text(encoding="utf-8")), str(path)
    elif not isinstance(config, dict):
        config = config.to_dict()
    keys = Keys(config, source)
    family = keys.take("model_type")
    if family not in FAMILIES:
        keys.refuse("model_type", family, ", ".join(sorted(FAMILIES)))
    keys.only(is_encoder_decoder=False)
    numbers = FAMILIES[family](keys)
    for key, value in keys.left.items():
        if value is not None and key not in COSTS_NOTHING:
            keys.refuse(key, value,
                        f"no such key for {family}, since it may change what the model costs")
    return ModelShape(name=name or config.get("_name_or_path") or family, source=source, **numbers)
