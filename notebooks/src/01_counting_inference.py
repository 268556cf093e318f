# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · Why is prefill compute-bound and decode memory-bound?
#
# ## Question
#
# A language model serves a request in two phases. **Prefill** reads the whole prompt at once and gives the first token; its length is
# the *time to first token* (TTFT). **Decode** then gives one token after another; the pace is the *time per output token* (TPOT).
# Both run the same weights through the same matrix products.
#
# Yet on almost any machine a prompt token costs a small fraction of what an output token costs. Why? And can we say in advance, on
# the back of an envelope, how long each phase will take, on an H100 as well as on the machine in front of you?

# %%
import matplotlib.pyplot as plt
import sympy
import torch
from IPython.display import Markdown

from clawdemy_infer import bench, catalog, plots
from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.calibrate import Pulse, this_machine
from clawdemy_infer.lesson import Lesson
from clawdemy_infer.model import load_model
from clawdemy_infer.napkin import card
from clawdemy_infer.tables import Table, number, si

plots.use_style()

# %% [markdown]
# The letters, once and for all: **B** batch, **S** context, **T** new tokens, **D** model width, **F** feed-forward width, **N** query
# heads, **K** KV heads, **H** head dimension, **L** layers, **V** vocabulary.

# %% [markdown]
# ## Envelope
#
# ### One matrix product, counted step by step
#
# Nearly all of the work is `Y = X @ W` with X of shape [B, D] and W of shape [D, F], in bf16: 2 bytes a number. Beside each step
# stands what it costs.

# %%
B, D, F = sympy.symbols("B D F", positive=True)
flops, bytes = 0, 0

bytes += 2 * B * D          # read X
bytes += 2 * D * F          # read W
flops += 2 * B * D * F      # B*F dot products of length D: a multiply and an add for each term
bytes += 2 * B * F          # write Y

intensity = sympy.simplify(flops / bytes)
assert sympy.simplify(intensity - B * D * F / (B * D + D * F + B * F)) == 0
intensity

# %% [markdown]
# FLOPs over bytes is the **arithmetic intensity**. In a language model B is small beside D and F. Let D and F grow, and see what stays:

# %%
growth = sympy.symbols("c", positive=True)
limit = sympy.limit(intensity.subs({D: growth * D, F: growth * F}), growth, sympy.oo)
assert limit == B
limit

# %% [markdown]
# So the intensity of a product with a large weight matrix is simply **B, the number of rows that share one reading of W**. That single
# letter decides everything below.
#
# A machine has an intensity too: the FLOPs it can do in the time it reads one byte. That is its **ridge point**. Below it a product
# waits for memory, above it for arithmetic.

# %%
h100 = catalog.machine("h100-sxm")
ridge = h100.peak("bf16") / h100.bandwidth_at()     # FLOP/s over bytes/s
assert round(ridge) == 295
Markdown(f"An {h100.name} does {si(h100.peak('bf16'), 'FLOP/s')} in bf16 and reads {si(h100.bandwidth_at(), 'B/s')}: its ridge point is "
         f"**{ridge:.0f} FLOPs per byte**. With one row (B = 1) the same product uses {1 / ridge:.1%} of its arithmetic.")

# %% [markdown]
# ### The MLP: B·T rows
#
# A gated MLP has three matrices: gate and up, [D, F], and down, [F, D]. All tokens of all sequences go through them together, so B·T
# rows share each reading.

# %%
T = sympy.symbols("T", positive=True)
rows = B * T
flops, bytes = 0, 0

bytes += 2 * rows * D                               # read X
bytes += 2 * 2 * D * F                              # read gate and up
flops += 2 * 2 * rows * D * F                       # X @ gate, X @ up
bytes += 2 * 2 * rows * F                           # write both
bytes += 2 * 2 * rows * F + 2 * rows * F            # read both, write silu(gate) * up; its few FLOPs per element do not count
bytes += 2 * rows * F + 2 * F * D                   # read the result, read down
flops += 2 * rows * F * D                           # ... @ down
bytes += 2 * rows * D                               # write

