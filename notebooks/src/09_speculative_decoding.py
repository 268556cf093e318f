# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 09 · Can guessing be exact, and when does it pay?
# ## Question
# A decode step at batch 1 streams all the weights through the processor to make *one* row of numbers. Lesson 01 counted it: the bytes
# are the price, the arithmetic is nearly free. So let something cheap **guess** the next few tokens, and let the large model **check**
# them all in a single step. What it agrees with is ours at the price of one.
#
# Two things should make you suspicious. A guess that is sampled is not what the large model would have sampled, so is the text still *its*
# text? And guessing takes time too. Leviathan, Kalman and Matias answered both in 2023: the first with a proof of four lines, the second with a formula.
#
# Before you go on, write three numbers down. The same model with 8-bit weights guesses for the one with 32 bits. How many of ten guesses will stand?
# How many times faster will the whole be? And with eight users at once?

# %% tags=["nbval-ignore-output"]
import shutil
from fractions import Fraction

import matplotlib.pyplot as plt
import numpy as np
import sympy
import torch
from IPython.display import Markdown

from clawdemy_infer.batching import Operations, Policy, StepCost, simulate
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.files import load_model
from clawdemy_infer.from_config import catalog
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.steps import step_ops
from clawdemy_infer.lesson.tables import Table, si
from clawdemy_infer.lesson.workload import uniform, workload
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.model import Sampling
from clawdemy_infer.rigs.compare_drafts import compare_drafts, measure_costs
from clawdemy_infer.rigs.prompts import prompts_of
from clawdemy_infer.speculative import speculate, theory, verify
from clawdemy_infer.variants.adaptive import Adaptive
from clawdemy_infer.variants.self_drafts import draft_named

plots.use_style()
plt.rcParams["figure.dpi"] = 90
machine = this_machine()
lesson = Lesson("09 speculative_decoding", machine=machine)
model = load_model("smollm2-135m")
target = faster(model, "fp32")                          # its matrices as the kernels of this machine like them
drafts = {name: draft_named(name, model if name.startswith("int") else target) for name in ("lookup", "int8", "int4", "trained")}
Markdown(f"This machine: **{machine.name}**. It reads {si(machine.bandwidth_at(), 'B/s')} from memory and computes at most "
         f"{si(machine.peak('fp32'), 'FLOP/s')} in fp32.")

# %% [markdown]
# ## Envelope: why checking is cheaper than writing
# The letters: **γ** drafted tokens a round, **α** the chance that one of them stands, **c** the price of a draft step and **v** the price of a check,
# both in plain steps of the target.
#
# A check reads the last token and the γ drafted ones, γ + 1 rows. We count what that asks for.

# %%
shape = catalog.model("smollm2-135m")
gamma, S = 4, 64
rows = gamma + 1
weights = shape.streamed_bytes("fp32")                                  # once, however many rows

flops = 0
flops += 2 * rows * shape.matrix_parameters()                           # every row meets every matrix of the layers
flops += 2 * rows * shape.D * shape.V                                   # and the head: each row must name its next token
flops += shape.L * 4 * shape.N * shape.H * sum(S - gamma + i for i in range(rows))     # each looks back at what is before it

FP32 = {"weights": "fp32", "kv": "fp32", "activations": "fp32"}
check = shape.step(1, rows, S, logits=rows, **FP32)
plain = shape.step(1, 1, S, **FP32)
assert flops == check.flops
f"{rows} rows for one: {check.flops / plain.flops:.2f} times the FLOPs, {check.bytes / plain.bytes:.3f} times the bytes"

# %% [markdown]
# Five times the arithmetic, and hardly a byte more. **As long as bytes are what a step waits for, a check costs what a step costs: v = 1.**
# That is the paper's assumption, and a roofline says where it ends.

# %% tags=["nbval-ignore-output"]
Markdown(f"A row brings half a FLOP for each byte of fp32 weights. This machine's ridge is at **{machine.ridge('fp32'):.1f} FLOPs per byte**, so by hand a check "
         f"is free up to about {2 * machine.ridge('fp32'):.0f} rows. An H100 has its ridge at {catalog.machine('h100-sxm').ridge('bf16'):.0f} (bf16, one FLOP a byte "
         "and row): hundreds of rows.")

