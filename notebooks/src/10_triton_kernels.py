# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10 · What does a kernel really read?
# ## Question
# All lessons so far said: a decode step reads each key and each value **once**. A formula can say so. But a formula reads nothing. A *kernel* does, and
# a kernel is a program: it asks for a block of memory, and another, and nobody stops it from asking for the same block eight times.
#
# In this lesson we go from one query and one key to **flash decoding**, a few lines at a time, in [Triton](https://triton-lang.org): Python in which one
# works on blocks of numbers, and which a compiler turns into the code of a GPU. You need no GPU. Triton has an *interpreter* that runs the same kernels
# on the CPU, thousands of times slower. And as it runs them, we can stand beside and **count every byte they ask for**.
#
# Three guesses before you go on. Eight query heads share one KV head, so the cache is eight times smaller: how many times fewer bytes does the obvious
# kernel read? One user with a long context, on a GPU of 132 multiprocessors: how many of them work? And if the compiler does not know that an address is
# a multiple of 16, how many bytes does one load instruction fetch?

# %% tags=["nbval-ignore-output"]
import os

os.environ["TRITON_INTERPRET"] = "1"            # kernels run in the interpreter, on any machine. Triton looks once: when it is imported

import inspect
import json
import math
import re
import subprocess
import sys
import textwrap
from collections import Counter
from importlib import import_module
from statistics import median

from clawdemy_infer.attention import attend
from clawdemy_infer.envelope.roofline import Part, Prediction
from clawdemy_infer.from_config import catalog
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.parts import Parts, Rate
from clawdemy_infer.lesson.tables import Table, si
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.machine.present import bracketed
from clawdemy_infer.published.rows import read as published_runs
from clawdemy_infer.published.setting import bytes_per_weight, chip, shape_of
from clawdemy_infer.timing import now, stopwatch

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from torch.nn.functional import scaled_dot_product_attention

try:
    from clawdemy_kernels.launch import tl, triton
    from clawdemy_kernels.traffic import counting
    TRITON = True
except ImportError:
    TRITON = False
    print("There is no Triton for this system: kernels are neither run nor counted here, and plain PyTorch stands in for them.")

plots.use_style()
plt.rcParams["figure.dpi"] = plt.rcParams["savefig.dpi"] = 90      # many figures, and the file stays small
plt.rcParams["figure.dpi"] = 90
torch.manual_seed(10)
machine = this_machine("cpu")
lesson = Lesson("10 triton_kernels", machine=machine)
lesson.card()

# %% [markdown]
# Two helpers. `watch` runs one of the library's kernels in the interpreter and counts, argument by argument, what it asks for. `loop_of` shows a kernel's
# inner loop, which is where the bytes are.

# %%
def watch(name, **arguments):
    """What the kernel returns, and its traffic by argument; (None, None) where there is no Triton."""
    if not TRITON:
        return None, None
    kernel = getattr(import_module(f"clawdemy_kernels.{name}"), name)
    with counting(**{key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}) as traffic:
        out = kernel(**arguments)
    return out, traffic


def loop_of(name):
    """The inner loop of a kernel of the library, as it stands in its file."""
    if TRITON:
        module = import_module(f"clawdemy_kernels.{name}")
        lines = inspect.getsource(getattr(module, f"{name}_kernel").fn).splitlines()
        first = next(i for i, line in enumerate(lines) if line.strip().startswith("for "))
        body = next((i for i, line in enumerate(lines) if i > first and line.strip() and not line.startswith(" " * 8)), len(lines))
        print(textwrap.dedent("\n".join(lines[first:body])).rstrip())


# %% [markdown]
# ## Envelope: one query, one key at a time
# Attention is a weighted mean: each key gets a score, scores become weights by softmax, and the weights mix the values. Softmax wants the *largest* score
# (or else e^score overflows) and the *sum* of all, and both are only known at the end. Must a kernel then walk over the keys twice, or keep all scores?
#
# No. Keep three things: the **largest** score so far, the **total** of the weights, and the weighted sum **acc** of the values. When a larger score
# turns up, everything summed so far *shrinks* by the same factor, and one goes on (Milakov and Gimelshein 2018). Here it is with six keys:

# %%
dice = np.random.default_rng(3)
keys, values, query = dice.normal(size=(6, 4)), dice.normal(size=(6, 4)), 3 * dice.normal(size=4)

largest, total, acc, steps = -math.inf, 0.0, np.zeros(4), []
for key, value in zip(keys, values, strict=True):
    score = query @ key / math.sqrt(4)
    new = max(largest, score)
    shrink = math.exp(largest - new)                    # exp(-inf) = 0 at the first key: there is nothing to shrink
    weight = math.exp(score - new)
    largest, total, acc = new, total * shrink + weight, acc * shrink + weight * value
    steps.append([f"{score:.2f}", f"{largest:.2f}", f"{shrink:.3f}", f"{total:.3f}", f"{acc[0] / total:.3f}"])

scores = keys @ query / math.sqrt(4)
softmax = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
assert np.allclose(acc / total, softmax @ values)       # one walk, and nothing kept but six numbers
Table(["score", "largest", "shrink", "total", "acc / total, first number"], steps,
      ["score", "largest", "shrink", "total", "acc / total, first number"])

# %% [markdown]
# Look at the column *shrink*: it is 1 unless a record falls. That loop **is** the kernel. All that follows is about *who* runs it over *which* keys.
#
# ### First kernel: a program for each query head
# A Triton kernel is launched as a grid of **programs**, and each knows its place in it. The obvious grid for decoding has one program for each
# query head of each
# sequence. A program walks over the keys of its KV head in blocks of 64, by the loop above. `tl.load` takes a block of *addresses* and a **mask**
# that says which of
# them to touch:

# %% tags=["nbval-ignore-output"]
loop_of("decode_naive")

# %% [markdown]
# `rescale` is the step from above, for a block of scores. Now the bytes. We take the real model's heads, two sequences of crooked lengths, and
# numbers of 2 bytes.
# We count as the programs do:

# %%
shape = catalog.model("smollm2-135m")
N, K, H = shape.N, shape.K, shape.H
G, e = N // K, 2                                        # query heads to a KV head; bytes of a bf16 number
lengths = [177, 241]
B, S = len(lengths), sum(lengths)

naive = dict.fromkeys(("q", "k", "v", "seq_lens", "other"), 0)
for length in lengths:
    for _head in range(N):                              # each of these is a program
        naive["seq_lens"] += 4                           # how long is my sequence?
        naive["q"] += H * e
        naive["k"] += length * H * e                    # all keys of its KV head, although two others ask for the same
        naive["v"] += length * H * e
        naive["other"] += H * e                         # the output

assert naive["k"] + naive["v"] == 2 * N * S * H * e
assert naive["q"] + naive["other"] == 2 * B * N * H * e

# %% [markdown]
# And now we let it run, and count. The counter wraps the interpreter's load and store; it knows nothing of our envelope. **asked** is what the
# instructions name,
# **distinct** what remains if each address counts once.

# %%
q = torch.randn(B, N, H).bfloat16()
k, v = torch.randn(2, B, K, 256, H).bfloat16()
how_long = torch.tensor(lengths, dtype=torch.int32)
SUMMARY = {}


def reference(q, k, v, lengths):
    """torch's own attention in fp64, a sequence at a time."""
    each = [scaled_dot_product_attention(q[b:b + 1, :, None].double(), *(x[b:b + 1, :, :length].double() for x in (k, v)), enable_gqa=True)
            for b, length in enumerate(lengths)]
    return torch.cat(each)[:, :, 0]


