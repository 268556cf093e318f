"""Lesson 03's exercises: a model that is trained anew with fewer KV heads, latents at 16 and at 128
heads, and local layers among global ones. Every right and wrong answer is computed."""

from dataclasses import replace

from clawdemy_course.checks import Exercise, Step
from clawdemy_infer.from_config import catalog

# ---- 1. Llama-2-13B on an A100, as it is and with 8 KV heads ----

SHAPE, CARD = catalog.model("llama-2-13b"), catalog.machine("a100-80gb-sxm")
WEIGHTS, SPEED, TOKENS = 26e9, 2.0e12, 3_500
ROOM = 80e9 - WEIGHTS


def sequence(kv_heads: int) -> float:
    """Bytes of a bf16 cache of `TOKENS` tokens."""
    return TOKENS * 2 * SHAPE.L * kv_heads * SHAPE.H * 2


MHA, GQA = sequence(SHAPE.K), sequence(8)
USERS, MORE = ROOM // MHA, ROOM // GQA


def rate(users: float, each: float) -> float:
    """Tokens per second of all users; a step reads the weights and every cache once."""
    return users * SPEED / (WEIGHTS + users * each)


GAIN = rate(MORE, GQA) / rate(USERS, MHA)

FEWER_HEADS = Exercise("fewer_heads", {
    "sequence": Step(MHA, {
        MHA / 2: "A key *and* a value, each number of 2 bytes.",
        MHA / TOKENS: "That is one token; a sequence has 3,500.",
        MHA / SHAPE.L: "That is one layer of 40.",
        GQA: "That is already with 8 KV heads; as it is, each query head has its own.",
    }, unit="B"),
    "users": Step(USERS, {
        80e9 // MHA: "The weights are on the card too; take them off first.",
        USERS + 1: "The last of these has no room: round down.",
    }, rtol=1e-3),
    "users_gqa": Step(MORE, {
        USERS * 5: "A fifth of the bytes; but round down once, at the end: the room left over "
                   "counts too.",
        USERS * 8: "8 is the number of KV heads that are left; the cache shrinks by 40/8.",
        80e9 // GQA: "The weights are on the card too; take them off first.",
    }, rtol=1e-3),
    "tokens_per_s": Step(rate(USERS, MHA), {
        SPEED / (WEIGHTS + USERS * MHA): "Those are steps per second; each gives every user a "
                                         "token.",
        USERS * SPEED / WEIGHTS: "A step reads the caches too, of all users.",
        USERS * SPEED / (WEIGHTS + MHA): "Each user has a cache of their own; the step reads all.",
    }, rtol=0.02),
    "times_more": Step(GAIN, {
        5.0: "40/8 is the ratio of the bytes of a user. Divide the tokens per second.",
        MORE / USERS: "That is the ratio of the users; a full card's step takes a little longer.",
        rate(USERS, GQA) / rate(USERS, MHA): "The room that is freed takes more users.",
    }, rtol=0.005),
}, means="Both steps read a nearly full card and take about as long; one serves "
         f"{MORE:.0f} users, the other {USERS:.0f}. With a full card fewer KV bytes are more "
         "users, not faster tokens.")

# ---- 2. A latent at 16 heads and at 128 ----

WIDTH, H = 512 + 64, 128
RIDGE = catalog.machine("a100-80gb-sxm").ridge("bf16")


def intensity(heads: int) -> float:
    """FLOPs per byte of absorbed attention over latents of 2 bytes a number."""
    return 2 * heads * (WIDTH + 512) / (2 * WIDTH)


