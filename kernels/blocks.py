"""How large a block, how many warps, how deep a pipeline: a rule says so everywhere, and on a GPU
the clock may know better.

    python -m clawdemy_kernels.blocks       on a GPU: time all candidates at the sizes of a real
                                            model, and keep the fastest

Blocks change how fast a kernel is, not what it computes. By the rule a block of keys has 16 KiB,
and 16 to 64 tokens: several of them are on their way from memory at once, and there is room for
those in the shared memory of every GPU. In fp32 it has at most 32 tokens, and codes of 8 bits wait
their turn: `tl.dot` has no tensor cores there and wants whole rows and columns in registers, of
which a thread has 255. The other candidates are smaller with a deeper pipeline, larger with more
warps, or the same with more warps. What the clock chose lies beside Triton's compiled code, by GPU
and Triton's version. In the interpreter, and where kernels are only compiled, nothing is timed and
the rule decides.

4-bit codes come in groups, which are the block: so many `threads` are asked for as load 16 bytes
each. A warp has 32 of them on NVIDIA, 64 on AMD: with as many warps on both, 32 tokens of 64 bytes
would leave the 256 threads of AMD 8 bytes each.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import inf
from pathlib import Path

import torch

from clawdemy_kernels.launch import on_gpu, triton, warps

ASKED: set[tuple[str, int, int]] = set()
"""Kernels that were launched so far, with the bytes of a number that is multiplied, and how many of
them are a row of keys."""
_using: dict[str, dict[str, int]] = {}


def candidates(kernel: str, e: int, H: int = 0) -> list[dict[str, int]]:
    """What may be said to the compiler about `kernel`, which multiplies numbers of `e` bytes, H of
    them a key. The first is the rule's."""
    if kernel == "linear_int8":
        I_BLOCK = 256 // e                  # a block of 32 outputs x 128 codes, in fp32 of 64
        return [{"I_BLOCK": I_BLOCK, "num_warps": 4, "num_stages": 4},
                {"I_BLOCK": 2 * I_BLOCK, "num_warps": 4, "num_stages": 3},
                {"I_BLOCK": I_BLOCK, "num_warps": 8, "num_stages": 4}]
    if kernel == "linear_int4":
        return [{"threads": 64, "num_stages": 4}, {"threads": 128, "num_stages": 4},
                {"threads": 64, "num_stages": 6}]
    if kernel == "decode_int4":
        return [{"threads": 128}, {"threads": 128, "num_stages": 4}, {"threads": 256}]
    size = max(16, min(64 if e < 4 else 32, 2**14 // e // triton.next_power_of_2(H)))
    smaller = {"S_BLOCK": max(16, size // 2), "num_warps": 4, "num_stages": 4}
    larger = {"S_BLOCK": 2 * size, "num_warps": 8, "num_stages": 2}
    if kernel in ("decode_naive", "decode_grouped"):    # to be read; no model runs on them
        return [{"S_BLOCK": size, "num_warps": 4}]
    if kernel == "prefill_paged":           # its many queries need the registers of more warps
        return [{"S_BLOCK": size, "num_warps": 8}, smaller, larger]
    rule = {"S_BLOCK": size, "num_warps": 4}
    if kernel == "decode_int8" and e == 4:
        rule["num_stages"] = 1
    return [rule, smaller, larger, {"S_BLOCK": size, "num_warps": 8}]


def blocks(kernel: str, dtype: torch.dtype, H: int = 0) -> dict[str, int]:
    """The options of a launch: those of `using`, those that the clock chose on this GPU among
    today's candidates, or the rule's. Of `dtype` are the numbers that are multiplied, H of them a
    key."""
    asked = kernel, dtype.itemsize, H
    ASKED.add(asked)
    known = candidates(*asked)
    kept = chosen(place()).get(named(*asked)) if on_gpu() else None
    options = dict(_using.get(kernel) or (kept if kept in known else known[0]))
    if "threads" in options:
        options["num_warps"] = warps(options.pop("threads"))
    return options


def named(kernel: str, e: int, H: int) -> str:
    """In the file of choices."""
    return f"{kernel} {H} x {e} B" if H else f"{kernel} {e} B"


@contextmanager
def using(kernel: str, options: dict[str, int]) -> Iterator[None]:
    """Launch `kernel` with these options, whatever was chosen."""
    _using[kernel] = options
    try:
        yield
    finally:
        del _using[kernel]


# ---- the clock's choice ----


def choose(launch: Callable[[], object],
           seconds: Callable[[Callable], float]) -> dict[str, dict[str, int]]:
    """Time `launch()` with every candidate of each kernel in it, keep the fastest for good, and
    return them. RuntimeError without a GPU."""
    if not on_gpu():
        raise RuntimeError("blocks are chosen by the clock of a GPU, and there is none here, or "
                           "kernels are interpreted")
    ASKED.clear()
    launch()
    found = {named(*asked): fastest(*asked, launch, seconds) for asked in sorted(ASKED)}
    _keep(place(), found)
    return found


def fastest(kernel: str, e: int, H: int, launch: Callable[[], object],
            seconds: Callable[[Callable], float]) -> dict[str, int]:
    """The candidate with which `launch()` takes the fewest seconds. One for which this GPU has no
    room takes forever."""
    def time(options: dict[str, int]) -> float:
        try:
            with using(kernel, options):
                return seconds(launch)
        except triton.runtime.errors.OutOfResources:
            return inf
    return min(candidates(kernel, e, H), key=time)


def place() -> tuple[Path, str]:
    """The file of all choices, and this GPU's name in it."""
    name = f"{torch.cuda.get_device_name()}, Triton {triton.__version__}"
    return Path(triton.knobs.cache.dir) / "clawdemy-blocks.json", name


@cache
def chosen(place: tuple[Path, str]) -> dict[str, dict[str, int]]:
    """By kernel and the numbers that it multiplies."""
    file, gpu = place
    return _read(file).get(gpu, {})


def _read(file: Path) -> dict[str, dict[str, dict[str, int]]]:
    """By GPU, what was chosen there. A file that is damaged counts as absent, and a warning says
    so."""
    try:
        kept = json.loads(file.read_bytes())
        for options in [options for by_kernel in kept.values() for options in by_kernel.values()]:
            if not all(type(value) is int and 0 < value <= 2**20 for value in options.values()):
                raise ValueError(f"{options}: whole numbers are accepted")
        return kept
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        warnings.warn(f"{file} is damaged and counts as absent until it is written again: {error}",
                      stacklevel=2)
        return {}


def _keep(place: tuple[Path, str], found: dict[str, dict[str, int]]) -> None:
    file, gpu = place
    kept = _read(file)
    kept[gpu] = kept.get(gpu, {}) | found
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(".partial")
    whole.write_text(json.dumps(kept, indent=1))
    whole.replace(file)
    chosen.cache_clear()


def choose_all(seconds: Callable[[Callable], float]) -> dict[str, dict[str, int]]:
    """`choose` for all `examples` at the sizes of Llama-3-8B."""
    from clawdemy_kernels.examples import examples
    found = {}
    for example in examples(device="cuda").values():
        found |= choose(example.launch, seconds)
    return found


if __name__ == "__main__":
    # this file's other self, which the kernels import
    from clawdemy_kernels.blocks import choose_all
    from clawdemy_kernels.clock import seconds

    for kernel, options in choose_all(seconds).items():
        print(kernel, options)
