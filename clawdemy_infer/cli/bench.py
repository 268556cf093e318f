"""`bench`: what the roofline allows, then what the clock says; with `--breakdown`, where the time
of a step goes. With `--peers` or `--kernels` something else is measured instead."""

from itertools import product
from operator import itemgetter

from clawdemy_infer.cli import arguments, bench_kernels, bench_peers
from clawdemy_infer.cli.arguments import RUNS_IN, Args, UsageError, command, count, idle, option
from clawdemy_infer.cli.output import answer, say, show, table_of
from clawdemy_infer.lesson.tables import si

CONTEXTS = {"prefill": [64, 256, 1024], "decode": [64, 512, 1024]}
"""By phase, the contexts that are timed unless told."""
ROWS = "--phase", "--weights", "--batch", "--context"
OURS, PEERS = ("--coverage", "--breakdown"), ("--workloads", "--rounds")
"""Options that say which steps are timed, and those of one kind of benchmark alone."""


def add(subparsers) -> None:
    c = command(subparsers, "bench", run, "Time prefill and decode of the real model beside what "
                "was predicted, or beside other engines.",
                "--phase prefill,decode --weights fp32,bf16 --batch 1 --context 64,512",
                "--phase decode --weights bf16,int8,int4 --batch 1,8 --compile",
                "--peers llama.cpp --weights int4,int8 --workloads decode-1,prefill-512 --compile",
                "--coverage", "--kernels --checks --json")
    ours = c.add_argument_group("ours")
    arguments.model_option(ours)
    option(ours, "--phase LIST", "prefill, decode", [tuple(CONTEXTS)], [*CONTEXTS])
    option(ours, "--weights LIST", ", ".join(RUNS_IN), [RUNS_IN], ["fp32", "bf16"])
    option(ours, "--batch LIST", "sequences", [count], [1])
    option(ours, "--context LIST", "tokens (default: three of each phase)", [arguments.tokens])
    option(ours, "--coverage", "instead: twenty settings that no probe used, and how many of them "
           "are inside the interval of their prediction", bool)
    option(ours, "--breakdown", "also say where the time of each step goes", bool)
    arguments.compile_option(ours)
    for instead in (bench_peers, bench_kernels):
        instead.add(c)


def run(args: Args) -> int:
    kernels, peers = args.kernels or args.checks, args.peers is not None
    idle(args, kernels, "with --kernels", *ROWS, *OURS, *PEERS, "--peers", "--model", "--compile")
    idle(args, not kernels, "without --kernels", "--machine")
    idle(args, peers, "with --peers", "--phase", "--batch", "--context", *OURS)
    idle(args, not peers, "without --peers", *PEERS)
    idle(args, args.coverage, "with --coverage", *ROWS)
    if kernels:
        return bench_kernels.run(args)
    return bench_peers.run(args) if peers else ours(args)


