"""The calibration as a file: what is kept, what is refused, and a whole run of it with less
patience."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clawdemy_infer.arithmetic import Work
from clawdemy_infer.arithmetic.work import BYTES
from clawdemy_infer.cli import calibrate as calibrate_command
from clawdemy_infer.envelope.roofline import Part, Prediction
from clawdemy_infer.fast import FLOATS, FORMATS, computes_in
from clawdemy_infer.machine import calibrate, present, probes, probes_attention
from clawdemy_infer.machine.calibrate import from_record, kept_record, this_machine
from clawdemy_infer.machine.calibrated import Speeds
from clawdemy_infer.machine.present import widened
from clawdemy_infer.machine.probes import Probe

RECORD = {
    "name": "a test machine", "device": "cpu",
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
    with pytest.warns(UserWarning, match="calibration-cpu.json is damaged and counts as absent"):
        assert kept_record("cpu") is None


ANY_JSON = st.recursive(
    st.sampled_from([None, True, 0, -1, 5, 0.0, 1e-320, 1e300, 10**400, "", "x", "fp32", [], {}])
    | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["", "m", "dtype", "name", "bytes", "fp32", "flops_per_s", "x"]), inner,
        max_size=3), max_leaves=6)


def used(record):
    """All that the package does with a kept record."""
    made = from_record(record)
    for machine in (made, made.at(Speeds(0.5, 2.0, 1.0))):
        for kernel in ("gemm", "attention", "elementwise", calibrate.SMALL_GEMM):
            assert machine.time(Work(4e9, 100, kernel=kernel, rows=7), ops=10).seconds > 0
        assert machine.bandwidth_at() > 0 and present.drift(machine) is not None
    assert not present.speeds_now(machine) or not {*present.REFERENCES} <= {*machine.reference}
    calibrate_command.curve(record | {"gemm": record.get("gemm", [])}, "gemm", "rows")
    json.dumps(record, allow_nan=False)
    return True


@given(ANY_JSON | st.binary(max_size=40))
@settings(max_examples=200, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_lies_in_place_of_a_calibration_is_no_calibration(cache, content):
    cache.mkdir(exist_ok=True)
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (cache / "calibration-cpu.json").write_bytes(data)
    with pytest.warns(UserWarning, match="calibration-cpu.json is damaged"):
        assert kept_record("cpu") is None


@given(st.lists(st.sampled_from([*RECORD, "fixed", "threads", "reference", "spreads", "waited",
                                 "head"]), min_size=1, max_size=2, unique=True),
       st.data())
@settings(max_examples=300, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture,
                                 HealthCheck.too_slow])
def test_a_calibration_with_other_values_is_whole_or_absent(cache, names, data):
    """Whatever a field is replaced by, or an element of its list: what is taken can be used."""
    changed = {}
    for name in names:
        value, replaced = RECORD.get(name, {}), data.draw(ANY_JSON)
        if isinstance(value, list) and data.draw(st.booleans()):
            replaced = [*value, value[0] | {data.draw(st.sampled_from([*value[0], "name",
                                                                       "spread"])): replaced}]
        changed[name] = replaced
    keep(cache, **changed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        record = kept_record("cpu")
    assert [len(said), record] == [1, None] or (not said and used(record))


@pytest.mark.parametrize("name", [name for name in RECORD if name != "versions"])
@pytest.mark.parametrize("value", ["absent", None, 5, [], {}, "x", [None], {"": None}, math.nan])
def test_a_field_of_another_kind_makes_a_calibration_absent_or_is_as_good(cache, name, value):
    keep(cache, **{name: value})
    if value == "absent":
        file = cache / "calibration-cpu.json"
        record = json.loads(file.read_text())
        del record[name]
        file.write_text(json.dumps(record))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        record = kept_record("cpu")
    assert [len(said), record] == [1, None] or (not said and used(record))
    if name in ("bandwidth", "peak_flops", "memory", "fixed_s_per_op"):
        assert (record is None) is (value != 5 or name in ("bandwidth", "peak_flops"))


def test_a_folder_or_a_pipe_in_place_of_a_calibration_is_named_and_not_waited_for(cache):
    (cache / "calibration-cpu.json").mkdir(parents=True)
    with pytest.warns(UserWarning, match="calibration-cpu.json is damaged"):
        assert kept_record("cpu") is None
    (cache / "calibration-cpu.json").rmdir()
    os.mkfifo(cache / "calibration-cpu.json")
    with pytest.warns(UserWarning, match="calibration-cpu.json is damaged"):
        assert kept_record("cpu") is None


def test_the_cuda_calibration_is_another_file(cache, monkeypatch):
    keep(cache)
    monkeypatch.setattr(calibrate, "fingerprint", lambda device: {"device": device})
    assert kept_record("cuda") is None


# ---- is it still true? ----


@pytest.fixture
def at_speed(cache, monkeypatch):
    """A kept calibration, and a machine whose memory now has the speed that the test says."""
    def keep_and_set(memory):
        keep(cache, reference={"memory": 1e10, "compute": 1e11, "launches": 1e5})
        monkeypatch.setattr(present, "reference_probes", lambda device: (
            lambda: memory * 1e10, lambda: 1e11, lambda: 1e5))
    return keep_and_set


def not_again(*_, **__):
    raise AssertionError("the machine was measured again, unasked")


@pytest.mark.parametrize("memory", [0.3, 0.78, 1.0, 1.22, 3.0])
def test_a_kept_calibration_is_never_made_again_unasked(at_speed, monkeypatch, memory):
    at_speed(memory)
    monkeypatch.setattr(calibrate, "sampled", not_again)
    assert this_machine("cpu").name == "a test machine"


@pytest.mark.parametrize("memory, says", [(0.85, False), (1.0, False), (0.8, True), (1.3, True)])
def test_a_machine_that_has_drifted_says_so_in_one_line_and_how_to_renew(
        at_speed, capsys, memory, says):
    at_speed(memory)
    this_machine("cpu")
    said = capsys.readouterr().out
    assert said.count("\n") == says
    assert (f"reads memory at {memory:.0%}" in said and "clawdemy-infer calibrate" in said) == says


def test_predictions_are_made_for_the_speed_of_the_moment(at_speed):
    at_speed(0.5)
    machine = this_machine("cpu")
    assert machine.now == Speeds(0.5, 1.0, 1.0)
    assert machine.bandwidth_at() == 0.5e10 and machine.peak("fp32") == 2e11
    one_row, many = (machine.flops_at(Work(1, 1, kernel="gemm", weights="fp32", rows=rows))
                     for rows in (1, 1024))
    assert (one_row, many) == (pytest.approx(0.5 * 4e9), pytest.approx(1.5e11))


def test_another_format_is_measured_when_it_is_first_asked_for_and_kept(at_speed, monkeypatch):
    at_speed(0.5)                                       # half as fast as when it was calibrated
    asked = []

    def found(wanted, deadline, what):
        asked.append(what)
        return {("peak", "int8", 64): (3e11, 0.1), ("gemm", "int8", 1): (8e9, 0.1),
                ("launches", "int8", 1): (5e-6, 0.1)}
    monkeypatch.setattr(calibrate, "sampled", found)
    monkeypatch.setattr(calibrate, "of_formats", lambda formats, device: [])
    for _ in range(2):
        machine = this_machine("cpu", formats=("fp32", "int8"))
    assert asked == ["calibrating int8"]
    # Measured at half the speed, so at full speed it is twice that; today it is half of it again.
    rates = from_record(kept_record("cpu")).rates["gemm"]
    assert rates["int8"] == ((1, pytest.approx(1.6e10)), )
    assert rates["fp32"] == from_record(RECORD).rates["gemm"]["fp32"]
    assert machine.rates["gemm"]["int8"] == ((1, pytest.approx(8e9)), )


def test_compiling_for_another_format_leaves_its_curves_their_time(at_speed, monkeypatch):
    """Its first product waits for the compiler; the seconds of the samples begin after it."""
    at_speed(1.0)
    clock = itertools.count(1e-3, 1e-3)                 # a millisecond for every look
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: next(clock) + 60 * len(compiled))
    compiled, left = [], []
    monkeypatch.setattr(calibrate, "of_formats", lambda formats, device: (
        compiled.extend(formats), [])[1])
    monkeypatch.setattr(calibrate, "sampled", lambda wanted, deadline, what: (
        left.append(deadline - time.perf_counter()), {("gemm", "int8", 1): (8e9, 0.1),
                                           ("launches", "int8", 1): (5e-6, 0.1)})[1])
    calibrate.calibrate_formats(kept_record("cpu"), ["int8"], "cpu")
    assert left == [pytest.approx(calibrate.FORMAT_BUDGET_S, abs=0.1)] and compiled == ["int8"]


@pytest.mark.parametrize("rows", [1, 31, 32, 100, 255, 256, 4096])
def test_what_is_measured_at_todays_speed_is_predicted_for_it(at_speed, monkeypatch, rows):
    """Kept for the speed of the calibration and scaled to today's, a figure is what was found."""
    at_speed(0.5)
    monkeypatch.setattr(calibrate, "of_formats", lambda formats, device: [])
    monkeypatch.setattr(calibrate, "sampled", lambda wanted, deadline, what: {
        ("peak", "int8", 64): (3e11, 0.1), ("gemm", "int8", rows): (8e9, 0.1),
        ("launches", "int8", 1): (5e-6, 0.1)})
    machine = this_machine("cpu", formats=("int8", ))
    assert machine.rates["gemm"]["int8"] == ((rows, pytest.approx(8e9)), )
    assert machine.fixed["int8"] == pytest.approx(5e-6)