mlp_intensity = sympy.simplify(flops / bytes)
assert sympy.limit(mlp_intensity.subs({D: growth * D, F: growth * F}), growth, sympy.oo) == B * T
mlp_intensity

# %% [markdown]
# In prefill T is the length of the prompt: hundreds of rows from a single sequence. In decode T = 1, and only the batch is left.

# %% [markdown]
# ### Attention: its bytes belong to one sequence
#
# Weights are shared by everybody; a KV cache is not. Each sequence reads its own. Count for N query heads with their own keys and
# values (MHA), all scores kept on chip:

# %%
S, N, K, H = sympy.symbols("S N K H", positive=True)


def attention_intensity(query_heads, kv_heads):
    """FLOPs per byte of attention: T queries over S keys and values, in bf16."""
    flops, bytes = 0, 0
    bytes += 2 * B * T * query_heads * H            # read Q
    bytes += 2 * 2 * B * S * kv_heads * H           # read K and V: once for each KV head
    flops += 2 * B * T * S * query_heads * H        # scores Q Kᵀ
    flops += 2 * B * T * S * query_heads * H        # weighted sum of V
    bytes += 2 * B * T * query_heads * H            # write the output
    return sympy.simplify(flops / bytes)


mha = attention_intensity(N, N)
assert sympy.simplify(mha - S * T / (S + T)) == 0
mha

# %% [markdown]
# **B is gone.** Batching makes the MLP denser and does nothing for attention. (Causality halves the FLOPs of a prefill; the shape of
# the argument stays.) The two phases are the two ends of the formula:

# %%
in_prefill = sympy.simplify(mha.subs(T, S))
in_decode = sympy.simplify(mha.subs(T, 1))
assert in_prefill == S / 2 and sympy.limit(in_decode, S, sympy.oo) == 1
Table(("phase", "T", "intensity", "as S grows"),
      [("prefill", "S", str(in_prefill), "grows with the prompt: compute-bound"),
       ("decode", "1", str(in_decode), "1: memory-bound, at any batch")])

# %% [markdown]
# ### What grouping changes
#
# With grouped queries (GQA), G = N/K query heads share one KV head. If the kernel shares the reading as well, its bytes fall by G:

# %%
G = sympy.symbols("G", positive=True)
gqa = attention_intensity(G * K, K)
assert sympy.simplify(gqa - G * S * T / (G * T + S)) == 0
assert sympy.limit(gqa.subs(T, 1), S, sympy.oo) == G
gqa

# %% [markdown]
# A decode step of attention has intensity **G**: 4 for Llama-3-8B, 8 for Llama-3.1-70B, against a ridge point near 300. Better than 1, and
# still far below. A kernel that reads K and V once per *query* head throws the gain away, and published
# tables suggest that several engines once did.

# %% [markdown]
# ### A whole model: does it fit, and how fast could it be?
#
# Llama-2-13B on an H100, 1,024 tokens of context, at three batch sizes. Decode reads all the weights once a step, and all of the KV cache.
# Capacity comes first: a configuration that does not fit has no speed.

# %%
llama = catalog.model("llama-2-13b")
context = 1024

weight_bytes = 2 * llama.parameters()
kv_per_sequence = 2 * llama.L * llama.K * llama.H * 2 * context     # K and V, every layer, 2 bytes
assert llama.kv_bytes(1, context) == kv_per_sequence == 838_860_800

lines = []
for batch in (1, 64, 256):
    memory = weight_bytes + batch * kv_per_sequence
    seconds = memory / h100.bandwidth_at()
    fits = memory <= h100.memory
    lines.append((str(batch), si(memory, "B"), "yes" if fits else "no", si(seconds, "s") if fits else f"({si(seconds, 's')})",
                  f"{batch / seconds:,.0f}" if fits else f"({batch / seconds:,.0f})"))
