# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02 · What does remembering cost, and save?
# ## Question
# A language model writes one token at a time, and each new token looks back at all the others. Does it have to *read* them all
# again, every time?
#
# The plainest program does: after each token it runs the whole text through the model anew. Every engine you have ever used
# keeps something instead, the **KV cache**, and computes only what is new.
#
# So two questions. How much time does remembering save, and from which length on? And how much memory does it cost, until
# the memory itself is the problem?
#
# Before you go on, write three numbers on a piece of paper: at 256 tokens, how many times faster is a token with a cache? At
# how few tokens does the cache stop being worth it? And how many bytes does it keep for one token of a 70B model?

# %% tags=["nbval-ignore-output"]
import math
from functools import cache as remembered

from clawdemy_infer.arithmetic import total
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.files import load_model
from clawdemy_infer.from_config import catalog
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.parts import StepOf
from clawdemy_infer.lesson.steps import filled_cache, random_tokens
from clawdemy_infer.lesson.tables import Table, si
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.machine.present import bracketed
from clawdemy_infer.model import generate
from clawdemy_infer.timing import Timing
from clawdemy_infer.variants.named_caches import CACHES

import matplotlib.pyplot as plt
import numpy as np
import sympy
import torch
from IPython.display import Markdown
from matplotlib.ticker import FixedLocator, NullLocator

plots.use_style()
plt.rcParams["savefig.dpi"] = 80                    # many figures, and the file stays small
machine = this_machine()
lesson = Lesson("02 kv_cache", machine=machine)
decoder = faster(load_model("smollm2-135m", device=machine.device), "fp32")   # matrices as this machine's kernels like them
lesson.card()

# %% [markdown]
# ## Envelope: what the past leaves behind
# In a layer, the new token's *query* is compared with the *keys* of all tokens so far, and the answer is a weighted sum of
# their *values*. So of an old token we need its key and its value, in every layer. Its query we never need again: nobody asks
# an old token what it is looking for.
#
# And an old token's key cannot change. Attention is causal: token 5 sees tokens 1 to 5, whatever is written after them. Let us
# not take that on trust. We run a sentence whole, and its first five tokens alone, and compare what the two caches hold.

# %%
sentence = "The past does not change. It only becomes longer."
tokens = torch.tensor([decoder.tokenizer.encode(sentence)], device=decoder.device)
whole, first_five = (ContiguousCache.for_model(decoder, batch=1, capacity=tokens.shape[1]) for _ in range(2))
decoder(tokens, whole)
decoder(tokens[:, :5], first_five)

for ours, theirs in ((whole.keys, first_five.keys), (whole.values, first_five.values)):     # [L, B, K, S, H]
    torch.testing.assert_close(ours[:, :, :, :5], theirs[:, :, :, :5], rtol=1e-3, atol=1e-3)
f"the first 5 of {tokens.shape[1]} tokens left the same keys and values in all {decoder.config.shape.L} layers"

# %% [markdown]
# That is the whole idea: **keep the keys and values, compute only the new token**. The code that keeps them is short enough to
# read now: `clawdemy_infer/kv_cache/contiguous.py`.
#
# ### The work without a cache
# We generate `n` tokens after a prompt of `P`. Without a cache each step is a whole prefill of everything so far. We count
# FLOPs for SmolLM2-135M, step by step, in the letters of lesson 01: L layers, D width, N query heads, K KV heads, H head
# dimension, F feed-forward width, V vocabulary.

# %%
shape = catalog.model("smollm2-135m")
L, D, N, K, H, F, V = (getattr(shape, letter) for letter in "LDNKHFV")
P, n = 26, 24
W = D * (N + 2 * K) * H + N * H * D + 3 * D * F     # the matrices of one layer: Q K V, output, gate up down

rows = pairs = flops = 0
for i in range(n):
    S = P + i                                       # tokens so far, all of which go through the model again
    rows += S                                       # each is a row in every matrix product
    pairs += S * (S + 1) // 2                       # token 1 sees 1 token, token 2 sees 2, … token S sees S
    flops += L * 2 * S * W                          # a multiply and an add per row and weight
    flops += L * 4 * N * H * S * (S + 1) // 2       # scores, then sum of values: 2 + 2 per pair and dimension
    flops += 2 * D * V                              # the head: only the last position has to name a word
without_cache = flops

S = P + n - 1                                       # the length of the last step
assert rows == n * (2 * P + n - 1) // 2
assert pairs == (S * (S + 1) * (S + 2) - (P - 1) * P * (P + 1)) // 6
assert flops == L * 2 * W * rows + L * 4 * N * H * pairs + n * 2 * D * V
assert flops == sum(shape.prefill(1, P + i).flops for i in range(n))
f"{n} tokens after {P}, without a cache: {si(without_cache, 'FLOP')}"

# %% [markdown]
# ### The work with a cache
# The first step still reads the prompt. After it, each step sends *one* row through the matrices, and that row looks back at
# everything kept.

# %%
rows, pairs = P, P * (P + 1) // 2                   # prefill: all of the prompt, once
flops = L * 2 * P * W + L * 4 * N * H * P * (P + 1) // 2 + 2 * D * V
for i in range(1, n):
    S = P + i                                       # the cache holds S - 1 tokens, and the new one sees itself too
    rows += 1
    pairs += S
    flops += L * 2 * W + L * 4 * N * H * S + 2 * D * V
with_cache = flops

assert rows == P + n - 1
assert pairs == S * (S + 1) // 2
assert flops == L * 2 * W * rows + L * 4 * N * H * pairs + n * 2 * D * V
assert flops == shape.prefill(1, P).flops + sum(shape.decode(1, P + i).flops for i in range(1, n))