def ours(args: Args) -> int:
    import psutil
    load_average = psutil.getloadavg()[0]       # before we add to it ourselves
    from clawdemy_infer.lesson.parts import StepOf
    from clawdemy_infer.machine.present import default_device
    from clawdemy_infer.rigs.bench import HELD_OUT, bounds, measure, prediction_errors

    # 1. What is asked for, refused before anything is timed.
    device = default_device()
    wanted = HELD_OUT if args.coverage else [
        (phase, weights, batch, context) for weights, phase in product(args.weights, args.phase)
        for batch, context in product(args.batch, args.context or CONTEXTS[phase])]
    args.weights = list(dict.fromkeys(weights for _, weights, _, _ in wanted))
    machine = arguments.calibrated(device, args.weights)
    if unknown := [weights for weights in args.weights if weights not in machine.peak_flops]:
        raise UsageError("", "weights", unknown[0], f"{', '.join(machine.peak_flops)}, for which "
                         f"{machine.name} is calibrated")
    if args.compile and args.breakdown and device == "cuda":
        raise UsageError("", "compile", True, "none with --breakdown: a recording has no clocks")
    model = arguments.running(args, args.weights[0])
    shape = model.config.shape
    if shape.max_context and (longest := max(row[-1] for row in wanted)) > shape.max_context:
        raise UsageError("", "context", longest, f"at most {shape.max_context}, as the model has")
    # 2. What the roofline allows, and what does not fit.
    available = machine.memory if device == "cuda" else psutil.virtual_memory().available
    memory = min(machine.memory, available)
    allowed = bounds(shape, machine, memory, wanted, device)
    peaks = ", ".join(f"{si(machine.peak(weights), 'FLOP/s')} in {weights}"
                      for weights in args.weights)
    show(table_of(allowed, "phase weights batch context memory_bytes flops bytes intensity bound "
                  "napkin_s fits", f"{shape.name} on {machine.name}: "
                  f"{si(machine.bandwidth_at(), 'B/s')}, {peaks}"), stderr=args.json)
    # 3. What the clock says.
    rows, parts, compile_s = [], [], {}
    for weights in args.weights:
        feasible = [row for row in allowed if row["weights"] == weights and row["fits"]]
        if feasible and model.weights != weights:
            del model                           # before the next one takes its place
            model = arguments.running(args, weights)
        if args.compile:
            compile_s[model.weights] = model.runner.compile_s
        for row in measure(model, machine, feasible):
            say("{phase} {weights} B={batch} S={context}: ".format(**row)
                + si(row["measured_s"], "s"))
            rows.append(row)
            if args.breakdown:
                found = StepOf(model, row["phase"], row["batch"], row["context"]).parts(machine)
                rest = {"name": "not explained", "measured_s": found.rest_s}
                parts.append(row | {"parts": [*found, rest], "whole_s": found.whole_s,
                                    "watching_s": found.watching_s})

    notes = notes_on(rows, allowed, memory, load_average)
    if args.compile:
        took = ", ".join(f"{weights} {si(seconds, 's')}" for weights, seconds in compile_s.items())
        notes.append(f"Compiled code was run, for which its seconds were: {took}.")
    off = prediction_errors(rows) if rows else {}
    said = [f"Prediction of {off['rows']} rows: median error {off['median']:.0%}, worst "
            f"{off['worst']:.0%} ({off['worst_row']}). {off['coverage']:.0%} of the measurements "
            f"are inside their interval, which is ±{off['width']:.0%} wide."] if off else []
    result = {"card": {"model": shape.name, "machine": machine.name, "memory_bytes": memory,
                       "bandwidth": machine.bandwidth_at(), "peak_flops": machine.peak_flops,
                       "fixed_s_per_op": machine.fixed_s_per_op, "rows": allowed},
              "rows": rows, "notes": notes, "errors": off}
    result |= {"compile_s": compile_s} if args.compile else {}
    result |= {"breakdown": parts} if args.breakdown else {}
    answer(args.json, result, "",
           table_of(rows, "phase weights batch context napkin_s predicted_s "
                    "predicted_low_s predicted_high_s measured_s spread inside fraction_of_bound"),
           *(table_of(each["parts"], "name napkin_s predicted_s measured_s",
                      "{phase} in {weights}, batch {batch:,}, context {context:,}".format(**each))
             for each in parts), *notes, *said)
    return 0 if rows else 1


def notes_on(rows: list, allowed: list[dict], memory: float, load_average: float) -> list[str]:
    notes = [f"{row['phase']} in {row['weights']} of batch {row['batch']:,} and context "
             f"{row['context']:,} was not timed: it needs {si(row['memory_bytes'], 'B')}, and "
             f"there are {si(memory, 'B')}." for row in allowed if not row["fits"]]
    spread = max((row["spread"] for row in rows), default=0)
    if load_average > 0.5 or spread > 0.15:
        notes.append(f"The machine is busy (load average {load_average:.1f} at the start, spread "
                     f"of a row up to {spread:.0%}): trust these figures less.")
    if any(row["fraction_of_bound"] > 1 for row in rows):
        notes.append("A row is faster than its bound, which cannot be: the machine was slower "
                     "while it was calibrated. Calibrate again.")
    step = itemgetter("phase", "batch", "context")
    fp32 = {step(row): row["measured_s"] for row in rows if row["weights"] == "fp32"}
    for row in rows:
        times = row["measured_s"] / fp32.get(step(row), row["measured_s"])
        if times > 1:
            notes.append("{weights} loses here: {phase} of batch {batch:,} and context {context:,} "
                         "takes {times:.2f} times as long as with fp32 weights."
                         .format(times=times, **row))
    return notes
