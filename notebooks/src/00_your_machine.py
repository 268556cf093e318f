# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 · How fast could anything run here?
#
# > Based on the structure of Stanford CS336, 'Language Modeling from Scratch,' by Tatsunori Hashimoto and Percy Liang (cs336.stanford.edu). This is an independent structural mirror in original prose; it reproduces no course materials, and Stanford does not endorse it.
#
# **For further study.** CS336, lecture 10 (inference) · Williams et al. 2009, *Roofline* (this lesson) · Ainslie et al. 2023, *GQA* ·
# Yu et al. 2022, *Orca* (continuous batching) · Kwon et al. 2023, *PagedAttention* · Frantar et al. 2022, *GPTQ* · Lin et al. 2023, *AWQ* ·
# Leviathan et al. 2023, *speculative decoding*.

# %% [markdown]
# ### How to take this course
#
# Every lesson plays one game: **predict** a cost on the back of an envelope, **run** it, **compare**, and explain what is left over.
# The explaining is where the learning is. A prediction that is out by a factor of three is not a failure; it is a question.
# Shift+Enter runs a cell and goes to the next.
#
# - **Guess before you run.** Where you see `lesson.guess("…", ...)`, write your number over the dots, with its unit: `"20 ms"`, `"50 GB/s"`. Nobody
#   grades it. The table at the end sets it beside the envelope and the stopwatch. Before an explanation, `lesson.cause("…", ...)` asks what you
#   take for the cause.
# - **Move the sliders.** Under each there is a picture of the same thing, for when no kernel runs: on GitHub, on paper, on a telephone.
# - **Do the exercises.** They check themselves. An open one stops nothing, and hint and solution lie folded below it.
# - **No GPU is needed.** With an NVIDIA GPU the same cells run on it, and everything is faster; without one they run on your processor.
#   The arithmetic is the same, and so are the surprises.
# - **Run lessons on a quiet machine.** Plug the laptop in, close the video call. A busy neighbour shows up in every number here, and makes every
#   predicted interval wider.

# %% [markdown]
# ## Question
#
# Before any language model: how fast could *anything* run on the machine in front of you?
#
# Here are three small jobs. Which takes longest, and by what factor?
#
# 1. add up a long vector of numbers,
# 2. multiply a stack of matrices with one vector,
# 3. multiply the same matrices with 64 vectors at once.
#
# The third does 64 times the arithmetic of the second. Does it take 64 times as long? Write your answer down. By the end of this lesson you
# will be able to work it out for any machine, from three numbers.

# %%
import math
from pathlib import Path
from statistics import median

from clawdemy_infer.arithmetic import BYTES, Work, matmul, total
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.fast import PackedLinear
from clawdemy_infer.fast.launches import count_ops
from clawdemy_infer.from_config import catalog
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.tables import Table, number, si
from clawdemy_infer.machine.calibrate import fingerprint, this_machine
from clawdemy_infer.machine.present import bracketed, default_device, speeds_now
from clawdemy_infer.machine.probes import bandwidth_probes
from clawdemy_infer.timing import alternate, stopwatch

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from matplotlib.ticker import LogLocator
from torch.nn import functional as F

plots.use_style()
plt.rcParams["savefig.dpi"] = 80                    # many figures, and the file stays small
device = default_device()
lesson = Lesson("00 your_machine", machine=fingerprint(device)["device"])

# %% [markdown]
# ## Envelope: three numbers
#
# To run something, a processor does three things, and each has its price:
#
# | number | unit | what it says |
# |---|---|---|
# | **bandwidth** | bytes/s | how fast numbers come from memory to where the arithmetic is done |
# | **peak** | FLOP/s | how fast the arithmetic is, once the numbers are there; it depends on the dtype |
# | **launch overhead** | s | what it takes to *launch* an operation, however small it is |
#
# FLOPs (small s) are a count: one multiplication or one addition each. FLOP/s is a rate.
#
# First a trap. Memory is sold in GB and addressed in GiB, and people write one and mean the other. In this course **GB is 10⁹ bytes,
# GiB is 2³⁰**, and inside the code there are only bytes.

# %%
GB, GiB, MiB = 10**9, 2**30, 2**20
written = {"256 MiB": 256 * MiB, "1 GiB": GiB, "80 GB": 80 * GB, "80 GiB": 80 * GiB}
Table(
    ["written", "bytes", "in GB"],
    [[name, f"{size:,}", f"{size / GB:.3f}"] for name, size in written.items()],
    numeric=["bytes", "in GB"],
)

# %% [markdown]
# The last line is an H100: what the box calls 80 GB is 80 GiB. Seven per cent is not much, until it is the seven per cent that your model does
# not fit into.
#
# ### Count the sum of a vector
# We count what *must* happen: every input read from memory once, every output written once. Beside each step stands its cost.

# %%
n, fp32 = 2**26, 4            # how many numbers; bytes in each

flops, bytes = 0, 0
bytes += n * fp32             # read x, each number once
flops += n - 1                # one addition for each number but the first
bytes += fp32                 # write the result: one number

vector_sum = Work(flops, bytes, "sum")
assert math.isclose(vector_sum.intensity, 1 / 4, rel_tol=1e-6)
Markdown(f"Reading {si(bytes, 'B')} for {si(flops, 'FLOP')}: "
         f"**{vector_sum.intensity:.3f} FLOPs per byte**, whatever n is.")

# %% [markdown]
# FLOPs per byte: that ratio has a name, **arithmetic intensity**, and it is the most useful number in this course. It belongs to the *work*,
# not to the machine. A sum does little with each number that it went to all the trouble of fetching.
#
# ### Count the addition of two vectors

# %%
flops, bytes = 0, 0
bytes += 2 * n * fp32         # read x and y
flops += n                    # one addition each
bytes += n * fp32             # write z