# %% [markdown]
# ### Two tokens, by hand
# Now the exactness. Say there are two tokens, A and B. The target wants A with 7/10, the draft says A with 4/10. The rule:
#
# - draw x from the draft, and keep it with probability min(1, p(x) / q(x));
# - if it falls, draw from the **residual**: max(0, p - q), made to sum to 1.

# %%
p = {"A": Fraction(7, 10), "B": Fraction(3, 10)}
q = {"A": Fraction(4, 10), "B": Fraction(6, 10)}

stands = {x: q[x] * min(1, p[x] / q[x]) for x in p}                     # drawn, and kept
falls = 1 - sum(stands.values())                                        # drawn, and not
left = {x: max(0, p[x] - q[x]) for x in p}
residual = {x: left[x] / sum(left.values()) for x in p}
out = {x: stands[x] + falls * residual[x] for x in p}

assert out == p
assert falls == sum(left.values())                                      # that is why dividing by it is just right
{x: f"{stands[x]} by standing + {falls} · {residual[x]} after a fall = {out[x]}" for x in p}

# %% [markdown]
# ### Any number of tokens
# Nothing in it needed two. A token y comes out by standing with q(y)·min(1, p(y)/q(y)) = **min(p, q)**. After a fall it comes with what the residual has,
# and the chance of a fall cancels what the residual is divided by: **max(0, p - q)**. And
#
# $$\min(p, q) + \max(0, p - q) = p .$$
#
# If p is the smaller, that is p + 0; if q is, it is q + (p - q). The draft may be as bad as it likes: it costs time, never truth.
# The chance that a token stands is the sum of min(p, q), and that is α.
#
# A proof is good, and a program is another thing. Here `verify`, the function that the library decodes with, plays 40,000 rounds; beside it a
# version with a bug that is easily made: after a fall it draws from p instead of the residual.

# %%
generator = torch.Generator().manual_seed(9)
many, V = 40_000, 6
target_p, draft_q = torch.randn(2, V, generator=generator, dtype=torch.float64).softmax(-1)
guesses = torch.multinomial(draft_q, many, replacement=True, generator=generator)[:, None]
verdict = verify(target_p.expand(many, 2, V), draft_q.expand(many, 1, V), guesses, torch.ones(many, dtype=torch.int64), generator)
first = torch.where(verdict.accepted == 1, guesses[:, 0], verdict.token)
careless = torch.where(verdict.accepted == 1, guesses[:, 0], torch.multinomial(target_p, many, replacement=True, generator=generator))


def chance_of(tokens: torch.Tensor) -> float:
    """Pearson's chi-square: how likely counts at least this far from the target's are, if nothing is wrong."""
    expected = many * target_p
    distance = ((torch.bincount(tokens, minlength=V) - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((V - 1) / 2).double(), distance / 2))


alarm = 1e-4                                                            # how often we accept to accuse a correct program
assert chance_of(first) > alarm and chance_of(careless) < alarm**2
assert abs((verdict.accepted == 1).double().mean() - torch.minimum(target_p, draft_q).sum()) < 0.01
print("as verified: nothing to object to; with the residual dropped: certainly wrong")

# %%
fig, ax = plt.subplots(figsize=(7.2, 2.9))
for i, (label, share) in enumerate({"target p": target_p, "draft q": draft_q, "verified": torch.bincount(first, minlength=V) / many,
                                    "residual dropped": torch.bincount(careless, minlength=V) / many}.items()):
    ax.bar(np.arange(V) + 0.2 * i - 0.3, share, width=0.18, color=[plots.COLOURS[i] for i in (0, 5, 2, 1)][i], label=label)
ax.set(xlabel="token", ylabel="share", title="Verified: the target's distribution. Without the residual: a mixture")
ax.grid(axis="x", visible=False)
ax.legend()
plt.show()

# %% [markdown]
# Greedy decoding is the limit: p and q are each certain of one token, and a guess stands if it is the target's own. So greedy output must be the *same
# tokens*, and below we check that it is.
#
# ### How many tokens a round brings
# One is certain: the target always adds a token of its own, a correction or, if all stood, a bonus. The i-th guess counts if it and all before it stand.

