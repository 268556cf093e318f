"""Build task of lesson 01: what one decode step costs, counted from the keys of a config.json.

The library's counts stand on transformers and torch, not on themselves: `tests/test_arithmetic.py`
watches which weights a step of transformers touches, weighs its cache, and compares FLOPs with
torch's own counter.
"""

import math
from collections.abc import Callable

from clawdemy_infer.arithmetic import Attention, ModelShape, matmul
from clawdemy_infer.from_config import catalog, from_config
from clawdemy_infer.lesson.build import Task, Wrong
from clawdemy_infer.lesson.tables import si

Answer = Callable[[dict, int, int], tuple[float, float]]

NAMES = ("smollm2-135m", "qwen3-0.6b", "tinyllama-1.1b", "llama-3.2-1b", "qwen3-4b", "llama-2-7b",
         "llama-3-8b", "llama-2-13b", "yi-34b", "llama-3.1-70b")
"""Decoders of the Llama family, in which all layers see all tokens: heads shared and not, H equal
to D/N and not, LM heads tied to the embedding and not."""
RTOL = 0.01
"""Room for norms, biases, and a step's activations."""


def config_of(name: str) -> dict:
    """The keys of a model's config.json that a decode step's cost depends on. As in the files
    themselves, `head_dim` is absent where it is hidden_size / num_attention_heads."""
    shape = catalog.model(name)
    return {
        "model_type": "qwen3" if shape.qk_norm else "llama",
        "hidden_size": shape.D, "num_hidden_layers": shape.L, "num_attention_heads": shape.N,
        "num_key_value_heads": shape.K, "intermediate_size": shape.F, "vocab_size": shape.V,
        "tie_word_embeddings": shape.tied, "max_position_embeddings": shape.max_context,
    } | ({} if shape.H * shape.N == shape.D else {"head_dim": shape.H})


CONFIGS = {name: config_of(name) for name in NAMES}


def decode_step(config: dict, batch: int, context: int) -> tuple[float, float]:
    """FLOPs, and bytes in bf16, of a step that gives each of `batch` sequences one more token; a
    sequence then holds `context`. By the library's counts; activations never leave the chip."""
    shape = from_config(config)
    flops = shape.decode(batch, context).flops
    return flops, shape.streamed_bytes("bf16") + shape.kv_bytes(batch, context, "bf16")


def smoke(answer: Answer) -> tuple[float, float]:
    return answer(dict(CONFIGS["llama-3-8b"]), 1, 1000)


# ---- properties ----


def _count(answer: Answer, name: str, batch: int = 1, context: int = 1) -> tuple[float, float]:
    got = answer(dict(CONFIGS[name]), batch, context)
    try:
        flops, moved = map(float, got)
    except (TypeError, ValueError):
        raise Wrong(f"It returned {got!r}; a pair is asked for: flops, bytes.") from None
    if not (0 < flops < math.inf and 0 < moved < math.inf):
        raise Wrong(f"For {_called(name)}, batch {batch}, context {context:,}, it returned "
                    f"{flops:g} FLOPs and {moved:g} bytes; both are above 0.")
    return flops, moved


def _called(name: str) -> str:
    return catalog.model(name).name


def _near(value: float, expected: float) -> bool:
    return abs(value - expected) <= RTOL * abs(expected)


def _grown(answer: Answer, name: str, batch: int = 1) -> tuple[float, float]:
    """FLOPs and bytes by which a step grows with each token of context."""
    short, long = (_count(answer, name, batch, context) for context in (1000, 2000))
    return (long[0] - short[0]) / 1000, (long[1] - short[1]) / 1000


def _recognise(value: float, right: float, said: str, unit: str, wrong: dict[float, str]) -> None:
    """Wrong, unless `value` is `right`: with the words of the wrong answer that it is, if any."""
    if not _near(value, right):
        why = next((words for known, words in wrong.items() if _near(value, known)), "")
        raise Wrong(f"{said}: {si(right, unit)}; yours: {si(value, unit)}. {why}".rstrip())


