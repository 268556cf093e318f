"""The roofline, by sums one can do on paper."""

import math

import pytest

from clawdemy_infer.arithmetic import ModelShape, Work, total
from clawdemy_infer.napkin import card
from clawdemy_infer.roofline import Machine, interpolate

SHEET = Machine("sheet", ((1.0, 100.0),), {"fp32": 1000.0, "bf16": 4000.0}, memory=1e6)
CALIBRATED = Machine(
    "calibrated", bandwidth=((1e3, 400.0), (1e5, 100.0)), peak_flops={"fp32": 1000.0}, memory=1e6,
    rates={"gemm": {"fp32": ((1, 50.0), (100, 800.0))}, "attention": {"fp32": ((1, 25.0),)}}, fixed_s_per_op=0.5)


# ---- curves ----


def test_a_curve_goes_through_its_points_and_is_flat_beyond_them():
    curve = ((2.0, 10.0), (8.0, 40.0), (32.0, 20.0))
    assert [interpolate(curve, x) for x, _ in curve] == pytest.approx([10, 40, 20])
    assert interpolate(curve, 0) == interpolate(curve, 1.9) == 10
    assert interpolate(curve, 33) == interpolate(curve, math.inf) == 20


def test_between_two_points_a_curve_is_straight_on_log_log_axes():
    """At the geometric mean of two x lies the geometric mean of their y: sqrt(2·8) = 4 -> sqrt(10·40) = 20."""
    curve = ((2.0, 10.0), (8.0, 40.0), (32.0, 20.0))
    assert interpolate(curve, 4) == pytest.approx(20)
    assert interpolate(curve, 16) == pytest.approx(math.sqrt(40 * 20))
    assert interpolate(((3.0, 7.0),), 5) == 7                           # a data sheet's curve is one point


def test_bandwidth_without_a_working_set_is_that_of_main_memory():
    assert CALIBRATED.bandwidth_at() == 100
    assert CALIBRATED.bandwidth_at(1e4) == pytest.approx(200)           # half-way, in logarithms
    assert SHEET.bandwidth_at(7) == SHEET.bandwidth_at() == 100


# ---- time ----


@pytest.mark.parametrize("flops, bytes, seconds, bound", [
    (500, 100, 1.0, "memory"), (2000, 100, 2.0, "compute"), (0, 250, 2.5, "memory"),
], ids=["below the ridge", "above the ridge", "nothing to compute"])
def test_time_is_the_larger_of_compute_and_memory(flops, bytes, seconds, bound):
    work = Work(flops, bytes)
    prediction = SHEET.time(work)
    assert prediction.seconds == SHEET.napkin(work) == pytest.approx(seconds)
    assert prediction.bound == bound
    assert (work.intensity > SHEET.ridge("fp32")) == (bound == "compute")


def test_the_larger_is_taken_operation_by_operation_and_by_the_napkin_only_once():
    """Compute-bound 3 s (1 s of memory), then memory-bound 2 s (1 s of compute): 5 s one after the other, 4 s of FLOPs in all."""
    work = total("two", [Work(3000, 100), Work(1000, 200)])
    prediction = SHEET.time(work)
    assert (prediction.seconds, prediction.compute_s, prediction.memory_s) == pytest.approx((5, 4, 3))
    assert SHEET.napkin(work) == pytest.approx(4)


def test_layers_repeat_an_operation_and_do_not_share_its_reads():
    layer = Work(500, 100, rows=2, kernel="gemm")
    assert SHEET.time(total("step", [layer * 7])).seconds == pytest.approx(7 * SHEET.time(layer).seconds)


def test_each_kernel_has_its_own_rate_at_its_own_rows():
    gemm = Work(1600, 1e-9, dtype="fp32", kernel="gemm", rows=100)
    assert CALIBRATED.time(gemm).seconds == pytest.approx(1600 / 800)
    one_row = Work(1600, 1e-9, dtype="fp32", kernel="gemm", rows=1)
    assert CALIBRATED.time(one_row).seconds == pytest.approx(1600 / 50)
    ten = Work(1600, 1e-9, dtype="fp32", kernel="gemm", rows=10)        # half-way between 1 and 100: sqrt(50·800) = 200
    assert CALIBRATED.time(ten).seconds == pytest.approx(1600 / 200)
    assert CALIBRATED.time(Work(50, 1e-9, kernel="attention")).seconds == pytest.approx(2)
    assert CALIBRATED.time(Work(500, 1e-9, kernel="unheard of")).seconds == pytest.approx(0.5)      # at peak


