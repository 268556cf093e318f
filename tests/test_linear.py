"""Linear layers by format: what each kernel computes, which one is taken, and a model of them."""

import copy

import pytest
import torch

from clawdemy_infer.linear import (
    FLOATS,
    FORMATS,
    Codes,
    Linear,
    PackedLinear,
    choice,
    computes_in,
    int4_codes,
    int8_codes,
    layers,
    packable,
)
from clawdemy_infer.linear.kernels import CANDIDATES, FALLBACK, fbgemm_int8

# Relative to the largest result: rounding of fp32, of fp16 weights, of bf16 activations, of 8-bit activations.
WITHIN = {"fp32": 1e-5, "fp16": 1e-5, "bf16": 1e-2, "int8": 2e-2, "int4": 2e-2}
KERNELS = [(format, make) for format in FORMATS for make in {FALLBACK[format]: 0} | dict.fromkeys(CANDIDATES[format])]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def two_kernels(monkeypatch):
    """No clock: the first candidate up to 4 rows, then the last."""
    def ends(format: str, k: int, n: int) -> list[tuple[float, str]]:
        return [(4, CANDIDATES[format][0].__name__), (1e9, CANDIDATES[format][-1].__name__)]
    monkeypatch.setattr(layers, "by_rows", ends)


# ---- codes ----


def test_int8_codes_are_at_most_half_a_step_off_and_the_largest_weight_is_127():
    weight = normal(37, 96)
    codes = int8_codes(weight)
    assert codes.bits == 8 and codes.codes.abs().amax(1).eq(127).all()
    assert (codes.dequantized() - weight).abs().le(codes.scales[:, None] / 2 * 1.0001).all()


@pytest.mark.parametrize("group", [32, 64])
def test_int4_codes_are_at_most_half_a_step_off_and_keep_zero(group):
    weight = normal(19, 192) + 0.1
    weight[3, :70] = 0
    codes = int4_codes(weight, group)
    assert codes.bits == 4 and codes.codes.max() <= 15
    step = codes.scales.repeat_interleave(group, dim=1)
    assert (codes.dequantized() - weight).abs().le(step * 0.56).all()         # bf16 scales may clip the ends by a little
    assert codes.dequantized()[3, :70].eq(0).all()


def test_a_group_that_no_kernel_knows_is_refused():
    with pytest.raises(ValueError, match="group=48"):
        int4_codes(normal(3, 96), 48)
    with pytest.raises(ValueError, match="K=96"):
        int4_codes(normal(3, 96), 64)


# ---- kernels ----


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("format, make", KERNELS, ids=[f"{format} {make.__name__}" for format, make in KERNELS])
def test_every_kernel_computes_the_product(format, make, rows):
    """Against float64, on the weights that the format stands for."""
    source = packable(format, normal(144, 192))
    x = normal(rows, 192, seed=1).to(FLOATS[computes_in(format, "cpu")])
    try:
        got = make(source)(x)
    except (RuntimeError, NotImplementedError):
        assert make is not FALLBACK[format], "this one runs everywhere"
        pytest.skip("not in this build of PyTorch, or not for this CPU")
    weight = source.dequantized() if isinstance(source, Codes) else source
    right = x.double() @ weight.double().T
    assert got.dtype == x.dtype and got.shape == (rows, 144)
    assert (got.double() - right).abs().max() <= WITHIN[format] * right.abs().max()


def test_in_int8_an_outlier_in_one_token_costs_the_others_nothing():
    codes, x = int8_codes(normal(80, 128)), normal(9, 128, seed=2)
    calm = fbgemm_int8(codes)(x)
    x[4, 17] = 5000
    upset = fbgemm_int8(codes)(x)
    others = [i for i in range(9) if i != 4]
    assert (upset[others] - calm[others]).abs().max() <= 0.01 * calm.abs().max()


def test_codes_of_another_method_run_as_they_are(two_kernels):
    """Zeros between two codes, as AWQ and GPTQ may have them."""
    g = torch.Generator().manual_seed(5)
    integers = torch.randint(0, 16, (64, 128), generator=g, dtype=torch.uint8)
    codes = Codes(integers, torch.full((64, 2), 0.125), normal(64, 2).abs() * 4 + 0.25)
    linear = PackedLinear("int4", codes)
    for rows in (1, 7):
        x = normal(rows, 128, seed=rows).bfloat16()
        right = x.double() @ codes.dequantized().double().T
        assert (linear(x).double() - right).abs().max() <= 0.02 * right.abs().max()
    with pytest.raises(ValueError, match="int4"):
        PackedLinear("int8", codes)


# ---- layers ----


