"""Each Triton kernel at the size of a real model: what the roofline allows, and on a GPU what the clock says beside PyTorch's own way.

The sizes are those of Llama-3-8B (`clawdemy_kernels.examples`): a batch of 8 with 1,024 tokens each, whose keys and values in one layer
are 32 MiB; one row against 4096 x 4096 weights. The envelope of a kernel is the bytes that must come from memory or go there once.

    clawdemy-infer bench --kernels --checks --json > h100.json         on a GPU: the whole run as data, with the machine that made it
"""

from __future__ import annotations

import datetime
import platform
from dataclasses import asdict, dataclass

import torch

from clawdemy_infer.arithmetic import Work
from clawdemy_infer.roofline import Machine
from clawdemy_infer.tables import Table, number, si


@dataclass(frozen=True)
class KernelRow:
    """`bytes` must move, `asked` are named by the kernel's loads and stores (what is asked for twice may come from a cache).

    On a GPU `measured_s` and `torch_s` are medians, each run with cold caches and without the time that Python takes to launch;
    `of_copy` is bytes / measured_s as a fraction of the bandwidth that a copy reaches there. None without a GPU, or where PyTorch has
    nothing alike.
    """

    kernel: str
    bytes: int
    asked: int
    flops: int
    predicted_s: float
    bound: str
    measured_s: float | None = None
    torch_s: float | None = None
    of_copy: float | None = None

    def as_dict(self) -> dict:
        return asdict(self)


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes/s, read and written, of a copy on the GPU: what every kernel is measured against."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source))


def seconds(work) -> float:
    """As `clawdemy_kernels.clock`, which is imported when first needed, for Triton takes a second."""
    from clawdemy_kernels import clock

    return clock.seconds(work)


def gpu() -> dict:
    """What a run on this GPU means something for."""
    import triton

    of = torch.cuda.get_device_properties(0)
    return {"name": of.name, "multiprocessors": of.multi_processor_count, "memory_bytes": of.total_memory,
            "capability": f"{of.major}.{of.minor}", "torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip,
            "triton": triton.__version__, "system": platform.platform(), "date": datetime.date.today().isoformat()}


@torch.inference_mode()
def rows(machine: Machine, copy: float | None = None) -> list[KernelRow]:
    """One row a kernel. With a `copy` bandwidth they are timed on the GPU; without, only predicted for `machine`."""
    from clawdemy_kernels.examples import LLAMA_3_8B, examples

    made = []
    # Without a GPU nothing is launched, and nothing but sizes is needed: tensors are then made of no memory.
    for name, example in examples(LLAMA_3_8B, "meta" if copy is None else "cuda").items():
        work = Work(example.flops, example.least, name, "bf16")
        prediction = machine.time(work)
        row = {"kernel": name, "bytes": example.least, "asked": example.asked, "flops": example.flops,
               "predicted_s": prediction.seconds, "bound": prediction.bound}
        if copy is not None:
            row["measured_s"] = seconds(example.launch)
            row["of_copy"] = example.least / row["measured_s"] / copy
            row["torch_s"] = example.torch and seconds(example.torch)
        made.append(KernelRow(**row))
    return made


# ---- on paper ----


def card_table(rows: list[KernelRow], machine: Machine) -> Table:
    """What the roofline allows."""
    cells = [(row.kernel, si(row.bytes, "B"), f"{row.asked / row.bytes:.2f}", si(row.flops, "FLOP"), si(row.predicted_s, "s"), row.bound)
             for row in rows]
    header = ("kernel", "must move", "asked ÷ must", "work", "at least", "bound by")
    return Table(header, cells, numeric=header[1:5], title=f"Llama-3-8B sizes in bf16 on {machine.name}")


def timed_table(rows: list[KernelRow], copy: float) -> Table:
    """What the clock says."""
    cells = [(row.kernel, si(row.predicted_s, "s"), si(row.measured_s, "s"), si(row.bytes / row.measured_s, "B/s"), f"{row.of_copy:.2f}",
              si(row.torch_s, "s"), "–" if row.torch_s is None else f"{row.torch_s / row.measured_s:.2f}") for row in rows]
    header = ("kernel", "at least", "measured", "bytes that must move, a second", "of a copy", "PyTorch", "times as fast as PyTorch")
    return Table(header, cells, numeric=header[1:], title=f"A copy reaches {si(copy, 'B/s')}")


def traffic_table(found: list[dict]) -> Table:
    cells = [(row["kernel"], *(f"{row[key]:,}" for key in ("envelope", "asked", "distinct", "sectors")),
              f"{row['dot_flops'] / row['flops']:.1f}" if row["dot_flops"] else "–", "yes" if row["ok"] else "NO") for row in found]
    header = ("kernel", "envelope", "asked for", "of which differ", "sectors", "FLOPs ÷ useful", "as counted?")
    return Table(header, cells, numeric=header[1:6],
                 title="Bytes counted in Triton's interpreter, at small sizes in bf16, beside the envelope")


def values_table(found: list[dict]) -> Table:
    dtypes = list(dict.fromkeys(row["dtype"] for row in found))
    by = {(row["kernel"], row["dtype"]): row for row in found}
    cells = []
    for kernel in dict.fromkeys(row["kernel"] for row in found):
        of = [by.get((kernel, dtype)) for dtype in dtypes]
        cells.append((kernel, *("–" if row is None else f"{row['error']:.1e} ({number(row['share'])})" for row in of),
                      "yes" if all(row is None or row["ok"] for row in of) else "NO"))
    header = ("kernel", *dtypes, "within?")
    return Table(header, cells, numeric=header[1:-1],
                 title="Largest error against fp64, and in brackets as a share of what its dtype allows")


def code_table(found: list[dict]) -> Table:
    cells = [(row["kernel"].removesuffix("_kernel"), row["target"], str(row["registers"]), str(row["spilled"]), f"{row['shared']:,}",
              ", ".join(f"{count} of {size}" for size, count in sorted(row["loads"].items(), key=lambda item: -int(item[0]))) or "–",
              str(row["products"])) for row in found]
    header = ("kernel", "target", "registers", "spilled", "shared bytes", "loads, of bytes a thread", "tensor-core instructions")
    return Table(header, cells, numeric=("registers", "spilled", "shared bytes", "tensor-core instructions"),
                 title="Machine code, compiled for GPUs that need not be here")
