"""What a terminal sees: `clawdemy-infer`, also `python -m clawdemy_infer`. `page` says what is
printed where and what the exit codes mean; 130 is Ctrl-C."""

import os
import sys
import warnings
from importlib import import_module

from clawdemy_infer import __version__
from clawdemy_infer.cli.arguments import Parser, UsageError
from clawdemy_infer.cli.output import say

COMMANDS = ("doctor", "calibrate", "napkin", "generate", "bench", "published", "replay", "quantize",
            "evaluate", "course")
"""Each is a file of this folder, which offers `add(subparsers)` and `run(args)`."""


def parser() -> Parser:
    top = Parser("clawdemy-infer", allow_abbrev=False, description=(
        "Predict the cost of LLM inference, measure it, explain the difference."))
    top.add_argument("--version", action="version", version=f"clawdemy-infer {__version__}")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="command")
    for name in COMMANDS:
        import_module(f"clawdemy_infer.cli.{name}").add(subparsers)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code."""
    args = parser().parse_args(arguments)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:             # whoever read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, MemoryError) as error:
        sentence = " ".join(str(error).split()) or type(error).__name__
        say(f"clawdemy-infer {args.command}: {sentence}")
        return 2 if isinstance(error, UsageError) else 1
