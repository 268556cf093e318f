# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 07 · What does a bit buy?
# ## Question
# A decode step reads every weight once, does one multiplication and one addition with it, and forgets it again. Lesson 01 found that the reading is what takes the time. So a weight of
# fewer bits should be a faster weight, in proportion:
#
# $$\text{time per token} \approx \frac{\text{weights} \cdot \text{bits}}{8 \cdot \text{bandwidth}}$$
#
# Two questions hide behind the proportion. Does the machine keep the promise? And how many bits can a weight lose before the model is another model?
#
# Three guesses before you go on. From 32 bits to 4: how much faster is a token, here? How many of 100 next tokens change if every weight is rounded to the nearest of 16 numbers?
# Weights in 8 bits lose almost nothing. And if the *activations* are put into 8 bits as well?

# %% tags=["nbval-ignore-output"]
from clawdemy_infer.envelope.roofline import interpolate
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.files import load_model
from clawdemy_infer.from_config import catalog
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.parts import StepOf
from clawdemy_infer.lesson.tables import Table, si
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.quantization import Quantized, format_named, linears, observe, round_to_nearest
from clawdemy_infer.rigs.quality import Reference
from clawdemy_infer.rigs.quantization_table import judged_row, quantization_table
from clawdemy_infer.rigs.text import calibration_tokens, evaluation_tokens
from clawdemy_infer.variants.int8_activations import int8_activations, llm_int8
from clawdemy_infer.variants.smoothquant import smoothquant

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown

plots.use_style()
plt.rcParams["figure.dpi"] = 90
machine = this_machine("cpu", formats=("int8", "int4"))         # the kernels for 8 and 4 bits used here are the CPU's
lesson = Lesson("07 quantization", machine=machine)
decoder = load_model("smollm2-135m")
lesson.card()

# %% [markdown]
# Write the first guess over the dots, as a number or as text with its unit, such as "20 ms": how long does a token take from weights in 4 bits, for one user who is at 64 tokens?

# %%
lesson.guess("int4, decode, B = 1", ...)

# %% [markdown]
# ## Envelope: how many bits has a 4-bit weight?
# A code of 4 bits is one of 16 numbers, and which 16 is said by a *scale*. One scale for a whole matrix would be set by its largest weight, so a scale is kept for each row, or for each
# *group* of neighbours in a row. A scale is bytes, too. We count, for a row of 1,536 weights:

# %%
I = 1536                                            # inputs of the down projection
bits = {}
bits["int8"] = 8 + 16 / I                           # one fp16 scale for the row
bits["int4-g64"] = 4 + 16 / 64                      # … for each 64 weights
bits["int4-g64-asym"] = 4 + (16 + 4) / 64           # and a zero point, itself a code of 4 bits
bits["int3-g64"] = 3 + 16 / 64
bits["q4_1"] = 4 + (16 + 16) / 32                   # llama.cpp: the scale and the lowest weight, both fp16
bits["fp8-e4m3"] = 8 + 32 / I                       # floating point: 4 bits of exponent, 3 of mantissa
bits["mxfp4"] = 4 + 8 / 32                          # 2 bits of exponent, 1 of mantissa; the scale is a power of two
bits["nvfp4"] = 4 + 8 / 16                          # the same 16 numbers, and an 8-bit float as scale
bits["nf4"] = 4 + 32 / 64                           # quantiles of a bell curve

weight = linears(decoder)["layers.11.down"].weight
for name, count in bits.items():
    assert abs(Quantized.of(format_named(name), weight).bits_per_weight - count) < 1e-3, name
Table(["format", "bits for a weight", "codes", "fp32 is larger by"],
      [[name, f"{count:.3f}", f"{len(format_named(name).levels)}", f"{32 / count:.2f} ×"] for name, count in bits.items()],
      numeric=["bits for a weight", "codes", "fp32 is larger by"])

# %% [markdown]
# Four bits are 4¼ to 5. Small groups cost bytes and give back precision; the trade is what formats differ in.
#
# ### The promise, in bytes
# What runs below has *all* matrices in the format, the head too. One token reads:

