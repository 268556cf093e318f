"""The command `bench`: what the roofline allows, then what the clock says; with `--breakdown`, where the time of a step goes."""

from __future__ import annotations

import argparse
from itertools import product

from clawdemy_infer.commands import PHASES, emit, say, show
from clawdemy_infer.paper import bounds_table, breakdown_table, rows_table
from clawdemy_infer.tables import si

BUSY = 0.15
"""A spread above this says that something else ran on the machine."""


def bench(args: argparse.Namespace) -> int:
    import psutil

    load = psutil.getloadavg()[0]           # before we add to it ourselves
    from clawdemy_infer.bench import SLOW, card, errors, measure
    from clawdemy_infer.breakdown import breakdown
    from clawdemy_infer.calibrate import default_device, this_machine
    from clawdemy_infer.linear import computes_in
    from clawdemy_infer.model import load_model

    device = default_device()
    for weights in args.weights:
        computes_in(weights, device)        # refuses what the device has no kernel for
    say("Looking at this machine; up to two minutes if it must be calibrated …")
    machine = this_machine(device)
    for weights in args.weights:
        if weights not in machine.peak_flops:
            raise ValueError(f"weights={weights!r}: {machine.name} is calibrated for {', '.join(machine.peak_flops)}")
    if args.compile and args.breakdown and "decode" in args.phase and 1 in args.batch:
        raise ValueError("batch=1: compiled, the parts of such a step are one; other batches are accepted, or no --compile")
    model = load_model(args.model, device=device, weights=args.weights[0], compile=args.compile)
    compile_s = {args.weights[0]: model.compile_s}
    shape = model.config.shape
    wanted = [(phase, weights, batch, context) for weights, phase in product(args.weights, args.phase)
              for batch, context in product(args.batch, args.context or PHASES[phase])]
    longest = max(context for *_, context in wanted)
    if shape.max_context and longest > shape.max_context:
        raise ValueError(f"context={longest}: the model's context is {shape.max_context}")

    memory = machine.memory if device == "cuda" else min(machine.memory, psutil.virtual_memory().available)
    allowed = card(shape, machine, memory, wanted, device)
    show(bounds_table(allowed, shape, machine), stderr=args.json)
    rows, parts = [], []
    for weights in args.weights:
        feasible = [row for row in allowed if row["weights"] == weights and row["fits"]]
        if feasible and model.weights != weights:
            del model                       # before the next one takes its place
            model = load_model(args.model, device=device, weights=weights, compile=args.compile)
            compile_s[weights] = model.compile_s
        for row in measure(model, machine, feasible):
            say(f"{row.phase} {row.weights} B={row.batch} S={row.context}: {si(row.measured_s, 's')}")
            rows.append(row)
            if args.breakdown:
                parts.append((row, breakdown(model, machine, row.phase, row.batch, row.context)))

    notes = [f"{row['phase']} in {row['weights']} of batch {row['batch']:,} and context {row['context']:,} was not timed: it needs "
             f"{si(row['memory_bytes'], 'B')}, and there are {si(memory, 'B')}." for row in allowed if not row["fits"]]
    slow = [row for row in rows if row.speed < SLOW]
    if slow:
        notes.append(f"WARNING: during {len(slow)} of {len(rows)} rows the machine ran at {min(row.speed for row in slow):.0%} of its "
                     "calibrated speed or little more: something else runs on it. One other process makes a decode step several times "
                     "slower, since each product waits for its slowest thread. End it and measure again.")
    if load > 0.5 or any(row.spread > BUSY for row in rows):
        notes.append(f"The machine is busy (load average {load:.1f} at the start, spread of a row up to "
                     f"{max((row.spread for row in rows), default=0):.0%}): trust these figures less.")
    if any(row.fraction_of_bound > 1 for row in rows):
        notes.append("A row is faster than its bound, which cannot be: the machine was slower while it was calibrated. Calibrate again.")
    notes += losers(rows)
    if args.compile:
        notes.append("Compiled code was run, for which its seconds were: "
                     + ", ".join(f"{weights} {si(seconds, 's')}" for weights, seconds in compile_s.items()) + ".")
    off = errors(rows) if rows else {}
    if not args.json:
        print()
        show(rows_table(rows), *(breakdown_table(row, of) for row, of in parts), *notes)
        if off:
            show(f"Prediction of {off['rows']} rows: median error {off['median']:.0%}, worst {off['worst']:.0%} ({off['worst_row']}).")
    result = {"card": {"model": shape.name, "machine": machine.name, "memory_bytes": memory, "bandwidth": machine.bandwidth_at(),
                       "peak_flops": machine.peak_flops, "fixed_s_per_op": machine.fixed_s_per_op, "rows": allowed},
              "rows": [row.as_dict() for row in rows], "notes": notes, "errors": off}
    if args.compile:
        result["compile_s"] = compile_s
    if args.breakdown:
        result["breakdown"] = [{"phase": row.phase, "weights": row.weights, "batch": row.batch, "context": row.context,
                                "parts": [vars(part) | {"residual_s": part.residual_s} for part in of]} for row, of in parts]
    emit(result)
    return 0 if rows else 1


def losers(rows: list) -> list[str]:
    """A sentence for each row that took longer than the same work with fp32 weights."""
    at = {(row.phase, row.batch, row.context): row.measured_s for row in rows if row.weights == "fp32"}
    slower = [(row, row.measured_s / fp32) for row in rows
              if (fp32 := at.get((row.phase, row.batch, row.context))) and row.measured_s > fp32]
    return [f"{row.weights} loses here: {row.phase} of batch {row.batch:,} and context {row.context:,} takes {times:.2f} times as long "
            "as with fp32 weights." for row, times in slower]
