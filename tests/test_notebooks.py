"""Every lesson: in step with its script, six beats, readable without a kernel, exercises with
solutions. `make test` runs them all."""

import ast
import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
BEATS = ("question", "envelope", "prediction", "measurement", "reconciliation",
         "play and exercises")
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def metadata(cell) -> dict:
    """But for how long the cell took, and what jupytext notes of a script's blank lines."""
    return {name: value for name, value in cell.metadata.items()
            if name != "seconds" and not name.startswith("lines_to_")}


def has_core(notebook) -> bool:
    """In the second form of a lesson; `test_lessons` has its rules."""
    return any("core" in tags(cell) for cell in notebook.cells)


@pytest.fixture
def in_first_form(notebook):
    if has_core(notebook):
        pytest.skip("in the second form")
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def mime_types(cell) -> set[str]:
    return {mime for output in cell.outputs for mime in output.get("data", {})}


def texts(cell):
    """Everything that a cell's outputs say in words."""
    for output in cell.outputs:
        yield from (value for mime, value in output.get("data", {}).items()
                    if mime.startswith("text/"))
        yield output.get("text", "")


def test_every_script_has_its_notebook_and_every_notebook_its_script():
    assert [path.stem
            for path in NOTEBOOKS] == [script.stem for script in sorted(FOLDER.glob("src/*.py"))]


def lesson_calls(cell, *methods):
    """Calls of `lesson.METHOD(...)` in a cell."""
    if cell.cell_type == "code":
        for node in ast.walk(ast.parse(TransformerManager().transform_cell(cell.source))):
            if (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                    and getattr(node.func.value, "id", "") == "lesson"
                    and node.func.attr in methods):
                yield node


def test_a_guess_is_made_in_a_cell_of_its_own_before_any_prediction_is_shown(notebook):
    shown = ("predict", "reveal", "measure", "table", "cause", "explain")
    seen = set()
    for cell in notebook.cells:
        guesses = [node.args[0].value for node in lesson_calls(cell, "guess")]
        assert not guesses or not [*lesson_calls(cell, *shown)], cell.source
        assert not seen & set(guesses), f"already predicted: {seen & set(guesses)}"
        seen |= {node.args[0].value for node in lesson_calls(cell, "predict")
                 if node.args and isinstance(node.args[0], ast.Constant)}


def test_no_cause_is_typed_into_a_lesson(notebook):
    """A measurement comes without a reason, an explanation is asked for and never given."""
    for cell in notebook.cells:
        for call in lesson_calls(cell, "measure"):
            assert {word.arg for word in call.keywords} <= {"parts", "about_s"}, cell.source
        for call in lesson_calls(cell, "explain"):
            assert len(call.args) == 1 and not call.keywords, cell.source
        for call in lesson_calls(cell, "cause"):
            assert isinstance(call.args[-1], ast.Constant) and call.args[-1].value is ..., (
                "the learner names the cause")


def test_a_notebook_is_in_step_with_its_script(path, notebook):
    """If this fails: `make notebooks`."""
    script = jupytext.read(FOLDER / "src" / f"{path.stem}.py", fmt="py:percent")
    for cell in script.cells:
        if "hide-input" in tags(cell):
            cell.metadata["jupyter"] = {"source_hidden": True}
    assert [(cell.cell_type, cell.source, metadata(cell)) for cell in notebook.cells] == [
        (cell.cell_type, cell.source, metadata(cell)) for cell in script.cells
    ]


def test_a_notebook_was_run_from_top_to_bottom_and_nothing_failed(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)
    assert not [
        cell.source
        for cell in cells
        for output in cell.outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def test_a_notebook_is_small_enough_to_open_on_a_telephone(path):
    assert path.stat().st_size < 400_000


def test_the_six_beats_come_in_order(in_first_form):
    headings = [
        line.lower() for cell in in_first_form.cells if cell.cell_type == "markdown"
        for line in cell.source.splitlines() if line.startswith("#")
    ]
    places = [
        next((place for place, heading in enumerate(headings) if beat in heading),
             None) for beat in BEATS
    ]
    missing = [beat for beat, place in zip(BEATS, places, strict=True) if place is None]
    assert not missing
    assert places == sorted(places)


def test_what_differs_between_machines_is_not_compared(notebook):
    timed = re.compile(r"\.measure\(|\.table\(|\bstopwatch\(|\balternate\(|\bcalibrate\(")
    for cell in code_cells(notebook):
        if timed.search(cell.source) and cell.outputs:
            assert {"nbval-ignore-output", "measured"} & tags(
                cell), f"needs the tag nbval-ignore-output: {cell.source}"


def test_outputs_name_no_place_of_the_machine_they_were_made_on(notebook):
    private = re.compile(r"(?<![\w.:/])/(home|root|tmp|work|Users|usr|opt|var|private)/"
                         r"|site-packages|\bat 0x[0-9a-f]+")
    assert not [
        found[0]
        for cell in code_cells(notebook)
        for text in texts(cell)
        if (found := private.search(text))
    ]


def test_every_widget_is_followed_by_what_it_shows_at_first_without_a_kernel(notebook):
    cells = code_cells(notebook)
    assert not [cell.source for cell in cells if WIDGET in mime_types(cell)]
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        if "widget" in tags(cell):
            assert following is not None and "text/html" in mime_types(
                following), f"no static figure after: {cell.source}"


def test_there_are_three_exercises_each_with_a_stub_a_hint_and_a_folded_solution(in_first_form):
    notebook = in_first_form
    exercises = [index for index, cell in enumerate(notebook.cells) if "exercise" in tags(cell)]
    assert len(exercises) >= 3
    for index in exercises:
        cell, hint, solution = notebook.cells[index : index + 3]
        (name, ) = (tag.removeprefix("exercise:")
                    for tag in tags(cell)
                    if tag.startswith("exercise:"))
        assert "..." in cell.source and re.search(rf"^lesson\.exercise\(\s*[\"']{name}[\"']",
                                                  cell.source, re.MULTILINE), name
        assert ["".join(texts(cell))[:1]] == ["○"], f"{name} is not shipped open"
        assert "hint" in tags(hint) and "solution" in tags(
            solution), f"{name}: after it come its hint and its solution"
        assert solution.source.startswith("<details>") and solution.source.rstrip().endswith(
            "</details>"), name
