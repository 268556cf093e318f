# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown] tags=["core", "slide"]
# # 01 · Why is prefill compute-bound and decode memory-bound?
#
# ## Question
#
# A chat waits for its first token (**TTFT**; without queueing), then for each output token
# (**TPOT**). **Prefill** runs a whole prompt in one step; each **decode** step adds one token.
# Which costs more, a token read or one written? Why?
#
# *45 minutes, exercises extra. Before: lesson 00, transformer layers. Afterwards: TTFT, TPOT,
# bill from config.json and data sheet. Skip folded code.*

# %% [markdown] tags=["notes"]
# **2 min.** Let the room vote, then ask by what factor. Collect three numbers on the board. Usual
# wrong answer: "the same, it is the same FLOPs". Nearly so, and that is the point: each token passes
# the same layers. (Two things differ, by less than half: the LM head runs for every output token and
# once for a prompt; and a prompt's average token looks back half as far.) Only now say that price
# lists ask several times as much for output. An agent may read 8,000 tokens and write 30,000.

# %% tags=["core", "slide", "hide-input", "nbval-ignore-output"]
from clawdemy_course import diagrams
from clawdemy_course.build_01 import CONFIGS, config_of
from clawdemy_course.reading import how_to_read
from clawdemy_infer import published
from clawdemy_infer.arithmetic import Work
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.files import load_model
from clawdemy_infer.from_config import catalog
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.parts import StepOf
from clawdemy_infer.lesson.tables import Table, interval, percent, si
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.machine.present import bracketed

import matplotlib.pyplot as plt
import sympy
from IPython.display import Markdown, clear_output, display

plots.use_style()
machine = this_machine()
lesson = Lesson("01 counting_inference", machine=machine)
display(Markdown(
    "**B** batch, **S** context, **T** new tokens of a sequence; **L** layers, "
    "**D** model width, **F** feed-forward (MLP) width, **N** query heads, **K** KV "
    "heads, **H** head dimension, **V** vocabulary; **G** = N/K query heads share a KV "
    "head. A step has B·T **rows**.\n\n**KV cache**: keys and values of all earlier "
    "tokens, kept in each layer. A new token's queries meet them."))
lesson.card()

# %% [markdown] tags=["notes"]
# **1 min.** The letters of the whole course, and the machine that we shall time. They come back on
# the matrices of the next picture: do not explain each of them now. Ask: what is a row? (One token
# of one sequence, a vector of D numbers.) Usual wrong answer: one sequence. And say that q, k and v
# are vectors, while K counts KV heads.

# %% tags=["core", "slide", "hide-input"]
display(Markdown(
    "**SmolLM2-135M, bf16, 512 tokens.** Below the line: another scale."))
diagrams.layer(catalog.model("smollm2-135m"))

# %% [markdown] tags=["notes"]
# **4 min.** One layer of the model that we run later. Point at the residual stream: the sum that
# each half of a layer reads and adds to. The MLP has three matrices, gate, up and down. The LM
# head is the last D x V matrix. The bars below the line are the whole step, on another scale. Ask:
# which of these bytes can two users share? (The weights; of the cache only a common beginning:
# lesson 06.) Usual wrong answer: the cache too. With 512 rows the intensity is 125, not 512: D is 576, hardly larger than the
# 512 rows, so X and Y weigh as much as W; and the activations of the element-wise operations count
# (12.2 of 29.5 MB a layer).

# %% [markdown] tags=["core", "slide"]
# ## Envelope
#
# **A matrix product.** `Y = X @ W`, X of [B·T, D], W of [D, F], 2 bytes a number. B sequences
# bring T new tokens each: a prompt has many, a decode step one.
#
# FLOPs over bytes is the **arithmetic intensity**. What stays of it while the rows are few beside
# D and F? (With many rows it stops at D·F / (D + F).)

# %% tags=["core", "fragment", "by-line"]
B, T, D, F, c = sympy.symbols("B T D F c", positive=True)
flops = 2 * B * T * D * F           # B·T·F dot products: D multiplies, D adds each
bytes = 2 * B * T * D               # read X
bytes += 2 * D * F                  # read W
bytes += 2 * B * T * F              # write Y
limit = sympy.limit((flops / bytes).subs({D: c * D, F: c * F}), c, sympy.oo)
assert limit == B * T               # the rows that share one reading of W
print("intensity", sympy.simplify(flops / bytes), " -> ", limit)

# %% [markdown] tags=["notes"]
# **4 min.** Each line comes at a key press: let the room say it first. Usual slips: one FLOP for a
# multiply-add; reading W once per row. The limit is the whole lesson: the intensity is the number
# of rows, while they are few beside D and F. Prefill has T of them from one user, decode has B,
# one from each user.

# %% tags=["core", "slide", "by-line"]
S, K, H, G = sympy.symbols("S K H G", positive=True)


def attention_intensity(N, K):
    """T queries meet S keys and values. Each sequence reads its own cache. In
    grouped-query attention (GQA) G = N/K query heads share a KV head; G = 1 is
    multi-head attention (MHA).
    A fused kernel (FlashAttention) never writes the scores to memory."""
    bytes = 2 * B * T * N * H               # read Q
    bytes += 2 * 2 * B * S * K * H          # read K and V, once for each KV head
    flops = 2 * B * T * S * N * H           # scores: Q times K transposed
    flops += 2 * B * T * S * N * H          # weighted sum of V
    bytes += 2 * B * T * N * H              # write the output
    return sympy.simplify(flops / bytes)

