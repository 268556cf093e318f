# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["core"]
# # A1 · Does the envelope hold on machines that we never touched?
#
# ## Question
#
# In lesson 01 the machine was yours. Others have measured language models on a Raspberry Pi, on
# eight H100s and on much between, and published what they found. Does the same arithmetic explain
# their numbers? And where it does not, who is wrong: the arithmetic, or the table?
#
# *An appendix, 30 minutes. Before: lesson 01. Afterwards: you can say of a published number
# whether it is possible, and how far from its bound such a run usually is.*

# %% tags=["core", "hide-input"]
from clawdemy_infer import published
from clawdemy_infer.lesson import Lesson, plots
from clawdemy_infer.lesson.tables import Table, si
from clawdemy_infer.published.summary import (
    aims_table,
    contradictions_table,
    figures_table,
)

import matplotlib.pyplot as plt
from IPython.display import Markdown, display

plots.use_style()
plt.rcParams["savefig.dpi"] = 90                    # the file stays small
lesson = Lesson("A1 other_peoples_runs", machine="machines of others")

# %% [markdown] tags=["core"]
# ## Evidence
#
# `data/published_runs.csv` keeps runs that others published, each with its source. None was made
# by the model of time that is about to be judged. Capacity and bounds come first: a run that does
# not fit, or that is faster than its bytes at data-sheet bandwidth, did not happen as stated.

# %% tags=["core"]
runs = published.read()
evidence = published.Evidence()                 # the rows that may teach
verdicts = published.verdicts(runs, evidence)   # each judged without its own source

by_status = {"ok": [], "impossible": [], "inexpressible": []}
for row in verdicts:
    by_status[row.status].append(row)

# %% tags=["core", "hide-input"]
judged = {row.id: row for row in verdicts}
counts = {status: len(rows) for status, rows in by_status.items()}
display(Markdown(
    f"{len(runs)} rows from {len({run.group for run in runs})} sources, 2022 to 2025. "
    f"{counts['ok']} can be predicted. **{counts['impossible']} are impossible as "
    f"stated.** {counts['inexpressible']} say something else than a time (a quality, "
    "an acceptance rate), or leave out what a prediction needs."))
Table(("row", "model", "on", "source", "why it is impossible"), [
    (row.id, row.model, f"{row.n_devices:.0f} × {row.hardware}", row.source.split()[0],
     row.reason) for row in by_status["impossible"]])

# %% [markdown] tags=["core"]
# The first two do not say what they ran on; a generous machine was assumed. The
# third calls a formula a measurement.
#
# All others take longer than their bound. How much longer? A data sheet leaves out what kernels
# lose: some of the bandwidth and of the peak, a gap between one kernel and the next, instructions
# that unpack a quantized weight, the launch of an all-reduce. The model of time has one figure
# for each, and no more. They are *fitted* on rows of **other sources than the one that is
# judged**: only that says anything about a run that you have not seen.

# %% tags=["core", "hide-input"]
fitted = evidence.without(None)
gap_s = fitted["gap"] / 1.41e9                      # an A100 runs at 1.41 GHz
display(figures_table(fitted))
Markdown(
    f"Read as a sentence: a kernel streams at {fitted['bandwidth']:.0%} of the data "
    f"sheet, a matrix product runs at {fitted['tile']:.0%} of the peak inside a tile "
    f"of its output, and {fitted['gap']:,.0f} clock cycles pass between one kernel and "
    f"the next, {si(gap_s, 's')} on an A100. The last one is the GPU's kernel-launch "
    "overhead: it keeps small models, and the small part of a large one on eight "
    "devices, far from their bound.")

# %% [markdown] tags=["core"]
# ## What the envelope explains
#
# Each dot is a published run. Grey dots are the envelope alone, data sheets as printed; coloured
# dots are predicted with the nine figures.

# %% tags=["core", "hide-input"]
KINDS = {"decode, batch 1": "decode at batch 1", "prefill": "prefill",
         "one matrix product": "GEMM profiles", "served batches": "serving, all",
         "decode on several devices": "tensor parallel"}
