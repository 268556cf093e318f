"""Where a run took place: the chip behind a row's `hardware`, and what is known of the code behind its `software`.

Nothing here is fitted. A chip is a data sheet (`data/chips.toml`). A `Software` is a count: the kernels that it launches for one
layer, read off its layer's code, and whether its decode attention fetches a KV head once for all of its query heads.
"""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

TILES = ((64, 128, 1.0), (64, 64, 0.9))
"""Output tiles that a GEMM library chooses from: rows, columns, and the rate beside that of a large one (fewer FLOPs for each operand).
Larger ones are not faster than the first in the rows that we have, and fill fewer cores."""


@dataclass(frozen=True)
class Chip:
    """The figures of `data/chips.toml`; 0 where nothing is known. `tensor` and `lanes` are per core and clock, `link` in GB/s."""

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

    @property
    def tile_rows(self) -> int:
        """Rows of activations that share one unpacking of a quantized weight: 32 on Apple's GPUs (llama.cpp, MLX), else 128."""
        return 32 if self.unified else 128

    def filled(self, blocks: int) -> float:
        """Share of the cores that are busy while `blocks` equal pieces of work go through them in waves."""
        return blocks / (math.ceil(blocks / self.cores) * self.cores) if self.cores else 1.0

    def gemm_filled(self, rows: int, columns: int) -> float:
        """What is left of a tile's rate when an output of [rows, columns] is cut into tiles: padding, a last wave that is not full.

        A tile is as flat as the rows allow, in steps of 16, what a matrix instruction takes; a single row is no product of tiles.
        """
        def left(tall: int, wide: int, rate: float) -> float:
            tall = min(tall, 16 * math.ceil(rows / 16))
            blocks = math.ceil(rows / tall) * math.ceil(columns / wide)
            return rate * self.filled(blocks) * rows * columns / (blocks * tall * wide)
        return max(left(*tile) for tile in TILES) if self.cores and rows > 1 and not self.unified else 1.0


@cache
def _chips() -> list[Chip]:
    return [Chip(**entry) for entry in tomllib.loads((files("clawdemy_data") / "chips.toml").read_text(encoding="utf-8"))["chip"]]


def chip(hardware: str) -> Chip:
    """The chip that a row's `hardware` names. Apple's cores are in the name (`M1 Pro 14c`); an unknown one has no figures but a clock."""
    if "CPU" in hardware:
        return Chip()
    for found in _chips():
        if re.search(found.match, hardware):
            cores = re.search(r"(\d+)c\b", hardware) if found.unified else None
            return Chip(**vars(found) | {"cores": int(cores[1])}) if cores else found
    return Chip()


@dataclass(frozen=True)
class Software:
    """kernels: launched for one layer in a pass. shared: a KV head is fetched once for its whole group of query heads.
    fp16_accumulation: its quantized products keep sums in fp16."""

    kernels: int
    shared: bool
    fp16_accumulation: bool = False


COMPILED, LIBRARY, EAGER = 12, 16, 24
"""Kernels a layer. Compiled or fused by hand: norm, q-k-v, rope, cache write, attention in two parts, out, norm, gate and up, product,
down, add. A library with some fused kernels: 16. Line by line: each of the three projections, both rotations, both cache writes, scores,
softmax, values, each multiply and add on its own."""

SOFTWARE = (
    # TensorRT-LLM before its XQA kernel reads K and V once per query head in decode (NVIDIA's note on XQA: 2.4 times faster with it).
    (r"XQA", Software(COMPILED, shared=True)),
    (r"TensorRT-LLM 0\.[1-6]\b|TensorRT-LLM 0\.[1-6]\.|FasterTransformer", Software(COMPILED, shared=False)),
    # Metal kernels for one query run a threadgroup per query head (llama.cpp; MLX's sdpa_vector).
    (r"MLX", Software(COMPILED, shared=False)),
    (r"llama\.cpp", Software(EAGER, shared=False)),
    (r"TinyChat", Software(LIBRARY, shared=False, fp16_accumulation=True)),
    (r"gpt-fast|torch\.compile|TensorRT|MLC|mlc|vLLM(?!-era)|SGLang|LMDeploy|InferSim|T5X|JAX|TPU", Software(COMPILED, shared=True)),
    (r"GPTQ|transformers|HF|PyTorch|tiny-llm", Software(EAGER, shared=True)),
)


def software(name: str) -> Software:
    """What is known of the software that a row names; in between for one that nobody has looked into."""
    for pattern, known in SOFTWARE:
        if re.search(pattern, name):
            return known
    return Software(LIBRARY, shared=True)
