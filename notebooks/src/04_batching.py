# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 · Where does a batch stop being free?
# ## Question
# To write one token, a decode step reads all of the weights, and does two FLOPs with each. Most of the arithmetic stands idle (lesson 01). Now a
# second user comes. Their token goes through the *same* weights, so both tokens can be computed while the weights stream past once: a **batch** of
# two, at the price of one. And a third, and a fourth.
#
# That cannot go on for ever. Something ends it: the arithmetic is busy at last, or the caches of all those users have become the larger read, or
# there is no room for another, or the users have waited long enough.
#
# Which of them comes first, and at which batch? Three guesses before you go on. On this machine, at which batch does a step take twice as long as for one user,
# if everybody is at 64 tokens? At which, if everybody is at 512? And how many times the tokens per second of one user do 64 users get together?

# %% tags=["nbval-ignore-output"]
from itertools import pairwise
from math import log, sqrt

from clawdemy_course.figures import beside, pareto
from clawdemy_infer.envelope.napkin import sweep
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.files import load_model
from clawdemy_infer.from_config import catalog
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.parts import StepOf
from clawdemy_infer.lesson.steps import filled_cache
from clawdemy_infer.lesson.tables import Table, number, si
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.machine.present import bracketed, default_device
from clawdemy_infer.model import generate
from clawdemy_infer.published.rows import read as published_runs

import matplotlib.pyplot as plt
import numpy as np
import sympy
import torch
from IPython.display import Markdown, display
from matplotlib.colors import ListedColormap
from matplotlib.ticker import LogLocator

plots.use_style()
plt.rcParams["figure.dpi"] = plt.rcParams["savefig.dpi"] = 80      # many figures, and the file stays small
machine = this_machine(formats=("int4",))
lesson = Lesson("04 batching", machine=machine)
plain = load_model("smollm2-135m", device=default_device())
decoder = faster(plain, "fp32")                         # its matrices as the kernels of this machine like them
lesson.card()

# %% [markdown]
# ## Envelope: one read for all, and one read for each
# We count one decode step of SmolLM2-135M in fp32, for B sequences of S tokens, in the letters of lesson 01. Beside each line stands whether the batch is in it.

# %%
shape = catalog.model("smollm2-135m")
L, D, N, K, H, F, V = (getattr(shape, letter) for letter in "LDNKHFV")
B, S, e = 16, 512, 4                                # e: bytes of a number

w = L * (D * (N + 2 * K) * H + N * H * D + 3 * D * F) + D * V       # numbers in the matrices of all layers, and in the head

bytes = flops = 0
bytes += e * w                                      # the weights: once, whatever B
flops += 2 * w * B                                  # a multiply and an add for each weight and sequence
bytes += B * S * 2 * L * K * H * e                  # keys and values: each sequence has its own
flops += B * S * 4 * L * N * H                      # scores and sums: each sequence with its own

FP32 = {"weights": "fp32", "kv": "fp32", "activations": "fp32"}
step = shape.decode(B, S, **FP32)
k = shape.kv_bytes_per_token("fp32")
assert flops == step.flops
assert bytes == e * w + B * S * k
between = step.bytes - bytes                        # what passes between the operations, and the weights of the norms
Markdown(f"{B} sequences of {S} tokens: {si(flops, 'FLOP')}; {si(e * w, 'B')} of weights and {si(B * S * k, 'B')} of caches. "
         f"(What passes between the operations is {between / step.bytes:.0%} more, and the napkin leaves it out.)")

# %% [markdown]
# Four lines, and only the first is without a B. It is what a batch shares.
#
# The matrices do 2·w·B FLOPs for e·w bytes: their intensity is **2·B/e**, so it grows with the batch. Attention has a B above and a B below.

# %%
llama = catalog.model("llama-3-8b")
rows = []
for batch in (1, 8, 64):
    weights = sum(layer_count * sum(a * b for a, b in layer.matrices().values()) for layer, layer_count in llama.groups) + llama.D * llama.V
    matrices = (2 * weights * batch) / (2 * weights)                    # in bf16
    caches = (4 * llama.L * llama.N * llama.H * batch * 4096) / (2 * llama.L * llama.K * llama.H * 2 * batch * 4096)
    assert matrices == batch and caches == llama.N / llama.K
    rows.append([str(batch), f"{matrices:g}", f"{caches:g}"])
columns = ["batch", "FLOPs per byte, matrices", "FLOPs per byte, attention"]
Table(columns, rows, numeric=columns, title=f"{llama.name}, bf16, 4,096 tokens of context")

# %% [markdown]
# **Attention does not get cheaper.** Nobody else can use my keys. Its intensity is the number of query heads to a KV head, N/K, for one user or for
# a thousand. Lesson 03 could change it; a batch cannot.
#
# ### Two reasons to stop
# A machine does R FLOPs in the time it reads a byte: its ridge point. So the step takes as long as reading this many bytes:
#
# $$\max\Big(\underbrace{e\,w}_{\text{weights}} + \underbrace{B\,S\,k}_{\text{caches}},\ \underbrace{2\,w\,B/R}_{\text{arithmetic}}\Big)$$
#
# where k is the bytes of one token's keys and values. (Attention's own FLOPs are few; they are left out.) The weights are what we share. A batch is
# nearly free as long as neither of the other two has caught up with them.

# %%
B_, S_, w_, e_, k_, R_ = sympy.symbols("B S w e k R", positive=True)
weights, caches, arithmetic = e_ * w_, B_ * S_ * k_, 2 * w_ * B_ / R_

[B_arithmetic] = sympy.solve(sympy.Eq(arithmetic, weights), B_)         # the arithmetic has caught up
[B_caches] = sympy.solve(sympy.Eq(caches, weights), B_)                 # the caches have
assert B_arithmetic == R_ * e_ / 2
assert B_caches == e_ * w_ / (S_ * k_)

[S_even] = sympy.solve(sympy.Eq(B_arithmetic, B_caches), S_)            # and where both do at once
intensity = sympy.limit(2 * w_ * B_ / (weights + caches), B_, sympy.oo) # with users without end
assert S_even == 2 * w_ / (R_ * k_)
assert sympy.simplify(intensity.subs(S_, S_even) - R_) == 0
Markdown(f"The arithmetic catches up at $B = {sympy.latex(B_arithmetic)}$, the caches at $B = {sympy.latex(B_caches)}$; "
         f"both at once at a context of $S = {sympy.latex(S_even)}$.")

# %% [markdown]
# The first has neither the model nor the context in it: **R·e/2** belongs to the machine and the format. The second is **weights over the cache of one sequence**,
# and has no machine in it.
#
# The last assertion says more than it seems to. With users without end, the intensity of a step tends to 2w/(S·k), and that reaches the ridge only up to the
# very context at which both knees coincide. Beyond it *no* batch is compute-bound. The caches always come first.

# %%
h100 = catalog.machine("h100-sxm")
ridge = h100.ridge("bf16")
assert round(ridge) == 295


def numbers_at_work(s) -> float:
    """w: what each token is multiplied by, the head with it."""
    return s.matrix_parameters() + s.D * s.V


