"""A step is predicted and measured by the same parts, which add up to it. Where numbers are
expected, the clock is one that counts operations: each takes a `TICK`."""

from types import SimpleNamespace

import pytest
import torch

from clawdemy_infer import timing
from clawdemy_infer.arithmetic import ModelShape, MoE
from clawdemy_infer.fast import cpp
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.fast.launches import count_ops, op_counter
from clawdemy_infer.fast.recorded import RecordedSteps
from clawdemy_infer.fast.watched import Watch, cost_of_watching
from clawdemy_infer.kv_cache import ContiguousCache, PagedCache
from clawdemy_infer.lesson.parts import Parts, Rate, StepOf
from clawdemy_infer.lesson.steps import filled_cache, step_ops, work_of
from clawdemy_infer.lesson.waterfall import shares
from clawdemy_infer.machine import probes
from clawdemy_infer.machine.calibrated import Calibrated, only_products
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.variants.experts import decoder_with_experts
from clawdemy_infer.variants.int8_cache import Int8Cache

SHAPE = ModelShape("small", L=2, D=96, N=6, K=2, H=16, F=160, V=176, tied=True, max_context=64)
MACHINE = Calibrated(
    "m", ((1.0, 1e9), ), {"fp32": 1e10, "bf16": 3e10}, memory=1e6, fixed_s_per_op=1e-6,
    elementwise={"fp32": ((1, 5e8), )}, rates={
        "gemm": {"fp32": ((1, 1e9), (64, 5e9))}, "head": {"fp32": ((1, 2e9), )},
        "attention": {"fp32": ((1, 3e9), )}
    })
PRODUCTS = ("qkv", "out", "gate_up", "down", "head")
NAMES = {*PRODUCTS, "attention", "element-wise", "launches"}
STEPS = [("decode", 1, 9), ("decode", 3, 9), ("prefill", 1, 11), ("prefill", 2, 11)]
TICK = 2.0**-20
needs_compiler = pytest.mark.skipif(not cpp.available(), reason="no C++ compiler here")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(4)
    return Decoder(ModelConfig(SHAPE)).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def small_probes(monkeypatch):
    monkeypatch.setattr(probes, "GLUE_LAYERS", 1)
    monkeypatch.setattr(probes, "MOST_LAYERS", 2)


@pytest.fixture
def clock_of_ops(monkeypatch):
    """An operation takes a `TICK`, and nothing else takes any time: so says the clock, and so say
    the probes."""
    monkeypatch.setattr(probes, "launch_probe", lambda *_: SimpleNamespace(sample=lambda: TICK))
    with op_counter() as ops:
        clock = SimpleNamespace(perf_counter=lambda: ops.count * TICK)
        monkeypatch.setattr(timing, "time", clock)
        yield


def in_ops(parts):
    """Measured, in operations."""
    return {name: pytest.approx(seconds / TICK) for name, seconds in parts.measured.items()}


def left_behind(step):
    """All that a module, the runner or the cache has of its own."""
    owners = [*step.model.modules(), step.filled, step.model.runner]
    return [sorted(vars(owner)) for owner in owners if owner is not None]


# ---- what is measured ----


@pytest.mark.parametrize("phase, batch, context", STEPS)
def test_parts_and_rest_are_the_whole_to_the_operation(model, phase, batch, context, clock_of_ops):
    parts = StepOf(model, phase, batch, context).parts(MACHINE, repeats=2)
    found = in_ops(parts)
    assert [found[name] for name in PRODUCTS] == [2, 2, 2, 2, 1]        # by hand: L, and one head
    assert found["element-wise"] == 0 < parts.measured["attention"]
    assert parts.rest_s / TICK == pytest.approx(0)
    assert parts.whole_s / TICK == sum(StepOf(model, phase, batch, context).started.values())
    assert parts.watching_s == 0


