# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["core", "slide"]
# # 03 · Fewer KV bytes, by which trick?
#
# ## Question
#
# An agent keeps 30,000 tokens. With multi-head attention its **KV cache** takes gigabytes, and each
# step reads all of them. Llama-3, Qwen3, Gemma-3 and DeepSeek keep less: by which tricks, and what
# do these cost?
#
# **45 minutes**, exercises extra. Before: lesson 02. Afterwards: you have built grouped-query
# attention, and can choose a cache for a service. Skip folded code.

# %% [markdown] tags=["notes"]
# **2 min.** Ask: "the cache is 2 · L · K · H · bytes · tokens. Which factor would you shrink, and
# who would notice?" Write the factors on the board; each trick of this lesson goes under its
# factor. Usual wrong answer: fewer tokens. That is the one that the user notices.

# %% tags=["core", "slide", "hide-input"]
import math
from dataclasses import replace
from functools import partial

from clawdemy_course import diagrams
from clawdemy_course.build_03 import attending_by, copied_first, grouped, head_by_head
from clawdemy_course.reading import how_to_read
from clawdemy_course.techniques import LLAMA, PUBLISHED, TECHNIQUES, THROUGHPUT
from clawdemy_infer.arithmetic import MLA
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.files import load_model
from clawdemy_infer.from_config import catalog
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.parts import StepOf
from clawdemy_infer.lesson.steps import random_tokens
from clawdemy_infer.lesson.tables import Table, si
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.machine.present import bracketed
from clawdemy_infer.model import generate
from clawdemy_infer.published.rows import read as published_runs
from clawdemy_infer.variants.grouping import with_kv_heads
from clawdemy_infer.variants.int8_cache import Int8Cache
from clawdemy_infer.variants.latent import LatentCache, LatentConfig, LatentDecoder

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display

plots.use_style()
diagrams.heads()

# %% [markdown] tags=["notes"]
# **2 min.** One panel at a key press. Ask at each: "what is kept, and what is computed?" MHA, GQA
# and MQA differ in the number of KV heads alone; every query head stays. MLA keeps one latent; the
# dashed keys and values can be made from it and are not kept. Usual wrong answer: MLA is smallest.
# Look at the bars: here MQA and GQA keep less. With 128 query heads it is otherwise (later).

# %% [markdown] tags=["core", "slide"]
# ## Envelope
#
# **Grouped-query attention** (GQA): N query heads, K KV heads; N/K neighbours share one. The cache
# shrinks by N/K. No FLOP is saved: every query head still meets every key. Multi-query attention
# (MQA) has K = 1.
#
# A cache can only save *reads* if the kernel shares them too.

# %% tags=["core", "fragment", "by-line"]
N, K, H, L = 9, 3, 64, 30               # SmolLM2-135M: 9 query heads, 3 KV heads
S, G = 4096, N // K                     # one new token looks back at S; a group

kept = 2 * L * K * H * S                # numbers: a key and a value for each KV head
flops = L * 2 * N * H * S               # q·k: each query head with each key
flops += L * 2 * N * H * S              # p·v: and with each value

once = kept                             # each KV head is read once, for its group
by_head = G * kept                      # each query head reads for itself
copied = kept + 2 * G * kept            # read; written G times; and read again
per_byte = flops / (2 * once)           # of a bf16 cache

# %% [markdown] tags=["notes"]
# > Kept, and read
#
# **3 min.** One line at a key press. Let the room say the last four. Ask: "multi-head attention has
# 1 FLOP for each byte of a bf16 cache. And GQA?" N/K: each byte that comes from memory is used by
# all query heads of its group. Usual wrong answer: still 1, since FLOPs and bytes both fall. The
# FLOPs do not fall.

# %% tags=["core", "slide", "hide-input", "nbval-ignore-output"]
machine = this_machine()
lesson = Lesson("03 shrinking_the_cache", machine=machine)
shape, h100 = catalog.model("smollm2-135m"), catalog.machine("h100-sxm")
assert (N, K, H, L) == (shape.N, shape.K, shape.H, shape.L)
assert shape.kv_bytes(1, S, "bf16") == 2 * kept and per_byte == N / K
counted = {shared: shape.attention(1, 1, S, shared=shared) for shared in (True, False)}
q_and_out = 2 * 2 * N * H               # bf16 bytes of a layer's queries and outputs
assert counted[True].flops * L == flops
assert (counted[True].bytes - q_and_out) * L == 2 * once
assert (counted[False].bytes - q_and_out) * L == 2 * by_head

weights = shape.streamed_bytes("fp32")
shares = {at: shape.kv_bytes(1, at, "fp32") / (weights + shape.kv_bytes(1, at, "fp32"))
          for at in (256, 4096)}
Markdown(f"""
### What is there to gain?

* **{per_byte:g} FLOPs** per byte of bf16; an H100's ridge is at
  {h100.ridge("bf16"):.0f}: memory-bound.
* **Head by head** reads {by_head / once:g} times as much, **copied first** moves
  {copied / once:g} times as much.
* Of SmolLM2's step (fp32, batch 1) the cache is {shares[256]:.1%} at 256 tokens,
  {shares[4096]:.0%} at 4,096. A cache of *no* bytes: {1 / (1 - shares[256]):.2f} and
  {1 / (1 - shares[4096]):.2f} times as fast.
""")

# %% [markdown] tags=["notes"]
# **2 min.** The last line is Amdahl's law in bytes; let somebody say it in their own words. Ask:
# "what brings the share nearer to one?" Longer contexts, and more sequences: each has its own
# cache, all share the weights. Usual wrong answer: a larger model. Its weights grow too.