assert numbers_at_work(shape) == w
rows = []
for name in ("smollm2-135m", "llama-3-8b", "llama-2-7b", "llama-2-70b", "qwen3-0.6b"):
    s = catalog.model(name)
    weights, per_token = 2 * numbers_at_work(s), s.kv_bytes_per_token("bf16")
    rows.append([s.name, si(weights, "B"), si(per_token, "B"), f"{ridge:,.0f}", *(f"{weights / (S * per_token):,.0f}" for S in (512, 4096, 32768)),
                 f"{2 * numbers_at_work(s) / (ridge * per_token):,.0f}"])
columns = ["model", "weights", "KV of a token", "arithmetic", "caches at 512", "at 4,096", "at 32,768", "never arithmetic beyond"]
Table(columns, rows, numeric=columns[1:], title="Batch at which … catches up with the weights: bf16 on an H100")

# %% [markdown]
# The books end a batch at "about 300 on an H100". Read the columns of the caches: at today's contexts it ends far sooner, and for another reason. Watch the two at
# work.

# %%
weights, per_token, batches = 2 * numbers_at_work(llama), llama.kv_bytes_per_token("bf16"), np.geomspace(1, 4096, 200)


def room(s, memory: float, S: float, kv: str = "bf16") -> float:
    """Sequences of S tokens that fit beside the weights."""
    return (memory - s.stored_bytes("bf16")) / (S * s.kv_bytes_per_token(kv))


fig, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.7))
S = 1024
fits = batches <= room(llama, h100.memory, S)
parts = {"weights": weights + 0 * batches, "caches": batches * S * per_token, "arithmetic": 2 * numbers_at_work(llama) * batches / ridge}
for (name, part), colour in zip(parts.items(), plots.COLOURS, strict=False):
    left.loglog(batches[fits], part[fits] / h100.bandwidth_at(), "--", color=colour, linewidth=1.5, label=name)
total = np.maximum(parts["weights"] + parts["caches"], parts["arithmetic"])
left.loglog(batches[fits], total[fits] / h100.bandwidth_at(), color="black", label="the step")
left.set(xlabel="batch", ylabel="time", ylim=(2e-5, 0.1), title="A step at 1,024 tokens: caches overtake first")
plots.units(left.yaxis, "s")
left.legend(loc="lower right")

for S, colour in zip((128, 1024, 8192), plots.COLOURS, strict=False):
    fits = batches <= room(llama, h100.memory, S)
    seconds = np.maximum(weights + batches * S * per_token, parts["arithmetic"]) / h100.bandwidth_at()
    right.loglog(batches[fits], (batches / seconds)[fits], color=colour, label=f"{S:,} tokens")
    right.axhline(h100.bandwidth_at() / (S * per_token), color=colour, linestyle=":", linewidth=1.2)
    right.plot(batches[fits][-1], (batches / seconds)[fits][-1], "o", color=colour)
right.axhline(h100.peak("bf16") / (2 * numbers_at_work(llama)), color="black", linestyle=":", linewidth=1.2)
right.text(1.2, 1.12 * h100.peak("bf16") / (2 * numbers_at_work(llama)), "all of the arithmetic", va="bottom")
right.set(xlabel="batch", ylabel="tokens/s, of all users", ylim=(100, 3e5), title="Each context has its ceiling (dotted)")
right.legend(loc="lower right")
for ax in (left, right):
    ax.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4,096"])
    ax.minorticks_off()
right.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
fig.suptitle(f"{llama.name} on an {h100.name}, bf16, by napkin", x=0.01, ha="left", fontsize=10)
plt.show()

# %% [markdown]
# Lines end where memory ends. The ceiling of a context is **bandwidth over the cache of one sequence**: with users without end the weights cost nothing, and
# every token still has to read its own past. At 8,192 tokens the ceiling is low, and not even approached: there is no room.
#
# ### Room, and what a full machine does
# How near does one come to the ceiling? With W bytes of weights and c bytes for each sequence, B sequences give B/(W + B·c) tokens for each byte read, and the ceiling is 1/c. If
# the memory M is full, B = (M − W)/c:

# %%
W, c, M = sympy.symbols("W c M", positive=True)
share_of_ceiling = B_ / (W + B_ * c) * c
full = sympy.simplify(share_of_ceiling.subs(B_, (M - W) / c))
assert sympy.simplify(full - (M - W) / M) == 0
assert sympy.simplify(share_of_ceiling.subs(B_, W / c)) == sympy.Rational(1, 2)        # at the knee of the caches: half

rows = []
for key in ("h100-sxm", "h200-sxm", "a100-80gb-sxm", "mi300x", "l4", "rtx-4090", "rtx-5090"):
    on = catalog.machine(key)
    filled = llama.fits(on.memory, 1, 4096).max_batch
    assert llama.decode(filled, 4096).flops / on.peak("bf16") < on.memory / on.bandwidth_at()       # bytes bind
    stored = llama.stored_bytes("bf16")
    rows.append([on.name, si(on.memory, "B"), f"{filled:,}", si(on.memory / on.bandwidth_at(), "s"), f"{1 - stored / on.memory:.0%}",
                 f"{filled * on.bandwidth_at() / on.memory:,.0f}"])
columns = ["machine", "memory", "sequences when full", "a step when full", "of the ceiling", "tokens/s"]
Table(columns, rows, numeric=columns[1:], title=f"{llama.name}, 4,096 tokens, bf16: filled to the brim")

# %%
brief = 64
crowd = llama.fits(h100.memory, 1, brief).max_batch
computing = llama.decode(crowd, brief).flops / h100.peak("bf16")
assert computing > 4 * h100.memory / h100.bandwidth_at()
Markdown(f"""
Two napkin rules for free.

- **Where bytes bind, a full machine takes memory over bandwidth for a step**: it reads all that it holds. At short contexts bytes do not bind. At {brief} tokens, {crowd:,} sequences
  of {llama.name} fit on an H100, and their arithmetic takes {si(computing, "s")}, {computing / (h100.memory / h100.bandwidth_at()):.1f} times as long as reading everything.
- **It reaches 1 − W/M of the ceiling**: the share of memory that is not weights. Where the weights fill half of a card, half of the throughput is out of reach, at any context at which
  bytes bind.

At the knee of the caches one has half of the ceiling; nine times that batch would be 90 %. There is seldom room for so many.
""")

# %%
contexts = np.geomspace(64, 131072, 240)
grid_S, grid_B = np.meshgrid(contexts, np.geomspace(1, 16384, 240))
reads_w, reads_kv = weights, grid_B * grid_S * per_token
computes = 2 * numbers_at_work(llama) * grid_B / ridge
binds = np.where(computes > reads_w + reads_kv, 2, np.where(reads_kv > reads_w, 1, 0))
binds = np.where(grid_B > room(llama, h100.memory, grid_S), 3, binds)

fig, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.9), sharex=True, sharey=True)
left.pcolormesh(grid_S, grid_B, binds, cmap=ListedColormap(["#cfe0f2", "#f8d5c5", "#d3ead8", "#eeeeee"]), vmin=0, vmax=3, shading="auto")
for x, y, name in ((110, 12, "weights:\na batch is free"), (9000, 21, "caches"), (75, 2600, "arithmetic"), (10000, 1500, "does not fit")):
    left.text(x, y, name, va="center")
