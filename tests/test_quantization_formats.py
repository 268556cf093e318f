"""Number formats: every code means what its definition says, every weight gets the nearest one, and
the bytes are counted."""

import math
from statistics import NormalDist

import gguf
import numpy as np
import pytest
import torch

from clawdemy_infer.fast.codes import pack, unpack
from clawdemy_infer.quantization import IntFormat, Quantized, Scales, format_named
from clawdemy_infer.quantization.floats import E2M1, E4M3, E5M2, FLOATS, NF4, NormalFloat

ALL = ["int8", "int8-asym", "int6-g32", "int4-g64", "int4-g64-asym", "int4-g64-float", "int3-g64",
       "int3-g64-asym", "int2-g32", "q4_1", *FLOATS]
each_format = pytest.mark.parametrize("name", ALL)


def weights(rows=37, columns=192, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return x * torch.rand(rows, 1, generator=generator).mul(4).exp() / 40


# -- floating point -------------------------------------------------------------------------------

FP8 = pytest.mark.parametrize(("numbers", "dtype"), [(E4M3, torch.float8_e4m3fn),
                                                     (E5M2, torch.float8_e5m2)],
                              ids=["e4m3", "e5m2"])


@FP8
def test_all_256_codes_mean_what_torch_says(numbers, dtype):
    codes = torch.arange(256).to(torch.uint8)
    assert torch.allclose(numbers.decode(codes), codes.view(dtype).float(), rtol=0, atol=0,
                          equal_nan=True)


@FP8
def test_a_number_becomes_the_code_that_torch_gives_it(numbers, dtype):
    x = weights(200, 300) * 1000
    levels = numbers.levels
    x = torch.cat((x.flatten(), levels, (levels[1:] + levels[:-1]) / 2,
                   torch.tensor([0.0, -0.0, 1e-30, -1e-30])))
    x = x.clamp(-numbers.largest, numbers.largest)
    assert torch.equal(numbers.encode(x), x.to(dtype).view(torch.uint8))


@FP8
def test_what_is_too_large_becomes_the_largest(numbers, dtype):
    largest = torch.finfo(dtype).max
    codes = numbers.encode(torch.tensor([largest * 1.2, -1e30, math.inf]))
    assert numbers.decode(codes).tolist() == [largest, -largest, largest]


def test_e2m1_has_the_values_of_the_mx_specification():
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]                               # OCP MX 1.0, table 5
    codes = torch.arange(16).to(torch.uint8)
    assert E2M1.decode(codes).tolist() == values + [-value for value in values]


def test_e2m1_rounds_to_the_nearest_and_ties_to_even():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 7.9, -0.3, -2.5])
    assert E2M1.decode(E2M1.encode(x)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6, -0.5, -2]


def nearest_e2m1(x):
    """Brute force: of two equally near, the one with an even mantissa, which is every other."""
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    i = min(range(8), key=lambda i: (abs(values[i] - abs(x)), i % 2))
    return math.copysign(values[i], x)


def test_mxfp4_against_a_plain_program():
    weight = weights(5, 96)
    weight[1, :32], weight[2, 40] = 0, 7.9
    expected = np.zeros((5, 96))
    for i, row in enumerate(weight.double().numpy()):
        for block in range(0, 96, 32):
            largest = max(abs(row[block:block + 32]))
            scale = 2.0 ** (math.floor(math.log2(largest)) - 2) if largest else 1.0  # section 6.3
            expected[i, block:block + 32] = [nearest_e2m1(x / scale) * scale
                                             for x in row[block:block + 32]]
    ours = Quantized.of(FLOATS["mxfp4"], weight).dequantize()
    assert torch.equal(ours, torch.from_numpy(expected).float())


def test_mxfp4_against_the_reader_of_gguf():
    """gguf-py's block: a byte of exponent, and 16 bytes of which each holds codes i and i + 16."""
    weight = weights(6, 64)
    quantized = Quantized.of(FLOATS["mxfp4"], weight)
    codes = quantized.codes.view(6, 2, 32).numpy()
    blocks = np.concatenate(
        [quantized.scale.to(torch.float8_e8m0fnu).view(torch.uint8).numpy()[..., None],
         codes[..., :16] | codes[..., 16:] << 4],
        axis=-1)
    read = gguf.quants.dequantize(blocks.reshape(6, -1), gguf.GGMLQuantizationType.MXFP4)
    assert torch.equal(quantized.dequantize(), torch.from_numpy(read))


