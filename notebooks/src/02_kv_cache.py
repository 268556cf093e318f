# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["core", "slide"]
# # 02 · What does remembering cost, and save?
#
# ## Question
#
# A chat answers in 300 words; an agent thinks for 30,000 tokens. Each token looks back at all
# earlier ones. Must the model *compute* them again? Plain programs do. Engines keep a **KV
# cache** instead; it fills the card.
#
# **45 minutes**, exercises extra. Before: lesson 01. Afterwards: you have built a KV
# cache and know how many users fit. Skip folded code.

# %% [markdown] tags=["notes"]
# **2 min.** Ask: "at 256 tokens, how many times faster is a token with a cache?" Collect three
# numbers on the board; they return at the guess. Usual wrong answer: 256 times. And ask who has
# seen an out-of-memory error in the middle of a long chat: weights do not grow, the cache does.

# %% tags=["core", "slide", "hide-input"]
import math
from functools import cache as remembered

from clawdemy_course import diagrams
from clawdemy_course.build_02 import CatCache, adapt
from clawdemy_course.reading import how_to_read
from clawdemy_infer.arithmetic import Work, total
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.files import load_model
from clawdemy_infer.from_config import catalog
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.parts import StepOf
from clawdemy_infer.lesson.steps import filled_cache
from clawdemy_infer.lesson.tables import Table, interval, si
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.machine.present import bracketed
from clawdemy_infer.model import generate
from clawdemy_infer.timing import Timing
from clawdemy_infer.variants.named_caches import CACHES

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown, display
from matplotlib.ticker import FixedLocator, NullLocator

plots.use_style()
diagrams.generation()

# %% [markdown] tags=["notes"]
# **2 min.** Show the left side first and count rows aloud: 1, 2, 3, 4, 5. Ask what is red. (Rows
# that were computed before, with the same result.) Then the right side: one row a step. Usual
# objection: "but the new token still looks at all of them". It does: it *reads* their keys and
# values, and does not compute them.

# %% [markdown] tags=["core", "slide"]
# ## Envelope
#
# In each layer the new token's *query* meets the *keys* of all tokens so far; the answer is a
# weighted sum of their *values*. An old token's query is never used again.
#
# Its key and value cannot change: attention is causal, so token 5 sees tokens 1 to 5, whatever
# follows. Not on trust: we run a sentence whole, and its first five tokens alone.

# %% tags=["core", "fragment", "hide-input", "nbval-ignore-output"]
machine = this_machine()
lesson = Lesson("02 kv_cache", machine=machine)
# The matrices as this machine's kernels like them best.
decoder = faster(load_model("smollm2-135m", device=machine.device), "fp32")
shape = catalog.model("smollm2-135m")
L, D, N, K, H, F, V = (getattr(shape, letter) for letter in "LDNKHFV")

ids = decoder.tokenizer.encode("The past does not change. It only becomes longer.")
tokens = torch.tensor([ids], device=decoder.device)
whole, first_five = (ContiguousCache.for_model(decoder, batch=1, capacity=len(ids))
                     for _ in range(2))
decoder(tokens, whole)
decoder(tokens[:, :5], first_five)
pairs = ((whole.keys, first_five.keys), (whole.values, first_five.values))
for ours, theirs in pairs:
    torch.testing.assert_close(ours[..., :5, :], theirs[..., :5, :],
                               rtol=1e-3, atol=1e-3)
apart = max((ours - theirs)[..., :5, :].abs().max().item() for ours, theirs in pairs)
print(f"the first 5 of {len(ids)} tokens: the same keys and values in all {L} layers; "
      f"the largest difference is {apart:.0e}, rounding of fp32")

# %% [markdown] tags=["notes"]
# **2 min.** Ask: "which of Q, K and V of token 5 does token 9 need?" Usual wrong answer: all three.
# Ask what would break the argument: a bidirectional model such as BERT, where token 5 sees token 9.
# There is no KV cache for it.

# %% tags=["core", "slide", "by-line"]
# Lesson 01: L layers, width D, N heads, K for KV, of width H; MLP F, vocabulary V
P, n = 26, 24                           # tokens of the prompt, tokens generated
weights = D * (N + 2 * K) * H + N * H * D + 3 * D * F       # of a layer: QKV, out, MLP

def flops(rows, pairs, steps):          # a pair: q·k and p·v; a step: the LM head
    return L * (2 * weights * rows + 4 * N * H * pairs) + steps * 2 * D * V

rows, pairs = 0, 0                      # without a cache: all of the text in each step
for S in range(P, P + n):               # S tokens so far:
    rows += S                           # each is a row in every matrix product
    pairs += S * (S + 1) // 2           # and looks back at all tokens up to itself
without = flops(rows, pairs, n)

# %% tags=["core", "fragment", "by-line"]
rows, pairs = P, P * (P + 1) // 2       # with one: the prompt once, and then
for S in range(P + 1, P + n):
    rows += 1                           # one row a step,
    pairs += S                          # which looks back at all that is kept
with_cache = flops(rows, pairs, n)

# %% [markdown] tags=["notes"]
# > Count rows and pairs, without a cache and with one
#
# **4 min.** Each line comes at a key press: let the room count rows and pairs, without a cache, then
# with one. Ask: "what are rows and pairs at the end, in terms of S?" (S and S·(S+1)/2: a
# single step without a cache. The next slide says it.) Usual wrong answer for pairs: S² a step. The
# mask halves it: token t looks back at t tokens.

