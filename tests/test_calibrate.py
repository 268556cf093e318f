"""The calibration as a file: what is kept, what is refused, and a whole run of it with less
patience."""

import json
from functools import partial

import pytest

from clawdemy_infer import timing
from clawdemy_infer.arithmetic import Work
from clawdemy_infer.fast import FLOATS, FORMATS, computes_in
from clawdemy_infer.machine import calibrate, probes, probes_attention
from clawdemy_infer.machine.calibrate import Pulse, from_record, kept_record, this_machine
from clawdemy_infer.timing import Timing

RECORD = {
    "name": "a test machine",
    "bandwidth": [{"bytes": 2**20, "bytes_per_s": 5e10}, {"bytes": 2**30, "bytes_per_s": 1e10}],
    "peak_flops": {"fp32": 2e11, "bf16": 4e11},
    "gemm": [{"dtype": "fp32", "m": 1, "flops_per_s": 4e9},
             {"dtype": "bf16", "m": 1, "flops_per_s": 7e9},
             {"dtype": "fp32", "m": 1024, "flops_per_s": 1.5e11}],
    "attention": [{"dtype": "fp32", "m": 3, "flops_per_s": 6e9}],
    "elementwise": [{"dtype": "fp32", "m": 1, "bytes_per_s": 8e9}],
    "fixed_s_per_op": 4e-6, "memory": 8 * 2**30,
    "date": "2026-01-02T03:04:05+00:00", "versions": {"python": "3.11", "torch": "2.13.0"},
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAWDEMY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def keep(cache, **changes):
    """Write a calibration as an earlier run would have left it."""
    cache.mkdir(exist_ok=True)
    record = RECORD | {"fingerprint": calibrate.fingerprint("cpu")} | changes
    (cache / "calibration-cpu.json").write_text(json.dumps(record))
    return record


# ---- the record and the machine ----


def test_a_record_becomes_the_machine_that_it_describes():
    machine = from_record(json.loads(json.dumps(RECORD)))
    assert (machine.name, machine.memory) == ("a test machine", 8 * 2**30)
    assert machine.fixed_s_per_op == 4e-6
    assert machine.bandwidth == ((2**20, 5e10), (2**30, 1e10))
    assert machine.bandwidth_at() == 1e10 and machine.bandwidth_at(1000) == 5e10
    assert machine.peak("bf16") == 4e11
    assert machine.rates == {
        "gemm": {"fp32": ((1, 4e9), (1024, 1.5e11)), "bf16": ((1, 7e9), )},
        "attention": {"fp32": ((3, 6e9), )}
    }
    assert "2026-01-02" in machine.source
    # Predictions come from it: 4e9 FLOPs at M = 1 take a second, ten operations 40 µs.
    assert machine.time(Work(4e9, 1, kernel="gemm", rows=1),
                        ops=10).seconds == pytest.approx(1 + 40e-6)


def test_a_kept_calibration_is_found_again(cache):
    assert kept_record("cpu") is None
    record = keep(cache)
    assert kept_record("cpu") == record


@pytest.mark.parametrize("changed", ["device", "system", "torch"])
def test_a_calibration_of_another_machine_is_not_used(cache, changed):
    keep(cache, fingerprint=calibrate.fingerprint("cpu") | {changed: "another"})
    assert kept_record("cpu") is None


def test_a_calibration_is_of_so_many_threads(cache, monkeypatch):
    keep(cache)
    monkeypatch.setattr(calibrate.torch, "get_num_threads", lambda: 77)
    assert kept_record("cpu") is None


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_torn_calibration_counts_as_none(cache, share):
    keep(cache)
    file = cache / "calibration-cpu.json"
    whole = file.read_text()
    file.write_text(whole[:int(len(whole) * share)])
    assert kept_record("cpu") is None


def test_the_cuda_calibration_is_another_file(cache, monkeypatch):
    keep(cache)
    monkeypatch.setattr(calibrate, "fingerprint", lambda device: {"device": device})
    assert kept_record("cuda") is None


# ---- is it still true? ----


@pytest.mark.parametrize("now, used", [(1.0e10, True), (1.18e10, True), (0.82e10, True),
                                       (0.78e10, False), (1.22e10, False)])
def test_a_kept_calibration_is_used_only_while_memory_is_as_fast_as_it_was(
        cache, monkeypatch, now, used):
    keep(cache)
    asked = []
    monkeypatch.setattr(probes, "read_bandwidth",
                        lambda sizes, *_, **__: asked.append(sizes) or [(sizes[0], now)])
    monkeypatch.setattr(calibrate, "pulse_now", lambda machine, rows, device: 1.0)
    monkeypatch.setattr(calibrate, "calibrate", lambda device: "measured afresh")
    machine = this_machine("cpu")
    assert asked == [[2**30]]  # main memory, and not a cache
    assert (machine.name == "a test machine") if used else (machine == "measured afresh")


def test_without_a_kept_calibration_the_machine_is_measured(cache, monkeypatch):
    monkeypatch.setattr(calibrate, "calibrate", lambda device: f"measured on {device}")
    assert this_machine("cpu") == "measured on cpu"


# ---- a whole run, with less patience ----


def quick(steps, *_, **__):
    return timing.rates(steps, sample_s=1e-4, rounds=1)


@pytest.fixture
def small(cache, monkeypatch):
    """Every probe, on less data and without repeats. The figures mean nothing; that they are there
    and positive does."""
    for room in (probes, probes_attention):
        monkeypatch.setattr(room, "rates", quick)
        monkeypatch.setattr(room, "alternate",
                            lambda works, **_: timing.alternate(works, repeats=1))
    monkeypatch.setattr(calibrate, "rates", quick)
    whole = probes.gemm_weights

    def few(format, device, numbers=2**14, shapes=((64, 64), (64, 96), (96, 64))):
        return whole(format, device, numbers, shapes)
    monkeypatch.setattr(probes, "gemm_weights", few)
    monkeypatch.setattr(probes, "RING_NUMBERS", 2**14)
    monkeypatch.setattr(probes, "GEMM_ROWS", [1, 3])
    monkeypatch.setattr(probes, "SMALL_ROWS", [1, 2])
    monkeypatch.setattr(probes, "HEAD_ROWS", [1, 2])
    monkeypatch.setattr(probes, "SHAPES", [(64, 64), (64, 96), (96, 64)])
    monkeypatch.setattr(probes, "SMALL_SHAPES", [(32, 32)])
    monkeypatch.setattr(probes, "HEAD_SHAPES", [(64, 1024)])
    monkeypatch.setattr(probes, "PEAK_ROWS", {"cpu": 64})
    monkeypatch.setattr(probes_attention, "DECODE_ROWS", [2])
    monkeypatch.setattr(probes_attention, "PREFILL_ROWS", [34])
    monkeypatch.setattr(probes_attention, "ATTENTION_KEYS", (5, 9, 17))
    monkeypatch.setattr(probes_attention, "PAGED_ROWS", [2, 34])
    monkeypatch.setattr(probes_attention, "RING_KEYS", 2**14)
    monkeypatch.setattr(probes_attention, "paged_rates",
                        partial(probes_attention.paged_rates, keys=20))
    monkeypatch.setattr(probes, "ELEMENTWISE_ROWS", [2, 5])
    monkeypatch.setattr(calibrate, "PASSES", 2)
    monkeypatch.setattr(probes, "GLUE_LAYERS", 1)
    monkeypatch.setattr(calibrate, "WORKING_SETS", [2**14, 2**18])
    return cache


def test_a_calibration_measures_everything_keeps_it_and_predicts(small):
    machine = calibrate.calibrate("cpu")
    record = kept_record("cpu")
    assert from_record(record) == machine
    assert [point["bytes"] for point in record["bandwidth"]] == [2**14, 2**18]
    for kind, dtypes, rows in (("gemm", FORMATS, (1, 3)), ("head", FORMATS, (1, 2)),
                               ("attention", ("fp32", "bf16"), (2, 34))):
        probed = {(point["dtype"], point["m"]) for point in record[kind]}
        assert probed == {(dtype, m) for dtype in dtypes for m in rows}, kind
    figures = [point["bytes_per_s"] for point in record["bandwidth"]]
    figures += [point["flops_per_s"] for point in record["gemm"] + record["attention"]]
    figures += record["peak_flops"].values()
    assert min(figures) > 0 and record["fixed_s_per_op"] >= 0 and record["memory"] > 2**28
    for dtype in FORMATS:  # nothing measured is faster than the peak
        assert record["peak_flops"][dtype] >= max(
            point["flops_per_s"] for point in record["gemm"] if point["dtype"] == dtype)
    assert machine.time(Work(1e6, 1e6, kernel="gemm", dtype="bf16", rows=2), ops=3).seconds > 0
    files = {file.name for file in small.iterdir()}
    # No half-written one beside it. The products in C++ are compiled once a process, and so perhaps
    # elsewhere.
    assert files - {"cpp"} == {"calibration-cpu.json"}


def test_a_calibration_that_is_interrupted_leaves_the_kept_one_as_it_was(small, monkeypatch):
    kept = keep(small)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(probes, "fixed_cost", interrupted)           # the last of the probes
    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate("cpu")
    assert kept_record("cpu") == kept


def test_the_pulse_is_the_probes_rate_now_over_its_rate_then(small, monkeypatch):
    pulse = Pulse(from_record(RECORD), "fp32", rows=1, device="cpu")
    monkeypatch.setattr(calibrate, "rates", lambda steps, **_: {name: 3e9 for name in steps})
    pulse.sample()
    assert pulse.speed == pytest.approx(3e9 / 4e9)


def test_the_pulse_is_taken_around_every_run_and_never_in_it(small, monkeypatch):
    events = []
    pulse = Pulse(from_record(RECORD), "fp32", rows=1, device="cpu")

    def rates(steps, **_):
        events.append("pulse")
        return dict.fromkeys(steps, 1e9)

    monkeypatch.setattr(calibrate, "rates", rates)
    timed = pulse.stopwatch(lambda: events.append("run"), repeats=2)
    assert events == ["run", "pulse", "run", "pulse", "run", "pulse"]   # the first run is warm-up
    assert len(timed.seconds) == 2 and len(pulse.samples) == 3


@pytest.mark.parametrize("scale", [1, 7])
def test_a_burst_is_put_beside_the_runs_that_it_slowed(small, monkeypatch, scale):
    """Runs of 1, 1, 4, 4, 4 seconds by a machine that falls to a quarter of its speed: a steady
    second each at full speed. How long a run takes does not matter: seven times as long, and the
    speed is the same."""
    rates_seen = iter([4e9, 4e9, 4e9, 1e9, 1e9, 1e9])
    lengths = iter([scale * length for length in (1.0, 1.0, 1.0, 4.0, 4.0, 4.0)])
    monkeypatch.setattr(calibrate, "rates",
                        lambda steps, **_: {name: next(rates_seen) for name in steps})
    monkeypatch.setattr(calibrate, "stopwatch", lambda work, **_: Timing((next(lengths),)))
    pulse = Pulse(from_record(RECORD), "fp32", rows=1, device="cpu")
    timed = pulse.stopwatch(lambda: None, repeats=5)
    assert timed.median == 4.0 * scale
    assert pulse.speed == pytest.approx(1 / 4)  # the median of all six pulses would be 5/8


@pytest.mark.parametrize("slow_at, used", [(None, True), (1, False), (256, False)])
def test_a_kept_calibration_is_used_only_while_products_run_as_fast_as_they_did(
        cache, monkeypatch, slow_at, used):
    keep(cache)
    monkeypatch.setattr(probes, "read_bandwidth", lambda sizes, *_, **__: [(sizes[0], 1e10)])
    monkeypatch.setattr(calibrate, "pulse_now",
                        lambda machine, rows, device: 0.5 if rows == slow_at else 1.1)
    monkeypatch.setattr(calibrate, "calibrate", lambda device: "measured afresh")
    assert (this_machine("cpu") != "measured afresh") == used


# ---- the probes count what they do ----


@pytest.mark.parametrize("format", FORMATS)
def test_the_gemm_probe_counts_its_flops(format):
    weights = probes.gemm_weights(format, "cpu", numbers=2**20)
    assert {(w.in_features, w.out_features) for w in weights} == set(probes.SHAPES)
    dtype = FLOATS[computes_in(format, "cpu")]
    assert probes.gemm_step(weights, 3, dtype)(5) == 2 * 3 * sum(k * n for k, n in probes.SHAPES)


def test_the_gemm_probe_has_as_many_numbers_as_were_asked_for():
    """Or a little less, since all shapes come equally often: enough to be asked for more than a
    cache keeps."""
    size = sum(
        w.in_features*w.out_features for w in probes.gemm_weights("bf16", "cpu", numbers=2**25))
    assert 0.85 * 2**25 < size <= 2**25