def test_nvfp4_against_a_plain_program():
    weight = weights(5, 48)
    weight[3, 16:32] = 0
    matrix = np.float32(weight.abs().max()) / np.float32(6 * 448)
    expected = np.zeros((5, 48), dtype=np.float32)
    for i, row in enumerate(weight.numpy()):
        for block in range(0, 48, 16):
            numbers = row[block:block + 16]
            scale = torch.tensor(np.abs(numbers).max() / np.float32(6) / matrix)
            step = scale.to(torch.float8_e4m3fn).float().numpy() * matrix
            expected[i, block:block + 16] = [
                np.float32(nearest_e2m1(x / step)) * step if step else 0 for x in numbers]
    quantized = Quantized.of(FLOATS["nvfp4"], weight)
    assert torch.equal(quantized.dequantize(), torch.from_numpy(expected))
    assert quantized.scale.max() == 448


def test_nf4s_numbers_are_the_papers_quantiles():
    """QLoRA, section 3, and the published offset: 8 steps above zero, 7 below."""
    end, normal = (1 - 1 / 32 + 1 - 1 / 30) / 2, NormalDist()
    above = [normal.inv_cdf(p) for p in np.linspace(0.5, end, 9)[1:]]
    below = [-normal.inv_cdf(p) for p in np.linspace(0.5, end, 8)[1:]]
    assert np.allclose(np.array(sorted([*below, 0, *above])) / max(above), NF4, rtol=0, atol=2e-7)


def test_nf4_takes_the_nearest_of_its_numbers():
    weight = weights(7, 128)
    quantized = Quantized.of(FLOATS["nf4"], weight)
    scaled = weight.view(7, 2, 64) / weight.view(7, 2, 64).abs().amax(-1, keepdim=True)
    nearest = (scaled[..., None] - NormalFloat().levels).abs().argmin(-1)
    assert torch.equal(quantized.codes.view(7, 2, 64).long(), nearest)


# -- integers -------------------------------------------------------------------------------------

def test_symmetric_int4_by_hand():
    # The largest, 3.75, is code 7.5, so a step is 0.5; 3.75 itself would be code 8, which there is
    # not.
    quantized = Quantized.of(IntFormat(4, 4), torch.tensor([[3.75, -3.75, 0.30, -0.80]]))
    assert quantized.scale.tolist() == [[0.5]]
    assert quantized.codes.tolist() == [[7, -8, 1, -2]]
    assert quantized.dequantize().tolist() == [[3.5, -4.0, 0.5, -1.0]]


def test_symmetric_int8_by_hand():
    weight = torch.tensor([[-63.5, 10.3, 0.2, 63.5], [1.0, 0.0, 0.0, 0.0]])
    quantized = Quantized.of(IntFormat(8), weight)
    assert quantized.codes.tolist() == [[-127, 21, 0, 127], [127, 0, 0, 0]]
    assert quantized.scale[0].item() == 0.5


def test_asymmetric_int4_by_hand():
    # From -1.5 to 6: 15 steps of 0.5, and zero is 3 steps up.
    quantized = Quantized.of(IntFormat(4, 4, "integer"), torch.tensor([[-1.5, 6.0, 0.0, 1.3]]))
    assert (quantized.scale.item(), quantized.zero.item()) == (0.5, 3)
    assert quantized.codes.tolist() == [[0, 15, 3, 6]]
    assert quantized.dequantize().tolist() == [[-1.5, 6.0, 0.0, 1.5]]


def test_a_grid_with_a_whole_zero_holds_the_weight_0_exactly_also_where_all_are_positive():
    weight = torch.rand(3, 64) + 1
    weight[:, 5] = 0
    assert (Quantized.of(IntFormat(4, 32, "integer"), weight).dequantize()[:, 5] == 0).all()


