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
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown

from clawdemy_infer.arithmetic.work import matmul, total
from clawdemy_infer.fast.launches import count_ops
from clawdemy_infer.files import load_model
from clawdemy_infer.files.checkpoint import load_quantized, save_quantized
from clawdemy_infer.lesson import Lesson, plots, widgets
from clawdemy_infer.lesson.quality import Reference, kl_by_layer, output_errors
from clawdemy_infer.lesson.tables import Table, si
from clawdemy_infer.lesson.text import calibration_tokens, evaluation_tokens
from clawdemy_infer.machine.calibrate import this_machine
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
from clawdemy_infer.quantization.gptq import gptq_matrix, hessian_of, output_error
from clawdemy_infer.quantization.linears import with_modules
from clawdemy_infer.rigs.quantization_table import quantization_table, shipped_table
from clawdemy_infer.timing import stopwatch

plots.use_style()
plt.rcParams["figure.dpi"] = 90
machine = this_machine("cpu")
lesson = Lesson("08 gptq_awq", machine=machine)
decoder = load_model("smollm2-135m")
shape = decoder.config.shape
Markdown(f"This machine: **{machine.name}**. It computes at most {si(machine.peak('fp32'), 'FLOP/s')} in fp32.")

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
# (**act-order**), while there are many left to make up for them; and a little is added to H's diagonal (**damping**), because a few thousand tokens do not fill I directions.
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
for name, x in inputs.items():
    weight, size = linears(decoder)[f"layers.11.{name}"].weight, x.abs().mean(0).clamp(min=1e-4)
    errors = []
    for ratio in RATIOS:
        s = size**ratio
        assert torch.allclose((x / s) @ (weight * s).T, x @ weight.T, rtol=1e-3, atol=1e-3)         # the identity, before anything is rounded
        errors.append(output_error(weight, Quantized.of(format, weight * s).dequantize() / s, hessians[name]))
    ax.plot(RATIOS, np.array(errors) / errors[0], "o-", label=name)
ax.axhline(1, color="black", linewidth=0.8)
ax.set(xlabel="a: 0 is rounding to nearest, 1 is scaling in full", ylabel="output error, of nearest", ylim=(0, 2),
       title="Some scaling helps; too much stretches the grid of the neighbours")
ax.legend()
plt.show()

# %% [markdown]
# ## Prediction
# Two things an envelope can say: how long GPTQ takes for a matrix (FLOPs over peak, though the loop works through I columns one after another, each some operations with a fixed price), and
# how large the file is that comes out.

