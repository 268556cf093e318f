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
# Before you go on, write three numbers down. The same model with 8-bit weights guesses for the one with 32 bits. How many of ten drafted
# tokens will be accepted? How many times faster will the whole be? And with eight users at once?

# %% tags=["nbval-ignore-output"]
import shutil
from fractions import Fraction

from clawdemy_course import theory
from clawdemy_course.compare_drafts import (
    acceptances,
    compare_drafts,
    greedy_rounds,
    measure_costs,
    round_parts,
)
from clawdemy_course.prompts import texts_of
from clawdemy_infer.batching import Operations, Policy, StepCost, simulate
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.fast.launches import count_ops
from clawdemy_infer.files import load_model
from clawdemy_infer.from_config import catalog
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.parts import StepOf
from clawdemy_infer.lesson.tables import Table, si
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.machine.calibrated import only_products
from clawdemy_infer.model import Sampling
from clawdemy_infer.rigs.workload import uniform, workload
from clawdemy_infer.speculative import speculate, verify
from clawdemy_infer.variants.self_drafts import draft_named

import matplotlib.pyplot as plt
import numpy as np
import sympy
import torch
from IPython.display import Markdown

plots.use_style()
plt.rcParams["figure.dpi"] = 90
machine = this_machine(formats=("int8", "int4"))
lesson = Lesson("09 speculative_decoding", machine=machine)
model = load_model("smollm2-135m")
target = faster(model, "fp32")                          # its matrices as the kernels of this machine like them
drafts = {name: draft_named(name, model if name.startswith("int") else target) for name in ("lookup", "int8", "int4", "trained")}
lesson.card()

# %% [markdown]
# ## Envelope: why checking is cheaper than writing
# The letters: **γ** drafted tokens a round, **α** the chance that one of them is accepted (the acceptance rate), **c** the price of a draft step
# and **v** the price of a check,
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
# - if it is rejected, draw from the **residual**: max(0, p - q), made to sum to 1.

# %%
p = {"A": Fraction(7, 10), "B": Fraction(3, 10)}
q = {"A": Fraction(4, 10), "B": Fraction(6, 10)}

accepted = {x: q[x] * min(1, p[x] / q[x]) for x in p}                   # drawn, and kept
rejected = 1 - sum(accepted.values())                                   # drawn, and not
left = {x: max(0, p[x] - q[x]) for x in p}
residual = {x: left[x] / sum(left.values()) for x in p}
out = {x: accepted[x] + rejected * residual[x] for x in p}

assert out == p
assert rejected == sum(left.values())                                   # that is why dividing by it is just right
{x: f"{accepted[x]} accepted + {rejected} · {residual[x]} after a rejection = {out[x]}" for x in p}

# %% [markdown]
# ### Any number of tokens
# Nothing in it needed two. A token y is drafted and accepted with q(y)·min(1, p(y)/q(y)) = **min(p, q)**. After a rejection it comes with what the
# residual has,
# and the chance of a rejection cancels what the residual is divided by: **max(0, p - q)**. And
#
# $$\min(p, q) + \max(0, p - q) = p .$$
#
# If p is the smaller, that is p + 0; if q is, it is q + (p - q). The draft may be as bad as it likes: it costs time, never truth.
# The chance that a token is accepted is the sum of min(p, q), and that is α.
#
# A proof is good, and a program is another thing. Here `verify`, the function that the library decodes with, plays 40,000 rounds; beside it a
# version with a bug that is easily made: after a rejection it draws from p instead of the residual.

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
plots.show(fig, "Shares of six tokens, by target, draft, verified rounds and rounds without the residual. Verified: "
                "the target's distribution. Without the residual: a mixture of target and draft")

# %% [markdown]
# Greedy decoding is the limit: p and q are each certain of one token, and a drafted token is accepted if it is the target's own. So greedy output
# must be the *same
# tokens*, and below we check that it is.
#
# ### How many tokens a round brings
# One is certain: the target always adds a token of its own, a correction or, if all were accepted, a bonus. The i-th drafted token
# counts if it and all before it are accepted.

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
# First the price of the parts. Write your own guess over the dots if you like, as a number or as text with its unit: `1.2`, `"20 ms"`.

# %%
lesson.guess("a check of 5 tokens, in steps", ...)
lesson.guess("an int8 draft step, in steps", ...)
lesson.guess("an int4 draft step, in steps", ...)
lesson.guess("a trained draft step, in steps", ...)
lesson.guess("a plain step", ...)