# Every row and every pair is computed once: just what the *last* step without a cache does on its own.
assert flops - n * 2 * D * V == shape.prefill(1, S).flops - 2 * D * V
f"{n} tokens after {P}, with a cache: {si(with_cache, 'FLOP')}, {without_cache / with_cache:.1f} times less"

# %% [markdown]
# The last assertion is the one to remember. **A whole generation with a cache does no more work than one step without it, the
# last** (the head aside, which each step needs).
#
# Let us see the powers. From one token on, P = 1, how do the sums grow with n?

# %%
i, m = sympy.symbols("i n", integer=True, positive=True)
sums = {
    "matrix rows, without": sympy.summation(i, (i, 1, m)),
    "matrix rows, with": sympy.summation(1, (i, 1, m)),
    "attention pairs, without": sympy.summation(i * (i + 1) / 2, (i, 1, m)),
    "attention pairs, with": sympy.summation(i, (i, 1, m)),
}
assert sympy.limit(sums["matrix rows, without"] / m**2, m, sympy.oo) == sympy.Rational(1, 2)
assert sympy.limit(sums["attention pairs, without"] / m**3, m, sympy.oo) == sympy.Rational(1, 6)
rows = [f"| {name} | ${sympy.latex(sympy.factor(value))}$ | ${sympy.latex(m ** sympy.degree(value, m))}$ |"
        for name, value in sums.items()]
Markdown("| | after n tokens | grows as |\n|:--|:--|:--|\n" + "\n".join(rows))

# %% [markdown]
# Without a cache the matrix products are **quadratic** and attention is **cubic**. With it they are linear and quadratic: the
# cache takes one power off each.

# %%
lengths = np.geomspace(1, 8192, 100)
matrices, attention = L * 2 * W, L * 4 * N * H

square, cube = lengths * (lengths + 1) / 2, lengths * (lengths + 1) * (lengths + 2) / 6

fig, ax = plt.subplots(figsize=(6.2, 3.3))
for label, powers, style in (("without", (square, cube), "-"), ("with", (lengths, square), "--")):
    ax.loglog(lengths, matrices * powers[0], style, color=plots.COLOURS[0], label=f"matrix products, {label}")
    ax.loglog(lengths, attention * powers[1], style, color=plots.COLOURS[1], label=f"attention, {label}")
for power, x, y, shift, side in (("n²", 200, matrices * 200**2 / 2, (-7, 7), "right"),
                                 ("n³", 400, attention * 400**3 / 6, (-7, 5), "right"),
                                 ("n", 40, matrices * 40, (-5, 9), "right"),
                                 ("n²", 600, attention * 600**2 / 2, (9, -9), "left")):
    ax.annotate(f"∝ {power}", (x, y), xytext=shift, textcoords="offset points", ha=side, va="center")
ax.set(xlabel="tokens generated, n", ylabel="work in all", xlim=(1, 8192), ylim=(1e5, 1e17),
       title="A cache takes one power of n off the work (SmolLM2-135M)")
ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
plots.units(ax.yaxis, "FLOP")
ax.legend(loc="upper left")
plots.show(fig, "Work of generating n tokens, both axes logarithmic. Without a cache matrix products rise with the square of n and attention with "
                "its cube; with a cache they rise with n and with its square.")

# %% [markdown]
# ### FLOPs are half of the story
# FLOPs fell, but what about bytes? We count what one token at a length of 256 must read, in fp32 as we shall run it: the weights, and the keys
# and values of all that it looks back at. (What passes between the operations comes on top.)

# %%
S = 256
flops_without = L * 2 * S * W + L * 4 * N * H * S * (S + 1) // 2 + 2 * D * V
flops_with = L * 2 * W + L * 4 * N * H * S + 2 * D * V
assert (flops_without, flops_with) == (shape.prefill(1, S).flops, shape.decode(1, S).flops)

bytes_with = L * W * 4 + V * D * 4              # every matrix, and the head, whether for one row or for a thousand
bytes_with += L * 2 * K * H * S * 4             # keys and values, kept from before
bytes_without = bytes_with                      # the same matrices, and the same keys and values, freshly computed

Table(["the 256th token", "FLOPs", "bytes", "FLOPs per byte"],
      [["without a cache", si(flops_without, "FLOP"), si(bytes_without, "B"), f"{flops_without / bytes_without:.1f}"],
       ["with a cache", si(flops_with, "FLOP"), si(bytes_with, "B"), f"{flops_with / bytes_with:.1f}"]],
      numeric=["FLOPs", "bytes", "FLOPs per byte"])

# %%
Markdown(f"The cache divides the FLOPs by {flops_without / flops_with:.0f}, and the bytes not at all. "
         "It does not make a compute-bound step a little cheaper: it turns it into a *memory-bound* one. "
         "So it saves what the computing cost *above* the reading. "
         "Where there was nothing above it, at a few tokens, it saves nothing.")

# %% [markdown]
# ### What one token leaves in memory
# A key and a value, for each KV head, each H numbers wide, in each layer. Per token and layer that is **2·K·H·bytes**, and
#
# $$\text{KV bytes per token} = 2 \cdot L \cdot K \cdot H \cdot \text{bytes per number}$$
#
# It looks too simple to get wrong. There are two ways:
#
# - **N instead of K.** In grouped-query attention (Ainslie et al. 2023) several query heads share one KV head. Only KV heads are kept.
# - **D/N instead of H.** In many models the head dimension happens to be the width over the heads. Where it is not, `config.json`
#   says so in `head_dim`.

# %%
models = {name: catalog.model(name) for name in ("llama-2-7b", "llama-3-8b", "llama-2-70b", "qwen3-0.6b", "qwen3-4b")}