# %%
shape = catalog.model("smollm2-135m")
stored = {"fp32": 32, "bf16": 16, "int8": 8, "int4": bits["int4-g64-asym"]}
streamed = {name: shape.streamed_bytes("fp32") * count / 32 for name, count in stored.items()}
Table(["weights", "bits", "read for a token", "at best, against fp32"],
      [[name, f"{count:.2f}", si(streamed[name], "B"), f"{streamed['fp32'] / streamed[name]:.2f} ×"] for name, count in stored.items()],
      numeric=["bits", "read for a token", "at best, against fp32"])

# %% [markdown]
# ### Which sixteen numbers?
# Below, each line is a format; each tick is a number that a code can mean, for weights scaled so that the largest of the group is 1. Above them, where weights really are: the histogram of one matrix, each
# group of 64 divided by its largest weight.

# %%
groups = weight.unflatten(1, (-1, 64))
scaled = (groups / groups.abs().amax(-1, keepdim=True)).flatten().numpy()
lines = {"int3": "int3-g64", "int4": "int4-g64", "E2M1 (mxfp4, nvfp4)": "mxfp4", "nf4": "nf4", "E4M3 (fp8)": "fp8-e4m3"}

fig, (top, ax) = plt.subplots(2, 1, figsize=(7.6, 4.2), height_ratios=[1, 1.7], sharex=True)
top.hist(scaled, bins=120, color=plots.COLOURS[5], alpha=0.8)
top.set(title="Most weights are small; some formats know it", yticks=[], ylabel="weights")
for y, name in enumerate(lines.values()):
    levels = format_named(name).levels
    largest = levels.abs().max() - (0.5 if name.startswith("int") else 0)       # integers meet their largest weight half a step early
    ax.plot(levels / largest, [y] * len(levels), "|", markersize=18, markeredgewidth=1.4, color=plots.COLOURS[y])
ax.set_yticks(range(len(lines)), list(lines))
ax.set(xlabel="number, of the largest in the group", ylim=(len(lines) - 0.5, -0.5))
ax.grid(axis="y", visible=False)
plots.show(fig, f"Above, a histogram of the weights of one matrix, each divided by the largest of its group: {np.mean(np.abs(scaled) < 0.5):.0%} are below a half. "
           f"Below, the numbers that a code can mean, in {', '.join(lines)}: evenly spaced in integers, denser near zero in the others.")

# %% [markdown]
# Integers have the same step everywhere. Floats have steps that grow with the number: fine near zero, coarse outside. nf4 puts its numbers where a bell curve has its weights.
#
# ### By hand
# Four weights, four bits, once symmetric and once with a zero point. Check one code yourself: `round(weight / scale)`, and `+ zero` in the second.

# %%
four = torch.tensor([[-0.30, 0.13, 0.42, 1.20]])
rows = []
for name in ("int4-g4", "int4-g4-asym"):
    q = Quantized.of(format_named(name), four)
    zero = 0 if q.zero is None else int(q.zero)
    rows.append([name, f"{float(q.scale):.3f}", f"{zero}", str(q.codes[0].tolist()), ", ".join(f"{x:.2f}" for x in q.dequantize()[0]),
                 f"{float((q.dequantize() - four).norm() / four.norm()):.1%}"])
Table(["format", "scale", "zero", "codes", "mean", "relative error"], rows, numeric=["scale", "zero", "relative error"],
      title="−0.30, 0.13, 0.42, 1.20")

# %% [markdown]
# These four are mostly positive, so half of the symmetric codes lie idle. The zero point moves the grid to where the weights are.
#
# ### Groups
# The smaller a group, the nearer its largest weight is to the others. We round one real matrix with every group size that divides its rows, and draw what is lost against what it weighs.

# %%
def lost(name: str) -> tuple[float, float]:
    """Effective bits and relative error of the matrix."""
    q = Quantized.of(format_named(name), weight)
    return q.bits_per_weight, float((q.dequantize() - weight).norm() / weight.norm())


