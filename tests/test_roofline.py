"""The roofline, by sums one can do on paper."""

import math
from dataclasses import replace

import pytest

from clawdemy_infer.arithmetic import ModelShape, MoE, Work, total
from clawdemy_infer.envelope.napkin import card, sweep
from clawdemy_infer.envelope.parallel import Layout
from clawdemy_infer.envelope.roofline import (
    PAGED_ATTENTION,
    Link,
    Machine,
    Part,
    Prediction,
    interpolate,
)
from clawdemy_infer.machine.calibrated import (
    ATTENTION_KEYS,
    PROBE_KV_HEADS,
    PRODUCT_NUMBERS,
    Calibrated,
    decode_attention,
    only_products,
)

SHEET = Machine("sheet", ((1.0, 100.0),), {"fp32": 1000.0, "bf16": 4000.0}, memory=1e6)
CALIBRATED = Calibrated(
    "calibrated", bandwidth=((1e3, 400.0), (1e5, 100.0)), peak_flops={"fp32": 1000.0}, memory=1e6,
    rates={"gemm": {"fp32": ((1, 50.0), (100, 800.0))},
           "attention": {"fp32": ((1, 25.0), )}}, fixed_s_per_op=0.5)


# ---- curves ----


def test_a_curve_goes_through_its_points_and_is_flat_beyond_them():
    curve = ((2.0, 10.0), (8.0, 40.0), (32.0, 20.0))
    assert [interpolate(curve, x) for x, _ in curve] == pytest.approx([10, 40, 20])
    assert interpolate(curve, 0) == interpolate(curve, 1.9) == 10
    assert interpolate(curve, 33) == interpolate(curve, math.inf) == 20


def test_between_two_points_a_curve_is_straight_on_log_log_axes():
    """At the geometric mean of two x lies the geometric mean of their y: sqrt(2·8) = 4 ->
    sqrt(10·40) = 20."""
    curve = ((2.0, 10.0), (8.0, 40.0), (32.0, 20.0))
    assert interpolate(curve, 4) == pytest.approx(20)
    assert interpolate(curve, 16) == pytest.approx(math.sqrt(40 * 20))
    assert interpolate(((3.0, 7.0),), 5) == 7  # a data sheet's curve is one point


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
    """Compute-bound 3 s (1 s of memory), then memory-bound 2 s (1 s of compute): 5 s one after the
    other, 4 s of FLOPs in all."""
    work = total("two", [Work(3000, 100), Work(1000, 200)])
    prediction = SHEET.time(work)
    assert (prediction.seconds, prediction.compute_s, prediction.memory_s) == pytest.approx(
        (5, 4, 3))
    assert SHEET.napkin(work) == pytest.approx(4)


def test_layers_repeat_an_operation_and_do_not_share_its_reads():
    layer = Work(500, 100, rows=2, kernel="gemm")
    seven = SHEET.time(total("step", [layer * 7])).seconds
    assert seven == pytest.approx(7 * SHEET.time(layer).seconds)


def test_each_kernel_has_its_own_rate_at_its_own_rows():
    gemm = Work(1600, 1e-9, dtype="fp32", kernel="gemm", rows=100)
    assert CALIBRATED.time(gemm).seconds == pytest.approx(1600 / 800)
    one_row = Work(1600, 1e-9, dtype="fp32", kernel="gemm", rows=1)
    assert CALIBRATED.time(one_row).seconds == pytest.approx(1600 / 50)
    # half-way between 1 and 100: sqrt(50·800) = 200
    ten = Work(1600, 1e-9, dtype="fp32", kernel="gemm", rows=10)
    assert CALIBRATED.time(ten).seconds == pytest.approx(1600 / 200)
    assert CALIBRATED.time(Work(50, 1e-9, kernel="attention")).seconds == pytest.approx(2)
    # at peak
    assert CALIBRATED.time(Work(500, 1e-9, kernel="unheard of")).seconds == pytest.approx(0.5)


def test_the_working_set_is_the_whole_work_and_not_each_operation():
    """Two reads of 50,000 B: together 1e5 B, which come from memory at 100 B/s, though either alone
    would be in a faster level."""
    work = total("step", [Work(0, 5e4), Work(0, 5e4)])
    assert CALIBRATED.time(work).seconds == pytest.approx(1e5 / 100)


