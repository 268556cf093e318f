"""`replay`: serve a trace with the model, on a machine that need not exist, or by a server."""

from argparse import ArgumentTypeError
from dataclasses import asdict, replace
from math import inf
from os.path import isfile
from re import fullmatch

from clawdemy_infer.arithmetic import BYTES
from clawdemy_infer.cli import arguments
from clawdemy_infer.cli.arguments import Args, checked, command, count, draft, idle, number, option
from clawdemy_infer.cli.napkin import machine_of, shape_of
from clawdemy_infer.cli.output import answer, say
from clawdemy_infer.envelope.parallel import Layout
from clawdemy_infer.lesson import tables
from clawdemy_infer.lesson.tables import Table, si
from clawdemy_infer.rigs.stream import FIELDS, printable

POLICIES = {"static": {"batching": "static"}, "continuous": {}, "chunked": {"token_budget": 256}}
"""What `--policy` stands for; other options change it."""
LINES = {
    "output tokens/s": ("output_tokens_per_s", ""), "requests/s": ("requests_per_s", ""),
    "goodput, requests/s": ("goodput", ""), "TTFT": ("ttft", "s"), "TPOT": ("tpot", "s"),
    "between two tokens": ("itl", "s"), "end to end": ("e2e", "s"),
    "batch, share of the largest": ("occupancy", "%"), "computed for nothing": ("wasted", "%"),
    "KV blocks in use": ("kv_usage", "%"), "KV peak": ("kv_peak_bytes", "B"),
    "prompt tokens found in the cache": ("cached", "%"), "preemptions": ("preemptions", "")}
"""Lines of the summary: where each is found, and its unit."""


def place(text: str) -> str:
    if not fullmatch("engine|simulator|https?://.*", text):     # it may hold a password
        raise ArgumentTypeError("engine, simulator or a URL is accepted")
    return text


def add(subparsers) -> None:
    c = command(subparsers, "replay", run,
                "Serve a trace: with the model, or in the time that a roofline says.",
                "sharegpt --model llama-3.1-70b --machine h100-sxm --tp 8 --policy chunked",
                "uniform --requests 64 --rate inf --on engine --compile",
                "alpaca --on http://localhost:8000/v1 --model NAME --requests 50 --rate 2")
    work, at_most = c.add_argument_group("workload"), number(infinite=True, low=0)
    option(work, "trace", "a file of JSON lines, or a workload to draw from: sharegpt, alpaca, "
           "code, conversation, uniform", metavar="TRACE")
    option(work, "--requests N", "how many to draw", count, 100)
    option(work, "--rate R", "requests a second", arguments.rate, 1.0)
    option(work, "--burstiness CV", "1 is Poisson, more comes in bursts", float, 1.0)
    option(work, "--seed N", "the same seed draws the same requests", int, 0)
    option(work, "--save FILE", "write the requests as a trace")
    option(work, "--slo-ttft S", "most seconds to the first token of a good request", at_most, inf)
    option(work, "--slo-tpot S", "most seconds per output token of a good request", at_most, inf)
    policy = c.add_argument_group("policy")
    option(policy, "--policy", "how requests become batches", tuple(POLICIES), "continuous")
    option(policy, "--max-batch B", "most sequences that run at once", count, 16)
    option(policy, "--token-budget T", "most new tokens of a step (default of chunked: 256)", count)
    option(policy, "--order", "who comes first", ("fcfs", "priority"), "fcfs")
    option(policy, "--preemption", "how to give way", ("recompute", "swap"), "recompute")
    option(policy, "--prefix-caching", "prompts that begin alike share blocks", bool)
    option(policy, "--draft D", "speculate, as `generate` does; a simulation needs --alpha", draft)
    option(policy, "--gamma N", "most tokens that are drafted at a time", count, 4)
    where = c.add_argument_group("where")
    option(where, "--on WHERE", "engine: run the model; simulator: charge what the roofline says; "
           "or the URL of a server that speaks OpenAI's protocol", place, "simulator")
    option(where, "--model M", "as for `generate` (engine) or `napkin` (simulator), or its name on "
           "the server", default="smollm2-135m")
    option(where, "--weights F", "of weights, cache and activations (default: fp32 on `this` "
           "machine, else bf16)", tuple(BYTES))
    option(where, "--kv-bytes BYTES", "of the cache (default: engine 1 GiB, else what fits)",
           number(low=1, high=1e15))
    arguments.compile_option(where, "engine: ")
    option(where, "--machine X", "simulator: one of the catalog, or `this`", default="this")
    option(where, "--tp N", "simulator: devices that share every matrix", count, 1)
    option(where, "--timeout S", "URL: most seconds of one request", number(low=1e-3, high=1e6),
           600.0)
    option(where, "--leave-out LIST", f"URL: {','.join(FIELDS)} or one of them, for servers that "
           "do not know them", [FIELDS], [])
    option(where, "--alpha A", "simulator: the chance that a drafted token is accepted",
           number(low=0, high=1))


