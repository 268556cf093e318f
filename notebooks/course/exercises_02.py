"""Lesson 02's exercises: an agent's memory, a summary's seconds, and a prompt that is fetched or
computed anew. Every right and wrong answer is computed."""

from clawdemy_course.checks import Exercise, Step
from clawdemy_infer.from_config import catalog

# ---- 1. Agents of 30,000 tokens of Qwen3-4B on an L40S ----

QWEN, MEMORY = catalog.model("qwen3-4b"), catalog.machine("l40s").memory
TOKENS, WEIGHTS = 30_000, QWEN.stored_bytes("bf16")
NUMBERS = 2 * QWEN.L * QWEN.K * QWEN.H                  # that one token leaves
AGENT = TOKENS * NUMBERS * 2
AGENTS = (MEMORY - WEIGHTS) // AGENT

FREE = MEMORY - WEIGHTS
SHARING = 8

LONG_AGENT = Exercise("long_agent", {
    "per_token": Step(NUMBERS * 2, {
        NUMBERS: "Half of it. A key *and* a value are kept, and a bf16 number is 2 bytes.",
        NUMBERS * 2 * QWEN.N / QWEN.K: "N query heads share K KV heads; only KV heads are kept.",
        NUMBERS * 2 * QWEN.D / QWEN.N / QWEN.H: "D/N is 80 here, but head_dim is 128.",
        NUMBERS * 2 / QWEN.L: "That is one layer; each of the L layers keeps its own.",
        NUMBERS * 4: "fp32 has 4 bytes; bf16 has 2.",
    }, unit="B"),
    "agent": Step(AGENT, {
        WEIGHTS + AGENT: "Leave the weights out: they are there once, whatever the number of "
                         "agents.",
        AGENT * 2: "Twice too much: per_token has keys and values in it already.",
        AGENT / 2: "Half of it: per_token counts the keys *and* the values.",
    }, unit="B"),
    "agents": Step(AGENTS, {
        MEMORY // AGENT: "The weights are on the card too; take them off first.",
        AGENTS + 1: "The last of these has no room: agents come whole, so round down.",
        FREE // (AGENT * QWEN.N / QWEN.K): "This counts query heads; only KV heads are kept.",
    }, rtol=1e-3),
    "longest": Step(FREE / SHARING / (NUMBERS * 2), {
        MEMORY / SHARING / (NUMBERS * 2): "The weights are on the card too; take them off first.",
        FREE / (NUMBERS * 2): f"That is one agent alone; here {SHARING} share the memory.",
        (48e9 - WEIGHTS) / SHARING / (NUMBERS * 2): "48 GiB are 48 · 2**30 bytes, 7 % more than "
                                                    "48 GB.",
    }),
}, means=f"{AGENTS:.0f} agents fill a card that has room for {MEMORY / WEIGHTS:.0f} times the "
         "weights. "
         "The past, not the model, limits how many are served: lesson 03 makes each "
         "token smaller, lesson 06 wastes less of the room.")

# ---- 2. A summary: the rows that a cache saves, and the seconds ----

LLAMA = catalog.model("llama-3-8b")
P, N = 4_000, 200
MATRICES, FLOPS, BANDWIDTH = 7e9, 400e12, 2.7e12
WITHOUT, WITH = N * (2 * P + N - 1) / 2, P + N - 1
PREFILL_S, TOKEN_S = 2 * MATRICES * P / FLOPS, 2 * MATRICES / BANDWIDTH
SECONDS = 2 * MATRICES * WITHOUT / FLOPS, PREFILL_S + (N - 1) * TOKEN_S

