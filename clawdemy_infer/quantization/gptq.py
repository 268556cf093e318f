"""GPTQ: round one column, and let the columns still to come make up for it (Frantar et al. 2022, https://arxiv.org/abs/2210.17323).

A weight is W [N, K], its inputs X [M, K]. What rounding must keep is the output, so each row w wants the q on the grid with the least

    |X (w - q)|² = (w - q) H (w - q)ᵀ,    H = Xᵀ X    [K, K], the same for all rows

Round column j to q_j. The columns not yet rounded then do best to move by (equation 2 of the paper)

    δ = - (w_j - q_j) / [H⁻¹]_jj · [H⁻¹]_j,:

and H⁻¹ loses row and column j by one step of elimination (equation 3). All rows go through the columns in the same order, so
all these inverses are known beforehand: they are the rows of the Cholesky factor U of H⁻¹ = Uᵀ U, up to a scale (section 3.3):

    e = (w_j - q_j) / U_jj        W_:,j: -= e · U_j,j:

Rounding to nearest asks how far a weight moves; this asks how far the output moves. The weights end up *further* from where they were.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization.format import TENSOR, Format, Scales
from clawdemy_infer.quantization.linears import QuantizedModel, linears, with_matrices, with_modules
from clawdemy_infer.quantization.quantized import Quantized

SHRINKS = tuple(1 - 0.05 * i for i in range(1, 11))
"""Parts of a group's range that its grid may cover: less than all clips the largest weight, and places the others finer."""


def gptq(model: Decoder, tokens: torch.Tensor, format: Format, *, act_order: bool = True, static_groups: bool = True,
         damping: float = 0.01, progress: bool = False) -> QuantizedModel:
    """A copy of `model` whose linears are quantized by GPTQ to `format`, on the calibration tokens [B, T].

    The model runs once. Each linear is quantized at the moment its input arrives, which is what it will see in use: all that comes
    before is quantized already (section 4.1 of the paper goes layer by layer; this goes linear by linear). All B·T tokens
    are in memory at once. See `gptq_matrix` for the options. Raises ValueError where an input is not finite, naming the linear.
    """
    found, done = linears(model), {}
    for linear in found.values():
        check(format, linear.weight.shape[1], damping)
    bar = tqdm(total=len(found), desc=f"GPTQ {format.name}", unit="linear", disable=not progress)

    def quantize(name: str, linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        done[name] = gptq_matrix(linear.weight, hessian_of(x, name), format, act_order=act_order, static_groups=static_groups,
                                 damping=damping)
        bar.update()
        return done[name].dequantize().to(x.dtype)

    running = with_modules(model, {name: _OnArrival(name, linear, quantize) for name, linear in found.items()})
    with bar:
        running(tokens, last_only=True)
    return QuantizedModel("GPTQ act-order" if act_order else "GPTQ", format, done, with_matrices(model, done))


class _OnArrival(nn.Module):
    """Stands where a linear stood: quantizes it when its input comes, and answers with what it has become."""

    def __init__(self, name, linear, quantize) -> None:
        super().__init__()
        self.name, self.linear, self.quantize = name, linear, quantize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.quantize(self.name, self.linear, x), self.linear.bias)


def hessian_of(x: torch.Tensor, name: str = "x") -> torch.Tensor:
    """H = 2 Xᵀ X / M [K, K] in fp32 of a linear's inputs x [M, K]: half the second derivative of the mean squared output error.

    Raises ValueError where a value is not finite.
    """
    x = x.float()
    H = x.T @ x * (2 / len(x))                                          # M·K² multiplications: most of GPTQ's arithmetic
    if not torch.isfinite(H.diagonal()).all():
        raise ValueError(f"tokens: the inputs of {name} that they lead to are not all finite, and GPTQ needs their squares")
    return H