def beside_right(wrong: float, right: float) -> str:
    return f"{wrong:,.0f}  (× {wrong / right:g})" if wrong != right else "the same"


rows = []
for s in models.values():
    right = 2 * s.L * s.K * s.H * 2
    assert right == s.kv_bytes_per_token("bf16")
    heads, width = 2 * s.L * s.N * s.H * 2, 2 * s.L * s.K * (s.D / s.N) * 2
    rows.append([s.name, *map(str, (s.L, s.N, s.K, s.H)), f"{s.D / s.N:g}", f"{right:,}",
                 beside_right(heads, right), beside_right(width, right)])
columns = ["model", "L", "N", "K", "H", "D/N", "bytes per token, bf16", "with N for K", "with D/N for H"]
Table(columns, rows, numeric=columns[1:])

# %% [markdown]
# On Llama-2-7B both mistakes give the right answer, which is how they survive a test. And look down the right column of bytes:
# a 70B model keeps *less* per token than a 7B one. Memory per token is a matter of KV heads, not of size.
#
# ### When the cache outweighs the weights
# Weights are paid once. KV is paid for every token of every sequence in flight, B·S tokens in all. The two are equal at
#
# $$B \cdot S = \frac{\text{weight bytes}}{2 \cdot L \cdot K \cdot H \cdot \text{bytes}}$$

# %%
names = ["qwen3-0.6b", "smollm2-135m", "llama-2-7b", "qwen3-4b", "llama-3.2-1b", "llama-3-8b", "llama-2-70b"]
shapes = [catalog.model(name) for name in names]
even = sorted((s.stored_bytes("bf16") / s.kv_bytes_per_token("bf16"), s.name) for s in shapes)

fig, ax = plt.subplots(figsize=(6.2, 3.3))
bars = ax.barh([name for _, name in even], [tokens for tokens, _ in even], color=plots.COLOURS[0], height=0.6)
ax.bar_label(bars, [f"{tokens:,.0f}" for tokens, _ in even], padding=4, bbox={"color": "white", "pad": 1})
for batch, context in ((1, 8192), (16, 4096), (64, 8192)):
    ax.axvline(batch * context, color=plots.COLOURS[1], linestyle=":", zorder=0)
    ax.text(batch * context, 0.99, f" {batch} × {context:,}", color=plots.COLOURS[1],
            transform=ax.get_xaxis_transform(), va="top")
ax.set(xscale="log", xlim=(3e3, 1.6e6), ylim=(-0.6, len(even) + 0.1), xlabel="tokens in flight, batch × context",
       title="The KV cache weighs as much as the weights at … (both bf16)")
ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
ax.grid(axis="y", visible=False)
plots.show(fig, "Tokens in flight at which the KV cache weighs as much as the weights, both in bf16: " + ", ".join(
    f"{name} {tokens:,.0f}" for tokens, name in even) + ".")

# %% [markdown]
# Small models are outweighed first: their weights are few, their KV is not. One user with one long chat is enough for Qwen3-0.6B. And every
# KV head counts: Llama-2-7B keeps one for each query head, and is outweighed long before Llama-3-8B, which keeps one for four.
#
# ## Prediction
# Now SmolLM2 on this machine, in fp32. Two predictions of the time for one token at length S, and neither has seen the runs below.
#
# **The napkin**, with three numbers: peak FLOP/s, bandwidth, and the size of the model.
# - *without*: 2·L·W·S FLOPs at peak or the weights once from memory, whichever is longer;
# - *with*: the weights once from memory. (At S = 256 the cache is a fraction of them, and the napkin drops it.)
#
# **The calibrated roofline** knows more about the machine: how fast a product of M rows really runs, attention's own rate,
# and what each launch of a step costs. It says an interval, as wide as its measurements were unsteady.
#
# Where is the **crossover**, the length below which the cache does not pay? Honestly: nowhere. At length 1 the two steps are the same
# step, and from there on the one without a cache can only do more. But "more" starts out as nearly nothing, because a few
# rows ride along while the weights are read. A better question has a definite answer: **at which length is the cache twice as
# fast?** We scan the predictions for it.
#
# Write your own guesses over the dots, if you like, with a unit: `"500 ms"`, `"3 times"`, `"100 tokens"`. The last one asks how much longer a step takes
# that looks back at 2,048 tokens instead of 64.

# %% tags=["guess"]
lesson.guess("a token without a cache, at 256", ...)
lesson.guess("a token with a cache, at 256", ...)
lesson.guess("speed-up at 256", ...)
lesson.guess("length where it is twice as fast", ...)
lesson.guess("attention to 2,048 tokens adds, over 64", ...)

# %% [markdown]
# A `StepOf` the model knows how many operations it launches. For other lengths these are the same, and the work is counted as above.

# %% tags=["nbval-ignore-output"]
FP32 = {"weights": "fp32", "kv": "fp32", "activations": "fp32"}
prefill, decode = (StepOf(decoder, phase, context=256) for phase in ("prefill", "decode"))


def napkin_without(S: int) -> float:
    return max(L * 2 * W * S / machine.peak("fp32"), napkin_with(S))


def napkin_with(S: int) -> float:
    return shape.streamed_bytes("fp32") / machine.bandwidth_at()


def napkin_added(S: int) -> float:
    return (S - 64) * shape.kv_bytes_per_token("fp32") / machine.bandwidth_at()


def without_cache(S: int):
    """Predicted: a prefill of all S tokens."""
    return machine.time(shape.prefill(1, S, **FP32), prefill.ops)


def with_cache(S: int):
    """Predicted: a decode step at context S."""
    return machine.time(shape.decode(1, S, **FP32), decode.ops)


