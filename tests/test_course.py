"""The course runs to its end whatever a lesson does, and a built notebook is the same notebook
everywhere."""

import asyncio
import base64
import importlib.util
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from queue import Empty

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

from clawdemy_infer.cli import main as cli
from clawdemy_infer.lesson import ledger
from clawdemy_infer.lesson.ledger import LedgerRow, read
from clawdemy_infer.rigs import course
from clawdemy_infer.rigs.course import LessonRun

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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "LONG_S", math.inf)        # however busy the machine is
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


def test_a_reply_whose_sign_was_lost_is_found_at_the_next_look(monkeypatch):
    """The first wait ends with nothing, though the reply is there."""
    monkeypatch.setattr(course, "LOOK_S", 0.01)
    waits = []

    class Channel:
        async def get_msg(self, timeout):
            waits.append(timeout)
            if len(waits) == 1:
                await asyncio.sleep(timeout)
                raise Empty
            return {"reply": 42}
    channel = Channel()
    course.look_again(channel)
    assert asyncio.run(channel.get_msg(timeout=None)) == {"reply": 42} and waits == [0.01, 0.01]


def test_a_reply_that_never_comes_is_waited_for_as_long_as_was_asked(monkeypatch):
    monkeypatch.setattr(course, "LOOK_S", 0.02)

    class Channel:
        async def get_msg(self, timeout):
            await asyncio.sleep(timeout)
            raise Empty
    channel, start = Channel(), time.monotonic()
    course.look_again(channel)
    with pytest.raises(Empty):
        asyncio.run(channel.get_msg(timeout=0.1))
    assert time.monotonic() - start >= 0.1


def test_building_twice_gives_the_same_bytes(checkout, monkeypatch):
    monkeypatch.setattr(build, "LONG_S", math.inf)
    path = checkout / "notebooks" / "99_dummy.ipynb"
    before = path.read_bytes()
    build.build(checkout / "notebooks" / "src" / "99_dummy.py", progress=False)
    assert path.read_bytes() == before


def test_a_built_notebook_says_nothing_of_when_and_where_it_ran(lesson):
    assert lesson.metadata == build.METADATA
    assert {key for cell in lesson.cells for key in cell.metadata} <= {"tags"}
    assert len({cell.id for cell in lesson.cells}) == len(lesson.cells)
    nbformat.validate(lesson)


def test_a_cell_keeps_all_the_metadata_of_its_script_and_no_note_of_its_layout(tmp_path):
    script = tmp_path / "lesson.py"
    script.write_text('''# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: -all
# ---

# %% [markdown] tags=["core", "slide"] slideshow={"slide_type": "slide"}
# Text.

# %% tags=["core", "hide-input"] seconds=40
a = 1



# %% tags=["further"] minutes=3
b = 1
# %% tags=["core"]
c = 1
''')
    assert [cell.metadata for cell in build.read_source(script).cells] == [
        {"tags": ["core", "slide"], "slideshow": {"slide_type": "slide"}},
        {"jupyter": {"source_hidden": True}, "tags": ["core", "hide-input"], "seconds": 40},
        {"tags": ["further"], "minutes": 3}, {"tags": ["core"]}]


@pytest.mark.parametrize("tags, problem", [
    ([], "one of the tags core, further, notes, solution is needed"),
    (["core", "further"], "one of the tags"),
    (["core", "slides"], "no tag 'slides'"),
    (["core", "slide", "fragment"], "slide or fragment, not both"),
])
def test_a_wrong_tag_in_a_lesson_with_a_core_is_named_with_its_cell(tmp_path, tags, problem):
    script = tmp_path / "lesson.py"
    script.write_text(f'# %% tags=["core"]\na = 1\n# %% tags={json.dumps(tags)}\nb = 1\n')
    with pytest.raises(ValueError, match="lesson.py, cell 'b = 1': " + problem):
        build.read_source(script)


