"""`course`: run lessons, then show all predictions beside all measurements."""

import json
from dataclasses import asdict
from pathlib import Path

from clawdemy_infer.cli.arguments import Args, checked, command, option
from clawdemy_infer.cli.output import answer, say
from clawdemy_infer.lesson import ledger
from clawdemy_infer.lesson.tables import Table, ledger_table, scoreboard_table, si
from clawdemy_infer.paths import write_atomically


def add(subparsers) -> None:
    made = command(subparsers, "course", run, "Run lessons and print the scoreboard.", "",
                   "01 kv_cache --core", "--resume", "04 --in my-lessons --json", "a/04_mine.ipynb")
    made.add_argument("lessons", nargs="*", metavar="LESSON",
                      help="number, name or notebook of a lesson (default: all)")
    option(made, "--core", "skip the cells tagged `further`", bool)
    option(made, "--resume", "go on: lessons that ended well are not run again, unless their code "
           "is another", bool)
    option(made, "--in FOLDER", "the lessons of this folder, such as the copies that `make lab` "
           "opens (default: of the checkout)", Path, dest="folder")


def run(args: Args) -> int:
    from clawdemy_infer.rigs import course
    with checked():
        lessons = course.choose(args.lessons, args.folder)
    folder = course.results_of(lessons[0])
    try:
        runs = course.run_course(lessons, args.core, args.resume)
    except KeyboardInterrupt:
        say(f"interrupted; lessons that are done are kept in {folder}, and the last ledger is as "
            "it was. The same command with --resume goes on.")
        return 130
    rows = ledger.latest(ledger.read(folder / "ledger.jsonl"))
    report = ledger.scoreboard(rows) | {"lessons": [asdict(run) for run in runs],
                                        "versions": ledger.versions(), "date": ledger.today()}
    write_atomically(folder / "scoreboard.json",
                     json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    header = ("lesson", "time", "first cell", "peak memory", "")
    cost = Table(header, [
        (run.name, si(run.seconds, "s"), si(run.first_cell_s, "s"), si(run.peak_bytes, "B"),
         "ok" if run.ok else f"FAILED in {run.error}") for run in runs], numeric=header[1:4])
    answer(args.json, report, ledger_table(rows, lessons=True), scoreboard_table(report), cost)
    return int(not all(run.ok for run in runs))
