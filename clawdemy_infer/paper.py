"""Cards, calibrations and benchmarks on paper: tables that a person can follow by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.roofline import Machine
from clawdemy_infer.tables import MISSING, Table, number, si


def card_on_paper(c: dict, shape: ModelShape) -> list[Table | str]:
    """The card of `napkin.card`: each term with its formula, its figures and its result."""
    S, T, B = c["context"], c["prompt"], c["batch"]
    w = shape.L * sum(k * n for k, n in shape.matrices().values())
    blocks: list[Table | str] = [
        f"{c['model']} on {c['machine']}: batch B = {B:,}, context S = {S:,}, prompt T = {T:,}; weights {c['weights']}, KV {c['kv']}\n"
        f"L = {shape.L}, D = {shape.D:,}, N = {shape.N}, K = {shape.K}, H = {shape.H}, F = {shape.F:,}, V = {shape.V:,}; "
        f"P = {c['parameters']:,} parameters, of which w = L·(D·(N + 2K)·H + N·H·D + 3·D·F) = {w:,} in matrices",
    ]
    if shape.max_context and max(S, T) > shape.max_context:
        blocks.append(f"Note: this model was made for contexts of up to {shape.max_context:,} tokens.")
    blocks += [_memory(c, shape), _work(c), _time(c)]
    if not c["fits"]:
        blocks.append("It does not fit, so no times are given: they would be of a run that cannot happen.")
    return blocks


def _memory(c: dict, shape: ModelShape) -> Table:
    kept = shape.kept_tokens(max(c["context"], c["prompt"]))
    per_weight, per_kv = c["weight_bytes"] / c["parameters"], c["kv_bytes_per_token"] / (2 * shape.L * shape.K * shape.H)
    most = f"the largest batch that fits is {c['max_batch']:,}" if c["max_batch"] else "not even one sequence fits"
    return Table(("memory", "by hand", "", " "), [
        ("weights", "P × bytes", f"{c['parameters']:,} × {per_weight:g} B", si(c["weight_bytes"], "B")),
        ("KV cache", "2·L·K·H × bytes × tokens kept × B",
         f"2·{shape.L}·{shape.K}·{shape.H} × {per_kv:g} B × {kept:,} × {c['batch']:,}", si(c["kv_bytes"], "B")),
        ("together", f"{'fits' if c['fits'] else 'DOES NOT FIT'}; {most}", f"of {si(c['memory_bytes'], 'B')}",
         si(c["weight_bytes"] + c["kv_bytes"], "B")),
    ], numeric=("", " "))


def _work(c: dict) -> Table:
    """FLOPs and bytes of both phases, part by part."""
    formulas = {
        "matrices": ("2·w·B·T (decode: T = 1)", "w × bytes, and what goes in and out"),
        "attention": ("4·L·N·H × pairs that see each other × B", "K and V once per KV head, Q, output"),
        "head": ("2·D·V·B", "D·V × bytes, and what goes in and out"),
        "element-wise": (MISSING, "norms, RoPE, gate, residual"),
    }

    def cost(term: dict) -> tuple[str, str]:
        return si(term["flops"], "FLOP") if term["flops"] else MISSING, si(term["bytes"], "B")

    rows = [(name, *formula, *cost(c["prefill"]["parts"][name]), *cost(c["decode"]["parts"][name])) for name, formula in formulas.items()]
    header = ("work of a step", "FLOPs by hand", "bytes by hand", "prefill FLOPs", "bytes", "decode FLOPs", "bytes ")
    return Table(header, [*rows, ("together", "", "", *cost(c["prefill"]), *cost(c["decode"]))], numeric=header[3:])


def _time(c: dict) -> Table:
    peak, bandwidth = c["peak_flops"], c["bandwidth"]

    def both(formula: Callable[[dict], str]) -> tuple[str, str]:
        return formula(c["prefill"]), formula(c["decode"])

    rows = [("intensity", "FLOPs / bytes", *both(lambda phase: number(phase["intensity"]))),
            ("ridge", f"{si(peak, 'FLOP/s')} / {si(bandwidth, 'B/s')}", *both(lambda _: number(c["ridge"])))]
    if c["fits"]:
        rows += [("bound", "intensity above the ridge: compute; below: memory", *both(lambda phase: phase["bound"])),
                 ("compute", f"FLOPs / {si(peak, 'FLOP/s')}", *both(lambda phase: si(phase["flops"] / peak, "s"))),
                 ("memory", f"bytes / {si(bandwidth, 'B/s')}", *both(lambda phase: si(phase["bytes"] / bandwidth, "s"))),
                 ("time", "the larger of the two", *both(lambda phase: si(phase["seconds"], "s"))),
                 ("tokens/s", "B / time", "", number(c["tokens_per_s"]))]
    return Table(("time of a step", "by hand", "prefill", "decode"), rows, numeric=("prefill", "decode"))


def calibration_on_paper(record: dict) -> list[Table | str]:
    """What `calibrate` measured: a curve a table."""
    dtypes = list(record["peak_flops"])

    def curve(kernel: str, rows: str) -> Table:
        rates = {(point["m"], point["dtype"]): si(point["flops_per_s"], "FLOP/s") for point in record[kernel]}
        body = [(f"{m:,}", *(rates[m, dtype] for dtype in dtypes)) for m in sorted({m for m, _ in rates})]
        return Table((rows, *dtypes), body, numeric=(rows, *dtypes))

    header = ("working set", "read bandwidth")
    return [
        f"{record['name']}, {si(record['memory'], 'B')} of memory",
        Table(header, [(si(point["bytes"], "B"), si(point["bytes_per_s"], "B/s")) for point in record["bandwidth"]], numeric=header),
        curve("gemm", "matrix product, rows M"),
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