@pytest.mark.parametrize("phase, batch, context", STEPS)
@pytest.mark.parametrize("way", ["plain", "int8", "triton", "paged", "cpp", "cpp, paged"])
def test_what_is_measured_has_the_names_of_what_is_predicted(model, phase, batch, context, way):
    if way == "triton":
        pytest.importorskip("triton", reason="there is no Triton for this system")
        model = faster(model, backend="triton")
    if "cpp" in way:
        if not cpp.available():
            pytest.skip("no C++ compiler here")
        model = faster(model, compile=True)
    model, cache = faster(model, "int8") if way == "int8" else model, None
    if "paged" in way:
        new = context if phase == "prefill" else 1
        cache = filled_cache(model, batch, context - new, new, PagedCache)
    step = StepOf(model, phase, batch, context, cache)
    before = left_behind(step)
    parts = step.parts(MACHINE, repeats=2)
    assert left_behind(step) == before
    assert set(parts.measured) == set(step.predict(MACHINE).parts) == NAMES
    assert parts.measured.keys() == parts.predicted.keys() == parts.napkin.keys()
    # what launches leave of an attention over blocks, or of a few rows, may be nothing
    assert all(seconds > 0 or name in ("attention", "element-wise") and seconds == 0
               for name, seconds in parts.measured.items())
    assert parts.whole_s == pytest.approx(sum(parts.measured.values()) + parts.rest_s)
    assert parts.rest_s < parts.whole_s


@pytest.mark.parametrize("planted", ["qkv", "down"])
def test_a_product_three_times_as_slow_shows_in_its_part_and_in_no_other(
        model, monkeypatch, planted, clock_of_ops):
    step = StepOf(model, "prefill", 2, 9)
    right = in_ops(step.parts(MACHINE, repeats=2))
    for layer in model.layers:
        product = getattr(layer, planted)
        monkeypatch.setattr(product, "forward", lambda x, run=product.forward: [
            run(x) for _ in range(3)][-1])
    slow = in_ops(step.parts(MACHINE, repeats=2))
    assert slow == right | {planted: pytest.approx(3 * 2)}


def test_what_nobody_counted_is_in_no_part(model, monkeypatch, clock_of_ops):
    """A norm of 8 operations that runs four times where it was counted once: not explained."""
    step = StepOf(model, "prefill", 1, 9)
    right = in_ops(step.parts(MACHINE, repeats=2))
    norm = model.layers[0].mlp_norm
    monkeypatch.setattr(norm, "forward", lambda x, run=norm.forward: [run(x) for _ in range(4)][-1])
    slow = step.parts(MACHINE, repeats=2)
    assert in_ops(slow) == right and slow.rest_s / TICK == pytest.approx(3 * 8)


def test_what_more_rows_take_between_products_is_element_wise(model, monkeypatch, clock_of_ops):
    """A norm of 8 operations runs four times, but once where there is one row."""
    step = StepOf(model, "decode", 2, 9)
    right = in_ops(step.parts(MACHINE, repeats=2))
    norm = model.layers[0].mlp_norm
    monkeypatch.setattr(norm, "forward", lambda x, run=norm.forward: [
        run(x) for _ in range(4 if len(x) > 1 else 1)][-1])
    slow = step.parts(MACHINE, repeats=2)
    assert in_ops(slow) == right | {"element-wise": pytest.approx(3 * 8)}
    assert slow.rest_s / TICK == pytest.approx(0)


@pytest.mark.parametrize("phase, batch, context", STEPS)
def test_a_launch_has_a_price_of_its_own(model, monkeypatch, phase, batch, context):
    monkeypatch.setattr(probes, "launch_probe", lambda *_: SimpleNamespace(sample=lambda: 0.25))
    step = StepOf(model, phase, batch, context)
    assert step.parts(MACHINE, repeats=1).measured["launches"] == step.ops / 4


