"""All engines in turn, A B C A B C …: one works while the others are idle, and a drift of the machine falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from clawdemy_infer.peers.contestants import Contestant
from clawdemy_infer.peers.worker import Worker, WorkerFailed
from clawdemy_infer.peers.workloads import Workload

IDLE = 0.05
"""Cores that all waiting workers together may use. Threads of OpenMP spin for a moment after their work, and then sleep."""


@dataclass
class Run:
    """One contestant's answers on one workload, a round each, and the read bandwidth, bytes/s, just before each."""

    contestant: Contestant
    workload: Workload
    command: dict
    answers: list[dict] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)


def race(workers: dict[Contestant, Worker], workload: Workload, command: dict, rounds: int, bandwidth: Callable[[], float],
         note: Callable[[str], None] = print) -> list[Run]:
    """`rounds` times in turn, each worker does `command`. One that fails is named to `note`, leaves `workers`, and the rest go on.

    `bandwidth` is read before each turn. Runs that got no answer at all are left out.
    """
    runs = {contestant: Run(contestant, workload, command) for contestant in workers}
    for _ in range(rounds):
        for contestant, worker in list(workers.items()):
            if busy := not_idle(workers):
                note(f"The waiting engines use {busy:.1f} cores: trust this round less.")
            read = bandwidth()
            try:
                runs[contestant].answers.append(worker.ask(command))
                runs[contestant].bandwidth.append(read)
            except WorkerFailed as failed:
                note(f"{failed}. The others go on.")
                del workers[contestant]
    return [run for run in runs.values() if run.answers]


def not_idle(workers: dict[Contestant, Worker], patience: float = 2.0, look: float = 0.2) -> float:
    """Wait until the workers have come to rest. Returns 0, or the cores that they still use after `patience` seconds."""
    end = time.perf_counter() + patience
    while True:
        before, start = sum(worker.cpu_seconds() for worker in workers.values()), time.perf_counter()
        time.sleep(look)
        cores = (sum(worker.cpu_seconds() for worker in workers.values()) - before) / (time.perf_counter() - start)
        if cores <= IDLE:
            return 0.0
        if time.perf_counter() > end:
            return cores