def beside(kernel, envelope, traffic):
    """The envelope beside the counter, to the byte; and a row of the ledger."""
    lesson.predict(f"bytes of {kernel}", sum(envelope.values()), unit="B")
    if traffic is not None:
        assert {tensor: traffic[tensor].asked for tensor in envelope} == envelope
        assert traffic.asked == sum(envelope.values())                          # and nothing else was touched
        lesson.measure(f"bytes of {kernel}", traffic.asked)
        SUMMARY[kernel] = (sum(envelope.values()), traffic.asked, sum(each.distinct for each in traffic.tensors.values()))
    rows = [[tensor, f"{bytes:,}", *((f"{traffic[tensor].asked:,}", f"{traffic[tensor].distinct:,}") if traffic else ("–", "–"))]
            for tensor, bytes in envelope.items()]
    return Table(["tensor", "envelope", "asked, counted", "distinct"], rows, ["envelope", "asked, counted", "distinct"], title=kernel)


# %%
wanted = reference(q, k, v, lengths)
out, traffic = watch("decode_naive", q=q, k=k, v=v, seq_lens=how_long)
if TRITON:
    torch.testing.assert_close(out.double(), wanted, rtol=2e-2, atol=2e-2)     # bf16 keeps three digits
beside("decode_naive", naive, traffic)

# %% [markdown]
# Equal, to the byte. And of the keys and values, three times as many were asked for as there are: **G = 3 query heads read each KV head, each for itself.** The
# model was trained to share (lesson 03); the kernel does not.
#
# ### Second kernel: one program for a group
# The G queries of a group want the same keys. So let *one* program serve them all: load a block of keys once, and multiply it with a small matrix of G queries.

# %% tags=["nbval-ignore-output"]
loop_of("decode_grouped")

# %%
grouped = dict.fromkeys(naive, 0)
for length in lengths:
    for _kv_head in range(K):                           # a third of the programs
        grouped["seq_lens"] += 4
        grouped["q"] += G * H * e                       # G queries each
        grouped["k"] += length * H * e                  # and the keys once
        grouped["v"] += length * H * e
        grouped["other"] += G * H * e

assert grouped["k"] + grouped["v"] == 2 * K * S * H * e == S * shape.kv_bytes_per_token("bf16") // shape.L
out, traffic = watch("decode_grouped", q=q, k=k, v=v, seq_lens=how_long)
if TRITON:
    torch.testing.assert_close(out.double(), wanted, rtol=2e-2, atol=2e-2)
beside("decode_grouped", grouped, traffic)

# %% [markdown]
# Asked equals distinct: every byte once. This is what the formula of lesson 01 had promised.
#
# What does it cost? `tl.dot` goes to the tensor cores, and those multiply **16 rows at least**. A group of 3 is padded to 16, and the last block of keys to 64.
# The counter sees every product:

# %%
useful = 4 * N * H * S                                  # 2 for the scores, 2 for the values, each query head, number and key
rows_padded = 16 / G
keys_padded = sum(64 * math.ceil(length / 64) for length in lengths) / S
done = 4 * K * 16 * H * sum(64 * math.ceil(length / 64) for length in lengths)
if TRITON:
    assert traffic.flops == done
assert math.isclose(done / useful, rows_padded * keys_padded)
Markdown(f"**{done / useful:.1f} times** the useful FLOPs: {rows_padded:.2f} by padding {G} rows to 16, {keys_padded:.2f} by padding the last blocks.")

# %% [markdown]
# Is that bad? Ask the roofline. For every key and value of H numbers the padded kernel does 4·16·H FLOPs and reads 4·H bytes:

# %%
intensity = 4 * 16 * H / (2 * H * e)
CARDS = {name: catalog.machine(name) for name in ("h100-sxm", "a100-80gb-sxm", "t4")}
Table(["machine", "ridge in fp16, FLOPs per byte", "padded kernel", "tensor cores busy"],
      [[card.name, f"{card.ridge('fp16'):.0f}", f"{intensity:.0f}", f"{intensity / card.ridge('fp16'):.0%}"] for card in CARDS.values()],
      ["ridge in fp16, FLOPs per byte", "padded kernel", "tensor cores busy"])

# %% [markdown]
# Far below every ridge. **The waste is arithmetic that would idle anyway**; bytes are what counts. That is a good bargain on a GPU with tensor cores. On a
# processor that has none it is not: there the padding is paid in full.
#
# ### Third kernel: split the sequence
# A GPU is many small processors, its **multiprocessors** (SMs). A program runs on one of them. And one SM alone cannot draw all that memory
# delivers: its fair share is
# bandwidth / SMs. So count programs. One user of Llama-3-8B at 8,192 tokens, one layer:

# %%
llama = catalog.model("llama-3-8b")
SMS = {name: chip(card.name).cores for name, card in CARDS.items()}             # data/chips.toml


def seconds(asked, programs, bandwidth, sms):
    """Wave after wave of programs, one on each SM, each drawing its SM's share of the bandwidth."""
    waves = math.ceil(programs / sms)
    return waves * (asked / programs) / (bandwidth / sms)


h100, sms, context = CARDS["h100-sxm"], SMS["h100-sxm"], 8192
once = 2 * llama.K * context * llama.H * 2                                      # the KV of one layer
each = once * llama.N // llama.K                                                # read by each query head
ONE_USER = {"a program for each query head": (llama.N, each), "a program for each group": (llama.K, once)}
Table(["batch of 1", "programs", f"of {sms} SMs work", "bytes asked for", "predicted"],
      [[name, str(programs), f"{min(1, programs / sms):.0%}", si(asked, "B"), si(seconds(asked, programs, h100.bandwidth_at(), sms), "s")]
       for name, (programs, asked) in ONE_USER.items()], ["programs", f"of {sms} SMs work", "bytes asked for", "predicted"], title=h100.name)

# %% [markdown]
# **Sharing has gained nothing.** A quarter of the bytes, by a quarter of the programs! Nearly the whole GPU sleeps while a few SMs read the cache.
#
# The way out is in the triple (largest, total, acc). It does not matter who began: a triple of the first half of the keys and one of the second can
# be *joined*,
# by the same shrinking. So cut the sequence into P **parts**, let each part of each KV head be a program, and join the P triples in a second, small
# kernel. This is
# **flash decoding** (Dao et al. 2023), and people call the cut *split-K*. The join is exercise 3; its price are the triples, written and read in fp32:

# %%
P = 3
length = lengths[1]
split = dict.fromkeys(naive, 0)
for _kv_head in range(K):
    for _part in range(P):                              # each of these is a program
        split["seq_lens"] += 4
        split["q"] += G * H * e                         # every part needs the queries
        split["other"] += G * (H + 2) * 4               # leaves acc, largest and total
split["k"] = split["v"] = K * length * H * e            # the parts share the keys out among themselves
for _head in range(N):                                  # and the join:
    split["other"] += P * (H + 2) * 4                   # reads all parts
    split["other"] += H * e                             # writes the output

assert split["other"] == 2 * P * N * (H + 2) * 4 + N * H * e
one = {"q": q[1:], "k": k[1:], "v": v[1:], "seq_lens": how_long[1:]}
out, traffic = watch("decode_split", **one, parts=P)
if TRITON:
    torch.testing.assert_close(out.double(), wanted[1:], rtol=2e-2, atol=2e-2)
