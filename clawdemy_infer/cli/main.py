"""What a terminal sees: `clawdemy-infer`, or `python -m clawdemy_infer`. This is the one boundary:
whatever a command raises becomes one line on stderr and an exit code, which COMMANDS.md explains.
Nothing slow is imported before `main` is ready for Ctrl-C."""

import os
import signal
import sys
import warnings
from contextlib import suppress
from importlib import import_module

from clawdemy_infer import __version__

COMMANDS = ("doctor", "calibrate", "napkin", "generate", "bench", "published", "replay", "quantize",
            "evaluate", "course")
"""Each is a file of this folder, which offers `add(subparsers)` and `run(args)`."""
BUG = 70
"""Exit code of an error that is none of ours: EX_SOFTWARE of sysexits.h."""


def parser():
    from clawdemy_infer.cli.arguments import Parser, option
    top = Parser("clawdemy-infer", allow_abbrev=False, description=(
        "Predict the cost of LLM inference, measure it, explain the difference."))
    top.add_argument("--version", action="version", version=f"clawdemy-infer {__version__}")
    option(top, "--debug", "show where an error comes from", bool)
    subparsers = top.add_subparsers(dest="command", required=True, metavar="command")
    for name in COMMANDS:
        import_module(f"clawdemy_infer.cli.{name}").add(subparsers)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        open_streams()
        args = parser().parse_args(words)
        args.given = {word.partition("=")[0] for word in words}
        code = args.run(args)
        sys.stdout.flush()                  # a full disk may show only now
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                 # whoever read our output has read enough
        return 1
    except Exception as error:              # noqa: BLE001  what nobody expects is a bug
        return say_error(error, words)
    finally:
        close_streams()
        if arguments is None:               # what is left is Python's own end: no traceback of it
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def say_error(error: Exception, words: list[str]) -> int:
    """Say in one line what went wrong, with --debug also where; the exit code."""
    from clawdemy_infer.cli.arguments import one_line
    from clawdemy_infer.cli.output import say
    from clawdemy_infer.paths import cache_dir
    if "--debug" in words:
        import traceback
        say("".join(traceback.format_exception(error)).rstrip())
    kind, said = type(error).__name__, one_line(str(error))
    code = getattr(error, "exit_code", 1)
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "allocate memory" in said:
        said = f"{kind}: there is not enough memory for this. {said}".strip()
    elif not isinstance(error, ValueError | OSError | ImportError | RecursionError):
        code, said = BUG, (f"this is a bug of clawdemy-infer, and not your mistake ({kind}: "
                           f"{said}); with --debug it shows where")
    with suppress(OSError):
        short, long = sorted((str(getattr(error, "filename", "?")), str(cache_dir())), key=len)
        said += "; CLAWDEMY_CACHE names another folder" * long.startswith(short)
    command = next((f" {word}" for word in words if word in COMMANDS), "")
    say(f"clawdemy-infer{command}: {said or kind}")
    return code


def open_streams() -> None:
    """Standard streams that take what is written: one that is closed leads nowhere, a character
    that an encoding lacks becomes a question mark, a warning is one line."""
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))        # noqa: SIM115
    if "stdout" in closed:
        raise OSError("stdout is closed; one that leads somewhere is accepted")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_: f"warning: {' '.join(str(message).split())}\n"


def close_streams() -> None:
    """Write what waits, and drop what cannot be: Python would try again, and fail in its words."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
