"""The command line as a script sees it: exit codes, one JSON object on stdout, one line on stderr
for wrong usage."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clawdemy_infer import files, model
from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.cli import bench_peers, doctor, generate
from clawdemy_infer.cli import main as cli
from clawdemy_infer.cli.arguments import RUNS_IN
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.fast import FORMATS
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.from_config import catalog
from clawdemy_infer.lesson import parts
from clawdemy_infer.machine import calibrate
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.peers import contestants
from clawdemy_infer.rigs import bench as bench_room
from clawdemy_infer.rigs import course
from clawdemy_infer.timing import Timing
from clawdemy_infer.variants import named_caches

REPOSITORY = Path(__file__).parents[1]
COMMANDS = [
    "doctor", "calibrate", "napkin", "generate", "bench", "published", "replay", "quantize",
    "evaluate", "course"
]
NAPKIN = ["napkin", "--model", "llama-2-13b", "--machine", "h100-sxm", "--context", "1024"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's calibration."""
    monkeypatch.setenv("CLAWDEMY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys):
    """main() as a shell would see it."""
    def run(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)
    return run


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True,
                          cwd=REPOSITORY, timeout=120, **options)


# ---- usage ----


def test_help_and_version_say_what_there_is(run):
    top = run("--help")
    assert top.code == 0 and top.err == ""
    assert all(command in top.out for command in COMMANDS)
    assert run("--version").out.strip() == f"clawdemy-infer {cli.__version__}"
    for command in COMMANDS:
        assert "--json" in run(command, "--help").out


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "command"),
        (["napkn"], "napkn"),
        (["napkin", "--model", "llama-2-13b"], "--machine"),
        ([*NAPKIN, "--batch", "0"], "--batch: '0'"),
        ([*NAPKIN, "--batch", "2.5"], "--batch: '2.5'"),
        ([*NAPKIN, "--prompt", "-3"], "--prompt"),
        ([*NAPKIN, "--weights", "fp7"], "--weights: invalid choice: 'fp7'"),
        ([*NAPKIN, "--frobnicate"], "--frobnicate"),
        ([*NAPKIN, "--cont", "9"], "--cont"),  # no guessing at half a name
        (["generate"], "--prompt"),
        (["generate", "--prompt", "a", "--max-tokens", "0"], "--max-tokens: '0'"),
        (["generate", "--prompt", "a", "--temperature", "hot"], "--temperature"),
        (["generate", "--prompt", "a", "--cache", "papers"], "--cache"),
        (["bench", "--weights", "fp32,fp8"
          ], "--weights: 'fp8': accepted are fp32, fp16, bf16, int8, int4"),
        (["bench", "--phase", "decode,train"], "--phase: 'train'"),
        (["bench", "--context", "64,,128"], "--context: ''"),
        (["doctor", "now"], "now"),
        # These the library refuses, before it loads or computes anything.
        (["napkin", "--model", "lama-2-13b", "--machine", "h100-sxm"
          ], "model='lama-2-13b' is not in models.toml; near matches: llama-2-13b"),
        (["napkin", "--model", "llama-2-13b", "--machine", "h10"
          ], "machine='h10' is not in machines.toml; near matches: a10, h100-"),
        (["napkin", "--model", "nowhere/config.json", "--machine", "l4"],
         "model='nowhere/config.json' is not supported; accepted: a config.json"),
        (["napkin", "--machine", "l4"],
         "model is missing; accepted: one, or several with --compare"),
        (["napkin", "--compare", "llama-2-13b,", "--machine", "l4"
          ], "model='' is not in models.toml"),
        ([*NAPKIN, "--tp", "3"], "tp=3: it must divide the N=40 query heads"),
        ([*NAPKIN, "--ep", "2"], "ep=2: Llama-2-13B has no experts"),
        ([*NAPKIN, "--pp", "64"], "pp=64: at most a stage for each of the L=40 layers"),
        (["napkin", "--model", "llama-2-13b", "--machine", "raspberry-pi-5", "--tp", "2"
          ], "tp=2: no link to other devices is known of"),
        ([*NAPKIN, "--sweep", "depth"], "--sweep: invalid choice: 'depth'"),
        (["napkin", "--model", "llama-2-13b", "--machine", "a10", "--activations", "fp8"
          ], "activations='fp8': NVIDIA A10 24 GB has"),
        (["napkin", "--model", "llama-2-13b", "--machine", "tpu-v5e", "--weights", "fp32"
          ], "weights='fp32'"),
        (["generate", "--prompt", "a", "--temperature", "-1"
          ], "temperature=-1.0: 0 (greedy) or above is accepted"),
        (["generate", "--prompt", "a", "--top-p", "1.5"], "top_p=1.5"),
        (["generate", "--prompt", "a", "--model", "smollm2-136m"], "near matches: smollm2-135m"),
    ])
