# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["core", "slide"]
# # 04 · Where does a batch stop being free?
#
# ## Question
#
# A step reads all weights to write one token; arithmetic stands idle. A second user's token can
# share that reading: two tokens for the price of one. How many users share before somebody pays, in
# time or in memory?
#
# **45 minutes**, exercises extra. Before: lessons 01, 02. Afterwards: you have built selective
# batching and know a batch's knees. Skip folded code.

# %% [markdown] tags=["notes"]
# **2 min.** Ask: "one H100 serves one user of an 8B model. How many can it serve at the same speed,
# if each is at 4,096 tokens?" Collect numbers on the board; the third slide of the envelope answers.
# Usual wrong answer: about 300, the ridge point. Ask also what a batch does *not* share. (The
# caches: everybody has their own past.)

# %% tags=["core", "slide", "hide-input"]
import math
from itertools import pairwise

from clawdemy_course import diagrams
from clawdemy_course.build_04 import as_it_is
from clawdemy_course.figures import beside, pareto
from clawdemy_course.reading import how_to_read
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.files import load_model
from clawdemy_infer.from_config import catalog
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.parts import StepOf
from clawdemy_infer.lesson.steps import filled_cache
from clawdemy_infer.lesson.tables import Table, interval, number, si
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.machine.present import bracketed
from clawdemy_infer.model import generate
from clawdemy_infer.published.rows import read as published_runs

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown, display
from matplotlib.ticker import LogLocator

plots.use_style()
diagrams.batch()

# %% [markdown] tags=["notes"]
# **2 min.** Three sequences, five new rows: two decode, one brings a prompt of three. Follow one row
# with a finger. Ask at each column: "does this part know whose row it is?" Only attention does; the
# products multiply rows. Usual wrong answer: sequences must be equally long to share a step. Bars
# below: the blue one stays as it is, whatever the batch; the orange one grows with users *and*
# contexts.

# %% [markdown] tags=["core", "slide"]
# ## Envelope
#
# One decode step of SmolLM2-135M in fp32, for B sequences of S tokens. Which lines have a B in
# them?

# %% tags=["core", "fragment", "by-line"]
s = catalog.model("smollm2-135m")
L, D, N, K, H, F, V = (getattr(s, letter) for letter in "LDNKHFV")
B, S, e = 16, 512, 4                                # e: bytes of a number
w = L * (D * (N + 2 * K) * H + N * H * D + 3 * D * F) + D * V   # layers, LM head
k = 2 * L * K * H * e                               # bytes that one token keeps

bytes = e * w                                       # weights: once, whatever B
flops = 2 * w * B                                   # multiply, add: each sequence
bytes += B * S * k                                  # caches: each has its own
flops += B * S * 4 * L * N * H                      # attention: each over its own

assert flops == s.decode(B, S, weights="fp32", kv="fp32", activations="fp32").flops

# %% [markdown] tags=["core"]
# Only the weights' bytes are without a B: they are what a batch shares. So the matrices' intensity,
# 2·B/e FLOPs per byte, grows with the batch. Attention's has a B above and a B below: 2·N/(K·e), for
# one user as for a thousand. **Attention does not get cheaper in a batch.** Nobody else can use my
# keys. Lesson 03 makes them fewer; a batch cannot.

# %% [markdown] tags=["notes"]
# > Count bytes and FLOPs, and look for the B
#
# **3 min.** A line at each key press; the room says "with B" or "without" before it appears. One of
# the four is without: the weights' bytes. Then ask for the intensity of the matrices (2·B/e, it
# grows with the batch) and of attention (4·N·H over 2·K·H·e, it does not: nobody else can use my
# keys). Usual wrong answer: attention gets cheaper in a batch too.

# %% tags=["core", "slide", "hide-input"]
FP32 = {"weights": "fp32", "kv": "fp32", "activations": "fp32"}
step = s.decode(B, S, **FP32)
assert bytes == e * w + s.kv_bytes(B, S, "fp32")
assert bytes < step.bytes < 1.05 * bytes            # activations, norms: left out
matrices, attention = 2 * w * B / (e * w), 4 * L * N * H / k    # FLOPs per byte
assert (matrices, attention) == (2 * B / e, 2 * N / K / e)


def numbers_in(s) -> float:
    """What each token is multiplied by, the LM head with it."""
    return s.matrix_parameters() + s.D * s.V


assert numbers_in(s) == w
h100, llama = catalog.machine("h100-sxm"), catalog.model("llama-3-8b")
R, w_8b, k_8b = h100.ridge("bf16"), numbers_in(llama), llama.kv_bytes_per_token("bf16")


def in_bytes(B: float, S: float) -> tuple[float, float, float]:
    """Weights, caches, and arithmetic as the bytes that are read meanwhile."""
    return 2 * w_8b, B * S * k_8b, 2 * w_8b * B / R


def intensity(B: float, S: float) -> float:
    return 2 * w_8b * B / sum(in_bytes(B, S)[:2])


even = 2 * w_8b / (R * k_8b)
weights_, caches_, arithmetic_ = in_bytes(R * 2 / 2, even)
assert math.isclose(weights_, arithmetic_) and math.isclose(weights_, caches_)
assert math.isclose(intensity(1e12, even), R, rel_tol=1e-6)     # never more, beyond
assert all(intensity(B, 1.01 * even) < R for B in np.geomspace(1, 1e12))
Markdown("""
A machine of ridge point R does R FLOPs while it reads a byte. In bytes, a step takes

**max( e·w + B·S·k, 2·w·B / R )**

All share `e·w`, the weights. What catches up with them?

* **Arithmetic**, at `B = R·e/2`. No model in it, no context.
* **Caches**, at `B = e·w/(S·k)`. No machine in it.

Both at `S = 2·w/(R·k)`. Beyond it **no batch is compute-bound**.
""")

# %% [markdown] tags=["notes"]
# > Two reasons to stop: two knees
#
# **3 min.** Let the room derive both: set each term equal to the weights. Attention's own FLOPs are
# few and left out. The last sentence is the limit: with users without end the intensity tends to
# 2·w/(S·k), and that falls below R. Usual wrong answer: "a batch that is large enough always
# computes". Asserted behind this slide, for batches up to 10¹².

# %% tags=["core", "slide", "hide-input"]
rows = []
for name in ("smollm2-135m", "qwen3-0.6b", "llama-2-7b", "llama-3-8b", "llama-2-70b"):
    each = catalog.model(name)
    read, kept = 2 * numbers_in(each), each.kv_bytes_per_token("bf16")
    rows.append([each.name.removesuffix("-Instruct"), si(read, "B"), si(kept, "B"),
                 f"{R:.0f}",
                 *(f"{read / (S * kept):,.0f}" for S in (512, 4096, 32_768)),
                 f"{read / (R * kept):,.0f}"])
