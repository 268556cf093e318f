"""The diagram of lesson 00: a machine and its three numbers."""

from clawdemy_course.drawing import (
    ACTIVATIONS,
    COMPUTE,
    LAUNCH,
    MEMORY,
    WEIGHTS,
    Diagram,
)
from clawdemy_infer.arithmetic import Work, matmul
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.from_config import catalog
from clawdemy_infer.lesson.tables import si

LAUNCH_S = 4e-6
"""Seconds to launch an operation from Python, where the machine does not say."""


def of(count: int, noun: str) -> str:
    """`of(1, "row")` is 1 row, `of(5, "row")` is 5 rows."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def legend(d: Diagram, y: float, *entries: tuple[float, str, str, bool]) -> None:
    """Swatches from left to right: where, what, its colour, and whether it is hatched."""
    for left, name, colour, hatch in entries:
        d.bar(left, y - 8, 26, 16, colour, hatch=hatch)
        d.text(left + 34, y, name, 13)


def machine(machine: Machine | None = None, dtype: str = "bf16", size: int = 4096,
            rows: tuple[int, int] = (1, 1024)) -> Diagram:
    """Memory, bus, caches and cores, the launch, and what two products X[B, size] @ W[size, size]
    cost by each of the three numbers. Without `machine`, an H100 as on its data sheet, and
    an assumed launch overhead. A CPU launches an operation and then runs it; a GPU, as any data
    sheet is taken for, runs while its host launches the next."""
    machine = machine or catalog.machine("h100-sxm")
    device = getattr(machine, "device", "")             # a data sheet has none
    launch = machine.fixed_s_per_op or LAUNCH_S
    assumed = "" if machine.fixed_s_per_op else " (assumed)"
    sheet = machine.name.removeprefix("NVIDIA ").split()[0] + ", data sheet"
    title = "this machine" if device else sheet
    works = [matmul(B, size, size, of(B, "row"), dtype, dtype) for B in rows]
    bandwidth = machine.bandwidth_at(works[0].bytes)
    prices = [si(bandwidth, "B/s"), si(machine.peak(dtype), "FLOP/s"), si(launch, "s")]
    costs = {work.name: [work.bytes / bandwidth, work.flops / machine.peak(dtype), launch]
             for work in works}
    said = "; ".join(f"{name}: bytes {si(a, 's')}, FLOPs {si(b, 's')}, launch {si(c, 's')}"
                     for name, (a, b, c) in costs.items())
    d = Diagram(800, 430, "A machine and its three numbers. Weights lie in memory and cross a "
                f"narrow bus at {prices[0]} into the caches of the processor; its cores compute at "
                f"{prices[1]}; a program launches each operation, in {prices[2]}{assumed}. "
                f"{title}. X is read and Y is written over the same bus. The same weights "
                f"meet {works[0].name} or {works[1].name}: {said}.")
    # 1. the machine
    d.box(20, 66, 190, 164, edge=MEMORY)
    d.text(115, 84, "memory", 15, "middle", bold=True)
    d.box(36, 104, 158, 74, f"weights\n{size:,} × {size:,}", WEIGHTS)
    d.box(36, 186, 158, 30, "activations", ACTIVATIONS)
    d.text(720, 27, title, 13, "middle", bold=True)
    d.box(390, 66, 390, 164, edge=MEMORY)
    d.text(585, 84, "processor", 15, "middle", bold=True)
    d.box(406, 104, 96, 112, "caches,\nregisters", MEMORY)
    for row in range(2):
        for column in range(3):
            d.box(524 + 82 * column, 104 + 59 * row, 76, 53, "core", COMPUTE)
    # 2. bandwidth
    d.step()
    d.arrow((210, 141), (390, 141), colour=WEIGHTS, width=5)
    d.arrow((210, 194), (390, 194), colour=ACTIVATIONS, width=2)
    d.arrow((390, 208), (210, 208), colour=ACTIVATIONS, width=2)
    d.text(298, 106, f"bandwidth\n{prices[0]}", 14, "middle", bold=True)
    # 3. arithmetic
    d.step()
    d.arrow((502, 160), (524, 160), colour=MEMORY, width=3)
    d.text(585, 246, f"peak: {prices[1]} in {dtype}", 14, "middle", bold=True)
    # 4. launch
    d.step()
    d.box(20, 10, 190, 34, "program", MEMORY)
    d.arrow((210, 27), (646, 27), (646, 66), colour=LAUNCH, width=3)
    d.text(428, 44, f"launch overhead: {prices[2]} each{assumed}", 14, "middle", bold=True)
    # 5., 6. the same weights for few rows and for many
    longest = max(seconds for each in costs.values() for seconds in each)
    for left, work in zip((20, 410), works, strict=True):
        d.step()
        _three_terms(d, left, work, costs[work.name], longest, ahead=device != "cpu")
    return d


def _three_terms(d: Diagram, left: float, work: Work, costs: list[float], longest: float,
                  ahead: bool) -> None:
    """Three bars, as long as each term of the time, from `left` to 370 units further. The launch
    adds to the larger of the others, unless the host launches `ahead` of them."""
    d.text(left, 276, f"{work.name}: {si(work.bytes, 'B')}, {si(work.flops, 'FLOP')}", bold=True)
    for row, (name, seconds, colour) in enumerate(zip(
            ("bytes / bandwidth", "FLOPs / peak", "launch"), costs, (WEIGHTS, COMPUTE, LAUNCH),
            strict=True)):
        y = 292 + 28 * row
        d.text(left, y + 10, name, 13)
        end = d.bar(left + 136, y, 160 * seconds / longest, 20, colour)
        d.text(end + 6, y + 10, si(seconds, "s"), 13)
    memory, compute, launch = costs
    bound = max((memory, "memory-bound"), (compute, "compute-bound"), (launch, "launch-bound"))[1]
    total = max(costs) if ahead else max(memory, compute) + launch
    formula = "max(bytes, FLOPs, launch)" if ahead else "max(bytes, FLOPs) + launch"
    d.text(left, 388, f"{formula} = {si(total, 's')}", 14)
    d.text(left, 410, bound, 14, bold=True)
