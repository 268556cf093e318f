"""Exercises, and how the answers to them stand: several steps, functions, values."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

from clawdemy_infer.lesson.build import OPEN, RIGHT, WRONG
from clawdemy_infer.lesson.tables import PREFIXED, from_si, number, si

MISTAKES = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError,
            TypeError, ValueError)
"""What a learner's function raises while it is still wrong, unlike Ctrl-C or a lack of memory."""
UNITS = [unit + per for unit in PREFIXED for per in ("", "/s")]


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