columns = ("batch", "weights and KV", "fits?", "time per token", "tokens/s")
Table(columns, lines, numeric=[name for name in columns if name != "fits?"],
      title=f"{llama.name}, {h100.name}, memory time alone")

# %% [markdown]
# Throughput grows with the batch as the weights are shared, latency grows with it as the caches are not. And the last row is an illusion:
# it does not fit. The same model with 8 KV heads instead of 40 would:

# %%
grouped = ModelShape("Llama-2-13B with 8 KV heads", L=40, D=5120, N=40, K=8, H=128, F=13824, V=32000)
rows = [card(shape, h100, batch=256, context=context) for shape in (llama, grouped)]
assert [row["fits"] for row in rows] == [False, True]
Table(("model", "KV cache at batch 256", "fits?", "tokens/s"),
      [(row["model"], si(row["kv_bytes"], "B"), "yes" if row["fits"] else "no", number(row["tokens_per_s"]) if row["fits"] else "–")
       for row in rows],
      numeric=("KV cache at batch 256", "tokens/s"))

# %% [markdown]
# ## Prediction
#
# Now the machine in front of you, and a model that really runs: SmolLM2-135M. First the shape; the arithmetic needs nothing else.

# %%
shape = catalog.model("smollm2-135m")
streamed = shape.streamed_bytes("fp32")
Markdown(f"{shape.name}: L = {shape.L}, D = {shape.D}, N = {shape.N}, K = {shape.K}, H = {shape.H}, F = {shape.F}, V = {shape.V:,}. "
         f"**{shape.parameters():,} parameters**; a step streams {si(streamed, 'B')} of weights in fp32 "
         f"and {si(shape.kv_bytes_per_token('fp32'), 'B')} of cache for each token of context.")

# %% [markdown]
# Two predictions, and they must not be mixed up.
#
# * The **napkin** knows two numbers of this machine: bandwidth from main memory, and peak FLOP/s. Decode is bytes over bandwidth, prefill
#   is FLOPs over peak.
# * The **calibrated roofline** knows how fast a matrix product with M rows runs here, how fast attention runs, and what an operation costs
#   just to start. It takes each operation's own bound, then adds the starts.
#
# Neither has seen the model run.

# %% tags=["nbval-ignore-output"]
machine = this_machine()
lesson = Lesson("01 counting_inference", machine=machine)
Markdown(f"This machine: {machine.name}. It reads {si(machine.bandwidth_at(), 'B/s')} from memory; its best matrix product does "
         f"{si(machine.peak('fp32'), 'FLOP/s')} in fp32 and {si(machine.peak('bf16'), 'FLOP/s')} in bf16; starting an operation costs "
         f"{si(machine.fixed_s_per_op, 's')}. Ridge point in fp32: {machine.ridge('fp32'):.1f} FLOPs per byte.")

# %% [markdown]
# Your own guesses first, in seconds, if you like: write a number over the dots. How long for a prompt of 256 tokens? How long for one more token?

# %%
my_guess_ttft = ...
my_guess_token = ...

# %% tags=["nbval-ignore-output"]
PROMPTS, CONTEXTS = (64, 256, 1024), (64, 512, 1024)
models = {"fp32": load_model("smollm2-135m", dtype=torch.float32), "bf16": load_model("smollm2-135m", dtype=torch.bfloat16)}
lesson.guess("TTFT, prompt 256, fp32", my_guess_ttft)
lesson.guess("time per token, context 512, fp32", my_guess_token)


def work(phase, tokens, dtype):
    """The envelope's FLOPs and bytes for a prompt of so many tokens, or for one token at so much context."""
    count = shape.prefill if phase == "TTFT" else shape.decode
    return count(1, tokens, weights=dtype, kv=dtype, activations=dtype)


# How many operations PyTorch will be asked to start: counted on the model, not timed. A long prompt takes as many as a short one.
operations = {(phase, dtype): bench.step_ops(models[dtype], new) for phase, new in (("TTFT", 8), ("decode", 1)) for dtype in models}


