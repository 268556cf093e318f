"""`bench --peers`: other engines in turn with ours, each in a process of its own."""

from statistics import median

from clawdemy_infer.cli import arguments
from clawdemy_infer.cli.arguments import MOST_TOKENS, Args, calibrated, checked, count, option
from clawdemy_infer.cli.output import answer, say

PEERS = ("transformers", "llama.cpp", "vllm")


def add(bench) -> None:
    group = bench.add_argument_group("peers, instead of ours")
    option(group, "--peers LIST", f"run {', '.join(PEERS)} in turn with ours, in as many bits as "
           "--weights has; `make peers` sets them up", [PEERS], nargs="?", const=[*PEERS])
    option(group, "--workloads LIST", "decode-B, decode-B@S or prefill-S (default: six)", [str])
    option(group, "--rounds N", "turns that each gets", count, 3)


def run(args: Args) -> int:
    from clawdemy_infer.peers import contestants as who
    with checked():                             # what is wrong is said before anything starts
        works = [who.parse(name) for name in args.workloads or who.DEFAULT_WORKLOADS]
        if large := [work.name for work in works if work.batch * work.context > MOST_TOKENS]:
            raise arguments.UsageError("", "workloads", large[0], f"at most {MOST_TOKENS:,} tokens")
        directory, gguf = who.weights_of(arguments.there(args.model))
    entered, notes = who.contestants(args.weights, args.peers, gguf)
    for sentence in notes:
        say(sentence)

    import torch

    from clawdemy_infer.from_config import from_config
    from clawdemy_infer.machine.probes import bandwidth_probes
    from clawdemy_infer.peers.race import Worker, WorkerFailed, race
    from clawdemy_infer.peers.result import peer_rows, peers_table
    machine, shape = calibrated("cpu"), from_config(str(directory / "config.json"))
    [read] = bandwidth_probes([int(machine.bandwidth[-1][0])], "cpu")

    def note(sentence: str) -> None:
        say(sentence)
        notes.append(sentence)

    settings = {"threads": torch.get_num_threads(), "batch": max(work.batch for work in works),
                "context": max(work.context + work.new for work in works), "compile": args.compile}
    workers, rows = {}, []
    try:
        for one in entered:
            say(f"Starting {one.name} …")
            model = str(gguf if one.engine == "llama.cpp" else directory)
            try:
                workers[one] = Worker(one.name, one.command,
                                      {"model": model, "weights": one.weights, **settings})
            except WorkerFailed as failed:
                note(f"{failed}. The others go on.")
        versions = {one.engine: worker.ready["version"] for one, worker in workers.items()}
        weight_bytes = {one: worker.ready.get("weight_bytes") or shape.streamed_bytes(one.weights)
                        for one, worker in workers.items()}
        for work in works:
            runs = race(workers, work, who.asked(work, directory), args.rounds,
                        lambda: median(read.sample() for _ in range(3)), note)
            rows += (new := peer_rows(runs, shape, machine, weight_bytes))
            say(str(peers_table(new)))
    finally:
        for worker in workers.values():
            worker.stop()

    card = {"model": shape.name, "machine": machine.name, "bandwidth": machine.bandwidth_at(),
            "peak_flops": machine.peak_flops, "versions": versions, "rounds": args.rounds}
    result = {"card": card | settings, "rows": rows, "notes": notes}
    answer(args.json, result, peers_table(rows), *notes)
    return 0 if rows else 1