beside("decode_split", split, traffic)

# %% [markdown]
# ### Paging: one look-up more
# In a server the cache lies in blocks all over the memory (lesson 06), and a table names them. For a kernel that means: before the address of a key
# can be known, load an
# entry of the table. One line:

# %% tags=["nbval-ignore-output"]
loop_of("decode_paged")

# %%
C = 16                                                  # tokens of a block
blocks = torch.randperm(256 // C, generator=torch.Generator().manual_seed(1)).int()
table = blocks[None]                                    # the sequence's blocks, in no order at all
pool_k, pool_v = (torch.empty(256 // C, K, C, H, dtype=torch.bfloat16) for _ in range(2))
for pool, whole in ((pool_k, one["k"]), (pool_v, one["v"])):
    pool[blocks.long()] = whole[0].view(K, 256 // C, C, H).transpose(0, 1)

paged = split | {"block_table": K * length * 4}               # each program looks up each of its tokens, at 4 bytes an entry
out, traffic = watch("decode_paged", q=one["q"], k=pool_k, v=pool_v, block_table=table, seq_lens=one["seq_lens"], parts=P)
if TRITON:
    torch.testing.assert_close(out.double(), wanted[1:], rtol=2e-2, atol=2e-2)
    assert traffic["k"].sectors == traffic["k"].asked   # whole sectors of 32 bytes: blocks are long enough to lose nothing
beside("decode_paged", paged, traffic)

# %% [markdown]
# Not a byte more of keys and values. The table is asked for once a token, but its *distinct* bytes are few: neighbours stand in one block, and the
# entry comes from
# the cache next to the SM. What paging really costs is **waiting**: an address depends on a load.
#
# ### Weights of 4 bits
# Same game, other stream. In a step for one user the weights are most of the bytes (lesson 07), and int4 quarters them. A kernel reads bytes, each
# of which holds two weights,
# takes them apart (`& 15`, `>> 4`), and multiplies by a **scale** for each group of 64:

# %% tags=["nbval-ignore-output"]
loop_of("linear_int4")

# %%
rows, columns, g = 128, 512, 64                         # outputs, inputs, weights to a scale
codes = torch.randint(16, (rows, columns), generator=torch.Generator().manual_seed(2))
scales, zeros = torch.rand(columns // g, rows).half() / 8, torch.full((columns // g, rows), 8.0).half()
x = torch.randn(1, columns).bfloat16()

low_bit = {
    "packed": rows * columns // 2,                      # half a byte a weight
    "scales": rows * columns // g * 2,                  # 2 bytes for g of them
    "zeros": rows * columns // g * 2,
    "x": rows // 32 * columns * 2,                      # every program has 32 outputs, and reads all inputs
    "other": None,                                      # sums in fp32, a row for each of the parts
}
parts = max(1, min(columns // g // 4, 4 * 132 // (rows // 32)))
low_bit["other"] = parts * rows * 4
if TRITON:
    from clawdemy_kernels.linear_int4 import pack_int4

    out, traffic = watch("linear_int4", x=x, packed=pack_int4(codes, g), scales=scales, zeros=zeros)
    weights = (codes - 8) * scales.T.repeat_interleave(g, dim=1).double()
    torch.testing.assert_close(out.double(), x.double() @ weights.T, rtol=2e-2, atol=5e-2)
    assert traffic["scales"].sectors == traffic["scales"].asked         # kept [groups, outputs]: neighbours in a block are neighbours in memory
else:
    traffic = None
beside("linear_int4", low_bit, traffic)

# %% [markdown]
# Here too the parts are dealt out, for the same reason: too few programs would ask. And note how scales are kept. Were they stored output by
# output, each of 2 bytes would
# drag in a **sector** of 32, the smallest piece that a GPU's memory moves. A kernel of two lines that reads the scales of 32 outputs at a time,
# group after group, shows it:

# %%
lines = []
if TRITON:
    @triton.jit
    def scales_kernel(scales, out, of_output, of_group, N_BLOCK: tl.constexpr):
        n = tl.program_id(0) * N_BLOCK + tl.arange(0, N_BLOCK)
        tl.store(out + n, tl.load(scales + n * of_output + tl.program_id(1) * of_group))

    for name, kept in (("[groups, outputs]", scales.T), ("[outputs, groups]", scales.T.contiguous())):
        with counting(scales=kept) as seen_by:
            scales_kernel[(rows // 32, columns // g)](kept, torch.empty(rows).half(), *kept.stride(), N_BLOCK=32)
        lines.append([name, f"{seen_by['scales'].asked:,} B", f"{seen_by['scales'].sectors:,} B"])
    assert lines[1][2] == f"{8 * len(scales) * rows * 2:,} B"           # the 8 scales of an output are 16 bytes, and all of them come for the one that is asked for
Table(["scales kept as", "asked for", "sectors that move"], lines, ["asked for", "sectors that move"])

# %% [markdown]
# All kernels so far, on one page:

# %%
Table(["kernel", "envelope", "counted", "of it distinct", "asked for again"],
      [[name, f"{envelope:,} B", f"{counted:,} B", f"{distinct:,} B", f"{counted / distinct:.2f} ×"] for name, (envelope, counted, distinct) in SUMMARY.items()],
      ["envelope", "counted", "of it distinct", "asked for again"])

# %% [markdown]
# ## Prediction
# ### Three cards
# From bytes and programs to time: `seconds` above. P is what the library's `parts_for` chooses: two programs for each SM, and no part below two blocks of keys.
# One layer of Llama-3-8B, fp16 (a T4 has no bf16):

# %%
def parts_for(programs, tokens, cores):
    """As the library chooses."""
    return max(1, min(math.ceil(2 * cores / programs), tokens // 128))


def decode_bytes(kind, batch, context, parts=1, heads=llama, size=2):
    """(bytes asked for, programs) of one layer, by the envelopes above; all sequences of one length."""
    kv, queries = 2 * batch * heads.K * context * heads.H * size, batch * heads.N * heads.H * size
    if kind == "naive":
        return kv * heads.N // heads.K + 2 * queries, batch * heads.N
    if kind == "grouped":
        return kv + 2 * queries, batch * heads.K
    return kv + (parts + 1) * queries + 2 * parts * batch * heads.N * (heads.H + 2) * 4, batch * heads.K * parts


def predicted_on(card, kind, batch, context, parts=1):
    asked, programs = decode_bytes(kind, batch, context, parts)
    return seconds(asked, programs, CARDS[card].bandwidth_at(), SMS[card])


for kind, envelope in (("naive", naive), ("grouped", grouped)):         # the same as we counted program by program
    assert sum(decode_bytes(kind, 1, length, heads=shape)[0] for length in lengths) == sum(envelope.values()) - envelope["seq_lens"]
assert decode_bytes("split", 1, length, P, heads=shape) == (sum(split.values()) - split["seq_lens"], K * P)

lines = []
for batch, context in ((1, 8192), (1, 65_536), (64, 1024)):
    for card in CARDS:
        P_card = parts_for(batch * llama.K, context, SMS[card])
        times = {kind: predicted_on(card, kind, batch, context, P_card) for kind in ("naive", "grouped", "split")}
        lines.append([f"{batch} × {context:,}", CARDS[card].name, str(SMS[card]), *(si(t, "s") for t in times.values()), str(P_card),
                      si(2 * batch * llama.K * context * llama.H * 2 / CARDS[card].bandwidth_at(), "s")])
Table(["batch × context", "machine", "SMs", "naive", "grouped", "split", "P", "KV once"], lines, ["SMs", "naive", "grouped", "split", "P", "KV once"])

# %% [markdown]
# Read it line by line. With one user, sharing alone changes nothing, and splitting is everything. With 64 users every SM has work anyway, splitting
# is idle, and sharing gives its full factor of four. A decode kernel needs both, for it never knows who will come.
#
# ### This machine
# Cores are to a CPU what SMs are to a GPU. So the same arithmetic must hold here, in PyTorch, with the real model's heads: the attention of all 30 layers at
# 8,192 tokens, one sequence, in fp32. Four ways:
#
# - **copied out**: first copy every KV head G times, as plain code does (`repeat_interleave`): K and V are read, written G-fold, and read G-fold;
# - **each head reads**: torch's kernel, one query head at a time;
# - **shared**: the library's `attend`: the group as rows of one product;
# - **shared and split**: each KV head in as many parts as there are cores.
#
# And once more, shared with and without the split, for **one** KV head alone: what each of three cards would have if the model were dealt out to
# them (tensor parallelism).
# There a batch of one really is one program.
#
# The **napkin**: bytes asked for / bandwidth. A **better prediction** knows that a core alone does not get all of the bandwidth: it asks for a few
# lines, waits, multiplies, and asks again.
# We probe what **one core alone** makes of one KV head on one thread. Cores overlap their stalls and arithmetic, their *own time*, in waves of
# programs; only memory traffic is
# shared:
#
# $$t = \frac{\text{distinct bytes}}{\text{bandwidth}} + \frac{\text{waves}}{\text{programs}} \cdot \text{own time}$$
#
# The own time for bytes from memory is what one core alone takes, less their time on the bus. And what is asked for *again*, soon after, is still
# in the CPU's cache: for that we
# probe a core that reads one head over and over.
#
# Your own guess first: over the dots, as text with its unit, like `"20 ms"`.

# %%
lesson.guess("shared", ...)
lesson.guess("copied out", ...)

# %% tags=["nbval-ignore-output"]
L, context = shape.L, 8192
cores = torch.get_num_threads()
cache = torch.randn(L, 2, 1, K, context, H)             # K and V of every layer: more than any CPU cache holds
token = torch.randn(1, N, H)
KV = cache.numel() * 4
assert KV == shape.kv_bytes(1, context, "fp32")


def alone(rows: int, again: bool = False) -> float:
    """Bytes/s that torch's kernel makes of one KV head of each layer, for so many query rows, on one thread; `again`: always of the same."""
    torch.set_num_threads(1)
    lone, layers = torch.randn(1, 1, rows, H), [cache[0]] * L if again else cache
    timing = stopwatch(lambda: [scaled_dot_product_attention(lone, layer[0, :, :1], layer[1, :, :1]) for layer in layers], repeats=5)
    torch.set_num_threads(cores)
    return KV / K / timing.median


RATE = {1: alone(1), G: alone(G)}
RATE_AGAIN = alone(1, again=True)
bandwidth = machine.bandwidth_at()
P = 1 << (cores - 1).bit_length()                       # a power of two, so that it divides the context


def on_cores(programs, distinct, rows, again=0.0, copied=0.0):
    """Prediction for all layers, of which each starts so many programs, for bytes from memory, those asked for again, and those copied before."""
    own = max(0.0, distinct / RATE[rows] - distinct / bandwidth) + again / RATE_AGAIN
    seconds = {"copy": copied / bandwidth, "bus": distinct / bandwidth, "own time": math.ceil(programs / cores) / programs * own}
    spread = machine.spread_at("attention", "fp32")
    return Prediction({name: Part(each, spread) for name, each in seconds.items() if each}, 0.0, sum(seconds.values()))


PREDICTED = {
    "copied out": ((1 + 2 * G) * KV, on_cores(N, G * KV, 1, copied=(1 + G) * KV)), "each head reads": (G * KV, on_cores(N, KV, 1, again=(G - 1) * KV)),
    "shared": (KV, on_cores(K, KV, G)), "shared and split": (KV, on_cores(K * P, KV, G)),
    "one KV head": (KV / K, on_cores(1, KV / K, G)), "one KV head, split": (KV / K, on_cores(P, KV / K, G)),
}
for name, (asked, prediction) in PREDICTED.items():
    lesson.predict(name, asked / bandwidth, prediction, unit="s")
lesson.reveal(*PREDICTED)

# %% tags=["nbval-ignore-output"]
Table(["query rows to a KV head", "keys and values", "one core alone", "of the machine's bandwidth"],
      [[str(rows), where, si(rate, "B/s"), f"{rate / bandwidth:.0%}"]
       for rows, where, rate in ((1, "from memory", RATE[1]), (1, "again", RATE_AGAIN), (G, "from memory", RATE[G]))],
      ["query rows to a KV head", "one core alone", "of the machine's bandwidth"], title=f"{cores} cores")

# %% [markdown]
# That is a core's share. An SM's is far smaller: there are 132 of them, and 8 programs draw next to nothing.
#
# ## Measurement
# ### On this machine
# First that all ways give the same answer, then the clock. In two of them it is read between their parts too: copying and attention, a kernel and a
# join. The split is written out: torch's kernel for each part, which also returns log(total) + largest, and a join of
# three operations.

# %% tags=["nbval-ignore-output"]
partial = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu    # torch's own kernel, by the name under which it returns its log-sum too


room = torch.empty(2, 1, K, G, context, H)                                              # for the copies: used again in each layer


def copies(layer):
    return room.copy_(layer[:, :, :, None].expand_as(room)).flatten(2, 3)               # [2, 1, N, S, H]


def over_copies(copied):
    return scaled_dot_product_attention(token[:, :, None], *copied)[:, :, 0]


def copied_out(layer):
    return over_copies(copies(layer))


def each_head(layer):
    return scaled_dot_product_attention(token[:, :, None], *layer, enable_gqa=True)[:, :, 0]


def shared(layer):
    heads = G * layer.shape[2]
    return attend(token[:, :heads], *layer).view(1, heads, H)


def over_parts(layer):
    kv_heads = layer.shape[2]
    queries = token[:, :G * kv_heads].view(1, kv_heads, G, H).expand(P, -1, -1, -1)
    keys, values = (x[0].view(kv_heads, P, -1, H).transpose(0, 1) for x in layer)       # parts as a batch: [P, K, S/P, H], no copy
    return partial(queries, keys, values)                                               # [P, K, G, H] and [P, K, G]


def joined(parts):
    out, log_total = parts
    return (out * log_total.softmax(0)[..., None]).sum(0).view(1, -1, H)                # the join


def shared_and_split(layer):
    return joined(over_parts(layer))


single = cache[:, :, :, :1]                             # the first KV head of each layer
WAYS = {
    "copied out": (copied_out, cache), "each head reads": (each_head, cache), "shared": (shared, cache), "shared and split": (shared_and_split, cache),
    "one KV head": (shared, single), "one KV head, split": (shared_and_split, single),
}
for way in (copied_out, each_head, shared_and_split):
    torch.testing.assert_close(way(cache[0]), shared(cache[0]), rtol=1e-4, atol=1e-5)
torch.testing.assert_close(shared_and_split(single[0]), shared(single[0]), rtol=1e-4, atol=1e-5)

def watched(first, then, napkin, predicted):
    """Two parts of a way, the clock read between them: seconds of all layers. `napkin` and `predicted` by part."""
    runs = []
    for _ in range(5):
        took = dict.fromkeys(napkin, 0.0)
        for layer in cache:
            start = now()
            made = first(layer)
            between = now()
            then(made)
            for name, seconds in zip(took, (between - start, now() - between), strict=True):
                took[name] += seconds
        runs.append(took)
    taken = {name: median(run[name] for run in runs) for name in napkin}
    return Parts(taken, predicted, napkin, dict.fromkeys(taken, Rate(None, None, "")), sum(taken.values()), watching_s=0.0)


copy_s, copied_s = (1 + G) * KV / bandwidth, on_cores(N, G * KV, 1).seconds
PARTS = {
    "copied out": watched(copies, over_copies, {"copy": copy_s, "read": G * KV / bandwidth}, {"copy": copy_s, "read": copied_s}),
    "shared and split": watched(over_parts, joined, {"kernel": KV / bandwidth, "join": 0.0}, {"kernel": PREDICTED["shared and split"][1].seconds, "join": 0.0}),
}
times = bracketed(machine)({name: lambda way=way, of=of: [way(layer) for layer in of] for name, (way, of) in WAYS.items()}, repeats=7)
for name, timing in times.items():
    lesson.measure(name, timing, parts=PARTS.get(name, ()))

fig, ax = plt.subplots(figsize=(7.2, 3.3))
names = list(WAYS)
ax.barh(names, [lesson.rows[name].predicted for name in names], color=plots.ROOFLINE, alpha=0.35, height=0.62, label="one core alone, and waves")
ax.plot([lesson.rows[name].napkin for name in names], names, "|", color=plots.NAPKIN, markersize=15, markeredgewidth=2.5, label="napkin: bytes / bandwidth")
ax.plot([timing.median for timing in times.values()], names, "o", color=plots.MEASURED, label="measured")
ax.set(xlabel=f"attention of {L} layers at {context:,} tokens", title="Six ways to read a cache: bytes, waves of programs, and the clock")
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
plots.units(ax.xaxis, "s")
fig.legend(loc="outside lower center", ncols=3)
plots.show(fig, f"Attention of {L} layers at {context:,} tokens, predicted and measured. " + "; ".join(
    f"{name}: {si(lesson.rows[name].predicted, 's')} and {si(timing.median, 's')}" for name, timing in times.items()))

# %% [markdown]
# ### A surprise in other people's tables
# In 2023 NVIDIA published how many tokens per second TensorRT-LLM served. Some of the models share KV heads, some do not. Take all rows with 2,048
# tokens of output, where the cache is
# most of the bytes, and divide what was published by what bytes / bandwidth allows. Twice: with the KV read once for each KV head, as the
# architecture promises, and once for
# each *query* head.

# %%
found = [run for run in published_runs() if run.software.startswith("TensorRT-LLM") and run.category == "serving_throughput" and run.gen_len == 2048]
lines, drawn = [], []
for run in found:
    model, devices = shape_of(run), run.whole("n_devices", 1)
    batch, mean_context = run.whole("batch"), int(run.prompt_len + run.gen_len / 2)
    speed = run.value * (1 if run.metric.endswith("total") else devices)                # tokens/s of all devices
    weights = model.streamed_bytes(bytes_per_weight(run, model))
    kv = model.kv_bytes(batch, mean_context, run.kv_dtype)
    of_bound = [speed / (batch * run.whole("tp", 1) * 1e9 * run.peak_bw_GBps_per_device / (weights + readers * kv)) for readers in (1, model.N // model.K)]
    drawn.append((model.N // model.K, f"{run.model}, {run.hardware.split('-')[0]}, {run.prompt_len:.0f} in", *of_bound))
    lines.append([run.id, run.model, f"{devices} × {run.hardware}", str(model.N // model.K), f"{run.value:,.0f} {run.unit}", f"{of_bound[0]:.2f}",
                  f"{of_bound[1]:.2f}", run.source])
Table(["row", "model", "on", "G", "published", "of the bound, KV once", "…, once a query head", "source"], lines,
      ["G", "published", "of the bound, KV once", "…, once a query head"])

# %%
drawn.sort(key=lambda row: (row[0], row[1]))
fig, ax = plt.subplots(figsize=(7.4, 4.6))
y = range(len(drawn))
ax.hlines(y, [row[2] for row in drawn], [row[3] for row in drawn], color="#bbbbbb", linewidth=1.5, zorder=1)
ax.plot([row[2] for row in drawn], y, "o", color=plots.COLOURS[0], label="if each KV head is read once")
ax.plot([row[3] for row in drawn], y, "o", color=plots.COLOURS[1], markersize=8, markerfacecolor="none", markeredgewidth=2, label="if each query head reads for itself")
ax.set_yticks(y, [f"{row[1]} (G = {row[0]})" for row in drawn], fontsize=9)
ax.set(xlim=(0, 1.05), xlabel="published, as a share of what bytes / bandwidth allows", title="The models that share heads are far below the bound of one read")
fig.legend(loc="outside lower center", ncols=2)
plain, sharing = [row for row in drawn if row[0] == 1], [row for row in drawn if row[0] > 1]
plots.show(fig, "Published throughput as a share of the bound. Models without shared heads: "
                f"{min(r[2] for r in plain):.2f} to {max(r[2] for r in plain):.2f}. Models with shared heads: {min(r[2] for r in sharing):.2f} to "
                f"{max(r[2] for r in sharing):.2f} if each KV head is read once, {min(r[3] for r in sharing):.2f} to {max(r[3] for r in sharing):.2f} if "
                "each query head reads for itself")
several = min(run.whole("n_devices", 1) for run in found if shape_of(run).N > shape_of(run).K)

# %%
Markdown(f"Without sharing: {min(r[2] for r in plain):.2f} to {max(r[2] for r in plain):.2f} of the bound. With it: {min(r[2] for r in sharing):.2f} to "
         f"{max(r[2] for r in sharing):.2f}, and the tables do not say why. If one charges a read for each query head: "
         f"**{min(r[3] for r in sharing):.2f} to {max(r[3] for r in sharing):.2f}**, as if these GPUs had run our first kernel. That is a hypothesis: every row "
         f"that shares heads is also of a larger model, on {several} devices or more, and their communication is in no bound here.")

# %% [markdown]
# The hypothesis was found by looking at these rows, so they cannot confirm it. What fits it from elsewhere: NVIDIA's later note on its kernel *XQA*,
# which shares the read, has the same 70B model go from 1,227 to 2,941 tokens/s on one H200.
#
# ### Flash decoding, predicted from bytes and programs
# The authors of flash decoding published a table: 16 query heads, 2 KV heads, one layer on an A100, batch × context always 65,536 or so. So the
# *bytes* are the same in every row,
# and only the number of programs changes. FlashAttention 2 had a program for each query head, no split. Our first kernel, then; and flash decoding
# is our third, with P as our library
# would choose it.

# %%
a100, a100_sms = CARDS["a100-80gb-sxm"], SMS["a100-80gb-sxm"]
bench = [run for run in published_runs() if run.category == "attention_kernel" and "flash-decoding" in run.source]
heads = {"FlashAttention 2.0.9": 16, "Flash-Decoding (split-K)": 2}
fig, ax = plt.subplots(figsize=(7.2, 3.6))
lines, ratios = [], {name: [] for name in heads}
for (name, readers), colour in zip(heads.items(), (plots.COLOURS[1], plots.COLOURS[0]), strict=True):
    runs = [run for run in bench if run.software == name and run.batch * run.decode_context == 65_536]
    guess = []
    for run in runs:
        batch, tokens = run.whole("batch"), run.whole("decode_context")
        programs = batch * readers * (parts_for(batch * readers, tokens, a100_sms) if readers == 2 else 1)
        guess.append(seconds(2 * batch * tokens * readers * 128 * 2, programs, a100.bandwidth_at(), a100_sms))
        ratios[name].append(run.value * 1e-6 / guess[-1])
        if batch in (1, 16, 256):
            lines.append([run.id, name, f"{batch} × {tokens:,}", str(programs), si(guess[-1], "s"), si(run.value * 1e-6, "s"), run.source])
    ax.loglog([run.batch for run in runs], guess, color=colour)
    ax.loglog([run.batch for run in runs], [run.value * 1e-6 for run in runs], "o", color=colour, label=f"{name}: published")
ax.plot([], [], color="black", label="predicted")
ax.set_xscale("log", base=2)
ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
ax.set(xlabel="batch (× context = 65,536)", ylabel="time of one layer", title="The same bytes in every column: programs make the difference")
plots.units(ax.yaxis, "s")
fig.legend(loc="outside lower center", ncols=3)
plots.show(fig, "Time of one layer against the batch, the same bytes in each, published over predicted: " + "; ".join(
    f"{name} {min(r):.2f} to {max(r):.2f}" for name, r in ratios.items()))

# %%
Table(["row", "kernel", "batch × context", "programs", "predicted", "published", "source"], lines, ["programs", "predicted", "published"])

# %%
Markdown("Published over predicted: " + "; ".join(f"**{min(r):.2f} to {max(r):.2f}** for {name}" for name, r in ratios.items())
         + ". No figure was fitted. The first is slow in just the way in which programs run out. Not counted in the second: the launches of its two kernels, some microseconds each.")

# %% [markdown]
# ### What the compiler makes of it
# Bytes asked for are one thing. *How* a thread asks is another: a load instruction fetches 2, 4, 8 or 16 bytes, and a kernel that fetches 2 at a
# time spends its life on
# instructions. The width is in the machine code, and to see that needs no GPU either: the compiler comes with Triton. It must not run in this
# process, where kernels are
# interpreted, so we start another one.
#
# We compile the five kernels of this lesson for an H100, and the first two of them once more: for a cache whose rows are not 128 numbers apart, as
# always, but 129. The kernels
# are the same.

# %% tags=["nbval-ignore-output"]
SCRIPT = """
import json, torch
from dataclasses import asdict
from clawdemy_kernels.ahead import compiled, listing
from clawdemy_kernels.decode_grouped import decode_grouped
from clawdemy_kernels.decode_naive import decode_naive
from clawdemy_kernels.examples import examples
q, lengths = torch.zeros(8, 32, 128, dtype=torch.bfloat16), torch.ones(8, dtype=torch.int32)
for kernel in (decode_naive, decode_grouped):
    for apart in (128, 129):
        k = torch.zeros(8, 8, 256, apart, dtype=torch.bfloat16)[..., :128]
        launch = lambda: kernel(q, k, k, lengths)
        [code], [ptx] = compiled(launch, "sm_90"), listing(launch, "sm_90").values()
        print(json.dumps(asdict(code) | {"apart": apart, "ptx": ptx}))
for name in ("decode_split", "decode_paged", "linear_int4"):
    launch = examples()[name].launch
    code, ptx = compiled(launch, "sm_90")[0], listing(launch, "sm_90")[f"{name}_kernel"]
    print(json.dumps(asdict(code) | {"apart": 128, "ptx": ptx}))
"""


def compile_elsewhere() -> list[dict]:
    if not TRITON:
        return []
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    if ran.returncode:
        print(f"The compiler did not run here: {ran.stderr.strip().splitlines()[-1]}")
        return []
    return [json.loads(line) for line in ran.stdout.splitlines()]


def loads_of(code):
    """The lines of PTX that load from memory under a mask."""
    lines = [line.strip() for line in code["ptx"].splitlines()]
    return [line for line in lines if line.startswith("@") and "ld.global" in line or "cp.async" in line and "shared.global" in line]


codes = compile_elsewhere()
for code in codes[:2]:
    print(f"decode_naive, rows {code['apart']} numbers apart; {len(loads_of(code))} loads, the second to fourth:")
    print(*(f"    {line}" for line in loads_of(code)[1:4]), sep="\n")

# %% [markdown]
# This is PTX, the assembler that NVIDIA publishes. `ld.global` loads from memory; `@%p` before it is our mask; **`v4.b32` is four words of 32 bits:
# 16 bytes** in one instruction, and
# `b16` is a single number of 2 bytes.
#
# Why? A wide load needs an address that is a multiple of 16. Triton looks at the arguments of a launch, and when a stride is a multiple of 16 it
# compiles a version that *relies* on it. From 129
# it can conclude nothing: some rows begin at odd places, and so every number is fetched by itself. Same Python, same bytes, eight times the instructions.
#
# The other four multiply with `tl.dot`, and there the loads look different:

# %% tags=["nbval-ignore-output"]
def in_general(line):
    """Without the numbers of the registers: loads of one stream are then the same line."""
    return re.sub(r"%\w+", "%", re.sub(r"\[[^]]*\]", "[ ]", line))


for code in (code for code in codes if code["products"] and code["apart"] == 128):
    print(code["kernel"].removesuffix("_kernel"))
    for line, count in Counter(map(in_general, loads_of(code))).most_common(3):
        print(f"    {count:3} times   {line}")

# %% [markdown]
# **`cp.async.cg … 0x10`** copies 16 bytes from memory straight into the SM's *shared memory*, and the thread does not wait for them: the loads of
# the next block of keys are on their way
# while the tensor cores work on this one. That is what hides the waiting, the indirection of `decode_paged` too: its `cp.async.ca … 0x4` fetch the
# entries of the table, 4 bytes each, a block ahead.
# `linear_int4` has its codes and `x` on the way in the same manner, and loads the few scales into registers. How large a block, how many blocks
# ahead? A rule in `kernels/blocks.py` says 16 KiB of keys; on a GPU the clock may choose
# among four candidates.
#
# Everything in one table:

# %% tags=["nbval-ignore-output"]
def widths(code):
    return ", ".join(f"{count} of {width} B" for width, count in sorted(code["loads"].items(), key=lambda item: -int(item[0])))


def resident(code):
    """Programs that an H100's SM can hold: it has 65,536 registers, 227 KiB of shared memory and room for 2,048 threads (CUDA C programming guide)."""
    return min(65_536 // (code["registers"] * code["threads"]), 227 * 1024 // (code["shared"] + 1024), 2048 // code["threads"])


Table(["kernel", "rows apart", "loads", "tensor-core instructions", "threads", "registers a thread", "shared memory", "programs an SM holds"],
      [[code["kernel"].removesuffix("_kernel"), str(code["apart"]), widths(code), str(code["products"]), str(code["threads"]), str(code["registers"]),
        si(code["shared"], "B"), str(resident(code))] for code in codes],
      ["tensor-core instructions", "threads", "registers a thread", "shared memory", "programs an SM holds"])

# %% [markdown]
# The numbers wait in registers until they are used, and so narrow loads also eat registers, and then fewer programs fit on an SM. A test of this
# repository compiles every kernel for four GPUs and
# fails if a load gets narrower. One thing it has taught: on AMD a warp has 64 threads, so the same block spreads over twice as many threads and
# each loads 8 bytes instead of 16. We use 2 warps there.
#
# ### On a GPU, if there is one

# %% tags=["nbval-ignore-output"]
if TRITON and torch.cuda.is_available():
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    bench_run = subprocess.run([sys.executable, "-m", "clawdemy_infer", "bench", "--kernels"], capture_output=True, text=True, env=compiling)
    print(bench_run.stdout or bench_run.stderr)
else:
    print("There is no CUDA GPU here, so no kernel was timed: times on GPUs in this lesson are predictions, or other people's measurements.")
    print("Where there is one, this cell runs `clawdemy-infer bench --kernels`.")

# %% [markdown]
# ## Reconciliation: what the differences are made of

# %% tags=["nbval-ignore-output"]
lesson.table()

# %% [markdown]
# Of *copied out*, what lies between the napkin and the clock? Name the cause that you take for the largest.

# %%
lesson.cause("copied out", ...)     # "copy", "read", "memory was slower than calibrated", "memory was faster than calibrated" or "not explained"

# %% tags=["nbval-ignore-output"]
lesson.explain("copied out")

# %% [markdown]
# And of *shared and split*: is it the join that costs?

# %% tags=["nbval-ignore-output"]
lesson.explain("shared and split")

# %% tags=["nbval-ignore-output"]
Markdown(f"**Asked for is not moved.** Between a kernel and memory are caches. *Each head reads* asks for {G} times the bytes of *shared*, and took "
         f"**{times['each head reads'].median / times['shared'].median:.2f} times** as long here. `distinct` is the floor, `asked` the ceiling, and the truth lies between. "
         f"Splitting one KV head among {cores} cores took {times['one KV head, split'].median / times['one KV head'].median:.2f} of the time.")

# %% [markdown]
# What remains:
#
# - **Bytes need no explanation.** Counted and predicted are the same number, five times. What a kernel asks for is knowable before it ever runs.
# - **A probe is a moment.** What one core alone makes depends on the neighbours of the machine in that second; the runs come some seconds later.
#
# ### When does each lose?
# - **Sharing** without splitting, for few users: bytes and programs fall alike. Nothing gained.
# - **Splitting** when all SMs have work, or when the context is short: it then only adds P · (H + 2) · 8 bytes a head, and a second kernel.
# - **Padding** to 16 rows, where there are no tensor cores, or no multiple to share: MHA (G = 1) does sixteen times its FLOPs with `tl.dot`. The
#   first kernel is then the better one.
# - **Paging**, where nobody else wants the memory (lesson 06).
# - **Four bits**, when the matrix is small or the kernel is not good. A published pair on an A100:

# %%
pair = [run for run in published_runs() if run.id in ("r286", "r287")]
Table(["row", "weights of 4096 × 4096", "bytes / bandwidth", "published", "times longer", "source"],
      [[run.id, run.weight_dtype, si(4096 * 4096 * run.weight_bits_eff / 8 / a100.bandwidth_at(), "s"), si(run.value / 1e3, "s"),
        f"{run.value / 1e3 / (4096 * 4096 * run.weight_bits_eff / 8 / a100.bandwidth_at()):.1f}", run.source] for run in pair],
      ["bytes / bandwidth", "published", "times longer"])

# %% [markdown]
# A third of the bytes, and more than three times the time: a kernel that reads few bytes badly is slower than one that reads many well.
#
# ## Play and exercises
# A card, a batch, a context, and the number of parts of the third kernel. On the left the card's SMs: grey ones have no program. On the right what
# that costs. Find the P that is
# just enough, and then the batch at which P no longer matters.

# %%
def draw_card(card: str, batch: int, context: int, parts: int) -> None:
    cores, bandwidth = SMS[card], CARDS[card].bandwidth_at()
    asked, programs = decode_bytes("split", batch, context, parts)
    wide = 12 if cores % 12 == 0 else 8
    at_work = np.array([programs // cores + (i < programs % cores) for i in range(cores)]).reshape(-1, wide)
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.2), width_ratios=(2, 3))
    colours = np.array([plt.matplotlib.colors.to_rgb(colour) for colour in ("#dddddd", "#9dbfe3", "#5b92cf", "#2f6db5")])
    left.imshow(colours[np.minimum(at_work, 3)], interpolation="nearest")
    left.set_xticks(np.arange(-0.5, wide), [""] * (wide + 1))
    left.set_yticks(np.arange(-0.5, cores // wide), [""] * (cores // wide + 1))
    left.grid(color="white", linewidth=1.5, alpha=1)
    left.tick_params(length=0)
    left.spines[:].set_visible(False)
    idle = f"{cores - programs} of {cores} SMs idle" if programs < cores else f"{programs / cores:,.1f} on each of {cores} SMs"
    left.set_title(f"{programs:,} programs: {idle}", fontsize=10)

    kinds = {"naive": "1 · a program\neach query head", "grouped": "2 · each group", "split": f"3 · in {parts} part{'s' if parts > 1 else ''}"}
    found = [predicted_on(card, kind, batch, context, parts) for kind in kinds]
    bars = right.barh(list(kinds.values()), found, color=[plots.COLOURS[1], plots.COLOURS[2], plots.COLOURS[0]], height=0.6)
    right.bar_label(bars, [si(t, "s") for t in found], padding=4)
    floor = 2 * batch * llama.K * context * llama.H * 2 / bandwidth
    right.axvline(floor, color="black", linestyle=":", linewidth=1.4)
    right.annotate(f" KV once: {si(floor, 's')}", (floor, -0.42), fontsize=9, va="bottom")
    right.set(xlim=(0, 1.22 * max(found)), ylim=(2.5, -0.75), xlabel="predicted, one layer of Llama-3-8B", title=f"{CARDS[card].name}, {batch} × {context:,}")
    right.title.set_fontsize(10)
    right.grid(axis="y", visible=False)
    right.locator_params(axis="x", nbins=4)
    plots.units(right.xaxis, "s")
    plots.show(fig, f"{CARDS[card].name}, {batch} × {context:,}, {parts} part{'s' * (parts > 1)}: {programs:,} programs, {idle}; "
                    + "; ".join(f"{kind} {si(t, 's')}" for kind, t in zip(kinds, found, strict=True)))


# %% tags=["widget", "nbval-ignore-output"]
widgets.play(draw_card, card=widgets.choose("card", list(CARDS)), batch=widgets.powers_of_two("batch", 1, 256, 1),
             context=widgets.powers_of_two("context", 512, 131_072, 8192), parts=widgets.powers_of_two("parts P", 1, 128, 1))

# %%
for parts in (1, 8, 32):
    draw_card("h100-sxm", 1, 8192, parts)

# %% [markdown]
# ### 1 · Mend a wrong mask
# A colleague's kernel has a sliding window: the query, which is token `length - 1`, shall see the last `window` tokens, itself among them. Its mask is
#
# ```python
# (s <= length) & (s > length - window)
# ```
#
# and the tests passed: they had all filled the cache to the brim, with a window as long as the text. Below, kernels run with *your* mask in them,
# and report which tokens they gave any
# weight. `s` is a block of token numbers in Triton, so use `&`, not `and`.

# %%
if TRITON:
    @triton.jit
    def weights_kernel(scores, out, length, window, S_BLOCK: tl.constexpr, seen: tl.constexpr):
        s = tl.arange(0, S_BLOCK)
        score = tl.load(scores + s)
        score = tl.where(seen(s, length, window), score, -float("inf"))
        weight = tl.exp(score - tl.max(score, 0))
        tl.store(out + s, weight / tl.sum(weight, 0))


def tokens_with(seen):
    """A function of (length, window): the tokens that a kernel with the mask `seen` gives weight to, in a cache of 16."""
    def tokens(length, window):
        if seen(0, length, window) is ...:
            return ...
        scores, out = torch.zeros(16), torch.zeros(16)
        if TRITON:
            weights_kernel[(1,)](scores, out, length, window, S_BLOCK=16, seen=seen)
        else:
            out = scores.masked_fill(~seen(torch.arange(16), length, window), -math.inf).softmax(0)
        return out.nonzero().flatten().tolist()
    return tokens


theirs = tokens_with(lambda s, length, window: (s <= length) & (s > length - window))
print(f"theirs, 16 tokens and a window of 16: {len(theirs(16, 16))} tokens seen")
print(f"theirs,  9 tokens and a window of  4: {theirs(9, 4)}")

# %% tags=["exercise", "exercise:seen"]
def seen(s, length, window):
    return ...


lesson.exercise(
    "seen", tokens_with(seen),
    cases={
        (9, 4): [5, 6, 7, 8],
        (1, 1): [0],                                        # one token, which sees itself
        (3, 8): [0, 1, 2],                                  # a window longer than the text
        (16, 16): list(range(16)),
        (16, 1): [15],
    },
    nudge="Which is the last token that exists? And how many may there be before it?",
    means="a mask that is off by one reads a stranger's key, and often the numbers look fine.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Tokens are counted from 0, so the last one is `length - 1`, and the first that is seen is `length - window`.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def seen(s, length, window):
#     return (s < length) & (s >= length - window)
# ```
#
# </details>

# %% [markdown]
# ### 2 · The bytes of a variant
# The library has a kernel for pages of **int8** (`kernels/decode_int8.py`): a byte for each number, and for each key and each value of a token and
# KV head a scale of 2 bytes. With a window of W tokens it leaves all others
# untouched. How many bytes of keys, values, their scales and the table does it ask for, for B sequences of S tokens each? The group shares the
# read, and each program looks up each
# of its tokens in the table, at 4 bytes. The expected numbers are counted, by the interpreter.

# %%
COUNTED = {(1, 3, 64, 100, 1000): 40_800, (2, 1, 64, 70, 32): 8_704, (1, 2, 128, 40, 40): 21_120}      # (B, K, H, S, W): bytes
if TRITON:
    for (batch, kv_heads, width, tokens, window), expected in COUNTED.items():
        per_sequence = -(-tokens // 16)
        pool = torch.zeros(batch * per_sequence, kv_heads, 16, width, dtype=torch.int8)
        scale = torch.ones(pool.shape[:-1]).half()
        _, traffic = watch("decode_int8", q=torch.zeros(batch, kv_heads, width), k=pool, k_scale=scale, v=pool.clone(), v_scale=scale.clone(),
                           block_table=torch.arange(len(pool)).view(batch, -1).int(), seq_lens=torch.full((batch,), tokens, dtype=torch.int32),
                           window=window, parts=1)
        assert sum(traffic[name].asked for name in ("k", "v", "k_scale", "v_scale", "block_table")) == expected

# %% tags=["exercise", "exercise:bytes_asked"]
def bytes_asked(B, K, H, S, W):
    return ...


lesson.exercise(
    "bytes_asked", bytes_asked, cases=COUNTED,
    nudge="How many tokens are seen? And what does each cost, for each KV head?",
    means="at H = 128 the scales and the table add less than 4 % to the codes.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Each of the min(S, W) tokens costs, for each KV head, H bytes of key, H of value, two scales, and an entry of the table.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def bytes_asked(B, K, H, S, W):
#     return B * K * min(S, W) * (2 * (H + 2) + 4)
# ```
#
# </details>

# %% [markdown]
# ### 3 · The reduction step of split-K
# Each part has left its `largest` score, the `total` of its weights e^(score - largest), and `acc`, the sum of weight times value (here a single
# number). Some parts got no
# key at all: largest = -inf, total = 0, acc = 0. Join them: return the output. No score may be taken to e^ as it is; one of the cases would overflow.

# %% tags=["exercise", "exercise:join"]
def join(largest, total, acc):
    return ...


lesson.exercise(
    "join", join,
    cases={
        ((0.0,), (2.0,), (3.0,)): 1.5,                                          # one part: nothing to join
        ((1.0, 1.0), (1.0, 3.0), (2.0, 10.0)): 3.0,                             # the same largest: just add
        ((0.0, math.log(2)), (1.0, 1.0), (5.0, 8.0)): 7.0,                      # weights 1 and 2
        ((-math.inf, 5.0), (0.0, 4.0), (0.0, 6.0)): 1.5,                        # the first part is empty
        ((1000.0, 1000.0 + math.log(3)), (2.0, 1.0), (4.0, 6.0)): 4.4,          # e^1000 is no number
    },
    nudge="All parts must shrink to the largest score of all; then sums may be added.",
    means="it is the step of the loop above, for whole parts: who began, and who went on, does not matter.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# With M the largest of all, part p shrinks by e^(largest_p - M). Shrink totals and accs alike, sum both, divide.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def join(largest, total, acc):
#     shrink = [math.exp(x - max(largest)) for x in largest]
#     return sum(a * f for a, f in zip(acc, shrink)) / sum(t * f for t, f in zip(total, shrink))
# ```
#
# </details>

# %% [markdown]
# ### 4 · Harder: from which batch on does sharing pay?
# Without splitting, the first kernel has B·N programs and reads N/K times as much as the second, which has B·K. Below one program an SM, time is
# bytes / (bandwidth · share of SMs at work); from
# there on it is bytes / bandwidth. (Forget that waves come in whole numbers.) Which is the first batch at which the second kernel is faster? `sms`
# is the number
# of SMs. If there is none, return "never".

# %% tags=["exercise", "exercise:first_batch"]
def first_batch(N, K, sms):
    return ...


lesson.exercise(
    "first_batch", first_batch,
    cases={(32, 8, 132): 5, (32, 8, 40): 2, (9, 3, 108): 13, (64, 8, 132): 3, (8, 8, 132): "never", (132, 33, 132): 2},
    nudge="As long as neither fills the card they take equally long. Who fills it first? And if nothing is shared?",
    means="the card is full with the naive kernel first; from then on that one pays for its bytes, and the other still gains.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The naive kernel fills the card at B·N = sms. At exactly that batch both still take the same time. With N = K there is no such batch: return "never".
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def first_batch(N, K, sms):
#     return sms // N + 1 if N > K else "never"
# ```
#
# </details>

# %% [markdown]
# **To take away.** What a kernel asks for can be counted before it runs, to the byte. Sharing heads saves bandwidth only if the kernel shares the
# read: then G times, at the price of
# padding that idle tensor cores do for nothing. A GPU is full only with more programs than SMs; for few users the sequence must be split, and three
# numbers a row are enough to put it together again. Paging adds a look-up and
# no bytes of KV. And the compiler loads 16 bytes at once only where it *knows* that it may.
#
# Further reading: Milakov and Gimelshein 2018 (online softmax); Dao et al. 2022 and 2023 (FlashAttention 1 and 2); Dao, Haziza, Massa and Sizov
# 2023 (flash decoding); Ainslie et al. 2023 (GQA); Kwon et al. 2023
# (PagedAttention); Tillet, Kung and Cox 2019 (Triton).