columns = ["model", "weights", "KV per token", "arithmetic", "caches, 512", "at 4,096",
           "at 32,768", "both at, tokens"]
display(Markdown("### At which batch? bf16 on an H100"),
        Table(columns, rows, columns[1:]),
        Markdown(f"The rule of thumb, about {R:.0f}, holds at short contexts. At 4,096 "
                 f"tokens caches of {llama.name} catch up at "
                 f"**{2 * w_8b / (4096 * k_8b):.0f} sequences**."))

# %% [markdown] tags=["notes"]
# **2 min.** Ask the room to read one row aloud. Compare with the numbers on the board. Then ask why
# Llama-2-7B, with *fewer* weights than Llama-3-8B, comes to its knee at a fifth of the users: 32 KV
# heads against 8. Usual wrong answer: a smaller model takes a larger batch. Where there stands a 0,
# one sequence alone reads more cache than weights.

# %% tags=["core", "slide", "hide-input"]
def room(S: float) -> float:
    """Sequences of S tokens that fit on the H100 beside the weights."""
    return (h100.memory - llama.stored_bytes("bf16")) / (S * k_8b)


def full_card(S: int) -> tuple[int, float]:
    """The batch that fills the card, and the seconds of its arithmetic."""
    B = llama.fits(h100.memory, 1, S).max_batch
    return B, llama.decode(B, S).flops / h100.peak("bf16")


law = h100.memory / h100.bandwidth_at()
holds = next(S for S in range(1, 8192) if full_card(S)[1] < law)
contexts = np.geomspace(32, 65_536, 240)
# Arithmetic takes as long as all reading; caches are as large as the weights.
short = np.minimum(contexts, 0.999 * even)
computes_from = 2 * w_8b / (2 * w_8b / R - short * k_8b)
caches_from = 2 * w_8b / (contexts * k_8b)
for B, S in zip(computes_from, short, strict=True):
    assert math.isclose(in_bytes(B, S)[2], sum(in_bytes(B, S)[:2]))
computed = (contexts < even) & (computes_from < room(contexts))
cached = contexts >= even / 2                   # there both curves meet
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.5))
left.plot(contexts[computed], computes_from[computed], color=plots.COLOURS[3])
left.plot(contexts[cached], caches_from[cached], color=plots.COLOURS[1])
left.plot(contexts, room(contexts), color=plots.TEXT)
left.fill_between(contexts, room(contexts), 16_384, facecolor="none", hatch="//",
                  edgecolor=plots.TEXT, linewidth=0, alpha=0.35)
for x, y, said, turned in (
        (45, 9, "weights:\na batch is free", 0), (36, 1100, "arithmetic", 0),
        (2300, 74, "caches", -35)):
    left.text(x, y, said, va="center", rotation=turned)
left.annotate("does not fit", (0.97, 0.9), xycoords="axes fraction", ha="right",
              weight="bold")
left.set(yscale="log", ylabel="batch", ylim=(1, 16_384), title="What a step waits for")
left.set_yticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4,096"])
left.grid(False)
computing = np.array([full_card(round(S))[1] for S in contexts])
right.plot(contexts, np.maximum(computing, law), color=plots.COLOURS[5], linewidth=6,
           alpha=0.4, label="a full card's step")
right.axhline(law, color=plots.COLOURS[1], label="memory over bandwidth")
right.plot(contexts, computing, "--", color=plots.COLOURS[3], label="arithmetic")
for S, shift in ((64, (8, -3)), (4096, (-30, 8))):
    at = max(law, full_card(S)[1])
    right.plot([S], [at], "o", color=plots.TEXT)
    right.annotate(f"{full_card(S)[0]:,} × {S:,} tokens", (S, at), xytext=shift,
                   textcoords="offset points", fontsize=9)
right.set(ylabel="time of a step", ylim=(0, 0.16), title="The card is full: how long?")
plots.units(right.yaxis, "s")
right.legend(loc="center right", bbox_to_anchor=(1, 0.55), fontsize=8)
for ax in (left, right):
    ax.set(xscale="log", xlabel="context, tokens", xlim=(32, 65_536))
    ax.set_xticks([64, 512, 4096, 32_768], ["64", "512", "4,096", "32,768"])
    ax.minorticks_off()
brief, computes = full_card(64)
plots.show(fig, f"{llama.name} on an H100, bf16, by envelope. Left, a map of context "
                "and batch: small batches wait for weights, long contexts for caches, "
                "large batches of short contexts for arithmetic; beyond a line there "
                f"is no room. Right, the step of a full card: {si(law, 's')} from "
                f"{holds} tokens on, {si(computes, 's')} at 64.")
display(Markdown(f"{llama.name}, H100, bf16. **A full card takes memory over bandwidth "
                 f"per step, {si(law, 's')}**, from **{holds} tokens** on. At 64 "
                 f"tokens {brief:,} sequences fit: their arithmetic takes "
                 f"{si(computes, 's')}, {computes / law:.1f} times as long."))

# %% [markdown] tags=["notes"]
# > All that a card can do, on one map
#
# **4 min.** Left: begin at the lower left and walk up at 64 tokens: weights, arithmetic, no room.
# Walk up at 4,096: weights, caches, no room. The lines of caches and of room are parallel. Right: a
# card that is full of caches reads everything it has once a step, so memory over bandwidth is its
# time, with no model in it. Ask: "whatever the context?" Usual wrong answer: yes. The shorter the
# contexts, the more sequences fit, and each brings FLOPs.

# %% tags=["core", "hide-input", "nbval-ignore-output"]
machine = this_machine()
lesson = Lesson("04 batching", machine=machine)

# %% [markdown] tags=["core", "slide"]
# ## Guess
#
# SmolLM2-135M here, fp32, all sequences at 64 tokens, or all at 512. Call **knee** the batch from
# which a step takes more than *twice* as long as for one sequence.
#
# Where are both knees? How many times the tokens/s of one user do 64 users get together? How long is
# a step of 64 at 512 tokens?
#
# Write text with a unit: `"0.1 sequences"`, `"0.1 times"`, `"9 hours"`.

# %% tags=["core", "fragment", "guess", "nbval-ignore-output"]
lesson.guess("knee, context 64", ...)
lesson.guess("knee, context 512", ...)
lesson.guess("throughput of 64 over 1, context 64", ...)
lesson.guess("step, batch 64, context 512", ...)
lesson.card()

# %% [markdown] tags=["notes"]
# **2 min.** Everybody writes four numbers before you go on. The examples are absurd, so that they
# suggest nothing. Help: the machine's ridge in fp32 is peak over bandwidth, both on the card, and
# e is 4 here. Usual wrong answers: 64 times the throughput; a knee at R·e/2 and not near twice of it
# (the napkin lets a machine compute *while* it reads, so at R·e/2 nothing has become slower yet).

