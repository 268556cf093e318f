# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 08 · How do four bits keep the quality?
# ## Question
# Lesson 07 rounded every weight to the nearest number of its grid, and at four bits that cost a good part of the model. The grid is not to blame alone: *nearest* is the wrong question. Nobody reads the weights. What is
# read is the output, and errors of several weights may add up there, or cancel.
#
# Two answers that production engines load today:
#
# - **GPTQ** (Frantar et al. 2022) rounds one column at a time and lets the columns still to come make up for it.
# - **AWQ** (Lin et al. 2023) gives the weights that meet large activations a finer grid, and hides the price in the norm before.
#
# Both look at a few thousand tokens of text, and train nothing. Guess before you go on: can the weights end up *further* from the originals, and the model closer?

# %% tags=["nbval-ignore-output"]
import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from textwrap import fill

from clawdemy_course.quality_by_part import kl_by_layer, output_errors
from clawdemy_infer.arithmetic.work import matmul, total
from clawdemy_infer.fast.launches import count_ops
from clawdemy_infer.fast.quantized import with_modules
from clawdemy_infer.files import load_model
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.tables import Table
from clawdemy_infer.machine.calibrate import this_machine
from clawdemy_infer.machine.present import bracketed
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.quantization import (
    Quantized,
    QuantizedModel,
    awq,
    format_named,
    gptq,
    linears,
    observe,
    round_to_nearest,
)
from clawdemy_infer.quantization.awq import RATIOS
from clawdemy_infer.quantization.gptq import gptq_matrix, hessian_of, inverse_factor, output_error
from clawdemy_infer.rigs.checkpoint import load_quantized, save_quantized
from clawdemy_infer.rigs.quality import Reference
from clawdemy_infer.rigs.quantization_table import quantization_table, shipped_table
from clawdemy_infer.rigs.text import calibration_tokens, evaluation_tokens
from clawdemy_infer.timing import stopwatch

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown

plots.use_style()
plt.rcParams["figure.dpi"] = 90
machine = this_machine("cpu")
lesson = Lesson("08 gptq_awq", machine=machine)
decoder = load_model("smollm2-135m")
shape = decoder.config.shape
lesson.card()

# %% [markdown]
# ## Envelope: one column, by hand
# A row of weights $w$ meets inputs $X$ of shape [M, I]. Rounded to $q$, the output is off by
#
# $$|X (w - q)|^2 = (w - q)\, H\, (w - q)^\top, \qquad H = X^\top X$$
#
# Two weights on a grid of whole numbers, two inputs that tend to move together:

# %%
H = np.array([[2.0, 1.0], [1.0, 2.0]])
w = np.array([1.4, 0.4])


def off(q):
    return (w - q) @ H @ (w - q)


nearest = np.round(w)
first = np.round(w[0])                                      # round the first weight: it is off by 0.4
moved = w[1] + (w[0] - first) * H[0, 1] / H[1, 1]           # where the second does best to go: 0.4 + 0.4 · 1/2
inverse = np.linalg.inv(H)
assert np.isclose(moved, w[1] - (w[0] - first) / inverse[0, 0] * inverse[0, 1])       # equation 2 of the paper says the same
together = np.array([first, np.round(moved)])
Table(["", "q", "weights off by", "output off by"],
      [["nearest", str(nearest.tolist()), f"{((w - nearest) ** 2).sum():.2f}", f"{off(nearest):.2f}"],
       [f"second moved to {moved:.1f} first", str(together.tolist()), f"{((w - together) ** 2).sum():.2f}", f"{off(together):.2f}"]],
      numeric=["weights off by", "output off by"])

# %% [markdown]
# The second weight goes to 1, though 0 is nearer: the first lost 0.4, and the second gives 0.6 back.
#
# With I columns the same step is taken I times. After column j is rounded, all later ones move by $-\,e \cdot [H^{-1}]_{j,:} / [H^{-1}]_{jj}$, and column j leaves the inverse. Here is the whole of GPTQ, without its tricks:

# %%
def gptq_by_the_formula(W, H, grid):
    """W [O, I]; `grid(j, w)` rounds column j."""
    W, inverse, Q = W.double().clone(), torch.linalg.inv(H.double()), torch.empty_like(W, dtype=torch.float64)
    for j in range(W.shape[1]):
        Q[:, j] = grid(j, W[:, j])
        error = (W[:, j] - Q[:, j]) / inverse[j, j]
        W -= torch.outer(error, inverse[j])                                             # the columns to come make up for it
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]               # and column j is done
    return Q


