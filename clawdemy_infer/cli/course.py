"""`course`: run lessons, then show all predictions beside all measurements."""

from pathlib import Path

from clawdemy_infer.cli.arguments import Args, checked, command, option


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
    return course.main(lessons, args.core, args.resume, args.json)
