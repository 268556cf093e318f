"""Servers that answer oddly, or mean harm: whatever one of them sends costs at most that request,
ends soon, stays small, and shows no secret. A server of bytes, in a thread."""

import base64
import gzip
import json
import socketserver
import threading

import pytest

from clawdemy_infer.batching import Request
from clawdemy_infer.cli import main as cli
from clawdemy_infer.rigs.endpoint import Endpoint

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
LENGTH = 3


def event(text=None, finish=None, **more):
    choices = {} if text is None else {"choices": [{"text": text, "finish_reason": finish}]}
    return b"data: " + json.dumps(choices | more).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
GOOD = HEAD + b"".join(event(" a", ("", "length")[i == 2]) for i in range(LENGTH)) + DONE


class Handler(socketserver.BaseRequestHandler):
    """Answers with what `server.answers` has for the prompt: bytes, or what yields bytes; a number
    is for how many seconds to wait."""

    def handle(self):
        raw = b""
        while b"\r\n\r\n" not in raw:
            raw += self.request.recv(2**16)
        head, _, body = raw.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        while len(body) < length:
            body += self.request.recv(2**16)
        asked = json.loads(body)
        self.server.heads.append(head.decode())
        self.server.asked.append(asked)
        says = self.server.answers.get(asked["prompt"], GOOD)
        try:
            for part in (says,) if isinstance(says, bytes) else says(head.decode(), asked):
                if isinstance(part, float):
                    self.server.over.wait(part)
                else:
                    self.request.sendall(part)
                    self.server.sent += len(part)
        except OSError:
            pass                                            # whoever asked has hung up


class Server(socketserver.ThreadingTCPServer):
    daemon_threads, request_queue_size, allow_reuse_address = True, 64, True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.heads, self.asked, self.sent = {}, [], [], 0
        self.over, self.port = threading.Event(), self.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"


@pytest.fixture
def server():
    made = Server()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.over.set()
    made.shutdown()
    made.server_close()


def ask(server, says, **options):
    """What becomes of a request that is answered with `says`, between two that are answered well;
    for which it must not matter."""
    server.answers["odd"] = says
    endpoint = Endpoint(server.url, "m", **options)
    first, odd, last = endpoint.run(
        [Request(i, prompt, LENGTH, 0.0) for i, prompt in enumerate(("a", "odd", "b"))]).sequences
    assert [(str(one.state), one.generated) for one in (first, last)] == [("finished", LENGTH)] * 2
    return odd


# ---- answers ----


@pytest.mark.parametrize("odd", [
    b"data: null\n\n", b"data: 5\n\n", b"data: [1]\n\n", b'data: "error"\n\n', b"data:\n\n",
    event(choices=None), event(choices=[None, 5]), event(choices=[], usage=5),
    event(choices=[], usage={"completion_tokens": "3"}), event(usage={"completion_tokens": 10**9}),
    event(usage={"total_tokens": 3, "completion_tokens": -1}), event(error=None),
    event("", finish={"x": 1}), b": ping\r\n\r\n", b"\r\r"], ids=repr)
def test_an_odd_event_is_skipped(server, odd):
    found = ask(server, HEAD + event(" a") + odd + event(" b", "length") + DONE)
    assert (str(found.state), found.generated, found.text) == ("finished", 2, " a b")


@pytest.mark.parametrize("odd", [
    b"data: hello\n\n", event(5), event(["a"]), b"data: " + b"[" * 10**5 + b"\n\n",
    event(error={"message": "boom"}), event(object="error", message="boom"), event(error="boom"),
    b"event: error\ndata: boom\n\n"], ids=lambda odd: repr(odd[:40]))
def test_an_event_that_cannot_be_used_fails_its_request_and_what_came_is_kept(server, odd):
    found = ask(server, HEAD + event(" a") + event(" b") + odd + event(" c", "length") + DONE)
    assert (str(found.state), found.generated, found.text) == ("failed", 2, " a b")
    assert "boom" in found.reason or b"boom" not in odd


@pytest.mark.parametrize(("says", "outcome"), [
    (HEAD + event(" a") + event(" b"), ("failed", 2, "the answer broke off")),
    (HEAD + event(" a") + b'data: {"cho', ("failed", 1, 'an event is not JSON: {"cho')),
    (HEAD + event(" a") + event(" b", None) + DONE, ("finished", 2, "[DONE]")),
    (HEAD + event(" a") + event(" b", "") + DONE, ("finished", 2, "[DONE]")),
    (HEAD + event(" a") + event(" b", "stop"), ("finished", 2, "stop")),
    (HEAD + event(" a", "error") + DONE, ("failed", 1, "the server ended it with error")),
    (HEAD + event(" a") + event("", "abort"), ("failed", 1, "the server ended it with abort")),
    (HEAD + event("", "length") + DONE, ("failed", 0, "no text came")),
    (GOOD.replace(b"\r\nContent-Type: text/event-stream", b""), ("finished", 3, "length")),
    (GOOD.replace(b"stream\r", b"stream; charset=latin-1\r"), ("finished", 3, "length")),
    (GOOD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: identity\r\n\r\n"), ("finished", 3,
                                                                            "length"))])