left.set(title=f"What a step waits for ({llama.name}, H100)")
for name, key, line in (("H100", "h100-sxm", "-"), ("RTX 4090", "rtx-4090", "--")):
    for s, colour in zip((llama, catalog.model("llama-2-7b")), plots.COLOURS, strict=False):
        right.plot(contexts, room(s, catalog.machine(key).memory, contexts), line, color=colour, label=f"{s.name}, K = {s.K}, {name}")
right.set(title="Room: 8 KV heads against 32, on two cards")
right.legend(loc="upper right")
for ax in (left, right):
    ax.set(xscale="log", yscale="log", xlabel="context, tokens", xlim=(64, 131072), ylim=(1, 16384))
    ax.set_xticks([64, 512, 4096, 32768], ["64", "512", "4,096", "32,768"])
    ax.set_yticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4,096"])
    ax.minorticks_off()
left.set_ylabel("batch")
left.grid(False)
plt.show()

# %% [markdown]
# The lines of the caches and of the room are parallel: both fall as 1/S. So however long the context, there is the same factor between "caches weigh as much as weights" and "no more room":
# (M − W)/W. It is large where the memory is large beside the model, and below one where it is not. On the 4090 the room ends first: a batch there is free *until it is impossible*.
#
# And see what four times fewer KV heads are worth. Llama-2-7B has fewer weights than Llama-3-8B, and room for a quarter of its users.
#
# ### Machines and formats
# R·e/2 for machines of every kind: data sheets, so predictions only. If the weights are stored in fewer bits and computed with in bf16, e is smaller and R stays. The knee comes *earlier*.

# %%
rows = []
for key in ("b200", "h100-sxm", "a100-80gb-sxm", "mi300x", "tpu-v5e", "l4", "rtx-4090", "apple-m4-max-40c", "epyc-9654"):
    on = catalog.machine(key)
    dtype = "bf16" if "bf16" in on.peak_flops else "fp16"
    R = on.ridge(dtype)
    rows.append([on.name, f"{R:,.0f}", *(f"{R * bytes_ / 2:,.0f}" for bytes_ in (2, 1, 0.5))])
columns = ["machine", "ridge, FLOPs per byte", "16-bit weights", "8-bit", "4-bit"]
Table(columns, rows, numeric=columns[1:], title="Batch at which the arithmetic catches up (predicted from data sheets)")

# %% [markdown]
# Weights in 4 bits make a batch of one four times as fast, and a large one not at all: the read they save had been shared away already. That is the fine print of
# weight-only quantization (lesson 07). Whether it is so here we shall measure.
#
# ### What is "the" knee?
# A step never jumps, it bends. To predict a knee and measure it we need a definition that a stopwatch can decide: **the knee is the batch from which on
# a step takes more than twice as long as for one sequence.** There each user has half the pace, and all together B/2 times one user's throughput. By napkin it follows from
# the two numbers above.

# %%
def reached(seconds: dict[int, float], limit: float) -> float | None:
    """The batch from which on a step takes longer than `limit`; between two batches, a straight line on log-log axes."""
    for low, high in reversed(list(pairwise(sorted(seconds)))):         # from above: a bump before the last crossing is no knee
        if seconds[low] <= limit < seconds[high]:
            return low * (high / low) ** (log(limit / seconds[low]) / log(seconds[high] / seconds[low]))
    return None


def knee(seconds: dict[int, float]) -> float | None:
    return reached(seconds, 2 * seconds[1])


def by_hand(s, S: int, R: float, e: float) -> dict[int, float]:
    """The time of a step, in bytes, for every batch up to 2,048."""
    w, k = numbers_at_work(s), s.kv_bytes_per_token(e)
    return {B: max(e * w + B * S * k, 2 * w * B / R) for B in range(1, 2049)}


for s, S, R, e in ((llama, 4096, ridge, 2), (llama, 64, ridge, 2), (shape, 64, 6, 4), (shape, 512, 6, 4)):
    weights_over_cache = e * numbers_at_work(s) / (S * s.kv_bytes_per_token(e))
    two_caches = weights_over_cache + 2                                 # W + B c = 2 (W + c)
    two_computing = R * e * (1 + 1 / weights_over_cache)                # 2 w B / R = 2 (W + c)
    assert abs(knee(by_hand(s, S, R, e)) / min(two_caches, two_computing) - 1) < 1e-3

# %% [markdown]
# So by napkin the knee is the smaller of **W/c + 2** and **R·e** (a little more, as one sequence has a cache, too): twice the batch at which the arithmetic catches up, because the napkin lets a machine compute *while*
# it reads, perfectly. One that could do only one thing at a time would need twice the time at R·e/2 already. Real ones are in between.
#
# ## Prediction
# Now SmolLM2-135M, in fp32, on this machine: batches of 1 to 64, everybody at 64 tokens or everybody at 512. First your own guesses, written over the dots: a number, or text with its
# unit, as in `"300 ms"`.

# %% tags=["guess"]
lesson.guess("knee, context 64", ...)
lesson.guess("knee, context 512", ...)
lesson.guess("throughput of 64 over 1, context 64", ...)
lesson.guess("step, batch 64, context 512", ...)

# %% tags=["nbval-ignore-output"]
BATCHES, SHORT, LONG = [1, 2, 4, 8, 16, 32, 64], 64, 512
R = machine.ridge("fp32")
Markdown(f"By hand: the ridge is at {R:.1f} FLOPs per byte, so the arithmetic catches up at R·e/2 = **{2 * R:.0f} sequences**. "
         f"The caches catch up at {4 * w / (SHORT * k):.0f} sequences of {SHORT} tokens, and at **{4 * w / (LONG * k):.0f} sequences of {LONG}**.")

# %% [markdown]
# The calibrated roofline knows one thing more: how fast a product of M rows really runs here (lesson 00). M *is* the batch. So before anything of the model has run, we can read off
# what the weights of a step should cost at each batch.

# %% tags=["nbval-ignore-output"]
products = {B: sum(op.flops / machine.flops_at(op) for op in shape.decode(B, SHORT, **FP32).operations() if op.kernel == "gemm") for B in BATCHES}
Table(["rows", "rate of a product", "all weights once, at that rate", "against one row"],
      [[str(B), si(2 * w * B / products[B], "FLOP/s"), si(products[B], "s"), f"{products[B] / products[1]:.2f} ×"] for B in BATCHES],
      numeric=["rows", "rate of a product", "all weights once, at that rate", "against one row"])

# %% [markdown]
# Does the last column rise smoothly? With a library alone it often does not: it has one program for a single row and another for blocks of many, and a product of two rows may cost more than one of
# eight. Our own program, in C++ (`fast/cpp/product.h`), takes a few rows at a time, as many as there are registers for. No napkin knows of such things, and they are not about the hardware.
#
# A predicted time is an interval: how far the probes of this machine agreed with one another. So is what follows from two times, such as a knee or a gain: both may be off, and their errors seldom point the same way.