# %% tags=["core", "slide", "hide-input"]
assert (rows, pairs) == (S, S * (S + 1) // 2)   # the last step alone, without a cache
assert without == sum(shape.prefill(1, P + i).flops for i in range(n))
assert with_cache == shape.prefill(1, P).flops + sum(
    shape.decode(1, P + i).flops for i in range(1, n))
assert with_cache - n * 2 * D * V == shape.prefill(1, S).flops - 2 * D * V

S = 256
many, one = shape.prefill(1, S).flops, shape.decode(1, S).flops
assert (many, one) == (flops(S, S * (S + 1) // 2, 1), flops(1, S, 1))
read = (L * weights + V * D) * 4 + L * 2 * K * H * S * 4    # weights, keys and values
Markdown(f"""
In the picture 1 + 1 + 1 + 1 + 1 rows equal the last step's 5 without a cache.
**With a cache, the layers do in a whole generation exactly the work of its last step
without one.**

* {n} tokens after {P}: {si(without, "FLOP")} without, {si(with_cache, "FLOP")} with.
* At 256 tokens both steps read {si(read, "B")}. {many / read:.0f} FLOPs per such byte
  become {one / read:.1f}: compute-bound turns **memory-bound**.
""")

# %% [markdown] tags=["notes"]
# **2 min.** The bold sentence is the one to remember; let somebody say it in their own words. Then ask: "FLOPs fell by two hundred at 256 tokens.
# Does the time?" Usual wrong answer: yes. The weights are read all the same; only activations
# became fewer. Draw the roofline of lesson 00 and move the dot to the left, below the slope.

# %% tags=["core", "slide", "hide-input"]
names = ["llama-2-7b", "llama-3-8b", "llama-2-70b", "qwen3-0.6b", "qwen3-4b"]


lines = []
for each in map(catalog.model, names):
    right = 2 * each.L * each.K * each.H * 2
    assert right == each.kv_bytes_per_token("bf16")
    lines.append([each.name, *map(str, (each.L, each.N, each.K, each.H)),
                  f"{right / 1024:g}",
                  f"{each.streamed_bytes('bf16') / right:,.0f}"])
eight, small = catalog.model("llama-3-8b"), catalog.model("qwen3-0.6b")
display(Markdown(f"""
### What one token leaves in memory

A key and a value for each KV head and layer:

**KV bytes per token = 2 · L · K · H · bytes**

Using N instead of K makes it {eight.N / eight.K:g} times too large for {eight.name};
D/N instead of H makes it {small.D / small.N / small.H:g} of the truth for {small.name}.

Last column: context from which a step at batch 1 reads more cache than weights.
"""))
header = ["model", "L", "N", "K", "H", "KiB per token, bf16", "more cache from, tokens"]
Table(header, lines, header[1:])

# %% [markdown] tags=["notes"]
# **3 min.** Let the room compute Llama-3-8B in the head: 2 · 32 · 8 · 128 · 2 = 128 KiB. Ask which
# model keeps *least* per token for its size: the 70B one keeps less than the 7B one. The two
# ways to get it wrong: N for K (only KV heads are kept), D/N for H
# (`config.json` may state a `head_dim`). A test on Llama-2-7B finds neither. Last column: one long
# chat is enough for Qwen3-0.6B.

# %% [markdown] tags=["core", "slide"]
# ## Guess
#
# SmolLM2-135M on this machine, fp32, at 256 tokens: how long does the next token take **without** a
# cache, and **with** one? How many times faster is that?
#
# At 1 token both steps compute the same. From which **length** on does the cache make a token twice
# as fast?
#
# Write text with a unit over the dots: `"9 hours"`, `"0.1 times"`, `"0.5 tokens"`.

# %% tags=["core", "fragment", "guess", "nbval-ignore-output"]
lesson.guess("a token without a cache, at 256", ...)
lesson.guess("a token with a cache, at 256", ...)
lesson.guess("speed-up at 256", ...)
lesson.guess("length where it is twice as fast", ...)
lesson.card()

# %% [markdown] tags=["notes"]
# **2 min.** Everybody writes four numbers, in the notebook or on paper, before you go on. The
# examples show the units alone: they are absurd, so that they suggest nothing. A napkin helps: 135 M weights of 4
# bytes over the bandwidth; 2 FLOPs a weight and row over the peak. Usual wrong answers: a speed-up
# of 256 or of 200 (rows, or FLOPs), and a crossover at 2.

# %% tags=["core", "slide", "hide-input", "nbval-ignore-output"]
FP32 = {"weights": "fp32", "kv": "fp32", "activations": "fp32"}
# The launches of a step do not depend on its length.
prefill = StepOf(decoder, "prefill", context=256)
decode = StepOf(decoder, "decode", context=256)


def napkin_without(S: int) -> float:
    """2 · L · weights · S FLOPs at peak, or the weights once from memory."""
    return max(L * 2 * weights * S / machine.peak("fp32"), napkin_with(S))


def napkin_with(S: int) -> float:
    """The weights once from memory; the cache, a fraction of them, is dropped."""
    return shape.streamed_bytes("fp32") / machine.bandwidth_at()


def without_cache(S: int):
    """Predicted: a prefill of all S tokens."""
    return machine.time(shape.prefill(1, S, **FP32), prefill.ops)


def with_cache_at(S: int):
    """Predicted: a decode step at context S."""
    return machine.time(shape.decode(1, S, **FP32), decode.ops)


@remembered
def predicted_speedup(S: int) -> tuple[float, float]:
    """The ratio of both, and its half-width: two errors that are not the same one."""
    more, less = without_cache(S), with_cache_at(S)
    return more.seconds / less.seconds, 1 + math.hypot(more.spread, less.spread)


def doubling(speedup) -> int:
    """The first length at which a step without a cache takes twice as long."""
    return next((S for S in range(1, shape.max_context) if speedup(S) >= 2),
                shape.max_context)


lesson.predict("a token without a cache, at 256",
               napkin_without(256), without_cache(256), "s")
for whose in ("a cache", "the library's cache"):
    lesson.predict(f"a token with {whose}, at 256",
                   napkin_with(256), with_cache_at(256), "s")
for S in (64, 256):
    ratio, half = predicted_speedup(S)
    lesson.predict(f"speed-up at {S}", napkin_without(S) / napkin_with(S), ratio, "×",
                   (ratio / half, ratio * half))
lesson.predict("length where it is twice as fast",
               doubling(lambda S: napkin_without(S) / napkin_with(S)),
               doubling(lambda S: predicted_speedup(S)[0]), "tokens",
               (doubling(lambda S: math.prod(predicted_speedup(S))),
                doubling(lambda S: predicted_speedup(S)[0] / predicted_speedup(S)[1])))
later = range(1, n)
lesson.predict(f"all of {n} tokens after {P}, without",
               sum(napkin_without(P + i) for i in range(n)),
               machine.time(total("without", [shape.prefill(1, P + i, **FP32)
                                              for i in range(n)]),
                            n * prefill.ops), "s")
lesson.predict(f"all of {n} tokens after {P}, with",
               napkin_without(P) + sum(napkin_with(P + i) for i in later),
               machine.time(total("with", [shape.prefill(1, P, **FP32), *(
                   shape.decode(1, P + i, **FP32) for i in later)]),
                   prefill.ops + (n - 1) * decode.ops), "s")
display(lesson.reveal("a token without a cache, at 256", "a token with a cache, at 256",
                      "speed-up at 256", "length where it is twice as fast"))
in_lesson_01 = machine.napkin(shape.prefill(1, 256, **FP32))
Markdown("Lesson 01's napkin for 256 rows also counts attention and the LM head: "
         f"{si(in_lesson_01, 's')} with this lesson's peak. Each lesson takes the "
         "machine's speed of its moment (the card).")

# %% [markdown] tags=["notes"]
# > A napkin of three numbers, and the calibrated roofline
#
# **2 min.** The *napkin* knows three numbers: peak, bandwidth, model size. *Predicted* is the
# calibrated roofline: how fast a product of that many rows really runs here, attention's own rate,
# the price of each launch. Ask where they disagree most (with a cache: one row, many launches; the
# usual wrong answer is without, where the times are largest), and why the napkin's crossover lies a
# quarter above twice the ridge in *rows*. (At the ridge in rows computing takes as long as reading,
# at twice as many rows twice as long. An fp32 weight has 4 bytes for 2 FLOPs a row: twice the FLOPs
# per byte of lesson 00, in rows. The quarter is the LM head: a fifth of the weights that are read,
# and computed for one row only.)

# %% [markdown] tags=["core", "slide"]
# ## Build
#
# **A KV cache for one sequence.** In each layer, from 0 on, the decoder calls `append`, then
# `read`. So in mid-step layer 0 has one token more than layer 29: each layer counts its own.
#
# The stub preallocates; `torch.cat` is right too. Where a chunk does not fit, `append` raises
# `ValueError` and changes nothing. The caller may write over `k` and `v` later, never into what
# `read` returns.

# %% [markdown] tags=["notes"]
# **1 min.** Say the contract, not the solution. Ask: "how many tokens has layer 29 while layer 0
# has ten?" (Nine: it has not been called yet.) Usual wrong answer: ten.

# %% tags=["core", "slide", "hide-input"]
diagrams.cache(layers=30, kv_heads=3, head_dim=64, length=5, capacity=12, kv="fp32")

# %% [markdown] tags=["notes"]
# **2 min.** One sheet for each layer, a row for each KV head, a column for each token. `append`
# fills the next column in *one* layer; `truncate(2)` moves the end to the left in *all* layers. Ask
# what must be erased by `truncate`. (Nothing: what lies beyond the end is never read.) Usual wrong
# answer: the bytes. And who calls it? Somebody who regenerates the last answer, or speculative
# decoding, when draft tokens are rejected (lesson 09). The bar counts the appended token too.

# %% tags=["core", "slide", "build"]
class MyCache:
    """Keys and values of one sequence, fp32. append(0, k, v) with k, v [K, 3, H] adds
    three tokens in layer 0; read(0) is then keys and values [K, 3, H]; truncate(2)
    leaves each layer its first 2, or as many as it has."""
    def __init__(self, layers, kv_heads, head_dim, capacity):
        self.capacity = capacity
        self.keys, self.values = torch.zeros(2, layers, kv_heads, capacity, head_dim)
        self.lengths = [0] * layers

    def append(self, layer, k, v):      # into keys[layer, :, start:end] and values
        return ...                      # ValueError beyond the capacity

    def read(self, layer):
        end = self.lengths[layer]
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def truncate(self, length):         # all layers
        return ...

Cache = lesson.build("KVCache", MyCache)

# %% [markdown] tags=["notes"]
# > Write `append` and `truncate`
#
# **8 min.** Six minutes in pairs, about ten lines; `__init__` and `read` are given. An append changes
# nothing where the chunk does not fit. Usual wrong answers, and the checker names
# each with its smallest example: only the last chunk is kept; one length for all layers;
# `truncate` in layer 0 only, or one that makes a layer longer; the caller's tensor kept
# instead of copied; a full cache that silently drops the token (a preallocated slice of width 0
# takes it without an error). Show one student's cache; it runs in the next cell.

# %% [markdown] tags=["core"]
# ## Measure
#
# The same story three times: without a cache, with `Cache` (your class, wrapped by the checker for
# the decoder), with the library's. Greedy, so all three write the *same tokens*. Then single steps.

# %% tags=["core", "slide", "hide-input", "measured", "nbval-ignore-output"]
story = ("Once upon a time, in a small town by the sea, there lived an old clockmaker "
         "who never forgot anything. One day")
caches = {"none": "none", "yours": Cache.for_model(decoder, batch=1, capacity=P + n),
          "library": ContiguousCache.for_model(decoder, batch=1, capacity=P + n)}
told = {whose: generate(decoder, story, max_tokens=n, cache=cache)
        for whose, cache in caches.items()}
assert told["none"].tokens == told["yours"].tokens == told["library"].tokens
display(Markdown(f"> One day{told['yours'].text.split('.')[0]} …"))

with_yours = StepOf(decoder, "decode", context=256,
                    cache=filled_cache(decoder, batch=1, tokens=255, kind=Cache))
lesson.measure("a token without a cache, at 256", prefill)
lesson.measure("a token with a cache, at 256", with_yours)

# %% [markdown] tags=["notes"]
# > The same tokens, sooner
#
# **2 min.** Runs about a minute, with the next cell: meanwhile ask who guessed lowest. If it fails
# or drags, stay on the slide: its numbers are a whole run's, on the machine that built the deck.
# Read the story, then the lines with their spreads. Ask: "why do the three stories agree to the
# token?" Greedy decoding takes the largest logit, and a cache moves it by no more than rounding;
# only two logits that nearly tie could part the stories.

# %% tags=["core", "slide", "hide-input", "measured", "nbval-ignore-output"]
# 1. The whole story, and single steps in turn: a busy moment falls on all alike.
assert (len(told["none"].prompt_tokens), len(told["none"].tokens)) == (P, n)
for kind, whose in (("without", "none"), ("with", "yours")):
    lesson.measure(f"all of {n} tokens after {P}, {kind}",
                   told[whose].ttft_s + (n - 1) * told[whose].tpot_s)
LENGTHS = [1, 8, 16, 32, 64, 128, 256]
steps = {("without", S): StepOf(decoder, "prefill", context=S) for S in LENGTHS} | {
    ("with", S): StepOf(decoder, "decode", context=S,
                        cache=filled_cache(decoder, 1, S - 1, kind=Cache))
    for S in LENGTHS}
times = bracketed(machine)({key: step.run for key, step in steps.items()}, repeats=4)
took = {kind: {S: times[kind, S].median for S in LENGTHS}
        for kind in ("without", "with")}
speedup = {S: took["without"][S] / took["with"][S] for S in LENGTHS}
for S in (64, 256):
    lesson.measure(f"speed-up at {S}", speedup[S])

# 2. Between two lengths a straight line on logarithmic axes.
above = next((k for k, S in enumerate(LENGTHS) if speedup[S] >= 2), 0)
if above:
    pair = LENGTHS[above - 1: above + 1]
    twice = np.interp(np.log(2), np.log([speedup[S] for S in pair]), np.log(pair))
    lesson.measure("length where it is twice as fast", float(np.exp(twice)))

# 3. Draw. In fp32 a row takes 2 FLOPs for the 4 bytes of a weight.
ridge_rows = 2 * machine.ridge("fp32")
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4))
for kind, napkin, predicted, marker in (
        ("without", napkin_without, without_cache, "o"),
        ("with", napkin_with, with_cache_at, "s")):
    said = [predicted(S) for S in LENGTHS]
    only = "_" * (kind == "with")                       # no second entry in the legend
    left.plot(LENGTHS, [napkin(S) for S in LENGTHS], "--", color=plots.NAPKIN,
              label=f"{only}napkin")
    left.plot(LENGTHS, [each.seconds for each in said], color=plots.ROOFLINE,
              label=f"{only}calibrated roofline")
    left.fill_between(LENGTHS, [each.low_s for each in said],
                      [each.high_s for each in said],
                      color=plots.ROOFLINE, alpha=0.12, linewidth=0)
    left.plot(LENGTHS, list(took[kind].values()), marker, color=plots.MEASURED,
              label=f"measured, {kind}")
    left.annotate(f"{kind}\na cache", (256, said[-1].seconds), xytext=(9, 0),
                  va="center", textcoords="offset points", fontsize=9)
left.legend(loc="upper left", fontsize=8)
left.set(xlabel="length, tokens", ylabel="time for one token", ylim=(0, None),
         xlim=(0, 330), xticks=[1, 64, 128, 256],
         title="With a cache the time stays flat …")
plots.units(left.yaxis, "s")
right.plot(LENGTHS, [napkin_without(S) / napkin_with(S) for S in LENGTHS], "--",
           color=plots.NAPKIN)
right.plot(LENGTHS, [predicted_speedup(S)[0] for S in LENGTHS], color=plots.ROOFLINE)
right.plot(LENGTHS, list(speedup.values()), "D", color=plots.MEASURED)
right.axvline(ridge_rows, color=plots.TEXT, linewidth=0.8, linestyle=":")
right.annotate(f"ridge:\n{ridge_rows:.0f} rows", (ridge_rows, 0.98), xytext=(-4, 0),
               xycoords=("data", "axes fraction"), textcoords="offset points",
               fontsize=9, ha="right", va="top")
right.axhline(2, color=plots.TEXT, linewidth=0.8, linestyle=":")
right.annotate("twice as fast", (1, 2), xytext=(0, 3), textcoords="offset points",
               fontsize=9)
right.set(xscale="log", yscale="log", xlabel="length, tokens",
          ylabel="times faster with a cache",
          title="… and at a few tokens it saves little")
for axis, ticks in ((right.xaxis, LENGTHS), (right.yaxis, [1, 2, 4, 8, 16, 32])):
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")
plots.show(fig, "Left, time for one token against the length: at 256 tokens "
                f"{si(took['without'][256], 's')} without a cache, "
                f"{si(took['with'][256], 's')} with one. Right, the speed-up: "
                + ", ".join(f"{speedup[S]:.1f} at {S}" for S in LENGTHS)
                + f". The ridge lies at {ridge_rows:.0f} rows.")
head = shape.streamed_bytes("fp32") / (L * weights * 4)
for name in ("speed-up at 256", "length where it is twice as fast"):
    row = lesson.rows[name]
    guess = f"guess {si(row.guess, row.unit)}, " if row.guess else ""
    print(f"{name}: {guess}napkin {si(row.napkin, row.unit)}, predicted",
          f"{interval(row.low, row.high, row.unit)}, measured",
          si(row.measured, row.unit))
print(f"At {ridge_rows:.0f} rows the layers compute as long as they read. Twice as "
      "long as a cached token: at twice as many\nrows, times "
      f"{head:.2f} (the LM head is read too, and computed for one row only). Here both "
      "steps were timed in\nturn, in the cell before one after the other: the speed-up "
      "is this figure's.")

# %% [markdown] tags=["notes"]
# **3 min.** Left: one line rises with the length, the other is flat. Right: the same as a ratio;
# the dotted upright line is the ridge in rows, twice the fp32 ridge in FLOPs per byte. Ask: "why do
# rows to the left of it cost little?" They share one reading of the weights. That is the room that
# batching (lesson 04) and speculative decoding (lesson 09) use. Usual wrong answer: they are few.
# Go back to the guesses on the board; the lines under the figure answer the last two.

# %% [markdown] tags=["core", "slide"]
# ## Reconcile
#
# A token with your cache, at 256: napkin and stopwatch differ. **What is the largest part of the
# difference?** Commit yourself first:
#
# 1. `"products"`
# 2. `"attention"`
# 3. `"element-wise"`
# 4. `"launches"`
# 5. `"memory was slower than calibrated"`
# 6. `"memory was faster than calibrated"`
# 7. `"not explained"`

# %% tags=["core", "fragment", "guess"]
lesson.cause("a token with a cache, at 256", ...)

# %% [markdown] tags=["notes"]
# **1 min.** Count hands for each cause before the next cell. Usual wrong answer: "attention",
# because the lesson is about it. At 256 tokens the cache is a small part of what a step reads.

# %% tags=["core", "slide", "hide-input", "measured", "nbval-ignore-output"]
def part_s(quantity: str, name: str) -> float:
    return sum(part["measured_s"] for part in lesson.rows[quantity].parts
               if part["name"] == name)


yours, theirs = (f"a token with {whose} cache, at 256"
                 for whose in ("a", "the library's"))
lesson.measure(theirs, decode.time(machine), parts=decode.parts(machine))
lesson.explain(yours)
print(how_to_read(lesson, yours))
if Cache is ContiguousCache:
    print("Your cache is still open, so the library's ran twice, in "
          f"{si(lesson.rows[yours].measured, 's')} and "
          f"{si(lesson.rows[theirs].measured, 's')}: noise from run to run.")
else:
    print(f"Your cache: {si(lesson.rows[yours].measured, 's')} a token, the library's: "
          f"{si(lesson.rows[theirs].measured, 's')}.\nAttention "
          f"{si(part_s(yours, 'attention'), 's')}, the library's "
          f"{si(part_s(theirs, 'attention'), 's')}; launches {with_yours.ops:,.0f}, "
          f"the library's {decode.ops:,.0f}.")

# %% [markdown] tags=["notes"]
# **3 min.** From left to right: the napkin, each part by what it took beyond its share, then
# measured. Products and attention were clocked; launches are a count times a price; element-wise is
# what is left between products; what none accounts for is called "not explained". Who named the
# largest bar? A student's cache and the library's read the same bytes; the times differ by the
# kernels that copies launch and by the Python time of each slice. All predictions beside the stopwatch stand in a table under
# Further.

# %% [markdown] tags=["core", "slide"]
# ## On a GPU
#
# The **ridge point** lies far to the right: the crossover comes later. A **launch** costs host
# time: with many short kernels the host falls behind (CUDA graphs, lesson 10).

# %% tags=["core", "fragment", "hide-input"]
h100, t4 = catalog.machine("h100-sxm"), catalog.machine("t4")
llama, gpt2 = catalog.model("llama-3-8b"), catalog.model("gpt2-124m")


def on_h100(S: int) -> float:
    return h100.napkin(llama.prefill(1, S)) / h100.napkin(llama.decode(1, S))


# Lages 2023, "Transformers KV caching explained": GPT-2, 1,000 tokens after a question
# of 5, on a T4; transformers, which computed the logits of all rows. Mean of ten runs.
published = {"with": 11.885, "without": 56.197}
bound = {"with": t4.napkin(gpt2.prefill(1, 5, logits=5, **FP32)) + sum(
             t4.napkin(gpt2.decode(1, 5 + i, **FP32)) for i in range(1, 1000)),
         "without": sum(t4.napkin(gpt2.prefill(1, 5 + i, logits=5 + i, **FP32))
                        for i in range(1000))}
display(Markdown(
    "**GPT-2, fp32, 1,000 tokens on a T4** (J. Lages 2023). Without a cache, all "
    "tokens' logits count, as in `transformers` then:"),
    Table(["", "without", "with", "times faster"],
          [[name, f"{of['without']:.1f} s", f"{of['with']:.1f} s",
            f"{of['without'] / of['with']:.1f}"]
           for name, of in (("published", published), ("envelope", bound))],
          ["without", "with", "times faster"]), Markdown(
    "**Llama-3-8B, H100, envelope:** twice as fast from "
    f"**{next(S for S in range(1, 8192) if on_h100(S) >= 2)} tokens** on, "
    f"{on_h100(8192):.0f} times at 8,192."))

# %% [markdown] tags=["notes"]
# **2 min.** Ask before the table: "is the cache worth more or less on a GPU?" Usual wrong answer:
# more, because it is faster. It is worth *less*: where both machines compute without a cache and
# read with one, by the ratio of their ridge points, whatever the length. At a few tokens it saves
# little on either. Then compare the table with this machine's own speed-up. Say what nobody here
# measured: what the T4 did in the 10 ms of each cached token beyond its bytes. Lesson 10 has the
# tools to find out.

# %% [markdown] tags=["core", "slide"]
# ## When does it lose?
#
# - **One token of output.** Classify a text: the cache is written, never read.
# - **Memory.** Each user needs room for all of their tokens; that limits how many share a card
#   (lessons 04 and 06).
# - **Long contexts.** Each step reads *all* of the cache, eventually more than the weights (lesson
#   03).
# - **A cache that copies.** `torch.cat` writes everything anew for each token: three times the
#   bytes (Further).

# %% [markdown] tags=["notes"]
# **2 min.** Let the room find the first two. Then ask: "a batch of eight: are the weights read
# eight times? And the caches?" Weights once for all, each cache for its own sequence. So a batch
# brings the length at which the cache is the larger read nearer, by its factor. Usual wrong answer:
# both are read once, or both eight times.

# %% [markdown] tags=["core", "slide"]
# ## Play
#
# Does it fit (no workspace)? Weights in bf16; red names the limit. From 64 users with 8,192 tokens of
# Llama-3-8B on one H100, find
#
# 1. a single change with which 128 users fit;
# 2. the smallest card for 8 users of Qwen3-4B with 32,768 tokens;
# 3. a card for 64 users with 2,048 tokens of Llama-2-70B, but not of LLaMA-30B. Why?

# %% tags=["core", "widget", "hide-input", "nbval-ignore-output"]
FORMATS = ["bf16", "int8", "int4"]


def draw_memory(model: str, on: str, users: int, context: int, kv: str) -> None:
    """Weights and cache against a card's memory and the model's trained context."""
    s, card = catalog.model(model), catalog.machine(on)
    found = s.fits(card.memory, users, context, "bf16", kv)
    both, red = found.weight_bytes + found.kv_bytes, plots.COLOURS[4]
    limits = [] if found else [f"memory: {si(both, 'B')} of {si(card.memory, 'B')}"]
    if s.max_context and context > s.max_context:
        limits.append(f"context: {context:,} of {s.max_context:,}")
    fig = plt.figure(figsize=(7.2, 2.3), layout="none")
    ax = fig.add_axes((0.12, 0.24, 0.85, 0.52))
    blue, orange = plots.COLOURS[0], red if not found else plots.COLOURS[1]
    ax.barh([0, 2], found.weight_bytes, color=blue, height=0.62)
    ax.barh([1], found.kv_bytes, color=orange, height=0.62)
    ax.barh([2], found.kv_bytes, left=found.weight_bytes, color=orange, height=0.62,
            hatch=None if found else "//", edgecolor="white", linewidth=0)
    ax.axvline(card.memory, color=red if not found else plots.TEXT, linestyle="--")
    for y, value in enumerate((found.weight_bytes, found.kv_bytes, both)):
        inside = 0.8 * card.memory < value < card.memory    # not on the line
        ax.text(value, y, f" {si(value, 'B')} ", va="center", weight="bold",
                ha="right" if inside else "left",
                color="white" if inside else plots.TEXT)
    ax.set(xlim=(0, 1.25 * max(both, card.memory)), ylim=(2.5, -0.5))
    ax.set_yticks([0, 1, 2], ["weights", "KV cache", "together"])
    ax.set_xlabel(f"dashed: memory of the card, {si(card.memory, 'B')}")
    plots.units(ax.xaxis, "B")
    ax.grid(visible=False, axis="y")
    verdict = ("DOES NOT FIT: " + "; ".join(limits) if limits else
               f"fits; at most {found.max_batch:,} users would")
    fig.text(0.01, 0.97, f"{s.name} on {card.name}: {users:,} × {context:,} tokens, "
             f"{kv} cache\n{verdict}", va="top", weight="bold",
             color=red if limits else plots.TEXT)
    plots.show(fig, f"{s.name} on {card.name}, {users:,} users of {context:,} tokens, "
                    f"{kv} cache: {verdict}. Weights {si(found.weight_bytes, 'B')}, "
                    f"KV cache {si(found.kv_bytes, 'B')}, together {si(both, 'B')}.")


widgets.play(draw_memory,
             model=widgets.choose("model", catalog.model_names(), "llama-3-8b"),
             on=widgets.choose("card", catalog.machine_names(), "h100-sxm"),
             users=widgets.powers_of_two("users", 1, 512, 64),
             context=widgets.powers_of_two("context", 256, 131072, 8192),
             kv=widgets.choose("KV format", FORMATS))

# %% tags=["core", "fragment", "hide-input"]
draw_memory("llama-3-8b", "h100-sxm", 64, 8192, "bf16")

# %% [markdown] tags=["notes"]
# **3 min.** Ask question 1 live, the others are homework. Switch to the notebook; the figure on the
# slide is the fallback. Move to 128 users: red, and the limit is named. Ask for the single change
# before anybody touches a slider. Right are half the
# context, a model that keeps less per token, a card with 154 GB (not the H200); an int8 cache fits
# on paper, with less than 0.1 % of the card to spare, and so in no engine. Usual wrong
# answer: a model with fewer weights but the same K, H, L. The weights are a fifth of what is used.
# Question 2 has three equal answers: A40, L40S, RTX A6000. Question 3: an MI300X; with GQA the 70B
# model needs 181 GB, the 30B model with multi-head attention 274 GB. Solutions computes all three.

# %% [markdown] tags=["core"]
# ## Check yourself
#
# Numbers in the unit behind each line, or text with a unit (`"16 GB"`). The third is under Further,
# solutions, of Play too, at the end.
#
# **1 · A long agent.** Qwen3-4B in bf16: L = 36, D = 2,560, N = 32, K = 8, head_dim = 128; 8.04 GB
# of weights; a bf16 cache. Each agent keeps 30,000 tokens. How many bytes does a *token* keep, and
# an *agent*? How many *agents* fit on a card with 48 GiB? If 8 agents share the card, what is the
# *longest* context, in tokens, of each?
#
# **2 · A summary.** An 8B model (7·10⁹ weights in its layers, bf16) reads P = 4,000 tokens and
# writes n = 200, alone on a GPU that reaches 400 TFLOP/s and 2.7 TB/s. Count only the layers'
# matrices. With a cache the prefill writes the first token. How many *rows* go through them without
# and with one? How many *seconds* does each take: without one, every step is compute-bound; with
# one, only the prefill is. How many *times faster* is the cache?

# %% tags=["core", "exercise", "exercise:long_agent"]
per_token = ...             # bytes
agent = ...                 # bytes
agents = ...                # a number of agents
longest = ...               # tokens

lesson.steps("long_agent", per_token=per_token, agent=agent, agents=agents,
             longest=longest)

# %% tags=["core", "exercise", "exercise:summary"]
rows_without = ...          # rows
rows_with = ...             # rows
s_without = ...             # seconds
s_with = ...                # seconds
times_faster = ...          # times

lesson.steps("summary", rows_without=rows_without, rows_with=rows_with,
             s_without=s_without, s_with=s_with, times_faster=times_faster)

# %% [markdown] tags=["further", "slide"]
# ### Take with you
#
# 1. With a cache, the layers do in a whole generation the work of its last step without one.
# 2. Computing becomes reading: it saves little at a few tokens, much at a few hundred.
# 3. It costs 2 · L · K · H · bytes a token; users and contexts fill the card.
#
# **Next:** can one remember with fewer bytes? **Homework:** a long agent, a summary,
# yesterday's prompt (Further).

# %% [markdown] tags=["notes"]
# **1 min.** Let three people say one sentence each, with the slide closed. Then the question.

# %% [markdown] tags=["further"]
# ## Further
#
# ### Exercise 3 · Yesterday's prompt
#
# The cache of a 4,000-token prompt of Llama-2-7B (L = 32, K = N = 32, H
# = 128, bf16) was moved to another machine, over 100 Gbit/s. *Fetch* it back, or *compute* it anew,
# at 14 GFLOP a token and 400 TFLOP/s: how many seconds does either take? From which bandwidth on
# are they *even*? For Llama-3-8B (K = 8, the same FLOPs)? What is *better* here for Llama-2-7B,
# `"fetch"` or `"compute"`?

# %% tags=["further", "exercise", "exercise:fetch_or_compute"]
fetch = ...                 # seconds
compute = ...               # seconds
even = ...                  # bytes per second
even_gqa = ...              # bytes per second
better = ...                # "fetch" or "compute"

lesson.steps("fetch_or_compute", fetch=fetch, compute=compute, even=even,
             even_gqa=even_gqa, better=better)

# %% [markdown] tags=["further"]
# ### The library's cache

# %% tags=["further", "hide-input"]
lesson.show("KVCache")

# %% [markdown] tags=["further"]
# ### The powers
# From one token on, n tokens. On two logarithmic axes a power law is a straight line; its slope is
# the exponent.

# %% tags=["further", "hide-input"]
lengths = np.geomspace(1, 8192, 100)
matrices, attention = L * 2 * weights, L * 4 * N * H
square, cube = lengths * (lengths + 1) / 2, lengths * (lengths + 1) * (lengths + 2) / 6
fig, ax = plt.subplots(figsize=(6.4, 3.4))
for label, powers, style in (("without", (square, cube), "-"),
                             ("with", (lengths, square), "--")):
    ax.loglog(lengths, matrices * powers[0], style, color=plots.COLOURS[0],
              label=f"matrix products, {label}")
    ax.loglog(lengths, attention * powers[1], style, color=plots.COLOURS[1],
              label=f"attention, {label}")
for power, x, y, shift, side in (
        ("n²", 200, matrices * 200**2 / 2, (-3, 4), "right"),
        ("n³", 400, attention * 400**3 / 6, (-3, 3), "right"),
        ("n", 40, matrices * 40, (-2, 5), "right"),
        ("n²", 600, attention * 600**2 / 2, (4, -4), "left")):
    ax.annotate(f"∝ {power}", (x, y), xytext=shift, textcoords="offset points", ha=side,
                va="center")
ax.set(xlabel="tokens generated, n", ylabel="work in all",
       xlim=(1, 8192), ylim=(1e5, 1e17),
       title="A cache takes one power of n off the work (SmolLM2-135M)")
ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
plots.units(ax.yaxis, "FLOP")
ax.legend(loc="upper left")
plots.show(fig, "Work of generating n tokens, both axes logarithmic. Without a cache "
                "matrix products rise with n squared, attention with n cubed; with one "
                "with n and n squared.")

# %% [markdown] tags=["further"]
# ### What the step without a cache waits for
# The same account for the other step. Its napkin is FLOPs over peak.

# %% tags=["further", "nbval-ignore-output"]
lesson.explain("a token without a cache, at 256")

# %% [markdown] tags=["further"]
# ### A long context, and a cache that copies
# "Flat" was too strong: a token looks at all that is kept. How much longer is a step that looks
# back at 2,048 tokens instead of 64 (napkin: the bytes of 1,984)? And one whose cache grows by
# `torch.cat` (napkin: 2,047 tokens, read and written)? Each is a difference, round by round.

# %% tags=["further", "guess"]
lesson.guess("attention to 2,048 tokens adds, over 64", ...)
lesson.guess("growing by torch.cat adds, at 2,048", ...)

# %% tags=["further", "hide-input", "measured", "nbval-ignore-output"]
per_token = shape.kv_bytes_per_token("fp32")
copied = Work(0, 2 * 2047 * per_token, "element-wise", "fp32")
attends, copies = ("attention to 2,048 tokens adds, over 64",
                   "growing by torch.cat adds, at 2,048")
lesson.predict(attends, 1984 * per_token / machine.bandwidth_at(),
               with_cache_at(2048) - with_cache_at(64), "s")
lesson.predict(copies, machine.napkin(copied), machine.time(copied), "s")
display(lesson.reveal(attends, copies))

kinds = {"short": (64, ContiguousCache), "long": (2048, ContiguousCache),
         "cat": (2048, adapt(CatCache))}
contexts = {name: StepOf(decoder, "decode", context=S,
                         cache=filled_cache(decoder, 1, S - 1, kind=kind))
            for name, (S, kind) in kinds.items()}
runs = bracketed(machine)({name: step.run for name, step in contexts.items()},
                          repeats=15)


def added(more: str, less: str) -> Timing:
    pairs = zip(runs[more].seconds, runs[less].seconds, strict=True)
    return Timing(tuple(a - b for a, b in pairs), runs[more].around)


attending = {name: contexts[name].parts(machine).measured["attention"]
             for name in ("short", "long")}
lesson.measure(attends, added("long", "short"), parts=[{
    "name": "attention", "napkin_s": lesson.rows[attends].napkin,
    "predicted_s": lesson.rows[attends].predicted,
    "measured_s": max(attending["long"] - attending["short"], 0.0)}])
lesson.measure(copies, added("cat", "long"))
Table(["a step at 2,048 tokens", "bytes moved for the cache", "whole step"],
      [["preallocated", si(2048 * per_token, "B"), si(runs["long"].median, "s")],
       ["torch.cat", si(2048 * per_token + copied.bytes, "B"),
        si(runs["cat"].median, "s")]],
      ["bytes moved for the cache", "whole step"])

# %% tags=["further", "nbval-ignore-output"]
lesson.explain("attention to 2,048 tokens adds, over 64")

# %% [markdown] tags=["further"]
# A layer's keys and values of 2,048 tokens are 3.1 MB. If they stay in a processor's cache from
# `torch.cat` to attention, a count that adds the copy's bytes to attention's counts bytes that never
# moved:

# %% tags=["further", "nbval-ignore-output"]
lesson.explain("growing by torch.cat adds, at 2,048")
print(how_to_read(lesson, "growing by torch.cat adds, at 2,048"))

# %% tags=["further", "nbval-ignore-output"]
lesson.table()

# %% [markdown] tags=["further"]
# ### Five caches, one interface
# The decoder does not care where the bytes lie. They can be kept in *pages* of 16 tokens that are
# handed out as they are needed (lesson 06); as a *window* of the newest 256 tokens and the first 4;
# in *8 or 4 bits* (lesson 03, with what that costs in quality). Three sequences of 777 tokens,
# counted by hand before anything is allocated:

# %% tags=["further"]
numbers = 2 * L * K * H                             # of one token: a key and a value
by_hand = {
    "contiguous": 3 * 777 * numbers * 4,        # room for every token from the start
    "paged": 3 * 49 * 16 * numbers * 4,         # 49 blocks of 16 tokens each
    "window": 3 * (256 + 4) * numbers * 4,      # whatever the length
    "int8": 3 * 777 * 2 * L * K * (H + 2),      # a byte each, a 16-bit scale a head
    # half a byte, scale and zero point for 32 numbers; a buffer of 32 tokens in fp32
    "int4": 3 * numbers * (768 * (0.5 + 4 / 32) + 32 * 4),
}
for name, bytes in by_hand.items():
    assert CACHES[name](decoder, 3, 777).allocated_bytes == bytes
Table(["cache", "bytes", "of contiguous, fp32"],
      [[name, f"{bytes:,.0f}", f"{bytes / by_hand['contiguous']:.0%}"]
       for name, bytes in by_hand.items()], ["bytes", "of contiguous, fp32"])

# %% [markdown] tags=["further"]
# Further reading: Vaswani et al. 2017 (attention); Ainslie et al. 2023 (grouped queries); Kwon et
# al. 2023, section 3 (the memory that a cache takes in a server); Pope et al. 2022 (inference cost
# with a cache, at scale).

# %% [markdown] tags=["solution"]
# ## Solutions

# %% [markdown] tags=["solution", "solution:KVCache"]
# <details><summary>KVCache</summary>
#
# ```python
# class MyCache:
#     def __init__(self, layers, kv_heads, head_dim, capacity):
#         self.capacity = capacity
#         self.keys = torch.zeros(layers, kv_heads, capacity, head_dim)
#         self.values = torch.zeros(layers, kv_heads, capacity, head_dim)
#         self.lengths = [0] * layers
#
#     def append(self, layer, k, v):
#         start = self.lengths[layer]
#         end = start + k.shape[1]
#         if end > self.capacity:
#             raise ValueError(f"{end} tokens, but the capacity is {self.capacity}")
#         self.keys[layer, :, start:end] = k          # copies, so the caller may reuse k
#         self.values[layer, :, start:end] = v
#         self.lengths[layer] = end
#
#     def read(self, layer):
#         end = self.lengths[layer]
#         return self.keys[layer, :, :end], self.values[layer, :, :end]   # views: no copy
#
#     def truncate(self, length):
#         self.lengths = [min(length, each) for each in self.lengths]
# ```
#
# </details>

# %% tags=["solution", "hide-input"]
def fitting(model, users, context, cards):
    return [card for card in cards
            if catalog.model(model).fits(catalog.machine(card).memory, users, context)]


def called(cards):
    return ", ".join(catalog.machine(card).name for card in cards)


cards = catalog.machine_names()
larger = fitting("llama-3-8b", 128, 8192, cards)
enough = fitting("qwen3-4b", 8, 32_768, cards)
least = min(catalog.machine(card).memory for card in enough)
smallest = [card for card in enough if catalog.machine(card).memory == least]
both = fitting("llama-30b", 64, 2048, cards)
one = [card for card in fitting("llama-2-70b", 64, 2048, cards) if card not in both]
big, mha = catalog.model("llama-2-70b"), catalog.model("llama-30b")
Markdown(f"""<details><summary>Play</summary>

1. Half the context, an int8 cache (on paper: it fills the card), a model that keeps
   less per token, or a card with more memory: {called(larger)}.
2. {called(smallest)}.
3. {called(one)}. {big.name} shares each KV head among {big.N // big.K} query
   heads ({big.kv_bytes_per_token() / 1024:,.0f} KiB per token); {mha.name} has
   multi-head attention, {mha.K} KV heads ({mha.kv_bytes_per_token() / 1024:,.0f} KiB).

</details>""")

# %% [markdown] tags=["solution", "solution:long_agent"]
# <details><summary>A long agent</summary>
#
# ```python
# per_token = 2 * 36 * 8 * 128 * 2                    # neither N = 32 nor D/N = 80
# agent = 30_000 * per_token
# free = 48 * 2**30 - 8.04e9                          # one copy of the weights for all
# agents = free // agent
# longest = free / 8 / per_token
# ```
#
# </details>

# %% [markdown] tags=["solution", "solution:summary"]
# <details><summary>A summary</summary>
#
# ```python
# P, n, weights = 4_000, 200, 7e9
# rows_without = n * (2 * P + n - 1) / 2              # P, P + 1, ... P + n - 1
# rows_with = P + n - 1                               # nobody reads the last token
# s_without = 2 * weights * rows_without / 400e12
# s_with = 2 * weights * P / 400e12 + (n - 1) * 2 * weights / 2.7e12     # FLOPs, then bytes
# times_faster = s_without / s_with
# ```
#
# </details>

# %% [markdown] tags=["solution", "solution:fetch_or_compute"]
# <details><summary>Yesterday's prompt</summary>
#
# ```python
# per_token, link = 2 * 32 * 32 * 128 * 2, 100e9 / 8  # bits are not bytes
# computing = 14e9 / 400e12                           # seconds a token
# fetch = 4_000 * per_token / link
# compute = 4_000 * computing
# even = per_token / computing
# even_gqa = even / 4                                 # a quarter of the KV heads
# better = "compute"
# ```
#
# </details>