def test_a_format_without_a_kernel_is_refused_before_anything_is_measured(cache, monkeypatch):
    monkeypatch.setattr(calibrate, "calibrate", not_again)
    with pytest.raises(ValueError, match="weights='int5'"):
        this_machine("cpu", formats=("int5", ))


# ---- intervals ----


def test_an_interval_holds_what_the_speeds_around_the_run_would_have_made_of_it():
    machine = from_record(RECORD | {"spreads": {}})
    parts = {"qkv": Part(2.0, 0.1, "memory"), "launches": Part(1.0, 0.1, "launches")}
    prediction = Prediction(parts, 0.0, 2.0)
    assert (prediction.low_s, prediction.high_s) == (pytest.approx(3 / 1.1), pytest.approx(3.3))
    same = widened(prediction, machine, (Speeds(), Speeds()))
    assert same == pytest.approx((3 / 1.1, 3.3))
    slower = widened(prediction, machine, (Speeds(), Speeds(memory=0.5)))
    assert slower == pytest.approx((3 / 1.1, 1.1 * (2 / 0.5 + 1)))
    faster = widened(prediction, machine, (Speeds(launches=2.0), Speeds()))
    assert faster == pytest.approx(((2 + 0.5) / 1.1, 3.3))


def test_waiting_for_a_core_widens_an_interval_and_moves_nothing():
    calm = from_record(RECORD)
    work = Work(1e9, 1e6, kernel="gemm", weights="fp32", rows=1)
    one, other = calm.time(work), calm.at(Speeds(waited=0.5)).time(work)
    assert other.seconds == one.seconds and other.spread > one.spread + 0.1
    around = (Speeds(), Speeds(waited=0.5))
    assert widened(one, calm, around) == pytest.approx((other.low_s, other.high_s))


