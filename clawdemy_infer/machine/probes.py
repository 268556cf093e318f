"""What can be measured of a machine without a model: the probes that a calibration is made of.

Each is a kind of work of known size that no cache can help, and none is a piece of the model that
it will predict (those of attention are in `probes_attention`). A probe gives one sample of one
figure in some hundredths of a second; how many samples there are is the calibration's business.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.nn import functional as F

from clawdemy_infer.arithmetic.work import BYTES
from clawdemy_infer.fast import FLOATS, PackedLinear, computes_in, copy_of, packable
from clawdemy_infer.fast.backends import choose
from clawdemy_infer.fast.kernels import table
from clawdemy_infer.fast.launches import count_ops
from clawdemy_infer.machine.calibrated import SMALL_GEMM
from clawdemy_infer.timing import now

RING_BYTES = 2**27      # all the matrices that a GEMM probe goes through: more than caches hold
SHAPES = [(640, 640), (640, 2560), (1280, 640)]
"""(inputs, outputs) of its weights: square, wide and tall, a small model's size but no model's."""
SMALL_SHAPES = [(320, 320), (320, 1280), (640, 320)]
HEAD_SHAPES = [(640, 40960)]
GEMM_ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
SMALL_ROWS = [1, 4, 16, 64, 256, 1024]
HEAD_ROWS = [1, 4, 16, 64, 256]
PEAK_ROWS = {"cpu": 1536, "cuda": 8192}         # and columns of the square product of the peak
ELEMENTWISE_ROWS = [4, 16, 64, 256, 1024, 4096]
GLUE_LAYERS = 8         # of the launch probe, each with four matrices of a million numbers
MOST_LAYERS = 8         # of element-wise work in one sample
SAMPLE_S = 0.01         # seconds of one sample, or one piece of work if that takes longer


def largest_cache() -> int:
    """Bytes of the largest cache, where Linux says it; a server's third may hold 300 MiB."""
    sizes = [path.read_text().strip()
             for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 2**10 for size in sizes if size.endswith("K")), default=0)


class Probe(NamedTuple):
    """One figure of the machine: its kind and format, the size that it is taken at (bytes or rows),
    and a function that samples it once."""

    kind: str
    format: str
    at: float
    sample: Callable[[], float]


def rate_of(step: Callable[[int], float], sample_s: float | None = None,
            clock: Callable[[], float] | None = None) -> Callable[[], float]:
    """Samples of units/s of `step(i)`, which does the i-th piece and returns its units."""
    done, clock = 0, clock or now

    def sample() -> float:
        nonlocal done
        units, start, elapsed = 0.0, clock(), 0.0
        while elapsed < (SAMPLE_S if sample_s is None else sample_s):
            units, done = units + step(done), done + 1
            elapsed = clock() - start
        return units / elapsed
    return sample


def bandwidth(read: Callable[[], object], nbytes: float, clock: Callable[[], float] = now) -> float:
    """Bytes/s at which `read()` reads its `nbytes` bytes; `clock()` gives seconds, in ticks of 1 ms
    at most. A first read is cold and does not count; the median of 9 samples of 20 ms does."""
    read()
    sample = rate_of(lambda _: (read(), nbytes)[1], 0.02, clock)
    return median(sample() for _ in range(9))


def beyond(more: Callable[[], object], less: Callable[[], object]) -> float:
    """Seconds that `more()` takes longer than `less()`, run once each, above 0."""
    start = now()
    less()
    between = now()
    more()
    return max(now() - between - (between - start), 1e-9)


