"""Linear layers by format: what each kernel computes, which one is taken, and a model of them."""

import pytest
import torch

from clawdemy_infer.fast import (
    FLOATS,
    FORMATS,
    Codes,
    PackedLinear,
    computes_in,
    cpp,
    int4_codes,
    int8_codes,
    kernels,
    packable,
)
from clawdemy_infer.fast.cpp_product import CppProduct
from clawdemy_infer.fast.kernels import FALLBACK, PYTORCH, table

# Relative to the largest result: rounding of fp32, of fp16 weights, of bf16 activations, of 8-bit
# activations.
WITHIN = {"fp32": 1e-5, "fp16": 1e-5, "bf16": 1e-2, "int8": 2e-2, "int4": 2e-2}
KERNELS = [(format, make) for format in FORMATS
           for make in dict.fromkeys((PYTORCH[format], FALLBACK[format]))]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def two_kernels(monkeypatch):
    """One kernel up to 4 rows, then another."""
    monkeypatch.setattr(kernels, "table", lambda format, *_: [
        (4, [PYTORCH[format], FALLBACK[format]]), (1e9, [FALLBACK[format]])])
    monkeypatch.setattr("clawdemy_infer.fast.layers.table", kernels.table)


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
    # bf16 scales may clip the ends by a little
    assert (codes.dequantized() - weight).abs().le(step * 0.56).all()
    assert codes.dequantized()[3, :70].eq(0).all()


def test_a_group_that_no_kernel_knows_is_refused():
    with pytest.raises(ValueError, match="group=48"):
        int4_codes(normal(3, 96), 48)
    with pytest.raises(ValueError, match="I=96"):
        int4_codes(normal(3, 96), 64)


# ---- kernels ----


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("format, make", KERNELS,
                         ids=[f"{format} {make.__name__}" for format, make in KERNELS])
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


@pytest.mark.parametrize("make", [PYTORCH["int8"], lambda codes: PackedLinear("int8", codes)],
                         ids=["PyTorch's", "the table's"])
def test_in_int8_an_outlier_in_one_token_costs_the_others_nothing(make):
    codes, x = int8_codes(normal(80, 128)), normal(9, 128, seed=2)
    calm = make(codes)(x)
    x[4, 17] = 5000
    upset = make(codes)(x)
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


@pytest.mark.parametrize("format", FORMATS)
def test_a_packed_layer_keeps_no_float_weight_and_adds_its_bias(format, two_kernels):
    weight, bias = normal(96, 128), normal(96, seed=3)
    dtype = FLOATS[computes_in(format, "cpu")]
    linear = PackedLinear(format, weight, bias.to(dtype))
    assert not list(linear.parameters()) and not list(linear.buffers())
    for rows in (2, 11):
        x = normal(rows, 128, seed=rows).to(dtype)
        right = x.float() @ weight.T + bias
        assert (linear(x).float() -
                right).abs().max() <= (0.2 if format == "int4" else 0.05)*right.abs().max()


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"weights='int5'.*fp32, fp16, bf16, int8, int4"):
        PackedLinear("int5", normal(3, 4))
    with pytest.raises(ValueError, match="CUDA"):
        computes_in("int5", "cuda")


# ---- the table ----


@pytest.mark.skipif(not cpp.available(), reason="no C++ compiler here")
@pytest.mark.parametrize("format", FORMATS)
def test_where_there_is_a_compiler_a_weight_is_multiplied_in_cpp(format, monkeypatch):
    monkeypatch.setattr(cpp, "cpuinfo", lambda key: "fma avx2")
    [(rows, kernel)] = PackedLinear(format, normal(96, 128)).kernels
    assert rows == float("inf") and isinstance(kernel, CppProduct)
    assert kernels.kernels_in_words(format) == "cpp_product"


def test_with_matrix_registers_many_rows_of_bf16_are_pytorch_s(monkeypatch):
    monkeypatch.setattr(cpp, "available", lambda: True)
    monkeypatch.setattr(cpp, "cpuinfo", lambda key: "avx512_bf16 amx_bf16 amx_tile")
    assert kernels.kernels_in_words("bf16") == "cpp_product up to 32 rows, then plain"
    assert kernels.kernels_in_words("int8") == "cpp_product"


def test_without_a_compiler_pytorch_multiplies_and_with_one_odd_sizes_are_in_cpp_too(monkeypatch):
    odd = PackedLinear("fp32", normal(90, 33))
    assert isinstance(odd.kernels[0][1], CppProduct)
    torch.testing.assert_close(odd(normal(3, 33)), normal(3, 33) @ normal(90, 33).T)
    monkeypatch.setattr(cpp, "available", lambda: False)
    assert [kernels.kernels_in_words(format) for format in FORMATS] == [
        "plain", "fbgemm_half", "plain", "weight_only_int8", "weight_only_int4"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [1, 40])
def test_weights_in_bf16_take_activations_in_either_float_whoever_multiplies(M, dtype, monkeypatch):
    x, weight = normal(M, 64).to(dtype), normal(48, 64)
    right = x.double() @ weight.bfloat16().double().T
    for flags in ("amx_bf16", ""):
        monkeypatch.setattr(cpp, "cpuinfo", lambda key, flags=flags: flags)
        got = PackedLinear("bf16", weight)(x)
        assert got.dtype == dtype
        assert (got.double() - right).abs().max() <= WITHIN["bf16"] * right.abs().max()


def test_a_gpu_has_pytorch_s_floats_and_triton_s_integers():
    names = [table(format, "cuda", "triton")[0][1][0].__name__ for format in FORMATS]
    assert names == ["plain", "plain", "plain", "triton_int8", "triton_int4"]
    names = [table(format, "cuda", "torch")[0][1][0].__name__ for format in FORMATS]
    assert names == ["plain", "plain", "plain", "dequantized", "dequantized"]