# %%
alpha, g, i = sympy.Symbol("alpha", positive=True), sympy.Symbol("gamma", integer=True, positive=True), sympy.Symbol("i", integer=True)
closed = (1 - alpha ** (g + 1)) / (1 - alpha)
for size in (1, 2, 4, 7):
    assert sympy.simplify(sum(alpha**k for k in range(size + 1)) - closed.subs(g, size)) == 0
assert abs(theory.expected_tokens(0.8, 5) - closed.subs({alpha: sympy.Rational(4, 5), g: 5})) < 1e-12
f"α = 0.8: {theory.expected_tokens(0.8, 5):.2f} tokens with γ = 5, and never more than {1 / (1 - 0.8):.0f} whatever γ is"

# %% [markdown]
# A round costs γ draft steps and a check. So, in plain steps,
#
# $$\text{speed-up} = \frac{1 - \alpha^{\gamma+1}}{1-\alpha} \cdot \frac{1}{\gamma c + v} .$$
#
# ## Prediction
# Four drafts. **lookup** looks whether the last words came before, and copies what followed them there: c is nothing. **int8** and **int4** are the target
# itself with its weights rounded. By their bytes their steps should cost a quarter, and a seventh (four bits, and a scale and a zero of 16 bits for each
# 64 weights). **trained** is a single layer, trained on the target's own texts to go on from what the target's last layer left; thirty layers have become one.
#
# First the price of the parts. Write your own guess over the dots if you like.

# %% tags=["nbval-ignore-output"]
lesson.guess("a check of 5 tokens, in steps", ...)
lesson.guess("an int8 draft step, in steps", ...)
lesson.guess("an int4 draft step, in steps", ...)
lesson.guess("a trained draft step, in steps", ...)

ops = step_ops(target)
v_roofline = {rows: theory.verification_cost(machine, shape, rows, 64, ops=ops, **FP32) for rows in range(1, 10)}
c_napkin = {"lookup": 0.0, "int8": 1 / 4, "int4": (1 / 2 + 4 / 64) / 4, "trained": drafts["trained"].step_work(1, 64).bytes / plain.bytes}
steps = {"int8": "an int8 draft step, in steps", "int4": "an int4 draft step, in steps", "trained": "a trained draft step, in steps"}
lesson.predict("a check of 5 tokens, in steps", napkin=1.0, predicted=v_roofline[5], unit="×")
for name, step in steps.items():
    lesson.predict(step, napkin=c_napkin[name], unit="×")
lesson.table()

# %% [markdown]
# These we time at once, each alone: a forward pass over 1, 2, 5 and 9 tokens, and a step of each draft. None of them is a round of speculation, so what we
# predict from them is still a prediction.

# %% tags=["nbval-ignore-output"]
costs = measure_costs(target, drafts, context=64, rows=(1, 2, 5, 9), repeats=7)
lesson.measure("a check of 5 tokens, in steps", costs.v(5), "the library chooses a kernel by the number of rows; the calibration timed one kernel")
for name, step in steps.items():
    lesson.measure(step, costs.c(name), "bytes are not all: starting an operation costs the same in any format, and a draft must choose its token too")
lesson.table()

# %% [markdown]
# Then α. It is a property of the two models and the text, not of the clock, so it can be *counted* beforehand. Three kinds of text: one that copies, code, prose.

# %% tags=["nbval-ignore-output"]
prompts = prompts_of(target)
talk = {"chat, T = 1": prompts.pop("chat")}
tokens = 18
counted = {(kind, name): speculate(target, prompt, draft, tokens, gamma=4).rounds
           for kind, prompt in prompts.items() for name, draft in drafts.items()}
for (kind, name), rounds in counted.items():
    alpha_here = theory.acceptance_rate(rounds)
    guessed = alpha_here if alpha_here == alpha_here else 0.0           # NaN where nothing was drafted
    by_hand = theory.speedup_of(rounds, c_napkin[name], lambda rows: 1.0)
    lesson.predict(f"{name} on {kind}", napkin=by_hand, predicted=theory.speedup_of(rounds, costs.c(name), costs.v), unit="×")
