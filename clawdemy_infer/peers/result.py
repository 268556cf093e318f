"""What came of a race: tokens/s, ours beside it, how near the bound, memory, the same tokens."""

from os.path import commonprefix
from statistics import median

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.lesson.tables import MISSING, Table, number, si
from clawdemy_infer.peers.contestants import Contestant
from clawdemy_infer.peers.race import PeerRun


def round_rates(run: PeerRun) -> list[float]:
    """Tokens per second of each round."""
    work = run.workload
    if work.phase == "decode":
        return [answer["decode_tokens"] / answer["decode_s"] for answer in run.answers]
    return [work.batch * work.context / answer["prefill_s"] for answer in run.answers]


def fraction_of_bound(run: PeerRun, shape: ModelShape, machine: Machine,
                      weight_bytes: float) -> float:
    """What the roofline allows at least, over what it took."""
    work, weights = run.workload, run.contestant.weights
    if work.phase == "prefill":
        peak = machine.peak(weights if weights in machine.peak_flops else "fp32")
        took = median(answer["prefill_s"] for answer in run.answers)
        return shape.prefill(work.batch, work.context).flops / peak / took
    # Weights once a step, and all keys and values at the mean step's context: llama.cpp keeps them
    # in fp16 whatever its weights, the others as they compute.
    kv = ("fp16" if run.contestant.engine == "llama.cpp" else
          "bf16" if weights == "bf16" else "fp32")
    bytes = weight_bytes + shape.kv_bytes(work.batch, work.context + (work.new + 1) // 2, kv)
    return median(rate / work.batch * bytes / read
                  for rate, read in zip(round_rates(run), run.bandwidth, strict=True))


def same_tokens(tokens: list[list[int]], reference: list[list[int]]) -> int:
    """Tokens that two runs have in common before each sequence's first difference."""
    return sum(len(commonprefix(texts)) for texts in zip(reference, tokens, strict=True))


def peer_rows(runs: list[PeerRun], shape: ModelShape, machine: Machine,
              weight_bytes: dict[Contestant, float]) -> list[dict]:
    """The rows of one workload, in the order of its runs.

    tokens_per_s       median of rounds: tokens after each sequence's first, or of the prompt
    lowest, highest    of the rounds
    ours_same_bits     tokens/s of our best format of as many bits, over these
    ours_best          tokens/s of the best of all our formats here, over these
    fraction_of_bound  decode: of the bytes at the bandwidth of that minute; prefill: of the FLOPs
                       at the calibrated peak
    peak_bytes         the most memory that the process held during the workload
    same_tokens, of    of a decode, tokens up to each sequence's first difference from ours in fp32
    """
    speed = {run.contestant: median(round_rates(run)) for run in runs}
    ours = {one: rate for one, rate in speed.items() if one.engine == "ours"}
    reference = next((run.answers[0] for run in runs if run.contestant.name == "ours fp32"), None)
    rows = []
    for run in runs:
        one, rate, found = run.contestant, speed[run.contestant], round_rates(run)
        same_bits = [speed[mine] for mine in ours if mine.bits == one.bits]
        compared = reference and run.workload.phase == "decode"
        tokens = run.answers[0]["tokens"]
        rows.append({
            "engine": one.engine, "weights": one.weights, "workload": run.workload.name,
            "tokens_per_s": rate, "lowest": min(found), "highest": max(found),
            "ours_same_bits": max(same_bits) / rate if same_bits else None,
            "ours_best": max(ours.values()) / rate if ours else None,
            "fraction_of_bound": fraction_of_bound(run, shape, machine, weight_bytes[one]),
            "peak_bytes": max(answer["peak_bytes"] for answer in run.answers),
            "same_tokens": same_tokens(tokens, reference["tokens"]) if compared else None,
            "of": sum(map(len, tokens)) if compared else None})
    return rows


def peers_table(rows: list[dict]) -> Table:
    """`ours ÷ it` is at as many bits; the spread is half of the range."""
    def times(value: float | None) -> str:
        return MISSING if value is None else f"{value:.2f}×"

    header = ("workload", "engine", "weights", "tokens/s", "spread", "ours ÷ it", "our best ÷ it",
              "of bound", "memory", "same tokens")
    body = [(row["workload"], row["engine"], row["weights"], number(row["tokens_per_s"]),
             f"± {(row['highest'] - row['lowest']) / 2 / row['tokens_per_s']:.0%}",
             times(row["ours_same_bits"]), times(row["ours_best"]),
             f"{row['fraction_of_bound']:.0%}", si(row["peak_bytes"], "B"),
             MISSING if row["of"] is None else f"{row['same_tokens']:,} of {row['of']:,}")
            for row in rows]
    return Table(header, body, numeric=header[3:])
