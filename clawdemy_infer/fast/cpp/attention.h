// Attention of new tokens over pages: keys and values are read where the block table says they lie.
//
//     out[m] = softmax(q[m] k^T / sqrt(H)) v         over the tokens of its sequence up to itself,
//                                                    or the last `window` of them
//
// Wanted: T, the type of keys and values; G queries to a KV head, H numbers to a head. Queries come
// scaled by log2(e) / sqrt(H), so that exponentials are powers of 2; all sums are in fp32, and
// scores never leave the nearest cache: of each query there is a running maximum, and sums that are
// scaled when it rises (Dao et al. 2022, FlashAttention, algorithm 1).
//
// A token that comes alone or with a few others of its sequence is attended for itself
// (`attend_one`): its keys and values are read once, for the G queries of a KV head. The many of a
// prompt are attended in blocks (`attend_block`): for few tokens reading is what costs, for many
// multiplying.
//
// Threads share rows x KV heads, or blocks of queries x KV heads, longest first.
#pragma once

#include "vector.h"
#include <vector>

const int APART = 16;                                              // tokens: more are a block
const int STRIDE = 16;                                             // keys whose scores are in hand
const int QUERIES = 16, KEYS = 64;                                 // tokens of a block
const int ROWS_OF_Q = G * QUERIES, HP = (H + 15) / 16 * 16;        // H filled up with zeros
const float NEVER = -1e30f;
const float SCALE = 1.44269504f / std::sqrt(float(H));

// Blocks of `size` tokens, [blocks, K, size, H], of which sequence b has table[b].
struct Pages {
    T *keys, *values; const int32_t* table;
    int64_t K, columns, size, window;
    int64_t place(int64_t b, int64_t k, int64_t token) const {
        return ((table[b * columns + token / size] * K + k) * size + token % size) * H;
    }
};

// The rows of a step: B sequences bring new[b] tokens each, behind past[b].
struct Rows {
    int64_t B; const int64_t *past, *brought;
    std::vector<int64_t> sequence, token;                          // of each row
    Rows(int64_t B, const int64_t* past, const int64_t* brought)
        : B(B), past(past), brought(brought) {
        for (int64_t b = 0; b < B; b++)
            for (int64_t i = 0; i < brought[b]; i++)
                sequence.push_back(b), token.push_back(past[b] + i);
    }
};

static inline void fetch(const T* row) {
    for (int h = 0; h < H; h += 64 / sizeof(T)) __builtin_prefetch(row + h);
}

// G queries of one token and KV head -> out [G, H]. While a key is worked on, the one that comes
// STRIDE tokens later is asked of memory: blocks lie apart, and no CPU guesses where the next one
// begins.
template <class O>
static void attend_one(const float* query, const Pages& in, int64_t b, int64_t k, int64_t token,
                       O* out) {
    const int64_t length = token + 1;
    float sum[G][H] = {}, total[G] = {}, largest[G];
    for (int g = 0; g < G; g++) largest[g] = NEVER;
    int64_t first = std::max(int64_t(0), length - in.window), here = in.place(b, k, first);
    while (first < length) {
        const int64_t end = std::min({first + STRIDE, (first / in.size + 1) * in.size, length});
        const int64_t next = in.place(b, k, std::min(end, length - 1));
        const int n = end - first;
        alignas(64) float score[G][STRIDE];
        for (int g = 0; g < G; g++) for (int t = n; t < STRIDE; t++) score[g][t] = 2 * NEVER;
        for (int t = 0; t < n; t++) {
            fetch(in.keys + next + t * H);
            const T* key = in.keys + here + t * H;
            for (int g = 0; g < G; g++) {
                float dot = 0;
                #pragma omp simd reduction(+:dot)
                for (int h = 0; h < H; h++) dot += query[g * H + h] * number(key[h]);
                score[g][t] = dot;
            }
        }
        for (int g = 0; g < G; g++) {
            vec most = all(largest[g]), added = {};
            for (int t = 0; t < STRIDE; t += WIDTH) most = larger(most, read<vec>(score[g] + t));
            const float now = largest_of(most), less = power_of_2(all(largest[g] - now))[0];
            for (int t = 0; t < STRIDE; t += WIDTH) {
                const vec weight = power_of_2(read<vec>(score[g] + t) - now);
                added += weight, put(weight, score[g] + t);
            }
            for (int h = 0; h < H; h++) sum[g][h] *= less;
            total[g] = total[g] * less + sum_of(added);
            largest[g] = now;
        }
        for (int t = 0; t < n; t++) {
            fetch(in.values + next + t * H);
            const T* value = in.values + here + t * H;
            for (int g = 0; g < G; g++)
                #pragma omp simd
                for (int h = 0; h < H; h++) sum[g][h] += score[g][t] * number(value[h]);
        }
        first = end, here = next;
    }
    for (int g = 0; g < G; g++)
        for (int h = 0; h < H; h++) put(sum[g][h] / total[g], out + g * H + h);
}

