"""The terminal at its worst: every nasty argument, streams that are closed or full, an encoding
without our characters, a bug. Always an exit code and at most one line, never a traceback."""

import errno
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clawdemy_infer import files, published
from clawdemy_infer.cli import calibrate as calibrate_command
from clawdemy_infer.cli import doctor, replay
from clawdemy_infer.cli import main as cli
from clawdemy_infer.machine import calibrate
from clawdemy_infer.rigs import course

REPOSITORY = Path(__file__).parents[1]
NAPKIN = ["napkin", "--model", "llama-2-13b", "--machine", "h100-sxm"]
NASTY = [
    "", " ", "-1", "0", "-0", "-0.0", "nan", "-inf", "inf", "1e-300", "1e300", "1e400", "0.5", "7",
    "1.5", "9" * 320, "9" * 5000, "1_000", "0x10", "½", "٣", "\udcff", "a\nb", "\x1b[31m", "\x00",
    "./nope", "~nobody/x", "tests/nope", "/", "/dev/null", ".", "..", "x" * 5000, "x/y/z", ",",
    "1,2,,3", ",".join(["1"] * 2000), "None", "{}", "%s", "fp32", "int4", "llama-2-13b", "this",
    "engine", "simulator", "lookup", "exit:0", "exit:" + "9" * 30, "decode", "gptq", "rtn", "row",
    "prefill-" + "9" * 40, "decode-1@" + "9" * 30, "uniform", "sharegpt", "--", "-"]
PROGRESS = ("Serving ", "Looking at ", "Measuring ", "Comparing ", "warning: ")


def subparsers():
    [found] = [action for action in cli.parser()._actions if isinstance(action.choices, dict)]
    return found.choices


FLAGS = {name: [action.option_strings[0] for action in command._actions
                if action.option_strings and action.dest != "help"]
         for name, command in subparsers().items()}
NEEDED = {"napkin": ["--machine", "h100-sxm"], "generate": ["--prompt", "a"],
          "quantize": ["--out", "out"], "replay": ["uniform"]}


@pytest.fixture
def run(capsys):
    def run(*arguments):
        try:
            code = cli.main(list(arguments))
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err
    return run


