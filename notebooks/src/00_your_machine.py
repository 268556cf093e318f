# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["core", "slide"]
# # 00 · How fast could anything run here?
#
# An agent that thinks for 30,000 tokens reads its model's weights 30,000 times, and somebody pays. How fast can a machine be?
#
# > Based on the structure of Stanford CS336, 'Language Modeling from Scratch,' by Tatsunori Hashimoto and Percy Liang (cs336.stanford.edu). This is an independent structural mirror in original prose; it reproduces no course materials, and Stanford does not endorse it.

# %% [markdown] tags=["notes"]
# **1 min.** Say what every lesson does: guess, build, measure, explain. Today: four guesses, a probe of about ten lines, and the machine that it
# runs on. Nobody needs a GPU. Ask everybody to plug the laptop in and to close the video call.

# %% [markdown] tags=["core", "slide"]
# ## Question
#
# Three small jobs. Which takes longest, and by what factor?
#
# 1. Add up 67 million numbers.
# 2. Multiply **1 row** of 1,024 numbers with each of 64 matrices, 1,024 × 1,024. They have 67 million numbers too.
# 3. The same with **64 rows**: 64 times the arithmetic.
#
# **45 minutes**, exercises extra. Before: Python, the matrix product. Afterwards: you predict such jobs on any machine. Folded code is plumbing: skip it.

# %% [markdown] tags=["notes"]
# **2 min.** Let the room vote on paper: the order of the three jobs, and the ratio of job 3 to job 2. The wrong part is usually
# "64 times", because people count arithmetic. Job 3 may well be the slowest: by how much depends on peak over bandwidth.
# Do not give the answer now; the stopwatch gives it after the build task. Keep the votes on the board.

# %% [markdown] tags=["core", "slide"]
# ## Envelope
#
# Three numbers: **bandwidth** (bytes/s from memory), **peak** (FLOP/s; a FLOP is one multiplication or addition), **launch overhead** (s per operation, however small).
#
# > time = max( FLOPs / peak , bytes / bandwidth ) + launches × launch overhead
#
# **Calibration**: reads, products and launches, timed once here. **Napkin**: the max alone. **Predicted**: an interval, from the calibrated rate of each *kind* of product, and launches.
#
# A number has 4 bytes in **fp32**, 2 in **bf16**.

# %% [markdown] tags=["notes"]
# **3 min.** Ask: why the maximum and not the sum? Fetching and computing overlap. The usual wrong answer is that a core waits for all bytes first.
# Why is the launch outside? A CPU launches, then works, one after the
# other. The host of a GPU queues the next kernel while one runs, so a step takes the larger of the two. Say now that a predicted interval may lie
# wholly above its napkin: products of one row reach less than bandwidth or peak, and the calibration has clocked them.

# %% tags=["core", "slide", "hide-input"]
import math
from functools import partial

from clawdemy_course import diagrams
from clawdemy_course.figures import mark, roofline
from clawdemy_course.reading import how_to_read
from clawdemy_infer.arithmetic import Work, matmul, total
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.fast import PackedLinear
from clawdemy_infer.fast.launches import count_ops
from clawdemy_infer.from_config import catalog
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.tables import Table, interval, number, si
from clawdemy_infer.machine.calibrate import fingerprint, this_machine
from clawdemy_infer.machine.present import bracketed, default_device
from clawdemy_infer.machine.probes import bandwidth_probes, launch_probe
from clawdemy_infer.published import read as published
from clawdemy_infer.timing import alternate, now, stopwatch

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display
from torch.nn.functional import silu

plots.use_style()
device = default_device()
bf16 = partial(matmul, weights="bf16", activations="bf16")
lesson = Lesson("00 your_machine", machine=fingerprint(device)["device"])
h100, l4, a100, laptop = map(
    catalog.machine, ("h100-sxm", "l4", "a100-80gb-sxm", "macbook-air-m2"))
display(diagrams.machine(), Markdown(
    "A **GPU's** host launches ahead: the max of all three. "
    "A **CPU** adds the launch."))

# %% [markdown] tags=["notes"]
# **2 min.** Build the picture step by step. Ask at each arrow: "which number stands here, and in which unit?" X is read and Y is written, beside the
# weights. Let the room compare the two products at the foot: the same weights cross the bus for 1 row and for 1,024 rows. Usual wrong
# answer: "more rows, more *weights* read". Rows add only the bytes of X and Y. Some think that the launch is free on a GPU; it is
# hidden behind longer kernels, and no cheaper.

# %% tags=["core", "slide", "by-line"]
fp32 = 4                        # bytes in a number (32 bits); one in bf16 has 2
n = 2**26                       # count: the sum of n numbers, in one launch of a kernel
flops, bytes = 0, 0
bytes += n * fp32               # read each number once
flops += n - 1                  # one addition for all but the first
bytes += fp32                   # write one result
assert math.isclose(flops / bytes, 1 / 4, rel_tol=1e-6)

B = D = 4096                    # count: X[B, D] @ W[D, D], in one launch too
flops, bytes = 0, 0
bytes += B * D * fp32           # read X
bytes += D * D * fp32           # read W
flops += B * D * 2 * D          # B·D results: D multiplies, D adds each
bytes += B * D * fp32           # write Y
assert flops / bytes == D / 6   # square: 2D³ / (3D² · 4 bytes)
wide = matmul(64, 2**20, 2**20)                               # 64 rows, D without end:
assert math.isclose(wide.intensity, 64 / 2, rel_tol=1e-3)     # tends to B / 2
# In bf16 each intensity doubles: the sum has 0.5, B rows have about B.

