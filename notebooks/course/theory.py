"""What speculation should gain: expected tokens over what a round costs, in plain steps:

    α   acceptance rate: chance that a draft token is accepted      c   a draft step
    γ   draft tokens per round                                      v   a verification of γ + 1

Leviathan et al. 2023 take v = 1. While a step is bound by streaming the weights, reading γ + 1
tokens costs nearly what reading one does; a CPU leaves that region at a handful of rows, and a
large batch leaves it on any machine.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import prod

from clawdemy_infer.arithmetic import Format, ModelShape
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.speculative.rounds import Round


def expected_tokens(alpha: float | Sequence[float], gamma: int) -> float:
    """Tokens that a round brings on average: (1 - α^(γ+1)) / (1 - α) (Leviathan et al. 2023,
    equation 1). With an α for each position: 1 + α1 + α1 α2 + ..., since a token is accepted only
    where all before it are.

    >>> expected_tokens(0.5, gamma=2)                       # 1 + 1/2 + 1/4
    1.75
    """
    if gamma < 0:
        raise ValueError(f"gamma={gamma}: 0 or more is accepted")
    alphas = [alpha] * gamma if isinstance(alpha, int | float) else list(alpha[:gamma])
    if len(alphas) < gamma or not all(0 <= a <= 1 for a in alphas):
        raise ValueError(f"alpha={alpha}: chances from 0 to 1, one for each of gamma={gamma} "
                         "positions, are accepted")
    return 1.0 + sum(prod(alphas[:i + 1]) for i in range(gamma))


def speedup(alpha: float | Sequence[float], gamma: int, c: float, v: float = 1.0) -> float:
    """Plain time over speculative time: expected tokens / (γ c + v) (theorem 3.8, where v = 1)."""
    return expected_tokens(alpha, gamma) / (gamma * c + v)


def verification_cost(machine: Machine, shape: ModelShape, rows: int, context: int, batch: int = 1,
                      ops: int = 0, **formats: Format) -> float:
    """v(rows) on `machine`: a step that gives the logits of `rows` tokens of each sequence, over a
    plain one, both of `ops` operations."""
    many, one = (machine.time(shape.step(batch, new, context, new, **formats), ops).seconds
                 for new in (rows, 1))
    return many / one


def acceptance_by_position(rounds: Iterable[Round]) -> list[float]:
    """α by position: of the tokens whose forerunners were all accepted, the share that was too."""
    reached, passed = Counter(), Counter()
    for drafted, accepted, _ in rounds:
        reached.update(range(min(accepted + 1, len(drafted))))
        passed.update(range(accepted))
    return [passed[i] / reached[i] for i in sorted(reached)]


def acceptance_rate(rounds: Iterable[Round]) -> float:
    """α as one number: the accepted share of the draft tokens looked at. NaN where none was."""
    rounds = list(rounds)
    looked_at = sum(min(accepted + 1, len(drafted)) for drafted, accepted, _ in rounds)
    return sum(each.accepted for each in rounds) / looked_at if looked_at else float("nan")


def speedup_of(rounds: Iterable[Round], c: float, v: Callable[[int], float]) -> float:
    """What these rounds should have gained by `c` and `v`: their tokens over their cost."""
    rounds = list(rounds)
    cost = sum(len(each.drafted) * c + v(len(each.drafted) + 1) for each in rounds)
    return sum(each.accepted + 1 for each in rounds) / cost if cost else 1.0
