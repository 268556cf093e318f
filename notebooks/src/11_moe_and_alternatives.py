# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 11 · What if the architecture changes?
# ## Question
# So far the model was given, and we ran it as cheaply as we could. Now we change the model itself. Six ideas promise cheaper tokens:
#
# - **experts**: many small MLPs, of which each token uses a few;
# - **a state instead of a cache**: state-space models and linear attention, whose memory does not grow;
# - **a window**: attention that looks back only so far;
# - **diffusion**: many tokens in one pass, but many passes;
# - **pruning**: fewer layers; and **distillation**, to teach what is left.
#
# Each saves one kind of byte or FLOP, and pays with another. The envelope tells which, and from where on.
#
# Before you go on, write down four guesses. Eight tokens choose 2 of 8 experts each: how many experts are read? From which batch on does a model
# with 8 of 256 experts keep an H100 busy? From which context on is a state of 128 × 128 numbers a head cheaper than a KV cache? And
# if you take a third of the layers out of a model without any training, what does it still know?

# %% tags=["nbval-ignore-output"]
import pydoc_data.topics
from collections import defaultdict
from dataclasses import replace
from functools import cache
from itertools import combinations, cycle, product
from statistics import median

from clawdemy_infer.arithmetic import MLP, Attention, Experts, MoE, Pass, Work, total
from clawdemy_infer.attention import attend
from clawdemy_infer.envelope.roofline import Prediction
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.fast.launches import count_ops
from clawdemy_infer.fast.watched import Watch
from clawdemy_infer.files import load_model
from clawdemy_infer.from_config import catalog
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.parts import Parts, Rate, StepOf
from clawdemy_infer.lesson.steps import filled_cache, random_tokens, step_ops
from clawdemy_infer.lesson.tables import Table, percent, si
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.machine.present import bracketed, default_device
from clawdemy_infer.model import ModelConfig
from clawdemy_infer.timing import Timing, alternate, now
from clawdemy_infer.variants import experts, linear_attention
from clawdemy_infer.variants.pruning import influence, without_layers

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

plots.use_style()
plt.rcParams["figure.dpi"] = plt.rcParams["savefig.dpi"] = 72      # many figures, and the file stays small
torch.set_grad_enabled(False)
machine = this_machine()
device = default_device()
lesson = Lesson("11 moe_and_alternatives", machine=machine)
decoder = faster(load_model("smollm2-135m", device=device), "fp32")   # matrices as this machine's kernels like them
shape = decoder.config.shape
FP32 = {"weights": "fp32", "kv": "fp32", "activations": "fp32"}
lesson.card()

# %% [markdown]
# ## Envelope: how many experts does a batch touch?
# A mixture of experts replaces the MLP by E of them and a small *router*, which sends each token to k. Mixtral has E = 8 and k = 2 (Jiang et al. 2024).
# One token reads 2 experts. Another token may want the same two, or two others. So how many *distinct* experts do B tokens read between them?
#
# If each token chooses evenly, an expert is missed by one token with probability 1 − k/E, and by all of them with (1 − k/E)^B. So of E experts
#
# $$\text{touched}(B) = E \cdot \left(1 - (1 - k/E)^B\right)$$
#
# are read. We check it on a case small enough to write out: 4 experts, 2 for each of 3 tokens, all 216 possibilities.

# %%
E, k, B = 4, 2, 3
choices = list(combinations(range(E), k))               # what one token may choose
counts = [len(set().union(*tokens)) for tokens in product(choices, repeat=B)]
assert len(counts) == 6**3
assert abs(np.mean(counts) - E * (1 - (1 - k / E) ** B)) < 1e-12
assert abs(np.mean(counts) - MoE(E, k).touched(B)) < 1e-12
f"{len(counts)} possibilities, {np.mean(counts)} experts touched in the mean"

# %% [markdown]
# Published models differ widely in E and k. What matters for cost is how fast the share fills up, and how many rows (tokens) each expert then gets.

# %%
MIXTURES = {name: catalog.model(name) for name in ("mixtral-8x7b", "gpt-oss-20b", "qwen3-30b-a3b", "deepseek-v3")}
BATCHES = [1, 4, 16, 64, 256]
rows = []
for s in MIXTURES.values():
    moe = s.moe
    rows.append([s.name, f"{moe.active} of {moe.experts}",
                 *(f"{moe.touched(B):.0f}  ({B * moe.active / moe.touched(B):.1f})" for B in BATCHES)])
Table(["model", "experts", *(f"B = {B}" for B in BATCHES)], rows, numeric=["experts", *(f"B = {B}" for B in BATCHES)],
      title="Experts touched at batch B, and in brackets the rows that each of them gets")

# %% [markdown]
# Read the last two columns. At batch 64 nearly everything is read, as if the model were dense; but an expert gets only a few rows
# out of the 64. **The bytes are those of the whole model, the FLOPs those of a small one.** So what does it do to arithmetic intensity?
#
# We count one layer's experts beside a *dense MLP of the same active width*, k·F: both do the same FLOPs.

# %%
s, B = catalog.model("mixtral-8x7b"), 16
D, F, moe = s.D, s.F, s.moe
flops = bytes = 0
flops += B * moe.active * 3 * 2 * D * F                 # gate, up and down, for each token and each of its experts
bytes += moe.touched(B) * 3 * D * F * 2                 # each expert touched, once, in bf16
rows_each = B * moe.active / moe.touched(B)
assert abs(flops / bytes - rows_each) < 1e-9            # in bf16, intensity is the rows that share a read of the weights

counted = total("experts", Experts(D, F, moe).work(Pass(B, 1, 1)))
weights_alone = sum(op.flops for op in counted.operations() if op.name.startswith("expert"))
assert weights_alone == flops
f"16 tokens: {flops / bytes:.1f} FLOPs per byte of weights with experts, {B} with a dense MLP"

# %%
ridge = catalog.machine("h100-sxm").ridge("bf16")
tokens = 2 ** np.arange(0, 15)
fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.3))
for s, colour in zip(MIXTURES.values(), plots.COLOURS, strict=False):
    moe, label = s.moe, f"{s.name.removesuffix('-v0.1')}: {s.moe.active} of {s.moe.experts}"
    part = Experts(s.D, moe.F or s.F, replace(moe, shared=0))
    left.plot(tokens, [moe.touched(B) / moe.experts for B in tokens], color=colour, label=label)
    right.plot(tokens, [total("", part.work(Pass(int(B), 1, 1))).intensity for B in tokens], color=colour)
dense = MLP(4096, 2 * 14336)
right.plot(tokens, [total("", dense.work(Pass(int(B), 1, 1))).intensity for B in tokens], "--", color="black", label="dense")
right.axhline(ridge, color=plots.NAPKIN, linestyle=":")
right.text(1.2, ridge * 1.15, f"ridge of an H100, {ridge:.0f}", color="#606060")
left.set(xscale="log", xlabel="tokens in the step", ylabel="share of the experts read", ylim=(0, 1.05),
         title="Experts fill up soon …")
right.set(xscale="log", yscale="log", ylim=(0.5, 3000), xlabel="tokens in the step", ylabel="FLOPs per byte",
          title="… but are busy late")
