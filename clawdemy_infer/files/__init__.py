"""Models in files: GGUF, safetensors, quantized checkpoints, tokenizers; `load_model`."""

from clawdemy_infer.files.load import UnknownModel, load_model

__all__ = ["UnknownModel", "load_model"]
