"""What config.json says of a `ModelConfig`: the way back from `ModelConfig.from_hf`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from clawdemy_infer.model import ModelConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers, serving engines and `ModelConfig.from_hf` read."""
    shape = config.shape
    family = "qwen3" if shape.qk_norm else "qwen2" if shape.qkv_bias else "mistral" if shape.window else "llama"
    scaling = {"rope_type": "llama3", **asdict(config.rope_scaling)} if config.rope_scaling else None
    said = {
        "_name_or_path": shape.name, "architectures": [ARCHITECTURES[family]], "model_type": family, "hidden_act": "silu",
        "num_hidden_layers": shape.L, "hidden_size": shape.D, "num_attention_heads": shape.N, "num_key_value_heads": shape.K,
        "head_dim": shape.H, "intermediate_size": shape.F, "vocab_size": shape.V, "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.max_context, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "rope_scaling": scaling, "bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids) or None,
    }
    if family in ("llama", "qwen3"):
        said["attention_bias"] = False
    if family != "llama":
        said["sliding_window"] = shape.window
    if family in ("qwen2", "qwen3"):
        said |= {"use_sliding_window": shape.window is not None, "max_window_layers": 0 if shape.window else shape.L}
    return said
