"""The same model in other formats of its weights, and where the time of a step goes."""

import math

import pytest
import torch

from clawdemy_infer.arithmetic import ModelShape, MoE
from clawdemy_infer.fast import FORMATS, layers
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.fast.kernels import FALLBACK, PYTORCH
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.lesson.steps import step_ops, work_of
from clawdemy_infer.machine.calibrated import Calibrated
from clawdemy_infer.model import Decoder, ModelConfig, generate
from clawdemy_infer.rigs import breakdown as room
from clawdemy_infer.variants.experts import decoder_with_experts

SHAPE = ModelShape("small", L=2, D=96, N=6, K=2, H=16, F=160, V=176, tied=True, qkv_bias=True,
                   max_context=64)
MACHINE = Calibrated(
    "m", ((1.0, 1e9), ), {"fp32": 1e10, "bf16": 3e10}, memory=1e6, fixed_s_per_op=1e-6,
    elementwise={"fp32": ((1, 5e8), )}, rates={
        "gemm": {"fp32": ((1, 1e9), (64, 5e9))}, "head": {"fp32": ((1, 2e9), )},
        "attention": {"fp32": ((1, 3e9), )}
    })


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


# ---- the breakdown ----


@pytest.mark.parametrize("phase, batch, context", [("decode", 3, 17), ("prefill", 2, 11)])
def test_the_parts_of_a_step_are_predicted_as_the_step_is(model, phase, batch, context):
    work = work_of(SHAPE, phase, "fp32", batch, context)
    parts = room.predict_parts(model, MACHINE, phase, batch, context)
    assert list(parts) == list(room.PARTS)
    whole = MACHINE.time(work,
                         step_ops(model, 2) if phase == "prefill" else step_ops(model, batch=batch))
    assert sum(seconds for _, seconds in parts.values()) == pytest.approx(whole.seconds)
    assert sum(part.flops for part, _ in parts.values()) == work.flops
    assert sum(part.bytes for part, _ in parts.values()) == work.bytes


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_every_part_of_a_step_is_watched_and_the_model_is_left_as_it_was(model, packed, phase):
    watched = faster(model, "fp32") if packed else model
    parts = room.breakdown(watched, MACHINE, phase, 2, 9, repeats=2)
    assert all(part["measured_s"] > 0 for part in parts)
    assert not any({"forward", "logits"} & vars(module).keys() for module in watched.modules())