# %% tags=["core", "slide", "hide-input"]
AT = 32_768
FACTOR = {"MHA": "K = N", "GQA": "K", "MQA": "K = 1", "MLA": "2 · K · H",
          "window of 4,096": "tokens", "5 local : 1 global": "tokens, in 5 of 6 layers",
          "int8": "bytes", "int4": "bytes"}


def kept_by(name: str, tokens: int = AT) -> float:
    technique = TECHNIQUES[name]
    return technique.shape.kv_bytes(1, tokens, technique.kv)


def flops_per_byte(name: str) -> float:
    technique = TECHNIQUES[name]
    step = technique.shape.decode(1, AT, kv=technique.kv)
    ops = [op for op in step.operations() if op.name == "attention"]
    return sum(op.flops for op in ops) / sum(op.bytes for op in ops)


display(Markdown(f"### Every factor has its trick\n\n{LLAMA.name} with "
                 f"{AT:,} tokens; GQA with a bf16 cache is how it was published."))
Table(["technique", "shrinks", "cache", "of GQA in bf16", "FLOPs per byte"],
      [[name, FACTOR[name], si(kept_by(name), "B"),
        f"{kept_by(name) / kept_by('GQA'):.2f} ×", f"{flops_per_byte(name):.1f}"]
       for name in TECHNIQUES], ["cache", "of GQA in bf16", "FLOPs per byte"])

# %% [markdown] tags=["notes"]
# **2 min.** Read down, a row at a time. int8 has a 16-bit scale for each key and value, int4 a
# scale and a lowest value for 32 numbers: 8 bits are not quite a half of bf16, 4 bits are not a
# quarter. Ask: "which rows can be had tomorrow, with the checkpoint that you serve?" The last two;
# all others need training. Ask for the row that works most for a byte (MLA).

# %% tags=["core", "slide", "hide-input"]
diagrams.windows()

# %% [markdown] tags=["notes"]
# **2 min.** Rows are layers, columns are tokens. Ask: "a layer above sees what the layer below made
# of its window. How far back can the last layer see, in principle?" Window times layers; in
# practice much less. So models keep some layers global. Usual wrong answer: a window model forgets
# nothing, since layers add up. And why does a *first* token matter? Softmax must put its weight
# somewhere; a trained model parks it there (Xiao et al. 2023).

# %% tags=["core", "slide", "hide-input"]
lines, latent = [], 512 + 64
for name in ("deepseek-v2-lite", "deepseek-v2"):
    deep = catalog.model(name)
    ops = [op for op in deep.decode(1, AT).operations() if op.name == "attention"]
    intensity = sum(op.flops for op in ops) / sum(op.bytes for op in ops)
    mha, per_kv_head = 2 * deep.N * 128, 2 * 128
    assert deep.kv_bytes(1, AT) == deep.L * latent * AT * 2
    lines.append(f"* **{deep.N} heads** ({deep.name}): MHA {mha:,}, GQA with 2 KV "
                 f"heads {2 * per_kv_head}, latent {latent} (1/{mha / latent:.0f}); "
                 f"{intensity:.0f} FLOPs per byte.")
Markdown("### A latent at 16 and at 128 heads\n\nNumbers per token and layer:\n\n"
         + "\n".join(lines) + f"\n\nA latent takes the bytes of "
         f"{latent / per_kv_head:g} KV heads, however many share it. An H100's ridge: "
         f"{h100.ridge('bf16'):.0f}.")

# %% [markdown] tags=["notes"]
# **2 min.** MLA never stores keys: q·(c·W) = (q·Wᵀ)·c, so the one new query is multiplied instead
# of all cached latents, and every head attends to the latent itself, 576 numbers wide (Further). So
# it pays bytes with FLOPs. Ask: "at 16 heads, would you take it?" It keeps more than GQA with 2 KV
# heads; its case there is quality (next slide). At 128 heads it is nearly compute-bound. Usual
# wrong answer: MLA has the fewest bytes.

# %% tags=["core", "slide", "hide-input"]
def lost(index: int) -> float:
    return float(PUBLISHED[index].before) - float(PUBLISHED[index].after)


display(Markdown("### And the quality?\n\nMeasured by others, on models of their own:"))
display(Table(["change", "model", "measure", "before", "after", "source"],
              [list(each) for each in PUBLISHED], ["before", "after"]))
Markdown(f"GQA with 8 KV heads lost {lost(0):.1f} of {PUBLISHED[0].before} in one "
         f"paper, {lost(2):.1f} of {PUBLISHED[2].before} in another.")

# %% [markdown] tags=["notes"]
# **3 min.** Ask: "is GQA free?" Two papers disagree. The first averaged the heads of a finished
# model and trained on, and judged on summaries and translation; the second trained from scratch and
# judged on hard questions. Neither is our model. MLA's figures are its authors' own. Gemma's figure
# has no numbers: its axis ends at a tenth. The row of 5,158: a window in a model that was never
# trained for one; four first tokens bring it back. Usual wrong answer: one row settles it.

# %% [markdown] tags=["core", "slide"]
# ## Guess
#
# SmolLM2-135M here, fp32, at 4,096 tokens. How long does a **token** take? How many times as long
#
# - is it with the 9 KV heads of **MHA** in place of 3;
# - does attention take if each KV head is **copied** for its three query heads first;
# - is a token with an **int8** cache?
#
# Write text over the dots: `"9 hours"`, `"0.1 times"`.

# %% tags=["core", "fragment", "guess", "nbval-ignore-output"]
lesson.guess("a token with GQA, at 4,096", ...)
lesson.guess("MHA over GQA, at 4,096", ...)
lesson.guess("copied first over read once", ...)
lesson.guess("int8 over fp32 cache, at 4,096", ...)
lesson.card()

