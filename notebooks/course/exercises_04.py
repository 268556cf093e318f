"""Exercises of lesson 04: a server read off two timings, a full card at a short context, and what
four bits are worth in a batch."""

from math import floor

from clawdemy_course.checks import Exercise, Step
from clawdemy_infer.from_config import catalog


def _two_timings() -> Exercise:
    """Qwen3-8B on an unknown card: steps of 1 and of 32 sequences, equally long, memory-bound."""
    shape, one, many, batch = catalog.model("qwen3-8b"), 8.1e-3, 17.4e-3, 32
    weights, kv = shape.streamed_bytes(), shape.kv_bytes_per_token()
    each = (many - one) / (batch - 1)
    shared = one - each
    bandwidth = weights / shared
    context = each * bandwidth / kv
    heads = shape.N // shape.K
    return Exercise("two_timings", {
        "each": Step(each, {
            (many - one) / batch: "From 1 to 32 it is 31 more.",
            many / batch: "That is a sequence's share of the step, weights and all. What does "
                          "*one more* add?"}, "s"),
        "shared": Step(shared, {
            one: "A step of one reads a cache too: take it off.",
            many - one: "That is what 31 more sequences add."}, "s"),
        "knee": Step(1 + one / each, {
            shared / each: "There the caches are as large a read as the weights. Twice a step of "
                           "*one*, which has a cache, is two later.",
            one / each: "So many more, beside the first.",
            2 * one / each: "A step twice as long has room for one more such time, not for two."}),
        "bandwidth": Step(bandwidth, {
            weights / one: "In that time the card read a cache too.",
            shape.stored_bytes() / shared: "A step looks up one row of the embedding table; it "
                                           "streams 15.1 GB.",
            weights * batch / shared: "All sequences share one reading."}, "B/s"),
        "context": Step(context, {
            context / heads: f"The cache holds {shape.K} KV heads, not {shape.N}.",
            context * 2: "Keys and values: 147,456 bytes a token has both in it.",
            each * weights / one / kv: "That bandwidth is too low: it forgot the cache."}),
    }, means="two timings tell the bandwidth, the context, and where the batch stops being free, "
             "as long as bytes bind.")


def _full_card() -> Exercise:
    """Mistral-7B fills an H200 with sequences of 100 tokens."""
    shape, card = catalog.model("mistral-7b"), catalog.machine("h200-sxm")
    tokens, promise = 100, 0.05
    numbers, stored = shape.matrix_parameters() + shape.D * shape.V, shape.stored_bytes()
    kv, peak, law = (shape.kv_bytes_per_token(), card.peak("bf16"),
                     card.memory / card.bandwidth_at())
    batch = floor((card.memory - stored) / (tokens * kv))
    computing = 2 * numbers * batch / peak
    holds = tokens * computing / law
    both = 2 * numbers / (card.ridge("bf16") * kv)          # where both knees coincide
    kept = floor(promise * peak / (2 * numbers))
    assert computing > law and kept < batch
    return Exercise("full_card", {
        "batch": Step(batch, {
            floor(card.memory / (tokens * kv)): "The weights are on the card too.",
            floor((card.memory - stored) / kv): "That is tokens; a sequence has 100.",
            floor((card.memory - stored) / (tokens * kv) * shape.K / shape.N):
                f"The cache holds {shape.K} KV heads, not {shape.N}."}),
        "reading": Step(law, {
            stored / card.bandwidth_at(): "Weights alone. A full card reads all that it holds.",
            (card.memory - stored) / card.bandwidth_at(): "The weights are read too."}, "s"),
        "computing": Step(computing, {
            computing / 2: "A multiply and an add: 2 FLOPs for each number and sequence.",
            2 * numbers / peak: "That is one sequence; all of the batch compute."}, "s"),
        "step": Step(max(law, computing), {
            law: "Bytes do not bind here: compare your last two answers.",
            law + computing: "By napkin a machine computes while it reads: take the larger."}, "s"),
        "from_context": Step(holds, {
            both: "There the knees coincide, for a batch without end. A full card has room for "
                  "M - W bytes of caches alone.",
            tokens: "At 100 tokens arithmetic takes longer.",
            holds / 2: "A multiply and an add: 2 FLOPs for each number and sequence."}),
        "promised": Step(kept, {
            batch: "Its step takes longer than 50 ms.",
            floor((promise * card.bandwidth_at() - stored) / (tokens * kv)):
                "That many could be *read* in time; arithmetic allows fewer.",
            2 * kept: "A multiply and an add: 2 FLOPs for each number and sequence."}),
    }, means=f"below {holds:.0f} tokens a full card computes longer than it reads, and memory over "
             "bandwidth is no estimate of its step.")


def _four_bits() -> Exercise:
    """Llama-3-8B on an H100, weights in 16 or 4 bits, computed with in bf16; short contexts."""
    shape, card = catalog.model("llama-3-8b"), catalog.machine("h100-sxm")
    ridge, context = card.ridge("bf16"), 4000
    kv = context * shape.kv_bytes_per_token()
    freed = 0.75 * shape.streamed_bytes()
    return Exercise("four_bits", {
        "at_1": Step(4.0, {
            1.0: "A step of one waits for bytes, and a quarter of them are left.",
            2.0: "From 16 bits to 4 it is a factor of four.",
            ridge: "Both formats wait for bytes here: compare bytes."}),
        "at_128": Step(ridge / 128, {
            4.0: "With 4 bits, 128 sequences are past the knee at R·e/2: arithmetic sets the time.",
            1.0: "With 16 bits it still reads, longer than 128 sequences compute.",
            128 / ridge: "Upside down: reading 16 bits takes the longer of the two."}),
        "at_256": Step(ridge / 256, {
            4.0: "With 4 bits, 256 sequences compute: fewer bytes cannot shorten that.",
            1.0: "Nearly: with 16 bits the H100 still reads, up to 295 sequences.",
            ridge / 128: "The number of FLOPs doubled since 128."}),
        "last_4": Step(ridge / 4, {
            ridge: "That is the knee of 16-bit weights: e is 2 there, and 1/2 with 4 bits.",
            ridge / 2: "That is the knee of 8-bit weights.",
            4 * ridge: "Fewer bytes make the batch reach its knee *earlier*."}),
        "room": Step(floor(freed / kv), {
            floor(shape.streamed_bytes() / kv): "A quarter of the weights is still there.",
            floor(freed / kv / (shape.N / shape.K)): f"The cache holds {shape.K} KV heads, not "
                                                     f"{shape.N}.",
            floor(freed / shape.kv_bytes_per_token()): "That is tokens; a sequence has 4,000."}),
    }, means="weights in fewer bits help whoever waits for weights. In a large batch what they "
             "bring is room for caches.")


EXERCISES = {exercise.name: exercise
             for exercise in (_two_timings(), _full_card(), _four_bits())}
