"""The card of `napkin` as a sheet to follow by hand: each term's formula, figures and result."""

from clawdemy_infer.arithmetic import ModelShape, element_bytes
from clawdemy_infer.lesson.tables import MISSING, Table, number, si

WAITS = {
    "tp": "1/tp of every matrix, of the heads and of the vocabulary",
    "pp": "the stages one after another, with B/pp sequences, so that all of them are busy",
    "ep": "B/ep sequences, and 1/ep of the experts for the tokens of all"}
"""What a step waits for where several devices share the work, by the way they share it."""


def card_blocks(c: dict, shape: ModelShape) -> list[Table | str]:
    """The sheet of one card of `envelope.napkin`."""
    S, T, B, layout = c["context"], c["prompt"], c["batch"], c["layout"]
    devices = f", {layout['devices']} of them: {ways(layout)}" if layout["devices"] > 1 else ""
    letters = ", ".join(f"{letter} = {getattr(shape, letter):,}" for letter in "LDNKHFV"
                        if getattr(shape, letter))
    plain = shape.gated and not (shape.moe or shape.mla or shape.ssm
                                 or any("shared" in kind for kind in shape.kinds))
    formula = " = L·(D·(N + 2K)·H + N·H·D + 3·D·F)" if plain else ""
    experts = (f"; E = {shape.moe.experts:,} experts, k = {shape.moe.active} for each token"
               if shape.moe else "")
    blocks: list[Table | str] = [
        f"{c['model']} on {c['machine']}{devices}: batch B = {B:,}, context S = {S:,}, "
        f"prompt T = {T:,}; weights {c['weights']}, KV {c['kv']}\n"
        f"{letters}{experts}; P = {c['parameters']:,} parameters; "
        f"a token meets w{formula} = {shape.matrix_parameters():,} in matrices"]
    if parts := c["weights_of_parts"]:
        own = {name.partition(" ")[0] for name in shape.numbers()}
        said = ", ".join(f"{part} {parts[part]:.4g} B" for part in parts if part in own)
        blocks.append(f"Formats as the file says: {said} a weight, all else as without a method.")
    if shape.max_context and max(S, T) > shape.max_context:
        blocks.append(f"Note: it was made for contexts of up to {shape.max_context:,} tokens.")
    blocks.append(_memory(c, shape))
    if shared := [cut for name, cut in WAITS.items() if layout[name] > 1]:
        blocks.append(f"A step's work, below, is what one waits for: {'; '.join(shared)}.\n"
                      f"Every device is taken to reach every other by {c['link']['kind']}.")
    blocks += [_work(c), _time(c)]
    if not c["fits"]:
        blocks.append("It does not fit, so no times are given: it cannot run.")
    elif c["left_bytes"] < 0:
        blocks.append("Note: it fits by weights and cache alone. With activations and half-empty "
                      "blocks it does not: take a smaller batch.")
    if c["fixed_s_per_op"]:
        blocks.append(f"Not in these times: {si(c['fixed_s_per_op'], 's')} for each operation "
                      "that the software starts.")
    return blocks


def ways(layout: dict) -> str:
    """tp = 8, pp = 2."""
    return ", ".join(f"{name} = {layout[name]}" for name in WAITS if layout[name] > 1)


def _memory(c: dict, shape: ModelShape) -> Table:
    """Capacity, first of the model and then, where there are several, of the fullest device."""
    per_weight, per_token = c["total_weight_bytes"] / c["parameters"], c["kv_bytes_per_token"]
    per_kv, B, state = element_bytes("kv", c["kv"]), c["batch"], shape.state_bytes(c["kv"])
    kept = (c["total_kv_bytes"] / B - state) / per_token if per_token else 0
    formula, figures = "per token", f"{per_token:,.0f} B"
    if per_token == 2 * shape.L * shape.K * shape.H * per_kv:           # every layer caches alike
        formula, figures = "2·L·K·H × bytes", f"2·{shape.L}·{shape.K}·{shape.H} × {per_kv:g} B"
    tokens, mean = f"{kept:,.0f}", ""
    if kept != int(kept):
        tokens, mean = f"{kept:,.1f}", ", mean of the layers,"
    most = (f"the largest batch that fits is {c['max_batch']:,}" if c["max_batch"]
            else "not even one sequence fits")
    rows = [("weights", "P × bytes", f"{c['parameters']:,} × {per_weight:g} B",
             c["total_weight_bytes"]),
            ("KV cache", f"{formula} × tokens kept{mean} × B", f"{figures} × {tokens} × {B:,}",
             c["total_kv_bytes"] - B * state)]
    if state:
        rows.append(("states", "per sequence × B", f"{si(state, 'B')} × {B:,}", B * state))
    if c["layout"]["devices"] > 1:
        rows += [("weights of one",
                  "the fullest device: a share of every layer that it has, and a table", "",
                  c["weight_bytes"]),
                 ("KV cache of one", "its layers, its KV heads, its sequences", "", c["kv_bytes"])]
    rows += [("together", f"{'fits' if c['fits'] else 'DOES NOT FIT'}; {most}",
              f"of {si(c['memory_bytes'], 'B')}", c["weight_bytes"] + c["kv_bytes"]),
             ("activations", "rows × (D, and in and out of the widest matrix) × bytes",
              f"{c['activation_rows']:,} × {c['activation_bytes'] / c['activation_rows']:,.0f} B",
              c["activation_bytes"]),
             ("paging", "half a block of 16 tokens for each sequence", "", c["paging_bytes"]),
             ("left", "for more batch or context", "", max(0, c["left_bytes"]))]
    return Table(("memory", "by hand", "", " "),
                 [(*words, si(bytes, "B")) for *words, bytes in rows], numeric=("", " "))


