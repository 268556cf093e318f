"""Products in C++ against float64, for every format, and what they are refused."""

from pathlib import Path

import pytest
import torch
from test_linear import WITHIN, normal

from clawdemy_infer.fast import FORMATS, Codes, cpp, packable
from clawdemy_infer.fast.cpp_product import CppProduct, code, panels

pytestmark = pytest.mark.skipif(not cpp.available(), reason="no C++ compiler here")

ALL = [(format, dtype) for format in FORMATS for dtype in (torch.float32, torch.bfloat16)]


# One panel; fewer than a strip; strips and a rest; tiles of one, two, three and more, even and not;
# and for many rows, panels that are made fp32.
@pytest.mark.parametrize("M", [1, 2, 3, 5, 6, 7, 8, 9, 12, 16, 17, 24, 27, 70])
@pytest.mark.parametrize(("O", "I"), [(16, 64), (32, 192), (48, 32), (80, 320), (208, 128)])
@pytest.mark.parametrize(("format", "dtype"), ALL)
def test_a_product_is_that_of_float64_and_nothing_beside_it_is_written(format, dtype, O, I, M):
    source = packable(format, normal(O, I))
    product = CppProduct(format, source)
    x = normal(M, I, seed=M).to(dtype)
    room = torch.full((M * O + 64,), 7.0).to(dtype)
    y = room[32:-32]
    y.fill_(torch.nan)
    code(format, dtype)(*cpp.pointers(x, product.panels, y), M, I, O, product.group,
                        2)
    right = x.double() @ (source.dequantized() if isinstance(source, Codes) else source).double().T
    within = WITHIN["bf16" if dtype == torch.bfloat16 else format]
    assert (y.view(M, O).double() - right).abs().max() <= within * right.abs().max()
    assert room[:32].eq(7).all() and room[-32:].eq(7).all()


@pytest.mark.parametrize("M", [1, 20])
def test_a_result_in_bf16_is_rounded_to_nearest_and_of_two_to_the_even_one(M):
    """Each output is one weight: numbers with 16 more bits than bf16 has, half of them on a
    border."""
    bits = torch.randint(0x3f000000, 0x40000000, (48,), dtype=torch.int32)
    bits[::2] = bits[::2] >> 16 << 16 | 0x8000
    weight, x = torch.zeros(48, 32), torch.zeros(M, 32, dtype=torch.bfloat16)
    weight[:, 5], x[:, 5] = bits.view(torch.float32), 1
    got = CppProduct("fp32", weight)(x)
    assert torch.equal(got, weight[:, 5].bfloat16().expand(M, -1))


@pytest.mark.parametrize("M", [1, 20])
def test_an_x_of_fp32_is_taken_as_it_is_or_rounded_to_the_nearest_bf16(M):
    """As the processor has it. Each output is one number of x."""
    bits = torch.randint(0x3f000000, 0x40000000, (M, 32), dtype=torch.int32)
    bits[:, ::2] = bits[:, ::2] >> 16 << 16 | 0x8000
    x = bits.view(torch.float32)
    got = CppProduct("bf16", torch.eye(32).bfloat16())(x)
    assert torch.equal(got, x) or torch.equal(got, x.bfloat16().float())


@pytest.mark.parametrize("group", [8, 24, 48, 96])
@pytest.mark.parametrize("M", [1, 4, 40])
def test_groups_of_any_eights_have_scales_and_zeros_of_their_own(group, M):
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (48, 96), generator=generator, dtype=torch.uint8)
    each = 48, 96 // group
    codes = Codes(codes, torch.rand(each, generator=generator).half().float() + 0.5,
                  torch.randint(0, 16, each, generator=generator).float())
    x = normal(M, 96)
    right = x.double() @ codes.dequantized().double().T
    got = CppProduct("int4", codes)(x)
    assert (got.double() - right).abs().max() <= WITHIN["int4"] * right.abs().max()


