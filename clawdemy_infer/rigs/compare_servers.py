"""The same requests through ours and through `transformers`, each padded and continuous, in turn.

All run the same weights in fp32, greedily, to exactly the tokens that each request asks for. Beside
ours stands what the simulator said, from a calibration that knows nothing of these runs; it is told
only how fast the machine was meanwhile (`machine.present`).
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from clawdemy_infer.batching.metrics import Report
from clawdemy_infer.batching.policy import Policy
from clawdemy_infer.batching.request import Request
from clawdemy_infer.batching.serving import engine
from clawdemy_infer.batching.simulator import simulate
from clawdemy_infer.lesson.steps import count_operations
from clawdemy_infer.machine.calibrated import Calibrated, Speeds
from clawdemy_infer.machine.present import speeds_now
from clawdemy_infer.model import Decoder
from clawdemy_infer.timing import now

COMPARED_METRICS = ("output_tokens_per_s", "ttft_p50", "ttft_p95", "tpot_p50", "tpot_p95",
                    "e2e_p50", "e2e_p95", "seconds")
"""What engine and simulator are compared on."""


@dataclass(frozen=True)
class ServerComparison:
    """Seconds of each round by server, for `tokens` output tokens in all; of ours, the machine's
    `speeds` as fractions of its calibration, and (server, metric, simulated, measured)."""

    seconds: dict[str, list[float]]
    tokens: int
    speeds: dict[str, Speeds]
    simulated: list[tuple[str, str, float, float]]

    def tokens_per_s(self, server: str) -> float:
        return self.tokens / statistics.median(self.seconds[server])


def compare_servers(model: Decoder, machine: Calibrated, requests: list[Request],
                    max_batch: int = 16, rounds: int = 3, kv_bytes: float = 2**30,
                    directory: Path | None = None,
                    note: Callable[[str], None] = print) -> ServerComparison:
    """Serve `requests` by each server, `rounds` times in turn; `note` is told of each run.
    `transformers` takes part if given the `directory` of the same weights, and if all requests come
    at 0: it knows no arrivals."""
    # 1. The servers, each a function of some requests.
    policies = {"ours, static": Policy("static", max_batch),
                "ours, continuous": Policy(max_batch=max_batch)}
    engines = {name: engine(model, policy, kv_bytes=kv_bytes) for name, policy in policies.items()}
    tokens_of = engines["ours, static"].executor.tokens
    requests = [replace(request, prompt=tokens_of(request)[1]) for request in requests]
    reports: dict[str, list[Report]] = {name: [] for name in policies}

    def ours(some: list[Request], name: str) -> float:
        reports[name].append(engines[name].run(some))
        return reports[name][-1].seconds

    servers = {name: partial(ours, name=name) for name in policies}
    if directory and not any(request.arrival_s for request in requests):
        from transformers import AutoModelForCausalLM
        other = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        for serve in (transformers_static, transformers_continuous):
            name = serve.__name__.replace("_", ", ")
            servers[name] = partial(serve, model=other, max_batch=max_batch)
    # 2. Memory that was never touched costs more than the work in it, so all begin with a little.
    for serve in servers.values():
        serve([replace(request, max_tokens=2, output_tokens=2, arrival_s=0.0)
               for request in requests[:max_batch]])
    for warm_ups in reports.values():
        warm_ups.clear()
    # 3. The rounds, each between two looks at the machine.
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    seen: dict[str, list[Speeds]] = {name: [] for name in servers}
    for name, serve in [*servers.items()] * rounds:
        seen[name].append(speeds_now(machine))
        seconds[name].append(serve(requests))
        seen[name].append(speeds_now(machine))
        note(f"{name}: {seconds[name][-1]:.1f} s")
    # 4. The simulator, on a machine of the speed that this one had.
    speeds = {name: Speeds(*map(statistics.mean, zip(*seen[name], strict=True)))
              for name in policies}
    simulated = []
    for name, policy in policies.items():
        predicted = simulate(model.config.shape, machine.at(speeds[name]), requests, policy,
                             weights="fp32", kv="fp32", activations="fp32", kv_bytes=kv_bytes,
                             operations=count_operations(model, policy)).summary
        for metric in COMPARED_METRICS:
            measured = statistics.median(report.summary[metric] for report in reports[name])
            simulated.append((name, metric, predicted[metric], measured))
    tokens = sum(request.output_tokens or request.max_tokens for request in requests)
    return ServerComparison(seconds, tokens, speeds, simulated)


@torch.inference_mode()
def transformers_static(requests: list[Request], model, max_batch: int) -> float:
    """Seconds of batches in order, padded on the left, each until its longest output is done."""
    start = now()
    for first in range(0, len(requests), max_batch):
        batch = requests[first:first + max_batch]
        longest = max(len(request.prompt) for request in batch)
        ids = torch.tensor([[-1] * (longest - len(request.prompt)) + list(request.prompt)
                            for request in batch], device=model.device)
        most = max(request.output_tokens or request.max_tokens for request in batch)
        model.generate(ids.clamp(min=0), attention_mask=(ids >= 0).long(), max_new_tokens=most,
                       min_new_tokens=most, do_sample=False, pad_token_id=0)
    return now() - start


def transformers_continuous(requests: list[Request], model, max_batch: int) -> float:
    """Seconds of its own continuous batching, without the setting up."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    config = GenerationConfig(max_new_tokens=max(request.max_tokens for request in requests),
                              do_sample=False, eos_token_id=-1, pad_token_id=0)
    blocks = sum(-(-(len(request.prompt) + request.max_tokens) // 256) for request in requests)
    options = ContinuousBatchingConfig(max_requests_per_batch=max_batch, max_batch_tokens=512,
                                       num_blocks=blocks + max_batch)
    with model.continuous_batching_context_manager(config,
                                                   continuous_batching_config=options) as manager:
        start = now()
        for request in requests:
            manager.add_request(list(request.prompt),
                                max_new_tokens=request.output_tokens or request.max_tokens)
        missing = len(requests)
        while missing:
            result = manager.get_result(timeout=1)
            missing -= bool(result and result.is_finished())
            if result is None and not manager.is_running():
                raise ValueError("transformers: its continuous batching stopped by itself")
        return now() - start