@remembered
def predicted_speedup(S: int) -> tuple[float, float]:
    """The ratio of both, and its half-width: two errors that are not the same one."""
    more, less = without_cache(S), with_cache(S)
    return more.seconds / less.seconds, 1 + math.hypot(more.spread, less.spread)


def doubling(speedup) -> int:
    """The first length, at most the model's context, at which a step without a cache takes twice as long."""
    return next((S for S in range(1, shape.max_context) if speedup(S) >= 2), shape.max_context)


lesson.predict("a token without a cache, at 256", napkin_without(256), without_cache(256), unit="s")
lesson.predict("a token with a cache, at 256", napkin_with(256), with_cache(256), unit="s")
for S in (32, 64, 128, 256):
    ratio, half = predicted_speedup(S)
    lesson.predict(f"speed-up at {S}", napkin_without(S) / napkin_with(S), ratio, unit="×", interval=(ratio / half, ratio * half))

twice = doubling(lambda S: predicted_speedup(S)[0])
lesson.predict("length where it is twice as fast", doubling(lambda S: napkin_without(S) / napkin_with(S)), twice, unit="tokens",
               interval=(doubling(lambda S: math.prod(predicted_speedup(S))), doubling(lambda S: predicted_speedup(S)[0] / predicted_speedup(S)[1])))

prompt_step, later = shape.prefill(1, P, **FP32), [shape.decode(1, P + i, **FP32) for i in range(1, n)]
whole_prefills = [shape.prefill(1, P + i, **FP32) for i in range(n)]
lesson.predict(f"all of {n} tokens after {P}, without", sum(napkin_without(P + i) for i in range(n)),
               machine.time(total("without", whole_prefills), n * prefill.ops), unit="s")
lesson.predict(f"all of {n} tokens after {P}, with", napkin_without(P) + sum(napkin_with(P + i) for i in range(1, n)),
               machine.time(total("with", [prompt_step, *later]), prefill.ops + (n - 1) * decode.ops), unit="s")
added_by_attention = with_cache(2048) - with_cache(64)
lesson.predict("attention to 2,048 tokens adds, over 64", napkin_added(2048), added_by_attention, unit="s")
lesson.reveal()

# %% [markdown]
# The last row looks further: a step that looks back at 2,048 tokens instead of 64 has more keys and values to read. On the
# napkin that is their bytes over the bandwidth. The calibrated prediction is the *difference* of two, part by part: all that both steps do alike,
# and all that is wrong about it, falls out.
#
# ## Measurement: with and without
# First the same story twice. Greedy, so that both must write the *same tokens*: a cache may change the time and nothing else.

# %%
story = ("Once upon a time, in a small town by the sea, there lived an old clockmaker who never forgot anything. "
         "One day")
prompt = decoder.tokenizer.encode(story)
assert len(prompt) == P
outputs, generating = {}, {}


def tell(kind: str) -> None:
    outputs[kind] = generate(decoder, prompt, max_tokens=n, cache="contiguous" if kind == "with" else "none")


for kind in ("without", "with"):
    generating[kind] = bracketed(machine)(lambda kind=kind: tell(kind), repeats=1, warmup=0)

assert outputs["without"].tokens == outputs["with"].tokens and len(outputs["with"].tokens) == n
print(outputs["with"].text)

# %% tags=["nbval-ignore-output"]
for kind in outputs:
    lesson.measure(f"all of {n} tokens after {P}, {kind}", generating[kind])
Table(["", "first token", "each later token", "all"],
      [[f"{kind} a cache", *(si(value, "s") for value in (outputs[kind].ttft_s, outputs[kind].tpot_s, generating[kind].median))]
       for kind in outputs],
      numeric=["first token", "each later token", "all"])

# %% [markdown]
# Now single steps, at one length after another. We take them in turn, so that a busy moment of the machine falls on all of them alike, and look
# at the machine's speed right before and right after.
# One cache of 2,048 tokens serves every length: to be shorter, only its counter moves.

# %% tags=["nbval-ignore-output"]
LENGTHS = [1, 8, 16, 32, 64, 128, 256]
cache = ContiguousCache.for_model(decoder, batch=1, capacity=2048)
part = filled_cache(decoder, batch=1, tokens=256)
for all_of_it, real in ((cache.keys, part.keys), (cache.values, part.values)):          # [L, B, K, S, H] each
    all_of_it[:] = real[:, :, :, :256].repeat(1, 1, 1, 8, 1)    # a step costs the same, whatever its keys say
token = random_tokens(decoder, 1, 1)


def step_without(S: int) -> None:
    decoder(random_tokens(decoder, 1, S), None, last_only=True)


def step_with(S: int) -> None:
    cache.length = S - 1                            # the bytes beyond stay where they are
    decoder(token, cache, last_only=True)


works = {(kind, S): lambda step=step, S=S: step(S)
         for S in LENGTHS for kind, step in (("without", step_without), ("with", step_with))}
times = bracketed(machine)(works, repeats=4)
steps = {kind: {S: times[kind, S].median for S in LENGTHS} for kind in ("without", "with")}
speedup = {S: steps["without"][S] / steps["with"][S] for S in LENGTHS}

# The step without a cache has the parts of a prefill: it computes the same keys and values, and does not keep them.
lesson.measure("a token without a cache, at 256", times["without", 256], parts=prefill.parts(machine))
lesson.measure("a token with a cache, at 256", times["with", 256], parts=decode.parts(machine))
for S in (32, 64, 128, 256):
    lesson.measure(f"speed-up at {S}", speedup[S])