# %% tags=["nbval-ignore-output"]
SLO = 0.1                                           # seconds a token: ten tokens a second, faster than one reads
WIDE = [2**i for i in range(21)]                    # the predictions may look further than we can measure
ops = StepOf(decoder, "decode").ops
works = {S: {B: shape.decode(B, S, **FP32) for B in WIDE} for S in (SHORT, LONG)}
napkins = {S: {B: machine.napkin(work) for B, work in works[S].items()} for S in works}
predicted = {S: {B: machine.time(work, ops) for B, work in works[S].items()} for S in works}


def gain(seconds: dict[int, float]) -> float:
    """Tokens/s of 64 sequences over those of one."""
    return 64 * seconds[1] / seconds[64]


def promised(seconds: dict[int, float]) -> float | None:
    return reached(seconds, SLO)


def ends(of, steps: dict, alone=1) -> tuple[float, float] | None:
    """What follows from the steps where that of `alone` is off one way and all others the other way. Two errors of one size, of different probes, are
    together √2 as large: each counts 1/√2."""
    found = [of({which: step.seconds * (1 + step.spread) ** ((way if which == alone else -way) / sqrt(2)) for which, step in steps.items()})
             for way in (1, -1)]
    return None if None in found else (min(found), max(found))


def predict(quantity: str, of, napkins: dict, steps: dict, unit: str, alone=1) -> None:
    """What follows from several steps, with its interval."""
    said = of(napkins), of({which: step.seconds for which, step in steps.items()})
    if None not in said:
        lesson.predict(quantity, *said, unit, ends(of, steps, alone))


for S in (SHORT, LONG):
    for B in (1, 4, 16, 64):
        lesson.predict(f"step, batch {B}, context {S}", napkins[S][B], predicted[S][B], unit="s")
    predict(f"knee, context {S}", knee, napkins[S], predicted[S], "sequences")
    predict(f"throughput of 64 over 1, context {S}", gain, napkins[S], predicted[S], "×")
    predict(f"batch at {si(SLO, 's')} a token, context {S}", promised, napkins[S], predicted[S], "sequences")


def four_over_one(seconds: dict[int, float]) -> float:
    """Four prompts of 128 tokens in one prefill, against one prompt."""
    return seconds[4] / seconds[1]


prefills = {B: StepOf(decoder, "prefill", B, 128) for B in (1, 4)}
predict("four prompts of 128, over one", four_over_one, {B: step.napkin(machine) for B, step in prefills.items()},
        {B: step.predict(machine) for B, step in prefills.items()}, "×")


def times_faster(seconds: dict[str, float]) -> float:
    return seconds["bf16"] / seconds["int4"]


packed = {weights: faster(plain, weights) for weights in ("bf16", "int4") if decoder.device.type == "cpu"}     # the packed formats are for CPUs
for B in (1, 64) if packed else ():
    of_format = {weights: StepOf(model, "decode", B, SHORT) for weights, model in packed.items()}
    predict(f"int4 over bf16, batch {B}", times_faster, {weights: machine.napkin(step.work) for weights, step in of_format.items()},
            {weights: step.predict(machine) for weights, step in of_format.items()}, "×", alone="int4")
lesson.reveal()

# %% [markdown]
# The last rows are checks of another kind. A *prompt* brings many rows of its own, so there is little left for a batch to share. And weights in 4 bits, computed with in bf16, should be worth
# much at a batch of one, and little at 64.
#
# ## Measurement
# First, that neighbours do not matter. Four sentences in one batch must go on as each does alone: the same tokens, greedily.

# %%
sentences = ["The capital of France is", "The best way to bake", "Once upon a time there", "It takes two hours to"]
ids = [decoder.tokenizer.encode(text) for text in sentences]
assert len({len(each) for each in ids}) == 1                            # of equal length; lesson 05 does without this
cache = ContiguousCache.for_model(decoder, batch=4, capacity=32)
tokens = torch.tensor(ids, device=decoder.device)                       # [B, T], the prompts
together = []
for _ in range(10):
    tokens = decoder(tokens, cache, last_only=True).argmax(-1)          # [B, 1]
    together.append(tokens)
together = torch.cat(together, dim=1).tolist()

alone = [generate(decoder, each, max_tokens=10).tokens for each in ids]
assert together == alone
for text, each in zip(sentences, together, strict=True):
    print(text + decoder.tokenizer.decode(each))

# %% [markdown]
# Now the clock. There is one large cache of 64 sequences; a batch of B uses the first B of them, and a short context the first tokens: nothing is copied. Capacity comes first.

# %%
capacity = shape.fits(4 * 2**30, 64, LONG, "fp32", "fp32")              # 4 GiB: what a lesson allows itself
assert capacity
Markdown(f"{shape.name}, 64 sequences of {LONG} tokens in fp32: {si(capacity.weight_bytes, 'B')} of weights, **{si(capacity.kv_bytes, 'B')} of caches**.")

# %% [markdown]
# All batches in turn, round after round, so that a slow moment of the machine falls on all of them alike. Right before and right after, the machine is probed: was it as fast as when it was predicted? If not,
# intervals become wider; what was predicted stays. Of three steps the clock is read inside, too, part by part.

# %% tags=["nbval-ignore-output"]
EXPLAINED = [(1, SHORT), (64, SHORT), (64, LONG)]


def time_batches(rounds: int) -> tuple[dict, dict]:
    """Timings of a step by (batch, context), and the parts of some. The caches are gone when it returns."""
    everybody = ContiguousCache.for_model(decoder, batch=64, capacity=LONG)
    assert everybody.allocated_bytes == capacity.kv_bytes               # predicted and allocated, to the byte
    one = filled_cache(decoder, batch=1, tokens=LONG - 1)
    for all_of_it, real in zip(everybody.tensors, one.tensors, strict=True):
        all_of_it[:] = real                         # everybody has the same past: a step costs the same, whatever its keys say

    def first(B: int, S: int) -> ContiguousCache:
        cache = ContiguousCache.for_model(decoder, B, 1)
        cache.keys, cache.values, cache.capacity = everybody.keys[:, :B], everybody.values[:, :B], LONG
        cache.length = S
        return cache

    steps = {(B, S): StepOf(decoder, "decode", B, S, first(B, S)) for S in (SHORT, LONG) for B in BATCHES}
    times = bracketed(machine)({case: step.run for case, step in steps.items()}, rounds)
    return times, {case: steps[case].parts(machine) for case in EXPLAINED}


times, parts = time_batches(rounds=6)
measured = {S: {B: times[B, S].median for B in BATCHES} for S in (SHORT, LONG)}
prompts = {B: timing.median for B, timing in bracketed(machine)({B: step.run for B, step in prefills.items()}, 3).items()}

# %% tags=["nbval-ignore-output"]
for S in (SHORT, LONG):
    for B in (1, 4, 16, 64):
        lesson.measure(f"step, batch {B}, context {S}", times[B, S], parts=parts.get((B, S), ()))
    lesson.measure(f"throughput of 64 over 1, context {S}", gain(measured[S]))
    for quantity, found in ((f"knee, context {S}", knee(measured[S])), (f"batch at {si(SLO, 's')} a token, context {S}", promised(measured[S]))):
        if found and quantity in lesson.rows:
            lesson.measure(quantity, found)
        else:
            print(f"{quantity}: not between the batches of 1 and {BATCHES[-1]} on this machine")
