"""`calibrate`: measure this machine, and keep the result."""

from clawdemy_infer.cli.arguments import Args, command
from clawdemy_infer.cli.output import answer, say
from clawdemy_infer.lesson.tables import Table, si


def add(subparsers) -> None:
    command(subparsers, "calibrate", run,
            "Measure this machine: bandwidth, FLOP/s, fixed cost. Keeps the result.", "", "--json")


def run(args: Args) -> int:
    from clawdemy_infer.lesson import ledger
    from clawdemy_infer.machine import calibrate
    say("Measuring this machine for 20 seconds: bandwidth by working set, FLOP/s by dtype and "
        "rows, the fixed cost of an operation …")
    calibrate.calibrate()
    record = calibrate.kept_record()
    peaks = ", ".join(f"{dtype} {si(peak, 'FLOP/s')}"
                      for dtype, peak in record["peak_flops"].items())
    header = ("working set", "read bandwidth", "spread")
    answer(args.json, {"machine": record, "versions": ledger.versions()},
           f"{record['name']}, {si(record['memory'], 'B')} of memory",
           Table(header, [(si(point["bytes"], "B"), si(point["bytes_per_s"], "B/s"),
                                   f"±{point['spread']:.0%}")
                          for point in record["bandwidth"]], numeric=header),
           curve(record, "gemm", "matrix product, rows M"),
           curve(record, "head", "very wide matrix product, rows M"),
           curve(record, "attention", "attention, query rows to a KV head"),
           f"peak: {peaks}\nfixed cost: {si(record['fixed_s_per_op'], 's')} for each operation")
    return 0


def curve(record: dict, kernel: str, rows: str) -> Table:
    """FLOP/s of one kernel by its rows, a column for each dtype that was measured."""
    rates = {(point["m"], point["dtype"]): point["flops_per_s"] for point in record[kernel]}
    dtypes = [dtype for dtype in record["peak_flops"] if any(dtype == of for _, of in rates)]
    body = [(f"{m:,}", *(si(rates.get((m, dtype)), "FLOP/s") for dtype in dtypes))
            for m in sorted({m for m, _ in rates})]
    return Table((rows, *dtypes), body, numeric=(rows, *dtypes))