vector_add = Work(flops, bytes, "add")
assert math.isclose(vector_add.intensity, 1 / 12)
Markdown(f"**{number(vector_add.intensity)} FLOPs per byte**: "
         "as many additions as the sum, and three times the bytes.")

# %% [markdown]
# ### Count a square matrix product
# `X[D, D] @ W[D, D]`. Each of the D·D results is D multiplications and D additions (the first is added to zero).

# %%
D = 4096

flops, bytes = 0, 0
bytes += D * D * fp32         # read X
bytes += D * D * fp32         # read W
flops += D * D * 2 * D        # D·D results, D multiply-adds each
bytes += D * D * fp32         # write Y

square = Work(flops, bytes, "square matmul")
assert math.isclose(square.intensity, D / 6)              # 2 D³ / (3 D² · 4 bytes)
Markdown(f"**{number(square.intensity)} FLOPs per byte**, and it grows with D: "
         "that is what is special about a matrix product.")

# %% [markdown]
# Here is the difference in one table. The sum and the addition do the same to every byte at any size. The matrix product uses each number D
# times, so its intensity is 2D³ / 3D²·(bytes per number): **D/6 in fp32, D/3 in bf16**. Half the bytes, twice the intensity.

# %%
header, rows = ["D", "sum of D·D", "add of D·D", "matmul, fp32", "matmul, bf16"], []
for size in (64, 512, 4096):
    small, half = matmul(size, size, size), matmul(size, size, size, weights="bf16", activations="bf16")
    assert math.isclose(small.intensity, size / 6) and math.isclose(half.intensity, size / 3)
    rows.append([f"{size:,}", "1/4", "1/12", number(small.intensity), number(half.intensity)])
Table(header, rows, numeric=header, title="FLOPs per byte")

# %% [markdown]
# ### The roofline
# Now the machine. Fetching and computing go on at the same time, so the slower of the two decides:
#
# > time = max( FLOPs / peak , bytes / bandwidth ) + launch overhead
#
# Which one it is depends on the intensity alone. Both terms are equal where FLOPs / bytes = **peak / bandwidth**: the machine's **ridge point**.
# Below it, work is *memory-bound*: the arithmetic waits. Above it, *compute-bound*: the memory waits.
#
# We take the H100, as the lecture does, from its data sheet:

# %%
h100 = catalog.machine("h100-sxm")
ridge = h100.peak("bf16") / h100.bandwidth_at()
assert round(ridge) == 295
Markdown(f"{si(h100.peak('bf16'), 'FLOP/s')} in bf16 over {si(h100.bandwidth_at(), 'B/s')}: "
         f"a ridge point of **{ridge:.0f} FLOPs per byte**. An H100 has to do {ridge:.0f} FLOPs with every byte "
         "that it reads, or its arithmetic is idle some of the time.")

# %% [markdown]
# How do our jobs fare? The same three counts in bf16, and with them the product of the large matrix with a single vector, which is what
# a language model does most of the time, as lesson 01 will show.

# %%
def in_bf16():
    """The four jobs with two bytes to a number."""
    return [
        Work(n - 1, 2 * n + 2, "sum", "bf16"),
        Work(n, 3 * 2 * n, "add", "bf16"),
        matmul(1, D, D, "matrix × vector", weights="bf16", activations="bf16"),
        matmul(D, D, D, "matrix × matrix", weights="bf16", activations="bf16"),
    ]


header, rows = ["on an H100, bf16", "FLOPs", "bytes", "FLOPs/byte", "compute", "memory", "bound by"], []
for work in in_bf16():
    compute, memory = work.flops / h100.peak("bf16"), work.bytes / h100.bandwidth_at()
    assert max(compute, memory) == h100.napkin(work)             # the library does no more than this
    assert (memory > compute) == (work.intensity < ridge)        # two ways to say the same
    rows.append([work.name, si(work.flops, "FLOP"), si(work.bytes, "B"), number(work.intensity),
                 si(compute, "s"), si(memory, "s"), "memory" if memory > compute else "compute"])
Table(header, rows, numeric=header[1:-1])

# %% [markdown]
# Draw the best rate that a machine can reach against intensity, and you see why it is called a roof: up the slope with the bandwidth, then flat
# at the peak.

# %%
fig, ax = plt.subplots()
ax.axvspan(0.05, ridge, color=plots.COLOURS[0], alpha=0.06, linewidth=0)
ax.axvspan(ridge, 20_000, color=plots.COLOURS[1], alpha=0.06, linewidth=0)
plots.roofline(ax, h100, "bf16", intensities=(0.05, 20_000))
for work in in_bf16():
    plots.mark(ax, h100, work, label=work.name)
ax.set_xlim(0.05, 20_000)
ax.set_ylim(1e11, 4e15)
ax.text(0.07, 2e15, "memory-bound", color=plots.COLOURS[0], fontweight="bold")
ax.text(ridge * 1.25, 2e15, "compute-bound", color=plots.COLOURS[1], fontweight="bold")
ax.annotate(f"ridge point: {ridge:.0f} FLOPs per byte", (ridge, h100.peak("bf16")),
            xytext=(-8, 4), textcoords="offset points", ha="right", fontsize=9)
ax.set_title("The roof of an H100, and four jobs under it")
plots.show(fig, "The roof of an H100: the attainable rate rises with the intensity up to the ridge point at 295 FLOPs per byte, then it is flat. Sum, "
                "addition and matrix times vector lie far down the slope, matrix times matrix under the flat roof.")

# %% [markdown]
# ## Prediction: your own machine
#
# Now yours. What are its three numbers? Write your guess over the dots, with its unit: `"50 GB/s"`, `"200 GFLOP/s"`, `"20 µs"`. You do not know? Then
# guess the more: that is when a guess teaches most.

