"""What a notebook sees: predict before you measure, and exercises that never stop a run."""

import numpy as np
import pytest
import torch

from clawdemy_infer.lesson import Lesson, NotRight
from clawdemy_infer.lesson.ledger import read


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
    lesson.measure("TTFT", 0.75, why="cold cache")
    (row,) = read(ledger_file)
    assert (row.lesson, row.machine) == ("01 counting_inference", "a test's machine")
    assert (row.quantity, row.unit, row.why) == ("TTFT", "s", "cold cache")
    assert (row.guess, row.napkin, row.predicted, row.measured) == (1.0, 0.25, 0.5, 0.75)
    assert (row.ratio, row.ratio_napkin) == (1.5, 3.0)
    assert "750 ms" in repr(lesson.table())


def test_what_was_never_predicted_cannot_be_measured_or_explained(lesson, ledger_file):
    lesson.predict("TTFT", napkin=1.0, unit="s")
    for forbidden in (lambda: lesson.measure("TPOT", 1.0),
                      lambda: lesson.explain("TPOT", "why not")):
        with pytest.raises(ValueError, match="'TPOT' was never predicted.*'TTFT'"):
            forbidden()
    with pytest.raises(ValueError, match="not been measured"):
        lesson.explain("TTFT", "too early")
    assert read(ledger_file) == []


def test_running_a_cell_again_replaces_in_the_lesson_and_appends_to_the_file(lesson, ledger_file):
    lesson.predict("TTFT", napkin=1.0, unit="s")
    lesson.measure("TTFT", 2.0)
    lesson.measure("TTFT", 3.0)
    lesson.explain("TTFT", "the second was slower")
    assert [(row.measured, row.why)
            for row in read(ledger_file)] == [(2.0, ""), (3.0, ""), (3.0, "the second was slower")]
    assert len(lesson.table().rows) == 1


def test_predicting_again_starts_afresh_and_keeps_the_guess(lesson):
    lesson.guess("TTFT", 5.0)
    lesson.predict("TTFT", napkin=1.0, unit="s")
    lesson.measure("TTFT", 2.0)
    lesson.predict("TTFT", napkin=1.5, unit="s")
    assert (lesson.rows["TTFT"].measured, lesson.rows["TTFT"].guess) == (None, 5.0)


def test_dots_are_no_guess_and_a_late_guess_still_counts(lesson):
    lesson.guess("TTFT", ...)
    lesson.predict("TTFT", napkin=1.0, unit="s")
    assert lesson.rows["TTFT"].guess is None
    lesson.guess("TTFT", 4.0)
    assert lesson.rows["TTFT"].guess == 4.0


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


def test_a_prediction_is_judged_at_the_speed_of_the_machine_during_the_run(lesson, ledger_file):
    lesson.predict("TTFT", napkin=0.25, predicted=0.5, unit="s")
    lesson.measure("TTFT", 1.1, speed=0.5)
    lesson.measure("TTFT", 0.9, speed=0.6)  # measured again: the first speed is forgotten
    rows = read(ledger_file)
    assert [row.speed for row in rows] == [0.5, 0.6]
    assert [row.predicted for row in rows] == [1.0, pytest.approx(0.8333, abs=1e-4)]
    assert rows[0].ratio == pytest.approx(1.1)


def test_only_a_time_is_predicted_for_a_speed(lesson):
    lesson.predict("cache", napkin=10, unit="B")
    with pytest.raises(ValueError, match="speed=0.5.*'B'"):
        lesson.measure("cache", 10, speed=0.5)
