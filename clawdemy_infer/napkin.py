"""The card: everything one can say about a model on a machine, or on several, before anything runs. A sweep is a row of cards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from clawdemy_infer import parallel
from clawdemy_infer.arithmetic import Format, ModelShape, Work, at_least_1, element_bytes
from clawdemy_infer.parallel import ONE_DEVICE, Layout
from clawdemy_infer.roofline import Machine

BLOCK = 16
"""Tokens in a block of a paged KV cache (Kwon et al. 2023). Half of the last block of a sequence is empty, on average."""


def card(shape: ModelShape, machine: Machine, batch: int = 1, context: int = 1024, prompt: int | None = None,
         weights: Format = "bf16", kv: Format = "bf16", layout: Layout = ONE_DEVICE, activations: str | None = None) -> dict:
    """Capacity first, then time: a dict of bytes, FLOPs, seconds and FLOPs per byte. `prompt` is the context unless given.

    The time is what one works out by hand, `Machine.napkin`: all the FLOPs at peak or all the bytes from main memory, and
    then what several devices tell one another. A configuration that does not fit has no times: they would be of a run that cannot
    happen. On several devices, memory is that of the fullest device, and a step's work is what one waits for: the devices of a
    stage work at once, the stages one after another.

    Weights of fewer than 16 bits are computed with in bf16 unless `activations` says otherwise. Raises ValueError as
    `ModelShape` and `Layout` do, and where the machine has no figure for the format that is computed in, or no link.
    """
    prompt = context if prompt is None else prompt
    at_least_1(batch=batch, context=context, prompt=prompt)
    computed = activations or (weights if weights in ("fp32", "bf16", "fp16") else "bf16")
    longest = max(context, prompt)
    capacity = parallel.fits(shape, layout, machine.memory, batch, longest, weights, kv)
    if computed not in machine.peak_flops:
        asked = f"activations={computed!r}" if activations else f"weights={weights!r} is computed with in {computed}"
        raise ValueError(f"{asked}: {machine.name} has a peak for {', '.join(machine.peak_flops)}")
    if layout.devices > 1 and not machine.link:
        name = next(name for name, ways in asdict(layout).items() if ways > 1)
        raise ValueError(f"{name}={getattr(layout, name)}: no link to other devices is known of {machine.name}")

    half_full = parallel.fits(shape, layout, machine.memory, batch, longest + BLOCK // 2, weights, kv)
    rows, row_bytes = activations_of(shape, layout, batch, prompt, computed)
    overhead = {"activation_bytes": rows * row_bytes, "paging_bytes": half_full.kv_bytes - capacity.kv_bytes}
    result = {
        "model": shape.name, "machine": machine.name, "batch": batch, "context": context, "prompt": prompt,
        "weights": weights, "kv": kv, "activations": computed, "layout": asdict(layout) | {"devices": layout.devices},
        "parameters": shape.parameters(), "active_parameters": shape.active_parameters(),
        "kv_bytes_per_token": shape.kv_bytes_per_token(kv),
        "fits": bool(capacity), "memory_bytes": machine.memory, "weight_bytes": capacity.weight_bytes, "kv_bytes": capacity.kv_bytes,
        **overhead, "activation_rows": rows,
        "left_bytes": machine.memory - capacity.weight_bytes - capacity.kv_bytes - sum(overhead.values()),
        "max_batch": capacity.max_batch * layout.ep,
        "total_weight_bytes": shape.stored_bytes(weights), "total_kv_bytes": shape.kv_bytes(batch, longest, kv),
        "peak_flops": machine.peak(computed), "bandwidth": machine.bandwidth_at(), "ridge": machine.ridge(computed),
        "fixed_s_per_op": machine.fixed_s_per_op, "link": machine.link and asdict(machine.link),
    }
    for phase, new, held, times in (("prefill", prompt, prompt, layout.filling(batch)), ("decode", 1, context, 1)):
        work = parallel.step(shape, layout, batch, new, held, weights=weights, kv=kv, activations=computed) * times
        told = parallel.transfers(shape, layout, batch, new, machine.link, computed) if layout.devices > 1 else []
        result[phase] = _phase(work, machine, computed, [asdict(one) | {"seconds": one.seconds * times} for one in told])
        if not capacity:
            result[phase] |= dict.fromkeys(("compute_s", "memory_s", "communication_s", "seconds", "bound")) | {"transfers": []}
    step_s = result["decode"]["seconds"]
    rate = batch / step_s if step_s else None
    price = machine.dollars_per_hour and machine.dollars_per_hour * layout.devices
    power = machine.watts and machine.watts * layout.devices
    return result | {
        "tokens_per_s": rate, "tokens_per_s_per_user": rate and 1 / step_s,
        "dollars_per_hour": price, "priced": machine.priced, "watts": power,
        "dollars_per_million_tokens": price / 3600 / rate * 1e6 if price and rate else None,
        "joules_per_token": power / rate if power and rate else None,
    }


def _phase(work: Work, machine: Machine, dtype: str, transfers: list[dict]) -> dict:
    """One phase of the card: the work, what each of its terms takes alone, and which of them is the largest."""
    compute, memory = work.flops / machine.peak(dtype), work.bytes / machine.bandwidth_at()
    communication = sum(one["seconds"] for one in transfers)
    bound = "communication" if communication > max(compute, memory) else "compute" if compute > memory else "memory"
    return {
        "flops": work.flops, "bytes": work.bytes, "intensity": work.intensity, "parts": parts(work),
        "compute_s": compute, "memory_s": memory, "communication_s": communication, "transfers": transfers,
        "seconds": machine.napkin(work) + communication, "bound": bound,
    }


def parts(work: Work) -> dict[str, dict[str, float]]:
    """FLOPs and bytes of a step, over all layers: the weight matrices, experts and state spaces where there are any, attention, the
    head, and what only moves activations."""
    sums = {name: {"flops": 0.0, "bytes": 0.0} for name in ("matrices", "experts", "attention", "state space", "head", "element-wise")}
    kernels = {"gemm": "matrices", "attention": "attention", "scan": "state space"}
    for op in work.operations():
        name = "head" if op.name == "head" else "experts" if op.name.startswith("expert ") else kernels.get(op.kernel, "element-wise")
        sums[name]["flops"] += op.flops
        sums[name]["bytes"] += op.bytes
    return {name: cost for name, cost in sums.items() if cost["bytes"] or name not in ("experts", "state space")}


def activations_of(shape: ModelShape, layout: Layout, batch: int, prompt: int, activations: str) -> tuple[int, float]:
    """Rows, and bytes of each, that one device holds between two kernels: the residual stream, and what goes into and comes out of the
    widest matrix. The rows are those of a decode step or of one prompt, whichever are more."""
    own = parallel.share(shape, layout.tp)
    widest = max(k + n for layer, _ in own.groups for k, n in layer.matrices().values())
    return max(layout.microbatch(batch), prompt), (shape.D + widest) * element_bytes("activations", activations)


def sweep(shape: ModelShape, machine: Machine, over: str, **options) -> list[dict]:
    """The latency-throughput frontier: one row for each batch, or for each context, that fits, and the first that does not.

    `over` is "batch" or "context"; `options` are the other arguments of `card`. Powers of two, and the largest batch that fits.
    Raises ValueError for another `over`, and as `card`.
    """
    if over not in ("batch", "context"):
        raise ValueError(f"sweep={over!r}: accepted are batch, context")
    wanted = ("model", "machine", "layout", "batch", "context", "fits", "max_batch",
              "tokens_per_s_per_user", "tokens_per_s", "dollars_per_million_tokens")
    rows = []
    for value in _values(shape, machine, over, options):
        c = card(shape, machine, **options | {over: value, "prompt": None if over == "context" else options.get("prompt")})
        rows.append({name: c[name] for name in wanted} | {name: c["decode"][name] for name in ("seconds", "bound")})
        if not c["fits"]:
            break
    return rows


def _values(shape: ModelShape, machine: Machine, over: str, options: dict) -> Iterator[int]:
    """Powers of two: batches with the largest that fits among them; contexts up to the model's own."""
    if over == "context":
        longest = shape.max_context or 2**17
        yield from (2**k for k in range(8, 40) if 2**k < longest)
        yield longest
        return
    most = card(shape, machine, **options | {"batch": 1})["max_batch"]
    yield from (2**k for k in range(40) if 2**k < most)
    if most:
        yield most
    yield 2 ** most.bit_length()            # the next power of two does not fit