# %% tags=["guess"]
lesson.guess("main memory, reading", ...)
lesson.guess("peak in fp32", ...)
lesson.guess("kernel-launch overhead", ...)

# %% [markdown]
# And here is ours, from what one can read on a box. For a processor: ordinary memory comes in two channels of 8 bytes, with 3.2 billion transfers
# a second (DDR4-3200). A core runs at about 3 GHz and has two units that do a fused multiply-add on 8 fp32 numbers in every
# cycle. For a GPU we take an L4's data sheet; if you know yours, take that. And to launch an operation: some hundred Python
# bytecodes and a dispatcher, say 10 µs.

# %% tags=["nbval-ignore-output"]
if device == "cuda":
    bandwidth, peak = catalog.machine("l4").bandwidth_at(), catalog.machine("l4").peak("fp32")
else:
    bandwidth = 2 * 8 * 3.2e9                              # channels · bytes · transfers/s
    peak = torch.get_num_threads() * 3e9 * (2 * 8 * 2)     # cores · cycles/s · (units · lanes · multiply and add)
box = Machine("as on the box", ((1.0, bandwidth),), {"fp32": peak}, memory=8 * GiB, fixed_s_per_op=10e-6)

lesson.predict("main memory, reading", napkin=box.bandwidth_at(), unit="B/s")
lesson.predict("peak in fp32", napkin=box.peak("fp32"), unit="FLOP/s")
lesson.predict("kernel-launch overhead", napkin=box.fixed_s_per_op, unit="s")
lesson.reveal()

# %% [markdown]
# ### The jobs
# Five kernels and a mixture. The matrix products go through a stack of 16 matrices, 1,024 × 1,024 each, as a model goes through its layers; M is
# the number of rows that go through together: `X[M, I] @ W[I, O]`, with I inputs and O outputs.
#
# A `PackedLinear` is the layer that this course's models are made of: `F.linear`, with the weight laid out as the fastest kernel of your processor
# likes it. Which kernel that is follows from the processor and the format; `clawdemy-infer doctor` shows it.
#
# The last job is a caricature of what a language model does for one token: a matrix, a few tiny operations, the next matrix.

# %%
x = torch.randn(n, device=device)
left, right = x.chunk(2)                                  # the addition works on two halves
z = torch.empty_like(left)
stack = [PackedLinear("fp32", torch.randn(1024, 1024, device=device)) for _ in range(16)]
small_stack = [PackedLinear("fp32", torch.randn(640, 640, device=device)) for _ in range(48)]
inputs = {M: torch.randn(M, 1024, device=device) for M in (1, 64, 1024)}


def products(M):
    for layer in stack:
        layer(inputs[M])


def toy_products():
    row = inputs[1][:, :640]
    for layer in small_stack:
        layer(row)


def toy_step():
    row = first = inputs[1][:, :640]
    for layer in small_stack:
        row = layer(row)
        row = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + 1e-5)     # a norm: five tiny operations
        row = F.silu(row) * first + row                                         # a gate and a residual: three more
    return row


jobs = {                                                  # what runs
    "sum of 67 M numbers": lambda: x.sum(),
    "add of 34 M numbers": lambda: torch.add(left, right, out=z),
    "16 products, M = 1": lambda: products(1),
    "16 products, M = 64": lambda: products(64),
    "16 products, M = 1,024": lambda: products(1024),
    "toy step": toy_step,
}
works = {                                                 # what it costs
    "sum of 67 M numbers": vector_sum,
    "add of 34 M numbers": Work(n / 2, 3 * n / 2 * fp32, "add"),
    "16 products, M = 1": matmul(1, 1024, 1024, "products") * 16,
    "16 products, M = 64": matmul(64, 1024, 1024, "products") * 16,
    "16 products, M = 1,024": matmul(1024, 1024, 1024, "products") * 16,
    "toy step": total("toy step", [
        matmul(1, 640, 640, "products") * 48,
        Work(640, 2 * 640 * fp32, "element-wise") * (48 * 8),
    ]),
}
Table(
    ["job", "FLOPs", "bytes", "FLOPs/byte"],
    [[name, si(work.flops, "FLOP"), si(work.bytes, "B"), number(work.intensity)] for name, work in works.items()],
    numeric=["FLOPs", "bytes", "FLOPs/byte"],
)

# %% [markdown]
# Look at the three products: the bytes hardly move while the FLOPs grow a thousandfold. And the toy step asks for as little as the products with
# M = 1. It looks harmless on paper.
#
# Your guesses. You have seen all that is needed: bytes over bandwidth, FLOPs over peak, the larger of the two.

# %% tags=["guess"]
lesson.guess("sum of 67 M numbers", ...)
lesson.guess("add of 34 M numbers", ...)
lesson.guess("16 products, M = 1", ...)
lesson.guess("16 products, M = 64", ...)
lesson.guess("16 products, M = 1,024", ...)
lesson.guess("toy step", ...)

# %% tags=["nbval-ignore-output"]
ops = {name: count_ops(job) for name, job in jobs.items()}      # how many PyTorch has to launch: counted, not timed

header, rows = ["job", "launches", "as on the box", "bound by", "on an H100"], []
for name, work in works.items():
    paper = box.time(work, ops[name])
    rows.append([name, f"{ops[name]:,}", si(paper.seconds, "s"), paper.bound, si(h100.napkin(work), "s")])
Table(header, rows, numeric=["launches", "as on the box", "on an H100"], title="Seconds, before anything has run")

# %% [markdown]
# ## Measurement: first the machine, then the jobs
#
# A calibration measures the three numbers in at most 20 seconds by the clock, and a little more: the bandwidth for working sets of several sizes, the
# rate of a matrix product for several numbers of rows M. It does so with other shapes than those of our jobs. On a busy machine it takes no longer;
# it takes fewer samples, and says with each figure how far they were apart. The result is kept, and the later lessons take it from there.
#
# `this_machine()` calibrates if nothing is kept yet. Else it takes what is kept, looks for a third of a second at how fast the machine is right now,
# and scales all figures to that; if the machine has changed by more than a fifth, it says so. It never calibrates again unasked: the command for
# that is `clawdemy-infer calibrate`.