@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize("zero", ["none", "integer", "float"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_every_weight_gets_the_nearest_code(bits, zero, group):
    """In float64, with the stored scale and zero: no other code would be nearer."""
    format, weight = IntFormat(bits, group, zero), weights(11, 192)
    quantized = Quantized.of(format, weight)
    width = group or 192
    groups = weight.double().reshape(-1, width, 1)
    scale, low = quantized.scale.double().view(-1, 1, 1), torch.zeros(1)
    lowest = -(2 ** (bits - 1)) if zero == "none" else 0
    codes = torch.arange(lowest, lowest + 2**bits)
    if zero == "integer":
        codes, low = codes - quantized.zero.double().view(-1, 1, 1), torch.zeros(1)
    elif zero == "float":
        low = quantized.zero.double().view(-1, 1, 1)
    best = (groups - (codes * scale + low)).abs().amin(-1)
    ours = (quantized.dequantize().double().reshape(-1, width) - groups[..., 0]).abs()
    assert torch.allclose(ours, best, rtol=1e-5, atol=1e-9)


def test_codes_are_chosen_for_the_scale_that_is_stored():
    """An fp16 scale is off by up to 1 part in 2,048, which is a sixteenth of a step at code 127."""
    weight = weights(64, 256)
    quantized = Quantized.of(IntFormat(8), weight)
    assert torch.equal(quantized.scale.half().float(), quantized.scale)
    allowed = quantized.scale * 0.5 * 1.0001 + quantized.scale * 127 / 2048
    assert ((quantized.dequantize() - weight).abs() <= allowed).all()
    codes = (weight / quantized.scale).round().clamp(-128, 127).to(torch.int8)
    assert torch.equal(quantized.codes, codes)


def test_q4_1_is_ggufs():
    """gguf-py's own rounding of the same weights: a block is scale and lowest weight in fp16, then
    codes i and i + 16 in a byte."""
    weight = weights(9, 64)
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q4_1)
    ours = Quantized.of(format_named("q4_1"), weight)
    blocks = theirs.reshape(9, 2, 20)
    numbers = torch.from_numpy(blocks[..., :4].copy().view(np.float16).astype(np.float32))
    assert torch.equal(ours.zero, numbers[..., 1])
    # they take the range before the lowest weight is rounded
    assert torch.allclose(ours.scale, numbers[..., 0], rtol=2e-3)
    read = torch.from_numpy(gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType.Q4_1))
    again = Quantized.of(format_named("q4_1"), read)
    assert torch.equal(again.dequantize(), read)  # on its own grid it is exact


# -- bytes ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_is_numpys_order_of_bits_and_comes_back(bits):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (3, 37), generator=generator).to(torch.uint8)
    each = np.unpackbits(codes.numpy()[..., None], axis=-1, bitorder="little")[..., :bits]
    expected = np.packbits(each.reshape(3, -1), axis=-1, bitorder="little")
    assert (pack(codes, bits).numpy() == expected).all()
    assert torch.equal(unpack(pack(codes, bits), bits, 37), codes)


def test_packing_by_hand():
    assert pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]
    assert pack(torch.tensor([7, 0, 5], dtype=torch.uint8), 3).tolist() == [0b01_000_111, 0b1]


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="codes hold 8: 3 bits hold 0 to 7"):
        pack(torch.tensor([3, 8], dtype=torch.uint8), 3)


# Codes, and the scale and zero that g weights share.
BITS = {"int8": 8 + 16/192, "int4-g64": 4 + 16/64, "int4-g32": 4 + 16/32, "int3-g64": 3 + 16/64,
        "int4-g64-float": 4 + 32/64, "q4_1": 5, "fp8-e4m3": 8 + 32/192, "mxfp4": 4 + 8/32,
        "nf4": 4 + 32/64}


@pytest.mark.parametrize("name", BITS)
def test_effective_bits_count_the_scales(name):
    quantized = Quantized.of(format_named(name), weights())
    assert quantized.bits_per_weight == pytest.approx(BITS[name], rel=1e-12)


def test_nvfp4_also_stores_one_number_for_the_matrix():
    assert Quantized.of(format_named("nvfp4"), weights(32, 64)).nbytes == 32 * 64 // 2 + 32 * 4 + 4


