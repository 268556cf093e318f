"""Exercises of lesson 01: a turn of an agent, the contexts below which a batch is compute-bound,
and a promise on the time per token."""

from math import ceil, floor

from clawdemy_course.checks import Exercise, Step
from clawdemy_infer.from_config import catalog


def _agent_turn() -> Exercise:
    """Qwen3-32B on one H200 at 4 dollars an hour: 8,000 tokens read, 30,000 written."""
    shape, card, hour = catalog.model("qwen3-32b"), catalog.machine("h200-sxm"), 4.0
    prompt, written, turns = 8000, 30_000, 8
    bandwidth, peak = card.bandwidth_at(), card.peak("bf16")
    weights, numbers = shape.streamed_bytes(), shape.matrix_parameters()
    context = prompt + written // 2
    assert shape.fits(card.memory, turns, prompt + written)

    def tpot_of(batch: int, tokens: int) -> float:
        return (weights + shape.kv_bytes(batch, tokens)) / bandwidth

    products, attention = 2 * numbers * prompt, 2 * shape.L * shape.N * shape.H * prompt**2
    ttft, tpot = (products + attention) / peak, tpot_of(1, context)
    seconds = ttft + written * tpot
    dollars = hour * seconds / 3600
    together = hour * (turns * ttft + written * tpot_of(turns, context)) / 3600 / turns
    heads = shape.N // shape.K
    return Exercise("agent_turn", {
        "ttft": Step(ttft, {
            prompt * tpot: "That is a prompt token at the price of an output token. The prompt's "
                           "tokens go through the weights together.",
            weights / bandwidth: "That reads the weights once, which is the lesser part: compare "
                                 "with its FLOPs at the peak.",
            (products + attention) / 2 / peak: "A multiply and an add are two FLOPs.",
            products / peak: "Attention is missing: a prompt token sees T/2 tokens on average.",
            (products + 2 * attention) / peak: "Half of the T x T pairs lie in the future: a "
                                               "prompt token sees T/2 tokens on average.",
        }, "s", rtol=0.04),
        "tpot": Step(tpot, {
            weights / bandwidth: "The cache is missing.",
            tpot_of(1, prompt + written): "That is the last token's. Take the mean context.",
            tpot_of(1, written // 2): "The prompt is in the cache too: 8,000 + 15,000 tokens.",
            tpot_of(heads, context): f"The cache holds {shape.K} KV heads, not {shape.N}.",
            2 * (numbers + shape.V * shape.D) / peak: "At batch 1 the FLOPs are the lesser part: "
                                                      "compare with the bytes.",
        }, "s"),
        "seconds": Step(seconds, {
            ttft + 15_000 * tpot: "15,000 is the mean of what is written; 30,000 steps run.",
            (prompt + written) * tpot: "The prompt is not written token by token: TTFT, then "
                                       "30,000 steps.",
            ttft + prompt * tpot: "The answer has 30,000 tokens; the prompt had 8,000.",
        }, "s"),
        "share": Step(ttft / seconds, {
            100 * ttft / seconds: "That is in percent; a plain number is a fraction.",
            1 - ttft / seconds: "That is the share of the 30,000 steps.",
            prompt / (prompt + written): "That is the prompt's share of the tokens, not of the "
                                         "seconds.",
            products / peak / seconds: "Attention is missing in the TTFT.",
        }, rtol=0.04),
        "dollars": Step(dollars, {
            hour * seconds: "Dollars an hour, times seconds: divide by 3,600.",
            hour * seconds / 60: "An hour has 3,600 seconds."}),
        "fits": Step(True, {False: "The stored weights and eight caches of 38,000 tokens are less "
                                   "than the card's memory."}),
        "dollars_of_8": Step(together, {
            dollars: "Eight turns share the card's hour, and the reading of the weights.",
            dollars / turns: "A step of 8 reads eight caches: it takes longer than a step of 1.",
            together * turns: "That is the price of all eight; give that of one."}),
    }, means="a turn's time and its bill are the 30,000 steps of decode; the prompt is a tenth of "
             "a percent. A batch shares the weights, not the caches.")


def _compute_bound() -> Exercise:
    """Llama-3.1-70B on one MI300X: can a batch reach the ridge point?"""
    shape, card = catalog.model("llama-3.1-70b"), catalog.machine("mi300x")
    numbers, kv, ridge = shape.streamed_bytes() / 2, shape.kv_bytes_per_token(), card.ridge("bf16")
    below, batch = 2 * numbers / kv / ridge, 2 * ridge
    cache = batch * below / 2 * kv
    attention = 4 * shape.L * shape.N * shape.H             # FLOPs for each token of a context
    counted = "Leave attention's FLOPs out."
    # R·2·n / (2·n - R·S·kv) sequences reach the ridge at S; their caches fill what is left at S:
    room = card.memory - shape.stored_bytes()
    both = 2 * numbers * room / (ridge * kv * (2 * numbers + room))
    heads = shape.N / shape.K
    assert shape.stored_bytes() + cache > card.memory
    return Exercise("compute_bound", {
        "below": Step(below, {
            below / 2: "A weight takes two FLOPs in each sequence.",
            below * 2: "A sequence reads keys and values, with 2 bytes each.",
            2 * numbers / (kv * ridge - attention): counted,
            below / heads: f"The cache holds {shape.K} KV heads, not {shape.N}.",
            card.peak("bf16") / card.bandwidth_at(): "That is the ridge point itself, in rows. "
                                                     "Each sequence brings its cache too."}),
        "batch": Step(batch, {
            ridge: "That would do if no sequence had a cache. At this context half of the bytes "
                   "that a sequence may cost are its cache.",
            4 * ridge: "At half that context a sequence's FLOPs outweigh its cache twice: "
                       "2·n·B / (2·n + n·B / R) = R, with n weights and ridge R.",
            ridge / (1 / 2 + attention * below / 4 / numbers): counted}),
        "cache": Step(cache, {
            cache / batch: "That is one sequence's.",
            cache * 2: "Take half of that context.",
            cache * heads: f"The cache holds {shape.K} KV heads, not {shape.N}."}, "B", rtol=0.03),
        "fits": Step(False, {True: "Add the weights: they and this cache are more than the card "
                                   "has."}),
    }, means=f"at {below / 2:.0f} tokens the memory ends first. A batch that reaches the ridge "
             f"fits only up to some {both:.0f} tokens.")


def _promise() -> Exercise:
    """Qwen3-14B on L40S cards, 10,000 tokens of context, 45 ms a token promised."""
    shape, card = catalog.model("qwen3-14b"), catalog.machine("l40s")
    context, promise, wanted = 10_000, 0.045, 5000
    weights, bandwidth = shape.streamed_bytes(), card.bandwidth_at()
    cache = shape.kv_bytes(1, context)

    def rate(batch: int) -> float:
        return batch / (weights + batch * cache) * bandwidth

    batch = floor((promise * bandwidth - weights) / cache)
    full = shape.fits(card.memory, 1, context).max_batch
    stored = floor((promise * bandwidth - shape.stored_bytes()) / cache)
    cards = ceil(wanted / rate(batch))
    return Exercise("promise", {
        "batch": Step(batch, {
            full: "That many fit, and their steps take longer than 45 ms.",
            floor(promise * bandwidth / cache): "Each step reads the weights too.",
            stored: "The embedding table is stored and not streamed: a step looks up rows of it.",
            batch * shape.K // shape.N: f"The cache holds {shape.K} KV heads, not {shape.N}."}),
        "fits": Step(True, {False: "Weights and caches of this batch are less than the card's "
                                   "memory."}),
        "tokens_per_s": Step(rate(batch), {
            1 / promise: "That is one user's; a step gives a token to each of the batch.",
            batch / promise: "A step of this batch is done before the promised time: take its own.",
            rate(full): "That is the batch that fills the memory; it breaks the promise."}),
        "cards": Step(cards, {
            cards - 1: "Round up: with one card fewer some users would wait.",
            ceil(wanted / (batch / promise)): "A step takes less than the promise: fewer cards do.",
            ceil(wanted / rate(full)): "Those cards would have to run fuller than the promise "
                                       "allows."}),
    }, means="the promise, not the memory, sets the batch: it leaves memory empty, and costs "
             "cards.")


EXERCISES = {exercise.name: exercise
             for exercise in (_agent_turn(), _compute_bound(), _promise())}
