"""A process for each engine, and all of them in turn: one works while the others are idle, and a
drift of the machine falls on all of them alike."""

import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from clawdemy_infer.machine import peak_memory
from clawdemy_infer.peers.contestants import Contestant, PeerWorkload

MAX_IDLE_CORES = 0.05
"""Cores that waiting workers may use: threads of OpenMP spin for a moment before they sleep."""
MAX_ANSWER_BYTES = 2**26        # of one line: the tokens of a workload


class WorkerFailed(RuntimeError):
    """An engine died, hung or talked nonsense; the message says which and what it last wrote."""


class Worker:
    """A process that one engine lives in, started by `command` with `settings` as last argument: it
    answers a line of JSON with a line of JSON, within `patience` seconds. `ready` is the first,
    with its `version`, and `weight_bytes` where it knows."""

    def __init__(self, name: str, command: list[str], settings: dict,
                 patience: float = 600) -> None:
        self.name, self.patience, self.log = name, patience, tempfile.TemporaryFile()
        # All engines get the same number of threads. Nobody may look for anything on a network.
        environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"]),
                                    "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [*command, json.dumps(settings)], text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        self.ready = self._answer()

    def ask(self, command: dict) -> dict:
        """Its answer, with `peak_bytes`, the most memory it held. WorkerFailed ends the worker."""
        with suppress(BrokenPipeError, ProcessLookupError):         # the answer: that it has ended
            # Linux keeps the peak, and lets its owner start it afresh (proc(5), clear_refs).
            if (file := Path(f"/proc/{self.process.pid}/clear_refs")).exists():
                file.write_text("5")
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        return self._answer() | {"peak_bytes": peak_memory(self.process.pid)}

    def _answer(self) -> dict:
        end, line = time.monotonic() + self.patience, b""
        while b"\n" not in line:
            left = max(0.0, end - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                raise self._failed(f"gave no answer within {self.patience:g} s")
            if not (part := os.read(self.process.stdout.fileno(), 2**16)):      # it has ended
                raise self._failed(f"ended with exit code {self.process.wait()}")
            line += part
            if len(line) > MAX_ANSWER_BYTES:
                raise self._failed(f"answered more than {MAX_ANSWER_BYTES:,} bytes")
        try:
            answer = json.loads(line := line[:line.index(b"\n") + 1])
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self._failed(f"answered {line[:100].decode(errors='replace')!r}, which is "
                               "not JSON for an object")
        return answer

    def _failed(self, how: str) -> WorkerFailed:
        self.stop()
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip().splitlines()
        last = f"; the last it wrote: {said[-1].strip()[:300]}" if said else ""
        return WorkerFailed(f"{self.name} {how}{last}")

    def stop(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):         # of what it did not read any more
            self.process.stdin.close()

    def cpu_seconds(self) -> float:
        """Processor time that it has used so far, in its own code and in the system's."""
        return sum(psutil.Process(self.process.pid).cpu_times()[:2])


@dataclass
class PeerRun:
    """One contestant's answers on one workload, and the read bandwidth, bytes/s, before each."""

    contestant: Contestant
    workload: PeerWorkload
    answers: list[dict] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)


def race(workers: dict[Contestant, Worker], workload: PeerWorkload, command: dict, rounds: int,
         bandwidth: Callable[[], float], note: Callable[[str], None] = print) -> list[PeerRun]:
    """`rounds` times in turn, each worker does `command`; `bandwidth` is read before each turn. A
    worker that fails is named to `note`, leaves `workers`, and the rest go on."""
    runs = {contestant: PeerRun(contestant, workload) for contestant in workers}
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
    """Wait until the workers rest. Returns 0, or the cores they use after `patience` seconds."""
    def used() -> float:
        return sum(worker.cpu_seconds() for worker in workers.values())

    end = time.perf_counter() + patience
    while True:
        before, start = used(), time.perf_counter()
        time.sleep(look)
        cores = (used() - before) / (time.perf_counter() - start)
        if cores <= MAX_IDLE_CORES:
            return 0.0
        if time.perf_counter() > end:
            return cores
