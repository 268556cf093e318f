"""The benchmark's counts and its rows, on a random model of a few thousand parameters. No time is
asserted."""

import math

import pytest
import torch

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.lesson import parts
from clawdemy_infer.lesson.steps import (
    filled_cache,
    random_tokens,
    step_ops,
    work_of,
)
from clawdemy_infer.machine.calibrated import Calibrated, Speeds
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.rigs import bench
from clawdemy_infer.rigs.bench import bounds, measure
from clawdemy_infer.timing import Timing

SHAPE = ModelShape("tiny", L=2, D=24, N=3, K=1, H=8, F=40, V=67, max_context=64)
MACHINE = Calibrated("m", ((1.0, 1e9), ), {"fp32": 1e10, "bf16": 3e10}, memory=1e6,
                  rates={"gemm": {"fp32": ((1, 1e9), (64, 5e9)),
                                  "bf16": ((1, 1e9), (64, 5e9))}}, fixed_s_per_op=1e-6)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(2)
    return Decoder(ModelConfig(SHAPE)).eval()


@pytest.fixture
def calm(monkeypatch):
    """A machine at half the speed that it was calibrated at, which falls to a quarter during the
    run; nothing is measured."""
    half, quarter = Speeds(0.5, 0.5, 0.5), Speeds(0.25, 0.25, 0.25)
    watched = []

    def bracketed(machine):
        def watch(work, repeats):
            work()
            watched.append(machine.now)
            return Timing((1.0, 2.0, 3.0), around=(half, quarter))
        return watch
    monkeypatch.setattr(bench, "at_present", lambda machine: machine.at(half))
    monkeypatch.setattr(parts, "bracketed", bracketed)
    return watched


# ---- the model on the stopwatch ----


def test_the_cache_holds_what_a_prefill_of_the_same_tokens_leaves(model, monkeypatch):
    """Filled in chunks, and by the real model: zeros would be attended to as well, but denormals
    and NaN cost other times."""
    cache = filled_cache(model, batch=2, tokens=13)
    assert (cache.length, cache.capacity, len(cache.lengths)) == (13, 14, 2)
    assert cache.keys[:, :, :, :13].isfinite().all() and cache.keys[:, :, :, :13].std() > 0
    assert filled_cache(model, 1, 0).length == 0


def test_a_long_cache_is_filled_in_chunks(model, monkeypatch):
    seen = []

    def forward(tokens, cache, last_only):
        seen.append(tokens.shape[1])
        cache.length += tokens.shape[1]

    monkeypatch.setattr(model, "forward", forward)
    assert filled_cache(model, 1, 1100).length == 1100
    assert seen == [512, 512, 76]


def test_a_timed_decode_step_is_the_context_th_token_each_time(model, monkeypatch):
    cache, steps = filled_cache(model, 2, 20), []
    real = model.forward

    def watched(tokens, cache, last_only):
        steps.append((tuple(tokens.shape), cache.length, last_only))
        return real(tokens, cache, last_only)

    monkeypatch.setattr(model, "forward", watched)
    step = parts.StepOf(model, "decode", 2, 15, cache)
    for _ in range(3):
        step.run()
    assert steps == [((2, 1), 14, True)] * 3


def test_a_timed_prefill_starts_from_an_empty_cache_each_time(model, monkeypatch):
    steps = []
    real = model.forward

    def watched(tokens, cache, last_only):
        steps.append((tuple(tokens.shape), cache.length, last_only))
        return real(tokens, cache, last_only)

    step = parts.StepOf(model, "prefill", 3, 11)
    monkeypatch.setattr(model, "forward", watched)
    assert len(step.time(MACHINE, repeats=2).seconds) == 2
    assert set(steps) == {((3, 11), 0, True)}


def test_random_tokens_are_in_the_vocabulary_and_the_same_each_time(model):
    tokens = random_tokens(model, 3, 50)
    assert tokens.shape == (3, 50) and 0 <= tokens.min() and tokens.max() < 67
    assert torch.equal(tokens, random_tokens(model, 3, 50))


def test_operations_depend_on_layers_and_not_on_the_length(model):
    deeper = Decoder(ModelConfig(ModelShape("deeper", L=5, D=24, N=3, K=1, H=8, F=40, V=67))).eval()
    per_layer = (step_ops(deeper) - step_ops(model)) / 3
    assert per_layer == int(per_layer) > 10
    assert step_ops(model, new=2) == step_ops(model, new=30)


# ---- the card ----