def check(args: Args) -> None:
    """Refuse options that would do nothing."""
    engine, simulator = args.on == "engine", args.on == "simulator"
    idle(args, isfile(args.trace), "with a trace from a file", "--requests", "--rate",
         "--burstiness", "--seed")
    where = args.on if engine or simulator else "URL"               # a URL may hold a password
    idle(args, not simulator, f"with --on {where}", "--machine", "--tp", "--alpha")
    idle(args, not engine, f"with --on {where}", "--compile")
    idle(args, engine or simulator, f"with --on {where}", "--timeout", "--leave-out")
    idle(args, not (engine or simulator), "with --on URL", "--policy", "--max-batch",
         "--token-budget", "--order", "--preemption", "--prefix-caching", "--draft", "--weights",
         "--kv-bytes")
    idle(args, not args.draft, "without --draft", "--gamma", "--alpha")


def run(args: Args) -> int:
    check(args)
    from clawdemy_infer.batching import SLO, Policy
    from clawdemy_infer.rigs.trace import save_trace
    from clawdemy_infer.timing import now
    names = ("max_batch", "order", "preemption", "prefix_caching")
    options = POLICIES[args.policy] | {name: getattr(args, name) for name in names}
    options |= {"token_budget": args.token_budget} if args.token_budget else {}
    options |= {"gamma": args.gamma} if args.draft else {}
    with checked():
        policy, requests = Policy(**options), requests_of(args)
        slo = SLO(args.slo_ttft, args.slo_tpot)
    server, where = {"engine": engine, "simulator": simulator}.get(args.on, endpoint)(args, policy)
    if args.save:
        try:
            with checked():
                save_trace(requests, args.save)
        except OSError as error:
            accepted = f"another file: {error.strerror}"
            raise arguments.UsageError("", "save", args.save, accepted) from error
    say(f"Serving {len(requests)} requests …")
    start = now()
    try:
        report = server.run(requests, slo)
    except KeyboardInterrupt:
        server.cancel_all()
        report = server.report(slo)
    result = {"on": getattr(server, "url", args.on), "model": args.model, "machine": where,
              "policy": asdict(policy), "requests": report.requests, "summary": report.summary,
              "wall_s": now() - start}
    answer(args.json, result, *blocks(result))
    if any(row["reason"] == "cancelled" for row in report.requests):
        return 130
    return 0 if report.finished and not report.summary["failed"] else 1


def requests_of(args: Args) -> list:
    from clawdemy_infer.rigs.trace import load_trace
    from clawdemy_infer.rigs.workload import known_workloads, workload
    if isfile(args.trace):
        return load_trace(args.trace)
    if args.trace not in known_workloads():
        raise arguments.UsageError("", "trace", args.trace,
                                   f"a file, {', '.join(known_workloads())}")
    return workload(args.trace, requests=args.requests, rate=args.rate, burstiness=args.burstiness,
                    seed=args.seed, most=1024 if args.on == "engine" else None)


