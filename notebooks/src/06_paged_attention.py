# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 · Where did the memory go?
# ## Question
# A server has filled its memory with a model's weights, and what is left is for the KV caches of its users. The more users fit, the more of them share
# each read of the weights (lesson 04), so this room decides what the machine earns.
#
# Kwon et al. (2023) looked into that room in the servers of their day. Most of it held *nothing*: no key, no value. It was held for
# tokens that had not come yet, or never would, or lay in gaps that fitted nobody. Nobody had leaked a byte.
#
# Their answer is as old as operating systems. Do not ask for one long piece; take small **blocks** as you go, wherever they are
# free, and keep a table of where they lie. They called it **PagedAttention**.
#
# Three guesses before you go on. How much of the room is really used if each user gets a piece for the longest answer there can be? How much with
# blocks of 16 tokens? And what does a token cost more, now that its keys lie all over the place?

# %% tags=["nbval-ignore-output"]
import math
from bisect import bisect
from statistics import mean

from clawdemy_course.allocators import (
    Buddy,
    Lengths,
    Pages,
    Reservation,
    doubled_output,
    serve,
    sharegpt_like,
)
from clawdemy_course.figures import beside
from clawdemy_infer.arithmetic import Work
from clawdemy_infer.batching.swapping import SwappingCache, SwappingTables
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.fast.launches import count_ops
from clawdemy_infer.files import load_model
from clawdemy_infer.from_config import catalog
from clawdemy_infer.kv_cache import BlockPool, BlockTables, ContiguousCache, PagedCache
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.parts import StepOf
from clawdemy_infer.lesson.steps import filled_cache, random_tokens
from clawdemy_infer.lesson.tables import Table, si
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.machine.present import bracketed, default_device
from clawdemy_infer.model import Sampling
from clawdemy_infer.model.sampling import sample
from clawdemy_infer.published.rows import read as published_runs
from clawdemy_infer.timing import alternate

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from ipywidgets import IntSlider
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

plots.use_style()
plt.rcParams["figure.dpi"] = 90
machine = this_machine()
lesson = Lesson("06 paged_attention", machine=machine)
model = load_model("smollm2-135m", device=default_device())
decoder = faster(model, "fp32")                         # its matrices as the kernels of this machine like them
lesson.card()

# %% [markdown]
# Write your guesses over the dots, as a number or as text with its unit: 50, "50 %", and further down "20 ms".

# %%
lesson.guess("used under reservation", ...)             # of the room for KV caches, in %
lesson.guess("used with pages", ...)                    # in %
lesson.guess("paged over contiguous", ...)              # times as long for a step

# %% [markdown]
# ## Envelope: used, reserved, internal, external
# The unit of all that follows is *a token's room*: the keys and values of one token (lesson 02). In the paper's example it is large.

# %%
opt = catalog.model("opt-13b")
per_token = 0
for _layer in range(opt.L):
    per_token += opt.K * opt.H * 2                      # the key of each head, 2 bytes a number
    per_token += opt.K * opt.H * 2                      # and the value
assert per_token == 2 * opt.L * opt.K * opt.H * 2 == opt.kv_bytes_per_token("fp16")

facts = [run for run in published_runs() if run.category == "memory_fact" and run.model == opt.name]
[stated] = [run.value for run in facts if run.metric == "kv_KiB_per_token"]
assert per_token == stated * 1024                       # the paper says "800 KB", and counts in KiB

left_for_kv = 12 * 2**30                                # of an A100 with 40 GB, beside weights and activations: the paper's table 1
CAPACITY, MOST = left_for_kv // per_token, opt.max_context
Markdown(f"{opt.name} on an A100 with 40 GB: {si(per_token, 'B')} a token, so {si(left_for_kv, 'B')} are room for **{CAPACITY:,} tokens**. "
         f"One request of the full {MOST:,} tokens takes {si(MOST * per_token, 'B')}, "
         f"and {CAPACITY // MOST} of those fit.")

# %% [markdown]
# ### One request, one long piece
# A tensor wants its memory in one piece, and nobody knows how long an answer will be. So reserve for the longest there can be. We follow one request
# of 100 prompt tokens and 64 output tokens through its life, and count in token-steps: a token's room held for one step.

# %%
P, n = 100, 64

used = reserved = internal = 0
for t in range(1, n + 1):
    used += P + t                                       # tokens that are there
    reserved += n - t                                   # room for those that will come: wasted now, wanted later
    internal += MOST - P - n                            # room that will never be used: internal fragmentation

assert used == n * P + n * (n + 1) // 2
assert reserved == n * (n - 1) // 2
assert internal == n * (MOST - P - n)
assert used + reserved + internal == n * MOST

life = list(serve(Reservation(MOST, MOST), [Lengths(0, P, n)]))     # the library's allocator agrees, step by step
assert [used, reserved, internal] == [sum(getattr(step, kind) for step in life) for kind in ("used", "reserved", "internal")]

stranded = CAPACITY % MOST                              # behind the last whole piece: external fragmentation
assert stranded == CAPACITY - CAPACITY // MOST * MOST
Markdown(f"Of what this request holds, {used / (n * MOST):.1%} is used, {reserved / (n * MOST):.1%} reserved, and {internal / (n * MOST):.1%} "
         f"never wanted. And behind the last whole piece {stranded:,} tokens' room is *external* fragmentation: free, and too short for anybody.")

# %% [markdown]
# ### The same request, in blocks
# In blocks of 16 tokens only the *last* block can be partly empty. Nothing is reserved beyond it, and as any free block will do, no gap is too short.