fig, ax = plt.subplots(figsize=(7.6, 3.8))
said = []
for colour, width in zip(plots.COLOURS, (8, 6, 4, 3), strict=False):
    for zero, style in (("", "-"), ("-asym", "--")):
        points = [lost(f"int{width}{group}{zero}") for group in ("", "-g256", "-g128", "-g64", "-g32")]
        said.append(f"int{width}{' with zero' if zero else ''} {points[0][1]:.1%} with a scale for a row, {points[-1][1]:.1%} for groups of 32")
        ax.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=colour, label=f"int{width}{' with zero' if zero else ''}")
for name, shift in {"fp8-e4m3": (-48, 5), "fp8-e5m2": (-48, 5), "mxfp4": (6, 4), "nvfp4": (6, -3), "nf4": (6, -15)}.items():
    x, y = lost(name)
    ax.plot([x], [y], "s", color="black", markersize=5)
    ax.annotate(name, (x, y), xytext=shift, textcoords="offset points", fontsize=9)
ax.set(yscale="log", xlabel="bits for a weight, scales and all", ylabel="relative error", title="A bit less, twice the error; small groups buy some back")
ax.legend(ncols=2)
plots.show(fig, f"Relative error of a matrix against the bits for a weight: {'; '.join(said)}.")

# %% [markdown]
# **A trap on the way.** The file that our model comes in is quantized already: Q4_1, groups of 32 with an fp16 scale and lowest weight. Round these weights on *that* grid and nothing happens:

# %%
exact = Quantized.of(format_named("q4_1"), weight)
assert torch.equal(exact.dequantize(), weight)
Markdown(f"q4_1: error **{lost('q4_1')[1]:.0%}**. The next grid, the same group and a whole zero point (int4-g32-asym): **{lost('int4-g32-asym')[1]:.1%}**.")

# %% [markdown]
# So 4 bits "without any loss" would be easy to show here, and would mean nothing. Every other grid treats these weights like any others. And what we call the reference below is the model as the file holds it.
#
# ### Activations are another matter
# If the inputs are put into 8 bits too, the products are whole numbers, for which many chips have units of twice the rate: an H100 does 1,979 T operations a second in int8, and 989 TFLOP/s in bf16. One scale for each token, by the token's largest number. What does that number look like?

# %%
seen: dict[str, torch.Tensor] = {}
calibration = calibration_tokens(decoder.tokenizer, 1, 128)
observe(decoder, calibration, lambda name, x: seen.__setitem__(name, x.abs()))

fig, axes = plt.subplots(1, 3, figsize=(9.0, 2.9))
for ax, name in zip(axes, ("layers.11.qkv", "layers.11.down", "layers.29.down"), strict=True):
    columns = seen[name].amax(0).sort(descending=True).values
    ax.semilogy(columns, color=plots.COLOURS[0], label="largest over all tokens")
    ax.semilogy(seen[name].median(0).values.sort(descending=True).values.clamp(min=1e-4), color=plots.COLOURS[2], label="median")
    ax.axhline(6, color=plots.MEASURED, linewidth=1, label="6")
    ax.set(title=name, xlabel="column, sorted")
axes[0].set_ylabel("|activation|")
fig.suptitle("A few columns are far above the rest", x=0.01, ha="left", fontsize=11, fontweight="bold")
handles, labels = axes[0].get_legend_handles_labels()
fig.legend(handles, labels, loc="outside lower center", ncols=3)
plots.show(fig, "Activations by column, sorted, in three places; the largest, and the median of the columns' largest: " + "; ".join(
    f"{name} {float(seen[name].max()):.1f} and {float(seen[name].amax(0).median()):.1f}" for name in ("layers.11.qkv", "layers.11.down", "layers.29.down")) + ".")

# %% [markdown]
# A few columns are far above the rest. They set the scale of their token, and the others are left with few codes: that is the outlier problem. How few, matrix by matrix:

# %% tags=["nbval-ignore-output"]
def zeros(x: torch.Tensor) -> float:
    """Share of activations, of those that are not tiny noise, which int8 with a scale for each token rounds to 0."""
    return float((x < x.amax(1, keepdim=True) / 127 / 2).float().mean())


