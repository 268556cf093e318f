"""`course`: run every lesson, then show all predictions beside all measurements."""

from clawdemy_infer.cli.arguments import Args, command


def add(subparsers) -> None:
    command(subparsers, "course", run, "Run every lesson and print the scoreboard.", "", "--json")


def run(args: Args) -> int:
    from clawdemy_infer.lesson import course
    return course.main(args.json)