# %% tags=["nbval-ignore-output"]
def ratio(more, less) -> dict:
    """One prediction over another. What both have in common cancels, and the wider of the two intervals is left."""
    value, off = more.seconds / less.seconds, 1 + max(more.spread, less.spread)
    return {"predicted": value, "interval": (value / off, value * off), "unit": "×"}


step = StepOf(target, "decode", context=64)
copy = {name: StepOf(drafts[name].model, "decode", context=64) for name in ("int8", "int4")}
trained = round_parts(target, {"trained": drafts["trained"]}, 64, ())["trained"]
plain_s, check_s = step.predict(machine), machine.time(check, step.ops)
draft_s = {name: each.predict(machine) for name, each in copy.items()}
draft_s["trained"] = machine.time(drafts["trained"].step_work(1, 64), count_ops(trained))
v_roofline = check_s.seconds / plain_s.seconds

c_napkin = {"lookup": 0.0, "int8": 1 / 4, "int4": (1 / 2 + 4 / 64) / 4, "trained": drafts["trained"].step_work(1, 64).bytes / plain.bytes}
steps = {"int8": "an int8 draft step, in steps", "int4": "an int4 draft step, in steps", "trained": "a trained draft step, in steps"}
lesson.predict("a check of 5 tokens, in steps", napkin=1.0, **ratio(check_s, plain_s))
for name, quantity in steps.items():
    lesson.predict(quantity, napkin=c_napkin[name], **ratio(draft_s[name], plain_s))
lesson.predict("a plain step", step.napkin(machine), plain_s, unit="s")
lesson.predict("a step of the int8 copy", copy["int8"].napkin(machine), draft_s["int8"], unit="s")
lesson.reveal()

# %% [markdown]
# These we time at once, each alone: a forward pass over 1, 2, 5 and 9 tokens, and a step of each draft. None of them is a round of speculation, so what we
# predict from them is still a prediction. Of two steps we also measure the parts, for later.

# %% tags=["nbval-ignore-output"]
costs = measure_costs(target, drafts, context=64, rows=(1, 2, 5, 9), repeats=7)
lesson.measure("a check of 5 tokens, in steps", costs.v(5))
for name, quantity in steps.items():
    lesson.measure(quantity, costs.c(name))
lesson.measure("a plain step", step.time(machine), parts=step.parts(machine))
lesson.measure("a step of the int8 copy", copy["int8"].time(machine), parts=copy["int8"].parts(machine))
Table(["part of a round", "by hand", "predicted", "measured"],
      [[quantity, *(f"{getattr(lesson.rows[quantity], column):.2f} ×" for column in ("napkin", "predicted", "measured"))]
       for quantity in ("a check of 5 tokens, in steps", *steps.values())], numeric=["by hand", "predicted", "measured"])

# %% [markdown]
# Then α. It is a property of the two models and the text, not of the clock, so it can be *counted* beforehand, and without a single round: a
# drafted token is looked at only where all
# before it were accepted, so behind a text that is the target's own. The target writes 16 texts of each kind, and at every token we ask each draft
# for the one that it would have drafted there.
# The kinds: texts that copy, code, prose, and answers in a chat.

# %% tags=["nbval-ignore-output"]
def average(chances) -> float:
    """α: over all places where the draft had something to say."""
    return float(np.nanmean([each for text in chances for each in text]))


def share_of(hits) -> str:
    """A share with its 95 % interval by Wilson's score, as if the places were independent of one another."""
    n, p, z = len(hits), float(np.mean([float(each) for each in hits])) if len(hits) else 0.0, 1.96
    if not n:
        return "–"
    centre, half = (p + z * z / 2 / n) / (1 + z * z / n), z * (p * (1 - p) / n + (z / 2 / n) ** 2) ** 0.5 / (1 + z * z / n)
    return f"{p:.2f} ({max(centre - half, 0):.2f} – {min(centre + half, 1):.2f})"


tokens, texts = 34, texts_of(target, 16)
prompts = {kind: each[0] for kind, each in texts.items() if kind != "chat"}
fast = faster(model, compile=True) if shutil.which("g++") else target            # each step one call of C++: only sooner done
counted_by = drafts if fast is target else {name: draft_named(name, fast) for name in drafts}
written, found = {}, {}
for kind, some in texts.items():
    written[kind], found[kind] = acceptances(fast, counted_by, some, tokens)

