"""Models in files: GGUF, safetensors, layouts of quantized matrices, tokenizers; `load_model`."""

from clawdemy_infer.files.load import UnknownModel, load_model

__all__ = ["UnknownModel", "load_model"]
