"""transformers' own reading of a GGUF file, for comparison.

`AutoModelForCausalLM.from_pretrained(gguf_file=…)` ends in the same functions, but wants
`accelerate` installed for it.
"""

from pathlib import Path

import torch


def transformers_model(gguf: Path) -> torch.nn.Module:
    """A transformers Llama in fp32 with the shape and weights of `gguf`."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(gguf)["config"])).eval()
    tensors = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model)["tensors"]
    problems = model.load_state_dict(tensors, strict=False)
    assert not problems.unexpected_keys and set(problems.missing_keys) <= {"lm_head.weight"}
    model.generation_config.eos_token_id = model.config.eos_token_id
    return model
