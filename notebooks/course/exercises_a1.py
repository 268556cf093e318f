"""Exercises of appendix A1: which format a published cache had, and whether a run can have
happened."""

from clawdemy_course.checks import Exercise, Step
from clawdemy_infer.from_config import catalog
from clawdemy_infer.published import read


def _cache_format() -> Exercise:
    """GPT-J-6B on one H100: 1,024 sequences at once, 128 tokens in and 128 out, weights in fp8."""
    shape = catalog.model("gpt-j-6b")
    [run] = (run for run in read() if run.model == "GPT-J-6B" and run.batch == 1024
             and run.hardware.startswith("H100"))
    memory = 1e9 * run.mem_GB_per_device
    tokens = 1024 * 256
    numbers = tokens * shape.kv_bytes_per_token(1)
    return Exercise("cache_format", {
        "numbers": Step(numbers, {
            numbers / 2: "Keys and values, or: a sequence ends with 128 + 128 tokens.",
            numbers / 1024: "That is one sequence; 1,024 of them run at once.",
            numbers / shape.L: f"That is one layer; there are {shape.L}."}),
        "at_two_bytes": Step(2 * numbers, {
            numbers: "That is one byte a number.",
            4 * numbers: "That is four bytes a number."}, "B"),
        "room": Step(memory - shape.stored_bytes(1.0), {
            memory: "The weights lie there too: 6 GB in fp8.",
            memory - shape.stored_bytes("bf16"): "In fp8 a weight has one byte, not two.",
        }, "B"),
        "format": Step("fp8", {
            "bf16": "At two bytes the cache alone is larger than the card.",
            "fp16": "At two bytes the cache alone is larger than the card.",
            "int4": "Half a byte would fit as well; take the widest format that does."}),
    }, means="capacity is arithmetic that a table cannot hide: the cache was in 8 bits, though the "
             "source does not say so.")


def _possible_run() -> Exercise:
    """Two rows of published_runs.csv that the bounds refuse."""
    runs = {run.id: run for run in read()}
    fast, large = runs["r617"], runs["r619"]
    streamed, bandwidth = 1e9 * fast.weight_GB, 1e9 * fast.peak_bw_GBps_per_device
    least = streamed / bandwidth
    stored, memory = 1e9 * large.weight_GB, 1e9 * large.mem_GB_per_device
    devices = -(-stored // memory)
    per_device = stored / 1e9 / large.peak_bw_GBps_per_device
    return Exercise("possible_run", {
        "least": Step(least, {
            1 / fast.value: "That is what the source claims. What do the bytes need?",
            least / 2: "A weight in fp16 has two bytes; these GB are bytes already."}, "s"),
        "too_fast": Step(least * fast.value, {
            1 / (least * fast.value): "The other way round: the bound over what is claimed.",
            fast.value / 100: "Set the claimed time beside the least time."}, rtol=0.03),
        "cards": Step(devices, {
            1: "The weights are larger than this card's memory.",
            devices + 2: "Fewer will do."}),
        "claimed": Step("the formula", {
            "a run": "Divide the bytes by one card's bandwidth, and compare with the 41.8 ms.",
        }),
    }, means=f"two lines of arithmetic: one row is faster than its bytes allow, the other is "
             f"{per_device * 1e3:.1f} ms of bytes on a card that cannot hold them.")


EXERCISES = {exercise.name: exercise for exercise in (_cache_format(), _possible_run())}
