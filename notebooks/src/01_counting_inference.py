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
from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.envelope.napkin import card
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.files import load_model
from clawdemy_infer.from_config import catalog
from clawdemy_infer.lesson import Lesson, plots
from clawdemy_infer.lesson.parts import StepOf
from clawdemy_infer.lesson.tables import Table, number, si
from clawdemy_infer.machine.calibrate import this_machine

import matplotlib.pyplot as plt
import sympy
from IPython.display import Markdown

plots.use_style()
plt.rcParams["savefig.dpi"] = 90                    # many figures, and the file stays small

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
# still far below. A kernel that reads K and V once per *query* head throws the gain away. The published tables of one engine
# look as if it once did; we come back to them below.

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
# * The **calibrated roofline** knows how fast a matrix product with M rows runs here, how fast attention runs, and what a *launch* costs:
#   whatever an operation takes, however small it is. It takes each operation's own bound, then adds the launches. It says an *interval*, as
#   wide as its measurements were unsteady.
#
# Neither has seen the model run.

# %% tags=["nbval-ignore-output"]
machine = this_machine()
lesson = Lesson("01 counting_inference", machine=machine)
lesson.card()

# %% [markdown]
# Your own guesses first: write over the dots, with a unit, `"20 ms"` or `"1.5 s"`. How long for a prompt of 256 tokens? How long for one
# more token, in fp32 and in bf16? An open guess is fine too.

# %% tags=["guess"]
lesson.guess("TTFT, prompt 256, fp32", ...)
lesson.guess("time per token, context 512, fp32", ...)
lesson.guess("time per token, context 512, bf16", ...)

# %% [markdown]
# A `StepOf` the model knows its FLOPs and bytes, counted as above, and how many operations PyTorch will launch for it: counted on the model,
# not timed. So it can be predicted before it runs.

# %% tags=["nbval-ignore-output"]
PROMPTS, CONTEXTS = (64, 256, 1024), (64, 512, 1024)
smollm2 = load_model("smollm2-135m", device=machine.device)
models = {dtype: faster(smollm2, dtype) for dtype in ("fp32", "bf16")}

steps = {}
for dtype, model in models.items():
    for T in PROMPTS:
        steps[f"TTFT, prompt {T}, {dtype}"] = StepOf(model, "prefill", context=T)
    for S in CONTEXTS:
        steps[f"time per token, context {S}, {dtype}"] = StepOf(model, "decode", context=S)

predictions = {name: step.predict(machine) for name, step in steps.items()}
for name, step in steps.items():
    lesson.predict(name, napkin=step.napkin(machine), predicted=predictions[name], unit="s")
lesson.reveal()

# %% [markdown]
# The same predictions, part by part. In decode, compare what the bytes alone would take with what the *products* take, each with one row.
# They read the same bytes; where they take longer, the one-row kernel was not seen to reach the bandwidth that memory offers, and the napkin,
# which knows nothing of kernels, will be too hopeful by just that.

# %% tags=["nbval-ignore-output"]
BESIDE = ("attention", "element-wise", "launches")


def by_part(prediction):
    """Seconds of the products together, and of the other parts."""
    others = [prediction.parts[name].seconds if name in prediction.parts else 0.0 for name in BESIDE]
    return [prediction.seconds - sum(others), *others]


columns = ("quantity", "bytes alone", "products", *BESIDE, "together")
Table(columns, [(name, si(step.work.bytes / machine.bandwidth_at(), "s"), *(si(part, "s") for part in by_part(predictions[name])),
                 si(predictions[name].seconds, "s")) for name, step in steps.items()], numeric=columns[1:])

# %% [markdown]
# ## Measurement
#
# One stopwatch for all: a warm-up, then repeats, and the median. Shared machines and warm laptops run faster and slower by the second, so right
# before and right after the repeats short probes look at how fast this one is *at that moment*. What they see makes the predicted interval
# wider. It never moves the prediction's centre, and the measured time changes nothing of it.
#
# Three steps are also measured part by part, with a clock around each product and each attention; reading the clock costs next to nothing,
# and what it costs is taken off.

