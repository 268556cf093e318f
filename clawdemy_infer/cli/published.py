"""`published`: other people's runs, predicted and compared."""

from clawdemy_infer.cli.arguments import Args, UsageError, checked, command, option
from clawdemy_infer.cli.output import answer, table_of


def add(subparsers) -> None:
    c = command(subparsers, "published", run,
                "Predict the runs that others published, and say how far off that was.",
                "", "--category decode_bs1 --json", "--csv my_runs.csv")
    option(c, "--csv FILE", "a file with the columns of data/published_runs.csv, the default")
    option(c, "--category C", "only the rows of this category")


def run(args: Args) -> int:
    from clawdemy_infer import published
    from clawdemy_infer.published import summary
    with checked():
        runs = published.read(args.csv)
        there = sorted({each.category for each in runs})
        if args.category and args.category not in there:
            raise UsageError("", "category", args.category, ", ".join(there))
    runs = [each for each in runs if args.category in (None, each.category)]
    evidence = published.Evidence()
    rows, plainer = published.verdicts(runs, evidence), published.simpler(runs, evidence)
    figures = evidence.without(None)
    aims = {aim: published.errors(row.error for row in rows if row.status == "ok" and belongs(row))
            | {"simpler": plainer[aim]} for aim, belongs in published.AIMS.items()}
    counts = ", ".join(f"{sum(row.status == status for row in rows)} {said}" for status, said in (
        ("ok", "predicted"), ("impossible", "impossible"), ("inexpressible", "inexpressible")))
    groups = {"source": published.by(rows, "group"), "category": published.by(rows, "category")}
    tables = [table_of([row.as_dict() for row in summary.worst(rows)], "id model hardware software "
                       "predicted published unit ratio binds fits status"),
              summary.reasons_table(rows),
              summary.contradictions_table(published.contradictions(runs)),
              *(table_of([{name: value} | found for value, found in by.items()],
                         f"{name} n median_error p90_error within_25 impossible inexpressible")
                for name, by in groups.items()),
              summary.aims_table(rows, plainer), summary.figures_table(figures)]
    answer(args.json,
           {"rows": [row.as_dict() for row in rows], "summary": groups["category"],
            "sources": groups["source"], "aims": aims, "figures": figures},
           f"{len(rows)} rows: {counts}. Every prediction is made with figures fitted without the "
           "row's own source.", *(table for table in tables if table.rows))
    return 0
