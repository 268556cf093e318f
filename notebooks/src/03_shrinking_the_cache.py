# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · Fewer KV bytes, by which trick?
# ## Question
# A KV cache made each token cheap, and became the thing that fills the machine. Its size is a product:
#
# $$\underbrace{2}_{\text{K and V}} \cdot \underbrace{L}_{\text{layers}} \cdot \underbrace{K}_{\text{KV heads}} \cdot \underbrace{H}_{\text{head dim}}
# \cdot \underbrace{\text{bytes}}_{\text{per number}} \cdot \underbrace{S}_{\text{tokens}}$$
#
# A product can be shrunk at every factor, and each factor has its trick:
#
# - **K**: let query heads share keys and values: GQA, and in the extreme MQA, a single KV head;
# - **2·K·H**: keep one short *latent* vector and make keys and values from it: MLA;
# - **L**: let layers share: cross-layer attention;
# - **bytes**: round to 8 bits, or to 4;
# - **S**: forget: a sliding window, with a few *sinks* that are never forgotten.
#
# All of them save bytes, and that is easy to count. The interesting questions are the other two. Does a token become *faster*? And is it still
# the same model?
#
# Three guesses before you go on. At a context of 256, how much faster is a token when the cache shrinks to a quarter? A cache of 4-bit
# numbers is a third of one in bf16, and a sixth of the fp32 cache that we run here: how much faster is a token that looks back at 4,096 tokens? And if a model may
# see only the last 256 tokens, what is lost when the very first four are dropped, too?

# %% tags=["nbval-ignore-output"]
from dataclasses import replace
from pydoc_data.topics import topics

from clawdemy_infer.arithmetic import MLA, Work, total
from clawdemy_infer.attention import attend
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.fast.launches import count_ops
from clawdemy_infer.files import load_model
from clawdemy_infer.from_config import catalog
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.parts import StepOf
from clawdemy_infer.lesson.steps import random_tokens
from clawdemy_infer.lesson.tables import Table, si
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.machine.present import bracketed, default_device
from clawdemy_infer.variants.cross_layer import CrossLayerConfig, CrossLayerDecoder
from clawdemy_infer.variants.grouping import with_kv_heads
from clawdemy_infer.variants.int4_cache import KiviCache
from clawdemy_infer.variants.int8_cache import Int8Cache
from clawdemy_infer.variants.latent import LatentCache, LatentConfig, LatentDecoder
from clawdemy_infer.variants.sliding_cache import SlidingWindowCache

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from torch.nn.functional import scaled_dot_product_attention

plots.use_style()
plt.rcParams["figure.dpi"] = plt.rcParams["savefig.dpi"] = 80      # many figures, and the file stays small
machine = this_machine()
lesson = Lesson("03 shrinking_the_cache", machine=machine)
plain = load_model("smollm2-135m", device=default_device())
decoder = faster(plain, "fp32")                         # its matrices as the kernels of this machine like them
lesson.card()

# %% [markdown]
# ## Envelope: what a token leaves behind, eight times
# SmolLM2-135M has 9 query heads of 64 numbers, and 3 KV heads: it is a GQA model as it comes. We count one token's bytes in fp32, in which we shall run it,
# beside what *could* be kept.

# %%
shape = catalog.model("smollm2-135m")
L, D, N, K, H = (getattr(shape, letter) for letter in "LDNKH")
numbers = {}                                    # that one token leaves in memory, over all layers
numbers["MHA, as if"] = L * 2 * N * H           # a key and a value for each query head: as if nobody shared
numbers["GQA, as it is"] = L * 2 * K * H        # three query heads share a KV head
numbers["MQA"] = L * 2 * 1 * H                  # all nine share one

latent, rope = 4 * H, H // 2                    # DeepSeek-V2's proportions
numbers["MLA"] = L * (latent + rope)            # one latent, key and value of all heads at once; one rotated key beside it
numbers["cross-layer"] = L // 2 * 2 * K * H     # every other layer looks at the keys and values of the one below

bytes_per_token = {name: 4 * count for name, count in numbers.items()}

bytes_per_token["int8"] = L * 2 * K * (H * 1 + 2)                   # a byte for each number, a 16-bit scale for each vector
bytes_per_token["int4"] = L * 2 * K * H * (4 / 8 + 2 * 2 / 32)      # half a byte; scale and lowest, 16 bits each, for 32 numbers

# %% [markdown]
# The window keeps as much for a token as before, but not every token. So its bytes per token fall with the context; we write
# it down at S = 4,096.

# %%
WINDOW, SINKS = 252, 4                          # 256 tokens in all
S = 4096
bytes_per_token["window + sinks"] = bytes_per_token["GQA, as it is"] * (WINDOW + SINKS) / S

as_is = bytes_per_token["GQA, as it is"]
Table(["technique", "bytes per token", "against GQA", "at 4,096 tokens"],
      [[name, f"{each:,.0f}", f"÷ {as_is / each:.2f}" if each <= as_is else f"× {each / as_is:.0f}", si(each * S, "B")]
       for name, each in bytes_per_token.items()],
      numeric=["bytes per token", "against GQA", "at 4,096 tokens"])

