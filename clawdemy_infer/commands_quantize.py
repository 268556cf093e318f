"""`quantize`: fewer bits for each weight, into a directory that serving engines load. `evaluate`: what that cost in quality, or
with `--table` what every format costs by every method."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import zlib
from pathlib import Path

from clawdemy_infer.commands import emit, say, show
from clawdemy_infer.ledger import today, versions
from clawdemy_infer.tables import Table, si

METHODS = {"rtn": 0, "gptq": 12, "awq": 4}
"""Ways to round, and the sequences of calibration text that each takes: AWQ fits few numbers, and runs each block many times."""

CACHES_NOTE = ("KV cache: the weights stay in fp32; bits of a number in the cache, and bytes of the cache of one sequence, with what is "
               "not rounded yet.")


def add_quantize_arguments(c: argparse.ArgumentParser, count) -> None:
    """The options of `quantize`; `count` reads a whole number."""
    c.add_argument("--out", required=True, metavar="DIR", help="a new directory for the quantized model")
    c.add_argument("--method", choices=[*METHODS], default="gptq", help="(default: gptq)")
    c.add_argument("--bits", type=count, choices=(2, 3, 4, 8), default=4, help="of a code (default: 4)")
    c.add_argument("--group", type=lambda text: None if text == "row" else count(text), default=64, metavar="G",
                   help="neighbouring weights that share a scale, or `row` (default: 64)")
    c.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=True, help="no zero points (default)")
    c.add_argument("--format", metavar="F", help="instead of bits, group and symmetric, a format by name: nf4, mxfp4, nvfp4, fp8-e4m3, …")
    c.add_argument("--act-order", action=argparse.BooleanOptionalAction, default=True,
                   help="gptq: columns with large inputs first, groups of neighbours all the same (default)")
    c.add_argument("--layout", choices=("gptq", "awq", "packed"),
                   help="of the file (default: awq for awq in 4 bits, gptq for other integers; packed, which we alone read, for the rest)")
    c.add_argument("--calibration", metavar="FILE", help="a text (default: prose that comes with Python)")
    c.add_argument("--sequences", type=count, metavar="N", help="of the calibration text (default: 12 for gptq, 4 for awq)")
    c.add_argument("--length", type=count, default=512, metavar="T", help="tokens of a sequence (default: 512)")
    c.add_argument("--seed", type=int, default=0, help="which places of the calibration text (default: 0)")


def add_evaluate_arguments(c: argparse.ArgumentParser, count) -> None:
    """The options of `evaluate`; `count` reads a whole number."""
    c.add_argument("directory", nargs="?", metavar="DIR", help="a quantized model")
    c.add_argument("--table", nargs="?", const="", metavar="FILE",
                   help="instead, every format by every method: some ten minutes. Rows are kept in FILE as they come, and what it has is "
                        "not judged again")
    c.add_argument("--timed", action="store_true", help="with --table: also the time of a token, predicted and measured, where "
                                                        "there is a fast kernel")
    c.add_argument("--reference", metavar="M", help="the model it was made of (default: the one that DIR names; smollm2-135m for --table)")
    c.add_argument("--text", metavar="FILE", help="a text to judge by (default: prose that comes with Python)")
    c.add_argument("--sequences", type=count, metavar="N", help="of that text (default: 8; 4 for --table)")
    c.add_argument("--length", type=count, default=512, metavar="T", help="tokens of a sequence (default: 512)")


def quantize(args: argparse.Namespace) -> int:
    from clawdemy_infer.model import load_model
    from clawdemy_infer.quantization import IntFormat, awq, calibration_tokens, format_named, gptq, linears, round_to_nearest
    from clawdemy_infer.quantization.checkpoint import can_save, layout_for, save_quantized
    from clawdemy_infer.timing import now

    format = format_named(args.format) if args.format else IntFormat(args.bits, args.group, "none" if args.symmetric else "integer")
    layout = args.layout or layout_for(args.method.upper(), format)
    model = load_model(args.model)
    for linear in linears(model).values():                              # what cannot be saved is refused before the work
        try:
            format.width(linear.weight.shape[1])
        except ValueError as error:
            said = str(error).removeprefix(f"{format.name}: ")
            raise ValueError(f"format={args.format}: {said}" if args.format else said) from error
    can_save(model, format, args.out, layout)
    tokens = None
    if args.method != "rtn":
        if model.tokenizer is None:
            raise ValueError(f"model={args.model!r}: it has no tokenizer, so no text can be read to calibrate {args.method}")
        tokens = calibration_tokens(model.tokenizer, args.sequences or METHODS[args.method], args.length, args.seed,
                                    _text("calibration", args.calibration))
    start = now()
    if args.method == "rtn":
        quantized = round_to_nearest(model, format)
    elif args.method == "gptq":
        quantized = gptq(model, tokens, format, act_order=args.act_order, progress=True)
    else:
        quantized = awq(model, tokens, format, progress=True)
    seconds = now() - start
    out = save_quantized(quantized, args.out, layout)
    stored = (out / "model.safetensors").stat().st_size
    result = {"out": str(out), "method": quantized.method, "format": format.name, "layout": layout,
              "bits_effective": quantized.bits_per_weight, "bytes": stored, "matrix_bytes": quantized.matrix_bytes, "seconds": seconds}
    if args.json:
        emit(result)
    else:
        show(Table(("", "value", "what it means"), [
            ("method", f"{quantized.method}, {format.name}", f"in the {layout} layout, in {out}"),
            ("effective bits", f"{quantized.bits_per_weight:.3f}", "of a weight of the layers, with its share of scales and zero points"),
            ("stored", si(stored, "B"), f"of which {si(quantized.matrix_bytes, 'B')} for the layers' matrices; the rest is in fp16"),
            ("time", si(seconds, "s"), "to quantize"),
        ]), f"`clawdemy-infer evaluate {out}` says what it cost in quality.")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    from clawdemy_infer.quantization import Reference, evaluation_tokens
    from clawdemy_infer.quantization.checkpoint import load_quantized

    if args.table is not None:
        return evaluate_table(args)
    if args.timed:
        raise ValueError("timed: only --table has times; `clawdemy-infer bench` times models")
    if args.directory is None:
        raise ValueError("directory: name that of a quantized model, or ask for --table")
    quantized = load_quantized(args.directory)
    name = args.reference or json.loads((Path(args.directory) / "config.json").read_text("utf-8")).get("_name_or_path")
    if not name:
        raise ValueError(f"reference: {args.directory} does not say what it was made of; name that model")
    model = _reference(name)
    if (theirs := model.config.shape.V) != (ours := quantized.decoder.config.shape.V):
        raise ValueError(f"reference={name!r}: it has {theirs} tokens and {args.directory} {ours}; the model it was made of is accepted")
    tokens = evaluation_tokens(model.tokenizer, args.sequences or 8, args.length, _text("text", args.text))
    say(f"Comparing {args.directory} with {name} on {tokens.numel():,} tokens …")
    reference = Reference(model, tokens)
    quality = reference.judge(quantized.decoder)
    if args.json:
        emit({"kl": quality.kl, "kl_se": quality.kl_se, "perplexity": quality.perplexity, "top1": quality.top1, "reference": name,
              "reference_perplexity": reference.quality.perplexity, "tokens": tokens.numel(), "bits_effective": quantized.bits_per_weight})
    else:
        show(Table(("", "value", "what it means"), [
            ("KL divergence", f"{quality.kl:.4f} ± {quality.kl_se:.4f}", f"from {name}, in nats for each token; 0 is the same model"),
            ("perplexity", f"{quality.perplexity:.2f}", f"{name}: {reference.quality.perplexity:.2f}"),
            ("top-1 agreement", f"{quality.top1:.1%}", "of the tokens that both find likeliest"),
        ]))
    return 0


def evaluate_table(args: argparse.Namespace) -> int:
    """Every format by every method, a row at a time."""
    if args.directory is not None:
        raise ValueError(f"directory={args.directory!r}: --table makes its own models; leave one of the two out")
    from tqdm import tqdm

    from clawdemy_infer.quantization import Reference, calibration_tokens, evaluation_tokens, kept
    from clawdemy_infer.quantization.grid import cells
    from clawdemy_infer.quantization.report import table, untimed

    name = args.reference or "smollm2-135m"
    model = _reference(name)
    tokens = evaluation_tokens(model.tokenizer, args.sequences or 4, args.length, _text("text", args.text))
    source, rows = _source(name, tokens), []
    if args.table and Path(args.table).exists():
        before, rows = kept.read(args.table)
        if unlike := [key for key in ("model", "text") if before.get(key) != source[key]]:
            raise ValueError(f"table={args.table!r}: its {unlike[0]} is {before.get(unlike[0])!r}, and now it would be "
                             f"{source[unlike[0]]!r}; a new file, or the same settings, are accepted")
        source = before
    done = {(row.method, row.format) for row in rows}
    left = [cell for cell in cells() if (cell.method, cell.format) not in done]
    reference = Reference(model, tokens) if left else None
    calibration = functools.cache(lambda sequences: calibration_tokens(model.tokenizer, sequences, args.length))
    with tqdm(left, desc="table", unit="row") as bar:
        for cell in bar:
            bar.set_postfix_str(f"{cell.method} {cell.format}")
            rows.append(cell.make(reference, calibration))
            bar.write(f"{cell.method} {cell.format}: KL {rows[-1].quality.kl:.4f} ± {rows[-1].quality.kl_se:.4f}", file=sys.stderr)
            if args.table:
                kept.write(args.table, source, rows)
    if args.timed:
        from clawdemy_infer.calibrate import this_machine
        from clawdemy_infer.quantization.clock import timed

        machine = this_machine("cpu")
        rows = list(timed(tqdm(rows, desc="times", unit="row"), model, machine))
        source |= {"timed_on": machine.name, "timed": today()}
        if args.table:
            kept.write(args.table, source, rows)
    if not args.json:
        show(table(rows), *untimed(rows), CACHES_NOTE)
    emit({"source": source, "rows": [kept.as_dict(row) for row in rows]})
    return 0


def _source(name: str, tokens) -> dict:
    """Where a table comes from: what must be the same for two rows to be compared, and what is good to know."""
    from clawdemy_infer.cpp import cpu_name

    digest = f"{tokens.shape[0]} sequences of {tokens.shape[1]} tokens, crc32 {zlib.crc32(tokens.numpy().tobytes()):08x}"
    return {"command": "clawdemy-infer evaluate --table", "model": name, "text": digest, "machine": cpu_name(), "date": today(),
            **versions()}


def _reference(name: str):
    """The model `name`; what is wrong with the name is said of --reference, the option that gave it."""
    from clawdemy_infer.model import load_model

    try:
        return load_model(name)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(str(error).replace(f"model={name!r}", f"reference={name!r}")) from error


def _text(name: str, file: str | None) -> Path | None:
    if file is not None and not Path(file).is_file():
        raise ValueError(f"{name}={file!r}: no such file")
    return None if file is None else Path(file)
