"""AWQ: an identity that must hold exactly, and searches that must never make it worse on the text
they look at."""

from copy import deepcopy

import pytest
import torch
from tolerances import LOGITS

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.fast.quantized import on_kernels
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.quantization import (
    IntFormat,
    Quantized,
    awq,
    format_named,
    observe,
    round_to_nearest,
)
from clawdemy_infer.quantization.awq import (
    SINK,
    _ordinary,
    best_scales,
    clipped,
    fold,
    shared,
)
from clawdemy_infer.rigs.quality import Reference
from clawdemy_infer.rigs.text import calibration_tokens, evaluation_tokens

NO_SINKS = torch.zeros(200, dtype=torch.bool)
TOKENS = torch.randint(0, 101, (3, 31), generator=torch.Generator().manual_seed(1))


def tiny(**more):
    torch.manual_seed(0)
    shape = ModelShape(name="tiny", source="test", L=2, D=96, N=6, K=2, H=16, F=160, V=101,
                       tied=True, max_context=64, **more)
    model = Decoder(ModelConfig(shape)).eval().requires_grad_(False)
    for layer in model.layers:
        for norm in (layer.attention_norm, layer.mlp_norm):  # a few channels far above the rest
            norm.weight.uniform_(0.5, 1.5)
            norm.weight[[3, 40, 77]] = 12.0
            norm.weight.div_(4)
    return model


