"""Other engines beside ours, with workers that only pretend: no engine is needed, and no time is
asserted."""

import ast
import json
import sys
from pathlib import Path

import pytest

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.cli import bench
from clawdemy_infer.cli.main import main
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.peers import contestants as who
from clawdemy_infer.peers.contestants import Contestant, asked, contestants, parse
from clawdemy_infer.peers.race import PeerRun, Worker, WorkerFailed, not_idle, race
from clawdemy_infer.peers.result import (
    fraction_of_bound,
    peer_rows,
    peers_table,
    round_rates,
    same_tokens,
)

SHAPE = ModelShape("tiny", L=2, D=24, N=3, K=1, H=8, F=40, V=67)
MACHINE = Machine("m", ((2.0**20, 1e9),), {"fp32": 1e10, "bf16": 4e10}, memory=1e9)
SETTINGS = {"threads": 1, "model": "", "weights": "fp32", "batch": 2, "context": 9}

# An engine that answers at once, the real loop of `serve` around it. How it behaves is told by its
# weights.
FAKE = f"""
import os, sys, time
sys.path.insert(0, {str(Path(who.__file__).parent)!r})
from serve import serve

class Fake:
    version, weight_bytes = "7.1", 1e6

    def __init__(self, model, weights, threads, batch, context, compile=False):
        print("this is no answer")
        self.how, self.calls, self.threads = weights, 0, threads
        if weights == "broken":
            raise ImportError("no module named engine")

    def generate(self, prompts, new):
        self.calls += 1
        if self.calls == 3 and self.how == "dies":
            sys.exit("out of luck")
        if self.calls == 3 and self.how == "hangs":
            time.sleep(60)
        if self.calls == 3 and self.how == "babbles":
            os.write(self.out, b"what?\\n")
        if self.calls == 3 and self.how == "lists":
            os.write(self.out, b"[1, 2]\\n")
        if self.calls == 3 and self.how == "nests":
            os.write(self.out, b"[" * 100000 + b"\\n")
        if self.calls == 3 and self.how == "mumbles":
            os.write(self.out, b"\\xff")
            time.sleep(60)
        return {{"tokens": [[prompt[0]] * new for prompt in prompts], "prefill_s": 0.5,
                "decode_s": 2.0, "decode_tokens": len(prompts) * (new - 1),
                "threads": os.environ["OMP_NUM_THREADS"]}}

Fake.out = os.dup(1)
serve(Fake)
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    return [sys.executable, str(tmp_path / "fake.py")]


@pytest.fixture
def start(command):
    started = []

    def worker(how="fp32", patience=20):
        started.append(Worker(f"fake {how}", command, SETTINGS | {"weights": how}, patience))
        return started[-1]
    yield worker
    for one in started:
        one.stop()


ASK = {"prompts": [[5, 6], [7, 8]], "new": 3}


# ---- the worker ----


def test_a_worker_says_its_version_and_answers_each_command(start):
    worker = start()
    assert worker.ready["version"] == "7.1"
    answer = worker.ask(ASK)
    assert answer["tokens"] == [[5, 5, 5], [7, 7, 7]] and answer["decode_tokens"] == 4
    assert worker.ask({"prompts": [[1]], "new": 2})["tokens"] == [[1, 1]]


def test_what_an_engine_prints_does_not_garble_its_answers_and_all_have_the_same_threads(start):
    assert start().ask(ASK)["threads"] == "1"


def test_the_peak_is_of_the_process_and_not_of_ours(start):
    assert 1e6 < start().ask(ASK)["peak_bytes"] < 2e8            # a Python without torch


@pytest.mark.parametrize(("how", "message"), [
    ("dies", "fake dies ended with exit code 1; the last it wrote: out of luck"),
    ("babbles", r"fake babbles answered 'what\?\\n', which is not JSON"),
    ("lists", r"fake lists answered '\[1, 2\]\\n', which is not JSON for an object"),
    ("nests", r"fake nests answered '\[\[\[.*, which is not JSON"),
])
def test_a_worker_that_fails_is_named_with_its_last_words(start, how, message):
    worker = start(how)
    worker.ask(ASK)
    with pytest.raises(WorkerFailed, match=message):
        worker.ask(ASK)
    assert worker.process.poll() is not None


@pytest.mark.parametrize("how", ["hangs", "mumbles"])
def test_a_worker_that_hangs_is_put_away(start, how):
    worker = start(how)
    worker.ask(ASK)
    worker.patience = 0.2
    with pytest.raises(WorkerFailed, match=rf"fake {how} gave no answer within 0\.2 s"):
        worker.ask(ASK)
    assert worker.process.poll() is not None


def test_a_worker_that_cannot_start_says_why(command):
    with pytest.raises(WorkerFailed, match="fake ended with exit code 1; the last it wrote: "
                                           "ImportError: no module named engine"):
        Worker("fake", command, SETTINGS | {"weights": "broken"}, 20)


def test_a_dead_worker_fails_again_at_the_next_command(start):
    worker = start()
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(WorkerFailed, match="ended with exit code -9"):
        worker.ask(ASK)


# ---- the race ----


class Answers:
    """A worker in this process."""

    def __init__(self, name, log, fails_at=None):
        self.name, self.log, self.fails_at, self.cpu = name, log, fails_at, 0.0

    def ask(self, command):
        self.log.append(self.name)
        if self.log.count(self.name) == self.fails_at:
            raise WorkerFailed(f"{self.name} ended with exit code 3")
        return {"tokens": [[1, 2]], "prefill_s": 1.0, "decode_s": 1.0, "decode_tokens": 1,
                "peak_bytes": 10}

    def cpu_seconds(self):
        return self.cpu


def of(engine, weights="fp32"):
    bits = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "Q4_1": 4}
    return Contestant(engine, weights, bits[weights])


def test_engines_take_turns_and_the_bandwidth_is_read_before_each(monkeypatch):
    monkeypatch.setattr("clawdemy_infer.peers.race.not_idle", lambda workers: 0.0)
    log = []
    workers = {of(name): Answers(name, log) for name in ("ours", "vllm")}
    runs = race(workers, parse("decode-1"), ASK, 2, lambda: log.append("read") or 5.0)
    assert log == ["read", "ours", "read", "vllm"] * 2
    assert [(run.contestant.engine, len(run.answers), run.bandwidth)
            for run in runs] == [("ours", 2, [5.0, 5.0]), ("vllm", 2, [5.0, 5.0])]


@pytest.mark.parametrize(("fails_at", "left"), [(1, ["ours"]), (2, ["ours", "vllm"])])
def test_one_that_fails_is_reported_and_the_others_go_on(monkeypatch, fails_at, left):
    monkeypatch.setattr("clawdemy_infer.peers.race.not_idle", lambda workers: 0.0)
    log, said = [], []
    workers = {of("vllm"): Answers("vllm", log, fails_at), of("ours"): Answers("ours", log)}
    runs = race(workers, parse("decode-1"), ASK, 3, lambda: 1.0, said.append)
    assert said == ["vllm ended with exit code 3. The others go on."]
    assert sorted(run.contestant.engine for run in runs) == left
    assert log.count("ours") == 3 and log.count("vllm") == fails_at
    assert list(workers) == [of("ours")]


def test_waiting_engines_that_spin_are_told_from_idle_ones():
    class Spins(Answers):
        def cpu_seconds(self):
            self.cpu += 1.0
            return self.cpu
    assert not_idle({of("ours"): Answers("ours", [])}, patience=0.0, look=0.01) == 0.0
    assert not_idle({of("ours"): Spins("ours", [])}, patience=0.0, look=0.01) > 1


# ---- who takes part ----


@pytest.fixture
def environments(tmp_path, monkeypatch):
    monkeypatch.setattr(who, "ENVIRONMENTS", tmp_path)
    (tmp_path / "vllm" / "bin").mkdir(parents=True)
    (tmp_path / "vllm" / "bin" / "python").touch()
    return tmp_path


def test_peers_take_part_in_the_formats_of_as_many_bits(environments):
    found, missing = contestants(["int8", "bf16", "fp16"], ["transformers", "vllm"], None)
    assert [one.name for one in found] == ["ours int8", "ours bf16", "ours fp16",
                                           "transformers bf16", "vllm bf16"]
    assert missing == []


def test_a_peer_that_is_not_set_up_is_one_sentence_with_its_make_target(environments):
    found, missing = contestants(["int4"], ["llama.cpp", "vllm"], Path("m.gguf"))
    assert [one.name for one in found] == ["ours int4"]
    assert missing == ["llama.cpp is not set up, so it takes no part: `make peer-llama` in the "
                       "checkout does that."]
    targets = (Path(__file__).parents[1] / "Makefile").read_text()
    assert all(f"\n{target}:" in targets for target in who.TARGETS.values())


def test_a_narrower_instruction_set_races_against_llama_cpp_built_for_it(environments, monkeypatch):
    monkeypatch.setenv("CLAWDEMY_ISA", "scalar")
    _, missing = contestants(["fp32"], ["llama.cpp"], Path("m.gguf"))
    assert "`make peer-llama-scalar`" in missing[0]
    (environments / "llama.cpp-scalar" / "bin").mkdir(parents=True)
    (environments / "llama.cpp-scalar" / "bin" / "python").touch()
    [_, peer], missing = contestants(["fp32"], ["llama.cpp"], Path("m.gguf"))
    assert missing == [] and "llama.cpp-scalar/bin/python" in peer.command[0]
    targets = (Path(__file__).parents[1] / "Makefile").read_text()
    assert all(f"peer-llama-{name}:" in targets for name in ("scalar", "avx2", "avx512"))


def test_llama_cpp_takes_no_part_without_a_gguf_file(environments):
    assert contestants(["int4"], ["llama.cpp"], None)[1] == [
        "llama.cpp reads GGUF files only, and this model is not one, so it takes no part."]


def test_every_engine_has_the_script_that_its_environment_runs(environments):
    for engine in ("ours", "transformers", "llama.cpp", "vllm"):
        _, script, name = Contestant(engine, "fp32", 32).command
        made = ast.parse(Path(script).with_name(f"{name}.py").read_text()).body
        assert Path(script).is_file() and "Engine" in [getattr(each, "name", "") for each in made]
    assert of("vllm").command[0] == str(environments / "vllm" / "bin" / "python")


# ---- what they do ----


def test_workloads_are_named_by_phase_batch_and_context():
    works = map(parse, ["decode-8", "decode-1@2000", "prefill-512"])
    assert [(w.phase, w.batch, w.context, w.new) for w in works] == [
        ("decode", 8, 128, 32), ("decode", 1, 2000, 32), ("prefill", 1, 512, 1)]
    assert [parse(name).name for name in who.DEFAULT_WORKLOADS] == who.DEFAULT_WORKLOADS


@pytest.mark.parametrize("name", ["decode", "decode-0", "prefill-", "prefill-5@6", "train-1", ""])
def test_another_name_is_refused(name):
    with pytest.raises(ValueError, match=f"workloads={name!r}: accepted are decode-B"):
        parse(name)


@pytest.fixture
def ids(monkeypatch):
    monkeypatch.setattr(who, "text", lambda directory: list(range(1000)))


def test_prompts_are_consecutive_pieces_of_one_text_and_begin_again_where_it_ends(ids):
    command = asked(parse("decode-3@300"), Path())
    assert command == {"prompts": [[*range(300)], [*range(300, 600)], [*range(600, 900)]],
                       "new": 32}
    assert asked(parse("decode-4@300"), Path())["prompts"][3] == [*range(300)]


# ---- what came of it ----


def answered(contestant, work, *answers, bandwidth=1e9):
    return PeerRun(contestant, work, [answer | {"peak_bytes": 10} for answer in answers],
                   [bandwidth] * len(answers))


def decoded(seconds, tokens=62, out=None):
    return {"decode_s": seconds, "prefill_s": 9.0, "decode_tokens": tokens,
            "tokens": out or [[1, 2, 3], [4, 5, 6]]}


def test_rates_leave_the_prefill_out_of_a_decode_and_the_decode_out_of_a_prefill():
    assert round_rates(answered(of("ours"), parse("decode-2"), decoded(2.0),
                          decoded(4.0))) == [31.0, 15.5]
    assert round_rates(answered(of("ours"), parse("prefill-512"),
                          {"prefill_s": 2.0, "decode_s": 5.0})) == [256.0]


def test_tokens_count_until_each_sequence_first_differs():
    assert same_tokens([[1, 2, 3], [1, 9, 3]], [[1, 2, 3], [1, 2, 3]]) == 3 + 1
    assert same_tokens([[9, 2], [1, 2]], [[1, 2], [1, 2]]) == 0 + 2


def test_a_row_sets_the_best_of_ours_beside_each_engine():
    work = parse("decode-2")
    runs = [answered(of("ours"), work, decoded(2.0)),
            answered(of("ours", "bf16"), work, decoded(1.0, out=[[1, 2, 9], [4, 5, 6]])),
            answered(of("ours", "fp16"), work, decoded(4.0)),
            answered(of("vllm", "bf16"), work, decoded(3.0)),
            answered(of("llama.cpp", "Q4_1"), work, decoded(1.0), decoded(0.5), decoded(0.25))]
    rows = peer_rows(runs, SHAPE, MACHINE, dict.fromkeys([run.contestant for run in runs], 1e6))
    vllm, llama = rows[3], rows[4]
    assert (vllm["ours_same_bits"], vllm["ours_best"]) == (3.0, 3.0)
    assert llama["ours_same_bits"] is None and llama["ours_best"] == 0.5
    assert (llama["lowest"], llama["tokens_per_s"], llama["highest"]) == (62, 124, 248)
    assert rows[0]["ours_best"] == 2.0
    assert (rows[1]["same_tokens"], rows[1]["of"]) == (5, 6)
    shown = repr(peers_table(rows))
    assert "3.00×" in shown and "5 of 6" in shown


def test_a_decode_is_judged_by_the_bytes_of_a_step_at_the_bandwidth_of_its_own_minute():
    # By hand: a step at the middle of 128 + 32 tokens sees 144; K and V of 2 layers, 1 head of 8, 4
    # bytes, for 2 sequences.
    bytes = 1e6 + 2 * 144 * 2 * 2 * 8 * 4
    # A step of two tokens takes 1 s.
    run = answered(of("ours"), parse("decode-2"), decoded(31.0), decoded(31.0), bandwidth=1e7)
    assert fraction_of_bound(run, SHAPE, MACHINE, 1e6) == pytest.approx(bytes / 1e7)


def test_a_prefill_is_judged_by_its_flops_at_the_peak_of_its_format():
    flops = SHAPE.prefill(1, 512).flops
    answer = {"prefill_s": flops / 1e10 * 2, "decode_s": 0.0, "tokens": [[1]]}
    runs = {weights: answered(of("ours", weights), parse("prefill-512"), answer)
            for weights in ("fp32", "bf16", "int8")}
    by = {weights: fraction_of_bound(run, SHAPE, MACHINE, 1e6) for weights, run in runs.items()}
    assert by == pytest.approx({"fp32": 0.5, "bf16": 0.125, "int8": 0.5})


# ---- the command ----


def test_the_command_prints_one_table_or_one_object(command, environments, ids, monkeypatch,
                                                    tmp_path, capsys):
    """One engine is missing, one dies when it starts, one in its second round; the table has what
    there is."""
    config = {"model_type": "llama", "hidden_size": 24, "num_hidden_layers": 2,
              "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 40,
              "vocab_size": 67, "head_dim": 8, "max_position_embeddings": 64,
              "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(Contestant, "command", property(lambda self: command))
    monkeypatch.setattr(who, "PEER_FORMATS",
                        {"transformers": {32: ["dies"]}, "vllm": {32: ["broken"]}, "llama.cpp": {}})
    monkeypatch.setattr(who, "weights_of", lambda model: (tmp_path, tmp_path / "m.gguf"))
    monkeypatch.setattr("clawdemy_infer.machine.calibrate.this_machine", lambda *_: MACHINE)
    line = ["bench", "--peers", "--weights", "fp32", "--workloads", "decode-2,prefill-9"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert main([*line, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["engine"], row["workload"]) for row in result["rows"]] == [
        ("ours", "decode-2"), ("transformers", "decode-2"), ("ours", "prefill-9")]
    assert result["rows"][0]["tokens_per_s"] == 31 and result["rows"][2]["tokens_per_s"] == 18
    assert "make peer-llama" in result["notes"][0]
    assert "no module named engine" in result["notes"][1]
    assert "transformers dies ended with exit code 1" in result["notes"][-1]
    assert "decode-2" in out and all(note.split()[0] in out for note in result["notes"])
    assert result["card"]["versions"] == {"ours": "7.1", "transformers": "7.1"}


@pytest.mark.parametrize(("arguments", "named"),
                         [(["--peers", "ollama"], "--peers: 'ollama'"),
                          (["--peers", "--workloads", "x"], "workloads='x'"),
                          (["--peers", "--model", "nobody"], "model='nobody'")])
def test_a_slip_is_named_before_anything_starts(arguments, named, capsys):
    try:
        code = main(["bench", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and named in capsys.readouterr().err


def test_without_peers_bench_is_ours_alone(monkeypatch):
    monkeypatch.setattr(bench, "ours", lambda args: 17)
    assert main(["bench"]) == 17