# %%
b = 16
held = used = 0
for t in range(1, n + 1):
    blocks = -(-(P + t) // b)                           # rounded up
    held += blocks * b
    used += P + t
wasted = held - used

assert n % b == 0 and wasted == n * (b - 1) // 2        # 0 to b - 1 slots are empty, (b - 1)/2 on average, whatever the length
life = list(serve(Pages(MOST, b), [Lengths(0, P, n)]))
assert wasted == sum(step.reserved + step.internal for step in life)
f"{wasted / n} of {held / n:.1f} tokens' room is wasted on average: {wasted / held:.1%}"

# %% [markdown]
# **(b - 1)/2 tokens a sequence.** That is the whole theory. It does not depend on how long an answer may become, only on the size of a block.
#
# ### Draw it
# A memory of 256 tokens, in which no request may exceed 64. Fourteen requests arrive, one every step or two, and each allocator must find room for them:
#
# - **reservation**: 64 tokens each, whatever they need;
# - **buddy**: the output as if known up to a factor of two, but no more than the 64 tokens there can be, in pieces of power-of-two sizes that are halved and joined;
# - **pages**: blocks of 4 tokens, one at a time.
#
# A colour is a request. Strong: used. Paler: reserved for what will come. Palest: never wanted.

# %%
REQUESTS = [Lengths(name, prompt, output, arrival) for name, (prompt, output, arrival) in enumerate((
    (12, 20, 0), (8, 40, 0), (20, 12, 1), (24, 30, 2), (16, 16, 4), (10, 32, 5), (28, 36, 7),
    (6, 16, 9), (18, 30, 11), (22, 8, 13), (9, 32, 15), (30, 16, 17), (14, 28, 19), (5, 24, 21)))]


def doubled(most: int):
    """What buddy reserves for a request: prompt, and output up to a factor of two, `most` at most."""
    return lambda request: min(doubled_output(request), most)


SMALL = {"reservation": lambda: Reservation(256, 64), "buddy": lambda: Buddy(256, doubled(64)), "pages": lambda: Pages(256, 4)}
HUES = [*plots.COLOURS, "#c2557a", "#4aa3b5", "#7d6b3d", "#9db34a", "#b07cd0", "#d08a5a", "#46527a", "#6fae8e"]


def film(name: str) -> list:
    """(snapshot, extents) after each step."""
    allocator = SMALL[name]()
    return [(snapshot, allocator.extents()) for snapshot in serve(allocator, REQUESTS)]


FILMS = {name: film(name) for name in SMALL}


def pale(colour: str, share: float) -> np.ndarray:
    return 1 - share * (1 - np.array(to_rgb(colour)))


def picture(snapshot, extents) -> np.ndarray:
    """A colour for each of 256 tokens, 16 to a row."""
    cells = np.ones((256, 3))
    filled = dict.fromkeys(snapshot.tokens, 0)
    for start, stop, request in extents:
        for slot in range(start, stop):
            i = filled[request]
            share = 1.0 if i < snapshot.tokens[request] else 0.45 if i < request.total else 0.2
            cells[slot] = pale(HUES[request.name], share)
            filled[request] += 1
    return cells.reshape(16, 16, 3)


def draw_grid(ax, snapshot, extents) -> None:
    ax.imshow(picture(snapshot, extents), interpolation="nearest")
    ax.set_xticks(np.arange(-0.5, 16), [""] * 17)
    ax.set_yticks(np.arange(-0.5, 16), [""] * 17)
    ax.grid(color="#d0d0d0", linewidth=0.5, alpha=1)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


KINDS = {"used": "#333333", "reserved": "#9a9a9a", "internal": "#d4d4d4", "external": plots.COLOURS[1], "free": "#ffffff"}


def draw_memory(allocator: str, step: int) -> None:
    """The memory, and beside it what it is used for."""
    at = min(step, len(FILMS[allocator]) - 1)
    snapshot, extents = FILMS[allocator][at]
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.0, 3.3), width_ratios=(3, 2))
    draw_grid(left, snapshot, extents)
    left.set_title(f"{allocator}, step {at}: {len(snapshot.tokens)} requests run")
    counts = [getattr(snapshot, kind) for kind in KINDS]
    bars = right.barh(list(KINDS), counts, color=list(KINDS.values()), edgecolor="#777777", linewidth=0.6)
    right.bar_label(bars, [f"{count / 256:.0%}" for count in counts], padding=4)
    right.set(xlim=(0, 300), xlabel="tokens", title=f"{len(snapshot.waiting)} wait")
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    shares = ", ".join(f"{count / 256:.0%} {kind}" for kind, count in zip(KINDS, counts, strict=True))
    plots.show(fig, f"The memory under {allocator} after step {at}: {len(snapshot.tokens)} requests run, {len(snapshot.waiting)} wait; {shares}.")


# %% tags=["widget", "nbval-ignore-output"]
widgets.play(draw_memory,
             allocator=widgets.choose("allocator", list(SMALL), "reservation"),
             step=IntSlider(description="step", min=0, max=max(map(len, FILMS.values())) - 1, value=8,
                            **widgets.LOOK))

# %%
STRIP = (4, 16, 28, 40)
fig, axes = plt.subplots(3, 4, figsize=(7.4, 6.3))
for (name, steps), row in zip(FILMS.items(), axes, strict=True):
    for step, ax in zip(STRIP, row, strict=True):
        snapshot, extents = steps[step]
        draw_grid(ax, snapshot, extents)
        ax.set_title(f"{snapshot.used / 256:.0%} used\n{len(snapshot.tokens)} run, {len(snapshot.waiting)} wait", fontsize=9, weight="normal")
    row[0].set_ylabel(name, fontsize=10, weight="bold")
for step, ax in zip(STRIP, axes[-1], strict=True):
    ax.set_xlabel(f"after step {step}")
fig.suptitle("The same requests, the same memory: only pages fill it", weight="bold", fontsize=11)
grey = "#5b6770"
fig.legend(handles=[Patch(color=grey, label="used"), Patch(color=pale(grey, 0.45), label="reserved, will be used"),
                    Patch(color=pale(grey, 0.2), label="internal, never used"),
                    Patch(facecolor="white", edgecolor="#d0d0d0", label="nobody's")],
           loc="outside lower center", ncols=4)
used = {name: ", ".join(f"{steps[step][0].used / 256:.0%}" for step in STRIP) for name, steps in FILMS.items()}
plots.show(fig, f"The memory under three allocators after steps {', '.join(map(str, STRIP))}. Used: " + "; ".join(
    f"{name} {shares}" for name, shares in used.items()) + ".")

# %%
Table(["allocator", "steps until all are served", "steps in which somebody waited", "most requests at once"],
      [[name, str(len(steps)), str(sum(bool(snapshot.waiting) for snapshot, _ in steps)),
        str(max(len(snapshot.tokens) for snapshot, _ in steps))] for name, steps in FILMS.items()],
      numeric=["steps until all are served", "steps in which somebody waited", "most requests at once"])

# %% [markdown]
# Buddy is hardly faster than reservation here: it rounds up twice, first the output and then the whole piece, and most pieces come out at 64 tokens, as if reserved.
#
# Move the slider to where nobody waits any more, too. There the three differ in pictures and not in anything that matters: an empty room wastes
# nothing. **Waste counts when somebody waits.** Under load is where we shall measure it.
#
# ## Prediction
# ### The waste
# The paper replayed conversations (ShareGPT), whose lengths it draws in figure 11. We take the means from it and draw 200 requests with those means and a long tail, as
# chats have: log-normal, which is an assumption. They all wait at the door, and the memory is the A100's from above.
#
# **The napkin** for reservation takes two numbers, the mean prompt and the mean output: on average half of the output is there, so (P + n/2) of 2,048.
# For pages: half a block is lost of what a request holds.
#
# **A better prediction** sees that it must not ask for the mean *request*, but for the mean request *that one meets in the memory*. A long answer stays
# for many steps, and each step counts. It weighs each request by its steps, and takes off what the pieces leave stranded.

