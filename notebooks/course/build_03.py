"""Lesson 03's build task: grouped-query attention of one new token, which reads each KV head once
for its group. And two ways that read more, whose price the lesson measures."""

from collections import Counter
from collections.abc import Callable
from math import exp, sqrt

import torch
from hypothesis import strategies as st

from clawdemy_course.properties import for_all
from clawdemy_infer.attention import attend
from clawdemy_infer.fast.launches import OpCounter
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.lesson.build import Task, Wrong

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""q [N, H] of one new token, keys and values [K, S, H] of S tokens -> [N, H]."""

TOLERANCE = 1e-4                                        # fp32 beside float64


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The library's: N/K query heads are rows of one product with their KV head."""
    return attend(q[None], k[None], v[None]).view(q.shape)


def head_by_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Each query head reads its KV head for itself: N/K times in all. Nothing is copied."""
    G = len(q) // len(k)
    return torch.cat([grouped(q[n:n + 1], k[n // G:n // G + 1], v[n // G:n // G + 1])
                      for n in range(len(q))])


def copied_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Each KV head is copied for its query heads, then multi-head attention: read 1, write N/K,
    read N/K."""
    G = len(q) // len(k)
    return grouped(q, k.repeat_interleave(G, dim=0), v.repeat_interleave(G, dim=0))


# ---- a learner's attention beside float64, number by number ----


def of_one_head(query: list[float], keys: list[list[float]], values: list[list[float]],
                divisor: float) -> list[float]:
    """softmax(q kᵀ / divisor) v of one query (Vaswani et al. 2017, equation 1)."""
    scores = [sum(a * b for a, b in zip(query, key, strict=True)) / divisor for key in keys]
    weights = [exp(score - max(scores)) for score in scores]
    return [sum(w * x for w, x in zip(weights, column, strict=True)) / sum(weights)
            for column in zip(*values, strict=True)]