left.legend(loc="lower right")
right.legend(loc="lower right")
for ax in (left, right):
    ax.xaxis.set_major_locator(FixedLocator([1, 8, 64, 512, 4096]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
right.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
plots.show(fig, "Four mixtures against the tokens in the step. Left: the share of their experts that is read. Right: FLOPs per byte, "
                f"below those of a dense layer, with the ridge of an H100 at {ridge:.0f}")

# %% [markdown]
# A dense layer is compute-bound from about 300 tokens on (lesson 04). With experts the rows are spread over E/k times as many weights, so it
# takes **E/k times the batch**: 4 times for Mixtral, 32 times for DeepSeek-V3. That is why such models are served to very many users at once, on many devices.
# And see how *flat* the curves begin: there each new token brings experts of its own, and a larger batch shares almost nothing.
#
# ### Experts and the KV cache
# Experts shrink the weights that a step reads, and leave the cache alone. So the cache weighs more, relatively, than in a dense model, and grouped
# queries matter more. At which context does reading the KV cache cost as much as reading the weights?

# %%
def even_context(s, batch: int) -> int | None:
    """The context at which KV and weights are equal reads in a step; None if there is none below ten million tokens."""
    weights, low, high = s.streamed_bytes("bf16", tokens=batch), 1, 10_000_000
    if s.kv_bytes(batch, high, "bf16") < weights:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if s.kv_bytes(batch, middle, "bf16") >= weights else (middle + 1, high)
    return low


mixtral = MIXTURES["mixtral-8x7b"]
ungrouped = replace(mixtral, name="… with 32 KV heads", K=mixtral.N)
dense_13b = catalog.model("llama-2-13b")
columns = ["model", "stored", "read at B = 1", "read at B = 64", "KV a token", "even at B = 1", "even at B = 64"]
rows = [[s.name, si(s.stored_bytes("bf16"), "B"), *(si(s.streamed_bytes("bf16", tokens=B), "B") for B in (1, 64)),
         si(s.kv_bytes_per_token("bf16"), "B"), *(f"{even_context(s, B):,}" for B in (1, 64))]
        for s in (dense_13b, mixtral, ungrouped, *list(MIXTURES.values())[1:])]
assert mixtral.kv_bytes_per_token("bf16") == catalog.model("mistral-7b").kv_bytes_per_token("bf16")       # experts keep no keys
Table(columns, rows, numeric=columns[1:], title="Weights and KV in bf16; even: the context at which both are equal reads")

# %% [markdown]
# For one user Mixtral reads what Llama-2-13B reads, though it stores nearly four times as much. Now go down the last two columns. A batch brings
# experts in (the weights grow) and caches too (the KV grows with B): the caches win by far. Without grouped
# queries Mixtral's users would be even with its weights at a quarter of the context. And DeepSeek-V3, by far the largest here, keeps
# one latent vector for all its 128 heads; its context can grow longest before the cache overtakes.

# %%
CONTEXT, USERS = 32_768, 64
named = {"Mixtral, N KV heads": ungrouped, "Mixtral, 8 KV heads": mixtral, **{s.name: s for s in list(MIXTURES.values())[1:]}}
weights = [s.streamed_bytes("bf16", tokens=USERS) for s in named.values()]
caches = [s.kv_bytes(USERS, CONTEXT, "bf16") for s in named.values()]
fig, ax = plt.subplots(figsize=(7.4, 3.0))
ax.barh(list(named), weights, color=plots.COLOURS[0], height=0.6, label="weights (experts touched)")
ax.barh(list(named), caches, left=weights, color=plots.COLOURS[1], height=0.6, label="KV cache")
for y, both in enumerate(np.add(weights, caches)):
    ax.annotate(f"{si(both, 'B')}, {caches[y] / both:.0%} KV", (both, y), xytext=(5, 0), textcoords="offset points", va="center")
ax.set(title=f"Read in one step of {USERS} users at {CONTEXT:,} tokens (bf16)", xlim=(0, 1.3 * max(np.add(weights, caches))))
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
fig.legend(loc="outside lower center", ncols=2)
plots.units(ax.xaxis, "B")
plots.show(fig, "Bytes read in one step, weights and KV cache. " + "; ".join(
    f"{name}: {si(both, 'B')}, {kv / both:.0%} KV" for name, kv, both in zip(named, caches, np.add(weights, caches), strict=True)))

# %% [markdown]
# (At this length the bars with the most KV exceed any one card: the figure says what a step *reads*, not that it fits.)
#
# ### A state instead of a cache
# Attention without its softmax is a plain sum, and a sum need not remember its terms:
#
# $$o_t = \sum_{s \le t} (q_t \cdot k_s)\, v_s = q_t \underbrace{\sum_{s \le t} k_s v_s^\top}_{S_t}, \qquad S_t = \gamma\, S_{t-1} + k_t v_t^\top$$
#
# The state S is one H × H matrix for each head (Katharopoulos et al. 2020), and γ < 1 lets old tokens fade (RetNet, Sun et al. 2023; lightning
# attention). Mamba (Gu and Dao 2023)
# keeps a state too, updated by another rule. We count one token, for one head, in fp32.

# %%
H, S = 128, 4096
cache_bytes = state_bytes = 0
cache_bytes += 2 * S * H * 4                            # softmax attention: read the keys and values of all tokens so far
state_bytes += H * H * 4                                # linear attention: read the state …
state_bytes += H * H * 4                                # … and write it back, because this token changed it
assert cache_bytes / state_bytes == S / H
cache_flops = 4 * S * H                                 # scores, then sum of values
state_flops = 5 * H * H                                 # fade (1), add the outer product (2), multiply by q (2)
f"at {S:,} tokens: cache {si(cache_bytes, 'B')} a head, state {si(state_bytes, 'B')}; even at a context of {H} = H"

# %% [markdown]
# The cache costs S/H times as much. **From a context of about H on, a state is cheaper**, and from then on the gap grows without
# end. (With grouped queries, G heads share the keys that are read and each has its own state: then from G·H on.)
#
# For whole models, a state-space model beside a transformer of its size, per step and user:

# %%
mamba, llama = catalog.model("mamba-2.8b"), catalog.model("llama-3.2-3b")
rows = []
for context in (256, 2048, 16_384, 131_072):
    step_state = 2 * mamba.state_bytes("bf16")          # read and written
    rows.append([f"{context:,}", si(llama.kv_bytes(1, context, "bf16"), "B"), si(step_state, "B"),
                 si(llama.streamed_bytes("bf16") + llama.kv_bytes(1, context, "bf16"), "B"),
                 si(mamba.streamed_bytes("bf16") + step_state, "B")])
columns = ["context", f"{llama.name}: KV", f"{mamba.name}: state", "with the weights", "with the weights "]
Table(columns, rows, numeric=columns)

# %%
even_at = 2 * mamba.state_bytes("bf16") / llama.kv_bytes_per_token("bf16")
Markdown(f"State and cache are even at {even_at:,.0f} tokens. For *one* user that hardly matters: the weights are the larger part far beyond it. "
         "It matters with many users, each of whom brings a cache or a state: with 64 of them at 16,384 tokens, the transformer reads "
         f"{si(llama.kv_bytes(64, 16_384, 'bf16'), 'B')} of KV a step, the state-space model "
         f"{si(64 * 2 * mamba.state_bytes('bf16'), 'B')} of states.")

# %% [markdown]
# ### A window, a block, a layer less
# Three more envelopes, each one line.
#
# - **Local attention** reads min(S, W) tokens instead of S. Beyond the window the cost stands still.
# - **Diffusion** writes T tokens at once, by passes over the whole block that make it less noisy each time (Nie et al. 2025, LLaDA; Arriola et
#   al. 2025, block diffusion).
#   A pass costs what a prefill of T tokens costs. It replaces T decode steps if the passes are fewer than
#
# $$\text{break-even} = \frac{T \cdot t_\text{decode}}{t_\text{pass}(T)}$$
#
# - **Pruning** takes layers out. Each takes its bytes along: the step should shrink by exactly their share of what is streamed.

# %%
h100, llama8 = catalog.machine("h100-sxm"), catalog.model("llama-3-8b")


def denoise(s, batch: int, T: int, context: int, **formats) -> Work:
    """One pass over a block of T tokens that follows on `context`: as a prefill, but every position needs its logits."""
    return s.step(batch, T, context + T, logits=T, **formats)


def break_even(batch: int, T: int) -> float:
    one_token = h100.time(llama8.decode(batch, 1024)).seconds
    return T * one_token / h100.time(denoise(llama8, batch, T, 1024)).seconds


batches = 2 ** np.arange(0, 9)
fig, ax = plt.subplots(figsize=(6.4, 3.1))
for T, colour in zip((16, 32, 64), plots.COLOURS, strict=False):
    ax.plot(batches, [break_even(int(B), T) for B in batches], "o-", color=colour, markersize=4, label=f"block of {T}")
ax.axhline(1, color="black", linewidth=0.8)
ax.set(xscale="log", yscale="log", xlabel="batch", ylabel="passes that break even", ylim=(0.8, 90),
       title="Diffusion: passes that may be spent on a block (Llama-3-8B, H100)")
ax.xaxis.set_major_locator(FixedLocator(batches))
ax.yaxis.set_major_locator(FixedLocator([1, 2, 4, 8, 16, 32, 64]))
for axis in (ax.xaxis, ax.yaxis):
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")
ax.legend()
plots.show(fig, "Passes that break even against the batch, blocks of 16, 32 and 64 tokens: "
                f"with 32, {break_even(1, 32):.0f} at a batch of 1 and {break_even(256, 32):.1f} at 256")

# %% [markdown]
# For one user on a GPU, decode is memory-bound and a block rides along for nothing: even with as many passes as tokens it would come out even. A batch
# takes that away. It *already* shares the read of the weights, so the block's FLOPs must be paid for, and hardly a few passes are left.
# Diffusion and batching use the same idle FLOPs. (So does speculation, lesson 09.)
#
# ## Prediction
# Now on this machine. What we shall run:
#
# - a tiny Mixtral of random weights, to count what its routers choose;
# - **one layer of experts**, Mixtral's at a quarter of the width, in fp32; its eight experts are far larger than the caches. Beside it a
#   dense MLP of the same active width;
# - **one layer's attention** with the heads of Llama-2-7B (32 of 128): softmax, softmax in a window, and linear attention, without the
#   projections, which are the same in all of them;
# - **SmolLM2-135M**, with a window, as a block, and without some of its layers.
#
# The **napkin** is bytes over bandwidth (or FLOPs over the peak, where there are many rows). The **calibrated roofline** knows the rate of a
# product of few rows, and the price
# of a kernel launch. Neither has seen what follows.

# %% tags=["nbval-ignore-output"]
QUARTER = MoE(experts=8, active=2)
D, F = 1024, 3584
torch.manual_seed(0)
mixture = experts.Experts(D, F, QUARTER.experts, QUARTER.active).requires_grad_(False).to(device)
dense = torch.nn.ModuleDict({"gate_up": torch.nn.Linear(D, 4 * F, bias=False), "down": torch.nn.Linear(2 * F, D, bias=False)}).requires_grad_(False).to(device)
expert_bytes = 3 * D * F * 4
ROWS = [1, 2, 4, 8, 16, 32, 128]
inputs = {B: [torch.randn(B, D, device=device) for _ in range(8)] for B in ROWS}


def dense_mlp(x: torch.Tensor) -> torch.Tensor:
    gate, up = dense["gate_up"](x).chunk(2, dim=-1)
    return dense["down"](torch.nn.functional.silu(gate) * up)


def work_of(part, B: int) -> Work:
    return total("", part.work(Pass(B, 1, 1, **FP32)))


@cache
def roofline_moe(B: int) -> Prediction:
    ops = count_ops(lambda: mixture(inputs[B][0]))          # counted, not timed; a few more for each expert touched
    return machine.time(work_of(Experts(D, F, QUARTER), B), ops)


@cache
def roofline_dense(B: int) -> Prediction:
    return machine.time(work_of(MLP(D, 2 * F), B), count_ops(lambda: dense_mlp(inputs[B][0])))


def ratio(more: Prediction, less: Prediction, times: float = 1) -> dict:
    """One prediction over another. What both have in common cancels, and the wider of the two intervals is left."""
    value, off = times * more.seconds / less.seconds, 1 + max(more.spread, less.spread)
    return {"predicted": value, "interval": (value / off, value * off)}


def napkin_ffn(experts_read: float, B: int, per_token: int = 2) -> float:
    return max(experts_read * expert_bytes / machine.bandwidth_at(), 2 * B * per_token * 3 * D * F / machine.peak("fp32"))


# %% [markdown]
# Your own guesses stand in cells of their own: write them over the dots, as a number or as text with its unit (`3.5`, `"20 ms"`), before you run
# the cell that follows.

# %%
lesson.guess("experts touched by 8 tokens, 2 of 8", ...)
lesson.guess("experts touched by 8 tokens, 8 of 64", ...)
lesson.guess("layer of experts, 8 tokens", ...)
lesson.guess("experts over dense, 8 tokens", ...)
lesson.guess("experts over dense, 128 tokens", ...)

# %% tags=["nbval-ignore-output"]
lesson.predict("experts touched by 8 tokens, 2 of 8", min(8, 8 * 2), MoE(8, 2).touched(8), unit="experts")
lesson.predict("experts touched by 8 tokens, 8 of 64", min(64, 8 * 8), MoE(64, 8).touched(8), unit="experts")
for B in (1, 8):
    lesson.predict(f"layer of experts, {B} token{'s' * (B > 1)}", napkin_ffn(QUARTER.touched(B), B), roofline_moe(B), unit="s")
for B in (8, 128):
    lesson.predict(f"experts over dense, {B} tokens", napkin_ffn(QUARTER.touched(B), B) / napkin_ffn(2, B),
                   **ratio(roofline_moe(B), roofline_dense(B)), unit="×")
lesson.reveal()

# %% [markdown]
# The napkin for the count is the crudest: B tokens need B·k experts, as long as there are so many. Now attention in its three forms.

# %%
lesson.guess("linear attention", ...)
lesson.guess("context from which linear attention is faster", ...)

# %% tags=["nbval-ignore-output"]
N, H, WINDOW = 32, 128, 512
CONTEXTS = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
one_layer = {"softmax": Attention(4096, N, N, H), "window": Attention(4096, N, N, H, window=WINDOW)}
state = N * H * H * 4
linear_work = Work(5 * N * H * H, 2 * state, "scan", kernel="scan")        # as the envelope: read once, written once
LINEAR_OPS, SOFTMAX_OPS = 5, 4                                             # views among them


def of_one(work: Work, ops: int) -> Prediction:
    """One layer of a thousand: all that a sweep over the layers of a model would read, so that the caches do not help."""
    whole, n = machine.time(work * 1000, 1000 * ops), 1000
    parts = {name: part._replace(seconds=part.seconds / n) for name, part in whole.parts.items()}
    return Prediction(parts, whole.compute_s / n, whole.memory_s / n)


@cache
def roofline_attention(kind: str, S: int) -> Prediction:
    return of_one(one_layer[kind].of_sequences(Pass(1, 1, S, **FP32))[0], SOFTMAX_OPS)


def napkin_attention(S: int) -> float:
    return 2 * N * S * H * 4 / machine.bandwidth_at()


napkin_linear = 2 * state / machine.bandwidth_at()
roofline_linear = of_one(linear_work, LINEAR_OPS)


def first_context(at: str, beyond: float) -> int:
    """The first context at which softmax attention's `at` (seconds, low_s or high_s) is beyond so many seconds."""
    low, high = 1, 1_000_000
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if getattr(roofline_attention("softmax", middle), at) > beyond else (middle + 1, high)
    return low


crossing = first_context("seconds", roofline_linear.seconds)
ends = first_context("high_s", roofline_linear.low_s), first_context("low_s", roofline_linear.high_s)

lesson.predict("softmax attention to 4,096", napkin_attention(4096), roofline_attention("softmax", 4096), unit="s")
lesson.predict("attention to 4,096 in a window of 512", napkin_attention(512), roofline_attention("window", 4096), unit="s")
lesson.predict("linear attention", napkin_linear, roofline_linear, unit="s")
lesson.predict("context from which linear attention is faster", H, crossing, unit="tokens", interval=ends)
lesson.reveal("softmax attention to 4,096", "attention to 4,096 in a window of 512", "linear attention", "context from which linear attention is faster")

# %% [markdown]
# And the real model. The context before a block of diffusion is 128 tokens, already in the cache.

# %%
lesson.guess("one token at 2,048", ...)
lesson.guess("a window of 256 saves at 2,048", ...)
lesson.guess("passes that break even, block of 32", ...)
lesson.guess("speed-up without 10 of 30 layers", ...)

# %% tags=["nbval-ignore-output"]
P, BLOCKS, DROPPED = 128, (8, 32, 64), (4, 8, 10)
ops, block_ops = step_ops(decoder), step_ops(decoder, new=2)
local = replace(shape, window=256)


def roofline_step(s, S: int) -> Prediction:
    return machine.time(s.decode(1, S, **FP32), ops * s.L // shape.L)


def napkin_step(s) -> float:
    return s.streamed_bytes("fp32") / machine.bandwidth_at()


def roofline_pass(T: int) -> Prediction:
    return machine.time(denoise(shape, 1, T, P, **FP32), block_ops)


def napkin_pass(T: int) -> float:
    return max(2 * T * (shape.matrix_parameters() + shape.D * shape.V) / machine.peak("fp32"), napkin_step(shape))


long = ContiguousCache.for_model(decoder, batch=1, capacity=2048)
at_2048 = StepOf(decoder, "decode", context=2048, cache=long)
lesson.predict("one token at 2,048", at_2048.napkin(machine), at_2048.predict(machine), unit="s")
lesson.predict("a window of 256 saves at 2,048", (2048 - 256) * shape.kv_bytes_per_token("fp32") / machine.bandwidth_at(),
               roofline_step(shape, 2048) - roofline_step(local, 2048), unit="s")
for T in BLOCKS:
    lesson.predict(f"passes that break even, block of {T}", T * napkin_step(shape) / napkin_pass(T),
                   **ratio(roofline_step(shape, P), roofline_pass(T), T), unit="passes")
for n in DROPPED:
    fewer = replace(shape, L=shape.L - n)
    lesson.predict(f"speed-up without {n} of {shape.L} layers", napkin_step(shape) / napkin_step(fewer),
                   **ratio(roofline_step(shape, P), roofline_step(fewer, P)), unit="×")
lesson.reveal("one token at 2,048", "a window of 256 saves at 2,048", *(f"passes that break even, block of {T}" for T in BLOCKS),
              *(f"speed-up without {n} of {shape.L} layers" for n in DROPPED))

# %% [markdown]
# ## Measurement: experts
# Our experts are `clawdemy_infer/variants/experts.py`: the pairs of token and expert are sorted by expert, and each expert that has any runs once,
# on all of its rows.
# First: do they compute what Mixtral computes? The layer of `transformers` with the same weights must give the same numbers.
# (The tests do it for a whole model.)

# %%
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

torch.manual_seed(1)
theirs = MixtralSparseMoeBlock(MixtralConfig(hidden_size=48, intermediate_size=80, num_local_experts=8, num_experts_per_tok=2,
                                             experts_implementation="eager"))
ours = experts.Experts(48, 80, experts=8, active=2)
for target, source in ((theirs.gate.weight, ours.router.weight), (theirs.experts.gate_up_proj, ours.gate_up),
                       (theirs.experts.down_proj, ours.down)):
    target.copy_(source)
x = torch.randn(21, 48)
torch.testing.assert_close(ours(x), theirs(x[None])[0], rtol=1e-4, atol=1e-5)
"21 tokens through 2 of 8 experts: the same numbers as transformers"

# %% [markdown]
# Now a tiny Mixtral: four layers, random weights, each layer with its own router. A thousand sequences of random tokens run through it, and we note
# which experts
# the last token of each went to, in every layer. A router looks at each token alone, so any B of them make a batch; we draw two hundred batches and count.

# %% tags=["nbval-ignore-output"]
def choices_of(E: int, k: int, sequences: int = 1000) -> list[torch.Tensor]:
    """For each layer of a tiny Mixtral, the experts that the last token of each sequence chose: [sequences, k]."""
    dense_shape = replace(shape, name="tiny", L=4, D=64, N=4, K=2, H=16, F=32, V=512)
    model = experts.decoder_with_experts(ModelConfig(dense_shape), MoE(E, k))
    found = []
    for layer in model.layers:
        layer.experts.register_forward_hook(lambda layer, x, _: found.append(layer.route(x[0])[0].view(sequences, -1, k)[:, -1]))
    model(torch.randint(0, 512, (sequences, 4)), last_only=True)
    return found


def count_touched(chosen: torch.Tensor, B: int, batches: int = 50) -> float:
    """Distinct experts that a batch of B touches, in the mean over some batches drawn from the tokens of `chosen` [tokens, k]."""
    drawn = [chosen[torch.randperm(len(chosen))[:B]] for _ in range(batches)]
    return float(np.mean([batch.unique().numel() for batch in drawn]))


torch.manual_seed(2)
COUNTED = [1, 2, 4, 8, 16, 32, 64]
SMALL = {(E, k): choices_of(E, k) for E, k in ((8, 2), (64, 8))}
touched = {(E, k): {B: np.mean([count_touched(layer, B) for layer in layers]) for B in COUNTED} for (E, k), layers in SMALL.items()}
for E, k in SMALL:
    lesson.measure(f"experts touched by 8 tokens, {k} of {E}", touched[E, k][8])
Table(["experts", *(f"B = {B}" for B in COUNTED)],
      [[f"{k} of {E}", *(f"{touched[E, k][B]:.1f}  ({MoE(E, k).touched(B):.1f})" for B in COUNTED)] for E, k in SMALL],
      numeric=[f"B = {B}" for B in COUNTED], title="Experts counted, and in brackets what chance says")

# %% [markdown]
# A little fewer than chance says. Even random routers are not quite even: some of a router's rows are longer than others, and tokens have something
# in common. Trained ones
# are less even still. They are held in balance over a whole corpus, but the tokens of one batch may all be French, or all be code.
#
# Suppose all tokens share a direction. To the router, that is a constant preference. We turn it up, and look at two predictions: chance with *even*
# choices, and
# chance with each expert's own popularity p, Σ (1 − (1 − p)^B), where p was counted on other tokens.

# %% tags=["nbval-ignore-output"]
layer = experts.Experts(64, 32, experts=64, active=8)


def skewed_counts(common: float, B: int = 16) -> tuple[float, float]:
    """Experts touched by B tokens that share a direction: counted, and as the experts' popularity says."""
    torch.manual_seed(3)
    direction = torch.randn(64)
    some, others = (layer.route(torch.randn(4000, 64) + common * direction)[0] for _ in range(2))        # [4000, k]
    popularity = others.flatten().bincount(minlength=64) / 4000
    return count_touched(some, B, batches=200), float((1 - (1 - popularity) ** B).sum())


lesson.predict("experts touched by 16 alike tokens, 8 of 64", MoE(64, 8).touched(16), skewed_counts(1.0)[1], unit="experts")
skews = np.linspace(0, 3, 13)
skewed = np.array([skewed_counts(float(common)) for common in skews])
lesson.measure("experts touched by 16 alike tokens, 8 of 64", skewed[skews == 1.0, 0].item())
fig, ax = plt.subplots(figsize=(6.2, 2.9))
ax.axhline(MoE(64, 8).touched(16), color=plots.NAPKIN, linestyle="--", label="chance, even choices")
ax.plot(skews, skewed[:, 1], color=plots.ROOFLINE, label="chance, with each expert's popularity")
ax.plot(skews, skewed[:, 0], "o", color=plots.MEASURED, label="counted")
ax.set(xlabel="what the tokens have in common, as a multiple of what they have not", ylabel="experts touched", ylim=(0, 64),
       title="Tokens that are alike touch fewer experts (16 tokens, 8 of 64)")
ax.legend(loc="lower left")
plots.show(fig, f"Experts touched by 16 tokens against what they have in common: from {skewed[0, 0]:.0f} down to {skewed[-1, 0]:.0f} counted, "
                f"{skewed[-1, 1]:.0f} by the experts' popularity, {MoE(64, 8).touched(16):.0f} by chance with even choices")

# %% [markdown]
# So the formula is an *upper bound on the mean*: 1 − (1 − p)^B is concave in p, so by Jensen's inequality uneven popularity can only lower it.
# Fewer experts read is good
# news on one device. Where each device holds some of the experts, it is bad: the popular one makes all the others wait.
#
# Next, the clock: the layer of eight large experts, and a dense MLP with the same active width. For 8 tokens the clock is read within the layer too.

# %% tags=["nbval-ignore-output"]
turns = {B: cycle(inputs[B]) for B in ROWS}                 # each run brings other tokens, and so other experts
works = {(kind, B): (lambda run=run, B=B: run(next(turns[B]))) for B in ROWS for kind, run in (("experts", mixture), ("dense", dense_mlp))}
times = alternate(works, repeats=5)
moe_s, dense_s = ({B: times[kind, B].median for B in ROWS} for kind in ("experts", "dense"))


def watched_layer(B: int) -> Watch:
    """One run of the layer, its router and its experts watched; what remains is sorting the rows and adding them up."""
    watch = Watch()
    mixture.route, mixture.expert = watch.of("router", mixture.route), watch.of("experts", mixture.expert)
    try:
        watch.of("sorting", mixture)(next(turns[B]))
    finally:
        del mixture.route, mixture.expert
    return watch


def as_parts(taken: dict[str, float], napkin: dict[str, float], predicted: dict[str, float]) -> Parts:
    """Parts that were watched here, as a step has them: shares of the whole. What napkin or prediction lack is 0."""
    said, by_hand = ({name: seconds.get(name, 0.0) for name in taken} for seconds in (predicted, napkin))
    return Parts(taken, said, by_hand, dict.fromkeys(taken, Rate(None, None, "")), sum(taken.values()), watching_s=0.0)


def parts_of_layer(B: int) -> Parts:
    """By the napkin all the time goes to the experts' bytes."""
    watches = [watched_layer(B).taken for _ in range(15)]
    said = roofline_moe(B).parts
    predicted = {"router": said["router"].seconds, "sorting": said["launches"].seconds}
    predicted["experts"] = roofline_moe(B).seconds - sum(predicted.values())
    taken = {name: median(watch[name] for watch in watches) for name in predicted}
    return as_parts(taken, {"experts": napkin_ffn(QUARTER.touched(B), B)}, predicted)


for B in (1, 8):
    timing = bracketed(machine)(lambda B=B: mixture(next(turns[B])), repeats=11)
    lesson.measure(f"layer of experts, {B} token{'s' * (B > 1)}", timing, parts=parts_of_layer(8) if B == 8 else ())
for B in (8, 128):
    lesson.measure(f"experts over dense, {B} tokens", moe_s[B] / dense_s[B])

fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.3))
for label, roofline, clock, colour in (("experts", roofline_moe, moe_s, plots.COLOURS[0]), ("dense", roofline_dense, dense_s, plots.COLOURS[2])):
    left.plot(ROWS, [roofline(B).seconds for B in ROWS], color=colour, label=label)
    left.plot(ROWS, [clock[B] for B in ROWS], "o", color=colour, markeredgecolor="white")
right.plot(ROWS, [napkin_ffn(QUARTER.touched(B), B) / napkin_ffn(2, B) for B in ROWS], "--", color=plots.NAPKIN, label="napkin")
right.plot(ROWS, [roofline_moe(B).seconds / roofline_dense(B).seconds for B in ROWS], color=plots.ROOFLINE, label="calibrated roofline")
right.plot(ROWS, [moe_s[B] / dense_s[B] for B in ROWS], "o", color=plots.MEASURED, label="measured")
right.axhline(1, color="black", linewidth=0.8)
left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time of the layer", title="Same FLOPs, other bytes …")
right.set(xscale="log", ylim=(0, None), xlabel="tokens", ylabel="experts over dense", title="… so the price has a hump")
plots.units(left.yaxis, "s")
for ax in (left, right):
    ax.xaxis.set_major_locator(FixedLocator(ROWS))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
left.yaxis.set_minor_locator(NullLocator())
top = max(max(moe_s.values()), roofline_moe(ROWS[-1]).seconds)
left.set_ylim(top=4 * top)                                  # room for the legend
left.legend(loc="upper left", title="lines: roofline, dots: measured", alignment="left")
right.set_ylim(top=1.5 * right.get_ylim()[1])
right.legend(loc="upper right")
over = {B: moe_s[B] / dense_s[B] for B in ROWS}
misses = {f"{kind} at {B} tokens": clock[B] / roofline(B).seconds for kind, clock, roofline in
          (("experts", moe_s, roofline_moe), ("dense", dense_s, roofline_dense)) for B in ROWS}
worst = max(misses, key=lambda name: abs(np.log(misses[name])))
plots.show(fig, "Time of a layer of experts and of a dense layer with the same FLOPs, and its quotient, against the tokens: "
                + "; ".join(f"{B}: {over[B]:.2f}" for B in ROWS))

# %% tags=["nbval-ignore-output"]
Markdown("For one token the two read the same bytes. Then each token brings experts of its own, and the mixture pays for up to E/k = 4 times the bytes: here it takes up "
         f"to **{max(over.values()):.1f}** times as long. Where both are bound by FLOPs they have the same, and what is left is that many small products are slower than few "
         f"large ones: {over[128]:.2f} at 128 tokens. The roofline's largest miss in the left panel: {worst}, {misses[worst]:.2f} of what it said.")

# %% [markdown]
# What lies between napkin and clock for 8 tokens? Name the part that you take for the largest.

# %%
lesson.cause("layer of experts, 8 tokens", ...)     # "experts", "router", "sorting", "memory was slower than calibrated",
# "memory was faster than calibrated" or "not explained"

# %% tags=["nbval-ignore-output"]
lesson.explain("layer of experts, 8 tokens")

# %% [markdown]
# ## Measurement: a state instead of a cache, and a window
# `clawdemy_infer/variants/linear_attention.py` runs linear attention in two ways: token by token, as decode must, and chunk by chunk, as a prefill should.
# They have to agree.

# %%
generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 4, 75, 16, generator=generator) for _ in range(3))        # [B, N, T, H]
decay = torch.tensor([1.0, 0.99, 0.9, 0.5])
chunked, stepped = (linear_attention.empty_state(1, 4, 16, 16) for _ in range(2))
by_chunks = linear_attention.prefill(chunked, q, k, v, decay, chunk=32)
by_steps = torch.cat([linear_attention.step(stepped, *(x[:, :, t: t + 1] for x in (q, k, v)), decay) for t in range(75)], dim=2)
torch.testing.assert_close(by_chunks, by_steps, rtol=1e-3, atol=1e-3)
torch.testing.assert_close(chunked, stepped, rtol=1e-3, atol=1e-3)
f"75 tokens, in chunks of 32 or one by one: the same outputs, and the same state of {stepped[0].numel():,} numbers"

