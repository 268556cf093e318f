"""What the commands share: how one is added, how an argument is read and how far it may go, which
errors are wrong usage. Nothing here imports torch before a command runs: `--help` is quick."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from textwrap import fill
from typing import NoReturn

from clawdemy_infer.cli.output import say
from clawdemy_infer.paths import Refused
from clawdemy_infer.rigs.stream import printable

Args = argparse.Namespace
RUNS_IN = ("fp32", "fp16", "bf16", "int8", "int4")
"""Formats of the weights that a model runs in."""
MOST, MOST_TOKENS, MOST_SEED, MOST_VALUE = 10**6, 10**8, 2**63 - 1, 1e15
"""Largest count (of sequences, devices, turns), tokens, start of a generator, and other number."""
MOST_LISTED, MOST_SHOWN = 1000, 1000
"""Values in a list with commas; characters of an error, since an argument may be megabytes long."""


class UsageError(Refused):
    """An argument that is refused: `UsageError("", "trace", "x", "a file")`."""

    exit_code = 2


@contextmanager
def checked() -> Iterator[None]:
    """Where arguments are looked at: a ValueError in here is wrong usage."""
    try:
        yield
    except ValueError as error:
        error.exit_code = 2
        raise


def one_line(text: str) -> str:
    """`text` without what moves a cursor, and not longer than a line may be."""
    text = printable(text)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} …"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}\n")


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
    made.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                      help=argparse.SUPPRESS)       # the same before and after the command
    return made


def option(group, flag: str, help: str, kind: object = str, default: object = None, **more) -> None:
    """Add an option to a parser or a group of one: `option(c, "--batch B", "sequences", count, 1)`.
    `flag` is its name and what stands for its value. `kind` reads the value, or is a tuple of the
    accepted ones; in a list, `[count]`, it takes several with commas between; `bool` takes no
    value, and with a default it can be denied; `int` and `float` have limits, here as elsewhere. A
    default is named at the end of the help."""
    name, _, metavar = flag.partition(" ")
    if default not in (None, "", []):
        shown = ",".join(map(str, default)) if isinstance(default, list) else default
        help += f" (default: {shown})"
    if kind is bool:
        action = "store_true" if default is None else argparse.BooleanOptionalAction
        more |= {"action": action, "default": bool(default)}
    else:
        kind = number(default == math.inf) if kind is float else seed if kind is int else kind
        kind = several(*kind) if isinstance(kind, list) else kind
        reads = "choices" if isinstance(kind, tuple) else "type"
        more = {reads: kind, "metavar": metavar or None, "default": default} | more
    group.add_argument(name, help=help, **more)


def model_option(group) -> None:
    option(group, "--model M", "smollm2-135m, a GGUF file, a Hugging Face directory, or a name on "
           "the hub", default="smollm2-135m")


def compile_option(group, where: str = "") -> None:
    option(group, "--compile", f"{where}run on compiled code; it wants a C++ compiler", bool)


def idle(args: Args, because: object, why: str, *flags: str) -> None:
    """Refuse those of `flags` that were given, which change nothing `because` something is so."""
    for flag in flags:
        if because and flag in args.given:
            raise UsageError("", flag, why=f"changes nothing {why}")


def read_by(read: Callable[[str], object], accepted: str) -> Callable[[str], object]:
    """The type of an argument that `read` takes: else it gives None, or raises ValueError."""
    def kind(text: str) -> object:
        with suppress(ValueError):
            if (value := read(text)) is not None:
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: {accepted}")
    return kind


def fitting(pattern: str, accepted: str) -> Callable[[str], str]:
    """The type of an argument of that pattern."""
    return read_by(lambda text: text if re.fullmatch(pattern, text) else None, accepted)


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of a whole number from `low` to `high`."""
    return read_by(lambda text: int(text) if re.fullmatch("[0-9]+", text)
                   and low <= int(text) <= high else None,
                   f"a whole number from {low:,} to {high:,} is accepted")


def number(infinite: bool = False, low: float = -MOST_VALUE,
           high: float = MOST_VALUE) -> Callable[[str], float]:
    """The type of a number that may have a point or an exponent, or may be `inf`. -0 is 0."""
    return read_by(lambda text: float(text) + 0.0 if low <= float(text) <= high
                   or infinite and float(text) == math.inf else None,
                   f"a number from {low:g} to {high:g}{', or inf,' * infinite} is accepted")


words = read_by(lambda text: text.encode().decode(), "UTF-8 is accepted")
count, tokens, seed = whole(1, MOST), whole(1, MOST_TOKENS), whole(0, MOST_SEED)
rate = number(infinite=True)
text_file = read_by(lambda text: Path(text) if Path(text).is_file() else None,
                    "the path of a text file is accepted")
draft = fitting("lookup|int8|int4|trained|exit:[1-9][0-9]{0,3}",
                "accepted are lookup, int8, int4, trained, exit:K for the first K layers")


def several(kind: object) -> Callable[[str], list]:
    """The type of a list with commas: of what `kind` reads, or of the words in it."""
    if isinstance(kind, tuple):
        kind = fitting("|".join(map(re.escape, kind)), f"accepted are {', '.join(kind)}")

    def read(text: str) -> list:
        if len(items := text.split(",")) > MOST_LISTED:
            raise argparse.ArgumentTypeError(f"at most {MOST_LISTED:,} values are accepted")
        return [kind(item) for item in items]
    return read


def there(name: str, option: str = "model") -> str:
    """`name`, unless it begins as a path does, or lies in a folder, and is not there."""
    like_a_path = (name.startswith(("/", "./", "../", "~"))
                   or "/" in name and os.path.exists(name.partition("/")[0]))
    if like_a_path and not os.path.exists(os.path.expanduser(name)):
        raise UsageError("", option, name, "a file or directory that exists")
    return name


def load(name: str, option: str = "model", device: str = "cpu"):
    """`load_model`; a name that it does not know is wrong usage of `option`."""
    from clawdemy_infer import files
    try:
        return files.load_model(there(name, option), device=device)
    except files.UnknownModel as error:
        said = str(error).replace("model=", f"{option}=", 1)
        raise UsageError("", None, why=said) from error


def running(args: Args, weights: str | None = None):
    """The model of `--model` on this machine's device, packed in `weights`, compiled if asked."""
    from clawdemy_infer.fast.faster import faster
    from clawdemy_infer.machine.calibrate import default_device
    plain = load(args.model, device=default_device())
    with checked():
        return faster(plain, weights, compile=args.compile)


def calibrated(device: str, formats: Sequence[str] = ()):
    """This machine's calibration, with `formats`, made now if there is none."""
    from clawdemy_infer.machine.calibrate import this_machine
    say("Looking at this machine; up to 20 seconds if it must be calibrated …")
    with checked(), redirect_stdout(sys.stderr):            # where a notebook would be told
        return this_machine(device, formats)
