"""Products in C++ against float64, for every format, and what they are refused."""

import pytest
import torch
from test_linear import WITHIN, normal

from clawdemy_infer.linear import FORMATS, Codes, cpp_strips, packable
from clawdemy_infer.linear.cpp_tiles import COMPUTES_IN, panels

pytestmark = pytest.mark.skipif(not cpp_strips.available(), reason="no C++ compiler here, or a CPU without AVX512_BF16")

ALL = [(format, out) for format in FORMATS for out in (torch.float32, torch.bfloat16) if out == torch.float32 or COMPUTES_IN[format] == out]


# One panel; fewer than a strip; strips and a rest; tiles of one, two, three and more, even and not.
@pytest.mark.parametrize("M", [1, 2, 5, 8, 9, 16, 17, 24, 27, 70])
@pytest.mark.parametrize(("N", "K"), [(16, 64), (32, 192), (48, 32), (80, 320), (208, 128)])
@pytest.mark.parametrize(("format", "out"), ALL)
def test_a_product_is_that_of_float64_and_nothing_beside_it_is_written(format, out, N, K, M):
    source = packable(format, normal(N, K))
    group = K // source.scales.shape[1] if format == "int4" else 0
    x, packed = normal(M, K, seed=M).to(COMPUTES_IN[format]), panels(format, source)
    room = torch.full((M * N + 64,), 7.0).to(out)
    y = room[32:-32]
    y.fill_(torch.nan)
    cpp_strips.built(format, out, group)(x.data_ptr(), packed.data_ptr(), y.data_ptr(), M, K, N)
    right = x.double() @ (source.dequantized() if isinstance(source, Codes) else source).double().T
    assert (y.view(M, N).double() - right).abs().max() <= WITHIN["bf16" if out == torch.bfloat16 else format] * right.abs().max()
    assert room[:32].eq(7).all() and room[-32:].eq(7).all()


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
def test_the_bytes_of_a_matrix_are_those_of_its_format(format):
    """int8 has a scale for each output; int4 two numbers of 16 bits for each output and 64 inputs."""
    bits = 8 * panels(format, packable(format, normal(96, 128))).nbytes / (96 * 128)
    assert bits == {"fp32": 32, "bf16": 16, "int8": 8 + 32 / 128, "int4": 4 + 32 / 64}[format]


def test_any_order_of_x_in_memory_will_do_and_any_dimensions_before_the_last():
    weight = normal(32, 64)
    for x in (normal(64, 6).T, normal(2, 3, 5, 64), normal(3, 64, 2).mT, normal(1, 0, 64)):
        got = cpp_strips.in_strips("fp32", weight)(x)
        torch.testing.assert_close(got, x @ weight.T, rtol=1e-5, atol=1e-5)


def test_an_x_of_another_width_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match=r"x is \[2, 32\]: the last dimension must be the K=64 inputs"):
        cpp_strips.in_strips("bf16", normal(16, 64).bfloat16())(normal(2, 32).bfloat16())


@pytest.mark.parametrize(("N", "K"), [(20, 64), (16, 33)])
def test_other_sizes_are_refused_so_that_another_kernel_is_taken(N, K):
    with pytest.raises(NotImplementedError, match=f"\\[{N}, {K}\\]"):
        cpp_strips.in_strips("fp32", normal(N, K))


def test_without_a_compiler_it_is_refused_too(monkeypatch):
    monkeypatch.setattr(cpp_strips, "available", lambda: False)
    with pytest.raises(NotImplementedError, match="compiler"):
        cpp_strips.in_strips("bf16", normal(16, 64).bfloat16())
