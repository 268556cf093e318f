"""What a notebook sees: predict before you measure, and exercises that never stop a run."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clawdemy_infer.envelope.roofline import Part, Prediction
from clawdemy_infer.lesson import Lesson, NotRight
from clawdemy_infer.lesson.ledger import read
from clawdemy_infer.machine.calibrated import Speeds
from clawdemy_infer.timing import Timing


@pytest.fixture
def ledger_file(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    monkeypatch.setenv("CLAWDEMY_LEDGER", str(path))
    monkeypatch.delenv("CLAWDEMY_STRICT", raising=False)
    return path


@pytest.fixture
def lesson(ledger_file):
    return Lesson("01 counting_inference", machine="a test's machine")


def test_a_measurement_lands_beside_its_prediction(lesson, ledger_file):
    lesson.guess("TTFT", 1)
    lesson.predict("TTFT", napkin=np.float32(0.25), predicted=torch.tensor(0.5), unit="s")
    assert read(ledger_file) == []
    lesson.measure("TTFT", 0.75)
    (row,) = read(ledger_file)
    assert (row.lesson, row.machine) == ("01 counting_inference", "a test's machine")
    assert (row.quantity, row.unit) == ("TTFT", "s")
    assert (row.guess, row.napkin, row.predicted, row.measured) == (1.0, 0.25, 0.5, 0.75)
    assert (row.ratio, row.ratio_napkin) == (1.5, 3.0)
    assert "750 ms" in repr(lesson.table())


def test_what_was_never_predicted_cannot_be_measured_or_explained(lesson, ledger_file, capsys):
    lesson.predict("TTFT", napkin=1.0, unit="s")
    for forbidden in (lambda: lesson.measure("TPOT", 1.0), lambda: lesson.explain("TPOT")):
        with pytest.raises(ValueError, match="'TPOT' was never predicted.*'TTFT'"):
            forbidden()
    lesson.explain("TTFT")
    assert "'TTFT' has not been measured" in capsys.readouterr().out
    assert read(ledger_file) == []


def test_running_a_cell_again_replaces_in_the_lesson_and_appends_to_the_file(lesson, ledger_file):
    lesson.predict("TTFT", napkin=1.0, unit="s")
    lesson.measure("TTFT", 2.0)
    lesson.measure("TTFT", 3.0)
    assert [row.measured for row in read(ledger_file)] == [2.0, 3.0]
    assert len(lesson.table().rows) == 1


def test_predicting_again_starts_afresh_and_keeps_the_guess(lesson):
    lesson.guess("TTFT", 5.0)
    lesson.predict("TTFT", napkin=1.0, unit="s")
    lesson.measure("TTFT", 2.0)
    lesson.predict("TTFT", napkin=1.5, unit="s")
    assert (lesson.rows["TTFT"].measured, lesson.rows["TTFT"].guess) == (None, 5.0)


# -- guesses --------------------------------------------------------------------------------------


def guessed(lesson, quantity="TTFT"):
    return lesson.rows[quantity].guess, lesson.rows[quantity].late


def test_the_last_guess_before_the_reveal_counts(lesson):
    lesson.guess("TTFT", 5.0)
    lesson.guess("TTFT", "20 ms")
    lesson.predict("TTFT", napkin=0.01, unit="s")
    assert guessed(lesson) == (0.02, False)
    lesson.guess("TTFT", "3 GiB")  # of what is counted in seconds: no guess
    assert guessed(lesson) == (None, False)
    lesson.guess("TTFT", 0.03)
    lesson.guess("TTFT", ...)
    assert guessed(lesson) == (None, False)
    lesson.guess("TTFT", 4)
    assert lesson.reveal("TTFT").rows == [("TTFT", "4.00 s", "10.0 ms", "–")]
    assert guessed(lesson) == (4.0, False)


@pytest.mark.parametrize("shown", ["reveal", "table", "measure"])
def test_a_guess_after_the_reveal_is_late_and_moves_no_earlier_one(lesson, shown, ledger_file):
    def cell(early, late):
        lesson.guess("early", early)
        lesson.guess("late", late)

    cell(2.0, ...)
    for quantity in ("early", "late"):
        lesson.predict(quantity, napkin=1.0, unit="s")
    {"reveal": lesson.reveal, "table": lesson.table,
     "measure": lambda: [lesson.measure(name, 1.0) for name in lesson.rows]}[shown]()
    cell(3.0, 7.0)
    cell(4.0, 8.0)  # the cell is run again
    cell(..., ...)
    assert guessed(lesson, "early") == (2.0, False) and guessed(lesson, "late") == (7.0, True)
    lesson.predict("late", napkin=1.0, unit="s")
    lesson.measure("late", 6.0)
    assert (read(ledger_file)[-1].guess, read(ledger_file)[-1].late) == (7.0, True)


@pytest.mark.parametrize(("value", "line"), [
    ("20 GB", "○ your guess of 'TTFT', 20.0 GB, is in B, and the lesson counts in s"),
    ("12 tokens", "○ your guess of 'TTFT', 12.0 tokens, is in tokens, and the lesson counts in s"),
    ("soon", "○ your guess of 'TTFT': 'soon' is no number, nor one with a unit like 20 ms"),
    (["20 ms"], "○ your guess of 'TTFT': "),
    (20e6, "○ your guess of 'TTFT', 20,000,000 s, is a million times off the napkin"),
    (1e-9, "○ your guess of 'TTFT', 1.00 ns, is a million times off the napkin"),
    (0, "○ your guess of 'TTFT', 0 s, is a million times off"),
    (float("nan"), "○ your guess of 'TTFT', nan s, is a million times off"),
])
@pytest.mark.parametrize("order", ["guess first", "prediction first"])
def test_a_guess_that_cannot_be_meant_gets_one_line_and_does_not_count(lesson, capsys, value, line,
                                                                       order):
    if order == "guess first":
        lesson.guess("TTFT", value)
    lesson.predict("TTFT", napkin=0.01, unit="s")
    if order == "prediction first":
        lesson.guess("TTFT", value)
    lesson.reveal()
    printed = capsys.readouterr().out
    assert printed.startswith(line) and printed.count("\n") == 1
    assert guessed(lesson) == (None, False)


def test_a_guess_in_the_singular_or_in_a_unit_of_its_own_is_understood(lesson, capsys):
    lesson.predict("knee", napkin=10, unit="tokens")
    lesson.predict("bandwidth", napkin=20e9, unit="B/s")
    lesson.guess("knee", "8 token")
    lesson.guess("bandwidth", 30e9, unit="B/s")
    assert (guessed(lesson, "knee"), guessed(lesson, "bandwidth")) == ((8, False), (30e9, False))
    assert capsys.readouterr().out == ""


def test_a_misspelt_quantity_is_named_when_the_right_one_is_revealed(lesson, capsys):
    lesson.guess("time per tokn", 1)
    lesson.guess("TTFT", 1)
    lesson.guess("weights", 1e9)  # of a quantity that is predicted later
    for quantity in ("time per token", "TTFT"):
        lesson.predict(quantity, napkin=1.0, unit="s")
    assert lesson.reveal("time per token").rows[0][:2] == ("time per token", "open")
    printed = capsys.readouterr().out
    assert "'time per tokn'" in printed and "did you mean 'time per token'?" in printed
    assert printed.count("\n") == 1
    lesson.guess("time per token", 2)
    lesson.reveal()
    assert "it has 'time per token', 'TTFT'" in capsys.readouterr().out


# -- measurements ---------------------------------------------------------------------------------


def test_no_measurement_changes_its_prediction(lesson, ledger_file):
    lesson.predict("bandwidth", 20e9, 25e9, unit="B/s", interval=(20e9, 30e9))
    for measured in (1e9, 25e9, 400e9):
        lesson.measure("bandwidth", measured)
    assert {(row.predicted, row.low, row.high) for row in read(ledger_file)} == {(25e9, 20e9, 30e9)}
    assert [row.inside for row in read(ledger_file)] == ["below", "yes", "above"]


# 12 ms of reading, ± 10%, and 3 ms of launches, ± 50%: 2.7 ms of 15
PREDICTION = Prediction({"down": Part(0.012, 0.1, "memory"),
                         "launches": Part(0.003, 0.5, "launches")}, compute_s=0.001, memory_s=0.012)
MACHINE = SimpleNamespace(name="a test's machine", now=Speeds(memory=0.5))


@pytest.mark.parametrize("measured", [1e-3, 0.015, 1.0])
def test_speeds_around_the_run_widen_the_interval_and_never_move_its_centre(ledger_file, measured):
    lesson = Lesson("01", MACHINE)
    lesson.predict("token", napkin=0.01, predicted=PREDICTION, unit="s")
    low, high = lesson.rows["token"].low, lesson.rows["token"].high
    assert (low, high) == (pytest.approx(0.015 / 1.18), pytest.approx(0.015 * 1.18))
    lesson.measure("token", Timing((measured,), around=(Speeds(memory=0.5), Speeds(memory=0.25))))
    [row] = read(ledger_file)  # memory was half as fast after the run: 24 ms of reading
    assert (row.predicted, row.low) == (0.015, low)
    assert row.high == pytest.approx(0.027 * 1.18)
    lesson.measure("token", Timing((measured,)))  # again, and nobody looked
    assert (lesson.rows["token"].low, lesson.rows["token"].high) == (low, high)


def test_a_data_sheets_prediction_has_no_interval(lesson):
    exact = Prediction({"down": Part(0.012)}, compute_s=0.0, memory_s=0.012)
    lesson.predict("token", napkin=0.01, predicted=exact, unit="s")
    lesson.measure("token", 0.02)
    assert (lesson.rows["token"].predicted, lesson.rows["token"].inside) == (0.012, None)
    lesson.measure("token", Timing((0.02,), around=(Speeds(memory=0.5),)))
    assert lesson._result("token") == (
        "token: 20.0 ms, predicted 12.0 ms; widened to 12.0 – 24.0 ms by the speeds around the run")


def test_a_timing_brings_its_median_and_spread(lesson, ledger_file):
    lesson.predict("TTFT", napkin=1.0, unit="s")
    lesson.measure("TTFT", Timing((1.0, 2.0, 4.0)))
    [row] = read(ledger_file)
    assert (row.measured, row.spread) == (2.0, Timing((1.0, 2.0, 4.0)).spread)
    lesson.measure("TTFT", 3.0)
    assert (lesson.rows["TTFT"].measured, lesson.rows["TTFT"].spread) == (3.0, None)


@pytest.mark.parametrize("value", [-0.001, 0.0, float("nan"), float("inf")])
def test_a_difference_lost_in_noise_is_no_row_and_no_error(lesson, ledger_file, capsys, value):
    lesson.predict("attention adds", napkin=1.0, unit="s")
    lesson.measure("attention adds", value)
    lesson.explain("attention adds")
    assert capsys.readouterr().out.count("○ 'attention adds'") == 2
    assert read(ledger_file) == [] and lesson.rows["attention adds"].measured is None


def test_a_run_lost_in_noise_is_told_once(lesson, ledger_file, capsys):
    lesson.predict("attention adds", napkin=1.0, unit="s")
    lesson.measure("attention adds", 2.0)
    lesson.measure("attention adds", lambda: Timing((-0.001, -0.001)))
    told = capsys.readouterr().out
    assert told == ("○ 'attention adds' measured as -1.00 ms: lost in noise, it does not count.\n")
    assert [row.measured for row in read(ledger_file)] == [2.0]


def test_the_machine_may_be_an_object_with_a_name(ledger_file):
    class Machine:
        name = "H100"

    assert Lesson("00 your_machine", machine=Machine()).machine == "H100"


# -- exercises ------------------------------------------------------------------------------------

CASES = {(2, 3): 6, (5, 0.5): 2.5}


def raises(error):
    def function(*arguments):
        raise error

    return function


@pytest.mark.parametrize(
    ("answer", "status", "line"),
    [(..., "open", "○ product: not attempted yet"),
     (lambda a, b: ..., "open", "○ product: not attempted yet"),
     (lambda a, b: 2*..., "open", "○ product: not attempted yet"),
     (lambda a, b: a*b, "right", "✓ product: it multiplies"),
     (lambda a, b: torch.tensor(float(a*b)), "right", "✓ product: it multiplies"),
     (lambda a, b: a + b, "wrong", "✗ product(2, 3) gave 5; 6 was asked for. think of areas"),
     (lambda a, b: 6, "wrong", "✗ product(5, 0.5) gave 6; 2.5 was asked for. think of areas"),
     (lambda a, b: None, "wrong", "✗ product(2, 3) gave None; 6 was asked for. think of areas"),
     (lambda a, b: [6], "wrong", "✗ product(2, 3) gave [6]; 6 was asked for. think of areas"),
     (lambda a, b: float("nan"), "wrong",
      "✗ product(2, 3) gave nan; 6 was asked for. think of areas"),
     (lambda a: a, "wrong", "✗ product(2, 3) raised TypeError:"),
     (raises(ZeroDivisionError("division by zero")), "wrong",
      "✗ product(2, 3) raised ZeroDivisionError: division by zero. think"),
     (6, "wrong", "✗ product is 6; a function was asked for. think of areas"), ],
)
def test_a_function_is_judged_in_one_line(lesson, capsys, monkeypatch, answer, status, line):
    def check():
        lesson.exercise("product", answer, cases=CASES, nudge="think of areas",
                        means="it multiplies")

    check()
    printed = capsys.readouterr().out
    assert printed.startswith(line) and printed.count("\n") == 1
    assert lesson.exercises == {"product": status}
    monkeypatch.setenv("CLAWDEMY_STRICT", "1")
    if status == "right":
        check()
    else:
        with pytest.raises(NotRight, match="product"):
            check()


@pytest.mark.parametrize(
    ("answer", "status", "line"),
    [
        (..., "open", "○ ridge: not attempted yet"),
        (295.2, "right", "✓ ridge: right."),
        (590, "wrong", "✗ ridge = 590 is 2.00 times too large."),
        (29.5, "wrong", "✗ ridge = 29.5 is 10.0 times too small."),
        (-295, "wrong", "✗ ridge = -295 is not it."),
        ("a lot", "wrong", "✗ ridge = 'a lot' is not it."),
        (None, "wrong", "✗ ridge = None is not it."),
    ],
)
def test_a_number_is_judged_without_giving_the_answer_away(lesson, capsys, answer, status, line):
    lesson.exercise("ridge", answer, expected=295.0, rtol=0.01)
    printed = capsys.readouterr().out
    assert printed.startswith(line)
    assert lesson.exercises["ridge"] == status


def test_words_lists_and_single_arguments_are_judged_too(lesson):
    lesson.exercise("side", "memory", expected="memory")
    lesson.exercise("which", "compute", expected="memory")
    lesson.exercise("shape", [1, 2, 3], expected=(1, 2, 3))
    lesson.exercise("double", lambda x: 2 * x, cases={3: 6})
    assert lesson.exercises == {
        "side": "right", "which": "wrong", "shape": "right", "double": "right"
    }


def test_an_interrupt_in_an_answer_is_not_a_wrong_answer(lesson):
    with pytest.raises(KeyboardInterrupt):
        lesson.exercise("product", raises(KeyboardInterrupt()), cases=CASES)


def test_an_exercise_without_anything_to_compare_is_the_authors_mistake(lesson):
    for wrong in ({}, {"cases": CASES, "expected": 1}):
        with pytest.raises(ValueError, match="exercise 'product'"):
            lesson.exercise("product", ..., **wrong)


# -- one call measures ----------------------------------------------------------------------------


class Step:
    """As `StepOf` measures itself, on no clock."""

    def __init__(self, fails=None):
        self.asked, self.fails = [], fails

    def about_s(self, seconds, watched):
        return 10 * seconds + watched

    def time(self, machine):
        self.asked.append("time")
        if self.fails:
            raise self.fails
        return Timing((0.75, 0.75))

    def parts(self, machine):
        self.asked.append("parts")
        return [{"name": "attention", "napkin_s": 0.1, "predicted_s": 0.2, "measured_s": 0.3}]


def test_a_step_is_measured_with_its_parts_in_one_call_and_the_result_is_told(
        lesson, ledger_file, capsys):
    lesson.predict("TPOT", napkin=0.25, predicted=0.5, unit="s", interval=(0.4, 0.6))
    step = Step()
    lesson.measure("TPOT", step)
    (row,) = read(ledger_file)
    assert step.asked == ["time", "parts"] and row.measured == 0.75
    assert [part["name"] for part in row.parts] == ["attention"]
    assert capsys.readouterr().out == "TPOT: 750 ms, predicted 400 – 600 ms\n"


def test_a_step_may_be_measured_as_a_whole_only(lesson, ledger_file):
    lesson.predict("TPOT", napkin=0.25, unit="s")
    step = Step()
    lesson.measure("TPOT", step, parts=())
    assert step.asked == ["time"] and read(ledger_file)[0].parts == ()


def test_what_measures_itself_is_called_once_and_only_for_what_was_predicted(lesson, ledger_file):
    lesson.predict("copy", napkin=1.0, unit="s")
    lesson.measure("copy", lambda: Timing((2.0, 2.0)), about_s=3)
    assert read(ledger_file)[0].measured == 2.0
    with pytest.raises(ValueError, match="never predicted"):
        lesson.measure("coffee", lambda: pytest.fail("measured before it was refused"))


def test_an_interrupt_costs_one_quantity_and_one_line(lesson, ledger_file, capsys):
    lesson.predict("TPOT", napkin=0.25, unit="s")
    with pytest.raises(KeyboardInterrupt) as caught:
        lesson.measure("TPOT", Step(fails=KeyboardInterrupt()))
    assert caught.value._render_traceback_() == [str(caught.value)]
    assert capsys.readouterr().out == (
        "○ 'TPOT' was interrupted and does not count yet; run the cell again.\n")
    assert read(ledger_file) == []
    lesson.measure("TPOT", Step())                      # and the lesson goes on
    assert read(ledger_file)[0].measured == 0.75


def test_the_bar_lasts_as_long_as_predicted_and_gives_way_to_the_result(monkeypatch):
    from clawdemy_infer.lesson import progress

    shown = []
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    monkeypatch.setattr(progress, "display", lambda data, **_: shown.append(data) or
                        SimpleNamespace(update=lambda data, **_: shown.append(data)))
    with progress.bar("<TTFT>", 2.34) as end:
        end("done: 3 s < 4 s")
    first, last = shown
    assert "2.34s linear" in first["text/html"] and "measuring &lt;TTFT&gt;" in first["text/html"]
    assert first["text/plain"] == "measuring <TTFT>, about 2.00 s"
    assert last == {"text/html": "<div>done: 3 s &lt; 4 s</div>", "text/plain": "done: 3 s < 4 s"}


def test_an_interval_that_the_machine_widened_is_shown_as_told_and_as_widened(lesson):
    """Judged by the wider one; the learner sees both."""
    lesson.predict("TPOT", napkin=1.0, predicted=2.0, interval=(1.5, 2.5), unit="s")
    lesson.measure("TPOT", 2.6)
    assert lesson.table().title == "" and "widened" not in lesson._result("TPOT")
    lesson.rows["TPOT"] = replace(lesson.rows["TPOT"], low=1.2, high=3.0)
    assert lesson.table().title.startswith("predicted: each interval is widened")
    assert lesson.table().title.endswith("; 1 inside, 1 of them only as widened")
    lesson.predict("TTFT", napkin=1.0, predicted=2.0, interval=(1.5, 2.5), unit="s")
    lesson.measure("TTFT", 2.4)
    assert [row[-1] for row in lesson.table("TTFT", "TPOT").rows] == ["yes", "yes, widened"]
    assert lesson.table("TTFT").title == ""
    assert lesson._result("TPOT") == (
        "TPOT: 2.60 s, predicted 1.50 – 2.50 s; widened to 1.20 – 3.00 s by the speeds around the "
        "run")