# %% [markdown] tags=["notes"]
# > Attention: the same count, with a cache for each sequence
#
# **3 min.** Each line comes at a key press. Then ask: what does a larger batch do for attention? Take
# votes; the next slide answers. Usual wrong answer: the same as for the products.

# %% tags=["core", "slide", "hide-input"]
many = sympy.limit(flops / bytes, T, sympy.oo)
assert sympy.simplify(many - D * F / (D + F)) == 0
mha, gqa = attention_intensity(K, K), attention_intensity(G * K, K)
causal = sympy.simplify(gqa.subs(T, S) / 2)             # half of the pairs are seen
assert sympy.simplify(mha - S * T / (S + T)) == 0       # B is gone
assert causal.subs(G, 1) == S / 4
assert sympy.limit(gqa.subs(T, 1), S, sympy.oo) == G    # decode: G, at any batch
print("MHA", mha, "  GQA", gqa)
h100, llama_3 = catalog.machine("h100-sxm"), catalog.model("llama-3-8b")
shared = llama_3.N // llama_3.K
Markdown(
    "* A **product**: the rows that share W: T from a prompt, B from a decode step.\n"
    "* **Attention**: B is gone. Each sequence reads its own cache.\n"
    "* Prefill, T = S: S/2 in MHA; the causal mask halves the FLOPs: S/4, and "
    f"{float(causal.subs({G: shared, S: 1})):.1f}·S in {llama_3.name}.\n"
    f"* Decode: 1 in MHA, G in GQA, {shared} in {llama_3.name}.\n"
    f"* An H100's ridge point: {h100.ridge('bf16'):.0f}.\n\n"
    "**A long prefill is compute-bound, decode at small batches memory-bound.**")

# %% [markdown] tags=["notes"]
# **3 min.** A larger batch does nothing for attention: **B is gone.** In prefill it grows with the
# prompt, to thousands. Ask: from which prompt on is Llama-3-8B's attention above the ridge point?
# (295 / 0.4, some 740 tokens.) Usual wrong answer: 295, the rows of a product. A kernel that reads K and V once per *query* head throws the gain of GQA
# away.

# %% tags=["core", "slide", "hide-input"]
llama_2 = catalog.model("llama-2-13b")
lines = []
for batch in (1, 64, 256):
    fits = llama_2.fits(h100.memory, batch, 1024)
    step_s = (llama_2.streamed_bytes() + fits.kv_bytes) / h100.bandwidth_at()
    shown = si(step_s, "s"), f"{batch / step_s:,.0f}"
    lines.append((str(batch), si(fits.weight_bytes, "B"), si(fits.kv_bytes, "B"),
                  *(("yes", *shown) if fits else ("no", "–", "–"))))
columns = ("batch", "weights", "KV cache", "fits?", "time per token", "tokens/s")
display(Table(columns, lines, [name for name in columns if name != "fits?"],
              f"Capacity first: {llama_2.name}, 1,024 tokens, H100. The 80 GB on its "
              f"box are 80 GiB = {si(h100.memory, 'B')}"))
numbers, peak = llama_2.matrix_parameters(), h100.peak("bf16")
bandwidth, computed = h100.bandwidth_at(), 2 * numbers * 1024
read = llama_2.streamed_bytes() + llama_2.kv_bytes(1, 1024)
Markdown(
    "**By hand, batch 1.** TPOT ≈ (weights read + cache) / bandwidth = "
    f"{si(read, 'B')} / {si(bandwidth, 'B/s')} = **{si(read / bandwidth, 's')}**.\n\n"
    "TTFT ≈ 2 · parameters · prompt tokens / peak = 2 · "
    f"{numbers / 1e9:.1f}·10⁹ · 1,024 / {si(peak, 'FLOP/s')} = "
    f"**{si(computed / peak, 's')}**.")

# %% [markdown] tags=["notes"]
# **2 min.** A configuration that does not fit has no speed. Ask: "80 GB on the box; how many GiB?"
# GB is 10⁹ bytes, GiB is 2³⁰, 7 % more; of DRAM and caches (not of disks, links or rates) vendors
# write GB and mean GiB: 80. A step reads all stored weights except
# the embedding. From 1 to 64, throughput grows since the weights are shared, and the time per token
# grows since the caches are not. Ask: what would 8
# KV heads instead of 40 do to the last row? (A fifth of the cache: it fits.) Usual wrong answer: a
# fifth of everything.

# %% [markdown] tags=["core", "slide"]
# ## Guess
#
# SmolLM2-135M, on the machine in front of you. How long does a prompt of 256 tokens take? How
# long one more token at 512 tokens of context, in fp32, and in bf16?
#
# Write over the dots, with a unit: `"9 hours"`.

# %% tags=["core", "fragment", "guess"]
lesson.guess("TTFT, prompt 256, fp32", ...)
lesson.guess("time per token, context 512, fp32", ...)
lesson.guess("time per token, context 512, bf16", ...)

# %% [markdown] tags=["notes"]
# **2 min.** Everybody writes three numbers down; the example on the slide is absurd, so that it
# suggests nothing. Hint for those who hesitate: 135 million parameters, 4 bytes each, and the
# bandwidth on the machine card at the top. Usual wrong answers: a prompt of 256 takes 256 times a
# token, and bf16 half of fp32. Do not correct anybody yet.

