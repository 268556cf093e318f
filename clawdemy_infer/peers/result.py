"""What came of a race: tokens/s, what ours is beside it, how near the bound, how much memory, and whether the tokens are the same."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.peers.contestants import Contestant
from clawdemy_infer.peers.race import Run
from clawdemy_infer.roofline import Machine
from clawdemy_infer.tables import MISSING, Table, number, si


@dataclass(frozen=True)
class PeerRow:
    """One engine in one format on one workload.

    tokens_per_s       decode: tokens after each sequence's first; prefill: tokens of the prompt; trace: output tokens; median of rounds
    lowest, highest    of the rounds
    ours_same_bits     times as many tokens/s as this that ours has, in its best format of as many bits; None if it has none here
    ours_best          the same for the best of all its formats in this run
    fraction_of_bound  decode: of the bytes at the bandwidth of that minute; prefill: of the FLOPs at the calibrated peak; trace: None
    peak_bytes         the most memory that the process held during the workload
    same_tokens, of    tokens up to each sequence's first difference from the reference, ours in fp32; None for a prefill or a trace
    """

    engine: str
    weights: str
    workload: str
    tokens_per_s: float
    lowest: float
    highest: float
    ours_same_bits: float | None
    ours_best: float | None
    fraction_of_bound: float | None
    peak_bytes: int
    same_tokens: int | None
    of: int | None

    def as_dict(self) -> dict:
        return asdict(self)


def rates(run: Run) -> list[float]:
    """Tokens per second, a round each."""
    work = run.workload
    if work.phase == "decode":
        return [answer["decode_tokens"] / answer["decode_s"] for answer in run.answers]
    if work.phase == "prefill":
        return [work.batch * work.context / answer["prefill_s"] for answer in run.answers]
    return [sum(run.command["new"]) / answer["seconds"] for answer in run.answers]


def kv_format(contestant: Contestant) -> str:
    """How an engine keeps keys and values: llama.cpp in fp16 whatever its weights, the others as they compute, in fp32 but for bf16."""
    if contestant.engine == "llama.cpp":
        return "fp16"
    return "bf16" if contestant.weights == "bf16" else "fp32"


def fraction_of_bound(run: Run, shape: ModelShape, machine: Machine, weight_bytes: float) -> float | None:
    """What the roofline allows at least, over what it took; each round of a decode beside its own reading of the bandwidth."""
    work, contestant = run.workload, run.contestant
    if work.phase == "trace":
        return None
    if work.phase == "prefill":
        dtype = contestant.weights if contestant.weights in machine.peak_flops else "fp32"
        flops = shape.prefill(work.batch, work.context).flops
        return flops / machine.peak(dtype) / statistics.median(answer["prefill_s"] for answer in run.answers)
    # Weights once a step, and the keys and values of all sequences; the context of the mean step, rounded down.
    bytes = weight_bytes + shape.kv_bytes(work.batch, int(work.middle), kv_format(contestant))
    return statistics.median(rate / work.batch * bytes / read for rate, read in zip(rates(run), run.bandwidth, strict=True))


def same_tokens(tokens: list[list[int]], reference: list[list[int]]) -> int:
    """Tokens that two runs have in common before each sequence's first difference."""
    count = 0
    for ours, theirs in zip(reference, tokens, strict=True):
        differ = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        count += next(differ, len(ours))
    return count


def peer_rows(runs: list[Run], shape: ModelShape, machine: Machine, weight_bytes: dict[Contestant, float]) -> list[PeerRow]:
    """The rows of one workload, in the order of its runs."""
    speed = {run.contestant: statistics.median(rates(run)) for run in runs}

    def best_of_ours(bits: Iterable[int]) -> float | None:
        return max((rate for c, rate in speed.items() if c.engine == "ours" and c.bits in bits), default=None)

    reference = next((run for run in runs if (run.contestant.engine, run.contestant.weights) == ("ours", "fp32")), None)
    rows = []
    for run in runs:
        c, rate, found = run.contestant, speed[run.contestant], rates(run)
        same_bits, best = best_of_ours({c.bits}), best_of_ours({4, 8, 16, 32})
        compared = reference and run.workload.phase == "decode"
        tokens = run.answers[0].get("tokens")
        rows.append(PeerRow(
            c.engine, c.weights, run.workload.name, rate, min(found), max(found), same_bits and same_bits / rate, best and best / rate,
            fraction_of_bound(run, shape, machine, weight_bytes[c]), max(answer["peak_bytes"] for answer in run.answers),
            same_tokens(tokens, reference.answers[0]["tokens"]) if compared else None, sum(map(len, tokens)) if compared else None))
    return rows


def peers_table(rows: list[PeerRow]) -> Table:
    """`ours ÷ it` is at as many bits; the spread is half of the range; same tokens: as ours in fp32."""
    header = ("workload", "engine", "weights", "tokens/s", "spread", "ours ÷ it", "our best ÷ it", "of bound", "memory", "same tokens")

    def times(value: float | None) -> str:
        return MISSING if value is None else f"{value:.2f}×"

    body = [(row.workload, row.engine, row.weights, number(row.tokens_per_s), f"± {(row.highest - row.lowest) / 2 / row.tokens_per_s:.0%}",
             times(row.ours_same_bits), times(row.ours_best), MISSING if row.fraction_of_bound is None else f"{row.fraction_of_bound:.0%}",
             si(row.peak_bytes, "B"), MISSING if row.of is None else f"{row.same_tokens:,} of {row.of:,}") for row in rows]
    return Table(header, body, numeric=header[3:])
