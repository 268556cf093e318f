"""The command `bench`: ours alone, or with `--peers` beside other engines, `--drafts` beside itself, `--kernels` the Triton kernels."""

from __future__ import annotations

import argparse

from clawdemy_infer import commands_bench, commands_drafts, commands_kernels
from clawdemy_infer.commands import emit, say, show

PEERS = ("transformers", "llama.cpp", "vllm")


def bench(args: argparse.Namespace) -> int:
    if args.drafts:
        return commands_drafts.beside_drafts(args)
    if args.kernels or args.checks:
        return commands_kernels.bench_kernels(args)
    return commands_bench.bench(args) if args.peers is None else beside_peers(args)


def beside_peers(args: argparse.Namespace) -> int:
    """Start every engine that is set up, let them do each workload in turn, and print one table."""
    from clawdemy_infer.peers import contestants as who
    from clawdemy_infer.peers.workloads import DEFAULT, asked, parse

    works = [parse(name) for name in args.workloads or DEFAULT]            # what is wrong is said before anything starts
    directory, gguf = who.weights_of(args.model)
    entered, notes = who.contestants(args.weights, args.peers, gguf)
    for sentence in notes:
        say(sentence)

    import torch

    from clawdemy_infer.calibrate import this_machine
    from clawdemy_infer.from_config import from_config
    from clawdemy_infer.peers.race import race
    from clawdemy_infer.peers.result import peer_rows, peers_table
    from clawdemy_infer.peers.worker import Worker, WorkerFailed
    from clawdemy_infer.timing import rates

    say("Looking at this machine; up to two minutes if it must be calibrated …")
    machine, shape = this_machine("cpu"), from_config(str(directory / "config.json"))
    data = torch.ones(int(machine.bandwidth[-1][0]) // 4)

    def bandwidth() -> float:
        return rates({"read": lambda _: data.sum() and data.nbytes}, rounds=1)["read"]

    def note(sentence: str) -> None:
        say(sentence)
        notes.append(sentence)

    settings = {"threads": torch.get_num_threads(), "batch": max(work.batch for work in works),
                "context": max(work.context + work.new for work in works), "compile": args.compile}
    workers: dict[who.Contestant, Worker] = {}
    rows = []
    try:
        for one in entered:
            say(f"Starting {one.name} …")
            model = str(gguf if one.engine == "llama.cpp" else directory)
            try:
                workers[one] = Worker(one.name, one.command, {"model": model, "weights": one.weights, **settings})
            except WorkerFailed as failed:
                note(f"{failed}. The others go on.")
        versions = {one.engine: worker.ready["version"] for one, worker in workers.items()}
        weight_bytes = {one: worker.ready.get("weight_bytes") or shape.streamed_bytes(one.weights) for one, worker in workers.items()}
        for work in works:
            runs = race(workers, work, asked(work, directory), args.rounds, bandwidth, note)
            rows += (new := peer_rows(runs, shape, machine, weight_bytes))
            say(str(peers_table(new)))
    finally:
        for worker in workers.values():
            worker.stop()

    if not args.json:
        show(peers_table(rows), *notes)
    emit({"card": {"model": shape.name, "machine": machine.name, "bandwidth": machine.bandwidth_at(), "peak_flops": machine.peak_flops,
                   "versions": versions, "rounds": args.rounds, **settings},
          "rows": [row.as_dict() for row in rows], "notes": notes})
    return 0 if rows else 1