# %% [markdown] tags=["notes"]
# **2 min.** Everybody writes four numbers, in the notebook or on paper. A napkin helps: 135 M
# weights of 4 bytes, and 3 KV heads of keys and values. Usual wrong answers: 3 for the second (the
# cache is three times as large, the step is not), and a half for the last.

# %% tags=["core", "slide", "hide-input", "nbval-ignore-output"]
FP32, INT8 = {"weights": "fp32", "activations": "fp32"}, 1 + 2 / H
plain = load_model("smollm2-135m", device=machine.device)
decoder = faster(plain, "fp32")         # matrices as this machine's kernels like them


def with_heads(plain, kv_heads: int):
    """The same model with other KV heads, copied or averaged; it shares the rest."""
    made = faster(with_kv_heads(plain, kv_heads), "fp32")
    made.head = decoder.head
    for mine, theirs in zip(made.layers, decoder.layers, strict=True):
        mine.out, mine.gate_up, mine.down = theirs.out, theirs.gate_up, theirs.down
    return made


models = {N: with_heads(plain, N), K: decoder, 1: with_heads(plain, 1)}
del plain
plan = {heads: StepOf(model, "decode", context=S) for heads, model in models.items()}
said = {heads: step.predict(machine) for heads, step in plan.items()}
napkin = {heads: step.napkin(machine) for heads, step in plan.items()}
int8_s = shape.decode(1, S, kv=INT8, **FP32).bytes / machine.bandwidth_at()
attends = shape.attention(1, 1, S, kv="fp32", activations="fp32") * L

lesson.predict("a token with GQA, at 4,096", napkin[K], said[K], "s")
ratio = said[N].seconds / said[K].seconds
half = 1 + math.hypot(said[N].spread, said[K].spread)
lesson.predict("MHA over GQA, at 4,096", napkin[N] / napkin[K], ratio, "×",
               (ratio / half, ratio * half))
lesson.predict("attention, each KV head read once", 4 * once / machine.bandwidth_at(),
               machine.time(attends), "s")
# No probe times copies that a processor's cache may hold, nor an attention over int8.
lesson.predict("attention, copied first", 4 * copied / machine.bandwidth_at(), unit="s")
lesson.predict("copied first over read once", copied / once, unit="×")
lesson.predict("a token with an int8 cache, at 4,096", int8_s, unit="s")
lesson.predict("int8 over fp32 cache, at 4,096", int8_s / napkin[K], unit="×")
lesson.reveal("a token with GQA, at 4,096", "MHA over GQA, at 4,096",
              "copied first over read once", "int8 over fp32 cache, at 4,096")

# %% [markdown] tags=["notes"]
# > Bytes over bandwidth, and the calibrated roofline
#
# **2 min.** The napkin reads each byte once from memory. The prediction adds the rates that
# products and attention were calibrated with, and launches. A dash: no probe of this machine is
# about that, so the lesson makes no prediction there, and the napkin is a claim about bytes alone.
# Ask which of the four the napkin will miss most.

# %% [markdown] tags=["core", "slide"]
# ## Build
#
# **Attention of one new token**: softmax(q kᵀ / √H) v, N query heads over K KV heads; neighbours
# share one. With K = N your function is MHA, with K = 1 MQA. Read each KV head **once**: no copies,
# no second reading. Write into nothing.

# %% tags=["core", "fragment", "hide-input"]
diagrams.grouped(N, K)

# %% [markdown] tags=["notes"]
# **3 min.** Say the contract, not the solution. Ask: "which KV head does query head 5 of 9 read, of
# 3?" (KV head 1: 5 // 3.) Usual wrong answer: 2, by 5 % 3. Then the picture: the three ways compute
# the same numbers. Ask for the heads read before the last line of each panel. The third: a group's
# query heads see the same keys, so they are rows of one matrix product, like the rows of a batch
# that share the weights. The checker counts what each PyTorch operation is given.

# %% tags=["core", "slide", "build"]
def my_gqa(q, k, v):
    """q [N, H] of one new token; k, v [K, S, H] of all tokens. Returns [N, H].

    With N = 4 and K = 2, rows 0 and 1 of q meet k[0] and v[0], rows 2 and 3 meet
    k[1] and v[1]. A product of [K, 2, H] and [K, H, S] has all four rows of scores."""
    (N, H), K = q.shape, len(k)
    rows = ...                          # the query heads of each KV head: [K, N/K, H]
    scores = ...                        # [K, N/K, S]
    return ...

attention = lesson.build("grouped_query_attention", my_gqa)

# %% [markdown] tags=["notes"]
# > Three lines
#
# **7 min.** Five minutes in pairs. Usual wrong answers, and the checker names each with its
# smallest example: no √H; heads dealt out in turn (n % K); `repeat_interleave` first, which is
# right in its numbers and reads six times as much; a loop over query heads; softmax over the wrong
# dimension; a shape [K, N/K, H] that was never put back. The checker counts what each PyTorch
# operation is given. Show one student's function; it runs in the next cell.

# %% [markdown] tags=["core"]
# ## Measure
#
# The same story with `attention`, yours or the library's, in every layer. Then steps of three
# models that differ in their KV heads, an int8 cache, and attention alone, the three ways.

# %% tags=["core", "slide", "hide-input", "measured", "nbval-ignore-output"]
# 1. The same text. More KV heads by copies are the same model.
story, Cache = "Once upon a time, in a small town by the sea,", attending_by(attention)
told = [generate(decoder, story, max_tokens=12, cache=kind.for_model(decoder, 1, 64))
        for kind in (Cache, ContiguousCache)]
