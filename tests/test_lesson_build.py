"""Build tasks and exercises of several steps: whatever a learner writes, the lesson goes on; and
each task and exercise of the course accepts what is right and says what is wrong."""

import __future__

import ast
import importlib
import math
import multiprocessing
import signal
import textwrap
import threading
from html import unescape
from pathlib import Path

import jupytext
import pytest
import torch
from hypothesis import strategies as st

import clawdemy_course
from clawdemy_course.checks import Exercise, Step
from clawdemy_course.properties import for_all
from clawdemy_infer.lesson import Lesson, NotRight, build
from clawdemy_infer.lesson.build import OPEN, RIGHT, WRONG, Task, Wrong

REPOSITORY = Path(__file__).parents[1]
forks = pytest.mark.skipif(not build.FORKS, reason="a child process needs Linux")


class Total:
    """A library's object."""

    def __init__(self):
        self.sum = torch.zeros(())

    def add(self, x):
        self.sum = self.sum + x.sum()
        return self.sum


def use_once(answer):
    total = answer()
    return {"sum": total.sum, "add": [total.add(torch.ones(2))]}


def an_empty_total_is_zero(answer):
    if (got := float(answer().sum)) != 0:
        raise Wrong(f"A new total was {got:g}.")


@for_all(parts=st.lists(st.integers(0, 3), min_size=1, max_size=4))
def parts_add_up(answer, parts):
    total = answer()
    for part in parts:
        got = total.add(torch.full((2,), float(part)))
    if not isinstance(got, torch.Tensor) or float(got) != 2 * sum(parts):
        raise Wrong(f"After adding two of each of {parts}, the total was {got}.")


def task(**changed):
    return Task(**{"name": "Total", "student": "MyTotal", "where": "somewhere/total.py",
                   "properties": (an_empty_total_is_zero, parts_add_up), "smoke": use_once,
                   "library": Total, "adapt": lambda answer: ("adapted", answer), "seconds": 20,
                   **changed})


def defined(source, name="MyTotal", given=""):
    names = {"torch": torch, "math": math}
    for text in (given, source):
        code = compile(text, "<answer>", "exec", __future__.annotations.compiler_flag, True)
        exec(code, names)
    return names[name]


def answer(add):
    """A class whose method `add` has this body."""
    head = "class MyTotal:\n    def __init__(self):\n        self.sum = torch.zeros(())\n\n"
    return defined(f"{head}    def add(self, x):\n{textwrap.indent(add, ' ' * 8)}")


RIGHT_BODY = "self.sum = self.sum + x.sum()\nreturn self.sum"


# -- what a learner's code may do ------------------------------------------------------------------


@forks
@pytest.mark.parametrize(("add", "status", "said"), [
    (RIGHT_BODY, RIGHT, ""),
    ("return ...", OPEN, ""),
    ("return 2 * ...", OPEN, ""),
    ("return (...).sum()", OPEN, ""),
    ("self.sum = ... if x[0] == 3 else self.sum + x.sum()\nreturn self.sum + 0", OPEN, ""),
    ("return x.sum()", WRONG, "parts add up. After adding two of each of [1, 0], the total was 0"),
    ("return None", WRONG, "the total was None"),
    ("self.sum += x.sum()\nx.fill_(7)\nreturn self.sum", RIGHT, ""),
    ("class Same(float):\n    def __eq__(self, other):\n        return True\nreturn Same(5)", WRONG,
     "parts add up. After adding two of each of [0], the total was 5.0"),
    ("return x.total()", WRONG,
     "it can be used. It raised AttributeError: 'Tensor' object has no attribute 'total'."),
    ("if x[0] > 1: raise IndexError('first\\nsecond')\n" + RIGHT_BODY, WRONG,
     "parts add up. It raised IndexError: first second (parts=[2])."),
    ("raise SystemExit", WRONG, "It raised SystemExit."),
    ("raise KeyboardInterrupt", WRONG, "It raised KeyboardInterrupt."),
    ("raise BaseException('x' * 1000)", WRONG, "It raised BaseException: xxx"),
    ("raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})", WRONG,
     "it can be used. Python ended with code 0."),
    ("import os; os._exit(3)", WRONG, "it can be used. Python ended with code 3."),
    ("import ctypes; ctypes.string_at(0)", WRONG, "Python crashed (SIGSEGV)."),
    ("return self.add(x)", WRONG, "It raised RecursionError: maximum recursion depth exceeded"),
    ("return torch.ones(10**11)", WRONG, "It asked for more than 1.07 GB of memory."),
    ("return bytes(10**12)", WRONG, "It asked for more than 1.07 GB of memory."),
    ("pieces = []\nwhile True: pieces.append(bytes(10**7))", WRONG, "It asked for more than"),
    ("import random\n" + RIGHT_BODY + " + random.random()", WRONG, "parts add up. "),
])  # fmt: skip
def test_an_answer_is_judged_by_the_first_property_that_it_breaks(add, status, said):
    got, text = build.check(task(), answer(add))
    assert got == status and said in text and "\n" not in text and len(text) < 300
    assert not multiprocessing.active_children()