def gptq_matrix(weight: torch.Tensor, hessian: torch.Tensor, format: Format, *, act_order: bool = True, static_groups: bool = True,
                damping: float = 0.01, search: bool = True, block: int = 128) -> Quantized:
    """weight [N, K] on the grid of `format`, with the least output error that one pass over the columns finds.

    `act_order` takes the columns with the largest inputs first, while there are many others left to make up for them. Then a
    group is either, with `static_groups`, g neighbouring columns, whose grid is fitted before the pass; or the g columns
    that come one after another in the pass, fitted when it reaches them, which needs an index of each column's group.
    `damping` times the mean of H's diagonal is added to it, ten times as much for each time that H cannot be factored.
    `search` fits each grid by least squared error and not to the largest weight. `block` is how many columns pass before the rest hears
    of them: it changes the time, not the result (section 3.2, lazy batch updates).
    Raises ValueError for a group that does not divide K, or a hessian that is not [K, K], finite and positive.
    """
    N, K = weight.shape
    g = check(format, K, damping)
    if hessian.shape != (K, K):
        raise ValueError(f"hessian {list(hessian.shape)}: a weight {[N, K]} needs {[K, K]}, the products of its inputs with each other")
    columns = torch.arange(K, device=weight.device)
    order = hessian.diagonal().argsort(descending=True) if act_order else columns
    group = (order if static_groups else columns) // g                  # of the column that is rounded k-th
    U = inverse_factor(hessian[order][:, order], damping)

    outer = format.outer(weight)
    grids: dict[int, Scales] = {}
    if static_groups:
        grids = {i: fitted(format, part, outer, search) for i, part in enumerate(weight.float().split(g, dim=1))}
    W = weight.float()[:, order].T.contiguous()                         # [K, N]: a column of the weight is contiguous here
    codes = torch.empty(N, K, dtype=format.encode(W[:1, :1], format.fit(W[:1, :1], outer)).dtype, device=weight.device)
    # A block ends where a group begins that is yet to be fitted, so that the group has heard of all columns before it.
    edges = sorted({*range(0, K, block), *(() if static_groups else range(0, K, g)), K})
    for start, end in zip(edges, edges[1:], strict=False):
        errors = torch.empty_like(W[start:end])
        for j in range(start, end):
            i = int(group[j])
            if i not in grids:
                grids[i] = fitted(format, W[j:j + g].T, outer, search)
            code = format.encode(W[j][:, None], grids[i])               # [N, 1]
            codes[:, order[j]] = code[:, 0]
            errors[j - start] = (W[j] - format.decode(code, grids[i])[:, 0]) / U[j, j]
            W[j + 1:end].addr_(U[j, j + 1:end], errors[j - start], alpha=-1)
        W[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)          # the rest hears of the whole block in one product

    fits = [grids[i] for i in range(K // g)]
    zero = None if fits[0].zero is None else torch.cat([fit.zero for fit in fits], dim=1)
    group_of = None if static_groups or not act_order else torch.empty_like(group).scatter_(0, order, group)
    return Quantized(format, codes, torch.cat([fit.scale for fit in fits], dim=1), zero, outer, group_of)


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """U [K, K] of fp32, upper triangular, with Uᵀ U the inverse of the damped hessian. See `gptq_matrix`."""
    H = hessian.double()                                                # a few tokens with huge values: fp32 would not do
    if not torch.isfinite(H).all():
        raise ValueError("hessian: it holds numbers that are not finite; were the inputs?")
    diagonal = H.diagonal()
    # An input that was never seen anything but 0 says nothing about its column, which is then simply rounded to nearest.
    H = H + torch.diag((diagonal == 0).double())
    mean = float(H.diagonal().mean())
    while damping <= 1:
        damped = H + damping * mean * torch.eye(len(H), dtype=H.dtype, device=H.device)
        # The inverse itself is not needed: factor H = R Rᵀ from its last row upwards, then U = R⁻¹.
        R, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            R = R.flip(0, 1)
            return torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True).float()
        damping = max(10 * damping, 1e-4)
    raise ValueError("hessian: not positive even when its mean is added to the diagonal; Xᵀ X of some inputs X is accepted")


def fitted(format: Format, x: torch.Tensor, outer: torch.Tensor | None, search: bool = True) -> Scales:
    """The grid of a group x [N, g] for each row: fitted to the largest weight or, with `search`, the one that covers a part of its
    range and leaves the least error, |error|^2.4 as in the authors' code (quant.py of IST-DASLab/gptq).
    """
    best = format.fit(x, outer)
    if not search:
        return best
    least = _error(format, x, best)
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    for shrink in SHRINKS:
        tried = format.fit(x.clamp(low * shrink, high * shrink), outer)
        error = _error(format, x, tried)
        better = error < least
        least = torch.where(better, error, least)
        best = Scales(torch.where(better, tried.scale, best.scale),
                      None if best.zero is None else torch.where(better, tried.zero, best.zero), outer)
    return best


def _error(format: Format, x: torch.Tensor, scales: Scales) -> torch.Tensor:
    return (format.decode(format.encode(x, scales), scales) - x).abs().pow(2.4).sum(dim=-1, keepdim=True)


def output_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """|X (W - Q)ᵀ|² / |X Wᵀ|² of weight and quantized [N, K], by way of the hessian: what GPTQ makes small."""
    def energy(D: torch.Tensor) -> torch.Tensor:
        D = D.double()
        return (D @ hessian.double() * D).sum()

    return float(energy(weight - quantized) / energy(weight))


def check(format: Format, columns: int, damping: float = 0.01) -> int:
    """The width of a group in rows of `columns`. Raises ValueError for what GPTQ cannot do."""
    if format.group == TENSOR:
        raise ValueError(f"format={format}: one scale for a whole matrix; a scale for each row or group is accepted")
    if not 0 <= damping <= 1:
        raise ValueError(f"damping={damping}: a fraction of the hessian's mean diagonal, from 0 to 1, is accepted")
    return format.width(columns)
