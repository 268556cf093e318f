"""`evaluate`: what quantization cost in quality; with `--table`, every format by every method."""

import functools
import sys
import zlib
from pathlib import Path

from clawdemy_infer.cli import arguments
from clawdemy_infer.cli.arguments import Args, UsageError, checked, command, count, option
from clawdemy_infer.cli.output import answer, say
from clawdemy_infer.from_config.keys import read_object
from clawdemy_infer.lesson.ledger import today, versions
from clawdemy_infer.lesson.tables import Table


def add(subparsers) -> None:
    c = command(subparsers, "evaluate", run,
                "Say how far a quantized model is from the one it was made of.",
                "tiny-int4", "--table my_table.jsonl")
    option(c, "directory", "a quantized model", nargs="?", metavar="DIR")
    option(c, "--table FILE", "instead, every format by every method, some ten minutes; rows are "
           "kept in FILE as they come, and not judged again", nargs="?", const="")
    option(c, "--reference M", "the model it was made of (default: the one that DIR names)")
    option(c, "--text FILE", "a text to judge by (default: prose that comes with Python)",
           arguments.text_file)
    option(c, "--sequences N", "of that text (default: 8; 4 for --table)", count)
    option(c, "--length T", "tokens of a sequence", count, 512)


def run(args: Args) -> int:
    from clawdemy_infer.rigs.checkpoint import is_quantized, load_quantized
    from clawdemy_infer.rigs.quality import Reference
    if args.table is not None:
        return table(args)
    if not args.directory or not is_quantized(args.directory):
        raise UsageError("", "directory", args.directory or ..., "a quantized model's, or --table")
    quantized = load_quantized(args.directory)
    name = args.reference or read_object(Path(args.directory) / "config.json").get("_name_or_path")
    if not name or not isinstance(name, str):
        raise UsageError("", "reference", ..., f"what {args.directory} was made of")
    model, tokens = reference(args, name, sequences=8)
    if (theirs := model.config.shape.V) != (ours := quantized.decoder.config.shape.V):
        raise UsageError("", "reference", name, f"what {args.directory} was made of, with {ours} "
                         f"tokens, not {theirs}")
    say(f"Comparing {args.directory} with {name} on {tokens.numel():,} tokens …")
    judge = Reference(model, tokens)
    quality, its_own = judge.judge(quantized.decoder), judge.quality.perplexity
    answer(args.json, {"kl": quality.kl, "kl_se": quality.kl_se, "perplexity": quality.perplexity,
                       "top1": quality.top1, "reference": name, "reference_perplexity": its_own,
                       "tokens": tokens.numel(), "bits_effective": quantized.bits_per_weight},
           Table(("", "value", "what it means"), [
               ("KL divergence", f"{quality.kl:.4f} ± {quality.kl_se:.4f}",
                f"from {name}, in nats for each token; 0 is the same model"),
               ("perplexity", f"{quality.perplexity:.2f}", f"{name}: {its_own:.2f}"),
               ("top-1 agreement", f"{quality.top1:.1%}",
                "of the tokens that both find likeliest")]))
    return 0


def reference(args: Args, name: str, sequences: int):
    """The model to compare with, and the tokens to compare on."""
    from clawdemy_infer.rigs.text import evaluation_tokens
    model, sequences = arguments.load(name, "reference"), args.sequences or sequences
    with checked():
        return model, evaluation_tokens(model.tokenizer, sequences, args.length, args.text)


def table(args: Args) -> int:
    from tqdm import tqdm

    from clawdemy_infer.fast.cpp import cpu_name
    from clawdemy_infer.rigs import quantization_table as kept
    from clawdemy_infer.rigs.quality import Reference
    from clawdemy_infer.rigs.text import calibration_tokens

    # 1. What the file has already, if it is of the same model and text.
    if args.directory is not None:
        raise UsageError("", "directory", args.directory, "none: --table makes its own models")
    name = args.reference or "smollm2-135m"
    model, tokens = reference(args, name, sequences=4)
    text = (f"{tokens.shape[0]} sequences of {tokens.shape[1]} tokens, "
            f"crc32 {zlib.crc32(tokens.numpy().tobytes()):08x}")
    source = {"command": "clawdemy-infer evaluate --table", "model": name, "text": text,
              "machine": cpu_name(), "date": today(), **versions()}
    rows = []
    if args.table and Path(args.table).exists():
        before, rows = kept.read_table(args.table)
        if unlike := [key for key in ("model", "text") if before.get(key) != source[key]]:
            raise UsageError(args.table, unlike[0], before.get(unlike[0]),
                             f"{source[unlike[0]]!r}, or a new file")
        source = before
    # 2. The rest.
    done = {(row.method, row.format) for row in rows}
    left = [cell for cell in kept.cells() if (cell.method, cell.format) not in done]
    judge = Reference(model, tokens) if left else None
    calibration = functools.cache(
        lambda sequences: calibration_tokens(model.tokenizer, sequences, args.length))
    with tqdm(left, desc="table", unit="row") as bar:
        for cell in bar:
            bar.set_postfix_str(f"{cell.method} {cell.format}")
            rows.append(cell.make(judge, calibration))
            kl, se = rows[-1].quality.kl, rows[-1].quality.kl_se
            bar.write(f"{cell.method} {cell.format}: KL {kl:.4f} ± {se:.4f}", file=sys.stderr)
            if args.table:
                kept.write_table(args.table, source, rows)
    answer(args.json, {"source": source, "rows": [kept.row_to_json(row) for row in rows]},
           kept.quantization_table(rows),
           "KV cache: weights in fp32; bits and bytes are those of the cache of one sequence.")
    return 0
