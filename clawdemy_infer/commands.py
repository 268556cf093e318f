"""What each command does: it prints, and returns its exit code. `cli` reads the arguments.

torch takes seconds to import, so what measures or runs the model is imported by the commands that need it.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path

from rich.console import Console

from clawdemy_infer import catalog
from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.from_config import from_config
from clawdemy_infer.napkin import card, sweep
from clawdemy_infer.paper import calibration_on_paper, card_on_paper, compare_tables, sweep_table
from clawdemy_infer.parallel import Layout
from clawdemy_infer.roofline import Machine
from clawdemy_infer.tables import Table, si

PHASES = {"prefill": [64, 256, 1024], "decode": [64, 512, 1024]}
"""What `bench` times, and the contexts it takes unless told."""


def say(sentence: str) -> None:
    """A word to whoever waits, on stderr: stdout is for results."""
    print(sentence, file=sys.stderr, flush=True)


def show(*blocks: Table | str, stderr: bool = False) -> None:
    """Tables and sentences, an empty line between."""
    console = Console(stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160                 # a file has no edge to wrap at
    for block in blocks:
        if block is not blocks[0]:
            console.print()
        console.print(block)


def emit(result: dict) -> None:
    """One JSON object on one line, the last of stdout."""
    print(json.dumps(result, ensure_ascii=False, allow_nan=False), flush=True)


# ---- what there is ----


def doctor(args: argparse.Namespace) -> int:
    from clawdemy_infer.calibrate import kept_record
    from clawdemy_infer.doctor import checks, versions

    found = checks()
    ready = all(check.ok for check in found)
    if args.json:
        emit({"ready": ready, "machine": kept_record(), "versions": versions(), "checks": [vars(check) for check in found]})
    else:
        show(Table(("", "found", "what it means"), [(c.what, c.found, ("" if c.ok else "LACKING: ") + c.means) for c in found]),
             ", ".join(f"{name} {version or 'none'}" for name, version in versions().items()),
             "Ready: `make course` runs every lesson." if ready else "Not ready: see LACKING above.")
    return 0 if ready else 1


def calibrate(args: argparse.Namespace) -> int:
    from clawdemy_infer import ledger
    from clawdemy_infer.calibrate import calibrate, kept_record

    say("Measuring this machine, up to two minutes: bandwidth by working set, FLOP/s by dtype and rows, the fixed cost of an operation …")
    calibrate()
    record = kept_record()
    if args.json:
        emit({"machine": record, "versions": ledger.versions()})
        return 0
    show(*calibration_on_paper(record))
    return 0


# ---- the napkin ----


def napkin(args: argparse.Namespace) -> int:
    if not args.model and not args.compare:
        raise ValueError("model: name one, or several with --compare")
    shapes = [shape_of(name) for name in [*filter(None, [args.model]), *args.compare]]
    machines = [machine_of(name) for name in args.machine]
    options = {name: getattr(args, name) for name in ("batch", "context", "prompt", "weights", "kv", "activations")}
    options["layout"] = Layout(args.tp, args.pp, args.ep)
    pairs = list(product(shapes, machines))
    if args.sweep:
        rows = [row for shape, machine in pairs for row in sweep(shape, machine, args.sweep, **options)]
        emit({"sweep": args.sweep, "rows": rows}) if args.json else show(sweep_table(rows))
        return 0 if any(row["fits"] for row in rows) else 1
    cards = [card(shape, machine, **options) for shape, machine in pairs]
    if len(cards) == 1:
        emit(cards[0]) if args.json else show(*card_on_paper(cards[0], shapes[0]))
    else:
        emit({"cards": cards}) if args.json else show(*compare_tables(cards))
    return 0 if all(c["fits"] for c in cards) else 1


def shape_of(name: str) -> ModelShape:
    """A model of the catalog, or the one that a config.json describes."""
    if not name.endswith(".json"):
        return catalog.model(name)
    if not Path(name).is_file():
        raise ValueError(f"model={name!r}: no such file")
    return from_config(name)


def machine_of(name: str) -> Machine:
    """A machine of the catalog, or this one. FileNotFoundError where this one was not calibrated."""
    if name != "this":
        return catalog.machine(name)
    from clawdemy_infer.calibrate import from_record, kept_record

    if record := kept_record():
        return from_record(record)
    raise FileNotFoundError("machine=this has no kept calibration; run `clawdemy-infer calibrate` first")


# ---- what runs the model ----


def generate(args: argparse.Namespace) -> int:
    from clawdemy_infer import model
    from clawdemy_infer.calibrate import default_device
    from clawdemy_infer.quantization import is_quantized, load_quantized, running
    from clawdemy_infer.speculative import draft_named, speculate

    sampling = model.Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)  # refused before the model is loaded
    if is_quantized(args.model):
        if args.weights != "fp32":
            raise ValueError(f"weights={args.weights!r}: {args.model} is quantized already; leave it out")
        if args.compile:
            raise ValueError("compile: a model whose weights are floats is accepted; this one is quantized already")
        loaded = decoder = running(load_quantized(args.model))
    else:
        loaded = model.load_model(args.model, device=default_device())
        decoder = model.compiled(loaded, args.weights) if args.compile else model.with_weights(loaded, args.weights)
    prompt = args.prompt
    if args.chat:
        if decoder.tokenizer is None:
            raise ValueError("chat: this model has no tokenizer, and so no chat template")
        prompt = decoder.tokenizer.chat([{"role": "user", "content": prompt}])
    more = {"stop": args.stop, "cache": args.cache, "on_token": None if args.json else lambda piece: print(piece, end="", flush=True)}
    if args.draft:
        # A copy in fewer bits is made of the weights as they were; the others read what the model itself computes.
        draft = draft_named(args.draft, loaded if args.draft.startswith("int") else decoder)
        result = speculate(decoder, prompt, draft, args.max_tokens, sampling, gamma=args.gamma, **more)
    else:
        result = model.generate(decoder, prompt, args.max_tokens, sampling, **more)
    if args.json:
        rounds = {"rounds": [each._asdict() for each in result.rounds]} if args.draft else {}
        compiling = {"compile_s": decoder.compile_s} if args.compile else {}
        emit(vars(result) | {"prompt_tokens": len(result.prompt_tokens)} | rounds | compiling)
    else:
        print(flush=True)
        if args.compile:
            say(f"compiled in {si(decoder.compile_s, 's')}, before the clock of the rest began")
        say(f"{len(result.prompt_tokens)} prompt tokens, {len(result.tokens)} generated (ended by: {result.finish_reason}); "
            f"TTFT {si(result.ttft_s, 's')}, TPOT {si(result.tpot_s, 's')}")
        if args.draft:
            drafted, accepted = sum(len(each.drafted) for each in result.rounds), sum(each.accepted for each in result.rounds)
            say(f"{len(result.rounds)} rounds after the first token: {accepted} of {drafted} drafted tokens were accepted")
    return 130 if result.finish_reason == "interrupted" else 0


def course(args: argparse.Namespace) -> int:
    from clawdemy_infer.course import main

    return main(args.json)