def test_a_cell_that_took_long_says_so_in_its_metadata(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "LONG_S", 0.9)
    script = tmp_path / "notebooks" / "src" / "98_long.py"
    script.parent.mkdir(parents=True)
    script.write_text("# %%\nimport time\ntime.sleep(1)\n")
    [cell] = nbformat.read(build.build(script, progress=False), as_version=4).cells
    assert cell.metadata.seconds >= 1


def test_a_cell_keeps_its_id_when_another_is_put_before_it(tmp_path):
    script = tmp_path / "lesson.py"
    script.write_text("# %%\na = 1\n\n# %%\na = 1\n")
    before = [cell.id for cell in build.read_source(script).cells]
    script.write_text("# %% [markdown]\n# New.\n\n# %%\na = 1\n\n# %%\na = 1\n")
    assert [cell.id for cell in build.read_source(script).cells][1:] == before


def test_sliders_are_replaced_by_a_line_that_reads_anywhere(lesson):
    (widget,) = [cell for cell in lesson.cells if "widget" in cell.metadata.get("tags", [])]
    assert [output.data["text/markdown"] for output in widget.outputs] == [build.STAND_IN]


def test_a_built_figure_stays_transparent_and_is_the_same_picture_in_its_html():
    figure = BytesIO()
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    image.putpixel((3, 4), (235, 120, 7, 255))
    image.save(figure, "PNG")
    png = base64.b64encode(figure.getvalue()).decode()
    shown = {"image/png": png, "text/html": f'<img alt="a dot" src="data:image/png;base64,{png}">'}
    notebook = new_notebook(cells=[
        new_code_cell(outputs=[nbformat.v4.new_output("display_data", shown)])])
    build.settle(notebook)
    built = notebook.cells[0].outputs[0].data
    small = Image.open(BytesIO(base64.b64decode(built["image/png"])))
    assert small.mode == "P"
    assert small.convert("RGBA").getpixel((0, 0))[3] == 0
    assert small.convert("RGBA").getpixel((3, 4)) == (235, 120, 7, 255)
    assert built["text/html"] == shown["text/html"].replace(png, built["image/png"])


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


def asking(name, check, *tags):
    return new_code_cell(f"x = ...\n\n{check}", metadata={"tags": ["core", *tags]})


LESSON = new_notebook(cells=[
    new_code_cell("y = 1", metadata={"tags": ["core"]}),
    asking("Cache", "Cache = lesson.build('Cache', x)", "build"),
    new_markdown_cell("**2 min.** Ask", metadata={"tags": ["notes"]}),
    new_code_cell("z = 1", metadata={"tags": ["further"]}),
    asking("chat", "lesson.steps('chat', x=x)", "exercise", "exercise:chat"),
    *[new_markdown_cell(f"```python\nx = {value}\n```",
                        metadata={"tags": ["solution", f"solution:{name}"]})
      for name, value in (("Cache", 2), ("chat", 3))]])


def test_solutions_at_the_end_of_a_lesson_answer_tasks_by_their_names():
    answered = build.with_solutions(LESSON)
    assert [cell.source for cell in answered.cells[len(LESSON.cells):]] == [
        "%env CLAWDEMY_STRICT=1", "x = 2\n\nCache = lesson.build('Cache', x)",
        "x = 3\n\nlesson.steps('chat', x=x)"]


def test_a_learner_who_answers_all_runs_the_core_with_what_was_built_in_its_place():
    assert [cell.source for cell in build.as_answered(LESSON).cells] == [
        "%env CLAWDEMY_STRICT=1", "y = 1", "x = 2\n\nCache = lesson.build('Cache', x)",
        "x = 3\n\nlesson.steps('chat', x=x)"]


def test_a_task_without_a_solution_of_its_name_is_named():
    with pytest.raises(ValueError, match="exercise 'chat'"):
        build.with_solutions(new_notebook(cells=LESSON.cells[:-1]))


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


# -- one lesson -----------------------------------------------------------------------------------