def test_the_fixed_cost_comes_on_top_of_the_larger():
    prediction = CALIBRATED.time(Work(0, 1e5), ops=6)
    assert prediction.seconds == pytest.approx(1000 + 3)
    assert prediction.fixed_s == pytest.approx(3)
    assert CALIBRATED.time(Work(0, 100), ops=6).bound == "fixed"  # 0.25 s of memory under 3 s of it


def test_what_devices_tell_one_another_comes_on_top_too():
    # 1 s of memory, half of that of compute
    prediction = SHEET.time(Work(500, 100), communication_s=2.5)
    assert (prediction.seconds, prediction.parts["communication"].seconds) == (3.5, 2.5)
    assert prediction.bound == "communication"
    assert SHEET.time(Work(500, 100), communication_s=0.9).bound == "memory"


def test_element_wise_work_is_slowed_by_its_own_rate_but_never_sped_up():
    work = Work(0, 1e6, kernel="elementwise")
    for rate, expected in ((25.0, 25.0), (400.0, 100.0)):
        machine = Calibrated("m", ((1.0, 100.0),), {"fp32": 1.0}, 1.0,
                             elementwise={"fp32": ((1, rate),)})
        assert machine.time(work).seconds == pytest.approx(1e6 / expected)
        assert machine.time(Work(0, 1e6)).seconds == pytest.approx(1e4)


def test_the_interval_of_a_prediction_by_hand():
    """3 s within a factor of 1.5 and 1 s within 1.1: (3 * 0.5 + 1 * 0.1) / 4 = 0.4 of all 4 s."""
    both = Prediction({"a": Part(3, 0.5), "launches": Part(1, 0.1, "launches")}, 0.5, 2.5)
    assert (both.seconds, both.spread) == pytest.approx((4, 0.4))
    assert (both.low_s, both.high_s) == pytest.approx((4 / 1.4, 4 * 1.4))
    assert (both.fixed_s, both.bound) == (1, "memory")
    assert replace(both, memory_s=0.9).bound == "fixed"
    assert replace(both, compute_s=9).bound == "compute"
    assert replace(both, parts=both.parts | {"communication": Part(7)}).bound == "communication"
    nothing = Prediction({}, 0, 0)
    assert (nothing.seconds, nothing.spread, nothing.low_s, nothing.fixed_s) == (0, 0, 0, 0)


def test_a_difference_of_predictions_is_taken_part_by_part_and_is_never_below_0():
    more = Prediction({"a": Part(3, 0.5), "b": Part(1, 0.1), "c": Part(2)}, 5, 6)
    less = Prediction({"a": Part(1, 0.2), "b": Part(4, 0.9)}, 7, 1)
    found = more - less
    assert found.parts == {"a": Part(2, 0.5), "b": Part(0, 0.1), "c": Part(2)}
    assert (found.compute_s, found.memory_s) == (0, 5)
    equal = more - more                         # the figures cannot tell: a hundredth, give or take
    assert (equal.seconds, equal.spread) == pytest.approx((0.06, 10))


def test_a_product_is_as_uncertain_as_those_of_its_weights_whatever_it_computes_in():
    machine = replace(CALIBRATED, spreads={"gemm": {"int4": 0.5, "fp32": 0.1}})
    int4, fp32, unsaid = (
        machine.time(Work(9, 9, "qkv", kernel="gemm", weights=weights)).parts["qkv"].spread
        for weights in ("int4", "fp32", ""))
    assert int4 - fp32 == pytest.approx(0.4) and unsaid == fp32


def test_each_part_says_what_it_waits_for():
    """The ridge lies at 10 FLOPs a byte."""
    work = total("step", [Work(1100, 100, "above", kernel="gemm"), Work(900, 100, "below")])
    found = SHEET.time(work, ops=1, communication_s=2.0)
    assert {name: part.bound for name, part in found.parts.items()} == {
        "above": "compute", "below": "memory", "launches": "launches",
        "communication": "communication"}
    assert (found.compute_s, found.memory_s) == pytest.approx((2.0, 2.0))


# ---- utilisation ----


