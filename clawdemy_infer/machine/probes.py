"""What can be measured of a machine without a model: the probes that a calibration is made of.

Each is a kind of work of known size that no cache can help, and none is a piece of the model that
it will predict (those of attention are in `probes_attention`):

    read bandwidth      the sum of an array, over working sets: caches show as steps
    peak FLOP/s         a large square matrix product
    GEMM rate by M      X[M, k] @ W[k, n] with W fresh from memory each time, for each format of W:
                        at small M the rate is the reading of W; the same for a wide W, as heads
                        have, and for small ones
    element-wise rate   norms, gates and sums between products: bound by memory on a GPU, by
                        arithmetic and conversion on many CPUs
    fixed cost          a decoder layer without its matrix products: what PyTorch and Python charge
                        to start an operation
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn import functional as F

from clawdemy_infer.fast import FLOATS, FORMATS, PackedLinear, computes_in, copy_of, packable
from clawdemy_infer.fast.backends import choose
from clawdemy_infer.machine.calibrated import SMALL_GEMM
from clawdemy_infer.timing import alternate, count_ops, rates, stopwatch

RING_NUMBERS = 2**27
"""Numbers in all the matrices that a GEMM probe goes through: more than caches hold."""
SHAPES = [(640, 640), (640, 2560), (1280, 640)]
"""(inputs, outputs) of the weights in the GEMM probe: square, wide and tall, of a small model's
size but of no model's."""
SMALL_SHAPES = [(320, 320), (320, 1280), (640, 320)]
HEAD_SHAPES = [(640, 40960)]
GEMM_ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
SMALL_ROWS = [1, 4, 16, 64, 256, 1024]
HEAD_ROWS = [1, 4, 16, 64]
PEAK_ROWS = {"cpu": 1536, "cuda": 8192}
"""Rows and columns of the square product that the peak is taken from."""
ELEMENTWISE_ROWS = [4, 16, 64, 256, 1024, 4096]
GLUE_LAYERS = 32
"""Layers of the fixed-cost probe, each with four matrices of a million numbers."""