assert told[0].tokens == told[1].tokens
as_mha = generate(models[N], story, max_tokens=12,
                  cache=Cache.for_model(models[N], 1, 64))
assert as_mha.tokens == told[0].tokens
display(Markdown(f"> {story} {told[0].text.strip()} …"))


# 2. Steps in turn. A step costs the same whatever its cache says.
def filled(kind, heads: int = K):
    cache = kind.for_model(models[heads], 1, S)
    for tensor in cache.tensors:
        most = 100 if tensor.dtype == torch.int8 else 1
        one = most * torch.rand(tensor.shape[1:], device=tensor.device)
        tensor.copy_(one.to(tensor.dtype))
    return cache


caches = {heads: filled(Cache, heads) for heads in models} | {"int8": filled(Int8Cache)}
token, CONTEXTS = random_tokens(decoder, 1, 1), [256, 1024, S]


def step(which, context: int) -> None:
    caches[which].length = context - 1
    models.get(which, decoder)(token, caches[which], last_only=True)


times = bracketed(machine)({(which, context): partial(step, which, context)
                            for which in caches for context in CONTEXTS}, repeats=5)
seconds = {case: timing.median for case, timing in times.items()}

# 3. Attention alone, layer after layer, so that keys come from memory as in a step.
WAYS = {"each KV head read once": attention, "head by head": head_by_head,
        "copied first": copied_first}
q, cache = torch.randn(N, H, device=decoder.device), caches[K]
for way in WAYS.values():
    torch.testing.assert_close(way(q, cache.keys[5, 0], cache.values[5, 0]),
                               grouped(q, cache.keys[5, 0], cache.values[5, 0]),
                               rtol=1e-4, atol=1e-4)


def all_layers(way) -> None:
    for layer in range(L):
        way(q, cache.keys[layer, 0], cache.values[layer, 0])


alone = bracketed(machine)({name: partial(all_layers, way)
                            for name, way in WAYS.items()}, repeats=7)
for name in ("each KV head read once", "copied first"):
    lesson.measure(f"attention, {name}", alone[name])
lesson.measure("copied first over read once",
               alone["copied first"].median / alone["each KV head read once"].median)
lesson.measure("MHA over GQA, at 4,096", seconds[N, S] / seconds[K, S])
lesson.measure("int8 over fp32 cache, at 4,096", seconds["int8", S] / seconds[K, S])


def parts(which, kv):
    caches[which].length = S - 1
    return StepOf(decoder, "decode", 1, S, caches[which], kv).parts(machine)


lesson.measure("a token with GQA, at 4,096", times[K, S], parts=parts(K, "fp32"))
lesson.measure("a token with an int8 cache, at 4,096", times["int8", S],
               parts=parts("int8", INT8))

# 4. Draw.
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.0), width_ratios=[1.25, 1])
NAMES = {N: "MHA, 9 KV heads", K: "GQA, 3", 1: "MQA, 1", "int8": "GQA in int8"}
for (which, label), marker, colour in zip(NAMES.items(), "osD^", plots.COLOURS,
                                          strict=False):
    left.plot(CONTEXTS, [seconds[which, at] for at in CONTEXTS], f"{marker}-",
              color=colour, markersize=5, linewidth=1.2, label=label)
left.set(xlabel="context, tokens", ylabel="time for one token", xlim=(0, 4300),
         ylim=(0, 1.1 * max(seconds.values())), xticks=CONTEXTS,
         title="KV heads cost time at long contexts")
left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
left.legend(loc="lower right", fontsize=8)
bytes_moved = dict(zip(WAYS, (once, by_head, copied), strict=True))
for place, name in enumerate(WAYS):
    bars = (4 * bytes_moved[name] / machine.bandwidth_at(), alone[name].median)
    for offset, label, colour, value in zip(
            (-0.2, 0.2), ("napkin", "measured"), (plots.NAPKIN, plots.MEASURED), bars,
            strict=True):
        right.barh(place + offset, value, 0.36, color=colour,
                   label=label if not place else None)
        right.annotate(f" {si(value, 's')}", (value, place + offset), va="center",
                       fontsize=9)
right.set_yticks(range(3), [name.replace(" read ", "\nread ") for name in WAYS])
right.invert_yaxis()
right.set(xlabel="attention in all layers, at 4,096",
          xlim=(0, 1.3 * max(4 * copied / machine.bandwidth_at(),
                             *(timing.median for timing in alone.values()))),
          title="Three ways to read")
right.grid(visible=False, axis="y")
right.legend(loc="upper right", fontsize=8)
for axis in (left.yaxis, right.xaxis):
    plots.units(axis, "s")
right.locator_params(axis="x", nbins=3)
plots.show(fig, "Left, time for one token against the context: at 4,096 tokens "
           + ", ".join(f"{label} {si(seconds[which, S], 's')}"
                       for which, label in NAMES.items())
           + ". Right, attention alone: " + ", ".join(
               f"{name} {si(each.median, 's')}" for name, each in alone.items()) + ".")
for name in ("MHA over GQA, at 4,096", "copied first over read once",
             "int8 over fp32 cache, at 4,096"):
    row = lesson.rows[name]
    print(f"{name}: {f'guess {si(row.guess, row.unit)}, ' if row.guess else ''}napkin "
          f"{si(row.napkin, row.unit)}, measured {si(row.measured, row.unit)}")

# %% [markdown] tags=["notes"]
# > The same tokens from fewer KV heads
#
# **3 min.** Runs about half a minute: meanwhile ask who guessed that int8 halves a token. Left: at
# 256 tokens all are alike, the weights are the step. Right: bytes by the napkin beside the clock.
# Ask: "which bar breaks its own bound, if any?" Bytes that a processor's cache held did not come
# from memory; the napkin counts them all. Then go back to the guesses; the lines under the figure
# answer the last three. If it fails or drags, the slide has a whole run's numbers.

