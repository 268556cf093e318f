"""GPTQ against the Optimal Brain formulas written out: one column after another, on the inverse
itself, in float64."""

import sys
from dataclasses import replace

import pytest
import torch

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.quantization import (
    IntFormat,
    Quantized,
    format_named,
    gptq,
    linears,
    observe,
    round_to_nearest,
)
from clawdemy_infer.quantization.gptq import (
    column_step,
    fitted,
    gptq_matrix,
    hessian_of,
    inverse_factor,
    output_error,
)

SHAPES = [("int4-g16", 7, 80), ("int3-g32-asym", 11, 96), ("int4", 5, 37), ("int8-g5", 3, 35)]


def problem(O, I, seed=0):
    """Weights [O, I] and inputs [M, I] whose channels are correlated and of very different size, as
    a language model's are."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(3*I, I, generator=random) @ torch.randn(I, I, generator=random)*torch.rand(
        I, generator=random).exp()
    return torch.randn(O, I, generator=random), x


def grid_of(group, bits, symmetric):
    """Scale and zero point of each row of `group` in float64, the scale as fp16 holds it: published
    formulas, not the library's."""
    top = 2**bits - 1
    if symmetric:
        span = 2 * group.abs().amax(1) if bits < 8 else 2 * group.abs().amax(1) * 255 / 254
        zero = torch.full_like(span, 2 ** (bits - 1))
    else:
        span = group.amax(1).clamp(min=0) - group.amin(1).clamp(max=0)
        zero = None
    scale = (span.float() / top).half().double()
    return scale, zero if symmetric else (-group.amin(1).clamp(max=0) / scale).round().clamp(0, top)


def searched(group, bits, symmetric, power=2.4):
    """The grid that `grid_of` gives to the part of each row, all of its range or 0.95 ... 0.5 of
    it, that leaves the least sum of |error|^2.4: the norm of IST-DASLab's quant.py."""
    found = []
    for part in range(11):
        narrow = [row.clamp(row.min() * (1 - part / 20), row.max() * (1 - part / 20))
                  for row in group]
        scale, zero = grid_of(torch.stack(narrow), bits, symmetric)
        codes = ((group / scale[:, None] + zero[:, None]).round().clamp(0, 2**bits - 1))
        error = ((codes - zero[:, None]) * scale[:, None] - group).abs() ** power
        found.append((error.sum(1), scale, zero))
    errors, scales, zeros = map(torch.stack, zip(*found, strict=True))          # [11, O]
    best = errors.argmin(0, keepdim=True)
    return scales.gather(0, best)[0], zeros.gather(0, best)[0]


