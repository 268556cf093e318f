"""`bench --drafts`: speculative beside plain decoding, draft by draft and text by text."""

from math import isnan
from statistics import mean

from clawdemy_infer.cli.arguments import Args, calibrated, checked, count, draft, option, running
from clawdemy_infer.cli.output import answer, say, show, table_of
from clawdemy_infer.lesson.tables import si

CONTEXT, SIZES = 64, (1, 2, 3, 5, 9)
"""Tokens behind which the parts of a round are timed, and rows of a check that are. Where γ adapts,
a check has no more rows than the last."""
DRAFTS = ["lookup", "int8", "int4", "trained"]


def add(bench) -> None:
    group = bench.add_argument_group("drafts, instead of ours")
    option(group, "--drafts LIST", f"decode with {', '.join(DRAFTS)} and without, in turn, on "
           "texts of four kinds", [draft], nargs="?", const=DRAFTS)
    option(group, "--gamma N", "tokens drafted at a time (default: as many as pay, up to 8)", count)
    option(group, "--tokens N", "tokens generated for each text", count, 40)


def run(args: Args) -> int:
    from clawdemy_infer.model import Sampling
    from clawdemy_infer.rigs.compare_drafts import compare_drafts, measure_costs, predict_costs
    from clawdemy_infer.rigs.prompts import prompts_of
    from clawdemy_infer.speculative import theory
    from clawdemy_infer.variants.adaptive import Adaptive
    from clawdemy_infer.variants.self_drafts import draft_named
    model = running(args)
    machine, prompts = calibrated(model.device.type), prompts_of(model)
    with checked():
        drafts = {name: draft_named(name, model) for name in args.drafts}
    most = args.gamma or SIZES[-1] - 1
    card, found = [], []
    for mode, sampling in (("greedy", Sampling()), ("T = 1", Sampling(temperature=1.0, seed=1))):
        # 1. The parts of a round, predicted and timed, in steps of plain decoding.
        said = predict_costs(machine, model, drafts, CONTEXT, SIZES, sampling=sampling)
        timed = measure_costs(model, drafts, CONTEXT, SIZES, sampling=sampling)
        parts = [(f"a check of {rows} tokens", said.v(rows), timed.v(rows)) for rows in SIZES[1:]]
        parts += [(f"a step of {name}", said.c(name), timed.c(name)) for name in drafts]
        card += [{"mode": mode, "part": part, "predicted": predicted, "timed": took}
                 for part, predicted, took in parts]
        show(table_of(card[-len(parts):], "mode part predicted timed"),
             f"All in plain steps: {si(said.seconds[1], 's')} predicted, "
             f"{si(timed.seconds[1], 's')} timed.", stderr=args.json)
        # 2. Whole texts. Memory may be faster by now than it was: what is predicted of them is the
        #    mean of before and after.
        guessing = drafts if args.gamma else {
            name: Adaptive(each, timed.c(name), timed.v, most) for name, each in drafts.items()}
        rows = compare_drafts(model, guessing, prompts, timed, most, args.tokens, sampling,
                              repeats=args.rounds)
        both = said, predict_costs(machine, model, drafts, CONTEXT, SIZES, sampling=sampling)
        for row in rows:
            say(f"{mode}, {row.draft} on {row.prompt}: {row.measured:.2f} ×")
            predicted = mean(theory.speedup_of(row.rounds, each.c(row.draft), each.v)
                             for each in both)
            found.append({
                "mode": mode, "draft": row.draft, "prompt": row.prompt,
                "gamma": args.gamma or "adaptive", "alpha": None if isnan(row.alpha) else row.alpha,
                "tokens_per_round": row.tokens_per_round, "c": timed.c(row.draft),
                "predicted": predicted, "measured": row.measured, "ratio": row.measured / predicted,
                "identical": row.identical, "plain_s": row.plain_s, "tokens": row.tokens})
    changed = any(row["identical"] is False for row in found)
    notes = ["WARNING: greedy tokens with a draft are not those of plain decoding."] * changed
    answer(args.json, {"machine": machine.name, "model": model.config.shape.name, "card": card,
                       "context": CONTEXT, "tokens": args.tokens, "rows": found, "notes": notes},
           table_of(found, "mode prompt draft alpha tokens_per_round c predicted measured ratio "
                    "identical"), *notes)
    return 1 if changed else 0