Table(["length", "without", "with", "speed-up", "predicted", "napkin"],
      [[str(S), si(steps["without"][S], "s"), si(steps["with"][S], "s"), f"{speedup[S]:.1f} ×",
        f"{predicted_speedup(S)[0]:.1f} ×", f"{napkin_without(S) / napkin_with(S):.1f} ×"]
       for S in LENGTHS],
      numeric=["length", "without", "with", "speed-up", "predicted", "napkin"])

# %% [markdown]
# The length of the doubling lies between two of these; we draw a straight line between them on log-log axes.

# %% tags=["nbval-ignore-output"]
above = next((k for k, S in enumerate(LENGTHS) if speedup[S] >= 2), None)
if above is None:
    print(f"On this machine the cache does not double the speed within {LENGTHS[-1]} tokens.")
elif above == 0:
    print("A token of one is twice as fast with a cache: that is noise, and no length can be found in it.")
else:
    pair = LENGTHS[above - 1: above + 1]
    measured_doubling = float(np.exp(np.interp(np.log(2), np.log([speedup[S] for S in pair]), np.log(pair))))
    lesson.measure("length where it is twice as fast", measured_doubling)
    print(f"With a cache, a token is twice as fast from {measured_doubling:.0f} tokens on.")

# %% tags=["nbval-ignore-output"]
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2))
for kind, napkin, predicted, shift in (("without", napkin_without, without_cache, (-34, 10)),
                                       ("with", napkin_with, with_cache, (0, 9))):
    said = [predicted(S) for S in LENGTHS]
    left.plot(LENGTHS, [napkin(S) for S in LENGTHS], "--", color=plots.NAPKIN)
    left.plot(LENGTHS, [each.seconds for each in said], color=plots.ROOFLINE)
    left.fill_between(LENGTHS, [each.low_s for each in said], [each.high_s for each in said], color=plots.ROOFLINE, alpha=0.12, linewidth=0)
    left.plot(LENGTHS, list(steps[kind].values()), "o", color=plots.MEASURED)
    left.annotate(f"{kind} a cache", (190, predicted(190).seconds), xytext=shift, textcoords="offset points", ha="center")
left.set(xlabel="length, tokens", ylabel="time for one token", ylim=(0, None),
         title="With a cache the time stays flat …")
plots.units(left.yaxis, "s")
right.plot(LENGTHS, [napkin_without(S) / napkin_with(S) for S in LENGTHS], "--", color=plots.NAPKIN, label="napkin")
right.plot(LENGTHS, [predicted_speedup(S)[0] for S in LENGTHS], color=plots.ROOFLINE,
           label="calibrated roofline")
right.plot(LENGTHS, list(speedup.values()), "o", color=plots.MEASURED, label="measured")
right.axhline(1, color="black", linewidth=0.8)
right.set(xscale="log", yscale="log", xlabel="length, tokens", ylabel="times faster with a cache",
          title="… and at a few tokens it saves little")
right.legend(loc="upper left")
for axis, ticks in ((right.xaxis, LENGTHS), (right.yaxis, [1, 2, 4, 8, 16, 32])):
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")
plots.show(fig, f"Left, time for one token against the length: at 256 tokens {si(steps['without'][256], 's')} without a cache and "
                f"{si(steps['with'][256], 's')} with. Right, the speed-up: " + ", ".join(f"{speedup[S]:.1f} at {S}" for S in LENGTHS) + ".")

# %% [markdown]
# ### Where the time goes as the context grows
# "Flat" was too strong. The new token looks at every key and value kept, so attention's part of a step must grow. We measure it as the
# *difference* to a step at 64 tokens, round by round; all else in the step is the same.

# %% tags=["nbval-ignore-output"]
CONTEXTS = [64, 512, 1024, 1536, 2048]
long = bracketed(machine)({S: lambda S=S: step_with(S) for S in CONTEXTS}, repeats=15)
added = {S: Timing(tuple(more - less for more, less in zip(long[S].seconds, long[64].seconds, strict=True)), long[S].around)
         for S in CONTEXTS[1:]}

attending = {}                                      # seconds of attention alone, from steps that are watched
for S in (2048, 64):
    cache.length = S
    attending[S] = StepOf(decoder, "decode", context=S, cache=cache).parts(machine).measured["attention"]
lesson.measure("attention to 2,048 tokens adds, over 64", added[2048], parts=[{
    "name": "attention", "napkin_s": napkin_added(2048), "predicted_s": added_by_attention.seconds,
    "measured_s": max(attending[2048] - attending[64], 0.0)}])

fig, ax = plt.subplots(figsize=(6.2, 3.0))
said = [(with_cache(S) - with_cache(64)).seconds for S in CONTEXTS[1:]]
plots.beside(ax, CONTEXTS[1:], [napkin_added(S) for S in CONTEXTS[1:]], said, [each.median for each in added.values()])
ax.set(xlabel="context, tokens", ylabel="added to one step",
       title="What looking back adds to a step, over a context of 64")
ax.xaxis.set_major_locator(FixedLocator(CONTEXTS[1:]))
ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
plots.show(fig, "Time added to a step against its context, over one at 64 tokens; measured: "
                + ", ".join(f"{si(added[S].median, 's')} at {S:,}" for S in CONTEXTS[1:]) + ".")
Table(["context", "whole step", "added by attention", "its share", "predicted", "napkin"],
      [[f"{S:,}", si(long[S].median, "s"), si(added[S].median, "s"), f"{added[S].median / long[S].median:.1%}",
        f"{(with_cache(S) - with_cache(64)).seconds / with_cache(S).seconds:.1%}", f"{napkin_added(S) / (napkin_with(S) + napkin_added(S)):.1%}"]
       for S in CONTEXTS[1:]],
      numeric=["context", "whole step", "added by attention", "its share", "predicted", "napkin"])