lines = []
for kind, name in [(kind, name) for kind in texts for name in drafts]:
    hits = [each for text in found[kind][name] for each in text if each == each]
    rounds = [each for text in found[kind][name] for each in greedy_rounds(text, 4)]
    lines.append([kind, name, str(len(hits)), share_of(hits), " ".join(f"{a:.2f}" for a in theory.acceptance_by_position(rounds)),
                  f"{sum(r.accepted + 1 for r in rounds) / len(rounds):.2f}"])
Table(["text", "draft", "drafted tokens", "α (95 % interval)", "α by position", "tokens a round, γ = 4"], lines,
      numeric=["drafted tokens", "α (95 % interval)", "tokens a round, γ = 4"])

# %% tags=["nbval-ignore-output"]
Markdown("Note the spread. " + " ".join(
    f"The {name} draft agrees with the target in **{average(found[best][name]):.0%}** of the places on {best} and in **{average(found[worst][name]):.0%}** on {worst}."
    for name in drafts for best, *_, worst in [sorted(texts, key=lambda kind: -average(found[kind][name]))])
    + " (A lookup drafts only where the last words came before.)")

# %% [markdown]
# (The target comes from a 4-bit file, Q4_1: lesson 07. A 4-bit copy of a model that was never rounded may agree with its target more or less often.)
#
# From α and the prices follows the speed-up. We shall time one text of three kinds, and know what was drafted and accepted in it. A guess?

# %%
lesson.guess("lookup on copying", ...)
lesson.guess("int8 on prose", ...)
lesson.guess("int4 on prose", ...)

# %% tags=["nbval-ignore-output"]
off = 1 + plain_s.spread                                # a round may cost as much more or less as a step may
for kind in prompts:
    for name in drafts:
        rounds = greedy_rounds(found[kind][name][0], 4)
        gain = theory.speedup_of(rounds, costs.c(name), costs.v)
        lesson.predict(f"{name} on {kind}", napkin=theory.speedup_of(rounds, c_napkin[name], lambda rows: 1.0), predicted=gain,
                       interval=(gain / off, gain * off), unit="×")
lesson.reveal(*(f"{name} on {kind}" for kind in prompts for name in drafts))

# %% [markdown]
# ## Measurement
# Plain and speculative decoding in turn, in one process, of the same target; prefills are left out of both. Target and drafts run layer by layer,
# as they are written down. Compiled into one loop nest the target decodes faster still; that comes below.

# %% tags=["nbval-ignore-output"]
rows_greedy = compare_drafts(target, drafts, prompts, costs, gamma=4, max_tokens=tokens, repeats=1)
assert all(row.identical for row in rows_greedy)                        # the same tokens, draft or no draft
for row in rows_greedy:
    lesson.measure(f"{row.draft} on {row.prompt}", row.measured)
Table(["text", "draft", "by hand", "predicted", "measured"],
      [[row.prompt, row.draft, *(f"{getattr(lesson.rows[f'{row.draft} on {row.prompt}'], column):.2f} ×" for column in ("napkin", "predicted", "measured"))]
       for row in rows_greedy], numeric=["by hand", "predicted", "measured"])

# %% [markdown]
# At temperature 1 the target draws, and so does the draft; a drafted token is accepted with the chance Σ min(p, q), so α is the mean of that, and
# no coin need be tossed to count it. Sampling from 49,152 tokens
# costs time for every drafted token, so we time c and v anew.

# %% tags=["nbval-ignore-output"]
warm = Sampling(temperature=1.0, seed=1)
_, drawn = acceptances(fast, counted_by, texts["chat"], tokens, warm)
warm_costs = measure_costs(target, drafts, 64, (1, 5), repeats=5, sampling=warm)
rows_warm = compare_drafts(target, drafts, {"chat, T = 1": texts["chat"][0]}, warm_costs, gamma=4, max_tokens=tokens, sampling=warm, repeats=1)


def mean_of(chances) -> str:
    """The mean of chances, and two standard errors of it."""
    said = [each for text in chances for each in text if each == each]
    return f"{np.mean(said):.2f} ± {2 * np.std(said) / len(said) ** 0.5:.2f}" if said else "–"