# %% [markdown]
# Now one decode step of one layer. So that nothing waits in a cache that would not in a whole model, each call takes another stretch of a large pool of keys
# and values, or another state.

# %% tags=["nbval-ignore-output"]
POOL = max(CONTEXTS)
keys, values = (torch.randn(1, N, POOL, H, device=device) for _ in range(2))             # [B, K, S, H]: 134 MB each
states = [linear_attention.empty_state(1, N, H, H, device=device) for _ in range(64)]
query = torch.randn(1, N, H, device=device)                                              # [B*T, N, H]
token = torch.randn(1, N, 1, H, device=device)                                           # [B, N, T, H]
fade = torch.full((N,), 0.99, device=device)


def look_back(S: int, window: int | None = None):
    """A sweep over stretches of the pool, each as long as a step at context S can see; and how many there are."""
    seen = min(S, window or S)
    stretches = [(keys[:, :, end - seen: end], values[:, :, end - seen: end]) for end in range(seen, POOL + 1, seen)][:64]

    def sweep() -> None:
        for ks, vs in stretches:
            attend(query, ks, vs)
    return sweep, len(stretches)


def advance() -> None:
    for state in states:
        linear_attention.step(state, token, token, token, fade)


sweeps = {("softmax", S): look_back(S) for S in CONTEXTS} | {("window", S): look_back(S, WINDOW) for S in CONTEXTS if S > WINDOW}
sweeps["linear", 0] = (advance, len(states))
times = bracketed(machine)({name: sweep for name, (sweep, _) in sweeps.items()}, repeats=7)
each = {name: Timing(tuple(seconds / count for seconds in times[name].seconds), times[name].around) for name, (_, count) in sweeps.items()}
mixer = {name: timing.median for name, timing in each.items()}
linear_s = mixer["linear", 0]