def test_wrong_usage_is_exit_2_and_one_line_that_names_the_argument(run, arguments, named):
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1 and result.err.startswith("clawdemy-infer")
    assert named in result.err


def test_what_fails_without_the_users_fault_is_exit_1_and_one_line(run, monkeypatch):
    def fail(*_, **__):
        raise ValueError(
            "/models/x.gguf: damaged, or another file than expected\n(its sha256 is 00)")

    monkeypatch.setattr(files, "load_model", fail)
    result = run("generate", "--prompt", "a")
    assert (result.code, result.out) == (1, "")
    assert result.err == ("clawdemy-infer generate: /models/x.gguf: damaged, or another file than "
                          "expected (its sha256 is 00)\n")


@pytest.mark.parametrize("error", [
    FileNotFoundError("the model x.gguf is not installed"),
    ModuleNotFoundError("No module named 'gguf'"),
    MemoryError()
], ids=lambda error: type(error).__name__)
def test_a_missing_part_is_a_sentence_and_no_traceback(run, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(files, "load_model", fail)
    result = run("generate", "--prompt", "a")
    assert result.code == 1 and result.err.count("\n") == 1 and (str(error)
                                                                 or "MemoryError") in result.err


def test_ctrl_c_is_quiet(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "load_model", interrupt)
    result = run("generate", "--prompt", "a")
    assert (result.code, result.out, result.err) == (130, "", "")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], NAPKIN, [*NAPKIN, "--json"], ["napkin", "--model", "x", "--machine", "y"]])
def test_what_needs_no_torch_does_not_wait_for_it(arguments):
    script = ("import sys\nfrom clawdemy_infer.cli.main import main\n"
              f"try: main({arguments!r})\nexcept SystemExit: pass\n"
              "slow = {'torch', 'transformers', 'numpy', 'matplotlib'}\n"
              "print(sorted(slow & set(sys.modules)), file=sys.stderr)")
    assert python("-c", script).stderr.splitlines()[-1] == "[]"


def test_python_m_is_the_same_command():
    result = python("-m", "clawdemy_infer", *NAPKIN, "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["model"] == "Llama-2-13B"
    assert python("-m", "clawdemy_infer", "napkin").returncode == 2


def test_a_reader_that_has_read_enough_is_no_error():
    """`clawdemy-infer napkin … | head -1`."""
    script = f"{shlex.quote(sys.executable)} -m clawdemy_infer {' '.join(NAPKIN)} | true; exit 0"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=REPOSITORY,
                            timeout=120)
    assert "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr


# ---- napkin ----


def test_the_napkin_of_the_worked_example(run):
    """Llama-2-13B, B = 64, S = 1,024 on an H100: 26.03 GB of weights, 53.69 GB of cache, and so
    some 24 ms a step."""
    result = run(*NAPKIN, "--batch", 64, "--json")
    assert result.code == 0 and result.out.count("\n") == 1
    card = json.loads(result.out)
    assert {"fits", "weight_bytes", "kv_bytes", "prefill", "decode", "tokens_per_s"} <= set(card)
    assert {"flops", "bytes", "seconds", "bound"} <= set(card["prefill"])
    assert {"flops", "bytes", "seconds", "intensity", "bound"} <= set(card["decode"])
    assert card["fits"] is True
    assert (card["weight_bytes"], card["kv_bytes"]) == (26_031_728_640, 64 * 838_860_800)
    assert card["decode"]["seconds"] == pytest.approx(
        23.8e-3, rel=0.03) and card["decode"]["bound"] == "memory"
    assert card["tokens_per_s"] == pytest.approx(64 / card["decode"]["seconds"])
    assert card["prefill"]["bound"] == "compute"