@pytest.mark.parametrize("more", [{}, {"biases": ("qkv",)}, {"qk_norm": True}],
                         ids=["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["qkv", "out", "gate_up", "down"])
def test_scaled_and_folded_the_model_computes_the_same(name, more):
    model = tiny(**more)
    copy, random = deepcopy(model), torch.Generator().manual_seed(2)
    for layer in copy.layers:
        before = getattr(layer, name).weight.clone()
        s = torch.rand(before.shape[1], generator=random) * 3 + 0.2
        fold(layer, name, shared(layer, name, s))
        assert not torch.equal(getattr(layer, name).weight, before)
    expected = model(TOKENS)
    torch.testing.assert_close(copy(TOKENS) / expected.std(), expected / expected.std(),
                               **LOGITS[torch.float32])


def test_query_heads_that_share_a_v_share_its_scales():
    layer = tiny().layers[0]                                            # 6 query heads, 2 KV heads
    s = shared(layer, "out", torch.rand(96)).view(2, 3, 16)
    assert torch.equal(s, s[:, :1].expand_as(s)) and not torch.equal(s[0], s[1])


@pytest.mark.parametrize("name", ["int3-g16", "int4-g32-asym"])
def test_awq_beats_rounding_where_some_channels_are_large(name):
    model, format = tiny(), format_named(name)
    before = model(TOKENS)
    result = awq(model, TOKENS, format)
    assert torch.equal(model(TOKENS), before)  # the model itself is untouched
    errors = [(each.decoder(TOKENS) - before).square().mean()
              for each in (result, round_to_nearest(model, format))]
    assert errors[0] < 0.8 * errors[1]


def test_awq_codes_run_on_the_kernels_of_plain_int4():
    result = awq(tiny(), TOKENS, format_named("int4-g32-asym"))
    expected = result.decoder(TOKENS)
    torch.testing.assert_close(on_kernels(result)(TOKENS) / expected.std(),
                               expected / expected.std(), **LOGITS[torch.bfloat16])


def test_the_search_finds_a_channel_that_matters_and_never_does_worse_than_no_scaling():
    torch.manual_seed(3)
    linear = torch.nn.Linear(64, 24, bias=False).requires_grad_(False)
    x, format = torch.randn(200, 64), format_named("int3-g16-asym")
    x[:, 9] *= 50
    exact, before = linear(x), linear.weight.clone()
    s = best_scales(linear, x.abs().mean(0), format, lambda: linear(x), NO_SINKS)
    assert torch.equal(linear.weight, before) and s.argmax() == 9
    scaled, plain = (x @ w.T for w in (Quantized.of(format, before*s).dequantize()/s,
                                       Quantized.of(format, before).dequantize()))
    assert (scaled - exact).square().mean() < 0.5 * (plain - exact).square().mean()
    calm = best_scales(linear, torch.ones(64), format, lambda: linear(x), NO_SINKS)
    assert torch.equal(calm, torch.ones(64))


def test_sinks_are_told_apart_by_their_length():
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(4))
    x[[0, 17]] *= 3 * SINK
    assert (~_ordinary(x)).nonzero().flatten().tolist() == [0, 17]


def test_a_sink_among_the_tokens_does_not_move_the_scales():
    torch.manual_seed(5)
    linear = torch.nn.Linear(64, 24, bias=False).requires_grad_(False)
    x, format = torch.randn(50, 64), IntFormat(4, 16)
    x[:, 9] *= 20
    ordinary = torch.arange(50) > 0
    found = []
    for sink in (1.0, 1e4):
        x[0] = sink
        size = x[ordinary].abs().mean(0)
        found.append(best_scales(linear, size, format, lambda: linear(x), ~ordinary))
    assert torch.equal(*found)


def with_sinks():
    """A model, and texts that each begin with token 7, which is as long as 100 others."""
    model, tokens = tiny(), TOKENS.masked_fill(TOKENS == 7, 8)
    model.embed.weight[7] *= 100
    tokens[:, 0] = 7
    return model, tokens


def seen_by(name, model, tokens, monkeypatch):
    """What `awq` calls its function `name` with, call by call."""
    calls, plain = [], awq.__globals__[name]

    def see(*given):
        calls.append([x.clone() if isinstance(x, torch.Tensor) else x for x in given])
        return plain(*given)
    monkeypatch.setitem(awq.__globals__, name, see)
    awq(model, tokens, IntFormat(4, 16))
    return calls


def test_sinks_do_not_count_among_the_sizes_of_channels(monkeypatch):
    """Of what goes into the first product, the mean over all other tokens."""
    model, tokens = with_sinks()
    (_, size, *_), *_ = seen_by("best_scales", model, tokens, monkeypatch)
    x = model.embed(tokens)[:, 1:].flatten(0, 1)
    normed = x / x.square().mean(1, keepdim=True).sqrt() * model.layers[0].attention_norm.weight
    torch.testing.assert_close(size, normed.abs().mean(0), rtol=1e-4, atol=0)


def test_all_sinks_judge_and_of_the_other_tokens_some_from_everywhere(monkeypatch):
    """3 sinks and 90 others, of which each tenth where at most 10 tokens are to judge; attention is
    judged on all."""
    model, tokens = with_sinks()
    monkeypatch.setitem(awq.__globals__, "MAX_JUDGES", 10)
    qkv, out, gate_up, down, *_ = seen_by("best_scales", model, tokens, monkeypatch)
    assert qkv[4].nonzero().flatten().tolist() == [0, 31, 62]
    for _, _, _, block, sink in (out, gate_up, down):
        assert len(block()) == len(sink) == 9 + 3 and sink.tolist() == [False] * 9 + [True] * 3
    seen = []
    observe(model, tokens, lambda name, x: seen.append(x) if name == "layers.0.down" else None)
    others = [row for row in range(93) if row % 31][::10]
    torch.testing.assert_close(down[3].args[0], torch.cat(seen)[[*others, 0, 31, 62]])


def test_a_token_that_is_long_before_a_layer_or_behind_it_is_a_sink(monkeypatch):
    rows, masks = torch.arange(93), iter([0, 5, 7, 9])
    monkeypatch.setitem(awq.__globals__, "_ordinary", lambda x: rows != next(masks))
    calls = seen_by("best_scales", tiny(), TOKENS, monkeypatch)
    assert [calls[i][4].nonzero().flatten().tolist() for i in (0, 4)] == [[0, 5], [7, 9]]


def test_clips_are_judged_on_what_the_scaled_matrices_get(monkeypatch):
    """Weights times s on inputs over s: what they make is what the model makes, but for V and up,
    whose own outputs the scales of the next matrix divide."""
    model, tokens = with_sinks()
    made = {}
    observe(model, tokens, lambda name, x: made.setdefault(name, []).append(
        x @ model.get_submodule(name).weight.T))
    calls = seen_by("clipped", model, tokens, monkeypatch)
    for name, (weight, x, *_) in zip(("qkv", "out", "gate_up", "down"), calls, strict=False):
        expected = torch.cat(made[f"layers.0.{name}"])
        same = {"qkv": 0, "gate_up": 160}.get(name, 96)
        torch.testing.assert_close((x @ weight.T)[:, :same], expected[:, :same],
                                   rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["int3-g16", "int4-g32-asym"])
def test_clipping_lowers_the_error_of_every_group_or_leaves_it(name):
    torch.manual_seed(6)
    weight, x, format = torch.randn(20, 64) ** 3, torch.randn(300, 64), format_named(name)
    kept = clipped(weight, x, format, torch.zeros(300, dtype=torch.bool))
    assert (kept.abs() <= weight.abs()).all() and not torch.equal(kept, weight)
    g = format.group
    for group in range(64 // g):
        part = slice(group * g, group * g + g)
        off = [(Quantized.of(format, w).dequantize() - weight)[:, part] for w in (weight, kept)]
        plain, clip = ((x[:, part] @ each.T).square().sum(0) for each in off)
        assert (clip <= plain * (1 + 1e-4)).all()


def test_q_and_k_are_not_clipped(monkeypatch):
    model, format = tiny(), IntFormat(3, 16)
    with_clip = awq(model, TOKENS, format).tensors["layers.0.qkv"]
    monkeypatch.setitem(awq.__globals__, "clipped", lambda weight, *_: weight)
    without = awq(model, TOKENS, format).tensors["layers.0.qkv"]
    q_and_k = (6 + 2) * 16
    assert torch.equal(with_clip.scale[:q_and_k], without.scale[:q_and_k])
    assert not torch.equal(with_clip.scale[q_and_k:], without.scale[q_and_k:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4-g64", "int3-g64"])
def test_awq_takes_a_tenth_off_the_kl_of_rounding_whatever_text_it_saw(name, smollm):
    """All of SmolLM2, on text that the calibration has not: each of three seeds, and not their
    mean. Some two minutes a format."""
    reference, format = Reference(smollm, evaluation_tokens(smollm.tokenizer,
                                                            4)), format_named(name)
    nearest = reference.judge(round_to_nearest(smollm, format).decoder)
    for seed in range(3):
        quality = reference.judge(
            awq(smollm, calibration_tokens(smollm.tokenizer, 4, seed=seed), format).decoder)
        gain, error = quality.difference(nearest)
        print(f"{name}, seed {seed}: KL {quality.kl:.4f}, nearest {nearest.kl:.4f}, "
              f"-{gain / nearest.kl:.1%} ± {error / nearest.kl:.1%}")
        assert gain - 2 * error > 0.1 * nearest.kl


@pytest.mark.parametrize(
    "call, said",
    [(lambda m: awq(m, TOKENS, IntFormat(4, 64)), "group=64 does not divide the 96 inputs"),
     (lambda m: awq(m, TOKENS[:, :0], IntFormat(4, 32)), "tokens"),
     (lambda m: awq(m, TOKENS + 1000, IntFormat(4, 32)), "tokens hold"),
     (lambda m: m.layers[1].mlp_norm.weight.fill_(float("nan")) is None or
      awq(m, TOKENS, IntFormat(4, 32)), "the output of layer 1"), ])
def test_bad_input_is_refused_by_name(call, said):
    with pytest.raises(ValueError, match=said):
        call(tiny())
