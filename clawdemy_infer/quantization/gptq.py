"""GPTQ: round one column, and let the columns still to come make up for it (Frantar et al. 2022,
https://arxiv.org/abs/2210.17323).

Of a weight W [O, I] with inputs X [M, I], each row w wants the q on the grid with the least

    |X (w - q)|² = (w - q) H (w - q)ᵀ,    H = Xᵀ X    [I, I], the hessian of all rows

Round column j to q_j. The columns not yet rounded then do best to move by (equation 2)

    δ = - (w_j - q_j) / [H⁻¹]_jj · [H⁻¹]_j,:

and H⁻¹ loses row and column j (equation 3). All rows take the columns in the same order, so the
rows that are needed are known beforehand: up to a scale those of the Cholesky factor U of H⁻¹ =
Uᵀ U (section 3.3). Weights end *further* from where they were than by rounding, outputs nearer."""

from collections.abc import Callable

import torch
from torch import nn

from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization.format import Format, Quantized, Scales
from clawdemy_infer.quantization.linears import QuantizedModel, linears, watched, with_matrices

CLIPS = tuple(1 - 0.05 * i for i in range(1, 11))       # parts of a group's range, to clip it to


def column_step(W: torch.Tensor, j: int, rounded: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
    """Column j of the weight becomes `rounded` [O], and the columns behind it move, in place:
    w_k -= e · U_jk for all k > j. W [I, O] is the weight transposed, U [I, I] the factor. Returns
    the error e [O] = (w_j - q_j) / U_jj.

    >>> U = inverse_factor(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), damping=0)   # the inputs agree
    >>> W = torch.tensor([[1.4], [0.4]])
    >>> column_step(W, 0, torch.tensor([1.0]), U)           # 1.4 becomes 1: 0.4 / U_00
    tensor([0.4899])
    >>> W[1]                                # 0.4 - 0.4899 * U_01: now it rounds to 1, not to 0
    tensor([0.6000])
    """
    error = (W[j] - rounded) / U[j, j]
    W[j + 1:].addr_(U[j, j + 1:], error, alpha=-1)
    return error


def gptq(model: Decoder, tokens: torch.Tensor, format: Format, *, act_order: bool = True,
         progress: bool = False, **options) -> QuantizedModel:
    """A copy of `model` whose matrices are quantized by GPTQ to `format`, on the calibration tokens
    [B, T]; `options` are those of `gptq_matrix`. The model runs once. Each matrix is quantized when
    its input arrives, from matrices that are quantized already (section 4.1). Raises ValueError
    where an input is not finite, naming the matrix."""
    copy, tensors = with_matrices(model, {}), {}
    for linear in linears(copy).values():
        format.width(linear.weight.shape[1])

    def quantize(name: str, linear: nn.Linear, x: torch.Tensor) -> None:
        tensors[name] = gptq_matrix(linear.weight, hessian_of(x, name), format,
                                    act_order=act_order, **options)
        linear.weight = nn.Parameter(tensors[name].dequantize().to(x.dtype), requires_grad=False)

    with watched(copy, quantize, f"GPTQ {format.name}" if progress else None):
        copy(tokens, last_only=True)
    return QuantizedModel("GPTQ act-order" if act_order else "GPTQ", format, tensors, copy)


def hessian_of(x: torch.Tensor, name: str = "x") -> torch.Tensor:
    """H = 2 Xᵀ X / M [I, I] in fp32 of inputs x [M, I]. ValueError where one is not finite."""
    x = x.float()
    H = x.T @ x * (2 / len(x))          # M·I² multiplications: most of GPTQ's arithmetic
    if not torch.isfinite(H.diagonal()).all():
        raise ValueError(f"tokens: the inputs of {name} that they lead to are not all finite")
    return H


def gptq_matrix(weight: torch.Tensor, hessian: torch.Tensor, format: Format, *,
                act_order: bool = True, static_groups: bool = True, damping: float = 0.01,
                search: bool = True, block: int = 128) -> Quantized:
    """weight [O, I] on the grid of `format`, by one pass over its columns.

    act_order       the columns with the largest inputs go first, while many can make up for them
    static_groups   a group is g neighbours, fitted before the pass; else the next g, when they come
    damping         times the mean of H's diagonal is added to it, or more until H can be factored
    search          fit each grid by least error, not to the largest weight
    block           columns that pass before the rest hears of them: it changes the time alone

    ValueError for a group that does not divide I, or a hessian not [I, I], finite and positive."""
    (O, I), g = weight.shape, format.width(weight.shape[1])
    if not 0 <= damping <= 1:
        raise ValueError(f"damping={damping}: 0 to 1, of H's mean diagonal, is accepted")
    if hessian.shape != (I, I):
        raise ValueError(f"hessian {list(hessian.shape)}: a weight {[O, I]} needs {[I, I]}, the "
                         "products of its inputs with each other")
    # 1. The order of the columns, the group of each, and what an error does to those behind it.
    columns = torch.arange(I, device=weight.device)
    order = hessian.diagonal().argsort(descending=True) if act_order else columns
    group = (order if static_groups else columns) // g      # of the column that is rounded k-th
    U = inverse_factor(hessian[order][:, order], damping)
    # 2. The grids that are known before the pass.
    outer, known = format.outer(weight), weight.float().split(g, dim=1) if static_groups else ()
    grids = {i: fitted(format, part, outer, search) for i, part in enumerate(known)}
    # 3. The pass. A block ends where a group begins that is yet to be fitted, on what is left.
    W = weight.float()[:, order].T.contiguous()     # [I, O]: a column of the weight is contiguous
    codes = torch.empty_like(weight, dtype=torch.int8 if format.signed else torch.uint8)
    edges = sorted({*range(0, I, block), *(() if static_groups else range(0, I, g)), I})
    for start, end in zip(edges, edges[1:], strict=False):
        inside, errors = slice(start, end), torch.empty_like(W[start:end])
        for j in range(start, end):
            i = int(group[j])
            if i not in grids:
                grids[i] = fitted(format, W[j:j + g].T, outer, search)
            code = format.encode(W[j][:, None], grids[i])                       # [O, 1]
            codes[:, order[j]] = code[:, 0]
            errors[j - start] = column_step(W[inside], j - start,
                                            format.decode(code, grids[i])[:, 0], U[inside, inside])
        W[end:].addmm_(U[inside, end:].T, errors, alpha=-1)     # section 3.2, lazy batch updates
    # 4. Scales in the order of the groups.
    fits = [grids[i] for i in range(I // g)]
    zero = None if fits[0].zero is None else torch.cat([fit.zero for fit in fits], dim=1)
    group_of = torch.empty_like(group).scatter_(0, order, group)
    return Quantized(format, codes, torch.cat([fit.scale for fit in fits], dim=1), zero, outer,
                     None if static_groups or not act_order else group_of)


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """U [I, I], fp32, upper triangular: Uᵀ U is the inverse of the damped hessian."""
    H = hessian.double()                # a few tokens with huge values: fp32 would not do
    if not torch.isfinite(H).all():
        raise ValueError("hessian: it holds numbers that are not finite; were the inputs?")
    H = H + torch.diag((H.diagonal() == 0).double())    # an input of zeros: rounded to nearest
    eye, mean = torch.eye(len(H), dtype=H.dtype, device=H.device), float(H.diagonal().mean())
    while damping <= 1:
        # The inverse itself is not needed: factor H = R Rᵀ from its last row upwards, then U = R⁻¹.
        R, failed = torch.linalg.cholesky_ex((H + damping * mean * eye).flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(R.flip(0, 1), eye, upper=True).float()
        damping = max(10 * damping, 1e-4)
    raise ValueError("hessian: not positive even when its mean is added to the diagonal; Xᵀ X of "
                     "some inputs X is accepted")


def fitted(format: Format, x: torch.Tensor, outer: torch.Tensor | None, search: bool) -> Scales:
    """The grids of a group x [O, g]: fitted to the largest weight of each row, or with `search` to
    the part of its range that leaves the least |error|^2.4 (quant.py of IST-DASLab/gptq)."""
    def error_of(tried: torch.Tensor) -> torch.Tensor:
        scales = format.fit(tried, outer)
        rounded = format.decode(format.encode(x, scales), scales)
        return (rounded - x).abs().pow(2.4).sum(dim=-1, keepdim=True)

    return format.fit(narrowed(x, error_of) if search else x, outer)


def narrowed(x: torch.Tensor, error_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Groups x [..., g], each clipped to the part of its range, all or one of `CLIPS`, of least
    error. `error_of` gives those of all groups, [..., 1]."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    best, least = x, error_of(x)
    for part in CLIPS:
        tried = x.clamp(low * part, high * part)
        error = error_of(tried)
        best, least = tried.where(error < least, best), torch.minimum(error, least)
    return best


def output_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """|X (W - Q)ᵀ|² / |X Wᵀ|² of weight and quantized [O, I], by way of the hessian."""
    off, w, H = (weight - quantized).double(), weight.double(), hessian.double()
    return float((off @ H * off).sum() / (w @ H * w).sum())
