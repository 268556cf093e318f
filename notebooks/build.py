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
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import count
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output
from PIL import Image
from tqdm import tqdm

from clawdemy_infer.machine import probes
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.paths import write_atomically
from clawdemy_infer.rigs.course import FACTOR, FLOOR_S, execute, first_line

HERE = Path(__file__).resolve().parent
WIDGET = "application/vnd.jupyter.widget-view+json"
STAND_IN = ("*Sliders appear here when you run this cell; the figure below shows the same without "
            "them.*")
LONG_S = FLOOR_S / FACTOR
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
    text does, wherever it moves."""
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
    return notebook


def settle(notebook: NotebookNode) -> None:
    """Leave in an executed notebook what reads the same everywhere. Raises `ValueError` for a
    widget in a cell not tagged `widget`."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        widgets = [output for output in cell.outputs if WIDGET in output.get("data", {})]
        if widgets and not {"widget", "nbval-ignore-output"} <= set(cell.metadata.get("tags", [])):
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


def with_solutions(notebook: NotebookNode) -> NotebookNode:
    """A copy of `notebook` that asks every exercise once more behind its last cell, answered: what
    stands above `lesson.exercise(` is there the code of the folded solution, and anything but a
    right answer raises. So one run shows both that a lesson with nothing attempted comes to its end
    and that its solutions are right.

    Raises `ValueError` naming an exercise without its check, or without a solution before the next
    exercise.
    """
    answered = copy.deepcopy(notebook)
    uncompared = {"tags": ["nbval-ignore-output"]}
    answered.cells.append(new_code_cell("%env CLAWDEMY_STRICT=1", id="strict", metadata=uncompared))
    for index, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        if "exercise" not in tags:
            continue
        name = next((tag.removeprefix("exercise:") for tag in tags if tag.startswith("exercise:")),
                    first_line(cell.source))
        _, check, arguments = cell.source.partition("lesson.exercise(")
        if not check:
            raise ValueError(f"exercise {name!r}: its cell never calls `lesson.exercise(`")
        solved = f"{_solution(name, notebook.cells[index + 1:])}\n\n{check}{arguments}"
        answered.cells.append(new_code_cell(solved, id=f"solved-{index}", metadata=uncompared))
    return answered


def _solution(name: str, following: Sequence[NotebookNode]) -> str:
    for cell in following:
        tags = cell.metadata.get("tags", [])
        if "exercise" in tags:
            break
        code = re.search(r"```python\n(.*?)```", cell.source, re.DOTALL)
        if "solution" in tags and code:
            return code[1].rstrip()
    raise ValueError(f"exercise {name!r}: no cell tagged `solution` with a ```python block "
                     "follows it")


def solve(folder: Path) -> None:
    """Write every notebook to `folder`, its exercises answered at the end, not yet executed: nbval
    checks all that in one run."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(HERE.glob("*.ipynb")):
        nbformat.write(with_solutions(nbformat.read(path, as_version=4)), folder / path.name)


def lend(folder: Path) -> None:
    """Copy the lessons to `folder`, to work in. A lesson that is newer than its copy replaces a
    copy that nobody has changed; else it becomes NN_name.new.ipynb beside it, which is said.

    What was given out last is known by its digest, in `folder`/.given.json.
    """
    record = folder / ".given.json"
    given = json.loads(record.read_text()) if record.exists() else {}
    for lesson in sorted(HERE.glob("*.ipynb")):
        own, last, now = folder / lesson.name, given.get(lesson.name), _digest(lesson)
        given[lesson.name] = now
        if own.exists() and now in (last, _digest(own)):
            continue
        free = next(path for path in _copies(own) if not path.exists() or _digest(path) == last)
        write_atomically(free, lesson.read_bytes())
        if free != own:
            print(f"{own} has your changes and stays as it is; the newer lesson is {free.name}")
    write_atomically(record, json.dumps(given, indent=1) + "\n")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    this_machine("cpu", probes.formats("cpu"))         # now, or its progress lands in a lesson
    for script in scripts:
        build(script)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
