"""Workloads, traces and metrics: the published means, files that come back as they went, and
figures by hand."""

import json
import math
import os
import statistics
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawdemy_course.timeline import draw_gantt, spans
from clawdemy_infer.batching import Policy, Request, Sequence, State
from clawdemy_infer.batching.metrics import SLO, Report, StepRecord, e2e, percentiles, tpot, ttft
from clawdemy_infer.rigs.trace import load_trace, save_trace
from clawdemy_infer.rigs.workload import lognormal, uniform, workload

# ---- workloads ----

# means: Kwon et al. 2023, figure 11. Medians: Patel et al. 2024, section III (1,500 and 13; 1,020
# and 129)
PUBLISHED = {
    "sharegpt": ("mean", 161.31, 337.99), "alpaca": ("mean", 19.31, 58.45),
    "code": ("median", 1500, 13), "conversation": ("median", 1020, 129),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_lengths_have_the_published_mean_or_median(name):
    kind, prompt, output = PUBLISHED[name]
    of = {"mean": statistics.fmean, "median": statistics.median}[kind]
    requests = workload(name, requests=20_000, seed=11)
    assert of(request.prompt for request in requests) == pytest.approx(prompt, rel=0.04)
    assert of(request.max_tokens for request in requests) == pytest.approx(output, rel=0.04)
    assert all(request.prompt >= 1 and request.output_tokens == request.max_tokens >= 1
               for request in requests)


def test_a_cut_lognormal_keeps_its_mean():
    import random

    draw, source = lognormal(100, 1.5, 300), random.Random(0)
    drawn = [draw(source) for _ in range(40_000)]
    assert max(drawn) <= 300 and statistics.fmean(drawn) == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize("burstiness", [0.0, 1.0, 2.5])
def test_gaps_have_the_rate_and_the_variation_that_were_asked_for(burstiness):
    times = [
        request.arrival_s for request in workload(uniform(1, 1), uniform(1, 1), requests=40_000,
                                                  rate=4.0, burstiness=burstiness)
    ]
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert times[0] == 0 and statistics.fmean(gaps) == pytest.approx(0.25, rel=0.04)
    assert statistics.stdev(gaps)/statistics.fmean(gaps) == pytest.approx(
        burstiness, rel=0.05, abs=1e-6)


def test_the_same_seed_draws_the_same_requests_and_another_one_others():
    assert workload("alpaca", requests=9, rate=1.0, seed=5) == workload(
        "alpaca", requests=9, rate=1.0, seed=5)
    assert workload("alpaca", requests=9, rate=1.0, seed=5) != workload(
        "alpaca", requests=9, rate=1.0, seed=6)
    assert {request.arrival_s for request in workload("alpaca", requests=9)} == {0.0}


def test_most_caps_prompt_and_output_together():
    assert max(request.prompt + request.max_tokens
               for request in workload("code", requests=500, most=1024)) <= 1024


@pytest.mark.parametrize("arguments, named",
                         [({"prompt": "sharegtp"}, "accepted: sharegpt"),
                          ({"prompt": uniform(1, 2)}, "output"), ({"requests": 0}, "requests=0"),
                          ({"rate": 0.0}, "rate=0"), ({"burstiness": -1.0}, "burstiness=-1"),
                          *(({"burstiness": value}, "burstiness=.*0.001 to 1000")
                            for value in (math.nan, math.inf, 1e300, 1e-300)),
                          *(({"rate": value}, "rate=") for value in (math.nan, -1, 1e-9, 5e-324)),
                          *(({"requests": value}, "requests=.*1 to 1,000,000")
                            for value in (10**7, 10**400)), ])
def test_a_workload_that_makes_no_sense_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        workload(**{"prompt": "alpaca", "requests": 3} | arguments)


# ---- traces ----


def test_a_trace_comes_back_as_it_was_saved(tmp_path):
    requests = [
        *workload("alpaca", requests=3, rate=2.0),
        Request("text", "Ünïcode\nand lines", 7, 9.5, priority=2, stop=("\n", ".")),
        Request("ids", [4, 5, 6], 3, 10.0)
    ]
    save_trace(requests, tmp_path / "trace.jsonl")
    assert load_trace(tmp_path / "trace.jsonl") == requests


def test_a_trace_written_by_hand_is_read_in_the_order_of_arrival(tmp_path):
    path = tmp_path / "hand.jsonl"
    path.write_text('{"id": "b", "arrival_s": 2, "prompt_tokens": 9, "max_tokens": 4}\n\n'
                    '{"id": "a", "arrival_s": 0.5, "prompt": "Hi", "max_tokens": 4, '
                    '"output_tokens": 2, "stop": "."}\n')
    assert load_trace(path) == [Request("a", "Hi", 4, 0.5, 2, stop=(".",)), Request("b", 9, 4, 2)]


GOOD = {"id": 1, "arrival_s": 0, "prompt_tokens": 3, "max_tokens": 2}


@pytest.mark.parametrize("change, words", [({"max_tokens": 0}, "max_tokens=0"),
                                           ({"max_tokens": "many"}, "max_tokens='many'"),
                                           ({"arrival_s": -1}, "arrival_s=-1"),
                                           ({"arrival_s": "soon"}, "arrival_s='soon'"),
                                           ({"prompt_tokens": 2.5}, "prompt_tokens=2.5"),
                                           ({"prompt": "x"}, "exactly one"),
                                           ({"prompt_token": 3}, "prompt_token=3"),
                                           ({"id": [1]}, r"id=\[1\]"), ({"stop": [""]}, "stop="),
                                           ({"priority": "high"}, "priority='high'"),
                                           *(({"max_tokens": value}, "max_tokens=.*10,000,000")
                                             for value in (None, True, 2.0, -1, 10**30, 10**4000)),
                                           ({"output_tokens": 10**9}, "output_tokens=1000000000"),
                                           *(({"arrival_s": value}, "arrival_s=.*10,000,000")
                                             for value in (math.nan, math.inf, 1e300, 10**400, True,
                                                           None)),
                                           ({"prompt_tokens": 10**12}, "prompt_tokens=10000000000"),
                                           ({"prompt_tokens": -1}, "prompt_tokens=-1"),
                                           ({"prompt_tokens": [1, -1]}, r"prompt_tokens=\[1, -1\]"),
                                           ({"prompt_tokens": [2**31]}, r"prompt_tokens=\[214748"),
                                           ({"id": "x" * 201}, "id='xxx.*200 characters"),
                                           ({"id": 10**400}, "id=1000.*64 bits"),
                                           ({"id": "\ud800"}, r"id='\\ud800'"),
                                           ({"stop": ["\udfff"]}, "stop="),
                                           ({"y" * 10**6: 1}, "'yyy.*; accepted: the keys id"), ])
def test_a_wrong_line_is_named_with_its_number(tmp_path, change, words):
    path = tmp_path / "wrong.jsonl"
    path.write_text(json.dumps(GOOD | {"id": 0}) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(ValueError, match=f"line 2: .*{words}"):
        load_trace(path)


@pytest.mark.parametrize(
    "text, words",
    [("", "request is missing"), ("[1]", "an object"), ("{", "line 1"),
     ('{"id": 1}', "arrival_s is missing"),
     (json.dumps(GOOD) + "\n" + json.dumps(GOOD), "line 2: id=1 .*not there before"), ])
def test_a_file_that_is_no_trace_is_refused(tmp_path, text, words):
    path = tmp_path / "wrong.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_trace(path)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_lines_of_a_trace_end_at_lf_alone(tmp_path, character):
    line = json.dumps({"id": 1, "arrival_s": 0, "prompt": "X", "max_tokens": 2})
    (tmp_path / "trace.jsonl").write_bytes(
        b"\xef\xbb\xbf" + line.replace("X", f"a{character}b").encode() + b"\r\n\r\n"
        if character > "\x1f" else line.replace("X", json.dumps(character)[1:-1]).encode())
    [found] = load_trace(tmp_path / "trace.jsonl")
    assert found.prompt == (f"a{character}b" if character > "\x1f" else character)


@pytest.mark.parametrize("text", [b'{"a":' * 30_000, b"[" * 10**5, b"\xff\xfe", b'{"id": "\xff"}',
                                  b"9" * 5000, b"\n" * 20], ids=lambda text: repr(text[:9]))
def test_a_line_that_cannot_be_read_is_one_short_sentence(tmp_path, text):
    (tmp_path / "trace.jsonl").write_bytes(text)
    with pytest.raises(ValueError) as caught:
        load_trace(tmp_path / "trace.jsonl")
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize(("limit", "words"), [("MAX_REQUESTS", "line 3: requests=3 .* at most 2$"),
                                              ("MAX_TRACE_BYTES", "at most 2 bytes")])
def test_a_trace_that_is_too_long_is_refused_with_the_limit(tmp_path, monkeypatch, limit, words):
    from clawdemy_infer.rigs import trace

    path = tmp_path / "long.jsonl"
    save_trace(workload("alpaca", requests=5), path)
    monkeypatch.setattr(trace, limit, 2)
    with pytest.raises(ValueError, match=words):
        load_trace(path)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(
    st.characters(), max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=5)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | st.dictionaries(st.sampled_from(
    ["id", "arrival_s", "prompt", "prompt_tokens", "max_tokens", "output_tokens", "priority",
     "stop"]), json_values).map(lambda change: json.dumps(GOOD | change).encode()))
def test_any_trace_is_read_and_can_be_saved_or_is_refused(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.jsonl"
        path.write_bytes(text)
        try:
            requests = load_trace(path)
        except ValueError:
            return
        save_trace(requests, path)
        assert load_trace(path) == requests


def test_a_trace_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    path, link = tmp_path / "trace.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(path)
    save_trace([Request(1, 3, 2, 0.0)], link)
    before = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
        def replace(*_):
            raise OSError("the disk is full")
        patch.setattr(os, "replace", replace)
        save_trace([Request(2, 3, 2, 0.0)], link)
    assert path.read_bytes() == before and link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, path]
    for place in (tmp_path, "/dev/null"):
        with pytest.raises(ValueError, match="save=.*a regular file"):
            save_trace([Request(1, 3, 2, 0.0)], place)


# ---- metrics ----


def sequence(arrival, times, history=(), state=State.FINISHED):
    made = Sequence(Request(f"at {arrival}", 10, 9), 10, None, arrival)
    made.extend(list(times))
    made.history, made.state = list(history), state
    return made


def test_the_metrics_of_one_request_by_hand():
    one = sequence(1.0, [3.0, 3.5, 5.0])
    assert (ttft(one), tpot(one), e2e(one)) == (2.0, 1.0, 4.0)
    single, none = sequence(1.0, [2.5]), sequence(1.0, [], state=State.CANCELLED)
    assert (ttft(single), tpot(single), e2e(single)) == (1.5, None, 1.5)
    at_once = sequence(1.0, [2.5] * 10)                     # ten tokens in one piece
    assert (ttft(at_once), tpot(at_once), e2e(at_once)) == (1.5, None, 1.5)
    assert Report([at_once, one], [], 4, 8).summary["itl_p50"] == 1.0
    assert (ttft(none), tpot(none), e2e(none)) == (None, None, None)


def test_the_summary_of_a_run_by_hand():
    """Two steps of 1 s with two sequences, a pause, and two of 1 s with one."""
    steps = [StepRecord(1.0, 2.0, 2, 5, 8, 3), StepRecord(2.0, 3.0, 2, 5, 8, 3),
             StepRecord(6.0, 7.0, 1, 1, 1, 6), StepRecord(7.0, 8.0, 1, 1, 1, 6)]
    report = Report([sequence(0.0, [2.0, 3.0, 8.0]), sequence(1.0, [2.0])], steps, max_batch=4,
                    blocks=12, block_bytes=100.0)
    found = report.summary
    assert found["seconds"] == 8 and found["busy"] == 0.5 and found["steps"] == 4
    assert found["output_tokens_per_s"] == 4/8 and found["input_tokens_per_s"] == 20/8 and found[
        "requests_per_s"] == 2/8
    assert found["ttft_p50"] == 1.5 and found["itl_p50"] == 3.0 and found["tpot_p50"] == 3.0
    assert found["occupancy"] == pytest.approx((2*2 + 1*2)/4/4) and found["kv_peak_bytes"] == 600
    assert found["kv_usage"] == pytest.approx(
        (3 + 6)/2/12) and found["wasted"] == pytest.approx(1 - 12/18)
    assert report.goodput(SLO(ttft_s=1.0)) == 1 / 8 and report.goodput(SLO(tpot_s=2.0)) == 1 / 8


def test_the_summary_of_a_run_in_which_not_all_went_well_by_hand():
    """A step of 1 s with two sequences and 7 blocks, one of 3 s with one and 3. The second request
    is given up after a token: what it found in the prefix cache and its end count for nothing."""
    steps = [StepRecord(0.0, 1.0, 2, 5, 8, 7), StepRecord(1.0, 4.0, 1, 1, 1, 3)]
    served, given_up = sequence(0.0, [1.0, 4.0]), sequence(0.0, [1.0], state=State.CANCELLED)
    served.num_cached_tokens, given_up.num_cached_tokens = 5, 8
    report = Report([served, given_up], steps, max_batch=4, blocks=14, block_bytes=100.0)
    found = report.summary
    assert found["occupancy"] == pytest.approx((1*2 + 3*1)/4/4)
    assert found["kv_usage"] == pytest.approx((1*7 + 3*3)/4/14) and found["kv_peak_bytes"] == 700
    assert (found["finished"], found["cancelled"], found["cached"]) == (1, 1, 5 / 10)
    assert (found["output_tokens_per_s"], found["input_tokens_per_s"]) == (3 / 4, 10 / 4)
    assert (found["requests_per_s"], found["ttft_p50"], found["e2e_p50"]) == (1 / 4, 1.0, 4.0)
    assert e2e(given_up) is None
    # Just in time is in time, for what finished.
    assert [report.goodput(SLO(*slo)) for slo in ((1.0, 3.0), (1.0, 2.9), (0.9, 3.0))] == [
        1 / 4, 0, 0]


def test_percentiles_have_the_names_of_their_percents():
    assert percentiles("x", [*range(101), None]) == {"x_p50": 50, "x_p95": 95, "x_p99": 99}
    assert percentiles("x", [0.0, 1.0])["x_p95"] == pytest.approx(0.95)     # by a straight line


def test_without_steps_a_run_lasts_from_the_first_arrival_to_the_last_token():
    report = Report([sequence(5.0, [6.0, 9.0]), sequence(3.0, [4.0])], [], 4, 8)
    assert report.seconds == 6 and report.summary["busy"] is None


def test_a_report_of_nothing_has_no_figures_and_no_errors():
    found = Report([], [], 4, 8).summary
    assert found["output_tokens_per_s"] == 0 and found["ttft_p95"] is None


# ---- the timeline ----


def test_phases_follow_the_history():
    one = sequence(0.0, [3.0, 4.0, 9.0], [(0.0, State.WAITING), (1.0, State.RUNNING),
                                          (5.0, State.PREEMPTED), (7.0, State.RUNNING),
                                          (9.0, State.FINISHED)])
    assert spans(one) == [("waiting", 0, 1), ("prefill", 1, 3), ("decode", 3, 5),
                          ("preempted", 5, 7), ("decode", 7, 9)]
    early = sequence(0.0, [], [(0.0, State.WAITING), (2.0, State.RUNNING), (4.0, State.PREEMPTED),
                               (5.0, State.CANCELLED)])
    assert spans(early) == [("waiting", 0, 2), ("prefill", 2, 4), ("preempted", 4, 5)]


def test_the_gantt_chart_has_a_row_for_each_request():
    from matplotlib.figure import Figure

    from clawdemy_infer.batching import simulate
    from clawdemy_infer.from_config import catalog

    report = simulate(catalog.model("smollm2-135m"), catalog.machine("h100-sxm"),
                      workload("alpaca", requests=7), Policy(max_batch=2))
    axes = Figure().subplots()
    draw_gantt(axes, report, dict.fromkeys(("waiting", "prefill", "decode", "preempted"), "black"))
    assert len(axes.collections) == 7
    assert all(
        sum(end - start
            for _, start, end in spans(s)) == pytest.approx(e2e(s))
        for s in report.sequences)
