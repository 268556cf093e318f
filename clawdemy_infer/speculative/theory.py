"""What speculation should gain: expected tokens a round over what a round costs. Standard library and the roofline; nothing runs.

    α   chance that a drafted token stands          γ   drafted tokens a round
    c   a draft step, in steps of the target        v   a verification of γ + 1 tokens, in steps of the target

Leviathan et al. 2023 take v = 1: reading γ + 1 tokens costs what reading one does. While a step is bound by streaming the
weights that is nearly so. A CPU leaves that region at a handful of rows, and a large batch leaves it on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod

from clawdemy_infer.arithmetic import ModelShape, Work
from clawdemy_infer.arithmetic.work import Format, total
from clawdemy_infer.roofline import Machine
from clawdemy_infer.speculative.rounds import Round


def expected_tokens(alpha: float | Sequence[float], gamma: int) -> float:
    """Tokens that a round brings on average: (1 - α^(γ+1)) / (1 - α) (Leviathan et al. 2023, equation 1).

    With an α for each position: 1 + α1 + α1 α2 + ..., since a token stands only where all before it did.
    """
    if gamma < 0:
        raise ValueError(f"gamma={gamma}: 0 or more is accepted")
    alphas = [alpha] * gamma if isinstance(alpha, int | float) else list(alpha[:gamma])
    if len(alphas) < gamma or not all(0 <= a <= 1 for a in alphas):
        raise ValueError(f"alpha={alpha}: chances from 0 to 1, one for each of gamma={gamma} positions, are accepted")
    return 1.0 + sum(prod(alphas[:i + 1]) for i in range(gamma))


def speedup(alpha: float | Sequence[float], gamma: int, c: float, v: float = 1.0) -> float:
    """Plain time over speculative time: expected tokens / (γ c + v). With v = 1 theorem 3.8 of the paper."""
    return expected_tokens(alpha, gamma) / (gamma * c + v)


def best_gamma(alpha: float | Sequence[float], c: float, v: Callable[[int], float], most: int = 16) -> int:
    """The γ from 0 to `most` with the largest speed-up, where reading m tokens at once costs v(m). 0: better not to speculate."""
    if not isinstance(alpha, int | float):
        most = min(most, len(alpha))
    return max(range(most + 1), key=lambda gamma: speedup(alpha, gamma, c, v(gamma + 1)))


def verification_work(shape: ModelShape, batch: int, rows: int, context: int, weights: Format = "fp32", kv: Format = "fp32",
                      activations: str = "fp32") -> Work:
    """A forward pass over `rows` tokens of each sequence that wants the logits of all of them: a prefill wants only the last."""
    step = shape.step(batch, rows, context, weights=weights, kv=kv, activations=activations)
    return total("verification", [*step.parts[:-1], shape.head(batch * rows, weights, activations)])


def verification_cost(machine: Machine, shape: ModelShape, rows: int, context: int, batch: int = 1, ops: int = 0, one_ops: int = 0,
                      **formats: Format) -> float:
    """v(rows) on `machine`: the time of a verification over that of a plain step, which dispatch `ops` and `one_ops` operations."""
    reading = machine.time(verification_work(shape, batch, rows, context, **formats), ops)
    return reading.seconds / machine.time(verification_work(shape, batch, 1, context, **formats), one_ops).seconds


# ---- from the rounds that were played ----


def acceptance(rounds: Iterable[Round]) -> list[float]:
    """α by position: of the drafted tokens at a position whose forerunners all stood, the share that did too."""
    reached: list[int] = []
    stood: list[int] = []
    for drafted, accepted, _ in rounds:
        reached += [0] * (len(drafted) - len(reached))
        stood += [0] * (len(drafted) - len(stood))
        for i in range(min(accepted + 1, len(drafted))):
            reached[i] += 1
            stood[i] += i < accepted
    return [s / r for s, r in zip(stood, reached, strict=True) if r]


def mean_acceptance(rounds: Iterable[Round]) -> float:
    """α as one number: of all drafted tokens that were looked at, the share that stood. NaN where none was drafted."""
    looked_at = stood = 0
    for drafted, accepted, _ in rounds:
        looked_at += min(accepted + 1, len(drafted))
        stood += accepted
    return stood / looked_at if looked_at else float("nan")


def speedup_of(rounds: Iterable[Round], c: float, v: Callable[[int], float]) -> float:
    """What these rounds should have gained: their tokens over their cost, each with as many drafted tokens as it had.

    It knows how many tokens stood, and nothing of how long it took: the times are `c` and `v`, predicted or measured elsewhere.
    """
    tokens = cost = 0.0
    for drafted, accepted, _ in rounds:
        tokens += accepted + 1
        cost += len(drafted) * c + v(len(drafted) + 1)
    return tokens / cost if cost else 1.0