cases = [("TTFT", T, dtype, f"TTFT, prompt {T}, {dtype}") for dtype in models for T in PROMPTS]
cases += [("decode", S, dtype, f"time per token, context {S}, {dtype}") for dtype in models for S in CONTEXTS]
predictions = {}
for phase, tokens, dtype, name in cases:
    asked = work(phase, tokens, dtype)
    predictions[name] = machine.time(asked, operations[phase, dtype])
    lesson.predict(name, napkin=machine.napkin(asked), predicted=predictions[name].seconds, unit="s")
lesson.table()

# %% [markdown]
# The same predictions by cause. In prefill the kernels' arithmetic is nearly all of it. In decode, compare what the bytes alone would take
# with what the *one-row kernels* take. They read the same bytes; where they take longer, PyTorch's kernel does not reach the bandwidth
# that memory offers, and the napkin, which knows nothing of kernels, will be too hopeful by just that.

# %% tags=["nbval-ignore-output"]
Table(("quantity", "kernels, at their M", "bytes", "starting operations", "together"),
      [(name, si(p.compute_s, "s"), si(p.memory_s, "s"), si(p.fixed_s, "s"), si(p.seconds, "s")) for name, p in predictions.items()],
      numeric=("kernels, at their M", "bytes", "starting operations", "together"))

# %% [markdown]
# ## Measurement
#
# One stopwatch for all: a warm-up, then repeats, and the median. Between the repeats we take the machine's **pulse**, a short matrix product
# of known speed: shared machines and warm laptops run faster and slower by the second, and a prediction is only as good as the ruler.
# The column *speed* in the ledger is the pulse; the roofline's time is divided by it.

# %% tags=["nbval-ignore-output"]
spreads = {}
for dtype, model in models.items():
    for T in PROMPTS:
        pulse = Pulse(machine, dtype, rows=T)
        timing = bench.time_prefill(model, 1, T, repeats={64: 5, 256: 3, 1024: 2}[T], watch=pulse.stopwatch)
        lesson.measure(f"TTFT, prompt {T}, {dtype}", timing.median, speed=pulse.speed)
        spreads[f"TTFT, prompt {T}, {dtype}"] = timing.spread

# %% tags=["nbval-ignore-output"]
for dtype, model in models.items():
    pulse = Pulse(machine, dtype, rows=1)
    cache = bench.filled_cache(model, 1, max(CONTEXTS) - 1)
    for S in sorted(CONTEXTS, reverse=True):                    # from the longest down: the cache is only ever cut
        timing = bench.time_decode(model, cache, S, repeats=11, watch=pulse.stopwatch)
        lesson.measure(f"time per token, context {S}, {dtype}", timing.median, speed=pulse.speed)
        spreads[f"time per token, context {S}, {dtype}"] = timing.spread

# %% [markdown]
# The first question again, now in measured numbers: what does a token of the prompt cost, and what a token of the answer?

# %% tags=["nbval-ignore-output"]
measured = {name: row.measured for name, row in lesson.rows.items()}
prompt_token = measured["TTFT, prompt 1024, fp32"] / 1024
output_token = measured["time per token, context 1024, fp32"]
Markdown(f"In fp32, a prompt token costs **{si(prompt_token, 's')}** and an output token **{si(output_token, 's')}**: "
         f"{output_token / prompt_token:.0f} times as much, for the same FLOPs.")

# %% [markdown]
# ## Reconciliation

# %% tags=["nbval-ignore-output"]
for phase, tokens, dtype, name in cases:
    p, asked = predictions[name], work(phase, tokens, dtype)
    gemm = sum(op.flops for op in asked.operations() if op.kernel == "gemm")
    if phase == "TTFT":
        rate = gemm / sum(op.flops / machine.flops_at(op) for op in asked.operations() if op.kernel == "gemm")
        why = f"products run at {rate / machine.peak(dtype):.0%} of peak on average; starts {p.fixed_s / p.seconds:.0%}"
    else:
        reach = asked.bytes / p.compute_s / machine.bandwidth_at()
        why = f"the one-row kernel reads at {reach:.0%} of bandwidth; starts {p.fixed_s / p.seconds:.0%}"
    lesson.explain(name, why + (f"; noisy, spread {spreads[name]:.0%}" if spreads[name] > 0.1 else ""))