def test_utilisation_is_one_at_the_roofline_and_above_it_beyond():
    """An MBU above 1 is a wrong count or a wrong clock; it is given back as it is, never cut to
    1."""
    work = Work(2000, 300)
    assert SHEET.mbu(work, 3.0) == pytest.approx(1)
    assert SHEET.mfu(work, 2.0) == pytest.approx(1)
    assert SHEET.mbu(work, 1.5) == pytest.approx(2)


def test_utilisation_and_ridge_are_of_main_memory_however_small_the_work():
    """1,000 bytes would come at 400 bytes/s out of a cache, and at 100 from memory."""
    work = Work(3000, 1000)
    assert CALIBRATED.bandwidth_at(1000) == 400
    assert CALIBRATED.mbu(work, 20.0) == pytest.approx(0.5)
    assert CALIBRATED.mfu(work, 20.0) == pytest.approx(0.15)
    assert CALIBRATED.ridge("fp32") == 10 and CALIBRATED.napkin(work) == 10


def test_an_unknown_dtype_is_refused_by_name():
    with pytest.raises(ValueError, match="dtype='int8': sheet has figures for fp32, bf16"):
        SHEET.napkin(Work(1, 1, dtype="int8"))


# ---- the card ----

SHAPE = ModelShape("odd", L=3, D=60, N=6, K=2, H=14, F=84, V=131)
BIG = Machine("big", ((1.0, 2e6),), {"fp32": 3e7, "bf16": 9e7}, memory=1e6)


@pytest.mark.parametrize("batch, weights, kv", [(1, "bf16", "bf16"), (5, "fp32", "int8"),
                                                (40, "int4", "bf16")])
def test_the_card_adds_up(batch, weights, kv):
    c = card(SHAPE, BIG, batch, context=33, prompt=21, weights=weights, kv=kv)
    assert c["fits"] and c["weight_bytes"] + c["kv_bytes"] <= c["memory_bytes"] == 1e6
    assert c["ridge"] == c["peak_flops"] / c["bandwidth"]
    for phase in ("prefill", "decode"):
        p = c[phase]
        assert p["flops"] == pytest.approx(sum(part["flops"] for part in p["parts"].values()))
        assert p["bytes"] == pytest.approx(sum(part["bytes"] for part in p["parts"].values()))
        compute_s, memory_s = p["flops"] / c["peak_flops"], p["bytes"] / c["bandwidth"]
        assert p["seconds"] == pytest.approx(max(compute_s, memory_s))
        assert p["bound"] == ("compute" if compute_s > memory_s else "memory")
    assert c["tokens_per_s"] == pytest.approx(batch / c["decode"]["seconds"])


def test_the_card_has_no_times_for_what_does_not_fit():
    c = card(SHAPE, BIG, batch=1000, context=1000)
    assert not c["fits"]
    assert c["prefill"]["seconds"] is c["decode"]["seconds"] is c["prefill"]["bound"] is c[
        "decode"]["bound"] is c["tokens_per_s"] is None
    again = card(SHAPE, BIG, batch=c["max_batch"], context=1000)
    assert again["fits"] and again["max_batch"] == c["max_batch"]


def test_the_cache_must_hold_the_longer_of_prompt_and_context():
    assert card(SHAPE, BIG, context=10, prompt=40)["kv_bytes"] == card(
        SHAPE, BIG, context=40, prompt=10)["kv_bytes"]


@pytest.mark.parametrize("arguments, message", [
    ({"batch": 0}, "batch=0"), ({"context": 0, "prompt": 3}, "context=0"),
    ({"prompt": 0}, "prompt=0"),
    ({"weights": "fp16"}, "weights='fp16' is computed with in fp16: big has a peak for fp32, bf16"),
    ({"kv": "fp7"}, "kv='fp7'"),
])
def test_the_card_names_the_argument_that_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        card(SHAPE, BIG, **arguments)


# ---- several devices ----

LINKED = Machine("linked", ((1.0, 2e6), ), {"fp32": 3e7, "bf16": 9e7}, memory=1e6, link=Link(
    5e4, latency_s=0.01, hop_s=0.001, kind="wire"), watts=300, dollars_per_hour=7.2, priced="2025")