# %% [markdown] tags=["core", "slide"]
# ## Build
#
# A decode step, Llama family (gated MLP, full attention):
#
# * a multiply-add is 2 FLOPs, a number 2 bytes (bf16);
# * Q: D×N·H; K, V: D×K·H each; output: N·H×D; gate, up, down: D×F each;
# * a step reads each matrix once, the LM head (D×V) too; the embedding is stored, not read;
# * each sequence reads its cache;
# * leave out norms, rotary position embedding (RoPE), activations: small for few rows, not a
#   prompt's.

# %% [markdown] tags=["notes"]
# **2 min.** The rules are those of the envelope, and stand beside the stub on the next slide too. Ask: does it matter whether the LM head is tied
# to the embedding? (Not for what a step reads: it is read either way. It matters for what is
# stored.) The activations are assumed to stay on the chip.

# %% tags=["core", "slide", "build"]
def my_decode_step(config, batch, context):
    """FLOPs and bytes of a step that gives `batch` sequences one token each; then
    each holds `context` tokens. For Llama-3-8B, batch 1, context 1,000:
    15.5e9 FLOPs, 15.1e9 bytes."""
    D, L = config["hidden_size"], config["num_hidden_layers"]
    N, K = config["num_attention_heads"], config["num_key_value_heads"]
    F, V = config["intermediate_size"], config["vocab_size"]
    H = ...             # "head_dim" where the config states it, else D // N
    weights = ...       # L layers (Q: D×N·H; K, V: D×K·H each; output: N·H×D; gate,
                        # up, down: D×F each), and the LM head, D×V
    cached = ...        # numbers that one sequence keeps: K and V, every layer
    flops = ...         # the rows' products, and attention's
    bytes = ...
    return flops, bytes


decode_step = lesson.build("decode_step", my_decode_step)

# %% [markdown] tags=["notes"]
# > Count a decode step from config.json
#
# **7 min.** Students write; the check names the first property that fails, with an example. Usual
# wrong answers: N heads in the cache instead of K; one FLOP for a multiply-add; the embedding
# counted as read; weights times batch; D/N where `head_dim` says otherwise (Qwen3). An open stub
# is fine: the lesson goes on with the library's count.

# %% [markdown] tags=["core"]
# ## Measure
#
# Two predictions for each step. The **napkin**: your count over the card's bandwidth or peak,
# whichever takes longer. The **calibrated roofline** also knows the rates of products with few or
# many rows and of attention, and the price of a launch; it says an **interval**. Neither has seen
# the model run. If the machine's speed changed around a run, the interval is *widened*.

# %% tags=["core", "nbval-ignore-output"]
lesson.show("decode_step")               # the library's count, folded
smollm2 = load_model("smollm2-135m", device=machine.device)
models = {dtype: faster(smollm2, dtype) for dtype in ("fp32", "bf16")}
TIMES = {"fp32": 2, "bf16": 1}          # fp32 moves twice the bytes of bf16

steps = {f"TTFT, prompt {T}, fp32": StepOf(models["fp32"], "prefill", context=T)
         for T in (8, 256, 1024)}
for dtype, contexts in {"fp32": (64, 512, 1024), "bf16": (64, 512)}.items():
    steps |= {f"time per token, context {S}, {dtype}":
              StepOf(models[dtype], "decode", context=S) for S in contexts}

for name, step in steps.items():
    napkin, dtype = step.napkin(machine), step.model.weights
    if step.phase == "decode":
        flops, bytes = decode_step(CONFIGS["smollm2-135m"], 1, step.context)
        napkin = machine.napkin(Work(flops, TIMES[dtype] * bytes, dtype=dtype))
    lesson.predict(name, napkin, step.predict(machine), unit="s")
lesson.reveal()

# %% tags=["core", "slide", "hide-input", "measured", "nbval-ignore-output"]
tokens = {name: step for name, step in steps.items() if step.phase == "decode"}
runs = bracketed(machine)({name: step.run for name, step in tokens.items()}, repeats=15)
for name, step in steps.items():                        # tokens in turn: a busy moment
    explained = "prompt 256" in name or "context 512" in name       # falls on all alike
    if name in tokens:
        parts = step.parts(machine) if explained else ()
        lesson.measure(name, runs[name], parts=parts)
    else:
        lesson.measure(name, step, parts=None if explained else ())
clear_output()                                          # all eight are under Further
lines = []
for name in (name for name in steps if "prompt 256" in name or "context 512" in name):
    row, told = lesson.rows[name], lesson.said[name][1]
    before, after = (interval(each.low, each.high, "s") for each in (told, row))
    lines.append([name, si(row.napkin, "s"), before, "–" if after == before else after,
                  si(row.measured, "s"), percent(row.spread)])
numeric = ["napkin", "predicted", "widened to", "measured", "± spread"]
Table(["quantity", *numeric], lines, numeric)

# %% [markdown] tags=["notes"]
# > Napkin, prediction, stopwatch
#
# **2 min.** Runs about a minute: meanwhile ask who guessed lowest. If it fails or drags, stay on
# the slide: its numbers are a whole run's, on the machine that built the deck. Napkin beside
# measured: who was nearer, the guess or the napkin? Usual wrong answer for bf16: half the time of
# fp32. Its bytes are half, and the rest is not. Do not explain yet.

# %% [markdown] tags=["core", "slide"]
# ## Reconcile
#
# What is the largest part of what lies between napkin and stopwatch: for a **token** at context 512
# in fp32, and for the **TTFT** of 256? Commit yourself to a cause for each:
#
# 1. `"products"`
# 2. `"attention"`
# 3. `"element-wise"` (norms, activations, additions)
# 4. `"launches"`
# 5. `"memory was slower than calibrated"`, `"memory was faster than calibrated"` (the token)
# 6. `"compute was slower than calibrated"`, `"compute was faster than calibrated"` (the TTFT)
# 7. `"not explained"`

