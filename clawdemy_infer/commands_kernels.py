"""`bench --kernels`: the Triton kernels on the roofline, and on a GPU on the clock; `--checks` adds what is proved without one."""

from __future__ import annotations

import argparse

from clawdemy_infer import catalog
from clawdemy_infer.commands import emit, say, show

WITHOUT_A_GPU = "h100-sxm"


def bench_kernels(args: argparse.Namespace) -> int:
    import torch

    from clawdemy_infer import bench_kernels as bench
    from clawdemy_infer.backends import choose
    from clawdemy_infer.calibrate import this_machine

    choose("cpu", "triton")                     # a clear word where Triton is not installed
    from clawdemy_kernels import blocks as block_sizes
    from clawdemy_kernels import checks
    from clawdemy_kernels.launch import on_gpu

    gpu, copy, chosen, notes = on_gpu(), None, None, []
    if args.machine or not gpu:
        machine = catalog.machine(args.machine or WITHOUT_A_GPU)
    else:
        say("Looking at this machine; up to two minutes if it must be calibrated …")
        machine = this_machine("cuda")
    if not gpu:
        why = "Kernels are interpreted here" if torch.cuda.is_available() else "There is no GPU here"
        notes.append(f"{why}, so none is timed: bytes are counted in Triton's interpreter, and the seconds are those "
                     f"that {machine.name} needs at least. On a machine with a GPU the same command measures.")
    else:
        say("The clock chooses block sizes; a minute or two, most of it the compiler's …")
        copy, chosen = bench.copy_bandwidth(), block_sizes.choose_all(bench.seconds)
    rows = bench.rows(machine, copy)
    show(bench.card_table(rows, machine), stderr=args.json)
    result = {"card": {"machine": machine.name, "bandwidth": machine.bandwidth_at(), "sizes": "Llama-3-8B, batch 8, context 1024, bf16"},
              "device": torch.cuda.get_device_name() if gpu else None, "gpu": bench.gpu() if gpu else None, "blocks": chosen,
              "copy_bytes_per_s": copy, "rows": [row.as_dict() for row in rows]}
    if gpu:
        blocks, right = [bench.timed_table(rows, copy)], True
        notes.append("Bytes are counted in Triton's interpreter: TRITON_INTERPRET=1 before the same command counts them here.")
    else:
        say("Counting bytes in the interpreter …")
        result["traffic"] = checks.traffic()
        blocks = [bench.traffic_table(result["traffic"])]
        right = all(row["ok"] for row in result["traffic"])
    if args.checks:
        say("Computing in three dtypes beside fp64 …")
        result["values"] = checks.values(device="cuda" if gpu else "cpu")
        say("Compiling for four GPUs; a minute or two …")
        result["code"] = checks.code()
        right = right and all(row["ok"] for row in result["values"]) and not any(row["spilled"] for row in result["code"])
        blocks += [bench.values_table(result["values"]), bench.code_table(result["code"])]
    if not args.json:
        show("", *blocks, *notes)
    emit(result | {"notes": notes})
    return 0 if right else 1
