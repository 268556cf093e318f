"""What the parts of a round should cost, from rates that were measured of none of them.

    layer by layer    the roofline: each operation's work, and what it costs to start it; operations are counted, not timed
    in C++            the same, where nothing but products costs more than its bytes, and few operations are left; products at what the
                      probe of the calibration reaches at this moment
    compiled          products at the rate of compiled products of so many rows, and all else that a step does as on a narrow twin: a
                      model of as many layers with next to nothing in them

Rows that only fill a compiled step up cost what the others do. To choose a token is to go over all of the vocabulary, a few times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from clawdemy_infer.arithmetic import ModelShape, Work
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.linear import FLOATS, Codes, computes_in, packable
from clawdemy_infer.linear.cpp_strips import in_strips
from clawdemy_infer.model import Decoder, ModelConfig, Sampling, draw, probabilities
from clawdemy_infer.model.compiled import CompiledStep
from clawdemy_infer.model.loops import Parts, product, stored, translated
from clawdemy_infer.model.step_cpp import StepInCpp
from clawdemy_infer.probes import RING, SHAPES, gemm_step
from clawdemy_infer.roofline import Curve, Machine, interpolate
from clawdemy_infer.speculative import theory
from clawdemy_infer.speculative.compare import Costs, parts
from clawdemy_infer.speculative.drafts import DTYPES, Draft
from clawdemy_infer.speculative.trained import FeatureLayer
from clawdemy_infer.speculative.verification import verify_rows
from clawdemy_infer.timing import alternate, count_ops, rates

Kind = tuple[str, int]
"""A format of weights, and a number of rows that there is code for."""
NUMBERS, COPIES = 2**22, 32
"""Numbers in a matrix of the probe, about, and such matrices: together as many as a small model has, of which a cache holds next to
nothing."""
PASSES = {True: 4, False: 40}
"""Bytes for each number of the logits, greedily and else: a search for the largest reads them. A distribution takes four passes, of
which three write too (largest; difference; division; softmax); its running sum writes 8 bytes for 4."""


def predict_costs(machine: Machine, model: Decoder, drafts: Mapping[str, Draft], context: int, rows: Sequence[int] = (1, 2, 5, 9),
                  batch: int = 1, sampling: Sampling | None = None) -> Costs:
    """Seconds of the parts of a round, as `compare.measure_costs` times them."""
    sampling = sampling or Sampling()
    shape, kept = model.config.shape, DTYPES[model.dtype]
    found: dict[str | int, float] = {}
    made = parts(model, drafts, context, rows, batch, sampling)
    readers = {name: drafts[name].model if isinstance(name, str) else model for name in made}
    code = {name: code_of(reader, batch * (1 if isinstance(name, str) else name)) for name, reader in readers.items()}
    kinds = tuple(sorted({kind for kind in code.values() if kind}))
    known = compiled_rates(kinds, shape.D, shape.F) if kinds else {}
    formats = {reader.weights for reader in readers.values() if in_cpp(reader)}
    fused = at_this_moment(machine, formats, sorted({batch * each for each in (1, *rows)}))
    for name, run in made.items():
        if isinstance(name, int):
            work = theory.verification_work(shape, batch, name, context + name, model.weights, kept, kept)
        else:
            work = drafts[name].step_work(batch, context + 1)
        if not code[name]:
            if in_cpp(readers[name]):
                passes = choosing(shape, 1 if isinstance(name, str) else name, sampling)
                found[name] = fused.time(work, count_ops(run)).seconds + machine.operation_s(passes, passes.bytes)
            else:
                calls = model.between.calls if isinstance(name, int) and model.between else 0
                found[name] = machine.time(work, count_ops(run) + calls).seconds
            continue
        seconds = compiled_s(machine, work, code[name], known)
        besides = besides_products(shape.L, tuple(sorted({M for _, M in kinds} | {1})))
        if isinstance(name, str) and isinstance(drafts[name].model, FeatureLayer):
            seconds += besides[1] / (shape.L + 1) + machine.fixed_s_per_op * count_ops(run)             # one call, and what is around it
        else:
            looked_at = 1 if isinstance(name, str) else name
            seconds += besides[code[name][1]] + choosing_s(machine, shape, looked_at, isinstance(name, str), sampling)
        found[name] = seconds
    return Costs.of(found)


def code_of(model: Decoder | FeatureLayer, rows: int) -> Kind | None:
    """The compiled code that `model` has for so many rows of one sequence; None if it has none."""
    code = model.compiled if isinstance(model, FeatureLayer) else model.compiled_step
    if not code or isinstance(code, StepInCpp) or rows > code.rows[-1]:
        return None
    return DTYPES[model.dtype] if isinstance(model, FeatureLayer) else model.weights, next(each for each in code.rows if each >= rows)


def compiled_s(machine: Machine, work: Work, kind: Kind, found: Mapping[tuple[str, int, bool], float]) -> float:
    """Seconds of what `work` has to compute and read, by compiled code of this `kind`."""
    format, filled = kind
    seconds = 0.0
    for op in work.operations():
        rate = found.get((op.weights, filled, op.name == "down")) if op.weights == format else None
        if rate:
            seconds += op.flops / op.rows * filled / rate
        elif op.weights:
            seconds += machine.operation_s(op, work.bytes)              # a head of its own format
        elif op.kernel == "attention":
            seconds += op.bytes / machine.bandwidth_at()
    return seconds


def in_cpp(model: Decoder | FeatureLayer) -> bool:
    return isinstance(getattr(model, "compiled_step", None), StepInCpp)


def at_this_moment(machine: Machine, formats: Iterable[str], rows: Sequence[int]) -> Machine:
    """`machine` where only products cost more than their bytes, and these at what the probe of the calibration reaches now with weights
    in these formats and so many rows: memory may be twice as fast a minute later."""
    fused = machine.with_only_products()
    if not formats:
        return fused
    steps = {(format, m): gemm_step(probe(format), m, FLOATS[computes_in(format, "cpu")]) for format in formats for m in rows}
    now = rates(steps, sample_s=0.05)

    def curve(known: Curve, format: str) -> Curve:
        usual = machine.rates["gemm"][format]
        return tuple((m, interpolate(known, m) * now[format, m] / interpolate(usual, m)) for m in rows)
    return replace(fused, rates={kernel: {format: curve(of[format], format) for format in formats if format in of}
                                 for kernel, of in fused.rates.items()})


class InCpp:
    """A matrix by the product that `StepInCpp` multiplies with, for `gemm_step`."""

    def __init__(self, format: str, source: torch.Tensor | Codes) -> None:
        self.product = in_strips(format, source)                    # packs a copy
        (self.out_features, self.in_features), self.device = (source.codes if isinstance(source, Codes) else source).shape, "cpu"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)


@functools.cache
def probe(format: str) -> list[InCpp]:
    """The matrices of the calibration's probe, by that product, whatever was chosen for this format."""
    sources = [packable(format, torch.randn(n, k, generator=torch.Generator().manual_seed(0))) for k, n in SHAPES]
    return [InCpp(format, source) for _ in range(RING // sum(k * n for k, n in SHAPES)) for source in sources]


def choosing(shape: ModelShape, rows: int, sampling: Sampling) -> Work:
    """The passes over the logits of so many rows in which a token is chosen."""
    return Work(0, rows * shape.V * PASSES[sampling.temperature == 0], "choosing", kernel="elementwise", rows=rows * shape.V / shape.D)


def choosing_s(machine: Machine, shape: ModelShape, rows: int, drafts: bool, sampling: Sampling) -> float:
    """Seconds of choosing from the logits of so many rows: a token to draft, or what stands of a draft."""
    logits, generator = torch.zeros(rows, shape.V), Sampling(seed=0).generator()

    def choose() -> None:
        if not drafts:
            verify_rows(logits, [[1] * (rows - 1)], None, sampling, generator)
        elif sampling.temperature:
            draw(probabilities(logits, sampling), generator)
        else:
            logits.argmax(-1)
    passes = choosing(shape, rows, sampling)
    return machine.operation_s(passes, passes.bytes) + machine.fixed_s_per_op * count_ops(choose)


@torch.inference_mode()
def compiled_rates(kinds: tuple[Kind, ...], D: int, F: int) -> dict[tuple[str, int, bool], float]:
    """FLOP/s of compiled products by format, number of rows, and whether the matrix has F inputs or D: weights from memory, without
    what a call costs. All are timed in turn, and anew each time: memory may be twice as fast a minute later.
    """
    made = {"call": repeated(code_for("fp32", 1, 16, 16), [stored("fp32", torch.ones(16, 16))], torch.ones(1, 16))}
    for format in {format for format, _ in kinds}:
        for tall, K in ((False, D), (True, F)):
            first = stored(format, torch.randn(NUMBERS // K, K))
            copies = [tuple(part.clone() for part in first) for _ in range(COPIES)]
            for M in [M for each, M in kinds if each == format]:
                made[format, M, tall] = repeated(code_for(format, M, NUMBERS // K, K), copies, torch.ones(M, K))
    seconds = {name: 1 / rate for name, rate in rates(made, sample_s=0.05).items()}
    return {(format, M, tall): 2 * M * (NUMBERS // K) * K / (seconds[format, M, tall] - seconds["call"])
            for format, M in kinds for tall, K in ((False, D), (True, F))}


def repeated(code: Callable, copies: Sequence[Parts], x: torch.Tensor) -> Callable[[int], int]:
    """The i-th time the product with the i-th of `copies`, in a circle; 1, for one product."""
    def step(i: int) -> int:
        code(copies[i % len(copies)], x)
        return 1
    return step


@functools.cache
@torch.inference_mode()
def code_for(format: str, M: int, N: int, K: int) -> Callable:
    """The compiled product of M rows by a matrix [N, K]."""
    return translated(product, stored(format, torch.ones(N, K)), torch.ones(M, K))


@functools.cache
@torch.inference_mode()
def besides_products(layers: int, rows: tuple[int, ...]) -> dict[int, float]:
    """Seconds of a compiled step of so many rows and layers that have next to no weights."""
    narrow = Decoder(ModelConfig(ModelShape(name="narrow", L=layers, D=32, N=2, K=1, H=16, F=32, V=32, tied=True))).eval()
    narrow.compiled_step = CompiledStep(narrow, "fp32", torch.float32, rows)

    def step(M: int):
        cache = ContiguousCache.for_model(narrow, 1, 64 + M)
        narrow.step({0: [1] * 64}, cache)

        def run() -> None:
            cache.truncate(64)
            narrow.step({0: [1] * M}, cache, last_only=False)
        return run
    return {M: timing.median for M, timing in alternate({M: step(M) for M in rows}, repeats=25, warmup=3).items()}
