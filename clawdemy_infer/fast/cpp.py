"""The C++ in `cpp/` (`step.cpp` is to be read first), compiled for the CPU at hand when it is first
asked for, and kept in the user's cache.

What is loaded is run: so it lies in a folder that is ours alone, with the hash of its bytes in its
name."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten

import torch

from clawdemy_infer.paths import cache_dir
from clawdemy_infer.timing import now

FOLDER = Path(__file__).parent / "cpp"
FLAGS = [
    "-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared",
    "-fno-strict-aliasing",     # a row of bf16 is also read as pairs (`Operand` of product.h)
    # Nobody asks for errno; but sums keep their order, NaN stays NaN, and the smallest numbers of
    # the whole process stay what they are, which -ffast-math would not grant.
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-Wno-psabi", "-Wno-unknown-pragmas",
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
]
ISA = {"": "native", "scalar": "armv8-a"} if platform.machine() in ("aarch64", "arm64") else {
    "": "native", "avx512": "x86-64-v4", "avx2": "x86-64-v3", "scalar": "x86-64"}
"""What CLAWDEMY_ISA may say, and what the compiler calls it: all that this CPU has; AVX-512 without
what came after it; AVX2 and FMA; "scalar", what every CPU of its kind has, which is SSE2 or NEON:
four numbers at once."""
NEEDS = {"avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
         "avx2": {"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"}}
"""What the CPU must have for it, as Linux calls it; besides, AVX-512 comes with all of AVX2."""
COMPILER_S = 120
"""Seconds that the compiler may take for one library, some five as a rule; and that another process
that has it is waited for."""
TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
"""What C++ calls a number of that type."""
EVERYTHING = 2**40
"""Tokens: the window of a model that has none."""


class CompilerFailed(OSError):
    """There is a compiler, and no code of its that could be run. PyTorch's runs anyway."""


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