# %% [markdown] tags=["notes"]
# > Count every byte and every FLOP, then divide
#
# **4 min.** A kernel is the compiled routine that a launch runs. Each count comes at a key press: let the room say it first. Usual wrong
# answers: D FLOPs for a result instead of 2D, and Y forgotten. Then the two limits: square (D/6) and few rows (B/2). The sum
# stays at 1/4 whatever its length: it uses each number once. Ask before you go on: "from how many rows on is an H100's
# arithmetic busy, in bf16?"

# %% tags=["core", "slide", "hide-input"]
ridge = h100.peak("bf16") / h100.bandwidth_at()
assert round(ridge) == 295
shown = {"sum": Work(n - 1, 2 * n + 2, "sum", "bf16"), "1 row": bf16(1, 4096, 4096),
         "64 rows": bf16(64, 4096, 4096), "4,096 rows": bf16(4096, 4096, 4096)}
intensities = {name: number(work.intensity) for name, work in shown.items()}
fig, ax = plt.subplots()
roofline(ax, h100, "bf16", colour=plots.ROOFLINE, intensities=(0.1, 20_000))
for name, work in shown.items():
    mark(ax, h100, work, label=name)
ax.set_xlim(0.1, 20_000)
ax.set_ylim(1e11, 4e15)
for x, side in ((0.13, "memory-bound"), (ridge * 1.3, "compute-bound")):
    ax.text(x, 2e15, side, fontweight="bold", color=plots.ROOFLINE)
ax.axvline(ridge, color=plots.ROOFLINE, linewidth=1, linestyle=":")
ax.text(ridge * 1.15, 1.4e11, f"ridge point: {ridge:.0f}")
ax.set_title(f"Below {ridge:.0f} FLOPs per byte an H100 waits for its memory (bf16)")
plots.show(
    fig, "Roofline of an H100 in bf16: the attainable rate rises with the arithmetic "
    f"intensity up to the ridge point at {ridge:.0f} FLOPs per byte, then it is flat. "
    "FLOPs per byte: " + ", ".join(map(" ".join, intensities.items())))
Markdown(
    "**Arithmetic intensity** = FLOPs / bytes of a job. **Ridge point** = peak / "
    f"bandwidth of a machine. D = 4,096, bf16: 64 rows have {intensities['64 rows']}.")

# %% [markdown] tags=["notes"]
# **3 min.** Compare with what the room said: from how many rows on is the arithmetic busy? Usual wrong answers: 1, because it is a
# matrix product, and 64, because it is many. In bf16 each row is worth about one FLOP per byte, so it takes about as many rows as the
# ridge says. The intensity belongs to the job, the ridge point to the machine.

# %% [markdown] tags=["core", "slide"]
# ## Guess
#
# The machine in front of you:
#
# 1. How fast does it read main memory?
# 2. How many fp32 FLOPs does it do in a second?
# 3. What does it cost to launch one operation from Python?
# 4. How many times as long as 1 row do 64 rows take?
#
# Write over the dots, as text with a unit: `"3 kB/s"`, `"7 FLOP/s"`, `"9 s"`, `"0.1 times"`.

# %% tags=["core", "guess", "fragment"]
lesson.guess("main memory, reading", ...)
lesson.guess("peak in fp32", ...)
lesson.guess("kernel-launch overhead", ...)
lesson.guess("64 rows over 1 row", ...)

# %% [markdown] tags=["notes"]
# **2 min.** Everybody writes four numbers before you go on; wait for it. The examples on the slide show the units alone: they are absurd, so that they
# suggest nothing. The next cell of the notebook sets each guess beside the box's number, the last table of *Reconcile* beside what was measured. Typical guesses: bandwidth off by a factor of three either way, launch overhead
# far too small ("nanoseconds"), and 64 for the last. A guess that is off by a factor of three is a question, not a failure.

# %% tags=["core", "nbval-ignore-output"]
if device == "cuda":                            # from an L4's data sheet
    reads, computes = l4.bandwidth_at(), l4.peak("fp32")
else:                                           # from what stands on a box
    reads = 2 * 8 * 3.2e9       # DDR4-3200: channels · bytes · transfers/s
    per_cycle = 2 * 8 * 2       # units · fp32 lanes (AVX2; AVX-512: 16) · mul and add
    computes = torch.get_num_threads() * 3e9 * per_cycle    # threads · cycles/s
launch_s = 10e-6                                # a few bytecodes, and PyTorch's choice
box = Machine("box", ((1, reads),), {"fp32": computes}, 8e9)
one, many = (box.napkin(matmul(B, 1024, 1024)) for B in (1, 64))

machine = lesson.calibrated = this_machine(device)     # 20 s at most, the first time
lesson.predict("main memory, reading", napkin=reads, unit="B/s")
lesson.predict("peak in fp32", napkin=computes, unit="FLOP/s")
lesson.predict("kernel-launch overhead", napkin=launch_s, unit="s")
lesson.predict("64 rows over 1 row", napkin=many / one, unit="×")
lesson.reveal()

# %% [markdown] tags=["core", "slide"]
# ## Build
#
# A **bandwidth probe**: how many bytes a second does `read()` read? Real calls look like this:
#
# ```text
# calls   ██████████ █ █ █ █ █ ██████████████████ █ █ | █ █
#         the first,            a neighbour has       lucky:
#         cold                  the core              in a cache
# clock   |       |       |       |       |       |       |
# ```
#
# One call may be shorter than a tick of the clock (up to 1 ms). Give the *typical* call, within 5 seconds. You may leave it open.