# %% tags=["nbval-ignore-output"]
EXPLAINED = ("TTFT, prompt 256, fp32", "time per token, context 512, fp32", "time per token, context 512, bf16")
for name, step in steps.items():
    timing = step.time(machine, repeats=3 if step.phase == "prefill" else 11)
    lesson.measure(name, timing, parts=step.parts(machine) if name in EXPLAINED else ())

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
#
# First commit yourself: of what is between the napkin and the stopwatch, for a token at context 512 in fp32, what is the largest part? Write
# one of the causes over the dots.

# %% tags=["guess"]
# "products", "attention", "element-wise", "launches", "memory was slower than calibrated", "memory was faster than calibrated", "not explained"
lesson.cause("time per token, context 512, fp32", ...)

# %% [markdown]
# From the napkin to what was measured, step by step. Each bar was measured by itself: the memory's speed around the run, then each part, by what
# it took beyond its share of the napkin. What is left is called *not explained*.

# %% tags=["nbval-ignore-output"]
lesson.explain("time per token, context 512, fp32")

# %% [markdown]
# The same token in bf16: half the bytes, and the same launches.

# %% tags=["nbval-ignore-output"]
lesson.explain("time per token, context 512, bf16")

# %% [markdown]
# And a prompt of 256 tokens, where the napkin counts FLOPs.

# %% tags=["nbval-ignore-output"]
lesson.explain("TTFT, prompt 256, fp32")

# %% [markdown]
# All twelve, beside what was said of them:

# %% tags=["nbval-ignore-output"]
lesson.table()

# %% tags=["nbval-ignore-output"]
figure, axes = plt.subplots(2, 2, figsize=(8.4, 6.2))
for row, dtype in zip(axes, models, strict=True):
    panels = ((row[0], PROMPTS, "TTFT, prompt {}, {}", "TTFT"),
              (row[1], CONTEXTS, "time per token, context {}, {}", "Time per output token"))
    for ax, tokens, name, title in panels:
        rows = [lesson.rows[name.format(n, dtype)] for n in tokens]
        plots.beside(ax, tokens, [r.napkin for r in rows], [r.predicted for r in rows], [r.measured for r in rows])
        ax.fill_between(tokens, [r.low for r in rows], [r.high for r in rows], color=plots.ROOFLINE, alpha=0.12, linewidth=0)
        ax.set_title(f"{title}, {dtype}")
        ax.set_xlabel("prompt, tokens" if title == "TTFT" else "context, tokens")
        ax.set_xticks(tokens)
plots.show(figure, "Napkin, predicted interval and measurement in four panels: time to first token against the prompt, and time per output "
                   "token against the context, in fp32 and in bf16. The prompt's time rises with its length; a token's hardly moves.")

# %% tags=["nbval-ignore-output"]
rows = lesson.rows.values()
errors = sorted(max(r.ratio, 1 / r.ratio) for r in rows)
napkins = sorted(r.ratio_napkin for r in rows)


def measured_parts(name):
    """Measured seconds of the products, and of each part, of a step that was explained."""
    parts = {part["name"]: part["measured_s"] for part in lesson.rows[name].parts}
    return parts | {"products": sum(parts.values()) - sum(parts[each] for each in BESIDE)}


fp32_token, bf16_token = (measured_parts(f"time per token, context 512, {dtype}") for dtype in models)
weights = {dtype: shape.streamed_bytes(dtype) for dtype in models}
per_token = {T: measured[f"TTFT, prompt {T}, fp32"] / T for T in PROMPTS}
launches = steps["time per token, context 512, fp32"].ops
Markdown(f"""
{sum(r.inside == "yes" for r in rows)} of {len(rows)} measurements are inside their interval. The interval's centre is off by a factor of
{errors[len(errors) // 2]:.2f} in the median and {errors[-1]:.2f} at worst; measured over napkin is {napkins[0]:.1f} to {napkins[-1]:.1f}.
What was measured of it:

* **Products with one row.** The napkin takes it for granted that they read memory at full speed, {si(machine.bandwidth_at(), "B/s")}. In the token
  at context 512 they read {si(weights["fp32"] / fp32_token["products"], "B/s")} of weights in fp32,
  {si(weights["bf16"] / bf16_token["products"], "B/s")} in bf16.
* **Rows.** A token of a prompt of {PROMPTS[0]} costs {si(per_token[PROMPTS[0]], "s")}, one of a prompt of {PROMPTS[-1]:,}
  {si(per_token[PROMPTS[-1]], "s")}: a product needs rows to come near its peak, and attention grows with the prompt.
* **Kernel-launch overhead.** A decode step launches {launches:,.0f} operations beside its products and its attention. They took
  {si(fp32_token["launches"], "s")} in fp32 ({fp32_token["launches"] / measured["time per token, context 512, fp32"]:.0%} of the token) and
  {si(bf16_token["launches"], "s")} in bf16 ({bf16_token["launches"] / measured["time per token, context 512, bf16"]:.0%}): a launch costs the
  same whatever the model's width.
""")