Table(["text", "draft", "α", "α by position", "tokens a round"],
      [[kind, name, f"{theory.acceptance_rate(rounds):.2f}", " ".join(f"{a:.2f}" for a in theory.acceptance_by_position(rounds)),
        f"{sum(r.accepted + 1 for r in rounds) / len(rounds):.2f}"] for (kind, name), rounds in counted.items()], numeric=["α", "tokens a round"])

# %% [markdown]
# Note the spread. A copy of the model agrees with it nearly everywhere; a lookup is right where the text repeats itself and useless where it does not.
#
# ## Measurement
# Plain and speculative decoding in turn, in one process, of the same target; prefills are left out of both. Target and drafts run layer by layer,
# as they are written down. Compiled into one loop nest the target decodes faster still; that comes below.

# %% tags=["nbval-ignore-output"]
rows_greedy = compare_drafts(target, drafts, prompts, costs, gamma=4, max_tokens=tokens, repeats=1)
assert all(row.identical for row in rows_greedy)                        # the same tokens, draft or no draft
for row in rows_greedy:
    lesson.measure(f"{row.draft} on {row.prompt}", row.measured, "verification's own arithmetic and the loop around it, which no part has")
Table(["text", "draft", "α", "by hand", "predicted", "measured"],
      [[row.prompt, row.draft, f"{row.alpha:.2f}", f"{lesson.rows[f'{row.draft} on {row.prompt}'].napkin:.2f} ×", f"{row.predicted:.2f} ×",
        f"{row.measured:.2f} ×"] for row in rows_greedy], numeric=["α", "by hand", "predicted", "measured"])

# %% [markdown]
# At temperature 1 the target is less predictable, even to its own copy: α is lower, and each round ends earlier. Drawing and weighing 49,152 chances
# takes time too, for each drafted token, so the prices are taken anew.

# %% tags=["nbval-ignore-output"]
warm = Sampling(temperature=1.0, seed=1)
rows_warm = compare_drafts(target, drafts, talk, measure_costs(target, drafts, 64, (1, 5), repeats=5, sampling=warm), gamma=4, max_tokens=tokens,
                    sampling=warm, repeats=1)
Table(["text", "draft", "α", "predicted", "measured"],
      [[row.prompt, row.draft, f"{row.alpha:.2f}", f"{row.predicted:.2f} ×", f"{row.measured:.2f} ×"] for row in rows_warm],
      numeric=["α", "predicted", "measured"])

# %% [markdown]
# How many guesses at a time? The curve comes from the α of the rounds above and the prices of the parts; the points from the clock.

# %% tags=["nbval-ignore-output"]
name, kind, sizes = "int8", "prose", [1, 2, 4]
plain_s = np.median([speculate(target, prompts[kind], drafts["lookup"], tokens, gamma=0).tpot_s for _ in range(2)])
measured = {size: plain_s / speculate(target, prompts[kind], drafts[name], tokens, gamma=size).tpot_s for size in sizes}
alpha_of = theory.acceptance_rate(counted[kind, name])
xs = list(range(9))
fig, ax = plt.subplots(figsize=(6.6, 3.2))
ax.plot(xs, [theory.speedup(alpha_of, x, c_napkin[name]) for x in xs], "--", color=plots.COLOURS[5], label="by hand: c from bytes, v = 1")
ax.plot(xs, [theory.speedup(alpha_of, x, costs.c(name), costs.v(x + 1)) for x in xs], color=plots.COLOURS[0], label="from the prices of the parts")
ax.plot(list(measured), list(measured.values()), "o", color=plots.COLOURS[1], label="measured")
ax.axhline(1, color="black", linewidth=0.8)
ax.set(xlabel="γ, drafted tokens a round", ylabel="speed-up", ylim=(0, None), title=f"The {name} draft on {kind}: more guesses pay, until they do not")
ax.legend()
plt.show()

# %% [markdown]
# ### Against the fastest plain decode
# A speed-up over a slow baseline proves little. So the same target once more, each step as one call of C++ (`fast/cpp/step.cpp`): a plain step streams its
# weights nearly as fast as memory gives them. And while memory brings the next weights, the processor has time to multiply the last ones by five rows
# as well as by one. So here a check is what the roofline says it is, and so is a draft: one with 8-bit weights reads a quarter of the bytes. Lookup
# on the text that copies, and the 8-bit copy on prose:

# %% tags=["nbval-ignore-output"]
if shutil.which("g++"):
    fast = faster(model, compile=True)
    fast_drafts = {"lookup": drafts["lookup"], "int8": draft_named("int8", fast)}
    fast_costs = measure_costs(fast, fast_drafts, context=64, rows=(1, 5), repeats=7)
    fast_rows = [compare_drafts(fast, {name: fast_drafts[name]}, {kind: prompts[kind]}, fast_costs, gamma=4, max_tokens=30, repeats=2)[0]
                 for name, kind in (("lookup", "copying"), ("int8", "prose"))]
    assert all(row.identical for row in fast_rows)
    said = (f"Compiled in {fast.runner.compile_s:.0f} s. A plain token takes **{si(fast_rows[0].plain_s, 's')}** ({si(rows_greedy[0].plain_s, 's')} layer by layer), a "
            f"check of five rows {fast_costs.v(5):.2f} of a step, a step of the 8-bit copy {fast_costs.c('int8'):.2f}. "
            + " ".join(f"{row.draft} on {row.prompt}: from these prices {row.predicted:.2f} ×, measured **{row.measured:.2f} ×**." for row in fast_rows))
else:
    said = "There is no C++ compiler (g++) here, so the compiled target is left out."
Markdown(said)

# %% [markdown]
# `clawdemy-infer bench --drafts --compile` has all drafts on all texts.
#
# ### Let the text choose γ
# A γ that is right for copying is wrong for prose. But after a few rounds we *know* how guesses fare at each position, and the formula says how many pay: α by
# position, counted with a memory that fades; c and v as timed. `Adaptive` does that around any draft. The choice looks only at what is already written, so
# the output stays exact.

# %% tags=["nbval-ignore-output"]
choosing = {"int4, γ = 4": (drafts["int4"], 4), "int4, γ = 8": (drafts["int4"], 8),
            "int4, adaptive": (Adaptive(drafts["int4"], costs.c("int4"), costs.v), 8)}
paid = []
for text in ("copying", "prose"):
    plain_s = speculate(target, prompts[text], drafts["lookup"], tokens, gamma=0).tpot_s
    for label, (draft, most) in choosing.items():
        done = speculate(target, prompts[text], draft, tokens, gamma=most)
        paid.append([text, label, f"{sum(len(r.drafted) for r in done.rounds) / len(done.rounds):.1f}", f"{theory.acceptance_rate(done.rounds):.2f}",
                     f"{plain_s / done.tpot_s:.2f} ×"])
Table(["text", "draft", "guesses a round", "α", "speed-up"], paid, numeric=["guesses a round", "α", "speed-up"])

# %% [markdown]
# Where the best γ is flat, as the curve above is near its top, choosing it well gains little, and on a text as short as these the counts have hardly begun to
# say anything. Adaptive γ is an insurance: where a draft does not pay at all, it stops asking.
#
# ### Why not a tree?
# If the first choice falls, the draft's *second* might have stood. It costs no draft step, only a row more in the check. So check a tree: beside each of γ = 4
# guesses its runner-up as a leaf, 9 rows in place of 5. If a guess falls, which happens with chance 1 - α⁴, a leaf saves the round one more token with chance p₂.
# We count p₂ over one text, by one pass of each model.

# %% tags=["nbval-ignore-output"]
text = torch.tensor([prompts["prose"] + speculate(target, prompts["prose"], drafts["int8"], 60).tokens])
wants, offers = target(text)[0].argmax(-1), drafts["int4"].model(text)[0].topk(2, dim=-1).indices
fell = wants != offers[:, 0]
a, p2 = 1 - fell.float().mean().item(), (wants == offers[:, 1])[fell].float().mean().item()
c4 = costs.c("int4")
chain = theory.expected_tokens(a, 4), 4 * c4 + costs.v(5)
tree = theory.expected_tokens(a, 4) + (1 - a**4) * p2, 4 * c4 + costs.v(9)
Table(["checked", "rows", "tokens a round", "costs, in plain steps", "speed-up"],
      [["chain", "5", f"{chain[0]:.2f}", f"{chain[1]:.2f}", f"{chain[0] / chain[1]:.2f} ×"],
       ["tree", "9", f"{tree[0]:.2f}", f"{tree[1]:.2f}", f"{tree[0] / tree[1]:.2f} ×"],
       ["tree, if rows were free", "9", f"{tree[0]:.2f}", f"{chain[1]:.2f}", f"{tree[0] / chain[1]:.2f} ×"]],
      numeric=["rows", "tokens a round", "costs, in plain steps", "speed-up"])