def test_a_cell_may_take_many_times_what_it_took_and_minutes_anyway():
    def limit(**metadata):
        return course.limit(new_code_cell("pass", metadata=metadata))

    assert limit() == limit(seconds=1) >= 180
    assert limit(seconds=1000) >= 10_000
    assert limit(seconds=build.LONG_S) == limit()       # what is not noted takes no more than that


def test_a_cell_that_hangs_ends_the_lesson_with_what_it_did_and_what_was_expected(
        tmp_path, monkeypatch):
    monkeypatch.setattr(course, "limit", lambda cell: 1 if "sleep" in cell.source else 600)
    cells = [new_code_cell("import time"),
             new_code_cell("# wait\ntime.sleep(3600)", metadata={"seconds": 40})]
    result = run(new_notebook(cells=cells), tmp_path)
    assert result.error == ("cell [2] `time.sleep(3600)`: CellTimeoutError: still running after "
                            "1 s; expected: 40 s")
    del cells[1].metadata["seconds"]
    assert run(new_notebook(cells=cells), tmp_path).error.endswith("expected: under 15 s")


def test_the_first_cell_has_a_time_of_its_own(tmp_path):
    cells = [new_markdown_cell("text"), *map(new_code_cell, (
        "import time\ntime.sleep(0.5)", "time.sleep(0.5)", "pass", "1 / 0"))]
    result = run(new_notebook(cells=cells), tmp_path)
    assert 0.5 <= result.first_cell_s <= result.seconds - 0.5
    assert run(new_notebook(cells=cells[-1:]), tmp_path).first_cell_s is None


def test_a_kernel_that_does_not_start_is_reported_like_any_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(course, "get_kernel_dict", lambda: {
        "argv": [sys.executable, "-c", "raise SystemExit(1)"], "display_name": "x",
        "language": "python"})
    result = run(new_notebook(cells=[new_code_cell("pass")]), tmp_path)
    assert not result.ok and result.error.startswith("the kernel did not start: ")


def test_the_core_is_a_lesson_without_its_further_cells(tmp_path):
    def further(source):
        return new_code_cell(source, metadata={"tags": ["further"]})

    cells = [new_code_cell("a = 1"), further("1 / 0"), further("2 / 0"),
             new_code_cell("# In [4]\nprint(a)\nb")]
    notebook = new_notebook(cells=cells)
    result = course.execute(notebook, "99", tmp_path, core=True)
    assert cells[3].outputs[0].text == "1\n"
    assert result.error == "cell [4] `print(a)`: NameError: name 'b' is not defined"
    assert run(notebook, tmp_path).error.startswith("cell [2] `1 / 0`")


def test_what_a_cell_raises_is_told_in_one_line(tmp_path):
    notebook = new_notebook(cells=[new_code_cell(r"raise ValueError('one\ntwo' + 999 * ' three')")])
    error = run(notebook, tmp_path).error
    assert "ValueError: one two three" in error and "\n" not in error and len(error) < 500


