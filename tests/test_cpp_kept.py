"""Compiled code is kept where nobody else can put any, is checked before it is loaded, and made
again when it is damaged; a compiler that fails or hangs costs one sentence."""

import ctypes
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.fast import cpp, kernels
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.model import Decoder, ModelConfig

pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")),
                                reason="there is no C++ compiler here")

SOURCE = 'extern "C" int answer() { return ANSWER; }\n'


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of its own, a source of one line, and nothing remembered."""
    monkeypatch.setenv("CLAWDEMY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "tiny.cpp").write_text(SOURCE)
    monkeypatch.setattr(cpp, "FOLDER", tmp_path / "sources")
    monkeypatch.setattr(cpp, "FLAGS", ["-O0", "-fPIC", "-shared"])
    forget()
    yield tmp_path / "cache" / "cpp"
    forget()


def forget():
    cpp._library.cache_clear()
    cpp.available.cache_clear()


def answer(number=42):
    forget()
    return cpp.library("tiny", ANSWER=number).answer()


def compiler(tmp_path, monkeypatch, script):
    """A compiler that does what the lines of shell say."""
    path = tmp_path / "compiler"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def kept(folder):
    return sorted(folder.glob("*.so"))


def test_code_is_compiled_once_into_a_folder_that_is_ours_alone(home, tmp_path, monkeypatch):
    assert answer() == 42
    assert home.stat().st_mode & 0o777 == 0o700
    [file] = kept(home)
    assert {each.name for each in home.iterdir()} == {file.name, "lock"}
    monkeypatch.setattr(cpp, "_compiled", lambda *_: pytest.fail("compiled again"))
    assert answer() == 42


def test_another_compiler_of_the_same_name_compiles_anew(home, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, 'exec g++ "$@"')
    assert answer() == 42
    compiler(tmp_path, monkeypatch, 'exec g++ "$@"  # a newer one')
    assert answer() == 42
    assert len(kept(home)) == 2


def test_only_sources_are_read(home, tmp_path):
    """Editors and others leave folders, links to nowhere and bytes beside them."""
    assert answer() == 42
    sources = tmp_path / "sources"
    (sources / "__pycache__").mkdir()
    (sources / ".tiny.cpp.swp").write_bytes(b"\xff\xfe")
    (sources / ".#tiny.cpp").symlink_to("nowhere")
    (sources / "tiny.orig").write_bytes(b"\xff")
    assert answer() == 42 and len(kept(home)) == 1


@pytest.mark.parametrize(("isa", "missing"), [
    ("avx2", "fma"), ("avx2", "bmi2"), ("avx512", "avx512dq"), ("avx512", "avx512vl")])
def test_an_instruction_set_is_refused_where_a_part_of_it_is_missing(monkeypatch, isa, missing):
    monkeypatch.setenv("CLAWDEMY_ISA", isa)
    monkeypatch.setattr(cpp, "ISA", {"": "native", isa: "x86-64"})
    monkeypatch.setattr(cpp, "cpuinfo", lambda key: " ".join(cpp.NEEDS[isa]))
    assert cpp.isa() == isa
    monkeypatch.setattr(cpp, "cpuinfo", lambda key: " ".join(cpp.NEEDS[isa] - {missing}))
    with pytest.raises(ValueError, match=f"CLAWDEMY_ISA='{isa}' is not supported"):
        cpp.isa()


@pytest.mark.parametrize("damage", [
    lambda file: file.write_bytes(file.read_bytes()[:5000]), lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(b"\x7fELF" + bytes(9000)),
    lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x01"),
    lambda file: (file.rename(file.parent / "else"), file.symlink_to("else"))],
    ids=["truncated", "empty", "another", "a bit", "a link"])
def test_what_is_damaged_is_made_again_and_never_loaded(home, damage):
    assert answer() == 42
    [file] = kept(home)
    whole = file.read_bytes()
    file.rename(file.with_suffix(".loaded"))            # this process runs it still
    file.write_bytes(whole)
    damage(file)
    assert answer() == 42
    assert [each.read_bytes() for each in kept(home)] == [whole]


def test_a_library_that_somebody_else_put_there_is_not_run(home, tmp_path):
    assert answer(1) == 1
    [file] = kept(home)
    forget()
    planted = subprocess.run(["g++", "-shared", "-fPIC", "-DANSWER=666", "-x", "c++", "-", "-o",
                              str(tmp_path / "planted.so")], input=SOURCE, text=True, check=True)
    assert planted.returncode == 0 and ctypes.CDLL(str(tmp_path / "planted.so")).answer() == 666
    os.replace(tmp_path / "planted.so", file)
    assert answer(1) == 1


@pytest.mark.parametrize("make", [
    lambda folder: (folder.mkdir(), folder.chmod(0o777)),
    lambda folder: (folder.mkdir(), folder.chmod(0o720)),
    lambda folder: folder.symlink_to(folder.parent), lambda folder: folder.write_text("a file")],
    ids=["all write", "a group writes", "a link", "a file"])
def test_a_folder_that_is_not_ours_alone_is_refused_with_the_way_on(home, make):
    home.parent.mkdir()
    make(home)
    with pytest.raises(cpp.CompilerFailed, match="compile: .*CLAWDEMY_CACHE.*runs as PyTorch"):
        answer()
    assert not home.is_dir() or not kept(home)


def test_a_folder_of_another_user_is_refused(home, monkeypatch):
    home.mkdir(parents=True)
    monkeypatch.setattr(os, "getuid", lambda: home.stat().st_uid + 1)
    with pytest.raises(cpp.CompilerFailed, match="not a folder of yours"):
        answer()


def test_a_cache_that_cannot_be_written_is_one_sentence(home, monkeypatch):
    monkeypatch.setenv("CLAWDEMY_CACHE", "/dev/null/cache")
    with pytest.raises(cpp.CompilerFailed, match="compile: .*/dev/null.*runs as PyTorch"):
        answer()


@pytest.mark.parametrize("script, said", [
    ("echo 'x.cpp:1: error: no such thing' >&2; exit 1", "refused: x.cpp:1: error: no such thing"),
    ("exit 3", "exit code 3"), ("exit 0", "exit code 0"),
    ('while [ "$1" != -o ]; do shift; done; echo garbage > "$2"', "compile: "),
    ("yes error 'very long' | head -c 3000000 >&2; exit 1", "refused: error very long"),
])
def test_a_compiler_that_fails_costs_one_sentence(home, tmp_path, monkeypatch, script, said):
    compiler(tmp_path, monkeypatch, script)
    with pytest.raises(cpp.CompilerFailed) as error:
        answer()
    assert said in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 600 and kept(home) == []
    monkeypatch.delenv("CXX")
    assert answer() == 42                               # and what it left stands in nobody's way


def test_a_compiler_that_hangs_is_stopped_with_what_it_started_and_waited_for_once(
        home, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, f"echo >> {tmp_path}/begun; sleep 600 & echo $! > "
             f"{tmp_path}/child; wait")
    monkeypatch.setattr(cpp, "COMPILER_S", 1)
    forget()
    for _ in range(2):
        with pytest.raises(cpp.CompilerFailed, match="stopped after 1 s; without compile"):
            cpp.library("tiny", ANSWER=42)
    assert (tmp_path / "begun").read_text() == "\n"
    child = Path("/proc") / (tmp_path / "child").read_text().strip()
    for _ in range(200):                                # the system needs a moment to bury it
        if not child.exists() or "Z" in (child / "stat").read_text().split()[2]:
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the compiler has started still runs")


def test_where_the_compiler_fails_products_are_pytorchs_and_a_warning_says_so(
        home, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, "exit 1")
    with pytest.warns(UserWarning, match="refused.*runs as PyTorch"):
        assert not cpp.available()
    assert kernels.kernels_in_words("fp32") == "plain"
    torch.manual_seed(0)
    model = Decoder(ModelConfig(ModelShape("tiny", L=1, D=32, N=2, K=1, H=16, F=32, V=64))).eval()
    for format in ("int8", "bf16"):
        faster(model, format)
    with pytest.raises(cpp.CompilerFailed, match="compile: .*without compile it runs as PyTorch"):
        faster(model, compile=True)


def test_a_library_that_fails_when_others_did_not_leaves_its_products_to_pytorch(monkeypatch):
    def fails(*_):
        raise cpp.CompilerFailed("compile: the disk is full")
    monkeypatch.setattr(cpp, "available", lambda: True)
    monkeypatch.setattr(kernels, "code", fails)
    weight, x = torch.randn(32, 64), torch.randn(3, 64)
    [(_, makers)] = kernels.table("fp32")
    torch.testing.assert_close(kernels.made_by(makers, weight)(x), x @ weight.T)


def test_what_a_killed_process_left_is_swept_by_the_next(home):
    (home / "unfinished").mkdir(parents=True)
    home.chmod(0o700)
    (home / "unfinished" / "made.so").write_bytes(b"half")
    (home / "unfinished" / "cc123.s").write_bytes(b"half")
    assert answer() == 42
    assert not (home / "unfinished").exists()


def test_six_processes_at_once_compile_once(home, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, f'echo >> {tmp_path}/begun; exec g++ "$@"')
    children = []
    for _ in range(6):
        if not (child := os.fork()):
            os._exit(answer())
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [42] * 6
    assert (tmp_path / "begun").read_text() == "\n" and len(kept(home)) == 1