# %% [markdown]
# ### And the bytes?
# Those need no stopwatch. Three sequences, room for 777 tokens each:

# %%
kept = ContiguousCache.for_model(decoder, batch=3, capacity=777)
assert kept.allocated_bytes == 3 * 777 * 2 * L * K * H * 4 == shape.kv_bytes(3, 777, "fp32")
Markdown(f"Predicted and allocated, to the byte: **{kept.allocated_bytes:,}**. "
         f"That is {si(kept.allocated_bytes / 3 / 777, 'B')} a token in fp32, "
         f"beside {si(shape.stored_bytes('fp32'), 'B')} of weights.")

# %% [markdown]
# ### Five caches, one interface
# The decoder does not care where the bytes lie. It hands a layer's keys and values to the cache, and gets back what attention makes of them. So they can
# be kept in other ways: in *pages* of 16 tokens that are handed out as they are needed (lesson 06); as a *window* of the newest 256 tokens and the first
# 4; in *8 or 4 bits* (lesson 03). The same three sequences of 777 tokens, counted by hand before anything is allocated:

# %%
numbers = 2 * L * K * H                                                 # of one token: a key and a value, in all layers
by_hand = {
    "contiguous": 3 * 777 * numbers * 4,                                # room for every token from the start
    "paged": 3 * 49 * 16 * numbers * 4,                                 # 49 blocks of 16 tokens each
    "window": 3 * (256 + 4) * numbers * 4,                              # whatever the length
    "int8": 3 * 777 * 2 * L * K * (H + 2),                              # a byte each, and a 16-bit scale for each head
    "int4": 3 * numbers * (768 * (0.5 + 4 / 32) + 32 * 4),              # half a byte, scale and zero point for 32; the last 32 in fp32
}
for name, bytes in by_hand.items():
    assert CACHES[name](decoder, 3, 777).allocated_bytes == bytes
Table(["cache", "bytes", "of contiguous, fp32"],
      [[name, f"{bytes:,.0f}", f"{bytes / by_hand['contiguous']:.0%}"] for name, bytes in by_hand.items()],
      numeric=["bytes", "of contiguous, fp32"])

# %% [markdown]
# Counted and allocated, to the byte. And what do they make of the story? Pages move bytes and change none of them, and a window changes nothing as long as all
# still fits into it: the same tokens. Rounding does change the keys and values, and whether that shows within sixteen tokens is chance. What 8 and 4 bits cost in
# quality takes a measure and many more tokens: lesson 03.

# %%
told = {name: generate(decoder, prompt, max_tokens=16, cache=CACHES[name](decoder, 1, 1024)).tokens
        for name in ("contiguous", "paged", "window")}
assert all(tokens == outputs["with"].tokens[:16] for tokens in told.values())
f"the same {len(told['paged'])} tokens from {', '.join(told)}"

# %% [markdown]
# ## Reconciliation: who was wrong, and why
# Commit yourself first: of what is between the napkin and the stopwatch, for a token with a cache at 256, what is the largest part? Write one of the causes
# over the dots.

# %% tags=["guess"]
# "products", "attention", "element-wise", "launches", "memory was slower than calibrated", "memory was faster than calibrated", "not explained"
lesson.cause("a token with a cache, at 256", ...)

# %% [markdown]
# From the napkin to what was measured, step by step. Each bar was measured by itself: the machine's speed around the run, then each part, by what it took
# beyond its share of the napkin.

# %% tags=["nbval-ignore-output"]
lesson.explain("a token with a cache, at 256")

# %% tags=["nbval-ignore-output"]
lesson.explain("a token without a cache, at 256")

# %% [markdown]
# And the difference of two steps. Its attention was measured by itself, in steps that were watched; the whole difference in others, that were not.

# %% tags=["nbval-ignore-output"]
lesson.explain("attention to 2,048 tokens adds, over 64")

# %% tags=["nbval-ignore-output"]
lesson.table()

# %% tags=["nbval-ignore-output"]
cached = {part["name"]: part["measured_s"] for part in lesson.rows["a token with a cache, at 256"].parts}
products = sum(seconds for name, seconds in cached.items() if name not in ("attention", "element-wise", "launches"))
early, late = (doubling(lambda S, off=off: predicted_speedup(S)[0] * off) for off in (1.1, 1 / 1.1))
read = (2048 - 64) * shape.kv_bytes_per_token("fp32")
attention = ("was lost in the noise of this run" if added[2048].median <= 0 else
             f"took {si(added[2048].median, 's')}: {si(read / added[2048].median, 'B/s')}, or "
             f"{read / added[2048].median / machine.bandwidth_at():.0%} of the bandwidth")
Markdown(f"""
What was measured of it:

* **The cached step.** The napkin lets the weights stream past at the bandwidth that a plain sum reaches, {si(machine.bandwidth_at(), "B/s")}. The
  products with one row read them at {si(shape.streamed_bytes("fp32") / products, "B/s")}; {decode.ops:,.0f} launches took
  {si(cached["launches"], "s")}, whether they carry one row or thirty. Launch overhead is not a defect of the cache. It is what remains when the work is gone.
* **The speed-up.** At 256 tokens a step without a cache took {steps["without"][256] / napkin_without(256):.1f} times its napkin, one with a cache
  {steps["with"][256] / napkin_with(256):.1f} times its own; so the speed-up is {speedup[256]:.1f} ×, where the napkin says {napkin_without(256) / napkin_with(256):.1f} ×. What both steps pay alike,
  such as launches, pulls it towards 1. The length of the doubling is a touchy number besides: a tenth more or less of the speed-up moves the predicted
  crossing from {twice} tokens to {early} or {late}.
* **Attention.** Reading {si(read, "B")} more of keys and values {attention}. Lesson 10 is about kernels that come close to the bandwidth.
""")