# %% [markdown] tags=["core", "slide"]
# ## Reconcile
#
# A token with your attention, at 4,096: napkin and stopwatch differ. **What is the largest part of
# the difference?** Commit yourself first:
#
# 1. `"products"`
# 2. `"attention"`
# 3. `"element-wise"`
# 4. `"launches"`
# 5. `"memory was slower than calibrated"`
# 6. `"memory was faster than calibrated"`
# 7. `"not explained"`

# %% tags=["core", "fragment", "guess"]
lesson.cause("a token with GQA, at 4,096", ...)

# %% [markdown] tags=["notes"]
# **1 min.** Count hands for each cause before the next cell. The cache is a quarter of what this
# step reads. Usual wrong answer: "launches", from lesson 02: their number is the same here, their
# share is not.

# %% tags=["core", "slide", "hide-input", "measured", "nbval-ignore-output"]
lesson.explain("a token with GQA, at 4,096")
print(how_to_read(lesson, "a token with GQA, at 4,096"))
library = bracketed(machine)(partial(all_layers, grouped), repeats=7)
if attention is grouped:
    print("Your function is still open, so the library's ran twice: attention alone in "
          f"{si(alone['each KV head read once'].median, 's')} and "
          f"{si(library.median, 's')}.")
else:
    print("Attention alone, all layers: yours "
          f"{si(alone['each KV head read once'].median, 's')}, the library's "
          f"{si(library.median, 's')}.")

# %% [markdown] tags=["notes"]
# **3 min.** From left to right: the napkin, each part by what it took beyond its share, then
# measured. Who named the largest bar? A student's function and the library's read the same bytes.
# The library's is one kernel; a student's has a product, a softmax and a product, and the scores go
# through memory between them.

# %% tags=["core", "slide", "hide-input", "measured", "nbval-ignore-output"]
lesson.explain("a token with an int8 cache, at 4,096")
codes = INT8 * kept                     # bytes; the programs' passes, a number:
passes = (INT8 + 4 + 4 + 4 + 4) * kept  # read code, write; read, scale, write; read
ratio = lesson.rows["int8 over fp32 cache, at 4,096"].measured
print(f"int8 over fp32 cache: {ratio:.2f}. Codes alone are {si(codes, 'B')}, fp32 is "
      f"{si(4 * kept, 'B')}. PyTorch has no attention that reads\nintegers: each layer "
      f"becomes fp32 again first, in passes over {si(passes, 'B')} in all, of memory "
      "or of a processor's cache.")

# %% [markdown] tags=["notes"]
# > An int8 cache
#
# **2 min.** The cache is a quarter of fp32 (half of bf16). Is the token faster here? Read the
# printed ratio, whatever it is; it depends on how much of the passes a processor's cache holds,
# which nothing here measures. Part "attention" includes making the numbers fp32 again. Usual wrong
# answer: int8 is slow because integers are slow.

# %% [markdown] tags=["core", "slide"]
# ## On a GPU
#
# A GPU kernel makes numbers of codes **in its registers**; it can share the read of a group.

# %% tags=["core", "fragment", "hide-input"]
a100 = catalog.machine("a100-80gb-sxm")
runs = [run for run in published_runs() if "flash-decoding" in run.source
        and run.category == "attention_kernel" and run.batch == 256]
us = {run.software.split(" (")[0]: run.value for run in runs}
cached = 2 * 256 * 256 * 2 * 128 * 2    # bytes: 256 sequences, 2 KV heads of 128, fp16
bound = {name: 1e6 * cached * times / a100.bandwidth_at()
         for name, times in (("once", 1), ("8 times", 8), ("copied", 1 + 8 + 8))}
Markdown(f"""
* **16 query heads, 2 KV heads, A100** (PyTorch blog, 256 sequences of 256).
  Bounds: read once {bound["once"]:.0f} µs, head by head {bound["8 times"]:.0f}, copied
  first {bound["copied"]:.0f}. Measured: Flash-Decoding {us["Flash-Decoding"]:.0f} µs,
  FlashAttention {us["FlashAttention 2.0.9"]:.0f}, eager {us["PyTorch eager"]:,.0f}.
* **Cache in int8, int4** (LMDeploy, Llama-2-7B-chat):
  {THROUGHPUT["int8"] / THROUGHPUT["fp16"]:.2f} and
  {THROUGHPUT["int4"] / THROUGHPUT["fp16"]:.2f} times fp16's requests per second.
""")

# %% [markdown] tags=["notes"]
# **2 min.** Ask before the numbers: "8 query heads to a KV head: how far apart can two kernels be?"
# Three bounds, three measurements; none is below its bound. That FlashAttention lies just above the
# bound of reading head by head fits a kernel that re-reads; it is no proof (lesson 10 counts the
# bytes of kernels). LMDeploy does not say which GPU; its gain is throughput: more requests fit.
# Usual wrong answer: this CPU's int8 result holds everywhere.

# %% [markdown] tags=["core", "slide"]
# ## When does it lose?
#
# - **Short contexts, few sequences.** The weights are the step.
# - **Kernels that do not know the trick.** They re-read, copy, or write numbers back.
# - **Compute.** At 128 heads a latent nears the ridge; speculative decoding (lesson 09) multiplies
#   its FLOPs.
# - **Many GPUs.** With fewer KV heads than GPUs, tensor parallelism keeps copies of heads.
# - **Quality.** Fewer heads, from scratch; a window that must recall.