def parts_of_linear() -> Parts:
    """Its three operations, the clock read between them. Counted are one read of the state and one write, which the first does."""
    taken = defaultdict(list)
    for state in states * 3:
        start = now()
        state.mul_(fade[:, None, None])                     # as `linear_attention.step` does
        faded = now()
        state.addcmul_(token.transpose(2, 3), token)
        added = now()
        token @ state
        for name, seconds in (("fade", faded - start), ("add", added - faded), ("read out", now() - added)):
            taken[name].append(seconds)
    return as_parts({name: median(seconds) for name, seconds in taken.items()}, {"fade": napkin_linear}, {"fade": roofline_linear.seconds})


lesson.measure("softmax attention to 4,096", each["softmax", 4096])
lesson.measure("attention to 4,096 in a window of 512", each["window", 4096])
lesson.measure("linear attention", each["linear", 0], parts=parts_of_linear())
slower = next((i for i, S in enumerate(CONTEXTS) if mixer["softmax", S] > linear_s), None)
if slower:
    pair = CONTEXTS[slower - 1: slower + 1]
    crossed = float(np.exp(np.interp(np.log(linear_s), np.log([mixer["softmax", S] for S in pair]), np.log(pair))))
    lesson.measure("context from which linear attention is faster", crossed)
    print(f"Linear attention is faster from {crossed:.0f} tokens on.")