# %% tags=["nbval-ignore-output"]
machine = lesson.calibrated = this_machine(device)

lesson.measure("main memory, reading", machine.bandwidth_at())
lesson.measure("peak in fp32", machine.peak("fp32"))
lesson.measure("kernel-launch overhead", machine.fixed_s_per_op)
Table(["", "as on the box", "measured"],
      [["main memory, reading", si(box.bandwidth_at(), "B/s"), si(machine.bandwidth_at(), "B/s")],
       ["peak in fp32", si(box.peak("fp32"), "FLOP/s"), si(machine.peak("fp32"), "FLOP/s")],
       ["kernel-launch overhead", si(box.fixed_s_per_op, "s"), si(machine.fixed_s_per_op, "s")]],
      numeric=["as on the box", "measured"], title=f"{machine.name}, {machine.source}")

# %% [markdown]
# These figures are the card that stands at the top of each lesson from here on, with the speed of the moment below them.

# %% tags=["nbval-ignore-output"]
lesson.card()

# %% [markdown]
# A machine is not the same from one minute to the next: a laptop grows warm, a rented core has neighbours. `speeds_now` is the look that lessons take: three
# short probes of how fast the machine reads, computes and launches at this moment, as fractions of what the calibration found.

# %% tags=["nbval-ignore-output"]
Table(["at this moment", "of the calibrated speed"],
      [[what, f"{speed:.0%}"] for what, speed in zip(("reading", "computing", "launching"), speeds_now(machine)[:3], strict=True)],
      numeric=["of the calibrated speed"])

# %% [markdown]
# ### Bandwidth is not one number
# "Memory" is a ladder: small caches near the arithmetic, larger and slower ones behind them, main memory last. What we read again and again stays
# on the highest rung that holds all of it. So let us sum arrays of growing size, now. The large dots are what the calibration keeps of the same
# sums, scaled to today's speed.

# %% tags=["nbval-ignore-output"]
def caches():
    """Bytes of the second and third cache, where Linux says it. Each core has an L2 of its own, and all cores work on a sum."""
    found = {}
    for cache in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*") if device == "cpu" else []:
        level, size = (cache / "level").read_text().strip(), (cache / "size").read_text().strip()
        if level in "23" and size.endswith("K"):
            found[f"L{level}"] = int(size[:-1]) * 1024 * (torch.get_num_threads() if level == "2" else 1)
    return found


sizes = [2**p for p in range(15, 31) if 2**p <= machine.memory / 8]
curve = [(probe.at, median(probe.sample() for _ in range(5))) for probe in bandwidth_probes(sizes, device)]
kept = dict(machine.bandwidth)
apart = [now / kept[size] for size, now in curve if size in kept]

fig, ax = plt.subplots()
ax.semilogx(*zip(*curve, strict=True), color=plots.MEASURED, base=2)
ax.plot(list(kept), list(kept.values()), "o", color=plots.ROOFLINE, markersize=8,
        label="kept by the calibration")
ax.axhline(machine.bandwidth_at(), color=plots.NAPKIN, linestyle="--", linewidth=1,
           label=f"the napkin's number: {si(machine.bandwidth_at(), 'B/s')}")
for level, size in caches().items():
    ax.axvline(size, color="black", linewidth=0.8, linestyle=":")
    ax.text(size, 0.02, f" {level}", transform=ax.get_xaxis_transform(), va="bottom", fontsize=9)
ax.set_ylim(bottom=0)
plots.units(ax.yaxis, "B/s")
ax.set_xticks([2**p for p in range(15, 31, 3)], ["32 KiB", "256 KiB", "2 MiB", "16 MiB", "128 MiB", "1 GiB"])
ax.set_xlabel("working set")
ax.set_ylabel("read bandwidth")
ax.set_title("The same sum, from nearer and farther memory")
ax.legend()
plots.show(fig, f"Read bandwidth against the working set, read now: at most {si(max(rate for _, rate in curve), 'B/s')}, and {si(curve[-1][1], 'B/s')} "
                f"from main memory. The dots are the calibration's: the curve is at {min(apart):.0%} to {max(apart):.0%} of them.")

# %% tags=["nbval-ignore-output"]
off = max(max(ratio, 1 / ratio) for ratio in apart) - 1
Markdown(f"Where there are dots, the curve is at {min(apart):.0%} to {max(apart):.0%} of them: "
         + ("the machine reads now as it was calibrated." if off <= 0.15 else
            f"the same probe, and up to {off:.0%} apart. The calibration took its samples between other probes, at another moment; "
            "a prediction from the dots is off by as much, unless it is made for the speed of its own moment."))

# %% [markdown]
# Read it from the right. The flat end is main memory, and this is the number that matters for a language model: its weights are larger than any cache.
# Further left the array fits into a cache, and the same instructions run faster. At the far left the curve falls again. That is not slow
# memory: the arrays are so small that *launching* the sum takes longer than the sum.
#
# If your curve jumps about, or its left end is lower than its right, somebody else is using your cores. Close what you can and run again.
#
# ### Where is the ridge, in rows?
# For a matrix product the intensity is set by M, the rows that share one reading of the matrix. While M is small beside I and O, the weight makes up
# nearly all of the bytes, and
#
# > intensity ≈ 2·M·I·O / (I·O·bytes per weight) = 2M / (bytes per weight)
#
# So each row is worth one FLOP per byte in bf16, half a FLOP per byte in fp32, and four in int4. The ridge is then at a certain number of rows. The dashed lines are the
# napkin, with its two numbers; the dots are what the calibration measured.