def test_a_slow_part_is_the_largest_by_the_real_clock(model, monkeypatch):
    """By a sleep, so that no other process makes it faster."""
    attend = ContiguousCache.attend

    def slow(*arguments):
        timing.time.sleep(0.05)
        return attend(*arguments)

    monkeypatch.setattr(ContiguousCache, "attend", slow)
    measured = StepOf(model, "decode", 2, 9).parts(MACHINE, repeats=3).measured
    assert max(measured, key=measured.get) == "attention" and measured["attention"] > 0.05


def test_watching_leaves_nothing_behind_when_a_step_fails(model, monkeypatch):
    step = StepOf(model, "decode", 1, 9)
    step.run()
    assert step.started                         # counted before: it fails while the clock runs

    def broken(x):
        raise RuntimeError("broken")

    monkeypatch.setattr(model.layers[1].down, "forward", broken)
    before = left_behind(step)
    for failing in (lambda: step.look(0.0), lambda: step.parts(MACHINE), lambda: step_ops(model)):
        with pytest.raises(RuntimeError, match="broken"):
            failing()
        assert left_behind(step) == before and model.layers[1].down.forward is broken
    assert step.filled.length == 8                                      # it has not happened


def test_a_call_is_taken_without_what_is_watched_within_it():
    time = 0.0

    def work(seconds, then=lambda: None):
        nonlocal time
        time += seconds
        then()
        time += seconds

    watch = Watch(lambda: time, own_s=0.25)
    inner = watch.of("inner", lambda: work(1))
    watch.of("outer", work)(10, lambda: [inner(), inner(), watch.note("told", 3)])
    # 20 + 2 x 2 passed, of which 2 x 0.25 were the watching's and 3 were told
    assert watch.taken == {"inner": 4, "told": 3, "outer": 24 - 4 - 3 - 0.5}
    assert (watch.calls, watch.whole_s) == (3, 24 - 0.5 + 3 * 0.25)


def test_watching_has_a_cost():
    assert 0 < cost_of_watching() < 1e-3


# ---- in C++ ----


@needs_compiler
def test_the_clocks_of_the_code_are_read_only_while_it_is_watched(model):
    step = StepOf(faster(model, compile=True), "prefill", 2, 21)
    step.run()
    assert step.model.runner.clocks is None
    watch = step.look(0.0)
    assert step.model.runner.clocks is None
    assert {*PRODUCTS, "attention", "element-wise", "launches", "the rest"} == set(watch.taken)
    assert all(seconds > 0 for seconds in watch.taken.values())
    step.model.runner.clocks, start = torch.zeros(6, dtype=torch.float64), timing.now()
    step.run()
    assert 0 < step.model.runner.clocks.sum() < timing.now() - start
    assert (step.model.runner.clocks > 0).all()


# ---- what is predicted ----


@pytest.mark.parametrize("phase, batch, context", STEPS)
def test_a_step_is_predicted_from_its_work_and_its_launches(model, phase, batch, context):
    step = StepOf(model, phase, batch, context)
    work = work_of(SHAPE, phase, "fp32", batch, context)
    ops = step_ops(model, 2) if phase == "prefill" else step_ops(model, batch=batch)
    assert step.predict(MACHINE) == MACHINE.time(work, ops)
    assert step.napkin(MACHINE) == max(work.flops / 1e10, work.bytes / 1e9)
    parts = step.parts(MACHINE, repeats=1)
    assert sum(parts.predicted.values()) == pytest.approx(MACHINE.time(work, ops).seconds)
    assert sum(parts.napkin.values()) == pytest.approx(step.napkin(MACHINE))


@needs_compiler
def test_in_one_call_only_products_cost_more_than_their_bytes(model):
    step = StepOf(faster(model, compile=True), "decode", 2, 9)
    assert step.predict(MACHINE) == only_products(MACHINE).time(step.work, step_ops(step.model))