else:
    print(f"On this machine linear attention is not faster within {POOL:,} tokens." if slower is None
          else f"On this machine linear attention is faster even at {CONTEXTS[0]} tokens.")

# %% tags=["nbval-ignore-output"]
fig, ax = plt.subplots(figsize=(7.2, 3.6))
ends = [S for S in CONTEXTS if S >= WINDOW]
kinds = (("softmax", CONTEXTS, plots.COLOURS[0], "softmax, all of the context"), ("window", ends, plots.COLOURS[2], f"softmax, window {WINDOW}"))
for kind, xs, colour, label in kinds:
    ax.plot(xs, [roofline_attention(kind, S).seconds for S in xs], color=colour, label=label)
    ax.plot([S for S in xs if (kind, S) in mixer], [mixer[kind, S] for S in xs if (kind, S) in mixer], "o", color=colour, markeredgecolor="white")
ax.axhline(roofline_linear.seconds, color=plots.COLOURS[1], label="linear attention")
ax.plot(CONTEXTS[::3], [linear_s] * len(CONTEXTS[::3]), "o", color=plots.COLOURS[1], markeredgecolor="white")
ax.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="time of one step, one layer",
       title="What grows and what does not: lines predicted, dots measured")
ax.xaxis.set_major_locator(FixedLocator(CONTEXTS))
ax.xaxis.set_minor_locator(NullLocator())
ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
plots.units(ax.yaxis, "s")
ax.legend(loc="upper left")
plots.show(fig, "Time of one step of one layer against the context. Softmax: " + "; ".join(f"{S}: {si(mixer['softmax', S], 's')}" for S in CONTEXTS[::3])
           + f". Linear attention: {si(linear_s, 's')} at any context")

