"""Attention of one new token over pages, in C++ for a CPU: what `kernels/decode_paged.py` is to a GPU.

    out[b] = softmax(q[b] k[b]ᵀ / sqrt(H)) v[b]        over the tokens of sequence b, which lie where its block table says

PyTorch has no operation that follows a block table, and to call one for each sequence costs more than the work. Here every key and value
is read once, where it lies, and serves the G queries of its KV head; scores never leave the nearest cache (Dao et al. 2022,
FlashAttention: a running maximum, and sums that are scaled when it rises). While a row is worked on, the row that comes STEP tokens
later is asked of memory: blocks lie apart, and a CPU cannot guess where the next one begins.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from clawdemy_infer import cpp

SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

const int STEP = 16;                                                // tokens whose scores are in hand at a time
const float NEVER = -1e30f;

static inline float number(float x) { return x; }
static inline float number(uint16_t x) { uint32_t bits = uint32_t(x) << 16; float y; memcpy(&y, &bits, 4); return y; }      // bf16
static inline void store(float x, float* to) { *to = x; }
static inline void store(float x, uint16_t* to) { uint32_t bits; memcpy(&bits, &x, 4); *to = (bits + 0x7fff + (bits >> 16 & 1)) >> 16; }
static inline void fetch(const T* row) { for (int h = 0; h < H; h += 64 / sizeof(T)) __builtin_prefetch(row + h); }

// Where the key and the value of a token lie: slot s is in tile s / C at s % C.
struct Pages {
    T *keys, *values; const int32_t *table, *lengths;
    int64_t K, blocks, C, size, window;                             // of a row of the table; of a tile and of a block, in tokens
    int64_t place(int64_t b, int64_t k, int64_t token) const {
        const int64_t slot = table[b * blocks + token / size] * size + token % size;
        return ((slot / C * K + k) * C + slot % C) * H;
    }
};

// The G queries of KV head k of sequence b, scaled -> out [G, H].
template <class O>
static void attend(const float (&query)[G][H], const Pages& in, int64_t b, int64_t k, O* out) {
    const int64_t length = in.lengths[b];
    float sum[G][H] = {}, total[G] = {}, largest[G];
    for (int g = 0; g < G; g++) largest[g] = NEVER;
    auto end_of = [&](int64_t token) { return std::min({token + STEP, (token / in.size + 1) * in.size, length}); };
    int64_t first = std::max(int64_t(0), length - in.window), here = in.place(b, k, first);
    while (first < length) {
        const int64_t end = end_of(first), next = in.place(b, k, std::min(end, length - 1));
        const int n = end - first;
        float score[G][STEP];
        for (int g = 0; g < G; g++) for (int t = n; t < STEP; t++) score[g][t] = NEVER;
        for (int t = 0; t < n; t++) {
            fetch(in.keys + next + t * H);
            for (int g = 0; g < G; g++) {
                float dot = 0;
                #pragma omp simd reduction(+:dot)
                for (int h = 0; h < H; h++) dot += query[g][h] * number(in.keys[here + t * H + h]);
                score[g][t] = dot;
            }
        }
        for (int g = 0; g < G; g++) {
            float most = largest[g], added = 0;
            #pragma omp simd reduction(max:most)
            for (int t = 0; t < STEP; t++) most = std::max(most, score[g][t]);
            #pragma omp simd reduction(+:added)
            for (int t = 0; t < STEP; t++) added += score[g][t] = expf(score[g][t] - most);
            const float less = expf(largest[g] - most);
            for (int h = 0; h < H; h++) sum[g][h] *= less;
            total[g] = total[g] * less + added;
            largest[g] = most;
        }
        for (int t = 0; t < n; t++) {
            fetch(in.values + next + t * H);
            for (int g = 0; g < G; g++)
                #pragma omp simd
                for (int h = 0; h < H; h++) sum[g][h] += score[g][t] * number(in.values[here + t * H + h]);
        }
        first = end, here = next;
    }
    for (int g = 0; g < G; g++) for (int h = 0; h < H; h++) store(sum[g][h] / total[g], out + g * H + h);
}

extern "C" void decode(const T* q, T* keys, T* values, const int32_t* table, const int32_t* lengths, T* out,
                       int64_t B, int64_t K, int64_t blocks, int64_t C, int64_t size, int64_t window) {
    const Pages in = {keys, values, table, lengths, K, blocks, C, size, window};
    #pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < B * K; task++) {
        float query[G][H];
        for (int g = 0; g < G; g++)
            for (int h = 0; h < H; h++) query[g][h] = number(q[(task * G + g) * H + h]) / std::sqrt(float(H));
        attend(query, in, task / K, task % K, out + task * G * H);
    }
}
"""
TYPES = {torch.float32: "float", torch.bfloat16: "uint16_t"}


@functools.cache
def built(dtype: torch.dtype, G: int, H: int) -> Callable:
    """The machine code for these sizes, which a compiler unrolls."""
    decode = cpp.library(SOURCE, f"T={TYPES[dtype]}", f"G={G}", f"H={H}").decode
    decode.argtypes, decode.restype = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 6, None
    return decode


def decode_paged(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor,
                 window: int | None = None, block_size: int | None = None) -> torch.Tensor:
    """One token for each of B sequences, q [B, N, H], over keys and values [tiles, K, C, H]: [B, N, H], in fp32 or bf16 as all are.

    `table` [B, blocks] says which blocks of `block_size` tokens a sequence has (a tile is one, if not said) and `lengths` [B] how
    many of their tokens are its own, the new one included; both of int32. It sees the last `window` of them, or all.
    """
    (B, N, H), (_, K, C, _) = q.shape, keys.shape
    q, out = q.contiguous(), torch.empty(B, N, H, dtype=q.dtype)
    built(q.dtype, N // K, H)(*(x.data_ptr() for x in (q, keys, values, table, lengths, out)),
                              B, K, table.shape[1], C, block_size or C, window or 2**40)
    return out