def test_the_card_of_two_devices_by_hand():
    """Two devices, each with half of what is cut: of 3 layers 60·(3 + 2)·14 in qkv, 42·60 out,
    3·60·42 in the MLP, and whole norms. A token's 6 all-reduces of 60 numbers in bf16: 0.01 +
    2·(0.001 + 60/50,000) s each."""
    one, two = card(SHAPE, LINKED, context=33), card(SHAPE, LINKED, context=33, layout=Layout(tp=2))
    # 131 words: 66 on the larger half
    held = 3 * (60 * 5 * 14 + 42 * 60 + 3 * 60 * 42 + 120) + 2 * 66 * 60 + 60
    assert two["weight_bytes"] == 2 * held
    assert two["kv_bytes"] == one["kv_bytes"] / 2 == 33 * 2 * 3 * 14 * 2
    assert two["decode"]["communication_s"] == pytest.approx(6 * (0.01 + 2 * (0.001 + 60 / 5e4)))
    assert two["decode"]["seconds"] == pytest.approx(
        two["decode"]["memory_s"] + two["decode"]["communication_s"])
    assert two["decode"]["bound"] == "communication" and one["decode"]["bound"] == "memory"
    assert (one["dollars_per_hour"], two["dollars_per_hour"], two["watts"]) == (7.2, 14.4, 600)
    # 14.4 dollars buy 3,600 s of tokens.
    assert two["dollars_per_million_tokens"] == pytest.approx(14.4/(3600*two["tokens_per_s"])*1e6)
    assert two["joules_per_token"] == pytest.approx(600 * two["decode"]["seconds"])


def test_a_prefill_waits_for_the_pipeline_to_fill_and_a_decode_step_does_not():
    """Six prompts on three stages: three microbatches of 2 need 5 turns, of which one prompt alone
    would need 3."""
    one = card(SHAPE, LINKED, 2, context=33)
    three = card(SHAPE, LINKED, 6, context=33, layout=Layout(pp=3))
    assert three["prefill"]["compute_s"] == pytest.approx(5 / 3 * one["prefill"]["compute_s"])
    assert three["prefill"]["communication_s"] == pytest.approx(5/3*2*(0.011 + 2*33*60*2/5e4))
    assert three["decode"]["memory_s"] == pytest.approx(one["decode"]["memory_s"])


@pytest.mark.parametrize(
    "layout", [Layout(tp=2), Layout(pp=3),
               Layout(ep=2), Layout(tp=2, pp=3, ep=4)])
def test_the_largest_batch_fits_and_no_larger_one(layout):
    shape = ModelShape("experts", L=3, D=60, N=6, K=2, H=14, F=84, V=131, moe=MoE(
        experts=4, active=1, F=30))
    most = card(shape, LINKED, context=200, layout=layout)["max_batch"]
    assert card(shape, LINKED, most, context=200, layout=layout)["fits"]
    assert not card(shape, LINKED, most + 1, context=200, layout=layout)["fits"]


def test_the_card_counts_what_weights_and_cache_leave():
    """Decode of 5 sequences needs fewer rows than one prompt of 21: 21 rows of D = 60, and 60 in
    and 168 out of gate and up. Half a block is 8 tokens for each sequence."""
    c = card(SHAPE, BIG, 5, context=33, prompt=21)
    assert c["activation_bytes"] == 21 * (60 + 60 + 168) * 2
    assert c["paging_bytes"] == 5 * 8 * 2 * 3 * 2 * 14 * 2
    assert c["left_bytes"] == 1e6 - c["weight_bytes"] - c["kv_bytes"] - c["activation_bytes"] - c[
        "paging_bytes"]


def test_the_price_of_a_token_is_that_of_the_machine_over_what_the_whole_batch_makes():
    """3.60 dollars an hour are 1,000 millionths a second."""
    machine = replace(SHEET, dollars_per_hour=3.6, watts=200.0)
    shape = ModelShape("", L=1, D=8, N=2, K=1, H=4, F=8, V=50)
    priced = card(shape, machine, batch=4, context=9, weights="fp32")
    seconds, rate = priced["decode"]["seconds"], priced["tokens_per_s"]
    assert rate == pytest.approx(4 / seconds)
    assert priced["tokens_per_s_per_user"] == pytest.approx(1 / seconds)
    assert priced["dollars_per_million_tokens"] == pytest.approx(1000 / rate)
    assert priced["joules_per_token"] == pytest.approx(200 / rate)


