"""How much work? FLOPs and bytes of a language model, counted step by step. Standard library only.

In reading order: `work` (the unit and the matrix product), the mixers `attention`, `latent` and `state_space`, `feed_forward`
(MLP and experts), `layer` (a mixer and a feed-forward part), `shape` (a model: L layers between an embedding and a head).
"""

from clawdemy_infer.arithmetic.attention import Attention
from clawdemy_infer.arithmetic.feed_forward import MLP, Experts, MoE
from clawdemy_infer.arithmetic.latent import MLA, LatentAttention
from clawdemy_infer.arithmetic.layer import Layer
from clawdemy_infer.arithmetic.shape import KINDS, Capacity, ModelShape
from clawdemy_infer.arithmetic.state_space import SSM, StateSpace
from clawdemy_infer.arithmetic.work import BYTES, Format, Pass, Work, at_least_1, check_step, element_bytes, matmul, total

__all__ = [
    "BYTES", "KINDS", "MLA", "MLP", "SSM", "Attention", "Capacity", "Experts", "Format", "LatentAttention", "Layer", "MoE", "ModelShape",
    "Pass", "StateSpace", "Work", "at_least_1", "check_step", "element_bytes", "matmul", "total",
]