def bandwidth_probes(sizes: Sequence[int], device: str) -> list[Probe]:
    """Bytes/s of torch sums over `sizes` bytes: a lower bound on the hardware."""
    data = torch.ones(max(sizes) // 4, device=device)

    def sample(size: int) -> Callable[[], float]:
        view = data[:size // 4]
        return rate_of(lambda _: (view.sum(), size)[1])
    return [Probe("bandwidth", "", size, sample(size)) for size in sizes]


def gemm_weights(format: str, device: str, ring_bytes: int,
                 shapes: Sequence[tuple[int, int]] = SHAPES) -> list[PackedLinear]:
    """Linear layers of all `shapes`, one behind the other, of about `ring_bytes` bytes in all: so
    many that each comes from memory when its turn comes."""
    each = sum(k * n for k, n in shapes) * BYTES[format]
    copies = max(1, round(ring_bytes / each))
    generator = torch.Generator(device).manual_seed(0)
    # Random rows, again and again: it is the reading that counts, and drawing takes longer.
    sources = [packable(format, torch.randn(64, k, device=device, generator=generator)
                        .repeat(-(-n // 64), 1)[:n]) for k, n in shapes]
    # A product in C++ has its weight in memory of its own, which is quicker to copy than to pack
    # again; others use the source as it is.
    if all(makers[0].__name__ == "cpp_product"
           for _, makers in table(format, device, choose(device))):
        packed = [PackedLinear(format, source) for source in sources]
        return packed + [deepcopy(layer) for _ in range(copies - 1) for layer in packed]
    return [PackedLinear(format, copy_of(source)) for _ in range(copies) for source in sources]


def gemm_step(weights: list[PackedLinear], m: int, dtype: torch.dtype,
              each: int = len(SHAPES)) -> Callable[[int], int]:
    """The i-th piece of the GEMM probe, M rows through the next `each` weights; returns its FLOPs.
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


def gemm_probes(format: str, device: str) -> Iterator[Probe]:
    """FLOP/s of X[M, k] @ W[k, n]: "gemm" for the matrices of layers, `SMALL_GEMM` for smaller
    ones, "head" for very wide ones, "peak" for the largest rate that we know how to ask for."""
    dtype, n = FLOATS[computes_in(format, device)], PEAK_ROWS[device]
    for kernel, rows, shapes, ring_bytes in (
            ("gemm", GEMM_ROWS, SHAPES, RING_BYTES),
            (SMALL_GEMM, SMALL_ROWS, SMALL_SHAPES, RING_BYTES // 2),
            ("head", HEAD_ROWS, HEAD_SHAPES, RING_BYTES),
            ("peak", [n], [(n, n)], 1)):
        weights = gemm_weights(format, device, ring_bytes, shapes)
        for m in rows:
            yield Probe(kernel, format, m, rate_of(gemm_step(weights, m, dtype, len(shapes))))


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMS norm of each row, in fp32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return wide.to(x.dtype) * weight


def elementwise_probes(dtype: str, device: str) -> Iterator[Probe]:
    """Bytes/s of norms, gates and residual sums, each counted as one fused operation.

    PyTorch makes several operations of each and moves more, so this is a rate of useful bytes, far
    below the bandwidth. As in a decoder, a product sweeps its weight through the caches after each.
    They run on M rows and on one: the start costs the same, and the difference is the bytes' price.
    """
    width, size = 1024, FLOATS[dtype].itemsize
    token = torch.randn(1, width, device=device)
    norm_weight = torch.ones(width, device=device, dtype=FLOATS[dtype])
    weights = [torch.ones(width, width, device=device) for _ in range(3 * MOST_LAYERS)]

    def on(rows: int, layers: int) -> Callable[[], float]:
        first = torch.randn(rows, width, device=device).to(FLOATS[dtype])
        gate_up = [torch.randn(rows, 2 * width, device=device).to(FLOATS[dtype]).chunk(2, dim=-1)
                   for _ in range(layers // 2)]

        @torch.inference_mode()
        def run() -> float:
            x, seconds = first, 0.0
            for i in range(layers):
                start = now()
                norm(x, norm_weight)                                    # read one, write one
                seconds += now() - start
                F.linear(token, weights[3 * i])
                start, (gate, up) = now(), gate_up[i % len(gate_up)]
                y = F.silu(gate) * up                                   # read two, write one
                seconds += now() - start
                F.linear(token, weights[3 * i + 1])
                start = now()
                x = x + y                                               # read two, write one
                seconds += now() - start
                F.linear(token, weights[3 * i + 2])
            return seconds
        return run

    def sample(m: int, layers: int) -> Callable[[], float]:
        many, one, bytes_per_row = on(m, layers), on(1, layers), (2 + 3 + 3) * width * size

        def once() -> float:
            start_s = one()
            return layers * bytes_per_row * (m - 1) / max(many() - start_s, 0.01 * start_s)
        return once

    # A GPU runs 256 rows as fast as one, and of thousands of rows a few layers will do.
    for m in (ELEMENTWISE_ROWS if device == "cpu" else [2**13]):
        some = max(2, min(MOST_LAYERS, 2**14 // m))
        yield Probe("elementwise", dtype, m, sample(m, some))


class Glue:
    """What stands between the matrix products of any decoder layer, here of width 512: norms, a
    rotation, a cache of 16 tokens, a gate. Its arrays are so small that its time is the price of
    starting its operations. Four `products` run where a layer has its own, for nothing."""

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


def launch_probe(format: str, device: str) -> Probe:
    """Mean seconds to start an operation of `Glue`, Python included, between products of `format`.

    The time of the products is taken off. What is left is more than the glue would cost in a
    loop of its own: a weight has gone through the caches, and the other threads have gone to sleep.
    """
    dtype = FLOATS[computes_in(format, device)]
    layers = [Glue(device, dtype) for _ in range(GLUE_LAYERS)]
    x, row = (torch.randn(1, 1, width, device=device).to(dtype) for width in (512, 1024))
    weights = gemm_weights(format, device, int(4 * GLUE_LAYERS * 2**20 * BYTES[format]),
                           [(1024, 1024)])
    products = [[partial(w, row[0]) for w in weights[i:i + 4]] for i in range(0, len(weights), 4)]

    @torch.inference_mode()
    def with_glue(of: Callable = lambda product: product) -> None:
        for layer, four in zip(layers, products, strict=True):
            layer(x, [of(product) for product in four])

    @torch.inference_mode()
    def products_alone() -> None:
        for four in products:
            for product in four:
                product()

    def sample() -> float:
        if device != "cpu":                             # to read the clock would be to wait
            return beyond(with_glue, products_alone) / ops
        seconds = 0.0

        def timed(product: Callable) -> Callable[[], None]:
            def run() -> None:
                nonlocal seconds
                start = now()
                product()
                seconds += now() - start
            return run
        with_glue()                                     # as in a model, its layers have just run
        start = now()
        with_glue(timed)
        return (now() - start - seconds) / ops

    ops = count_ops(with_glue) - count_ops(products_alone)
    return Probe("launches", format, 1, sample)
