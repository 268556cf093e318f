"""The model behind a row: from the catalog where its columns agree with it, else from the columns alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from clawdemy_infer import catalog
from clawdemy_infer.arithmetic import ModelShape, MoE
from clawdemy_infer.published.rows import Run


def shape_of(run: Run) -> ModelShape:
    """The shape of the model that `run` names. Raises ValueError if neither the catalog nor the columns give one."""
    known = run.model.lower().replace(" ", "-")
    if known in catalog.model_names():
        shape = _catalog(known)
        if run.layers is None or (shape.L, shape.D, shape.N) == (run.layers, run.d_model, run.n_heads):
            return shape
    if run.whole("layers") > 1000:      # a slip in the file, and a shape has an entry for each of them
        raise ValueError(f"layers={run.layers:g}: at most 1,000")
    sizes = map(run.whole, ("layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab"))
    return _columns(run.model, *sizes, bool(run.tied), 1e9 * (run.params_B or 0), 1e9 * (run.active_params_B or run.params_B or 0))


@cache
def _catalog(name: str) -> ModelShape:
    return catalog.model(name)


@cache
def _columns(name: str, L: int, D: int, N: int, K: int, H: int, F: int, V: int, tied: bool, parameters: float, active: float) -> ModelShape:
    """The columns do not say whether the MLP has a gate, or how many experts there are. The parameters do."""
    gated = ModelShape(name, L, D, N, K, H, F, V, tied)
    if active < 0.9 * parameters:
        expert = L * 3 * D * F
        rest = gated.parameters() - expert
        return replace(gated, moe=MoE(experts=round((parameters - rest) / expert), active=max(1, round((active - rest) / expert))))
    return min((gated, replace(gated, gated=False)), key=lambda shape: abs(shape.parameters() - parameters))


def bytes_per_weight(run: Run, shape: ModelShape) -> float:
    """Bytes of a weight on the average, scales and wider parts included: from the bytes that the source states, else from its bits.

    Raises ValueError if it states neither.
    """
    bits = run.weight_bits_eff or None
    if run.weight_GB:
        stated = 1e9 * run.weight_GB / shape.streamed_bytes(1.0)
        if bits is None or 0.6 < stated / (bits / 8) < 1.5:     # else it counts other weights: all experts, one matrix
            return stated
    if bits is None:
        raise ValueError(f"the width of the weights is not stated ({run.weight_dtype or 'blank'!r})")
    return bits / 8