random = torch.Generator().manual_seed(0)
X = torch.randn(256, 32, generator=random) @ torch.randn(32, 32, generator=random)
W = torch.randn(8, 32, generator=random)
int4 = format_named("int4")
scale = int4.fit(W).scale.squeeze(1).double()
by_formula = gptq_by_the_formula(W, hessian_of(X), lambda j, w: (w / scale).round().clamp(-8, 7) * scale)
ours = gptq_matrix(W, hessian_of(X), int4, act_order=False, damping=0, search=False).dequantize()
assert torch.allclose(by_formula.float(), ours, atol=1e-5)
Markdown(f"Output error: nearest {output_error(W, Quantized.of(int4, W).dequantize(), hessian_of(X)):.2%}, GPTQ {output_error(W, ours, hessian_of(X)):.2%}.")

# %% [markdown]
# The library's loop does the same with tricks: the Cholesky factor of $H^{-1}$ holds all those inverses at once; the rest hears of a block of columns in one product; columns with large inputs go first
# (**act-order**), while there are many left to make up for them; and a little is added to H's diagonal (**damping**), because some thousand tokens may not fill I directions.
#
# **What does it cost?** The model runs once over M tokens. In front of each matrix [O, I] the products of its inputs with each other, H. Then the loop: every column moves all later ones.

# %%
M, by_matrix = 1024, {}
for name, linear in list(linears(decoder).items())[:4]:
    O, I = linear.weight.shape
    flops = 2 * M * O * I                           # the model itself: x Wᵀ
    flops += 2 * M * I * I                          # H = Xᵀ X
    flops += 2 * O * I * I / 2                      # the loop: each of I columns moves (I - j) others, of O rows
    flops += I**3 / 3 + I**3 / 3                    # Cholesky, and the inverse of the factor
    assert np.isclose(flops, 2 * M * I * (O + I) + O * I**2 + 2 * I**3 / 3)
    by_matrix[name] = flops
Table(["matrix", "FLOPs", "of which H"], [[name, f"{flops / 1e9:.2f} G", f"{2 * M * linears(decoder)[name].weight.shape[1] ** 2 / flops:.0%}"]
                                         for name, flops in by_matrix.items()], numeric=["FLOPs", "of which H"])

# %% [markdown]
# ### AWQ's identity
# A column k of W meets $x_k$. Multiply the one by s and divide the other:
#
# $$W x = (W \operatorname{diag}(s))\,(\operatorname{diag}(s)^{-1} x)$$
#
# Nothing has changed, until W is rounded. The scaled column sits on a grid that has hardly grown, and so loses s times less, where the activations are largest. The division is free: $1/s$ goes into the weights of the norm in front
# (or into the rows of `up` before `down`, of V before `out`). How large s? $s = \overline{|x|}^{\,a}$, and $a$ is searched. In this model, one layer:

# %% tags=["nbval-ignore-output"]
format = format_named("int3-g64-asym")
calibration = calibration_tokens(decoder.tokenizer, 2, 256)
inputs: dict[str, list[torch.Tensor]] = {}
observe(decoder, calibration, lambda name, x: inputs.setdefault(name, []).append(x) if name.startswith("layers.11.") else None)
inputs = {name.removeprefix("layers.11."): torch.cat([x[4:] for x in xs]) for name, xs in inputs.items()}       # without the first tokens: sinks
hessians = {name: hessian_of(x) for name, x in inputs.items()}

fig, ax = plt.subplots(figsize=(7.2, 3.4))
said = []
for name, x in inputs.items():
    weight, size = linears(decoder)[f"layers.11.{name}"].weight, x.abs().mean(0).clamp(min=1e-4)
    errors = []
    for ratio in RATIOS:
        s = size**ratio
        assert torch.allclose((x / s) @ (weight * s).T, x @ weight.T, rtol=1e-3, atol=1e-3)         # the identity, before anything is rounded
        errors.append(output_error(weight, Quantized.of(format, weight * s).dequantize() / s, hessians[name]))
    ax.plot(RATIOS, np.array(errors) / errors[0], "o-", label=name)
    said.append(f"{name} {min(errors) / errors[0]:.2f} at {RATIOS[int(np.argmin(errors))]:.2f}")
ax.axhline(1, color=plots.TEXT, linewidth=0.8)
ax.set(xlabel="a: 0 is rounding to nearest, 1 is scaling in full", ylabel="output error, of nearest", ylim=(0, 2),
       title="Some scaling helps; too much stretches the grid of the neighbours")
ax.legend()
plots.show(fig, f"Output error of four matrices, as a part of nearest's, against the exponent a; the least: {', '.join(said)}.")

