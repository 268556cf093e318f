"""C++ for the CPU at hand: compiled when it is first asked for, and kept in the user's cache.

For the few things that PyTorch has no operation for, or none that is as fast as the memory: a page of C++ each, beside what calls it.
"""

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

from clawdemy_infer.paths import cache_dir

FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffast-math", "-fno-strict-aliasing", "-fopenmp", "-fPIC", "-c", "-x", "c++",
         *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else [])]
LINK = ["-fopenmp", "-shared"]
"""Without -ffast-math: linked with it, a library makes zeros of the smallest numbers of the whole process."""


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def compiler() -> str:
    """The C++ compiler that PyTorch would call. Raises ValueError where there is none."""
    name = os.environ.get("CXX", "g++")
    if not shutil.which(name):
        raise ValueError(f"compile: there is no C++ compiler here ({name}); install one, or do without `compile`")
    return name


@functools.cache
def library(source: str, *defines: str) -> ctypes.CDLL:
    """The machine code of `source`, in which each of `defines`, as "H=64", is fixed. A second's work for the compiler, once.

    Raises ValueError where there is no compiler, and RuntimeError with its words where it refuses.
    """
    made_of = "\n".join([source, *defines, *FLAGS, compiler(), cpu_name(), _cpuinfo("flags")])       # CPUs of one name may differ
    kept = cache_dir() / "cpp" / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.so"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as directory:
            part, whole = Path(directory) / "part.o", Path(directory) / "whole.so"
            try:
                for command in ([*FLAGS, *(f"-D{define}" for define in defines), "-", "-o", part], [*LINK, part, "-o", whole]):
                    subprocess.run([compiler(), *command], input=source, text=True, check=True, capture_output=True)
            except subprocess.CalledProcessError as error:
                raise RuntimeError(f"compile: {compiler()} refused: {error.stderr.strip()}") from error
            os.replace(whole, kept)                 # whole or not at all
    return ctypes.CDLL(str(kept))