# %% [markdown] tags=["notes"]
# **2 min.** Let the room find the first two. Tensor parallelism: 8 KV heads on 16 GPUs are 16
# copies, 2 of each; MQA and a latent are copied to every GPU. Ask: "so what would you shard
# instead?" (Sequences.) Usual wrong answer: a smaller cache never hurts.

# %% [markdown] tags=["core", "slide"]
# ## Play
#
# A service of an 8B model (bf16) on one card; red names the limit. From GQA, 32 users with 32,768
# tokens, find
#
# 1. what fits without training a model anew;
# 2. why a window of 4,096 stays red when answers lie 16,384 tokens back;
# 3. for 64 users and answers 16,384 back, all that is green. Which would you take, by the table of
#    quality?

# %% tags=["core", "widget", "hide-input", "nbval-ignore-output"]
def draw_service(technique: str, on: str, users: int, context: int, back: int,
                 promise: str) -> None:
    """Memory and time of a token against card and promise; and what is forgotten."""
    made, card = TECHNIQUES[technique], catalog.machine(on)
    s, promised = made.shape, float(promise.split()[0]) / 1000
    found = s.fits(card.memory, users, context, "bf16", made.kv)
    both = found.weight_bytes + found.kv_bytes
    took = card.napkin(s.decode(users, context, kv=made.kv))
    limits = []
    if not found:
        limits.append(f"memory: {si(both, 'B')} of {si(card.memory, 'B')}")
    if took > promised:
        limits.append(f"promise: {si(took, 's')} a token, {promise} promised")
    if made.reach and made.reach < min(back, context):
        limits.append(f"forgotten: it sees {made.reach:,} tokens back, not {back:,}")
    red = plots.COLOURS[4]
    fig = plt.figure(figsize=(7.2, 2.5), layout="none")
    ax = fig.add_axes((0.12, 0.24, 0.40, 0.46))
    colours = plots.COLOURS[0], red if not found else plots.COLOURS[1]
    for y, value in enumerate((found.weight_bytes, found.kv_bytes)):
        ax.barh(y, value, color=colours[y], height=0.62,
                hatch="//" if y and not found else None, edgecolor="white", linewidth=0)
        ax.text(value, y, f" {si(value, 'B')} ", va="center", weight="bold")
    ax.axvline(card.memory - found.weight_bytes, linestyle="--",
               color=red if not found else plots.TEXT)
    ax.set(xlim=(0, 1.5 * max(found.kv_bytes, card.memory)), ylim=(1.5, -0.5))
    ax.set_yticks([0, 1], ["weights", "KV cache"])
    ax.set_xlabel("dashed: room for a cache")
    plots.units(ax.xaxis, "B")
    ax.locator_params(axis="x", nbins=4)
    clock = fig.add_axes((0.60, 0.24, 0.37, 0.46))
    late = took > promised
    clock.barh(0, took, color=red if late else plots.COLOURS[2], height=0.62,
               hatch="//" if late else None, edgecolor="white", linewidth=0)
    clock.text(took, 0, f" {si(took, 's')}", va="center", weight="bold")
    clock.axvline(promised, linestyle="--", color=red if late else plots.TEXT)
    clock.set(xlim=(0, 1.5 * max(took, promised)), ylim=(1.5, -0.5), yticks=[])
    clock.set_xlabel("a token, napkin; dashed: promised")
    plots.units(clock.xaxis, "s")
    clock.locator_params(axis="x", nbins=4)
    for each in (ax, clock):
        each.grid(visible=False, axis="y")
    training = "needs training" if made.retrained else "takes a finished checkpoint"
    verdict = "FAILS. " + "; ".join(limits) if limits else "green"
    fig.text(0.01, 0.97, f"{technique} ({training}) on {card.name}\n{users:,} × "
             f"{context:,} tokens, answers up to {back:,} back\n{verdict}", va="top",
             weight="bold",
             color=red if limits else plots.TEXT)
    plots.show(fig, f"{technique}, {training}, on {card.name}, {users:,} users of "
                    f"{context:,} tokens, answers up to {back:,} back: {verdict}. "
                    "Weights "
                    f"{si(found.weight_bytes, 'B')}, cache {si(found.kv_bytes, 'B')}, "
                    f"a token in {si(took, 's')}, {promise} promised.")


widgets.play(draw_service,
             technique=widgets.choose("technique", list(TECHNIQUES), "GQA"),
             on=widgets.choose("card", catalog.machine_names(), "h100-sxm"),
             users=widgets.powers_of_two("users", 1, 512, 32),
             context=widgets.powers_of_two("context", 1024, 131072, 32768),
             back=widgets.powers_of_two("look back", 1024, 131072, 16384),
             promise=widgets.choose("promise", ["10 ms", "20 ms", "30 ms", "50 ms"],
                                    "30 ms"))

# %% tags=["core", "fragment", "hide-input"]
draw_service("GQA", "h100-sxm", 32, 32768, 16384, "30 ms")

# %% [markdown] tags=["notes"]
# **3 min.** Ask question 1 live, the others are homework. Switch to the notebook; the figure on the
# slide is the fallback: it begins red. Ask for the single change before anybody touches a control.
# Int4 fits with room; int8 fits on paper with less than 0.1 % of the card to spare, and so in no
# engine. Usual wrong answer: a window, since it is green for memory. Solutions computes all three.