# %% [markdown]
# And the original question has its answer. Both phases do about 2 FLOPs for each parameter and token. Prefill has T rows to share each
# reading of the weights, decode has one. **Decode does not compute; it reads.** Whatever makes decode cheaper reads fewer bytes
# (quantization, smaller caches) or shares the reading among more rows (batching, speculation): that is the rest of this course.
#
# When does this *not* hold? Where the prompt is shorter than the ridge point, prefill is memory-bound too; where the batch is larger,
# decode's MLP becomes compute-bound, while its attention never does; and where a model is tiny, neither is true: the launches decide.

# %% [markdown]
# ### Other people's runs
#
# So far the machine was yours. Does the same arithmetic hold on machines that we have never touched? `data/published_runs.csv` keeps
# runs that others measured and published, each with its source: from a Raspberry Pi to eight H100s, from 2022 to 2025. The numbers are
# theirs, and none of them was made by the model that is about to be judged.
#
# Capacity and bounds come first. A run that does not fit, or that is faster than its bytes at data-sheet bandwidth, did not happen as stated.

# %%
from clawdemy_infer import published
from clawdemy_infer.published.summary import (
    aims_table,
    contradictions_table,
    figures_table,
    reasons_table,
)

runs = published.read()
evidence = published.Evidence()                     # the rows that may teach
verdicts = published.verdicts(runs, evidence)       # each predicted without its own source
by_status = {status: [row for row in verdicts if row.status == status] for status in ("ok", "impossible", "inexpressible")}
Markdown(f"{len(runs)} rows from {len({run.group for run in runs})} sources: {len(by_status['ok'])} can be predicted, "
         f"**{len(by_status['impossible'])} are impossible**, and {len(by_status['inexpressible'])} are about something else, or leave out "
         "what a prediction needs.")

# %%
reasons_table(verdicts)

# %% [markdown]
# The rest takes longer than its bound, always. How much longer? A data sheet leaves out what a kernel loses: some of the bandwidth, some of
# the peak, a gap between one kernel and the next, instructions to unpack a quantized weight, the launch of an all-reduce. The model has one
# figure for each of these, and no more. They are *fitted*, on rows of **other sources than the one that is judged**: that is the only
# test that says anything about a run you have not seen.

# %%
figures_table(evidence.without(None))

# %%
fitted = evidence.without(None)
gap_s = fitted["gap"] / 1.41e9                      # an A100 runs at 1.41 GHz
Markdown(f"Read as a sentence: a kernel streams at {fitted['bandwidth']:.0%} of the data sheet, a matrix product runs at {fitted['tile']:.0%} of the "
         f"peak, and between one kernel and the next pass {fitted['gap']:,.0f} clock cycles, {si(gap_s, 's')} on an A100. That last one is why a small "
         "model, or the small part of a large one on eight devices, stays so far from its bound.")

# %%
KINDS = {"decode, batch 1": "decode at batch 1", "prefill": "prefill", "one matrix product": "GEMM profiles", "served batches": "serving, all",
         "decode on several devices": "tensor parallel"}