# %%
Markdown(f"The factors are against the fp32 cache that we run. Most caches are kept in bf16, which is half of it: against that, int8 is "
         f"÷ {as_is / 2 / bytes_per_token['int8']:.2f} and int4 ÷ {as_is / 2 / bytes_per_token['int4']:.2f}.")

# %% [markdown]
# `arithmetic` must agree: each technique is a shape, or a format of the cache.

# %%
latents = MLA(latent=latent, rope=rope, value=H)
shapes = {
    "MHA, as if": replace(shape, K=N),
    "GQA, as it is": shape,
    "MQA": replace(shape, K=1),
    "MLA": replace(shape, K=N, H=H + rope, mla=latents),            # a query has H plain numbers and `rope` rotated ones
    "cross-layer": replace(shape, pattern=("global", "global shared")),
    "int8": shape,
    "int4": shape,
    "window + sinks": replace(shape, window=WINDOW + SINKS),
}
KV = dict.fromkeys(shapes, 4.0) | {"int8": 1 + 2 / H, "int4": 4 / 8 + 4 / 32}         # bytes per number that is kept
for name, each in shapes.items():
    assert each.kv_bytes(1, S, KV[name]) == bytes_per_token[name] * S, name

# %% [markdown]
# ### When it cannot help
# A step reads the weights *and* the cache. Whatever is done to the cache, the weights remain. So before any trick we ask what
# share of a step's bytes is KV at all; the best trick imaginable, a cache of no bytes, cannot speed up more than that share.

# %%
weights = shape.streamed_bytes("fp32")
rows = []
for context in (256, 1024, 4096, 8192):
    kv = context * as_is                                # read once, by a kernel that shares
    share = kv / (weights + kv)
    rows.append([f"{context:,}", si(kv, "B"), f"{share:.1%}", f"{1 / (1 - share):.2f} ×"])
Table(["context", "KV read", "share of the step", "at best"], rows, numeric=["context", "KV read", "share of the step", "at best"],
      title=f"One sequence, beside {si(weights, 'B')} of weights")

# %% [markdown]
# There is the answer to the first guess: at 256 tokens *no* trick can do more than a few per cent, for one sequence. Shrinking the cache is for long contexts, and for
# large batches, where each sequence brings its own cache and all share the weights. (And for memory: a cache that is a quarter as large lets four times as many users in, even where no token
# becomes faster.)
#
# ### Bytes kept and bytes read are not the same
# Two of the tricks part them:
# - **Cross-layer** keeps half the layers, but every layer still *looks* at all tokens. It reads what it always read.
# - **Sharing heads** only saves reads if the *kernel* shares. A kernel that works query head by query head reads each KV head G = N/K
#   times. GQA then saves memory and no time.

# %%
kept, read = {}, {}
for name in shapes:
    kept[name] = bytes_per_token[name] * S
    read[name] = kept[name]