# %% [markdown] tags=["core"]
# ## Check yourself
#
# Numbers in the unit behind each line, or text with a unit (`"16 GB"`). The third is under Further,
# solutions, of Play too, at the end.
#
# **1 · Fewer heads.** Llama-2-13B: L = 40, N = K = 40, H = 128; 26 GB of weights in bf16, a bf16
# cache, a card with 80·10⁹ bytes that reads 2.0 TB/s. Each user has 3,500 tokens. How many bytes
# does a *sequence* keep? How many *users* fit, and how many with 8 KV heads (same weights)? Bytes
# over bandwidth, with the card full: how many *tokens per second* in all does the model give as it
# is? How many *times more* with 8 KV heads?
#
# **2 · A latent.** MLA keeps 512 + 64 numbers a token and layer; a head has 128. How many times
# fewer than MHA is that with 16 query heads, how many with 128? How many *KV heads* of GQA keep as
# much? Absorbed, each head has a dot product with 576 numbers and a weighted sum of 512, for each
# cached token: with 128 heads and 2 bytes a number, how many *FLOPs per byte*? On an A100 (312
# TFLOP/s, 2.04 TB/s): does that attention wait for `"memory"` or `"compute"`?

# %% tags=["core", "exercise", "exercise:fewer_heads"]
sequence = ...              # bytes
users = ...                 # a number of users
users_gqa = ...             # a number of users
tokens_per_s = ...          # tokens per second, of all users
times_more = ...            # times

lesson.steps("fewer_heads", sequence=sequence, users=users, users_gqa=users_gqa,
             tokens_per_s=tokens_per_s, times_more=times_more)

# %% tags=["core", "exercise", "exercise:latents"]
of_16 = ...                 # times fewer
of_128 = ...                # times fewer
kv_heads = ...              # KV heads
flops_per_byte_128 = ...    # FLOPs per byte
waits_for = ...             # "memory" or "compute"

lesson.steps("latents", of_16=of_16, of_128=of_128, kv_heads=kv_heads,
             flops_per_byte=flops_per_byte_128, waits_for=waits_for)

# %% [markdown] tags=["further", "slide"]
# ### Take with you
#
# 1. Every factor of 2 · L · K · H · bytes · tokens has its trick; they multiply.
# 2. It saves time if the cache is much of the step, and the kernel reads each byte once.
# 3. A latent is for many heads.
# 4. Quality: ask for the table.
#
# **Next:** weights are shared by a batch, caches are not. **Homework:** fewer heads, a latent,
# local layers.

# %% [markdown] tags=["notes"]
# **1 min.** Let three people say one sentence each, with the slide closed. Then the question.

# %% [markdown] tags=["further"]
# ## Further
#
# ### Exercise 3 · Local layers
#
# Gemma-3-27B has 62 layers in the order local, local, local, local, local, global, and again; a
# local layer keeps 1,024 tokens. K = 16, H = 128, a bf16 cache. How many layers are *global*? How
# many bytes does a text of 131,072 tokens *keep*? How many *times smaller* is that than 62 global
# layers? What is the *limit* of that factor for ever longer texts? And the factor at 131,072 tokens
# with an *int8* cache too (scales neglected)?

# %% tags=["further", "exercise", "exercise:local_layers"]
global_layers = ...         # a number of layers
kept_bytes = ...            # bytes
times_smaller = ...         # times
limit = ...                 # times
int8_too = ...              # times

lesson.steps("local_layers", global_layers=global_layers, kept=kept_bytes,
             times_smaller=times_smaller, limit=limit, int8_too=int8_too)

# %% [markdown] tags=["further"]
# ### The library's attention

# %% tags=["further", "hide-input"]
lesson.show("grouped_query_attention")

# %% [markdown] tags=["further"]
# ### Copied first
# The napkin takes every byte for traffic of the memory, though a layer's copies may stay in a
# processor's cache until attention reads them. No part of this run was timed by itself.

# %% tags=["further", "nbval-ignore-output"]
lesson.explain("attention, copied first")
print(how_to_read(lesson, "attention, copied first"))

# %% tags=["further", "nbval-ignore-output"]
lesson.table()

# %% [markdown] tags=["further"]
# ### Multi-head latent attention: the same product, in another order
# MLA keeps a latent c of each token; head n's key is c·W_uk. The *naive* way makes the keys and
# values of all S tokens again in every step. But q·(c·W_uk) = (q·W_ukᵀ)·c: multiply the *one* new
# query, and attend to the latents themselves. Matrix products do not care where the brackets are;
# the FLOPs do.

# %% tags=["further"]
deep, latent, rope, value = catalog.model("deepseek-v2-lite"), 512, 64, 128
heads = deep.N
up = latent * heads * (value + value)       # W_uk and W_uv of all heads

naive = 2 * S * up                          # keys and values of S tokens, thrown away
naive += 2 * heads * (value + rope) * S + 2 * heads * value * S     # scores, sums

absorbed = 2 * 1 * up                       # a query through W_uk, a sum through W_uv
absorbed += 2 * heads * (latent + rope) * S     # scores: with latent and position
absorbed += 2 * heads * latent * S              # sums of latents

for form, by_hand in (("naive", naive), ("absorbed", absorbed)):
    ops = deep.decode(1, S, absorbed=form == "absorbed").operations()
    assert by_hand == sum(op.flops for op in ops if op.name in (
        "kv_b", "attention", "absorb_k", "absorb_v")) / deep.L
print(f"{deep.name}, a layer, one token at {S:,}: naive {si(naive, 'FLOP')}, absorbed "
      f"{si(absorbed, 'FLOP')}, {naive / absorbed:.0f} times less")

# %% [markdown] tags=["further"]
# Two random layers of that kind give the same logits either way, from the same cache:

# %% tags=["further", "hide-input"]
torch.manual_seed(0)
small = LatentConfig(replace(shape, L=2, K=N, H=H + 32, mla=MLA(4 * H, 32, H)))
random_model = LatentDecoder(small).eval()
ways = []
for absorbed_way in (True, False):
    for each in random_model.layers:
        each.absorbed = absorbed_way
    kept_latents = LatentCache.for_model(random_model, batch=1, capacity=48)
    random_model(torch.arange(47)[None], kept_latents, last_only=True)
    ways.append(random_model(torch.tensor([[47]]), kept_latents))
