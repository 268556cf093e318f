"""The card: all that one can say about a model on machines before anything runs."""

from dataclasses import asdict

from clawdemy_infer.arithmetic import Format, ModelShape, Work, element_bytes
from clawdemy_infer.arithmetic.work import at_least_1, format_of
from clawdemy_infer.envelope import parallel
from clawdemy_infer.envelope.parallel import ONE_DEVICE, Layout
from clawdemy_infer.envelope.roofline import Machine

BLOCK = 16      # tokens in a block of a paged cache (Kwon et al. 2023); the last is half empty


def card(shape: ModelShape, machine: Machine, batch: int = 1, context: int = 1024,
         prompt: int | None = None, weights: Format = "bf16", kv: Format = "bf16",
         layout: Layout = ONE_DEVICE, activations: str | None = None) -> dict:
    """Capacity first, then time, in bytes, FLOPs, seconds and FLOPs per byte. The arguments come
    back, `prompt` as the context unless given, `activations` as the weights or bf16 for fewer bits;
    then the machine's figures, and:

        fits, max_batch                    weights and KV cache alone, on the fullest device
        weight_bytes, kv_bytes             on the fullest device; total_*: of the whole model
        activation_bytes, activation_rows  what it holds between two kernels, and for how many rows
        paging_bytes                       half a block of the cache for each sequence
        left_bytes                         memory_bytes less these four; it may be below 0
        prefill, decode                    flops, bytes and intensity of `parallel.step`, its
                                           `parts`; memory_s, compute_s, communication_s: each
                                           alone, `bound` the largest; seconds: `Machine.napkin`,
                                           then the `transfers`. What does not fit has no seconds
        tokens_per_s, *_per_user           of a decode step: of the batch, of one sequence
        dollars_*, watts, joules_per_token of all devices; None where the machine's are not known

    Raises ValueError as `ModelShape` and `Layout` do, and where the machine has no figure for the
    format that is computed in, or no link."""
    # 1. What is asked for, and whether the machine has figures for it.
    prompt = context if prompt is None else prompt
    at_least_1(batch=batch, context=context, prompt=prompt)
    plain, said = format_of(weights, "vectors"), getattr(weights, "name", weights)
    computed = activations or (plain if plain in ("fp32", "bf16", "fp16") else "bf16")
    longest = max(context, prompt)
    capacity, half_full = (parallel.fits(shape, layout, machine.memory, batch, tokens, weights, kv)
                           for tokens in (longest, longest + BLOCK // 2))
    if computed not in machine.peak_flops:
        asked = (f"activations={computed!r}" if activations
                 else f"weights={said!r} is computed with in {computed}")
        raise ValueError(f"{asked}: {machine.name} has a peak for {', '.join(machine.peak_flops)}")
    if layout.devices > 1 and not machine.link:
        name, ways = next((name, ways) for name, ways in asdict(layout).items() if ways > 1)
        raise ValueError(f"{name}={ways}: no link to other devices is known of {machine.name}")

    # 2. Capacity. Between two kernels a device holds rows, of a decode step or of a prompt: the
    #    residual stream, and what goes into and comes out of the widest matrix.
    paging_bytes = half_full.kv_bytes - capacity.kv_bytes
    groups, rows = parallel.share(shape, layout.tp).groups, max(layout.microbatch(batch), prompt)
    widest = max(I + O for layer, _ in groups for I, O in layer.matrices().values())
    activation_bytes = rows * ((shape.D + widest) * element_bytes("activations", computed))
    used = capacity.weight_bytes + capacity.kv_bytes + activation_bytes + paging_bytes
    result = {
        "model": shape.name, "machine": machine.name, "batch": batch, "context": context,
        "prompt": prompt, "weights": said, "kv": kv,
        "weights_of_parts": dict(getattr(weights, "parts", ())), "activations": computed,
        "layout": asdict(layout) | {"devices": layout.devices},
        "parameters": shape.parameters(), "active_parameters": shape.active_parameters(),
        "kv_bytes_per_token": shape.kv_bytes_per_token(kv), "fits": bool(capacity),
        "memory_bytes": machine.memory, "weight_bytes": capacity.weight_bytes,
        "kv_bytes": capacity.kv_bytes, "activation_bytes": activation_bytes,
        "paging_bytes": paging_bytes, "activation_rows": rows, "left_bytes": machine.memory - used,
        "max_batch": capacity.max_batch * layout.ep,
        "total_weight_bytes": shape.stored_bytes(weights),
        "total_kv_bytes": shape.kv_bytes(batch, longest, kv),
        "peak_flops": machine.peak(computed), "bandwidth": machine.bandwidth_at(),
        "ridge": machine.ridge(computed), "fixed_s_per_op": machine.fixed_s_per_op,
        "link": machine.link and asdict(machine.link),
    }

    # 3. Time, of what fits.
    for phase, new, held, times in (("prefill", prompt, prompt, layout.filling(batch)),
                                    ("decode", 1, context, 1)):
        work = parallel.step(shape, layout, batch, new, held, weights=weights, kv=kv,
                             activations=computed) * times
        told = [asdict(one) | {"seconds": one.seconds * times} for one in
                parallel.transfers(shape, layout, batch, new, machine.link, computed)]
        terms = {"memory": work.bytes / machine.bandwidth_at(),     # each alone
                 "compute": work.flops / machine.peak(computed),
                 "communication": sum(one["seconds"] for one in told)}
        result[phase] = {
            "flops": work.flops, "bytes": work.bytes, "intensity": work.intensity,
            "parts": parts(work), **{f"{term}_s": seconds for term, seconds in terms.items()},
            "transfers": told, "seconds": machine.napkin(work) + terms["communication"],
            "bound": max(terms, key=terms.get)}
        if not capacity:
            result[phase] |= dict.fromkeys(("compute_s", "memory_s", "communication_s", "seconds",
                                            "bound")) | {"transfers": []}

    # 4. Its price.
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


def parts(work: Work) -> dict[str, dict[str, float]]:
    """FLOPs and bytes of a step by kind of operation. "element-wise" only moves activations."""
    kernels = {"gemm": "matrices", "attention": "attention", "scan": "state space"}
    sums = {name: {"flops": 0.0, "bytes": 0.0} for name in (
        "matrices", "experts", "attention", "state space", "head", "element-wise")}
    for op in work.operations():
        name = ("head" if op.name == "head" else "experts" if op.name.startswith("expert ")
                else kernels.get(op.kernel, "element-wise"))
        sums[name]["flops"] += op.flops
        sums[name]["bytes"] += op.bytes
    return {name: cost for name, cost in sums.items()
            if cost["bytes"] or name not in ("experts", "state space")}


def sweep(shape: ModelShape, machine: Machine, over: str, **options) -> list[dict]:
    """The latency-throughput frontier: a row for each batch, or each context (as `over` says), that
    fits, and the first that does not. `options` are those of `card`, and so are the errors."""
    if over not in ("batch", "context"):
        raise ValueError(f"sweep={over!r}: accepted are batch, context")
    wanted = ("model", "machine", "layout", "batch", "context", "fits", "max_batch",
              "tokens_per_s_per_user", "tokens_per_s", "dollars_per_million_tokens")
    if over == "context":                       # up to the model's; the prompt grows with it
        options["prompt"], longest = None, shape.max_context or 2**17
        values = [*(2**k for k in range(8, 40) if 2**k < longest), longest]
    else:                                       # the largest that fits, and what does not fit
        most = card(shape, machine, **options | {"batch": 1})["max_batch"]
        values = [*(2**k for k in range(40) if 2**k < most), most or 1, 2**most.bit_length()]
    rows = []
    for value in values:
        c = card(shape, machine, **options | {over: value})
        rows.append({name: c[name] for name in wanted}
                    | {name: c["decode"][name] for name in ("seconds", "bound")})
        if not c["fits"]:
            break
    return rows
