"""Make the notebooks: each `src/NN_name.py` (jupytext's percent format) becomes `NN_name.ipynb`,
executed, with its outputs.

    python notebooks/build.py                  all of them
    python notebooks/build.py 01 02            those whose names begin so
    python notebooks/build.py --solved DIR     none: copies of the notebooks as they are, with the
                                               exercises answered at their ends
    python notebooks/build.py --lab DIR        none: copies to work in, which are never written over

A rebuilt notebook differs from the committed one only where its cells or their outputs do: cell ids
come from the cells' text, and what only says when and where it ran is left out. Sliders do not
survive in a file: a line stands in their place. Figures keep 128 colours. A cell keeps all the
metadata that its script gives it, and one that took long gets its `seconds`, from which `course`
takes the time that it allows it.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from itertools import count
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output
from PIL import Image
from tqdm import tqdm

from clawdemy_infer.fast import FORMATS
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.paths import write_atomically
from clawdemy_infer.rigs.course import FACTOR, FLOOR_S, execute, first_line

HERE = Path(__file__).resolve().parent
WIDGET = "application/vnd.jupyter.widget-view+json"
STAND_IN = ("*Sliders appear here when you run this cell; the figure below shows the same without "
            "them.*")
LONG_S = FLOOR_S / FACTOR
PLACES = {"core", "further", "notes", "solution"}
"""Where a cell belongs, one of them: in the 45 minutes, below the line, beside a slide, at the end.
"""
ROLES = {"slide", "fragment", "by-line", "hide-input", "measured", "guess", "build", "exercise",
         "widget", "nbval-ignore-output"}
NAMED = ("exercise:", "solution:")
LAYOUT = ("cell_marker", "lines_to_end_of_cell_marker", "lines_to_next_cell", "noskipline",
          "skipline")
"""What jupytext notes of a script's blank lines: no metadata of a cell."""
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python",
                      "pygments_lexer": "ipython3"},
}


def read_source(script: Path) -> NotebookNode:
    """The notebook of a percent script, not yet executed. Ids stay the same for as long as a cell's
    text does, wherever it moves. Code that need not be read is folded. Raises `ValueError` for a
    wrong tag."""
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen = Counter()
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[digest] += 1
        for name in LAYOUT:
            cell.metadata.pop(name, None)
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        if "hide-input" in tags_of(cell):
            cell.metadata["jupyter"] = {"source_hidden": True}
    check_tags(notebook, script.name)
    return notebook