# %% tags=["core", "fragment", "guess"]
lesson.cause("time per token, context 512, fp32", ...)
lesson.cause("TTFT, prompt 256, fp32", ...)

# %% [markdown] tags=["notes"]
# **1 min.** Vote by hands, on the *token* alone; the prompt's cause is homework. Ask somebody for the
# reason. Usual wrong answer: memory, but its bytes are the napkin's already. A launch is what an
# operation costs however small it is.

# %% tags=["core", "slide", "hide-input", "measured", "nbval-ignore-output"]
lesson.explain("time per token, context 512, fp32")
print(how_to_read(lesson, "time per token, context 512, fp32"))

# %% [markdown] tags=["notes"]
# **3 min.** Read the waterfall from left to right. Products and attention were clocked; launches
# are a count times a price of these turns (under the figure, beside that of the prediction: a price
# between products depends on what they leave in the caches); element-wise is what is left between
# products. The rest is *not explained*. Usual wrong reading: a bar is all that a part took. It is
# what the part took beyond its share of the napkin. Then the vote.

# %% tags=["core", "hide-input", "measured", "nbval-ignore-output"]
lesson.explain("TTFT, prompt 256, fp32")
print(how_to_read(lesson, "TTFT, prompt 256, fp32"))
print("Here the napkin counts FLOPs at the peak. Element-wise operations read and "
      "write all rows;\nthe napkin has no share for them. A longer prompt adds most to "
      "attention: FLOPs grow with the square.")

# %% tags=["core", "slide", "hide-input", "measured", "nbval-ignore-output"]
measured = {name: row.measured for name, row in lesson.rows.items()}
shape, long = catalog.model("smollm2-135m"), 1024
prompt_token = measured[f"TTFT, prompt {long}, fp32"] / long
output_token = measured[f"time per token, context {long}, fp32"]
ratio = shape.decode(1, long).flops * long / shape.prefill(1, long).flops


def price_ratio(batch, context):
    """An output token over a prompt token, on the envelope of an H100."""
    flops, bytes = decode_step(CONFIGS["llama-3-8b"], batch, context)
    step_s = max(flops / h100.peak("bf16"), bytes / h100.bandwidth_at())
    prompt_s = llama_3.prefill(1, context).flops / h100.peak("bf16")
    return step_s / batch / (prompt_s / context)


Markdown(
    f"A token of a prompt of {long:,} costs **{si(prompt_token, 's')}**, an output "
    f"token at context {long:,} **{si(output_token, 's')}**: "
    f"**{output_token / prompt_token:.0f} times** that, for {ratio:.1f} times the "
    "FLOPs. (It pays for the LM head, and looks back twice as far.)\n\n"
    "Batches share the reading of weights, not of caches. On an H100's "
    f"envelope, {llama_3.name}: **{price_ratio(256, 1024):.0f} times** at batch 256 "
    f"and 1,024 tokens, **{price_ratio(64, 8192):.0f} times** at batch 64 and 8,192.")

# %% [markdown] tags=["notes"]
# **3 min.** Back to the numbers on the board: what is the factor? Ask: why more FLOPs at all? The
# LM head runs once for a prompt and once for each output token; a prompt's average token looks back
# at half of it. Usual wrong answer: decode computes more in each layer. All eight quantities stand
# under Further. There, tokens were timed in turn; where a shorter context still took longer, the
# machine was slower at that moment, or the difference is within the spread. A prompt of 8 tokens
# waits for the weights too; Further says how its time compares.

# %% [markdown] tags=["core"]
# ## On a GPU
#
# What others measured for the same two phases, beside the same envelope: data-sheet bandwidth and
# peak (fp32 accumulation). There a **kernel launch** costs microseconds on the CPU side, so a small
# model in eager PyTorch (one kernel at a time, from Python) waits for launches; **CUDA graphs**
# record a step's kernels once and replay them with a single launch.

# %% tags=["core", "slide", "hide-input"]
IDS = ("r103", "r104", "r154", "r157", "r133", "r144", "r142", "r002")
runs = {run.id: run for run in published.read()}
figure, ax = plt.subplots(figsize=(8.6, 4.3))
names, said, times = [], [], []
for place, run in enumerate(map(runs.get, IDS)):
    chip = published.demand(run).chip       # the peak as listed: sums in fp32
    asked = published.demand(run.changed(
        peak_TFLOPs_per_device=run.peak_TFLOPs_per_device / chip.fp16_accumulation))
    took, bound = asked.seconds(run.value), asked.bound
    times.append(took / bound)
    prefill = run.metric == "ttft_ms"
    gpu = run.hardware.split("-80GB")[0]
    software = run.software.replace(" (torch.compile)", "")
    what = f"TTFT of {run.prompt_len:,.0f}" if prefill else "a token"
    if prefill and sum(op.memory - op.compute for op in asked.ops) > 0:
        what += " (memory-bound)"
    names.append(f"{run.model}, {what}, {gpu}\n{software}")
    ax.plot([1, took / bound], [place, place], color=plots.NAPKIN, linewidth=2)
    ax.plot(took / bound, place, "o" if prefill else "s", color=plots.MEASURED)
    ax.text(took / bound + 0.04, place, f"{si(took, 's')} = {took / bound:.2f} × "
            f"{si(bound, 's')}", va="center", fontsize=10)
    said.append(f"{run.model}, {what}, {gpu}: {took / bound:.2f}")