# %% tags=["core", "slide", "hide-input", "nbval-ignore-output"]
# The matrices as this machine's kernels like them best.
decoder = faster(load_model("smollm2-135m", device=machine.device), "fp32")
BATCHES, SHORT, LONG = [1, 2, 4, 8, 16, 32, 64], 64, 512
WIDE = [2**i for i in range(15)]            # predictions look further than we measure
PROMISE = 0.1                               # seconds a token
ops = StepOf(decoder, "decode").ops
works = {S: {B: s.decode(B, S, **FP32) for B in WIDE} for S in (SHORT, LONG)}
napkins = {S: {B: machine.napkin(work) for B, work in works[S].items()} for S in works}
predicted = {S: {B: machine.time(work, ops) for B, work in works[S].items()}
             for S in works}


def reached(seconds: dict[int, float], limit: float) -> float | None:
    """The batch from which on a step takes longer than `limit`; between two batches, a
    straight line on log-log axes. From above: a bump before it is no knee."""
    for low, high in reversed(list(pairwise(sorted(seconds)))):
        if seconds[low] <= limit < seconds[high]:
            slope = math.log(seconds[high] / seconds[low]) / math.log(high / low)
            return low * math.exp(math.log(limit / seconds[low]) / slope)
    return None


def knee(seconds: dict[int, float]) -> float | None:
    return reached(seconds, 2 * seconds[1])


def gain(seconds: dict[int, float]) -> float:
    """Tokens/s of 64 sequences over those of one."""
    return 64 * seconds[1] / seconds[64]


def kept(seconds: dict[int, float]) -> float | None:
    return reached(seconds, PROMISE)


def predict(quantity: str, of, napkins: dict, steps: dict, unit: str) -> None:
    """What follows from several steps. Its interval: one sequence's step off one way,
    all others the other way, each by 1/√2 of its spread: two errors, not the same."""
    said = of(napkins), of({B: each.seconds for B, each in steps.items()})
    ends = [of({B: each.seconds * (1 + each.spread) ** (
        (sign if B == 1 else -sign) / math.sqrt(2)) for B, each in steps.items()})
        for sign in (1, -1)]
    if None not in (*said, *ends):
        lesson.predict(quantity, *said, unit, (min(ends), max(ends)))


for S in (SHORT, LONG):
    for B in (1, 4, 16, 64):
        lesson.predict(f"step, batch {B}, context {S}", napkins[S][B],
                       predicted[S][B], "s")
    predict(f"knee, context {S}", knee, napkins[S], predicted[S], "sequences")
    predict(f"throughput of 64 over 1, context {S}", gain, napkins[S], predicted[S],
            "×")
    predict(f"batch at {si(PROMISE, 's')} a token, context {S}", kept, napkins[S],
            predicted[S], "sequences")
asked = ["knee, context 64", "knee, context 512", "throughput of 64 over 1, context 64",
         "step, batch 64, context 512"]
display(lesson.reveal(*(each for each in asked if each in lesson.rows)))
ridge = machine.ridge("fp32")
Markdown(f"By hand: a ridge of {ridge:.1f} FLOPs per byte. Arithmetic catches up at "
         f"R·e/2 = {2 * ridge:.0f} sequences. Caches: at {4 * w / (SHORT * k):.0f} of "
         f"{SHORT} tokens, at {4 * w / (LONG * k):.0f} of {LONG}. By napkin a step is "
         "twice as long at R·e or at W/c + 2 sequences, W the weights, c one cache, "
         "whichever comes first.")

# %% [markdown] tags=["notes"]
# > Two knees by hand, and the calibrated roofline
#
# **2 min.** Which of the two knees comes first at 64 tokens, which at 512? Read it off the
# line below the table. The calibrated roofline knows in addition how fast a product of B rows runs
# here (lesson 00): a batch *is* the number of rows. Ask where napkin and roofline disagree most.
# Usual wrong answer: at one sequence, because it is the smallest.

# %% [markdown] tags=["core", "slide"]
# ## Build
#
# **Selective batching** (Yu et al. 2022, Orca, section 3.2): sequences of any lengths in *one*
# forward pass. One brings a prompt, another its newest token.
#
# - **Together:** embedding, QKV, output, MLP. Rows behind rows, no padding.
# - **Each alone:** attention, over its own cache.
# - **Positions** count on in each sequence: RoPE turns by them.
# - **Logits:** of the last row of each sequence.

# %% [markdown] tags=["notes"]
# **2 min.** Go back to the diagram: the four points are its four columns. Ask: "a batch of one
# prompt of 3,000 tokens and 20 decoding users: how many rows?" (3,020.) Usual wrong answer: 21 times
# 3,000, all padded to the longest. That difference is why engines do this.

# %% tags=["core", "slide", "build"]
def my_step(model, new, caches):
    """Logits [B, V] of each sequence's next token. new = [[5, 9, 2], [7]]: sequence 0
    brings three tokens, sequence 1 one. caches[i].length tokens of it came before;
    caches[i].attend(layer, q, k, v) keeps its k, v and returns what its q finds.
    Example: with lengths 0 and 4, M = 4 rows have the positions [0, 1, 2, 4]."""
    counts = [len(tokens) for tokens in new]
    x = model.embed([token for tokens in new for token in tokens])      # [M, D]
    positions = ...                                     # M of them
    for layer in range(model.L):
        q, k, v = model.qkv(layer, x, positions)        # [M, N, H], [M, K, H] twice
        parts = ...                                     # each one's rows to its cache
        x = model.mlp(layer, x, torch.cat(parts))       # together again, [M, N·H]
    return model.head(...)                              # of B rows of x

Batched = lesson.build("selective_batching", my_step)

# %% [markdown] tags=["notes"]
# > Fill in positions, attention, and the last rows
#
# **8 min.** Six minutes in pairs, about ten lines. `model` is the decoder's own parts; `qkv` has
# norm and RoPE in it, `mlp` the output matrix and both residuals. Usual wrong answers, each named by the checker
# with a small example: positions 0 to M-1 as if it were one text; positions that forget the past;
# equal shares, M // B rows each; a slice that stands still; `x[-1:]`, the last row of the batch; a loop
# over sequences around everything, which reads the weights B times. `split` makes it short.

# %% [markdown] tags=["core"]
# ## Measure
#
# Four sentences of different lengths; the last one joins when the others decode already. Each must
# go on as it does alone: the same tokens.

# %% tags=["core", "slide", "measured", "nbval-ignore-output"]
batched = Batched(decoder)                  # its steps are yours
texts = ["The capital of France is", "It takes two hours to get",
         "The best way to bake a",
         "Once upon a time there was a small town by the sea, and in it"]