def tags_of(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def check_tags(notebook: NotebookNode, name: str) -> None:
    """In a lesson that has a core every cell says where it belongs, and no tag is misspelt."""
    if not any("core" in tags_of(cell) for cell in notebook.cells):
        return
    for cell in notebook.cells:
        tags, where = set(tags_of(cell)), f"{name}, cell {first_line(cell.source)!r}"
        if len(tags & PLACES) != 1:
            raise ValueError(f"{where}: one of the tags {', '.join(sorted(PLACES))} is needed")
        for tag in tags - PLACES - ROLES:
            if not tag.startswith(NAMED):
                raise ValueError(f"{where}: no tag {tag!r}; accepted are "
                                 f"{', '.join(sorted(PLACES | ROLES))}, and {' '.join(NAMED)}NAME")
        if {"slide", "fragment"} <= tags:
            raise ValueError(f"{where}: slide or fragment, not both")


def settle(notebook: NotebookNode) -> None:
    """Leave in an executed notebook what reads the same everywhere. Raises `ValueError` for a
    widget in a cell not tagged `widget`."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        widgets = [output for output in cell.outputs if WIDGET in output.get("data", {})]
        if widgets and not {"widget", "nbval-ignore-output"} <= set(tags_of(cell)):
            raise ValueError("a cell that shows a widget needs the tags `widget` and "
                             f"`nbval-ignore-output`: {cell.source[:60]!r}")
        if widgets:
            shown = {"text/markdown": STAND_IN, "text/plain": STAND_IN.strip("*")}
            cell.outputs = [new_output("display_data", shown)]
        for output in cell.outputs:
            if figure := output.get("data", {}).get("image/png"):
                small, data = with_palette(figure), output["data"]
                data["image/png"] = small
                if "text/html" in data:                     # the same picture, with its text
                    data["text/html"] = data["text/html"].replace(figure.strip(), small)


def with_palette(figure: str) -> str:
    """A base64 PNG with 128 colours instead of 16 million: lines and text look the same in a third
    of the bytes, and the background stays transparent."""
    small = BytesIO()
    image = Image.open(BytesIO(base64.b64decode(figure))).convert("RGBA")
    image = image.quantize(128, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    image.save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def build(script: Path, progress: bool = True) -> Path:
    """Execute one script and write its notebook beside `src/`. Raises `RuntimeError` naming a cell
    that fails; then nothing is written."""
    notebook = read_source(script)
    target = script.parents[1] / f"{script.stem}.ipynb"
    ledger_file = script.parents[2] / "build" / f"{script.stem}.jsonl"
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    with tqdm(total=cells, desc=script.stem, unit="cell", disable=not progress) as bar:
        def note(cell: NotebookNode, seconds: float) -> None:
            bar.update()
            if seconds > LONG_S:
                cell.metadata["seconds"] = round(seconds)

        run = execute(notebook, script.stem, target.parent, {"CLAWDEMY_LEDGER": str(ledger_file)},
                      note)
    if not run.ok:
        raise RuntimeError(f"{script.name}: {run.error}")
    settle(notebook)
    write_atomically(target, nbformat.writes(notebook) + "\n")
    return target


CHECK = re.compile(r"^.*\blesson\.(?:exercise|steps|build)\(", re.MULTILINE)
"""The call that checks what a learner wrote above it."""
STRICT = "%env CLAWDEMY_STRICT=1"


def with_solutions(notebook: NotebookNode) -> NotebookNode:
    """A copy of `notebook` that asks every exercise and build task once more behind its last cell,
    answered: what stands above the call that checks it is there the code of the solution, and
    anything but a right answer raises. So one run shows both that a lesson with nothing attempted
    comes to its end and that its solutions are right.

    Raises `ValueError` naming what has no check or no solution.
    """
    answered = copy.deepcopy(notebook)
    answered.cells.append(uncompared(STRICT, "strict"))
    answered.cells += [uncompared(source, f"solved-{index}")
                       for index, source in solved_cells(notebook).items()]
    return answered


def uncompared(source: str, id: str) -> NotebookNode:
    return new_code_cell(source, id=id, metadata={"tags": ["nbval-ignore-output"]})


def as_answered(notebook: NotebookNode) -> NotebookNode:
    """A copy of the core of `notebook` as it is for a learner who builds and answers all rightly,
    each in its place: the measured runs use the learner's code. No output is compared."""
    answered = copy.deepcopy(notebook)
    for index, source in solved_cells(notebook).items():
        answered.cells[index].source = source
    answered.cells = [cell for cell in answered.cells if "core" in tags_of(cell)]
    for cell in answered.cells:
        cell.metadata["tags"] = ["nbval-ignore-output"]
    answered.cells.insert(0, uncompared(STRICT, "strict"))
    return answered


def solved_cells(notebook: NotebookNode) -> dict[int, str]:
    """The answered source of every cell that asks something, by its place."""
    found = {}
    for index, cell in enumerate(notebook.cells):
        if not {"exercise", "build"} & set(tags_of(cell)):
            continue
        check = CHECK.search(cell.source)
        if not check:
            name = next((tag[len("exercise:"):] for tag in tags_of(cell)
                         if tag.startswith("exercise:")), first_line(cell.source))
            raise ValueError(f"exercise {name!r}: its cell never calls `lesson.exercise(`, "
                             "`lesson.steps(` or `lesson.build(`")
        name = re.match(r"\s*[\"'](\w+)", cell.source[check.end():])[1]
        found[index] = f"{_solution(name, notebook, index)}\n\n{cell.source[check.start():]}"
    return found


def _solution(name: str, notebook: NotebookNode, index: int) -> str:
    """From the cell tagged with its name, or the first solution before the next exercise."""
    following = notebook.cells[index + 1:]
    own = [cell for cell in following if f"solution:{name}" in tags_of(cell)]
    ends = (place for place, cell in enumerate(following) if "exercise" in tags_of(cell))
    near = [cell for cell in following[:next(ends, None)]
            if "solution" in tags_of(cell) and not any(":" in tag for tag in tags_of(cell))]
    for cell in own or near:
        if code := re.search(r"```python\n(.*?)```", cell.source, re.DOTALL):
            return code[1].rstrip()
    raise ValueError(f"exercise {name!r}: no cell tagged `solution` with a ```python block "
                     "follows it")


def solve(folder: Path) -> None:
    """Write every notebook to `folder`, its exercises answered at the end, not yet executed: nbval
    checks all that in one run. One with a build task once more, built by a learner."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(HERE.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        nbformat.write(with_solutions(notebook), folder / path.name)
        if any("build" in tags_of(cell) for cell in notebook.cells):
            nbformat.write(as_answered(notebook), folder / f"{path.stem}-built.ipynb")


def lend(folder: Path) -> None:
    """Copy the lessons to `folder`, to work in. A lesson that is newer than its copy replaces a
    copy that nobody has changed; else it becomes NN_name.new.ipynb beside it, which is said.
    Speaker notes are left out.

    What was given out last is known by its digest, in `folder`/.given.json.
    """
    record = folder / ".given.json"
    given = json.loads(record.read_text()) if record.exists() else {}
    for lesson in sorted(HERE.glob("*.ipynb")):
        content = without_notes(lesson)
        own, last, now = folder / lesson.name, given.get(lesson.name), _digest(content)
        given[lesson.name] = now
        if own.exists() and now in (last, _digest(own.read_bytes())):
            continue
        free = next(path for path in _copies(own)
                    if not path.exists() or _digest(path.read_bytes()) == last)
        write_atomically(free, content)
        if free != own:
            print(f"{own} has your changes and stays as it is; the newer lesson is {free.name}")
    write_atomically(record, json.dumps(given, indent=1) + "\n")


def without_notes(lesson: Path) -> bytes:
    notebook = nbformat.read(lesson, as_version=4)
    kept = [cell for cell in notebook.cells if "notes" not in tags_of(cell)]
    if len(kept) == len(notebook.cells):
        return lesson.read_bytes()
    notebook.cells = kept
    return (nbformat.writes(notebook) + "\n").encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _copies(path: Path) -> Iterator[Path]:
    """NN_name.ipynb, NN_name.new.ipynb, NN_name.new2.ipynb, ..."""
    yield path
    yield path.with_suffix(".new.ipynb")
    yield from (path.with_suffix(f".new{number}.ipynb") for number in count(2))


def main(prefixes: list[str]) -> int:
    if prefixes[:1] in (["--solved"], ["--lab"]):
        {"--solved": solve, "--lab": lend}[prefixes[0]](Path(prefixes[1]))
        return 0
    scripts = [script for script in sorted((HERE / "src").glob("*.py"))
               if not prefixes or script.name.startswith(tuple(prefixes))]
    if not scripts:
        print(f"no script in {HERE / 'src'} begins with {' or '.join(prefixes) or 'anything'}",
              file=sys.stderr)
        return 1
    this_machine("cpu", FORMATS)                        # now, or its progress lands in a lesson
    for script in scripts:
        build(script)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
