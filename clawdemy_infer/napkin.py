"""The card: everything one can say about a model on a machine before anything runs."""

from __future__ import annotations

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.roofline import Machine


def card(shape: ModelShape, machine: Machine, batch: int = 1, context: int = 1024, prompt: int | None = None,
         weights: str = "bf16", kv: str = "bf16") -> dict:
    """Capacity first, then time: a dict of bytes, FLOPs, seconds and FLOPs per byte. `prompt` is the context unless given.

    A configuration that does not fit has no times: they would be of a run that cannot happen.
    Integer weights are computed with in bf16. Raises ValueError as `ModelShape` and `Machine` do.
    """
    prompt = prompt or context
    dtypes = {"weights": weights, "kv": kv, "activations": weights if weights in ("fp32", "bf16", "fp16") else "bf16"}
    prefill, decode = shape.prefill(batch, prompt, **dtypes), shape.decode(batch, context, **dtypes)
    capacity = shape.fits(machine.memory, batch, max(context, prompt), weights, kv)
    result = {
        "model": shape.name, "machine": machine.name, "batch": batch, "context": context, "prompt": prompt, "weights": weights, "kv": kv,
        "fits": bool(capacity), "memory_bytes": machine.memory, "weight_bytes": capacity.weight_bytes, "kv_bytes": capacity.kv_bytes,
        "max_batch": capacity.max_batch, "ridge": machine.ridge(dtypes["activations"]),
        "prefill": {"flops": prefill.flops, "bytes": prefill.bytes, "intensity": prefill.intensity, "seconds": None, "bound": None},
        "decode": {"flops": decode.flops, "bytes": decode.bytes, "intensity": decode.intensity, "seconds": None, "bound": None},
        "tokens_per_s": None,
    }
    if capacity:
        for phase, work in (("prefill", prefill), ("decode", decode)):
            prediction = machine.time(work)
            result[phase] |= {"seconds": prediction.seconds, "bound": prediction.bound}
        result["tokens_per_s"] = batch / result["decode"]["seconds"]
    return result