read["cross-layer"] *= 2                                # two layers look at each kept key
rereading = {"MHA, as if": 1, "GQA, as it is": N // K, "MQA": N}       # query heads to a KV head

Table(["technique", "kept", "read by a kernel that shares", "read query head by query head"],
      [[name, si(kept[name], "B"), si(read[name], "B"), si(read[name] * rereading[name], "B") if name in rereading else "–"]
       for name in shapes],
      numeric=["kept", "read by a kernel that shares", "read query head by query head"], title="One step at 4,096 tokens")

# %% [markdown]
# The first three rows of the last column are equal. Without the kernel, grouping is for nothing but memory.
#
# ### MLA: the same product, in another order
# MLA keeps a latent c of each token; head n's key is c·W_uk. The **naive** way makes the keys of all S tokens anew in every step, and then attends. But
# q·(c·W_uk) is (q·W_ukᵀ)·c: multiply the *one* new query instead, and attend to the latents themselves. Matrix products do not care where the brackets
# are; the FLOPs do.

# %%
mla = shapes["MLA"]
up = latent * N * (H + H)                               # W_uk and W_uv of all heads: H plain key numbers, H values

naive = 2 * S * up                                      # keys and values of S tokens, made and thrown away
naive += 2 * N * (H + rope) * S + 2 * N * H * S         # scores, sums

absorbed = 2 * 1 * up                                   # one query through W_uk, one sum through W_uv
absorbed += 2 * N * (latent + rope) * S                 # scores: each head against the latent and the rotated part
absorbed += 2 * N * latent * S                          # sums of latents

counted = {form: sum(op.flops for op in mla.decode(1, S, absorbed=form == "absorbed").operations()
                     if op.name in ("kv_b", "attention", "absorb_k", "absorb_v")) / L for form in ("naive", "absorbed")}
assert counted == {"naive": naive, "absorbed": absorbed}
Markdown(f"A layer, one new token at S = {S:,}: naive **{si(naive, 'FLOP')}**, absorbed **{si(absorbed, 'FLOP')}**, "
         f"{naive / absorbed:.0f} times less. Against GQA's {si(4 * N * H * S, 'FLOP')} it is still {absorbed / (4 * N * H * S):.1f} times more: "
         "MLA buys bytes with FLOPs.")

# %% [markdown]
# ### int4: what fits into half a byte?
# Sixteen values. If a group of 32 numbers spans from −3 to 3, the codes are 0.4 apart. So everything hangs on which numbers share a scale. Keys have a few channels that
# are large in *every* token; KIVI (Liu et al. 2024) therefore gives each channel of the keys a scale of its own, over 32 tokens, and the newest tokens wait
# in full precision until there are 32. Let us look at real keys.

# %%
def tokens_of(count: int, skip: int = 0) -> torch.Tensor:
    """English text that every Python carries."""
    text = "\n\n".join(topics[name] for name in sorted(topics)[::2])
    return torch.tensor([decoder.tokenizer.encode(text[:8 * (skip + count)])[skip:skip + count]], device=decoder.device)


some = ContiguousCache.for_model(decoder, batch=1, capacity=128)
decoder(tokens_of(128), some, last_only=True)
layer = 12
keys, values = some.keys[layer, 0, 1].cpu(), some.values[layer, 0, 1].cpu()             # one head: [128, 64]

fig, axes = plt.subplots(1, 2, figsize=(7.6, 2.9), sharey=True)
for ax, x, what in zip(axes, (keys, values), ("keys: stripes along the tokens", "values: no stripes"), strict=True):
    image = ax.imshow(x.abs(), aspect="auto", cmap="Blues", vmin=0, vmax=float(keys.abs().quantile(0.999)))
    ax.set(title=what, xlabel="channel")
    ax.grid(False)
axes[0].set_ylabel("token")
fig.colorbar(image, ax=axes, label="magnitude")
plots.show(fig, "Magnitudes of 128 tokens by 64 channels of one head. Keys: a few channels are large for all tokens, dark stripes along the tokens. Values: no stripes.")

# %% [markdown]
# A stripe is a channel that is large for all tokens. A scale along the stripe wastes nothing; a scale across the stripes is set by the large channels and leaves
# little for the small ones. We round these keys both ways, to 4 bits in groups of 32, and compare what is lost.

# %%
def rounded(x: torch.Tensor, axis: int, bits: int = 4, group: int = 32) -> torch.Tensor:
    """x [tokens, channels], rounded in groups of neighbours along `axis`."""
    x = x.unflatten(axis, (-1, group))
    low, high = x.aminmax(dim=axis + 1 if axis >= 0 else axis, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    codes = ((x - low) / scale).round()
    return (codes * scale + low).flatten(0, 1) if axis == 0 else (codes * scale + low).flatten(1)


lost = {(what, along): float((rounded(x, axis) - x).norm() / x.norm())
        for what, x in (("keys", keys), ("values", values)) for along, axis in (("by channel", 0), ("by token", -1))}
assert lost["keys", "by channel"] < lost["keys", "by token"]
Table(["rounded to 4 bits", "by channel (over 32 tokens)", "by token (over 32 channels)"],
      [[what, *(f"{lost[what, along]:.1%}" for along in ("by channel", "by token"))] for what in ("keys", "values")],
      numeric=["by channel (over 32 tokens)", "by token (over 32 channels)"], title="Relative error")

# %% [markdown]
# For keys it matters a great deal. For values it hardly does, so they take the convenient way: by token, each as it comes.
#
# ## Prediction
# Eight caches, one machine, contexts of 256, 1,024 and 4,096. First your own guesses of the time of one token, written over the dots: a number of seconds, or text with its unit, as in `"30 ms"`.

# %% tags=["guess"]
lesson.guess("GQA, as it is, at 4,096", ...)
lesson.guess("int4, at 4,096", ...)
lesson.guess("window + sinks, at 4,096", ...)

# %% [markdown]
# Again two predictions, made before anything runs.
#
# **The napkin** reads bytes: weights and cache once from memory. It believes that every trick pays for its bytes.
#
# **The calibrated roofline** is told in addition what our *programs* do. PyTorch on a CPU has no attention that reads 8-bit or 4-bit
# numbers. So the cache is made fp32 again, layer by layer, in memory, and those passes are counted:
#
# | | for each number of the cache, bytes |
# |:--|:--|
# | int8 | read 1, write 4 (convert); read 4, write 4 (times scale); then attention reads 4 |
# | int4 | read and write ½ four times (shift and mask, two halves); read 1, write 4 (convert); read 4, write 4 (scale and lowest); then attention reads 4 |

# %%
FP32 = {"weights": "fp32", "activations": "fp32"}
PASSES = {"int8": 1 + 4 + 4 + 4, "int4": 4 * (0.5 + 0.5) + 1 + 4 + 4 + 4}


def work_of(name: str, S: int) -> Work:
    """One decode step as our programs do it."""
    step = shapes[name].decode(1, S, kv="fp32", **FP32)             # attention itself always reads fp32
    if name not in PASSES:
        return step
    conversion = Work(0, PASSES[name] * 2 * L * K * H * S, "dequantize")
    return total("step", [step, conversion])


def napkin(name: str, S: int) -> float:
    """Weights and cache once: what a kernel that scales in registers would read."""
    return shapes[name].decode(1, S, kv=KV[name], **FP32).bytes / machine.bandwidth_at()


# %% [markdown]
# The models. MHA and MQA come out of the real one: for MQA its three KV heads are averaged (Ainslie et al. 2023), for MHA each is copied for three query heads,
# which changes the cost and not one number. MLA and cross-layer have projections of their own that nobody trained for us: there we take random ones,
# and can speak of bytes and seconds only. What is not attention is SmolLM2's, so all eight are the same size but for the cache.

# %%
def random_like(made: torch.nn.Module) -> torch.nn.Module:
    """`made` with SmolLM2's embedding and MLPs, so that they are in memory once."""
    made.embed, made.norm = decoder.embed, decoder.norm
    for mine, theirs in zip(made.layers, decoder.layers, strict=True):
        mine.gate_up, mine.down = theirs.gate_up, theirs.down
    return made.to(decoder.device).eval().requires_grad_(False)


torch.manual_seed(0)
models = dict.fromkeys(shapes, decoder) | {
    "MHA, as if": faster(with_kv_heads(plain, N), "fp32"),
    "MQA": faster(with_kv_heads(plain, 1), "fp32"),
    "MLA": random_like(LatentDecoder(LatentConfig(shapes["MLA"]))),
    "cross-layer": random_like(CrossLayerDecoder(CrossLayerConfig(shapes["cross-layer"]))),
}
NEW = {
    "MLA": LatentCache.for_model,
    "cross-layer": CrossLayerDecoder.new_cache,
    "int8": Int8Cache.for_model,
    "int4": KiviCache.for_model,
    "window + sinks": lambda model, batch, capacity: SlidingWindowCache.for_model(model, batch, WINDOW, SINKS),
}


def new_cache(name: str, capacity: int, batch: int = 1):
    return NEW.get(name, ContiguousCache.for_model)(models[name], batch, capacity)


# %% [markdown]
# MLA's two ways give the same logits, on a cache that is the same, too:

# %%
both = []
for way in (True, False):
    for each in models["MLA"].layers:
        each.absorbed = way
    cache = LatentCache.for_model(models["MLA"], batch=1, capacity=48)
    models["MLA"](random_tokens(decoder, 1, 47), cache, last_only=True)
    both.append(models["MLA"](random_tokens(decoder, 1, 1), cache))
for each in models["MLA"].layers:
    each.absorbed = True
torch.testing.assert_close(*both, rtol=1e-3, atol=1e-3)
"absorbed and naive agree"

# %% [markdown]
# First the bytes, since they need no clock. Predicted and allocated must be *equal*, for three sequences with room for 1,024 tokens. The 4-bit cache has
# something on top that we have to remember: 32 tokens of each sequence, waiting in fp32.

# %%
rows = []
for name, each in shapes.items():
    predicted = each.kv_bytes(3, 1024, KV[name])
    if name == "int4":
        predicted += 3 * 32 * as_is
    allocated = new_cache(name, capacity=1024, batch=3).allocated_bytes
    assert predicted == allocated, (name, predicted, allocated)
    rows.append([name, f"{predicted:,.0f}", f"{allocated:,}"])
Table(["technique", "predicted, bytes", "allocated, bytes"], rows, numeric=["predicted, bytes", "allocated, bytes"])

# %% [markdown]
# Now the seconds. Caches for 4,096 tokens are filled with random numbers: a step costs the same whatever they say. (Filled they must be. Fresh zeros may be one page of memory, mapped many
# times, and that one page is read from the nearest CPU cache.)

# %% tags=["nbval-ignore-output"]
CONTEXTS = [256, 1024, 4096]


def filled(cache):
    """Random content, the same in every layer; where it is integers, any bits are codes."""
    for tensor in cache.tensors:                                    # [L, B, K, ...]
        one = torch.rand(tensor.shape[1:]) if tensor.is_floating_point() else torch.randint(100, tensor.shape[1:])
        tensor.copy_(one.to(tensor.dtype))
    return cache


caches = {name: filled(new_cache(name, CONTEXTS[-1])) for name in shapes}
token = random_tokens(decoder, 1, 1)


def step(name: str, S: int) -> None:
    """The S-th token. For int4 the one 16 before it: a token within a group, as 31 of 32 are."""
    caches[name].length = S - 1 - 16 * (name == "int4")
    models[name](token, caches[name], last_only=True)


ops = {name: count_ops(lambda name=name: step(name, 256)) for name in shapes}


for name, S in (*((name, 4096) for name in shapes), ("int4", 256)):
    lesson.predict(f"{name}, at {S:,}", napkin(name, S), machine.time(work_of(name, S), ops[name]), unit="s")
lesson.reveal()

# %% tags=["nbval-ignore-output"]
gqa_row = lesson.rows["GQA, as it is, at 4,096"]
expected = {name: lesson.rows[f"{name}, at 4,096"].predicted / gqa_row.predicted for name in ("int8", "int4")}
Markdown(f"Read the table as a claim. The napkin says that int8 and int4 are faster than GQA as it is. The roofline counts every pass as traffic of the memory: they read fewer bytes, and move more. "
         f"It says that a token takes {expected['int8']:.1f} times as long with int8, and {expected['int4']:.1f} times with int4.")

# %% [markdown]
# ### Two kernels
# The same attention of one token to 4,096, in three programs:
# - **shares**: the three query heads of a group are three rows of one product, so each KV head is read once. It is what we always run: `attention.py`.
# - **head by head**: nine products, each with the keys of its group. Nothing is copied, and each KV head is read three times.
# - **copies first**: `repeat_interleave`, then plain multi-head attention, as many a model file does it: read 1, write 3, read 3.

# %% tags=["nbval-ignore-output"]
G = N // K


def shares(q, k, v):
    return attend(q, k, v)


def head_by_head(q, k, v):
    k, v = (x[0][:, None].expand(K, G, -1, H) for x in (k, v))          # a view: three heads with the same memory
    return scaled_dot_product_attention(q.view(K, G, 1, H), k, v).reshape(1, N * H)


def copies_first(q, k, v):
    k, v = (x.repeat_interleave(G, dim=1) for x in (k, v))
    return scaled_dot_product_attention(q.view(1, N, 1, H), k, v).reshape(1, N * H)


def attention_work(kernel: str) -> Work:
    """All layers."""
    work = shape.attention(1, 1, 4096, kv="fp32", activations="fp32", shared=kernel == "shares") * L
    copy = Work(0, (1 + G) * shape.kv_bytes(1, 4096, 4.0), "copy", "fp32", "elementwise", rows=4096)
    return total(kernel, [work, copy] if kernel == "copies first" else [work])


KERNELS = {"shares": shares, "head by head": head_by_head, "copies first": copies_first}
for name in KERNELS:
    work = attention_work(name)
    lesson.predict(f"attention, {name}", work.bytes / machine.bandwidth_at(),
                   machine.time(work, L * {"shares": 1, "head by head": 1, "copies first": 3}[name]), unit="s")

gqa = caches["GQA, as it is"]
q = torch.randn(1, N, H, device=decoder.device)
results = [kernel(q, gqa.keys[5], gqa.values[5]) for kernel in KERNELS.values()]
for result in results[1:]:
    torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-4)
f"the {len(results)} programs compute the same; predicted: " + ", ".join(
    f"{name} {si(lesson.rows[f'attention, {name}'].predicted, 's')}" for name in KERNELS)

# %% [markdown]
# ## Measurement
# All steps in turn, so that a busy moment falls on all alike. The machine is probed right before and right after; if it was not as fast as when we predicted, intervals become wider, and what was predicted stays.
# Of three steps the clock is read inside, too, part by part.

# %% tags=["nbval-ignore-output"]
EXPLAINED = ["GQA, as it is", "int8", "int4"]


def all_layers(kernel) -> None:
    for layer in range(L):                              # so that each layer's keys come from memory, as in a step
        kernel(q, gqa.keys[layer], gqa.values[layer])


def parts_of(name: str):
    """The parts of a token at 4,096: what a cache does to make its numbers fp32 again is in its attention."""
    return StepOf(decoder, "decode", 1, 4096 - 16 * (name == "int4"), caches[name], KV[name]).parts(machine)


times = bracketed(machine)({(name, S): lambda name=name, S=S: step(name, S) for name in shapes for S in CONTEXTS}, 7)
seconds = {case: timing.median for case, timing in times.items()}
parts = {name: parts_of(name) for name in EXPLAINED}
for name in shapes:
    lesson.measure(f"{name}, at 4,096", times[name, 4096], parts=parts.get(name, ()))
lesson.measure("int4, at 256", times["int4", 256])

kernels = bracketed(machine)({name: lambda kernel=kernel: all_layers(kernel) for name, kernel in KERNELS.items()}, 9)
for name, timing in kernels.items():
    lesson.measure(f"attention, {name}", timing)
reached = {name: attention_work(name).bytes / timing.median / machine.bandwidth_at() for name, timing in kernels.items()}
columns = ["bytes", "measured", "roofline said", "of the bandwidth"]
Table(["kernel", *columns],
      [[name, si(attention_work(name).bytes, "B"), si(timing.median, "s"), si(lesson.rows[f"attention, {name}"].predicted, "s"), f"{reached[name]:.0%}"]
       for name, timing in kernels.items()], numeric=columns)

# %% tags=["nbval-ignore-output"]
too_fast = [name for name, share in reached.items() if share > 1]
Markdown(f"Above 100 %: {', '.join(too_fast)}. *Impossible as stated*: not all of these bytes can have come from memory. What was not counted is what a CPU cache spared it."
         if too_fast else "None is above 100 %: all of them may have read their bytes from memory, as counted.")

# %% [markdown]
# ### Is it still the same model?
# A cache that forgets or rounds is another model. How far away? We let it read 640 tokens, and at the last 256 compare its predictions with those of the fp32 cache: the
# Kullback-Leibler divergence KL(fp32 ‖ trick) in nats, and how often both would name the same next token. MHA by copies is exact, so there is nothing to
# compare; MLA and cross-layer are random. (The weights come from a file of 4 bits a weight, so the "fp32" model is a rounded one itself. Here all caches serve the same weights.)
#
# The text is fed in pieces of 32 tokens, the size of a group. Within a piece int4 sees new tokens unrounded, just as many as it would one by one: that is decode, 32 tokens at a time.

# %% tags=["nbval-ignore-output"]
text = tokens_of(640, skip=300)


def log_probabilities(model, cache) -> torch.Tensor:
    """[256, V], teacher-forced."""
    model(text[:, :384], cache, last_only=True)
    return torch.cat([model(piece, cache)[0] for piece in text[:, 384:].split(32, dim=1)]).log_softmax(-1)


tried = {
    "MQA": (models["MQA"], ContiguousCache.for_model(models["MQA"], 1, 640)),
    "int8": (decoder, Int8Cache.for_model(decoder, 1, 640)),
    "int4": (decoder, KiviCache.for_model(decoder, 1, 640)),
    "2 bits": (decoder, KiviCache.for_model(decoder, 1, 640, bits=2)),
    "window + sinks": (decoder, SlidingWindowCache.for_model(decoder, 1, WINDOW, SINKS)),
    "window, no sinks": (decoder, SlidingWindowCache.for_model(decoder, 1, WINDOW + SINKS)),
}
exact = log_probabilities(decoder, ContiguousCache.for_model(decoder, 1, 640))
kl, top1 = {"MHA, as if": 0.0, "GQA, as it is": 0.0}, {"MHA, as if": 1.0, "GQA, as it is": 1.0}
for name, (model, cache) in tried.items():
    theirs = log_probabilities(model, cache)
    kl[name] = float((exact.exp() * (exact - theirs)).sum(-1).mean())
    top1[name] = float((exact.argmax(-1) == theirs.argmax(-1)).float().mean())


def quality(name: str) -> list[str]:
    if name not in kl:
        return ["untrained", "–"]
    return ["exact" if kl[name] == 0 else f"{kl[name]:.4f}" if kl[name] < 0.1 else f"{kl[name]:.2f}", f"{top1[name]:.0%}"]


columns = ["bytes per token", "at 256", "at 1,024", "at 4,096", "roofline, 4,096", "KL", "same token"]
Table(["technique", *columns],
      [[name, f"{bytes_per_token[name]:,.0f}", *(si(seconds[name, S], "s") for S in CONTEXTS), si(lesson.rows[f"{name}, at 4,096"].predicted, "s"), *quality(name)]
       for name in shapes]
      + [[name, "", "", "", "", "", *quality(name)] for name in ("2 bits", "window, no sinks")],
      numeric=columns)

# %% tags=["nbval-ignore-output"]
fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), width_ratios=[1, 1.25])
order = sorted(shapes, key=lambda name: seconds[name, 4096])
colours = dict(zip(shapes, [*plots.COLOURS, "#c2549d", "#1f9e9e"], strict=True))
for name in order:
    left.plot(CONTEXTS, [seconds[name, S] for S in CONTEXTS], "o-", color=colours[name], markersize=5, linewidth=1.5)