# %% tags=["nbval-ignore-output"]
Markdown(f"With α = {a:.2f} and p₂ = {p2:.2f} the leaves bring {tree[0] / chain[0] - 1:+.0%} tokens, and four rows more cost {tree[1] / chain[1] - 1:+.0%} time: "
         f"here the tree {'gains' if tree[0] / tree[1] > chain[0] / chain[1] else 'loses'}. "
         f"A GPU far below its ridge has the rows for nothing, and there trees pay (Miao et al. 2024, SpecInfer). This machine's ridge is at "
         f"{machine.ridge('fp32'):.0f}.")

# %% [markdown]
# ## Reconciliation: what a batch takes away, and other losses
# Eight sequences at once stream the weights once for eight rows: batching has already taken some of the gift that speculation lives on. A check then reads
# 8·(γ + 1) rows, and a machine with a low ridge has to compute for them. How much is left?

# %% tags=["nbval-ignore-output"]
batch = 8
crowded = measure_costs(target, {"int8": drafts["int8"]}, context=64, rows=(1, 5), batch=batch, repeats=5)
row = compare_drafts(target, {"int8": drafts["int8"]}, {"prose": prompts["prose"]}, crowded, gamma=4, max_tokens=12, batch=batch, repeats=1)[0]
alone = next(each for each in rows_greedy if (each.draft, each.prompt) == ("int8", "prose"))
Table(["batch", "rows of a check", "v by the roofline", "v", "c", "predicted", "measured"],
      [["1", "5", f"{v_roofline[5]:.2f}", f"{alone.v:.2f}", f"{alone.c:.2f}", f"{alone.predicted:.2f} ×", f"{alone.measured:.2f} ×"],
       [str(batch), str(5 * batch), f"{theory.verification_cost(machine, shape, 5, 64, batch, ops, **FP32):.2f}", f"{row.v:.2f}", f"{row.c:.2f}",
        f"{row.predicted:.2f} ×", f"{row.measured:.2f} ×"]], numeric=["batch", "rows of a check", "v by the roofline", "v", "c", "predicted", "measured"])

# %% [markdown]
# The simulator knows speculation as a policy: `Policy(gamma=4)`, with the α that we counted and the cost of the draft. So the whole curve can be predicted, for this
# machine and for one that we do not have; the points are the two measurements above.

# %% tags=["nbval-ignore-output"]
def simulated(shape, machine, weights: str, draft_weights: str, alpha: float, batches: list[int]) -> list[float]:
    """Speed-up of γ = 4 in a batch of each size: the same requests with and without a draft."""
    kept = {"kv": weights, "activations": weights, "operations": Operations(step=ops)}
    draft, found = StepCost(shape, machine, draft_weights, **kept), []
    for B in batches:
        requests = workload(uniform(64, 64), uniform(41, 41), requests=B)
        plain, guessed = (simulate(shape, machine, requests, Policy(max_batch=B, gamma=most), weights=weights, kv_bytes=4e10, alpha=alpha, draft=draft,
                                   memory=1e12, **kept).summary["tpot_p50"] for most in (0, 4))
        found.append(plain / guessed)
    return found


batches, alpha_prose = [1, 2, 4, 8, 16, 32, 64, 128, 256], theory.acceptance_rate(counted["prose", "int8"])
fig, ax = plt.subplots(figsize=(6.6, 3.2))
for i, (label, curve) in enumerate({
    "this machine, SmolLM2-135M in fp32": simulated(shape, machine, "fp32", "int8", alpha_prose, batches),
    "H100, Llama 3 8B in bf16": simulated(catalog.model("llama-3-8b"), catalog.machine("h100-sxm"), "bf16", "int4", alpha_prose, batches),
}.items()):
    ax.plot(batches, curve, color=plots.COLOURS[i], label=label)