def it_returns_flops_and_bytes(answer: Answer) -> None:
    _count(answer, "llama-3-8b")


def flops_come_first_and_bytes_second(answer: Answer) -> None:
    """At a batch of 1,024 the FLOPs are hundreds of times the bytes."""
    flops, moved = _count(answer, "llama-3-8b", batch=1024)
    if moved > 100 * flops:
        raise Wrong("(flops, bytes) are swapped: for Llama-3-8B, batch 1,024, one token of "
                    f"context, it returned {flops:.3g} as FLOPs and {moved:.3g} as bytes.")


def weights_are_read_once_whatever_the_batch(answer: Answer) -> None:
    one, two = (_count(answer, "llama-3-8b", batch)[1] for batch in (1, 2))
    if two > 1.01 * one:
        raise Wrong(f"Llama-3-8B, one token of context: from batch 1 to 2 your bytes grow "
                    f"{two / one:.2f} times. All sequences share one reading of the weights.")


def the_cache_grows_with_batch_and_context(answer: Answer) -> None:
    _, one = _grown(answer, "llama-3-8b")
    _, three = _grown(answer, "llama-3-8b", batch=3)
    if one <= 0:
        raise Wrong("Llama-3-8B: from 1,000 to 2,000 tokens of context your bytes do not grow. A "
                    "step reads the keys and values of all of them.")
    if not _near(three, 3 * one):
        raise Wrong(f"Llama-3-8B: with three sequences in place of one, a token of context costs "
                    f"{three / one:.2f} times the bytes. It costs 3 times: each sequence reads its "
                    "own cache.")


def each_row_meets_every_weight_for_two_flops(answer: Answer) -> None:
    shape, (flops, _) = catalog.model("llama-3-8b"), _count(answer, "llama-3-8b")
    head, layers = shape.V * shape.D, shape.matrix_parameters()
    _recognise(flops, 2 * (layers + head), "Llama-3-8B, one row: 2 FLOPs for each of "
               f"{(layers + head) / 1e9:.2f}e9 weights", "FLOP", {
                   layers + head: "You count one FLOP for a multiply and an add.",
                   2 * layers: _missing(answer),
                   2 * (layers + 2 * head): "The embedding computes nothing: it looks up a row.",
                   2 * (layers - shape.L * shape.D * shape.F + head): "The MLP has three matrices: "
                                                                      "gate, up and down.",
                   2 * (layers + 2 * shape.L * shape.D * (shape.N - shape.K) * shape.H + head):
                       "The matrices of K and V are D x K·H: they have the KV heads alone."})
    for_four, _ = _count(answer, "llama-3-8b", batch=4)
    if not _near(for_four, 4 * flops):
        raise Wrong(f"Llama-3-8B: from batch 1 to 4 your FLOPs grow {for_four / flops:.2f} times, "
                    "not 4 times. Every row meets every weight.")


def _missing(answer: Answer) -> str:
    """Which of two: in Llama-3-8B the LM head and all output matrices are nearly as large, in
    Llama-2-7B they are not."""
    other = catalog.model("llama-2-7b")
    flops, _ = _count(answer, "llama-2-7b")
    outputs = other.L * other.N * other.H * other.D
    if _near(flops, 2 * (other.matrix_parameters() + other.V * other.D - outputs)):
        return "The output matrix of attention is missing: N·H x D weights in each layer."
    return "The LM head is missing: D x V weights meet each row too."


def the_cache_holds_kv_heads(answer: Answer) -> None:
    shape, (_, grown) = catalog.model("llama-3-8b"), _grown(answer, "llama-3-8b")
    right = 4 * shape.L * shape.K * shape.H
    _recognise(grown, right, "Llama-3-8B, bytes of cache for each token of context", "B", {
        right * shape.N / shape.K: f"That is N = {shape.N} heads (or D numbers); the cache holds "
                                   f"K = {shape.K}.",
        right / 2: "Keys and values are two, and each number has 2 bytes.",
        right * 2: "A number in bf16 has 2 bytes.",
        right / shape.L: f"That is one layer; there are {shape.L}."})