kinds = ("qkv", "out", "gate_up", "down")
by_kind = {kind: [x for name, x in seen.items() if name.endswith(kind)] for kind in kinds}
Table(["input of", "largest", "columns that reach 6", "rounded to 0 in int8", "in the worst layer"],
      [[kind, f"{max(float(x.max()) for x in xs):,.0f}", f"{sum(int((x.amax(0) >= 6).sum()) for x in xs) / len(xs):.0f} of {xs[0].shape[1]:,}",
        f"{np.mean([zeros(x) for x in xs]):.0%}", f"{max(zeros(x) for x in xs):.0%}"] for kind, xs in by_kind.items()],
      numeric=["largest", "columns that reach 6", "rounded to 0 in int8", "in the worst layer"])

# %% [markdown]
# Two answers from 2022, both in a line:
#
# - **LLM.int8()** (Dettmers et al.): columns that reach 6 are taken out and multiplied in floating point; the rest is int8.
#   $x W^\top = x_O W_O^\top + s_x s_w \cdot \text{codes}_x\,\text{codes}_w^\top$
# - **SmoothQuant** (Xiao et al.): divide a column of x by s, multiply that of W by s. $(x / s)\,(W \operatorname{diag}(s))^\top = x W^\top$, and the norm in front does the division for free.
#
# ## Prediction
# First the time. **The napkin**: bytes over bandwidth, or FLOPs over peak. **The calibrated roofline** knows this machine's kernels for each format, by the number of rows, from products of random
# matrices: not from this model.

# %% tags=["nbval-ignore-output"]
models = {name: faster(decoder, name) for name in ("fp32", "bf16", "int8", "int4")}
SETTINGS = [("decode", 1, 64), ("decode", 32, 64), ("prefill", 1, 128)]
said = {(phase, batch): f"{phase}, B = {batch}" for phase, batch, _ in SETTINGS}

steps = {(name, *setting[:2]): StepOf(model, *setting) for name, model in models.items() for setting in SETTINGS}
predicted = {}
for (name, *setting), step in steps.items():
    predicted[name, *setting] = step.predict(machine)
    lesson.predict(f"{name}, {said[*setting]}", step.napkin(machine), predicted[name, *setting], unit="s")
lesson.reveal()

# %% [markdown]
# Then the quality. Nobody predicts that from an envelope; but an order one can: 8 bits before fp8 (3 bits of mantissa), small groups before large ones, a zero point before none, 4 bits long before 3.
#
# ## Measurement
# The same model in four formats.

# %% tags=["nbval-ignore-output"]
EXPLAINED = {("fp32", "decode", 1), ("int4", "decode", 1), ("int4", "prefill", 1)}         # these three part by part too
timed = {}
for (name, *setting), step in steps.items():
    timed[name, *setting] = step.time(machine)
    parts = step.parts(machine) if (name, *setting) in EXPLAINED else ()
    lesson.measure(f"{name}, {said[*setting]}", timed[name, *setting], parts=parts)


def speedup(name: str, phase: str, batch: int) -> float:
    return timed["fp32", phase, batch].median / timed[name, phase, batch].median


columns = ["bytes promise", *(f"{said[phase, batch]}" for phase, batch, _ in SETTINGS)]
Table(["weights", *columns],
      [[name, f"{streamed['fp32'] / streamed[name]:.2f} ×", *(f"{si(timed[name, phase, batch].median, 's')} ({speedup(name, phase, batch):.2f} ×)"
                                                             for phase, batch, _ in SETTINGS)] for name in models], numeric=columns)

# %% tags=["nbval-ignore-output"]
fig, axes = plt.subplots(1, 3, figsize=(9.0, 3.0))
for ax, (phase, batch, _) in zip(axes, SETTINGS, strict=True):
    names = list(models)
    ax.bar(names, [timed[name, phase, batch].median for name in names], color=plots.MEASURED, width=0.55)
    ax.plot(names, [steps[name, phase, batch].napkin(machine) for name in names], "_", color=plots.NAPKIN, markersize=26, markeredgewidth=2.5)
    ax.plot(names, [predicted[name, phase, batch].seconds for name in names], "_", color=plots.ROOFLINE, markersize=26, markeredgewidth=2.5)
    ax.set(title=said[phase, batch])
    ax.grid(axis="x", visible=False)
    plots.units(ax.yaxis, "s")
