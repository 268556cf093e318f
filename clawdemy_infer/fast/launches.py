"""What a step starts: each operation costs its fixed share, whatever its size."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


@contextmanager
def _launches(counter) -> Iterator[None]:
    """Count launches of Triton kernels too, which PyTorch does not dispatch: each as one."""
    if "triton" not in sys.modules:
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def counting(run: Callable) -> Callable:
        def counted(*args, **options):
            counter.count += 1
            with _disable_current_modes():
                return run(*args, **options)
        return counted

    plain = [(kind, kind.run) for kind in (JITFunction, InterpretedFunction)]
    try:
        for kind, run in plain:
            kind.run = counting(run)
        yield
    finally:
        for kind, run in plain:
            kind.run = run


class OpCounter(TorchDispatchMode):
    count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False                    # True imports all of torch._dynamo, which takes two seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def op_counter() -> Iterator[OpCounter]:
    """`.count`s ATen operations as they are dispatched, and Triton kernels as they are launched."""
    with OpCounter() as counter, _launches(counter):
        yield counter


def count_ops(work: Callable[[], object]) -> int:
    """Operations that one call of `work()` starts, as `op_counter` counts them."""
    with op_counter() as counter:
        work()
    return counter.count