@forks
@pytest.mark.parametrize("add", [
    "while True: pass",
    "while True:\n    try: pass\n    except BaseException: pass",
    "import time\nif x[0] == 0: time.sleep(60)\n" + RIGHT_BODY,
])
def test_what_never_ends_is_ended(add):
    status, text = build.check(task(seconds=0.7), answer(add))
    assert status == WRONG and text.endswith(". It was still running after 0.7 s.")
    assert text.startswith("parts add up" if "x[0]" in add else "it can be used")
    assert not multiprocessing.active_children()


@forks
def test_a_learners_ctrl_c_stops_the_check_and_nothing_else():
    main = threading.main_thread().ident
    threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGINT)).start()
    assert build.check(task(), answer("while True: pass")) == (OPEN, "stopped at 'it can be used'")
    assert not multiprocessing.active_children()


@forks
@pytest.mark.parametrize("noise", [
    "print('x' * 10**6)", "import os, sys\nos.write(1, b'out'); os.write(2, b'error')\n"
    "sys.__stdout__.write('out'); sys.stderr.write('error')", "import os; os.system('echo out')",
    "import sys; sys.stdin.read()"])
def test_what_a_learner_prints_goes_nowhere(noise, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert build.check(task(), answer(f"{noise}\n{RIGHT_BODY}")) == (RIGHT, "")
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("odd", [5, None, "MyTotal", Total(), [Total]])
def test_what_is_no_class_or_function_is_wrong(odd):
    status, text = build.check(task(), odd)
    assert status == WRONG and "a class or a function was asked for" in text


def test_dots_are_open_and_nothing_runs():
    assert build.check(task(smoke=None), ...) == (OPEN, "")


@forks
def test_nothing_that_an_answer_changes_is_seen_outside():
    seen, threads = [], torch.get_num_threads()

    class MyTotal(Total):
        def add(self, x):
            seen.append(x)
            return super().add(x)

    assert build.check(task(), MyTotal) == (RIGHT, "")
    assert seen == [] and torch.get_num_threads() == threads


def test_threads_of_this_process_hold_no_check_up():
    x = torch.ones(600, 600)
    x @ x                                               # OpenMP has its threads now
    multiply = RIGHT_BODY.replace("return", "y = torch.ones(600, 600); y @ y\nreturn")
    assert build.check(task(), answer(multiply)) == (RIGHT, "")


@pytest.mark.parametrize(("add", "found"), [
    (RIGHT_BODY, (RIGHT, "")), ("return ...", (OPEN, "")),
    ("raise SystemExit", (WRONG, "it can be used. It raised SystemExit.")),
    ("import time; time.sleep(1)", (WRONG, "it can be used. It was still running after 0.5 s."))])
def test_without_fork_a_thread_judges(add, found, monkeypatch, capfd):
    monkeypatch.setattr(build, "FORKS", False)
    assert build.check(task(seconds=0.5 if "sleep" in add else 20), answer(add)) == found
    assert capfd.readouterr().err == ""


def test_the_line_that_raised_is_shown():
    class MyTotal(Total):
        def add(self, x):
            return x[7]

    assert build.check(task(), MyTotal)[1].endswith(" (`return x[7]`).")


# -- what the lesson says --------------------------------------------------------------------------

STEPS = Exercise("chat", {
    "weights": Step(16e9, {8e9: "bf16 has 2 bytes.", "32 GB": "That is fp32."}, "B"),
    "users": Step(12, {24.0: "Keys and values."}, "users"),
    "share": Step(0.25, {0.75: "The rest."}),
    "limit": Step("memory", {"compute": "Few FLOPs a byte."}),
    "fits": Step(True, {False: "It does."}),
}, "The cache sets the batch.")


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAWDEMY_LEDGER", str(tmp_path / "ledger.jsonl"))
    monkeypatch.delenv("CLAWDEMY_STRICT", raising=False)
    return Lesson("02 kv_cache", machine="a test's machine")


@pytest.fixture
def toys(lesson, monkeypatch):
    monkeypatch.setattr(clawdemy_course, "tasks", lambda: {"Total": task()})
    monkeypatch.setattr(clawdemy_course, "exercises", lambda: {"chat": STEPS})
    return lesson


@pytest.mark.parametrize(("add", "status", "line"), [
    (RIGHT_BODY, RIGHT, "✓ Total: 2 properties hold. From here on the measured runs use your "
                        "code.\n"),
    ("return ...", OPEN, "○ Total: open; the lesson goes on with the library's "
                         "(somewhere/total.py)\n"),
    ("return x.sum()", WRONG, "✗ Total: parts add up. After adding two of each of [1, 0], the "
                              "total was 0.0. The lesson goes on with the library's.\n")])
def test_measured_runs_use_a_right_answer_and_else_the_librarys(toys, capsys, monkeypatch, add,
                                                                status, line):
    mine = answer(add)
    got = toys.build("Total", mine)
    assert capsys.readouterr().out == line and toys.exercises == {"Total": status}
    assert got == (("adapted", mine) if status == RIGHT else Total)
    monkeypatch.setenv("CLAWDEMY_STRICT", "1")
    if status != RIGHT:
        with pytest.raises(NotRight, match="Total"):
            toys.build("Total", mine)


def test_the_librarys_version_is_shown_folded(toys, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    toys.show("Total")
    [data] = shown
    assert data["text/plain"] == "library's version: somewhere/total.py"
    assert data["text/html"].startswith("<details><summary>library's version: somewhere/"
                                        "total.py</summary><pre>class Total:")


ANSWERS = {"weights": 16e9, "users": 12, "share": 0.25, "limit": "memory", "fits": True}


@pytest.mark.parametrize(("step", "given", "line"), [
    ("weights", 16.1e9, "✓ weights = 16.1 GB"),
    ("weights", "16 GB", "✓ weights = 16.0 GB"),
    ("weights", torch.tensor(16e9), "✓ weights = 16.0 GB"),
    ("weights", ..., "○ weights: open"),
    ("weights", "8 GB", "✗ weights = 8.00 GB: bf16 has 2 bytes."),
    ("weights", 32.1e9, "✗ weights = 32.1 GB: That is fp32."),
    ("weights", 48e9, "✗ weights = 48.0 GB is 3.00 times too large."),
    ("weights", -16e9, "✗ weights = -16.0 GB is not it."),
    ("weights", "16 s", "✗ weights: 16 s is in s; this step asks for B"),
    ("weights", "a lot", "✗ weights: 'a lot' is no number, nor one with a unit like 20 ms or "
                         "50 GB/s"),
    ("weights", None, "✗ weights = None is not it."),
    ("weights", [16e9], "✗ weights = [16000000000.0] is not it."),
    ("weights", float("nan"), "✗ weights = nan B is not it."),
    ("users", "12 users", "✓ users = 12.0 users"),
    ("users", "12", "✓ users = 12.0 users"),
    ("users", "12 %", "✗ users: 12 % is in %; this step asks for users"),
    ("share", "25 %", "✓ share = 0.250"),
    ("share", "0.25 s", "✗ share: 0.25 s is in s; this step asks for a number"),
    ("limit", " Memory", "✓ limit = 'memory'"),
    ("limit", "compute", "✗ limit = 'compute': Few FLOPs a byte."),
    ("limit", 3, "✗ limit = '3' is not it."),
    ("fits", False, "✗ fits = False: It does."),
    ("fits", "no", "✗ fits = False: It does."),
    ("weights", "16e9 bytes", "✓ weights = 16.0 GB"),
    ("share", "0.25 FLOPs per byte", "✓ share = 0.250"),
])  # fmt: skip
def test_each_step_gets_a_line(toys, capsys, monkeypatch, step, given, line):
    toys.steps("chat", **ANSWERS | {step: given})
    lines = capsys.readouterr().out.splitlines()
    right = line.startswith("✓")
    assert lines[list(ANSWERS).index(step)] == line
    assert len(lines) == 5 + right and lines[5:] == ["✓ chat: The cache sets the batch."] * right
    assert toys.exercises["chat"] == {"✓": RIGHT, "✗": WRONG, "○": OPEN}[line[0]]
    monkeypatch.setenv("CLAWDEMY_STRICT", "1")
    if not right:
        with pytest.raises(NotRight, match=step):
            toys.steps("chat", **ANSWERS | {step: given})


def test_a_wrong_step_beside_an_open_one_is_wrong(toys):
    toys.steps("chat", **ANSWERS | {"weights": ..., "limit": "compute"})
    assert toys.exercises == {"chat": WRONG}


def test_steps_that_do_not_exist_or_are_missing_are_the_notebooks_mistake(toys):
    for odd in (ANSWERS | {"wieghts": 1}, {"weights": 16e9}):
        with pytest.raises(ValueError, match="'chat'.*its steps are 'weights', 'users'"):
            toys.steps("chat", **odd)


def test_an_unknown_task_or_exercise_is_named_beside_those_that_exist(toys):
    for wrong in (lambda: toys.build("Totl", ...), lambda: toys.show("Totl")):
        with pytest.raises(ValueError, match="build task 'Totl' does not exist; .*'Total'"):
            wrong()
    with pytest.raises(ValueError, match="exercise 'caht' does not exist; .*'chat'"):
        toys.steps("caht")


# -- all tasks of the course -----------------------------------------------------------------------

LESSONS = sorted(path.stem[-2:] for path in (REPOSITORY / "notebooks/course").glob("build_*.py"))
answers_of = {lesson: importlib.import_module(f"answers_{lesson}") for lesson in LESSONS}
course = {lesson: importlib.import_module(f"clawdemy_course.build_{lesson}").TASK
          for lesson in LESSONS}


def read(lesson, which):
    given = getattr(answers_of[lesson], "GIVEN", "")
    return defined(answers_of[lesson].ANSWERS[which], course[lesson].student, given)


answers = [(lesson, which) for lesson in LESSONS for which in answers_of[lesson].ANSWERS]


@pytest.mark.parametrize(("lesson", "which"), [
    each for each in answers if each[1].startswith("right")])
def test_a_right_answer_has_all_properties(lesson, which):
    assert build.check(course[lesson], read(lesson, which)) == (RIGHT, "")


@pytest.mark.parametrize(("lesson", "which"), [
    each for each in answers if not each[1].startswith("right")])
def test_a_wrong_answer_is_told_what_is_wrong(lesson, which):
    status, text = build.check(course[lesson], read(lesson, which))
    assert status == WRONG and answers_of[lesson].MESSAGES[which] in text and "\n" not in text


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_task_has_four_wrong_answers_and_what_it_needs(lesson, monkeypatch):
    given, made = answers_of[lesson], course[lesson]
    wrong = {name for name in given.ANSWERS if not name.startswith("right")}
    assert wrong == given.MESSAGES.keys() and len(wrong) >= 4 and "right" in given.ANSWERS
    assert (REPOSITORY / made.where).is_file() and made.seconds <= 30
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    Lesson(lesson, "a test's machine").show(made.name)
    assert shown and clawdemy_course.task(made.name) is made
    source = unescape(shown[0]["text/html"].partition("<pre>")[2].partition("</pre>")[0])
    assert ast.parse(source).body           # a method stands under the line of its class


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_stub_in_the_notebook_is_open(lesson):
    [script] = (REPOSITORY / "notebooks/src").glob(f"{lesson}_*.py")
    call = f'lesson.build("{course[lesson].name}"'
    [cell] = [cell for cell in jupytext.read(script, fmt="py:percent").cells
              if call in cell.source and "build" in cell.metadata.get("tags", [])]
    lines = cell.source.splitlines()
    end = next(number for number, line in enumerate(lines) if call in line)
    stub = defined("\n".join(lines[:end]), course[lesson].student,
                   getattr(answers_of[lesson], "GIVEN", ""))
    assert build.check(course[lesson], stub) == (OPEN, "")


@pytest.mark.parametrize("lesson", [each for each in LESSONS if course[each].same_interface])
def test_the_librarys_version_has_the_same_properties(lesson):
    assert build.check(course[lesson], course[lesson].library) == (RIGHT, "")


# -- all exercises of the course -------------------------------------------------------------------

EXERCISES = clawdemy_course.exercises()


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_tells_wrong_answers_from_right_ones(name, lesson, capsys):
    exercise = EXERCISES[name]
    right = {each: step.right for each, step in exercise.steps.items()}
    assert exercise.name == name and exercise.means
    assert len(right) > 1 and sum(len(step.wrong) for step in exercise.steps.values()) >= 3
    lesson.steps(name, **right)
    said = capsys.readouterr().out
    assert lesson.exercises[name] == RIGHT and said.count("✓") == said.count("\n") == len(right) + 1
    for each, step in exercise.steps.items():
        assert isinstance(step.right, (str, bool)) or math.isfinite(step.right)
        for wrong, text in step.wrong.items():
            lesson.steps(name, **right | {each: wrong})
            lines = [line for line in capsys.readouterr().out.splitlines() if "✗" in line]
            assert len(lines) == 1 and text and lines[0].endswith(f": {text}")
    lesson.steps(name, **dict.fromkeys(right, ...))
    assert lesson.exercises[name] == OPEN


def test_no_name_is_given_twice():
    modules = sorted((REPOSITORY / "notebooks/course").glob("exercises_*.py"))
    names = [task.name for task in course.values()] + [
        name for path in modules
        for name in importlib.import_module(f"clawdemy_course.{path.stem}").EXERCISES]
    assert len(names) == len(set(names))
