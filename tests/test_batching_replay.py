"""The command `replay`: one JSON object with the names that scripts rely on, one line for what is
wrong."""

import json

import pytest

from clawdemy_infer.batching import Request
from clawdemy_infer.cli import main as cli
from clawdemy_infer.rigs.trace import save_trace

ON_PAPER = ["--model", "llama-3-8b", "--machine", "h100-sxm"]


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CLAWDEMY_CACHE", str(tmp_path / "cache"))

    def run(*arguments):
        try:
            code = cli.main(["replay", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err
    return run


def test_a_trace_on_the_simulator_is_one_json_object(run, tmp_path):
    path = tmp_path / "trace.jsonl"
    save_trace(
        [Request("a", 100, 20, 0.0),
         Request("b", 30, 5, 0.01),
         Request("long", 9000, 10, 0.0)], path)
    code, out, _ = run(path, *ON_PAPER, "--policy", "chunked", "--token-budget", 64, "--json")
    assert code == 0
    found = json.loads(out)
    assert {row["id"]: (row["outcome"], row["tokens"]) for row in found["requests"]} == {
        "a": ("finished", 20), "b": ("finished", 5), "long": ("refused", 0)}
    assert {"id", "outcome", "ttft_s", "tpot_s", "e2e_s", "tokens"} <= set(found["requests"][0])
    assert {
        "output_tokens_per_s", "ttft_p50", "ttft_p95", "tpot_p50", "tpot_p95", "goodput",
        "preemptions", "kv_peak_bytes"
    } <= set(found["summary"])
    # a: two chunks, and 19 tokens more
    assert found["summary"]["steps"] == 2 + 19 and found["policy"]["token_budget"] == 64


def test_a_known_workload_can_be_saved_and_served_again(run, tmp_path):
    path = tmp_path / "saved.jsonl"
    _, first, _ = run("alpaca", "--requests", 20, "--rate", 50, *ON_PAPER, "--json", "--save", path)
    _, again, _ = run(path, *ON_PAPER, "--json")
    assert json.loads(first)["summary"] == json.loads(again)["summary"]


def test_the_summary_can_be_read(run):
    code, out, err = run("uniform", "--requests", 40, "--rate", "inf", *ON_PAPER, "--policy",
                         "static")
    assert code == 0 and "Serving 40" in err
    assert "40 finished" in out and "TTFT" in out and "computed for nothing" in out
    assert "requests a second of this machine's time" in out


@pytest.mark.parametrize(
    "arguments, code, words",
    [(["nowhere.jsonl"], 2, "trace='nowhere.jsonl'"),
     (["alpaca", "--max-batch", "0"], 2, "--max-batch"),
     (["alpaca", "--token-budget", "8"], 2, "token_budget=8"),
     (["alpaca", "--on", "paper"], 2, "--on"), (["alpaca", "--rate", "0"], 2, "rate=0"),
     (["alpaca"], 1, "no kept calibration"),
     (["alpaca", "--model", "llama-3.1-70b", "--machine", "h100-sxm"], 1, "memory="), ])
def test_what_cannot_be_done_gets_one_line(run, arguments, code, words):
    found, out, err = run(*arguments)
    assert (found, out) == (code, "") and words in err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, words",
    [(["--burstiness", "nan"], "--burstiness: 'nan'"),
     (["--requests", "1" + "0" * 20], "--requests"),
     (["--rate", "1e-300"], "rate=1e-300"), (["--rate", "nan"], "--rate: 'nan'"),
     (["--slo-ttft", "nan"], "--slo-ttft"), (["--slo-tpot", "-1"], "--slo-tpot"),
     (["--kv-bytes", "nan"], "--kv-bytes"), (["--kv-bytes", "inf"], "--kv-bytes"),
     (["--timeout", "0"], "--timeout"), (["--timeout", "nan"], "--timeout"),
     (["--leave-out", "stop"], "--leave-out"),
     (["--draft", "exit:" + "9" * 5000, "--alpha", "1"], "--draft"),
     (["--alpha", "0.5"], "--alpha changes nothing without --draft"),
     (["--gamma", "3"], "--gamma changes nothing without --draft"),
     (["--compile"], "--compile changes nothing with --on simulator"),
     (["--timeout", "5"], "--timeout changes nothing with --on simulator"),
     (["--on", "engine", "--tp", "2"], "--tp changes nothing with --on engine"),
     (["--on", "http://127.0.0.1:9/v1", "--policy", "chunked"],
      "--policy changes nothing with --on URL")], ids=lambda value: str(value)[:40])
def test_a_number_or_an_option_that_cannot_be_is_refused_at_once(run, arguments, words):
    on_paper = [] if "--on" in arguments else ON_PAPER
    code, out, err = run("alpaca", *on_paper, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err


def test_what_draws_requests_changes_nothing_with_a_saved_trace(run, tmp_path):
    save_trace([Request("a", 3, 2, 0.0)], tmp_path / "t.jsonl")
    code, _, err = run(tmp_path / "t.jsonl", *ON_PAPER, "--rate", "2")
    assert code == 2 and "--rate changes nothing with a trace from a file" in err


def test_a_place_that_cannot_be_written_is_said_before_the_run(run, tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "below", "/proc/none"):
        code, out, err = run("alpaca", *ON_PAPER, "--save", place)
        assert (code, out, err.count("\n")) == (2, "", 1) and f"save='{place}'" in err


def test_the_engine_serves_the_real_model(run, smollm, monkeypatch, tmp_path):
    from clawdemy_infer import files

    asked = []
    monkeypatch.setattr(files, "load_model", lambda *_, **__: smollm)
    monkeypatch.setattr("clawdemy_infer.fast.faster.faster",
                        lambda model, weights, **__: asked.append(weights) or model)
    path = tmp_path / "trace.jsonl"
    save_trace([Request("a", "The capital of France is", 4, 0.0), Request("b", 9, 3, 0.0)], path)
    code, out, _ = run(path, "--on", "engine", "--kv-bytes", 2**25, "--json")
    run(path, "--on", "engine", "--kv-bytes", 2**25, "--weights", "fp16")
    assert asked == [None, "fp16"]                          # each format on its own kernels
    found = json.loads(out)
    assert code == 0 and [
        row["tokens"] for row in sorted(found["requests"], key=lambda row: row["id"])
    ] == [4, 3]
    assert found["summary"]["ttft_p50"] > 0