# %% [markdown] tags=["notes"]
# **2 min.** Ask: "which of these calls should count?" Then pairs. Usual wrong answers, in order: one call timed alone
# (division by zero on the coarse clock), the mean, the best, the first call counted, a fixed number of calls (minutes for a large
# array). The checker answers each with the smallest example. Whoever has nothing yet goes on with the library's probe.

# %% tags=["core", "slide", "build"]
from statistics import median


def my_bandwidth(read, nbytes, clock):
    """Bytes per second at which `read()` reads its `nbytes`; `clock()` gives seconds.

    If reading 8,000,000 bytes typically takes 0.8 ms, the answer is 1e10.
    1. The first call is cold: it must not move the answer.
    2. A sample lasts many ticks: call until 20 ms have passed, and count the calls.
    3. Of several samples, which one number says what is typical?
    """
    read()                      # 1.
    samples = []
    for _ in range(9):
        samples.append(...)     # 2. bytes per second
    return ...                  # 3.


bandwidth = lesson.build("bandwidth", my_bandwidth)

# %% [markdown] tags=["notes"]
# **6 min.** Four minutes in pairs; the cold call and the loop are given, about five lines are missing. Then show one student's probe, and the library's (folded, under Further). Ask: "why the
# median and not the mean, why not the best?" One interruption moves the mean; one cache hit makes the best. From here on the
# measured runs use the student's code.

# %% [markdown] tags=["core"]
# ## Measure
#
# Neighbours show up in every number: keep the machine quiet. `this_machine()` took the kept calibration, or made one; all lessons stand on it.

# %% tags=["core", "slide", "hide-input", "measured", "nbval-ignore-output"]
def binary(size):
    return f"{size >> 20} MiB" if size >= 2**20 else f"{size >> 10} KiB"