def reference(weight, hessian, bits, g, symmetric, order, static, damping=0.01, grid=grid_of):
    W, H = weight.double().clone(), hessian.double()
    I, top = len(H), 2**bits - 1
    inverse = torch.linalg.inv(H + damping * H.diagonal().mean() * torch.eye(I))
    grids = [grid(W[:, i:i + g], bits, symmetric) for i in range(0, I, g)] if static else {}
    Q = torch.empty_like(W)
    for step, j in enumerate(order):
        if not static and step % g == 0:
            grids[step // g] = grid(W[:, order[step:step + g]], bits, symmetric)
        scale, zero = grids[j // g if static else step // g]
        Q[:, j] = ((W[:, j] / scale + zero).round().clamp(0, top) - zero) * scale
        W = W - torch.outer((W[:, j] - Q[:, j]) / inverse[j, j], inverse[j])  # equation 2
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]  # equation 3
    return Q


def rows_that_differ(ours, theirs):
    return int(((ours.double() - theirs).abs() > 1e-5).any(1).sum())


@pytest.mark.parametrize("static", [True, False], ids=["static-groups", "groups-as-they-come"])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name, O, I", SHAPES)
def test_gptq_is_the_optimal_brain_update_of_every_column(name, O, I, act_order, static):
    format, (weight, x) = format_named(name), problem(O, I)
    H = hessian_of(x)
    order = H.diagonal().argsort(descending=True).tolist() if act_order else range(I)
    expected = reference(weight, H, format.bits, format.width(I), format.zero == "none",
                         list(order), static)
    ours = gptq_matrix(weight, H, format, act_order=act_order, static_groups=static, search=False,
                       block=24)
    # a weight half-way between two codes may go either way in fp32
    assert rows_that_differ(ours.dequantize(), expected) <= 1


@pytest.mark.parametrize("options", [{}, {"static_groups": False}], ids=["default", "as they come"])
@pytest.mark.parametrize("name, O, I", SHAPES)
def test_unless_one_says_otherwise_each_grid_is_searched_for_and_large_inputs_go_first(
        name, O, I, options):
    format, (weight, x) = format_named(name), problem(O, I)
    H = hessian_of(x)
    order = H.diagonal().argsort(descending=True).tolist()
    expected = reference(weight, H, format.bits, format.width(I), format.zero == "none", order,
                         static=not options, grid=searched)
    assert rows_that_differ(gptq_matrix(weight, H, format, **options).dequantize(), expected) <= 1


@pytest.mark.parametrize("name", ["int3-g16", "int4-g32-asym", "int2-g16", "int4-g32"])
def test_a_grid_is_that_of_least_error_to_the_power_of_2_4(name):
    format = format_named(name)
    x = torch.randn(300, format.group, generator=torch.Generator().manual_seed(5)) ** 3
    scale = fitted(format, x, None, search=True).scale[:, 0].double()
    (expected, _), (squares, _) = (searched(x.double(), format.bits, format.zero == "none", power)
                                   for power in (2.4, 2))
    assert (scale != expected).sum() <= 1                   # a tie may go either way in fp32
    assert (squares != expected).sum() > 8                  # least squares would be another grid


def planted(bug, weight, H, format, monkeypatch):
    if bug == "transposed factor":
        monkeypatch.setattr(sys.modules[gptq_matrix.__module__], "inverse_factor",
                            lambda H, damping: inverse_factor(H, damping).T)
    result = gptq_matrix(weight, H, format, static_groups=False, search=False)
    return {"none": result, "transposed factor": result,
            "group of neighbours": replace(result, group_of=None),
            "sign of the zero": replace(result, zero=-result.zero),
            "scale in bf16": replace(result, scale=result.scale.bfloat16().float())}[bug]


@pytest.mark.parametrize("bug", ["none", "transposed factor", "group of neighbours",
                                 "sign of the zero", "scale in bf16"])
def test_the_comparison_catches_planted_bugs(bug, monkeypatch):
    format, (weight, x) = format_named("int4-g16-asym"), problem(20, 64)
    H = hessian_of(x)
    expected = reference(weight, H, 4, 16, False,
                         H.diagonal().argsort(descending=True).tolist(), static=False)
    differ = rows_that_differ(planted(bug, weight, H, format, monkeypatch).dequantize(), expected)
    assert differ <= 1 if bug == "none" else differ > 10


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("block", [1, 7, 32, 1000])
def test_the_lazy_update_changes_nothing(block, static):
    weight, x = problem(9, 96)
    at_once, in_blocks = (gptq_matrix(weight, hessian_of(x), format_named("int4-g16"),
                                      static_groups=static, block=size) for size in (128, block))
    assert torch.equal(in_blocks.codes, at_once.codes)


def test_two_columns_by_hand():
    # H = [[2, 1], [1, 2]]: after w0 = 1.4 is rounded to 1, w1 = 0.4 does best to become 0.4 + 0.4 *
    # H01 / H11 = 0.6, and rounds to 1.
    H, weight = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.4, 0.4, 7.0]])
    H = torch.block_diag(H, torch.eye(1))
    format = IntFormat(4)
    scale = format.fit(weight).scale.item()                             # 7 / 7.5, in fp16
    weight = torch.tensor([[1.4, 0.4, 7.0]]) * scale
    weight[0, 2] = 7.5 * scale
    assert Quantized.of(format, weight).codes.tolist()[0][:2] == [1, 0]
    assert gptq_matrix(weight, H, format, act_order=False, damping=0,
                       search=False).codes.tolist()[0][:2] == [1, 1]


def test_a_column_step_by_hand():
    """The example of `column_step`: of two correlated inputs, the second weight makes up for the
    first."""
    H, W = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.4], [0.4]])
    U = inverse_factor(H, 0)
    torch.testing.assert_close(U, torch.tensor([[0.816, -0.408], [0, 0.707]]), rtol=0, atol=1e-3)
    error = column_step(W, 0, torch.tensor([1.0]), U)
    torch.testing.assert_close(error, torch.tensor([0.4 / 0.816]), rtol=0, atol=1e-3)
    torch.testing.assert_close(W, torch.tensor([[1.4], [0.6]]))
    off = {q: torch.tensor([1.4, 0.4]) - torch.tensor(q) for q in ((1.0, 1.0), (1.0, 0.0))}
    assert [float(d @ H @ d) for d in off.values()] == pytest.approx([0.56, 0.96])


@pytest.mark.parametrize("name",
                         ["int4-g16", "int3-g32-asym", "nf4", "mxfp4", "nvfp4", "int4-g32-float"])
def test_gptq_loses_less_of_the_output_and_more_of_the_weights_than_rounding(name):
    format, (weight, x) = format_named(name), problem(32, 128)
    H, nearest = hessian_of(x), Quantized.of(format_named(name), weight).dequantize()
    ours = gptq_matrix(weight, H, format, search=False).dequantize()
    assert output_error(weight, ours, H) < 0.8 * output_error(weight, nearest, H)
    assert (ours - weight).square().sum() > (nearest - weight).square().sum()