def _work(c: dict) -> Table:
    w = "(w − experts)" if "experts" in c["decode"]["parts"] else "w"
    formulas = {
        "matrices": (f"2·{w}·B·T (decode: T = 1)", f"{w} × bytes, and what goes in and out"),
        "experts": ("2 × k experts × B·T", "E·(1 − (1 − k/E)^(B·T)) experts × bytes"),
        "attention": ("4·L·N·H × pairs that see each other × B",
                      "K and V once per KV head, Q, output"),
        "state space": ("7 for each state × B·T", "the states in and out"),
        "head": ("2·D·V·B", "D·V × bytes, and what goes in and out"),
        "element-wise": (MISSING, "norms, RoPE, gate, residual")}

    def cost(term: dict) -> tuple[str, str]:
        return si(term["flops"], "FLOP") if term["flops"] else MISSING, si(term["bytes"], "B")

    rows = [(name, *formulas[name], *cost(c["prefill"]["parts"][name]), *cost(part))
            for name, part in c["decode"]["parts"].items()]
    rows.append(("together", "", "", *cost(c["prefill"]), *cost(c["decode"])))
    header = ("work of a step", "FLOPs by hand", "bytes by hand", "prefill FLOPs", "bytes",
              "decode FLOPs", "bytes ")
    return Table(header, rows, numeric=header[3:])


def _time(c: dict) -> Table:
    peak, bandwidth = si(c["peak_flops"], "FLOP/s"), si(c["bandwidth"], "B/s")
    phases = c["prefill"], c["decode"]

    def both(field: str, unit: str = "s", of: tuple[dict, dict] = phases) -> list[str]:
        return [si(each[field], unit) for each in of]

    rows = [("intensity", "FLOPs / bytes", *both("intensity", "")),
            ("ridge", f"{peak} / {bandwidth}", *[number(c["ridge"])] * 2)]
    if c["fits"]:
        rows += [("bound", "intensity above the ridge: compute; below: memory",
                  *(phase["bound"] for phase in phases)),
                 ("compute", f"FLOPs / {peak}", *both("compute_s")),
                 ("memory", f"bytes / {bandwidth}", *both("memory_s"))]
        transfers = list(zip(*(phase["transfers"] for phase in phases), strict=True))
        for pair in transfers:
            name, k = pair[1]["name"], " × k" if pair[1]["name"] == "all-to-all" else ""
            rows += [(name, _transfer(pair[1], c), *both("seconds", of=pair)),
                     ("  bytes of a call", f"B·T·D × bytes{k}", *both("bytes", "B", pair))]
        told = ", and what devices tell one another" if transfers else ""
        rows += [("time", f"the larger of the two{told}", *both("seconds")),
                 ("tokens/s", "B / time", "", number(c["tokens_per_s"]))]
        if c["dollars_per_hour"]:
            rows.append(("a million tokens", f"${c['dollars_per_hour']:,.2f} an hour (list price, "
                         f"{c['priced']}) / 3,600 s / tokens/s", "",
                         f"${c['dollars_per_million_tokens']:,.2f}"))
        if c["watts"]:
            rows.append(("energy of a token", f"at most {c['watts']:,.0f} W / tokens/s", "",
                         f"{number(c['joules_per_token'])} J"))
    return Table(("time of a step", "by hand", "prefill", "decode"), rows, ("prefill", "decode"))


def _transfer(one: dict, c: dict) -> str:
    """Calls × (cost of a call + steps × (cost of a step + bytes / link)), as in `parallel`."""
    link, tp = c["link"], c["layout"]["tp"]
    steps, part = {"all-reduce": (2 * (tp - 1), f" / {tp}"),
                   "all-to-all": (c["layout"]["ep"] - 1, f" / {c['layout']['ep']}"),
                   "send": (1, "")}[one["name"]]
    return (f"{one['calls']:,} × ({si(link['latency_s'], 's')} + {steps} × "
            f"({si(link['hop_s'], 's')} + bytes{part} / {si(link['bytes_per_s'], 'B/s')}))")
