"""Quantized models: what is rounded and what is not, 8-bit activations, and the figures by which
they are judged."""

import math
import re
from pydoc_data.topics import topics

import pytest
import torch
from tolerances import LOGITS
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from clawdemy_course.quality_by_part import kl_by_layer, output_errors
from clawdemy_infer.fast import cpp
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.fast.quantized import on_kernels
from clawdemy_infer.files import load_model
from clawdemy_infer.quantization import (
    IntFormat,
    Quantized,
    awq,
    format_named,
    gptq,
    linears,
    observe,
    round_to_nearest,
)
from clawdemy_infer.quantization.linears import with_matrices
from clawdemy_infer.rigs.quality import Reference, mean_and_error
from clawdemy_infer.rigs.quantization_table import judged_row, quantization_table
from clawdemy_infer.rigs.text import calibration_tokens, evaluation_tokens, prose
from clawdemy_infer.variants.int8_activations import (
    Int8Activations,
    LLMInt8,
    int8_activations,
    integer_product,
    llm_int8,
)
from clawdemy_infer.variants.smoothquant import input_maxima, smoothed, smoothquant

SMALL = {
    "num_hidden_layers": 3, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 160, "vocab_size": 101, "max_position_embeddings": 512,
    "initializer_range": 0.2, "bos_token_id": 1
}
TOKENS = torch.randint(101, (3, 83), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("llama")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, eos_token_id=None))
    model.save_pretrained(folder)
    return folder, model.eval()


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint[0])


@pytest.fixture(scope="module")
def reference(model):
    return Reference(model, TOKENS)


# -- which weights --------------------------------------------------------------------------------

def test_the_matrices_come_in_the_order_in_which_they_run(model):
    seen = []
    observe(model, TOKENS[:1], lambda name, x: seen.append((name, tuple(x.shape))))
    assert [name for name, _ in seen] == list(linears(model))
    assert dict(seen[:4]) == {
        "layers.0.qkv": (83, 96), "layers.0.out": (83, 96), "layers.0.gate_up": (83, 96),
        "layers.0.down": (83, 160)
    }
    assert len(seen) == 12


def test_only_the_matrices_of_the_layers_are_rounded_and_the_rest_is_shared(model):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    quantized = round_to_nearest(model, format_named("int4-g32"))
    for name, parameter in quantized.decoder.named_parameters():
        changed = name.removesuffix(".weight") in linears(model)
        assert torch.equal(parameter, before[name]) != changed, name
        assert (parameter.data_ptr() == model.get_parameter(name).data_ptr()) != changed, name
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_rounding_runs_in_16_bits_too(checkpoint):
    half = load_model(checkpoint[0], dtype=torch.bfloat16)
    quantized = round_to_nearest(half, format_named("int8"))
    assert {parameter.dtype for parameter in quantized.decoder.parameters()} == {torch.bfloat16}
    assert Reference(half, TOKENS).judge(quantized.decoder).kl < 0.1


def test_the_packaged_models_own_grid_is_exact_and_any_other_is_not(smollm):
    """Its file is Q4_1. What a lesson shows of 4 bits must not be shown on that grid."""
    for name in ("layers.0.qkv", "layers.11.gate_up", "layers.29.down"):
        weight = linears(smollm)[name].weight
        assert torch.equal(Quantized.of(format_named("q4_1"), weight).dequantize(), weight)
        for other in ("int4-g32", "int4-g64-asym", "int4-g64-float"):
            off = Quantized.of(format_named(other), weight).dequantize() - weight
            assert 0.05 < off.norm() / weight.norm() < 0.15


def test_packed_weights_are_not_rounded_again(model):
    said = "model: its weights are packed in int8; a model with float weights is accepted"
    with pytest.raises(ValueError, match=said):
        round_to_nearest(faster(model, weights="int8"), format_named("int4-g32"))


@pytest.mark.skipif(not cpp.available(), reason="there is no C++ compiler here")
@pytest.mark.parametrize("call", [
    lambda model: observe(model, TOKENS, lambda name, x: None),
    lambda model: awq(model, TOKENS, IntFormat(4, 32)), lambda model: smoothquant(model, TOKENS)],
    ids=["observe", "awq", "smoothquant"])
