"""The course runs to its end whatever a lesson does, and a built notebook is the same notebook
everywhere."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from clawdemy_infer.lesson import course
from clawdemy_infer.lesson.ledger import read

REPOSITORY = Path(__file__).parents[1]
STRICT = {"CLAWDEMY_STRICT": "1"}


def load_build():
    """notebooks/build.py is a script and no part of a package."""
    spec = importlib.util.spec_from_file_location("build", REPOSITORY / "notebooks" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with one lesson, built from its script."""
    root = tmp_path_factory.mktemp("checkout")
    script = root / "notebooks" / "src" / "99_dummy.py"
    script.parent.mkdir(parents=True)
    shutil.copy(REPOSITORY / "tests" / "dummy_lesson.py", script)
    build.build(script, progress=False)
    return root


@pytest.fixture
def lesson(checkout):
    return nbformat.read(checkout / "notebooks" / "99_dummy.ipynb", as_version=4)


def save(path: Path, *cells) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), path)
    return path


def run(notebook, tmp_path, environment=None):
    return course.execute(notebook, "99 dummy", tmp_path,
                          {"CLAWDEMY_LEDGER": str(tmp_path/"ledger.jsonl")} | (environment or {}))


# -- building -------------------------------------------------------------------------------------


def test_building_twice_gives_the_same_bytes(checkout):
    path = checkout / "notebooks" / "99_dummy.ipynb"
    before = path.read_bytes()
    build.build(checkout / "notebooks" / "src" / "99_dummy.py", progress=False)
    assert path.read_bytes() == before


def test_a_built_notebook_says_nothing_of_when_and_where_it_ran(lesson):
    assert lesson.metadata == build.METADATA
    assert {key for cell in lesson.cells for key in cell.metadata} <= {"tags"}
    assert len({cell.id for cell in lesson.cells}) == len(lesson.cells)
    nbformat.validate(lesson)


def test_a_cell_keeps_its_id_when_another_is_put_before_it(tmp_path):
    script = tmp_path / "lesson.py"
    script.write_text("# %%\na = 1\n\n# %%\na = 1\n")
    before = [cell.id for cell in build.read_source(script).cells]
    script.write_text("# %% [markdown]\n# New.\n\n# %%\na = 1\n\n# %%\na = 1\n")
    assert [cell.id for cell in build.read_source(script).cells][1:] == before


def test_sliders_are_replaced_by_a_line_that_reads_anywhere(lesson):
    (widget,) = [cell for cell in lesson.cells if "widget" in cell.metadata.get("tags", [])]
    assert [output.data["text/markdown"] for output in widget.outputs] == [build.STAND_IN]


def test_sliders_in_an_untagged_cell_are_refused():
    cell = new_code_cell("IntSlider()",
                         outputs=[nbformat.v4.new_output("display_data", {build.WIDGET: {}})])
    with pytest.raises(ValueError, match="IntSlider"):
        build.settle(new_notebook(cells=[cell]))


def test_a_script_that_fails_leaves_no_notebook(tmp_path):
    script = tmp_path / "notebooks" / "src" / "98_broken.py"
    script.parent.mkdir(parents=True)
    script.write_text("# %%\n1 / 0\n")
    with pytest.raises(
            RuntimeError,
            match=r"98_broken.py: cell \[1\] `1 / 0`: ZeroDivisionError: division by zero"):
        build.build(script, progress=False)
    assert not (tmp_path / "notebooks" / "98_broken.ipynb").exists()


# -- solutions ------------------------------------------------------------------------------------


def test_every_exercise_reports_right_once_its_solution_is_answered(lesson, tmp_path):
    answered = build.with_solutions(lesson)
    result = run(answered, tmp_path)
    assert result.ok, result.error
    printed = [output.text for cell in answered.cells[len(lesson.cells) + 1:]
               for output in cell.outputs]
    assert printed == ["✓ double: Two of a kind.\n", "✓ thrice: right.\n"]


def test_a_solution_that_is_wrong_fails_the_run(lesson, tmp_path):
    answered = build.with_solutions(lesson)
    answered.cells[-1].source = answered.cells[-1].source.replace("3", "4", 1)
    result = run(answered, tmp_path)
    assert not result.ok and "NotRight: ✗ thrice" in result.error


def test_filling_in_solutions_leaves_the_notebook_itself_alone(lesson):
    before = nbformat.writes(lesson)
    build.with_solutions(lesson)
    assert nbformat.writes(lesson) == before


def test_an_open_exercise_stops_only_a_strict_run(lesson, tmp_path):
    assert run(lesson, tmp_path).ok
    result = run(lesson, tmp_path, STRICT)
    assert not result.ok
    assert result.error == (
        "cell [5] `def double(x):`: NotRight: ○ double: not attempted yet. Write over the dots and "
        "run the cell again.")