# %% tags=["nbval-ignore-output"]
for name in ("layers.0.qkv", "layers.0.down"):
    O, I = linears(decoder)[name].weight.shape
    work = total(name, [matmul(I, M, I, "H"), matmul(O, I // 2, I, "the loop"), matmul(I, I // 3, I, "the factor")])
    ops = count_ops(lambda O=O, I=I: gptq_matrix(torch.randn(O, I), torch.eye(I), format_named("int4-g64"), search=False))
    lesson.predict(f"GPTQ of {name}", machine.napkin(work), machine.time(work, ops).seconds, unit="s")

LAYERS = 3
first_layers = replace(shape, L=LAYERS, name="three layers")
weights = sum(linear.weight.numel() for name, linear in linears(decoder).items() if int(name.split(".")[1]) < LAYERS)
rest = shape.V * shape.D + (2 * LAYERS + 1) * shape.D                               # embedding and norms stay in fp16
napkin = weights * 4.25 / 8 + 2 * rest
exact = weights * (4 + (16 + 4) / 64) / 8 + 2 * rest                                # the layout stores zero points, symmetric or not
lesson.predict("checkpoint, int4-g64", napkin, exact, unit="B")
lesson.guess("checkpoint, int4-g64", ...)
lesson.table()

# %% [markdown]
# ## Measurement
# First one matrix: layer 11's `down`, by four roundings.

# %% tags=["nbval-ignore-output"]
weight, H_down = linears(decoder)["layers.11.down"].weight, hessians["down"]
g64 = format_named("int4-g64")
roundings = {
    "nearest": Quantized.of(g64, weight),
    "GPTQ, in order": gptq_matrix(weight, H_down, g64, act_order=False),
    "GPTQ, groups as they come": gptq_matrix(weight, H_down, g64, static_groups=False),
    "GPTQ act-order": gptq_matrix(weight, H_down, g64),
}
far = {name: float((q.dequantize() - weight).square().sum() / weight.square().sum()) for name, q in roundings.items()}
wrong = {name: output_error(weight, q.dequantize(), H_down) for name, q in roundings.items()}
fig, axes = plt.subplots(1, 2, figsize=(8.4, 2.6), sharey=True)
for ax, values, title in zip(axes, (far, wrong), ("The weights move further …", "… and the output less"), strict=True):
    ax.barh(list(values), [100 * value for value in values.values()], color=plots.MEASURED, height=0.55)
    ax.set(title=title, xlabel="squared error, % of the whole")
    ax.grid(axis="y", visible=False)
axes[0].invert_yaxis()
plt.show()

# %% [markdown]
# Now the model. To stay within a minute we quantize its first three layers and leave the others as they are; the whole model takes about a minute with `clawdemy-infer quantize`.

# %% tags=["nbval-ignore-output"]
small = Decoder(ModelConfig(first_layers)).eval().requires_grad_(False)
small.embed, small.norm, small.tokenizer = decoder.embed, decoder.norm, decoder.tokenizer
for i in range(LAYERS):
    small.layers[i] = decoder.layers[i]
tokens = calibration_tokens(decoder.tokenizer, 4, 256)
reference = Reference(decoder, evaluation_tokens(decoder.tokenizer, 2, 192))


def judged(result: QuantizedModel):
    """The whole model with the quantized layers in it, against itself."""
    layers = {f"layers.{i}": result.decoder.layers[i] for i in range(LAYERS)}
    return reference.judge(with_modules(decoder, layers))


quality, results = {}, {}
for name in ("int4-g64", "int3-g64"):
    methods = {"nearest": lambda f: round_to_nearest(small, f), "AWQ": lambda f: awq(small, tokens[:2], f), "GPTQ act-order": lambda f: gptq(small, tokens, f)}
    for method, quantize in methods.items():
        results[name, method] = quantize(format_named(name))
        quality[name, method] = judged(results[name, method])
Table(["format", "method", "KL", "±", "perplexity", "same first token"],
      [[*key, f"{q.kl:.4f}", f"{q.kl_se:.4f}", f"{q.perplexity:.2f}", f"{q.top1:.1%}"] for key, q in quality.items()],
      numeric=["KL", "±", "perplexity", "same first token"])

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
plt.show()

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
plt.show()

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
plt.show()
worst = list(errors)[0]
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
plt.show()
hurts = max(alone, key=alone.get)
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
    took = stopwatch(lambda x=x, matrix=matrix: gptq_matrix(matrix, hessian_of(x), g64, search=False), repeats=3)
    lesson.measure(f"GPTQ of {name}", took.median)

with tempfile.TemporaryDirectory() as folder:
    directory = save_quantized(results["int4-g64", "GPTQ act-order"], Path(folder) / "int4")
    lesson.measure("checkpoint, int4-g64", (directory / "model.safetensors").stat().st_size)
    said = json.loads((directory / "config.json").read_text())["quantization_config"]
    loaded = load_quantized(directory)
again = judged(loaded).kl
said

# %% [markdown]
# ## Reconciliation

# %% tags=["nbval-ignore-output"]
for name in ("layers.0.qkv", "layers.0.down"):
    lesson.explain(f"GPTQ of {name}", "the loop is thousands of small operations, in 64 bits for the factor: their fixed price, not their FLOPs")
lesson.explain("checkpoint, int4-g64", "zero points are stored even where all are 8, and the group of each column")
lesson.table()

# %% tags=["nbval-ignore-output"]
def gain(name: str, method: str) -> float:
    return 1 - quality[name, method].kl / quality[name, "nearest"].kl


Markdown(f"""**Quality.** With the same bits, AWQ takes {gain('int4-g64', 'AWQ'):.0%} off the KL of rounding to nearest at int4-g64 and {gain('int3-g64', 'AWQ'):.0%} at int3-g64; GPTQ with act-order
{gain('int4-g64', 'GPTQ act-order'):.0%} and {gain('int3-g64', 'GPTQ act-order'):.0%}. In layer 11's `down` its weights are {far['GPTQ act-order'] / far['nearest']:.1f} × as far from the originals as nearest ones,
and its output error is {wrong['nearest'] / wrong['GPTQ act-order']:.0f} × smaller.

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
# - **On other text.** Both have seen a few thousand tokens of one kind. GPTQ fits them harder than AWQ does, and suffers more where the text in use is another.
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
    ax.contour(x, y, np.einsum("iab,ij,jab->ab", d, H, d), levels=[0.05, 0.2, 0.5, 1, 2], colors="grey", linewidths=0.8)
    ax.plot(*w, "k+", markersize=12)
    for (name, q), marker in zip(ends.items(), ("s", "o"), strict=True):
        ax.plot(*q, marker, markersize=11, fillstyle="none", markeredgewidth=2, label=f"{name}: off by {(w - q) @ H @ (w - q):.2f}")
    ax.set(xlabel="first weight", ylabel="second weight", xticks=range(3), yticks=range(-1, 3), title=f"Inputs correlated by {rho:.1f}")
    ax.legend(loc="upper right")
    plt.show()


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