# %% tags=["nbval-ignore-output"]
fig, ax = plt.subplots()
for (dtype, points), colour in zip(machine.rates["gemm"].items(), plots.COLOURS, strict=False):
    rows_at_ridge = machine.ridge(dtype) * BYTES[dtype] / 2
    edge = sorted([1, min(max(rows_at_ridge, 1), 1024), 1024])
    roof = [min(machine.peak(dtype), 2 * m / BYTES[dtype] * machine.bandwidth_at()) for m in edge]
    ax.loglog(edge, roof, "--", color=colour, linewidth=1.2)
    ax.loglog(*zip(*points, strict=True), "o-", color=colour, markersize=5,
              label=f"{dtype}: ridge at {rows_at_ridge:.0f} rows")
ax.set_xscale("log", base=2)
ax.set_xticks([m for m, _ in points], [f"{m:,}" for m, _ in points])
ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
plots.units(ax.yaxis, "FLOP/s")
ax.set_xlabel("rows M that share one reading of the matrix")
ax.set_ylabel("rate")
ax.set_title("A matrix product, from one row to a thousand")
ax.legend(loc="lower right")
plots.show(fig, "Rate of a matrix product against the rows M, from one to thousands, in each format, as measured: below the dashed roof of the "
                "napkin, and farthest from it near its edge.")

# %% [markdown]
# The roof has a sharp edge, the machine a round shoulder. Well before the ridge the rate falls behind the dashed line, because near the ridge both
# memory and arithmetic are busy, and no kernel overlaps them perfectly. And at M = 1 the dots may lie far below the slope: there are processors
# whose matrix-vector kernel does not read as fast as a plain sum. The napkin cannot know that. The calibration does: it has measured it.

# %% tags=["nbval-ignore-output"]
header, rows = ["format", "peak", "ridge, FLOPs/byte", "ridge in rows", "half of peak by M =", "FLOPs missed in one launch"], []
for dtype in machine.rates["gemm"]:
    half = [m for m, rate in machine.rates["gemm"][dtype] if rate >= machine.peak(dtype) / 2]
    rows.append([dtype, si(machine.peak(dtype), "FLOP/s"), f"{machine.ridge(dtype):.1f}",
                 f"{machine.ridge(dtype) * BYTES[dtype] / 2:.0f}", f"{half[0]:,}" if half else "–",
                 si(machine.fixed_s_per_op * machine.peak(dtype), "FLOP")])
Table(header, rows, numeric=header[1:])

# %% [markdown]
# ### Now the jobs
# Two predictions, made before the clock starts, and never mixed up in this course:
#
# - the **napkin**: two numbers, main-memory bandwidth and peak, as you would do it by hand;
# - the **calibrated roofline**: the bandwidth for a working set of that size, the rate at that M, and the launch overhead of every operation that is not
#   in that rate already. It says an *interval*: as wide as the calibration's samples were apart, and a little more for all that no probe can know.

# %% tags=["nbval-ignore-output"]
in_rate = {name: count for name, count in ops.items() if "products" in name} | {"toy step": count_ops(toy_products)}
predicted = {name: machine.time(work, ops[name] - in_rate.get(name, 0)) for name, work in works.items()}
for name, work in works.items():
    lesson.predict(name, napkin=machine.napkin(work), predicted=predicted[name], unit="s")
lesson.reveal(*jobs)

# %% [markdown]
# We quote the median of several runs, and look at the machine right before and right after them. What `speeds_now` sees then makes the interval wider:
# it also holds what the machine would have done at those speeds. It never moves the interval's centre, and the measured time changes nothing of the
# prediction. The toy step runs by turns with its matrix products alone, so that we know what the rest of it takes.

# %% tags=["nbval-ignore-output"]
watch = bracketed(machine)
times = {name: watch(job, repeats=9) for name, job in jobs.items() if name != "toy step"}
in_turn = watch({"toy step": toy_step, "its products": toy_products}, repeats=9)
times["toy step"] = in_turn["toy step"]


def part(name, work, seconds, **measured):
    """A part of a job: by the napkin, predicted and measured."""
    expected = machine.time(work, ops["toy step"] - in_rate["toy step"] if name == "launches" else 0)
    return {"name": name, "napkin_s": machine.napkin(work), "predicted_s": expected.seconds, "measured_s": seconds, **measured}


one, toy = "16 products, M = 1", times["toy step"].median
of_products = min(in_turn["its products"].median, toy)
matrices, others = works["toy step"].parts
parts = {one: [part("products", works[one], times[one].median)],
         "toy step": [part("products", matrices, of_products),
                      part("launches", others, toy - of_products, unit="launches/s",
                           reached=(ops["toy step"] - in_rate["toy step"]) / max(toy - of_products, 1e-9))]}
for name, timing in times.items():
    lesson.measure(name, timing, parts=parts.get(name, ()))

# %% tags=["nbval-ignore-output"]
spread = max(times, key=lambda name: times[name].spread)
many = "16 products, M = 64"
Markdown(f"So, the opening question: 64 times the arithmetic took **{times[many].median / times[one].median:.1f} times** as "
         f"long here. On an H100 it would be {h100.napkin(works[many]) / h100.napkin(works[one]):.1f} times, says the napkin. "
         f"(The unsteadiest job was “{spread}”, with a spread of {times[spread].spread:.0%}. "
         "Above 10% the machine was busy with something else.)")

# %% [markdown]
# ## Reconciliation: what is left over
#
# The toy step asks for as little as the 16 products with M = 1. What is the largest part of what it took beyond the napkin? Commit yourself first: write
# one of the causes over the dots.

# %% tags=["guess"]
# "products", "launches", "memory was slower than calibrated", "memory was faster than calibrated", "not explained"
lesson.cause("toy step", ...)