demands = {row.id: published.demand(row.run) for row in by_status["ok"] if row.terms}
known = [row for row in by_status["ok"] if row.terms]
figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 4.2))
low, high = 1.5e-5, 300
looks = zip(KINDS.items(), plots.COLOURS, "os^Dv", strict=False)
for (label, aim), colour, mark in looks:
    shown = [row for row in known if published.AIMS[aim](row)]
    took = [demands[row.id].seconds(row.published) for row in shown]
    said = [sum(row.terms.values()) for row in shown]
    dots = {"color": colour, "marker": mark, "linestyle": "none", "markersize": 4,
            "alpha": 0.7, "markeredgewidth": 0}
    left.loglog(took, [demands[row.id].bound for row in shown], ".", color=plots.NAPKIN,
                markersize=4, alpha=0.6, zorder=1)
    left.loglog(took, said, label=label, **dots)
    right.loglog(took, [s / t for s, t in zip(said, took, strict=True)], **dots)
left.plot([], [], ".", color=plots.NAPKIN, label="envelope alone")
left.plot([low, high], [low, high], color=plots.TEXT, linewidth=0.8)
left.set(title="Seven decades of published times", xlabel="published",
         ylabel="predicted", xlim=(low, high), ylim=(low / 3, high))
left.legend(loc="lower right", markerscale=1.5, handletextpad=0.2)
right.axhspan(1 / 1.25, 1.25, color=plots.ROOFLINE, alpha=0.12, linewidth=0)
right.axhline(1, color=plots.TEXT, linewidth=0.8)
right.set(title="Most lie within a quarter", xlabel="published",
          ylabel="predicted over published", xlim=(low, high), ylim=(0.1, 3))
right.set_yticks([0.125, 0.25, 0.5, 1, 2])
right.minorticks_off()
right.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
for ax in (left, right):
    ax.set_xticks([1e-4, 1e-2, 1, 100])
    plots.units(ax.xaxis, "s")
left.set_yticks([1e-4, 1e-2, 1, 100])
plots.units(left.yaxis, "s")
NAMES = {"r590": ("a matrix-vector kernel\nthat reads a prompt", (-112, 2)),
         "r093": ("70B on four H100s,\na prompt of 128", (-92, -44)),
         "r018": ("70B on two A100s", (18, -66))}
for id, (name, place) in NAMES.items():
    took = demands[id].seconds(judged[id].published)
    right.annotate(name, (took, sum(judged[id].terms.values()) / took), xytext=place,
                   textcoords="offset points", fontsize=9,
                   arrowprops={"arrowstyle": "-", "linewidth": 0.7})
plots.show(figure, f"{len(known)} published runs, from microseconds to minutes. Left, "
                   "predicted against published time: predictions lie along the "
                   "diagonal, the envelope's bounds below it. Right, their ratio: most "
                   "are inside the band of a quarter.")

# %% [markdown] tags=["core"]
# Beside simpler models, each judged in the same way. The **naive bound** is the envelope; *one
# efficiency* divides it by the share that other sources reach; *affine* adds a fixed time.

# %% tags=["core", "hide-input"]
simpler = published.simpler(runs, evidence)
missed = {aim: found["naive"]["median_error"] for aim, found in simpler.items()}
display(aims_table(verdicts, simpler))
Markdown(
    f"The envelope alone misses by {missed['decode at batch 1']:.0%} in decode and "
    f"{missed['prefill']:.0%} in prefill, in the median, and always to the same side: "
    f"it is a bound. On several devices it misses by {missed['tensor parallel']:.0%}: "
    "it counts neither launches nor all-reduces.")

# %% [markdown] tags=["core"]
# **Where does the batch stop being free?** Matrix products of Llama-2-7B, profiled by others.
# Dots are published, lines are predicted from other machines, the dashed roof is the data sheet.
# Its corner is sharp and the products' is round: near the ridge neither computing nor fetching
# hides the other wholly. Plan with half the ridge.