def read_bandwidth(sizes: list[int], device: str, rounds: int = 3) -> list[tuple[float, float]]:
    """(bytes, bytes/s) of torch sums over `sizes` bytes: a lower bound on the hardware."""
    data = torch.ones(max(sizes) // 4, device=device)

    def rate(size: int) -> float:
        view = data[:size // 4]

        def read(_: int) -> int:
            view.sum()
            return size
        return rates({"read": read}, rounds=rounds)["read"]
    return [(size, rate(size)) for size in sizes]


def formats(device: str) -> list[str]:
    """The formats of weights that the device has kernels for."""
    return list(FORMATS if device == "cpu" or choose(device) == "triton" else FLOATS)


def gemm_weights(format: str, device: str, numbers: int = RING_NUMBERS,
                 shapes: Sequence[tuple[int, int]] = SHAPES) -> list[PackedLinear]:
    """Linear layers of all `shapes`, one behind the other, of about `numbers` numbers in all: so
    many that each comes from memory when its turn comes."""
    copies = max(2, numbers // sum(k * n for k, n in shapes))
    generator = torch.Generator(device).manual_seed(0)
    sources = [packable(format, torch.randn(n, k, device=device, generator=generator))
               for k, n in shapes]
    return [PackedLinear(format, copy_of(source)) for _ in range(copies) for source in sources]


def gemm_step(weights: list[PackedLinear], m: int, dtype: torch.dtype,
              each: int = len(SHAPES)) -> Callable[[int], int]:
    """The i-th piece of the GEMM probe: M rows through the next `each` weights. Returns its FLOPs.
    Outputs are kept until all are done, as in a layer."""
    inputs = {w.in_features: torch.randn(m, w.in_features, device=w.device).to(dtype)
              for w in weights[:each]}

    @torch.inference_mode()
    def step(i: int) -> int:
        some = [weights[(i * each + j) % len(weights)] for j in range(each)]
        outputs = [w(inputs[w.in_features]) for w in some]
        outputs.clear()
        return 2 * m * sum(w.in_features * w.out_features for w in some)
    return step


def gemm_rates(format: str, device: str) -> dict[str, list[tuple[float, float]]]:
    """(M, FLOP/s) of X[M, k] @ W[k, n]: "gemm" for the matrices of layers, `SMALL_GEMM` for smaller
    ones, "head" for very wide ones."""
    dtype, curves = FLOATS[computes_in(format, device)], {}
    for kernel, rows, shapes, numbers in (
            ("gemm", GEMM_ROWS, SHAPES, RING_NUMBERS),
            (SMALL_GEMM, SMALL_ROWS, SMALL_SHAPES, RING_NUMBERS // 2),
            ("head", HEAD_ROWS, HEAD_SHAPES, RING_NUMBERS)):
        weights = gemm_weights(format, device, numbers, shapes)
        steps = {m: gemm_step(weights, m, dtype, len(shapes)) for m in rows}
        curves[kernel] = list(rates(steps, sample_s=0.02, rounds=3).items())
    return curves


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMS norm of each row, in fp32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return wide.to(x.dtype) * weight


@torch.inference_mode()
def elementwise_rates(dtype: str, device: str, width: int = 1024,
                      layers: int = 16) -> list[tuple[float, float]]:
    """(M, bytes/s) of norms, gates and residual sums, counted as the arithmetic counts them: as if
    each were one fused operation.

    PyTorch makes several operations of each and moves more, so this is a rate of useful bytes, far
    below the bandwidth. As in a decoder, a product sweeps its weight through the caches after each.
    They run on M rows and on one: starting them costs the same, so the difference is the price of
    the bytes.
    """
    token = torch.randn(1, width, device=device)
    norm_weight = torch.ones(width, device=device, dtype=FLOATS[dtype])
    weights = [torch.randn(width, width, device=device) for _ in range(3 * layers)]

    def on(rows: int, layers: int) -> Callable[[], None]:
        first = torch.randn(rows, width, device=device).to(FLOATS[dtype])
        gate_up = [torch.randn(rows, 2 * width, device=device).to(FLOATS[dtype]).chunk(2, dim=-1)
                   for _ in range(layers // 2)]

        def run() -> None:
            x = first
            for i in range(layers):
                sweep, sweep_again, and_again = weights[3 * i:3 * i + 3]
                norm(x, norm_weight)                                    # read one, write one
                F.linear(token, sweep)
                gate, up = gate_up[i % len(gate_up)]
                y = F.silu(gate) * up                                   # read two, write one
                F.linear(token, sweep_again)
                x = x + y                                               # read two, write one
                F.linear(token, and_again)
        return run

    bytes_per_row = (2 + 3 + 3) * width * FLOATS[dtype].itemsize        # in one layer
    found = []
    for m in ELEMENTWISE_ROWS if device == "cpu" else [2**13]:  # a GPU runs 256 rows as fast as one
        some = max(2, min(layers, 2**14 // m))          # layers: of thousands of rows a few will do
        times = alternate({"many": on(m, some), "one": on(1, some)}, repeats=7)
        seconds = max(times["many"].beyond(times["one"]), 1e-9)
        found.append((m, some * bytes_per_row * (m - 1) / seconds))
    return found


class Glue:
    """What stands between the matrix products of any decoder layer, here of width 512: norms, a
    rotation, a cache of 16 tokens, a gate.

    The arrays are so small that its time is the price of starting its operations. Four `products`,
    whose results it does not use, run where a layer has its own.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.attention_norm, self.mlp_norm = torch.ones(2, 512, device=device, dtype=dtype)
        self.cos, self.sin = torch.randn(2, 64, device=device).to(dtype)
        self.cache = torch.zeros(1, 2, 16, 64, device=device, dtype=dtype)

    def __call__(self, x: torch.Tensor, products: list[Callable[[], object]]) -> torch.Tensor:
        qkv, out, gate_up, down = products
        qkv()
        q, k = norm(x, self.attention_norm).view(1, 1, 8, 64).split((6, 2), dim=2)
        left, right = q.chunk(2, dim=-1)
        q = q * self.cos + torch.cat((-right, left), dim=-1) * self.sin
        self.cache[:, :, 5:6] = k.transpose(1, 2)
        F.scaled_dot_product_attention(q.reshape(1, 2, 3, 64), self.cache, self.cache)
        out()
        y = norm(x + x, self.mlp_norm)
        gate_up()
        gate, up = y.chunk(2, dim=-1)
        F.silu(gate) * up
        down()
        return x + y


@torch.inference_mode()
def fixed_cost(device: str, format: str = "fp32") -> float:
    """Seconds to start one operation in the mix of a decode step with weights in `format`, Python
    included: the mean over `Glue`.

    The time of the products alone is taken off. What is left is more than the glue would cost in a
    loop of its own: a weight has gone through the caches, and the other threads have gone to sleep.
    """
    dtype = FLOATS[computes_in(format, device)]
    layers = [Glue(device, dtype) for _ in range(GLUE_LAYERS)]
    x, row = (torch.randn(1, 1, width, device=device).to(dtype) for width in (512, 1024))
    weights = gemm_weights(format, device, 4 * GLUE_LAYERS * 2**20, [(1024, 1024)])
    products = [[partial(w, row[0]) for w in weights[i:i + 4]] for i in range(0, len(weights), 4)]

    def products_alone() -> None:
        for four in products:
            for product in four:
                product()

    def with_glue() -> None:
        for layer, four in zip(layers, products, strict=True):
            layer(x, four)

    times = alternate({"products": products_alone, "both": with_glue}, repeats=11)
    ops = count_ops(with_glue) - count_ops(products_alone)
    return max(0.0, times["both"].beyond(times["products"])) / ops


def peak_flops(format: str, device: str) -> float:
    """FLOP/s of a square matrix product, the largest rate we know how to ask for."""
    n = PEAK_ROWS[device]
    [product, *_] = gemm_weights(format, device, n * n, [(n, n)])
    a = torch.randn(n, n, device=device).to(FLOATS[computes_in(format, device)])
    return 2 * n**3 / stopwatch(torch.inference_mode()(lambda: product(a)), repeats=3).best