def every_query_head_scores_the_context(answer: Answer) -> None:
    shape, (grown, _) = catalog.model("llama-3-8b"), _grown(answer, "llama-3-8b")
    right = 4 * shape.L * shape.N * shape.H
    if not grown:
        raise Wrong("Llama-3-8B: your FLOPs do not grow with the context. Attention takes a dot "
                    "product with every cached key, and a weighted sum of every value.")
    _recognise(grown, right, "Llama-3-8B, FLOPs of attention for each token of context", "FLOP", {
        right * shape.K / shape.N: f"That is K = {shape.K} heads; all N = {shape.N} query heads "
                                   "compute.",
        right / 2: "Scores and weighted sum: two products, 2 FLOPs for each number of a head."})


def head_dim_is_read_where_it_is_stated(answer: Answer) -> None:
    shape, (_, grown) = catalog.model("qwen3-4b"), _grown(answer, "qwen3-4b")
    right = 4 * shape.L * shape.K * shape.H
    _recognise(grown, right, "Qwen3-4B, bytes of cache for each token of context", "B", {
        right * shape.D / shape.N / shape.H: f"That is D/N = {shape.D // shape.N} numbers a head; "
                                             f"this config states head_dim = {shape.H}."})
    right = 2 * (shape.matrix_parameters() + shape.V * shape.D)
    flops, _ = _count(answer, "qwen3-4b")
    _recognise(flops, right, "Qwen3-4B, FLOPs of one row", "FLOP", {
        flops if flops < right else 0: "Q and the output matrix are D x N·H, and N·H is not D."})


def the_head_is_read_and_the_embedding_is_not(answer: Answer) -> None:
    for name in ("llama-3-8b", "llama-3.2-1b"):
        shape, (_, moved) = catalog.model(name), _count(answer, name)
        head, layers = 2 * shape.V * shape.D, 2 * shape.matrix_parameters()
        tied = "tied: the embedding table is the LM head" if shape.tied else "not tied"
        _recognise(moved, layers + head, f"{shape.name} ({tied}), bytes at one token of context",
                   "B", {layers: "The LM head is missing: every step reads D x V numbers "
                                 "for it.",
                         layers + 2 * head: "The embedding table is not read: a step looks up one "
                                            "row of it. Only the LM head is read whole.",
                         (layers + head) / 2: "A number in bf16 has 2 bytes.",
                         2 * (layers + head): "A number in bf16 has 2 bytes."})


def ten_real_configs_within_one_percent(answer: Answer) -> None:
    for name in NAMES:
        for batch, context in ((1, 4096), (8, 32_768)):
            ours = decode_step(CONFIGS[name], batch, context)
            for got, right, unit in zip(_count(answer, name, batch, context), ours, ("FLOP", "B"),
                                        strict=True):
                _recognise(got, right, f"{_called(name)}, batch {batch}, context {context:,}",
                           unit, {})


TASK = Task(
    name="decode_step",
    student="my_decode_step",
    properties=(
        it_returns_flops_and_bytes,
        flops_come_first_and_bytes_second,
        weights_are_read_once_whatever_the_batch,
        the_cache_grows_with_batch_and_context,
        each_row_meets_every_weight_for_two_flops,
        the_cache_holds_kv_heads,
        every_query_head_scores_the_context,
        head_dim_is_read_where_it_is_stated,
        the_head_is_read_and_the_embedding_is_not,
        ten_real_configs_within_one_percent,
    ),
    smoke=smoke,
    library=decode_step,
    where="clawdemy_infer/arithmetic/shape.py",
    shown=(decode_step, "class ModelShape:", ModelShape.streamed_bytes, ModelShape.kv_bytes,
           "class Attention:", Attention.kept, Attention.of_sequences, matmul),
)
