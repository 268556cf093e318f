"""`bench --drafts`: speculative beside plain decoding, draft by draft and text by text, and `transformers` on the same prompts."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from math import isnan
from statistics import mean

from clawdemy_infer.commands import emit, say, show
from clawdemy_infer.tables import MISSING, Table, number, si

CONTEXT = 64
"""Tokens behind which the parts are timed."""
SIZES, COMPILED = (1, 2, 3, 5, 9), (1, 2, 5)
"""Rows of a check that are timed, and those that there is code for: 3 then cost what 5 do, and 9 are read layer by layer. Where γ
adapts, a check has no more rows than the last."""


def beside_drafts(args: argparse.Namespace) -> int:
    """First what the parts of a round should cost and do; then plain and speculative decoding in turn, greedily and at temperature 1."""
    from clawdemy_infer.calibrate import default_device, this_machine
    from clawdemy_infer.model import Sampling, compiled, load_model
    from clawdemy_infer.speculative import theory
    from clawdemy_infer.speculative.adaptive import Adaptive
    from clawdemy_infer.speculative.beside_transformers import transformers_rows
    from clawdemy_infer.speculative.compare import compare, measure_costs
    from clawdemy_infer.speculative.drafts import draft_named
    from clawdemy_infer.speculative.prediction import predict_costs
    from clawdemy_infer.speculative.prompts import prompts_of
    from clawdemy_infer.timing import now

    say("Looking at this machine; up to two minutes if it must be calibrated …")
    device = default_device()
    machine, model = this_machine(device), load_model(args.model, device=device)
    sizes = sorted({*SIZES, 4, 6}) if args.compile else SIZES
    if args.compile:
        model = compiled(model, rows=COMPILED)
    start = now()
    drafts = {name: draft_named(name, model) for name in args.drafts}
    compile_s = model.compile_s + now() - start if args.compile else 0.0
    prompts, directory = prompts_of(model), weights_directory(args.model)
    card, found, theirs, notes, arithmetic = [], [], [], [], []
    for mode, sampling in (("greedy", Sampling()), ("T = 1", Sampling(temperature=1.0, seed=1))):
        said = predict_costs(machine, model, drafts, CONTEXT, sizes, sampling=sampling)
        timed = measure_costs(model, drafts, CONTEXT, sizes, sampling=sampling)
        shares = [(f"a check of {rows} tokens", said.v(rows), timed.v(rows)) for rows in sizes[1:]]
        shares += [(f"a step of {name}", said.c(name), timed.c(name)) for name in drafts]
        card += [{"mode": mode, "part": part, "predicted": predicted, "timed": took} for part, predicted, took in shares]
        show(Table((mode, "predicted", "timed"), [(part, number(predicted), number(took)) for part, predicted, took in shares],
                   ("predicted", "timed")),
             f"All in plain steps: {si(said.reading[1], 's')} predicted, {si(timed.reading[1], 's')} timed.", stderr=args.json)
        most = args.gamma or sizes[-1] - 1
        guessing = drafts if args.gamma else {name: Adaptive(draft, timed.c(name), timed.v, most) for name, draft in drafts.items()}
        rows = compare(model, guessing, prompts, timed, most, args.tokens, sampling, repeats=args.rounds)
        # Memory may be faster by now than it was: what is predicted of the rows is the mean of before and after.
        both = said, predict_costs(machine, model, drafts, CONTEXT, sizes, sampling=sampling)
        for name in drafts:
            rounds = [each for row in rows if row.draft == name and row.prompt != "copying" for each in row.rounds]
            arithmetic.append({"mode": mode, "draft": name} | at_best(theory.mean_acceptance(rounds), timed.c(name), timed.v, most))
        for row in rows:
            say(f"{mode}, {row.draft} on {row.prompt}: {row.measured:.2f} ×")
            found.append({
                "mode": mode, "draft": row.draft, "prompt": row.prompt, "gamma": args.gamma or "adaptive",
                "alpha": None if isnan(row.alpha) else row.alpha,
                "alpha_by_position": theory.acceptance(row.rounds), "drafted_per_round": row.drafted_per_round,
                "tokens_per_round": row.tokens_per_round, "c": timed.c(row.draft),
                "predicted": mean(theory.speedup_of(row.rounds, each.c(row.draft), each.v) for each in both),
                "from_parts": row.predicted, "measured": row.measured,
                "identical": row.identical, "plain_s": row.plain_s, "tokens": row.tokens,
            })
        if directory:
            say("transformers …")
            for row in transformers_rows(directory, prompts, model.config.eos_ids, args.gamma or 4, args.tokens, sampling, args.rounds):
                plain = next(each for each in found if (each["mode"], each["prompt"]) == (mode, row.prompt))
                same = row.tokens == plain["tokens"] if mode == "greedy" else None
                theirs.append({"mode": mode, **asdict(row), "identical": same, "ours_plain_s": plain["plain_s"]})
    changed = any(row["identical"] is False for row in found)
    if changed:
        notes.append("WARNING: greedy tokens with a draft are not those of plain decoding.")
    if args.compile:
        notes.append(f"Target and drafts ran compiled code, for which {si(compile_s, 's')} were spent.")
    if not args.json:
        show(ours_table(found), arithmetic_table(arithmetic), *([theirs_table(theirs)] if theirs else []), *notes)
    emit({"machine": machine.name, "model": model.config.shape.name, "context": CONTEXT, "tokens": args.tokens, "compile_s": compile_s,
          "card": card, "rows": found, "arithmetic": arithmetic, "transformers": theirs, "notes": notes})
    return 1 if changed else 0


def ours_table(rows: list[dict]) -> Table:
    columns = ("α", "tokens a round", "c", "predicted", "from its parts", "measured", "predicted ÷ measured")
    return Table(("", "text", "draft", *columns, "same tokens"),
                 [(row["mode"], row["prompt"], row["draft"], MISSING if row["alpha"] is None else number(row["alpha"]),
                   number(row["tokens_per_round"]), number(row["c"]),
                   *(f"{row[key]:.2f} ×" for key in ("predicted", "from_parts", "measured")),
                   number(row["predicted"] / row["measured"]), _yes(row["identical"])) for row in rows], columns)


def at_best(alpha: float, c: float, v, most: int) -> dict:
    """What the theory leaves at this α (NaN where nothing was drafted), c and v, with the γ that is best there."""
    from clawdemy_infer.speculative import theory

    alpha = 0.0 if isnan(alpha) else alpha
    gamma = theory.best_gamma(alpha, c, v, most)
    return {"alpha": alpha, "c": c, "gamma": gamma, "v": v(gamma + 1), "tokens_per_round": theory.expected_tokens(alpha, gamma),
            "speedup": theory.speedup(alpha, gamma, c, v(gamma + 1))}


def arithmetic_table(rows: list[dict]) -> Table:
    columns = ("α", "best γ", "tokens a round", "c", "v", "tokens / (γ c + v)")
    return Table(("", "draft", *columns),
                 [(row["mode"], row["draft"], number(row["alpha"]), str(row["gamma"]), number(row["tokens_per_round"]), number(row["c"]),
                   number(row["v"]), f"{row['speedup']:.2f} ×") for row in rows], columns,
                 title="What the parts leave room for on code, prose and chat together")


def theirs_table(rows: list[dict]) -> Table:
    columns = ("seconds a token", "over its own plain", "our plain ÷ this")
    names = {"": "transformers, plain", "lookup": "transformers, lookup", "bf16": "transformers, bf16 assistant"}
    return Table(("", "text", "", *columns, "our tokens"),
                 [(row["mode"], row["prompt"], names[row["draft"]], si(row["tpot_s"], "s"), f"{row['speedup']:.2f} ×",
                   number(row["ours_plain_s"] / row["tpot_s"]), _yes(row["identical"])) for row in rows], columns)


def _yes(same: bool | None) -> str:
    return MISSING if same is None else "yes" if same else "NO"


def weights_directory(model: str):
    """Where `transformers` finds these weights; None if nowhere."""
    from clawdemy_infer.peers.contestants import weights_of

    try:
        return weights_of(model)[0]
    except ValueError:
        return None
