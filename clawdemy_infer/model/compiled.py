"""Decode of one sequence as compiled code: a layer becomes one loop nest. And `compiled`, which chooses among all ways to compile.

It serves CPUs and models that `step_cpp` does not.

At batch 1 a step reads every weight once, for one row of activations, or for a few where a draft's guesses are checked. `loops` says so
in sums, and PyTorch's compiler makes of them, and of all the small operations between, a single piece of C++ on all cores. Two things are
gained: weights are streamed as fast as memory gives them, and some forty operations a layer lose their fixed cost.

Only a region is compiled, with the weights as its arguments: so the same code serves all layers, and is compiled once. Three pieces
make a step:

    enter      embedding -> norm, QKV, RoPE of the first layer
    between    attention of layer i, the rest of layer i -> norm, QKV, RoPE of layer i + 1                  L - 1 times
    leave      attention of the last layer, the rest of it -> norm, head

Over a `ContiguousCache` attention is a part of the loop nest too. Any other cache looks for itself, between two pieces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.cpp import compiler
from clawdemy_infer.kv_cache import ContiguousCache, Step
from clawdemy_infer.model.between import BetweenProducts
from clawdemy_infer.model.decoder import Decoder, Layer
from clawdemy_infer.model.formats import twin, with_weights
from clawdemy_infer.model.loops import Parts, after_attention, before_attention, norm, parts_of, product, stored, translated
from clawdemy_infer.model.rope import rope_tables
from clawdemy_infer.model.step_cpp import StepInCpp
from clawdemy_infer.timing import now, rates


def past_of(step: Step, window: int | None) -> list[Parts]:
    """The keys and values [K, P, H] before the new tokens of one sequence, by layer, where they lie plain in one piece and all
    new tokens see the same of them; else nothing.
    """
    end, M = step.past[0], step.new[0]
    begin = max(0, end + 1 - window) if window else 0
    if type(step.cache) is not ContiguousCache or end - begin < 2:                      # 1 token would be compiled as a constant
        return []
    if window and M > 1 and end + M > window:
        return []
    return list(zip(*(tensor[:, step.sequences[0], :, begin:end].unbind() for tensor in step.cache.tensors), strict=True))


def example_past(shape: ModelShape, dtype: torch.dtype) -> Parts:
    """Keys and values to compile for, of any length: as a cache's not as long as its capacity, and so long that the compiler finds it
    worth sharing among the cores."""
    keys, values = torch.zeros(2, shape.K, 512, shape.H, dtype=dtype)[:, :, :500]
    torch._dynamo.mark_dynamic(keys, 1)
    torch._dynamo.mark_dynamic(values, 1)
    return keys, values


def keep(step: Step, new: Sequence[Parts]) -> None:
    """Write the new keys and values, [rows, K, H] by layer, behind the past. Rows that only filled up are left out."""
    row, at, M = step.sequences[0], step.past[0], step.new[0]
    for tensor, of_layers in zip(step.cache.tensors, zip(*new, strict=True), strict=True):
        tensor[:, row, :, at:at + M] = torch.stack(of_layers, 2)[:M].permute(2, 1, 0, 3)                    # [L, K, M, H]


class CompiledStep:
    """A step of `model` for a few new tokens of one sequence, its matrices kept in `format`.

    There is code for each number of tokens in `rows`, and other numbers are filled up to the next of them.
    """

    @torch.inference_mode()
    def __init__(self, model: Decoder, format: str, dtype: torch.dtype, rows: Sequence[int]) -> None:
        start = now()
        self.shape, self.eps, self.dtype, self.rows = model.config.shape, model.config.norm_eps, dtype, sorted({1, *rows})
        self.embed, self.frequencies = model.embed.weight, model.frequencies
        self.into, self.out_of = zip(*(parts_of(layer, format) for layer in model.layers), strict=True)
        self.last = model.norm.weight.float(), stored(format, model.embed.weight if model.head is None else model.head.weight)
        self.code = {M: self._translated(M) for M in self.rows}
        self.compile_s = now() - start

    def _translated(self, M: int) -> tuple[Callable, dict[bool, tuple[Callable, Callable]]]:
        """The pieces for M rows: the first, and the others by whether attention is in them. One row may look back in any cache."""
        shape, eps, dtype = self.shape, self.eps, self.dtype

        def enter(x, rope, into):
            return before_attention(x, into, rope, shape.N, shape.K, eps, dtype)

        def between(x, seen, rope, out_of, into):
            x = after_attention(x, seen, out_of, eps)
            return x, *enter(x, rope, into)

        def leave(x, seen, out_of, last):
            x = after_attention(x, seen, out_of, eps)
            return x, product(last[1], norm(x, last[0], eps))

        x, rope = self.embed[:M].float(), rope_tables(self.frequencies, torch.zeros(M), torch.float32)
        q, k, v = (torch.zeros(M, heads, shape.H, dtype=dtype) for heads in (shape.N, shape.K, shape.K))
        ways = {True: (q, k, v, *example_past(shape, dtype))} | ({False: (q.flatten(1),)} if M == 1 else {})
        return translated(enter, x, rope, self.into[0]), {
            inside: (translated(between, x, seen, rope, self.out_of[0], self.into[-1]),
                     translated(leave, x, seen, self.out_of[-1], self.last)) for inside, seen in ways.items()}

    def takes(self, step: Step) -> bool:
        """Is there code for such a step?"""
        return len(step.new) == 1 and (step.new[0] == 1 or step.new[0] <= self.rows[-1] and bool(past_of(step, self.shape.window)))

    def __call__(self, tokens: torch.Tensor, step: Step, last_only: bool | Sequence[int] = True) -> tuple[torch.Tensor, torch.Tensor]:
        """For tokens [M], what the last layer leaves, [M, D], and the logits that are wanted of it."""
        M, past, new = len(tokens), past_of(step, self.shape.window), []
        filled = filled_up(M, self.rows)
        enter, ways = self.code[len(filled)]
        between, leave = ways[bool(past)]
        rope = rope_tables(self.frequencies, step.positions[filled], torch.float32)
        x = self.embed[tokens[filled]].float()                                              # [rows, D], in fp32 from here to the logits
        qkv = enter(x, rope, self.into[0])
        for index, out_of in enumerate(self.out_of):
            seen = (*qkv, *past[index]) if past else (step.attend(index, *qkv),)
            new.append(qkv[1:])
            if index + 1 < len(self.into):
                x, *qkv = between(x, seen, rope, out_of, self.into[index + 1])
        x, logits = leave(x, seen, out_of, self.last)
        if past:
            keep(step, new)
        wanted = M if not last_only else 1 if last_only is True else last_only[0]
        return x[:M], logits[M - wanted:M]


def filled_up(M: int, rows: Sequence[int]) -> torch.Tensor:
    """0 ... M-1, and M-1 again and again up to the next of `rows`: no other row looks at those."""
    return torch.arange(next(each for each in rows if each >= M)).clamp(max=M - 1)


def compiled(model: Decoder, weights: str | None = None, rows: Sequence[int] = (1,)) -> Decoder:
    """A copy of a float `model` that runs on compiled code, its matrices in the format `weights`, or as they are.

    Where the CPU and the model allow it, all steps over plain keys and values are a `StepInCpp`: a second or two of the compiler, once.
    Else a step of one sequence is a `CompiledStep`, for each of the numbers of new tokens in `rows`, over a `ContiguousCache` (a
    speculative target wants more than 1); that takes some twenty seconds on two cores, five more for each further number of rows, and
    less where PyTorch remembers it. What neither takes goes through `BetweenProducts`. Each has layouts of its own: so there are two
    copies of the matrices, in fp32 as in any other format. `compiled(...).compile_s` says how long it took. Raises ValueError for an
    unknown format, for rows that are no numbers of tokens, for a model on a GPU or with other layers than a `Layer`, and where there is
    no C++ compiler.
    """
    if model.device.type != "cpu":
        raise ValueError(f"compile: the model is on {model.device}; only a CPU's code is compiled here")
    if any(type(layer) is not Layer for layer in model.layers) or model.packed:
        raise ValueError("compile: a model of plain float layers is accepted, and this one has experts, latents or packed weights")
    if not all(type(each) is int and each >= 1 for each in rows):
        raise ValueError(f"rows={rows}: whole numbers, 1 or more, are accepted")
    compiler()
    made = twin(model) if weights is None else with_weights(model, weights)
    made.backend = "cpp"
    made.between = BetweenProducts(made)
    try:
        made.compiled_step = StepInCpp(made, model, rows)
    except NotImplementedError:                             # not such layers or sizes, or not on this CPU
        made.compiled_step = CompiledStep(model, weights or model.weights, made.dtype, rows)
    return made


@functools.cache
@torch.inference_mode()
def product_rate(format: str) -> float:
    """FLOP/s of compiled products of one row, with weights from memory: a wide and a tall matrix of no model's shape in turn, each in
    copies that no cache holds.

    Compiled and measured once a process.
    """
    kinds = []
    for N, K in ((2560, 640), (640, 2560)):
        first, x = stored(format, torch.randn(N, K, generator=torch.Generator().manual_seed(0))), torch.ones(1, K)
        copies = [tuple(part.clone() for part in first) for _ in range(2**26 // sum(part.nbytes for part in first))]
        kinds.append((translated(product, first, x), copies, x))

    def step(i: int) -> int:
        code, copies, x = kinds[i % 2]
        code(copies[i // 2 % len(copies)], x)
        return 2 * 2560 * 640
    return rates({"product": step}, sample_s=0.1)["product"]
