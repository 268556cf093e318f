"""Cross-layer attention: what a plain program computes that keeps nothing, in fp64; and half the
bytes."""

import pytest
import torch
from tolerances import LOGITS
from torch.nn import functional as F

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.variants.cross_layer import CrossLayerConfig, CrossLayerDecoder

CLA2 = ("global", "global shared")
CLA3 = ("global", "global shared", "global shared")
TEXT = torch.randint(101, (83,), generator=torch.Generator().manual_seed(3)).tolist()


def shape(pattern=CLA2, layers=5):
    return ModelShape("small", L=layers, D=52, N=6, K=2, H=10, F=44, V=101, pattern=pattern,
                      max_context=256, window=7 if "local" in pattern else None)


def random_model(pattern):
    torch.manual_seed(5)
    model = CrossLayerDecoder(CrossLayerConfig(shape(pattern))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


@torch.no_grad()
def naive_logits(model, ids):
    """[S, V] in fp64: each layer's keys and values are those of the last layer that has any; of all
    pairs, those to come are struck out."""
    def norm(x, module):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight.double()

    def turned(x):  # [S, heads, 10], pairs (j, j + 5), by position * 10000^(-j/5)
        angle = torch.arange(len(x)).double()[:, None, None]*10_000.0**(-torch.arange(5).double()/5)
        z = torch.polar(torch.ones_like(angle), angle) * torch.complex(x[..., :5], x[..., 5:])
        return torch.cat((z.real, z.imag), -1)

    def product(x, linear):
        return x @ linear.weight.double().T

    x, S = model.embed.weight.double()[torch.tensor(ids)], len(ids)
    for layer in model.layers:
        h = norm(x, layer.attention_norm)
        if hasattr(layer, "qkv"):
            q, k, v = product(h, layer.qkv).view(S, 10, 10).split((6, 2, 2), dim=1)
            k, v = turned(k).repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        else:
            q = product(h, layer.q).view(S, 6, 10)
        scores = torch.einsum("tnh,snh->nts", turned(q), k) / 10**0.5
        scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), -torch.inf)
        x = x + product(torch.einsum("nts,snh->tnh", scores.softmax(-1), v).flatten(1), layer.out)
        gate, up = product(norm(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
        x = x + product(F.silu(gate) * up, layer.down)
    return product(norm(x, model.norm), model.head).float()


def assert_logits_agree(ours, theirs):
    torch.testing.assert_close(ours / theirs.std(), theirs / theirs.std(), **LOGITS[torch.float32])


@pytest.mark.parametrize("pattern", [CLA2, CLA3, ("global", )], ids=["CLA2", "CLA3", "none shares"])
@pytest.mark.parametrize("pieces", [[83], [1]*83, [40, 3, 1, 1, 38]],
                         ids=["whole", "one by one", "in pieces"])
def test_logits_equal_those_of_a_plain_program(pattern, pieces):
    model = random_model(pattern)
    cache, start, out = model.new_cache(1, 83), 0, []
    for piece in pieces:
        out.append(model.step({0: TEXT[start:start + piece]}, cache, logits_to_keep=0))
        start += piece
    assert_logits_agree(torch.cat(out), naive_logits(model, TEXT))


def test_a_ragged_batch_computes_what_each_sequence_does_alone():
    model, starts = random_model(CLA2), [1, 30, 7, 16, 2, 8, 41]
    cache = model.new_cache(7, 60)
    model.step({i: TEXT[i:i + n] for i, n in enumerate(starts)}, cache)
    logits = model.step({i: [TEXT[i + n]] for i, n in enumerate(starts)}, cache)
    alone = [naive_logits(model, TEXT[i:i + n + 1])[-1] for i, n in enumerate(starts)]
    assert_logits_agree(logits, torch.stack(alone))


@pytest.mark.parametrize(("pattern", "owners"), [(CLA2, 3), (CLA3, 2), (("global",), 5)])
def test_only_layers_that_own_keys_and_values_keep_some(pattern, owners):
    cache = random_model(pattern).new_cache(batch=7, capacity=77)
    assert cache.allocated_bytes == 7*77*owners*2*2*10*4 == shape(pattern).kv_bytes(7, 77, "fp32")


def test_the_parameters_are_as_many_as_the_shape_counts():
    count = sum(parameter.numel() for parameter in random_model(CLA2).parameters())
    assert count == shape().parameters()


@pytest.mark.parametrize("pattern", [("global shared", "global"), ("local", "global shared")])
def test_a_pattern_that_it_does_not_run_is_refused(pattern):
    with pytest.raises(ValueError, match="pattern="):
        CrossLayerDecoder(CrossLayerConfig(shape(pattern)))
