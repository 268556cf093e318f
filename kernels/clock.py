"""The time of a kernel on a GPU, without the time that Python takes to start it.

Python needs some tens of microseconds for a launch, and a decode kernel needs about ten. So the GPU
is given something long to do first: meanwhile the launch is queued, between two events, and what
the clock sees is kernels one right behind the other, as in a CUDA graph. The long thing is to write
256 MiB a few times, after which the caches hold nothing of what the kernel will read.
"""

from __future__ import annotations

import datetime
import platform
import statistics
from collections.abc import Callable

import torch

REPEATS = 25
BEFORE = 8
"""Times that 256 MiB are written: a quarter of a millisecond at least on any GPU of 2026."""


def seconds(work: Callable[[], object]) -> float:
    """The median time of what `work()` launches, from memory and not from caches."""
    other = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    work()                                                                  # compiles
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for begin, end in events:
        for _ in range(BEFORE):
            other.zero_()
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1000


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes/s, read and written, of a copy on the GPU: what every kernel is measured against."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source))


def gpu() -> dict:
    """What a time on this GPU depends on: the device, and versions."""
    import triton
    device = torch.cuda.get_device_properties(0)
    return {
        "name": device.name, "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory, "capability": f"{device.major}.{device.minor}",
        "torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton.__version__, "system": platform.platform(),
        "date": datetime.date.today().isoformat()}