@functools.cache
def cpuinfo(key: str) -> str:
    """What Linux says of the first processor, as "flags"; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def isa() -> str:
    """The instruction set that CLAWDEMY_ISA asks for, or "" for all that this CPU has. Raises
    ValueError for one that is unknown, or that it has not."""
    name, flags = os.environ.get("CLAWDEMY_ISA", ""), set(cpuinfo("flags").split())
    if name not in ISA or not NEEDS.get(name, set()) <= flags:
        raise ValueError(f"CLAWDEMY_ISA={name!r} is not supported; accepted: what this CPU has of "
                         f"{', '.join(filter(None, ISA))}; without it, all that it has")
    return name


def compiler() -> str:
    """The C++ compiler that PyTorch would call. Raises ValueError where there is none."""
    name = os.environ.get("CXX", "g++")
    if not shutil.which(name):
        raise ValueError(f"compile: there is no C++ compiler here ({name}); install one: without "
                         "compile it runs as PyTorch")
    return name


def library(name: str, **defines: object) -> ctypes.CDLL:
    """The machine code of `cpp/{name}.cpp`, in which each of `defines` is fixed, as H=64. A few
    seconds' work for the compiler, once: what is kept goes by the text of all sources in the
    folder, the defines, the CPU, and the compiler's name, size and time.

    Raises ValueError as `compiler` and `isa` do, and CompilerFailed where it refuses, takes more
    than `COMPILER_S`, or what it made cannot be kept: once tried, each time alike.
    """
    compiler()
    if isinstance(found := _library(name, isa(), **defines), CompilerFailed):
        raise found
    return found


@functools.cache
def _library(name: str, isa: str, **defines: object) -> ctypes.CDLL | CompilerFailed:
    command = [compiler(), *FLAGS, f"-march={ISA[isa]}",
               *(f"-D{key}={value}" for key, value in defines.items())]
    try:
        program = os.stat(shutil.which(command[0]))
        made_of = [name, *command, program.st_size, program.st_mtime_ns, cpu_name(),
                   cpuinfo("flags"), *(path.read_bytes() for path in sorted(FOLDER.iterdir())
                                       if path.suffix in (".h", ".cpp") and path.name[0] != ".")]
        name_and_key = f"{name}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]}"
        with _our_folder() as folder:
            for kept in folder.glob(f"{name_and_key}.*.so"):
                if not kept.is_symlink() and kept.is_file() and kept.suffixes[-2] == _digest(kept):
                    return ctypes.CDLL(str(kept))
                kept.unlink()                           # damaged, or not what we made
            made = _compiled([*command, f"-I{FOLDER}", str(FOLDER / f"{name}.cpp")],
                             folder / "unfinished", name_and_key)
            loaded = ctypes.CDLL(str(made))             # or it is not worth keeping
            os.replace(made, folder / f"{name_and_key}{_digest(made)}.so")
            shutil.rmtree(made.parent, ignore_errors=True)
            return loaded
    except OSError as error:
        return CompilerFailed(f"compile: {error}; without compile it runs as PyTorch")


@contextmanager
def _our_folder() -> Iterator[Path]:
    """The folder of compiled code, for one process at a time: those that wait find what it made.
    Raises OSError unless it is ours, and no link, and nobody else may write there."""
    folder = cache_dir() / "cpp"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{folder} is not a folder of yours that only you may write to, so no code "
                      "in it is run; remove it, or name another cache with CLAWDEMY_CACHE")
    with (folder / "lock").open("w") as lock:
        start, held = now(), False
        while not held:
            if now() - start > COMPILER_S:
                raise OSError(f"another process holds {folder} for {COMPILER_S} s")
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            time.sleep(0 if held else 0.05)
        yield folder


def _compiled(command: list[str], folder: Path, name: str) -> Path:
    """The library that `command` makes in `folder`, which is emptied of what a process that was
    killed has left there. `name` is its own: a loader that knows a path gives what it had loaded
    from there. Raises OSError with the compiler's words."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    made, words = folder / f"{name}.so", folder / "words"
    with words.open("wb") as stderr, subprocess.Popen(
            [*command, "-o", str(made)], stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr,
            env=os.environ | {"TMPDIR": str(folder)}, start_new_session=True) as process:
        try:
            process.wait(COMPILER_S)
        except subprocess.TimeoutExpired:
            raise OSError(f"{command[0]} was stopped after {COMPILER_S} s") from None
        finally:                                        # with all that it has started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode or not made.is_file():
        lines = words.read_text("utf-8", errors="replace").splitlines()
        said = next((line for line in lines if "error" in line), f"exit code {process.returncode}")
        raise OSError(f"{command[0]} refused: {shorten(said, 300)}")
    return made


def _digest(file: Path) -> str:
    return "." + hashlib.sha256(file.read_bytes()).hexdigest()[:32]


def tried() -> ctypes.CDLL:
    """A library that every CPU with a compiler has, or what `library` raises."""
    return library("product", FORMAT="FP32", Result="float")


@functools.cache
def available() -> bool:
    """Is there a compiler that takes this code? A warning says so where one does not. Raises
    ValueError as `isa`."""
    isa()
    try:
        return tried() is not None
    except (ValueError, CompilerFailed) as error:
        if isinstance(error, CompilerFailed):
            warnings.warn(str(error), stacklevel=2)
        return False


def pointers(*tensors: torch.Tensor) -> list[int]:
    """Where their numbers begin. The caller keeps the tensors until the call is over."""
    return [tensor.data_ptr() for tensor in tensors]


def function(of: ctypes.CDLL, name: str, arrays: int, numbers: int) -> ctypes._CFuncPtr:
    """A function of so many pointers to arrays, then so many numbers of 64 bits, that returns
    nothing. The GIL is free while it runs."""
    found = getattr(of, name)
    found.argtypes = [ctypes.c_void_p] * arrays + [ctypes.c_int64] * numbers
    found.restype = None
    return found