lesson.table()

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(2, 2, figsize=(8.4, 6.2))
for row, dtype in zip(axes, models, strict=True):
    panels = ((row[0], PROMPTS, "TTFT, prompt {}, {}", "TTFT"),
              (row[1], CONTEXTS, "time per token, context {}, {}", "Time per output token"))
    for ax, tokens, name, title in panels:
        rows = [lesson.rows[name.format(n, dtype)] for n in tokens]
        plots.beside(ax, tokens, [r.napkin for r in rows], [r.predicted for r in rows], [r.measured for r in rows])
        ax.set_title(f"{title}, {dtype}")
        ax.set_xlabel("prompt, tokens" if title == "TTFT" else "context, tokens")
        ax.set_xticks(tokens)
plt.show()

# %% tags=["nbval-ignore-output"]
rows = lesson.rows.values()
one_row = machine.flops_at(work("decode", 64, "fp32").operations()[0])      # FLOP/s of a product with M = 1; 2 FLOPs for each 4 bytes
errors = sorted(max(r.ratio, 1 / r.ratio) for r in rows)
napkins = sorted(r.ratio_napkin for r in rows)
Markdown(f"""
The calibrated roofline is off by a factor of {errors[len(errors) // 2]:.2f} in the median and {errors[-1]:.2f} at worst.
The napkin promises too much by a factor of {napkins[0]:.1f} to {napkins[-1]:.1f}. What is the difference made of?

* **The kernel.** The napkin takes it for granted that a product with one row reads memory at full speed. On this machine PyTorch's
  one-row product in fp32 runs at {si(one_row, "FLOP/s")}, that is {si(2 * one_row, "B/s")} of weights, where memory offers
  {si(machine.bandwidth_at(), "B/s")}.
* **Few rows are slow rows.** A product reaches its peak only with hundreds of rows, so the shortest prompt pays more per token
  than the longest.
* **Starting operations.** A decode step starts {operations["decode", "fp32"]:,} of them:
  {si(predictions["time per token, context 64, fp32"].fixed_s, "s")} before anything is computed. It does not shrink with the
  model, nor with the dtype, so it is a larger share of a faster step.
""")

# %% [markdown]
# And the original question has its answer. Both phases do about 2 FLOPs for each parameter and token. Prefill has T rows to share each
# reading of the weights, decode has one. **Decode does not compute; it reads.** Whatever makes decode cheaper reads fewer bytes
# (quantization, smaller caches) or shares the reading among more rows (batching, speculation): that is the rest of this course.
#
# When does this *not* hold? Where the prompt is shorter than the ridge point, prefill is memory-bound too; where the batch is larger,
# decode's MLP becomes compute-bound, while its attention never does; and where a model is tiny, neither is true: the starts decide.

# %% [markdown]
# ## Play and exercises
#
# What if? Any model, any machine. Watch what happens to the intensity as the batch grows, and when a long context takes the room.