demands = {run.id: published.demand(run) for run in runs if run.id in {row.id for row in by_status["ok"] if row.terms}}
figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 4.2))
low, high = 1.5e-5, 300
for colour, (label, aim) in zip(plots.COLOURS, KINDS.items(), strict=False):
    shown = [row for row in by_status["ok"] if published.AIMS[aim](row)]
    published_s = [demands[row.id].seconds(row.published) for row in shown]
    predicted_s = [sum(row.terms.values()) for row in shown]
    left.loglog(published_s, [demands[row.id].bound for row in shown], ".", color=plots.NAPKIN, markersize=4, alpha=0.6, zorder=1)
    left.loglog(published_s, predicted_s, "o", color=colour, markersize=4, alpha=0.7, label=label, markeredgewidth=0)
    right.loglog(published_s, [p / m for p, m in zip(predicted_s, published_s, strict=True)], "o", color=colour, markersize=4, alpha=0.7,
                 markeredgewidth=0)
left.plot([], [], ".", color=plots.NAPKIN, label="bound: data sheets as printed")
left.plot([low, high], [low, high], color="black", linewidth=0.8)
left.set(title="Predicted against published", xlabel="published", ylabel="predicted", xlim=(low, high), ylim=(low / 3, high))
left.legend(loc="lower right", markerscale=1.5, handletextpad=0.2, borderaxespad=0.2)
right.axhspan(1 / 1.25, 1.25, color=plots.ROOFLINE, alpha=0.12, linewidth=0)
right.axhline(1, color="black", linewidth=0.8)
right.set(title="… as a ratio; the band is a quarter", xlabel="published", xlim=(low, high), ylim=(0.1, 3), yticks=[0.125, 0.25, 0.5, 1, 2])
right.minorticks_off()
right.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
for ax in (left, right):
    ax.set_xticks([1e-4, 1e-2, 1, 100])
    plots.units(ax.xaxis, "s")
left.set_yticks([1e-4, 1e-2, 1, 100])
plots.units(left.yaxis, "s")
for id, name, place in (("r590", "a matrix-vector kernel\nthat reads a prompt", (-112, 2)), ("r093", "70B on four H100s,\na prompt of 128", (-92, -44)),
                        ("r018", "70B on two A100s", (18, -66)), ("r085", "70B, heads that\nshare reads", (-38, 22))):
    row = next(row for row in by_status["ok"] if row.id == id)
    right.annotate(name, (demands[id].seconds(row.published), sum(row.terms.values()) / demands[id].seconds(row.published)), xytext=place,
                   textcoords="offset points", fontsize=9, arrowprops={"arrowstyle": "-", "linewidth": 0.7})
plots.show(figure, f"{len(demands)} published runs, from microseconds to minutes. Left, predicted against published time: the predictions lie along the "
                   "diagonal, the data sheets' bounds below it. Right, their ratio: most are inside the band of a quarter.")

# %% [markdown]
# Seven decades. Beside simpler models, each judged in the same way:

# %%
aims_table(verdicts, published.simpler(runs, evidence))

# %% [markdown]
# **Is one cache read eight times?** A hypothesis: in 2023 the decode attention of TensorRT-LLM fetched a KV head once for *each* of its query
# heads. Nothing in its tables says so; let the arithmetic judge. Predict the long answers twice, with the cache read once for each KV head and
# once for each query head:

# %%
lines = []
for run in runs:
    if run.software.startswith("TensorRT-LLM") and (run.gen_len or 0) >= 1024 and run.category == "serving_throughput":
        mine = evidence.figures(run)
        once, each = (published.judge(variant, mine).ratio for variant in (run.changed(software="with shared reads (XQA)"), run))
        lines.append((run.model, run.hardware, run.n_heads / run.n_kv_heads, once, each))
groups = {"one query head to a KV head": [line for line in lines if line[2] == 1], "8 and more": [line for line in lines if line[2] > 1]}
Table(("predicted tokens/s as a multiple of the published", "rows", "read per KV head", "read per query head"),
      [(name, str(len(found)), *(f"{min(line[i] for line in found):.2f} to {max(line[i] for line in found):.2f}" for i in (3, 4)))
       for name, found in groups.items()], numeric=("rows", "read per KV head", "read per query head"))