// ---- a block of queries ----
//
//     scores [G * QUERIES, KEYS]  = Q K^T
//     out    [G * QUERIES, H]     = less out + P V       P the exponentials of the scores
//
// Keys and values are first laid out as the multiplier takes them, once for all queries: 16 columns
// side by side, of each one number (fp32), or two where AVX512_BF16 multiplies pairs (bf16).

#ifdef __AVX512BF16__
typedef T R;
#else
typedef float R;                                                   // what the products are in
#endif
template <class N> struct By;
template <> struct By<float> {
    typedef vec weights; static const int PAIR = 1, PARTS = ::PARTS;
    static weights get(const float* w) { return read<vec>(w); }
    static weights every(const float* x) { return all(*x); }
    static vec add(vec sum, weights w, weights x) { return sum + w * x; }
};
#ifdef __AVX512BF16__
template <> struct By<bf16> {
    typedef __m512bh weights; static const int PAIR = 2, PARTS = 1;
    static weights get(const bf16* w) { return (weights)_mm512_loadu_si512(w); }
    static weights every(const bf16* x) { return (weights)_mm512_set1_epi32(read<int32_t>(x)); }
    static vec add(vec sum, weights w, weights x) {
        return (vec)_mm512_dpbf16_ps((__m512)sum, w, x);
    }
};
#endif
typedef By<R> by;

// KEYS keys [KEYS, H] -> [KEYS / 16, HP / PAIR, 16, PAIR]; their values -> [HP / 16, KEYS / PAIR,
// 16, PAIR]. What lies outside the tokens `from` to `length` is zero: no weight of 0 hides a NaN.
static void lay_out(const Pages& in, int64_t b, int64_t k, int64_t first, int64_t from,
                    int64_t length, R* keys, R* values) {
    const int PAIR = by::PAIR;
    auto at = [](int depths, int depth, int column) {
        const int row = column / 16 * depths + depth / PAIR * PAIR;
        return row * 16 + column % 16 * PAIR + depth % PAIR;
    };
    for (int t = 0; t < KEYS; t++) {
        const bool there = first + t >= from && first + t < length;
        const int64_t place = there ? in.place(b, k, first + t) : 0;
        for (int h = 0; h < HP; h++) {
            put(there && h < H ? number(in.keys[place + h]) : 0.f, keys + at(HP, h, t));
            put(there && h < H ? number(in.values[place + h]) : 0.f, values + at(KEYS, t, h));
        }
    }
}

// out [ROWS_OF_Q, columns] = less out + x w, for x [ROWS_OF_Q, depth] and w [columns / 16, depth,
// 16]; less [ROWS_OF_Q], or nothing of what was there.
template <int depth, int columns>
static void add_product(const R* x, const R* w, const float* less, float* out) {
    const int PANELS = WIDTH < 16 ? 1 : columns % 64 == 0 ? 4 : columns % 32 == 0 ? 2 : 1;
    const int VECS = PANELS * PARTS;
    for (int row = 0; row < ROWS_OF_Q; row += 4)
        for (int c = 0; c < columns; c += 16 * PANELS) {
            vec sum[4][VECS];
            float* to = out + row * columns + c;
            for (int r = 0; r < 4; r++)
                for (int p = 0; p < VECS; p++) {
                    const float* before = to + r * columns + p * WIDTH;
                    sum[r][p] = less ? read<vec>(before) * less[row + r] : vec{};
                }
            for (int d = 0; d < depth; d += by::PAIR) {
                typename by::weights made[VECS];
                for (int p = 0; p < VECS; p++) {
                    const R* panel = w + (c + p / PARTS * 16) * depth;
                    made[p] = by::get(panel + d * 16 + p % PARTS * WIDTH);
                }
                for (int r = 0; r < 4; r++) {
                    const auto number = by::every(x + (row + r) * depth + d);
                    for (int p = 0; p < VECS; p++) sum[r][p] = by::add(sum[r][p], made[p], number);
                }
            }
            for (int r = 0; r < 4; r++)
                for (int p = 0; p < VECS; p++) put(sum[r][p], to + r * columns + p * WIDTH);
        }
}