ax.plot([], [], "o", color=plots.MEASURED, label="prefill")
ax.plot([], [], "s", color=plots.MEASURED, label="decode")
ax.set(title=f"Real kernels: {min(times):.1f} to {max(times):.1f} times the envelope",
       xlim=(1, 3.3), ylim=(len(IDS) - 0.4, -0.6),
       xlabel="published ÷ envelope (data sheet)")
ax.set_yticks(range(len(IDS)), names, fontsize=10)
ax.grid(visible=False, axis="y")                        # no lines through the numbers
ax.legend(loc="lower right", fontsize=10)
plots.show(figure, "Envelope and published time of eight runs, 16-bit weights, one "
                   "sequence on one GPU. Published over envelope: "
                   f"{'; '.join(said)}.")

# %% [markdown] tags=["notes"]
# **2 min.** How far are real kernels from the data sheet? Beside each dot stands the published
# time, as a multiple of its envelope. Ask which phase is nearer to its bound. Usual wrong answer:
# prefill, because large products run near the peak. (Neither, clearly: the ranges overlap.)
# Llama-3-8B and Llama-3.1-8B have the same layers, but the last two
# rows differ in software, in dtype, perhaps in the card: TinyChat's README does not say which A100
# it had.

# %% [markdown] tags=["core", "slide"]
# ## When does it lose?
#
# * <span class="fragment">**Short prompts**: with fewer rows than the ridge, prefill is
#   memory-bound too.</span>
# * <span class="fragment">**Large batches, short contexts**: decode becomes compute-bound. Its
#   attention does not (GQA: 4 to 16 FLOPs per byte; ridge: hundreds). Multi-head latent attention
#   (MLA) comes near (lesson 03).</span>
# * <span class="fragment">**Long contexts**: no batch helps; each sequence brings its own bytes. In
#   prefill attention outgrows the products.</span>
# * <span class="fragment">**Tiny models**: neither bytes nor FLOPs decide, but launches.</span>

# %% [markdown] tags=["notes"]
# **2 min.** Each bullet is an assumption of the envelope that fails. Ask for a workload for two of
# them. Usual wrong answer: a large batch always makes decode compute-bound. Workloads: a classifier with short prompts; offline generation of short answers; a coding agent; a draft
# model. One query a step gives attention G FLOPs per byte, at any batch: more where one KV head
# serves all (71 in Falcon-7B), T times as much where a step verifies T tokens; a laptop's ridge is
# lower than these GPUs'.

# %% [markdown] tags=["core", "slide"]
# ## Play
#
# Serve Llama-3-8B with 8,192 tokens of context: **at least 1,500 tokens/s**, each user's token
# within **20 ms**. Which card, which batch? What breaks is red. Activations and workspace come
# on top (vLLM uses 90 % of a card by default).

# %% tags=["core", "hide-input", "widget", "nbval-ignore-output"]
def limits(card, batch, context, promise_ms):
    """Bytes kept and seconds per token, each as (value, limit)."""
    shape, sheet = catalog.model("llama-3-8b"), catalog.machine(card)
    flops, bytes = decode_step(CONFIGS["llama-3-8b"], batch, context)
    seconds = max(flops / sheet.peak("bf16"), bytes / sheet.bandwidth_at())
    kept = shape.stored_bytes() + shape.kv_bytes(batch, context)
    return (kept, sheet.memory), (seconds, promise_ms / 1000)


def gauge(name, value, limit, unit):
    broken = value > limit
    colour = "#d91633" if broken else "#2aaa73"
    says = f"✗ over by {si(value - limit, unit)}" if broken else "✓"
    return (f'<div style="margin: 6px 0">{name}: <b>{si(value, unit)}</b> of '
            f'{si(limit, unit)} <b style="color: {colour}">{says}</b>'
            '<div style="border: 1px solid #777; width: 60%; height: 0.8em">'
            f'<div style="background: {colour}; height: 100%; '
            f'width: {min(100, 100 * value / limit):.0f}%"></div></div></div>')


def design(card, batch, context, promise_ms):
    memory, time = limits(card, batch, context, promise_ms)
    rate = batch / time[0] if memory[0] <= memory[1] else 0
    said = f"{catalog.machine(card).name}, {batch} sequences of {context:,} tokens"
    html = (f"<div>{said}</div>" + gauge("memory", *memory, "B")
            + gauge("time per token", *time, "s")
            + f"<div><b>{rate:,.0f} tokens/s</b></div>")
    plain = (f"{said}: {si(memory[0], 'B')} of {si(memory[1], 'B')}, "
             f"{si(time[0], 's')} of {si(time[1], 's')} a token, {rate:,.0f} tokens/s")
    display({"text/html": html, "text/plain": plain}, raw=True)


CARDS = ["l4", "l40s", "rtx-4090", "a100-80gb-sxm", "h100-sxm", "h200-sxm", "mi300x"]
widgets.play(design, card=widgets.choose("card", CARDS, "h100-sxm"),
             batch=widgets.powers_of_two("batch", 1, 256, 64),
             context=widgets.powers_of_two("context", 512, 65536, 8192),
             promise_ms=widgets.powers_of_two("promise, ms", 5, 160, 20))

# %% tags=["core", "fragment", "hide-input"]
design("h100-sxm", 64, 8192, 20)

