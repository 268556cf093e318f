"""Attention of many new tokens of one sequence over its pages, in C++ for a CPU: what `kernels/prefill_paged.py` is to a GPU.

For few tokens reading is what costs, for many multiplying. So keys and values are first laid out as the multiplier takes them, side by
side, once for all queries. Then QUERIES tokens at a time, with the G heads that share a KV head, look at KEYS keys at a time: two products
with a softmax between them, of which a running maximum and running sums are kept (Dao et al. 2022, FlashAttention, algorithm 1).

    scores [G * QUERIES, KEYS] = Q Kᵀ           Q [G * QUERIES, H], 16 keys side by side, one number of each (fp32) or two (bf16)
    out    [G * QUERIES, H]   += P V            P the exponentials, 16 numbers of a value side by side, of one key or two

Keys that come after all of the queries are not looked at: half of the square is spared, but for what the blocks cut. It follows
`decode_cpp.SOURCE`, and wants a head dimension that is a multiple of 16.
"""

SOURCE = r"""
#include <immintrin.h>
#include <vector>

const int QUERIES = 16, KEYS = 64, ROWS_OF_Q = G * QUERIES;

template <class N> struct By;                                       // how such numbers are multiplied: 16 or 32 of them by one or two
template <> struct By<float> {
    typedef __m512 vector; static const int PAIR = 1;
    static vector load(const float* w) { return _mm512_loadu_ps(w); }
    static vector all(const float* x) { return _mm512_set1_ps(*x); }
    static __m512 add(__m512 sum, vector w, vector x) { return _mm512_fmadd_ps(w, x, sum); }
    static void put(__m512 x, float* to) { _mm512_storeu_ps(to, x); }
};
#ifdef __AVX512BF16__
template <> struct By<uint16_t> {
    typedef __m512bh vector; static const int PAIR = 2;
    static vector load(const uint16_t* w) { return (vector)_mm512_loadu_si512(w); }
    static vector all(const uint16_t* x) { int32_t both; memcpy(&both, x, 4); return (vector)_mm512_set1_epi32(both); }
    static __m512 add(__m512 sum, vector w, vector x) { return _mm512_dpbf16_ps(sum, w, x); }
    static void put(__m512 x, uint16_t* to) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }
};
#endif
typedef By<T> by;

// 2^x: a whole part, which is an exponent, and the series of 2^f for |f| up to a half, six terms of which leave less than fp32 can tell.
static __m512 power_of_2(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = x - whole;
    __m512 sum = _mm512_set1_ps(1.5403530e-4f);
    for (float term : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) sum = sum * f + term;
    return _mm512_scalef_ps(sum, whole);
}

// 64 keys [KEYS, H] -> [KEYS / 16, H / PAIR, 16, PAIR]; their values -> [KEYS / PAIR, H, PAIR]. What lies behind the last is zero.
static void lay_out(const Pages& in, int64_t b, int64_t k, int64_t first, T* keys, T* values) {
    for (int t = 0; t < KEYS; t++) {
        const bool there = first + t < in.lengths[b];
        const int64_t at = there ? in.place(b, k, first + t) : 0;
        T *key = keys + t / 16 * 16 * H + t % 16 * by::PAIR, *value = values + t / by::PAIR * by::PAIR * H + t % by::PAIR;
        for (int h = 0; h < H; h++) {
            key[h / by::PAIR * 16 * by::PAIR + h % by::PAIR] = there ? in.keys[at + h] : T(0);
            value[h * by::PAIR] = there ? in.values[at + h] : T(0);
        }
    }
}

static void scores_of(const T* q, const T* keys, float (*score)[KEYS]) {
    for (int row = 0; row < ROWS_OF_Q; row += 4) {
        __m512 sum[4][KEYS / 16] = {};
        for (int h = 0; h < H; h += by::PAIR) {
            by::vector x[4];
            for (int r = 0; r < 4; r++) x[r] = by::all(q + (row + r) * H + h);
            for (int p = 0; p < KEYS / 16; p++) {
                const by::vector w = by::load(keys + (p * H + h) * 16);
                for (int r = 0; r < 4; r++) sum[r][p] = by::add(sum[r][p], w, x[r]);
            }
        }
        for (int r = 0; r < 4; r++) for (int p = 0; p < KEYS / 16; p++) _mm512_storeu_ps(score[row + r] + p * 16, sum[r][p]);
    }
}

static void sums_of(const T (*weight)[KEYS], const float* less, const T* values, float (*out)[H]) {
    for (int row = 0; row < ROWS_OF_Q; row += 4) {
        __m512 sum[4][H / 16];
        for (int r = 0; r < 4; r++) for (int p = 0; p < H / 16; p++) sum[r][p] = _mm512_loadu_ps(out[row + r] + p * 16) * less[row + r];
        for (int t = 0; t < KEYS; t += by::PAIR) {
            by::vector x[4];
            for (int r = 0; r < 4; r++) x[r] = by::all(weight[row + r] + t);
            for (int p = 0; p < H / 16; p++) {
                const by::vector w = by::load(values + t * H + p * 16 * by::PAIR);
                for (int r = 0; r < 4; r++) sum[r][p] = by::add(sum[r][p], w, x[r]);
            }
        }
        for (int r = 0; r < 4; r++) for (int p = 0; p < H / 16; p++) _mm512_storeu_ps(out[row + r] + p * 16, sum[r][p]);
    }
}

// Queries q [G * QUERIES, H], scaled for powers of 2, of the tokens `past` ... of which `count` are real, over the blocks of keys from
// `begin` on.
static void attend_many(const T* q, int64_t past, int count, int64_t begin, int64_t window, const T* keys, const T* values,
                        float (*out)[H]) {
    float score[ROWS_OF_Q][KEYS], largest[ROWS_OF_Q], total[ROWS_OF_Q] = {}, less[ROWS_OF_Q];
    T weight[ROWS_OF_Q][KEYS];
    for (float& each : largest) each = NEVER;
    for (int r = 0; r < ROWS_OF_Q; r++) for (int h = 0; h < H; h++) out[r][h] = 0;
    for (int64_t first = begin; first < past + count; first += KEYS, keys += KEYS * H, values += KEYS * H) {
        if (first + KEYS <= past + 1 - window) continue;                                    // behind the window of them all
        const bool cut = first + KEYS > past + 1 || first <= past + QUERIES - 1 - window;   // some do not see all of it
        scores_of(q, keys, score);
        for (int r = 0; r < ROWS_OF_Q; r++) {
            const int64_t mine = past + r % QUERIES - first;                                // the last that this query sees
            if (cut) for (int t = 0; t < KEYS; t++) if (t > mine || t <= mine - window) score[r][t] = 2 * NEVER;
            __m512 s[KEYS / 16], most = _mm512_set1_ps(largest[r]), added = {};
            for (int p = 0; p < KEYS / 16; p++) most = _mm512_max_ps(most, s[p] = _mm512_loadu_ps(score[r] + p * 16));
            const float now = _mm512_reduce_max_ps(most);
            for (int p = 0; p < KEYS / 16; p++) added += s[p] = power_of_2(s[p] - now), by::put(s[p], weight[r] + p * 16);
            less[r] = std::exp2(largest[r] - now);
            total[r] = total[r] * less[r] + _mm512_reduce_add_ps(added);
            largest[r] = now;
        }
        sums_of(weight, less, values, out);
    }
    for (int r = 0; r < ROWS_OF_Q; r++) for (int h = 0; h < H; h++) out[r][h] /= total[r];
}
"""
