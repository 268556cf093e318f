"""`quantize`: fewer bits for each weight, into a directory that serving engines load."""

from clawdemy_infer.cli import arguments
from clawdemy_infer.cli.arguments import Args, UsageError, checked, command, count, idle, option
from clawdemy_infer.cli.output import answer
from clawdemy_infer.lesson.tables import Table, si

SEQUENCES = {"rtn": 0, "gptq": 12, "awq": 4}
"""Ways to round, and their sequences of calibration text: AWQ fits few numbers, in many runs."""


def add(subparsers) -> None:
    c = command(subparsers, "quantize", run, "Store the weights of a model in fewer bits, in a "
                "directory that serving engines load.",
                "--method gptq --bits 4 --group 64 --act-order --out tiny-int4",
                "--method awq --group 64 --out tiny-awq")
    arguments.model_option(c)
    option(c, "--out DIR", "a new directory for the quantized model", required=True)
    option(c, "--method", "how to round", tuple(SEQUENCES), "gptq")
    option(c, "--bits N", "of a code: 2, 3, 4 or 8", count, 4, choices=(2, 3, 4, 8))
    option(c, "--group G", "neighbouring weights that share a scale, or `row`", group, 64)
    option(c, "--symmetric", "no zero points", bool, True)
    option(c, "--act-order", "gptq: columns with large inputs first", bool, True)
    option(c, "--layout", "of the file (default: awq for 4-bit awq, else gptq)", ("gptq", "awq"))
    option(c, "--calibration FILE", "a text (default: prose that comes with Python)",
           arguments.text_file)
    option(c, "--sequences N", "of the calibration text (default: 12 for gptq, 4 for awq)", count)
    option(c, "--length T", "tokens of a sequence", count, 512)
    option(c, "--seed N", "which places of the calibration text", int, 0)


def run(args: Args) -> int:
    from clawdemy_infer import quantization
    from clawdemy_infer.rigs.checkpoint import can_save, layout_for, save_quantized
    from clawdemy_infer.rigs.text import calibration_tokens
    from clawdemy_infer.timing import now

    # 1. What is asked for; what cannot be saved is refused before the work.
    method = f"with --method {args.method}"
    idle(args, args.method != "gptq", method, "--act-order", "--no-act-order")
    idle(args, args.method == "rtn", method, "--calibration", "--sequences", "--length", "--seed")
    with checked():
        zero = "none" if args.symmetric else "integer"
        format = quantization.IntFormat(args.bits, args.group, zero)
        layout = args.layout or layout_for(args.method.upper(), format)
    model = arguments.load(args.model)
    with checked():
        for linear in quantization.linears(model).values():
            format.width(linear.weight.shape[1])
        can_save(model, format, args.out, layout)
        if args.method != "rtn":
            if model.tokenizer is None:
                raise UsageError("", "model", args.model, "one with a tokenizer, or --method rtn")
            tokens = calibration_tokens(model.tokenizer, args.sequences or SEQUENCES[args.method],
                                        args.length, args.seed, args.calibration)
    # 2. The work.
    start = now()
    if args.method == "rtn":
        quantized = quantization.round_to_nearest(model, format)
    elif args.method == "awq":
        quantized = quantization.awq(model, tokens, format, progress=True)
    else:
        quantized = quantization.gptq(model, tokens, format, act_order=args.act_order,
                                      progress=True)
    seconds = now() - start
    out = save_quantized(quantized, args.out, layout)
    bits, stored = quantized.bits_per_weight, (out / "model.safetensors").stat().st_size
    answer(args.json, {"out": str(out), "method": quantized.method, "format": format.name,
                       "layout": layout, "bits_effective": bits, "bytes": stored,
                       "matrix_bytes": quantized.matrix_bytes, "seconds": seconds},
           Table(("", "value", "what it means"), [
               ("method", f"{quantized.method}, {format.name}", f"as {layout}, in {out}"),
               ("effective bits", f"{bits:.3f}",
                "of a weight of the layers, with its share of scales and zero points"),
               ("stored", si(stored, "B"), f"of which {si(quantized.matrix_bytes, 'B')} for the "
                "layers' matrices; the rest is in fp16"),
               ("time", si(seconds, "s"), "to quantize")]),
           f"`clawdemy-infer evaluate {out}` says what it cost in quality.")
    return 0


def group(text: str) -> int | None:
    return None if text == "row" else count(text)