# %% [markdown]
# The envelope of a state counts one read and one write. PyTorch runs three operations on it: fade, add, read out. What did each take?

# %%
lesson.cause("linear attention", ...)       # "fade", "add", "read out", "memory was slower than calibrated", "memory was faster than calibrated"
# or "not explained"

# %% tags=["nbval-ignore-output"]
lesson.explain("linear attention")

# %% [markdown]
# ### The price: what a state forgets
# The arithmetic says nothing about quality, and here is the catch. A state of H × H numbers cannot hold unboundedly much. We store n random pairs
# of key and value, ask for each by
# its key, and see whether the right value is nearest to the answer. (A toy: these keys are random, and nothing is trained.)

# %% tags=["nbval-ignore-output"]
def recalled(n: int, H: int = 64) -> tuple[float, float]:
    """The share of n pairs that softmax attention and linear attention give back, of one head of width H."""
    generator = torch.Generator().manual_seed(n)
    key, value = (torch.nn.functional.normalize(torch.randn(1, 1, n, H, generator=generator), dim=-1) for _ in range(2))
    state = linear_attention.empty_state(1, 1, H, H)
    linear_attention.prefill(state, key, key, value, torch.ones(1))
    by_state = key @ state
    by_softmax = torch.nn.functional.scaled_dot_product_attention(key, key, value, scale=40.0)
    names = torch.arange(n)
    return tuple((answer @ value.mT).argmax(-1).eq(names).float().mean().item() for answer in (by_softmax, by_state))


pairs = [16, 32, 64, 128, 256, 512, 1024, 2048]
shares = np.array([recalled(n) for n in pairs])
fig, ax = plt.subplots(figsize=(6.2, 2.8))
ax.plot(pairs, shares[:, 0], "o-", color=plots.COLOURS[0], label="softmax attention: a cache that grows")
ax.plot(pairs, shares[:, 1], "o-", color=plots.COLOURS[1], label="linear attention: a state of 64 × 64")
ax.set(xscale="log", xlabel="pairs stored", ylabel="given back rightly", ylim=(0, 1.08), title="A state of fixed size forgets")
ax.xaxis.set_major_locator(FixedLocator(pairs))
ax.xaxis.set_minor_locator(NullLocator())
ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
ax.legend(loc="lower left")
plots.show(fig, "Share of stored pairs given back rightly, against how many are stored. " + " ".join(
    f"{n}: softmax {cached:.0%}, state {kept:.0%}." for n, (cached, kept) in zip(pairs[::2], shares[::2], strict=True)))

# %% [markdown]
# That is why models of this kind so often keep a few layers of real attention (Jamba: one in eight), or a better rule than plain adding (the delta
# rule erases the old value first;
# Mamba decides for each token what to keep). The envelope for a hybrid is just a mix of the two rows above.
#
# ## Measurement: the real model, changed
# **A window.** SmolLM2 was not trained with one, so its words would suffer; its time is honest. The step looks back at 2,048 tokens, or at the last
# 256 of them.

# %% tags=["nbval-ignore-output"]
windowed = without_layers(decoder, [])                      # the same weights, and none dropped
windowed.config = replace(decoder.config, shape=local)
part = filled_cache(decoder, batch=1, tokens=256)
for all_of_it, real in zip(long.tensors, part.tensors, strict=True):                    # [L, B, K, S, H] each
    all_of_it[:] = real[:, :, :, :256].repeat(1, 1, 1, 8, 1)                             # a step costs the same, whatever its keys say
one = random_tokens(decoder, 1, 1)


def step_at(model, S: int, T: int = 1) -> None:
    long.length = S - T
    model(one if T == 1 else random_tokens(model, 1, T), long, last_only=T == 1)


times = bracketed(machine)({"full": lambda: step_at(decoder, 2048), "local": lambda: step_at(windowed, 2048)}, repeats=15)
saved = Timing(tuple(np.subtract(times["full"].seconds, times["local"].seconds).tolist()), times["full"].around)
lesson.measure("a window of 256 saves at 2,048", saved)
long.length = 2048
lesson.measure("one token at 2,048", at_2048.time(machine), parts=at_2048.parts(machine))
print(f"full: {si(times['full'].median, 's')} a token; window: {si(times['local'].median, 's')}; saved: {si(saved.median, 's')}")

# %% [markdown]
# Where does a token at 2,048 spend its time? And what could a window save of that?

# %%
lesson.cause("one token at 2,048", ...)     # "products", "attention", "element-wise", "launches", "memory was slower than calibrated",
# "memory was faster than calibrated" or "not explained"

# %% tags=["nbval-ignore-output"]
lesson.explain("one token at 2,048")

# %% [markdown]
# **A block.** One pass over T tokens with logits for each of them, against T single steps. Ours is a causal pass. A denoising one lets the block's
# tokens see each other
# both ways, which at these lengths costs next to nothing more.

# %% tags=["nbval-ignore-output"]
works = {T: (lambda T=T: step_at(decoder, P + T, T)) for T in BLOCKS} | {1: lambda: step_at(decoder, P)}
blocks = alternate(works, repeats=7)
even = {T: T * blocks[1].median / blocks[T].median for T in BLOCKS}
for T in BLOCKS:
    lesson.measure(f"passes that break even, block of {T}", even[T])
columns = ["block", "one pass", "its tokens one by one", "passes that break even", "roofline said", "napkin said"]
Table(columns, [[str(T), si(blocks[T].median, "s"), si(T * blocks[1].median, "s"), f"{even[T]:.1f}", f"{lesson.rows[f'passes that break even, block of {T}'].predicted:.1f}",
                 f"{lesson.rows[f'passes that break even, block of {T}'].napkin:.1f}"] for T in BLOCKS], numeric=columns)

