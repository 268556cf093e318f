"""Run the whole course: execute every lesson in a kernel of its own, then set all predictions
beside all measurements."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path

import nbformat
import psutil
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from rich.console import Console
from tqdm import tqdm

from clawdemy_infer.lesson import ledger
from clawdemy_infer.lesson.ledger import Scoreboard
from clawdemy_infer.lesson.tables import MISSING, Table, ledger_table, si
from clawdemy_infer.paths import write_atomically

CELL_TIMEOUT_S = 600
"""Ten times what a whole lesson should take: only a cell that hangs gets there."""


@dataclass(frozen=True)
class LessonRun:
    """How one notebook went: the most memory that its kernel held, and for one that failed the
    cell, its first line and what it raised."""

    name: str
    seconds: float
    ok: bool
    peak_bytes: int
    error: str | None = None


# -- one lesson -----------------------------------------------------------------------------------


class ThisInterpreter(KernelSpecManager):
    """Whatever kernels are registered on this machine, a lesson runs in the interpreter that runs
    the course."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


def execute(notebook: NotebookNode, name: str, folder: Path,
            environment: dict[str, str] | None = None,
            after_cell: Callable[[], object] = lambda: None) -> LessonRun:
    """Run all cells of `notebook` in a fresh kernel that starts in `folder`, and leave their
    outputs in it.

    `environment` is added to this process's. A cell that fails ends the lesson and is reported, not
    raised; Ctrl-C ends the kernel and is.
    """
    manager = AsyncKernelManager(kernel_spec_manager=ThisInterpreter(), transport_encryption="auto")
    client = NotebookClient(notebook, km=manager, timeout=CELL_TIMEOUT_S,
                            shutdown_kernel="immediate", record_timing=False, coalesce_streams=True)
    # A figure backend that is set for the shell would keep the figures out of the notebook.
    inherited = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    environment = inherited | {"HF_HUB_OFFLINE": "1"} | (environment or {})
    start, executed, peak, error = time.perf_counter(), 0, 0, None
    try:
        with client.setup_kernel(cwd=str(folder), env=environment, cleanup_kc=True):
            for index, cell in enumerate(notebook.cells):
                if cell.cell_type != "code":
                    continue
                executed += 1
                client.execute_cell(cell, index, execution_count=executed)
                peak = max(peak, peak_memory(manager.provisioner.pid))
                after_cell()
    except CellExecutionError as failure:
        error = f"{failure.ename}: {failure.evalue}"
    except CellTimeoutError:
        error = f"CellTimeoutError: still running after {CELL_TIMEOUT_S} s"
    except DeadKernelError:
        error = "DeadKernelError: the kernel died; most often the memory was not enough"
    if error:
        error = f"cell [{executed}] `{first_line(cell.source)}`: {error}"
    return LessonRun(name, time.perf_counter() - start, error is None, peak, error)


def peak_memory(pid: int) -> int:
    """The most bytes that a process ever held, from Linux's high-water mark; elsewhere what it
    holds now, a lower bound."""
    status = Path(f"/proc/{pid}/status")
    if status.exists() and (mark := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(mark[1]) * 1024
    return psutil.Process(pid).memory_info().rss


def first_line(source: str) -> str:
    return next((line for line in source.splitlines() if line.strip() and not line.startswith("#")),
                "").strip()


# -- the whole course -----------------------------------------------------------------------------


def run_course(notebooks: Sequence[Path], ledger_file: Path,
               progress: bool = True) -> list[LessonRun]:
    """Execute every notebook, with one fresh ledger for all. A lesson that fails does not stop the
    others; the files stay as they are."""
    ledger_file.parent.mkdir(parents=True, exist_ok=True)
    ledger_file.unlink(missing_ok=True)
    lessons = {path: nbformat.read(path, as_version=4) for path in notebooks}
    cells = sum(cell.cell_type == "code" for lesson in lessons.values() for cell in lesson.cells)
    runs = []
    with tqdm(total=cells, unit="cell", disable=not progress,
              bar_format="{desc}{bar:30} {n_fmt}/{total_fmt} cells, {elapsed}") as bar:
        for path, lesson in lessons.items():
            name = path.stem.replace("_", " ", 1)       # as the lesson calls itself in the ledger
            bar.set_description_str(f"{name:28}")
            environment = {"CLAWDEMY_LEDGER": str(ledger_file.resolve())}
            runs.append(execute(lesson, name, path.parent, environment, bar.update))
    return runs


def main(json: bool = False) -> int:
    """The `course` command: run, print the scoreboard (with `json`: the object that goes into the
    file, alone on stdout), write `build/`.

    Returns 0; 1 if a lesson failed or there is none to run; 130 after Ctrl-C.
    """
    root = checkout()
    if root is None:
        print(f"no notebooks/*.ipynb in {Path.cwd()}: run this in a checkout of clawdemy-infer",
              file=sys.stderr)
        return 1
    ledger_file = root / "build" / "ledger.jsonl"
    try:
        runs = run_course(sorted((root / "notebooks").glob("*.ipynb")), ledger_file)
    except KeyboardInterrupt:
        print(f"interrupted; what was measured so far is in {ledger_file}", file=sys.stderr)
        return 130
    board = ledger.scoreboard(ledger.read(ledger_file))

    report = board.to_json() | {"lessons": [asdict(run) for run in runs],
                                "versions": ledger.versions(), "date": ledger.today()}
    text = dumps(report, indent=1, ensure_ascii=False)
    write_atomically(root / "build" / "scoreboard.json", text + "\n")
    if json:
        print(text)
    else:
        show(board, runs)
    for run in runs:
        if not run.ok:
            print(f"lesson {run.name} failed in {run.error}", file=sys.stderr)
    return 0 if all(run.ok for run in runs) else 1


def checkout() -> Path | None:
    """The folder that holds notebooks/: the working directory, else the one that this package was
    installed from."""
    candidates = (Path.cwd(), Path(__file__).resolve().parents[2])
    return next((folder for folder in candidates if any(folder.glob("notebooks/*.ipynb"))), None)


def show(board: Scoreboard, runs: Sequence[LessonRun]) -> None:
    """The scoreboard and the lessons' own cost, in the terminal."""

    def percent(error: float | None) -> str:
        return MISSING if error is None else f"{error:.0%}"

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160                             # a log has no edge to wrap at
    console.print(ledger_table(board.rows, lessons=True))
    console.print(f"\nmedian ratio error: napkin {percent(board.napkin_error)}, "
                  f"calibrated roofline {percent(board.predicted_error)}")
    if worst := board.worst:
        console.print(f"worst row: {worst.lesson}, {worst.quantity}: {worst.ratio:.2f} times the "
                      "calibrated roofline", markup=False)
    rows = [(run.name, si(run.seconds, "s"), si(run.peak_bytes, "B"), "ok" if run.ok else "FAILED")
            for run in runs]
    header = ("lesson", "time", "peak memory", "")
    console.print()
    console.print(Table(header, rows, numeric=("time", "peak memory")))