def test_the_working_set_is_the_whole_work_and_not_each_operation():
    """Two reads of 50,000 B: together 1e5 B, which come from memory at 100 B/s, though either alone would be in a faster level."""
    work = total("step", [Work(0, 5e4), Work(0, 5e4)])
    assert CALIBRATED.time(work).seconds == pytest.approx(1e5 / 100)


def test_the_fixed_cost_comes_on_top_of_the_larger():
    prediction = CALIBRATED.time(Work(0, 1e5), ops=6)
    assert prediction.seconds == pytest.approx(1000 + 3)
    assert prediction.fixed_s == pytest.approx(3)
    assert CALIBRATED.time(Work(0, 100), ops=6).bound == "fixed"        # 0.25 s of memory under 3 s of it


def test_element_wise_work_is_slowed_by_its_own_rate_but_never_sped_up():
    work = Work(0, 1e6, kernel="elementwise")
    for rate, expected in ((25.0, 25.0), (400.0, 100.0)):
        machine = Machine("m", ((1.0, 100.0),), {"fp32": 1.0}, 1.0, elementwise={"fp32": rate})
        assert machine.time(work).seconds == pytest.approx(1e6 / expected)
        assert machine.time(Work(0, 1e6)).seconds == pytest.approx(1e4)


# ---- utilisation ----


def test_utilisation_is_one_at_the_roofline_and_above_it_beyond():
    """An MBU above 1 is a wrong count or a wrong clock; it is given back as it is, never cut to 1."""
    work = Work(2000, 300)
    assert SHEET.mbu(work, 3.0) == pytest.approx(1)
    assert SHEET.mfu(work, 2.0) == pytest.approx(1)
    assert SHEET.mbu(work, 1.5) == pytest.approx(2)


def test_an_unknown_dtype_is_refused_by_name():
    with pytest.raises(ValueError, match="dtype='int8': sheet has figures for fp32, bf16"):
        SHEET.napkin(Work(1, 1, dtype="int8"))


# ---- the card ----

SHAPE = ModelShape("odd", L=3, D=60, N=6, K=2, H=14, F=84, V=131)
BIG = Machine("big", ((1.0, 2e6),), {"fp32": 3e7, "bf16": 9e7}, memory=1e6)


@pytest.mark.parametrize("batch, weights, kv", [(1, "bf16", "bf16"), (5, "fp32", "int8"), (40, "int4", "bf16")])
def test_the_card_adds_up(batch, weights, kv):
    c = card(SHAPE, BIG, batch, context=33, prompt=21, weights=weights, kv=kv)
    assert c["fits"] and c["weight_bytes"] + c["kv_bytes"] <= c["memory_bytes"] == 1e6
    assert c["ridge"] == c["peak_flops"] / c["bandwidth"]
    for phase in ("prefill", "decode"):
        p = c[phase]
        assert p["flops"] == pytest.approx(sum(part["flops"] for part in p["parts"].values()))
        assert p["bytes"] == pytest.approx(sum(part["bytes"] for part in p["parts"].values()))
        assert p["seconds"] == pytest.approx(max(p["flops"] / c["peak_flops"], p["bytes"] / c["bandwidth"]))
        assert p["bound"] == ("compute" if p["flops"] / c["peak_flops"] > p["bytes"] / c["bandwidth"] else "memory")
    assert c["tokens_per_s"] == pytest.approx(batch / c["decode"]["seconds"])


def test_the_card_has_no_times_for_what_does_not_fit():
    c = card(SHAPE, BIG, batch=1000, context=1000)
    assert not c["fits"]
    assert c["prefill"]["seconds"] is c["decode"]["seconds"] is c["prefill"]["bound"] is c["decode"]["bound"] is c["tokens_per_s"] is None
    again = card(SHAPE, BIG, batch=c["max_batch"], context=1000)
    assert again["fits"] and again["max_batch"] == c["max_batch"]


def test_the_cache_must_hold_the_longer_of_prompt_and_context():
    assert card(SHAPE, BIG, context=10, prompt=40)["kv_bytes"] == card(SHAPE, BIG, context=40, prompt=10)["kv_bytes"]


@pytest.mark.parametrize("arguments, message", [
    ({"batch": 0}, "batch=0"), ({"context": 0, "prompt": 3}, "context=0"), ({"prompt": 0}, "prompt=0"), ({"weights": "fp16"},
     "weights='fp16' is computed with in fp16: big has a peak for fp32, bf16"), ({"kv": "fp8"}, "kv='fp8'"),
])
def test_the_card_names_the_argument_that_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        card(SHAPE, BIG, **arguments)