low, high = left.get_ylim()
left.set(xscale="log", xlabel="context, tokens (colours as on the right)", ylabel="time for one token", ylim=(0, high),
         title="Alike at 256, far apart at 4,096")
left.set_xticks(CONTEXTS, [f"{S:,}" for S in CONTEXTS])
left.minorticks_off()
plots.units(left.yaxis, "s")

x = np.geomspace(0.5 * min(kept.values()), 2 * max(kept.values()), 100)
right.plot(x, (weights + x) / machine.bandwidth_at(), "--", color=plots.NAPKIN, label="napkin: weights and cache, once")
shift = {"cross-layer": (10, 10), "window + sinks": (-14, 10), "MQA": (-36, -4), "GQA, as it is": (12, -8)}
for name in shapes:
    right.plot([kept[name]], [lesson.rows[f"{name}, at 4,096"].predicted], "_", color=plots.ROOFLINE, markersize=16, markeredgewidth=2.5)
    right.plot([kept[name]], [seconds[name, 4096]], "o", color=colours[name], markersize=8)
    right.annotate(name, (kept[name], seconds[name, 4096]), xytext=shift.get(name, (12, -4)), textcoords="offset points", color=colours[name])
right.plot([], [], "_", color=plots.ROOFLINE, markersize=12, markeredgewidth=2.5, label="calibrated roofline")
right.plot([], [], "o", color="black", label="measured")
right.set(xscale="log", xlabel="cache kept at 4,096 tokens", ylim=(0, None), xlim=(x[0], 2.5 * x[-1]),
          title="Fewer bytes kept do not always mean less time")