def test_the_card_can_be_followed_by_hand(run):
    out = run(*NAPKIN, "--batch", 64).out
    for term in ("P = 13,015,864,320", "13,015,864,320 × 2 B", "26.0 GB",
                 "2·40·40·128 × 2 B × 1,024 × 64", "53.7 GB", "79.7 GB",
                 "the largest batch that fits is 71", "FLOPs / 989 TFLOP/s", "bytes / 3.35 TB/s",
                 "ridge", "295", "memory", "tokens/s"):
        assert term in out, term


def test_what_does_not_fit_is_exit_1_with_the_numbers_and_no_times(run):
    result = run(*NAPKIN, "--batch", 256)
    assert result.code == 1 and result.err == ""
    assert "DOES NOT FIT; the largest batch that fits is 71" in result.out
    assert "241 GB" in result.out and "tokens/s" not in result.out
    result = run(*NAPKIN, "--batch", 256, "--json")
    card = json.loads(result.out)
    assert result.code == 1 and card["fits"] is False
    assert card["decode"]["seconds"] is card["prefill"]["seconds"] is card["tokens_per_s"] is None
    assert "not even one sequence fits" in run("napkin", "--model", "llama-2-70b", "--machine",
                                               "l4").out


@pytest.mark.parametrize("name", catalog.model_names())
def test_every_model_has_a_card(run, name):
    for weights in ("bf16", "q4_k"):
        result = run("napkin", "--model", name, "--machine", "h200-sxm", "--weights", weights,
                     "--kv", "fp8")
        assert result.code in (0, 1) and result.err == "" and len(result.out) > 500


@pytest.mark.parametrize("name", catalog.machine_names())
def test_every_machine_has_a_card(run, name):
    for weights in ("bf16", "int4"):
        result = run("napkin", "--model", "llama-3-8b", "--machine", name, "--weights", weights)
        assert result.code in (0, 1) and result.err == "" and len(result.out) > 500


def test_the_card_of_several_devices_can_be_followed_by_hand(run):
    """Llama-2-70B on eight H100s: 160 all-reduces of 8,192 numbers in bf16, each 6.6 + 14·0.6 µs
    and 14/8 of 16,384 B at 450 GB/s."""
    result = run("napkin", "--model", "llama-2-70b", "--machine", "h100-sxm", "--tp", 8)
    assert result.code == 0
    for term in ("8 of them: tp = 8", "160 × (6.60 µs + 14 × (600 ns + bytes / 8 / 450 GB/s))",
                 "16.4 kB", "NVLink 4", "$86.40 an hour"):
        assert term in result.out, term
    card = json.loads(
        run("napkin", "--model", "llama-2-70b", "--machine", "h100-sxm", "--tp", 8, "--json").out)
    assert card["decode"]["communication_s"] == pytest.approx(160*(15e-6 + 14/8*16384/450e9))
    assert card["decode"]["seconds"] == pytest.approx(card["decode"]["memory_s"] +
                                                      card["decode"]["communication_s"])
    assert card["layout"] == {"tp": 8, "pp": 1, "ep": 1, "devices": 8}
    # one of them is too small
    assert run("napkin", "--model", "llama-2-70b", "--machine", "h100-sxm").code == 1


def test_a_mixture_of_experts_has_its_terms(run):
    out = run("napkin", "--model", "mixtral-8x7b", "--machine", "h100-sxm", "--tp", 2, "--pp", 2,
              "--ep", 4, "--batch", 16).out
    for term in ("E = 8 experts, k = 2", "experts", "all-reduce", "all-to-all", "send",
                 "16 of them: tp = 2, pp = 2, ep = 4"):
        assert term in out, term


def test_a_sweep_is_a_frontier(run):
    """The table of the Scaling Book (Austin et al. 2025): Llama-2-13B on eight TPU v5e, context
    8,192; beyond 16 it runs out of memory."""
    arguments = [
        "napkin", "--model", "llama-2-13b", "--machine", "tpu-v5e", "--tp", 8, "--context", 8192,
        "--sweep", "batch"
    ]
    report = json.loads(run(*arguments, "--json").out)
    assert report["sweep"] == "batch"
    assert [(row["batch"], row["fits"]) for row in report["rows"]] == [(1, True), (2, True),
                                                                       (4, True), (8, True),
                                                                       (16, True), (32, False)]
    result = run(*arguments)
    assert result.code == 0 and result.err == ""
    assert len([line for line in result.out.splitlines() if "Llama-2-13B" in line
                ]) == 6 and "NO" in result.out
    assert run("napkin", "--model", "llama-2-70b", "--machine", "l4", "--sweep", "batch").code == 1
    assert run("napkin", "--model", "llama-2-7b", "--machine", "l4", "--sweep", "context").code == 0