prompts = [decoder.tokenizer.encode(text) for text in texts]
cache = ContiguousCache.for_model(batched, batch=4, capacity=40)
new, told = dict(enumerate(prompts[:3])), [[], [], [], []]
for step in range(12):
    if step == 2:
        new[3] = prompts[3]                 # joins with its whole prompt
    tokens = batched.step(new, cache).argmax(-1).tolist()
    for i, token in zip(new, tokens, strict=True):
        told[i].append(token)
    new = {i: [token] for i, token in zip(new, tokens, strict=True)}
alone = [generate(decoder, prompt, max_tokens=12).tokens for prompt in prompts]
assert told[:3] == alone[:3] and told[3] == alone[3][:10]
for text, tokens in zip(texts, told, strict=True):
    print(text + decoder.tokenizer.decode(tokens).replace("\n", " "))

# %% [markdown] tags=["notes"]
# > Four sentences in one batch, one of them late
#
# **2 min.** Read two of them aloud. Ask: "in the third step, how many rows pass the products?" (Three
# decode, the fourth brings its whole prompt: 3 + its tokens.) Usual wrong answer: four. Which product
# is chosen depends on the number of rows, so logits differ by rounding; only two logits that nearly
# tie could part the texts. A request that joins at any step: lesson 05 makes a scheduler of it.

# %% tags=["core", "slide", "hide-input", "measured", "nbval-ignore-output"]
# 1. One cache of 64 sequences; a batch uses the first of them, and nothing is copied.
capacity = s.fits(4 * 2**30, 64, LONG, "fp32", "fp32")
assert capacity                                 # 4 GiB: what a lesson allows itself


def everybody(batch: int, S: int) -> ContiguousCache:
    """Room for S tokens of each; all have the same past: a step costs the same."""
    cache = ContiguousCache.for_model(decoder, batch, S)
    one = filled_cache(decoder, batch=1, tokens=S - 1)
    for whole, real in zip(cache.tensors, one.tensors, strict=True):
        whole[:] = real
    cache.length = S - 1
    return cache


def time_batches(rounds: int) -> tuple[dict, list[dict]]:
    """Timings of a step by (batch, context), by turns; and the parts of the largest."""
    large = everybody(64, LONG)
    assert large.allocated_bytes == capacity.kv_bytes           # to the byte

    def first(B: int, S: int) -> ContiguousCache:
        cache = ContiguousCache.for_model(decoder, B, 1)
        cache.keys, cache.values = large.keys[:, :B], large.values[:, :B]
        cache.capacity, cache.length = LONG, S
        return cache

    steps = {(B, S): StepOf(batched, "decode", B, S, first(B, S))
             for S in (SHORT, LONG) for B in BATCHES}
    if Batched is not as_it_is:
        steps["library"] = StepOf(decoder, "decode", 64, LONG, first(64, LONG))
    times = bracketed(machine)({case: step.run for case, step in steps.items()}, rounds)
    return times, list(steps[64, LONG].parts(machine, 2))


times, parts = time_batches(rounds=3)
took = {S: {B: times[B, S].median for B in BATCHES} for S in (SHORT, LONG)}
for S in (SHORT, LONG):
    for B in (1, 4, 16, 64):
        lesson.measure(f"step, batch {B}, context {S}", times[B, S],
                       parts=parts if (B, S) == (64, LONG) else ())
    lesson.measure(f"throughput of 64 over 1, context {S}", gain(took[S]))
    for quantity, found in ((f"knee, context {S}", knee(took[S])),
                            (f"batch at {si(PROMISE, 's')} a token, context {S}",
                             kept(took[S]))):
        if found and quantity in lesson.rows:
            lesson.measure(quantity, found)

# 2. Draw, and say what was asked.
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), sharey=True)
for ax, S in zip(axes, (SHORT, LONG), strict=True):
    said, at = [predicted[S][B] for B in BATCHES], knee(took[S])
    ax.fill_between(BATCHES, [each.low_s for each in said],
                    [each.high_s for each in said],
                    color=plots.ROOFLINE, alpha=0.12, linewidth=0)
    beside(ax, BATCHES, [napkins[S][B] for B in BATCHES],
           [each.seconds for each in said], list(took[S].values()))
    ax.axhline(2 * took[S][1], color=plots.TEXT, linewidth=0.8, linestyle=":")
    ax.annotate("twice one", (1, 2 * took[S][1]), xytext=(0, 3), fontsize=9,
                textcoords="offset points")
    if at:
        ax.plot([at, at], [0, 2 * took[S][1]], ":", color=plots.TEXT, linewidth=1.2)
    ax.set(xscale="log", xlabel="batch", title=f"{S} tokens: " + (
        f"the knee is at {at:.0f}" if at else f"no knee up to {BATCHES[-1]}"))
    ax.set_xticks(BATCHES, [str(B) for B in BATCHES])
    ax.minorticks_off()
axes[0].set_ylabel("time of a step")
axes[0].set_ylim(0, 1.05 * max(took[LONG][64], predicted[LONG][64].high_s))
axes[1].get_legend().remove()
plots.show(fig, "Time of a step against the batch: napkin, prediction with its "
                "interval, measured. " + " ".join(
    f"At {S} tokens {si(took[S][1], 's')} for one sequence, {si(took[S][64], 's')} for "
    "64; " + (f"the knee is at {at:.0f}." if (at := knee(took[S])) else "no knee.")
    for S in (SHORT, LONG)))
for name in asked:
    row = lesson.rows.get(name)
    if row and row.measured:
        guess = f"guess {si(row.guess, row.unit)}, " if row.guess else ""
        print(f"{name}: {guess}napkin {si(row.napkin, row.unit)}, predicted",
              f"{interval(row.low, row.high, row.unit)}, measured",
              si(row.measured, row.unit))
    else:
        print(f"{name}: not between the batches of 1 and {BATCHES[-1]} on this machine")
print("A step of 2, 4, 8 against one of 1, at 64 tokens:",
      ", ".join(f"{took[SHORT][B] / took[SHORT][1]:.2f}" for B in (2, 4, 8)), "times.")

# %% [markdown] tags=["notes"]
# **4 min.** Half a minute to run; if it drags, stay on the slide. Ask which panel leaves
# the line "twice one" first, and by which of the two knees. Go back to the guesses. Ask what the same curve looks like as tokens/s (Further has it). Usual
# wrong answer: a knee is where the curve jumps. It never jumps, it bends; "twice" is a definition.
# Last line: does a step get longer with each row? No count of bytes says in which order these come.

# %% [markdown] tags=["core", "slide"]
# ## Reconcile
#
# A step of 64 sequences at 512 tokens: napkin and stopwatch differ. **What is the largest part of
# the difference?** Commit yourself first:
#
# 1. `"products"`
# 2. `"attention"`
# 3. `"element-wise"`
# 4. `"launches"`
# 5. memory or compute, `"… was slower than calibrated"` or `"… was faster than calibrated"`
# 6. `"not explained"`