# %% [markdown]
# If a diffusion model of this shape needs fewer passes than that for a block, it is faster here; whether its text is then as good is not for arithmetic to say.
#
# **Fewer layers.** Which ones? Every layer adds to a stream, and one that hardly turns its direction should be missed least: Men et al. (2024) call
# that its *block influence*. We
# measure it on one text and judge on another. Both are chapters of Python's own help, which come with every Python.

# %% tags=["nbval-ignore-output"]
chapters = pydoc_data.topics.topics
guide, judge = (torch.tensor([decoder.tokenizer.encode(chapters[name])[:257]], device=device) for name in ("import", "with"))
influences = influence(decoder, guide)
order = sorted(range(shape.L), key=lambda index: influences[index])

fig, ax = plt.subplots(figsize=(7.2, 2.6))
colours = [plots.COLOURS[1] if index in order[:10] else plots.COLOURS[0] for index in range(shape.L)]
ax.bar(range(shape.L), influences, color=colours)
ax.set(xlabel="layer", ylabel="influence, 1 − cosine", yscale="log", title="Most layers turn the stream little; the ten that do least are orange")
ax.grid(axis="x", visible=False)
plots.show(fig, f"Influence of each layer, 1 − cosine; least in layers {', '.join(map(str, sorted(order[:10])))}")


# %% tags=["nbval-ignore-output"]
def logits_of(dropped) -> torch.Tensor:
    return without_layers(decoder, dropped)(judge[:, :-1])[0].log_softmax(-1)            # [T, V]


def quality(dropped) -> tuple[float, float]:
    """Perplexity on the text, and KL of the whole model's distribution to this one's, in nats a token."""
    mine = logits_of(dropped)
    surprise = -mine.gather(1, judge[0, 1:, None]).mean()
    return float(surprise.exp()), float((whole.exp() * (whole - mine)).sum(-1).mean())


whole = logits_of([])
SCHEMES = {"none": [], **{f"{n} of least influence": order[:n] for n in (2, *DROPPED)},
           "4 in the middle": [13, 14, 15, 16], "the last 4": [26, 27, 28, 29]}
judged = {name: quality(dropped) for name, dropped in SCHEMES.items()}
pruned = {n: without_layers(decoder, order[:n]) for n in (0, *DROPPED)}
# One cache serves them all: a pruned model uses the first of its layers.
speeds = alternate({n: lambda n=n: step_at(pruned[n], P) for n in pruned}, repeats=11)
for n in DROPPED:
    lesson.measure(f"speed-up without {n} of {shape.L} layers", speeds[0].median / speeds[n].median)
Table(["layers dropped", "streamed", "perplexity", "KL, nats a token"],
      [[name, si(replace(shape, L=shape.L - len(dropped)).streamed_bytes("fp32"), "B"), f"{judged[name][0]:,.1f}", f"{judged[name][1]:.2f}"]
       for name, dropped in SCHEMES.items()], numeric=["streamed", "perplexity", "KL, nats a token"])

# %% tags=["nbval-ignore-output"]
n_s = [0, *DROPPED]
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.0))
left.plot(n_s, [napkin_step(shape) / napkin_step(replace(shape, L=shape.L - n)) for n in n_s], "--", color=plots.NAPKIN, label="napkin")
left.plot(n_s, [roofline_step(shape, P).seconds / roofline_step(replace(shape, L=shape.L - n), P).seconds for n in n_s], color=plots.ROOFLINE,
          label="calibrated roofline")
left.plot(n_s, [speeds[0].median / speeds[n].median for n in n_s], "o", color=plots.MEASURED, label="measured")
left.set(xlabel="layers dropped of 30", ylabel="times faster", ylim=(0.9, None), title="Cost goes down with the layers …")
left.legend()
by_influence = {len(dropped): judged[name] for name, dropped in SCHEMES.items() if name == "none" or "influence" in name}
right.plot(list(by_influence), [perplexity for perplexity, _ in by_influence.values()], "o-", color=plots.COLOURS[1], label="least influence")
for name, marker in (("4 in the middle", "s"), ("the last 4", "^")):
    right.plot([4], [judged[name][0]], marker, color=plots.COLOURS[3], label=name)
right.set(xlabel="layers dropped of 30", ylabel="perplexity", yscale="log", title="… and quality faster")
right.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
right.legend()
plots.show(fig, "Layers dropped of 30: times faster, and perplexity. " + " ".join(
    f"{n}: {speeds[0].median / speeds[n].median:.2f} times, perplexity {by_influence[n][0]:,.0f}." for n in n_s))

# %% [markdown]
# The cost is arithmetic. The quality is another matter: a few layers go nearly unnoticed if one knows which, and the same number taken from the end
# destroys the model. Nobody serves a model pruned like this. It is *healed* afterwards: trained some more, best of all to imitate the whole model's
# distributions, which is
# **distillation** (Hinton et al. 2015; Muralidharan et al. 2024, Minitron). That needs a training run, which exercise 5 prices and this lesson does not do.
#
# ## Reconciliation: who was wrong, and why

# %% tags=["nbval-ignore-output"]
lesson.table()

# %% tags=["nbval-ignore-output"]
one_row = machine.rates["gemm"]["fp32"][0][1] * 4 / 2       # two FLOPs for each weight of 4 bytes: bytes/s at M = 1
counts = {quantity: row for quantity, row in lesson.rows.items() if row.unit == "experts"}
Markdown("**Counts.** Counted over predicted: " + "; ".join(f"{row.ratio:.2f} for {quantity}" for quantity, row in counts.items())
         + f". **Few rows.** Every idea here ends in products of one to a few dozen rows: an expert's share of a batch, a block of diffusion. The calibration's product of one row "
         f"reads its weights at {si(one_row, 'B/s')}, {percent(one_row / machine.bandwidth_at())} of the bandwidth that the napkin takes; on a GPU below its ridge such products are bound by bytes.")

# %% [markdown]
# What the predictions leave out:
#
# - **An average hides its parts.** The roofline gives each expert the mean number of rows. Really one has five and another one, and time is not linear in rows.
# - **A difference of two large times** (a window) and **a quotient** (experts over dense, passes, layers): what both have in common cancels, and
#   each time's own error is left.
#
# ### When each of them loses
#
# | idea | saves | pays | loses when |
# |:--|:--|:--|:--|
# | experts | FLOPs; bytes at small batch | memory for all experts; a larger batch to be efficient | memory is scarce; batches are middling |
# | state instead of cache | KV reads and KV memory | a state written every token; recall | contexts are short; exact recall matters |
# | window | KV beyond the window | what lies beyond it | the answer lies far back |
# | diffusion | reads of the weights, at batch 1 | a block's FLOPs in every pass | batches are large; many passes are needed |
# | pruning | all bytes and FLOPs of a layer | quality, and a training run to get it back | nobody pays for the training |
#
# ## Play and exercises
# Choose the number of experts, how many a token uses, and a machine. The active width stays Mixtral's (k·F = 28,672, D = 4,096), so the FLOPs are
# always the same; only the
# bytes change. Try to find: the batch at which experts cost most, compared with dense; a machine on which 256 experts pay from a smaller batch on
# than on an H100.