def test_inputs_that_do_not_correlate_leave_rounding_to_nearest():
    weight, _ = problem(6, 64)
    H = torch.diag(torch.rand(64) + 0.1)
    ours = gptq_matrix(weight, H, format_named("int4-g16"), search=False)
    assert torch.equal(ours.codes, Quantized.of(format_named("int4-g16"), weight).codes)


def test_a_dead_column_is_rounded_to_nearest_and_bothers_no_other():
    format, (weight, x) = IntFormat(4, 16), problem(6, 48)
    x[:, 5] = 0
    other = weight.clone()
    other[:, 5] = 0.5 * weight[:, :16].amax(1)
    one, two = (gptq_matrix(w, hessian_of(x), format, search=False) for w in (weight, other))
    assert torch.equal(one.codes[:, 5], Quantized.of(format, weight).codes[:, 5])
    rest = [k for k in range(48) if k != 5]
    assert torch.equal(one.scale, two.scale) and torch.equal(one.codes[:, rest], two.codes[:, rest])


def test_damping_grows_until_the_hessian_can_be_factored():
    weight, x = problem(4, 32)
    flat = x[:1].repeat(5, 1)  # one direction only: no inverse
    assert gptq_matrix(weight, hessian_of(flat), IntFormat(4, 16),
                       damping=0).dequantize().isfinite().all()


def test_the_factor_is_that_of_the_inverse():
    H = hessian_of(problem(1, 40)[1])
    U = inverse_factor(H, 0.01).double()
    expected = torch.linalg.inv(H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(40))
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U, expected, rtol=1e-4, atol=1e-6*float(expected.abs().max()))


# ---- the model ----


def tiny(**more):
    torch.manual_seed(0)
    shape = ModelShape(name="tiny", source="test", L=2, D=96, N=6, K=2, H=16, F=160, V=101,
                       tied=True, max_context=64, **more)
    return Decoder(ModelConfig(shape)).eval().requires_grad_(False)


TOKENS = torch.randint(0, 101, (3, 31), generator=torch.Generator().manual_seed(1))


def test_each_linear_is_quantized_on_what_the_quantized_ones_before_it_give():
    model, format = tiny(biases=("qkv",)), format_named("int3-g16")
    result = gptq(model, TOKENS, format)
    inputs = {name: [] for name in result.tensors}
    observe(result.decoder, TOKENS, lambda name, x: inputs[name].append(x))
    for name, linear in linears(model).items():
        expected = gptq_matrix(linear.weight, hessian_of(torch.cat(inputs[name])), format)
        assert (expected.codes != result.tensors[name].codes).float().mean() < 0.01, name
        assert output_error(linear.weight, result.tensors[name].dequantize(),
                            hessian_of(torch.cat(inputs[name]))) < 0.1


def test_gptq_leaves_the_model_as_it_was_and_beats_rounding():
    model, format = tiny(), format_named("int3-g16")
    before = model(TOKENS)
    result = gptq(model, TOKENS, format)
    assert torch.equal(model(TOKENS), before)
    nearest = round_to_nearest(model, format)
    assert list(result.tensors) == list(nearest.tensors)
    assert result.bits_per_weight == nearest.bits_per_weight
    ours, plain = ((each.decoder(TOKENS) - before).square().mean() for each in (result, nearest))
    assert ours < 0.5 * plain


@pytest.mark.parametrize(
    "call, said",
    [(lambda m: gptq(m, TOKENS, IntFormat(4, 64)), "group=64 does not divide the 96 inputs"),
     (lambda m: gptq(m, TOKENS, IntFormat(9, 32)), "bits=9: 2 to 8"),
     (lambda m: gptq(m, TOKENS, IntFormat(4, 32), damping=-1), "damping=-1"),
     (lambda m: gptq(m, TOKENS[:, :0], IntFormat(4, 32)), "tokens"),
     (lambda m: gptq(m, TOKENS + 1000, IntFormat(4, 32)), "tokens hold"),
     (lambda m: gptq_matrix(torch.zeros(3, 32), torch.eye(16), IntFormat(4, 16)),
      r"hessian \[16, 16\]"),
     (lambda m: gptq_matrix(torch.zeros(3, 32), torch.full((32, 32), torch.nan), IntFormat(4, 16)),
      "hessian: .* not finite"),
     (lambda m: gptq_matrix(torch.ones(3, 32), -torch.eye(32), IntFormat(4, 16)),
      "hessian: not positive"), ])
def test_bad_input_is_refused_by_name(call, said):
    with pytest.raises(ValueError, match=said):
        call(tiny())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused_with_the_name_of_the_linear(bad):
    model = tiny()
    model.layers[1].mlp_norm.weight[3] = bad
    with pytest.raises(ValueError, match="layers.1.gate_up"):
        gptq(model, TOKENS, IntFormat(4, 32))