axes[0].set_ylabel("one step")
for colour, label in ((plots.NAPKIN, "napkin"), (plots.ROOFLINE, "calibrated roofline"), (plots.MEASURED, "measured")):
    axes[0].plot([], [], "_", color=colour, markersize=12, markeredgewidth=3, label=label)
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plots.show(fig, "One step in four formats, measured and predicted: " + "; ".join(
    f"{name}, {said[phase, batch]}, {si(timed[name, phase, batch].median, 's')} and {si(predicted[name, phase, batch].seconds, 's')}" for name, phase, batch in steps) + ".")

# %% [markdown]
# ### Is it still the same model?
# Both models read the same text, and at every position we compare what they expect next: the Kullback–Leibler divergence KL(reference ‖ quantized) in nats, its standard error, perplexity, and how often both would
# name the same token. First the four that were timed. Then more formats, rounding to nearest, the head untouched; and 8-bit weights *and* activations, three ways.

# %% tags=["nbval-ignore-output"]
reference = Reference(decoder, evaluation_tokens(decoder.tokenizer, 1, 256))
as_run = {name: reference.judge(model) for name, model in models.items() if name != "fp32"}
Table(["as it runs", "KL", "top-1"], [[name, f"{each.kl:.5f}", f"{each.top1:.1%}"] for name, each in as_run.items()], numeric=["KL", "top-1"])

# %% tags=["nbval-ignore-output"]
models = steps = None                               # the memory is needed here
FORMATS = ["int8", "fp8-e4m3", "int4-g64", "int4-g64-asym", "mxfp4", "nvfp4", "nf4", "int3-g64-asym"]


def candidates():
    """One at a time: each is a model of its own."""
    yield from (round_to_nearest(decoder, format_named(name)) for name in FORMATS)
    yield int8_activations(decoder)
    yield llm_int8(decoder)
    yield smoothquant(decoder, calibration_tokens(decoder.tokenizer, 2, 128))


rows = [judged_row(reference), *(judged_row(reference, one) for one in candidates())]
quantization_table(rows)

# %% tags=["nbval-ignore-output"]
fig, ax = plt.subplots(figsize=(7.6, 4.4))
for colour, method in zip(plots.COLOURS, dict.fromkeys(row.method for row in rows[1:]), strict=False):
    chosen = [row for row in rows if row.method == method]
    kls = [row.quality.kl for row in chosen]
    ax.errorbar([row.streamed / 1e6 for row in chosen], kls, yerr=[row.quality.kl_se for row in chosen], fmt="o", color=colour, label=method)
    for row in chosen if len(chosen) > 1 else ():       # one row is named by the legend
        close = any(0 < kl - row.quality.kl < 0.2 * row.quality.kl for kl in kls)
        ax.annotate(row.format, (row.streamed / 1e6, row.quality.kl), fontsize=9, textcoords="offset points", xytext=(-7 if close else 7, -3),
                    horizontalalignment="right" if close else "left")
ax.set(title="Eight bits are nearly free, four have a price, three ruin", xlim=(None, 1.05 * max(row.streamed for row in rows[1:]) / 1e6),
       yscale="log", xlabel="MB read for each token", ylabel="KL to the reference, nats a token")
ax.legend()
plots.show(fig, "KL to the reference against the MB that a token reads: " + "; ".join(
    f"{row.method} {row.format} {row.quality.kl:.3f} at {row.streamed / 1e6:.0f} MB" for row in rows[1:]) + ".")

# %% [markdown]
# ## Reconciliation
# Time first. Commit yourself to a cause: what makes the largest difference between napkin and measured?

# %%
lesson.cause("int4, decode, B = 1", ...)        # "products", "attention", "element-wise", "launches",
lesson.cause("int4, prefill, B = 1", ...)       # "memory was slower than calibrated" (or faster; or compute), "not explained"

# %% tags=["nbval-ignore-output"]
lesson.explain("fp32, decode, B = 1")

# %% tags=["nbval-ignore-output"]
lesson.explain("int4, decode, B = 1")