# -- which lessons --------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path, monkeypatch):
    """A checkout with three lessons, which is the working directory."""
    for stem in ("00_your_machine", "01_counting", "A1_more"):
        save(tmp_path / "notebooks" / f"{stem}.ipynb", new_code_cell(f"print({stem!r})"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "notebooks"


@pytest.mark.parametrize("names, stems", [
    ([], ["00_your_machine", "01_counting", "A1_more"]),
    (["01"], ["01_counting"]),
    (["A1", "00"], ["A1_more", "00_your_machine"]),
    (["01_counting"], ["01_counting"]),
    (["counting", "01 counting", "01_counting.ipynb"], ["01_counting"]),
    (["notebooks/01_counting.ipynb"], ["01_counting"]),
], ids=str)
def test_lessons_are_chosen_by_number_name_or_path(three, names, stems):
    chosen = course.choose(names)
    assert [path.stem for path in chosen] == stems
    assert all(path.resolve().parent == three for path in chosen)


def test_lessons_are_those_of_the_folder_that_is_named(three, tmp_path, monkeypatch):
    mine = save(tmp_path / "my-lessons" / "01_counting.ipynb")
    save(tmp_path / "my-lessons" / "01_counting.new.ipynb")
    assert course.choose(folder=mine.parent) == course.choose(["01"], mine.parent) == [mine]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert course.choose([str(mine)], three) == [mine]
    monkeypatch.setattr(course, "__file__", str(tmp_path / "package" / "lesson" / "course.py"))
    assert course.choose(["01"]) == [three / "01_counting.ipynb"]


@pytest.mark.parametrize("arguments, said", [
    (["02"], "lesson='02' is not supported; accepted: a notebook, or the number or name of one of "
             "00_your_machine, 01_counting, A1_more"),
    (["01", "0"], "lesson='0' is not supported; accepted"),
    (["nowhere/01_counting.ipynb"], "lesson='nowhere/01_counting.ipynb' is not supported"),
    (["--in", "nowhere"], "in='nowhere' is not supported; accepted: a folder of lessons (*.ipynb)"),
])
def test_a_wrong_name_is_wrong_usage_and_nothing_runs(three, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(course, "run_course", pytest.fail)
    assert cli.main(["course", *arguments]) == 2
    output = capsys.readouterr()
    assert said in output.err and output.err.count("\n") == 1 and output.out == ""


def test_a_course_without_lessons_says_where_it_looked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(course, "__file__",
                        str(tmp_path/"site-packages"/"clawdemy_infer"/"lesson"/"course.py"))
    assert cli.main(["course"]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_a_file_that_is_no_notebook_is_named_and_nothing_runs(three, monkeypatch, capsys):
    (three / "01_counting.ipynb").write_text("<<<<<<< HEAD")
    monkeypatch.setattr(course, "execute", pytest.fail)
    assert cli.main(["course"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "01_counting.ipynb is not a notebook: " in line


# -- one after another ----------------------------------------------------------------------------


@pytest.fixture
def played(three, monkeypatch):
    """Lessons are played, not executed: each writes a row with the number of the play. `during`
    maps one's name to what it does then. Gives (name, core) of those that were played."""
    names, during = [], {}

    def execute(notebook, name, folder, environment, after_cell, core):
        names.append((name, core))
        row = LedgerRow(name, "answer", "s", 1.0, 1.0, measured=float(len(names)))
        ledger.append(row, Path(environment["CLAWDEMY_LEDGER"]))
        during.get(name, lambda: None)()
        ok = name != played.broken
        return LessonRun(name, 1.0, ok, None if ok else "cell [1] `x`: NameError: x", 0.5, 9)

    monkeypatch.setattr(course, "execute", execute)
    played.names, played.during, played.broken = names, during, None
    return played


@pytest.fixture
def results(three):
    return three.parent / "build"


def interrupt():
    raise KeyboardInterrupt


def measured(results, name="ledger.jsonl"):
    return {row.lesson: row.measured for row in read(results / name)}


NAMES = ["00 your_machine", "01 counting", "A1 more"]


def test_a_failure_is_told_before_the_next_lesson_begins(played, capsys):
    said = []
    played.broken = NAMES[1]
    played.during[NAMES[2]] = lambda: said.append(capsys.readouterr().err)
    assert cli.main(["course"]) == 1
    [line] = [line for line in said[0].splitlines() if "failed" in line]
    assert line.endswith("lesson 01 counting failed in cell [1] `x`: NameError: x")
    assert "FAILED in cell [1] `x`: NameError: x" in capsys.readouterr().out


def test_the_last_ledger_is_there_until_the_next_is_and_then_beside_it(played, results):
    assert cli.main(["course"]) == 0
    first = dict(zip(NAMES, (1, 2, 3), strict=True))
    kept = []
    played.during[NAMES[2]] = lambda: kept.append(measured(results))
    assert cli.main(["course"]) == 0
    assert kept == [first]
    assert measured(results) == dict(zip(NAMES, (4, 5, 6), strict=True))
    assert measured(results, "ledger.previous.jsonl") == first


def test_an_interrupted_course_keeps_all_there_is_and_goes_on_where_it_was(
        played, results, capsys):
    assert cli.main(["course"]) == 0
    last = (results / "ledger.jsonl").read_bytes()
    played.names.clear()
    played.during[NAMES[1]] = interrupt
    assert cli.main(["course"]) == 130
    assert "The same command with --resume goes on" in capsys.readouterr().err
    assert (results / "ledger.jsonl").read_bytes() == last
    played.during.clear()
    assert cli.main(["course", "--resume", "--json"]) == 0
    assert [name for name, _ in played.names] == [*NAMES[:2], *NAMES[1:]]
    report = json.loads(capsys.readouterr().out)
    assert [(row["lesson"], row["measured"]) for row in report["rows"]] == list(
        zip(NAMES, (1, 3, 4), strict=True))             # the second was interrupted at play 2
    assert [one["name"] for one in report["lessons"]] == NAMES
    assert len(read(results / "ledger.jsonl")) == 3
    assert (results / "ledger.previous.jsonl").read_bytes() == last


def test_a_course_that_is_begun_again_is_not_taken_for_the_last_one(played):
    assert cli.main(["course"]) == 0
    played.during[NAMES[0]] = interrupt
    assert cli.main(["course"]) == 130
    played.during.clear()
    played.names.clear()
    assert cli.main(["course", "--resume"]) == 0
    assert [name for name, _ in played.names] == NAMES


def test_resuming_runs_again_what_failed_and_what_has_changed(played, three, results):
    played.broken = NAMES[0]
    assert cli.main(["course"]) == 1
    played.broken = None
    save(three / "01_counting.ipynb", new_code_cell("print('another')"))
    played.names.clear()
    assert cli.main(["course", "--resume"]) == 0
    assert [name for name, _ in played.names] == NAMES[:2]
    assert measured(results)[NAMES[2]] == 3
    played.names.clear()
    assert cli.main(["course", "--resume"]) == 0 and played.names == []


def test_a_lesson_without_its_further_cells_does_not_stand_for_the_whole(played, three):
    save(three / "01_counting.ipynb", new_code_cell("a = 1"),
         new_code_cell("b = 1", metadata={"tags": ["further"]}))
    assert cli.main(["course", "01", "--core"]) == 0
    assert cli.main(["course", "01", "--resume"]) == 0
    assert cli.main(["course", "01", "--resume"]) == 0
    assert played.names == [(NAMES[1], True), (NAMES[1], False)]


def test_one_lesson_leaves_an_interrupted_course_to_be_resumed(played, results):
    played.during[NAMES[2]] = interrupt
    assert cli.main(["course"]) == 130
    played.during.clear()
    assert cli.main(["course", "01"]) == 0
    assert measured(results) == {NAMES[1]: 4}
    played.names.clear()
    assert cli.main(["course", "--resume"]) == 0
    assert [name for name, _ in played.names] == NAMES[2:]
    assert list(measured(results)) == NAMES


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"5", b"\xff", b'{"01_counting": 5}',
    b'{"01_counting": {"run": {"ok": true}}}',
    b'{"01_counting": {"code": ["a = 1"], "rows": [], "run": {"name": "x", "seconds": "1", "ok": '
    b'true, "error": null, "first_cell_s": 1, "peak_bytes": 1}}}'])
def test_results_that_were_damaged_are_named_and_all_lessons_run_again(
        played, results, capsys, content):
    assert cli.main(["course"]) == 0
    (results / "course.json").write_bytes(content)
    played.names.clear()
    with pytest.warns(UserWarning, match="course.json is damaged"):
        assert cli.main(["course", "--resume"]) == 0
    assert [name for name, _ in played.names] == NAMES
    played.names.clear()
    assert cli.main(["course", "--resume"]) == 0 and played.names == []


@pytest.mark.parametrize("content", [
    "5", "[]", "{}", '{"cells": 5}', '{"nbformat": 4}', "[" * 10**5,
    '{"nbformat": "x", "cells": []}',
    '{"cells": [5], "nbformat": 4, "nbformat_minor": 5, "metadata": {}}'])
def test_json_that_is_no_notebook_is_one_line(three, capsys, content):
    (three / "01_counting.ipynb").write_text(content)
    assert cli.main(["course", "01"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "01_counting.ipynb is not a notebook" in err


def test_a_copy_is_measured_into_its_own_folder(played, three, results):
    mine = three.parent / "my-lessons"
    shutil.copytree(three, mine)
    assert cli.main(["course", "01", "--in", str(mine)]) == 0
    assert cli.main(["course", str(mine / "00_your_machine.ipynb"), "--resume"]) == 0
    assert measured(mine / "build") == {NAMES[0]: 2} and not results.exists()


def test_the_report_of_a_course(played, results, capsys):
    played.broken = NAMES[1]
    assert cli.main(["course", "00", "01", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((results / "scoreboard.json").read_text())
    assert {"rows", "coverage", "median_width", "median_ratio_error", "worst", "versions",
            "date"} < report.keys()
    assert report["lessons"] == [
        {"name": NAMES[0], "seconds": 1.0, "ok": True, "error": None, "first_cell_s": 0.5,
         "peak_bytes": 9},
        {"name": NAMES[1], "seconds": 1.0, "ok": False, "error": "cell [1] `x`: NameError: x",
         "first_cell_s": 0.5, "peak_bytes": 9}]


def test_ctrl_c_ends_the_kernel_and_what_was_done_can_be_resumed(three):
    """The real command, with real kernels and a real signal."""
    mark = three.parent / "kernel"
    wait = (f"import os, time\nfrom pathlib import Path\nmark = Path({str(mark)!r})\n"
            "if not mark.exists():\n"
            "    mark.with_suffix('.part').write_text(str(os.getpid()))\n"
            "    os.replace(mark.with_suffix('.part'), mark)\n    time.sleep(3600)")
    save(three / "01_counting.ipynb", new_code_cell(wait))
    command = [sys.executable, "-m", "clawdemy_infer", "course", "--in", str(three)]
    # Whoever runs the tests in the background may have told its children to ignore Ctrl-C.
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not mark.exists():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    error = running.communicate()[1]
    assert running.returncode == 130 and "The same command with --resume goes on" in error
    assert "Traceback" not in error
    assert not psutil.pid_exists(int(mark.read_text()))
    result = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [one["ok"] for one in json.loads(result.stdout)["lessons"]] == [True] * 3
    assert "2/2 cells" in result.stderr                 # the first of three is not run again


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

    assert cli.main(["course", "--json"]) == 1

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
    assert (row["quantity"], row["ratio"]) == ("piece of string", 1.25)
    assert report["median_ratio_error"] == 0.25
    assert report["worst"]["lesson"] == "99 dummy"


def test_a_course_starts_with_a_fresh_ledger_and_ends_with_a_scoreboard(
        checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    for _ in range(2):
        assert cli.main(["course"]) == 0
        assert len(read(checkout / "build" / "ledger.jsonl")) == 1
    output = capsys.readouterr().out
    assert "piece of string" in output
    said = {line[:40].rstrip(): line[40:].strip() for line in output.splitlines()}
    assert said["error of a prediction, median"] == "25%"
    assert said["error of the napkin, median"] == "50%"
    assert said["worst prediction"] == "99 dummy, piece of string: it took 1.25 times as much"


# -- copies to work in ----------------------------------------------------------------------------


@pytest.fixture
def lend(three, tmp_path, monkeypatch):
    """`make lab`'s copying, from a checkout of three lessons; gives the folder of the copies."""
    monkeypatch.setattr(build, "HERE", three)

    def lend():
        assert build.main(["--lab", str(tmp_path / "my-lessons")]) == 0
        return tmp_path / "my-lessons"

    return lend


def files(folder):
    return {path.name: path.read_text() for path in folder.glob("*.ipynb")}


def test_a_copy_is_made_when_it_is_absent(lend, three):
    mine = lend()
    assert files(mine) == files(three)
    (mine / "01_counting.ipynb").unlink()
    assert files(lend()) == files(three)


def test_a_copy_that_was_edited_stays_as_it_is(lend, capsys):
    edited = lend() / "01_counting.ipynb"
    edited.write_text("mine")
    before = files(edited.parent)
    assert files(lend()) == before and capsys.readouterr().out == ""


def test_a_newer_lesson_replaces_what_nobody_edited_and_is_put_beside_what_somebody_did(
        lend, three, capsys):
    mine = lend()
    (mine / "01_counting.ipynb").write_text("mine")
    for version in ("second", "third"):
        for name in ("00_your_machine.ipynb", "01_counting.ipynb"):
            save(three / name, new_code_cell(version))
        lessons = files(three)
        assert files(lend()) == lessons | {
            "01_counting.ipynb": "mine", "01_counting.new.ipynb": lessons["01_counting.ipynb"]}
        [line] = capsys.readouterr().out.splitlines()
        assert "01_counting.ipynb has your changes" in line and "01_counting.new.ipynb" in line
    (mine / "01_counting.new.ipynb").write_text("mine too")
    before = files(mine)
    assert files(lend()) == before and capsys.readouterr().out == ""
    save(three / "01_counting.ipynb", new_code_cell("fourth"))
    assert files(lend()) == before | {
        "01_counting.new2.ipynb": files(three)["01_counting.ipynb"]}


def test_a_learners_copy_has_no_speaker_notes(lend, three):
    save(three / "01_counting.ipynb", new_code_cell("x = 1"),
         new_markdown_cell("Ask the room", metadata={"tags": ["notes"]}))
    for _ in range(2):
        copied = nbformat.read(lend() / "01_counting.ipynb", as_version=4)
        assert [cell.source for cell in copied.cells] == ["x = 1"]
    assert {path.name for path in lend().glob("*.ipynb")} == set(files(three))


def test_copies_from_before_are_taken_as_a_learners(lend, three, tmp_path):
    save(tmp_path / "my-lessons" / "01_counting.ipynb", new_code_cell("mine"))
    shutil.copy(three / "A1_more.ipynb", tmp_path / "my-lessons")
    before = files(tmp_path / "my-lessons")
    after = files(lend())
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {"00_your_machine.ipynb", "01_counting.new.ipynb"}


def test_lint_and_tests_pass_over_what_a_learner_writes(tmp_path):
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    save(tmp_path / "my-lessons" / "01_mine.ipynb", new_code_cell("import os\nx = undefined"))
    for name in ("my-lessons/mine.py", "my-lessons/test_mine.py", "my-lessons/src/01_mine.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("import os\nx = undefined\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text("def test_one():\n    pass\n")

    def tool(*arguments):
        return subprocess.run([sys.executable, "-m", *arguments], cwd=tmp_path, text=True,
                              capture_output=True)

    lint = tool("ruff", "check")
    assert lint.returncode == 0, lint.stdout
    tests = tool("pytest", "--collect-only", "-q", "--nbval")
    assert tests.returncode == 0 and "1 test collected" in tests.stdout, tests.stdout
    assert "my-lessons/" in (REPOSITORY / ".gitignore").read_text().splitlines()


def test_the_lab_opens_the_copies_with_a_ledger_of_their_own():
    lines = subprocess.run(["make", "-n", "lab"], cwd=REPOSITORY, capture_output=True, text=True)
    assert re.search(r"build.py --lab my-lessons\n.*jupyter lab .*my-lessons$", lines.stdout,
                     re.MULTILINE), lines
    own_ledger = "lab: export CLAWDEMY_LEDGER := $(CURDIR)/my-lessons/ledger.jsonl"
    assert own_ledger in (REPOSITORY / "Makefile").read_text().splitlines()