# %% tags=["core", "fragment", "guess"]
lesson.cause("step, batch 64, context 512", ...)

# %% [markdown] tags=["notes"]
# **1 min.** Count hands for each, and ask one of each group for a reason. Help: the napkin takes all
# bytes or all FLOPs, whichever is longer, so it lets the one hide behind the other perfectly. Usual
# wrong answer: whatever it was in lesson 02, for one sequence.

# %% tags=["core", "slide", "hide-input", "measured", "nbval-ignore-output"]
LARGE = "step, batch 64, context 512"
lesson.explain(LARGE)
print(how_to_read(lesson, LARGE))


def of_attention(parts: list[dict]) -> str:
    """Its share of what the parts take together."""
    seconds = {part["name"]: part["measured_s"] for part in parts}
    return f"{seconds['attention'] / sum(seconds.values()):.0%}"


print(f"Attention is {of_attention(parts)} of this step.")
if "library" in times:
    print(f"Your step: {si(took[LONG][64], 's')}; the library's, which attends to "
          "equally long sequences in one call: "
          f"{si(times['library'].median, 's')}.")

# %% [markdown] tags=["notes"]
# **3 min.** From left to right: the napkin, what each part took beyond its share, measured. Each
# part's share of the napkin is in bytes or in FLOPs, as the whole is. Who named the largest bar? A
# learner's step attends to 64 sequences in 64 calls a layer; where it ran, the last line has its time
# beside the library's. All predictions beside the stopwatch: Further.

# %% [markdown] tags=["core", "slide"]
# ## On a GPU
#
# The ridge lies at 150 to 420 rows: hundreds of users before arithmetic counts. TensorRT-LLM, 2,048
# tokens written by each:

# %% tags=["core", "fragment", "hide-input"]
CARDS = {"A100-80GB SXM": "a100-80gb-sxm", "H100-80GB SXM": "h100-sxm",
         "L40S-48GB": "l40s"}
MODELS = {"LLaMA-7B": "llama-2-7b", "GPT-J-6B": "gpt-j-6b"}     # Llama 2: same shape


