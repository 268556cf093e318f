"""Checks the answer to a build task, in a forked child with limits on its time and its memory: what
it prints, breaks or never ends costs the lesson nothing.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe

import psutil

from clawdemy_infer.lesson.tables import si

OPEN, WRONG, RIGHT = "open", "wrong", "right"
MEMORY = 2**30                                          # bytes that a check may take
FORKS = sys.platform == "linux"     # macOS can, but there a child's matrix products may crash


class Wrong(AssertionError):
    """What a property raises: a sentence with the smallest example, for the learner."""


@dataclass(frozen=True)
class Task:
    """A build task. Each of `properties` is a function of the answer, named as what it demands.
    `smoke` uses all of the answer once and returns what came back; `...` in it is an open stub."""

    name: str
    student: str                        # the name in the notebook: "MyCache"
    properties: tuple[Callable[[object], None], ...]
    smoke: Callable[[object], object]
    library: object                     # what runs where the answer is open or wrong
    where: str                          # "clawdemy_infer/kv_cache/contiguous.py"
    adapt: Callable[[object], object] = lambda answer: answer   # what runs where it is right
    seconds: float = 20                 # time limit of the whole check
    same_interface: bool = True         # `library` itself has the properties
    shown: tuple = ()                   # what `Lesson.show` shows: code or lines; () is `library`


def check(task: Task, answer: object) -> tuple[str, str]:
    """How `answer` stands: OPEN, WRONG or RIGHT, and the first property that it breaks, and how."""
    if answer is ...:
        return OPEN, ""
    ours, theirs = Pipe(duplex=False)
    at, end = "", time.monotonic() + task.seconds
    kind = multiprocessing.get_context("fork").Process if FORKS else threading.Thread
    worker = kind(target=_in_child if FORKS else _judge, args=(task, answer, theirs), daemon=True)
    try:
        with warnings.catch_warnings():                 # the child needs none of our threads
            warnings.simplefilter("ignore", DeprecationWarning)
            worker.start()
        if FORKS:
            theirs.close()
        while ours.poll(max(0.0, end - time.monotonic())):
            status, text = ours.recv()
            if status:
                return status, text
            at = text
        return WRONG, f"{at}. It was still running after {task.seconds:g} s."
    except (EOFError, OSError):
        worker.join()
        code = worker.exitcode                          # minus the signal, after a crash
        how = f"ended with code {code}" if code >= 0 else f"crashed ({signal.Signals(-code).name})"
        return WRONG, f"{at}. Python {how}."
    except KeyboardInterrupt:
        return OPEN, f"stopped at {at!r}"
    finally:
        if FORKS and worker.pid:
            worker.kill()
            worker.join()


def _in_child(task: Task, answer: object, pipe: Connection) -> None:
    try:
        import resource

        import torch

        signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is for the parent
        faulthandler.disable()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for each in range(3):
            os.dup2(nowhere, each)
        sys.stdout = sys.stderr = open(os.devnull, "w")
        torch.set_num_threads(1)                        # OpenMP's threads do not survive a fork
        most = psutil.Process().memory_info().vms + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _judge(task, answer, pipe)
    finally:
        os._exit(0)


def _judge(task: Task, answer: object, pipe: Connection) -> None:
    """Send ("", name) before each property, then how the answer stands, whatever it raises.

    In a thread, an endless loop goes on behind the lesson, memory has no limit, what is printed is
    seen, and a crash takes the notebook with it.
    """
    at, found = "it can be used", None
    with suppress(BaseException):                       # told below, all of them
        try:
            pipe.send(("", at))
            if not callable(answer):
                raise Wrong(f"{task.student} is {answer!r}; a class or a function was asked for.")
            found = (OPEN, "") if _has_dots(task.smoke(answer)) else None
            for each in task.properties if not found else ():
                pipe.send(("", at := each.__name__.replace("_", " ")))
                each(answer)
            found = found or (RIGHT, "")
        finally:
            pipe.send(found or _told(at, answer, sys.exception()))


def _has_dots(value: object) -> bool:
    inside = value.values() if isinstance(value, dict) else value
    return value is ... or isinstance(value, (dict, list, tuple)) and any(map(_has_dots, inside))


def _told(at: str, answer: object, error: BaseException) -> tuple[str, str]:
    kind, text = type(error).__name__, " ".join(str(error).split())
    if "ellipsis" in text:                              # `2 * ...` is a stub half filled in
        return OPEN, ""
    if kind == "MemoryError" or "can't allocate memory" in text:
        text = f"It asked for more than {si(MEMORY, 'B')} of memory."
    elif kind.startswith("Flaky"):
        text = "Used twice in the same way, it did two different things."
    elif not isinstance(error, Wrong):
        drawn = [f"{name}={value!r}" for frame, _ in traceback.walk_tb(error.__traceback__)
                 if frame.f_code.co_name == "holds"     # of the course's `for_all`
                 for name, value in frame.f_locals.get("drawn", {}).items()]
        code = [getattr(each, "__code__", None) for each in (answer, *vars(answer).values())]
        files = {each.co_filename for each in code if each}
        lines = [f"`{line.line}`" for line in traceback.extract_tb(error.__traceback__)
                 if line.filename in files and line.line]
        where = ", ".join(lines[-1:] + drawn)
        text = f"It raised {kind}{': ' * bool(text)}{text}"[:200]
        text += f" ({where})." if where else "."
    return WRONG, f"{at}. {text}"
