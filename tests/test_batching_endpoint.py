"""A trace at a server that speaks OpenAI's completions: a small one, in a thread, that streams what
the test says, or fails."""

import json
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from clawdemy_infer.batching import SLO, Request, State
from clawdemy_infer.cli import main as cli
from clawdemy_infer.rigs.endpoint import Endpoint
from clawdemy_infer.rigs.trace import save_trace

GAP = 0.03


class Handler(BaseHTTPRequestHandler):
    """What becomes of a request is its prompt's to say: pieces `GAP` apart, an error, a connection
    that drops."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        prompt = body["prompt"]
        if prompt == "together":
            self.server.all_are_here.wait()
        if prompt == "too long":
            self.send_error(400, "so long a prompt is not accepted")
            return
        self.send_response(200)
        self.end_headers()
        self.say(": a comment that keeps the connection alive")
        if prompt == "no json":
            self.say("data: {")
            return
        if prompt == "breaks in the middle":
            self.say("data: " + json.dumps({"error": {"message": "out of memory"}}))
            return
        for i in range(3 if prompt == "drops" else body["max_tokens"]):
            time.sleep(GAP)
            self.send(choices=[{"text": f" {i}", "finish_reason": None}])
            if prompt == "presses Ctrl-C" and i == 30:
                os.kill(os.getpid(), signal.SIGINT)
        if prompt == "drops":
            return
        self.send(choices=[{"text": "", "finish_reason": "length"}])
        several = 2 if prompt == "two tokens a piece" else 1
        if prompt != "does not count":
            self.send(choices=[], usage={"prompt_tokens": 7,
                                         "completion_tokens": several * body["max_tokens"]})
        self.say("data: [DONE]")

    def send(self, **event):
        self.say("data: " + json.dumps(event))

    def say(self, line):
        self.wfile.write(f"{line}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.all_are_here = threading.Barrier(12, timeout=60)
    made.asked, made.url = [], f"http://127.0.0.1:{made.server_port}/v1"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def test_tokens_are_timed_as_they_come_and_arrivals_are_kept(server):
    report = Endpoint(server.url, "some-model").run(
        [Request("a", "first", 5, 0.0), Request("b", "second", 3, 0.25)], SLO(ttft_s=5))
    a, b = report.sequences
    assert (a.state, a.generated, a.text, a.reason) == (State.FINISHED, 5, " 0 1 2 3 4", "length")
    # No token can be there before it was sent, however busy the machine is.
    assert all(sent < came for sent, came in zip(np.arange(1, 6) * GAP, a.token_times, strict=True))
    assert a.token_times == sorted(a.token_times)
    assert b.arrival_s == 0.25 and b.token_times[0] > 0.25 + GAP
    path, body = server.asked[0]
    assert path == "/v1/completions"
    assert body | {"model": "some-model", "prompt": "first", "max_tokens": 5, "temperature": 0,
                   "stream": True} == body
    assert "ignore_eos" not in body
    summary = report.summary
    seconds = summary["seconds"]
    assert summary["finished"] == 2 and seconds == max(a.token_times[-1], b.token_times[-1])
    assert summary["input_tokens_per_s"] == pytest.approx(14 / seconds)
    assert summary["goodput"] == pytest.approx(2 / seconds)
    assert summary["ttft_p50"] < summary["e2e_p50"]
    assert summary["occupancy"] is summary["kv_peak_bytes"] is summary["steps"] is None


def test_requests_do_not_wait_for_one_another(server):
    report = Endpoint(server.url, "m").run([Request(i, "together", 2, 0.0) for i in range(12)])
    assert report.summary["finished"] == 12     # the server answers none before all have come


def test_failures_are_counted_and_not_raised(server):
    prompts = ["fine", "too long", "drops", "no json", "breaks in the middle"]
    report = Endpoint(server.url, "m").run([Request(prompt, prompt, 5, 0.0) for prompt in prompts])
    found = {s.request.id: (str(s.state), s.generated) for s in report.sequences}
    assert found == {"fine": ("finished", 5), "too long": ("failed", 0), "drops": ("failed", 3),
                     "no json": ("failed", 0), "breaks in the middle": ("failed", 0)}
    for prompt, words in {"too long": "HTTP 400", "drops": "broke off",
                          "breaks in the middle": "out of memory"}.items():
        assert words in next(s.reason for s in report.sequences if s.request.id == prompt)
    assert report.summary["failed"] == 4 and report.summary["finished"] == 1
    assert json.loads(json.dumps(report.summary, allow_nan=False))


def test_a_server_that_is_not_there_fails_every_request():
    report = Endpoint("http://127.0.0.1:9", "m").run([Request(i, 3, 3, 0.0) for i in range(2)])
    assert [s.state for s in report.sequences] == [State.FAILED] * 2
    assert "Connect" in report.sequences[0].reason
    with pytest.raises(ValueError, match="url='localhost"):
        Endpoint("localhost:8000", "m")


def test_pieces_of_several_tokens_and_servers_that_do_not_count(server):
    requests = [Request("both", "two tokens a piece", 4, 0.0),
                Request("silent", "does not count", 4, 0.0)]
    both, silent = Endpoint(server.url, "m").run(requests).sequences
    times = both.token_times
    assert both.generated == 8 and times[-2] == times[-1]
    assert times[0] == times[1] < times[2] == times[3] < times[4]
    assert silent.generated == 4


def test_ctrl_c_hangs_up_and_leaves_a_report(server):
    endpoint = Endpoint(server.url, "m")
    with pytest.raises(KeyboardInterrupt):
        endpoint.run([Request("quick", "first", 2, 0.0), Request("late", "third", 2, 60.0),
                      Request("slow", "presses Ctrl-C", 200, 0.0)])
    assert {s.request.id: str(s.state) for s in endpoint.report().sequences} == {
        "quick": "finished", "slow": "cancelled", "late": "cancelled"}
    tokens = {row["id"]: row["tokens"] for row in endpoint.report().requests}
    assert tokens["quick"] == 2 and 30 <= tokens["slow"] < 200 and tokens["late"] == 0


def test_the_command_keeps_what_came_before_ctrl_c(server, tmp_path, capsys):
    path = tmp_path / "trace.jsonl"
    save_trace([Request("quick", "first", 2, 0.0), Request("late", "third", 2, 60.0),
                Request("slow", "presses Ctrl-C", 200, 0.0)], path)
    assert cli.main(["replay", str(path), "--on", server.url, "--model", "m", "--json"]) == 130
    found = json.loads(capsys.readouterr().out)
    assert {row["id"]: row["outcome"] for row in found["requests"]} == {
        "quick": "finished", "slow": "cancelled", "late": "cancelled"}
    assert all(row["tokens"] for row in found["requests"] if row["id"] != "late")


def test_lengths_that_a_trace_knows_are_forced(server):
    Endpoint(server.url, "m").run([Request("count", 9, 8, 0.0, output_tokens=2),
                                   Request("ids", [5, 6], 3, 0.0, stop=(".",))])
    bodies = {type(body["prompt"]): body for _, body in server.asked}
    assert len(bodies[str]["prompt"].split()) == 9
    assert bodies[str]["max_tokens"] == 2 and bodies[str]["ignore_eos"]
    assert bodies[list]["prompt"] == [5, 6] and bodies[list]["stop"] == ["."]


def test_the_command_replays_at_a_url(server, tmp_path, capsys):
    path = tmp_path / "trace.jsonl"
    save_trace([Request("a", "first", 4, 0.0), Request("no", "too long", 4, 0.0)], path)
    assert cli.main(["replay", str(path), "--on", server.url, "--model", "m", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    outcomes = {row["id"]: (row["outcome"], row["tokens"]) for row in found["requests"]}
    assert outcomes == {"a": ("finished", 4), "no": ("failed", 0)}
    assert cli.main(["replay", str(path), "--on", server.url, "--model", "m"]) == 1
    assert "no failed: HTTP 400" in capsys.readouterr().out