Table(["text", "draft", "α, greedy", "α, T = 1", "c", "predicted", "measured"],
      [[row.prompt, row.draft, mean_of(found["chat"][row.draft]), mean_of(drawn[row.draft]), f"{row.c:.2f}", f"{row.predicted:.2f} ×", f"{row.measured:.2f} ×"]
       for row in rows_warm], numeric=["α, greedy", "α, T = 1", "c", "predicted", "measured"])

# %% [markdown]
# How many tokens at a time? One curve takes the α of 16 texts and the prices of the parts. The rings take the rounds of the one text that is timed:
# between curve and ring lies that text's luck, between ring
# and dot the clock.

# %% tags=["nbval-ignore-output"]
name, kind, sizes = "int8", "prose", [1, 2, 4, 8]
plain_tpot = np.median([speculate(target, prompts[kind], drafts["lookup"], tokens, gamma=0).tpot_s for _ in range(2)])
measured = {size: plain_tpot / speculate(target, prompts[kind], drafts[name], tokens, gamma=size).tpot_s for size in sizes}
of_text = {size: theory.speedup_of(greedy_rounds(found[kind][name][0], size), costs.c(name), costs.v) for size in sizes}
alpha_of = average(found[kind][name])
xs = list(range(9))
fig, ax = plt.subplots(figsize=(6.6, 3.2))
ax.plot(xs, [theory.speedup(alpha_of, x, c_napkin[name]) for x in xs], "--", color=plots.COLOURS[5], label="by hand: c from bytes, v = 1")
ax.plot(xs, [theory.speedup(alpha_of, x, costs.c(name), costs.v(x + 1)) for x in xs], color=plots.COLOURS[0], label=f"from the prices, α = {alpha_of:.2f}")
ax.plot(list(of_text), list(of_text.values()), "o", color=plots.COLOURS[0], markerfacecolor="none", markersize=9, label="from the prices, this text's rounds")
ax.plot(list(measured), list(measured.values()), "o", color=plots.COLOURS[1], label="measured")
ax.axhline(1, color="black", linewidth=0.8)
ax.set(xlabel="γ, drafted tokens a round", ylabel="speed-up", ylim=(0, None), title=f"The {name} draft on {kind}: what each further token brings")
ax.legend()
plots.show(fig, f"Speed-up against γ, the {name} draft on {kind}, predicted from the prices and measured: "
                + "; ".join(f"γ = {size}: {of_text[size]:.2f} and {measured[size]:.2f}" for size in sizes))

# %% [markdown]
# ### Against the fastest plain decode
# A speed-up over a slow baseline proves little. So the same target once more, each step as one call of C++ (`fast/cpp/step.cpp`): a plain step streams its
# weights nearly as fast as memory gives them. By the roofline the processor has time meanwhile to multiply them by five rows as well as by one, and
# a draft with 8-bit weights
# reads a quarter of the bytes. Is it so? Lookup on the text that copies, and the 8-bit copy on prose:

# %% tags=["nbval-ignore-output"]
if fast is not target:
    fast_drafts = {name: counted_by[name] for name in ("lookup", "int8")}
    fast_costs = measure_costs(fast, fast_drafts, context=64, rows=(1, 5), repeats=7)
    fast_rows = [compare_drafts(fast, {name: fast_drafts[name]}, {kind: prompts[kind]}, fast_costs, gamma=4, max_tokens=tokens, repeats=2)[0]
                 for name, kind in (("lookup", "copying"), ("int8", "prose"))]
    assert all(row.identical for row in fast_rows)
    whole, by_roofline = StepOf(fast, "decode", context=64), only_products(machine)
    v_fast = by_roofline.time(check, whole.ops).seconds / whole.predict(machine).seconds
    c_fast = StepOf(fast_drafts["int8"].model, "decode", context=64).predict(machine).seconds / whole.predict(machine).seconds
    said = (f"Compiled in {fast.runner.compile_s:.0f} s. A plain token takes **{si(fast_rows[0].plain_s, 's')}** ({si(rows_greedy[0].plain_s, 's')} layer by layer), a "
            f"check of five rows **{fast_costs.v(5):.2f}** of a step (roofline: {v_fast:.2f}), a step of the 8-bit copy **{fast_costs.c('int8'):.2f}** "
            f"(roofline: {c_fast:.2f}; bytes alone: 0.25). "
            + " ".join(f"{row.draft} on {row.prompt}: from these prices {row.predicted:.2f} ×, measured **{row.measured:.2f} ×**." for row in fast_rows))