lesson.measure("four prompts of 128, over one", four_over_one(prompts))
Table(["batch", *(f"{what}, {S}" for S in (SHORT, LONG) for what in ("a step", "tokens/s", "against one"))],
      [[str(B), *(cell for S in (SHORT, LONG) for cell in (si(measured[S][B], "s"), number(B / measured[S][B]), f"{measured[S][B] / measured[S][1]:.2f} ×"))]
       for B in BATCHES],
      numeric=["batch", *(f"{what}, {S}" for S in (SHORT, LONG) for what in ("a step", "tokens/s", "against one"))])

# %% tags=["nbval-ignore-output"]
fig, axes = plt.subplots(1, 2, figsize=(9.4, 3.7), sharey=True)
for ax, S in zip(axes, (SHORT, LONG), strict=True):
    said = [predicted[S][B] for B in BATCHES]
    ax.fill_between(BATCHES, [each.low_s for each in said], [each.high_s for each in said], color=plots.ROOFLINE, alpha=0.15, linewidth=0)
    beside(ax, BATCHES, [napkins[S][B] for B in BATCHES], [each.seconds for each in said], list(measured[S].values()))
    at = knee(measured[S])
    if at:
        ax.plot([at, at], [0, 2 * measured[S][1]], ":", color="black", linewidth=1.2)
        ax.annotate(f"knee: {at:.0f}", (at, 0), xytext=(4, 4), textcoords="offset points")
    ax.axhline(2 * measured[S][1], color="black", linewidth=0.8, linestyle=":")
    ax.set(xscale="log", xlabel="batch", title=f"A step at {S} tokens of context")
    ax.set_xticks(BATCHES, [str(B) for B in BATCHES])
    ax.minorticks_off()
axes[0].set_ylim(0, 1.05 * max(measured[LONG][64], predicted[LONG][64].high_s))
axes[1].text(1.01, 2 * measured[LONG][1], "twice\none", transform=axes[1].get_yaxis_transform(), va="center")
axes[1].get_legend().remove()
plots.show(fig, "Time of a step against the batch, napkin, prediction with its interval, and measured. " + " ".join(
    f"At {S} tokens {si(measured[S][1], 's')} for one sequence and {si(measured[S][64], 's')} for 64; "
    + (f"the knee is at {at:.0f}." if (at := knee(measured[S])) else "no knee up to 64.") for S in (SHORT, LONG)))

# %% [markdown]
# ### Fewer bytes, the same FLOPs
# The same model in bf16 and in 4 bits, in turn, at 64 tokens of context. Both compute in bf16.

# %% tags=["nbval-ignore-output"]
def time_formats(batches: list[int], rounds: int) -> dict:
    """Seconds of a step by (format, batch)."""
    steps = {(weights, B): StepOf(model, "decode", B, SHORT) for weights, model in packed.items() for B in batches}
    times = bracketed(machine)({case: step.run for case, step in steps.items()}, rounds)
    return {case: timing.median for case, timing in times.items()}


if packed:
    formats = time_formats([1, 4, 16, 64], rounds=7)
    for B in (1, 64):
        lesson.measure(f"int4 over bf16, batch {B}", formats["bf16", B] / formats["int4", B])
    display(Table(["batch", "bf16", "int4", "times faster"],
                  [[str(B), si(formats["bf16", B], "s"), si(formats["int4", B], "s"), f"{formats['bf16', B] / formats['int4', B]:.2f}"] for B in (1, 4, 16, 64)],
                  numeric=["batch", "bf16", "int4", "times faster"]))
else:
    print("The packed formats are for CPUs: with weights in 4 bits, a GPU needs kernels of its own (lesson 10).")

# %% [markdown]
# ### Latency against throughput
# The same points as those who pay for machines see them: what one user waits for a token, against what all users get. Every batch is a different bargain. Suppose we promise every user ten tokens a second, faster
# than one reads: a service-level objective, SLO, on the time per token. Which batch is best? The largest that keeps the promise.

# %% tags=["nbval-ignore-output"]
fig, axes = plt.subplots(1, 2, figsize=(9.4, 3.9), sharey=True)
for ax, S in zip(axes, (SHORT, LONG), strict=True):
    for said, colour, style, label in ((napkins[S], plots.NAPKIN, "--", "napkin"),
                                       ({B: step.seconds for B, step in predicted[S].items()}, plots.ROOFLINE, "-", "calibrated roofline")):
        ax.plot([said[B] for B in BATCHES], [B / said[B] for B in BATCHES], style, color=colour, label=label)
    rows = [{"batch": B, "fits": True, "seconds": t, "tokens_per_s": B / t} for B, t in measured[S].items()]
    pareto(ax, rows, label="measured", colour=plots.MEASURED)
    if SLO < ax.get_xlim()[1]:
        ax.axvline(SLO, color="black", linestyle=":", linewidth=1.2, label=f"the promise, {si(SLO, 's')}")
    at = promised(measured[S])
    ax.set(title=f"{S} tokens: the promise holds for {f'{at:.0f}' if at else 'all' if measured[S][64] <= SLO else 'none'}")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.minorticks_off()
    ax.locator_params(axis="x", nbins=5)
axes[1].set_ylabel("")
axes[1].legend(loc="lower right")
plots.show(fig, "Time per token of each user against tokens per second of all, a dot for each batch. " + " ".join(
    f"At {S} tokens from {number(1 / measured[S][1])} tokens/s at {si(measured[S][1], 's')} to {number(64 / measured[S][64])} at {si(measured[S][64], 's')}."
    for S in (SHORT, LONG)))

# %% [markdown]
# Up and to the left is better. A point with another above *and* to the left of it is never worth choosing: if a batch of two takes longer than one of four, run four, with two empty slots if need be.
#
# ## Reconciliation: what ended it?
# The calibrated roofline, taken apart by cause, beside the clock.

# %% tags=["nbval-ignore-output"]
BETWEEN = {"attention": "caches: attention", "element-wise": "element by element", "launches": "launches"}       # all others are products