def engine(args: Args, policy):
    from clawdemy_infer.batching.serving import engine
    from clawdemy_infer.speculative.engine import engine as speculating
    from clawdemy_infer.variants.self_drafts import draft_named
    memory = dict.fromkeys(("kv_bytes", "host_bytes"), args.kv_bytes or 2**30)
    model = arguments.running(args, None if args.weights == "fp32" else args.weights)
    with checked():
        server = (speculating(model, draft_named(args.draft, model), policy, **memory)
                  if args.draft else engine(model, policy, **memory))
    return server, model.device.type


def simulator(args: Args, policy):
    from clawdemy_infer.batching import StepCost, simulator
    from clawdemy_infer.fast.watched import operations_of
    default = "fp32" if args.machine == "this" else "bf16"
    formats = dict.fromkeys(("weights", "kv", "activations"), args.weights or default)
    with checked():
        if args.draft and args.alpha is None:
            raise arguments.UsageError("", "alpha", None,
                                       "the chance that a drafted token is accepted")
        shape, machine = shape_of(args.model), machine_of(args.machine)
        StepCost(shape, machine, **formats, layout=Layout(args.tp))     # or its ValueError
    operations = operations_of(shape, policy) if machine.fixed_s_per_op else None
    drafting = None
    if args.draft and args.draft != "lookup":                           # which costs nothing
        bits = {"weights": args.draft} if args.draft in ("int8", "int4") else {}
        known = {"int8": shape.L, "int4": shape.L, "trained": 1}
        layers = known.get(args.draft) or int(args.draft.removeprefix("exit:"))
        if layers > shape.L:
            raise arguments.UsageError("", "draft", args.draft, f"at most exit:{shape.L}")
        drafting = StepCost(replace(shape, L=layers), machine, **formats | bits,
                            operations=operations if layers == shape.L else None)
    server = simulator(shape, machine, policy, tp=args.tp, kv_bytes=args.kv_bytes,
                       host_bytes=args.kv_bytes or 2**30, operations=operations, alpha=args.alpha,
                       draft=drafting, **formats)
    return server, machine.name


def endpoint(args: Args, policy):
    from clawdemy_infer.rigs.endpoint import Endpoint
    with checked():
        server = Endpoint(args.on, args.model, args.timeout, args.leave_out, say)
    return server, server.url


def blocks(result: dict) -> list[Table | str]:
    from clawdemy_infer.batching.request import OUTCOMES

    def cell(value: float | None, unit: str) -> str:
        return f"{value:.0%}" if unit == "%" and value is not None else si(value, unit)

    summary, rows = result["summary"], []
    for name, (key, unit) in LINES.items():
        keys = [f"{key}_p{p}" for p in (50, 95, 99)] if f"{key}_p50" in summary else [key]
        rows.append([name, *(cell(summary[each], unit) for each in keys), "", ""][:4])
    counts = ", ".join(f"{summary[outcome]} {outcome}" for outcome in OUTCOMES
                       if summary[outcome] or outcome == "finished")
    clock = f" ({result['on']})" if result["on"] in ("engine", "simulator") else ""
    steps = f", {summary['steps']:,} steps" if summary["steps"] else ""
    found = [f"{result['model']} on {result['machine']}{clock}: {counts} in "
             f"{si(summary['seconds'], 's')}{steps}",
             Table(("", "median or all", "95 %", "99 %"), rows, ("median or all", "95 %", "99 %"))]
    if result["on"] == "simulator":
        rate = tables.number(len(result["requests"]) / result["wall_s"])
        found.append(f"Simulated in {si(result['wall_s'], 's')}: {rate} requests a second of this "
                     "machine's time.")
    if summary["drafted"]:
        found.append("{accepted:,} of {drafted:,} drafted tokens were accepted.".format(**summary))
    failed = [row for row in result["requests"] if row["outcome"] in ("refused", "failed")]
    return found + [printable(f"{row['id']} {'was ' * (row['outcome'] == 'refused')}"
                              f"{row['outcome']}: {row['reason']}.") for row in failed[:5]]
