"""How much work? FLOPs and bytes of a language model, counted. Standard library only."""

from clawdemy_infer.arithmetic.attention import Attention
from clawdemy_infer.arithmetic.feed_forward import MLP, Experts, MoE
from clawdemy_infer.arithmetic.latent import MLA, LatentAttention
from clawdemy_infer.arithmetic.shape import Capacity, Layer, ModelShape
from clawdemy_infer.arithmetic.state_space import SSM, StateSpace
from clawdemy_infer.arithmetic.work import BYTES, Format, Pass, Work, element_bytes, matmul, total

__all__ = ["BYTES", "MLA", "MLP", "SSM", "Attention", "Capacity", "Experts", "Format",
           "LatentAttention", "Layer", "MoE", "ModelShape", "Pass", "StateSpace", "Work",
           "element_bytes", "matmul", "total"]
