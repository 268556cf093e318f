"""`clawdemy-infer published`: other people's runs, predicted and compared. It prints, and returns its exit code."""

from __future__ import annotations

import argparse

from clawdemy_infer.commands import emit, show


def published(args: argparse.Namespace) -> int:
    from clawdemy_infer.published import AIMS, Evidence, by, contradictions, errors, read, simpler, verdicts
    from clawdemy_infer.published.on_paper import aims_table, by_table, contradictions_table, figures_table, reasons_table, rows_table

    runs = read(args.csv)
    if args.category:
        there = sorted({run.category for run in runs})
        if args.category not in there:
            raise ValueError(f"category={args.category!r}: the file has {', '.join(there)}")
        runs = [run for run in runs if run.category == args.category]
    evidence = Evidence()
    rows = verdicts(runs, evidence)
    plainer, figures = simpler(runs, evidence), evidence.without(None)
    if args.json:
        aims = {aim: errors(row.error for row in rows if row.status == "ok" and belongs(row)) | {"simpler": plainer[aim]}
                for aim, belongs in AIMS.items()}
        emit({"rows": [row.as_dict() for row in rows], "summary": by(rows, "category"), "sources": by(rows, "group"), "aims": aims,
              "figures": figures})
        return 0
    counts = {status: sum(row.status == status for row in rows) for status in ("ok", "impossible", "inexpressible")}
    blocks = [rows_table(rows), reasons_table(rows), contradictions_table(contradictions(runs)), by_table(rows, "group"),
              by_table(rows, "category"), aims_table(rows, plainer), figures_table(figures)]
    show(f"{len(rows)} rows: {counts['ok']} predicted, {counts['impossible']} impossible, {counts['inexpressible']} inexpressible. "
         "Every prediction is made with figures fitted without the row's own source.", *(block for block in blocks if block.rows))
    return 0
