"""What a terminal sees: `clawdemy-infer`, also `python -m clawdemy_infer`. `page` says what is
printed where and what the exit codes mean.

This is the one boundary: whatever a command raises becomes one line on stderr and an exit code
here. Nothing slow is imported before `main` stands ready for Ctrl-C.
"""

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
FAILED, WRONG_USAGE, BUG, INTERRUPTED = 1, 2, 70, 130
"""Exit codes; 70 is EX_SOFTWARE of sysexits.h, 130 is how shells say SIGINT."""
EXPECTED = (ValueError, OSError, ImportError, MemoryError, RecursionError)
"""What may fail without a mistake in the code."""


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
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        streams()
        args = parser().parse_args(words)
        args.given = {word.partition("=")[0] for word in words if word.startswith("--")}
        code = args.run(args)
        sys.stdout.flush()                  # a full disk may show only now
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:                 # whoever read our output has read enough
        return FAILED
    except Exception as error:              # here alone: what is not expected is a bug, and said so
        return told(error, words)
    finally:
        settle()
        if arguments is None:               # what is left is Python's own end: no traceback of it
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def told(error: Exception, words: list[str]) -> int:
    """Say on stderr what went wrong, in one line; the exit code."""
    from clawdemy_infer.cli.arguments import UsageError, one_line
    from clawdemy_infer.cli.output import say
    if "--debug" in words:
        import traceback
        say("".join(traceback.format_exception(error)).rstrip())
    command = next((f" {word}" for word in words if word in COMMANDS), "")
    kind, sentence = type(error).__name__, one_line(str(error))
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "allocate memory" in sentence:
        code, sentence = FAILED, f"{kind}: there is not enough memory for this. {sentence}"
    elif isinstance(error, EXPECTED):
        code = WRONG_USAGE if isinstance(error, UsageError) else FAILED
        sentence = sentence or kind
    else:
        code, sentence = BUG, (f"this is a bug of clawdemy-infer, and not your mistake ({kind}: "
                               f"{sentence}); with --debug it shows where")
    if isinstance(error, OSError) and error.filename and in_cache(os.fsdecode(error.filename)):
        sentence += "; CLAWDEMY_CACHE names another folder"
    say(f"clawdemy-infer{command}: {sentence.strip()}")
    return code


def in_cache(path: str) -> bool:
    """Is it in the user's cache, or one of the folders that this lies in?"""
    from clawdemy_infer.paths import cache_dir
    with suppress(OSError):
        return os.path.commonpath([path, place := str(cache_dir())]) in (path, place)
    return False


def streams() -> None:
    """Standard streams that take what is written: one that is closed leads nowhere, a character
    that an encoding lacks becomes a question mark, a warning is one line."""
    closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))    # noqa: SIM115
    if closed:
        raise OSError("stdout is closed; one that leads anywhere is accepted")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_: f"warning: {' '.join(str(message).split())}\n"


def settle() -> None:
    """Write what waits to be written. What cannot be is dropped: or Python would try again when it
    ends, and fail with words of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
