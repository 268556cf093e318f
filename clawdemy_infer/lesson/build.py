"""Checks what a learner writes: build tasks, exercises of several steps, functions, values.

The answer to a build task runs in a forked child with limits on its time and its memory: what it
prints, breaks or never ends costs the lesson nothing.
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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from numbers import Real
from typing import NamedTuple

import psutil

from clawdemy_infer.lesson.tables import PREFIXED, from_si, number, si

OPEN, WRONG, RIGHT = "open", "wrong", "right"
MISTAKES = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError,
            TypeError, ValueError)
"""What a learner's function raises while it is still wrong, unlike Ctrl-C or a lack of memory."""
UNITS = [unit + per for unit in PREFIXED for per in ("", "/s")]
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


class Step(NamedTuple):
    """One step of an exercise; `wrong` says to each wrong answer what the learner must know."""

    right: float | str | bool           # a number in plain units, as `tables.from_si` has them
    wrong: Mapping[float | str | bool, str]
    unit: str = ""
    rtol: float = 0.02


@dataclass(frozen=True)
class Exercise:
    name: str
    steps: Mapping[str, Step]           # in order
    means: str                          # shown when all steps are right


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


# -- steps, functions, values ---------------------------------------------------------------------


def check_step(name: str, step: Step, answer: object) -> tuple[str, str]:
    """How the answer to one step stands, and the line that says it."""
    if answer is ...:
        return OPEN, f"○ {name}: open"
    try:
        value, *known = (_plain(each, step) for each in (answer, step.right, *step.wrong))
    except ValueError as error:
        return WRONG, f"✗ {name}: {error}"
    said = f"{name} = {si(value, step.unit) if _is_number(value) else _shown(value)}"
    for each, text in zip(known, ("", *step.wrong.values()), strict=True):
        if _same(value, each, step.rtol):
            return (WRONG, f"✗ {said}: {text}") if text else (RIGHT, f"✓ {said}")
    return WRONG, f"✗ {said} {_off(value, known[0])}"


def _plain(answer: object, step: Step) -> object:
    """A number in the unit of `step`, yes or no, or lower-case text. What is counted may be named:
    "9 users". ValueError for another unit."""
    if isinstance(step.right, bool):
        said = {"yes": True, "true": True, "no": False, "false": False}
        return said.get(str(answer).strip().lower(), answer)
    if isinstance(step.right, str):
        return str(answer).strip().lower()
    if not isinstance(answer, str):
        return answer.item() if getattr(answer, "ndim", None) == 0 else answer
    value, unit = from_si(answer)
    if unit in ("%", "×") and not step.unit:
        return value / 100 if unit == "%" else value
    counted = not step.unit and unit not in UNITS
    if unit and step.unit not in (unit, unit + "s") and not counted:
        raise ValueError(f"{answer} is in {unit}; this step asks for {step.unit or 'a number'}")
    return value


def check_function(name: str, function: object, cases: Mapping[object, object],
                   rtol: float) -> tuple[str, str]:
    """How `function` stands, and a sentence on the first case that it gets wrong."""
    if function is ...:
        return OPEN, ""
    if not callable(function):
        return WRONG, f"{name} is {_shown(function)}; a function was asked for."
    for arguments, expected in cases.items():
        arguments = arguments if isinstance(arguments, tuple) else (arguments,)
        call = f"{name}({', '.join(map(repr, arguments))})"
        try:
            got = function(*arguments)
        except MISTAKES as error:
            if "ellipsis" not in str(error):
                return WRONG, f"{call} raised {type(error).__name__}: {error}."
            got = ...
        if got is ...:
            return OPEN, ""
        if not _same(got, expected, rtol):
            return WRONG, f"{call} gave {_shown(got)}; {_shown(expected)} was asked for."
    return RIGHT, ""


def check_value(name: str, value: object, expected: object, rtol: float) -> tuple[str, str]:
    """As `check_function`. It says how far off a number is, and never what was expected."""
    if value is ... or _same(value, expected, rtol):
        return OPEN if value is ... else RIGHT, ""
    return WRONG, f"{name} = {_shown(value)} {_off(value, expected)}"


def _off(value: object, expected: object) -> str:
    if _is_number(value) and _is_number(expected) and value * expected > 0:
        ratio = value / expected
        return f"is {number(max(ratio, 1 / ratio))} times too {'large' if ratio > 1 else 'small'}."
    return "is not it."


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)


def _same(got: object, expected: object, rtol: float) -> bool:
    import numpy as np  # here, for whoever wants a table alone

    if isinstance(expected, str):
        return got == expected
    try:
        return np.shape(got) == np.shape(expected) and bool(
            np.allclose(got, expected, rtol=rtol, atol=0.0))
    except (TypeError, ValueError):                     # not made of numbers
        return False
