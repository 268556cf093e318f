"""What the commands share: how one is added, how an argument is read, which errors are wrong usage.
Nothing here imports torch before a command runs, so that `--help` is quick."""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import fill
from typing import NoReturn

from clawdemy_infer.cli.output import say

Args = argparse.Namespace
RUNS_IN = ("fp32", "fp16", "bf16", "int8", "int4")
"""Formats of the weights that a model runs in."""


class UsageError(ValueError):
    """An argument that is refused. The message names it; the exit code is 2."""


@contextmanager
def checked() -> Iterator[None]:
    """Where arguments are looked at: a ValueError in here is a UsageError."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def command(subparsers, name: str, run: Callable[[Args], int], description: str,
            *examples: str, notes: Sequence[str] = ()) -> Parser:
    """The parser of one command, with `--json`; `examples` and `notes` end its help."""
    lines = ["examples:", *(f"  clawdemy-infer {name} {example}".rstrip() for example in examples)]
    epilog = "\n\n".join(["\n".join(lines), *(fill(note, 100) for note in notes)])
    made = subparsers.add_parser(name, help=description, description=description, epilog=epilog,
                                 formatter_class=argparse.RawDescriptionHelpFormatter,
                                 allow_abbrev=False)
    made.set_defaults(run=run)
    option(made, "--json", "print one JSON object and nothing else on stdout", bool)
    return made


def option(group, flag: str, help: str, kind: object = str, default: object = None, **more) -> None:
    """Add an option to a parser or a group of one: `option(c, "--batch B", "sequences", count, 1)`.

    `flag` is its name and what stands for its value. `kind` reads the value, or is a tuple of the
    accepted ones; in a list, `[count]`, it takes several with commas between; `bool` takes no
    value, and with a default it can be denied. A default is named at the end of the help.
    """
    name, _, metavar = flag.partition(" ")
    if default not in (None, "", []):
        shown = ",".join(map(str, default)) if isinstance(default, list) else default
        help += f" (default: {shown})"
    if kind is bool:
        action = "store_true" if default is None else argparse.BooleanOptionalAction
        more |= {"action": action, "default": bool(default)}
    else:
        kind = several(*kind) if isinstance(kind, list) else kind
        reads = "choices" if isinstance(kind, tuple) else "type"
        more = {reads: kind, "metavar": metavar or None, "default": default} | more
    group.add_argument(name, help=help, **more)


def model_option(group) -> None:
    option(group, "--model M", "smollm2-135m, a GGUF file, a Hugging Face directory, or a name on "
           "the hub", default="smollm2-135m")


def compile_option(group, where: str = "") -> None:
    option(group, "--compile", f"{where}run on compiled code; it wants a C++ compiler", bool)


def fitting(pattern: str, accepted: str, kind: type = str) -> Callable[[str], object]:
    """The type of an argument of that pattern; `kind` reads it."""
    def read(text: str) -> object:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r}: {accepted}")
        return kind(text)
    return read


count = fitting("0*[1-9][0-9]*", "a whole number, 1 or more, is accepted", int)
draft = fitting("lookup|int8|int4|trained|exit:[1-9][0-9]*",
                "accepted are lookup, int8, int4, trained, exit:K for the first K layers")


def several(kind: object) -> Callable[[str], list]:
    """The type of a list with commas: of what `kind` reads, or of the words in it."""
    if isinstance(kind, tuple):
        kind = fitting("|".join(map(re.escape, kind)), f"accepted are {', '.join(kind)}")
    return lambda text: [kind(item) for item in text.split(",")]


def load(name: str, option: str = "model", device: str = "cpu"):
    """`load_model`; a name that it does not know is wrong usage of `option`."""
    from clawdemy_infer import files
    try:
        return files.load_model(name, device=device)
    except files.UnknownModel as error:
        raise UsageError(str(error).replace("model=", f"{option}=", 1)) from error


def running(args: Args, weights: str | None = None):
    """The model of `--model` on this machine's device, packed in the format `weights`, on compiled
    code if that is asked for."""
    from clawdemy_infer.fast.faster import faster
    from clawdemy_infer.machine.calibrate import default_device
    plain = load(args.model, device=default_device())
    with checked():
        return faster(plain, weights, compile=args.compile)


def calibrated(device: str, formats: Sequence[str] = ()):
    """This machine's calibration, with `formats`, made now if there is none."""
    from clawdemy_infer.machine.calibrate import this_machine
    say("Looking at this machine; up to 20 seconds if it must be calibrated …")
    with checked():
        return this_machine(device, formats)
