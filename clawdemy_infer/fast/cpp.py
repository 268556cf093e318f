"""The C++ in `cpp/`, compiled for the CPU at hand when it is first asked for, and kept in the
user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from clawdemy_infer.paths import cache_dir

FOLDER = Path(__file__).parent / "cpp"
FLAGS = [
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fno-strict-aliasing",
    # Nobody asks for errno; but sums keep their order, NaN stays NaN, and the smallest numbers of
    # the whole process stay what they are, which -ffast-math would not grant.
    "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-Wno-psabi", "-Wno-unknown-pragmas",
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
]
TYPES = {torch.float32: "float", torch.bfloat16: "uint16_t"}
"""What C++ calls a number of that type."""


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


@functools.cache
def cpuinfo(key: str) -> str:
    """What Linux says of the first processor, as "flags"; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def compiler() -> str:
    """The C++ compiler that PyTorch would call. Raises ValueError where there is none."""
    name = os.environ.get("CXX", "g++")
    if not shutil.which(name):
        raise ValueError(f"compile: there is no C++ compiler here ({name}); install one: without "
                         "compile it runs as PyTorch")
    return name


@functools.cache
def library(name: str, **defines: object) -> ctypes.CDLL:
    """The machine code of `cpp/{name}.cpp`, in which each of `defines` is fixed, as H=64. A few
    seconds' work for the compiler, once: what is kept goes by the text of all files in the folder,
    the defines, the compiler and the CPU.

    Raises ValueError where there is no compiler, and RuntimeError with its words where it refuses.
    """
    command = [compiler(), *FLAGS, *(f"-D{key}={value}" for key, value in defines.items())]
    sources = [path.read_text() for path in sorted(FOLDER.iterdir())]
    made_of = "\n".join([name, *command, cpu_name(), cpuinfo("flags"), *sources])
    kept = cache_dir() / "cpp" / f"{name}-{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.so"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as directory:
            made = Path(directory) / "made.so"
            files = f"-I{FOLDER}", str(FOLDER / f"{name}.cpp"), "-o", str(made)
            done = subprocess.run([*command, *files], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"compile: {command[0]} refused: {done.stderr.strip()}")
            os.replace(made, kept)                                      # whole or not at all
    return ctypes.CDLL(str(kept))


@functools.cache
def available() -> bool:
    """Is there a compiler here that takes this code?"""
    try:
        return library("product", FORMAT="FP32", Y="float") is not None
    except (ValueError, RuntimeError):
        return False


def pointers(*tensors: torch.Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def function(of: ctypes.CDLL, name: str, pointers: int, numbers: int) -> ctypes._CFuncPtr:
    """A function of so many pointers, then so many numbers of 64 bits, that returns nothing."""
    found = getattr(of, name)
    found.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * numbers
    found.restype = None
    return found
