"""What a terminal sees: `clawdemy-infer`, also `python -m clawdemy_infer`.

Readable by default; `--json` prints exactly one object on stdout. Words about what is going on are for stderr.
Exit code 0: done. 1: what was asked about failed, or does not fit. 2: wrong usage, one line on stderr that names the argument.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from clawdemy_infer import __version__, catalog, commands, commands_peers, commands_published, commands_quantize, commands_replay
from clawdemy_infer.arithmetic import BYTES

RUNS_IN = ("fp32", "fp16", "bf16", "int8", "int4")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def count(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number, 1 or more, is accepted")
    return int(text)


def counts(text: str) -> list[int]:
    return [count(item) for item in text.split(",")]


def names_of(text: str) -> list[str]:
    return text.split(",")


def some_of(*accepted: str):
    """The type of an argument that takes several of `accepted`, with commas between."""
    def parse(text: str) -> list[str]:
        for item in text.split(","):
            if item not in accepted:
                raise argparse.ArgumentTypeError(f"{item!r}: accepted are {', '.join(accepted)}")
        return text.split(",")
    return parse


def draft(text: str) -> str:
    if not re.fullmatch(r"lookup|int8|int4|trained|exit:[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: accepted are lookup, int8, int4, trained, exit:K for the first K layers")
    return text


def some_drafts(text: str) -> list[str]:
    return [draft(name) for name in text.split(",")]


def parser() -> Parser:
    names = f"Models: {', '.join(catalog.model_names())}. Machines: {', '.join(catalog.machine_names())}, this."
    top = Parser("clawdemy-infer", description="Predict the cost of LLM inference, measure it, explain the difference.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"clawdemy-infer {__version__}")
    chosen = top.add_subparsers(dest="command", required=True, metavar="command")

    def command(run: Callable[[argparse.Namespace], int], description: str, epilog: str | None = None) -> Parser:
        made = chosen.add_parser(run.__name__, help=description, description=description, epilog=epilog, allow_abbrev=False)
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
        return made

    command(commands.doctor, "Say what this machine has and lacks.")
    command(commands.calibrate, "Measure this machine: bandwidth, FLOP/s, fixed cost. Keeps the result.")

    c = command(commands.napkin, "Work out, before anything runs, what a model costs on a machine.", names)
    c.add_argument("--model", metavar="M", help="a model of the catalog, or a path to a config.json")
    c.add_argument("--compare", type=names_of, default=[], metavar="M1,M2", help="models to set side by side")
    c.add_argument("--machine", required=True, type=names_of, metavar="X",
                   help="a machine of the catalog, or `this`: yours, once calibrated; several, with commas, are set side by side")
    c.add_argument("--batch", type=count, default=1, metavar="B", help="sequences (default: 1)")
    c.add_argument("--context", type=count, default=1024, metavar="S", help="tokens a sequence holds at the decode step (default: 1024)")
    c.add_argument("--prompt", type=count, metavar="T", help="tokens of the prompt (default: the context)")
    c.add_argument("--weights", choices=BYTES, default="bf16", help="format of the weights (default: bf16)")
    c.add_argument("--kv", choices=BYTES, default="bf16", help="format of the KV cache (default: bf16)")
    c.add_argument("--activations", choices=("fp32", "bf16", "fp16", "fp8", "int8"),
                   help="format that is computed in (default: that of the weights; bf16 for weights of fewer bits)")
    c.add_argument("--tp", type=count, default=1, metavar="N", help="devices that share every matrix: tensor parallel")
    c.add_argument("--pp", type=count, default=1, metavar="N", help="devices that share the layers: pipeline parallel")
    c.add_argument("--ep", type=count, default=1, metavar="N", help="devices that share the experts and the batch: expert parallel")
    c.add_argument("--sweep", choices=("batch", "context"), help="a row for each batch, or for each context, until it does not fit")

    c = command(commands.generate, "Let the model continue a prompt, and say how long it took.")
    c.add_argument("--prompt", required=True, metavar="TEXT")
    c.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    c.add_argument("--max-tokens", type=count, default=64, metavar="N", help="stop after so many (default: 64)")
    c.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be given several times")
    c.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    c.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens")
    c.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens that hold P of the probability")
    c.add_argument("--min-p", type=float, metavar="P", help="keep tokens at least P times as likely as the likeliest")
    c.add_argument("--seed", type=int, help="the same seed draws the same tokens")
    c.add_argument("--weights", choices=RUNS_IN, default="fp32", help="format of the weights (default: fp32)")
    c.add_argument("--cache", choices=("contiguous", "paged", "window", "int8", "int4", "paged-int8", "paged-int4", "none"),
                   default="contiguous",
                   help="how keys and values are kept (default: contiguous); window: the last 256 tokens and the first 4, "
                        "of a text as long as you like; none runs the whole text anew for each token")

    c.add_argument("--draft", type=draft, metavar="D",
                   help="speculative decoding: the same tokens, or drawn from the same distribution. lookup copies from the text; "
                        "int8 or int4 is the model itself in fewer bits; exit:K its first K layers; "
                        "trained one layer that goes on from its vectors")
    c.add_argument("--gamma", type=count, default=4, metavar="N", help="tokens that are drafted at a time (default: 4)")

    b = command(commands_peers.bench, "Time prefill and decode of the real model beside what was predicted, or beside other engines.")
    b.add_argument("--phase", type=some_of(*commands.PHASES), default=[*commands.PHASES], metavar="LIST", help="(default: prefill,decode)")
    b.add_argument("--weights", type=some_of(*RUNS_IN), default=["fp32", "bf16"], metavar="LIST", help="(default: fp32,bf16)")
    b.add_argument("--batch", type=counts, default=[1], metavar="LIST", help="sequences (default: 1)")
    b.add_argument("--context", type=counts, metavar="LIST", help="tokens (default: prefill 64,256,1024, decode 64,512,1024)")
    b.add_argument("--breakdown", action="store_true", help="also say where the time of each step goes: products, attention, the rest")
    b.add_argument("--peers", nargs="?", const=[*commands_peers.PEERS], type=some_of(*commands_peers.PEERS), metavar="LIST",
                   help="instead, run other engines in turn with ours, on the CPU (alone: transformers,llama.cpp,vllm), in the formats "
                        "of as many bits as --weights has")
    b.add_argument("--workloads", type=names_of, metavar="LIST",
                   help="what to do beside peers: decode-B, decode-B@S, prefill-S, trace (default: all of the README's table but trace)")
    b.add_argument("--rounds", type=count, default=3, metavar="N", help="turns that each gets beside peers or drafts (default: 3)")

    b.add_argument("--drafts", nargs="?", const=["lookup", "int8", "int4", "trained"], type=some_drafts, metavar="LIST",
                   help="instead, decode with these drafts and without, in turn, on texts of four kinds, greedily and at temperature 1; "
                        "and `transformers` on the same (alone: lookup,int8,int4,trained)")
    b.add_argument("--gamma", type=count, metavar="N", help="with --drafts: tokens drafted at a time (default: as many as pay, up to 8)")
    b.add_argument("--tokens", type=count, default=40, metavar="N", help="with --drafts: tokens generated for each text (default: 40)")

    b.add_argument("--kernels", action="store_true", help="instead, each Triton kernel: its bytes, its time at least, its time on a GPU")
    b.add_argument("--checks", action="store_true", help="with --kernels: also their errors and their machine code for four GPUs")
    b.add_argument("--machine", metavar="X", help="with --kernels: the machine to predict for (default: this GPU, or h100-sxm)")

    for which in (b, c):
        which.add_argument("--compile", action="store_true", help="run on compiled code; it wants a C++ compiler, and some seconds")
        which.add_argument("--model", default="smollm2-135m", metavar="M",
                           help="smollm2-135m (default), a GGUF file, a Hugging Face directory, or a name on the hub")
    c = command(commands_published.published, "Predict the runs that others published, and say how far off that was.")
    c.add_argument("--csv", metavar="FILE", help="a file with the columns of data/published_runs.csv (default: that file)")
    c.add_argument("--category", metavar="C", help="only the rows of this category")

    c = command(commands_replay.replay, "Serve a trace: with the model, or in the time that a roofline says.")
    commands_replay.add_arguments(c, count, BYTES, draft)

    c = command(commands_quantize.quantize, "Store the weights of a model in fewer bits, in a directory that serving engines load.")
    c.add_argument("--model", default="smollm2-135m", metavar="M", help="as for `generate`")
    commands_quantize.add_quantize_arguments(c, count)
    c = command(commands_quantize.evaluate, "Say how far a quantized model is from the one it was made of.")
    commands_quantize.add_evaluate_arguments(c, count)

    command(commands.course, "Run every lesson and print the scoreboard.")
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
        commands.say(f"clawdemy-infer {args.command}: {' '.join(str(error).split()) or type(error).__name__}")
        # The library names the argument that is wrong first. If it is one of this command's, it is the user's to mend.
        named = re.match(r"(\w+)[=: ]", str(error))
        return 2 if isinstance(error, ValueError) and named and named[1] in vars(args) else 1