def by_cause(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds by part, the products together."""
    products = sum(each for name, each in seconds.items() if name not in BETWEEN)
    return {"weights: products of B rows": products} | {cause: seconds.get(name, 0.0) for name, cause in BETWEEN.items()}


fig, axes = plt.subplots(1, 2, figsize=(9.4, 3.9), sharey=True)
for ax, S in zip(axes, (SHORT, LONG), strict=True):
    bottom = np.zeros(len(BATCHES))
    expected = [by_cause({name: part.seconds for name, part in predicted[S][B].parts.items()}) for B in BATCHES]
    for cause, colour in zip(expected[0], plots.COLOURS, strict=False):
        heights = [each[cause] for each in expected]
        ax.bar(range(len(BATCHES)), heights, bottom=bottom, color=colour, alpha=0.85, width=0.65, label=cause if S == SHORT else None)
        bottom += heights
    ax.plot(range(len(BATCHES)), list(measured[S].values()), "D", color="black", label="measured" if S == SHORT else None)
    ax.set(xlabel="batch", title=f"{S} tokens: what the roofline expects")
    ax.set_xticks(range(len(BATCHES)), [str(B) for B in BATCHES])
    ax.grid(axis="x", visible=False)
plots.units(axes[0].yaxis, "s")
fig.legend(loc="outside lower center", ncols=5)
plots.show(fig, "The predicted step, batch by batch, as a stack of products, attention, element-wise work and launches, with the measured time as a diamond. " + " ".join(
    f"At {S} tokens and a batch of 64: " + ", ".join(f"{cause} {si(each, 's')}" for cause, each in by_cause(
        {name: part.seconds for name, part in predicted[S][64].parts.items()}).items()) + f"; measured {si(measured[S][64], 's')}." for S in (SHORT, LONG)))

# %% [markdown]
# And against both roofs: the share of the bandwidth that a step reaches (MBU), and the share of the peak (MFU). A batch trades the one for the other.

# %% tags=["nbval-ignore-output"]
rows, roofs = [], {}
for B in BATCHES:
    for S in (SHORT, LONG):
        work = shape.decode(B, S, **FP32)
        roofs[B, S] = machine.mbu(work, measured[S][B]), machine.mfu(work, measured[S][B])
    rows.append([str(B), *(f"{share_:.0%}" for S in (SHORT, LONG) for share_ in roofs[B, S])])
columns = ["batch", *(f"{what}, {S}" for S in (SHORT, LONG) for what in ("of the bandwidth", "of the peak"))]
Table(columns, rows, numeric=columns)

# %% [markdown]
# Now commit yourself. What is the largest difference between napkin and clock for 64 sequences of 512 tokens?

# %% tags=["guess"]
# "products", "attention", "element-wise", "launches", "memory was slower than calibrated", "memory was faster than calibrated" or "not explained";
# where the napkin waits for arithmetic, "compute was slower than calibrated" and so on
lesson.cause("step, batch 64, context 512", ...)

# %% tags=["nbval-ignore-output"]
for B, S in reversed(EXPLAINED):
    lesson.explain(f"step, batch {B}, context {S}")

# %% tags=["nbval-ignore-output"]
inside = {(B, S): by_cause({part["name"]: part["measured_s"] for part in lesson.rows[f"step, batch {B}, context {S}"].parts}) for B, S in EXPLAINED}
products, attention, _, launches = inside[1, SHORT]
one, many = inside[1, SHORT], inside[64, SHORT]
attention_reads = 64 * LONG * k / inside[64, LONG][attention] / machine.bandwidth_at()
four_bits = "were not tried: the packed formats are for CPUs"
if packed:
    worth = {B: formats["bf16", B] / formats["int4", B] for B in (1, 16, 64)}
    four_bits = f"were worth {worth[1]:.1f} times the speed at a batch of one, {worth[16]:.2f} times at 16 and {worth[64]:.2f} at 64"
Markdown(f"""
What was measured inside the steps:

- **One sequence** reaches {roofs[1, SHORT][0]:.0%} of the bandwidth. Its products read the weights at {4 * w / one[products] / machine.bandwidth_at():.0%} of it, and launches take
  {one[launches] / measured[SHORT][1]:.0%} of the step. All of it goes into every *ratio* to one sequence: a faster program for one row would be good news for one user, and would bring the knee forward.
- **Sixty-four** reach {roofs[64, SHORT][1]:.0%} of the peak, their products {2 * w * 64 / many[products] / machine.peak("fp32"):.0%}. A corner as sharp as the napkin's exists on paper only: near it,
  neither reading nor computing hides the other.
- **The knee moves both ways.** A slower step of one moves it to larger batches, slower steps of many to smaller ones. Here the step of one took {measured[SHORT][1] / napkins[SHORT][1]:.1f} times its napkin, that
  of 64 {measured[SHORT][64] / napkins[SHORT][64]:.1f} times.
- **A few are a matter of programs.** A step of two took {measured[SHORT][2] / measured[SHORT][1]:.2f} times a step of one, a step of four
  {measured[SHORT][4] / measured[SHORT][1]:.2f}, of eight {measured[SHORT][8] / measured[SHORT][1]:.2f}. No count of bytes says in which order these come.
- **Caches** of 64 sequences of {LONG} tokens are read at {attention_reads:.0%} of the bandwidth, and attention is {inside[64, LONG][attention] / measured[LONG][64]:.0%} of that step.
- **Four bits** {four_bits}.
- **Prompts have little to share**: four of them took {four_over_one(prompts):.1f} times one, where four decode steps in a batch took
  {measured[SHORT][4] / measured[SHORT][1]:.1f} times one. They are their own batch.
""")

# %% tags=["nbval-ignore-output"]
lesson.table()

# %% [markdown]
# ### Other people's batches
# Does the formula hold on machines that we have never touched? TensorRT-LLM 0.5 and 0.6 published tokens per second for two models without grouped heads, on three cards, at batches from 16 to 120, with 2,048 tokens of output: many
# steps and little prefill. The napkin for each is weights and caches at data-sheet bandwidth, and no fit.

# %%
CARDS = {"A100-80GB SXM": "a100-80gb-sxm", "H100-80GB SXM": "h100-sxm", "L40S-48GB": "l40s"}
MODELS = {"LLaMA-7B": "llama-2-7b", "GPT-J-6B": "gpt-j-6b"}     # Llama 2 has the shape of its elder


def tokens_per_s(run, batch: int) -> float:
    """By napkin: a prefill at peak, then a step at the mean context for each token but the first."""
    s, m = catalog.model(MODELS[run.model]), catalog.machine(CARDS[run.hardware])
    prompt, generated = run.whole("prompt_len"), run.whole("gen_len")
    formats = {"weights": run.weight_dtype, "kv": run.kv_dtype}
    steps = (generated - 1) * m.napkin(s.decode(batch, prompt + generated // 2, **formats))
    return batch * generated / (m.napkin(s.prefill(batch, prompt, **formats)) + steps)


runs = [run for run in published_runs() if run.category == "serving_throughput" and run.model in MODELS and run.hardware in CARDS
        and run.tp == 1 and run.gen_len == 2048]
runs.sort(key=lambda run: (run.batch, run.value))
reach = {run.id: run.value / tokens_per_s(run, run.whole("batch")) for run in runs}
columns = ["batch", "model", "card", "weights", "in", "out", "tokens/s, published", "by napkin", "published ÷ napkin"]
Table(columns, [[f"{run.batch:.0f}", run.model, run.hardware, run.weight_dtype, f"{run.prompt_len:.0f}", f"{run.gen_len:,.0f}", f"{run.value:,.0f}",
                 f"{run.value / reach[run.id]:,.0f}", f"{reach[run.id]:.2f}"] for run in runs],
      numeric=["batch", *columns[4:]])

# %%
many = reach.values()
[few] = [run for run in runs if run.batch == 32 and run.model == "LLaMA-7B" and run.hardware == "A100-80GB SXM"]
[most] = [run for run in runs if run.batch == 60 and run.model == "LLaMA-7B"]
more, said = most.value / few.value, tokens_per_s(most, 60) / tokens_per_s(few, 32)
assert max(many) / min(many) < 1.3 and abs(more / said - 1) < 0.05
Markdown(f"The napkin promises more than there is, always, and nearly always by the same factor: what was published is {min(many):.2f} to {max(many):.2f} of it, from batches of 16 to 120. "
         f"So of *what a batch brings* it is a good judge. On the A100, {most.batch:.0f} sequences of LLaMA-7B instead of {few.batch:.0f} gave **{more:.2f} times** the throughput, "
         f"for {most.batch / few.batch:.2f} times the users; the napkin says {said:.2f}.")

# %% [markdown]
# ### When a batch loses
# - **Long contexts.** Past W/c sequences, twice the batch brings at most a third more tokens a second. A batch shares weights; nobody shares a past (unless it is the same one: lesson 06).
# - **Prefill.** A prompt of several hundred tokens fills the arithmetic alone. Then four prompts together take four times as long, and all four users wait for the fourth.
# - **A promise.** Beyond the knee one buys throughput with everybody's latency. The best batch is the largest that keeps the promise, and not the one with the most tokens a second.
# - **Between two programs.** A few rows may cost as much as one, or twice as much, by the program that the library picks for them. Ask the stopwatch before you pay for a batch of two.
# - **Experts.** In a mixture of experts every sequence chooses its own, so at first the batch shares *little*, and reads more with every user:

# %%
mixtral = catalog.model("mixtral-8x7b")
assert mixtral.streamed_bytes("bf16", tokens=64) > 0.99 * mixtral.streamed_bytes("bf16", tokens=10_000)
Table(["batch", *(str(B) for B in (1, 2, 4, 8, 16))],
      [["weights read in a step", *(si(mixtral.streamed_bytes("bf16", tokens=B), "B") for B in (1, 2, 4, 8, 16))]],
      numeric=[str(B) for B in (1, 2, 4, 8, 16)], title=f"{mixtral.name}, bf16, if tokens choose evenly (lesson 11)")

# %% [markdown]
# - **Nobody there.** A batch must be *filled*, and real users come and go one by one. To wait for the eighth costs the first seven; and if a batch lasts until its longest answer is
#   done, most of its slots are empty in the end. That is the next lesson.
#
# ## Play and exercises
# Any model, any machine: what does a step wait for, how much room is there, and what would one more user cost? Try to find: a setting in which room ends before anything else does; one in which the arithmetic
# binds at a context of 4,096 (does it fit?); and what 4-bit weights change at a batch of 1 and at 256.

# %%
def draw_step(model: str, on: str, batch: int, context: int, weights: str) -> None:
    """The parts of a step against the batch, up to the room that there is; the chosen batch marked."""
    s, m = catalog.model(model), catalog.machine(on)
    capacity = s.fits(m.memory, batch, context, weights)
    most = capacity.max_batch
    end = max(4 * most, 2 * batch)

    def seconds(B: int) -> dict[str, float]:
        step = s.decode(B, context, weights=weights)
        read, kept = s.streamed_bytes(weights, tokens=B), s.kv_bytes(B, context)
        parts = {"weights": read, "caches": kept, "between operations": max(0, step.bytes - read - kept)}
        return {name: count / m.bandwidth_at() for name, count in parts.items()} | {"arithmetic": step.flops / m.peak("bf16")}

    def together(parts: dict[str, float]) -> float:
        return max(parts["weights"] + parts["caches"] + parts["between operations"], parts["arithmetic"])

    fig, ax = plt.subplots(figsize=(7.4, 3.8))
    if capacity:
        parts = seconds(batch)
        step = together(parts)
        binds = "arithmetic" if parts["arithmetic"] == step else max(list(parts)[:3], key=parts.get)
        line = f"{si(step, 's')} a step, {batch / step:,.0f} tokens/s; it waits for: {binds}; room for {most:,}"
        ax.plot([batch], [step], "o", color=plots.MEASURED, markersize=9, zorder=5)
    elif most:
        line = f"does not fit: room for {most:,}"
    else:
        line = "does not fit: " + ("the weights alone are too much" if capacity.weight_bytes > m.memory else "no room for a single sequence")
    if most:                                        # what does not fit has no time
        x = np.unique(np.geomspace(1, most, 30).round().astype(int))
        curves = [seconds(int(B)) for B in x]
        for name, colour in zip(curves[0], [*plots.COLOURS[:2], plots.COLOURS[5], plots.COLOURS[2]], strict=True):
            ax.plot(x, [parts[name] for parts in curves], "--", color=colour, linewidth=1.5, label=name)
        ax.plot(x, [together(parts) for parts in curves], color="black", label="the step")
        ax.set_ylim(bottom=together(curves[0]) / 300)
        ax.legend(loc="lower right")
    ax.axvspan(max(most, 1), end, color="#eeeeee")
    ax.axvline(batch, color=plots.MEASURED, linewidth=1)
    ax.set_title(f"{s.name} on {m.name}, {batch:,} × {context:,} tokens, weights in {weights}\n{line}", fontsize=10)
    ax.set(xscale="log", yscale="log", xlabel="batch (grey: no room)", xlim=(1, end))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    plots.units(ax.yaxis, "s")
    ax.minorticks_off()
    plots.show(fig, f"A step of {s.name} on {m.name} against the batch, by its parts, at {context:,} tokens with weights in {weights}. At a batch of {batch:,}: {line}.")


# %% tags=["widget", "nbval-ignore-output"]
BF16 = [name for name in catalog.machine_names() if "bf16" in catalog.machine(name).peak_flops]
widgets.play(draw_step,
             model=widgets.choose("model", ["smollm2-135m", "qwen3-0.6b", "llama-3.2-1b", "llama-2-7b", "llama-3-8b", "qwen2.5-32b", "mixtral-8x7b"], "llama-3-8b"),
             on=widgets.choose("machine", BF16, "h100-sxm"),
             batch=widgets.powers_of_two("batch", 1, 1024, 32),
             context=widgets.powers_of_two("context", 64, 131072, 4096),
             weights=widgets.choose("weights", ["bf16", "int8", "int4"]))

# %%
draw_step("llama-3-8b", "h100-sxm", 32, 4096, "bf16")

# %% [markdown]
# And the bargain on machines that you may not own: the frontier for one model, by napkin, each line up to the last batch that fits. The dotted line promises 20 tokens a second.

# %%
fig, ax = plt.subplots(figsize=(7.4, 4.0))
for key, colour in zip(("h100-sxm", "a100-80gb-sxm", "rtx-4090", "l4"), plots.COLOURS, strict=False):
    rows = [row for row in sweep(llama, catalog.machine(key), "batch", context=4096) if row["fits"]]
    rows = [row for row, after in zip(rows, [*rows[1:], None], strict=True) if after is None or after["batch"] > 1.5 * row["batch"]]
    pareto(ax, rows, label=catalog.machine(key).name, colour=colour)
ax.axvline(0.05, color="black", linestyle=":", linewidth=1.2)
ax.set(title=f"{llama.name}, bf16, 4,096 tokens: each batch is a bargain")
ax.legend(loc="upper right")
plots.show(fig, f"Time per token against tokens per second of {llama.name} on an H100, an A100, an RTX 4090 and an L4, from a batch of one to the last that fits. "
                "Each card's line rises steeply, then flattens; the larger cards reach higher.")

# %% [markdown]
# ### 1 · The knee from two numbers
# You have measured a step of one sequence, `t1` seconds, and one of 64, `t64`. Take it that between them every further sequence adds the same. At which batch does a step take
# twice as long as for one?

# %% tags=["exercise", "exercise:knee_from_two"]
def knee_from_two(t1, t64):
    return ...


lesson.exercise(
    "knee_from_two", knee_from_two,
    cases={
        (0.064, 0.127): 65.0,           # each adds 1 ms to 64 ms
        (0.070, 0.280): 22.0,           # a CPU, say
        (0.010, 0.640): 2.0,            # nothing is shared: the second costs as much as the first
        (0.005, 0.00563): 501.0,        # a small model on a large GPU
    },
    nudge="What does one more sequence add? How many of those make another t1?",
    means="two measurements tell what all sweeps tell, if the machine has no bumps. Try it on the table above.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# From 1 to 64 there are 63 steps: one more sequence adds (t64 − t1) / 63.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def knee_from_two(t1, t64):
#     return 1 + t1 / ((t64 - t1) / 63)
# ```
#
# </details>

# %% [markdown]
# ### 2 · A promise is a capacity
# You promise `promise` seconds a token. In that time the machine reads promise · bandwidth bytes, and what it cannot read in time it might as well not hold. How many whole users can you
# serve, each with `kv` bytes of cache beside `weights` bytes of weights, on a machine with `memory`?

# %% tags=["exercise", "exercise:users_within"]
def users_within(promise, weights, kv, memory, bandwidth):
    return ...


lesson.exercise(
    "users_within", users_within,
    cases={
        (0.020, 16_060_522_496, 536_870_912, 85_899_345_920, 3.35e12): 94,      # Llama-3-8B at 4,096 on an H100: the promise binds
        (0.050, 16_060_522_496, 536_870_912, 85_899_345_920, 3.35e12): 130,     # here the memory does, and a laxer promise earns nothing
        (0.004, 16_060_522_496, 536_870_912, 85_899_345_920, 3.35e12): 0,       # not even the weights come past in time
        (0.050, 16_060_522_496, 536_870_912, 25_769_803_776, 1.008e12): 18,     # an RTX 4090
        (0.050, 16_060_522_496, 2_147_483_648, 85_899_345_920, 3.35e12): 32,    # with 32 KV heads instead of 8
    },
    nudge="There are two limits in bytes. The smaller one holds weights and caches.",
    means="at 4,096 tokens a full H100 takes 26 ms, so a laxer promise lets nobody else in. Both limits are of bytes: at short contexts the arithmetic sets a third.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# min(memory, promise · bandwidth), less the weights, over kv; whole users, and never less than none.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def users_within(promise, weights, kv, memory, bandwidth):
#     readable = min(memory, promise * bandwidth)
#     return max(0, int((readable - weights) // kv))
# ```
#
# </details>

# %% [markdown]
# ### 3 · Against intuition: four times fewer bytes
# Weights in 4 bits instead of 16, computed with in bf16 on a machine with ridge point `R`. How many times faster is a step of `batch` sequences with short contexts? Write down your guess for a batch of 256 on an H100 (R = 295) first.

# %% tags=["exercise", "exercise:int4_speedup"]
def int4_speedup(batch, R):
    return ...


lesson.exercise(
    "int4_speedup", int4_speedup,
    cases={
        (1, 295): 4.0,
        (64, 295): 4.0,                 # still reading
        (128, 295): 295 / 128,          # computing, where 16 bits were still reading
        (256, 295): 295 / 256,          # a quarter of the bytes, and a seventh less time
        (512, 295): 1.0,                # both compute
        (16, 40): 2.5,                  # a machine with few FLOPs per byte
    },
    nudge="Take the larger of reading and computing, for each format; a 16-bit weight is 2 bytes and 2·batch FLOPs.",
    means="fewer bytes help whoever waits for bytes. At large batches quantize the caches, or compute in fewer bits.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# In units of reading a 16-bit weight: reading takes 1 or 1/4, computing takes batch / R for both.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def int4_speedup(batch, R):
#     return max(1, batch / R) / max(1 / 4, batch / R)
# ```
#
# </details>

# %% [markdown]
# ### 4 · How many for 90 %?
# By bytes alone, B sequences reach B/(W + B·c) · c of the ceiling. Which batch reaches `share` of it? Then ask yourself whether there is room for it.

# %% tags=["exercise", "exercise:batch_for"]
def batch_for(share, weights, kv):
    return ...


lesson.exercise(
    "batch_for", batch_for,
    cases={
        (0.5, 16e9, 0.5e9): 32.0,       # weights and caches weigh the same
        (0.9, 16e9, 0.5e9): 288.0,      # nine times as many: 144 GB of caches
        (0.75, 16e9, 2e9): 24.0,
    },
    nudge="Solve share · (W + B·c) = B·c for B.",
    means="half of the ceiling is cheap, the next 40 % cost nine times the memory, and the latency with it.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# B·c · (1 − share) = share · W.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def batch_for(share, weights, kv):
#     return weights / kv * share / (1 - share)
# ```
#
# </details>

# %% [markdown]
# ### 5 · Harder: one model twice, or halved?
# You have two equal cards and `batch` users. Either each card holds the whole model and serves half of the users; or each holds half of every weight and half of every cache, and both work on all users at once. Everything waits
# for bytes, and let the cards talk for free. How many times the throughput of the first does the second have?

# %% tags=["exercise", "exercise:halved_over_twice"]
def halved_over_twice(batch, weights, kv):
    return ...


lesson.exercise(
    "halved_over_twice", halved_over_twice,
    cases={
        (2, 16e9, 0.0): 2.0,            # no caches to speak of: each weight is read by one card only
        (32, 16e9, 0.5e9): 1.5,
        (320, 16e9, 0.5e9): 192 / 176,  # a large batch: nearly the same
    },
    nudge="Both serve `batch` tokens a step. How many bytes does one card read in each case?",
    means="the second copy of the weights is read for nothing. It costs room, too; what it saves is talk.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Twice: weights + batch/2 · kv. Halved: weights/2 + batch · kv/2.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def halved_over_twice(batch, weights, kv):
#     return (weights + batch / 2 * kv) / (weights / 2 + batch * kv / 2)
# ```
#
# </details>

# %% [markdown]
# **To take away.** A batch shares the read of the weights and nothing else. It stops being free when the arithmetic has caught up, at R·e/2 sequences, or when the caches have, at W/c of them, whichever is first; at
# today's contexts it is the caches. Behind the knee, throughput is bought with everybody's latency, and the last to say no is the room. Where bytes bind, a full machine takes memory over bandwidth for a step. All that supposed
# that the users were there, at the same time, with answers of the same length. They are not: lesson 05.
#
# Further reading: Williams et al. 2009 (roofline); Pope et al. 2022, *Efficiently scaling transformer inference* (the frontier of latency and throughput); Yu et al. 2022 (Orca); Austin et al. 2025, *How to scale your model*.