# %% [markdown] tags=["notes"]
# **3 min.** Ask one question live: at 64 users the promise is broken and the memory is not; which
# one number of the data sheet would you improve to serve more users within 20 ms? (Bandwidth.) Usual
# wrong answer: FLOPs, or memory. One student drives the notebook; the slide is the fallback, with the
# sliders as they start. The design problem is homework; Solutions computes what keeps both promises.
# On an H100 48 users (not on the slider) would just keep 20 ms, at some 2,400 tokens/s; with an
# 8-bit cache 64 users come to 14.7 ms.

# %% [markdown] tags=["core"]
# ## Check yourself
#
# Use `decode_step(config, batch, context)`, and of the data sheet `card.peak("bf16")`,
# `card.bandwidth_at()`, `card.memory`. Weights and cache are in bf16; GB are 10^9 bytes. Bytes of
# one cached token are the difference of two contexts. A prompt of T tokens counts as batch T at
# context T/2. What must fit is *stored*: the embedding too. Of wrong lines, correct the first.
# Solutions, of Play too, are at the end.
#
# **A turn of an agent.** Qwen3-32B on one H200, rented at $4 an hour. A turn reads 8,000 tokens and
# writes 30,000. Give its TTFT (products and causal attention), its TPOT at the mean context while
# it answers (prompt included), the seconds of the whole turn, the share of the TTFT in them, and its
# price in dollars alone on the card. Do eight turns fit, each with all of its tokens? What does one
# cost when eight start together: prompts one after the other, nobody decodes until all are read?
#
# **A promise.** Qwen3-14B on L40S cards, 10,000 tokens of context, 45 ms a token promised. What is
# the largest batch that keeps the promise? Does it fit? How many tokens/s does a card give then?
# How many cards serve 5,000 tokens/s?

# %% tags=["core", "hide-input"]
for name, card in (("qwen3-32b", "h200-sxm"), ("qwen3-14b", "l40s"),
                   ("llama-3.1-70b", "mi300x")):
    asked, sheet = catalog.model(name), catalog.machine(card)
    letters = ", ".join(f"{each} {getattr(asked, each):,}" for each in "LDNKHFV")
    tied = "is" if asked.tied else "beside"
    print(f"{name}: {letters}; embedding {tied} the LM head\n"
          f"    {card}: {si(sheet.peak('bf16'), 'FLOP/s')} in bf16, "
          f"{si(sheet.bandwidth_at(), 'B/s')}, {si(sheet.memory, 'B')}")

# %% tags=["core", "exercise", "exercise:agent_turn"]
config, card = config_of("qwen3-32b"), catalog.machine("h200-sxm")
ttft = ...              # seconds; or text with a unit: "20 ms"
tpot = ...              # seconds
seconds = ...           # of the whole turn
share = ...             # of the TTFT in them, a fraction
dollars = ...           # alone on the card
fits = ...              # True or False: eight turns
dollars_of_8 = ...      # of one turn, when eight run together
lesson.steps("agent_turn", ttft=ttft, tpot=tpot, seconds=seconds, share=share,
             dollars=dollars, fits=fits, dollars_of_8=dollars_of_8)

# %% tags=["core", "exercise", "exercise:promise"]
config, card = config_of("qwen3-14b"), catalog.machine("l40s")
batch = ...             # sequences
fits = ...              # True or False
tokens_per_s = ...      # of one card
cards = ...             # a whole number
lesson.steps("promise", batch=batch, fits=fits, tokens_per_s=tokens_per_s, cards=cards)

# %% [markdown] tags=["further", "slide"]
# ### Take with you
#
# * A product's intensity is its rows, while they are few: a prompt has many, a decode step one a
#   user.
# * Attention's does not grow with the batch: each sequence reads its cache.
# * Bytes over bandwidth bound TPOT, FLOPs over peak a long prompt's TTFT; capacity comes first.
#
# **Next**: what does remembering cost, and save? **Homework**: a turn of an agent; a promise;
# compute-bound decode (Further).

# %% [markdown] tags=["notes"]
# **1 min.** Three sentences; let the room say them first. The three exercises take nearly an hour;
# the first one is the bill of an agent.

# %% [markdown] tags=["further"]
# ## Further
#
# **MFU, MBU, ledger.** Bound over measured, with the data sheet's peak or bandwidth in the bound,
# is what the field calls **MFU** (FLOPs) or **MBU** (bytes); with the calibrated values, as here, it
# comes out higher. Each measurement is kept in the **ledger**, a file of all your predictions. The
# **explained share** says how much of the difference to the napkin the parts account for. A step's
# own time is never used to predict it.

# %% [markdown] tags=["further"]
# **All eight, predicted and measured.**

# %% tags=["further", "nbval-ignore-output"]
lesson.table()

# %% [markdown] tags=["further"]
# **Exercise: compute-bound decode.** Llama-3.1-70B on one MI300X. Leave attention's FLOPs out, not
# its bytes. Below which context does some batch reach the ridge point? At *half* that context,
# which batch does (with a fraction)? How many bytes of cache does it keep? Does it fit beside the
# stored weights (`True` or `False`)?

# %% tags=["further", "exercise", "exercise:compute_bound"]
config, card = config_of("llama-3.1-70b"), catalog.machine("mi300x")
below = ...             # tokens
batch = ...             # sequences, at half of them
cache = ...             # bytes
fits = ...              # True or False
lesson.steps("compute_bound", below=below, batch=batch, cache=cache, fits=fits)

