"""What can be measured of a machine without a model: the probes that a calibration is made of.

Each is a kind of work of known size that no cache can help, and none is a piece of the model that it will predict (those of attention
are in `probes_attention`):

    read bandwidth      the sum of an array, over working sets: caches show as steps
    peak FLOP/s         a large square matrix product
    GEMM rate by M      X[M, k] @ W[k, n] with W fresh from memory each time, for each format of W, by the kernel that was chosen for it:
                        at small M the rate is the reading of W; and the same for a wide W, as heads have
    element-wise rate   norms, gates and sums between products: bound by memory on a GPU, by arithmetic and conversion on many CPUs
    fixed cost          a decoder layer without its matrix products: what PyTorch and Python charge to start an operation
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from clawdemy_infer.backends import choose
from clawdemy_infer.linear import FLOATS, FORMATS, PackedLinear, computes_in, copy_of, packable
from clawdemy_infer.roofline import SMALL_GEMM
from clawdemy_infer.timing import alternate, count_ops, rates, stopwatch

DTYPES = FLOATS
GEMM_ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
SMALL_ROWS = [1, 4, 16, 64, 256, 1024]
HEAD_ROWS = [1, 4, 16, 64]
ELEMENTWISE_ROWS = [4, 16, 64, 256, 1024, 4096]
RING = 2**27
"""Numbers in all the matrices that a GEMM probe goes through."""
GLUE_LAYERS = 32
"""Each with four matrices of a million numbers: in int4 too more than caches hold."""
SHAPES = [(640, 640), (640, 2560), (1280, 640)]
"""(inputs, outputs) of the weights in the GEMM probe: square, wide and tall, of a small model's size but of no model's."""
SMALL_SHAPES = [(320, 320), (320, 1280), (640, 320)]
HEAD_SHAPES = [(640, 40960)]


def read_bandwidth(sizes: list[int], device: str, rounds: int = 3) -> list[tuple[float, float]]:
    """(bytes, bytes/s) for reading `sizes` bytes again and again. A lower bound on the hardware: it is what a torch sum reaches."""
    data = torch.ones(max(sizes) // 4, device=device)

    def rate(size: int) -> float:
        view = data[: size // 4]

        def read(_: int) -> int:
            view.sum()
            return size
        return rates({"read": read}, rounds=rounds)["read"]
    return [(size, rate(size)) for size in sizes]


def formats(device: str) -> list[str]:
    """The formats of weights that the device has kernels for."""
    return list(FORMATS if device == "cpu" or choose(device) == "triton" else FLOATS)


def gemm_weights(format: str, device: str, numbers: int = RING, shapes: Sequence[tuple[int, int]] = SHAPES) -> list[PackedLinear]:
    """Linear layers of all `shapes`, one behind the other, of so many `numbers` in all: more than any cache keeps of fp32, and
    of fewer bits as much as a model of that size would have. So each comes from memory when its turn comes."""
    copies = max(2, numbers // sum(k * n for k, n in shapes))
    generator = torch.Generator(device).manual_seed(0)
    sources = [packable(format, torch.randn(n, k, device=device, generator=generator)) for k, n in shapes]
    return [PackedLinear(format, copy_of(source)) for _ in range(copies) for source in sources]


def gemm_step(weights: list[PackedLinear], m: int, dtype: torch.dtype, each: int = len(SHAPES)) -> Callable[[int], int]:
    """The i-th piece of the GEMM probe: M rows through the next `each` weights. Returns its FLOPs.

    What comes out of one is kept until all are done, as a layer does it: of thousands of rows it is then memory that the system has to
    give anew.
    """
    inputs = {w.in_features: torch.randn(m, w.in_features, device=w.device).to(dtype) for w in weights[:each]}

    @torch.inference_mode()
    def step(i: int) -> int:
        some = [weights[(i * each + j) % len(weights)] for j in range(each)]
        outputs = [w(inputs[w.in_features]) for w in some]
        outputs.clear()
        return 2 * m * sum(w.in_features * w.out_features for w in some)
    return step


def gemm_rates(format: str, device: str) -> dict[str, list[tuple[float, float]]]:
    """(M, FLOP/s) of X[M, k] @ W[k, n]: "gemm" for the matrices of layers, `SMALL_GEMM` for smaller ones, "head" for very wide ones."""
    dtype, curves = DTYPES[computes_in(format, device)], {}
    probes = ("gemm", GEMM_ROWS, SHAPES, RING), (SMALL_GEMM, SMALL_ROWS, SMALL_SHAPES, RING // 2), ("head", HEAD_ROWS, HEAD_SHAPES, RING)
    for kernel, rows, shapes, numbers in probes:
        weights = gemm_weights(format, device, numbers, shapes)
        measured = rates({str(m): gemm_step(weights, m, dtype, len(shapes)) for m in rows}, sample_s=0.02, rounds=3)
        curves[kernel] = [(m, measured[str(m)]) for m in rows]
    return curves


class Norm(nn.Module):
    """RMS norm of each row: the layer norm of (x, -x)."""

    def __init__(self, device: str, width: int = 512):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        D = x.shape[-1]
        return F.layer_norm(torch.cat((x, -x), dim=-1), (2 * D,), eps=1e-5)[..., :D] * self.weight


@torch.inference_mode()
def elementwise_rates(dtype: str, device: str, width: int = 1024, layers: int = 16) -> list[tuple[float, float]]:
    """(M, bytes/s) of norms, gates and residual sums, counted as the arithmetic counts them: as if each were one fused operation.

    PyTorch makes several operations of each and moves more, so this is a rate of useful bytes, far below the bandwidth. They
    run as in a decoder: after every one a product sweeps its weight through the caches. And they run on M rows and on one: starting
    them costs the same, so the difference is the price of the bytes. Few rows are one core's, and many no longer fit its caches.
    """
    norm = Norm(device, width).to(DTYPES[dtype])
    token, weights = torch.randn(1, width, device=device), [torch.randn(width, width, device=device) for _ in range(3 * layers)]

    def on(rows: int, layers: int) -> Callable[[], None]:
        first = torch.randn(rows, width, device=device).to(DTYPES[dtype])
        gate_up = [torch.randn(rows, 2 * width, device=device).to(DTYPES[dtype]).chunk(2, dim=-1) for _ in range(layers // 2)]

        def run() -> None:
            x = first
            for i in range(layers):
                sweep, sweep_again, and_again = weights[3 * i: 3 * i + 3]
                norm(x)                                     # read one, write one
                F.linear(token, sweep)
                gate, up = gate_up[i % len(gate_up)]
                y = F.silu(gate) * up                       # read two, write one
                F.linear(token, sweep_again)
                x = x + y                                   # read two, write one
                F.linear(token, and_again)
        return run

    rows = ELEMENTWISE_ROWS if device == "cpu" else [2**13]             # on a GPU 256 rows cost no more than one
    bytes = (2 + 3 + 3) * width * DTYPES[dtype].itemsize                # of one row and layer
    found = []
    for m in rows:
        some = max(2, min(layers, 2**14 // m))                          # of thousands of rows a few will do
        times = alternate({"many": on(m, some), "one": on(1, some)}, repeats=7)
        found.append((m, some * bytes * (m - 1) / max(times["many"].beyond(times["one"]), 1e-9)))
    return found


class Glue(nn.Module):
    """What stands between the matrix products of any decoder layer, here of width 512: norms, a rotation, a cache of 16 tokens, a gate.

    The arrays are so small that their bytes and FLOPs are nothing: its time is the price of starting its operations.
    Four `products`, whose results it does not use, run where a layer has its own.
    """

    def __init__(self, device: str, dtype: torch.dtype):
        super().__init__()
        self.norm, self.mlp_norm = Norm(device).to(dtype), Norm(device).to(dtype)
        self.cos, self.sin = torch.randn(2, 64, device=device).to(dtype)
        self.cache = torch.zeros(1, 2, 16, 64, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, products: list[Callable[[], object]]) -> torch.Tensor:
        qkv, out, gate_up, down = products
        qkv()
        q, k = self.norm(x).view(1, 1, 8, 64).split((6, 2), dim=2)
        left, right = q.chunk(2, dim=-1)
        q = q * self.cos + torch.cat((-right, left), dim=-1) * self.sin
        self.cache[:, :, 5:6] = k.transpose(1, 2)
        F.scaled_dot_product_attention(q.reshape(1, 2, 3, 64), self.cache, self.cache)
        out()
        y = self.mlp_norm(x + x)
        gate_up()
        gate, up = y.chunk(2, dim=-1)
        F.silu(gate) * up
        down()
        return x + y


@torch.inference_mode()
def fixed_cost(device: str, format: str = "fp32") -> float:
    """Seconds to start one operation in the mix of a decode step with weights in `format`, Python included: the mean over `Glue`.

    The time of the products alone is taken off. What is left is more than the glue would cost in a loop of its own:
    after a weight has gone through them, the caches hold nothing that the glue needs, and the other threads have gone to sleep. The
    fewer bytes a weight has, the less of that.
    """
    dtype = DTYPES[computes_in(format, device)]
    layers = [Glue(device, dtype) for _ in range(GLUE_LAYERS)]
    x, row = torch.randn(1, 1, 512, device=device).to(dtype), torch.randn(1, 1024, device=device).to(dtype)
    weights = gemm_weights(format, device, 4 * GLUE_LAYERS * 2**20, [(1024, 1024)])
    products = [[partial(w, row) for w in weights[i: i + 4]] for i in range(0, len(weights), 4)]

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
    n = 8192 if device == "cuda" else 1536
    [product, *_] = gemm_weights(format, device, n * n, [(n, n)])
    a = torch.randn(n, n, device=device).to(DTYPES[computes_in(format, device)])
    return 2 * n**3 / stopwatch(torch.inference_mode()(lambda: product(a)), repeats=3).best