ax.plot([1, batch], [alone.measured, row.measured], "o", color=plots.COLOURS[0], label="measured here")
ax.axhline(1, color="black", linewidth=0.8)
ax.set(xscale="log", xticks=batches, xticklabels=batches, xlabel="sequences in the batch", ylabel="speed-up", ylim=(0, 3.6),
       title="A batch kills speculation, sooner where the ridge is low")
ax.minorticks_off()
ax.legend(loc="upper right")
plt.show()

# %% [markdown]
# And a draft that loses on purpose: the target's own first ten layers, followed at once by its head. They have never been trained to name a word.

# %% tags=["nbval-ignore-output"]
early = {"exit:10": draft_named("exit:10", target)}
early_costs = measure_costs(target, early, context=64, rows=(1, 5), repeats=5)
lost = compare_drafts(target, early, {"prose": prompts["prose"]}, early_costs, gamma=4, max_tokens=20, repeats=1)[0]
assert lost.identical
Markdown(f"α = {lost.alpha:.2f}, c = {lost.c:.2f}: predicted {lost.predicted:.2f} ×, measured **{lost.measured:.2f} ×**. "
         f"The tokens are the same all the same. To break even with one guess a round, α would have to exceed c + v - 1 = "
         f"{lost.c + early_costs.v(2) - 1:.2f}.")

# %% tags=["nbval-ignore-output"]
lesson.table()

# %% [markdown]
# What the residuals are made of:
#
# - **By hand to predicted.** The paper's formula takes c from bytes and v = 1. A low-bit step reads a quarter of the bytes, and starts as many operations as any
#   other. A check of five rows does five times the arithmetic, and how near to free that is depends on the kernel.
# - **Predicted to measured.** The prices were taken one by one, on a warm cache and the same context. Between them in a round come choosing, comparing, taking back
#   rejected tokens, and two models that push each other's weights out of the processor's caches. On few tokens chance has its say too.
#
# **When speculation loses:** a draft that agrees too seldom (early exit without training, lookup on new text at high temperature); a draft too dear; a γ too large
# for its α; a batch. The first three you can choose. The last is why servers speculate when they are idle and stop when they are busy.
#
# ## Play and exercises
# Round by round: what was guessed, what stood, what the target put in the place of the first that fell.

# %%
def draw_rounds(draft: str, text: str, gamma: int) -> None:
    """Each line is a round: green stood, orange fell, blue is the target's own token."""
    result = speculate(target, prompts[text], drafts[draft], tokens, gamma=gamma)
    fig, ax = plt.subplots(figsize=(8.6, 0.5 + 0.3 * len(result.rounds)))
    for y, each in enumerate(result.rounds):
        cells = [(token, plots.COLOURS[2 if place < each.accepted else 1]) for place, token in enumerate(each.drafted)]
        cells.insert(each.accepted, (each.token, plots.COLOURS[0]))
        for x, (token, colour) in enumerate(cells):
            word = target.tokenizer.decode([token]).replace("\n", "⏎").replace("$", r"\$")
            ax.text(x, -y, word.strip(" ") or "␣", ha="center", va="center", fontsize=8, color="white", bbox={"color": colour, "pad": 2.5})
    share = sum(each.accepted for each in result.rounds) / max(1, sum(len(each.drafted) for each in result.rounds))
    ax.set(xlim=(-0.6, gamma + 0.6), ylim=(-len(result.rounds) + 0.4, 0.8),
           title=f"{draft} on {text}: {tokens} tokens in {len(result.rounds)} rounds, {share:.0%} of the guesses used")
    ax.axis("off")
    plt.show()


# %% tags=["widget", "nbval-ignore-output"]
widgets.play(draw_rounds, draft=widgets.choose("draft", list(drafts), "int4"), text=widgets.choose("text", list(prompts), "prose"),
             gamma=widgets.powers_of_two("γ", 1, 8, 4))

# %% tags=["nbval-ignore-output"]
draw_rounds("int4", "prose", 4)

# %% [markdown]
# ### 1 · What is left after a fall
# p and q are lists of probabilities. Return the distribution that a fallen token is replaced from.