SUMMARY = Exercise("summary", {
    "rows_without": Step(WITHOUT, {
        N * P: "The text grows: step i sends P + i rows, not P.",
        WITH: "That is with a cache. Without one, each of the n steps sends everything so far.",
        N * (P + N): "These are n steps as long as the whole text; step i sends P + i rows.",
        N * (2 * P + N - 1): "The mean of the first and the last step is half of their sum.",
        N * (N - 1) / 2: "The prompt goes through again in every step.",
        N * P + N**2 / 2: "Nearly: the first step sends P rows and the last P + n - 1.",
    }, rtol=5e-5),
    "rows_with": Step(WITH, {
        WITH + 1: "Nobody reads the last token: it is written, and the generation is over.",
        N: "The prompt goes through once too.",
    }, rtol=1e-4),
    "s_without": Step(SECONDS[0], {
        2 * MATRICES * N * (P + N) / FLOPS: "Not every step sends the whole text: step i sends "
                                            "P + i rows.",
        SECONDS[0] / 2: "A multiply *and* an add: 2 FLOPs for each weight and row.",
        2 * MATRICES * WITH / FLOPS: "These are the rows with a cache.",
    }, unit="s"),
    "s_with": Step(SECONDS[1], {
        2 * MATRICES * WITH / FLOPS: "Only the prefill runs at 400 TFLOP/s. A step of one row "
                                     "reads all weights for 2 FLOPs each: bytes over bandwidth.",
        (N - 1) * TOKEN_S: "The prefill is missing: the first step reads the whole prompt.",
        PREFILL_S + (N - 1) * TOKEN_S / 2: "bf16 weights have 2 bytes each.",
        N * TOKEN_S + P * TOKEN_S: "The prompt goes through in *one* step, as P rows.",
    }, unit="s"),
    "times_faster": Step(SECONDS[0] / SECONDS[1], {
        WITHOUT / WITH: "That is the ratio of the rows. Those that are left cost more each, since "
                        "they are memory-bound: divide the seconds.",
    }),
}, means=f"Rows: {WITHOUT / WITH:.0f} times fewer. Seconds: {SECONDS[0] / SECONDS[1]:.0f} times. "
         "What a cache leaves is memory-bound. Batching, lesson 04, is how that is used.")

# ---- 3. Yesterday's prompt: fetch its cache, or compute it anew? ----

LLAMA_2 = catalog.model("llama-2-7b")
PROMPT, LINK = 4_000, 100e9 / 8
MHA, GQA = (shape.kv_bytes_per_token("bf16") for shape in (LLAMA_2, LLAMA))
PER_TOKEN = 14e9 / FLOPS                                # seconds of computing, of both models

FETCH = Exercise("fetch_or_compute", {
    "fetch": Step(PROMPT * MHA / LINK, {
        PROMPT * MHA / LINK / 8: "100 Gbit/s are bits: 12.5 GB/s.",
        PROMPT * MHA / 2 / LINK: "A key *and* a value, 2 bytes each.",
        MHA / LINK: "That is one token; the prompt has 4,000.",
    }, unit="s"),
    "compute": Step(PROMPT * PER_TOKEN, {
        PER_TOKEN: "That is one token; the prompt has 4,000.",
        PROMPT * 14e9 / BANDWIDTH: "A prefill reads the weights once for 4,000 rows: it is "
                                   "compute-bound.",
    }, unit="s"),
    "even": Step(MHA / PER_TOKEN, {
        LINK: "That is the link you have. Which one brings the bytes in the seconds of `compute`?",
        MHA / PER_TOKEN / 8: "Divide by bytes: no bits are left here.",
        PROMPT * MHA / PER_TOKEN: "The prompt's length cancels: compare one token with one token.",
    }, unit="B/s"),
    "even_gqa": Step(GQA / PER_TOKEN, {
        MHA / PER_TOKEN: "Llama-3-8B keeps 8 KV heads, where Llama-2-7B keeps 32.",
        4 * MHA / PER_TOKEN: "Fewer bytes to fetch are content with a *slower* link.",
    }, unit="B/s"),
    "better": Step("compute", {
        "fetch": "Over 12.5 GB/s, for Llama-2-7B: compare your first two answers.",
    }),
}, means="Fewer KV heads: the same FLOPs for a quarter of the bytes. Over this link the prompt of "
         "Llama-3-8B is worth fetching, that of Llama-2-7B is not. Offloaded and remote "
         "prefix caches live on that difference.")

EXERCISES = {each.name: each for each in (LONG_AGENT, SUMMARY, FETCH)}