# %% [markdown]
# A shared or warm machine is not always as fast as it was. Plain seconds show that in full. A speed-up is a ratio of two steps that ran side by side, so it
# minds less; yet one of the two computes and the other reads, and a machine can lose one without the other.
#
# ### When remembering loses
# - **One token of output.** To classify a text, or to embed it, there is one prefill and nothing after it. The cache is written and never read.
# - **Memory.** Without a cache nothing grows. With one, each user needs room for all of their tokens, and that room, more than speed,
#   is what limits how many users share a machine (lesson 04).
# - **Long contexts.** A cached step reads the weights *and* all of the cache. From some length on the cache is the larger read, and
#   a token costs twice what it did. It is still far better than computing everything anew; but the cache itself has become the thing to shrink (lesson 03).

# %%
even_at = shape.streamed_bytes("fp32") / shape.kv_bytes_per_token("fp32")
Markdown(f"For SmolLM2-135M and one sequence, reading the cache overtakes reading the weights at "
         f"**{even_at:,.0f} tokens**, "
         f"{'beyond' if even_at > shape.max_context else 'within'} the {shape.max_context:,} it was trained for. "
         f"With a batch of 8 that is at {even_at / 8:,.0f}: "
         "the weights are read once for all, each cache for its own sequence.")

# %% [markdown]
# ## Play and exercises
# Does it fit? Choose a model with 16-bit weights, a machine, how many sequences, how long, and the format of the cache.
# Try to find: a setting in which the cache is ten times the weights; one that only fits with an 8-bit cache; a small model that needs more memory than
# a large one.

# %%
def draw_memory(model: str, on: str, batch: int, context: int, kv: str) -> None:
    """Weights and cache, in bytes, against the memory of a machine."""
    s, memory = catalog.model(model), catalog.machine(on).memory
    capacity = s.fits(memory, batch, context, "bf16", kv)
    weights, cache, both = capacity.weight_bytes, capacity.kv_bytes, capacity.weight_bytes + capacity.kv_bytes
    fig, ax = plt.subplots(figsize=(7.0, 2.6))
    blue, orange = plots.COLOURS[:2]
    ax.barh(["weights", "KV cache", "together"], [weights, cache, weights], color=[blue, orange, blue], height=0.62)
    ax.barh(["together"], [cache], left=[weights], color=orange, height=0.62)
    ax.axvline(memory, color="black", linestyle="--", linewidth=1.4)
    for y, value in enumerate((weights, cache, both)):
        ax.annotate(si(value, "B"), (value, y), xytext=(5, 0), textcoords="offset points", va="center",
                    bbox={"color": "white", "pad": 1})
    side, shift = ("left", 6) if memory < 0.75 * both else ("right", -6)
    ax.annotate(f"memory {si(memory, 'B')}", (memory, -0.72), xytext=(shift, 0), textcoords="offset points",
                ha=side, va="center")
    verdict = "fits" if capacity else "does not fit"
    ax.set_title(f"{s.name} on {catalog.machine(on).name}: {verdict}; the most is batch {capacity.max_batch:,}",
                 color="black" if capacity else orange)
    ax.set(xlim=(0, 1.16 * max(both, memory)), ylim=(2.5, -0.95))
    plots.units(ax.xaxis, "B")
    ax.grid(axis="y", visible=False)
    if s.max_context < context:
        ax.set_xlabel(f"(the model was trained for contexts up to {s.max_context:,})")
    plots.show(fig, f"{ax.get_title(loc='left')}. Weights {si(weights, 'B')}, KV cache {si(cache, 'B')}, together {si(both, 'B')}.")


# %% tags=["widget", "nbval-ignore-output"]
widgets.play(draw_memory,
             model=widgets.choose("model", catalog.model_names(), "llama-3-8b"),
             on=widgets.choose("machine", catalog.machine_names(), "h100-sxm"),
             batch=widgets.powers_of_two("batch", 1, 256, 64),
             context=widgets.powers_of_two("context", 256, 131072, 8192),
             kv=widgets.choose("KV format", ["bf16", "int8", "int4"], "bf16"))

# %%
draw_memory("llama-3-8b", "h100-sxm", 64, 8192, "bf16")

# %% [markdown]
# ### 1 · Bytes of one token
# Write the formula. It is checked on eight published models, the two traps among them.

# %% tags=["exercise", "exercise:kv_bytes_per_token"]
def kv_bytes_per_token(L, K, H, bytes):
    return ...