# %%
def what_if(model, machine, batch, context, weights):
    answer = card(catalog.model(model), catalog.machine(machine), batch=batch, context=context, weights=weights)
    decode, prefill = answer["decode"], answer["prefill"]
    title = f"{answer['model']} on {answer['machine']}"
    memory = f"{si(answer['weight_bytes'], 'B')} + {si(answer['kv_bytes'], 'B')} of {si(answer['memory_bytes'], 'B')}"
    if not answer["fits"]:
        return Table(("", ""), [("weights + KV cache", memory), ("fits", f"no: at most a batch of {answer['max_batch']}")], title=title)
    return Table(("", ""), [
        ("weights + KV cache", memory),
        ("fits", f"yes, up to a batch of {answer['max_batch']:,}"),
        ("time to first token", f"{si(prefill['seconds'], 's')}, bound by {prefill['bound']}"),
        ("time per token", f"{si(decode['seconds'], 's')}, bound by {decode['bound']}"),
        ("tokens/s, all sequences", number(answer["tokens_per_s"])),
        ("intensity of decode", f"{decode['intensity']:.1f} FLOPs per byte; the ridge is at {answer['ridge']:.0f}"),
    ], title=title)


what_if("llama-3-8b", "h100-sxm", 32, 4096, "bf16")

# %% tags=["widget", "nbval-ignore-output"]
from IPython.display import display

from clawdemy_infer import widgets

widgets.play(
    lambda **values: display(what_if(**values)),
    model=widgets.choose("model", catalog.model_names(), "llama-3-8b"),
    machine=widgets.choose("machine", catalog.machine_names(), "h100-sxm"),
    batch=widgets.powers_of_two("batch", 1, 1024, 32),
    context=widgets.powers_of_two("context", 128, 131072, 4096),
    weights=widgets.choose("weights", ["bf16", "int8", "int4"]),
)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.6))
batches = [2**i for i in range(9)]
for key, colour in zip(("h100-sxm", "rtx-4090", "l4"), plots.COLOURS, strict=False):
    cards = [card(catalog.model("llama-3-8b"), catalog.machine(key), batch=batch, context=2048) for batch in batches]
    cards = [answer for answer in cards if answer["fits"]]
    left.loglog([c["batch"] for c in cards], [c["tokens_per_s"] for c in cards], "o-", color=colour, label=catalog.machine(key).name,
                markersize=4)
    end = cards[-1]                                             # the intensity is the model's: the same line, cut off where memory ends
    right.loglog([c["batch"] for c in cards], [c["decode"]["intensity"] for c in cards], color=plots.COLOURS[0], zorder=1)
    right.plot(end["batch"], end["decode"]["intensity"], "o", color=colour, markersize=9 if key == "rtx-4090" else 5, zorder=3)
left.set(title="Llama-3-8B, context 2,048: throughput", xlabel="batch", ylabel="tokens/s")
left.legend(loc="lower right")
right.set(title="… and the intensity behind it", xlabel="batch", ylabel="FLOPs per byte", ylim=(0.7, 600))
right.axhline(ridge, color=plots.NAPKIN, linestyle="--")
right.text(1, ridge * 1.1, "ridge point of an H100", color="#6a6a6a", fontsize=9)
for ax in (left, right):
    ax.set_xticks(batches[::2], [str(batch) for batch in batches[::2]])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
plt.show()

# %% [markdown]
# Each line ends where memory ends; the dots on the right mark those ends on the one line that all machines share. The intensity flattens
# long before it reaches the ridge: every sequence brings its own KV cache, and no batch can share that.

# %% [markdown]
# ### Exercise 1 · Rows to be busy
#
# How many rows must share a reading of the weights before a large bf16 product is compute-bound? Write it for any machine, from its peak
# (FLOP/s) and its bandwidth (bytes/s). Then think: what if the weights are in int8 and the arithmetic in bf16?

# %% tags=["exercise", "exercise:rows_to_be_busy"]
def rows_to_be_busy(peak, bandwidth, bytes_per_weight):
    """Rows M at which 2*M FLOPs per weight take as long as reading that weight."""
    return ...


lesson.exercise("rows_to_be_busy", rows_to_be_busy,
                cases={(989.4e12, 3.35e12, 2): 295.343, (989.4e12, 3.35e12, 1): 147.672, (121e12, 300e9, 2): 403.333},
                nudge="M rows make 2*M FLOPs of every weight.",
                means="halve the bytes of a weight, and half the rows are enough to be busy.")

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# One weight: M multiply-adds take 2·M / peak seconds, its bytes take bytes_per_weight / bandwidth. Set them equal.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def rows_to_be_busy(peak, bandwidth, bytes_per_weight):
#     return peak / bandwidth * bytes_per_weight / 2
# ```
#
# At two bytes a weight this is the ridge point itself. Weight-only quantization lowers it.
#
# </details>

