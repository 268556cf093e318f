"""The page of the command line, made from the parsers:
`python notebooks/commands.py > notebooks/COMMANDS.md`."""

from argparse import SUPPRESS, RawDescriptionHelpFormatter
from functools import partial

from clawdemy_infer.cli.main import parser

BEGINNING = """# The command line

`clawdemy-infer COMMAND`, also `python -m clawdemy_infer COMMAND`; in a checkout that is set up,
`.venv/bin/clawdemy-infer`. Every command takes `--json`, which prints exactly one object on stdout.
Exit code 0: done; 1: what was asked about failed, or does not fit; 2: wrong usage, one line on
stderr that names the argument; 70: a bug; 130: Ctrl-C. With `--debug` an error says where it comes
from. This page is made by `python notebooks/commands.py`."""


def page() -> str:
    [subparsers] = [action for action in parser()._actions if isinstance(action.choices, dict)]
    sections = [BEGINNING]
    for name, command in subparsers.choices.items():
        command.usage = SUPPRESS
        command.formatter_class = partial(RawDescriptionHelpFormatter, width=100)
        sections.append(f"## {name}\n\n```\n{command.format_help().strip()}\n```")
    return "\n\n".join(sections)


if __name__ == "__main__":
    print(page())
