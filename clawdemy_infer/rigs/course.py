"""Run lessons, each in a kernel of its own, and keep what they measured."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty
from textwrap import shorten
from types import NoneType

import nbformat
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from tqdm import tqdm

from clawdemy_infer.lesson import ledger
from clawdemy_infer.machine import peak_memory
from clawdemy_infer.paths import Refused, read_kept, write_atomically

FLOOR_S, FACTOR = 300, 20
"""A cell may take `FACTOR` times the `seconds` of its metadata, for a machine that is slower or
busy, and never less than `FLOOR_S`. The build writes `seconds` above `FLOOR_S / FACTOR`."""
LAST_OUTPUT_S = 30
"""What a cell shows may come so long after its end; after that, the kernel has lost a message."""
LOOK_S = 1.0
RUN = {"name": str, "seconds": 0, "ok": bool, "error": (str, NoneType),
       "first_cell_s": (0, NoneType), "peak_bytes": 0}
KEPT = {"": {"code": [str], "run": RUN, "rows": [dict]}}
"""What course.json has of each lesson, as `paths.alike` reads it."""


@dataclass(frozen=True)
class LessonRun:
    """How one notebook went: the time of its first code cell (None if that never ended), the most
    memory that its kernel held, and for one that failed the cell and what it raised."""

    name: str
    seconds: float
    ok: bool
    error: str | None
    first_cell_s: float | None
    peak_bytes: int


class ThisInterpreter(KernelSpecManager):
    """A lesson runs in the interpreter that runs the course, whatever kernels are registered."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


def execute(notebook: NotebookNode, name: str, folder: Path,
            environment: dict[str, str] | None = None,
            after_cell: Callable[[NotebookNode, float], object] = lambda cell, seconds: None,
            core: bool = False) -> LessonRun:
    """Run all code cells of `notebook` in a fresh kernel that starts in `folder`, and leave their
    outputs in it; with `core` those not tagged `further`. `environment` is added to this process's;
    `after_cell` is told each cell and its seconds. A cell that fails ends the lesson and is
    reported, not raised; Ctrl-C ends the kernel and is."""
    manager = AsyncKernelManager(kernel_spec_manager=ThisInterpreter(), transport_encryption="auto")
    client = NotebookClient(notebook, km=manager, timeout_func=limit, startup_timeout=FLOOR_S,
                            iopub_timeout=LAST_OUTPUT_S, shutdown_kernel="immediate",
                            record_timing=False, coalesce_streams=True)
    # A figure backend that is set for the shell would keep the figures out of the notebook.
    inherited = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    environment = inherited | {"HF_HUB_OFFLINE": "1"} | (environment or {})
    start, first, peak, error, place = time.perf_counter(), None, 0, None, ""
    try:
        with client.setup_kernel(cwd=str(folder), env=environment, cleanup_kc=True):
            look_again(client.kc.shell_channel)
            for index, number, cell in code_cells(notebook, core):
                place, began = f"cell [{number}] `{first_line(cell.source)}`: ", time.perf_counter()
                client.execute_cell(cell, index, execution_count=number)
                seconds = time.perf_counter() - began
                first = first or seconds
                peak = max(peak, peak_memory(manager.provisioner.pid))
                after_cell(cell, seconds)
    except CellExecutionError as failure:
        error = shorten(f"{failure.ename}: {failure.evalue}", 400, placeholder=" …")
    except CellTimeoutError:
        expected = cell.metadata.get("seconds", f"under {FLOOR_S // FACTOR}")
        error = f"CellTimeoutError: still running after {limit(cell)} s; expected: {expected} s"
    except DeadKernelError:
        error = "DeadKernelError: the kernel died; most often the memory was not enough"
    except RuntimeError as failure:
        error = f"the kernel did not start: {failure}"
    return LessonRun(name, time.perf_counter() - start, error is None, error and place + error,
                     first, peak)


def look_again(channel: AsyncZMQSocketChannel) -> None:
    """Let `channel.get_msg` look each second: what a slider of the cell sends meanwhile on the same
    socket may use up the sign that the reply has come (jupyter/nbclient #312)."""
    get = channel.get_msg

    async def get_msg(timeout: float | None = None) -> dict:
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        while (left := end - time.monotonic()) > LOOK_S:
            with suppress(Empty):
                return await get(LOOK_S)
        return await get(max(left, 0))

    channel.get_msg = get_msg