def test_zeros_of_4_bits_are_packed_row_by_row():
    quantized = Quantized.of(format_named("int4-g64-asym"), weights(10, 192))
    assert quantized.nbytes == 10 * (192 // 2 + 3 * 2 + 2)


STORED = {"fp32": torch.float32, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn,
          "e8m0": torch.float8_e8m0fnu}


@each_format
def test_scales_lose_nothing_in_the_bits_that_they_are_counted_with(name):
    quantized = Quantized.of(format_named(name), weights(13))
    stored = quantized.scale.to(STORED[quantized.format.scale_kind])
    assert torch.equal(stored.float(), quantized.scale)


@each_format
def test_bytes_are_those_of_packed_codes_scales_and_zeros(name):
    quantized = Quantized.of(format_named(name), weights(13))

    def packed(codes):                          # by numpy
        bits = np.unpackbits(codes.numpy().view(np.uint8)[..., None], axis=-1, bitorder="little")
        return np.packbits(bits[..., :quantized.format.bits].reshape(13, -1), axis=-1).nbytes

    zero, scale_bytes = quantized.zero, STORED[quantized.format.scale_kind].itemsize
    expected = packed(quantized.codes) + quantized.scale.numel() * scale_bytes
    if zero is not None:
        whole = torch.equal(zero, zero.round())
        expected += packed(zero.to(torch.uint8)) if whole else 2 * zero.numel()
    assert quantized.nbytes == expected + (4 if name == "nvfp4" else 0)


@each_format
def test_a_matrix_of_zeros_stays_zero(name):
    assert (Quantized.of(format_named(name), torch.zeros(3, 192)).dequantize() == 0).all()


@each_format
def test_some_rows_are_those_of_the_whole(name):
    quantized = Quantized.of(format_named(name), weights(13))
    assert torch.equal(quantized.rows(slice(3, 8)).dequantize(), quantized.dequantize()[3:8])


@each_format
def test_rounding_twice_changes_nothing(name):
    """Codes mean numbers that are on the grid: with the same scales they become themselves."""
    quantized = Quantized.of(format_named(name), weights(13))
    scales = Scales(quantized.scale[..., None],
                    None if quantized.zero is None else quantized.zero[..., None], quantized.outer)
    format, numbers = quantized.format, quantized.dequantize()
    again = format.encode(format.grouped(numbers), scales)
    assert torch.equal(format.decode(again, scales).view(quantized.shape), numbers)


def test_columns_may_belong_to_any_group():
    group_of = torch.tensor([1, 0, 0, 1])
    codes = torch.tensor([[3, 3, 3, 3]], dtype=torch.uint8)
    quantized = Quantized(IntFormat(4, 2, "integer"), codes, torch.tensor([[0.5, 2.0]]),
                          torch.tensor([[1.0, 2.0]]), group_of=group_of)
    assert quantized.dequantize().tolist() == [[2.0, 1.0, 1.0, 2.0]]


# -- names and errors -----------------------------------------------------------------------------

@each_format
def test_a_format_is_found_by_its_own_name(name):
    format = format_named(name)
    assert format_named(format.name) == format


@pytest.mark.parametrize(("name", "message"), [
    ("int9", "bits=9: 2 to 8 are accepted"),
    ("int1-g64", "bits=1: 2 to 8 are accepted"),
    ("int4-g0", "group=0: a number of weights, or None for a whole row, is accepted"),
    ("nfp4", "format='nfp4' is not known; near ones: nvfp4, nf4"),
    ("int4g64", "format='int4g64' is not known; near ones: int4-g64"),
])
def test_a_wrong_name_is_answered_with_what_is_accepted(name, message):
    with pytest.raises(ValueError, match=message):
        format_named(name)


def test_a_group_must_divide_the_row():
    with pytest.raises(
            ValueError,
            match="int4-g128: group=128 does not divide the 576 inputs of a row; 16, 32, 64 would"):
        Quantized.of(format_named("int4-g128"), torch.zeros(2, 576))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e7])
def test_weights_beyond_a_scale_are_refused(bad):
    weight = weights(3, 64)
    weight[1, 7] = bad
    with pytest.raises(ValueError,
                       match="int4-g64: the weights are not all finite, or too large for a scale"):
        Quantized.of(format_named("int4-g64"), weight)
