"""A small model, and policies under which an engine may serve it."""

import torch

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.batching import Policy
from clawdemy_infer.model import Decoder, ModelConfig

# bytes of a block of four tokens: K and V, 2 layers, 2 heads of 8, fp32
BLOCK = 2 * 2 * 2 * 8 * 4 * 4
POLICIES = {
    "static": Policy("static", max_batch=3),
    "continuous": Policy(max_batch=4),
    "chunked": Policy(max_batch=4, token_budget=7),
    "swap": Policy(max_batch=4, preemption="swap"),
    "prefixes": Policy(max_batch=4, token_budget=9, prefix_caching=True),
}


def random_model(**fields) -> Decoder:
    """Random weights, wide enough apart that no two logits are nearly equal."""
    torch.manual_seed(3)
    shape = ModelShape("small", L=2, D=24, N=6, K=2, H=8, F=40, V=97, max_context=64, **fields)
    model = Decoder(ModelConfig(shape)).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(2)
    return model