# %% tags=["core", "hide-input"]
figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.8), sharey=True)
products = {"qkv": (4096, 12288), "o": (4096, 4096), "gate+up": (4096, 22016),
            "down": (11008, 4096)}
rows = [2**i for i in range(13)]
for panel, hardware in zip(panels, ("A100-80GB SXM", "A40-48GB"), strict=True):
    profiled = [run for run in runs if run.category == "gemm_profile"
                and run.model == "Llama-2-7B" and run.hardware == hardware]
    peak = 1e12 * profiled[0].peak_TFLOPs_per_device
    bandwidth = 1e9 * profiled[0].peak_bw_GBps_per_device
    for colour, mark, (name, (k, n)) in zip(plots.COLOURS, "os^D", products.items(),
                                            strict=False):
        mine = [run for run in profiled if run.notes.startswith(f"{name}:")]
        took = [demands[run.id].seconds(run.value) for run in mine]
        points = [(run.batch, 2 * run.batch * k * n / t)
                  for run, t in zip(mine, took, strict=True)]
        panel.loglog(*zip(*points, strict=True), mark, color=colour, markersize=5,
                     label=f"{k:,} × {n:,}")
        asked = published.Stack([
            published.demand(profiled[0].changed(notes=f"[{m},{k}]x[{k},{n}]"))
            for m in rows])
        seconds = asked.seconds(evidence.figures(profiled[0]))
        rates = [2 * m * k * n / s for m, s in zip(rows, seconds, strict=True)]
        panel.loglog(rows, rates, color=colour, linewidth=1)
    panel.plot([1, peak / bandwidth, 4096], [bandwidth, peak, peak], "--",
               color=plots.NAPKIN, linewidth=1.5)
    panel.text(1.2, peak * 1.1, f"ridge: {peak / bandwidth:.0f} rows", fontsize=9)
    panel.set(title=f"{hardware}: a round corner", xlabel="rows", ylim=(4e11, 8e14))
    panel.set_xticks([1, 16, 256, 4096], ["1", "16", "256", "4,096"])
    panel.xaxis.minorticks_off()
    plots.units(panel.yaxis, "FLOP/s")
panels[1].legend(loc="lower right", title="weights")
panels[0].set_ylabel("rate")
plots.show(figure, "Rate of four matrix products against their rows, published as dots "
                   "and predicted as lines, on an A100 and an A40: both rise with the "
                   "rows and bend into the peak well before the sharp ridge of the "
                   "data sheet.")

# %% [markdown] tags=["core"]
# ## What it does not
#
# **Is one cache read eight times?** A hypothesis: in 2023 the decode attention of TensorRT-LLM
# fetched a KV head once for *each* of its query heads. Its tables do not say so. Predict its long
# answers twice: with the cache read once for each KV head, and once for each query head.

# %% tags=["core", "hide-input"]
lines = []
for run in runs:
    if (run.software.startswith("TensorRT-LLM") and (run.gen_len or 0) >= 1024
            and run.category == "serving_throughput"):
        shared = run.changed(software="with shared reads (XQA)")
        mine = evidence.figures(run)
        once, each = (published.judge(one, mine).ratio for one in (shared, run))
        lines.append((run.n_heads / run.n_kv_heads, once, each))
groups = {"one query head to a KV head": [line for line in lines if line[0] == 1],
          "8 and more": [line for line in lines if line[0] > 1]}
spans = {name: [(min(line[i] for line in found), max(line[i] for line in found))
                for i in (1, 2)] for name, found in groups.items()}
(low, high), (under, over) = spans["8 and more"]
header = ("predicted over published tokens/s", "rows", "a read per KV head",
          "a read per query head")
display(Table(header, [
    (name, str(len(found)), *(f"{a:.2f} to {b:.2f}" for a, b in spans[name]))
    for name, found in groups.items()], header[1:]))
Markdown(
    "Where heads share nothing the two predictions are the same, and close to what was "
    "published. For models with shared heads, one read per KV head over-predicts "
    f"throughput {low:.1f} to {high:.1f} times; one read per query head under-predicts "
    f"it by {1 - over:.0%} to {1 - under:.0%}.")