else:
    said = "There is no C++ compiler (g++) here, so the compiled target is left out."
Markdown(said)

# %% [markdown]
# ### Why not a tree?
# If the draft's first choice is rejected, its *second* might have been accepted. It costs no draft step, only a row more in the check. So check a
# tree: beside each of γ = 4
# drafted tokens its runner-up as a leaf, 9 rows in place of 5. If one of them is rejected, which happens with chance 1 - α⁴, a leaf saves the round
# one more token with chance p₂.
# We count both over the prose that the target wrote, by one pass of the draft over each text.

# %% tags=["nbval-ignore-output"]
wrong, second = [], []
for ids, prompt in zip(written["prose"], texts["prose"], strict=True):
    offers = drafts["int4"].model(torch.tensor([ids[:-1]]))[0, len(prompt):].topk(2, dim=-1).indices
    wants = torch.tensor(ids[len(prompt) + 1:])
    wrong.append(wants != offers[:, 0])
    second.append((wants == offers[:, 1])[wrong[-1]])
wrong, second = torch.cat(wrong).float(), torch.cat(second).float()
a, p2 = 1 - wrong.mean().item(), second.mean().item()
c4 = costs.c("int4")
chain = theory.expected_tokens(a, 4), 4 * c4 + costs.v(5)
tree = theory.expected_tokens(a, 4) + (1 - a**4) * p2, 4 * c4 + costs.v(9)
Table(["checked", "rows", "tokens a round", "costs, in plain steps", "speed-up"],
      [["chain", "5", f"{chain[0]:.2f}", f"{chain[1]:.2f}", f"{chain[0] / chain[1]:.2f} ×"],
       ["tree", "9", f"{tree[0]:.2f}", f"{tree[1]:.2f}", f"{tree[0] / tree[1]:.2f} ×"],
       ["tree, if rows were free", "9", f"{tree[0]:.2f}", f"{chain[1]:.2f}", f"{tree[0] / chain[1]:.2f} ×"]],
      numeric=["rows", "tokens a round", "costs, in plain steps", "speed-up"])

# %% tags=["nbval-ignore-output"]
Markdown(f"With α = {share_of(1 - wrong)} and p₂ = {share_of(second)}, each with its 95 % interval, the leaves "
         f"bring {tree[0] / chain[0] - 1:+.0%} tokens, and four rows more cost {tree[1] / chain[1] - 1:+.0%} time: "
         f"here the tree {'gains' if tree[0] / tree[1] > chain[0] / chain[1] else 'loses'}. "
         f"A GPU far below its ridge has the rows for nothing, and there trees pay (Miao et al. 2024, SpecInfer). This machine's ridge is at "
         f"{machine.ridge('fp32'):.0f}.")

# %% [markdown]
# ## Reconciliation: what a batch takes away, and other losses
# Eight sequences at once stream the weights once for eight rows: batching has already taken some of what speculation lives on. A check then reads
# 8·(γ + 1) rows, and a machine with a low ridge has to compute for them. How much is left?

# %% tags=["nbval-ignore-output"]
batch = 8
crowded = measure_costs(target, {"int8": drafts["int8"]}, context=64, rows=(1, 5), batch=batch, repeats=5)
row = compare_drafts(target, {"int8": drafts["int8"]}, {"prose": prompts["prose"]}, crowded, gamma=4, max_tokens=12, batch=batch, repeats=1)[0]
alone = next(each for each in rows_greedy if (each.draft, each.prompt) == ("int8", "prose"))
Table(["batch", "rows of a check", "v by the roofline", "v", "c", "predicted", "measured"],
      [["1", "5", f"{v_roofline:.2f}", f"{alone.v:.2f}", f"{alone.c:.2f}", f"{alone.predicted:.2f} ×", f"{alone.measured:.2f} ×"],
       [str(batch), str(5 * batch), f"{theory.verification_cost(machine, shape, 5, 64, batch, step.ops, **FP32):.2f}", f"{row.v:.2f}", f"{row.c:.2f}",
        f"{row.predicted:.2f} ×", f"{row.measured:.2f} ×"]], numeric=["batch", "rows of a check", "v by the roofline", "v", "c", "predicted", "measured"])

# %% [markdown]
# The simulator knows speculation as a policy: `Policy(gamma=4)`, with the α that we counted on prose and the cost of the draft. So the whole curve
# can be predicted, for this
# machine and for one that we do not have; the points are the two measurements above. Each curve takes α and cost from **one** draft. (For the H100
# the α is that of SmolLM2's own copy:
# what a copy of Llama 3 would have, we have not counted.)

