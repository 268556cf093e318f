"""`replay`: serve a trace with the model that runs, on a machine that need not exist, or by a server, and say what it was like."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

from clawdemy_infer.commands import emit, machine_of, say, shape_of, show
from clawdemy_infer.tables import MISSING, Table, number, si

POLICIES = {"static": {"batching": "static"}, "continuous": {}, "chunked": {"token_budget": 256}}
"""What `--policy` stands for; other options change it."""

LINES = {
    "output tokens/s": ("output_tokens_per_s", ""), "requests/s": ("requests_per_s", ""), "goodput, requests/s": ("goodput", ""),
    "TTFT": ("ttft", "s"), "TPOT": ("tpot", "s"), "between two tokens": ("itl", "s"), "end to end": ("e2e", "s"),
    "batch, share of the largest": ("occupancy", "%"), "computed for nothing": ("wasted", "%"), "KV blocks in use": ("kv_usage", "%"),
    "KV peak": ("kv_peak_bytes", "B"), "prompt tokens found in the cache": ("cached", "%"), "preemptions": ("preemptions", ""),
}


def add_arguments(c: argparse.ArgumentParser, count, formats, draft) -> None:
    """The options of `replay`; `count` reads a whole number, `formats` are those of weights and caches, `draft` reads a draft's name."""
    c.add_argument("trace", metavar="TRACE", help="a file of JSON lines, or one of sharegpt, alpaca, code, conversation, uniform")
    c.add_argument("--on", type=place, default="simulator", metavar="WHERE",
                   help="engine: run the model; simulator: charge what the roofline says (default); or the URL of an OpenAI-compatible "
                        "server, as http://localhost:8000/v1")
    c.add_argument("--model", default="smollm2-135m", metavar="M",
                   help="as for `generate` (engine) or `napkin` (simulator), or the name that the server knows it by")
    c.add_argument("--machine", default="this", metavar="X", help="for the simulator: a machine of the catalog, or `this` (default)")
    c.add_argument("--policy", choices=POLICIES, default="continuous", help="(default: continuous)")
    c.add_argument("--max-batch", type=count, default=16, metavar="B", help="most sequences that run at once (default: 16)")
    c.add_argument("--token-budget", type=count, metavar="T", help="most new tokens of a step, prompts in chunks (chunked: 256)")
    c.add_argument("--order", choices=("fcfs", "priority"), default="fcfs", help="who comes first (default: fcfs)")
    c.add_argument("--preemption", choices=("recompute", "swap"), default="recompute", help="how to give way (default: recompute)")
    c.add_argument("--prefix-caching", action="store_true", help="prompts that begin alike share blocks")
    c.add_argument("--reserve", action="store_true", help="take all the blocks that a request might need at once")
    c.add_argument("--draft", type=draft, metavar="D", help="speculate with this draft, as of `generate`; a simulation needs --alpha too")
    c.add_argument("--gamma", type=count, default=4, metavar="N", help="most tokens that are drafted at a time (default: 4)")
    c.add_argument("--alpha", type=float, metavar="A", help="for the simulator: the chance that a drafted token stands")
    c.add_argument("--kv-bytes", type=float, metavar="BYTES", help="for the cache (default: engine 1 GiB, simulator what fits)")
    c.add_argument("--weights", choices=formats, help="of weights, cache and activations (default: fp32 on `this` machine, else bf16)")
    c.add_argument("--compile", action="store_true", help="for the engine: run on compiled code; it wants a C++ compiler")
    c.add_argument("--tp", type=count, default=1, metavar="N", help="for the simulator: devices that share every matrix")
    c.add_argument("--requests", type=count, default=100, metavar="N", help="of a known workload (default: 100)")
    c.add_argument("--rate", type=float, default=1.0, metavar="R", help="requests a second of a known workload (default: 1)")
    c.add_argument("--burstiness", type=float, default=1.0, metavar="CV", help="1 (default) is Poisson, more comes in bursts")
    c.add_argument("--seed", type=int, default=0, help="of a known workload (default: 0)")
    c.add_argument("--compare", action="store_true",
                   help="static, continuous and `transformers`, one after the other on this machine, and the simulator beside")
    c.add_argument("--rounds", type=count, default=3, metavar="N", help="of --compare (default: 3)")
    c.add_argument("--save", metavar="FILE", help="write the requests as a trace")
    c.add_argument("--slo-ttft", type=float, default=float("inf"), metavar="S", help="seconds to the first token that count as good")
    c.add_argument("--slo-tpot", type=float, default=float("inf"), metavar="S", help="seconds per output token that count as good")


