"""What fewer bits cost in quality: a model against the one that it was made of, on texts."""

from clawdemy_infer.evaluation.quality import Quality, Reference, kl_by_layer, output_errors
from clawdemy_infer.evaluation.text import calibration_tokens, evaluation_tokens

__all__ = ["Quality", "Reference", "calibration_tokens", "evaluation_tokens", "kl_by_layer",
           "output_errors"]