// Queries q [ROWS_OF_Q, HP] of the tokens from `token` on, over the keys from `begin` on, KEYS at a
// time -> out [ROWS_OF_Q, HP].
static void attend_block(const R* q, int64_t token, int count, int64_t begin, int64_t window,
                         const R* keys, const R* values, float* out) {
    alignas(64) float score[ROWS_OF_Q * KEYS];
    alignas(64) R weight[ROWS_OF_Q * KEYS];
    float largest[ROWS_OF_Q], total[ROWS_OF_Q] = {}, less[ROWS_OF_Q];
    for (float& each : largest) each = NEVER;
    for (int i = 0; i < ROWS_OF_Q * HP; i++) out[i] = 0;
    for (int64_t first = begin; first < token + count;
         first += KEYS, keys += KEYS * HP, values += KEYS * HP) {
        if (first + KEYS <= token + 1 - window) continue;          // behind the window of them all
        const bool cut = first + KEYS > token + 1 || first <= token + QUERIES - 1 - window;
        add_product<HP, KEYS>(q, keys, nullptr, score);
        for (int r = 0; r < ROWS_OF_Q; r++) {
            float* mine = score + r * KEYS;
            const int64_t last = token + r % QUERIES - first;      // that this query sees
            if (cut) for (int t = 0; t < KEYS; t++)
                if (t > last || t <= last - window) mine[t] = 2 * NEVER;
            vec most = all(largest[r]), added = {};
            for (int t = 0; t < KEYS; t += WIDTH) most = larger(most, read<vec>(mine + t));
            const float now = largest_of(most);
            for (int t = 0; t < KEYS; t += WIDTH) {
                const vec power = power_of_2(read<vec>(mine + t) - now);
                added += power, put(power, weight + r * KEYS + t);
            }
            less[r] = power_of_2(all(largest[r] - now))[0];
            total[r] = total[r] * less[r] + sum_of(added);
            largest[r] = now;
        }
        add_product<KEYS, HP>(weight, values, less, out);
    }
    for (int r = 0; r < ROWS_OF_Q; r++) for (int h = 0; h < H; h++) out[r * HP + h] /= total[r];
}

// ---- rows of any sequences ----

// Row m of q begins at q + m * stride with its K G H numbers; out is [M, K G H]. All threads of a
// parallel region share it. `room` is for keys and values as they are laid out.
template <class O>
static void attend(const float* q, int64_t stride, const Pages& in, const Rows& rows, O* out,
                   std::vector<R>* room) {
    const int64_t K = in.K;
    for (int64_t b = 0, row = 0; b < rows.B;) {
        int64_t count = rows.brought[b];
        if (count <= APART) {                                      // and others like it behind it
            for (b++; b < rows.B && rows.brought[b] <= APART; b++) count += rows.brought[b];
            #pragma omp for schedule(dynamic)
            for (int64_t task = row * K; task < (row + count) * K; task++) {
                const int64_t m = task / K, k = task % K;
                attend_one(q + m * stride + k * G * H, in, rows.sequence[m], k, rows.token[m],
                           out + task * G * H);
            }
        } else {
            const int64_t past = rows.past[b], length = past + count;
            const int64_t from = std::max(int64_t(0), past + 1 - in.window);    // seen by any
            const int64_t begin = from / KEYS * KEYS;
            const int64_t blocks = (length - begin + KEYS - 1) / KEYS;
            #pragma omp single
            for (int i = 0; i < 2; i++) room[i].resize(K * blocks * KEYS * HP);
            #pragma omp for schedule(static)
            for (int64_t task = 0; task < K * blocks; task++)
                lay_out(in, b, task / blocks, begin + task % blocks * KEYS, from, length,
                        &room[0][task * KEYS * HP], &room[1][task * KEYS * HP]);
            #pragma omp for schedule(dynamic)
            for (int64_t task = K * ((count + QUERIES - 1) / QUERIES) - 1; task >= 0; task--) {
                const int64_t k = task % K, first = task / K * QUERIES, at = k * blocks * KEYS * HP;
                const int mine = std::min(int64_t(QUERIES), count - first);
                alignas(64) R block[ROWS_OF_Q * HP] = {};
                alignas(64) float sum[ROWS_OF_Q * HP];
                for (int g = 0; g < G; g++)
                    for (int i = 0; i < mine; i++)
                        for (int h = 0; h < H; h++)
                            put(q[(row + first + i) * stride + (k * G + g) * H + h],
                                block + (g * QUERIES + i) * HP + h);
                attend_block(block, past + first, mine, begin, in.window, &room[0][at],
                             &room[1][at], sum);
                for (int i = 0; i < mine; i++) {
                    const int64_t m = row + first + i;
                    O* to = out + (m * K + k) * G * H;
                    bool nan = false;
                    for (int g = 0; g < G; g++)
                        for (int h = 0; h < H; h++) {
                            const float x = sum[(g * QUERIES + i) * HP + h];
                            nan |= x != x;
                            put(x, to + g * H + h);
                        }
                    // A weight of 0 does not hide a NaN among the values: this token for itself.
                    if (nan)
                        attend_one(q + m * stride + k * G * H, in, b, k, past + first + i, to);
                }
            }
            b++;
        }
        row += count;
    }
}