# %% tags=["exercise", "exercise:residual_of"]
def residual_of(p, q):
    return ...


lesson.exercise(
    "residual_of", residual_of,
    cases={
        ((0.7, 0.3), (0.4, 0.6)): [1.0, 0.0],
        ((0.5, 0.3, 0.2), (0.2, 0.2, 0.6)): [0.75, 0.25, 0.0],
        ((0.25, 0.25, 0.5), (0.0, 0.0, 1.0)): [0.5, 0.5, 0.0],      # a draft that was certain: p without its token
    },
    nudge="What the target wants beyond what the draft already gives; then make it sum to 1.",
    means="with a draft that says nothing, q = 0, it is p itself: that is the bonus token.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# max(0, p - q) token by token, divided by its sum.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def residual_of(p, q):
#     left = [max(0.0, a - b) for a, b in zip(p, q)]
#     return [x / sum(left) for x in left]
# ```
#
# </details>

# %% [markdown]
# ### 2 · The chance that a guess stands
# The draft draws x from q, and x stands with probability min(1, p(x)/q(x)). What is α?

# %% tags=["exercise", "exercise:alpha_from"]
def alpha_from(p, q):
    return ...


lesson.exercise(
    "alpha_from", alpha_from,
    cases={
        ((0.7, 0.3), (0.4, 0.6)): 0.7,
        ((0.5, 0.5), (0.5, 0.5)): 1.0,
        ((1.0, 0.0), (0.0, 1.0)): 0.0,
        ((0.5, 0.3, 0.2), (0.2, 0.2, 0.6)): 0.6,
    },
    nudge="Add over the tokens: how often it is drawn, times how often it then stands.",
    means="it is what the two distributions have in common, and symmetric in them.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# q·min(1, p/q) = min(p, q).
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def alpha_from(p, q):
#     return sum(min(a, b) for a, b in zip(p, q))
# ```
#
# </details>

# %% [markdown]
# ### 3 · How good must a draft be?
# One guess a round, a draft step at c, a check of two tokens at v. From which α on is that faster than not guessing?

# %% tags=["exercise", "exercise:break_even"]
def break_even(c, v):
    return ...


lesson.exercise(
    "break_even", break_even,
    cases={(0.25, 1.0): 0.25, (0.4, 1.2): 0.6, (0.0, 1.5): 0.5, (0.55, 1.55): 1.1},      # the last: never
    nudge="A round brings 1 + α tokens and costs c + v.",
    means="with free checks, a draft pays if it is right more often than it is dear.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Set (1 + α) / (c + v) = 1.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def break_even(c, v):
#     return c + v - 1
# ```
#
# </details>

# %% [markdown]
# ### 4 · Harder: stopping early, and staying exact
# A draft is allowed to stop when it is unsure. Two programs do it. The first draws x, and if q(x) is small it *keeps* x and drafts no more. The second, if q(x) is
# small, throws x *away* and drafts no more, so that the target draws in its place. Only one leaves the target's distribution as it is. With p = q = (0.9, 0.1) and
# "small" meaning below 0.5, how often does the second program put out the second token?

# %% tags=["exercise", "exercise:thrown_away"]
thrown_away = ...

lesson.exercise(
    "thrown_away", thrown_away, expected=0.01,
    nudge="It takes two unlikely events one after the other.",
    means="ten times too seldom. Whether x is drafted may depend on what was before it, never on x.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The draft says the second token with chance 0.1, and it is thrown away. Only then does the target draw.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# thrown_away = 0.1 * 0.1
# ```
#
# </details>

# %% [markdown]
# **To take away.** Reading γ + 1 tokens streams the weights once, so while bytes are the limit, checking is nearly free. Accept with min(1, p/q), else draw from the residual:
# the text is the target's own, whatever the draft is. The gain is (1 - α^(γ+1)) / (1 - α) tokens for γ c + v, and it is c, a draft step as it really runs, and v, a
# check as it really runs, that decide. The fuller the batch, the less is left.
#
# Further reading: Leviathan, Kalman and Matias 2023 and Chen et al. 2023 (the rule); Saxena 2023 (prompt lookup); Elhoushi et al. 2024 (early exit, trained);
# Miao et al. 2024 (trees).