def place(text: str) -> str:
    if text not in ("engine", "simulator") and not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r}: engine, simulator or a URL is accepted")
    return text


def replay(args: argparse.Namespace) -> int:
    from clawdemy_infer.batching import SLO, Policy, load_trace, save_trace, workload, workload_names

    options = {name: getattr(args, name) for name in ("max_batch", "order", "preemption", "prefix_caching", "reserve")}
    options |= {"token_budget": args.token_budget} if args.token_budget else {}
    options |= {"gamma": args.gamma} if args.draft else {}
    policy, slo = Policy(**POLICIES[args.policy] | options), SLO(args.slo_ttft, args.slo_tpot)
    if Path(args.trace).is_file():
        requests = load_trace(args.trace)
    elif args.trace in workload_names():
        requests = workload(args.trace, requests=args.requests, rate=args.rate, burstiness=args.burstiness, seed=args.seed,
                            most=1024 if args.on == "engine" else None)
    else:
        raise ValueError(f"trace={args.trace!r}: no such file, and no workload of that name: {', '.join(workload_names())}")
    if args.save:
        save_trace(requests, args.save)
    if args.compare:
        return _compare(args, requests)
    server, where = {"engine": _engine, "simulator": _simulator}.get(args.on, _endpoint)(args, policy)
    say(f"Serving {len(requests)} requests …")
    start = time.perf_counter()
    try:
        report = server.run(requests, slo)
    except KeyboardInterrupt:
        server.cancel_all()
        report = server.report(slo)
    took = time.perf_counter() - start
    result = {"on": args.on, "model": args.model, "machine": where, "policy": asdict(policy), "requests": report.requests,
              "summary": report.summary, "wall_s": took}
    emit(result) if args.json else show(*on_paper(result))
    cut_short = any(row["reason"] == "cancelled" for row in report.requests)
    return 130 if cut_short else 0 if report.finished else 1


def _engine(args: argparse.Namespace, policy):
    from clawdemy_infer.batching.torch_executor import engine
    from clawdemy_infer.calibrate import default_device
    from clawdemy_infer.model import load_model

    device = default_device()
    decoder = load_model(args.model, device=device, weights=None if args.weights == "fp32" else args.weights, compile=args.compile)
    memory = {"kv_bytes": args.kv_bytes or 2**30, "host_bytes": args.kv_bytes or 2**30}
    if args.draft:
        from clawdemy_infer.speculative import draft_named
        from clawdemy_infer.speculative.engine import engine as speculating

        return speculating(decoder, draft_named(args.draft, decoder), policy, **memory), device
    return engine(decoder, policy, **memory), device


def _simulator(args: argparse.Namespace, policy):
    from clawdemy_infer.batching import simulator

    shape, machine = shape_of(args.model), machine_of(args.machine)
    formats = dict.fromkeys(("weights", "kv", "activations"), args.weights or ("fp32" if args.machine == "this" else "bf16"))
    operations = None
    if machine.fixed_s_per_op:
        from clawdemy_infer.batching.torch_executor import operations_of

        operations = operations_of(shape, policy)
    draft = None
    if args.draft and args.draft != "lookup":               # which costs nothing
        from clawdemy_infer.batching import StepCost

        bits = {"weights": args.draft} if args.draft in ("int8", "int4") else {}
        layers = int(args.draft[5:]) if args.draft.startswith("exit:") else 1 if args.draft == "trained" else shape.L
        draft = StepCost(replace(shape, L=layers), machine, **formats | bits, operations=operations if layers == shape.L else None)
    server = simulator(shape, machine, policy, tp=args.tp, kv_bytes=args.kv_bytes, host_bytes=args.kv_bytes or 2**30, operations=operations,
                       alpha=args.alpha, draft=draft, **formats)
    return server, machine.name


def _endpoint(args: argparse.Namespace, policy):
    """The policy is the server's own."""
    from clawdemy_infer.batching.endpoint import Endpoint

    return Endpoint(args.on, args.model), args.on


