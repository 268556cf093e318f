"""What a notebook sees: `lesson.predict` before, `lesson.measure` after, one table at the end; and
exercises that check themselves.

    lesson = Lesson("01 counting_inference", machine=machine)
    lesson.guess("time per token at 512", ...)  # the learner may write a number over the dots
    lesson.predict("time per token at 512", napkin=weight_bytes / bandwidth,
                   predicted=machine.time(work), unit="s")
    lesson.measure("time per token at 512", stopwatch(step).median,
                   why="each operation has its fixed price")
    lesson.table()
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from types import EllipsisType

from clawdemy_infer.lesson import ledger
from clawdemy_infer.lesson.ledger import LedgerRow
from clawdemy_infer.lesson.tables import Table, ledger_table, number

MISTAKES = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError,
            TypeError, ValueError)
"""What a learner's function raises while it is still wrong. Anything else (Ctrl-C, no memory) is
not about the exercise."""


class NotRight(ValueError):
    """Under `CLAWDEMY_STRICT=1`: an exercise that is not answered rightly. In a learner's run this
    is a printed line instead."""


class Lesson:
    """One notebook's part of the ledger. `machine` is a `Machine` or its name; it goes into every
    row.

    Running a cell again replaces the quantity in this lesson's table and appends a fresh row to the
    file.
    """

    def __init__(self, name: str, machine: object) -> None:
        self.name = name
        self.machine = str(getattr(machine, "name", machine))
        self.rows: dict[str, LedgerRow] = {}
        self.guesses: dict[str, float | None] = {}
        self.said: dict[str, float | None] = {}     # the calibrated predictions as they were made
        self.exercises: dict[str, str] = {}         # name: "open", "wrong" or "right"

    # -- predict, measure, explain ----------------------------------------------------------------

    def guess(self, quantity: str, value: float | EllipsisType = ...) -> None:
        """The learner's own number, in the unit of the prediction; `...` is no guess."""
        self.guesses[quantity] = None if value is ... else float(value)
        if quantity in self.rows:
            self.rows[quantity] = replace(self.rows[quantity], guess=self.guesses[quantity])

    def predict(self, quantity: str, napkin: float, predicted: float | None = None,
                unit: str = "") -> None:
        """Say what `quantity` will be, before it is measured: `napkin` by hand, `predicted` by the
        calibrated roofline, both in `unit`.

        Units are plain: s, B, B/s, FLOP/s, never ms or GB. Predicting again starts the quantity
        afresh. Raises `ValueError` for a number that is not positive and finite.
        """
        self.said[quantity] = None if predicted is None else float(predicted)
        self.rows[quantity] = LedgerRow(
            self.name, quantity, unit, napkin=float(napkin), predicted=self.said[quantity],
            guess=self.guesses.get(quantity), machine=self.machine)

    def measure(self, quantity: str, value: float, why: str = "", speed: float = 1.0) -> None:
        """Set the measured `value` beside its prediction, in the prediction's unit, and write the
        row to the ledger.

        `why` says what the difference is made of. `speed` is a `Pulse`'s: how fast the machine ran
        during the measurement, against its calibration; the calibrated prediction of a time is
        divided by it. Raises `ValueError` for a quantity that was never predicted: that is the
        whole game; and for a speed of what is not in seconds.
        """
        row = self._predicted(quantity)
        if speed != 1.0 and row.unit != "s":
            raise ValueError(f"speed={speed} for {quantity!r} in {row.unit!r}: only a time is "
                             "predicted for a speed of the machine")
        predicted = self.said[quantity] and self.said[quantity] / speed
        self._write(replace(row, measured=float(value), predicted=predicted, speed=speed, why=why,
                            date=ledger.today()))

    def explain(self, quantity: str, why: str) -> None:
        """Give the reason after the fact, once the measurement has been looked at. Raises
        `ValueError` if there is none yet."""
        self._write(replace(self._predicted(quantity), why=why, date=ledger.today()))

    def table(self) -> Table:
        """Predicted beside measured, as far as this lesson has come."""
        return ledger_table(self.rows.values())

    def _write(self, row: LedgerRow) -> None:
        ledger.append(row)
        self.rows[row.quantity] = row

    def _predicted(self, quantity: str) -> LedgerRow:
        if quantity not in self.rows:
            known = ", ".join(map(repr, self.rows)) or "nothing yet"
            raise ValueError(f"quantity={quantity!r} was never predicted, so it cannot be "
                             f"measured; predicted so far: {known}")
        return self.rows[quantity]

    # -- exercises --------------------------------------------------------------------------------

    def exercise(self, name: str, answer: object, *, cases: Mapping[object, object] | None = None,
                 expected: object = None, rtol: float = 1e-3, nudge: str = "",
                 means: str = "") -> None:
        """Check the learner's `answer` and say in one line how it stands; never stop the notebook.

        A function is tried on `cases`, a mapping from its arguments (a tuple, or the only argument
        itself) to what it must return. A value is compared with `expected`. Numbers, lists and
        tensors may differ by the relative tolerance `rtol`; text may not differ. `nudge` follows a
        wrong answer, `means` a right one. An answer that is still `...`, or still returns it, is
        not attempted. Raises `NotRight` under `CLAWDEMY_STRICT=1` for anything but a right answer,
        `ValueError` unless given `cases` or `expected`.
        """
        if (cases is None) == (expected is None):
            raise ValueError(f"exercise {name!r}: give `cases` for a function or `expected` for a "
                             "value, one of the two")
        if cases is not None:
            problem = _try_function(name, answer, cases, rtol)
        else:
            problem = _try_value(name, answer, expected, rtol)
        if problem is None:
            self.exercises[name], line = "right", f"✓ {name}: {means or 'right.'}"
        elif problem is OPEN:
            self.exercises[name] = "open"
            line = f"○ {name}: not attempted yet. Write over the dots and run the cell again."
        else:
            self.exercises[name], line = "wrong", f"✗ {problem} {nudge}".rstrip()
        if problem is not None and os.environ.get("CLAWDEMY_STRICT") == "1":
            raise NotRight(line)
        print(line)


OPEN = "open"


def _try_function(name: str, function: object, cases: Mapping[object, object],
                  rtol: float) -> str | None:
    """None if `function` is right on every case, `OPEN` if it is still a stub, else a sentence on
    the first case that it gets wrong."""
    if function is ...:
        return OPEN
    if not callable(function):
        return f"{name} is {_shown(function)}; a function was asked for."
    for arguments, expected in cases.items():
        arguments = arguments if isinstance(arguments, tuple) else (arguments,)
        call = f"{name}({', '.join(map(repr, arguments))})"
        try:
            got = function(*arguments)
        except MISTAKES as error:
            if "ellipsis" in str(error):                # `2 * ...` is a stub half filled in
                return OPEN
            return f"{call} raised {type(error).__name__}: {error}."
        if got is ...:
            return OPEN
        if not _same(got, expected, rtol):
            return f"{call} gave {_shown(got)}; {_shown(expected)} was asked for."
    return None


def _try_value(name: str, value: object, expected: object, rtol: float) -> str | None:
    """As `_try_function`. It says how far off a number is and not what was expected: finding that
    is the exercise."""
    if value is ...:
        return OPEN
    if _same(value, expected, rtol):
        return None
    if _is_number(value) and _is_number(expected) and value * expected > 0:
        ratio = value / expected
        factor, way = number(max(ratio, 1 / ratio)), "large" if ratio > 1 else "small"
        return f"{name} = {_shown(value)} is {factor} times too {way}."
    return f"{name} = {_shown(value)} is not it."


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