def enveloped(run, batch: int) -> float:
    """Tokens/s: a prefill at peak, then a step at the mean context for each token."""
    shape, card = catalog.model(MODELS[run.model]), catalog.machine(CARDS[run.hardware])
    prompt, written = run.whole("prompt_len"), run.whole("gen_len")
    formats = {"weights": run.weight_dtype, "kv": run.kv_dtype}
    each_s = card.napkin(shape.decode(batch, prompt + written // 2, **formats))
    prefill_s = card.napkin(shape.prefill(batch, prompt, **formats))
    return batch * written / (prefill_s + (written - 1) * each_s)


runs = [run for run in published_runs() if run.category == "serving_throughput"
        and run.model in MODELS and run.hardware in CARDS and run.tp == 1
        and run.gen_len == 2048]
runs.sort(key=lambda run: (run.batch, run.value))
assert all(150 < catalog.machine(card).ridge("bf16") < 420 for card in CARDS.values())
reach = {run.id: run.value / enveloped(run, run.whole("batch")) for run in runs}
columns = ["batch", "model", "card", "weights", "read by each", "tokens/s, published",
           "envelope", "ratio"]
[few] = [run for run in runs if (run.batch, run.model, run.hardware)
         == (32, "LLaMA-7B", "A100-80GB SXM")]
[most] = [run for run in runs if (run.batch, run.model) == (60, "LLaMA-7B")]
context = few.prompt_len + few.gen_len / 2
seven = catalog.model("llama-2-7b")
assert round(2 * numbers_in(seven) / seven.kv_bytes(1, round(context))) == 22
more, said = most.value / few.value, enveloped(most, 60) / enveloped(few, 32)
display(Table(columns, [[
    f"{run.batch:.0f}", run.model, run.hardware.split("-")[0], run.weight_dtype,
    f"{run.prompt_len:,.0f}", f"{run.value:,.0f}", f"{run.value / reach[run.id]:,.0f}",
    f"{reach[run.id]:.2f}"] for run in runs], [columns[0], *columns[4:]]), Markdown(
    f"**Levels** are {min(reach.values()):.2f} to {max(reach.values()):.2f} of the "
    f"envelope. **What a batch brings** it judges well: on the A100 60 instead of 32 "
    f"sequences gave {more:.2f} times the throughput; the envelope says {said:.2f}."))

# %% [markdown] tags=["notes"]
# **2 min.** Ask before the table: "60 sequences instead of 32: how many times the throughput?" Usual
# wrong answer: 60/32, nearly two. By the envelope the caches have caught up
# with the weights at 22 sequences of this model and context. Ask what a ratio that hardly moves from
# batch 16 to 120 says (the bytes that grow with the batch are counted right), and what it does not
# say (which rate stays below the data sheet's).

# %% [markdown] tags=["core", "slide"]
# ## When does it lose?
#
# - **Long contexts.** Past W/c sequences twice the batch brings at most a third more tokens/s.
# - **Prompts.** One of several hundred tokens fills the arithmetic alone; four take four times as
#   long.
# - **A promise.** Behind the knee everybody's latency pays for throughput.
# - **Experts.** Each sequence picks its own: at first a batch reads *more* weights (Further).
# - **Nobody there.** Users come one by one: lesson 05.

# %% [markdown] tags=["notes"]
# **2 min.** Let the room find the first two. The first by formula: B sequences get B/(W + B·c) tokens
# for each byte read; from B = W/c to twice that it goes from 1/2 to 2/3 of the limit 1/c. Usual
# wrong answer for prompts: they gain as decode does. They bring their own rows.

# %% [markdown] tags=["core", "slide"]
# ## Play
#
# All users at one context, bf16 caches; red names the limit. 128 users of Llama-3-8B on an H100
# break a promised TPOT of 20 ms. Find
#
# 1. each *single* change that keeps it (not of users or promise). Weights in fewer bits?
# 2. at 64 tokens, the most users within 20 ms. Do 4-bit weights help?
# 3. NVIDIA cards of 48 GB or more on which even *one* user waits longer.

# %% tags=["core", "widget", "hide-input", "nbval-ignore-output"]
def serve(model: str, on: str, users: int, context: int, weights: str, promise: float):
    """What a step holds, how long it takes by envelope, which limits it breaks."""
    shape, card = catalog.model(model), catalog.machine(on)
    found = shape.fits(card.memory, users, context, weights)
    work = shape.decode(users, context, weights=weights)
    reads, computes = work.bytes / card.bandwidth_at(), work.flops / card.peak("bf16")
    both, step_s = found.weight_bytes + found.kv_bytes, max(reads, computes)
    broken = [] if found else [f"memory: {si(both, 'B')} of {si(card.memory, 'B')}, "
                               f"room for {max(found.max_batch, 0):,} users"]
    if found and step_s > promise:
        broken.append(f"promise: {si(step_s, 's')} of {si(promise, 's')}")
    if shape.max_context and context > shape.max_context:
        broken.append(f"context: {context:,} of {shape.max_context:,}")
    return found, reads, computes, broken


def draw_service(model: str, on: str, users: int, context: int, weights: str,
                 promise: float) -> None:
    found, reads, computes, broken = serve(model, on, users, context, weights, promise)
    shape, card = catalog.model(model), catalog.machine(on)
    step_s = max(reads, computes)
    red, blue, orange, _, _, grey = (plots.COLOURS[i] for i in (4, 0, 1, 2, 3, 5))
    fig = plt.figure(figsize=(7.6, 2.6), layout="none")
    left, right = (fig.add_axes((x, 0.22, 0.35, 0.46)) for x in (0.1, 0.61))
    at = 0
    for y, (value, colour) in enumerate(((found.weight_bytes, blue),
                                         (found.kv_bytes, orange))):
        left.barh(y, value, color=colour, height=0.6)
        left.barh(2, value, left=at, color=colour if found else red, height=0.6,
                  hatch=None if found else "//", edgecolor="white", linewidth=0)
        at += value
    for y, value in enumerate((found.weight_bytes, found.kv_bytes, at)):
        left.text(1.4 * max(at, card.memory), y, si(value, "B"), va="center",
                  ha="right", fontsize=9)
    left.axvline(card.memory, color=plots.TEXT if found else red, linestyle="--")
    left.set(xlim=(0, 1.4 * max(at, card.memory)), xlabel="dashed: memory")
    left.set_yticks([0, 1, 2], ["weights", "caches", "together"])
    plots.units(left.xaxis, "B")
    right.set_yticks([0, 1, 2], ["reading", "arithmetic", "step"])
    if found:                                   # what does not fit has no time
        late = step_s > promise
        for y, value in enumerate((reads, computes, step_s)):
            right.barh(y, value, color=red if late and y == 2 else grey, height=0.6,
                       hatch="//" if late and y == 2 else None, edgecolor="white",
                       linewidth=0)
            right.text(1.4 * max(step_s, promise), y, si(value, "s"), va="center",
                       ha="right", fontsize=9)
        right.axvline(promise, color=red if late else plots.TEXT, linestyle="--")
    else:
        right.text(0.5, 0.5, "not timed", ha="center", transform=right.transAxes)
    right.set(xlim=(0, 1.4 * max(step_s if found else 0, promise)),
              xlabel="dashed: promised TPOT")
    plots.units(right.xaxis, "s")
    for ax in (left, right):
        ax.locator_params(axis="x", nbins=4)
        ax.set_ylim(2.5, -0.5)
        ax.grid(visible=False, axis="y")
    waits = "arithmetic" if computes > reads else (
        "caches" if found.kv_bytes > found.weight_bytes else "weights")
    verdict = ("BROKEN: " + "; ".join(broken) if broken else
               f"holds: {si(step_s, 's')} a token, {users / step_s:,.0f} tokens/s; "
               f"waits for {waits}")
    fig.text(0.01, 0.97, f"{shape.name} on {card.name}: {users:,} × {context:,} "
             f"tokens, {weights} weights\n{verdict}", va="top", weight="bold",
             fontsize=10, color=red if broken else plots.TEXT)
    plots.show(fig, f"{shape.name} on {card.name}, {users:,} users of {context:,} "
                    f"tokens, {weights} weights, {si(promise, 's')} a token promised: "
                    f"{verdict}. Weights {si(found.weight_bytes, 'B')}, caches "
                    f"{si(found.kv_bytes, 'B')}.")


SERVED = ["smollm2-135m", "qwen3-0.6b", "llama-3.2-1b", "qwen3-4b", "llama-2-7b",
          "llama-3-8b", "qwen2.5-32b", "llama-2-70b"]
ON = [name for name in catalog.machine_names()
      if "bf16" in catalog.machine(name).peak_flops]
PROMISES = [(si(x, "s"), x) for x in (0.005, 0.01, 0.02, 0.05, 0.1)]
widgets.play(draw_service, model=widgets.choose("model", SERVED, "llama-3-8b"),
             on=widgets.choose("card", ON, "h100-sxm"),
             users=widgets.powers_of_two("users", 1, 8192, 128),
             context=widgets.powers_of_two("context", 64, 131_072, 4096),
             weights=widgets.choose("weights", ["bf16", "int8", "int4"]),
             promise=widgets.choose("promise", PROMISES, 0.02))

# %% tags=["core", "fragment", "hide-input"]
draw_service("llama-3-8b", "h100-sxm", 128, 4096, "bf16", 0.02)

# %% [markdown] tags=["notes"]
# **3 min.** Question 1 live, the others are homework. Let the room bet before anybody touches a
# control. Usual wrong answer: 4-bit weights; at this batch the weights are a fifth of what is read.
# For question 2 ask first what such a step waits for: arithmetic, and 4-bit weights are computed with
# in bf16 all the same. Solutions computes all three.

# %% [markdown] tags=["core"]
# ## Check yourself
#
# Numbers in the unit behind each line, or text with a unit (`"16 GB"`). The third exercise is under
# Further.
#
# **1 · Two timings.** A server runs Qwen3-8B in bf16 (15.1 GB of weights are streamed in a step;
# 147,456 bytes of cache a token) on a card you do not know. All its sequences are equally long. A
# step of *one* takes 8.1 ms, a step of *32* takes 17.4 ms, and both are memory-bound. How many
# seconds does *each* further sequence add? How many are *shared* by all? At which batch is the
# *knee*, a step twice as long as for one? What is the *bandwidth*, and how long is the *context*?
#
# **2 · A full card.** Mistral-7B in bf16 labels texts of 100 tokens on an H200: 151.4 GB, 4.8 TB/s,
# 989.4 TFLOP/s. 14.48 GB of weights are stored; each token meets 7.11·10⁹ of their numbers; a token
# leaves 131,072 bytes. Which *batch* fills the card? How many seconds does its decode step take by
# *reading* all memory, how many by *computing* (matrices alone), so how many does the *step* take?
# *From* which *context* on does a full card take memory over bandwidth? How many sequences may share a
# step if 50 ms are *promised*?

# %% tags=["core", "exercise", "exercise:two_timings"]
each = ...                  # seconds
shared = ...                # seconds
knee_at = ...               # sequences
bandwidth = ...             # bytes per second
context = ...               # tokens

lesson.steps("two_timings", each=each, shared=shared, knee=knee_at,
             bandwidth=bandwidth, context=context)

# %% tags=["core", "exercise", "exercise:full_card"]
batch = ...                 # sequences
reading = ...               # seconds
computing = ...             # seconds
step = ...                  # seconds
from_context = ...          # tokens
promised = ...              # sequences

lesson.steps("full_card", batch=batch, reading=reading, computing=computing, step=step,
             from_context=from_context, promised=promised)

# %% [markdown] tags=["further", "slide"]
# ### Take with you
#
# 1. A batch shares the reading of the weights, and nothing else.
# 2. It stops being free at R·e/2 sequences (arithmetic) or W/c (caches), whichever comes first.
# 3. A full card takes memory over bandwidth per step, where bytes bind; short contexts compute.
# 4. Sequences need not be alike: rows together, attention apart.
#
# **Next:** users come and go. **Homework:** two timings, a full card, four bits (Further).

# %% [markdown] tags=["notes"]
# **1 min.** Slide closed: three people, one sentence each. Then the question of the next lesson: "who
# fills a batch, if users come one by one?"

# %% [markdown] tags=["further"]
# ## Further
#
# ### Exercise 3 · Four bits in a batch
#
# Llama-3-8B on an H100 (R = 295 FLOPs per byte in bf16), short contexts, so weights and arithmetic
# alone. Weights take 15 GB in 16 bits; in 4 bits a quarter, and are still computed with in bf16. How
# many times faster is a step of 1 sequence, of 128, of 256? Up to which batch do 4-bit weights leave
# the step memory-bound (`last_4`)? And how many *more* caches of 4,000 tokens (131,072 bytes each
# token) have *room* in the bytes that they free?

# %% tags=["further", "exercise", "exercise:four_bits"]
at_1 = ...                  # times
at_128 = ...                # times
at_256 = ...                # times
last_4 = ...                # sequences
more_room = ...             # sequences

lesson.steps("four_bits", at_1=at_1, at_128=at_128, at_256=at_256, last_4=last_4,
             room=more_room)

# %% [markdown] tags=["further"]
# ### The library's step
# The decoder packs all rows. The step of the cache (here a paged one, lesson 06) attends to all
# sequences that bring equally many tokens in one call.

# %% tags=["further", "hide-input"]
lesson.show("selective_batching")

# %% [markdown] tags=["further"]
# ### The same batch at 64 tokens
# Less to look back at, another account.

# %% tags=["further", "hide-input", "measured", "nbval-ignore-output"]
BRIEF = "step, batch 64, context 64"
brief_parts = list(StepOf(batched, "decode", 64, SHORT, everybody(64, SHORT)).parts(
    machine, 2))
lesson.measure(BRIEF, times[64, SHORT], parts=brief_parts)
lesson.explain(BRIEF)
print(how_to_read(lesson, BRIEF))
print(f"Attention is {of_attention(brief_parts)} of this step; at {LONG} tokens it is "
      f"{of_attention(parts)}.")

# %% [markdown] tags=["further"]
# ### Latency against throughput
# The measured steps as those who pay see them: what a user waits for a token, against what all users
# get. Each batch is another bargain. Dotted: ten tokens a second promised to each, faster than one
# reads. The best batch is the largest that keeps the promise, not the one with the most tokens/s. A
# dot with another above *and* to the left of it is never worth choosing.

# %% tags=["further", "hide-input", "nbval-ignore-output"]
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), sharey=True)
for ax, S in zip(axes, (SHORT, LONG), strict=True):
    for said, colour, style, label in (
            (napkins[S], plots.NAPKIN, "--", "napkin"),
            ({B: each.seconds for B, each in predicted[S].items()}, plots.ROOFLINE, "-",
             "calibrated roofline")):
        ax.plot([said[B] for B in BATCHES], [B / said[B] for B in BATCHES], style,
                color=colour, label=label)
    pareto(ax, [{"batch": B, "fits": True, "seconds": t, "tokens_per_s": B / t}
                for B, t in took[S].items()], label="measured", colour=plots.MEASURED)
    ax.axvline(PROMISE, color=plots.TEXT, linestyle=":", label="promised")
    at = kept(took[S])
    all_or_none = "all" if took[S][64] <= PROMISE else "none"
    how_many = f"{math.floor(at)}" if at else all_or_none
    ax.set(title=f"{S} tokens: the promise holds for {how_many}")
    ax.locator_params(axis="x", nbins=4)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.minorticks_off()