# %% tags=["nbval-ignore-output"]
def simulated(shape, machine, weights: str, draft_weights: str, alpha: float, batches: list[int]) -> list[float]:
    """Speed-up of γ = 4 in a batch of each size: the same requests with and without a draft."""
    kept = {"kv": weights, "activations": weights, "operations": Operations(step=step.ops)}
    draft, found = StepCost(shape, machine, draft_weights, **kept), []
    for B in batches:
        requests = workload(uniform(64, 64), uniform(41, 41), requests=B)
        plain, guessed = (simulate(shape, machine, requests, Policy(max_batch=B, gamma=most), weights=weights, kv_bytes=4e10, alpha=alpha, draft=draft,
                                   memory=1e12, **kept).summary["tpot_p50"] for most in (0, 4))
        found.append(plain / guessed)
    return found


batches = [1, 2, 4, 8, 16, 32, 64, 128, 256]
rates = {name: average(found["prose"][name]) for name in ("int8", "int4")}
llama, h100 = catalog.model("llama-3-8b"), catalog.machine("h100-sxm")
curves = {f"this machine, SmolLM2-135M in fp32: int8 copy, α = {rates['int8']:.2f}": simulated(
    shape, machine, "fp32", "int8", rates["int8"], batches)}
curves |= {f"H100, Llama 3 8B in bf16: {name} copy, α = {rate:.2f}": simulated(llama, h100, "bf16", name, rate, batches)
           for name, rate in rates.items()}
fig, ax = plt.subplots(figsize=(6.6, 3.4))
for i, (label, curve) in enumerate(curves.items()):
    ax.plot(batches, curve, "-" if i == 0 else "--", color=plots.COLOURS[i], label=label)
ax.plot([1, batch], [alone.measured, row.measured], "o", color=plots.COLOURS[0], label="measured here")
ax.axhline(1, color="black", linewidth=0.8)
ax.set(xscale="log", xticks=batches, xticklabels=batches, xlabel="sequences in the batch", ylabel="speed-up", ylim=(0, 3.6),
       title="A batch takes the speed-up away")
ax.minorticks_off()
ax.legend(loc="upper right")
plots.show(fig, "Speed-up of 4 drafted tokens a round against the batch. " + " ".join(
    f"{label}: {curve[0]:.2f} at a batch of 1, {curve[-1]:.2f} at {batches[-1]}." for label, curve in curves.items()))

# %% [markdown]
# And a draft that loses on purpose: the target's own first ten layers, followed at once by its head. They have never been trained to name a word.

# %% tags=["nbval-ignore-output"]
early = {"exit:10": draft_named("exit:10", target)}
early_costs = measure_costs(target, early, context=64, rows=(1, 2, 5), repeats=5)
lost = compare_drafts(target, early, {"prose": prompts["prose"]}, early_costs, gamma=4, max_tokens=20, repeats=1)[0]
assert lost.identical
looked_at = [i < each.accepted for each in lost.rounds for i in range(min(each.accepted + 1, len(each.drafted)))]
Markdown(f"α = {share_of(looked_at)} of {len(looked_at)} tokens, c = {lost.c:.2f}: predicted {lost.predicted:.2f} ×, measured **{lost.measured:.2f} ×**. "
         f"The tokens are the same all the same. To break even with one drafted token a round, α would have to exceed c + v - 1 = "
         f"{lost.c + early_costs.v(2) - 1:.2f}.")

# %% [markdown]
# Back to the prices. The 8-bit copy reads a quarter of the bytes. What keeps its step from a quarter of the time? Name the cause that you take for
# the largest, of what lies between the napkin
# and the clock.

# %%
lesson.cause("a step of the int8 copy", ...)    # "products", "attention", "element-wise", "launches", "memory was slower than calibrated",
# "memory was faster than calibrated" or "not explained"

# %% tags=["nbval-ignore-output"]
lesson.explain("a step of the int8 copy")

# %% [markdown]
# The same for the target's own step, by which it is divided:

# %% tags=["nbval-ignore-output"]
lesson.explain("a plain step")

# %% tags=["nbval-ignore-output"]
lesson.table()

