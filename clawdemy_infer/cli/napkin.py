"""`napkin`: what a model costs on a machine, worked out before anything runs."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from clawdemy_infer.arithmetic import BYTES, Format, ModelShape
from clawdemy_infer.cli import arguments
from clawdemy_infer.cli.arguments import Args, UsageError, checked, command, count, idle, option
from clawdemy_infer.cli.by_hand import card_blocks, ways
from clawdemy_infer.cli.output import answer, table_of
from clawdemy_infer.envelope.napkin import card, sweep
from clawdemy_infer.envelope.parallel import Layout
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.from_config import catalog, from_config, stated_formats
from clawdemy_infer.lesson.tables import Table


def add(subparsers) -> None:
    c = command(subparsers, "napkin", run,
                "Work out, before anything runs, what a model costs on a machine.",
                "--model llama-3-8b --machine this --batch 4 --context 4096",
                "--model mixtral-8x7b --machine h100-sxm --tp 2 --ep 4 --weights fp8 --batch 64",
                "--model llama-3.1-70b --machine h100-sxm --tp 8 --context 4096 --sweep batch",
                "--compare llama-3-8b,qwen3-8b --machine h100-sxm,rtx-4090,apple-m4-max-40c",
                notes=[f"models: {', '.join(catalog.model_names())}",
                       f"machines: {', '.join(catalog.machine_names())}, this"])
    option(c, "--model M", "a model of the catalog, or the path of a config.json")
    option(c, "--compare M1,M2", "more models, to set side by side", [str], [])
    option(c, "--machine X", "of the catalog, or `this`: yours, once calibrated; several are set "
           "side by side", [str], required=True)
    option(c, "--batch B", "sequences", count, 1)
    option(c, "--context S", "tokens a sequence holds at the decode step", arguments.tokens, 1024)
    option(c, "--prompt T", "tokens of the prompt (default: the context)", arguments.tokens)
    option(c, "--weights F", f"of the weights: {', '.join(BYTES)} (default: as the file of the "
           "model says, else bf16)", tuple(BYTES))
    option(c, "--kv F", "of the KV cache, one of the same, with the same default", tuple(BYTES))
    option(c, "--activations", "computed in (default: as the weights, or bf16 for fewer bits)",
           ("fp32", "bf16", "fp16", "fp8", "int8"))
    option(c, "--tp N", "devices that share every matrix: tensor parallel", count, 1)
    option(c, "--pp N", "devices that share the layers: pipeline parallel", count, 1)
    option(c, "--ep N", "devices that share the experts and the batch: expert parallel", count, 1)
    option(c, "--sweep", "a row for each batch, or for each context, until it does not fit",
           ("batch", "context"))


def run(args: Args) -> int:
    idle(args, args.sweep, f"with --sweep {args.sweep}", f"--{args.sweep}")
    options = {name: getattr(args, name) for name in ("batch", "context", "prompt", "activations")}
    options["layout"] = Layout(args.tp, args.pp, args.ep)
    with checked():
        if not args.model and not args.compare:
            raise UsageError("", "model", ..., "one, or several with --compare")
        models = [model_of(name, args.weights, args.kv)
                  for name in [*filter(None, [args.model]), *args.compare]]
        pairs = list(product(models, [machine_of(name) for name in args.machine]))
        if args.sweep:
            rows = [row for (shape, formats), machine in pairs
                    for row in sweep(shape, machine, args.sweep, **options | formats)]
        else:
            rows = [card(shape, machine, **options | formats)
                    for (shape, formats), machine in pairs]
    if args.sweep:
        answer(args.json, {"sweep": args.sweep, "rows": rows}, table(rows, args.sweep))
    elif len(rows) == 1:
        answer(args.json, rows[0], *card_blocks(rows[0], models[0][0]))
    else:
        answer(args.json, {"cards": rows}, table(rows))
    enough = any if args.sweep else all
    return 0 if enough(row["fits"] for row in rows) else 1


def shape_of(name: str) -> ModelShape:
    """A model of the catalog, or the one that a config.json describes."""
    if not name.endswith(".json"):
        return catalog.model(arguments.there(name))
    if not Path(name).exists():
        raise UsageError("", "model", name, "a config.json that exists")
    return from_config(name)


def model_of(name: str, weights: str | None,
             kv: str | None) -> tuple[ModelShape, dict[str, Format]]:
    """The model, and its formats of weights and cache: the options', else the file's."""
    shape, said = shape_of(name), ("bf16", "bf16")
    if name.endswith(".json") and not (weights and kv):
        said = stated_formats(name, shape)
    return shape, {"weights": weights or said[0], "kv": kv or said[1]}


def machine_of(name: str) -> Machine:
    """A machine of the catalog, or this one. FileNotFoundError if this one was not calibrated."""
    if name != "this":
        return catalog.machine(name)
    from clawdemy_infer.machine.calibrate import from_record, kept_record
    if record := kept_record():
        return from_record(record)
    raise FileNotFoundError("machine=this has no kept calibration; "
                            "run `clawdemy-infer calibrate` first")


def table(rows: Sequence[dict], swept: str = "") -> Table:
    """Cards, or rows of sweeps, a line each."""
    lines = []
    for row in rows:
        devices = row["layout"]["devices"]
        many = f" × {devices}, {ways(row['layout'])}" if devices > 1 else ""
        lines.append(row | row.get("decode", {}) | {
            "on": row["machine"] + many, "prefill_s": row.get("prefill", {}).get("seconds")})
    return table_of(lines, {"model": "model", "on": "on"} | ({swept: swept} if swept else {}) | {
        "weight_bytes": "weights", "kv_bytes": "KV cache", "fits": "fits", "max_batch": "max batch",
        "prefill_s": "prefill", "seconds": "a token", "bound": "bound",
        "tokens_per_s_per_user": "tokens/s each", "tokens_per_s": "tokens/s",
        "dollars_per_million_tokens": "$ a million"})