def test_launches_are_what_starts_beside_products_and_their_attention(model):
    """Over a block table the rate of attention is without its starts, so they are counted."""
    cache = PagedCache.for_model(model, 2, 9)
    paged, plain = StepOf(model, "decode", 2, 9, cache), StepOf(model, "decode", 2, 9)
    plain.run()
    whole = count_ops(plain.run)
    assert plain.ops == step_ops(model, batch=2)
    assert plain.ops == whole - sum(plain.started[name] for name in (*PRODUCTS, "attention"))
    paged.filled.begin({0: [1] * 8, 1: [1] * 8}).commit()
    assert paged.ops == count_ops(paged.run) - sum(paged.started[name] for name in PRODUCTS)
    assert {op.kernel for op in paged.work.operations()} >= {"paged attention", "gemm"}
    assert (paged.work.flops, paged.work.bytes) == (plain.work.flops, plain.work.bytes)


def test_a_cache_in_another_format_is_counted_in_it(model):
    cache = Int8Cache.for_model(model, 2, 40)
    model(torch.ones(2, 39, dtype=torch.long), cache)
    step = StepOf(model, "decode", 2, 40, cache, kv="int8")
    assert step.work.bytes == SHAPE.decode(2, 40, weights="fp32", kv="int8",
                                           activations="fp32").bytes
    assert set(step.parts(MACHINE, repeats=1).measured) == NAMES and cache.length == 40


# ---- rows ----


def test_a_row_says_seconds_by_each_account_and_the_rate_that_was_reached():
    parts = Parts({"down": 2.0}, {"down": 1.5}, {"down": 1.0}, {"down": Rate(5.0, 10.0, "B/s")},
                  whole_s=2.5, watching_s=0.1)
    assert list(parts) == [{"name": "down", "napkin_s": 1.0, "predicted_s": 1.5, "measured_s": 2.0,
                            "reached": 5.0, "bound": 10.0, "unit": "B/s"}]
    [other] = shares(parts, 5.0)
    assert (other["name"], other["measured_s"], 5.0 - other["measured_s"]) == ("down", 4.0, 1.0)
    assert (parts.rest_s, other["predicted_s"]) == (0.5, parts.predicted["down"])


def test_a_rate_is_of_what_limits_the_part(model, clock_of_ops):
    step = StepOf(model, "prefill", 1, 50)
    rows = {row["name"]: row for row in step.parts(MACHINE, repeats=1)}
    flops, bytes = 2 * 50 * 96 * 320 * 2, 2 * 4 * (96 * 320 + 50 * (96 + 320))     # of two layers
    assert flops / 1e10 > bytes / 1e9
    assert rows["gate_up"]["reached"] == pytest.approx(flops / rows["gate_up"]["measured_s"])
    assert (rows["gate_up"]["bound"], rows["gate_up"]["unit"]) == (1e10, "FLOP/s")
    assert rows["head"]["unit"] == "B/s" and rows["head"]["bound"] == 1e9
    assert rows["element-wise"]["reached"] is None                     # it took no time at all
    assert (rows["launches"]["bound"], rows["launches"]["unit"]) == (1e6, "launches/s")
    assert rows["launches"]["reached"] == pytest.approx(1 / TICK)


# ---- refused ----


@pytest.mark.parametrize("arguments, named", [
    (("train", 1, 9), "phase='train'"), (("decode", 0, 9), "batch=0"),
    (("decode", 1, 0), "context=0"), (("prefill", 1, 65), "context=65: the model's context is 64"),
])
def test_a_step_that_there_is_not_is_refused_by_name(model, arguments, named):
    with pytest.raises(ValueError, match=named):
        StepOf(model, *arguments)


def test_a_step_without_clocks_is_refused_before_it_runs(model, monkeypatch):
    experts = StepOf(decoder_with_experts(ModelConfig(SHAPE), MoE(4, 2)), "decode", 1, 9)
    monkeypatch.setattr(experts.model, "forward", None)
    with pytest.raises(ValueError, match="model: its products are head, out, qkv, router; only"):
        experts.parts(MACHINE)
    recorded = StepOf(model, "decode", 1, 9)
    monkeypatch.setattr(model, "runner", RecordedSteps(None))
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ValueError, match="model: its decode steps are replayed as one recording"):
        recorded.parts(MACHINE)