torch.testing.assert_close(*ways, rtol=1e-3, atol=1e-3)
print("absorbed and naive agree")

# %% [markdown] tags=["further"]
# ### int4: which numbers share a scale?
# Keys have channels that are large in every token. KIVI (Liu et al. 2024) therefore gives each
# channel of the keys a scale of its own, over 32 tokens; values take one for 32 channels of a
# token. Both ways, on one head's real keys and values:

# %% tags=["further", "hide-input", "nbval-ignore-output"]
text = ("In 1969 two people walked on the Moon. Most bridges are built of steel. A "
        "cache keeps what was computed, so that nobody computes it again. ") * 6
ids = torch.tensor([decoder.tokenizer.encode(text)[:128]], device=decoder.device)
some = ContiguousCache.for_model(decoder, batch=1, capacity=128)
decoder(ids, some, last_only=True)
real = {"keys": some.keys[12, 0, 1].cpu(), "values": some.values[12, 0, 1].cpu()}


def error(x: torch.Tensor, axis: int, bits: int = 4, group: int = 32) -> str:
    """Of x [tokens, channels], rounded in groups of neighbours along `axis`."""
    groups = x.unflatten(axis, (-1, group))
    low, high = groups.aminmax(dim=axis + 1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    rounded = ((groups - low) / scale).round() * scale + low
    return f"{float((rounded.flatten(axis, axis + 1) - x).norm() / x.norm()):.1%}"


Table(["relative error at 4 bits", "by channel, 32 tokens", "by token, 32 channels"],
      [[what, error(x, 0), error(x, 1)] for what, x in real.items()],
      ["by channel, 32 tokens", "by token, 32 channels"])

# %% [markdown] tags=["further"]
# What 8 and 4 bits cost SmolLM2 is in lesson 08's table, whose rounded weights are the baseline
# there.
#
# Further reading: Shazeer 2019 (MQA); Ainslie et al. 2023 (GQA); DeepSeek-AI 2024, DeepSeek-V2,
# section 2.1 and appendix D (MLA); Brandon et al. 2024 (sharing among layers); Xiao et al. 2023
# (attention sinks); Liu et al. 2024 (KIVI); Gemma Team 2025, Gemma 3, section 5.2 (local layers).

# %% [markdown] tags=["solution"]
# ## Solutions

# %% [markdown] tags=["solution", "solution:grouped_query_attention"]
# <details><summary>Grouped-query attention</summary>
#
# ```python
# def my_gqa(q, k, v):
#     (N, H), K = q.shape, len(k)
#     rows = q.view(K, N // K, H)                         # neighbours share a KV head
#     scores = rows @ k.transpose(1, 2) / H**0.5          # a view of k: no copy
#     return (scores.softmax(-1) @ v).reshape(N, H)
# ```
#
# </details>

# %% tags=["solution", "hide-input"]
def green(users, context, back, on="h100-sxm", promise_s=0.03):
    card = catalog.machine(on)
    return [name for name, made in TECHNIQUES.items()
            if made.shape.fits(card.memory, users, context, "bf16", made.kv)
            and card.napkin(made.shape.decode(users, context, kv=made.kv)) <= promise_s
            and not (made.reach and made.reach < min(back, context))]


ready = [name for name in green(32, 32768, 16384) if not TECHNIQUES[name].retrained]
Markdown(f"""<details><summary>Play</summary>

1. {", ".join(ready)}; int8 on paper only, it fills the card.
2. It fits and is fast. But no layer sees further back than 4,096 tokens, so the answer
   is lost; more layers hand on only what they made of their windows.
3. {", ".join(green(64, 32768, 16384))}. MQA lost {lost(3):.1f} points of MMLU in a
   model trained from scratch; from 1 : 1 to 5 : 1 perplexity moved by at most a tenth.

</details>""")

# %% [markdown] tags=["solution", "solution:fewer_heads"]
# <details><summary>Fewer heads</summary>
#
# ```python
# sequence = 3_500 * 2 * 40 * 40 * 128 * 2            # K = N = 40: multi-head attention
# room = 80e9 - 26e9
# users = room // sequence
# users_gqa = room // (sequence * 8 / 40)
# tokens_per_s = users * 2.0e12 / (26e9 + users * sequence)
# times_more = users_gqa * 2.0e12 / (26e9 + users_gqa * sequence / 5) / tokens_per_s
# ```
#
# </details>

# %% [markdown] tags=["solution", "solution:latents"]
# <details><summary>A latent</summary>
#
# ```python
# latent = 512 + 64
# of_16 = 2 * 16 * 128 / latent
# of_128 = 2 * 128 * 128 / latent
# kv_heads = latent / (2 * 128)
# flops_per_byte_128 = 2 * 128 * (576 + 512) / (2 * latent)   # read once for all heads
# waits_for = "compute"                                       # the ridge is at 153
# ```
#
# </details>

# %% [markdown] tags=["solution", "solution:local_layers"]
# <details><summary>Local layers</summary>
#
# ```python
# global_layers = 62 // 6                             # the last two layers are local
# local = 62 - global_layers
# a_layer = 2 * 16 * 128 * 2                          # bytes of a token
# kept_bytes = a_layer * (local * 1024 + global_layers * 131_072)
# times_smaller = a_layer * 62 * 131_072 / kept_bytes
# limit = 62 / global_layers
# int8_too = 2 * times_smaller
# ```
#
# </details>
