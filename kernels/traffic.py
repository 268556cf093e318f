"""How many bytes a kernel asks for, counted in the interpreter: no GPU, no profiler, no guess.

    with counting(q=q, k=k, out=out) as traffic:
        decode_naive(q, k, v, seq_lens)
    traffic["k"].asked          bytes of all loads and stores: what the kernel's instructions name
    traffic["k"].distinct       bytes that differ: what must come from memory at least once
    traffic["k"].sectors        bytes of the 32-byte sectors that each instruction touches: what a
                                GPU's memory really moves
    traffic.flops               of all tl.dot, padding included

A kernel that reads everything once has asked = distinct. One whose neighbours in a block are not
neighbours in memory has more sectors than it asks for. The caches between are not counted: what is
asked for twice may come from L2 the second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from triton.runtime import interpreter

from clawdemy_kernels.launch import INTERPRETED

SECTOR_BYTES = 32


@dataclass
class TensorTraffic:
    """What was asked of one tensor, in bytes. `addresses` are those touched, by the bytes of a
    number."""

    asked: int = 0
    sectors: int = 0
    addresses: dict[int, list[np.ndarray]] = field(default_factory=dict, repr=False)

    @property
    def distinct(self) -> int:
        return sum(size * len(np.unique(np.concatenate(touched)))
                   for size, touched in self.addresses.items())


@dataclass
class Traffic:
    """By name of the tensor; `other` is what belongs to none of them, such as a kernel's own
    partial results."""

    places: dict[str, tuple[int, int]]
    tensors: dict[str, TensorTraffic] = field(default_factory=dict)
    flops: int = 0

    def __getitem__(self, name: str) -> TensorTraffic:
        return self.tensors.setdefault(name, TensorTraffic())

    @property
    def asked(self) -> int:
        return sum(each.asked for each in self.tensors.values())

    @property
    def distinct(self) -> int:
        return sum(each.distinct for each in self.tensors.values())

    @property
    def sectors(self) -> int:
        return sum(each.sectors for each in self.tensors.values())

    def count(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        """One instruction: the addresses of a block, of which those under the mask are touched,
        each of `size` bytes."""
        pointers, mask = np.broadcast_arrays(pointers, mask.astype(bool))   # masks of 0 and 1 too
        touched = pointers[mask]
        if not len(touched):
            return
        names = (name for name, (begin, end) in self.places.items() if begin <= touched[0] < end)
        tensor = self[next(names, "other")]
        tensor.asked += size * len(touched)
        tensor.sectors += SECTOR_BYTES * len(np.unique(touched // SECTOR_BYTES))
        tensor.addresses.setdefault(size, []).append(touched)


@contextmanager
def counting(**tensors: torch.Tensor) -> Iterator[Traffic]:
    """Count all loads, stores, atomic additions and products of kernels that run within. Raises
    RuntimeError where kernels are compiled."""
    if not INTERPRETED:
        raise RuntimeError("traffic is counted in Triton's interpreter; set TRITON_INTERPRET=1 "
                           "before the kernels are imported")
    traffic = Traffic({name: _place(tensor) for name, tensor in tensors.items()})
    builder = interpreter.InterpreterBuilder
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_dot")
    load, store, atomic, dot = plain = [getattr(builder, name) for name in names]

    def count(pointers, mask) -> None:
        traffic.count(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)

    def counted_load(self, pointers, mask, *rest):
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_atomic(self, operation, pointers, value, mask, *rest):
        count(pointers, mask)                                   # it reads
        count(pointers, mask)                                   # and it writes
        return atomic(self, operation, pointers, value, mask, *rest)

    def counted_dot(self, a, b, *rest):
        traffic.flops += 2 * a.data.size * b.data.shape[-1]     # [.., M, I] x [.., I, O]
        return dot(self, a, b, *rest)

    def use(functions) -> None:
        for name, function in zip(names, functions, strict=True):
            setattr(builder, name, function)

    try:
        use((counted_load, counted_store, counted_atomic, counted_dot))
        yield traffic
    finally:
        use(plain)


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses that its numbers lie between."""
    last = sum((size - 1) * stride
               for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