plots.units(right.xaxis, "B")
plots.units(right.yaxis, "s")
fig.legend(loc="outside lower center", ncols=3)
plots.show(fig, "Left, the time of one token against the context, a line for each technique. Right, at 4,096 tokens, the time against the bytes kept. "
                + "; ".join(f"{name} keeps {si(kept[name], 'B')} and takes {si(seconds[name, 4096], 's')}" for name in order) + ".")

# %% [markdown]
# ## Reconciliation: which trick, and when not
# The napkin took a cache of 4 bits for a fast one. Commit yourself: what is the largest difference between napkin and clock for a token of int4 at 4,096?

# %% tags=["guess"]
# "products", "attention" (with all that makes its numbers fp32 again), "element-wise", "launches",
# "memory was slower than calibrated", "memory was faster than calibrated" or "not explained"
lesson.cause("int4, at 4,096", ...)

# %% tags=["nbval-ignore-output"]
for name in reversed(EXPLAINED):
    lesson.explain(f"{name}, at 4,096")

# %% tags=["nbval-ignore-output"]
lesson.table()

# %% tags=["nbval-ignore-output"]
took = {name: seconds[name, 4096] / seconds["GQA, as it is", 4096] for name in shapes}
wide = (2 * N * (latent + rope) + 2 * N * latent) / (4 * (latent + rope))       # FLOPs for each byte of latents
Markdown(f"""
Which makes a short list of when a smaller cache is *not* a faster token.

- **Short contexts, few sequences.** The weights are the step. The columns at 256 differ by what the tricks *add*, launches and passes, and by little else.
- **Kernels that do not know the trick.** A cache in 4 bits pays where the kernel turns codes into numbers in its registers, as GPU kernels do. A program that writes
  the numbers back first goes through more bytes than it saved. Against GQA as it is, a token took {took['int8']:.2f} times as long with int8 and {took['int4']:.2f} times with int4. The roofline
  had said {expected['int8']:.2f} and {expected['int4']:.2f}: it takes every pass for traffic of the memory, also one over numbers that a CPU cache still holds. The memory is saved all the same.
- **Re-reading.** A kernel that goes query head by query head reads a group's keys once for each. Here that took {kernels['head by head'].median / kernels['shares'].median:.2f} times as long as to share.
  On a CPU the second reading may come from a cache; on a GPU it comes from memory unless the kernel takes care (lesson 10).
- **Sharing layers.** Half the memory, the same reading: {took['cross-layer']:.2f} times GQA's time.
- **MLA** keeps {kept['MLA'] / kept['GQA, as it is']:.0%} of GQA's bytes here, more than MQA or any rounded cache: with nine query heads there is little to save, its case is 128. And it computes more. Every head attends
  over a latent of {latent + rope} numbers, {wide:.1f} FLOPs for each byte, where this machine's ridge is at {machine.ridge('fp32'):.1f}. A token took {took['MLA']:.2f} times GQA's.
""")