# %%
once, each = ([line[i] for line in groups["8 and more"]] for i in (3, 4))
Markdown(f"For models whose heads share nothing the two predictions are the same, and close to what was published. For models with shared heads, one "
         f"read per KV head over-predicts throughput {min(once):.1f} to {max(once):.1f} times; one read per query head under-predicts it by "
         f"{1 - max(each):.0%} to {1 - min(each):.0%}.")

# %% [markdown]
# So the rows fit a kernel in which grouped-query attention saved memory and hardly any bandwidth; a little less than every read, as some
# of the repeated ones find the cache line on the chip. It stays a hypothesis: it was found by looking at these rows, all of one engine, and the
# models with shared heads in them are also the giants that run on several GPUs. NVIDIA's later kernel speaks for it: it shares the reads, and
# its own note gives 2.4 times the throughput.
#
# **Where the rows contradict each other**, no model can be right about both:

# %%
contradictions_table(published.contradictions(runs))

# %% [markdown]
# And what is missed most, and why:

# %%
row = {row.id: row for row in verdicts}
Markdown(f"""
* *A kernel that is wrong for its job.* A quantized matrix-vector kernel reads a whole prompt {row['r590'].ratio:.0f} times slower than
  arithmetic says (a course does so on purpose, before it writes the right one). Attention in eager PyTorch copies the cache for every query
  head and takes {1 / row['r262'].ratio:.0f} times as long as even those copies should. Data sheets know nothing of that.
* *Short prompts on fast machines.* {row['r089'].model} on an H100 took {row['r089'].published:.0f} ms for a prompt of 128 tokens in 2023, and
  we say {row['r089'].predicted:.1f}: what was left was software.
* *Two dies that act as one.* On Apple's M1 Ultra a token took {row['r466'].ratio:.2f} times as long as we predict: neither die finds all of
  the other's bandwidth.
""")

# %% [markdown]
# One figure more, for the eye. These are matrix products of Llama-2-7B, profiled by others. Where does the batch stop being free?

# %%
figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.6), sharey=True)
products = {"qkv": (4096, 12288), "o": (4096, 4096), "gate+up": (4096, 22016), "down": (11008, 4096)}
for panel, hardware in zip(panels, ("A100-80GB SXM", "A40-48GB"), strict=True):
    profiled = [run for run in runs if run.category == "gemm_profile" and run.model == "Llama-2-7B" and run.hardware == hardware]
    peak, bandwidth = 1e12 * profiled[0].peak_TFLOPs_per_device, 1e9 * profiled[0].peak_bw_GBps_per_device
    for colour, (name, (k, n)) in zip(plots.COLOURS, products.items(), strict=False):
        points = [(run.batch, 2 * run.batch * k * n / demands[run.id].seconds(run.value)) for run in profiled if run.notes.startswith(f"{name}:")]
        panel.loglog(*zip(*points, strict=True), "o", color=colour, markersize=5, label=f"{k:,} × {n:,}")
        rows = [2**i for i in range(13)]
        asked = published.Stack([published.demand(profiled[0].changed(notes=f"[{m},{k}]x[{k},{n}]")) for m in rows])
        seconds = asked.seconds(evidence.figures(profiled[0]))
        panel.loglog(rows, [2 * m * k * n / s for m, s in zip(rows, seconds, strict=True)], color=colour, linewidth=1)
    panel.plot([1, peak / bandwidth, 4096], [bandwidth, peak, peak], "--", color=plots.NAPKIN, linewidth=1.5)
    panel.text(1.2, peak * 1.1, f"ridge: {peak / bandwidth:.0f} rows", color="#6a6a6a", fontsize=9)
    panel.set(title=hardware, xlabel="rows M", ylim=(4e11, 8e14))
    panel.set_xticks([1, 16, 256, 4096], ["1", "16", "256", "4,096"])
    panel.xaxis.minorticks_off()
    plots.units(panel.yaxis, "FLOP/s")
panels[1].legend(loc="lower right", title="weights")
panels[0].set_ylabel("rate")
plots.show(figure, "Rate of four matrix products against their rows M, published as dots and predicted as lines, on an A100 and an A40: "
                   "both rise with M and bend into the peak well before the sharp ridge of the data sheet's dashed roof.")