# %% [markdown]
# What each column leaves out:
#
# - **By hand.** The paper's formula takes c from bytes and v = 1. A low-bit step reads a quarter of the bytes, and has as many kernel launches as any
#   other; a check of five rows does five times the arithmetic. How much either costs here stands in the ledger.
# - **Predicted.** The prices were taken one by one, on a warm cache and the same context. Between them in a round come choosing, comparing, taking back
#   rejected tokens, and two models that use the processor's caches by turns. None of these was measured by itself: what lies between predicted and measured is
#   all of them, and chance on a text of few tokens.
#
# **When speculation loses:** a draft that agrees too seldom (early exit without training, lookup on new text at high temperature); a draft that
# costs too much; a γ too large
# for its α; a batch. The first three you can choose. The last is why servers speculate when they are idle and stop when they are busy.
#
# ## Play and exercises
# Round by round: what was drafted, what was accepted, what the target put in the place of the first that was rejected. α counts the tokens that
# were looked at: those up to the first rejection.

# %%
def draw_rounds(draft: str, text: str, gamma: int) -> None:
    """Each line is a round: green was accepted, orange rejected, grey not looked at, blue is the target's own token."""
    result = speculate(target, prompts[text], drafts[draft], 18, gamma=gamma)
    fig, ax = plt.subplots(figsize=(8.6, 0.5 + 0.3 * len(result.rounds)))
    for y, each in enumerate(result.rounds):
        colours = [*[2] * each.accepted, 1, *[5] * len(each.drafted)]
        cells = [(token, plots.COLOURS[colour]) for token, colour in zip(each.drafted, colours, strict=False)]
        cells.insert(each.accepted, (each.token, plots.COLOURS[0]))
        for x, (token, colour) in enumerate(cells):
            word = target.tokenizer.decode([token]).replace("\n", "⏎").replace("$", r"\$")
            ax.text(x, -y, word.strip(" ") or "␣", ha="center", va="center", fontsize=8, color="white", bbox={"color": colour, "pad": 2.5})
    accepted, drafted = (sum(each) for each in zip(*((r.accepted, len(r.drafted)) for r in result.rounds), strict=True))
    looked_at = sum(min(r.accepted + 1, len(r.drafted)) for r in result.rounds)
    title = (f"{draft} on {text}: {len(result.tokens)} tokens in {len(result.rounds)} rounds; of {drafted} drafted {looked_at} were looked at, "
             f"{accepted} accepted")
    ax.set(xlim=(-0.6, gamma + 0.6), ylim=(-len(result.rounds) + 0.4, 0.8), title=title)
    ax.axis("off")
    plots.show(fig, title)


# %% tags=["widget", "nbval-ignore-output"]
widgets.play(draw_rounds, draft=widgets.choose("draft", list(drafts), "int4"), text=widgets.choose("text", list(prompts), "prose"),
             gamma=widgets.powers_of_two("γ", 1, 8, 4))

# %% tags=["nbval-ignore-output"]
draw_rounds("int4", "prose", 4)

# %% [markdown]
# ### 1 · What is left after a rejection
# p and q are lists of probabilities. Return the distribution that a rejected token is replaced from.

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
# ### 2 · The chance that a drafted token is accepted
# The draft draws x from q, and x is accepted with probability min(1, p(x)/q(x)). What is α?

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
    nudge="Add over the tokens: how often it is drawn, times how often it is then accepted.",
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
    means="with free checks, a draft pays if α is above the price of its step.",
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
# A draft is allowed to stop when it is unsure. Two programs do it. The first draws x, and if q(x) is small it *keeps* x and drafts no more. The
# second, if q(x) is
# small, throws x *away* and drafts no more, so that the target draws in its place. Only one leaves the target's distribution as it is. With p = q =
# (0.9, 0.1) and
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
# **To take away.** Reading γ + 1 tokens streams the weights once, so while bytes are the limit, checking is nearly free. Accept with min(1, p/q),
# else draw from the residual:
# the text is the target's own, whatever the draft is. The gain is (1 - α^(γ+1)) / (1 - α) tokens for γ c + v, and it is c, a draft step as it
# really runs, and v, a
# check as it really runs, that decide. The fuller the batch, the less is left.
#
# Further reading: Leviathan, Kalman and Matias 2023 and Chen et al. 2023 (the rule); Saxena 2023 (prompt lookup); Elhoushi et al. 2024 (early exit, trained);
# Miao et al. 2024 (trees).