# %%
requests = sharegpt_like(200)
prompt, output = mean(r.prompt for r in requests), mean(r.output for r in requests)
steps = sum(r.output for r in requests)
met = sum(r.output * r.prompt + r.output * (r.output + 1) / 2 for r in requests) / steps       # tokens of a request that one meets
pieces = CAPACITY // MOST * MOST / CAPACITY

lesson.predict("used under reservation", 100 * (prompt + output / 2) / MOST, 100 * met / MOST * pieces, unit="%")
lesson.predict("used with pages", 100 * (1 - b / 2 / (prompt + output / 2)), 100 * met / (met + (b - 1) / 2), unit="%")
lesson.predict("requests at once with pages", CAPACITY / (prompt + output / 2), CAPACITY / (met + (b - 1) / 2), unit="requests")
lesson.reveal("used under reservation", "used with pages", "requests at once with pages")

# %%
Markdown(f"A mean request has {prompt:.0f} tokens in and {output:.0f} out, so it holds {prompt + output / 2:.0f} over its life. "
         f"The mean request that one *meets* holds {met:.0f}.")

# %% [markdown]
# The buddy allocator we leave to the simulation: what it strands depends on who came before whom, and no envelope is that long.
#
# ### A system prompt, computed once
# Blocks bring a gift. A block is known by what it holds (its tokens, and all tokens before them), so when two prompts begin alike, the second can simply
# point at the first one's blocks. A shared system prompt of 512 tokens and a question of 64: without a hit the prefill computes 576 rows, with one 64, which
# look back at 512 tokens that are there.
#
# How long until the first token (TTFT)?

# %%
lesson.guess("TTFT with a hit of 512", ...)

# %%
shape = catalog.model("smollm2-135m")
FP32 = {"weights": "fp32", "kv": "fp32", "activations": "fp32"}
SYSTEM, QUESTION = 512, 64

flops = 0
for i in range(QUESTION):
    flops += 2 * shape.matrix_parameters()                                      # each row through the matrices
    flops += shape.L * 4 * shape.N * shape.H * (SYSTEM + i + 1)                 # and back at all before it, itself too
flops += 2 * shape.D * shape.V                                                  # the head names one word
hit, miss = shape.step(1, QUESTION, SYSTEM + QUESTION, **FP32), shape.prefill(1, SYSTEM + QUESTION, **FP32)
pairs = QUESTION * SYSTEM + QUESTION * (QUESTION + 1) // 2
assert flops == QUESTION * 2 * shape.matrix_parameters() + shape.L * 4 * shape.N * shape.H * pairs + 2 * shape.D * shape.V == hit.flops
f"{miss.flops / hit.flops:.1f} times fewer FLOPs with a hit; {miss.bytes / hit.bytes:.2f} times fewer bytes: the weights must be read either way"

# %% tags=["nbval-ignore-output"]
cold = StepOf(decoder, "prefill", 1, SYSTEM + QUESTION)
hit_ops = cold.ops + 2 * shape.L                        # two copies a layer gather what the hit looks back at
lesson.predict("TTFT without a hit", cold.napkin(machine), cold.predict(machine), unit="s")
lesson.predict("TTFT with a hit of 512", machine.napkin(hit), machine.time(hit, hit_ops), unit="s")
lesson.reveal("TTFT without a hit", "TTFT with a hit of 512")

# %% [markdown]
# And how often does one hit? That needs no model: the tables know. Twenty users with the same system prompt, each with a question of their own.

# %%
users = 20
tables = BlockTables(BlockPool(1024, b), prefix_caching=True)
for user in range(users):
    ids = list(range(SYSTEM)) + [10_000 + 100 * user + i for i in range(QUESTION)]
    known = tables.add(user, ids)
    tables.reserve({user: len(ids) - known})
    tables.commit({user: ids[known:]})

tokens = users * (SYSTEM + QUESTION)
assert tables.prefix.found == (users - 1) * SYSTEM                   # all but the first
assert tables.pool.used * b == SYSTEM + users * QUESTION                        # and the prompt lies there once
Markdown(f"Hit rate: **{tables.prefix.hit_rate:.1%}** of the tokens. {tokens:,} tokens lie in the room of {tables.pool.used * b:,}.")

# %% [markdown]
# ### What does the table cost?
# Contiguous keys are read front to back. Pages are looked up first. FLOPs and bytes of the attention itself are the same, so the **napkin** says: nothing.
#
# But somebody has to follow the table. PyTorch has no operation for it, so the plain way, and that of `kv_cache/paged.py`, is to *gather*: each step
# copies each sequence's blocks into one piece, and then attends as usual. It reads the KV, writes it, and reads it again. A kernel reads the pages
# where they lie: `fast/cpp/attention.h` on a CPU, `kernels/decode_paged.py` on a GPU. We time both ways, each beside a contiguous cache that the same
# engine reads.