axes[1].set_ylabel("")
axes[1].legend(loc="lower right", fontsize=8)
plots.show(fig, "Time per token of each user against tokens/s of all, a dot for each "
           "batch. " + " ".join(
               f"At {S} tokens from {number(1 / took[S][1])} tokens/s at "
               f"{si(took[S][1], 's')} to {number(64 / took[S][64])} at "
               f"{si(took[S][64], 's')}." for S in (SHORT, LONG)))

# %% [markdown] tags=["further"]
# ### Prompts bring their own batch
# Four prompts of 128 tokens in one prefill: how many times as long as one?

# %% tags=["further", "guess"]
lesson.guess("four prompts of 128, over one", ...)

# %% tags=["further", "hide-input", "measured", "nbval-ignore-output"]
FOUR = "four prompts of 128, over one"
prefills = {B: StepOf(decoder, "prefill", B, 128) for B in (1, 4)}


def four_over_one(seconds: dict[int, float]) -> float:
    return seconds[4] / seconds[1]


predict(FOUR, four_over_one, {B: each.napkin(machine) for B, each in prefills.items()},
        {B: each.predict(machine) for B, each in prefills.items()}, "×")
display(lesson.reveal(FOUR))
times_of = bracketed(machine)({B: each.run for B, each in prefills.items()}, 3)
lesson.measure(FOUR, four_over_one({B: each.median for B, each in times_of.items()}))
print(f"Prefill: {lesson.rows[FOUR].measured:.2f} times. A decode step of four against "
      f"one: {took[SHORT][4] / took[SHORT][1]:.2f} times.")

# %% [markdown] tags=["further"]
# ### Machines and formats
# R·e/2 from data sheets. Weights that are stored in fewer bits and computed with in 16 make e
# smaller and leave R: the knee comes *earlier*. What they save had been shared already.

# %% tags=["further", "hide-input"]
rows = []
for key in ("b200", "h100-sxm", "a100-80gb-sxm", "mi300x", "l4", "rtx-4090",
            "apple-m4-max-40c", "epyc-9654"):
    on = catalog.machine(key)
    ridge = on.ridge("bf16" if "bf16" in on.peak_flops else "fp16")
    rows.append([on.name, *(f"{ridge * each / 2:,.0f}" for each in (2, 1, 0.5))])
columns = ["arithmetic catches up at batch", "16-bit weights", "8-bit", "4-bit"]
Table(columns, rows, columns[1:])

