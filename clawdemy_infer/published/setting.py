"""What ran, and where: the chip behind a row's `hardware` (`data/chips.toml`), what is known of the
code behind its `software` (`data/software.toml`), and the shape of its `model`. Nothing here is
fitted."""

import math
import re
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

from clawdemy_infer.arithmetic import ModelShape, MoE
from clawdemy_infer.from_config import catalog
from clawdemy_infer.published.rows import PublishedRun

TILES = ((64, 128, 1.0), (64, 64, 0.9))
"""Output tiles that a GEMM library chooses from: rows, columns, and the rate beside that of a large
one (fewer FLOPs for each operand). Larger ones are no faster in our rows, and fill fewer cores."""
_catalog = cache(catalog.model)     # so that a shape's layers are worked out once


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
        return max(left(*tile) for tile in TILES)


@dataclass(frozen=True)
class Software:
    """Facts of `data/software.toml`: `kernels` launched for a layer in a pass; is a KV head fetched
    once for all its query heads (`shared`); do quantized products keep their sums in fp16?"""

    match: str = ""
    kernels: int = 16
    shared: bool = True
    fp16_accumulation: bool = False


@cache
def _named(name: str, kind: type, file: str) -> Chip | Software:
    """The first entry of a file whose pattern is in `name`, else what a `kind` has by default."""
    [entries] = tomllib.loads((files("clawdemy_data") / file).read_text(encoding="utf-8")).values()
    return next((kind(**each) for each in entries if re.search(each["match"], name)), kind())


def chip(hardware: str) -> Chip:
    """The chip that a row's `hardware` names. Apple's cores are in the name (`M1 Pro 14c`); an
    unknown one, or a CPU, has no figures but a clock."""
    found = Chip() if "CPU" in hardware else _named(hardware, Chip, "chips.toml")
    cores = re.search(r"(\d+)c\b", hardware) if found.unified else None
    return replace(found, cores=int(cores[1])) if cores else found


def software(name: str) -> Software:
    """What is known of the software that a row names; in between where nobody has looked."""
    return _named(name, Software, "software.toml")


def shape_of(run: PublishedRun) -> ModelShape:
    """The shape of the model of `run`: the catalog's if its columns agree, else theirs."""
    known = run.model.lower().replace(" ", "-")
    if known in catalog.model_names():
        shape = _catalog(known)
        stated = (run.layers, run.d_model, run.n_heads)
        if run.layers is None or (shape.L, shape.D, shape.N) == stated:
            return shape
    if run.whole("layers") > 1000:  # a slip in the file, and a shape has an entry for each of them
        raise ValueError(f"layers={run.layers:g}: at most 1,000")
    sizes = map(run.whole, "layers d_model n_heads n_kv_heads head_dim d_ff vocab".split())
    return _columns(run.model, *sizes, bool(run.tied), 1e9 * (run.params_B or 0),
                    1e9 * (run.active_params_B or run.params_B or 0))


@cache
def _columns(name: str, L: int, D: int, N: int, K: int, H: int, F: int, V: int, tied: bool,
             parameters: float, active: float) -> ModelShape:
    """The parameters say what no column does: how many experts, and whether the MLP has a gate."""
    gated = ModelShape(name, L, D, N, K, H, F, V, tied)
    if active < 0.9 * parameters:
        expert = L * 3 * D * F
        rest = gated.parameters() - expert
        return replace(gated, moe=MoE(experts=round((parameters - rest) / expert),
                                      active=max(1, round((active - rest) / expert))))
    return min((gated, replace(gated, gated=False)),
               key=lambda shape: abs(shape.parameters() - parameters))


def bytes_per_weight(run: PublishedRun, shape: ModelShape) -> float:
    """Mean bytes of a weight, scales and wider parts included: from the bytes that the source
    states, else from its bits. Raises ValueError if it states neither."""
    bits = run.weight_bits_eff or None
    if run.weight_GB:
        stated = 1e9 * run.weight_GB / shape.streamed_bytes(1.0)
        # Otherwise it counts other weights: all experts, one matrix.
        if bits is None or 0.6 < stated / (bits / 8) < 1.5:
            return stated
    if bits is None:
        width = run.weight_dtype or "blank"
        raise ValueError(f"the width of the weights is not stated ({width!r})")
    return bits / 8