LATENTS = Exercise("latents", {
    "of_16": Step(2 * 16 * H / WIDTH, {
        16 * H / WIDTH: "Multi-head attention keeps keys *and* values.",
        2 * 16 * H / 512: "The rotated part is kept too: 512 + 64 numbers.",
        2 * 16 * H / (2 * WIDTH): "One latent serves as key and as value; it is kept once.",
    }),
    "of_128": Step(2 * 128 * H / WIDTH, {
        128 * H / WIDTH: "Multi-head attention keeps keys *and* values.",
        2 * 128 * H / 512: "The rotated part is kept too: 512 + 64 numbers.",
    }),
    "kv_heads": Step(WIDTH / (2 * H), {
        WIDTH / H: "A KV head keeps a key *and* a value: 2 · 128 numbers.",
        512 / (2 * H): "The rotated part is kept too.",
    }),
    "flops_per_byte": Step(intensity(128), {
        intensity(128) * 2: "2 FLOPs for each multiply and add, but 2 bytes for each number too.",
        2 * 128 * WIDTH / (2 * WIDTH): "Those are the scores alone; the weighted sum is as long as "
                                       "the latent.",
        intensity(16): "That is with 16 heads.",
        intensity(128) / 2: "A multiply and an add are 2 FLOPs.",
    }),
    "waits_for": Step("compute", {
        "memory": f"The ridge of this card is at {RIDGE:.0f} FLOPs per byte; compare your last "
                  "answer with it.",
    }),
}, means="However many heads share it, a latent takes the bytes of "
         f"{WIDTH / (2 * H):g} KV heads. With 16 heads GQA comes down to 2 KV heads, and fewer "
         "bytes; with 128 heads it would have to share each among more than 50.")

# ---- 3. Local layers among global ones ----

GEMMA, LONG = catalog.model("gemma-3-27b"), 131_072
KINDS = [GEMMA.pattern[layer % 6] for layer in range(GEMMA.L)]
LOCAL, GLOBAL = KINDS.count("local"), KINDS.count("global")
PER_LAYER = 2 * GEMMA.K * GEMMA.H * 2                   # bytes of a token
KEPT = PER_LAYER * (LOCAL * GEMMA.window + GLOBAL * LONG)
ALL = replace(GEMMA, window=None, pattern=("global",)).kv_bytes(1, LONG)
assert KEPT == GEMMA.kv_bytes(1, LONG)

LOCALS = Exercise("local_layers", {
    "global_layers": Step(GLOBAL, {
        GEMMA.L / 6: "Layers are whole: 62 are ten times six, and two more, which are local.",
        LOCAL: "Those are the local ones.",
        GLOBAL + 1: "The last two layers begin the pattern anew, and it begins with local ones.",
    }, rtol=1e-3),
    "kept": Step(KEPT, {
        PER_LAYER * GLOBAL * LONG: "The local layers keep their windows of 1,024 tokens.",
        ALL: "That is with 62 global layers.",
        KEPT / 2: "A key *and* a value, each number of 2 bytes.",
        PER_LAYER * GEMMA.L * GEMMA.window: "The global layers keep all 131,072 tokens.",
    }, unit="B"),
    "times_smaller": Step(ALL / KEPT, {
        6.0: "Nearly: local layers keep something too, and 10 of 62 is not a sixth.",
        GEMMA.L / GLOBAL: "Nearly: the local layers keep something too.",
        LONG / GEMMA.window: "That is one local layer against one global layer.",
    }, rtol=0.005),
    "limit": Step(GEMMA.L / GLOBAL, {
        6.0: "10 of 62 layers are global, not quite one in six.",
        ALL / KEPT: "Longer: what the local layers keep does not grow with the context.",
    }, rtol=0.005),
    "int8_too": Step(2 * ALL / KEPT, {
        ALL / KEPT + 2: "Factors of a product multiply.",
        2 * GEMMA.L / GLOBAL: "At 131,072 tokens: half of `times_smaller`'s cache.",
    }, rtol=0.005),
}, means=f"Of 131,072 tokens {LOCAL} layers remember 1,024. The other {GLOBAL} hold "
         f"{PER_LAYER * GLOBAL * LONG / KEPT:.0%} of what is left, and set the limit. Techniques "
         "that shrink different factors of the product multiply.")

EXERCISES = {each.name: each for each in (FEWER_HEADS, LATENTS, LOCALS)}