# The student's probe over arrays of many sizes, in turn with the calibration's.
sizes = [2**p for p in range(15, 29)]
data = torch.ones(sizes[-1] // 4, device=device)
calibrated = machine.at(machine.now._replace(memory=1))     # not at today's speed
kept, again, curve = dict(calibrated.bandwidth), {}, {}
for size in sizes:
    read = data[:size // 4].sum
    turns = [bandwidth(read, size, now)]
    if size in kept:
        [probe], others = bandwidth_probes([size], device), []
        for _ in range(3):
            others.append(median(probe.sample() for _ in range(9)))
            turns.append(bandwidth(read, size, now))
        again[size] = median(others)
    curve[size] = median(turns)
main_memory, fastest = curve[sizes[-1]], max(curve.values())
lesson.measure("main memory, reading", main_memory)
lesson.measure("peak in fp32", machine.peak("fp32"))
lesson.measure("kernel-launch overhead", machine.fixed_s_per_op)

# The figure, and whether the kept points agree.
fig, ax = plt.subplots()
ax.set_xscale("log", base=2)
ax.plot(*zip(*curve.items(), strict=True), "o-", color=plots.MEASURED, markersize=4,
        label="your probe")
ax.plot(*zip(*kept.items(), strict=True), "s", color=plots.ROOFLINE, markersize=9,
        label="kept by the calibration")
ax.plot(*zip(*again.items(), strict=True), "s", color=plots.ROOFLINE, markersize=14,
        markerfacecolor="none", label="the calibration's probe, again just now")
ax.set_ylim(bottom=0)
plots.units(ax.yaxis, "B/s")
ax.set_xticks(sizes[::3], map(binary, sizes[::3]))
ax.set_xlabel("bytes read, again and again")
ax.set_ylabel("read bandwidth")
factor = fastest / main_memory
ax.set_title(f"Arrays that fit a cache are read up to {factor:.1f} times as fast"
             if factor > 1.15 else "No array is read much faster than main memory")
ax.legend()
plots.show(fig, "Read bandwidth against the bytes read: " + ", ".join(
    f"{si(rate, 'B/s')} at {binary(size)}" for size, rate in list(curve.items())[::3])
    + ". Squares: kept by the calibration, and its own probe run again just now.")


def apart(other):
    """The largest difference of `other` from the student's curve, and where."""
    return max((max(curve[size] / rate, rate / curve[size]) - 1, size)
               for size, rate in other.items() if size in curve)


(off, at), (off_now, _) = apart(kept), apart(again)
smallest_s = sizes[0] / curve[sizes[0]]
display(Markdown(
    f"Main memory: **{si(main_memory, 'B/s')}**; predictions use "
    f"{si(machine.bandwidth_at(), 'B/s')}. Your probe: {off:.0%} off the kept one at "
    f"most ({binary(at)}), {off_now:.0%} off its own now. {binary(2**18)} took "
    f"{si(2**18 / curve[2**18], 's')}; {binary(sizes[0])} {si(smallest_s, 's')}."))

# %% [markdown] tags=["notes"]
# **3 min.** Runs some ten seconds, up to half a minute where nothing was calibrated: meanwhile ask who guessed lowest. If it fails or drags, stay on the slide: its numbers are a whole run's, on the machine
# that built the deck. Say what the squares are: filled, what the calibration once measured and kept in a file; open, its probe run again in turn with yours. Read the curve from the right: main memory, the last cache, the near caches, the fall at the far left. Usual
# wrong answer: "small arrays are slow to read". Part of it is the launch: no more than what 32 KiB take (under the figure). The rest was not measured. A dip in between, if any, is not explained here. If both differences
# are large, the method differs; if only the kept one is, the machine has changed.

# %% tags=["core", "slide", "nbval-ignore-output"]
def toy_step():                             # a caricature of a model's step for a token
    y = toy_row                             # [1, 640]
    for W in toy_weights:                   # 48 matrices [640, 640]
        y = W(y)                            # y @ W: 1 launch
        power = y.square().mean(-1, keepdim=True)
        y = y * torch.rsqrt(power + 1e-5)   # RMS norm, x / its RMS: 5 launches
        y = silu(y) * toy_row + y           # gate, silu(y) = y·sigmoid(y): 3 launches

# %% [markdown] tags=["notes"]
# > A fourth job: small products, and small operations between them
#
# **1 min.** Three jobs are those of the vote; this one is new: 48 small products, after each 8 launches, as
# in a small model (5 in the norm, 3 in the gate). Ask: "what will it mostly pay?" Nobody answers yet; there is a vote on it.

# %% tags=["core", "slide", "hide-input", "measured", "nbval-ignore-output"]
D = 1024
x = torch.randn(n, device=device)
rows = {B: torch.randn(B, D, device=device) for B in (1, 64)}
weights = [PackedLinear("fp32", torch.randn(D, D, device=device)) for _ in range(64)]
toy_row = torch.randn(1, 640, device=device)
toy_weights = [PackedLinear("fp32", torch.randn(640, 640, device=device))
               for _ in range(48)]          # packed as the kernel reads them


def products(rows, weights):                # one product for each matrix
    return [W(rows) for W in weights]


# What the jobs cost and are predicted to take. Timings of products include their
# launch, so of the toy step only the norm's (5) and the gate's (3) are added.
SUM, TOY = "sum of 67 M numbers", "toy step"
ONE, MANY = "64 products, B = 1", "64 products, B = 64"
toy_products = partial(products, toy_row, toy_weights)
jobs = {SUM: x.sum, ONE: partial(products, rows[1], weights),
        MANY: partial(products, rows[64], weights)}
tiny = Work(640, 2 * 640 * fp32, "element-wise") * (48 * 8)
works = {SUM: Work(n - 1, (n + 1) * fp32, "sum"),
         ONE: matmul(1, D, D, "products") * 64, MANY: matmul(64, D, D, "products") * 64,
         TOY: total(TOY, [matmul(1, 640, 640, "products") * 48, tiny])}
launches = {SUM: 1, TOY: count_ops(toy_step) - count_ops(toy_products)}
said = {name: machine.time(work, launches.get(name, 0)) for name, work in works.items()}
for name, work in works.items():
    lesson.predict(name, napkin=machine.napkin(work), predicted=said[name], unit="s")

watch = bracketed(machine)              # a stopwatch, between two looks at the machine
for name, job in jobs.items():
    lesson.measure(name, watch(job, repeats=9))
took = {name: lesson.rows[name].measured for name in jobs}
ratio = took[MANY] / took[ONE]
lesson.measure("64 rows over 1 row", ratio)

# The toy step in turn with its products, and with a launch's price between products.
price, prices = launch_probe("fp32", device).sample, []
in_turn = watch({TOY: toy_step, "its products": toy_products,
                 "price": lambda: prices.append(price())}, repeats=15)
launch_now_s = median(prices)
napkins = map(machine.napkin, works[TOY].parts)
parts = {name: part.seconds for name, part in said[TOY].parts.items()}
lesson.measure(TOY, in_turn[TOY], parts=[
    {"name": "products", "napkin_s": next(napkins), "predicted_s": parts["products"],
     "measured_s": in_turn["its products"].median},
    {"name": "launches", "napkin_s": next(napkins),
     "predicted_s": parts["launches"] + parts["element-wise"],
     "measured_s": launches[TOY] * launch_now_s, "reached": 1 / launch_now_s,
     "bound": 1 / machine.fixed_s_per_op, "unit": "launches/s"}])
numbers = ["bytes", "FLOPs", "napkin", "predicted", "took"]
display(Table(["job", *numbers], [
    [f"{i}. {name}", si(works[name].bytes, "B"), si(works[name].flops, "FLOP"),
     si(lesson.rows[name].napkin, "s"),
     interval(said[name].low_s, said[name].high_s, "s"), si(took[name], "s")]
    for i, name in enumerate(took, 1)], numbers))
slowest = 1 + list(took.values()).index(max(took.values()))
Markdown(f"Slowest: job {slowest}. **64 : 1 in arithmetic, {ratio:.1f} : 1 in time.** "
         f"The ridge point here is {number(machine.ridge('fp32'))} FLOPs per byte in "
         f"fp32; job 3 has {number(works[MANY].intensity)}.")

# %% [markdown] tags=["notes"]
# > 64 times the arithmetic, and not 64 times the time
#
# **3 min.** Run it live and go back to the votes. The wrong part is usually "64 times". Which of jobs 1 and 3 is the slowest depends on peak over
# bandwidth: above about 28 FLOPs per byte all three read for about as long, below it job 3 computes longer. Ask: "which of the
# three numbers limits each job?" The sum the bandwidth, one row mostly the bandwidth. Jobs 1 and 2 read the same
# bytes, and job 2 takes longer: the prediction knew it, because the calibration has clocked products of one row, and the napkin did not. On an H100 both products cost mostly their launch: a
# matrix of 4 MB is read in 1.3 µs.

# %% [markdown] tags=["core", "slide"]
# ## Reconcile
#
# The toy step: 48 small products, 8 launches after each. **What is the largest part of the difference between its napkin and measured?** Commit
# yourself:
#
# 1. `"products"`
# 2. `"launches"`
# 3. `"memory was slower than calibrated"`
# 4. `"memory was faster than calibrated"`
# 5. `"not explained"`
#
# A launch has more than one price: low in a loop (all lies in the caches), higher between products (*calibrated*, on the card), and in the turns of this run.

# %% tags=["core", "guess"]
lesson.cause("toy step", ...)

# %% [markdown] tags=["notes"]
# **1 min.** Count hands for each cause before you run the next cell. Which one is right depends on the machine:
# on a quiet machine it is usually the launches; where the threads must be woken for each small product, it is the products. The usual wrong answer is
# "memory": the bytes are the napkin's already. An answer counts only before the waterfall is drawn.

# %% tags=["core", "slide", "hide-input", "nbval-ignore-output"]
lesson.explain("toy step")
print(how_to_read(lesson, "toy step"))

# %% [markdown] tags=["notes"]
# **2 min.** Read the waterfall from left to right: the napkin, then each part by what it took beyond its share, then what was measured. The products
# were clocked alone, in turn with the step; the launches are a count times a price, sampled in the same turns. What both leave is "not
# explained". Usual wrong reading: a bar below zero is an error. Where the parts add up to more than the whole, the slide says by how much. Say openly
# that the cause is unknown: each part ran by itself, with the caches as it left them. That is a guess; nobody measured it. Then show the hands again: who named the largest bar?

# %% tags=["core", "slide", "hide-input", "nbval-ignore-output"]
display(lesson.table())
of_box = {"peak": machine.peak("fp32") / computes,
          "bandwidth": machine.bandwidth_at() / reads}
further = max(of_box, key=lambda name: abs(math.log(of_box[name])))
Markdown(
    "**Inside?** Is *measured* in the *predicted* interval? **Explained** = 1 − "
    "|not explained| / |measured − napkin|. The first four napkins are from the box. "
    f"Its {further} is further off: calibrated {of_box['peak']:.2f} times the peak, "
    f"{of_box['bandwidth']:.2f} times the bandwidth. With both calibrated, 64 rows "
    "over 1 row would be "
    f"{machine.napkin(works[MANY]) / machine.napkin(works[ONE]):.2f} ×.")

# %% [markdown] tags=["notes"]
# > The room, the box, the calibration, the stopwatch
#
# **3 min.** In a lesson with guesses the table has a column for them; the room's are on the board. Compare the first four rows with them. Then ask which prediction missed its interval, and in which direction.
# Compare the miss with the machine's speed at that moment. If the speed changed, the miss is news about the machine. If it did not, the
# prediction was wrong: ask which part of it. Usual wrong answer: one of the two without a look at the speed.

# %% [markdown] tags=["core", "slide"]
# ## On a GPU
#
# In 16 bits, a data-centre GPU needs about 150 to 500 rows to be compute-bound.
# **Small kernels hurt where the launches take longer than the GPU's work.** CUDA graphs replay many as one.

# %% tags=["core", "fragment", "hide-input", "nbval-ignore-output"]
found = {int(run.batch): run.value * 1e-3 for run in published()
         if run.category == "gemm_profile" and run.notes.startswith("o: ")
         and (run.model, run.hardware) == ("Llama-2-7B", "A100-80GB SXM")}
header = ["rows B", "FLOPs/byte", "napkin", "published", "÷ napkin"]
lines, a100_off = [], {}
for B in (1, 8, 64, 256, 1024, 4096):
    work = bf16(B, 4096, 4096)
    a100_off[B] = found[B] / a100.napkin(work)
    lines.append([f"{B:,}", number(work.intensity), si(a100.napkin(work), "s"),
                  si(found[B], "s"), f"{a100_off[B]:.2f}"])
display(Table(header, lines, header, title="A100, fp16: X[B, 4096] @ W[4096, 4096]"))
sheets = {"H100": h100, "A100": a100, "L4": l4, "MacBook Air M2": laptop,
          "this machine": machine}
ridges = [f"{name} {sheet.ridge('bf16'):.0f}" for name, sheet in sheets.items()]
Markdown(
    f"Published (Vidur). **64 rows: {found[64] / found[1]:.2f} times as long as one.** "
    f"Ridge points (bf16, dense): {', '.join(ridges)} "
    f"({number(machine.ridge('fp32'))} in fp32).")

# %% [markdown] tags=["notes"]
# **2 min.** Ask: "is a launch cheaper on a GPU?" The usual wrong answer is yes: Python and the driver run on the CPU; what shrinks is the
# work behind the launch. Before the table appears, ask for the time at 64 rows, if 1 row takes 25 µs. Usual wrong answer: 64 times as long. Say what was *not*
# measured here: your own cells on a GPU; anybody with one can run this notebook on it. A data sheet does not state the launch overhead at all, and its peak is often the
# one with sparsity, twice the dense one that counts here.

# %% [markdown] tags=["core", "slide"]
# ## When does it lose?
#
# The napkin misses:

# %% tags=["core", "fragment", "hide-input", "nbval-ignore-output"]
launch_s, in_cache = machine.fixed_s_per_op, max(curve, key=curve.get)
worst = max(a100_off, key=a100_off.get)
tiles = math.ceil(worst / 128) * 4096 // 128
cached = (f"came {factor:.1f} times as fast"
          if factor > 1.15 else "can come faster; here it did not")
Markdown(
    f"- **Tiny operations**: a launch between products took {si(launch_s, 's')}, worth "
    f"reading **{si(launch_s * machine.bandwidth_at(), 'B')}**. In a loop it costs "
    f"less (Further): reading {binary(sizes[0])} took {si(smallest_s, 's')}.\n"
    f"- **Data in a cache** ({binary(in_cache)}) {cached}.\n"
    f"- **Uneven work**: A100, {worst} rows, {a100_off[worst]:.1f} times the napkin. "
    f"Tiles of 128 × 128 results (assumed): {tiles} for 108 multiprocessors, "
    f"{108 / tiles:.1f} times.")

# %% [markdown] tags=["notes"]
# **2 min.** Ask: "a model's step launches 400 operations; when does that matter?" When the step itself takes about as long: small models, fast
# GPUs. The usual wrong answer is "never, microseconds are nothing". In a tight loop a launch lies ready in the caches (Further). Published
# times are rounded to 1 µs; which tiles that kernel used is not published, so they are one possible reason. On an H100 a launch of 4 µs (assumed) is worth 13 MB of reading.

# %% [markdown] tags=["core", "slide"]
# ## Play
#
# A service runs 32 products `X[B, D] @ W[D, D]` in bf16 for a token, promised in **20 ms**. Red breaks the promise.
#
# - What is each machine's largest batch?
# - At B = 16,384: which terms, each by itself, break it on the L4, on the H100?
# - Raise D until a machine fails at B = 1. By which term? Does any batch help?

# %% [markdown] tags=["notes"]
# **1 min.** Ask the first question alone, the others are homework. Let the room write down the largest batch of an L4 and of an H100; nobody
# touches a slider yet.

# %% tags=["core", "widget", "hide-input", "nbval-ignore-output"]
machines = {"L4": l4, "H100": h100, "MacBook Air M2": laptop, "this machine": machine}
DEADLINE_S, BATCHES = 20e-3, [2**p for p in range(15)]
RED = plots.COLOURS[4]


def promise(name, D, B):
    """Time of a step against its rows, and the deadline."""
    sheet, seconds, bound = machines[name], {}, {}
    for rows in BATCHES:
        work = bf16(rows, D, D) * 32
        seconds[rows] = sheet.napkin(work)
        if sheet is machine:                            # calibrated: it knows more
            seconds[rows] = machine.time(work, 32).seconds
        bound[rows] = "memory" if work.intensity < sheet.ridge("bf16") else "compute"
    fig, ax = plt.subplots(figsize=(7.2, 3.4), layout="none", dpi=80)
    fig.subplots_adjust(left=0.1, right=0.98, top=0.88, bottom=0.16)
    for place, rows in enumerate(BATCHES):
        late = seconds[rows] > DEADLINE_S
        colour = RED if late else plots.COLOURS[bound[rows] == "compute"]
        ax.bar(place, min(seconds[rows], 2 * DEADLINE_S) * 1e3, edgecolor=colour,
               linewidth=2, color=colour if rows == B else "none",
               hatch="xx" * (late and rows != B) or None)
        if seconds[rows] > 2 * DEADLINE_S:              # cut off: say how long it is
            ax.text(place, 2 * DEADLINE_S * 1e3, f"↑ {seconds[rows] * 1e3:,.0f}",
                    ha="center", va="bottom", fontsize=9)
    ax.axhline(DEADLINE_S * 1e3, color=RED, linestyle="--", linewidth=1.5)
    ax.set_xticks(range(0, len(BATCHES), 2), [f"{rows:,}" for rows in BATCHES[::2]])
    ax.set_ylim(0, 2.25 * DEADLINE_S * 1e3)
    ax.set_xlabel("rows B (blue: memory-bound, orange: compute-bound, red: too late)")
    ax.set_ylabel("ms for a token")
    broken = seconds[B] > DEADLINE_S
    title = (f"{name}, D = {D:,}, B = {B:,}: {si(seconds[B], 's')}, {bound[B]}-bound; "
             f"20 ms {'BROKEN' if broken else 'kept'}")
    ax.set_title(title, color=RED if broken else plots.TEXT)
    kept_by = [rows for rows in BATCHES if seconds[rows] <= DEADLINE_S]
    most = max(kept_by, default="none")
    plots.show(fig, f"{title}. The largest batch that keeps 20 ms: {most}.")


widgets.play(promise, name=widgets.choose("machine", list(machines)),
             D=widgets.powers_of_two("D", 1024, 16384, 4096),
             B=widgets.powers_of_two("B", 1, 16384, 1024))

# %% tags=["core", "slide", "hide-input", "nbval-ignore-output"]
promise("L4", 4096, 1024)

# %% [markdown] tags=["notes"]
# **2 min.** One student drives the notebook; the slide is the fallback. L4: 2,048, H100: 16,384. Usual wrong answer: in the ratio of
# their bandwidths. A large batch is compute-bound, so the ratio of the peaks decides. Surprise: the L4's bars stay nearly flat up to some hundred
# rows: 256 rows take 12 % longer than one. Homework: at B = 16,384 both terms break the L4's promise (145 ms of FLOPs, 32 ms of bytes), neither the H100's (17.8 ms).
# At B = 1 bytes break it, from D = 9,683 on an L4 and 32,356 on an H100 (beyond the slider), and no batch helps. Solutions computes all of it.

# %% [markdown] tags=["core", "slide"]
# ## Check yourself
#
# ### Take with you
#
# - Three numbers predict a job: bandwidth, peak, launch overhead.
# - FLOPs per byte, against the ridge point, say which one limits a job.
# - Weights that are read once serve many rows: 64 rows do not take 64 times as long.
#
# **Next:** what does a *model's* step read and compute? **Homework:** unknown machine, rows needed, copy and launch: numbers or text (`"8 µs"`). Solutions at the end.

# %% [markdown] tags=["notes"]
# **1 min.** Let three students say one sentence each before you show yours. Each step of an exercise is checked by itself, and solutions are at the end
# of the notebook. A step that is wrong says what was probably forgotten.

# %% tags=["core", "exercise", "exercise:unknown_machine", "nbval-ignore-output"]
# Three stopwatch readings of an unknown machine, in fp32, each of one launch: adding
# two numbers, 8 µs; the sum of 16 MiB in main memory, 91.9 µs; a product 512 × 512
# times 512 × 512, 34.8 µs. One is done before the next is launched. What are its three
# numbers? How long do 64 rows through a 2,048 × 2,048 matrix take?
launch = ...                    # seconds
bytes_per_second = ...          # bytes/s
flops_per_second = ...          # FLOP/s
ridge = ...                     # FLOPs per byte
rows_64 = ...                   # seconds
lesson.steps("unknown_machine", launch=launch, bytes_per_second=bytes_per_second,
             flops_per_second=flops_per_second, ridge=ridge, rows_64=rows_64)

# %% tags=["core", "exercise", "exercise:rows_needed", "nbval-ignore-output"]
# X[B, D] @ W[D, D] in bf16; count X and Y too. From which B on is it compute-bound with
# D = 4,096 on an H100 (ridge 295.34) and on an L4 (403.33)? To which intensity does it
# tend for D = 512 as B grows? Is it compute-bound on an H100 with enough rows? Which D
# must be exceeded so that enough rows make it compute-bound there?
h100_4096, l4_4096 = ..., ...   # rows, with a fraction
most_512 = ...                  # FLOPs per byte
h100_512 = ...                  # "yes" or "no"
narrowest = ...                 # D, with a fraction
lesson.steps("rows_needed", h100_4096=h100_4096, l4_4096=l4_4096, most_512=most_512,
             h100_512=h100_512, narrowest=narrowest)

# %% tags=["core", "exercise", "exercise:copy_and_launch", "nbval-ignore-output"]
# 15 GiB of weights. How long does it take to load them into a GPU over a link of
# 64 GB/s, and to copy them within its memory of 3.35 TB/s? A step reads them once and
# launches 500 operations, 4 µs each; each waits for the one before (no overlap). Which
# share of the step is launches? Up to how many bytes does an operation take longer to
# launch than to read?
load, copy = ..., ...           # seconds
share = ...                     # a fraction, or "12 %"
too_small = ...                 # bytes
lesson.steps("copy_and_launch", load=load, copy=copy, share=share, too_small=too_small)

# %% [markdown] tags=["further"]
# ## Further
#
# Optional. **To read:** CS336, lecture 10 (inference) · Williams et al. 2009, *Roofline* (this lesson) · Ainslie et al. 2023, *GQA* · Yu et al. 2022, *Orca*
# (continuous batching) · Kwon et al. 2023, *PagedAttention* · Frantar et al. 2022, *GPTQ* · Lin et al. 2023, *AWQ* · Leviathan et al. 2023,
# *speculative decoding*.
#
# ### The library's probe, and this machine's card

# %% tags=["further", "nbval-ignore-output"]
lesson.show("bandwidth")
lesson.card()

# %% [markdown] tags=["further"]
# ### What one thought costs

# %% tags=["further", "hide-input"]
llama = catalog.model("llama-3.1-8b")
first, middle = llama.decode(1, 1).bytes, llama.decode(1, 15_000).bytes
thought_s = 30_000 * middle / h100.bandwidth_at()     # the cache grows from 0 to 30,000
dollars = thought_s / 3600 * h100.dollars_per_hour
Markdown(
    f"A step of Llama-3.1-8B in bf16 reads {si(first, 'B')} of weights for each token "
    "(of the embedding, one row), and the keys and values of all tokens before, in the "
    f"middle of 30,000 tokens {si(middle - first, 'B')}. An agent that thinks for "
    f"30,000 tokens, alone on an H100, takes {thought_s:.0f} s at least: {dollars:.2f} "
    f"dollars at {h100.dollars_per_hour} dollars an hour (Google Cloud, on demand, "
    f"{h100.priced}). If 64 agents shared each reading of the weights, their products "
    "would hardly take longer. Lesson 04 does that, and finds what it forgets.")

# %% [markdown] tags=["further"]
# ### The same addition in a tight loop
# The calibrated launch overhead was measured between the products of a model, whose weights have just swept the caches. In a tight loop all that PyTorch needs to
# launch an addition lies ready, and the price is lower.

# %% tags=["further", "hide-input", "measured", "nbval-ignore-output"]
left, right = x.chunk(2)
z = torch.empty_like(left)


def tiny_add(size):
    """Seconds of one addition of `size` numbers, out of a loop of some."""
    a, b, out = left[:size], right[:size], z[:size]
    loop = max(1, min(200, 2**21 // size))
    many = stopwatch(lambda: [torch.add(a, b, out=out) for _ in range(loop)])
    return many.median / loop


counts = [4**p for p in range(13)]
added = [tiny_add(count) for count in counts]
adds = [Work(count, 3 * count * fp32) for count in counts]
fig, ax = plt.subplots()
ax.loglog(counts, [machine.napkin(add) for add in adds], "--", color=plots.NAPKIN,
          label="napkin: bytes over bandwidth")
ax.loglog(counts, [machine.time(add, 1).seconds for add in adds], color=plots.ROOFLINE,
          label="calibrated roofline, with its launch overhead")
ax.loglog(counts, added, "o", color=plots.MEASURED, label="measured, in a tight loop")
plots.units(ax.yaxis, "s")
ax.set_xlabel("numbers added")
ax.set_ylabel("time of one addition")
ax.set_title("Below a certain size, an operation costs its launch")
ax.legend()
plots.show(
    fig, f"Time of one addition against its size: flat at {si(added[0], 's')} for "
    "small ones, then rising with the bytes. The napkin's line, far below, knows "
    "nothing of the flat part.")

# %% [markdown] tags=["further"]
# ### New arrays
# So far results went into an array that was there. This is the same addition into a new array each time.

# %% tags=["further", "hide-input", "measured", "nbval-ignore-output"]
into_z, into_new = "torch.add(x, y, out=z)", "z = x + y"
fresh = alternate({into_z: lambda: torch.add(left, right, out=z),
                   into_new: lambda: left + right})
by_hand = machine.napkin(Work(n / 2, 3 * n / 2 * fp32))
first = fresh[into_z].median / by_hand
near = "three" if abs(first - 1) < abs(first - 4 / 3) else "four"
Table(["", "measured", "÷ napkin"],
      [[name, si(fresh[name].median, "s"), f"{fresh[name].median / by_hand:.2f}"]
       for name in (into_z, into_new)], ["measured", "÷ napkin"],
      "The napkin moves three numbers for each sum; four would be 1.33 times as much. "
      f"The first line is nearer to {near}")

# %% [markdown] tags=["further"]
# If the second line is slower, then probably (this was not measured) because the operating system hands out the new array page by page, zeroes each
# page, and takes the array back. A separate effect, which no roofline here counts: on many processors a store to a line that is not in a cache
# reads it first (write-allocate), four numbers instead of three; what the first line took is set beside both. PyTorch on a GPU keeps freed memory for the next array. An inference engine
# reserves all of its memory at the start for another reason: it must know how many sequences it may admit.

# %% [markdown] tags=["solution"]
# ## Solutions

# %% [markdown] tags=["solution", "solution:bandwidth"]
# <details><summary>bandwidth</summary>
#
# ```python
# from statistics import median
#
#
# def my_bandwidth(read, nbytes, clock):
#     read()                                      # cold
#     rates = []
#     for _ in range(9):
#         calls, start, elapsed = 0, clock(), 0
#         while elapsed < 0.02:                   # 20 ticks of 1 ms
#             read()
#             calls += 1
#             elapsed = clock() - start
#         rates.append(calls * nbytes / elapsed)
#     return median(rates)
# ```
#
# </details>

# %% tags=["solution", "hide-input"]
def terms(sheet, D, B):
    """Seconds of the FLOPs and of the bytes of a step."""
    work = bf16(B, D, D) * 32
    return work.flops / sheet.peak("bf16"), work.bytes / sheet.bandwidth_at()


answers = []
for name, sheet in list(machines.items())[:3]:
    most = max(B for B in BATCHES if max(terms(sheet, 4096, B)) <= DEADLINE_S)
    computing, reading = terms(sheet, 4096, 16_384)
    wide = [D for D in (8192, 16_384) if terms(sheet, D, 1)[1] > DEADLINE_S]
    fails = (f"at B = 1 D = {wide[0]:,} breaks it, by bytes" if wide
             else "at B = 1 no D of the slider breaks it")
    answers.append(f"- {name}: batch {most:,}; at 16,384 FLOPs take "
                   f"{si(computing, 's')} and bytes {si(reading, 's')}; {fails}.")
Markdown("<details><summary>Play</summary>\n\n" + "\n".join(answers) + "\n\nMore than "
         "20 ms breaks the promise. Where the weights alone take longer, no batch "
         "helps: each batch reads them.\n\n</details>")

# %% [markdown] tags=["solution", "solution:unknown_machine"]
# <details><summary>unknown_machine</summary>
#
# The first time is one launch, and there is one in each of the other two: take it off. The product has 85 FLOPs per byte, more than the ridge point, so it shows the peak; 64 rows have about 30 FLOPs per byte, less than the
# ridge point, so their bytes decide.
#
# ```python
# launch = 8e-6
# bytes_per_second = 16 * 2**20 / (91.9e-6 - launch)
# flops_per_second = 2 * 512**3 / (34.8e-6 - launch)
# ridge = flops_per_second / bytes_per_second
# rows_64 = 4 * (2048**2 + 2 * 64 * 2048) / bytes_per_second + launch
# ```
#
# </details>

# %% [markdown] tags=["solution", "solution:rows_needed"]
# <details><summary>rows_needed</summary>
#
# The intensity is 2·B·D² / 2·(2·B·D + D²) = B·D / (2·B + D). Set it equal to the ridge point and solve for B. As B grows it tends to D/2 and stays
# below it, so D must be more than twice the ridge point.
#
# ```python
# def rows_needed(D, ridge):
#     return ridge * D / (D - 2 * ridge)
#
#
# h100_4096, l4_4096 = rows_needed(4096, 295.34), rows_needed(4096, 403.33)
# most_512 = 512 / 2
# h100_512 = "no"
# narrowest = 2 * 295.34
# ```
#
# </details>

# %% [markdown] tags=["solution", "solution:copy_and_launch"]
# <details><summary>copy_and_launch</summary>
#
# A GiB is 2³⁰ bytes, and a copy reads every byte and writes it.
#
# ```python
# weights_bytes = 15 * 2**30
# load, copy = weights_bytes / 64e9, 2 * weights_bytes / 3.35e12
# reading = weights_bytes / 3.35e12
# share = 500 * 4e-6 / (500 * 4e-6 + reading)
# too_small = 4e-6 * 3.35e12
# ```
#
# </details>