@pytest.fixture
def idle(monkeypatch, tmp_path):
    """Whatever takes long is taken as having failed."""
    def stop(*_, **__):
        raise ValueError("here the work would begin")

    monkeypatch.setenv("CLAWDEMY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "load_model", stop)
    monkeypatch.setattr(calibrate, "this_machine", stop)
    monkeypatch.setattr(calibrate_command, "run", stop)
    monkeypatch.setattr(replay, "requests_of", stop)
    monkeypatch.setattr(doctor, "checks", stop)
    monkeypatch.setattr(published, "Evidence", stop)
    monkeypatch.setattr(course, "run_course", stop)
    monkeypatch.setattr("clawdemy_infer.rigs.bench_kernels.kernel_rows", stop)


@st.composite
def lines(draw):
    command = draw(st.sampled_from(sorted(FLAGS)))
    words = [*NEEDED.get(command, ())]
    for _ in range(draw(st.integers(1, 4))):
        words.append(draw(st.sampled_from(FLAGS[command])))
        if draw(st.integers(0, 9)):
            words.append(draw(st.sampled_from(NASTY)))
    if not draw(st.integers(0, 4)):
        words.append(draw(st.sampled_from(NASTY)))
    return [command, *words]


@given(lines())
@settings(max_examples=int(os.environ.get("CLAWDEMY_EXAMPLES", 250)), deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_asked_for_is_answered_or_refused_in_one_line(run, idle, line):
    code, out, err = run(*line)
    said = [each for each in err.splitlines() if not each.startswith(PROGRESS)]
    assert code in (0, 1, 2, 130), (line, err)
    assert "--debug" in line or "Traceback" not in err and "\x1b" not in err
    if code in (1, 2) and "--debug" not in line:
        assert len(said) <= 1 and len(err) < 4000, (line, err)
        assert code == 1 or said[0].startswith("clawdemy-infer"), (line, err)
        assert code == 1 or out == ""


@pytest.mark.parametrize("line", [
    "generate --prompt a --gamma 2", "generate --prompt a --top-k 2",
    "generate --prompt a --min-p 0.1", "bench --workloads decode-1", "bench --rounds 2",
    "bench --machine l4", "bench --peers --batch 2",
    "bench --kernels --model x", "bench --coverage --context 5", "bench --checks --breakdown",
    "quantize --out o --method rtn --seed 1", "quantize --out o --method awq --act-order",
    "replay uniform --compile", "replay uniform --gamma 2", "replay uniform --alpha 0.5",
    "replay uniform --on engine --tp 2", "replay uniform --on engine --machine l4",
    "replay uniform --on http://localhost:1/v1 --policy chunked", "replay trace.jsonl --rate 3",
    "napkin --model llama-2-13b --machine l4 --sweep batch --batch 2"])
def test_options_that_mean_nothing_together_are_refused_by_one_line_that_names_both(
        run, idle, line):
    Path("trace.jsonl").write_text('{"id": "a", "arrival_s": 0, "prompt": "x", "max_tokens": 1}\n')
    code, out, err = run(*shlex.split(line))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "changes nothing with" in err
    named = [word for word in shlex.split(line)
             if word.startswith("--") and f"{word} changes nothing" in err]
    assert len(named) == 1


@pytest.mark.parametrize("flag, most", [
    ("--max-tokens", 10**8), ("--gamma", 10**6), ("--top-k", 10**6), ("--seed", 2**63 - 1)])
def test_a_number_has_its_range_and_the_refusal_says_it(run, idle, flag, most):
    line = ["generate", "--prompt", "a", "--draft", "lookup", "--temperature", "1"]
    code, _, err = run(*line, flag, str(most + 1))
    assert code == 2 and f"to {most:,} is accepted" in err
    code, _, err = run(*line, flag, str(most))
    assert code == 1 and "here the work would begin" in err


@pytest.mark.parametrize("value", ["1e-300", "-1e-300", "1e-9", "nan", "inf", "-1"])
def test_a_temperature_that_no_logits_survive_is_refused_and_zero_of_any_sign_is_greedy(
        run, idle, value):
    assert run("generate", "--prompt", "a", "--temperature", value)[0] == 2
    assert run("generate", "--prompt", "a", "--temperature", "-0.0")[0] == 1


@pytest.mark.parametrize("name", ["./nope", "/nope", "~nobody/x", "../nope", "here/nope"])
def test_a_mistyped_path_is_a_missing_path_and_no_name_of_the_hub(run, idle, name):
    Path("here").mkdir()
    for line in (["generate", "--prompt", "a", "--model", name],
                 ["napkin", "--model", name, "--machine", "l4"]):
        code, _, err = run(*line)
        assert code == 2 and f"model={name!r} is not supported; accepted: a file or dir" in err
    assert run("generate", "--prompt", "a", "--model", "org/name")[0] == 1


def test_an_unknown_name_has_few_near_matches(run):
    for name in ("zzzz", "llama", "qwen"):
        code, _, err = run("napkin", "--model", name, "--machine", "l4")
        assert code == 2 and err.count(",") < 5 and len(err) < 200


# ---- the boundary ----


@pytest.mark.parametrize("error, code, said", [
    (KeyError("shape"), 70, "a bug of clawdemy-infer, and not your mistake (KeyError: 'shape')"),
    (RuntimeError("sizes 2 and 3\ndo not fit"), 70, "(RuntimeError: sizes 2 and 3 do not fit)"),
    (ZeroDivisionError(), 70, "--debug"), (AssertionError("x" * 10**5), 70, "--debug"),
    (RecursionError("maximum recursion depth exceeded"), 1, "recursion"),
    (MemoryError(), 1, "not enough memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: "
                  "you tried to allocate 99 bytes."), 1, "not enough memory"),
    (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."), 1, "not enough memory"),
    (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "No space left on device: '/x'"),
    (ValueError("x.gguf: torn"), 1, "generate: x.gguf: torn"), (ValueError(), 1, "ValueError"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), 1, "can't decode")])
def test_what_is_raised_is_one_line_and_a_bug_is_70(run, monkeypatch, error, code, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(files, "load_model", fail)
    found, out, err = run("generate", "--prompt", "a")
    assert (found, out, err.count("\n")) == (code, "", 1) and said in err and len(err) < 1200
    for line in (["--debug", "generate", "--prompt", "a"],
                 ["generate", "--debug", "--prompt", "a"]):
        found, out, err = run(*line)
        assert (found, out) == (code, "") and "Traceback" in err and err.count(type(error).__name__)


def test_what_cannot_be_kept_in_the_cache_names_the_way_on(run, monkeypatch):
    for place in ("/dev/null/cache", "/proc/none/cache"):
        monkeypatch.setenv("CLAWDEMY_CACHE", place)
        code, _, err = run("calibrate")
        assert code == 1 and err.splitlines()[-1].endswith("CLAWDEMY_CACHE names another folder")
        assert "Traceback" not in err


def test_a_warning_is_one_line(run, monkeypatch):
    def warn(*_, **__):
        import warnings
        warnings.warn("two\nlines", stacklevel=1)
        raise ValueError("x")

    monkeypatch.setattr(files, "load_model", warn)
    with pytest.warns(UserWarning):
        run("generate", "--prompt", "a")
    import warnings
    assert warnings.formatwarning("two\nlines", UserWarning, "f", 1) == "warning: two lines\n"


class Broken(io.StringIO):
    """A stream whose disk is full."""

    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_results_that_cannot_be_written_are_a_failure_and_words_that_cannot_be_said_are_none(
        run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken())
    code, _, err = run(*NAPKIN, "--json")
    assert code == 1 and err.count("\n") == 1 and "No space left" in err
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stderr", Broken())
    code, out, _ = run(*NAPKIN, "--json")
    assert code == 0 and json.loads(out)["model"] == "Llama-2-13B"
    assert run("napkin", "--model", "zzzz", "--machine", "l4")[0] == 2


def test_every_encoding_gets_the_whole_card_with_replacements_and_json_as_it_is(monkeypatch):
    raw = {}
    for encoding in ("ascii", "latin-1", "utf-8"):
        for more in ([], ["--json"]):
            raw[encoding, *more] = io.BytesIO()
            monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw[encoding, *more], encoding))
            assert cli.main([*NAPKIN, *more]) == 0
            sys.stdout.detach()
    assert len(raw["ascii",].getvalue().splitlines()) == len(raw["utf-8",].getvalue().splitlines())
    assert b"13,015,864,320" in raw["ascii",].getvalue()
    for encoding in ("ascii", "latin-1", "utf-8"):
        assert json.loads(raw[encoding, "--json"].getvalue())["fits"] is True