# %% [markdown]
# From the napkin to the stopwatch, step by step. Each bar was measured by itself: the memory's speed around the run, then each part, by what it took
# beyond its share of the napkin. What no bar accounts for is called *not explained*.

# %% tags=["nbval-ignore-output"]
lesson.explain("toy step")

# %% [markdown]
# The products with one row are a single part: all that is to tell is at which share of the memory's speed they read.

# %% tags=["nbval-ignore-output"]
lesson.explain("16 products, M = 1")

# %% [markdown]
# And the sum is the bandwidth's own kernel. Beside the speed of that moment nothing is measured that could explain it.

# %% tags=["nbval-ignore-output"]
lesson.explain("sum of 67 M numbers")

# %% [markdown]
# All of it in one table: what was said before, and what came out.

# %% tags=["nbval-ignore-output"]
lesson.table()

# %% [markdown]
# And the same jobs under the roof of this machine. The roof is the napkin's: two numbers. A dot on the roof did all that two numbers promise; how far it
# hangs below is the part that two numbers do not know.

# %% tags=["nbval-ignore-output"]
fig, ax = plt.subplots()
plots.roofline(ax, machine, "fp32", colour=plots.ROOFLINE, intensities=(0.02, 3_000))
for name, work in works.items():
    short = name.removeprefix("16 products, ").split(" of ")[0]
    plots.mark(ax, machine, work, seconds=times[name].median, label=short, left=short in ("sum", "add"))
ax.set_title(f"This machine, fp32: ridge at {machine.ridge('fp32'):.1f} FLOPs per byte")
plots.show(fig, "The jobs under the roof of this machine: " + "; ".join(
    f"{name} at {works[name].flops / times[name].median / min(machine.peak('fp32'), works[name].intensity * machine.bandwidth_at()):.0%} of the roof"
    for name in works) + ".")

# %% [markdown]
# What can hide in such a distance, on any machine:
#
# - **Which memory.** One bandwidth is right for data that comes from main memory. What fits into a cache is faster, and the napkin is too slow for it.
# - **Traffic that we did not count.** A processor's cache works in lines of 64 bytes or so, and to write into a line it may first fetch it. The addition
#   asked for three trips over the bus; there can be four. (The same happens wherever a step's working set drops out of a cache between
#   two uses: bytes that we counted once are read twice.)
# - **Kernels that do not reach the bandwidth.** To keep the memory busy, a kernel must have many loads in flight at every moment. A sum does that
#   more easily than a matrix-vector product.
# - **The shoulder.** Near the ridge the maximum of two times is too kind; nothing overlaps perfectly.
# - **Launches.** Hundreds of them at some microseconds each. A toy repeats the same few operations; a real model's layer has dozens of kinds.
#
# ### When the roofline loses
# For tiny operations bytes and FLOPs are beside the point. Here is the addition again, from one number up, in a tight loop.