TWO_THREADS_ON_ONE_CORE = """
import hashlib, os, threading
from clawdemy_infer.machine.present import waiting
def work():
    for _ in range(40):
        hashlib.sha256(bytes(4_000_000)).digest()
threads = [threading.Thread(target=work) for _ in range(2)]
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
waited = waiting()
for thread in threads: thread.start()
while any(thread.is_alive() for thread in threads):
    threads[0].join(0.05)
    share = waited()
    if share > 0.2: break
print(share)
"""


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="only Linux counts waiting")
def test_two_threads_on_one_core_wait_for_it():
    run = subprocess.run([sys.executable, "-c", TWO_THREADS_ON_ONE_CORE], text=True,
                         capture_output=True, check=True)
    assert 0.2 < float(run.stdout) <= 1


def test_a_machine_at_other_speeds_and_back_is_the_same(at_speed):
    machine = from_record(RECORD)
    there = machine.at(Speeds(0.5, 2.0, 0.25))
    assert there.fixed_s_per_op == pytest.approx(4 * machine.fixed_s_per_op)
    back = there.at(Speeds())
    assert back.bandwidth == machine.bandwidth and back.peak_flops == machine.peak_flops
    assert back.rates == machine.rates and back.fixed_s_per_op == machine.fixed_s_per_op