def test_between_two_kernels_lie_the_rows_of_a_microbatch_or_of_a_prompt():
    machine = replace(SHEET, link=Link(1e3))
    shape = ModelShape("", L=2, D=8, N=2, K=1, H=4, F=8, V=50)
    rows = [card(shape, machine, batch=5, context=9, prompt=prompt, layout=Layout(pp=2),
                 weights="fp32")["activation_rows"] for prompt in (2, 7)]
    assert rows == [3, 7]


def test_experts_have_their_own_part():
    shape = ModelShape("experts", L=3, D=60, N=6, K=2, H=14, F=84, V=131, moe=MoE(
        experts=4, active=1, F=30))
    c = card(shape, BIG, 1, context=33)
    # one expert: three matrices in three layers
    assert c["decode"]["parts"]["experts"]["flops"] == 3 * 2 * 3 * 60 * 30
    assert c["active_parameters"] == c["parameters"] - 3 * 3 * 3 * 60 * 30
    assert "experts" not in card(SHAPE, BIG)["decode"]["parts"]


def test_other_activations_are_computed_with_at_their_own_peak():
    slow, fast = card(SHAPE, BIG, weights="fp32", activations="fp32"), card(
        SHAPE, BIG, weights="fp32", activations="bf16")
    assert (slow["peak_flops"], fast["peak_flops"]) == (3e7, 9e7)


@pytest.mark.parametrize("machine, arguments, message", [
    (BIG, {"layout": Layout(pp=3)}, "pp=3: no link to other devices is known of big"),
    (LINKED, {"layout": Layout(tp=4)}, "tp=4: it must divide the N=6 query heads"),
    (BIG, {"activations": "int8"}, "activations='int8': big has a peak for fp32, bf16"),
])
def test_the_card_refuses_devices_and_formats_by_name(machine, arguments, message):
    with pytest.raises(ValueError, match=message):
        card(SHAPE, machine, **arguments)


# ---- sweeps ----


def test_a_sweep_of_batches_ends_at_the_first_that_does_not_fit():
    """1 MB less the weights hold so many sequences of 99 tokens with 2·3·2·14 numbers of 2 B
    each."""
    weights = card(SHAPE, BIG)["weight_bytes"]
    most = int((1e6 - weights) // (99 * 2 * 3 * 2 * 14 * 2))
    rows = sweep(SHAPE, BIG, "batch", context=99)
    assert [row["batch"] for row in rows] == [1, 2, 4, 8, 16, most, 32] and 16 < most < 32
    assert [row["fits"] for row in rows] == [True] * 6 + [False]
    assert rows[-1]["seconds"] is rows[-1]["tokens_per_s"] is rows[-1]["bound"] is None
    fitting = rows[:-1]
    for row in fitting:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["seconds"])
        assert row["tokens_per_s_per_user"] == pytest.approx(1 / row["seconds"])
    for name in ("seconds", "tokens_per_s"):  # a batch buys throughput with latency
        assert [row[name] for row in fitting] == sorted(row[name] for row in fitting)


def test_a_sweep_of_contexts_ends_at_the_models_own_or_at_the_memory():
    short = ModelShape("short", L=3, D=60, N=6, K=2, H=14, F=84, V=131, max_context=700)
    assert [row["context"] for row in sweep(short, BIG, "context")] == [256, 512, 700]
    rows = sweep(SHAPE, BIG, "context")
    assert [row["fits"] for row in rows] == [True] * (len(rows) - 1) + [False]


def test_a_sweep_of_a_model_that_does_not_fit_is_one_line_that_says_so():
    tiny = Machine("tiny", ((1.0, 2e6),), {"bf16": 9e7}, memory=1e4)
    assert [(row["batch"], row["fits"]) for row in sweep(SHAPE, tiny, "batch")] == [(1, False)]
    with pytest.raises(ValueError, match="sweep='depth': accepted are batch, context"):
        sweep(SHAPE, BIG, "depth")