# %% tags=["nbval-ignore-output"]
lesson.explain("int4, prefill, B = 1")

# %% [markdown]
# What bits buy is bought by a kernel. From the calibration, products with matrices that no cache holds: how fast one row of activations goes through the weights, and how fast many are multiplied.

# %% tags=["nbval-ignore-output"]
rate = {name: {m: interpolate(machine.rates["gemm"][name], m) for m in (1, 32, 128)} for name in stored}
read = {name: rate[name][1] / 2 * count / 8 for name, count in stored.items()}              # B/s: two FLOPs a weight
header = ["weights a second, 1 row", "bytes read for them", "of the bandwidth", "1 row", "32 rows", "128 rows"]
Table(["products", *header],
      [[name, f"{rate[name][1] / 2e9:.1f} G", si(read[name], "B/s"), f"{read[name] / machine.bandwidth_at():.0%}", *(si(each, "FLOP/s") for each in rate[name].values())]
       for name in stored], numeric=header)

# %% tags=["nbval-ignore-output"]
lesson.table()

# %% tags=["nbval-ignore-output"]
against_int8, prefill = timed["int8", "decode", 1].median / timed["int4", "decode", 1].median, {name: speedup(name, "prefill", 1) for name in stored}
verdict = "int4 **loses** to int8" if against_int8 < 0.97 else "int4 is no faster than int8" if against_int8 < 1.03 else "int4 does beat int8 here, by less than its bytes"
quality = {(row.method, row.format): row.quality for row in rows}
rtn = {name: quality["RTN", name] for name in FORMATS}
plain, outliers, smooth = (quality[name, "int8"] for name in ("int8 activations", "LLM.int8", "SmoothQuant"))
zero_helps, error = rtn["int4-g64-asym"].difference(rtn["int4-g64"])
Markdown(f"""**Speed.** Bytes promise {streamed['fp32'] / streamed['int8']:.1f} × for int8 and {streamed['fp32'] / streamed['int4']:.1f} × for int4. Measured at batch 1:
{speedup('int8', 'decode', 1):.1f} × and {speedup('int4', 'decode', 1):.1f} ×. At batch 32 {speedup('int8', 'decode', 32):.1f} × and {speedup('int4', 'decode', 32):.1f} ×; in a prefill
{speedup('int8', 'prefill', 1):.1f} × and {speedup('int4', 'prefill', 1):.1f} ×. Fewer bytes help who waits for bytes; a prefill waits for FLOPs, and bf16
alone makes it {prefill['bf16']:.1f} × as fast as fp32. Against bf16, int8 makes it {prefill['int8'] / prefill['bf16']:.2f} × and int4 {prefill['int4'] / prefill['bf16']:.2f} × as fast.

**4 bits against 8.** At batch 1 {verdict}: {against_int8:.2f} ×, where the bytes promise {streamed['int8'] / streamed['int4']:.1f} ×. The kernels' rates: fp32 reads its weights at {read['fp32'] / machine.bandwidth_at():.0%} of what the memory
delivers, int8 at {read['int8'] / machine.bandwidth_at():.0%}, int4 at {read['int4'] / machine.bandwidth_at():.0%}. At batch 32 int4 runs at {timed['int8', 'decode', 32].median / timed['int4', 'decode', 32].median:.2f} × the speed of int8.

**Weights.** int8 costs KL {rtn['int8'].kl:.4f}; fp8, with as many bits, {rtn['fp8-e4m3'].kl:.3f}: 3 bits of mantissa are a coarser step than 8 bits of integer for numbers that are all of one size. At 4 bits a zero
point takes {zero_helps:.2f} ± {error:.2f} off the KL of int4-g64. The block-scaled floats: mxfp4 {rtn['mxfp4'].kl:.2f}, with scales that can only double; nvfp4 {rtn['nvfp4'].kl:.2f}, with twice as many and finer scales;
nf4 {rtn['nf4'].kl:.2f}. At 3 bits KL is {rtn['int3-g64-asym'].kl:.1f}. Of 100 next tokens, {100 * (1 - rtn['int4-g64'].top1):.0f} change at int4-g64.

**Activations.** Weights in int8: {rtn['int8'].kl:.4f}. Activations as well: {plain.kl:.3f}, {plain.kl / rtn['int8'].kl:.0f} times as much. LLM.int8() brings it to {outliers.kl:.3f}, SmoothQuant to {smooth.kl:.3f}. SmoothQuant cannot
reach the inputs of `out` and `down`, of which no norm stands in front; LLM.int8() does nothing for a token in which one number is huge and the others fall below 6.

**What ran** is not what was judged in the table, where the head stays in fp32. With the head and on the fast kernels: bf16 {as_run['bf16'].kl:.5f}, int8 {as_run['int8'].kl:.3f}, int4 {as_run['int4'].kl:.2f}. None of these kernels rounds
activations to 8 bits.""")