# %% tags=["nbval-ignore-output"]
Markdown(f"""And quality is not for free.

- **MQA by averaging** is ruined (KL {kl['MQA']:.1f}): three heads that had learned different things became one. The authors train on for 5 % of the original steps after
  averaging. Without that step it is an honest measurement of *cost* only.
- **The model** comes from a 4-bit file (Q4_1, lesson 07). A cache is rounded on top of that; a model that was never rounded may lose another share.
- **Rounding** is nearly free at 8 bits (KL {kl['int8']:.4f}), cheap at 4 ({kl['int4']:.3f}), and not at 2 ({kl['2 bits']:.2f}, for so small a model).
- **Forgetting** costs {kl['window + sinks']:.2f} with sinks, {kl['window, no sinks']:.2f} without, for the same 256 tokens. Softmax must put its weight
  somewhere; a trained model parks what it has no use for on the first tokens. Drop those four, and it lands on tokens that mean something.
  In return a window has no end. A token's position is its place in the cache, as its authors have it, so a text may go on long after the
  model's {shape.max_context:,} tokens are over, in the same {si(caches['window + sinks'].allocated_bytes, 'B')}.""")

# %% [markdown]
# ## Play and exercises
# Which share of a step's bytes is KV, trick by trick? Choose a model with 16-bit weights. Try to find: a setting in which int4 doubles the speed (on a machine with the right
# kernel); one in which MHA would be the same as MQA within a tenth; a batch at which a window is worth more than 4-bit weights would be.