def test_who_wants_to_see_inputs_refuses_a_model_whose_engine_shows_none(model, call):
    said = r"model: CppStep runs its steps, .*: quantize the model first, then make it `faster`"
    with pytest.raises(ValueError, match=said):
        call(faster(model, compile=True))


@pytest.mark.skipif(not cpp.available(), reason="there is no C++ compiler here")
def test_gptq_sees_the_inputs_of_a_faster_model_in_its_own_copy(model):
    expected, fast = (gptq(each, TOKENS, IntFormat(4, 32)).tensors
                      for each in (model, faster(model, compile=True)))
    assert list(fast) == list(linears(model))
    assert all(torch.equal(fast[name].codes, expected[name].codes) for name in fast)


def test_an_input_that_is_not_finite_is_reported_by_name(model):
    broken = with_matrices(model, {})
    nans = torch.full_like(model.layers[1].qkv.weight, math.nan)
    broken.layers[1].qkv.weight = torch.nn.Parameter(nans, requires_grad=False)
    with pytest.raises(ValueError, match="layers.1.out: its input is not finite"):
        observe(broken, TOKENS, lambda name, x: None)
    with pytest.raises(ValueError, match="model: its logits are not finite"):
        Reference(model, TOKENS).judge(broken)


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g32-asym", "int4-g32-float"])
def test_kernels_compute_what_the_codes_mean(model, name):
    quantized = round_to_nearest(model, format_named(name))
    expected, ours = quantized.decoder(TOKENS), on_kernels(quantized)(TOKENS)
    # int8's kernel rounds the activations to 8 bits, int4's to 8 bits of mantissa. A wrong zero or
    # scale is off by all of it.
    assert (ours - expected).norm() < (0.1 if name == "int8" else 0.05) * expected.norm()


def test_a_format_without_a_kernel_is_refused(model):
    with pytest.raises(ValueError, match="format=mxfp4: no kernel runs it here; int8, int4-g32"):
        on_kernels(round_to_nearest(model, format_named("mxfp4")))


# -- activations in 8 bits ------------------------------------------------------------------------

@pytest.mark.parametrize("K", [7, 576, 1024, 1025, 4096])
def test_the_product_of_whole_numbers_is_exact_also_at_the_extremes(K):
    generator = torch.Generator().manual_seed(K)
    a = torch.randint(-128, 128, (5, K), generator=generator).to(torch.int8)
    w = torch.randint(-128, 128, (9, K), generator=generator).to(torch.int8)
    a[0], w[0] = -128, -128
    assert torch.equal(integer_product(a, w).long(), a.long() @ w.long().t())


def layer_inputs(K=96, tokens=29):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, K, generator=generator)
    x[:, 17] *= 60  # a column of outliers, in every token
    return x, torch.randn(40, K, generator=generator)


def test_rounded_activations_give_the_sum_over_codes_and_scales():
    x, weight = layer_inputs()
    quantized = Quantized.of(IntFormat(8), weight)
    scale = (x.double().abs().amax(1, keepdim=True) / 127).half().double()
    codes = (x.double() / scale).round().clamp(-127, 127)
    expected = codes * scale @ quantized.dequantize().double().t()
    assert torch.allclose(Int8Activations(quantized)(x).double(), expected, rtol=1e-5, atol=1e-4)


def test_llm_int8_keeps_outliers_out_of_the_scales():
    x, weight = layer_inputs()
    quantized = Quantized.of(IntFormat(8), weight)
    exact = x @ quantized.dequantize().t()
    layer = LLMInt8(quantized)
    decomposed, plain = layer(x), Int8Activations(quantized)(x)
    assert layer.outliers == 1
    assert (decomposed - exact).norm() < 0.05 * (plain - exact).norm()


def test_a_column_that_just_reaches_the_threshold_is_an_outlier():
    """Of magnitude 6 or more (Dettmers et al. 2022, section 3.2), of either sign."""
    x, weight = torch.full((3, 96), 0.5), torch.ones(40, 96)
    x[1, 2], x[2, 5], x[0, 7], x[0, 9] = 6, -6, 5.996, 8
    layer = LLMInt8(Quantized.of(IntFormat(8), weight))
    layer(x)
    assert layer.outliers == 3