lesson.exercise(
    "kv_bytes_per_token", kv_bytes_per_token,
    cases={
        (40, 40, 128, 2): 819_200,      # OPT-13B: the "800 KB" of the PagedAttention paper are KiB
        (32, 32, 128, 2): 524_288,      # Llama-2-7B
        (80, 8, 128, 2): 327_680,       # Llama-2-70B
        (32, 8, 128, 2): 131_072,       # Llama-3-8B, and Mixtral 8x7B: experts keep no keys
        (28, 8, 128, 2): 114_688,       # Qwen3-0.6B, of width 1,024 and 16 heads
        (36, 8, 128, 2): 147_456,       # Qwen3-4B, of width 2,560 and 32 heads
        (28, 16, 256, 2): 458_752,      # GPT-J-6B
        (80, 8, 64, 1): 81_920,         # Falcon-180B with an 8-bit cache
    },
    nudge="Count what one token leaves in one layer, then the layers.",
    means="the one formula of this lesson to know by heart.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A key *and* a value; for each KV head; of H numbers each; in each layer.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def kv_bytes_per_token(L, K, H, bytes):
#     return 2 * L * K * H * bytes
# ```
#
# </details>

# %% [markdown]
# ### 2 · How many users?
# `memory` bytes, of which the weights take `weights`; each user needs room for `context` tokens at `per_token` bytes. How many whole users fit?

# %% tags=["exercise", "exercise:largest_batch"]
def largest_batch(memory, weights, per_token, context):
    return ...


lesson.exercise(
    "largest_batch", largest_batch,
    cases={
        (80 * 2**30, 16_060_522_496, 131_072, 8_192): 65,       # Llama-3-8B on an 80 GiB card
        (80 * 2**30, 26_031_728_640, 819_200, 4_096): 17,       # Llama-2-13B: half the context, a quarter of the users
        (24 * 2**30, 26_031_728_640, 819_200, 4_096): 0,        # and on 24 GiB not even the weights fit
        (24 * 2**30, 1_192_099_840, 114_688, 40_960): 5,        # Qwen3-0.6B: 1.2 GB of weights, and yet five users
    },
    nudge="Users come whole, and never less than none.",
    means="note how little the size of the model has to do with it.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# What the weights leave, divided by what one user needs, rounded down (`//`). And if the weights alone are too much?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def largest_batch(memory, weights, per_token, context):
#     return max(0, (memory - weights) // (per_token * context))
# ```
#
# </details>

# %% [markdown]
# ### 3 · What a long prompt leaves to save
# After a prompt of P tokens, generate n. Counting rows through the matrices only: how many times more go through without a cache than with one?

# %% tags=["exercise", "exercise:rows_saved"]
def rows_saved(P, n):
    return ...


lesson.exercise(
    "rows_saved", rows_saved,
    cases={
        (1, 1): 1.0,            # one row either way
        (1, 4): 2.5,            # 1 + 2 + 3 + 4 rows, or 4
        (1_000, 1): 1.0,        # one token of output: nothing to save, however long the prompt
        (6, 3): 2.625,          # 6 + 7 + 8 rows, or 6 + 1 + 1
        (512, 512): 392_960 / 1_023,
    },
    nudge="With a cache each of the P + n - 1 tokens goes through once: the last one written is never read.",
    means="for a prompt much longer than the answer it is just n.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Without: step i sends P + i rows, for i from 0 to n - 1. The mean of the first and the last, times n.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def rows_saved(P, n):
#     return (n * (2 * P + n - 1) / 2) / (P + n - 1)
# ```
#
# </details>

# %% [markdown]
# ### 4 · When the cache is the larger read
# A decode step of `batch` sequences streams `weights` bytes once, and `per_token` bytes for each token of each sequence. At which context do the two weigh the same?

# %% tags=["exercise", "exercise:even_context"]
def even_context(weights, per_token, batch):
    return ...


lesson.exercise(
    "even_context", even_context,
    cases={
        (16_000_000_000, 128_000, 1): 125_000,
        (16_000_000_000, 128_000, 25): 5_000,       # a batch brings the day forward
        (4_000_000_000, 128_000, 25): 1_250,        # 4-bit weights, 16-bit cache: four times sooner still
    },
    nudge="One weight read serves the whole batch; a cache serves its own sequence only.",
    means="quantize the weights, and the cache is next. Lesson 03 shrinks it.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Solve weights = batch · context · per_token.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def even_context(weights, per_token, batch):
#     return weights / (batch * per_token)
# ```
#
# </details>

# %% [markdown]
# ### 5 · Harder: fetch it or compute it again?
# A user comes back to yesterday's chat. Its cache was moved out of the card's memory, to a disk or to another machine. You can fetch it, `per_token` bytes for
# each token; or drop it, and run the prefill again at `flops_per_token` FLOPs a token and `peak` FLOP/s. (Take the prefill as compute-bound, and
# leave attention's pairs aside.) From which bandwidth on, in bytes per second, is fetching the faster?

# %% tags=["exercise", "exercise:worth_fetching"]
def worth_fetching(per_token, flops_per_token, peak):
    return ...


lesson.exercise(
    "worth_fetching", worth_fetching,
    cases={
        (100_000, 10e9, 100e12): 1e9,                   # 100 µs of computing for 100 kB
        (131_072, 15e9, 400e12): 3_495_253_333,         # Llama-3-8B at 400 TFLOP/s: a fast SSD is about even
        (524_288, 13.2e9, 400e12): 15_887_515_152,      # Llama-2-7B: four times the bytes, so it takes four SSDs
        (327_680, 138e9, 400e12): 949_797_101,          # Llama-2-70B: costly to compute, small to keep
    },
    nudge="Compare seconds per token with seconds per token.",
    means="the larger the model and the fewer its KV heads, the more a kept cache is worth.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Computing one token takes flops_per_token / peak seconds. In that time, how many bytes must arrive?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def worth_fetching(per_token, flops_per_token, peak):
#     return per_token * peak / flops_per_token
# ```
#
# </details>

# %% [markdown]
# **To take away.** The cache takes one power of n off the work: a whole generation with it does the work of one last step without it. It turns compute into memory,
# so it saves nothing at a few tokens and nearly everything at a few hundred. It costs 2·L·K·H·bytes a token, KV heads and the stated head dimension, and at many users
# or long contexts that, not the weights, is what fills the machine. Which leaves a question: can one remember with fewer bytes? That is lesson 03.
#
# Further reading: Vaswani et al. 2017 (attention); Ainslie et al. 2023 (grouped queries); Kwon et al. 2023, section 3 (the memory a cache takes in a server).