# %% tags=["nbval-ignore-output"]
B, S = 8, 1024
plain = ContiguousCache.for_model(decoder, B, S)
real = filled_cache(decoder, 1, 128)
for whole, part in ((plain.keys, real.keys), (plain.values, real.values)):      # [L, B, K, S, H] each
    for sequence in range(B):                           # real keys, shifted so that no two sequences are alike
        whole[:, sequence] = part[:, 0, :, :128].roll(13 * sequence, dims=2).repeat(1, 1, S // 128, 1)
plain.length = S - 1

tables = BlockTables(BlockPool(B * S // b, b))
for sequence in range(B):
    tables.add(sequence)
for _ in range(11):                                     # they grow in turns, as in a server, and so their blocks lie mixed
    for sequence in range(B):
        tables.reserve({sequence: (S - 1) // 11})
        tables.commit({sequence: range((S - 1) // 11)})
paged = PagedCache.over(decoder, tables)
for sequence in range(B):
    slots = (torch.tensor(tables.blocks[sequence])[:, None] * b + torch.arange(b)).flatten()[:S - 1]
    head_slots = paged.head_slots(slots.to(decoder.device))
    for layer in range(shape.L):
        keys, values = (tensor[layer, sequence, :, :S - 1].transpose(0, 1) for tensor in (plain.keys, plain.values))    # [M, K, H]
        paged.write(layer, head_slots, keys, values)
try:
    kernels = faster(model, compile=True)             # the same model, whose attention follows the table
except ValueError as missing:                           # no compiler: then PyTorch alone
    kernels = decoder
    print(missing)
ways = {"contiguous, PyTorch": (decoder, plain), "gathered, PyTorch": (decoder, paged),
        "contiguous, kernel": (kernels, plain), "paged, kernel": (kernels, paged)}
assert plain.allocated_bytes == paged.allocated_bytes == shape.kv_bytes(B, S, "fp32")
token = random_tokens(decoder, B, 1)


def one_token(model, cache) -> torch.Tensor:
    cache.truncate(S - 1)
    return model(token, cache, last_only=True)


steps = {name: StepOf(model, "decode", B, S, cache) for name, (model, cache) in ways.items()}
predicted = {name: step.predict(machine) for name, step in steps.items()}
contiguous, gathered = predicted["contiguous, PyTorch"], predicted["gathered, PyTorch"]
step_bytes, kv = shape.streamed_bytes("fp32") + shape.kv_bytes(B, S, "fp32"), shape.kv_bytes(B, S, "fp32")
GATHERS = f"step that gathers, {B} at {S:,}"

lesson.predict("paged over contiguous", 1.0, 1.0, unit="×")
more = gathered - contiguous                            # a difference is predicted as one: what the two have in common is equally wrong in both
lesson.predict("gathered over contiguous", (step_bytes + 2 * kv) / step_bytes, 1 + more.seconds / contiguous.seconds, unit="×",
               interval=(1 + more.low_s / contiguous.seconds, 1 + more.high_s / contiguous.seconds))
lesson.predict(GATHERS, steps["gathered, PyTorch"].napkin(machine), gathered, unit="s")
lesson.reveal("paged over contiguous", "gathered over contiguous", GATHERS)

# %% [markdown]
# ### Throw out a sequence: carry it away, or forget it?
# Nothing is reserved, so one day a block is wanted and none is free. Somebody must go: **preemption**. Their blocks are *swapped* out to the
# host's memory and back in later, or they are dropped and the prompt is *recomputed*.
#
# - swapping costs bytes over the link, there and back: 2 · S · bytes per token / link. A straight line.
# - recomputing is a prefill of S tokens: FLOPs over peak, but never less than one read of the weights. A floor, then a line.
#
# The floor is what swapping can beat. If swapping has the steeper line, the two cross, and the **break-even length** is roughly
# where its line reaches the floor:
#
# $$S^* = \frac{\text{weight bytes}}{\text{bandwidth}} \cdot \frac{\text{link}}{2 \cdot \text{KV bytes per token}}$$

# %%
card = catalog.machine("a100-80gb-pcie")
lengths = np.unique(np.geomspace(1, 2048, 60).round().astype(int))
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.1))
said = []
for name, ax in zip(("opt-13b", "qwen3-0.6b"), axes, strict=True):
    s = catalog.model(name)
    swap = [2 * length * s.kv_bytes_per_token("bf16") / card.link.bytes_per_s for length in lengths]
    again = [card.napkin(s.prefill(1, int(length))) for length in lengths]
    ax.loglog(lengths, swap, color=plots.COLOURS[0], label="swap out and in")
    ax.loglog(lengths, again, color=plots.COLOURS[1], label="recompute")
    cheaper = [int(length) for length, one, other in zip(lengths, swap, again, strict=True) if one > other]
    if cheaper:
        ax.axvline(cheaper[0], color="black", linestyle=":", linewidth=1.2)
        ax.annotate(f"even at about {cheaper[0]:,}", (cheaper[0], min(swap)), xytext=(-5, 2), textcoords="offset points", ha="right")
    ax.set(xlabel="tokens of the sequence", ylabel="time", title=f"{s.name}: {'they cross' if cheaper else 'swapping always wins'}")
    said.append(f"for {s.name} " + (f"they are even at about {cheaper[0]:,} tokens" if cheaper else "swapping is always the faster"))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    plots.units(ax.yaxis, "s")
axes[0].legend(loc="upper left")
plots.show(fig, f"Time to swap a sequence out and in, and to recompute it, against its tokens: {'; '.join(said)}.")
print(f"On paper: {card.name}, {card.link.kind}")

# %% [markdown]
# A large model with full KV heads takes long to compute and also long to carry; here the carrying wins on paper, though not by much.
# A small model with a thick cache is computed sooner than it is carried.
#
# On this machine the "host" is the same memory, so the link is as fast as can be, and we expect no crossing at all. To have one, let us also ask about a
# slow link: what if the sequence had to go to a neighbour through a 100 Mbit/s network?

# %%
lesson.guess("swap 512 tokens out and in", ...)

# %% tags=["nbval-ignore-output"]
KV = shape.kv_bytes_per_token("fp32")
NETWORK = 100e6 / 8                                     # bytes/s, on its label
recompute = StepOf(decoder, "prefill", 1, SYSTEM)


def recomputed(S: int):
    """The prediction of a prefill of S tokens."""
    return machine.time(shape.prefill(1, S, **FP32), recompute.ops)


def even_length(seconds_of, link: float = NETWORK) -> int:
    """The first length at which carrying the sequence there and back takes longer than computing it anew."""
    return 1 + bisect(range(1, shape.max_context), False, key=lambda S: 2 * S * KV / link > seconds_of(S))


swapping = SwappingCache.over(decoder, SwappingTables(BlockPool(64, b), host=BlockPool(64, b)))
swapping.add("sequence")
decoder.step({"sequence": random_tokens(decoder, 1, SYSTEM)[0].tolist()}, swapping)


def out_and_in(cache) -> None:
    cache.swap_out("sequence")
    cache.swap_in("sequence")


swap_ops = count_ops(lambda: out_and_in(swapping)) / (SYSTEM // b)      # a block: keys and values, out and in


def copied(S: int) -> Work:
    """Read and written on the way out, and again on the way in."""
    return Work(flops=0, bytes=4 * S * KV, name="copies")


def swapped(S: int):
    """The prediction of a swap: each block costs its launches."""
    return machine.time(copied(S), -(-S // b) * swap_ops)


lesson.predict("swap 512 tokens out and in", machine.napkin(copied(SYSTEM)), swapped(SYSTEM), unit="s")
lesson.predict("recompute 512 tokens", recompute.napkin(machine), recompute.predict(machine), unit="s")
lesson.predict("even at, over 100 Mbit/s", even_length(lambda S: machine.napkin(shape.prefill(1, S, **FP32))),
               even_length(lambda S: recomputed(S).seconds), unit="tokens",
               interval=(even_length(lambda S: recomputed(S).low_s), even_length(lambda S: recomputed(S).high_s)))
lesson.reveal("swap 512 tokens out and in", "recompute 512 tokens", "even at, over 100 Mbit/s")

# %% [markdown]
# ## Measurement: the waste
# This clock counts steps, not seconds. Each allocator serves the 200 requests; we keep the steps in which somebody waits. Buddy appears twice: with the
# output guessed up to a factor of two, and with an *oracle* that knows it. The paper's figures stand beside.

# %%
ALLOCATORS = {
    "reservation": lambda: Reservation(CAPACITY, MOST),
    "buddy": lambda: Buddy(CAPACITY, doubled(MOST)),
    "buddy, oracle": lambda: Buddy(CAPACITY, lambda request: request.total),
    "pages of 16": lambda: Pages(CAPACITY, b),
}
WASTE = ("used", "reserved", "internal", "external")
low, high, vllm = sorted(run.value for run in facts if run.metric == "kv_memory_used_pct")
paper = {"reservation": low, "buddy": 26.8, "buddy, oracle": high, "pages of 16": vllm}                    # its figure 2: Orca (Max), (Pow2), (Oracle), vLLM
paper_running = {"reservation": 7.00, "buddy": 9.81, "buddy, oracle": 13.62, "pages of 16": 30.42}         # its figure 13a, ShareGPT
shares, running, served = {}, {}, {}
for name, make in ALLOCATORS.items():
    whole = list(serve(make(), requests))
    loaded = [snapshot for snapshot in whole if snapshot.waiting]
    room = sum(getattr(snapshot, kind) for snapshot in loaded for kind in WASTE)
    shares[name] = {kind: 100 * sum(getattr(snapshot, kind) for snapshot in loaded) / room for kind in WASTE}
    running[name], served[name] = mean(len(snapshot.tokens) for snapshot in loaded), len(whole)

header = [*WASTE, "used, in the paper", "requests at once", "at once, in the paper", "steps for all 200"]
Table(["allocator", *header],
      [[name, *(f"{shares[name][kind]:.1f} %" for kind in WASTE), f"{paper[name]} %", f"{running[name]:.1f}",
        f"{paper_running[name]:.1f}", f"{served[name]:,}"] for name in ALLOCATORS],
      numeric=header)

# %%
fig, ax = plt.subplots(figsize=(7.2, 2.8))
left = np.zeros(len(ALLOCATORS))
for kind, colour in zip(WASTE, (plots.COLOURS[0], "#9a9a9a", "#d4d4d4", plots.COLOURS[1]), strict=True):
    widths = [shares[name][kind] for name in ALLOCATORS]
    ax.barh(list(ALLOCATORS), widths, left=left, color=colour, height=0.6, label=kind)
    left += widths
ax.plot(list(paper.values()), list(paper), "D", color="black", markersize=7, label="used, in the paper")
ax.set(xlim=(0, 101), xlabel="% of the room, while somebody waits", title="Of the room for keys and values, reservation uses a quarter")
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
fig.legend(loc="outside lower center", ncols=5)
plots.show(fig, "Used of the room, while somebody waits, ours and in the paper: " + "; ".join(
    f"{name} {shares[name]['used']:.0f} % and {paper[name]:.0f} %" for name in ALLOCATORS) + ".")

# %% tags=["nbval-ignore-output"]
lesson.measure("used under reservation", shares["reservation"]["used"])
lesson.measure("used with pages", shares["pages of 16"]["used"])
lesson.measure("requests at once with pages", running["pages of 16"])
Markdown(f"Pages waste **{100 - shares['pages of 16']['used']:.1f} %**. In the same memory "
         f"{running['pages of 16'] / running['reservation']:.1f} times as many requests run at once, and all are served in "
         f"{served['reservation'] / served['pages of 16']:.1f} times fewer steps.")

# %% [markdown]
# Even an oracle helps little: it stops guessing, and it still holds in the first step what will be wanted in the last.

# %%
lost = {name: 100 - shares[name]["used"] - shares[name]["reserved"] for name in ALLOCATORS}
Markdown(f"""Buddy is better than reservation, here as in the paper: {running['buddy']:.1f} requests at once and not {running['reservation']:.1f}; in the paper {paper_running['buddy']:.1f} and
not {paper_running['reservation']:.1f}. Of the room it uses {shares['buddy']['used']:.0f} %, in the paper {paper['buddy']:.0f} %. It rounds up twice, and to that and to gaps it loses {lost['buddy']:.0f} %, where the
oracle loses {lost['buddy, oracle']:.0f} % and pages {lost['pages of 16']:.1f} %. Pages run {running['pages of 16'] / running['buddy']:.1f} times as many requests as buddy; in the paper
{paper_running['pages of 16'] / paper_running['buddy']:.1f} times.""")

# %% [markdown]
# ### Parallel sampling: fork, and copy on write
# Ask for four answers to one prompt. All four begin with the same tokens, so all four tables point at the same blocks, each with a *count* of how many do. When
# one wants to write into a block that others read, it first gets a copy of its own. Full blocks are never written again, so at most the last is copied.

# %% tags=["nbval-ignore-output"]
text = ("The lighthouse keeper kept three books. In the first he wrote down the ships that passed, in the second the ships that did not, and in the "
        "third, which he showed to nobody, what he thought about while he waited. On the last page of the third book it said:")
ids, more, answers = decoder.tokenizer.encode(text), 16, ("a", "b", "c", "d")
cache = PagedCache.over(decoder, BlockTables(BlockPool(64, b)))
cache.add("a")
logits = decoder.step({"a": ids}, cache).expand(len(answers), -1)
for child in answers[1:]:
    cache.fork("a", child)                              # no byte moves
copies = cache.tables.blocks_needed(dict.fromkeys(answers, 1))
sampling = Sampling(temperature=0.8, top_p=0.95, seed=3)
generator = sampling.generator(decoder.device)
written = {name: [] for name in answers}
for _ in range(more):
    chosen = dict(zip(answers, sample(logits, sampling, generator).tolist(), strict=True))
    for name, token_id in chosen.items():
        written[name].append(token_id)
    logits = decoder.step({name: [token_id] for name, token_id in chosen.items()}, cache)
for name in answers:
    print(f"{name}: … {decoder.tokenizer.decode(written[name])!r}")

# %%
full, last = len(ids) // b, -(-(len(ids) + more) // b)
blocks = 0
for _ in range(full):
    blocks += 1                                         # a full block of the prompt, held once for all four
for _ in answers:
    blocks += last - full                               # each answer's own: the prompt's last, copied, and what follows
assert blocks == full + len(answers) * (last - full) == cache.tables.pool.used
assert len(ids) % b and copies == len(answers) - 1      # three copy; the last of the four may keep the block

per_block = b * KV
Table(["four answers", "blocks", "bytes"],
      [["each on its own", str(len(answers) * last), si(len(answers) * last * per_block, "B")],
       ["forked", str(blocks), si(blocks * per_block, "B")],
       ["saved", f"{1 - blocks / (len(answers) * last):.0%}", si((len(answers) * last - blocks) * per_block, "B")]],
      numeric=["blocks", "bytes"], title=f"{len(ids)} tokens of prompt, {more} of each answer")

# %% [markdown]
# Predicted and allocated, to the block. Beam search forks in the same way, only all the time: a beam that is continued twice is forked, one that is dropped
# is freed.
#
# ### A hit, on the clock
# First: does a hit change the answer? The same 576 tokens, once computed whole without any cache, once behind a hit.

# %%
cache = PagedCache.over(decoder, BlockTables(BlockPool(256, b), prefix_caching=True))
system = random_tokens(decoder, 1, SYSTEM)[0].tolist()
dice = torch.Generator().manual_seed(1)


def fresh(count: int) -> list[int]:
    return torch.randint(shape.V, (count,), generator=dice).tolist()


def first_token(found: int) -> torch.Tensor:
    """A prompt of 576 tokens, of which the cache knows the first `found`: from arrival to its first logits."""
    ids = system[:found] + fresh(SYSTEM + QUESTION - found)
    assert cache.add("user", ids) == found
    logits = decoder.step({"user": ids[found:]}, cache)
    cache.free("user")
    return logits


cache.add("everybody", system)
decoder.step({"everybody": system}, cache)
question = fresh(QUESTION)
known = cache.add("user", system + question)
behind_a_hit = decoder.step({"user": question}, cache)
cache.free("user")
alone = decoder(torch.tensor([system + question], device=decoder.device), None, last_only=True)[0]
torch.testing.assert_close(behind_a_hit, alone, rtol=1e-3, atol=1e-2)
f"{known} tokens found, and the same logits for all {shape.V:,} words of the vocabulary"

# %% tags=["nbval-ignore-output"]
ttft = {}
for name, found, repeats, parts in (("TTFT without a hit", 0, 3, cold.parts(machine)), ("TTFT with a hit of 512", SYSTEM, 7, ())):
    timing = bracketed(machine)(lambda found=found: first_token(found), repeats)
    ttft[found] = timing.median
    lesson.measure(name, timing, parts=parts)

# %% tags=["nbval-ignore-output"]
half = alternate({found: lambda found=found: first_token(found) for found in (256, 384)}, repeats=2, warmup=0)
ttft |= {found: timing.median for found, timing in half.items()}

known = sorted(ttft)
tokens = [SYSTEM + QUESTION - found for found in known]
works = [shape.step(1, new, SYSTEM + QUESTION, **FP32) for new in tokens]
fig, ax = plt.subplots(figsize=(6.2, 3.0))
beside(ax, known, [machine.napkin(work) for work in works], [machine.time(work, hit_ops).seconds for work in works],
             [ttft[found] for found in known])
ax.set(xlabel="tokens of the prompt that were found, of 576", ylabel="time to first token", xticks=known,
       title="What is known need not be computed")
plots.show(fig, "Time to first token against the tokens of the prompt that were found: " + "; ".join(
    f"{found} found, {si(ttft[found], 's')}" for found in known) + ".")

# %% [markdown]
# ### The price of the table
# First that all four read the same keys, however they lie; then the clock. And two small cases beside the large one.

# %% tags=["nbval-ignore-output"]
expected = one_token(decoder, plain)
for model, cache in ways.values():
    torch.testing.assert_close(one_token(model, cache), expected, rtol=1e-3, atol=1e-2)
times = alternate({name: step.run for name, step in steps.items()}, repeats=5)


def ratio(one: str, other: str) -> float:
    return float(np.median(np.divide(times[one].seconds, times[other].seconds)))


over = {"gathered": ratio("gathered, PyTorch", "contiguous, PyTorch"), "paged": ratio("paged, kernel", "contiguous, kernel")}
for name, value in over.items():
    lesson.measure(f"{name} over contiguous", value)

# %% tags=["nbval-ignore-output"]
gathering = steps["gathered, PyTorch"]
lesson.measure(GATHERS, gathering.time(machine, repeats=5), parts=gathering.parts(machine))

# %% tags=["nbval-ignore-output"]
small = {}
for context in (512, 64):                               # one sequence of few tokens
    ours = {"contiguous": ContiguousCache.for_model(decoder, 1, context), "paged": PagedCache.for_model(decoder, 1, context)}
    for cache in ours.values():
        decoder(random_tokens(decoder, 1, context - 1), cache, last_only=True)

    def next_token(cache, context=context) -> None:
        cache.truncate(context - 1)
        kernels(token[:1], cache, last_only=True)

    both = alternate({name: lambda cache=cache: next_token(cache) for name, cache in ours.items()}, repeats=11)
    small[context] = {name: timing.median for name, timing in both.items()}
    small[context]["ratio"] = float(np.median(np.divide(both["paged"].seconds, both["contiguous"].seconds)))

fig, ax = plt.subplots(figsize=(6.6, 2.6))
ax.barh(list(predicted), [each.seconds for each in predicted.values()], color=plots.ROOFLINE, alpha=0.35, height=0.62, label="calibrated roofline")
ax.plot([timing.median for timing in times.values()], list(times), "o", color=plots.MEASURED, label="measured")
ax.set(xlabel=f"a step of {B} sequences at {S:,} tokens", title="Read the pages where they lie: do not gather them")
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
plots.units(ax.xaxis, "s")
fig.legend(loc="outside lower center", ncols=2)
plots.show(fig, f"A step of {B} sequences at {S:,} tokens, predicted and measured: " + "; ".join(
    f"{name} {si(predicted[name].seconds, 's')} and {si(timing.median, 's')}" for name, timing in times.items()) + ".")
Table(["step by the kernel", "contiguous", "paged", "ratio"],
      [[f"{B} sequences, {S:,} tokens each", si(times["contiguous, kernel"].median, "s"), si(times["paged, kernel"].median, "s"), f"{over['paged']:.2f} ×"]]
      + [[f"1 sequence, {context:,} tokens", si(row["contiguous"], "s"), si(row["paged"], "s"), f"{row['ratio']:.2f} ×"]
         for context, row in small.items()],
      numeric=["contiguous", "paged", "ratio"])

# %% [markdown]
# ### Swap, or compute anew
# Both for several lengths. The sequence that comes back must be the one that went.

# %% tags=["nbval-ignore-output"]
LENGTHS = (4, 16, 64, 256, 512)


def first_block() -> torch.Tensor:
    return swapping.keys[:, swapping.tables.blocks["sequence"][0]].clone()


before = first_block()
swapping.swap_out("sequence")
swapping.keys.zero_()                             # whatever is there afterwards has come back
swapping.swap_in("sequence")
assert before.any() and torch.equal(before, first_block())

prefills = {length: StepOf(decoder, "prefill", 1, length) for length in LENGTHS}
carried, computed = {}, {}
for length in reversed(LENGTHS):
    swapping.truncate(length, "sequence")
    timing = alternate({"swap": lambda: out_and_in(swapping), "recompute": prefills[length].run}, repeats=3 if length > 100 else 5)
    carried[length], computed[length] = timing["swap"].median, timing["recompute"].median
    if length == SYSTEM:
        lesson.measure("swap 512 tokens out and in", bracketed(machine)(lambda: out_and_in(swapping), repeats=9))
        lesson.measure("recompute 512 tokens", recompute.time(machine))

# %% tags=["nbval-ignore-output"]
over_network = {length: 2 * length * KV / NETWORK for length in LENGTHS}
advantage = [math.log(over_network[length] / computed[length]) for length in LENGTHS]       # above 0: computing is the faster

fig, ax = plt.subplots(figsize=(7.0, 3.5))
x = np.unique(np.geomspace(LENGTHS[0], LENGTHS[-1], 40).round().astype(int))
ax.loglog(x, [swapped(int(length)).seconds for length in x], color=plots.COLOURS[0])
ax.loglog(x, [recomputed(int(length)).seconds for length in x], color=plots.COLOURS[1])
ax.loglog(x, 2 * x * KV / NETWORK, ":", color=plots.COLOURS[5])
for values, colour, label in ((carried, plots.COLOURS[0], "swap, in memory"), (computed, plots.COLOURS[1], "recompute")):
    ax.plot(LENGTHS, [values[length] for length in LENGTHS], "o", color=colour, label=f"{label}: measured")
ax.plot([], [], ":", color=plots.COLOURS[5], label="swap, over 100 Mbit/s: on paper")
if advantage[0] < 0 < advantage[-1]:
    crossing = float(np.exp(np.interp(0, advantage, np.log(LENGTHS))))          # a straight line between two lengths, on log-log axes
    lesson.measure("even at, over 100 Mbit/s", crossing)
    ax.axvline(crossing, color=plots.TEXT, linewidth=0.8, linestyle=":")
else:
    print(f"On this machine the two do not cross between {LENGTHS[0]} and {LENGTHS[-1]} tokens.")
ax.set(xlabel="tokens of the sequence", ylabel="time", title="Predicted (lines) and measured: a thin link loses from some length on")
ax.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
ax.minorticks_off()
plots.units(ax.yaxis, "s")
fig.legend(loc="outside lower center", ncols=3)
plots.show(fig, "Time to swap and to recompute: " + "; ".join(
    f"{length} tokens, {si(carried[length], 's')} and {si(computed[length], 's')}, and {si(over_network[length], 's')} over the network" for length in LENGTHS) + ".")

# %% [markdown]
# ## Reconciliation: what the differences are made of

# %% [markdown]
# First commit yourself: what is the largest difference between napkin and measured? Write one of the causes over the dots.

# %%
lesson.cause(GATHERS, ...)                  # "products", "attention", "element-wise", "launches",
lesson.cause("TTFT without a hit", ...)     # "memory was slower than calibrated" (or faster; or compute), "not explained"

# %% tags=["nbval-ignore-output"]
lesson.explain(GATHERS)

# %% tags=["nbval-ignore-output"]
lesson.explain("TTFT without a hit")

# %% tags=["nbval-ignore-output"]
lesson.table()

# %% tags=["nbval-ignore-output"]
swap_rate, attention = 4 * SYSTEM * KV / carried[SYSTEM], {part["name"]: part for part in lesson.rows[GATHERS].parts}["attention"]
Markdown(f"""**Copies.** Swapping moved its bytes at {si(swap_rate, 'B/s')}, {swap_rate / machine.bandwidth_at():.0%} of the bandwidth that we calibrate. The attention that gathers took
{si(attention['measured_s'], 's')}; to read keys and values once, as the napkin counts, takes {si(attention['napkin_s'], 's')}.""")

# %% [markdown]
# Two things remain that no clock shows.
#
# - **Whom you ask.** The napkin's mean request is not the mean request in memory. Long requests are over-represented in any snapshot, as full buses are among the buses
#   that passengers ride. The prediction that weighs each request by its steps needs no factor.
# - **A waste that the theory did not list.** Pages lose half a block each, and a little more: blocks stay free because the next prompt at the door needs more
#   than are left. It is bounded by one prompt, in all of the memory.
#
# On a GPU each block that is swapped is a transfer of its own, which is the paper's reason why tiny blocks swap badly (its section 7).
#
# ### When does paging lose?
# - **When nobody waits.** With one user, or with room for all, waste is free. Paging then only costs its operations: see the table of small cases.
# - **When all lengths are known and equal.** A benchmark with 1,024 tokens in and 128 out can reserve exactly that, in long pieces, and waste nothing.
# - **When the kernel has to gather.** The gain in memory is quickly paid back in bytes moved. Paging needs an attention that reads pages where they lie.
# - **When it is overbooked.** Nothing is reserved, so a machine that admits too many must throw some out again, and their work is carried twice or done
#   twice. Reservation cannot get there.
# - **When a prefix is short or rare.** A hit saves whole blocks only, and hashing and keeping them is not free; prompts that differ in their first words never hit.

# %% [markdown]
# ## Play and exercises
# The slider with the three allocators is above; try to find a step at which buddy runs more requests than reservation, and one at which it uses less of the memory, and say why.
#
# ### 1 · A block table by hand
# A sequence's table says where each of its blocks lies: `table[0]` holds its first `block_size` tokens, `table[1]` the next. A *slot* is a token's place in the pool:
# block number times block size, plus the offset within the block. In which slot lies token `i`, counted from 0? Do the first by hand.

# %% tags=["exercise", "exercise:slot_of"]
def slot_of(i, table, block_size):
    return ...


lesson.exercise(
    "slot_of", slot_of,
    cases={
        (0, (7, 1, 3), 4): 28,          # the paper's figure 6: the first block of the prompt lies in block 7
        (6, (7, 1, 3), 4): 6,           # its seventh token: block 1, offset 2
        (8, (7, 1, 3), 4): 12,          # the first token of the third block
        (1023, tuple(range(63, -1, -1)), 16): 15,
        (5, (9, 9, 2, 0, 4, 1), 1): 1,  # blocks of one token: the table says it all
    },
    nudge="Which block of the sequence, and how far into it?",
    means="one division, one look-up: that is all that paging adds to the address of a key.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `i // block_size` is the number of the block within the sequence, `i % block_size` the offset in it.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def slot_of(i, table, block_size):
#     return table[i // block_size] * block_size + i % block_size
# ```
#
# </details>

# %% [markdown]
# ### 2 · Which KV format did they use?
# A published table says how fast GPT-J served 1,024 requests of 128 tokens in and 128 out on one H100. It says that the weights were fp8. It does not say what the
# cache was. But the memory does. Given the bytes of memory, the bytes of weights, the tokens in flight and the *numbers* kept for one token (2·L·K·H), which is the
# widest of 4, 2 and 1 bytes per number that fits? The cases are rows of the library's table of published runs.

# %%
rows = {run.id: run for run in published_runs() if run.id in ("r052", "r056", "r076")}
cases = {}
for run, answer in ((rows["r052"], 1), (rows["r056"], 1), (rows["r076"], 2)):          # GPT-J and LLaMA-7B on an H100; GPT-J on an A100
    kept = int(2 * run.layers * run.n_kv_heads * run.head_dim)
    cases[run.mem_GB_per_device * 1e9, run.weight_GB * 1e9, int(run.batch * (run.prompt_len + run.gen_len)), kept] = answer

# %% tags=["exercise", "exercise:widest"]
def widest(memory, weights, tokens, numbers):
    return ...


lesson.exercise(
    "widest", widest, cases=cases,
    nudge="Try the widest first: does the cache fit into what the weights leave?",
    means="1,024 × 256 tokens on that H100 can only have been 8 bits wide. A capacity proves what a table leaves out.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# (memory - weights) / (tokens · numbers) is the most bytes that a number may have.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def widest(memory, weights, tokens, numbers):
#     most = (memory - weights) / (tokens * numbers)
#     return next(size for size in (4, 2, 1) if size <= most)
# ```
#
# </details>

# %% [markdown]
# ### 3 · Four answers, how many blocks?
# A prompt of P tokens is forked into `samples` sequences, and each writes n tokens (at least one). How many blocks of b tokens are in use at the end? Full blocks of the prompt are
# shared; a block that is written to is not.

# %% tags=["exercise", "exercise:blocks_in_use"]
def blocks_in_use(P, n, samples, b):
    return ...


lesson.exercise(
    "blocks_in_use", blocks_in_use,
    cases={
        (64, 16, 1, 16): 5,             # alone: nothing to share
        (64, 16, 4, 16): 8,             # the prompt ends with a block: no copy at all
        (65, 1, 4, 16): 8,              # it does not: each has its own fifth block
        (1000, 100, 10, 16): 132,       # instead of 690
        (15, 1, 8, 16): 8,              # shorter than a block: nothing shared
        (1000, 100, 10, 1): 2000,       # blocks of one token share to the last
    },
    nudge="P // b blocks are full when the fork happens.",
    means="the longer the prompt, the nearer ten answers come to the price of one.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A sequence of P + n tokens has ⌈(P + n)/b⌉ blocks. Of those, P // b are everybody's.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def blocks_in_use(P, n, samples, b):
#     shared = P // b
#     return shared + samples * (-(-(P + n) // b) - shared)
# ```
#
# </details>

# %% [markdown]
# ### 4 · The best block size
# A sequence of S tokens wastes b/2 tokens' room in its last block, `per_token` bytes each, and has S/b entries in its table. Say that an entry costs
# `per_entry` bytes: those it takes, or those that could have been read in the time of looking it up. Which b makes the sum smallest? (It need not be a whole number.)

# %% tags=["exercise", "exercise:best_block"]
def best_block(S, per_token, per_entry):
    return ...


lesson.exercise(
    "best_block", best_block,
    cases={
        (1024, 819_200, 4): 0.1,                # OPT-13B, 4 bytes an entry: memory alone wants blocks of one token
        (1024, 819_200, 102_400): 16.0,         # a look-up as dear as an eighth of a token: 16
        (4096, 819_200, 102_400): 32.0,         # four times the length, twice the block
        (1024, 131_072, 65_536): 32.0,
    },
    nudge="The one term grows with b, the other falls: set the derivative to zero.",
    means="what fixes b is not the table's bytes but the time of a look-up, and how many tokens a kernel likes to read in a row.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The cost is b/2 · per_token + S/b · per_entry. Its derivative is per_token/2 - S · per_entry / b².
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def best_block(S, per_token, per_entry):
#     return (2 * S * per_entry / per_token) ** 0.5
# ```
#
# </details>

# %% [markdown]
# ### 5 · Harder: swap or recompute?
# A sequence of S tokens is thrown out. Swapping takes its bytes over the `link` twice. Recomputing takes its FLOPs at `peak`, but never less than the reading of the `weights` at
# `bandwidth`. All in bytes, FLOPs and seconds. Return "swap" or "recompute", whichever is faster.

# %% tags=["exercise", "exercise:cheaper"]
def cheaper(S, per_token, link, weights, bandwidth, flops_per_token, peak):
    return ...


lesson.exercise(
    "cheaper", cheaper,
    cases={
        (100, 800_000, 32e9, 26e9, 2e12, 26e9, 312e12): "swap",             # OPT-13B: 5 ms of link, 13 ms of weights
        (2000, 800_000, 32e9, 26e9, 2e12, 26e9, 312e12): "swap",            # and still: 100 ms against 167
        (2000, 800_000, 16e9, 26e9, 2e12, 26e9, 312e12): "recompute",       # half the link, and no more
        (50, 114_688, 32e9, 1.2e9, 2e12, 0.88e9, 312e12): "swap",           # Qwen3-0.6B: below the floor
        (500, 114_688, 32e9, 1.2e9, 2e12, 0.88e9, 312e12): "recompute",     # above it
    },
    nudge="Two times, and one of them is a maximum.",
    means="a short sequence is worth carrying; a long one of a small model with a thick cache is not.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `2 * S * per_token / link` against `max(weights / bandwidth, S * flops_per_token / peak)`.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def cheaper(S, per_token, link, weights, bandwidth, flops_per_token, peak):
#     swap = 2 * S * per_token / link
#     recompute = max(weights / bandwidth, S * flops_per_token / peak)
#     return "swap" if swap < recompute else "recompute"
# ```
#
# </details>

# %% [markdown]
# **To take away.** Reservation holds the longest answer for everybody, and uses a fifth to two fifths of its room. Blocks waste half a block a sequence, whatever the lengths, and so several times as
# many requests share each read of the weights. The table is cheap only if attention reads pages where they lie, as the times above show, and it brings sharing for free: a common prompt is stored
# once and computed once, four answers cost little more than one. The price is that nothing is promised: a full machine must throw somebody out. Whom, and when, is the scheduler's
# business (lesson 05).
#
# Further reading: Kwon et al. 2023 (PagedAttention; section 3 on the waste, 4.4 on sharing, 4.5 on preemption, 7 on block sizes); Yu et al. 2022 (Orca).