def code_cells(notebook: NotebookNode, core: bool) -> Iterator[tuple[int, int, NotebookNode]]:
    """Each cell to run, after its index and the number that it has as `In [number]`."""
    code = [(index, cell) for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    for number, (index, cell) in enumerate(code, start=1):
        if not (core and "further" in cell.metadata.get("tags", [])):
            yield index, number, cell


def limit(cell: NotebookNode) -> int:
    """Seconds after which a cell is taken to hang."""
    return max(FLOOR_S, FACTOR * cell.metadata.get("seconds", 0))


def first_line(source: str) -> str:
    lines = (line.strip() for line in source.splitlines() if not line.startswith("#"))
    return next(filter(None, lines), "")


def choose(names: Sequence[str] = (), folder: Path | None = None) -> list[Path]:
    """The notebooks of `names`, each the path of one, or a lesson's number or name; without names
    all lessons. They lie in `folder`; else in notebooks/ of the working directory, or of the
    checkout that this package was installed from. Raises `FileNotFoundError` where there are no
    lessons, `ValueError` for a wrong argument."""
    checkouts = (Path.cwd(), Path(__file__).resolve().parents[2])
    places = [folder] if folder else [one / "notebooks" for one in checkouts]
    # 01_name.new.ipynb is a second copy of a lesson, and no lesson.
    found = (sorted(path for path in place.glob("*.ipynb") if "." not in path.stem)
             for place in places)
    if not (lessons := next(filter(None, found), [])):
        if folder:
            raise Refused("", "in", str(folder), "a folder of lessons (*.ipynb)")
        raise FileNotFoundError(f"{Path.cwd()}: no lessons (*.ipynb); run this in a checkout of "
                                "clawdemy-infer, or name their folder")
    known = {alias: path for path in lessons for alias in (
        path.name, path.stem, path.stem.replace("_", " ", 1), *path.stem.split("_", 1))}
    known |= {name: Path(name) for name in names if name[-6:] == ".ipynb" and Path(name).is_file()}
    if wrong := [name for name in names if name not in known]:
        raise Refused("", "lesson", wrong[0], "a notebook, or the number or name of one of "
                      + ", ".join(path.stem for path in lessons))
    return list(dict.fromkeys(known[name] for name in names)) or lessons


def results_of(lesson: Path) -> Path:
    """The folder build/ for what is measured: of the checkout, or in the folder of a copy."""
    folder = lesson.resolve().parent
    return (folder.parent if folder.name == "notebooks" else folder) / "build"


def run_course(lessons: Sequence[Path], core: bool = False,
               resume: bool = False) -> list[LessonRun]:
    """Execute every lesson; the files stay as they are. A lesson that fails is told at once and
    does not stop the others. With `resume` those that went well with the same code are not run.
    course.json keeps how each lesson went, and its rows, as soon as it has ended. All rows are in
    ledger.running.jsonl, at the end in ledger.jsonl; what that was is in ledger.previous.jsonl."""
    folder = results_of(lessons[0])
    state, running, final = map(folder.joinpath, ("course.json", "ledger.running.jsonl",
                                                  "ledger.jsonl"))
    done = read_kept(state, KEPT) or {}
    notebooks = {path: _read(path) for path in lessons}
    code = {path: [cell.source for *_, cell in code_cells(notebook, core)]
            for path, notebook in notebooks.items()}
    todo = [path for path in lessons
            if not (resume and (last := done.get(path.stem)) and last["run"]["ok"]
                    and last["code"] == code[path])]
    for path in todo:
        done.pop(path.stem, None)
    write_atomically(state, json.dumps(done))
    kept = [row for path in lessons if path not in todo for row in done[path.stem]["rows"]]
    write_atomically(running, "".join(json.dumps(row) + "\n" for row in kept))
    with tqdm(total=sum(len(code[path]) for path in todo),
              bar_format="{desc}{bar:30} {n_fmt}/{total_fmt} cells, {elapsed}") as bar:
        for path in todo:
            name = path.stem.replace("_", " ", 1)       # as the lesson calls itself in the ledger
            bar.set_description_str(f"{name:28}")
            before = len(ledger.read(running))
            run = execute(notebooks[path], name, path.parent, {"CLAWDEMY_LEDGER": str(running)},
                          lambda *_: bar.update(), core)
            if not run.ok:
                bar.write(f"lesson {name} failed in {run.error}", file=sys.stderr)
            rows = [asdict(row) for row in ledger.read(running)[before:]]
            done[path.stem] = {"code": code[path], "run": asdict(run), "rows": rows}
            write_atomically(state, json.dumps(done))
    if final.exists() and final.read_bytes() != running.read_bytes():
        write_atomically(folder / "ledger.previous.jsonl", final.read_bytes())
    os.replace(running, final)
    return [LessonRun(*(done[path.stem]["run"][name] for name in RUN)) for path in lessons]


def _read(path: Path) -> NotebookNode:
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        return notebook
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError,
            nbformat.ValidationError) as error:
        raise ValueError(f"{path} is not a notebook: {shorten(str(error), 200)}") from error