# %% [markdown]
# ### Exercise 2 · TTFT on the back of an envelope
#
# A prompt of 2,000 tokens for Llama-3-8B, bf16, on an L4 at 60 % of its peak. How many seconds until the first token? Two FLOPs for each
# parameter and token will do (leave attention out, and mind that the embedding is only a look-up).

# %% tags=["exercise", "exercise:ttft_on_an_l4"]
parameters_at_work = 8.03e9 - 128_256 * 4096        # all but the embedding table
ttft_on_an_l4 = ...

lesson.exercise("ttft_on_an_l4", ttft_on_an_l4, expected=2 * parameters_at_work * 2000 / (0.6 * 121e12), rtol=0.03,
                means="the prompt's length, not the answer's, sets the time to first token.")

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `catalog.machine("l4").peak("bf16")` is 121 TFLOP/s.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# parameters_at_work = 8.03e9 - 128_256 * 4096        # all but the embedding table
# ttft_on_an_l4 = 2 * parameters_at_work * 2000 / (0.6 * catalog.machine("l4").peak("bf16"))
# ```
#
# </details>

# %% [markdown]
# ### Exercise 3 · Time per token of a batch
#
# Write the napkin of a decode step that is bound by memory: weights once, caches once for each sequence. Give tokens per second for the
# *whole* batch.

# %% tags=["exercise", "exercise:throughput"]
def throughput(weight_bytes, kv_bytes_per_sequence, batch, bandwidth):
    """Tokens per second of the whole batch."""
    return ...


lesson.exercise("throughput", throughput,
                cases={(26e9, 838_860_800, 1, 3.35e12): 124.818, (26e9, 838_860_800, 64, 3.35e12): 2690.53, (26e9, 0, 64, 3.35e12): 8246.15},
                nudge="The weights are read once a step, whatever the batch.",
                means="with long contexts the caches, not the weights, set the ceiling.")

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A step gives `batch` tokens and takes (weights + batch · cache) / bandwidth seconds.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def throughput(weight_bytes, kv_bytes_per_sequence, batch, bandwidth):
#     return batch * bandwidth / (weight_bytes + batch * kv_bytes_per_sequence)
# ```
#
# As the batch grows this tends to bandwidth / kv_bytes_per_sequence: a ceiling that no batch can lift.
#
# </details>

# %% [markdown]
# ### Exercise 4 · Can decode ever be compute-bound? (harder)
#
# Take the whole decode step: P parameters at work in bf16, and for each sequence a cache of S tokens at `kv` bytes a token. Attention's
# FLOPs are small beside the rest here; leave them out. As the batch grows without end (and memory with it), towards what does the
# intensity of the step tend? Give the *longest context* at which some batch can still reach a ridge point R.

# %% tags=["exercise", "exercise:longest_compute_bound_context"]
def longest_compute_bound_context(P, kv, R):
    """Tokens of context beyond which no batch makes decode compute-bound."""
    return ...


lesson.exercise("longest_compute_bound_context", longest_compute_bound_context,
                cases={(7.5e9, 131_072, 295): 387.925, (12.85e9, 819_200, 295): 106.345, (68.7e9, 327_680, 295): 1421.37},
                nudge="With B without end, the weights' bytes vanish beside the caches'.",
                means="beyond a few hundred tokens of context, decode is memory-bound at any batch. Smaller caches are the way out.")

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# FLOPs: 2·P·B. Bytes: 2·P + B·S·kv. Divide, let B grow, and set the result equal to R.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def longest_compute_bound_context(P, kv, R):
#     return 2 * P / (kv * R)
# ```
#
# </details>
