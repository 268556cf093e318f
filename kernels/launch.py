"""What every launcher needs: where kernels run, and that their tensors are what they should be.

On a CUDA device Triton compiles a kernel. Without one, the same kernel runs in Triton's
interpreter: each program in turn, in numpy, on CPU tensors. That is thousands of times slower and
gives the same numbers.

In the signature of a kernel a tensor is a pointer, and its strides follow: `k_stride_head` is how
many numbers of k lie between one head and the next. Its last dimension has stride 1.
"""

from __future__ import annotations

import os
import sys

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1") == "1"
"""Do kernels run in the interpreter? With no GPU they do, unless TRITON_INTERPRET=0 says that they
are only to be compiled."""

ELSEWHERE = False
"""Are kernels being compiled for a GPU that is not this machine's? `ahead` says so while it
compiles."""

if INTERPRETED:
    # Triton decides while it is imported, for its own functions too, and torch does not import it
    # by itself.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise ImportError(
            "triton was imported before clawdemy_kernels, to compile for a GPU that is not there; "
            "import clawdemy_kernels first, or set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"

import triton  # noqa: E402
import triton.language as tl  # noqa: E402, F401

if INTERPRETED:
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    def _create_dot(self, a, b, d, *rest, plain=interpreter.InterpreterBuilder.create_dot):
        """The interpreter keeps bfloat16 as 16-bit integers, and its dot multiplies those (Triton
        3.7 to 3.9). Here they become numbers."""
        def number(x):
            if x.dtype.scalar != bfloat16:
                return x
            wide = interpreter._convert_float(x.data, bfloat16, float32, None)
            return interpreter.TensorHandle(wide.view("float32"), float32)
        return plain(self, number(a), number(b), d, *rest)

    interpreter.InterpreterBuilder.create_dot = _create_dot

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

LOG2_E = 1.4426950408889634
"""exp(x) = exp2(x * log2(e)): a GPU has an instruction for exp2. The factor goes into the scale of
the scores."""


def on_gpu() -> bool:
    """Do kernels run on a GPU of this machine?"""
    return not INTERPRETED and not ELSEWHERE and torch.cuda.is_available()


def check(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...],
          dtypes: tuple[torch.dtype, ...] = FLOATS, like: torch.Tensor | None = None) -> None:
    """ValueError naming the tensor unless it has this shape (None: any size), one of `dtypes`,
    numbers of the last dimension one behind the other, and the device of `like`: CUDA, where there
    is one.
    """
    wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    if tensor.dim() != len(shape) or any(size not in (None, got)
                                         for size, got in zip(shape, tensor.shape, strict=True)):
        raise ValueError(f"{name} is {list(tensor.shape)}: {wanted} is accepted")
    if tensor.numel() == 0:
        raise ValueError(f"{name} is {list(tensor.shape)}: it is empty")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is of {tensor.dtype}: {', '.join(map(str, dtypes))} accepted")
    if tensor.dim() and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}: the last must be 1")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} lies on {tensor.device}: {like.device} is accepted, where the "
                         "other tensors lie")
    if tensor.device.type != "cuda" and on_gpu():
        raise ValueError(f"{name} lies on {tensor.device}: a CUDA device is accepted")


def check_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                    seq_lens: torch.Tensor) -> None:
    """q [B, N, H]; k, v of any layout [..., K, any, H], N a multiple of K; seq_lens [B]. Raises
    ValueError as `check` does."""
    check("q", q, (None, None, None))
    B, N, H = q.shape
    check("k", k, (None, None, None, H), (q.dtype,), like=q)
    check("v", v, tuple(k.shape), (q.dtype,), like=q)
    check("seq_lens", seq_lens, (B,), (torch.int32,), like=q)
    check_heads(N, k.shape[1])


def check_heads(N: int, K: int) -> None:
    """ValueError unless the N query heads are shared out evenly among the K heads of keys and
    values."""
    if N % K:
        raise ValueError(f"q has N={N} heads and k has K={K}: N must be a multiple of K")


def at_least_1(**numbers: int | None) -> None:
    """ValueError naming the first of `numbers` that is below 1; None is a number not given."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name}={number}: 1 or more is accepted")


def tokens_of_block(k: torch.Tensor, block_table: torch.Tensor) -> int:
    """C of k [blocks, K, C, H], which kernels are compiled for.

    A sequence of one block has nothing behind it, so that any larger number will do: the power of
    two, or else every length of a contiguous cache would be compiled for.
    """
    C = k.shape[2]
    return power_of_2(C) if block_table.shape[1] == 1 else C


def warps(threads: int) -> int:
    """How many warps `threads` threads are: one has 32 on NVIDIA and 64 on AMD. It matters where a
    block is just 16 bytes for each thread."""
    if INTERPRETED:
        return 1
    return max(1, threads // triton.runtime.driver.active.get_current_target().warp_size)


def power_of_2(size: int, least: int = 1) -> int:
    """The power of two that holds `size`: Triton's blocks have such sizes, and `tl.dot` wants 16
    rows at least."""
    return max(least, triton.next_power_of_2(size))