def test_the_stopwatch_looks_at_the_machine_before_and_after_and_never_within(monkeypatch):
    events = []
    monkeypatch.setattr(present, "speeds_now", lambda machine: events.append("look") or Speeds())
    timed = present.bracketed(from_record(RECORD))(lambda: events.append("run"), repeats=2)
    assert events == ["look", "run", "run", "run", "look"]              # the first run is warm-up
    assert len(timed.seconds) == 2 and timed.around == (Speeds(), Speeds())


def test_several_works_in_turn_stand_between_two_looks(monkeypatch):
    events = []
    monkeypatch.setattr(present, "speeds_now", lambda machine: events.append("look") or Speeds())
    timed = present.bracketed(from_record(RECORD))(
        {name: lambda name=name: events.append(name) for name in "AB"}, repeats=2)
    assert "".join(events) == "lookABABABlook"
    assert [(len(timed[name].seconds), timed[name].around) for name in "AB"] == [
        (2, (Speeds(), Speeds()))] * 2


# ---- sampling ----


def probe_at(clock, kind, at, seconds, value=1.0):
    def sample():
        clock[0] += seconds
        return value
    return Probe(kind, "fp32", at, sample)


@pytest.fixture
def clock(monkeypatch):
    time = [0.0]
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: time[0])
    return time


@pytest.mark.parametrize("slower, rounds", [(1, 11), (4, 2), (1000, 1)])
def test_on_a_busy_machine_there_are_fewer_samples_and_never_more_time(clock, slower, rounds):
    """Twenty probes of 0.1 s: in 25 s there are eleven rounds; where each takes 0.4 s, the two that
    are enough; and where none would fit, the first point of each curve, warm, and the last."""
    done = []

    def counted(probe):
        return probe._replace(sample=lambda: done.append(probe.at) or probe.sample())
    wanted = [counted(probe_at(clock, kind, at, 0.1 * slower))
              for kind in ("gemm", "head") for at in range(10)]
    found = calibrate.sampled(wanted, deadline=25.0, what="test")
    assert clock[0] <= max(25.0, 6 * 0.1 * slower) + 0.1 * slower
    assert rounds <= done.count(9) // 2 <= rounds + 1       # before that of 0 there is a cold one
    assert {where[2] for where in found} == (set(range(10)) if slower < 1000 else {0, 9})


def test_short_samples_get_the_time_that_long_ones_do_not_need(clock):
    """In 10 s: one of 2 s a sample, twice each after a cold one, and one of 0.1 s for the rest."""
    done = []

    def counted(probe):
        return probe._replace(sample=lambda: done.append(probe.kind) or probe.sample())
    wanted = [counted(probe_at(clock, "peak", 1, 2.0)), counted(probe_at(clock, "gemm", 1, 0.1))]
    calibrate.sampled(wanted, deadline=10.0, what="test")
    assert done.count("peak") == 4 and done.count("gemm") == pytest.approx(20, abs=2)
    assert clock[0] == pytest.approx(10.0, abs=0.2)


