"""A process that one engine lives in. It answers a line of JSON with a line of JSON, or it is reported as failed and put away."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil


class WorkerFailed(RuntimeError):
    """An engine died, hung or talked nonsense; the message says which and what it last wrote."""


class Worker:
    """Start `command` with `settings` as its last argument, and wait until it is ready: up to `patience` seconds, as for any answer."""

    def __init__(self, name: str, command: list[str], settings: dict, patience: float = 600) -> None:
        self.name, self.patience = name, patience
        self.log: IO[bytes] = tempfile.TemporaryFile()
        # All engines get the same number of threads. Nobody may look for anything on a network.
        environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen([*command, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.log, text=True, env=environment)
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.ready = self._answer()
        """What it said of itself: its `version`, and `weight_bytes` where it knows."""

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")                      # it has ended

    def ask(self, command: dict) -> dict:
        """What it answers, with `peak_bytes`: the most memory it held meanwhile. Raises WorkerFailed, and the worker is gone."""
        with suppress(BrokenPipeError, ProcessLookupError):             # then the answer will be that it has ended
            self._forget_peak()
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        return self._answer() | {"peak_bytes": self._peak()}

    def _answer(self) -> dict:
        try:
            line = self.lines.get(timeout=self.patience)
        except queue.Empty:
            raise self._failed(f"gave no answer within {self.patience:g} s") from None
        if not line:
            raise self._failed(f"ended with exit code {self.process.wait()}")
        try:
            return json.loads(line)
        except ValueError:
            raise self._failed(f"answered {line[:100]!r}, which is not JSON") from None

    def _failed(self, how: str) -> WorkerFailed:
        self.stop()
        self.log.seek(0)
        said = [line for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        return WorkerFailed(f"{self.name} {how}" + (f"; the last it wrote: {said[-1].strip()[:300]}" if said else ""))

    def cpu_seconds(self) -> float:
        """Processor time that it has used so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def stop(self) -> None:
        """Put it away, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):         # of what it did not read any more
            self.process.stdin.close()

    # Linux keeps the peak of a process and lets its owner start it afresh (proc(5), clear_refs). Elsewhere: what it holds now.

    def _forget_peak(self) -> None:
        if (file := Path(f"/proc/{self.process.pid}/clear_refs")).exists():
            file.write_text("5")

    def _peak(self) -> int:
        if (file := Path(f"/proc/{self.process.pid}/status")).exists():
            return next(int(line.split()[1]) * 1024 for line in file.read_text().splitlines() if line.startswith("VmHWM"))
        return psutil.Process(self.process.pid).memory_info().rss