def test_llm_int8_against_equation_8_in_float64():
    x, weight = layer_inputs()
    quantized, outlier = Quantized.of(IntFormat(8), weight), torch.zeros(96, dtype=torch.bool)
    outlier[17] = True
    scale = (x[:, ~outlier].abs().amax(1, keepdim=True) / 127).half().double()
    codes = (x[:, ~outlier].double() / scale).round().clamp(-127, 127)
    w = quantized.dequantize().double()
    expected = x[:, outlier].double() @ w[:, outlier].t() + codes * scale @ w[:, ~outlier].t()
    assert torch.allclose(LLMInt8(quantized)(x).double(), expected, rtol=1e-5, atol=1e-4)


def test_without_a_threshold_nothing_or_everything_is_an_outlier(model):
    weights_alone = round_to_nearest(model, IntFormat(8)).decoder(TOKENS)
    everything, nothing = (llm_int8(model, threshold=threshold).decoder(TOKENS)
                           for threshold in (1e-30, math.inf))
    assert torch.allclose(everything, weights_alone, **LOGITS[torch.float32])
    assert torch.equal(nothing, int8_activations(model).decoder(TOKENS))
    with pytest.raises(ValueError, match="threshold=0: a number above 0 is accepted"):
        llm_int8(model, threshold=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_a_smoothed_model_computes_the_same(model, alpha):
    smooth = smoothed(model, input_maxima(model, TOKENS), alpha)
    exact = model(TOKENS)
    assert torch.allclose(smooth(TOKENS)/exact.std(), exact/exact.std(), **LOGITS[torch.float32])
    assert not torch.equal(smooth.layers[1].qkv.weight, model.layers[1].qkv.weight)


def test_smoothing_makes_the_largest_activation_and_weight_of_each_column_alike(model):
    """Equation 4 at alpha 1/2: both become sqrt(max|x| max|w|)."""
    before = input_maxima(model, TOKENS)
    after = input_maxima(smoothed(model, before, 0.5), TOKENS)
    for name in ("layers.0.qkv", "layers.2.gate_up"):
        expected = (before[name] * model.get_submodule(name).weight.abs().amax(0)).sqrt()
        assert torch.allclose(after[name], expected, rtol=1e-4)
    assert torch.allclose(after["layers.2.down"], before["layers.2.down"], rtol=1e-4)


def test_smoothing_helps_where_columns_have_outliers(model):
    """A planted column: the norm's weight is 60 times larger there, the weights behind it as much
    smaller."""
    ones = {name: torch.ones(linear.in_features) for name, linear in linears(model).items()}
    planted = smoothed(model, ones, 0.0)
    for layer in planted.layers:
        layer.attention_norm.weight[[5, 40]] *= 60
        layer.qkv.weight[:, [5, 40]] /= 60
    reference = Reference(planted, TOKENS)
    plain, smooth = (reference.judge(each.decoder)
                     for each in (int8_activations(planted), smoothquant(planted, TOKENS)))
    assert smooth.kl < 0.5 * plain.kl


def test_a_wrong_alpha_is_refused(model):
    with pytest.raises(ValueError, match="alpha=1.5: 0 to 1 is accepted"):
        smoothed(model, {}, 1.5)


# -- evaluation -----------------------------------------------------------------------------------

def test_kl_and_top1_against_float64(model, reference):
    other = round_to_nearest(model, format_named("int3-g32")).decoder
    p, q = (each(TOKENS).double().log_softmax(-1) for each in (model, other))
    quality = reference.judge(other)
    assert quality.kl == pytest.approx(
        float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()), rel=1e-4)
    assert quality.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_perplexity_is_that_of_transformers(checkpoint, reference):
    with torch.no_grad():
        losses = [checkpoint[1](row[None], labels=row[None]).loss for row in TOKENS]
    assert reference.quality.perplexity == pytest.approx(float(torch.stack(losses).mean().exp()),
                                                         rel=1e-4)


def test_a_model_is_no_distance_from_itself(model, reference):
    quality = reference.judge(model)
    assert abs(quality.kl) < 1e-6 and quality.top1 == 1
    assert quality.perplexity == pytest.approx(reference.quality.perplexity, rel=1e-5)


