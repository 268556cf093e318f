"""What a notebook sees: guess, predict and reveal before, `lesson.measure` after, then a cause and
its explanation; and exercises that check themselves.

    lesson = Lesson("01 counting_inference", machine=machine)
    lesson.guess("time per token at 512", ...)      # the learner may write "20 ms" over the dots
    lesson.predict("time per token at 512", napkin=machine.napkin(work),
                   predicted=machine.time(work), unit="s")
    lesson.reveal("time per token at 512")          # from here on a guess is late
    lesson.measure("time per token at 512", step)
    lesson.cause("time per token at 512", ...)      # "attention", "launches", ...
    lesson.explain("time per token at 512")
    lesson.table()
"""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from html import escape
from types import EllipsisType
from typing import TYPE_CHECKING, NamedTuple

import clawdemy_course
from clawdemy_course import checks
from clawdemy_infer.envelope.roofline import Machine, Prediction
from clawdemy_infer.lesson import build, ledger, tables
from clawdemy_infer.lesson.build import OPEN, RIGHT, WRONG
from clawdemy_infer.lesson.ledger import LedgerRow
from clawdemy_infer.lesson.progress import bar
from clawdemy_infer.lesson.tables import Table, si
from clawdemy_infer.lesson.waterfall import Moment, account, choices, moment, shares
from clawdemy_infer.timing import Timing

if TYPE_CHECKING:
    from clawdemy_infer.lesson.parts import StepOf


class NotRight(ValueError):
    """An exercise that is not answered rightly, under `CLAWDEMY_STRICT=1`; else a printed line."""


class Guess(NamedTuple):
    value: float
    unit: str           # "" is that of the prediction
    late: bool