# %% [markdown] tags=["core"]
# So these rows look like a kernel in which grouped-query attention saved memory and little
# bandwidth. **It stays a hypothesis**: it was found by looking at these rows, all are of one
# engine, and all models with shared heads among them are giants on several GPUs. One fact speaks
# for it: NVIDIA's later XQA kernel shares the reads, and its own note gives 2.4 times the
# throughput.
#
# **Where rows contradict each other** no model can be right about both:

# %% tags=["core", "hide-input"]
contradictions_table(published.contradictions(runs))

# %% [markdown] tags=["core"]
# **And what is missed most:**

# %% tags=["core", "hide-input"]
short = judged["r089"]
Markdown(f"""
* *A kernel that does not fit its job.* A quantized matrix-vector kernel reads a whole
  prompt {judged['r590'].ratio:.0f} times slower than predicted (its course does so
  before it writes the right one). Attention in eager PyTorch copies the cache for every
  query head, and takes {1 / judged['r262'].ratio:.0f} times as long as those copies.
* *Short prompts on fast machines.* {short.model} on an H100 took
  {short.published:.0f} ms for a prompt of 128 tokens in 2023; the prediction is
  {short.predicted:.1f} ms.
* *Two dies that act as one.* On Apple's M1 Ultra a token took
  {judged['r466'].ratio:.2f} times as long as predicted.
""")

# %% [markdown] tags=["core"]
# ## Check yourself
#
# **Which format had this cache?** A published table serves GPT-J-6B (L = 28, K = 16, H = 256,
# 6.05 billion parameters) on one H100 of 85.9 GB: 1,024 sequences of 128 tokens in and 128 out,
# all at once, with weights in fp8. It does not say the format of the cache. How many numbers does
# the full cache hold? How many bytes would they take at two bytes each? How much room do the
# weights leave? So the format was `"fp16"`, `"fp8"`, ...?
#
# **Is this run possible?** A README claims 1,084.86 tokens/s for Llama-2-7B, batch 1, fp16:
# 13.214 GB read for each token. Grant it an A100 of 2,039 GB/s. What is the least time per token,
# and how many times too fast is the claim? A test calls 41.8 ms per token of Llama-2-70B (137.43
# GB in fp16) on one H100 of 85.9 GB and 3,350 GB/s an empirical anchor. How many such cards hold
# the weights at least? Are the 41.8 ms `"a run"` or `"the formula"`?

# %% tags=["core", "exercise", "exercise:cache_format"]
numbers = ...           # a count
at_two_bytes = ...      # bytes
room = ...              # bytes
format = ...            # text
lesson.steps("cache_format", numbers=numbers, at_two_bytes=at_two_bytes, room=room,
             format=format)

# %% tags=["core", "exercise", "exercise:possible_run"]
least = ...             # seconds
too_fast = ...          # how many times
cards = ...             # a whole number
claimed = ...           # text
lesson.steps("possible_run", least=least, too_fast=too_fast, cards=cards,
             claimed=claimed)

# %% [markdown] tags=["solution"]
# ## Solutions

# %% [markdown] tags=["solution", "solution:cache_format"]
# <details><summary>cache_format</summary>
#
# ```python
# numbers = 2 * 28 * 16 * 256 * 1024 * (128 + 128)        # K and V, layers, heads, H, tokens
# at_two_bytes = 2 * numbers                              # more than the card has
# room = 85.9e9 - 6.05e9
# format = "fp8"                                          # room / numbers is 1.3 bytes
# ```
#
# </details>

# %% [markdown] tags=["solution", "solution:possible_run"]
# <details><summary>possible_run</summary>
#
# ```python
# least = 13.214e9 / 2039e9
# too_fast = least * 1084.86
# cards = -(-137.43 // 85.9)                              # rounded up
# claimed = "the formula"                                 # 137.43 GB / 3,350 GB/s is 41.0 ms
# ```
#
# </details>