# %% [markdown]
# When does quantization *lose*?
#
# - **Prefill and large batches.** They are bound by FLOPs. Weight-only formats save none, and unpacking is work that was not there before.
# - **A kernel that unpacks slowly.** 4 bits can be slower than 8, wherever the bytes come faster than they can be taken apart: another CPU than this one may say so in the table above.
# - **Small models.** They use what bits they have. The same grid costs a model of 70 billion parameters far less than one of 135 million.
# - **Outliers.** One large number in a group, or in a token, takes the precision of all others.
#
# Lesson 08 keeps the bits and moves the rounding: the same 4 bits, and half the KL.
#
# ## Play and exercises
# On a data-sheet machine with ideal kernels: by how much is a step faster than in bf16, batch by batch? Find the batch at which 4-bit weights stop paying, and how the context moves it.

# %%
def draw_speedup(model: str, device: str, context: int) -> None:
    """Step time in bf16 over that with fewer bits: weights alone, FLOPs in bf16."""
    s, m = catalog.model(model), catalog.machine(device)
    batches = [2**i for i in range(11) if s.fits(m.memory, 2**i, context, "bf16", "bf16")]            # what does not fit takes no time
    fig, ax = plt.subplots(figsize=(7.0, 3.2))
    said = []
    for name, width in (("8-bit weights", 1.0), ("4-bit weights, g64", (4 + 20 / 64) / 8)):
        def step(batch, weights):
            work = s.decode(batch, context, weights=weights, kv="bf16", activations="bf16")
            return max(work.flops / m.peak("bf16"), work.bytes / m.bandwidth_at())
        times = [step(batch, 2.0) / step(batch, width) for batch in batches]
        said += [f"{name} {times[0]:.2f} times at batch {batches[0]}, {times[-1]:.2f} at batch {batches[-1]:,}"]
        ax.plot(batches, times, "o-", label=name)
    ax.axhline(1, color=plots.TEXT, linewidth=0.8)
    ax.set(xscale="log", xlabel="batch", ylabel="times faster than bf16", ylim=(0.8, 4), title=f"{s.name} at context {context:,}: what bits still buy")
    ax.set_xticks(batches, [f"{batch:,}" for batch in batches])
    ax.minorticks_off()
    ax.legend()
    plots.show(fig, f"{s.name} on {m.name} at context {context:,}, times faster than in bf16: {'; '.join(said)}.")


# %% tags=["widget", "nbval-ignore-output"]
widgets.play(draw_speedup,
             model=widgets.choose("model", ["smollm2-135m", "llama-3.2-1b", "llama-2-7b", "llama-3-8b"], "llama-3-8b"),
             device=widgets.choose("machine", ["h100-sxm", "a100-80gb-sxm", "rtx-4090"], "h100-sxm"),
             context=widgets.powers_of_two("context", 256, 16384, 1024))

# %%
draw_speedup("llama-3-8b", "h100-sxm", 1024)

# %% [markdown]
# ### 1 · Effective bits
# Codes of `bits` bits; for every `group` weights a scale of `scale` bits and a zero point of `zero` bits. How many bits is a weight?

# %% tags=["exercise", "exercise:weight_bits"]
def weight_bits(bits, group, scale, zero):
    return ...