def tensors(N: int, K: int, S: int, H: int, scale: float = 1.0,
            seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [N, H], keys and values [K, S, H]; `scale` makes the scores larger."""
    made = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=made) for shape in ((N, H), (K, S, H), (K, S, H)))
    return q * scale, k, v


def compare(answer: Attention, N: int, K: int, S: int = 3, H: int = 4, scale: float = 1.0,
            seed: int = 0) -> None:
    """`Wrong` unless each query head gets what its own KV head gives in float64."""
    q, k, v = tensors(N, K, S, H, scale, seed)
    sizes = f"N = {N}, K = {K}, S = {S}, H = {H}"
    got = answer(q.clone(), k.clone(), v.clone())
    if not isinstance(got, torch.Tensor):
        raise Wrong(f"With {sizes} it returned {got!r:.40}; a tensor [N, H] is asked for.")
    if got.shape != q.shape:
        raise Wrong(f"With {sizes} it returned the shape {list(got.shape)}; [N, H] = "
                    f"{list(q.shape)} is asked for.")
    if got.dtype != q.dtype:
        raise Wrong(f"With {sizes} it returned {got.dtype}; {q.dtype}, as q, is asked for.")
    G, (rows, keys, values) = N // K, (x.tolist() for x in (q, k, v))
    for n, row in enumerate(rows):
        right = of_one_head(row, keys[n // G], values[n // G], sqrt(H))
        if near(got[n], right):
            continue
        found = ", ".join(f"{x:.3g}" for x in got[n].tolist()[:3])
        expected = ", ".join(f"{x:.3g}" for x in right[:3])
        raise Wrong(f"With {sizes}, query head {n} begins with {found}; expected {expected}."
                    + known(got[n], row, keys, values, n // G))


def known(got: torch.Tensor, row: list[float], keys: list, values: list, own: int) -> str:
    """What a wrong head is, if it is a slip that people make."""
    H = len(row)
    for divisor, said in ((1.0, "Those are the scores not divided by sqrt(H)."),
                          (float(H), "Those are the scores divided by H, not by sqrt(H).")):
        if near(got, of_one_head(row, keys[own], values[own], divisor)):
            return f" {said}"
    if near(got, of_one_head(row, keys[own], keys[own], sqrt(H))):
        return " That is the weighted sum of keys, not of values."
    for other in range(len(keys)):
        if other != own and near(got, of_one_head(row, keys[other], values[other], sqrt(H))):
            return f" That is what KV head {other} gives; this query head reads KV head {own}."
    return ""


def near(got: torch.Tensor, right: list[float]) -> bool:
    right = torch.tensor(right)
    return bool(((got - right).abs() <= TOLERANCE * (1 + right.abs())).all())


class Reads(OpCounter):
    """Counts blocks [S, H], keys or values of one head, that PyTorch's operations are given, or a
    copy of them; `block` is S * H, of primes. Views read nothing. What a kernel does with what it
    is given, nothing here can see (lesson 10)."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block, self.by_op = block, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [each.alias_info for each in func._schema.returns]
        is_view = any(alias and not alias.is_write for alias in aliases) or "view" in str(func)
        if not is_view:
            given = [x for each in args for x in (each if isinstance(each, list | tuple)
                                                  else [each]) if isinstance(x, torch.Tensor)]
            blocks = sum(x.numel() // self.block for x in given if x.numel() % self.block == 0)
            self.by_op[func._schema.name.partition("::")[2].strip("_")] += blocks
        return func(*args, **(kwargs or {}))


# ---- what grouped-query attention must do ----


def one_head_is_a_weighted_sum_of_its_values(answer: Attention) -> None:
    compare(answer, 1, 1, S=1)
    compare(answer, 1, 1)


def with_K_equal_to_N_it_is_multi_head_attention(answer: Attention) -> None:
    compare(answer, 3, 3)


def with_one_KV_head_it_is_multi_query_attention(answer: Attention) -> None:
    compare(answer, 3, 1)


def neighbouring_query_heads_share_a_KV_head(answer: Attention) -> None:
    compare(answer, 4, 2)
    compare(answer, 6, 2)


def large_scores_do_not_overflow(answer: Attention) -> None:
    compare(answer, 2, 1, scale=300.0)


@for_all(K=st.integers(1, 3), G=st.integers(1, 4), S=st.integers(1, 6), H=st.integers(1, 5))
def any_sizes_agree_with_float64(answer: Attention, K: int, G: int, S: int, H: int) -> None:
    compare(answer, K * G, K, S, H, seed=S)


def tensors_of_the_caller_stay_as_they_were(answer: Attention) -> None:
    given = tensors(4, 2, 3, 4)
    kept = [each.clone() for each in given]
    answer(*given)
    for name, now, before in zip("qkv", given, kept, strict=True):
        if not torch.equal(now, before):
            raise Wrong(f"It writes into {name}, which belongs to the cache or to the decoder.")


def each_KV_head_is_read_once_for_its_group(answer: Attention) -> None:
    N, K, S, H = 6, 2, 53, 11
    with Reads(S * H) as reads:
        answer(*tensors(N, K, S, H))
    read, needed = sum(reads.by_op.values()), 2 * K
    if read > needed:
        ops = ", ".join(f"{name} {count}" for name, count in reads.by_op.items() if count)
        raise Wrong(f"With N = {N}, K = {K}, the operations read {read} heads of keys or values "
                    f"({ops}) where {needed} are kept. The {N // K} query heads of a group are "
                    "rows of one product with their KV head.")


def _smoke(answer: Attention) -> list:
    return [answer(*tensors(2, 1, 2, 2))]


# ---- what a decoder asks of it ----


class OneSequence(ContiguousCache):
    """A cache of one sequence whose new token attends by a function, an `Attention`; a prompt
    attends by the library's."""

    attention: Attention = staticmethod(grouped)

    def attend(self, layer, part, q, k, v):
        if len(q) > 1:
            return super().attend(layer, part, q, k, v)
        self.write(layer, part, k, v)
        keys, values = self.read(layer, part)
        return self.attention(q[0], keys[0], values[0]).reshape(1, -1)


def attending_by(attention: Attention) -> type[OneSequence]:
    """A cache for a decoder in whose steps one new token attends by `attention`."""
    return type("Attending", (OneSequence,), {"attention": staticmethod(attention)})


TASK = Task(
    name="grouped_query_attention", student="my_gqa",
    properties=(
        one_head_is_a_weighted_sum_of_its_values,
        with_K_equal_to_N_it_is_multi_head_attention,
        with_one_KV_head_it_is_multi_query_attention,
        neighbouring_query_heads_share_a_KV_head,
        large_scores_do_not_overflow,
        any_sizes_agree_with_float64,
        tensors_of_the_caller_stay_as_they_were,
        each_KV_head_is_read_once_for_its_group,
    ),
    smoke=_smoke, library=grouped, where="clawdemy_infer/attention.py", shown=(grouped, attend))