# %% [markdown]
# Dots are published, lines are predicted from other machines, the dashed roof is the data sheet. The corner of the roof is sharp and the
# rows' is round: near the ridge neither computing nor fetching hides the other wholly, and a chip cut into tiles is never quite full. Plan
# with half the ridge, and you are not disappointed.

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
from clawdemy_infer.lesson import widgets

from IPython.display import display

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
plots.show(figure, "Llama-3-8B at a context of 2,048 on three GPUs. Left, tokens per second rise with the batch until memory ends. Right, the "
                   "intensity of a decode step flattens far below the ridge point of an H100.")

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

# %% [markdown]
# ### Exercise 5 · Which format had this cache?
#
# A published table serves GPT-J-6B on one H100 of 85.9 GB: 1,024 sequences of 128 tokens in and 128 out, all at once, with weights in fp8.
# It does not say in which format the KV cache was. Let the memory say it: give the bytes of a cached number, as a whole number. (GPT-J: L = 28,
# K = 16, H = 256.)

# %%
cached_numbers = 2 * 28 * 16 * 256 * 256 * 1024         # K and V, layers, heads, head dimension, tokens, sequences

# %% tags=["exercise", "exercise:bytes_of_a_cached_number"]
bytes_of_a_cached_number = ...

lesson.exercise("bytes_of_a_cached_number", bytes_of_a_cached_number, expected=1, rtol=0.01,
                means="capacity is arithmetic that a table cannot hide: at two bytes the cache alone would need 120 GB, so it was fp8.")

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# How many bytes are there for each of the cached numbers, once the weights (6 GB) are in? A number takes a whole number of them, and no more than
# there are.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# bytes_of_a_cached_number = int((85.9e9 - 6.05e9) / cached_numbers)
# ```
#
# </details>

# %% [markdown]
# ### Exercise 6 · One bandwidth or five?
#
# The GPTQ paper times OPT-175B in fp16, 349 GB of weights, on five A100s of 2,039 GB/s: 230 ms for a token. Do five cards read at five times
# the bandwidth of one? Give how many cards' bandwidth the 230 ms are worth.

# %% tags=["exercise", "exercise:bandwidths_at_work"]
bandwidths_at_work = ...

lesson.exercise("bandwidths_at_work", bandwidths_at_work, expected=349.2 / 2.039 / 230, rtol=0.03,
                means="less than one. The layers lie on five cards and run one after the other, so that one card reads at a time. "
                      "Pipelines make room; they do not make a single token faster.")

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# What would one card's bandwidth take for all of the bytes? Compare with 230 ms.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# bandwidths_at_work = 349.2e9 / 2039e9 / 0.230
# ```
#
# </details>

# %% [markdown]
# ### Exercise 7 · Is this run possible? (harder)
#
# Write the check that found the impossible rows: a decode step at batch 1 that streams so many bytes and keeps so many in memory,
# on so many devices that share the work evenly. Allow 2 % for rounding.

# %% tags=["exercise", "exercise:possible"]
def possible(streamed_bytes, kept_bytes, seconds, devices, bandwidth, memory):
    """Whether such a step can have taken `seconds`."""
    return ...


lesson.exercise("possible", possible,
                cases={(13.21e9, 13.48e9, 1 / 1084.86, 1, 2039e9, 85.9e9): False, (13.21e9, 13.48e9, 1 / 104.9, 1, 2039e9, 85.9e9): True,
                       (137.4e9, 138e9, 0.0418, 1, 3350e9, 85.9e9): False, (137.4e9, 138e9, 1 / 62.5, 8, 2039e9, 85.9e9): True,
                       (10e9, 10e9, 0.99, 1, 10e9, 80e9): True, (10e9, 10e9, 0.97, 1, 10e9, 80e9): False},
                nudge="Two questions: does it fit, and could the bytes be read in that time?",
                means="two lines of arithmetic are worth more than a benchmark's decimals.")

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `kept_bytes` against `devices * memory`; `streamed_bytes / devices / bandwidth` against `seconds`.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def possible(streamed_bytes, kept_bytes, seconds, devices, bandwidth, memory):
#     return kept_bytes <= 1.02 * devices * memory and streamed_bytes / devices / bandwidth <= 1.02 * seconds
# ```
#
# </details>