# %% [markdown] tags=["further"]
# **When does it lose, in numbers.**

# %% tags=["further", "hide-input", "nbval-ignore-output"]
def is_compute_bound(name, batch, context):
    flops, bytes = decode_step(CONFIGS[name], batch, context)
    return flops / h100.peak("bf16") > bytes / h100.bandwidth_at()


batch = next(B for B in range(1, 10_000) if is_compute_bound("llama-3-8b", B, 128))
longest = llama_3.matrix_parameters() / (llama_3.L * llama_3.N * llama_3.H)
assert not is_compute_bound("llama-3-8b", 10**6, 2048)
short = measured["TTFT, prompt 8, fp32"] / measured["time per token, context 64, fp32"]
Markdown(
    f"This machine's ridge in fp32 is {machine.ridge('fp32'):.1f} FLOPs per byte, "
    f"that is {2 * machine.ridge('fp32'):.0f} rows (a number has 4 bytes and "
    "brings 2 FLOPs a row); "
    f"a prompt of 8 took {short:.1f} times a "
    "single token's time. Llama-3-8B on an H100 is compute-bound from batch "
    f"{batch} at 128 tokens of context, and at 2,048 tokens at no batch. (One maximum "
    "for a whole step: reading and computing overlap perfectly.) Attention's "
    f"FLOPs pass those of the layers' products in prompts above {longest:,.0f} tokens.")

# %% [markdown] tags=["further"]
# **The same token in bf16.** Half the bytes, and as many launches.

# %% tags=["further", "hide-input", "measured", "nbval-ignore-output"]
lesson.explain("time per token, context 512, bf16")

# %% [markdown] tags=["further"]
# **Play, every batch at once.** Llama-3-8B, 8,192 tokens, two cards: the promise breaks before
# the memory does.

# %% tags=["further", "hide-input"]
batches, RED = [2**i for i in range(9)], plots.COLOURS[4]
cards = dict(zip(("a100-80gb-sxm", "h100-sxm"), (*plots.COLOURS,), strict=False))
figure, panels = plt.subplots(1, 2, figsize=(9, 3.8))
titles = ("Weights and cache, 8,192 tokens", "Time per token, 20 ms promised")
for which, (panel, unit, title) in enumerate(zip(panels, "Bs", titles, strict=True)):
    for key, colour in list(cards.items())[1 - which:]:     # memory is the same on both
        found = [limits(key, B, 8192, 20)[which] for B in batches]
        name = catalog.machine(key).name if which else "either card"
        panel.loglog(batches, [value for value, _ in found], color=colour, label=name)
        for B, (value, most) in zip(batches, found, strict=True):
            over = value > most
            panel.plot(B, value, "X" if over else "o", color=RED if over else colour,
                       markersize=9 if over else 6)
    panel.axhline(found[0][1], color=RED, linestyle="--", linewidth=1.5)
    panel.plot([], [], "X", color=RED, markersize=9, label="over the limit")
    panel.legend(loc="upper left")
    panel.set(title=title, xlabel="batch")
    panel.set_xticks(batches[::2], [str(B) for B in batches[::2]])
    panel.set_yticks([(2e10, 5e10, 1e11, 2e11), (5e-3, 0.01, 0.02, 0.05, 0.1)][which])
    panel.minorticks_off()
    plots.units(panel.yaxis, unit)
plots.show(figure, "Llama-3-8B at 8,192 tokens on an A100 and an H100 of 80 GB. Left, "
                   "weights and cache against the batch: from 128 on over the dashed "
                   "limit of 85.9 GB. Right, the time per token: over 20 ms from batch "
                   "32 on the A100, from 64 on the H100. What is over is a red cross.")

# %% [markdown] tags=["further"]
# **Where the batch stops helping.** The intensity of a whole decode step against its batch: it
# rises with the rows of the products, and flattens where the caches outweigh the weights.

# %% tags=["further", "hide-input"]
ridge = h100.ridge("bf16")
figure, ax = plt.subplots()
batches = [2**i for i in range(13)]
for context, colour in zip((128, 512, 2048, 8192), plots.COLOURS, strict=False):
    counts = [decode_step(CONFIGS["llama-3-8b"], B, context) for B in batches]
    ax.loglog(batches, [flops / bytes for flops, bytes in counts], color=colour)
    ax.annotate(f"{context:,} tokens", (batches[-1], counts[-1][0] / counts[-1][1]),
                xytext=(4, -3), textcoords="offset points", color=colour, fontsize=9,
                annotation_clip=False)
ax.axhline(ridge, color=plots.NAPKIN, linestyle="--")
ax.text(1, ridge * 1.1, f"ridge point of an H100: {ridge:.0f}", fontsize=9)
ax.set(title="A long context keeps decode memory-bound at any batch", xlabel="batch",
       ylabel="FLOPs per byte, Llama-3-8B", xlim=(0.9, 4096 * 4))
ax.set_xticks([1, 16, 256, 4096], ["1", "16", "256", "4,096"])
ax.minorticks_off()
ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
plots.show(figure, "Intensity of a decode step of Llama-3-8B against the batch, up to "
                   "4,096, at four contexts. At 128 tokens it crosses the H100's ridge "
                   "point near 295; at 2,048 and 8,192 tokens it flattens far below.")