def test_how_an_answer_ends(server, says, outcome):
    found = ask(server, says)
    assert (str(found.state), found.generated, found.reason) == outcome


@pytest.mark.parametrize(("says", "reason"), [
    (b"HTTP/1.1 307 T\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n",
     "HTTP 307 to /elsewhere: redirects are not followed"),
    (b"HTTP/1.1 204 No\r\n\r\n", "HTTP 204, no content type: no answer came"),
    (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<h1>hi</h1>\n",
     "HTTP 200, text/html: no answer came, but <h1>hi</h1>"),
    (b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"choices": [{"text": " a"}]}',
     'HTTP 200, application/json: no answer came, but {"choices": [{"text": " a"}]}'),
    (b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"error": {"message": "boom"}}',
     "HTTP 200, application/json: no answer came, but boom"),
    (b'HTTP/1.1 429 B\r\nContent-Type: application/json\r\n\r\n{"error": {"message": "busy"}}',
     "HTTP 429: busy"), (b'HTTP/1.1 404 N\r\n\r\n{"detail": "Not Found"}', "HTTP 404: Not Found"),
    (b"HTTP/1.1 500 X\r\nContent-Length: 300\r\n\r\n<b>no</b>\x1b[31m\n\xe2\x80\xaeoh",
     r"HTTP 500: <b>no</b>\x1b[31m \u202eoh"),
    (b"", "RemoteProtocolError: Server disconnected without sending a response.")])
def test_what_is_no_stream_is_told_with_its_status_and_the_servers_words(server, says, reason):
    found = ask(server, says)
    assert (str(found.state), found.generated, found.reason) == ("failed", 0, reason)


# ---- limits ----


def forever(part, start=HEAD):
    def says(*_):
        yield start
        while True:
            yield part
    return says


PACKED = HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")


@pytest.mark.parametrize(("says", "reason"), [
    (forever(b"x" * 2**16), "more than 1,060,864 bytes of answer"),
    (forever(b":%s\n\n" % (b" ping" * 99) * 99), "more than 1,060,864 bytes of answer"),
    (forever(event(" a")), "more than 88 pieces of text"),
    (forever(b"data: 1\ndata: [\n" * 99), "bytes"),
    (forever(b"x" * 2**16, b"HTTP/1.1 500 X\r\n\r\n"), "HTTP 500: xxx"),
    (forever(b"X-Y: " + b"y" * 999 + b"\r\n", HEAD[:-2]), "RemoteProtocolError"),
    (forever(gzip.compress(bytes(2**20)), PACKED), "compressed by gzip: only identity is accepted"),
], ids=["line", "comments", "pieces", "data", "error", "headers", "gzip"])
def test_what_never_ends_is_cut_off(server, says, reason):
    found = ask(server, says)
    assert str(found.state) == "failed" and reason in found.reason
    assert server.sent < 2**25                      # what fits into the buffers of a connection
    assert found.generated <= 89


@pytest.mark.parametrize("says", [
    lambda *_: [HEAD, *[b":", 0.05] * 10**6], lambda *_: [60.0],
    lambda *_: [HEAD, event(" a"), event(" b"), 60.0],
    lambda *_: [b"HTTP/1.1 200 OK\r\nX: ", *[b"y", 0.05] * 10**6]],
    ids=["comments", "nothing", "a start", "headers"])
def test_a_request_has_a_limit_of_time(server, says):
    found = ask(server, says, timeout_s=1.5)
    assert (str(found.state), found.reason) == ("failed", "no end within 1.5 s")
    assert found.generated == (2 if found.text else 0)


def test_done_ends_it_though_the_connection_stays_open(server):
    found = ask(server, lambda *_: [GOOD, 600.0])
    assert (str(found.state), found.generated) == ("finished", LENGTH) and not server.over.is_set()


# ---- fields that a server refuses ----


def strict(fields, status=400):
    def says(_, asked):
        bad = [field for field in fields if field in asked]
        body = json.dumps({"error": {"message": "not accepted", "param": bad[:1]}}).encode()
        return [b"HTTP/1.1 %d B\r\nConnection: close\r\n\r\n" % status + body if bad else GOOD]
    return says


@pytest.mark.parametrize("fields", [["ignore_eos"], ["stream_options"],
                                    ["ignore_eos", "stream_options"]])
@pytest.mark.parametrize("status", [400, 422])
def test_a_field_that_is_refused_is_left_out_and_that_is_said_once(server, fields, status):
    server.answers = dict.fromkeys("abcd", strict(fields, status))
    said = []
    endpoint = Endpoint(server.url, "m", note=said.append)
    report = endpoint.run([Request(i, i, LENGTH, 0.0, output_tokens=LENGTH) for i in "abcd"])
    assert report.summary["finished"] == 4
    assert said == [f"The server refuses {field}: requests go without it." for field in fields]
    assert not set(fields) & set(server.asked[-1])