def test_a_weight_that_is_written_to_is_seen_at_the_next_call(two_kernels):
    linear = Linear(512, 512).requires_grad_(False)
    x = normal(7, 512)                      # so many that a packed layout is taken, which does not change by itself
    linear(x)
    linear.weight.mul_(2)
    torch.testing.assert_close(linear(x), x @ linear.weight.T, rtol=1e-4, atol=1e-4)
    linear.weight = torch.nn.Parameter(normal(512, 512, seed=9), requires_grad=False)
    torch.testing.assert_close(linear(x), x @ linear.weight.T, rtol=1e-4, atol=1e-4)
    other = copy.deepcopy(linear)
    other.weight.zero_()
    assert other(x).eq(0).all() and linear(x).abs().max() > 1


@pytest.mark.parametrize("format", FORMATS)
def test_a_packed_layer_keeps_no_float_weight_and_adds_its_bias(format, two_kernels):
    weight, bias = normal(96, 128), normal(96, seed=3)
    dtype = FLOATS[computes_in(format, "cpu")]
    linear = PackedLinear(format, weight, bias.to(dtype))
    assert not list(linear.parameters()) and linear.product.source is None
    for rows in (2, 11):
        x = normal(rows, 128, seed=rows).to(dtype)
        right = x.float() @ weight.T + bias
        assert (linear(x).float() - right).abs().max() <= (0.2 if format == "int4" else 0.05) * right.abs().max()


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"weights='int5'.*fp32, fp16, bf16, int8, int4"):
        PackedLinear("int5", normal(3, 4))
    with pytest.raises(ValueError, match="CUDA"):
        computes_in("int5", "cuda")


# ---- the choice ----


@pytest.fixture
def clocked(monkeypatch, tmp_path):
    """A cache of its own, and a clock that says what the test wants: seconds by kernel and M."""
    monkeypatch.setenv("CLAWDEMY_CACHE", str(tmp_path))
    choice.by_rows.cache_clear()
    says, asked = {}, []

    def rates(steps, sample_s, rounds, of):
        asked.append(list(steps))
        m = choice.ROWS[(len(asked) - 1) % len(choice.ROWS)]
        return {name: 1 / says.get((name, m), 1.0) for name in steps}
    monkeypatch.setattr(choice, "rates", rates)
    monkeypatch.setattr(choice, "SHAPES", [(64, 96), (64, 1024)])
    yield says, asked
    choice.by_rows.cache_clear()


def test_the_fastest_kernel_is_chosen_once_and_kept(clocked):
    says, asked = clocked
    says.update({("onednn", m): 0.5 for m in choice.ROWS})
    assert choice.by_rows("fp32", 70, 90) == choice.UNTIL_THEN["fp32"] and not asked        # nobody waits for a clock unasked
    choice.remeasure(["fp32"])
    assert choice.by_rows("fp32", 70, 90) == [(float("inf"), "onednn")]
    assert len(asked) == 2 * len(choice.ROWS)
    choice.by_rows.cache_clear()
    assert choice.by_rows("fp32", 70, 90) and len(asked) == 2 * len(choice.ROWS)      # read from the file


def test_a_second_layout_must_earn_its_memory(clocked):
    says, _ = clocked
    says.update({("onednn", 1): 2.0, ("onednn", 4): 0.9, ("onednn", 16): 0.5, ("onednn", 64): 0.5})
    choice.remeasure(["fp32"])
    # 0.9 of the time is not worth another copy of the weights, half is; the border lies between 4 and 16 rows, at 8.
    assert choice.by_rows("fp32", 64, 96) == [(8, "plain"), (float("inf"), "onednn")]
    assert "plain up to 8 rows, then onednn" in choice.in_words("fp32")[0]


def test_a_format_that_loses_says_so(clocked):
    says, _ = clocked
    says.update({("weight_only_int4", 1): 0.25, ("weight_only_int4", 4): 3.0, ("bf16_copy", 4): 2.0, ("cpp_int4", 4): 2.0,
                 ("cpp_bf16_copy", 4): 2.0})
    choice.remeasure(["fp32", "bf16", "int4"])
    words = choice.against_fp32("int4")
    assert "4.0 at 1 rows" in words and "LOSES at 4" in words and "16" not in words.split("LOSES")[1]
    assert "LOSES" not in choice.against_fp32("bf16")


def test_a_kernel_that_computes_something_else_is_not_a_candidate(clocked, monkeypatch):
    def wrong(weight):
        return lambda x: x @ weight.T * 1.1
    monkeypatch.setitem(CANDIDATES, "fp32", [wrong])
    assert {row["kernel"] for row in choice.measure("fp32")} == {"plain"}