# %% tags=["further", "hide-input"]
gptq = runs["r192"]
weights, cards = 1e9 * gptq.weight_GB, int(gptq.n_devices)
took, one = gptq.value / 1e3, weights / (1e9 * gptq.peak_bw_GBps_per_device)
Markdown(
    f"**{cards} cards, one bandwidth.** The GPTQ paper times {gptq.model} in fp16, "
    f"{si(weights, 'B')} of weights, on {cards} A100s of "
    f"{gptq.peak_bw_GBps_per_device:,.0f} GB/s, assuming SXM cards: "
    f"{si(took, 's')} a token. One card's bandwidth would need "
    f"{si(one, 's')}: {cards} cards were as fast as {one / took:.2f} of one "
    "card's bandwidth. "
    "The layers lie on the cards one after the other, and one card reads at a time. A "
    "pipeline makes room; it does not make a single token faster.")

# %% [markdown] tags=["further"]
# **Read on.** Williams, Waterman and Patterson 2009 (the roofline); Pope et al. 2022,
# *Efficiently Scaling Transformer Inference*; Ainslie et al. 2023 (GQA); Stanford CS336, lecture
# 10. Lesson A1 judges other people's runs with this arithmetic; lesson 02 builds the cache.

# %% [markdown] tags=["solution"]
# ## Solutions

# %% [markdown] tags=["solution", "solution:decode_step"]
# <details><summary>decode_step</summary>
#
# ```python
# def my_decode_step(config, batch, context):
#     D, L = config["hidden_size"], config["num_hidden_layers"]
#     N, K = config["num_attention_heads"], config["num_key_value_heads"]
#     F, V = config["intermediate_size"], config["vocab_size"]
#     H = config.get("head_dim", D // N)
#     layer = D * (N + 2 * K) * H + N * H * D + 3 * D * F     # qkv, out, gate and up and down
#     weights = L * layer + V * D
#     cached = 2 * L * K * H * context
#     attention = 4 * L * N * H * context                     # scores and weighted sum
#     flops = batch * (2 * weights + attention)
#     bytes = 2 * (weights + batch * cached)
#     return flops, bytes
# ```
#
# </details>

# %% tags=["solution", "hide-input"]
kept = []
for key in CARDS:
    for batch in (2**i for i in range(9)):
        (stored, memory), (seconds, promised) = limits(key, batch, 8192, 20)
        if stored <= memory and seconds <= promised and batch / seconds >= 1500:
            kept.append(f"- {catalog.machine(key).name}, batch {batch}: "
                        f"{si(stored, 'B')}, {si(seconds, 's')}, "
                        f"{batch / seconds:,.0f} tokens/s")
Markdown("<details><summary>Play</summary>\n\n" + "\n".join(kept) + "\n\n</details>")

# %% [markdown] tags=["solution", "solution:agent_turn"]
# <details><summary>agent_turn</summary>
#
# ```python
# config, card = config_of("qwen3-32b"), catalog.machine("h200-sxm")
# peak, bandwidth = card.peak("bf16"), card.bandwidth_at()
# flops, _ = decode_step(config, 8000, 4000)          # 8,000 rows that see 4,000 tokens on average
# ttft = flops / peak                                     # (the head on each of them: 2 % too much)
# tpot = decode_step(config, 1, 8000 + 15_000)[1] / bandwidth
# seconds = ttft + 30_000 * tpot
# share = ttft / seconds
# dollars = 4 * seconds / 3600
# weights = decode_step(config, 1, 1)[1]
# kv = decode_step(config, 1, 2)[1] - weights
# embedding = 2 * config["vocab_size"] * config["hidden_size"]        # stored, not read
# fits = weights + embedding + 8 * 38_000 * kv <= card.memory
# together = 8 * ttft + 30_000 * decode_step(config, 8, 23_000)[1] / bandwidth
# dollars_of_8 = 4 * together / 3600 / 8
# ```
#
# </details>

# %% [markdown] tags=["solution", "solution:compute_bound"]
# <details><summary>compute_bound</summary>
#
# With n weights, kv bytes of cache a token and ridge R, a batch B has 2·n·B FLOPs and 2·n +
# B·S·kv bytes. As B grows the intensity tends to 2·n / (S·kv): equal to R at S = 2·n / (kv·R).
# At half of that S·kv is n / R, and 2·n·B = R·(2·n + n·B / R) gives B = 2·R. Its cache, B·S·kv, is
# 2·n bytes: as many as the weights that are read.
#
# ```python
# config, card = config_of("llama-3.1-70b"), catalog.machine("mi300x")
# ridge = card.peak("bf16") / card.bandwidth_at()
# _, weights = decode_step(config, 1, 1)                  # 2·n bytes
# kv = decode_step(config, 1, 2)[1] - weights
# below = weights / (kv * ridge)
# batch = 2 * ridge
# cache = batch * below / 2 * kv
# fits = weights + cache <= card.memory
# ```
#
# </details>

# %% [markdown] tags=["solution", "solution:promise"]
# <details><summary>promise</summary>
#
# ```python
# config, card = config_of("qwen3-14b"), catalog.machine("l40s")
# one, two = (decode_step(config, batch, 10_000)[1] for batch in (1, 2))
# cache, weights = two - one, 2 * one - two
# batch = int((0.045 * card.bandwidth_at() - weights) / cache)
# embedding = 2 * config["vocab_size"] * config["hidden_size"]        # stored, not read
# fits = weights + embedding + batch * cache <= card.memory
# tokens_per_s = batch / (weights + batch * cache) * card.bandwidth_at()
# cards = -(-5000 // tokens_per_s)                        # rounded up
# ```
#
# </details>