def test_fields_can_be_left_out_from_the_start(server):
    Endpoint(server.url, "m", leave_out=["ignore_eos", "stream_options"]).run(
        [Request("a", "a", 9, 0.0, output_tokens=LENGTH)])
    [asked] = server.asked
    assert asked == {"model": "m", "prompt": "a", "temperature": 0, "max_tokens": LENGTH,
                     "stream": True}


def test_another_refusal_is_not_tried_again(server):
    found = ask(server, b'HTTP/1.1 400 B\r\n\r\n{"error": "so long a prompt is not accepted"}')
    assert found.reason == "HTTP 400: so long a prompt is not accepted" and len(server.asked) == 3


# ---- secrets ----

KEY, USER, PASSWORD, TOKEN = "sk-3cre7/KEY", "us&er", "pa:ss/w#rd", "t0ken/of+mine"


def echo(status):
    def says(head, asked):
        sent = head.partition("Basic ")[2].partition("\r\n")[0]
        body = f"{head}\n{base64.b64decode(sent).decode()}\n{KEY} {TOKEN}\n{asked}"
        return [b"HTTP/1.1 %d N\r\n\r\n" % status + body.replace("\r\n", " ").encode()]
    return says


@pytest.mark.parametrize("says", [
    echo(401), echo(200), lambda head, _: [HEAD, b"data: " + head.replace("\r\n", " ").encode()],
    lambda head, _: [HEAD + event(error={"message": f"bad key {KEY} {TOKEN}"})],
    lambda head, _: [HEAD + event(error={"code": {"a": [KEY, PASSWORD]}})],
    lambda head, _: [HEAD + event(" a", f"error {KEY}") + DONE],
    lambda head, _: [HEAD + event(" a", KEY) + DONE],
    lambda head, _: [f"HTTP/1.1 {KEY} {PASSWORD}\r\n\r\n".encode()],
    lambda head, _: [f"HTTP/1.1 307 T\r\nLocation: /{KEY}?key={TOKEN}\r\n\r\n".encode()]])
@pytest.mark.parametrize("quoted", ["us%26er:pa%3Ass%2Fw%23rd@", ""])
def test_no_secret_is_ever_shown(server, monkeypatch, capsys, tmp_path, says, quoted):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    server.answers = {"a": says}
    trace, saved = tmp_path / "trace.jsonl", tmp_path / "saved.jsonl"
    trace.write_text('{"id": "a", "arrival_s": 0, "prompt": "a", "max_tokens": 3}\n')
    url = server.url.replace("//", f"//{quoted}") + "?key=t0ken%2Fof%2Bmine&plain"
    for more in ([], ["--json"]):
        cli.main(["replay", str(trace), "--on", url, "--model", "m", "--save", str(saved), *more])
    out, err = capsys.readouterr()
    shown = out + err + saved.read_text()
    assert f"127.0.0.1:{server.port}/v1" in shown and "\x1b" not in shown
    basic = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    secrets = [KEY, TOKEN, "t0ken%2F", "plain"]
    secrets += [PASSWORD, "pa%3A", "ss%2Fw", "us&er", "us%26er", basic] if quoted else []
    assert not [secret for secret in secrets if secret in shown]
    head = server.heads[0]                                  # they do reach the server
    assert head.startswith("POST /v1/completions?key=t0ken%2Fof%2Bmine&plain HTTP/1.1\r\n")
    assert f"uthorization: {f'Basic {basic}' if quoted else f'Bearer {KEY}'}\r\n" in head


def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(monkeypatch):
    for key in ("sk-a\nb", "sk-\x01", "sk-ключ"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ValueError, match="OPENAI_API_KEY: only printable") as caught:
            Endpoint("http://127.0.0.1:9/v1", "m")
        assert "sk-" not in str(caught.value)


@pytest.mark.parametrize("url", [
    "http://", "http://[", "http://a:b", "http://us:pw@h:port/v1", "http://h:99999/?key=pw",
    "http://us:pw@", "http://h\tx#pw", "https://:80", "ftp://us:pw@h", "us:pw@h", "http:/h?pw"])
def test_a_bad_url_is_one_line_that_shows_no_password(capsys, tmp_path, url):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"id": "a", "arrival_s": 0, "prompt": "a", "max_tokens": 3}\n')
    try:
        code = cli.main(["replay", str(trace), "--on", url, "--save", str(tmp_path / "saved")])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1) and "pw" not in err
    assert not (tmp_path / "saved").exists()


def test_what_one_answer_leaves_behind_reaches_no_other(server):
    """Neither a cookie nor bytes after the end of an answer, on a connection that could go on."""
    said = GOOD.split(b"\r\n\r\n")[1]
    server.answers["first"] = (b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nContent-Length: %d\r\n\r\n"
                               % len(said) + said + b"HTTP/1.1 500 X\r\n\r\n")
    report = Endpoint(server.url, "m").run([Request(0, "first", LENGTH, 0.0),
                                            Request(1, "second", LENGTH, 0.4)])
    assert report.summary["finished"] == 2
    assert "cookie" not in server.heads[1].lower()