# %% [markdown] tags=["further"]
# ### What a full card reaches
# B sequences get B/(W + B·c) tokens for each byte that is read, at most 1/c: bandwidth over one
# cache. Where bytes bind, a full card, B = (M - W)/c, reaches 1 - W/M of it.

# %% tags=["further", "hide-input"]
rows = []
for key in ("h100-sxm", "h200-sxm", "a100-80gb-sxm", "mi300x", "l4", "rtx-4090",
            "rtx-5090"):
    on = catalog.machine(key)
    W, c, M = llama.stored_bytes("bf16"), 4096 * k_8b, on.memory
    filled = llama.fits(M, 1, 4096).max_batch
    full_s = M / on.bandwidth_at()
    assert llama.decode(filled, 4096).flops / on.peak("bf16") < full_s      # bytes bind
    exact = (M - W) / c
    assert math.isclose(exact / (W + exact * c) * c, 1 - W / M)
    rows.append([on.name, f"{filled:,}", si(full_s, "s"), f"{filled / full_s:,.0f}",
                 f"{1 - W / M:.0%}"])
columns = [f"{llama.name}, 4,096 tokens", "sequences", "a step", "tokens/s",
           "of the limit"]
Table(columns, rows, columns[1:])

# %% [markdown] tags=["further"]
# ### Experts
# A mixture of experts reads what its tokens choose. If they choose evenly, a step reads:

# %% tags=["further", "hide-input"]
mixtral, some = catalog.model("mixtral-8x7b"), (1, 2, 4, 8, 16)
assert mixtral.streamed_bytes(tokens=64) > 0.99 * mixtral.streamed_bytes(tokens=10_000)
Table([f"{mixtral.name}, bf16; batch", *map(str, some)],
      [["weights", *(si(mixtral.streamed_bytes(tokens=B), "B") for B in some)]],
      list(map(str, some)))

# %% [markdown] tags=["further"]
# ### Predicted beside measured

# %% tags=["further", "nbval-ignore-output"]
lesson.table()

# %% [markdown] tags=["further"]
# Further reading: Yu et al. 2022 (Orca, selective batching); Williams et al. 2009 (roofline); Pope
# et al. 2022, *Efficiently scaling transformer inference* (latency against throughput); Austin et al.
# 2025, *How to scale your model*.

# %% [markdown] tags=["solution"]
# ## Solutions

# %% [markdown] tags=["solution", "solution:selective_batching"]
# <details><summary>selective batching</summary>
#
# ```python
# def my_step(model, new, caches):
#     counts = [len(tokens) for tokens in new]
#     x = model.embed([token for tokens in new for token in tokens])
#     positions = [cache.length + t for cache, T in zip(caches, counts) for t in range(T)]
#     for layer in range(model.L):
#         q, k, v = model.qkv(layer, x, positions)            # all rows together
#         own = zip(caches, q.split(counts), k.split(counts), v.split(counts))
#         parts = [cache.attend(layer, *rows) for cache, *rows in own]
#         x = model.mlp(layer, x, torch.cat(parts))
#     last = torch.tensor(counts).cumsum(0) - 1               # the last row of each
#     return model.head(x[last])
# ```
#
# </details>

# %% tags=["solution", "hide-input"]
def holding(models=("llama-3-8b",), cards=("h100-sxm",), users=(128,), contexts=(4096,),
            formats=("bf16",)):
    """All of these services that break no limit at 20 ms."""
    return [(m, on, u, S, f) for m in models for on in cards for u in users
            for S in contexts for f in formats if not serve(m, on, u, S, f, 0.02)[3]]


def called(cards):
    return ", ".join(sorted({catalog.machine(on).name for on in cards}))


halves = [2**i for i in range(6, 18)]
shorter = max(S for *_, S, _ in holding(contexts=halves) if S)
fewer_bits = holding(formats=("int8", "int4"))
bits = " or ".join(each[4] for each in fewer_bits) or "no format"
others = holding(models=SERVED)
brief = {f: max(u for _, _, u, _, _ in holding(users=[2**i for i in range(14)],
                                               contexts=(64,), formats=(f,)))
         for f in ("bf16", "int4")}
waits = serve("llama-3-8b", "h100-sxm", brief["bf16"], 64, "bf16", 0.02)
large = [on for on in ON if catalog.machine(on).name.startswith("NVIDIA")
         and catalog.machine(on).memory >= 48e9]
too_slow = [on for on in large if serve("llama-3-8b", on, 1, 4096, "bf16", 0.02)[3]]
assert waits[2] > waits[1] and brief["bf16"] == brief["int4"]
Markdown(f"""<details><summary>Play</summary>

1. At most {shorter:,} tokens of context; a card with more bandwidth
   ({called(on for _, on, *_ in holding(cards=ON))}); a model that keeps less per token
   ({", ".join(catalog.model(m).name for m, *_ in others)}). Of the weights' formats,
   {bits}: the caches are {si(llama.kv_bytes(128, 4096), "B")}.
2. {brief["bf16"]:,} users. Such a step waits for arithmetic, so 4-bit weights do not
   help.
3. {called(too_slow)}: reading the weights takes longer. Memory does not
   make a card fast; bandwidth does.

</details>""")

# %% [markdown] tags=["solution", "solution:two_timings"]
# <details><summary>Two timings</summary>
#
# ```python
# each = (17.4e-3 - 8.1e-3) / 31                      # from 1 to 32 it is 31 more
# shared = 8.1e-3 - each                              # one has a cache, too
# knee_at = 1 + 8.1e-3 / each
# bandwidth = 15.14e9 / shared
# context = each * bandwidth / 147_456
# ```
#
# </details>

# %% [markdown] tags=["solution", "solution:full_card"]
# <details><summary>A full card</summary>
#
# ```python
# batch = (151.4e9 - 14.48e9) // (100 * 131_072)
# reading = 151.4e9 / 4.8e12                          # memory over bandwidth
# computing = 2 * 7.11e9 * batch / 989.4e12
# step = max(reading, computing)
# from_context = 100 * computing / reading            # the batch falls as 1/S
# promised = 0.05 * 989.4e12 // (2 * 7.11e9)          # arithmetic allows fewer than bytes
# ```
#
# </details>

# %% [markdown] tags=["solution", "solution:four_bits"]
# <details><summary>Four bits in a batch</summary>
#
# ```python
# R = 295
# def gained(batch):          # in units of reading the 16-bit weights
#     return max(1, batch / R) / max(1 / 4, batch / R)
#
# at_1, at_128, at_256 = gained(1), gained(128), gained(256)
# last_4 = R / 4                                      # R·e/2 with e = 1/2
# more_room = 0.75 * 15.01e9 // (4_000 * 131_072)
# ```
#
# </details>
