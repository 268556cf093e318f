"""Compile kernels for GPUs that are not there, and read from the machine code what it will do.

    TRITON_INTERPRET=0 python -m clawdemy_kernels.ahead sm_90 gfx942        a table of all kernels
                                                                            for these targets

Whatever a launcher would launch is compiled as it would be: with the sizes and the alignment of its
arguments. Those decide much. A pointer or a stride that Triton knows to be a multiple of 16 gives
loads of 16 bytes; without, each number may be loaded by itself.

Everything needed comes inside the Triton wheel: ptxas, cuobjdump and nvdisasm for NVIDIA, LLVM for
AMD.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from clawdemy_kernels import launch as machine
from clawdemy_kernels.launch import INTERPRETED, triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),         # A100
    "sm_90": GPUTarget("cuda", 90, 32),         # H100
    "sm_100": GPUTarget("cuda", 100, 32),       # B200
    "gfx942": GPUTarget("hip", "gfx942", 64),   # MI300X
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Code:
    """One kernel for one target. `loads` counts the load instructions from global memory by their
    bytes a thread."""

    kernel: str
    target: str
    threads: int                # of a program
    registers: int              # of a thread
    spilled: int                # bytes a thread, or registers on AMD
    shared: int                 # bytes a program
    loads: dict[int, int]
    products: int               # tensor-core instructions

    @property
    def widest(self) -> int:
        return max(self.loads, default=0)


class Elsewhere:
    """The driver of a GPU that is not there: it says which one it would be, and that is all that a
    compilation asks."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _compiling(target: GPUTarget, found: list):
    run, active = JITFunction.run, driver._active

    def compile_only(self, *args, grid, warmup, **options):
        found.append(run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    driver.set_active(Elsewhere(target))
    machine.ELSEWHERE = True
    try:
        yield
    finally:
        JITFunction.run, machine.ELSEWHERE = run, False
        driver.set_active(active)


def compiled(launch: Callable[[], object], target: str) -> list[Code]:
    """All kernels that `launch()` would launch, compiled for one of `TARGETS`; none runs, so what
    it returns means nothing.

    Raises RuntimeError in the interpreter, which has nothing to compile: set TRITON_INTERPRET=0
    before the kernels are imported.
    """
    return [_read(kernel, target) for kernel in _compile(launch, target)]


def listing(launch: Callable[[], object], target: str) -> dict[str, str]:
    """What Triton hands to the assembler, by kernel: PTX for NVIDIA, AMD's own language for AMD.
    Raises RuntimeError as `compiled`."""
    return {kernel.name: kernel.asm.get("ptx") or kernel.asm["amdgcn"]
            for kernel in _compile(launch, target)}


def _compile(launch: Callable[[], object], target: str) -> list:
    if INTERPRETED:
        raise RuntimeError("kernels are interpreted here; set TRITON_INTERPRET=0 before they are "
                           "imported, in a process of its own")
    found = []
    with _compiling(TARGETS[target], found):
        launch()
    return found


def _read(kernel, target: str) -> Code:
    named = kernel.name, target, kernel.metadata.num_warps * TARGETS[target].warp_size
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{key}:\s+(\d+)", text)[1])
                              for key in ("vgpr_count", "vgpr_spill_count"))
        widths = re.findall(r"(?:global|buffer)_load_(\w+)", text)
        loads = Counter(AMD_BYTES[width] for width in widths if width in AMD_BYTES)
        products = len(re.findall(r"v_mfma_", text))
        return Code(*named, registers, spilled, kernel.metadata.shared, dict(loads), products)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (subprocess.run([TOOLS / tool, option, file.name], capture_output=True,
                                      text=True, check=True).stdout
                       for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    number = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    loads = Counter(map(_bytes, re.findall(r"\b(?:LDG|LDGSTS)\.E((?:\.\w+)*)", sass)))
    products = len(re.findall(r"\b(?:HMMA|QMMA|IMMA|HGMMA|UTC\w*MMA)\b", sass))
    return Code(*named, number["REG"], number["STACK"] + number["LOCAL"], kernel.metadata.shared,
                dict(loads), products)


AMD_BYTES = {"ubyte": 1, "sbyte": 1, "ushort": 2, "short_d16": 2, "short_d16_hi": 2, "dword": 4,
             "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def _bytes(modifiers: str) -> int:
    """Of one load: LDG.E.128 is 16 bytes, LDG.E.U16 two, a bare LDG.E four."""
    width = re.search(r"\.(?:U|S)?(8|16|64|128)\b", modifiers)
    return int(width[1]) // 8 if width else 4


def main(targets: list[str]) -> None:
    """One JSON object with Triton's version, then one a kernel and target, for all `examples`."""
    from clawdemy_kernels.examples import examples
    seen = set()
    print(json.dumps({"triton": triton.__version__}), flush=True)
    for target in targets or TARGETS:
        for launch in examples().values():
            for code in compiled(launch, target):
                if (code.kernel, target) not in seen:
                    print(json.dumps(asdict(code)), flush=True)
                seen.add((code.kernel, target))


if __name__ == "__main__":
    main(sys.argv[1:])
