"""What ran, and where: the chip behind a row's `hardware` (`data/chips.toml`), what is known of the
code behind its `software` (`data/software.toml`), the shape of its `model`. Nothing is fitted."""

import math
import re
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

from clawdemy_infer.arithmetic import ModelShape, MoE
from clawdemy_infer.from_config import catalog
from clawdemy_infer.published.rows import RULES, PublishedRun

_once = cache(lambda shape: shape)      # equal shapes are one: its layers are worked out once


@dataclass(frozen=True)
class Chip:
    """Figures of `data/chips.toml`; `tensor` and `lanes` per core and clock, `link` in GB/s."""

    match: str = ""
    cores: int = 0
    lanes: int = 0
    tensor: int = 0
    GHz: float = 1.5
    link: float = 32.0
    fp16_accumulation: int = 1
    unified: bool = False
    source: str = "no entry in data/chips.toml"

    @property
    def vector_flops(self) -> float:
        """FLOP/s without matrix units: a multiply and an add in each lane, each clock."""
        return 2e9 * self.cores * self.lanes * self.GHz

    @property
    def peak_flops(self) -> float:
        """Dense FLOP/s in fp16 with fp32 accumulation."""
        return 1e9 * self.cores * self.tensor * self.GHz

    def filled(self, blocks: int) -> float:
        """Share of the cores at work while `blocks` equal pieces go through them in waves."""
        return blocks / (math.ceil(blocks / self.cores) * self.cores) if self.cores else 1.0

    def gemm_filled(self, rows: int, columns: int) -> float:
        """What padding and a last wave that is not full leave of a tile's rate for an output of
        [rows, columns]. A tile is as flat as the rows allow, in steps of the 16 that a matrix
        instruction takes; a single row is no product of tiles."""
        if not self.cores or rows == 1 or self.unified:
            return 1.0

        def left(tall: int, wide: int, rate: float) -> float:
            tall = min(tall, 16 * math.ceil(rows / 16))
            blocks = math.ceil(rows / tall) * math.ceil(columns / wide)
            return rate * self.filled(blocks) * rows * columns / (blocks * tall * wide)
        return max(left(*tile) for tile in RULES["tiles"])


@cache
def _entry(name: str, file: str) -> dict:
    """The first entry of a file in `data/` whose pattern is in `name`."""
    [entries] = catalog.read(file).values()
    return next((each for each in entries if re.search(each["match"], name)), {})


def chip(hardware: str) -> Chip:
    """The chip that a row's `hardware` names. Apple's cores are in the name (`M1 Pro 14c`); an
    unknown one, or a CPU, has no figures but a clock."""
    found = Chip() if "CPU" in hardware else Chip(**_entry(hardware, "chips.toml"))
    cores = re.search(r"(\d+)c\b", hardware) if found.unified else None
    return replace(found, cores=int(cores[1])) if cores else found


def software(name: str) -> SimpleNamespace:
    """Facts of `data/software.toml` on it: its `kernels`, `shared` and `fp16_accumulation`."""
    return SimpleNamespace(**_entry(name, "software.toml"))


def shape_of(run: PublishedRun) -> ModelShape:
    """The shape of the model of `run`: the catalog's if its columns agree, else theirs, and the
    parameters say what no column does: how many experts, and whether the MLP has a gate."""
    known = run.model.lower().replace(" ", "-")
    if known in catalog.model_names():
        shape = _once(catalog.model(known))
        stated = (run.layers, run.d_model, run.n_heads)
        if run.layers is None or (shape.L, shape.D, shape.N) == stated:
            return shape
    L, D, N, K, H, F, V = map(run.whole, ("layers", "d_model", "n_heads", "n_kv_heads", "head_dim",
                                          "d_ff", "vocab"))
    if L > 1000:                    # a slip in the file, and a shape has an entry for each of them
        raise ValueError(f"layers={L:g}: at most 1,000")
    gated = _once(ModelShape(run.model, L, D, N, K, H, F, V, bool(run.tied)))
    parameters, active = (1e9 * (count or 0) for count in (
        run.params_B, run.active_params_B or run.params_B))
    if active < 0.9 * parameters:
        expert = L * 3 * D * F
        rest = gated.parameters() - expert
        return _once(replace(gated, moe=MoE(experts=round((parameters - rest) / expert),
                                            active=max(1, round((active - rest) / expert)))))
    return min((gated, _once(replace(gated, gated=False))),
               key=lambda shape: abs(shape.parameters() - parameters))


def bytes_per_weight(run: PublishedRun, shape: ModelShape) -> float:
    """Mean bytes of a weight, scales and wider parts included: from the bytes that the source
    states, else from its bits. Raises ValueError if it states neither."""
    bits = run.weight_bits_eff
    if run.weight_GB:
        stated = 1e9 * run.weight_GB / shape.streamed_bytes(1.0)
        # Otherwise it counts other weights: all experts, one matrix.
        if not bits or 0.6 < stated / (bits / 8) < 1.5:
            return stated
    if not bits:
        width = run.weight_dtype or "blank"
        raise ValueError(f"the width of the weights is not stated ({width!r})")
    return bits / 8