SHELL = [
    (">&-", {1}, ""), ("2>&-", {0}, "Llama-2-13B"), ("<&-", {0}, "Llama-2-13B"),
    (">&- 2>&-", {1}, ""), (">/dev/full", {1}, ""), ("2>/dev/full", {0}, "Llama-2-13B"),
    (">/dev/full 2>/dev/full", {1}, ""), ("| true; exit ${PIPESTATUS[0]}", {0, 1}, "")]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_closed_and_full_streams_are_an_exit_code_and_at_most_one_line():
    for redirect, codes, shown in SHELL:
        command = f"{shlex.quote(sys.executable)} -m clawdemy_infer {' '.join(NAPKIN)} {redirect}"
        found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120,
                               cwd=REPOSITORY, check=False)
        assert found.returncode in codes, (redirect, found)
        assert found.stderr.count("\n") <= 1 and "Exception" not in found.stderr, (redirect, found)
        assert shown in found.stdout


def test_ctrl_c_at_any_time_is_130_and_no_traceback(tmp_path):
    """Also while modules are imported: in each of them a moment is chosen."""
    script = ("import os, signal, sys, builtins\n"
              "from clawdemy_infer.cli.main import main\n"
              "plain, left = builtins.__import__, int(sys.argv[1])\n"
              "def importing(*arguments, **more):\n"
              "    global left\n"
              "    left -= 1\n"
              "    if left == 0: os.kill(os.getpid(), signal.SIGINT)\n"
              "    return plain(*arguments, **more)\n"
              "builtins.__import__ = importing\n"
              f"sys.argv[1:] = {NAPKIN!r}\n"
              "sys.exit(main())\n")
    for moment in ("1", "40", "400"):
        found = subprocess.run([sys.executable, "-c", script, moment], capture_output=True,
                               text=True, timeout=120, cwd=REPOSITORY, check=False)
        assert found.returncode == 130 and found.stderr == "", (moment, found)
