"""The card: everything one can say about a model on a machine before anything runs."""

from __future__ import annotations

from clawdemy_infer.arithmetic import ModelShape, Work
from clawdemy_infer.roofline import Machine


def card(shape: ModelShape, machine: Machine, batch: int = 1, context: int = 1024, prompt: int | None = None,
         weights: str = "bf16", kv: str = "bf16") -> dict:
    """Capacity first, then time: a dict of bytes, FLOPs, seconds and FLOPs per byte. `prompt` is the context unless given.

    The time is what one works out by hand, `Machine.napkin`: all the FLOPs at peak or all the bytes from main memory.
    A configuration that does not fit has no times: they would be of a run that cannot happen.
    Integer weights are computed with in bf16. Raises ValueError as `ModelShape` does, and where the machine has no figure
    for the dtype that is computed in.
    """
    prompt = context if prompt is None else prompt
    activations = weights if weights in ("fp32", "bf16", "fp16") else "bf16"
    dtypes = {"weights": weights, "kv": kv, "activations": activations}
    works = {"prefill": shape.prefill(batch, prompt, **dtypes), "decode": shape.decode(batch, context, **dtypes)}
    capacity = shape.fits(machine.memory, batch, max(context, prompt), weights, kv)
    if activations not in machine.peak_flops:
        raise ValueError(f"weights={weights!r} is computed with in {activations}: "
                         f"{machine.name} has a peak for {', '.join(machine.peak_flops)}")
    result = {
        "model": shape.name, "machine": machine.name, "batch": batch, "context": context, "prompt": prompt, "weights": weights, "kv": kv,
        "parameters": shape.parameters(), "kv_bytes_per_token": shape.kv_bytes_per_token(kv),
        "fits": bool(capacity), "memory_bytes": machine.memory, "weight_bytes": capacity.weight_bytes, "kv_bytes": capacity.kv_bytes,
        "max_batch": capacity.max_batch,
        "peak_flops": machine.peak(activations), "bandwidth": machine.bandwidth_at(), "ridge": machine.ridge(activations),
    }
    for phase, work in works.items():
        result[phase] = {
            "flops": work.flops, "bytes": work.bytes, "intensity": work.intensity, "parts": parts(work),
            "seconds": machine.napkin(work) if capacity else None,
            "bound": ("compute" if work.intensity > result["ridge"] else "memory") if capacity else None,
        }
    result["tokens_per_s"] = batch / result["decode"]["seconds"] if capacity else None
    return result


def parts(work: Work) -> dict[str, dict[str, float]]:
    """FLOPs and bytes of a step, over all layers: the weight matrices, attention, the head, and what only moves activations."""
    sums = {name: {"flops": 0.0, "bytes": 0.0} for name in ("matrices", "attention", "head", "element-wise")}
    for op in work.operations():
        name = "head" if op.name == "head" else {"gemm": "matrices", "attention": "attention"}.get(op.kernel, "element-wise")
        sums[name]["flops"] += op.flops
        sums[name]["bytes"] += op.bytes
    return sums