def _compare(args: argparse.Namespace, requests: list) -> int:
    """Every server in turn; what the simulator said of ours."""
    from clawdemy_infer.batching.compare import compare
    from clawdemy_infer.calibrate import default_device, this_machine
    from clawdemy_infer.model import load_model
    from clawdemy_infer.model.load import PACKAGED, converted, packaged_file

    device = default_device()
    machine, decoder = this_machine(device), load_model(args.model, device=device, compile=args.compile)
    if args.model in PACKAGED:
        package, file, digest = PACKAGED[args.model]
        directory = converted(packaged_file(package, file), digest)
    else:
        directory = Path(args.model) if Path(args.model).is_dir() else None
    found = compare(decoder, machine, requests, args.max_batch, args.rounds, args.kv_bytes or 2**30, directory, say)
    rows = [{"server": name, "output_tokens_per_s": found.tokens_per_s(name), "seconds": times, "speed": found.speeds.get(name)}
            for name, times in found.seconds.items()]
    simulated = [{"server": name, "metric": metric, "simulated": said, "measured": was, "ratio": was / said if said else None}
                 for name, metric, said, was in found.simulated]
    if not args.json:
        best = rows[1]["output_tokens_per_s"]
        at = ", ".join(f"{speed:.0%} ({name})" for name, speed in found.speeds.items())
        notes = [f"The machine ran at {at} of its calibrated speed; the simulator was told so, and nothing else."]
        if not any(request.arrival_s for request in requests):
            rate = len(requests) * best / found.tokens
            notes.append(f"Ours, continuous, serves {number(rate)} requests a second; 70 % of that load is --rate {number(0.7 * rate)}.")
        show(Table(("", "output tokens/s", "ours, continuous ÷ this"),
                   [(row["server"], number(row["output_tokens_per_s"]), number(best / row["output_tokens_per_s"])) for row in rows],
                   ("output tokens/s", "ours, continuous ÷ this")),
             Table(("", "metric", "simulated", "measured", "measured ÷ simulated"),
                   [(row["server"], row["metric"], *(MISSING if row[key] is None else number(row[key]) for key in
                                                     ("simulated", "measured", "ratio"))) for row in simulated],
                   ("simulated", "measured", "measured ÷ simulated")), *notes)
    else:
        emit({"machine": machine.name, "tokens": found.tokens, "rows": rows, "simulated": simulated})
    return 0


def on_paper(result: dict) -> list[Table | str]:
    """The summary as a table, what was refused below it."""
    from clawdemy_infer.batching.request import OUTCOMES

    summary, rows = result["summary"], []
    for name, (key, unit) in LINES.items():
        spread = [summary[f"{key}_p{p}"] for p in (50, 95, 99)] if f"{key}_p50" in summary else [summary[key], "", ""]
        rows.append((name, *(value if value == "" else _shown(value, unit) for value in spread)))
    spoken = [f"{summary['accepted']:,} of {summary['drafted']:,} drafted tokens were accepted."] if summary["drafted"] else []
    counts = ", ".join(f"{summary[outcome]} {outcome}" for outcome in OUTCOMES if summary[outcome] or outcome == "finished")
    clock = f" ({result['on']})" if result["on"] in ("engine", "simulator") else ""
    steps = f", {summary['steps']:,} steps" if summary["steps"] else ""
    blocks = [f"{result['model']} on {result['machine']}{clock}: {counts} in {si(summary['seconds'], 's')}{steps}",
              Table(("", "median or all", "95 %", "99 %"), rows, ("median or all", "95 %", "99 %"))]
    if result["on"] == "simulator":
        rate = len(result["requests"]) / result["wall_s"]
        blocks.append(f"Simulated in {si(result['wall_s'], 's')}: {number(rate)} requests a second of this machine's time.")
    blocks += spoken
    failed = [row for row in result["requests"] if row["outcome"] in ("refused", "failed")]
    return blocks + [f"{row['id']} {'was ' * (row['outcome'] == 'refused')}{row['outcome']}: {row['reason']}." for row in failed[:5]]


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return MISSING
    return f"{value:.0%}" if unit == "%" else si(value, unit) if unit else number(value)