# %%
def draw_shares(model: str, batch: int, context: int) -> None:
    """Bytes that a decode step reads: weights, and the cache under each trick."""
    s = catalog.model(model)
    at = min(context, WINDOW + SINKS) / context
    head = 2 * s.L * s.H * 2                                        # one KV head of one token in bf16
    per_token = {"MHA": s.N * head, "as it is": s.K * head, "MQA": head, "MLA": s.L * 4.5 * s.H * 2, "int8": s.K * head / 2 * (1 + 2 / s.H),
                 "int4": s.K * head / 2 * (0.5 + 4 / 32), "window + sinks": s.K * head * at}
    streamed = s.streamed_bytes("bf16")
    kv = {name: each * batch * context for name, each in per_token.items()}
    fig, ax = plt.subplots(figsize=(7.0, 3.0))
    ax.barh(list(kv), [streamed] * len(kv), color=plots.COLOURS[0], height=0.65, label="weights")
    ax.barh(list(kv), list(kv.values()), left=[streamed] * len(kv), color=plots.COLOURS[1], height=0.65, label="KV cache")
    for y, each in enumerate(kv.values()):
        faster = (streamed + kv["as it is"]) / (streamed + each)
        ax.annotate(f"{each / (streamed + each):.0%} KV, {faster:.2f} ×", (streamed + each, y), xytext=(5, 0),
                    textcoords="offset points", va="center", bbox={"color": "white", "pad": 1})
    ax.set(xlim=(0, 1.3 * (streamed + max(kv.values()))), xlabel="read in one step",
           title=f"{s.name}, {batch} × {context:,} tokens: KV's share, and the speed-up")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    plots.units(ax.xaxis, "B")
    fig.legend(loc="outside lower center", ncols=2)
    plots.show(fig, f"Bytes that a decode step of {s.name} reads at {batch} times {context:,} tokens: {si(streamed, 'B')} of weights, and of the cache "
                    + ", ".join(f"{name} {si(each, 'B')}" for name, each in kv.items()) + ".")


