"""Numbers in C++ (`fast/cpp/vector.h`), each against float64 or PyTorch, with the instructions of
this CPU and of older ones."""

from math import inf, nan

import pytest
import torch
from cpp_code import code

from clawdemy_infer.fast import cpp

pytestmark = pytest.mark.skipif(not cpp.available(), reason="no C++ compiler here")


@pytest.fixture(params=["", "avx512", "avx2", "scalar"], ids=["native", "avx512", "avx2", "scalar"])
def vector(request, monkeypatch):
    """x [n] of fp32 and half [n] of fp16 -> 2^x; x in bf16, one by one and WIDTH at a time; half in
    fp32."""
    monkeypatch.setenv("CLAWDEMY_ISA", request.param)
    try:
        run = code("vector", 6, 1)
    except ValueError as error:
        pytest.skip(str(error))

    def call(x, half):
        assert len(x) == len(half) and len(x) % 16 == 0
        power, one, many, wide = (torch.empty(len(x), dtype=dtype) for dtype in (
            torch.float32, torch.bfloat16, torch.bfloat16, torch.float32))
        run(*cpp.pointers(x, half, power, one, many, wide), len(x))
        return power, one, many, wide
    return call


def test_a_power_of_2_is_right_to_1_2_units_in_the_last_place(vector):
    x = torch.linspace(-126, 127, 2**20)
    right = x.double().exp2()
    unit = torch.nextafter(right.float(), torch.tensor(inf)).double() - right.float().double()
    got = vector(x, x.half())[0].double()
    assert ((got - right).abs() <= 1.2 * unit).all()


def test_a_power_of_2_is_exact_where_it_is_whole_and_ends_at_its_limits(vector):
    x = torch.tensor([*range(-126, 128), -126.5, -127, -1e30, -inf, 128, 1e30, inf, nan] + [0] * 10)
    got = vector(x, x.half())[0]
    assert torch.equal(got[:254].double(), x[:254].double().exp2())
    assert not got[254:258].any() and got[258:261].eq(2.0**127).all() and got[261].isnan()


def test_a_number_in_bf16_is_the_nearest_and_nan_stays_nan_with_its_sign(vector):
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    for lower in (0, 1, 0x7fff, 0x8000, 0x8001, 0xffff):
        x = (upper | lower).to(torch.int32).view(torch.float32)
        right = x.bfloat16()
        for got in vector(x, x.half())[1:3]:
            subnormal = (right != 0) & (right.abs() < 2.0**-126)    # AVX512_BF16 makes them zeros
            assert torch.equal(got.isnan(), x.isnan())
            assert torch.equal(got.signbit(), x.signbit())
            same = (got == right) | (subnormal | (x.abs() < 2.0**-126)) & (got == 0) | got.isnan()
            assert same.all()


def test_every_number_in_fp16_is_itself_in_fp32_infinity_and_nan_too(vector):
    half = torch.arange(2**16, dtype=torch.int64).to(torch.int16).view(torch.float16)
    got = vector(torch.zeros(2**16), half)[3]
    assert torch.equal(got.nan_to_num(7), half.float().nan_to_num(7))
    assert torch.equal(got.isnan(), half.isnan()) and torch.equal(got.signbit(), half.signbit())