def test_models_and_machines_stand_side_by_side(run):
    result = run("napkin", "--compare", "llama-3-8b,qwen3-8b", "--machine", "h100-sxm,rtx-4090",
                 "--json")
    cards = json.loads(result.out)["cards"]
    assert [(card["model"], card["machine"].split()[-3]) for card in cards] == [
        ("Llama-3-8B", "SXM"), ("Llama-3-8B", "4090"), ("Qwen3-8B", "SXM"), ("Qwen3-8B", "4090")]
    alone = json.loads(run("napkin", "--model", "qwen3-8b", "--machine", "rtx-4090", "--json").out)
    assert cards[3] == alone
    out = run("napkin", "--model", "llama-2-70b", "--compare", "llama-3-8b", "--machine", "l4")
    # one of them does not fit
    assert out.code == 1 and "Llama-2-70B" in out.out and "NO" in out.out


def test_a_config_file_is_a_model(run, tmp_path):
    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
        "vocab_size": 128256, "max_position_embeddings": 8192, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    card = json.loads(run("napkin", "--model", path, "--machine", "h100-sxm", "--json").out)
    assert card["parameters"] == 8_030_261_248                          # Llama-3-8B
    path.write_text(json.dumps(config | {"model_type": "unheard of"}))
    refused = run("napkin", "--model", path, "--machine", "h100-sxm")
    assert refused.code in (1, 2) and refused.err.count("\n") == 1 and "unheard of" in refused.err