def test_the_standard_error_is_that_of_blocks():
    values = torch.arange(256.0).view(2, 128)  # four blocks of 64, whose means are 31.5, 95.5, …
    mean, error = mean_and_error(values)
    assert mean == 127.5
    assert error == pytest.approx(torch.tensor([31.5, 95.5, 159.5, 223.5]).std().item() / 2)


def test_a_difference_on_the_same_text_is_known_better_than_its_parts(model, reference):
    worse, better = (reference.judge(round_to_nearest(model, format_named(name)).decoder)
                     for name in ("int4-g32", "int4-g32-asym"))
    difference, error = better.difference(worse)
    assert difference == pytest.approx(worse.kl - better.kl, rel=1e-5)
    assert error < worse.kl_se + better.kl_se


def test_output_errors_by_hand_and_worst_first(model):
    quantized, inputs = round_to_nearest(model, format_named("int4-g32")), {}
    errors = output_errors(model, quantized, TOKENS)
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    assert set(errors) == set(linears(model))
    observe(model, TOKENS, lambda name, x: inputs.setdefault(name, []).append(x))
    x, w = torch.cat(inputs["layers.1.down"]).double(), model.layers[1].down.weight.double()
    off = x @ (quantized.tensors["layers.1.down"].dequantize().double() - w).t()
    assert errors["layers.1.down"] == pytest.approx(
        float(off.square().sum()/(x @ w.t()).square().sum()), rel=1e-4)


def test_one_layer_at_a_time_costs_less_than_all(model, reference):
    quantized = round_to_nearest(model, format_named("int3-g32"))
    by_layer = kl_by_layer(reference, quantized)
    assert list(by_layer) == [0, 1, 2]
    assert 0 < max(by_layer.values()) < reference.judge(quantized.decoder).kl


def test_the_table_counts_bytes_by_hand(model, reference):
    quantized = round_to_nearest(model, format_named("int4-g32"))
    rows = [judged_row(reference), judged_row(reference, quantized)]
    # qkv, out, gate and up, down
    matrices = 3 * ((6 + 2 * 2) * 16 * 96 + 96 * 96 + 2 * 160 * 96 + 160 * 96)
    rest = (2 * 101 * 96 + 7 * 96) * 4  # embedding, head, norms: fp32
    assert rows[0].stored == matrices * 4 + rest
    assert rows[1].stored == matrices // 2 + matrices // 32 * 2 + rest
    # the embedding is looked up
    assert [row.stored - row.streamed for row in rows] == [101 * 96 * 4] * 2
    assert [row.bits for row in rows] == [32, 4.5]
    shown = repr(quantization_table(rows))
    assert "int4-g32" in shown and "predicted" not in shown


# -- text -----------------------------------------------------------------------------------------

def test_calibration_and_evaluation_share_no_paragraph():
    def paragraphs(text):
        return {lines.strip() for lines in re.split(r"\n\s*\n", text) if lines.strip()}

    calibration, evaluation = paragraphs(prose("calibration")), paragraphs(prose("evaluation"))
    assert not calibration & evaluation
    assert set().union(*map(paragraphs, topics.values())) == calibration | evaluation


def test_tokens_of_the_two_parts(smollm):
    evaluation = evaluation_tokens(smollm.tokenizer, 2, 100)
    assert smollm.tokenizer.decode(evaluation.flatten().tolist()) == prose(
        "evaluation")[:len(smollm.tokenizer.decode(evaluation.flatten().tolist()))]
    first, again, other = (calibration_tokens(smollm.tokenizer, 3, 50, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert smollm.tokenizer.decode(first[1].tolist()) in prose("calibration")


def test_text_from_a_file(smollm, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    tokens = calibration_tokens(smollm.tokenizer, 4, 16, text=file)
    assert tokens.shape == (4, 16) and smollm.tokenizer.decode(
        tokens[0].tolist()) in file.read_text()


@pytest.mark.parametrize(("text", "message"),
                         [("", "it has 0 tokens"),
                          ("Too short.", "it has 3 tokens, and 2 sequences of 64 ask for")])
def test_too_little_text_is_refused(smollm, text, message):
    with pytest.raises(ValueError, match=message):
        evaluation_tokens(smollm.tokenizer, 2, 64, text=text)
    with pytest.raises(ValueError, match="calibration text"):
        calibration_tokens(smollm.tokenizer, 2, 64, text=text)
