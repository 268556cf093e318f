"""The same requests through several servers, in turn: ours, padded and continuous, and `transformers`, padded and continuous.

All run the same weights in fp32, generate greedily, and give each request exactly the tokens that it asks for; what a padded batch
computes beyond them counts for nothing. Beside the runs of ours stands what the simulator said of them, from a calibration that
knows nothing of these runs; it is told only how fast the machine was while they ran (`calibrate.Pulse`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from clawdemy_infer.batching.metrics import Report
from clawdemy_infer.batching.policy import Policy
from clawdemy_infer.batching.request import Request
from clawdemy_infer.batching.simulator import simulate
from clawdemy_infer.batching.torch_executor import count_operations, engine
from clawdemy_infer.calibrate import Pulse
from clawdemy_infer.model import Decoder
from clawdemy_infer.roofline import Machine
from clawdemy_infer.timing import now

METRICS = ("output_tokens_per_s", "ttft_p50", "ttft_p95", "tpot_p50", "tpot_p95", "e2e_p50", "e2e_p95", "seconds")
"""What engine and simulator are compared on."""


@dataclass(frozen=True)
class Compared:
    """Seconds of each server by round, the output tokens they all gave; and for ours, how fast the machine was meanwhile, as a fraction
    of its calibration, and (server, metric, simulated, measured)."""

    seconds: dict[str, list[float]]
    tokens: int
    speeds: dict[str, float]
    simulated: list[tuple[str, str, float, float]]

    def tokens_per_s(self, server: str) -> float:
        return self.tokens / statistics.median(self.seconds[server])


def compare(model: Decoder, machine: Machine, requests: list[Request], max_batch: int = 16, rounds: int = 3, kv_bytes: float = 2**30,
            directory: Path | None = None, note: Callable[[str], None] = print) -> Compared:
    """Serve `requests` by each server, `rounds` times in turn. `transformers` takes part if given the `directory` of the same weights,
    and if all requests come at 0: it knows no arrivals. `note` is told of each run as it ends.
    """
    policies = {"ours, static": Policy("static", max_batch), "ours, continuous": Policy(max_batch=max_batch)}
    engines = {name: engine(model, policy, kv_bytes=kv_bytes) for name, policy in policies.items()}
    requests = [replace(request, prompt=engines["ours, static"].executor.tokens(request)[1]) for request in requests]
    reports: dict[str, list[Report]] = {name: [] for name in policies}

    def ours(name: str, some: list[Request]) -> None:
        reports[name].append(engines[name].run(some))

    servers = {name: (lambda some, name=name: ours(name, some)) for name in policies}
    if directory and not any(request.arrival_s for request in requests):
        from transformers import AutoModelForCausalLM

        other = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        servers["transformers, static"] = lambda some: transformers_static(other, some, max_batch)
        servers["transformers, continuous"] = lambda some: transformers_continuous(other, some, max_batch)
    first = [replace(request, max_tokens=2, output_tokens=2, arrival_s=0.0) for request in requests[:max_batch]]
    for serve in servers.values():                                      # memory that was never touched costs more than the work in it
        serve(first)
    for found in reports.values():
        found.clear()

    seconds: dict[str, list[float]] = {name: [] for name in servers}
    pulses = {name: Pulse(machine, "fp32", max_batch, model.device.type) for name in policies}
    for _ in range(rounds):
        for name, serve in servers.items():
            if name in pulses:
                take(pulses[name])
            start = now()
            took = serve(requests) or now() - start
            if name in pulses:
                took = reports[name][-1].seconds
                take(pulses[name])
            seconds[name].append(took)
            note(f"{name}: {took:.1f} s")
    speeds, simulated = {name: pulse.speed for name, pulse in pulses.items()}, []
    for name, policy in policies.items():
        predicted = simulate(model.config.shape, slowed(machine, speeds[name]), requests, policy, weights="fp32", kv="fp32",
                             activations="fp32", kv_bytes=kv_bytes, operations=count_operations(model, policy)).summary
        for metric in METRICS:
            measured = statistics.median(report.summary[metric] for report in reports[name])
            simulated.append((name, metric, predicted[metric], measured))
    return Compared(seconds, sum(request.output_tokens or request.max_tokens for request in requests), speeds, simulated)


def take(pulse: Pulse) -> None:
    """Several short readings, of which a median is taken, say more than a long one: a shared machine goes by fits and starts."""
    for _ in range(3):
        pulse.sample(0.15)


def slowed(machine: Machine, speed: float) -> Machine:
    """The same machine at `speed` times its calibrated speed."""
    def curve(points):
        return tuple((x, y * speed) for x, y in points)

    return replace(
        machine, bandwidth=curve(machine.bandwidth), fixed_s_per_op=machine.fixed_s_per_op / speed,
        peak_flops={dtype: rate * speed for dtype, rate in machine.peak_flops.items()},
        elementwise={dtype: curve(points) for dtype, points in machine.elementwise.items()},
        rates={kernel: {dtype: curve(points) for dtype, points in by_dtype.items()} for kernel, by_dtype in machine.rates.items()},
    )


@torch.inference_mode()
def transformers_static(model, requests: list[Request], max_batch: int) -> None:
    """Batches in the order of the requests, padded on the left as `generate` wants it, each until its longest output is done."""
    for first in range(0, len(requests), max_batch):
        batch = requests[first:first + max_batch]
        longest = max(len(request.prompt) for request in batch)
        ids = torch.tensor([[0] * (longest - len(request.prompt)) + list(request.prompt) for request in batch])
        mask = torch.tensor([[0] * (longest - len(request.prompt)) + [1] * len(request.prompt) for request in batch])
        most = max(request.output_tokens or request.max_tokens for request in batch)
        model.generate(ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=most, min_new_tokens=most,
                       do_sample=False, pad_token_id=0)


def transformers_continuous(model, requests: list[Request], max_batch: int) -> float:
    """Its own continuous batching. Returns seconds from the first request to the last answer, without the setting up."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    longest = max(request.max_tokens for request in requests)
    config = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0)
    blocks = sum(-(-(len(request.prompt) + request.max_tokens) // 256) for request in requests) + max_batch
    options = ContinuousBatchingConfig(max_requests_per_batch=max_batch, num_blocks=blocks, max_batch_tokens=512)
    with model.continuous_batching_context_manager(config, continuous_batching_config=options) as manager:
        start = now()
        for request in requests:
            manager.add_request(list(request.prompt), max_new_tokens=request.output_tokens or request.max_tokens)
        missing = len(requests)
        while missing:
            result = manager.get_result(timeout=1)
            missing -= bool(result and result.is_finished())
            if result is None and not manager.is_running():
                raise ValueError("transformers: its continuous batching stopped by itself")
        return now() - start