def test_the_formats_of_a_config_file_are_taken_and_said_unless_an_option_says_otherwise(
        run, tmp_path):
    """gpt-oss-20b, of which its authors say 12.8 GiB: experts in mxfp4, all else in bf16."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 24,
        "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128,
        "vocab_size": 201088, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4", "kv_cache_quant_algo": "FP8"}}))
    asked = ["napkin", "--model", path, "--machine", "h100-sxm"]
    card = json.loads(run(*asked, "--json").out)
    assert (card["weights"], card["kv"], card["activations"]) == ("mxfp4", "fp8", "bf16")
    assert card["weight_bytes"] / 2**30 == pytest.approx(12.8, abs=0.05)
    assert card["weights_of_parts"] == {"expert": 4.25 / 8}
    assert "Formats as the file says: expert 0.5312 B a weight" in run(*asked).out
    asked = [*asked, "--weights", "int8", "--kv", "bf16", "--json"]
    card = json.loads(run(*asked).out)
    assert (card["weights"], card["kv"], card["weights_of_parts"]) == ("int8", "bf16", {})
    path.write_text(path.read_text().replace("mxfp4", "quip"))
    refused = run(*asked[:5])
    assert refused.code in (1, 2) and "quant_method='quip' is not supported" in refused.err


def test_a_window_keeps_no_more_than_itself(run):
    out = run("napkin", "--model", "mistral-7b", "--machine", "h100-sxm", "--context", 10000).out
    assert "× 4,096 × 1" in out


def test_a_context_beyond_the_models_own_is_noted(run):
    assert "made for contexts of up to 4,096" in run(*NAPKIN[:-1], 5000).out
    assert "made for contexts" not in run(*NAPKIN).out


def test_this_machine_must_have_been_calibrated(run):
    result = run("napkin", "--model", "smollm2-135m", "--machine", "this")
    assert result.code == 1 and result.err.count(
        "\n") == 1 and "clawdemy-infer calibrate" in result.err


# ---- what is measured of the machine ----

RECORD = {
    "name": "a test machine", "bandwidth": [
        {"bytes": 2**20, "bytes_per_s": 5e10, "spread": 0.05},
        {"bytes": 2**30, "bytes_per_s": 1e10, "spread": 0.12}],
    "peak_flops": {"fp32": 2e11, "bf16": 4e11}, "fixed_s_per_op": 4e-6, "memory": 8*2**30,
    "date": "2026-01-02T03:04:05+00:00", "gemm": [{"dtype": dtype, "m": m, "flops_per_s": m*1e9}
                                                  for dtype in ("fp32", "bf16")
                                                  for m in (1, 128)],
    "head": [{"dtype": dtype, "m": 1, "flops_per_s": 3e9} for dtype in ("fp32", "bf16")],
    "attention": [{"dtype": dtype, "m": 16, "flops_per_s": 5e9} for dtype in ("fp32", "bf16")],
    "elementwise": [{"dtype": dtype, "m": 1, "bytes_per_s": 9e9}
                    for dtype in ("fp32", "bf16")], "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def calibrated(monkeypatch):
    measured = []
    monkeypatch.setattr(calibrate, "calibrate", lambda *_: measured.append(1))
    monkeypatch.setattr(calibrate, "kept_record", lambda *_: RECORD)
    return measured


def test_the_napkin_of_this_machine_uses_its_calibration(run, calibrated):
    card = json.loads(run("napkin", "--model", "smollm2-135m", "--machine", "this", "--json").out)
    assert (card["machine"], card["bandwidth"], card["peak_flops"],
            card["memory_bytes"]) == ("a test machine", 1e10, 4e11, 8*2**30)
    assert card["decode"]["seconds"] == pytest.approx(card["decode"]["bytes"] / 1e10)
    assert not calibrated                                               # it is read and not made


def test_calibrate_measures_and_shows_the_curves(run, calibrated):
    result = run("calibrate")
    assert result.code == 0 and calibrated == [1]
    for part in ("a test machine", "8.59 GB", "1.05 MB", "50.0 GB/s", "±5%", "10.0 GB/s",
                 "128 GFLOP/s", "peak: fp32 200 GFLOP/s", "4.00 µs"):
        assert part in result.out, part
    result = run("calibrate", "--json")
    assert result.code == 0 and result.out.count("\n") == 1 and "Measuring" in result.err
    assert json.loads(result.out)["machine"] == RECORD and "torch" in json.loads(
        result.out)["versions"]


def test_doctor_says_what_there_is(run, calibrated):
    result = run("doctor")
    assert result.code == 0 and "Ready" in result.out and "LACKING" not in result.out
    for part in ("CPU", "memory", "GPU", "Triton", "C++ compiler", "intact", "2026-01-02", "cache",
                 f"torch {torch.__version__}"):
        assert part in result.out, part
    report = json.loads(run("doctor", "--json").out)
    assert report["ready"] is True and report["machine"] == RECORD and report["versions"][
        "torch"] == torch.__version__
    asked = ["CPU", "memory", "GPU", "Triton", "C++ compiler",
             *(f"{format} weights" for format in FORMATS), "model", "calibration", "cache"]
    assert [check["what"] for check in report["checks"]] == asked


def test_doctor_without_a_calibration_is_well_and_says_how_to_make_one(run):
    assert json.loads(run("doctor", "--json").out)["machine"] is None
    result = run("doctor")
    assert result.code == 0 and "clawdemy-infer calibrate" in result.out


def test_doctor_finds_a_damaged_model(run, monkeypatch, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF and then nothing")
    monkeypatch.setattr(files.load, "packaged_file", lambda *_: file)
    result = run("doctor")
    assert result.code == 1 and "LACKING" in result.out
    assert "damaged" in result.out and "--force-reinstall" in result.out
    assert json.loads(run("doctor", "--json").out)["ready"] is False


def test_doctor_finds_what_is_missing(run, monkeypatch):
    def missing(*_):
        raise FileNotFoundError("the model is not installed: run `pip install …`")

    nothing_free = SimpleNamespace(total=2**33, available=2**30)
    monkeypatch.setattr(files.load, "packaged_file", missing)
    monkeypatch.setattr(doctor, "installed", lambda package: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=10**6))
    monkeypatch.setattr("psutil.virtual_memory", lambda: nothing_free)
    found = {check.what: check for check in doctor.checks()}
    assert {what for what, check in found.items() if not check.ok} == {"memory", "model", "cache"}
    assert "pip install" in found["model"].means and "close other programs" in found["memory"].means
    assert "CLAWDEMY_CACHE" in found["cache"].means and "apt install g++" in found[
        "C++ compiler"].means
    assert run("doctor").code == 1


# ---- generate ----


@pytest.fixture
def loaded(smollm, monkeypatch):
    monkeypatch.setattr(files, "load_model", lambda *_, **__: smollm)
    return smollm


def test_generate_streams_the_text_and_says_the_times_beside_it(run, loaded):
    expected = model.generate(loaded, "The capital of France is", 6).text
    result = run("generate", "--prompt", "The capital of France is", "--max-tokens", 6)
    assert result.code == 0 and result.out == expected + "\n"
    assert re.fullmatch(
        r"5 prompt tokens, 6 generated \(ended by: length\); TTFT [\d.]+ m?s, TPOT [\d.]+ m?s\n",
        result.err)


def test_generate_in_json(run, loaded):
    result = run("generate", "--prompt", "The capital of France is", "--max-tokens", 6, "--json")
    assert result.out.count("\n") == 1 and result.err == ""
    out, expected = json.loads(result.out), model.generate(loaded, "The capital of France is", 6)
    assert out["prompt_tokens"] == 5 and out["tokens"] == expected.tokens and out[
        "text"] == expected.text
    assert out["ttft_s"] > 0 and out["tpot_s"] > 0 and out["finish_reason"] == "length"


def test_generate_in_json_of_a_single_token_has_no_time_per_token(run, loaded):
    assert json.loads(run("generate", "--prompt", "Hello", "--max-tokens", 1,
                          "--json").out)["tpot_s"] is None


def test_the_chat_template_a_stop_text_and_no_cache(run, loaded):
    chat = loaded.tokenizer.chat([{"role": "user", "content": "Count to five."}])
    expected = model.generate(loaded, chat, 8, stop=[" 3"])
    result = run("generate", "--prompt", "Count to five.", "--chat", "--max-tokens", 8, "--stop",
                 " 3", "--cache", "none", "--json")
    out = json.loads(result.out)
    assert (out["text"], out["prompt_tokens"], out["finish_reason"]) == (expected.text, len(chat),
                                                                         expected.finish_reason)


def test_the_same_seed_draws_the_same_text(run, loaded):
    line = ["generate", "--json", "--prompt", "Once", "--max-tokens", 9, "--temperature", 1.5]
    line += ["--top-k", 50, "--top-p", 0.95, "--min-p", 0.01]
    first, second, other = (json.loads(run(*line, "--seed", seed).out)["tokens"]
                            for seed in (1, 1, 2))
    assert first == second != other


@pytest.mark.parametrize("arguments, named",
                         [(["--prompt", ""], "prompt is empty"),
                          (["--prompt", "a", "--max-tokens", "9999"], "prompt has 1"),
                          (["--prompt", "a", "--stop", ""], "stop=("), ])
def test_what_the_model_cannot_take_is_wrong_usage(run, loaded, arguments, named):
    result = run("generate", *arguments)
    assert result.code == 2 and result.err.count("\n") == 1 and named in result.err


def test_an_interrupted_generation_keeps_what_is_there(run, loaded, monkeypatch):
    calls = []
    real = loaded.forward

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(loaded, "forward", interrupted)
    result = run("generate", "--prompt", "The capital of France is", "--max-tokens", 30)
    assert result.code == 130 and len(result.out) > 3 and "interrupted" in result.err


# ---- bench ----

TINY = ModelShape("tiny", L=2, D=24, N=3, K=1, H=8, F=40, V=67, max_context=2048)


@pytest.fixture
def tiny(monkeypatch):
    """bench on a model of a few thousand parameters, on a machine that is known, with a stopwatch
    that measures nothing."""
    machine = Machine("a test machine", ((1.0, 1e9),), {"fp32": 1e12, "bf16": 3e12}, memory=60e6)

    def watch(work, repeats):
        work()
        return Timing((0.5, 0.5, 0.5))

    loaded = []

    def load(name, device):
        torch.manual_seed(1)
        return Decoder(ModelConfig(TINY)).eval()

    def pack(decoder, weights, compile=False):
        loaded.append(weights)
        return faster(decoder, weights, compile=compile)

    monkeypatch.setattr(calibrate, "this_machine", lambda *_: machine)
    monkeypatch.setattr(parts, "bracketed", lambda machine: watch)
    monkeypatch.setattr(files, "load_model", load)
    monkeypatch.setattr("clawdemy_infer.fast.faster.faster", pack)
    monkeypatch.setattr("psutil.getloadavg", lambda: (0.1, 0.1, 0.1))
    return loaded


def test_bench_shows_the_card_then_the_rows(run, tiny):
    result = run("bench", "--context", "7,30", "--weights", "fp32")
    # what the roofline allows comes first
    assert result.code == 0
    assert result.out.index("intensity") < result.out.index("fraction of bound")
    assert "{" not in result.out


def test_bench_in_json_has_a_row_for_all_that_is_asked(run, tiny):
    result = run("bench", "--context", "7,30", "--batch", "1,2", "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert [(row["weights"], row["phase"], row["batch"], row["context"])
            for row in report["rows"]] == [(weights, phase, batch, context)
                                           for weights in ("fp32", "bf16")
                                           for phase in ("prefill", "decode")
                                           for batch in (1, 2)
                                           for context in (7, 30)]
    needed = {
        "phase", "weights", "batch", "context", "napkin_s", "predicted_s", "predicted_low_s",
        "predicted_high_s", "measured_s", "ratio", "fraction_of_bound"
    }
    assert all(needed <= set(row) for row in report["rows"])
    assert [row["napkin_s"]
            for row in report["card"]["rows"]] == [row["napkin_s"] for row in report["rows"]]
    assert tiny == ["fp32", "bf16"]                      # each is loaded once
    assert report["notes"] == []


def test_bench_in_json_prints_the_card_elsewhere(run, tiny):
    result = run("bench", "--phase", "decode", "--weights", "bf16", "--context", "9", "--json")
    assert result.out.count("\n") == 1 and len(json.loads(result.out)["rows"]) == 1
    assert "intensity" in result.err and "a test machine" in result.err


def test_bench_times_each_phase_at_its_own_contexts(run, tiny):
    rows = json.loads(run("bench", "--json", "--weights", "fp32").out)["rows"]
    assert [(row["phase"], row["context"]) for row in rows] == [("prefill", 64), ("prefill", 256),
                                                                ("prefill", 1024), ("decode", 64),
                                                                ("decode", 512), ("decode", 1024)]


def test_bench_coverage_runs_the_held_out_settings_and_says_how_many_are_inside(
        run, tiny, monkeypatch):
    held_out = [("decode", "fp32", 1, 7), ("prefill", "bf16", 2, 9)]
    monkeypatch.setattr(bench_room, "HELD_OUT", held_out)
    report = json.loads(run("bench", "--coverage", "--json").out)
    assert [(row["phase"], row["weights"], row["batch"], row["context"])
            for row in report["rows"]] == held_out
    # A data sheet has no spread, and 0.5 s for steps of microseconds are not inside.
    assert report["errors"]["coverage"] == 0 and report["errors"]["width"] == 0
    assert "0% of the measurements are inside their interval" in run("bench", "--coverage").out


def test_bench_does_not_time_what_does_not_fit_and_says_so(run, tiny):
    """60 MB of memory. A token's cache is 2·2·1·8·4 B = 128 B in fp32, so a batch of 1,000 with
    1,000 tokens needs 128 MB."""
    line = ["bench", "--phase", "decode", "--weights", "fp32", "--batch", "1,1000", "--context",
            "1000"]
    result, report = run(*line), json.loads(run(*line, "--json").out)
    assert result.code == 0 and [row["batch"] for row in report["rows"]] == [1]
    assert [row["fits"] for row in report["card"]["rows"]] == [True, False]
    assert re.search(r"decode +fp32 +1,000 +1,000 .* NO *$", result.out, re.MULTILINE)
    assert "of batch 1,000 and context 1,000 was not timed: it needs 128 MB" in result.out
    assert run("bench", "--phase", "decode", "--weights", "fp32", "--batch", "1000", "--context",
               "1000").code == 1


def test_bench_says_when_the_machine_is_busy(run, tiny, monkeypatch):
    monkeypatch.setattr("psutil.getloadavg", lambda: (1.7, 1.0, 1.0))
    assert "The machine is busy (load average 1.7" in run("bench", "--context", "5", "--weights",
                                                          "fp32").out


def test_bench_says_when_a_row_is_faster_than_can_be(run, tiny, monkeypatch):
    """Bytes that moved faster than memory delivers them: never a success."""
    monkeypatch.setattr(parts, "bracketed", lambda machine: lambda work, repeats: Timing(
        (1e-9, 1e-9, 1e-9)))
    assert "faster than its bound" in run("bench", "--context", "5", "--weights", "fp32").out


def test_bench_says_when_a_format_loses_to_fp32(run, tiny, monkeypatch):
    times = iter([1.0, 1.5])
    monkeypatch.setattr(parts, "bracketed", lambda machine: lambda work, repeats: Timing(
        (next(times), )*3))
    notes = json.loads(run("bench", "--context", "5", "--phase", "decode", "--json").out)["notes"]
    assert [note for note in notes if "bf16 loses here" in note and "1.50 times" in note]


def test_bench_takes_a_step_apart(run, tiny):
    line = ["bench", "--context", "9", "--weights", "fp32", "--breakdown"]
    assert "not explained" in run(*line).out
    for one in json.loads(run(*line, "--json").out)["breakdown"]:
        assert {part["name"] for part in one["parts"]} == {
            "qkv", "out", "gate_up", "down", "head", "attention", "element-wise", "launches",
            "not explained"}
        assert sum(part["measured_s"] for part in one["parts"]) == pytest.approx(one["whole_s"])


@pytest.mark.parametrize("arguments, named",
                         [(["--context", "4096"],
                           "context=4096 is not supported; accepted: at most 2048"),
                          (["--weights", "fp32,fp16"], "weights='fp16'")])
def test_bench_refuses_before_it_times(run, tiny, arguments, named):
    result = run("bench", *arguments)
    assert result.code == 2 and named in result.err and result.out == ""


# ---- compiled code ----


@pytest.mark.parametrize("arguments", [
    ["generate", "--prompt", "a"], ["bench", "--context", "5"],
    ["replay", "uniform", "--on", "engine"]], ids=" ".join)
def test_every_command_gets_compiled_code_by_the_same_door(run, tiny, monkeypatch, arguments):
    asked = []

    def door(model, weights=None, backend=None, compile=False):
        asked.append(compile)
        raise ValueError("compile: there is no compiler here")

    monkeypatch.setattr("clawdemy_infer.fast.faster.faster", door)
    result = run(*arguments, "--compile")
    assert (result.code, result.out, asked) == (2, "", [True])
    assert "compile: there is no compiler here" in result.err


# ---- course ----


@pytest.mark.parametrize("arguments, lessons, given", [
    ([], ([], None), (False, False)),
    (["--json"], ([], None), (False, False)),
    (["01", "02", "--core"], (["01", "02"], None), (True, False)),
    (["--resume", "--in", "here"], ([], Path("here")), (False, True)),
])
def test_course_is_handed_on(run, monkeypatch, arguments, lessons, given):
    asked = []

    def run_course(*got):
        asked.append(got)
        raise KeyboardInterrupt

    monkeypatch.setattr(course, "choose", lambda *got: asked.append(got) or [Path("01.ipynb")])
    monkeypatch.setattr(course, "run_course", run_course)
    assert run("course", *arguments).code == 130
    assert asked == [lessons, ([Path("01.ipynb")], *given)]


# ---- the page of all commands ----

page = runpy.run_path(str(REPOSITORY / "notebooks" / "commands.py"))["page"]
EXAMPLES = re.findall(r"^  (clawdemy-infer .*)$", page(), re.MULTILINE)


def test_the_page_of_the_command_line_is_up_to_date():
    """In its words: where lines are wrapped depends on the version of Python."""
    kept = (REPOSITORY / "notebooks" / "COMMANDS.md").read_text("utf-8")
    assert kept.split() == page().split()


def test_every_command_has_an_example_in_its_help():
    assert {shlex.split(line)[1] for line in EXAMPLES} == set(COMMANDS)


@pytest.mark.parametrize("line", EXAMPLES)
def test_every_example_is_a_command(line):
    cli.parser().parse_args(shlex.split(line)[1:])


def test_the_caches_are_those_that_there_are():
    assert set(generate.CACHES) == {*named_caches.CACHES, "none"}


def test_the_formats_and_peers_are_those_that_there_are():
    assert set(RUNS_IN) == set(FORMATS) and set(bench_peers.PEERS) == set(contestants.PEER_FORMATS)