lesson.exercise(
    "weight_bits", weight_bits,
    cases={
        (4, 64, 16, 0): 4.25,           # int4-g64
        (4, 32, 16, 16): 5.0,           # llama.cpp's Q4_1
        (4, 16, 8, 0): 4.5,             # nvfp4
        (4, 32, 8, 0): 4.25,            # mxfp4
        (3, 128, 16, 3): 3.1484375,
    },
    nudge="What a group stores once is shared by all its weights.",
    means="mxfp4 has twice as many scales as int4-g64, of half the bits each: the same weight.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# bits, plus (scale + zero) spread over the group.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def weight_bits(bits, group, scale, zero):
#     return bits + (scale + zero) / group
# ```
#
# </details>

# %% [markdown]
# ### 2 · Round a group
# Asymmetric, `bits` bits: the grid reaches from the smallest weight (or 0) to the largest (or 0), and 0 is one of its numbers. Return the numbers that the codes mean. (`np.round` does the rounding.)

# %% tags=["exercise", "exercise:round_group"]
def round_group(weights, bits):
    return ...


lesson.exercise(
    "round_group", round_group,
    cases={
        ((-1.5, 6.0, 0.0, 1.3), 4): [-1.5, 6.0, 0.0, 1.5],      # steps of ½, zero at code 3
        ((0.0, 3.0, 1.4), 2): [0.0, 3.0, 1.0],
        ((1.0, 3.0), 2): [1.0, 3.0],                            # all positive: the grid still starts at 0
        ((-7.0, 0.2), 3): [-7.2, 0.0],
    },
    nudge="scale = (high − low) / (2^bits − 1), zero = round(−low / scale), code = round(w / scale) + zero, kept within 0 and 2^bits − 1.",
    means="this is the grid of AWQ's and most GPTQ files.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# low = min(0, smallest), high = max(0, largest). The code minus the zero, times the scale, is the number.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def round_group(weights, bits):
#     w = np.array(weights)
#     low, high = min(0, w.min()), max(0, w.max())
#     scale = (high - low) / (2**bits - 1)
#     zero = np.round(-low / scale)
#     codes = np.clip(np.round(w / scale) + zero, 0, 2**bits - 1)
#     return (codes - zero) * scale
# ```
#
# </details>

# %% [markdown]
# ### 3 · The batch at which bits stop paying
# A step of batch B does `2·B` FLOPs with each weight and reads it once, in `bits` bits. The machine does `peak` FLOP/s and reads `bandwidth` bytes a second. From which batch on are fewer bits no gain?
# (Only the weights count here.)

# %% tags=["exercise", "exercise:last_batch"]
def last_batch(bits, peak, bandwidth):
    return ...


lesson.exercise(
    "last_batch", last_batch,
    cases={
        (16, 989e12, 3.35e12): 295.2238805970149,       # an H100, bf16: the ridge
        (4, 989e12, 3.35e12): 73.80597014925372,        # with 4 bits, compute binds four times sooner
        (8, 100e9, 20e9): 2.5,                          # two CPU cores
    },
    nudge="The time to read a weight and the time to use it B times are equal there.",
    means="a 4-bit model is compute bound from a quarter of the batch on: what it buys is latency for few users.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# bits / 8 / bandwidth = 2·B / peak.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def last_batch(bits, peak, bandwidth):
#     return bits / 8 / bandwidth * peak / 2
# ```
#
# </details>

# %% [markdown]
# ### 4 · Harder: smooth it
# One column of the input reaches 64, its weights reach 0.25. By which s must the column be divided (and the weights multiplied) so that the largest activation and the largest weight become equal? Write it for any two maxima.

# %% tags=["exercise", "exercise:smoothing"]
def smoothing(largest_x, largest_w):
    return ...


lesson.exercise(
    "smoothing", smoothing,
    cases={
        (64, 0.25): 16.0,           # both become 4
        (1, 1): 1.0,
        (100, 0.01): 100.0,
    },
    nudge="largest_x / s = largest_w · s.",
    means="that is SmoothQuant at alpha = ½.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Solve for s².
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def smoothing(largest_x, largest_w):
#     return (largest_x / largest_w) ** 0.5
# ```
#
# </details>