def test_a_figure_sampled_once_has_a_wide_spread_and_the_cold_sample_does_not_count(clock):
    def found(deadline):
        clock[0], values = 0.0, iter([1.0, 100.0, 1.0, 110.0, 1.0, 90.0])
        probe = Probe("peak", "fp32", 1,
                      lambda: clock.__setitem__(0, clock[0] + 0.1) or next(values))
        return calibrate.sampled([probe], deadline, what="test")["peak", "fp32", 1]
    assert found(deadline=0.05) == (100.0, calibrate.ONE_SAMPLE_SPREAD)
    assert found(deadline=0.6) == (100.0, pytest.approx(0.05))


def test_half_of_the_samples_are_within_their_spread_and_outliers_do_not_count():
    values = [10.0, 0.0, 8.0, 9.0, 11.0, 12.0, 10.0, 99.0, 1000.0]
    assert calibrate.spread(values) == pytest.approx((12 - 9) / 2 / 10)


# ---- a whole run, with less patience ----


@pytest.fixture
def small(cache, monkeypatch):
    """Every probe, on less data. The figures mean nothing; that they are there and positive
    does."""
    monkeypatch.setattr(probes, "SAMPLE_S", 1e-4)
    monkeypatch.setattr(probes, "RING_BYTES", 2**16)
    monkeypatch.setattr(probes, "largest_cache", lambda: 0)
    monkeypatch.setattr(probes, "GEMM_ROWS", [1, 3])
    monkeypatch.setattr(probes, "SMALL_ROWS", [1, 2])
    monkeypatch.setattr(probes, "HEAD_ROWS", [1, 2])
    monkeypatch.setattr(probes, "SHAPES", [(64, 64), (64, 96), (96, 64)])
    monkeypatch.setattr(probes, "SMALL_SHAPES", [(32, 32)])
    monkeypatch.setattr(probes, "HEAD_SHAPES", [(64, 1024)])
    monkeypatch.setattr(probes, "PEAK_ROWS", {"cpu": 64})
    monkeypatch.setattr(probes, "ELEMENTWISE_ROWS", [2, 5])
    monkeypatch.setattr(probes, "GLUE_LAYERS", 1)
    monkeypatch.setattr(probes_attention, "DECODE_ROWS", [2])
    monkeypatch.setattr(probes_attention, "PREFILL_ROWS", [34])
    monkeypatch.setattr(probes_attention, "ATTENTION_KEYS", (5, 9, 17))
    monkeypatch.setattr(probes_attention, "PAGED_ROWS", [2, 34])
    monkeypatch.setattr(probes_attention, "PAGED_KEYS", 20)
    monkeypatch.setattr(probes_attention, "RING_KEYS", 2**14)
    monkeypatch.setattr(calibrate, "WORKING_SETS", [2**14, 2**18])
    # Two samples of each, however long they take: the budget has tests of its own.
    monkeypatch.setattr(calibrate, "sampled", lambda wanted, deadline, what: {
        probe[:3]: (max(probe.sample(), probe.sample()), 0.1) for probe in wanted})
    present.reference_probes.cache_clear()
    yield cache
    present.reference_probes.cache_clear()


def test_the_present_is_read_from_memory_however_large_the_caches_are(small, monkeypatch):
    """A calibration reads other things in between, and its caches hold nothing of the weights."""
    rings, made = [], probes.gemm_weights
    monkeypatch.setattr(probes, "largest_cache", lambda: 2**17)
    monkeypatch.setattr(probes, "gemm_weights", lambda format, device, ring_bytes: (
        rings.append(ring_bytes), made(format, device, ring_bytes))[1])
    present.reference_probes("cpu")
    assert rings == [2**18]


