"""A Llama-family decoder small enough to read in one sitting: config, rope, decoder, then sampling and generate."""

from clawdemy_infer.model.compiled import compiled
from clawdemy_infer.model.config import ModelConfig
from clawdemy_infer.model.decoder import Decoder
from clawdemy_infer.model.formats import with_weights
from clawdemy_infer.model.generate import Generation, generate
from clawdemy_infer.model.load import load_model
from clawdemy_infer.model.on_triton import with_backend
from clawdemy_infer.model.sampling import Sampling, draw, probabilities, sample
from clawdemy_infer.model.tokenizer import Tokenizer

__all__ = [
    "Decoder", "Generation", "ModelConfig", "Sampling", "Tokenizer", "compiled", "draw", "generate", "load_model", "probabilities",
    "sample", "with_backend", "with_weights",
]