@pytest.mark.parametrize("format", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_the_bytes_of_a_matrix_are_those_of_its_format(format):
    """int8 has a scale for each output; int4 two numbers of 16 bits for each output and 64
    inputs."""
    bits = 8 * panels(format, packable(format, normal(96, 128))).nbytes / (96 * 128)
    assert bits == {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8 + 32 / 128,
                    "int4": 4 + 32 / 64}[format]


def test_any_order_of_x_in_memory_will_do_and_any_dimensions_before_the_last():
    weight = normal(32, 64)
    for x in (normal(64, 6).T, normal(2, 3, 5, 64), normal(3, 64, 2).mT, normal(1, 0, 64)):
        got = CppProduct("fp32", weight)(x)
        torch.testing.assert_close(got, x @ weight.T, rtol=1e-5, atol=1e-5)


def test_an_x_of_another_width_is_refused_before_anything_is_read():
    with pytest.raises(ValueError,
                       match=r"x is \[2, 32\]: the last dimension must be the I=64 inputs"):
        CppProduct("bf16", normal(16, 64).bfloat16())(normal(2, 32).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_an_x_of_another_type_is_refused(dtype):
    with pytest.raises(ValueError, match=f"x is {dtype}: float32 or bfloat16 is accepted"):
        CppProduct("fp32", normal(16, 64))(normal(2, 64).to(dtype))


@pytest.mark.parametrize("M", [1, 7, 40])
@pytest.mark.parametrize(("format", "dtype"), ALL)
def test_any_number_of_threads_gives_the_same_bit_for_bit(format, dtype, M):
    product, x = CppProduct(format, packable(format, normal(208, 128))), normal(M, 128).to(dtype)
    right, *others = (torch.empty(M, 208, dtype=dtype) for _ in range(4))
    for y, threads in zip((right, *others), (1, 2, 3, 7), strict=True):
        code(format, dtype)(*cpp.pointers(x, product.panels, y), M, 128, 208, product.group,
                            threads)
    assert all(torch.equal(y, right) for y in others)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no list of threads here")
def test_threads_are_as_many_as_the_caller_says():
    product, x, y = CppProduct("fp32", normal(480, 64)), normal(1, 64), torch.empty(1, 480)
    code("fp32", x.dtype)(*cpp.pointers(x, product.panels, y), 1, 64, 480, 64, 11)
    assert len(list(Path("/proc/self/task").iterdir())) >= 11


def test_a_weight_in_fp16_may_be_infinite(monkeypatch):
    monkeypatch.setenv("CLAWDEMY_ISA", "scalar")
    weight = torch.ones(16, 2, dtype=torch.float16)
    weight[3, 1] = torch.inf
    code.cache_clear()
    y = CppProduct("fp16", weight)(torch.ones(1, 2))
    code.cache_clear()
    assert y[0, 3] == torch.inf and y.isfinite().sum() == 15


@pytest.mark.parametrize("M", [1, 5, 20, 70])
@pytest.mark.parametrize(("format", "O", "I"), [
    *((format, O, I) for format in ("fp32", "fp16", "bf16", "int8")
      for O, I in [(1, 7), (20, 33), (177, 96)]), ("int4", 20, 96), ("int4", 177, 64)])
def test_any_number_of_outputs_and_of_inputs_is_taken(format, O, I, M):
    source, x = packable(format, normal(O, I)), normal(M, I, seed=M)
    got = CppProduct(format, source)(x)
    right = x.double() @ (source.dequantized() if isinstance(source, Codes) else source).double().T
    assert got.shape == (M, O) and got.is_contiguous()
    assert (got.double() - right).abs().max() <= WITHIN[format] * right.abs().max()


def test_groups_that_are_no_eights_are_refused_so_that_another_kernel_is_taken():
    codes = Codes(torch.zeros(16, 36, dtype=torch.uint8), torch.ones(16, 3), torch.ones(16, 3))
    with pytest.raises(NotImplementedError, match=r"\[16, 36\] in groups of 12: .*by the eight"):
        CppProduct("int4", codes)


def test_without_a_compiler_it_is_refused_too(monkeypatch):
    monkeypatch.setattr(cpp, "available", lambda: False)
    with pytest.raises(NotImplementedError, match="compiler"):
        CppProduct("bf16", normal(16, 64).bfloat16())
