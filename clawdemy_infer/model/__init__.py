"""A Llama-family decoder small enough to read in one sitting, and how it writes a text."""

from clawdemy_infer.model.config import ModelConfig
from clawdemy_infer.model.decoder import Decoder
from clawdemy_infer.model.generate import Generation, generate
from clawdemy_infer.model.sampling import Sampling, draw, probabilities, sample

__all__ = ["Decoder", "Generation", "ModelConfig", "Sampling", "draw", "generate", "probabilities",
           "sample"]
