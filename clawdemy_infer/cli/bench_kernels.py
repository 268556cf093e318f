"""`bench --kernels`: the Triton kernels on the roofline, and on a GPU on the clock; `--checks` adds
what is proved without one."""

from clawdemy_infer.cli.arguments import Args, calibrated, checked, option
from clawdemy_infer.cli.output import answer, say, show, table_of
from clawdemy_infer.from_config import catalog
from clawdemy_infer.lesson.tables import si

WITHOUT_A_GPU = "h100-sxm"


def add(bench) -> None:
    group = bench.add_argument_group("kernels, instead of ours")
    option(group, "--kernels", "each Triton kernel: its bytes, and its time on a GPU", bool)
    option(group, "--checks", "also their errors and their machine code for four GPUs", bool)
    option(group, "--machine X", f"to predict for (default: this GPU, else {WITHOUT_A_GPU})")


def run(args: Args) -> int:
    import torch

    from clawdemy_infer.fast.backends import choose
    from clawdemy_infer.rigs import bench_kernels as rig
    choose("cpu", "triton")                     # a clear word where Triton is not installed
    from clawdemy_kernels import blocks as block_sizes
    from clawdemy_kernels import checks, clock
    from clawdemy_kernels.launch import on_gpu

    # 1. The machine, this GPU or one on paper, and what it needs at least.
    gpu, copy, chosen = on_gpu(), None, None
    if args.machine or not gpu:
        with checked():
            machine = catalog.machine(args.machine or WITHOUT_A_GPU)
    else:
        machine = calibrated("cuda")
    if gpu:
        say("The clock chooses block sizes; a minute or two, most of it the compiler's …")
        copy, chosen = clock.copy_bandwidth(), block_sizes.choose_all(clock.seconds)
    rows = rig.kernel_rows(machine, copy)
    show(table_of(rows, "kernel bytes asked flops predicted_s bound",
                  f"Llama-3-8B sizes in bf16 on {machine.name}"), stderr=args.json)
    result = {"card": {"machine": machine.name, "bandwidth": machine.bandwidth_at(),
                       "sizes": "Llama-3-8B, batch 8, context 1024, bf16"},
              "device": torch.cuda.get_device_name() if gpu else None,
              "gpu": clock.gpu() if gpu else None, "blocks": chosen, "copy_bytes_per_s": copy,
              "rows": rows}
    # 2. Times on a GPU, counted bytes without one; then values and machine code.
    if gpu:
        heads = {"kernel": "kernel", "predicted_s": "at least", "measured_s": "measured",
                 "of_copy": "of a copy", "torch_s": "PyTorch",
                 "over_torch": "times as fast as PyTorch"}
        tables = [table_of(rows, heads, f"A copy reaches {si(copy, 'B/s')}")]
        note = ("Bytes are counted in Triton's interpreter: TRITON_INTERPRET=1 before the same "
                "command counts them here.")
    else:
        say("Counting bytes in the interpreter …")
        result["traffic"] = checks.traffic()
        tables = [table_of(result["traffic"], "kernel envelope asked distinct sectors flops "
                           "dot_flops ok", "Bytes counted at small sizes in bf16")]
        why = "Kernels are interpreted" if torch.cuda.is_available() else "There is no GPU here"
        note = (f"{why}, so none is timed: bytes are counted in Triton's interpreter, and the "
                f"seconds are those that {machine.name} needs at least.")
    if args.checks:
        say("Computing in three dtypes beside fp64 …")
        result["values"] = checks.values(device="cuda" if gpu else "cpu")
        say("Compiling for four GPUs; a minute or two …")
        result["code"] = checks.code()
        tables += [table_of(result["values"], "kernel dtype share ok",
                            "Largest error against fp64, as a share of what its dtype allows"),
                   table_of(result["code"], "kernel target registers spilled shared products",
                            "Machine code, compiled for GPUs that need not be here")]
    answer(args.json, result | {"notes": [note]}, "", *tables, note)
    checked_rows = [*result.get("traffic", ()), *result.get("values", ())]
    spilled = any(row["spilled"] for row in result.get("code", ()))
    return 0 if all(row["ok"] for row in checked_rows) and not spilled else 1
