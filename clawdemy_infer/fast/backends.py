"""Who computes a step: PyTorch, the C++ in `cpp/`, or the Triton kernels in `kernels/`. It is
decided here and nowhere else.

    operator                            PyTorch                             Triton
    ----------------------------------------------------------------------------------------------
    residual and RMS norm               six operations                      rms_norm
    RoPE, keys and values kept          rotate, and a copy into the cache   rope_append
    attention of one new token          SDPA; over pages, gathered first    decode_paged
        8-bit keys and values           SDPA on numbers made of the codes   decode_int8
        4-bit keys and values           SDPA on numbers made of the codes   decode_int4
        a ring                          SDPA                                decode_split
        a ring with sinks               two products, and a softmax         decode_sinks
    attention of a chunk on pages       gathered, then SDPA                 prefill_paged
    between gate and down               silu, and a product                 swiglu
    linear, 8-bit weights               `fast.kernels`                      linear_int8
    linear, 4-bit weights               `fast.kernels`                      linear_int4

Float products, embeddings and the attention of a whole prompt are PyTorch's on both sides: its
libraries do those as well as can be done. C++ takes a step as a whole.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch

BACKENDS = ("torch", "triton", "cpp")


def choose(device: torch.device | str, backend: str | None = None) -> str:
    """The `backend` that was named, or by default "triton" on a CUDA device and "torch" elsewhere.

    Named on a CPU, the kernels run in Triton's interpreter: the same numbers, thousands of times
    slower. Raises ValueError for an unknown name, for "triton" where Triton is not installed (there
    is none for macOS), and for "cpp" on a GPU.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend={backend!r}: {', '.join(BACKENDS)} are accepted")
    installed = importlib.util.find_spec("triton") is not None
    if backend == "triton" and not installed:
        raise ValueError("backend='triton': Triton is not installed here; torch is accepted")
    if backend == "cpp" and torch.device(device).type != "cpu":
        raise ValueError(f"backend='cpp': it is for a CPU, and this is {device}")
    return backend or ("triton" if torch.device(device).type == "cuda" and installed else "torch")


@cache
def kernel(name: str, function: str | None = None) -> Callable:
    """The launcher of a kernel, as `kernel("rms_norm")`, or another `function` of its file.
    Imported when first needed: Triton takes a second to import, and most runs need none."""
    return getattr(import_module(f"clawdemy_kernels.{name}"), function or name)