def test_a_head_is_one_threads_so_three_take_two_threads_as_long_as_four():
    curves = {decode_attention(probe, keys): {"fp32": ((1, 1e9),)}
              for probe in PROBE_KV_HEADS for keys in ATTENTION_KEYS}
    for threads, alike, twice in ((2, (3, 4), (2, 4)), (4, (5, 8), (4, 8))):
        machine = Calibrated("", ((1, 1e15),), {"fp32": 1e9}, 1e9, rates=curves, threads=threads)
        shapes = {K: ModelShape("", L=1, D=8, N=K, K=K, H=8, F=8, V=8) for K in (*alike, *twice)}
        seconds = {
            K: machine.time(shape.attention(1, 1, 100, kv="fp32", activations="fp32")).seconds
            for K, shape in shapes.items()
        }
        assert seconds[alike[0]] == pytest.approx(seconds[alike[1]])
        assert 2 * seconds[twice[0]] == pytest.approx(seconds[twice[1]])


@pytest.mark.parametrize("numbers", [2**18, 333_333, 576**2, 2**20, 1_769_472, 7e6, 25 * 2**20])
def test_a_product_is_predicted_by_its_size_between_those_that_were_measured(numbers):
    """Its oracle: a machine where a product costs 80 µs and its bytes' time at 20 GB/s. The law is
    met at the sizes of the probes, and within a tenth between them, of any name."""
    def rate(numbers):
        return 2 * numbers / (80e-6 + 4 * numbers / 20e9)
    rates = {name: {"fp32": ((1, rate(size)),)} for name, size in PRODUCT_NUMBERS.items()}
    machine = Calibrated("", ((1, 1e15),), {"fp32": 1e15}, 1e9, rates=rates)
    for name in ("qkv", "head"):
        op = Work(1, 1, name, "fp32", kernel="gemm", weights="fp32", rows=1, numbers=numbers)
        exact = numbers in PRODUCT_NUMBERS.values()
        assert machine.flops_at(op) == pytest.approx(rate(numbers), rel=1e-9 if exact else 0.1)


@pytest.mark.parametrize("heads, rate", [(1, 1e9), (4, 1e9), (16, 2e9), (64, 4e9), (500, 4e9)])
def test_decode_attention_is_predicted_between_few_heads_and_many(heads, rate):
    """Measured: 1 GFLOP/s of 4 heads and 4 of 64; 16 lie in the middle of the two by ratio."""
    curves = {decode_attention(probe, keys): {"fp32": ((1, {"few": 1e9, "many": 4e9}[probe]),)}
              for probe in PROBE_KV_HEADS for keys in ATTENTION_KEYS}
    machine = Calibrated("", ((1, 1e15),), {"fp32": 1e15}, 1e9, rates=curves)
    op = Work(1, 1, "attention", "fp32", kernel="attention", rows=1, keys=100, heads=heads)
    assert machine.flops_at(op) == pytest.approx(rate)


def test_where_only_products_cost_more_than_their_bytes_the_rest_is_as_fast_as_memory():
    """Attention of 1,000 bytes and 2,000 FLOPs: at its own rate 80 s, else 1,000 / 400 bytes/s. A
    product is what it was."""
    attention = Work(2000, 1000, "a", "fp32", kernel="attention", rows=1)
    product = Work(2000, 1000, "p", "fp32", kernel="gemm", rows=1)
    norm = Work(0, 1000, "n", "fp32", kernel="elementwise", rows=1)
    machine = replace(CALIBRATED, elementwise={"fp32": ((1, 2.0),)})
    fused = only_products(machine)
    assert (machine.time(attention).seconds, fused.time(attention).seconds) == (80, 2.5)
    assert (machine.time(norm).seconds, fused.time(norm).seconds) == (500, 2.5)
    assert machine.time(product).seconds == fused.time(product).seconds == 40
    assert only_products(SHEET) == SHEET                # which knows of nothing that costs more


def test_attention_over_pages_has_its_own_rate_or_that_of_any_attention():
    """1,000 FLOPs at 25 FLOP/s, or at the 50 of pages; both have the name of the operation."""
    paged = Work(1000, 1e-9, "attention", "fp32", kernel=PAGED_ATTENTION, rows=1, keys=7, heads=4)
    assert CALIBRATED.time(paged).seconds == pytest.approx(40)
    rates = CALIBRATED.rates | {PAGED_ATTENTION: {"fp32": ((1, 50.0),)}}
    assert replace(CALIBRATED, rates=rates).time(paged).seconds == pytest.approx(20)