def exercise(source="x = ...\nlesson.exercise('x', x, expected=1)"):
    return new_code_cell(source, metadata={"tags": ["exercise", "exercise:x"]})


SOLUTION = new_markdown_cell("```python\nx = 1\n```", metadata={"tags": ["solution"]})


@pytest.mark.parametrize("cells", [
    [exercise()],
    [exercise(), new_markdown_cell("```python\nx = 1\n```")],
    [exercise(), new_markdown_cell("x is one", metadata={"tags": ["solution"]})],
    [exercise(), exercise(), SOLUTION],
    [exercise("x = ..."), SOLUTION],
], ids=["none", "untagged", "no code", "belongs to the next", "no check"])
def test_an_exercise_that_cannot_be_filled_in_is_named(cells):
    with pytest.raises(ValueError, match="exercise 'x'"):
        build.with_solutions(new_notebook(cells=cells))


# -- running --------------------------------------------------------------------------------------


def test_a_lesson_runs_in_this_interpreter_whatever_kernels_are_registered(tmp_path, monkeypatch):
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel/"kernel.json").write_text(
        json.dumps({"argv": ["/no/such/python"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    notebook = new_notebook(cells=[new_code_cell("import sys\nprint(sys.executable)")])
    result = run(notebook, tmp_path)
    assert result.ok, result.error
    assert notebook.cells[0].outputs[0].text.strip() == sys.executable


def test_a_lessons_peak_memory_counts_what_it_gave_back(tmp_path):
    notebook = new_notebook(cells=[
        new_code_cell("x = bytearray(300_000_000)\nx[::4096] = bytes(len(x[::4096]))\ndel x")
    ])
    assert run(notebook, tmp_path).peak_bytes > 300e6


def test_a_kernel_that_dies_is_reported_like_any_failure(tmp_path):
    result = run(new_notebook(cells=[new_code_cell("import os\nos._exit(1)")]), tmp_path)
    assert not result.ok
    assert result.error.startswith("cell [1] `import os`: DeadKernelError")


def test_a_course_goes_on_after_a_broken_lesson_and_names_what_broke(
        checkout, tmp_path, monkeypatch, capsys):
    """The whole command, on a good lesson between two bad ones."""
    notebooks = tmp_path / "notebooks"
    good = notebooks / "02_good.ipynb"
    save(notebooks/"01_bad_name.ipynb", new_code_cell("pass"), new_markdown_cell("text"),
         new_code_cell("# Now\nvalue = nothing"))
    shutil.copy(checkout / "notebooks" / "99_dummy.ipynb", good)
    save(notebooks / "03_bad_number.ipynb", new_code_cell("1 / 0"))
    before = {path: path.read_bytes() for path in notebooks.iterdir()}
    monkeypatch.chdir(tmp_path)

    assert course.main(json=True) == 1

    output = capsys.readouterr()
    assert ("lesson 01 bad_name failed in cell [2] `value = nothing`: NameError: name 'nothing' is "
            "not defined") in output.err
    assert ("lesson 03 bad_number failed in cell [1] `1 / 0`: ZeroDivisionError: division by "
            "zero") in output.err
    assert {path: path.read_bytes() for path in notebooks.iterdir()} == before
    report = json.loads(output.out)
    assert report == json.loads((tmp_path / "build" / "scoreboard.json").read_text())
    assert [(one["name"], one["ok"]) for one in report["lessons"]] == [
        ("01 bad_name", False), ("02 good", True), ("03 bad_number", False)]
    [row] = report["rows"]
    assert (row["quantity"], row["ratio"], row["why"]) == ("piece of string", 1.25, "it is knotted")
    assert report["median_ratio_error"] == 0.25
    assert report["worst"]["lesson"] == "99 dummy"


def test_a_course_starts_with_a_fresh_ledger_and_ends_with_a_scoreboard(
        checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    for _ in range(2):
        assert course.main() == 0
        assert len(read(checkout / "build" / "ledger.jsonl")) == 1
    output = capsys.readouterr().out
    assert "it is knotted" in output
    assert "median ratio error: napkin 50%, calibrated roofline 25%" in output
    assert "worst row: 99 dummy, piece of string: 1.25 times the calibrated roofline" in output


def test_a_course_without_lessons_says_where_it_looked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(course, "__file__",
                        str(tmp_path/"site-packages"/"clawdemy_infer"/"lesson"/"course.py"))
    assert course.main() == 1
    assert str(tmp_path) in capsys.readouterr().err
