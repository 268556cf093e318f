"""Cards, calibrations and benchmarks on paper: tables that a person can follow by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clawdemy_infer.arithmetic import ModelShape, element_bytes
from clawdemy_infer.roofline import Machine
from clawdemy_infer.tables import MISSING, Table, number, si


def card_on_paper(c: dict, shape: ModelShape) -> list[Table | str]:
    """The card of `napkin.card`: each term with its formula, its figures and its result."""
    S, T, B, layout = c["context"], c["prompt"], c["batch"], c["layout"]
    devices = f", {layout['devices']} of them: {_ways(layout)}" if layout["devices"] > 1 else ""
    letters = ", ".join(f"{letter} = {getattr(shape, letter):,}" for letter in "LDNKHFV" if getattr(shape, letter))
    plain = shape.gated and not (shape.moe or shape.mla or shape.ssm or any("shared" in kind for kind in shape.kinds))
    formula = " = L·(D·(N + 2K)·H + N·H·D + 3·D·F)" if plain else ""
    experts = f"; E = {shape.moe.experts:,} experts, k = {shape.moe.active} for each token" if shape.moe else ""
    blocks: list[Table | str] = [
        f"{c['model']} on {c['machine']}{devices}: batch B = {B:,}, context S = {S:,}, prompt T = {T:,}; "
        f"weights {c['weights']}, KV {c['kv']}\n"
        f"{letters}{experts}; P = {c['parameters']:,} parameters; "
        f"a token meets w{formula} = {shape.matrix_parameters():,} in matrices",
    ]
    if shape.max_context and max(S, T) > shape.max_context:
        blocks.append(f"Note: this model was made for contexts of up to {shape.max_context:,} tokens.")
    blocks += [_memory(c, shape), *_waits(c), _work(c), _time(c)]
    if not c["fits"]:
        blocks.append("It does not fit, so no times are given: they would be of a run that cannot happen.")
    elif c["left_bytes"] < 0:
        blocks.append("Note: it fits by weights and cache alone. With activations and half-empty blocks it does not: take a smaller batch.")
    if c["fixed_s_per_op"]:
        blocks.append(f"Not in these times: {si(c['fixed_s_per_op'], 's')} for each operation that the software starts.")
    return blocks


def _ways(layout: dict) -> str:
    """tp = 8, pp = 2."""
    return ", ".join(f"{name} = {layout[name]}" for name in ("tp", "pp", "ep") if layout[name] > 1)


def _waits(c: dict) -> list[str]:
    """Which part of the work several devices wait for."""
    cuts = {"tp": "1/tp of every matrix, of the heads and of the vocabulary",
            "pp": "the stages one after another, with B/pp sequences, so that all of them are busy",
            "ep": "B/ep sequences, and 1/ep of the experts for the tokens of all"}
    done = [cut for name, cut in cuts.items() if c["layout"][name] > 1]
    return [f"A step's work, below, is what one waits for: {'; '.join(done)}.\n"
            f"Every device is taken to reach every other by {c['link']['kind']}."] if done else []


def _memory(c: dict, shape: ModelShape) -> Table:
    """Capacity, first of the model and then, where there are several, of the fullest device."""
    several = c["layout"]["devices"] > 1
    kept, state = shape.kept_tokens(max(c["context"], c["prompt"])), shape.state_bytes(c["kv"])
    per_weight, per_token = c["total_weight_bytes"] / c["parameters"], c["kv_bytes_per_token"]
    per_kv = element_bytes("kv", c["kv"])
    formula, figures = "per token", f"{per_token:,.0f} B"
    if per_token == 2 * shape.L * shape.K * shape.H * per_kv:           # every layer caches alike
        formula, figures = "2·L·K·H × bytes", f"2·{shape.L}·{shape.K}·{shape.H} × {per_kv:g} B"
    tokens, mean = (f"{kept:,.0f}", "") if kept == int(kept) else (f"{kept:,.1f}", ", mean of the layers,")
    most = f"the largest batch that fits is {c['max_batch']:,}" if c["max_batch"] else "not even one sequence fits"
    rows = [
        ("weights", "P × bytes", f"{c['parameters']:,} × {per_weight:g} B", si(c["total_weight_bytes"], "B")),
        ("KV cache", f"{formula} × tokens kept{mean} × B", f"{figures} × {tokens} × {c['batch']:,}",
         si(c["total_kv_bytes"] - c["batch"] * state, "B")),
    ]
    if state:
        rows.append(("states", "per sequence × B", f"{si(state, 'B')} × {c['batch']:,}", si(c["batch"] * state, "B")))
    if several:
        rows += [("weights of one", "the fullest device: a share of every layer that it has, and a table", "", si(c["weight_bytes"], "B")),
                 ("KV cache of one", "its layers, its KV heads, its sequences", "", si(c["kv_bytes"], "B"))]
    rows += [
        ("together", f"{'fits' if c['fits'] else 'DOES NOT FIT'}; {most}", f"of {si(c['memory_bytes'], 'B')}",
         si(c["weight_bytes"] + c["kv_bytes"], "B")),
        ("activations", "rows × (D, and in and out of the widest matrix) × bytes",
         f"{c['activation_rows']:,} × {c['activation_bytes'] / c['activation_rows']:,.0f} B", si(c["activation_bytes"], "B")),
        ("paging", "half a block of 16 tokens for each sequence", "", si(c["paging_bytes"], "B")),
        ("left", "for more batch or context", "", si(max(0, c["left_bytes"]), "B")),
    ]
    return Table(("memory", "by hand", "", " "), rows, numeric=("", " "))


def _work(c: dict) -> Table:
    """FLOPs and bytes of both phases, part by part."""
    w = "(w − experts)" if "experts" in c["decode"]["parts"] else "w"
    formulas = {
        "matrices": (f"2·{w}·B·T (decode: T = 1)", f"{w} × bytes, and what goes in and out"),
        "experts": ("2 × k experts × B·T", "E·(1 − (1 − k/E)^(B·T)) experts × bytes"),
        "attention": ("4·L·N·H × pairs that see each other × B", "K and V once per KV head, Q, output"),
        "state space": ("7 for each state × B·T", "the states in and out"),
        "head": ("2·D·V·B", "D·V × bytes, and what goes in and out"),
        "element-wise": (MISSING, "norms, RoPE, gate, residual"),
    }

    def cost(term: dict) -> tuple[str, str]:
        return si(term["flops"], "FLOP") if term["flops"] else MISSING, si(term["bytes"], "B")

    rows = [(name, *formulas[name], *cost(c["prefill"]["parts"][name]), *cost(c["decode"]["parts"][name])) for name in c["decode"]["parts"]]
    header = ("work of a step", "FLOPs by hand", "bytes by hand", "prefill FLOPs", "bytes", "decode FLOPs", "bytes ")
    return Table(header, [*rows, ("together", "", "", *cost(c["prefill"]), *cost(c["decode"]))], numeric=header[3:])


def _time(c: dict) -> Table:
    peak, bandwidth = si(c["peak_flops"], "FLOP/s"), si(c["bandwidth"], "B/s")

    def both(formula: Callable[[dict], str]) -> tuple[str, str]:
        return formula(c["prefill"]), formula(c["decode"])

    rows = [("intensity", "FLOPs / bytes", *both(lambda phase: number(phase["intensity"]))),
            ("ridge", f"{peak} / {bandwidth}", *both(lambda _: number(c["ridge"])))]
    if c["fits"]:
        rows += [("bound", "intensity above the ridge: compute; below: memory", *both(lambda phase: phase["bound"])),
                 ("compute", f"FLOPs / {peak}", *both(lambda phase: si(phase["compute_s"], "s"))),
                 ("memory", f"bytes / {bandwidth}", *both(lambda phase: si(phase["memory_s"], "s")))]
        transfers = list(zip(c["prefill"]["transfers"], c["decode"]["transfers"], strict=True))
        for prefill, decode in transfers:
            rows += [(prefill["name"], _transfer(decode, c), si(prefill["seconds"], "s"), si(decode["seconds"], "s")),
                     ("  bytes of a call", "B·T·D × bytes" + (" × k" if prefill["name"] == "all-to-all" else ""),
                      si(prefill["bytes"], "B"), si(decode["bytes"], "B"))]
        rows += [("time", "the larger of the two" + (", and what devices tell one another" if transfers else ""),
                  *both(lambda phase: si(phase["seconds"], "s"))),
                 ("tokens/s", "B / time", "", number(c["tokens_per_s"]))]
        if c["dollars_per_hour"]:
            rows.append(("a million tokens", f"${c['dollars_per_hour']:,.2f} an hour (list price, {c['priced']}) / 3,600 s / tokens/s", "",
                         f"${c['dollars_per_million_tokens']:,.2f}"))
        if c["watts"]:
            rows.append(("energy of a token", f"at most {c['watts']:,.0f} W / tokens/s", "", f"{number(c['joules_per_token'])} J"))
    return Table(("time of a step", "by hand", "prefill", "decode"), rows, numeric=("prefill", "decode"))


def _transfer(one: dict, c: dict) -> str:
    """Calls × (what a call costs + steps × (what a step costs + bytes / link)), as `parallel` counts them."""
    link = c["link"]
    steps, part = {
        "all-reduce": (2 * (c["layout"]["tp"] - 1), f" / {c['layout']['tp']}"),
        "all-to-all": (c["layout"]["ep"] - 1, f" / {c['layout']['ep']}"),
        "send": (1, ""),
    }[one["name"]]
    return (f"{one['calls']:,} × ({si(link['latency_s'], 's')} + {steps} × ({si(link['hop_s'], 's')} + "
            f"bytes{part} / {si(link['bytes_per_s'], 'B/s')}))")


def _on(c: dict) -> str:
    """The machine, and how many of it."""
    return c["machine"] + (f" × {c['layout']['devices']}, {_ways(c['layout'])}" if c["layout"]["devices"] > 1 else "")


def _dollars(c: dict) -> str:
    return f"{c['dollars_per_million_tokens']:,.2f}" if c["dollars_per_million_tokens"] else MISSING


def sweep_table(rows: Sequence[dict]) -> Table:
    """The frontier of `napkin.sweep`, or of several of them one after the other."""
    return _table({
        "model": [row["model"] for row in rows], "on": [_on(row) for row in rows],
        "batch": [f"{row['batch']:,}" for row in rows], "context": [f"{row['context']:,}" for row in rows],
        "fits": ["yes" if row["fits"] else "NO" for row in rows],
        "a token": [si(row["seconds"], "s") for row in rows],
        "tokens/s of a user": [si(row["tokens_per_s_per_user"]) for row in rows],
        "tokens/s in all": [si(row["tokens_per_s"]) for row in rows],
        "bound": [row["bound"] or MISSING for row in rows],
        "$ a million": [_dollars(row) for row in rows],
    })


def compare_tables(cards: Sequence[dict]) -> list[Table]:
    """Several cards, a line each: what they need, then how long they take."""
    def of(name: str, unit: str) -> list[str]:
        return [si(c[name], unit) for c in cards]

    who = {"model": [c["model"] for c in cards], "on": [_on(c) for c in cards]}
    phases = {f"{phase}{name}": [text(c[phase]) for c in cards] for phase in ("prefill", "decode") for name, text in {
        "": lambda p: si(p["seconds"], "s"), " bound": lambda p: p["bound"] or MISSING,
        " communication": lambda p: si(p["communication_s"] or None, "s")}.items()}
    return [
        _table(who | {
            "parameters, 10⁹": [number(c["parameters"] / 1e9) for c in cards],
            "active": [number(c["active_parameters"] / 1e9) if c["active_parameters"] < c["parameters"] else MISSING for c in cards],
            "weights": of("weight_bytes", "B"), "KV of a token": of("kv_bytes_per_token", "B"), "KV cache": of("kv_bytes", "B"),
            "memory": of("memory_bytes", "B"), "fits": ["yes" if c["fits"] else "NO" for c in cards],
            "largest batch": [f"{c['max_batch']:,}" for c in cards],
        }),
        _table(who | phases | {"tokens/s": of("tokens_per_s", ""), "$ a million": [_dollars(c) for c in cards]}),
    ]


def _table(columns: dict[str, list[str]]) -> Table:
    """Columns without those that say nothing."""
    columns = {name: cells for name, cells in columns.items() if set(cells) != {MISSING}}
    numeric = [name for name in columns if name not in ("model", "on", "fits") and "bound" not in name]
    return Table(list(columns), list(zip(*columns.values(), strict=True)), numeric)


def calibration_on_paper(record: dict) -> list[Table | str]:
    """What `calibrate` measured: a curve a table."""
    dtypes = list(record["peak_flops"])

    def curve(kernel: str, rows: str) -> Table:
        rates = {(point["m"], point["dtype"]): si(point["flops_per_s"], "FLOP/s") for point in record[kernel]}
        known = [dtype for dtype in dtypes if any(dtype == of for _, of in rates)]
        body = [(f"{m:,}", *(rates[m, dtype] for dtype in known)) for m in sorted({m for m, _ in rates})]
        return Table((rows, *known), body, numeric=(rows, *known))

    header = ("working set", "read bandwidth")
    return [
        f"{record['name']}, {si(record['memory'], 'B')} of memory",
        Table(header, [(si(point["bytes"], "B"), si(point["bytes_per_s"], "B/s")) for point in record["bandwidth"]], numeric=header),
        curve("gemm", "matrix product, rows M"),
        curve("head", "very wide matrix product, rows M"),
        curve("attention", "attention, query rows to a KV head"),
        f"peak: {', '.join(f'{dtype} ' + si(peak, 'FLOP/s') for dtype, peak in record['peak_flops'].items())}\n"
        f"fixed cost: {si(record['fixed_s_per_op'], 's')} for each operation",
    ]


def bounds_table(rows: Sequence[dict], shape: ModelShape, machine: Machine) -> Table:
    """What the roofline allows, before anything is timed."""
    peaks = ", ".join(f"{si(machine.peak(dtype), 'FLOP/s')} in {dtype}" for dtype in dict.fromkeys(row["weights"] for row in rows))
    header = ("phase", "weights", "batch", "context", "memory", "FLOPs", "bytes", "FLOPs/byte", "bound", "napkin")
    body = [(row["phase"], row["weights"], f"{row['batch']:,}", f"{row['context']:,}", si(row["memory_bytes"], "B"),
             si(row["flops"], "FLOP"), si(row["bytes"], "B"), number(row["intensity"]),
             row["bound"] if row["fits"] else "DOES NOT FIT", si(row["napkin_s"], "s"))
            for row in rows]
    return Table(header, body, numeric=[name for name in header if name not in ("phase", "weights", "bound")],
                 title=f"{shape.name} on {machine.name}: {si(machine.bandwidth_at(), 'B/s')}, {peaks}")


def rows_table(rows: Sequence) -> Table:
    """Measured beside the napkin and the calibrated roofline, for `bench.BenchRow`s."""
    header = ("phase", "weights", "batch", "context", "napkin", "calibrated", "measured", "spread", "÷ calibrated", "of the bound")
    body = [(row.phase, row.weights, f"{row.batch:,}", f"{row.context:,}", si(row.napkin_s, "s"), si(row.predicted_s, "s"),
             si(row.measured_s, "s"), f"± {row.spread:.0%}", f"{row.ratio:.2f}", f"{row.fraction_of_bound:.0%}") for row in rows]
    return Table(header, body, numeric=header[2:])


def breakdown_table(row, parts: Sequence) -> Table:
    """The `breakdown.Part`s of one `bench.BenchRow`, whose run they took apart a second time."""
    header = ("part", "FLOPs", "bytes", "calibrated", "measured", "bytes/s", "FLOP/s", "residual")
    body = [(part.name, si(part.flops, "FLOP"), si(part.bytes, "B"), si(part.predicted_s, "s"), si(part.measured_s, "s"),
             si(part.bytes / part.measured_s, "B/s"), si(part.flops / part.measured_s, "FLOP/s") if part.flops else "",
             si(part.residual_s, "s")) for part in parts]
    whole, said = sum(part.measured_s for part in parts), sum(part.predicted_s for part in parts)
    body.append(("all", "", "", si(said, "s"), si(whole, "s"), "", "", si(whole - said, "s")))
    return Table(header, body, numeric=header[1:],
                 title=f"{row.phase} in {row.weights}, batch {row.batch:,}, context {row.context:,}")