def test_the_card_counts_before_anything_runs_and_gives_no_time_to_what_does_not_fit():
    wanted = [("decode", "fp32", 1, 9), ("prefill", "bf16", 3, 21), ("decode", "fp32", 50, 60)]
    rows = bounds(SHAPE, MACHINE, 200_000, wanted)
    assert [(row["phase"], row["weights"], row["batch"], row["context"]) for row in rows] == wanted
    assert [row["fits"] for row in rows] == [True, True, False]
    # 8,107 parameters of 4 bytes, by hand: embedding and head 2·67·24; a layer 24·40 + 24·24 +
    # 24·80 + 40·24 + 48; the last norm 24.
    parameters = 2 * 67 * 24 + 2 * (24 * 40 + 24 * 24 + 24 * 80 + 40 * 24 + 48) + 24
    assert rows[0]["memory_bytes"] == 4 * parameters + 9 * 2 * 2 * 1 * 8 * 4
    assert rows[2]["napkin_s"] is None
    for row in rows[:2]:
        compute_s = row["flops"] / MACHINE.peak(row["weights"])
        assert row["napkin_s"] == pytest.approx(max(compute_s, row["bytes"] / 1e9))


def test_a_row_has_weights_cache_and_activations_in_one_dtype():
    for phase, new in (("prefill", 12), ("decode", 1)):
        fp32, bf16 = (work_of(SHAPE, phase, dtype, 2, 12) for dtype in ("fp32", "bf16"))
        assert fp32.bytes == 2 * bf16.bytes and fp32.flops == bf16.flops
        assert {op.dtype for op in bf16.operations()} == {"bf16"}
        assert fp32.flops == SHAPE.step(2, new, 12).flops


# ---- the rows ----


def test_every_row_of_the_card_is_measured_in_its_order(model, calm):
    wanted = [("prefill", "fp32", 2, 7), ("prefill", "fp32", 1, 30), ("decode", "fp32", 2, 1),
              ("decode", "fp32", 2, 19)]
    allowed = bounds(SHAPE, MACHINE, 1e6, wanted)
    rows = list(measure(model, MACHINE, allowed))
    assert [(row["phase"], row["weights"], row["batch"], row["context"]) for row in rows] == wanted
    assert calm == [Speeds(0.5, 0.5, 0.5)] * 4
    for row, before in zip(rows, allowed, strict=True):
        ops = (step_ops(model, 2) if row["phase"] == "prefill"
               else step_ops(model, batch=row["batch"]))
        work = work_of(SHAPE, row["phase"], "fp32", row["batch"], row["context"])
        assert row["napkin_s"] == before["napkin_s"]
        # At half the speed it takes twice as long.
        said = MACHINE.time(work, ops)
        assert row["predicted_s"] == pytest.approx(said.seconds / 0.5)
        # The interval holds what the machine would do at the speeds before and after the run.
        assert row["predicted_low_s"] == pytest.approx(said.low_s / 0.5)
        assert row["predicted_high_s"] == pytest.approx(said.high_s / 0.25)
        assert row["measured_s"] == 2.0 and row["spread"] == pytest.approx(0.5)
        assert row["ratio"] == pytest.approx(2.0 / row["predicted_s"])


def test_a_prediction_is_made_before_its_run(model, calm, monkeypatch):
    """Whatever the run takes, the prediction stays the same."""
    [first] = measure(model, MACHINE, bounds(SHAPE, MACHINE, 1e6, [("decode", "fp32", 1, 5)]))
    watch = parts.bracketed(MACHINE)
    monkeypatch.setattr(parts, "bracketed", lambda machine: lambda work, repeats: Timing(
        (77.0,), watch(work, repeats).around))
    [second] = measure(model, MACHINE, bounds(SHAPE, MACHINE, 1e6, [("decode", "fp32", 1, 5)]))
    assert (first["measured_s"], second["measured_s"]) == (2.0, 77.0)
    assert first["predicted_s"] == second["predicted_s"]
    assert (first["predicted_low_s"], first["predicted_high_s"]) == (
        second["predicted_low_s"], second["predicted_high_s"])


def test_a_row_in_json_has_the_fields_that_scripts_rely_on(model, calm):
    [row] = measure(model, MACHINE, bounds(SHAPE, MACHINE, 1e6, [("decode", "fp32", 3, 64)]))
    assert {"phase", "weights", "batch", "context", "napkin_s", "predicted_s", "predicted_low_s",
            "predicted_high_s", "measured_s", "spread"} <= row.keys()
    assert row["inside"] is False and row["measured_s"] == 2.0
    assert row["ratio"] == pytest.approx(2.0 / row["predicted_s"])
    assert row["fraction_of_bound"] == pytest.approx(row["napkin_s"] / 2.0)
    assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