# %% tags=["widget", "nbval-ignore-output"]
widgets.play(draw_shares,
             model=widgets.choose("model", ["smollm2-135m", "qwen3-0.6b", "llama-3.2-1b", "llama-2-7b", "llama-3-8b", "llama-2-70b"], "llama-3-8b"),
             batch=widgets.powers_of_two("batch", 1, 128, 16),
             context=widgets.powers_of_two("context", 256, 131072, 8192))

# %%
draw_shares("llama-3-8b", 16, 8192)

# %% [markdown]
# ### 1 · What is left to win
# A step reads `weights` bytes and `kv` bytes. A trick divides the KV bytes by `factor`. How many times faster is the step, if it waits for memory alone?

# %% tags=["exercise", "exercise:speedup"]
def speedup(weights, kv, factor):
    return ...


lesson.exercise(
    "speedup", speedup,
    cases={
        (100, 100, 2): 4 / 3,           # half of the step is KV, and half of that is saved
        (100, 0, 8): 1.0,               # no context, nothing to win
        (538, 11.8, 6.4): 549.8 / 539.84,           # SmolLM2 at 256: int4 wins two per cent at best
        (16_000, 137_000, 3.2): 153_000 / 58_812.5,     # Llama-3-8B, 128 sequences of 8,192 in bf16: int4 wins 2.6 times
    },
    nudge="Bytes before over bytes after; the weights are in both.",
    means="Amdahl's law, with bytes. Look at the share before you look at the trick.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Before: weights + kv. After: weights + kv / factor.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def speedup(weights, kv, factor):
#     return (weights + kv) / (weights + kv / factor)
# ```
#
# </details>

# %% [markdown]
# ### 2 · How many bits is 4-bit?
# Codes of `bits` bits, and for every `group` numbers a scale and a lowest value of 16 bits each. How many bits does a number take in all?

# %% tags=["exercise", "exercise:effective_bits"]
def effective_bits(bits, group):
    return ...


lesson.exercise(
    "effective_bits", effective_bits,
    cases={
        (4, 32): 5.0,           # a quarter more than the name says
        (2, 32): 3.0,           # half more
        (4, 128): 4.25,
        (8, 64): 8.5,
    },
    nudge="Two numbers of 16 bits are shared by the whole group.",
    means="smaller groups round better and weigh more: 2 bits in groups of 32 are 3 bits.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# 32 bits for each group, spread over its numbers.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def effective_bits(bits, group):
#     return bits + 32 / group
# ```
#
# </details>

# %% [markdown]
# ### 3 · Where does it lie?
# A ring of `window` slots behind `sinks` slots. In which slot is token `p`, counted from 0? (A sink lies in its own slot for ever; all others go round.)

# %% tags=["exercise", "exercise:slot"]
def slot(p, sinks, window):
    return ...


lesson.exercise(
    "slot", slot,
    cases={
        (0, 4, 252): 0,
        (3, 4, 252): 3,
        (4, 4, 252): 4,             # the first of the window
        (255, 4, 252): 255,         # the last slot
        (256, 4, 252): 4,           # and round: it overwrites token 4
        (1000, 4, 252): 244,
        (1000, 0, 7): 6,
    },
    nudge="Only tokens from `sinks` on go round, and they start behind the sinks.",
    means="nothing ever moves: a token is written once, and dies in its place.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# How many tokens of the window came before p? Take that modulo the window, and add the sinks.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def slot(p, sinks, window):
#     return p if p < sinks else sinks + (p - sinks) % window
# ```
#
# </details>

# %% [markdown]
# ### 4 · Harder: MLA in heads
# DeepSeek-V2's latent is 4·H wide, and its rotated key H/2. For how many KV heads of GQA, each a key and a value of H numbers, would a token take the same bytes?
# Write it for any widths.

# %% tags=["exercise", "exercise:as_many_kv_heads"]
def as_many_kv_heads(latent, rope, H):
    return ...


lesson.exercise(
    "as_many_kv_heads", as_many_kv_heads,
    cases={
        (512, 64, 128): 2.25,       # DeepSeek-V2: "equal to GQA with only 2.25 groups", with 128 query heads
        (256, 32, 64): 2.25,        # the proportions of this lesson
        (512, 64, 64): 4.5,
    },
    nudge="What one KV head keeps of a token is 2·H numbers.",
    means="with 128 query heads that is a 57th of MHA. With SmolLM2's nine it is only a quarter: MLA is for models with many heads.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# MLA keeps latent + rope numbers, K heads keep 2·K·H.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def as_many_kv_heads(latent, rope, H):
#     return (latent + rope) / (2 * H)
# ```
#
# </details>

# %% [markdown]
# **To take away.** A cache can be shrunk at every factor of its product, and the bytes come out to the byte. Whether a token becomes faster is another matter: it does if KV is a
# large share of what the step reads, if the bytes *read* fall with the bytes *kept*, and if the kernel knows the trick. Whether it is still the same model must be measured each time. One factor we have not
# touched: the batch, which multiplies the caches and not the weights. That is lesson 04.
#
# Further reading: Shazeer 2019 (MQA); Ainslie et al. 2023 (GQA); DeepSeek-V2, 2024, section 2.1 (MLA); Brandon et al. 2024 (cross-layer); Xiao et al. 2023 (sinks); Liu et al. 2024 (KIVI).