# %% [markdown]
# ## Prediction
# Two things an envelope can say: how long GPTQ takes for a matrix (FLOPs over peak, though the loop works through I columns one after another, each some operations with a fixed price), and
# how large the file is that comes out: three layers of the thirty, in four bits, and the embedding in fp16. Write your guesses over the dots, as text with a unit: "20 ms", "3 MB".

# %%
lesson.guess("GPTQ of layers.0.down", ...)          # 1,536 columns of 576 weights, and the products of 1,024 tokens
lesson.guess("checkpoint, int4-g64", ...)

# %% tags=["nbval-ignore-output"]
works = {}
for name in ("layers.0.qkv", "layers.0.down"):
    O, I = linears(decoder)[name].weight.shape
    works[name] = total(name, [matmul(I, M, I, "H"), matmul(O, I // 2, I, "the loop"), matmul(I, I // 3, I, "the factor")])
    ops = count_ops(lambda O=O, I=I: gptq_matrix(torch.randn(O, I), torch.eye(I), format_named("int4-g64"), search=False))
    lesson.predict(f"GPTQ of {name}", machine.napkin(works[name]), machine.time(works[name], ops), unit="s")

LAYERS = 3
weights = sum(linear.weight.numel() for name, linear in linears(decoder).items() if int(name.split(".")[1]) < LAYERS)
rest = shape.V * shape.D + (2 * LAYERS + 1) * shape.D                               # embedding and norms stay in fp16
napkin = weights * 4.25 / 8 + 2 * rest
exact = weights * (4 + (16 + 4) / 64) / 8 + 2 * rest                                # the layout stores zero points, symmetric or not
lesson.predict("checkpoint, int4-g64", napkin, exact, unit="B")
lesson.reveal()

# %% [markdown]
# ## Measurement
# First one matrix: layer 11's `down`, by four roundings. How far do its outputs move? On the text that H was made of, that is one question. On text that GPTQ has not seen it is another, so we ask twice more: on
# the other half of the same prose (Python's help), and on another kind of text, source code.
#
# (The model comes from a file of 4 bits, Q4_1: lesson 07. Its weights lie on a grid of 16 levels already, and what a method costs here says little about a model that was never rounded before.)

# %% tags=["nbval-ignore-output"]
def first_layers(count: int) -> Decoder:
    """The model without its later layers."""
    part = Decoder(ModelConfig(replace(shape, L=count, name=f"{count} layers"))).eval().requires_grad_(False)
    part.embed, part.norm, part.tokenizer = decoder.embed, decoder.norm, decoder.tokenizer
    for i in range(count):
        part.layers[i] = decoder.layers[i]
    return part


def inputs_of_down(tokens: torch.Tensor) -> list[torch.Tensor]:
    """What goes into layer 11's `down`, [M, I] for each sequence, without the first tokens."""
    seen = []
    observe(twelve, tokens, lambda name, x: seen.append(x[4:]) if name == "layers.11.down" else None)
    return seen


def outputs(W: torch.Tensor, xs: list[torch.Tensor]) -> np.ndarray:
    """|x Wᵀ|² of each sequence."""
    return np.array([float((x @ W.T).square().sum()) for x in xs])


twelve, weight, g64 = first_layers(12), linears(decoder)["layers.11.down"].weight, format_named("int4-g64")
CODE = evaluation_tokens(decoder.tokenizer, 8, 256, text=Path(argparse.__file__))
unseen = {"the other half of the prose": inputs_of_down(evaluation_tokens(decoder.tokenizer, 8, 256)), "source code": inputs_of_down(CODE)}
texts = {"calibration text": [inputs["down"]], **unseen}
roundings = {
    "nearest": Quantized.of(g64, weight),
    "GPTQ, in order": gptq_matrix(weight, hessians["down"], g64, act_order=False),
    "GPTQ, groups as they come": gptq_matrix(weight, hessians["down"], g64, static_groups=False),
    "GPTQ act-order": gptq_matrix(weight, hessians["down"], g64),
}
roundings = {name: q.dequantize() for name, q in roundings.items()}
far = {name: float((q - weight).square().sum() / weight.square().sum()) for name, q in roundings.items()}
wrong = {text: {name: float((outputs(q - weight, xs) / outputs(weight, xs)).mean()) for name, q in roundings.items()} for text, xs in texts.items()}
fig, axes = plt.subplots(1, 4, figsize=(9.6, 2.6), sharey=True)
panels = {"weights": far, **{fill(f"output, {text}", 18): values for text, values in wrong.items()}}
for ax, (title, values) in zip(axes, panels.items(), strict=True):
    ax.barh(list(values), [100 * value for value in values.values()], color=plots.MEASURED, height=0.55)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("squared error, %")
    ax.grid(axis="y", visible=False)
axes[0].invert_yaxis()
plots.show(fig, "Squared error of layer 11's down, of the whole: " + "; ".join(
    " ".join(title.split()) + ": " + ", ".join(f"{name} {value:.2%}" for name, value in values.items()) for title, values in panels.items()) + ".")

# %% tags=["nbval-ignore-output"]
def against_nearest(q: torch.Tensor, xs: list[torch.Tensor]) -> tuple[float, float]:
    """Output error as a multiple of that of rounding to nearest, and the standard error of its mean over the sequences."""
    ratios = outputs(q - weight, xs) / outputs(roundings["nearest"] - weight, xs)
    return float(ratios.mean()), float(ratios.std(ddof=1) / len(ratios) ** 0.5) if len(ratios) > 1 else 0.0


held_out = {text: against_nearest(roundings["GPTQ act-order"], xs) for text, xs in unseen.items()}
said = " and ".join(f"**{ratio:.2f} ± {error:.2f} times** nearest's on {text}" for text, (ratio, error) in held_out.items())
in_sample = wrong["calibration text"]["nearest"] / wrong["calibration text"]["GPTQ act-order"]
tokens_seen, I = inputs["down"].shape
rank = int(torch.linalg.matrix_rank(inputs["down"]))
Markdown(f"""On the text that it was calibrated on, GPTQ (act-order) makes the output error {in_sample:.0f} × smaller than nearest. On text that it has not seen, the error is {said}.

H was made of {tokens_seen:,} tokens, and its rank is {rank:,}: of {I:,} directions an input may have, {I - rank:,} did not occur. An error in those costs nothing *there*. So a small error on the text that one calibrates on
proves nothing; the question is how it goes on text that one does not. More tokens should help:""")

# %% tags=["nbval-ignore-output"]
SEQUENCES = (2, 8, 32)                              # of 256 tokens
many = inputs_of_down(calibration_tokens(decoder.tokenizer, max(SEQUENCES), 256))

# %% tags=["nbval-ignore-output"]
counts, curves = [], {text: [] for text in texts}
for sequences in SEQUENCES:
    seen = many[:sequences]
    q = gptq_matrix(weight, hessian_of(torch.cat(seen)), g64).dequantize()
    counts.append(sum(map(len, seen)))
    for text, xs in {"calibration text": seen, **unseen}.items():
        curves[text].append(against_nearest(q, xs))
fig, ax = plt.subplots(figsize=(7.2, 3.4))
for text, points in curves.items():
    ax.errorbar(counts, *zip(*points, strict=True), fmt="o-", label=text, capsize=3)
ax.axhline(1, color=plots.TEXT, linewidth=0.8)
ax.axvline(I, color=plots.TEXT, linewidth=0.8, linestyle=":")
ax.annotate(f"{I:,} inputs", (I, 0.02), xytext=(4, 0), textcoords="offset points", fontsize=9)
ax.set(xscale="log", xlabel="tokens that H was made of", ylabel="output error, of nearest", ylim=(0, None), title="What GPTQ gains on unseen text, it gains from many tokens")
ax.set_xticks(counts, [f"{count:,}" for count in counts])
ax.minorticks_off()
ax.legend()
plots.show(fig, "Output error of GPTQ as a multiple of nearest's, for H of " + ", ".join(f"{count:,}" for count in counts) + " tokens: " + "; ".join(
    f"{text} " + ", ".join(f"{ratio:.2f}" for ratio, _ in points) for text, points in curves.items()) + ".")

# %% [markdown]
# Now the model, on 1,024 tokens. To stay within a minute we quantize its first three layers and leave the others as they are; the whole model takes about a minute with `clawdemy-infer quantize`. We judge on both kinds of unseen
# text: the other half of the prose, and (int4-g64) source code.

# %% tags=["nbval-ignore-output"]
small = first_layers(LAYERS)
tokens = calibration_tokens(decoder.tokenizer, 4, 256)
reference, on_code = Reference(decoder, evaluation_tokens(decoder.tokenizer, 2, 192)), Reference(decoder, CODE)


def judged(result: QuantizedModel, reference: Reference = reference):
    """The whole model with the quantized layers in it, against itself."""
    layers = {f"layers.{i}": result.decoder.layers[i] for i in range(LAYERS)}
    return reference.judge(with_modules(decoder, layers))


quality, of_code, results = {}, {}, {}
for name in ("int4-g64", "int3-g64"):
    methods = {"nearest": lambda f: round_to_nearest(small, f), "AWQ": lambda f: awq(small, tokens[:2], f), "GPTQ act-order": lambda f: gptq(small, tokens, f)}
    for method, quantize in methods.items():
        results[name, method] = quantize(format_named(name))
        quality[name, method] = judged(results[name, method])
        if name == "int4-g64":
            of_code[name, method] = judged(results[name, method], on_code)
header = ["KL", "±", "perplexity", "same first token"]
Table(["format", "method", *header],
      [[*key, f"{q.kl:.4f}", f"{q.kl_se:.4f}", f"{q.perplexity:.2f}", f"{q.top1:.1%}"] for key, q in quality.items()]
      + [[f"{name}, source code", method, f"{q.kl:.4f}", f"{q.kl_se:.4f}", f"{q.perplexity:.2f}", f"{q.top1:.1%}"] for (name, method), q in of_code.items()],
      numeric=header)

# %% tags=["nbval-ignore-output"]
def plain_ticks(ax) -> None:
    """0.1 and not 10⁻¹, on a logarithm of less than two decades."""
    limits, ticks = ax.get_ylim(), (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.yaxis.minorticks_off()
    ax.set_ylim(limits)


fig, ax = plt.subplots(figsize=(7.2, 3.2))
methods = ["nearest", "AWQ", "GPTQ act-order"]
for shift, name in ((-0.2, "int4-g64"), (0.2, "int3-g64")):
    values = [quality[name, method] for method in methods]
    ax.bar(np.arange(3) + shift, [q.kl for q in values], 0.36, yerr=[q.kl_se for q in values], label=name, capsize=3)
ax.set_xticks(range(3), methods)
ax.set(yscale="log", ylabel="KL, nats per token", title="The same bits, rounded with more care (three layers of thirty)")
plain_ticks(ax)
ax.legend()
ax.grid(axis="x", visible=False)
plots.show(fig, "KL of three layers of thirty: " + "; ".join(f"{name}, {method} {q.kl:.3f} ± {q.kl_se:.3f}" for (name, method), q in quality.items()) + ".")

# %% [markdown]
# And the weights themselves? For the same six: how far they are from the originals, against how far the model is.

# %% tags=["nbval-ignore-output"]
def moved_by(result: QuantizedModel) -> float:
    """Squared distance of the weights of all quantized matrices from the originals, of the whole."""
    pairs = [(tensor.dequantize(), linears(decoder)[name].weight) for name, tensor in result.tensors.items()]
    return float(sum((q - w).square().sum() for q, w in pairs) / sum(w.square().sum() for _, w in pairs))


# AWQ has scaled its matrices, and moved the scales into the layer before: its weights have no originals to be compared with.
distance = {(name, method): moved_by(results[name, method]) for name in ("int4-g64", "int3-g64") for method in ("nearest", "GPTQ act-order")}
fig, ax = plt.subplots(figsize=(7.2, 3.4))
for name, colour in zip(("int4-g64", "int3-g64"), plots.COLOURS, strict=False):
    (x0, y0), (x1, y1) = ((100 * distance[name, method], quality[name, method].kl) for method in ("nearest", "GPTQ act-order"))
    ax.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 2, "shrinkA": 7, "shrinkB": 7})
    ax.plot([x0], [y0], "s", color=colour, markersize=8, label=f"{name}, nearest")
    ax.plot([x1], [y1], "o", color=colour, markersize=8, label=f"{name}, GPTQ act-order")
ax.set(xscale="log", yscale="log", xlabel="weights: squared distance from the originals, %", ylabel="model: KL, nats per token",
       title="GPTQ moves the weights away, and brings the model closer", xlim=(0.5, 20))
ax.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
ax.xaxis.minorticks_off()
ax.margins(y=0.25)
plain_ticks(ax)
ax.legend(loc="lower right")
plots.show(fig, "KL of the model against the squared distance of its weights from the originals: " + "; ".join(
    f"{name}, {method} {quality[name, method].kl:.3f} at {far_off:.1%}" for (name, method), far_off in distance.items()) + ".")

# %% [markdown]
# Which matrices hurt? One pass through the whole model, every matrix rounded to nearest and judged by its own output alone, on the inputs of the model as it was.

# %% tags=["nbval-ignore-output"]
errors = output_errors(decoder, round_to_nearest(decoder, format_named("int4-g64")), calibration[:, :128])
fig, ax = plt.subplots(figsize=(7.2, 3.2))
for kind in ("qkv", "out", "gate_up", "down"):
    ax.plot([100 * errors[f"layers.{i}.{kind}"] for i in range(shape.L)], "o-", markersize=4, label=kind)
ax.set(yscale="log", xlabel="layer", ylabel="squared output error, %", title="Nearest, int4-g64: where the output is lost")
ax.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
ax.legend(ncols=4)
worst = list(errors)[0]
plots.show(fig, f"Squared output error of each matrix, rounded to nearest, by layer, from {min(errors.values()):.2%} to {errors[worst]:.1%} in {worst}.")
Markdown(f"The worst is `{worst}`, off by {errors[worst]:.1%} of its output; the median matrix by {np.median(list(errors.values())):.1%}.")

# %% [markdown]
# And for the model? Each layer rounded alone, the other 29 as they were; and the three that GPTQ has done, by GPTQ.

# %% tags=["nbval-ignore-output"]
short = Reference(decoder, evaluation_tokens(decoder.tokenizer, 1, 192))
nearest_all = round_to_nearest(decoder, g64)
alone = kl_by_layer(short, nearest_all)
alone_gptq = kl_by_layer(short, results["int4-g64", "GPTQ act-order"])
fig, ax = plt.subplots(figsize=(7.2, 3.0))
ax.bar(list(alone), list(alone.values()), color=plots.COLOURS[0], label="nearest")
ax.bar(list(alone_gptq), list(alone_gptq.values()), width=0.4, color=plots.COLOURS[1], label="GPTQ act-order, its three")
ax.set(xlabel="layer that is rounded, alone", ylabel="KL, nats per token", title="Which layers hurt, int4-g64")
ax.legend()
ax.grid(axis="x", visible=False)
hurts = max(alone, key=alone.get)
plots.show(fig, f"KL of the model with one layer rounded to nearest: {alone[hurts]:.3f} for layer {hurts}, {np.median(list(alone.values())):.3f} for the median layer. By GPTQ: " + ", ".join(
    f"{kl:.3f} for layer {i}" for i, kl in alone_gptq.items()) + ".")
of_layer = [errors[f"layers.{hurts}.{kind}"] for kind in ("qkv", "out", "gate_up", "down")]
Markdown(f"""Layer {hurts} costs most, {alone[hurts]:.3f}, the median layer {np.median(list(alone.values())):.3f}; and yet its outputs are off by {min(of_layer):.1%} to {max(of_layer):.1%}, like all others. What an error does
depends on what is made of it. All thirty, added up: {sum(alone.values()):.2f}. Rounded together, on the same text: {short.judge(nearest_all.decoder).kl:.2f}.""")

# %% [markdown]
# Time and bytes, beside what was predicted. The checkpoint is written in the layout that vLLM and transformers read, and loaded again.

# %% tags=["nbval-ignore-output"]
first_tokens: dict[str, torch.Tensor] = {}
observe(small, tokens, lambda name, x: first_tokens.setdefault(name, x) if name.startswith("layers.0.") else None)
for name in ("layers.0.qkv", "layers.0.down"):
    x, matrix = first_tokens[name].repeat(4, 1), linears(decoder)[name].weight
    H = hessian_of(x)
    took = {"H": stopwatch(lambda x=x: hessian_of(x), repeats=3).median, "the factor": stopwatch(lambda H=H: inverse_factor(H, 0.01), repeats=3).median}
    timing = bracketed(machine)(lambda x=x, matrix=matrix: gptq_matrix(matrix, hessian_of(x), g64, search=False), repeats=3)
    both = stopwatch(lambda H=H, matrix=matrix: gptq_matrix(matrix, H, g64, search=False), repeats=3).median
    took["the loop"] = max(both - took["the factor"], 0)                            # and all its launches
    said = machine.time(works[name])
    lesson.measure(f"GPTQ of {name}", timing, parts=[
        {"name": op.name, "napkin_s": op.flops / machine.peak("fp32"), "predicted_s": said.parts[op.name].seconds, "measured_s": took[op.name]}
        for op in works[name].operations()])

with tempfile.TemporaryDirectory() as folder:
    directory = save_quantized(results["int4-g64", "GPTQ act-order"], Path(folder) / "int4")
    lesson.measure("checkpoint, int4-g64", (directory / "model.safetensors").stat().st_size)
    said = json.loads((directory / "config.json").read_text())["quantization_config"]
    loaded = load_quantized(directory)
again = judged(loaded).kl
said

# %% [markdown]
# `desc_act` is false though the columns went by the size of their inputs: the groups were fixed before, each of 64 neighbours (*static groups*), so a kernel reads the file from left to right and needs no list of which column belongs to which
# group. Where groups are formed as the columns come, `desc_act` is true and the list is in the file.

# %% [markdown]
# ## Reconciliation
# What made GPTQ of `down` take so much longer than its FLOPs at the peak? Commit yourself first.

# %%
lesson.cause("GPTQ of layers.0.down", ...)          # "H", "the factor", "the loop", "compute was slower than calibrated" (or faster; or memory), "not explained"

# %% tags=["nbval-ignore-output"]
lesson.explain("GPTQ of layers.0.down")

# %% tags=["nbval-ignore-output"]
lesson.table()

# %% tags=["nbval-ignore-output"]
def gain(name: str, method: str, kls: dict = quality) -> float:
    return 1 - kls[name, method].kl / kls[name, "nearest"].kl


Markdown(f"""**Quality.** With the same bits, AWQ takes {gain('int4-g64', 'AWQ'):.0%} off the KL of rounding to nearest at int4-g64 and {gain('int3-g64', 'AWQ'):.0%} at int3-g64; GPTQ with act-order
{gain('int4-g64', 'GPTQ act-order'):.0%} and {gain('int3-g64', 'GPTQ act-order'):.0%}. On source code, of which neither has seen any, AWQ takes {gain('int4-g64', 'AWQ', of_code):.0%} off at int4-g64 and GPTQ
{gain('int4-g64', 'GPTQ act-order', of_code):.0%}. In layer 11's `down`, from {tokens_seen} tokens, GPTQ's weights are {far['GPTQ act-order'] / far['nearest']:.1f} × as far from the originals as nearest ones; its output error
is {in_sample:.0f} × smaller on those tokens, and {held_out['the other half of the prose'][0]:.2f} × and {held_out['source code'][0]:.2f} × nearest's on the two texts that it has not seen.

**The file** is read back code for code: its KL is {again:.4f}, before it was {quality['int4-g64', 'GPTQ act-order'].kl:.4f}; what little differs is the embedding in fp16.""")

# %% [markdown]
# **All thirty layers, all formats.** The same on the whole model takes some ten minutes: `clawdemy-infer evaluate --table`. What it said once is kept with the course, the KV cache of lesson 03 in it (there the weights
# stay in fp32, and the bytes are those of the cache).

# %% tags=["nbval-ignore-output"]
source, all_rows = shipped_table()
print(f"{source['model']}, {source['text'].partition(',')[0]}; {source['machine']}, {source['date'][:10]}")
quantization_table(all_rows)

# %% tags=["nbval-ignore-output"]
whole = {(row.method, row.format): row.quality for row in all_rows}
said = ", ".join(f"{method} {whole[method, 'int4-g64'].kl:.2f}" for method in ("RTN", "AWQ", "GPTQ", "GPTQ act-order") if (method, "int4-g64") in whole)
Markdown(f"""KL at int4-g64: {said}. Sixteen numbers that are not equally spaced need no search to do well: nf4 {whole['RTN', 'nf4'].kl:.2f} and nvfp4 {whole['RTN', 'nvfp4'].kl:.2f} by rounding alone, at 4.5 bits. Keys and
values are easier than weights: {whole['KV cache', 'int8'].kl:.4f} in 8 bits, {whole['KV cache', 'int4-g32'].kl:.3f} in 4.""")

# %% [markdown]
# When do they *lose*?
#
# - **On other text, and from too few tokens.** Both have seen a thousand tokens or so of one kind. GPTQ fits a whole H to them, AWQ a scale for each channel: the table and the curves above say what was left of it on other text.
# - **At 8 bits** there is nothing to win: rounding to nearest is already as good as the original.
# - **Time.** Rounding is instant; these run the model once (GPTQ) or search each block several times (AWQ).
# - **Sinks.** The first token carries activations a hundred times larger than all others. AWQ's means must leave it out, or it is all they see.
# - **They save no bytes** beyond the format's, and no time beyond the kernel's: lesson 07's table stays as it is.
#
# ## Play and exercises
# Two inputs, correlated by ρ, and two weights. Where do the two roundings end up? The ellipses join all points of equal output error.

# %%
def draw_two(rho: float, w0: float) -> None:
    """Contours of the output error around (w0, 0.4), the nearest point of the grid, and GPTQ's."""
    H, w = np.array([[1.0, rho], [rho, 1.0]]), np.array([w0, 0.4])
    first = np.round(w[0])
    ends = {"nearest": np.round(w), "GPTQ": np.array([first, np.round(w[1] + (w[0] - first) * rho)])}
    x, y = np.meshgrid(np.linspace(-0.5, 2.5, 120), np.linspace(-1.5, 2.5, 120))
    d = np.stack([x - w[0], y - w[1]])
    fig, ax = plt.subplots(figsize=(5.2, 3.6))
    off_by = {name: (w - q) @ H @ (w - q) for name, q in ends.items()}
    ax.contour(x, y, np.einsum("iab,ij,jab->ab", d, H, d), levels=[0.05, 0.2, 0.5, 1, 2], colors="grey", linewidths=0.8)
    ax.plot(*w, "+", color=plots.TEXT, markersize=12)
    for (name, q), marker in zip(ends.items(), ("s", "o"), strict=True):
        ax.plot(*q, marker, markersize=11, fillstyle="none", markeredgewidth=2, label=f"{name}: off by {off_by[name]:.2f}")
    ax.set(xlabel="first weight", ylabel="second weight", xticks=range(3), yticks=range(-1, 3), title=f"Inputs correlated by {rho:.1f}")
    ax.legend(loc="upper right")
    plots.show(fig, f"Ellipses of equal output error around the two weights, inputs correlated by {rho:.1f}: " + ", ".join(
        f"{name} ends at {q.tolist()} and is off by {off_by[name]:.2f}" for name, q in ends.items()) + ".")


# %% tags=["widget", "nbval-ignore-output"]
widgets.play(draw_two, rho=widgets.choose("correlation", [-0.9, -0.5, 0.0, 0.5, 0.9], 0.9), w0=widgets.choose("first weight", [1.1, 1.25, 1.4], 1.4))

# %%
draw_two(0.9, 1.4)

# %% [markdown]
# ### 1 · Make up for it
# The first of two weights was rounded and is off by `e` (it was e too large before). H is [[h00, h01], [h01, h11]]. By how much should the second weight move?

# %% tags=["exercise", "exercise:make_up"]
def make_up(e, h01, h11):
    return ...


lesson.exercise(
    "make_up", make_up,
    cases={(0.4, 1.0, 2.0): 0.2, (0.4, 0.0, 2.0): 0.0, (-0.3, 2.0, 2.0): -0.3, (0.5, -1.0, 4.0): -0.125},
    nudge="Minimise h00 e² − 2 h01 e·m + h11 m² over the move m … and mind the sign: the first became smaller by e.",
    means="inputs that do not move together cannot make up for one another.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The output changed by −e·x₀. A move m adds m·x₁. Least squares: m = e · (x₀·x₁) / (x₁·x₁).
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def make_up(e, h01, h11):
#     return e * h01 / h11
# ```
#
# </details>

# %% [markdown]
# ### 2 · What GPTQ costs
# FLOPs to quantize one matrix [n, k] on m tokens: the products of the inputs with each other, and the loop, in which every column moves all later ones (on average half of k). Leave out the factorisation.

# %% tags=["exercise", "exercise:gptq_flops"]
def gptq_flops(m, n, k):
    return ...


lesson.exercise(
    "gptq_flops", gptq_flops,
    cases={(8192, 576, 1536): 40013660160, (1, 1, 2): 12, (2048, 4096, 4096): 137438953472},
    nudge="A multiplication and an addition are two FLOPs.",
    means="H costs more than the loop as soon as there are more tokens than half the rows.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Xᵀ X is a product [k, m] · [m, k]. The loop: k columns, each moves about k/2 columns of n rows.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def gptq_flops(m, n, k):
#     return 2 * m * k * k + n * k * k
# ```
#
# </details>

# %% [markdown]
# ### 3 · Fold it away
# The norm in front multiplies channel k by `norm[k]`, the matrix then by `column[k]`. AWQ scales the column by `s[k]`. Return the new norm and the new column, as two lists.

# %% tags=["exercise", "exercise:folded"]
def folded(norm, column, s):
    return ...


lesson.exercise(
    "folded", folded,
    cases={((1.0, 4.0), (0.5, 0.25), (2.0, 4.0)): [[0.5, 1.0], [1.0, 1.0]], ((3.0,), (1.0,), (1.0,)): [[3.0], [1.0]]},
    nudge="Their product, channel by channel, must not change.",
    means="in use nothing is left of the scales: the file is an ordinary int4 file.",
)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# norm / s, and column · s.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def folded(norm, column, s):
#     return [[n / x for n, x in zip(norm, s)], [c * x for c, x in zip(column, s)]]
# ```
#
# </details>