class Lesson:
    """One notebook's part of the ledger; `machine`, a `Machine` or its name, goes into every row.
    A cell that runs again replaces its quantity in the table and adds a row to the file."""

    def __init__(self, name: str, machine: Machine | str) -> None:
        self.name = name
        self.machine = str(getattr(machine, "name", machine))
        self.calibrated = machine
        self.rows: dict[str, LedgerRow] = {}
        self.guesses: dict[str, Guess] = {}
        self.said: dict[str, tuple[object, LedgerRow]] = {}     # predictions as they were made
        self.moments: dict[str, Moment] = {}        # the machine around each run
        self.revealed: set[str] = set()
        self.explained: set[str] = set()
        self.exercises: dict[str, str] = {}         # name: "open", "wrong" or "right"

    # -- guess, predict, reveal -------------------------------------------------------------------

    def guess(self, quantity: str, value: float | str | EllipsisType = ...,
              unit: str = "") -> None:
        """The learner's own number: text with a unit ("20 ms", "50 GB/s"), or a plain number in
        `unit`, by default the prediction's; `...` is no guess.

        The last guess before the prediction is shown counts. A later one is kept, as late, if there
        was none. What cannot be read gets one line and is no guess.
        """
        late = quantity in self.revealed
        if late and (value is ... or quantity in self.guesses):
            return
        self.guesses.pop(quantity, None)
        try:
            if value is not ...:
                is_text = isinstance(value, str)
                number, said = tables.from_si(value) if is_text else (float(value), "")
                self.guesses[quantity] = Guess(number, said or unit, late)
        except (TypeError, ValueError) as error:
            print(f"○ your guess of {quantity!r}: {error}. It does not count yet.")
        self._join(quantity)

    def _join(self, quantity: str) -> None:
        """Put the guess into the row, if there are both, and if the guess can be meant."""
        row, guess = self.rows.get(quantity), self.guesses.get(quantity)
        problem = ""
        if row and guess and guess.unit and row.unit not in (guess.unit, guess.unit + "s"):
            problem = f"is in {guess.unit}, and the lesson counts in {row.unit or 'plain numbers'}"
        elif row and guess and not 1e-6 < guess.value / row.napkin < 1e6:
            problem = "is a million times off the napkin: write it with its unit, as in 20 ms"
        if problem:
            print(f"○ your guess of {quantity!r}, {si(guess.value, guess.unit or row.unit)}, "
                  f"{problem}. It does not count yet.")
            guess = self.guesses.pop(quantity) and None
        if row:
            value, _, late = guess or (None, "", False)
            self.rows[quantity] = replace(row, guess=value, late=late)

    def predict(self, quantity: str, napkin: float, predicted: Prediction | float | None = None,
                unit: str = "", interval: tuple[float, float] | None = None) -> None:
        """Say what `quantity` will be, before it is measured: `napkin` by hand, `predicted` by the
        calibrated machine, with its interval; what is no time may be given an `interval`. All in
        `unit`, which is plain: s, B, B/s, FLOP/s, never ms or GB.

        Predicting again starts afresh. `ValueError` for a number not positive and finite.
        """
        said = predicted
        if isinstance(said, Prediction):
            predicted, interval = said.seconds, (said.low_s, said.high_s)
        low, high = map(float, interval or (0, 0))
        row = LedgerRow(self.name, quantity, unit, napkin=float(napkin), machine=self.machine,
                        predicted=None if predicted is None else float(predicted),
                        low=low if low < high else None, high=high if low < high else None)
        self.said[quantity], self.rows[quantity] = (said, row), row
        self._join(quantity)

    def reveal(self, *quantities: str) -> Table:
        """Guess, napkin and predicted interval of `quantities` or of all. A later guess is late."""
        rows = [self._predicted(quantity) for quantity in quantities or self.rows]
        self.revealed |= {row.quantity for row in rows}
        without = [row.quantity for row in rows if row.guess is None]
        for quantity in [name for name in self.guesses if name not in self.rows]:
            meant = get_close_matches(quantity, without, 1)
            if meant or not quantities:
                asked = f"did you mean {meant[0]!r}?" if meant else f"it has {_listed(self.rows)}"
                print(f"○ you guessed {quantity!r}, which this lesson does not ask for; {asked}")
        return tables.reveal_table(rows)

    # -- measure, name a cause, explain -----------------------------------------------------------

    def measure(self, quantity: str, value: "StepOf | Callable[[], Timing] | Timing | float",
                parts: Iterable[dict] | None = None, about_s: float = 1.0) -> None:
        """Measure what was predicted, in its unit, and write the row to the ledger.

        `value` is a step, which is run now, also part by part unless `parts` is (); or a function
        that measures for `about_s` seconds; or what was measured already. A bar shows how long it
        will take, an interrupt costs this quantity alone. `parts` are what a step is made of:
        `Parts`, or as `LedgerRow` has them. A `Timing` that saw the machine's speed around the run
        widens the interval; the value itself changes nothing of the prediction. Where noise left
        nothing (a difference below zero), one line says so and nothing is written. `ValueError`
        for a quantity that was never predicted.
        """
        predicted = self._predicted(quantity)
        if not callable(getattr(value, "time", value)):
            if lost := self._measured(quantity, value, parts or ()):
                print(lost)
            return
        step = value if hasattr(value, "time") else None
        if step:
            seconds = predicted.predicted or predicted.napkin
            about_s = step.about_s(seconds, watched=parts is None)
        with bar(quantity, about_s) as end:
            timing = step.time(self.calibrated) if step else value()
            if step and parts is None:
                parts = step.parts(self.calibrated)
            end(self._measured(quantity, timing, parts or ()) or self._result(quantity))

    def _measured(self, quantity: str, value: Timing | float, parts: Iterable[dict]) -> str:
        """Write the row; where noise left nothing, the line that says so."""
        said, blank = self.said[quantity]
        self.revealed.add(quantity)
        spread = value.spread if isinstance(value, Timing) else None
        around = value.around if isinstance(value, Timing) and isinstance(said, Prediction) else ()
        value = value.median if isinstance(value, Timing) else float(value)
        if not 0 < value < math.inf:
            return (f"○ {quantity!r} measured as {si(value, blank.unit)}: lost in noise, it does "
                    "not count.")
        self.moments[quantity] = moment(said, self.calibrated, around)
        if around:
            from clawdemy_infer.machine.present import widened

            low, high = widened(said, self.calibrated, around)
            blank = replace(blank, low=low, high=high)
        row, parts = self.rows[quantity], shares(parts, value)
        self._write(replace(blank, measured=value, spread=spread, parts=parts,
                            guess=row.guess, late=row.late, cause=row.cause, date=ledger.today()))
        return ""

    def _result(self, quantity: str) -> str:
        """One line: what was measured, its spread, and what had been said."""
        row, told = self.rows[quantity], self.said[quantity][1]
        spread = f" ± {tables.percent(row.spread)}" if row.spread else ""
        said = f", predicted {tables.predicted(told)}" if row.low else ""
        if self._widened(row):
            said += f"; widened to {tables.predicted(row)} by the speeds around the run"
        return f"{quantity}: {si(row.measured, row.unit)}{spread}{said}"

    def _widened(self, row: LedgerRow) -> bool:
        told = self.said[row.quantity][1]
        return (told.low, told.high) != (row.low, row.high)

    def cause(self, quantity: str, choice: str | EllipsisType = ...) -> None:
        """What the learner takes for the largest difference between napkin and measured, one of
        `waterfall.choices`; `...` is no answer. After the explanation it does not count."""
        row = self._predicted(quantity)
        accepted = choices([part["name"] for part in row.parts]
                           or getattr(self.said[quantity][0], "parts", ()))
        if choice is ... or choice == row.cause:
            return
        if quantity in self.explained:
            print(f"○ {quantity!r} is explained already: {choice!r} comes too late to count.")
        elif choice not in accepted:
            print(f"○ {choice!r} is no cause; take one of {_listed(accepted)}")
        else:
            self.rows[quantity] = replace(row, cause=choice)

    def explain(self, quantity: str) -> None:
        """Draw and say, part by part, what lies between napkin and measured; judge the cause."""
        row = self._predicted(quantity)
        if row.measured is None:
            return print(f"○ {quantity!r} has not been measured, so there is nothing to explain.")
        found = account(row, self.moments[quantity])
        self.explained.add(quantity)
        right = row.cause in found.causes if row.cause and found.causes else None
        self._write(replace(row, explained=found.explained, sentence=found.sentence,
                            cause_right=right, date=ledger.today()))
        import matplotlib.pyplot as plt

        from clawdemy_course.figures import waterfall
        from clawdemy_infer.lesson import plots

        figure, ax = plt.subplots(figsize=(7.2, 3.2))       # a slide has lines under it
        plots.show(figure, waterfall(ax, row, found))
        print(found.sentence)
        if right is not None:
            print(f"{'✓' if right else '✗'} you said: {row.cause}.")

    def card(self) -> Table:
        """The machine that this lesson predicts for."""
        return tables.card(self.calibrated)

    def table(self, *quantities: str) -> Table:
        """Predicted beside measured of `quantities`, by default of all so far."""
        self.revealed |= self.rows.keys()
        rows = [self._predicted(quantity) for quantity in quantities or self.rows]
        told = {row.quantity: self.said[row.quantity][1] for row in rows if row.inside == "yes"}
        only = [name for name, said in told.items()
                if said.low and not said.low <= self.rows[name].measured <= said.high]
        title = ("predicted: each interval is widened by the machine's speeds right around its run;"
                 f" {len(told)} inside, {len(only)} of them only as widened")
        return replace(tables.ledger_table(rows, widened=only),
                       title=title * any(map(self._widened, rows)))

    def _write(self, row: LedgerRow) -> None:
        ledger.append(row)
        self.rows[row.quantity] = row

    def _predicted(self, quantity: str) -> LedgerRow:
        if quantity not in self.rows:
            raise ValueError(f"quantity={quantity!r} was never predicted, so it cannot be "
                             f"measured; predicted so far: {_listed(self.rows) or 'nothing yet'}")
        return self.rows[quantity]

    # -- build tasks and exercises ----------------------------------------------------------------

    def build(self, name: str, answer: object) -> object:
        """Check the learner's `answer` to a build task, say in one line how it stands, and return
        what the measured runs use: a right answer, else the library's. Raises as `exercise`."""
        task = clawdemy_course.task(name)
        status, text = build.check(task, answer)
        self._stands(name, status, {
            RIGHT: f"✓ {name}: {len(task.properties)} properties hold. From here on the measured "
                   "runs use your code.",
            WRONG: f"✗ {name}: {text} The lesson goes on with the library's.",
            OPEN: f"○ {name}: {text or 'open'}; the lesson goes on with the library's "
                  f"({task.where})"}[status])
        return task.adapt(answer) if status == RIGHT else task.library

    def show(self, name: str) -> None:
        """Show the library's version of a build task, folded."""
        from IPython.display import display

        task = clawdemy_course.task(name)
        title = f"library's version: {task.where}"
        source = "\n\n".join(each if isinstance(each, str) else inspect.getsource(each)
                             for each in task.shown or (task.library,))
        display({"text/plain": title, "text/html": f"<details><summary>{title}</summary>"
                 f"<pre>{escape(source)}</pre></details>"}, raw=True)

    def steps(self, name: str, **answers: object) -> None:
        """Check each step of an exercise: a number in the step's unit, text with a unit ("16 GB"),
        or `...`. Raises `ValueError` unless each step has its answer, else as `exercise`."""
        exercise = clawdemy_course.exercise(name)
        if odd := answers.keys() ^ exercise.steps.keys():
            raise ValueError(f"exercise {name!r}: {_listed(sorted(odd))} is missing or unknown; "
                             f"its steps are {_listed(exercise.steps)}")
        found = [checks.check_step(each, step, answers[each])
                 for each, step in exercise.steps.items()]
        status = next((bad for bad in (WRONG, OPEN) if bad in dict(found)), RIGHT)
        means = [f"✓ {name}: {exercise.means}"] if status == RIGHT else []
        self._stands(name, status, "\n".join([line for _, line in found] + means))

    def exercise(self, name: str, answer: object, *, cases: Mapping[object, object] | None = None,
                 expected: object = None, rtol: float = 1e-3, nudge: str = "",
                 means: str = "") -> None:
        """Check the learner's `answer` and say in one line how it stands; never stop the notebook.

        A function is tried on `cases`: what it must return, by its arguments (a tuple, or the only
        one). A value is compared with `expected`. Numbers, lists and tensors may differ by the
        relative `rtol`, text may not. `nudge` follows a wrong answer, `means` a right one. An
        answer that is or returns `...` is not attempted. Raises `NotRight` under
        `CLAWDEMY_STRICT=1` unless right, `ValueError` unless given `cases` or `expected`.
        """
        if (cases is None) == (expected is None):
            raise ValueError(f"exercise {name!r}: give `cases` for a function or `expected` for a "
                             "value, one of the two")
        status, problem = (checks.check_value(name, answer, expected, rtol) if cases is None
                           else checks.check_function(name, answer, cases, rtol))
        self._stands(name, status, {
            RIGHT: f"✓ {name}: {means or 'right.'}", WRONG: f"✗ {problem} {nudge}".rstrip(),
            OPEN: f"○ {name}: not attempted yet. Write over the dots and run the cell again.",
        }[status])

    def _stands(self, name: str, status: str, line: str) -> None:
        self.exercises[name] = status
        if status != RIGHT and os.environ.get("CLAWDEMY_STRICT") == "1":
            raise NotRight(line)
        print(line)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