# %% tags=["nbval-ignore-output"]
def tiny_add(size):
    """Seconds of one addition of `size` numbers, out of a loop of some."""
    a, b, out = left[:size], right[:size], z[:size]
    loop = max(1, min(200, 2**21 // size))
    return stopwatch(lambda: [torch.add(a, b, out=out) for _ in range(loop)], repeats=5).median / loop


counts = [4**p for p in range(13)]
seconds = [tiny_add(count) for count in counts]
adds = [Work(count, 12 * count) for count in counts]
threshold = machine.fixed_s_per_op * machine.bandwidth_at() / 12

fig, ax = plt.subplots()
ax.loglog(counts, [machine.napkin(add) for add in adds], "--", color=plots.NAPKIN,
          label="napkin: bytes over bandwidth")
ax.loglog(counts, [machine.time(add, 1).seconds for add in adds], color=plots.ROOFLINE,
          label="calibrated roofline, with its launch overhead")
ax.loglog(counts, seconds, "o", color=plots.MEASURED, label="measured, in a tight loop")
plots.units(ax.yaxis, "s")
ax.set_xlabel("numbers added")
ax.set_ylabel("time of one addition")
ax.set_title("Below a certain size, an operation costs its launch")
ax.legend()
plots.show(fig, f"Time of one addition against its size: flat at {si(seconds[0], 's')} for small ones, then rising with the bytes. The napkin's "
                "line, far below, knows nothing of the flat part.")

# %% tags=["nbval-ignore-output"]
Markdown(f"One number or a thousand: the same {si(seconds[0], 's')}, where the napkin says "
         f"{si(machine.napkin(adds[0]), 's')} for the one. The calibrated launch overhead is another number, "
         f"{si(machine.fixed_s_per_op, 's')}. In a loop, all that PyTorch needs to launch an addition lies ready in the nearest "
         "cache. Between two weights of a model it does not: they have just swept the caches clean. The calibration measures "
         "*that* price, because a model pays it. At that price, launching costs more than adding below some "
         f"**{float(f'{threshold:.2g}'):,.0f} numbers**.")

# %% [markdown]
# One more loss, and it has surprised many a benchmark. So far we added into an array that was there. This is the same addition, into a new array each
# time, as everybody writes it:

# %% tags=["nbval-ignore-output"]
into_z, into_new = "torch.add(x, y, out=z)", "z = x + y"
fresh = alternate({into_z: lambda: torch.add(left, right, out=z), into_new: lambda: left + right}, repeats=5)
napkin = machine.napkin(works["add of 34 M numbers"])
Table(
    ["", "measured", "÷ napkin"],
    [[name, si(timing.median, "s"), f"{timing.median / napkin:.2f}"] for name, timing in fresh.items()],
    numeric=["measured", "÷ napkin"],
)

# %% [markdown]
# Where the second line is the slower one, as on most processors, the operating system is at work: it hands out the new array page by page, each of them
# wiped, and takes it back afterwards. On a GPU both are alike, because PyTorch keeps freed memory for the next array. No roofline sees this.
# It is why an inference engine takes all of its memory at the start, and why our KV cache in lesson 02 does too.

# %% [markdown]
# ### Your machine among others
# The shape is the same everywhere; only the numbers move. What changes the *character* of a machine is the ridge: how much it wants to compute for each byte
# it is given.

# %% tags=["nbval-ignore-output"]
l4, laptop = catalog.machine("l4"), catalog.machine("macbook-air-m2")
others = {"H100": h100, "L4": l4, "MacBook Air M2": laptop, "this machine": machine}

fig, ax = plt.subplots(figsize=(7.2, 4.6))
for (name, sheet), colour in zip(others.items(), plots.COLOURS, strict=False):
    plots.roofline(ax, sheet, "bf16", colour=colour, label=name, intensities=(0.1, 10_000))
    above = {"xytext": (0, 6), "textcoords": "offset points", "color": colour,
             "bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}}
    ax.annotate(f"{sheet.ridge('bf16'):.0f}", (sheet.ridge("bf16"), sheet.peak("bf16")), ha="center", fontweight="bold", **above)
    ax.annotate(name, (10_000, sheet.peak("bf16")), ha="right", fontsize=9, **above)
ax.margins(y=0.1)
ax.set_title("Four roofs in bf16, each with its ridge point in FLOPs per byte")
plots.show(fig, "Four roofs in bf16, with their ridge points: " + ", ".join(
    f"{name} at {sheet.ridge('bf16'):.0f} FLOPs per byte" for name, sheet in others.items()) + ".")

# %% tags=["nbval-ignore-output"]
header, rows = ["bf16", "bandwidth", "peak", "ridge", f"matrix × vector, D = {D:,}", f"matrix × matrix, D = {D:,}"], []
vector, matrix = in_bf16()[2:]
for name, sheet in others.items():
    rows.append([name, si(sheet.bandwidth_at(), "B/s"), si(sheet.peak("bf16"), "FLOP/s"), number(sheet.ridge("bf16")),
                 si(sheet.napkin(vector), "s"), si(sheet.napkin(matrix), "s")])
Table(header, rows, numeric=header[1:])

# %% [markdown]
# Compare the H100 with the L4. The H100 wins both columns, and each by its own number: the vector by bandwidth, the matrix by peak. An L4 has a *higher*
# ridge than an H100: it is a chip with a good deal of arithmetic behind a narrow door. Which of two machines is "faster" is a question about the work.

# %% [markdown]
# ## Play and exercises
#
# Move a matrix product `X[M, I] @ W[I, O]` along the roof. Some things to try:
#
# - Start at M = 1 and double it. How does the *time* change while the dot climbs the slope? And on the flat?
# - Set I and O to 256. Can you still reach the ridge of an H100, with any M?
# - Choose your own machine. How many rows does it need?

# %%
machines = {sheet.name: sheet for sheet in map(catalog.machine, catalog.machine_names())} | {"this machine": machine}


def draw(ax, sheet, dtype, M, I, O):
    """A dot for `X[M, I] @ W[I, O]` under the roof of a machine, and what it would take at best."""
    work = matmul(M, I, O, weights=dtype, activations=dtype)
    plots.roofline(ax, sheet, dtype, colour=plots.ROOFLINE, intensities=(0.1, 10_000))
    plots.mark(ax, sheet, work)
    ax.axvline(sheet.ridge(dtype), color=plots.ROOFLINE, linewidth=0.8, linestyle=":")
    bound = "memory" if work.intensity < sheet.ridge(dtype) else "compute"
    ax.set_title(f"M = {M:,}: {si(sheet.napkin(work), 's')}, {bound}-bound", fontsize=10)
    return work


# %% tags=["widget", "nbval-ignore-output"]
def explore(name, dtype, M, I, O):
    sheet = machines[name]
    if dtype not in sheet.peak_flops:
        print(f"{sheet.name} has figures for {', '.join(sheet.peak_flops)}: choose one of them.")
        return
    fig, ax = plt.subplots()
    work = draw(ax, sheet, dtype, M, I, O)
    ax.set_ylim(3e8, 5e15)                               # the same for all: another machine is another roof
    ax.set_xlabel(f"{si(work.flops, 'FLOP')} / {si(work.bytes, 'B')} = {number(work.intensity)} FLOPs per byte; "
                  f"the ridge is at {number(sheet.ridge(dtype))}")
    plots.show(fig, f"Under the roof of {name}: {ax.get_title(loc='left')}.")


widgets.play(
    explore,
    name=widgets.choose("machine", list(machines)),
    dtype=widgets.choose("dtype", ["bf16", "fp32", "int8"]),
    M=widgets.powers_of_two("M", 1, 8192, 1),
    I=widgets.powers_of_two("I", 64, 16384, 4096),
    O=widgets.powers_of_two("O", 64, 16384, 4096),
)

# %%
fig, axes = plt.subplots(2, 2, figsize=(7.2, 5.4), sharex=True, sharey=True)
for ax, M in zip(axes.flat, (1, 32, 256, 4096), strict=True):
    draw(ax, h100, "bf16", M, 4096, 4096)
    ax.label_outer()
    ax.set_xlabel("")
    ax.set_ylabel("")
axes[0, 0].set_xticks([0.1, 1, 10, 100, 1_000])
fig.suptitle("M rows through a 4,096 × 4,096 matrix on an H100, bf16", fontweight="bold", fontsize=11)
fig.supxlabel("arithmetic intensity, FLOPs per byte", fontsize=10)
fig.supylabel("attainable rate", fontsize=10)
plots.show(fig, "A product of M rows with a 4,096 by 4,096 matrix on an H100, in four panels: the dot climbs the slope from M = 1 to M = 256 and is on "
                "the flat roof at M = 4,096.")

# %% [markdown]
# From M = 1 to M = 32 the time hardly moves: the matrix has to be read in any case, and the other rows come along for next to nothing. That free ride is the
# reason for batching (lesson 04). Past the ridge it is over: from then on, each row costs its full price.

# %% [markdown]
# ### Exercise 1: a ridge point
# Give the ridge point, in FLOPs per byte, of a machine with a peak of `peak` FLOP/s and a bandwidth of `bandwidth` bytes/s.

# %% tags=["exercise", "exercise:ridge_point"]
def ridge_point(peak, bandwidth):
    return ...


lesson.exercise(
    "ridge_point",
    ridge_point,
    cases={(121e12, 300e9): 403.33, (3.6e12, 100e9): 36.0, (165.2e12, 1.008e12): 163.89},
    nudge="At the ridge both take the same time: FLOPs / peak = bytes / bandwidth.",
    means="an L4, a MacBook Air M2 and an RTX 4090. The lower it is, the sooner the arithmetic has enough to do.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# FLOPs / peak = bytes / bandwidth. Solve for FLOPs / bytes.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def ridge_point(peak, bandwidth):
#     return peak / bandwidth
# ```
#
# </details>

# %% [markdown]
# ### Exercise 2: a copy
# How many seconds does it take, at the least, to copy `gibibytes` GiB from one place of a machine's memory to another, if that memory moves
# `bandwidth` bytes a second?

# %% tags=["exercise", "exercise:copy_seconds"]
def copy_seconds(gibibytes, bandwidth):
    return ...


lesson.exercise(
    "copy_seconds",
    copy_seconds,
    cases={(1, 100e9): 0.021475, (16, 3.35e12): 0.010257, (0.5, 819e9): 0.0013111},
    nudge="Two things to watch: what is a GiB, and how often does each byte cross the bus?",
    means="a copy crosses the bus twice, and a GiB is 7 % more than a GB.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A copy does no arithmetic at all. Each byte is read once and written once.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def copy_seconds(gibibytes, bandwidth):
#     return 2 * gibibytes * 2**30 / bandwidth
# ```
#
# </details>

# %% [markdown]
# ### Exercise 3: a matrix and one vector
# What is the intensity, in FLOPs per byte, of `x[1, k] @ W[k, n]` if everything is in bf16? Count it exactly: read x, read W, write y.

# %% tags=["exercise", "exercise:matvec_intensity"]
def matvec_intensity(k, n):
    return ...


lesson.exercise(
    "matvec_intensity",
    matvec_intensity,
    cases={(4096, 4096): 0.99951, (1, 1): 0.33333, (576, 1536): 0.99762, (8, 2): 0.61538},
    nudge="2 bytes to a number: k of them in x, k·n in W, n in y. A multiply-add is 2 FLOPs.",
    means="one FLOP per byte, however large the matrix. On an H100 that is 1/295 of what the arithmetic could do.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Every number of W is used for one multiplication and one addition: 2 FLOPs for 2 bytes. What else is read and written?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def matvec_intensity(k, n):
#     flops = 2 * k * n
#     bytes = 2 * (k + k * n + n)
#     return flops / bytes
# ```
#
# </details>

# %% [markdown]
# ### Exercise 4: too small to matter
# An operation reads and writes `n` numbers of 2 bytes each, in all, and does next to no arithmetic. Launching it costs `fixed` seconds. Up to which n
# does launching take longer than moving the numbers?

# %% tags=["exercise", "exercise:too_small"]
def too_small(fixed, bandwidth):
    return ...


lesson.exercise(
    "too_small",
    too_small,
    cases={(10e-6, 50e9): 250_000, (4e-6, 3.35e12): 6_700_000, (5e-6, 300e9): 750_000},
    nudge="How many bytes could have been moved while the operation was launched?",
    means="the faster the memory, the larger an operation must be. On an H100 most of a small model's decode step is too small.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Moving takes 2n / bandwidth seconds. Where is that equal to `fixed`?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def too_small(fixed, bandwidth):
#     return fixed * bandwidth / 2
# ```
#
# </details>

# %% [markdown]
# ### Exercise 5, harder: how many rows?
# From which M on is `X[M, D] @ W[D, D]` in bf16 compute-bound, on a machine whose ridge point is `ridge` FLOPs per byte? This time without the
# shortcut: the bytes of X and Y count too. Give M as a number with its fraction, and `math.inf` if no M is enough.

# %% tags=["exercise", "exercise:rows_needed"]
def rows_needed(D, ridge):
    return ...


lesson.exercise(
    "rows_needed",
    rows_needed,
    cases={(4096, 295): 344.64, (8192, 403): 446.97, (1024, 36): 38.723,
           (576, 295): math.inf, (64, 36): math.inf, (590, 295): math.inf},
    nudge="Write the intensity as a function of M and D. What does it tend to as M grows?",
    means="and too narrow a matrix stays memory-bound with any number of rows: X and Y grow along with the work.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The intensity is 2·M·D² / 2·(2·M·D + D²) = M·D / (2·M + D). As M grows, that tends to D/2 and never gets there. Set it equal to the ridge and solve
# for M.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# M·D = ridge·(2·M + D), so M·(D − 2·ridge) = ridge·D. If D is no more than twice the ridge, no M will do.
#
# ```python
# def rows_needed(D, ridge):
#     if D <= 2 * ridge:
#         return math.inf
#     return ridge * D / (D - 2 * ridge)
# ```
#
# </details>

# %% [markdown]
# ### What to keep
#
# - A machine is three numbers: bandwidth, peak, launch overhead. A job is two: FLOPs and bytes.
# - Intensity (FLOPs per byte) against ridge (peak over bandwidth) says which of the two limits matters.
# - Two numbers and a napkin get the order of magnitude. Caches, kernels and launches are the rest, and one can measure them beforehand.
#
# Your calibration is kept, and the next lesson begins with it: it puts a real language model under this roof.
