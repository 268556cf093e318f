"""The same model in other formats of its weights."""

import math

import pytest
import torch

from clawdemy_infer.arithmetic import ModelShape, MoE
from clawdemy_infer.fast import FORMATS, layers
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.fast.kernels import FALLBACK, PYTORCH
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.model import Decoder, ModelConfig, generate
from clawdemy_infer.variants.experts import decoder_with_experts

SHAPE = ModelShape("small", L=2, D=96, N=6, K=2, H=16, F=160, V=176, tied=True, biases=("qkv",),
                   max_context=64)


@pytest.fixture(params=["the table's", "two kernels"], autouse=True)
def kernels(request, monkeypatch):
    """Those of this machine; and one up to 4 rows, then another."""
    if request.param == "two kernels":
        monkeypatch.setattr(layers, "table", lambda format, *_: [
            (4, [PYTORCH[format], FALLBACK[format]]), (1e9, [FALLBACK[format]])])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(4)
    made = Decoder(ModelConfig(SHAPE)).eval().requires_grad_(False)
    made.embed.weight.mul_(0.3)
    for layer in made.layers:
        layer.qkv.bias.normal_()
    return made


@pytest.mark.parametrize("format, within", [("fp32", 1e-4), ("fp16", 5e-3), ("bf16", 0.1),
                                            ("int8", 0.1), ("int4", 0.6)])
def test_a_model_in_another_format_says_nearly_the_same(model, format, within):
    tokens = torch.arange(26).view(2, 13) * 5
    other = faster(model, format)
    assert (other.weights, model.weights) == (format, "fp32")
    right = model(tokens)
    assert (other(tokens).float() - right).abs().max() <= within * right.std()
    cache = ContiguousCache.for_model(other, 2, 20)
    whole = torch.cat([other(part, cache).float() for part in tokens.split([8, 4, 1], dim=1)],
                      dim=1)
    assert (whole - right).abs().max() <= within * right.std()


def test_the_copy_shares_what_it_does_not_pack_and_leaves_the_model_alone(model):
    before = model(torch.tensor([[3, 1, 4]])).clone()
    other = faster(model, "int8")
    assert other.embed is model.embed and other.norm is model.norm and other.layers[
        0].mlp_norm is model.layers[0].mlp_norm
    assert model.head is None and not any("weight" in name and "norm" not in name
                                          for name, _ in other.layers.named_parameters())
    assert torch.equal(model(torch.tensor([[3, 1, 4]])), before)


def test_a_model_generates_in_every_format(model):
    for format in FORMATS:
        assert len(generate(faster(model, format), [1, 2, 3], 5).tokens) == 5


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kernel", [None, PYTORCH, FALLBACK], ids=["ours", "PyTorch's", "fallback"])
def test_the_real_model_counts_on_with_a_named_kernel_in_every_product(
        smollm, monkeypatch, format, kernel):
    """What a machine that was never calibrated, or with one thread, might not choose. Each token
    leads by some 3 in the logits, far more than any rounding; a prefill takes the kernel at 40
    rows, a decode step at 2."""
    if kernel:
        monkeypatch.setattr(layers, "table", lambda *_: [(math.inf, [kernel[format]])])
    other = faster(smollm, format)
    tokens = torch.tensor([smollm.tokenizer.encode("1, 2, 3, 4, 5, 6, 7,")] * 2)
    cache, written = ContiguousCache.for_model(other, 2, 30), []
    for _ in range(6):
        tokens = other(tokens, cache, last_only=True).argmax(-1)
        written.append(tokens)
    assert [smollm.tokenizer.decode(row) for row in torch.cat(written, 1).tolist()] == [" 8, 9,"]*2


def test_what_cannot_be_packed_is_refused(model):
    with pytest.raises(ValueError, match="packed in int8"):
        faster(faster(model, "int8"), "int4")
    with pytest.raises(ValueError, match="weights='fp8'"):
        faster(model, "fp8")
    experts = decoder_with_experts(ModelConfig(SHAPE), MoE(4, 2))
    with pytest.raises(ValueError, match="experts"):
        faster(experts, "int8")