def test_a_calibration_measures_everything_keeps_it_and_predicts(small):
    machine = calibrate.calibrate("cpu")
    record = kept_record("cpu")
    assert from_record(record) == machine
    assert [point["bytes"] for point in record["bandwidth"]] == [2**14, 2**18]
    for kind, rows in (("gemm", (1, 3)), ("head", (1, 2)), ("attention", (2, 34))):
        probed = {(point["dtype"], point["m"]) for point in record[kind]}
        assert probed == {(dtype, m) for dtype in ("fp32", "bf16") for m in rows}, kind
    points = [point for kind in ("bandwidth", "gemm", "head", "attention", "elementwise")
              for point in record[kind]]
    figures = [point.get("flops_per_s", point.get("bytes_per_s")) for point in points]
    figures += record["peak_flops"].values()
    assert min(figures) > 0 and record["fixed_s_per_op"] >= 0 and record["memory"] > 2**28
    assert all(point["spread"] >= 0 for point in points)
    for dtype in calibrate.FORMATS:                     # nothing measured is faster than the peak
        assert record["peak_flops"][dtype] >= max(
            point["flops_per_s"] for point in record["gemm"] if point["dtype"] == dtype)
    prediction = machine.time(Work(1e6, 1e6, "qkv", "bf16", "gemm", rows=2, weights="bf16"), ops=3)
    assert 0 < prediction.low_s < prediction.seconds < prediction.high_s
    assert list(prediction.parts) == ["qkv", "launches"]
    files = {file.name for file in small.iterdir()}
    # No half-written one beside it. The products in C++ are compiled once a process, and so perhaps
    # elsewhere.
    assert files - {"cpp"} == {"calibration-cpu.json"}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_can_be_asked_for(small, format):
    machine = this_machine("cpu", formats=(format, ))
    work = Work(1e6, 1e6, "qkv", computes_in(format, "cpu"), "gemm", rows=1, weights=format)
    assert machine.time(work).seconds > 0 and machine.peak(format) > 0


def test_a_calibration_that_is_interrupted_leaves_the_kept_one_as_it_was(small, monkeypatch):
    kept = keep(small)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(probes, "launch_probe", interrupted)         # the last of the probes
    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate("cpu")
    assert kept_record("cpu") == kept


def test_making_the_probes_gives_the_threads_back(monkeypatch):
    threads = calibrate.torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), calibrate.one_thread():
        assert calibrate.torch.get_num_threads() == 1
        raise KeyboardInterrupt
    assert calibrate.torch.get_num_threads() == threads


# ---- the probes count what they do ----


@pytest.mark.parametrize("format", FORMATS)
def test_the_gemm_probe_counts_its_flops(format):
    weights = probes.gemm_weights(format, "cpu", ring_bytes=2**20)
    assert {(w.in_features, w.out_features) for w in weights} == set(probes.SHAPES)
    dtype = FLOATS[computes_in(format, "cpu")]
    assert probes.gemm_step(weights, 3, dtype)(5) == 2 * 3 * sum(k * n for k, n in probes.SHAPES)


@pytest.mark.parametrize("format", FORMATS)
def test_the_gemm_probe_goes_through_more_memory_than_caches_hold(format):
    """Each weight has memory of its own, and together they have as many bytes as were asked for."""
    weights = probes.gemm_weights(format, "cpu", ring_bytes=2**25)
    numbers = sum(w.in_features * w.out_features for w in weights)
    assert 0.8 * 2**25 < numbers * BYTES[format] < 1.2 * 2**25
    kernels = [kernel for w in weights for _, kernel in w.kernels]     # one each; two with AMX
    assert len({data_of(kernel) for kernel in kernels}) == len(kernels) >= len(weights)


def data_of(kernel):
    """Address of the weight in a kernel: an object with tensors, or a function that closes over
    one."""
    values = vars(kernel).values() if vars(kernel) else [cell.cell_contents
                                                         for cell in kernel.__closure__]
    return next(value.data_ptr() for value in values if isinstance(value, torch.Tensor))


def test_a_rate_is_all_units_over_all_the_time_they_took(monkeypatch):
    """Pieces of 6 units in 0.25 s: a sample of at least 1 s has four of them, so 24 units in 1 s;
    no piece is done twice. A piece that is longer than the sample is still done once."""
    time, seen = [1000.0], []
    monkeypatch.setattr(probes, "now", lambda: time[0])

    def step(i):
        seen.append(i)
        time[0] += 0.25
        return 6

    sample = probes.rate_of(step, sample_s=1.0)
    assert [sample(), sample()] == [24, 24] and seen == list(range(8))
    assert probes.rate_of(step, sample_s=0.1)() == 24 and len(seen) == 9