# %%
def draw_experts(E: int, k: int, on: str) -> None:
    """Experts touched, and time of one layer's experts beside a dense MLP of the same active width, against the batch (bf16)."""
    k, sheet = min(k, E), catalog.machine(on)
    moe, width = MoE(E, k), 28_672
    batches = 2 ** np.arange(0, 14)
    times = {label: [sheet.time(total("", part.work(Pass(int(B), 1, 1)))).seconds for B in batches]
             for label, part in ((f"{k} of {E} experts", Experts(4096, width // k, moe)), ("dense, the same FLOPs", MLP(4096, width)))}
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.2))
    left.plot(batches, [moe.touched(B) for B in batches], color=plots.COLOURS[0])
    left.plot(batches, [min(E, B * k) for B in batches], "--", color=plots.NAPKIN)
    left.set(xscale="log", ylim=(0, None), xlabel="batch", ylabel="experts read", title=f"{k} of {E} experts, read and timed")
    for (label, values), colour in zip(times.items(), (plots.COLOURS[0], plots.COLOURS[2]), strict=True):
        right.plot(batches, values, color=colour, label=label)
    right.set(xscale="log", yscale="log", xlabel="batch", ylabel="time of the layer", title=sheet.name)
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_minor_locator(NullLocator())
    plots.units(right.yaxis, "s")
    right.legend()
    for ax in (left, right):
        ax.xaxis.set_major_locator(FixedLocator([1, 8, 64, 512, 4096]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    mixed, dense = times.values()
    dearest = int(np.argmax(np.divide(mixed, dense)))
    plots.show(fig, f"{k} of {E} experts on {sheet.name}: experts read, and time beside a dense layer, against the batch. At most "
                    f"{mixed[dearest] / dense[dearest]:.1f} times the dense layer's, at a batch of {batches[dearest]:,}")


# %% tags=["widget", "nbval-ignore-output"]
CARDS = [name for name in catalog.machine_names() if "bf16" in catalog.machine(name).peak_flops]
widgets.play(draw_experts, E=widgets.powers_of_two("experts", 2, 512, 64), k=widgets.powers_of_two("for a token", 1, 16, 8),
             on=widgets.choose("machine", CARDS, "h100-sxm"))

# %%
draw_experts(64, 8, "h100-sxm")

# %% [markdown]
# ### 1 · Experts touched
# B tokens choose k of E experts each, evenly. How many distinct experts do they read in the mean?

# %% tags=["exercise", "exercise:experts_touched"]
def experts_touched(E, k, B):
    return ...


lesson.exercise(
    "experts_touched", experts_touched,
    cases={
        (8, 2, 1): 2.0,                 # one token reads its own
        (8, 2, 2): 3.5,                 # the second brings two, of which half a one is known in the mean
        (4, 2, 3): 3.5,                 # the case written out above
        (256, 8, 1_000_000): 256.0,     # a crowd reads everything
        (16, 16, 3): 16.0,              # and so does one token that uses them all
    },
    nudge="Ask for one expert: with which probability does nobody choose it?",
    means="for few tokens about k·B, for many all E, and between them it bends.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# One token misses a given expert with probability 1 − k/E. B tokens all miss it with the B-th power of that.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def experts_touched(E, k, B):
#     return E * (1 - (1 - k / E) ** B)
# ```
#
# </details>

# %% [markdown]
# ### 2 · The batch that keeps a machine busy
# From how many tokens a step on is a layer of experts compute-bound? Take it that all experts are touched and the weights are the only bytes.
# `ridge` is the machine's, in FLOPs per byte; `bytes` are those of one weight.

# %% tags=["exercise", "exercise:busy_batch"]
def busy_batch(ridge, bytes, E, k):
    return ...


lesson.exercise(
    "busy_batch", busy_batch,
    cases={
        (300, 2, 1, 1): 300.0,          # dense, 16-bit weights: the rule of lesson 04
        (300, 2, 8, 2): 1_200.0,        # Mixtral
        (300, 2, 256, 8): 9_600.0,      # DeepSeek-V3: nearly ten thousand users in one step
        (300, 0.5, 256, 8): 2_400.0,    # 4-bit weights bring it down
    },
    nudge="An expert of n weights: how many bytes are read, how many FLOPs are done for its B·k/E rows?",
    means="E/k times the dense batch: sparsity is paid for in users.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Two FLOPs for each weight and row, so an intensity of 2 · (B·k/E) / bytes. Set it equal to the ridge.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def busy_batch(ridge, bytes, E, k):
#     return ridge * bytes / 2 * E / k
# ```
#
# </details>

# %% [markdown]
# ### 3 · When a state is the cheaper memory
# Heads of width H; G query heads share a KV head. Softmax attention reads the keys and values of S tokens for each KV head; linear attention reads
# *and* writes a state of H × H for each
# query head. From which S on are the bytes of the cache more?

# %% tags=["exercise", "exercise:state_pays_from"]
def state_pays_from(H, G):
    return ...


lesson.exercise(
    "state_pays_from", state_pays_from,
    cases={
        (128, 1): 128,                  # Llama-2-7B: a KV head for each query head
        (128, 4): 512,                  # Llama-3-8B: the cache is read once for four heads, each of which has a state
        (64, 8): 512,                   # gpt-oss
        (256, 1): 256,
    },
    nudge="Write both for one KV head, with its G query heads.",
    means="grouped queries had already saved a part of what a state would.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Cache: 2·S·H numbers read. States: G·H·H read and as many written.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def state_pays_from(H, G):
#     return G * H
# ```
#
# </details>

# %% [markdown]
# ### 4 · Passes to spend
# A decode step reads `weights` bytes at `bandwidth`. A pass over T tokens of each of B sequences reads them too, and does 2·`parameters` FLOPs for
# each token at `peak`; it takes the longer of the two, and so does a decode step.
# (Leave the caches aside.) How many passes may a diffusion model spend on a block of T tokens until it is no faster?

# %% tags=["exercise", "exercise:passes_to_spend"]
def passes_to_spend(T, B, parameters, weights, bandwidth, peak):
    return ...


lesson.exercise(
    "passes_to_spend", passes_to_spend,
    cases={
        (32, 1, 8e9, 16e9, 3.2e12, 1e15): 32.0,         # one user: the block is free
        (32, 64, 8e9, 16e9, 3.2e12, 1e15): 4.8828125,   # 64 users: 2,048 rows, and compute decides
        (32, 512, 8e9, 16e9, 3.2e12, 1e15): 1.0,        # a step that is compute-bound already has nothing to give
        (8, 64, 8e9, 4e9, 3.2e12, 1e15): 1.220703125,   # 4-bit weights: less to save
    },
    nudge="Two times, each a maximum of two; then T steps against one pass.",
    means="diffusion spends FLOPs that a small batch leaves idle. A large one leaves none.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# time(rows) = max(weights / bandwidth, 2 · parameters · rows / peak), with B rows in a decode step and B·T in a pass.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def passes_to_spend(T, B, parameters, weights, bandwidth, peak):
#     def seconds(rows):
#         return max(weights / bandwidth, 2 * parameters * rows / peak)
#
#     return T * seconds(B) / seconds(B * T)
# ```
#
# </details>

# %% [markdown]
# ### 5 · Harder: when does distillation pay back?
# A pruned student of `student` parameters is healed on `tokens` tokens: each costs 6 FLOPs a parameter to train on, and 2 a parameter of the
# `teacher` that it imitates. The training
# reaches `rate` FLOP/s. In service, each token then takes `saved` seconds less of the same machine. After how many served tokens has the training
# paid for itself?

# %% tags=["exercise", "exercise:payback"]
def payback(teacher, student, tokens, rate, saved):
    return ...


lesson.exercise(
    "payback", payback,
    cases={
        (8e9, 4e9, 100e9, 400e12, 1e-3): 1e10,              # 10 million seconds of training against a millisecond a token
        (8e9, 4e9, 100e9, 400e12, 1e-5): 1e12,              # in a large batch a token saves far less, and it takes a hundred times as many
        (135e6, 90e6, 1e9, 50e12, 1e-4): 162_000_000,       # a small model, a short healing
    },
    nudge="Seconds of training over seconds saved by a token.",
    means="a healed model is an investment: it pays for those who serve much, and not for one who asks twice.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Training takes tokens · (6 · student + 2 · teacher) / rate seconds.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def payback(teacher, student, tokens, rate, saved):
#     return tokens * (6 * student + 2 * teacher) / rate / saved
# ```
#
# </details>

# %% [markdown]
# **To take away.** B tokens touch E·(1 − (1 − k/E)^B) experts, at most; a mixture is cheap for one token and for thousands, and expensive in
# between. A state costs what a cache of H tokens costs, and
# forgets. A window stops the growth, and what lies beyond it is gone. Diffusion trades FLOPs for reads, so it wins where a batch is small. Layers
# can go, at the price of a training run. In each
# case the envelope says what a token will cost; none says what it will be worth.
#
# Further reading: Shazeer et al. 2017 and Jiang et al. 2024 (experts); DeepSeek-AI 2024 (many small experts); Katharopoulos et al. 2020, Sun et al.
# 2023, Gu and Dao 2023 (states); Beltagy et al. 2020
# (windows); Nie et al. 2025, Arriola et al. 2025 (diffusion); Men et al. 2024, Gromov et al. 2024, Muralidharan et al. 2024 (pruning and distillation).
