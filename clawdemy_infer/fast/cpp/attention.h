// Attention of new tokens over pages: keys and values are read where the block table says they lie.
// Read step.cpp first, which has the letters.
//
//     out[m] = softmax(q[m] k^T / sqrt(H)) v         over the tokens of its sequence up to itself,
//                                                    or the last `window` of them
//
// A query in position p sees the tokens t with p - window < t <= p. Queries come scaled by
// log2(e) / sqrt(H), so that exponentials are powers of 2. Scores are made a few at a time, and
// each query keeps their maximum m, the sum of its weights and the sum of its weighted values (Dao
// et al. 2022, FlashAttention, algorithm 1). New scores s_t change them:
//
//     m' = max(m, s_t)                            rescale = 2^(m - m')
//     total' = rescale total + sum 2^(s_t - m')   sum' = rescale sum + sum 2^(s_t - m') v_t
//
// and at the end out = sum / total. All sums are in fp32. There are two ways:
//
//     attend_one     Up to ALONE new tokens of a sequence, each for itself: keys and values are
//                    read once for the G queries of a KV head, and 16 times by 16 tokens. Reading
//                    is what costs.
//     attend_block   More, as in a prompt: QUERIES of them and KEYS keys at a time are two products
//                    of matrices. Multiplying is what costs. Before, all keys and values that any
//                    of them sees are copied into the layout that products read, in every layer:
//                    2 K S H numbers of memory for S tokens. Scores of a block, 4 KiB for each of
//                    the G heads, do not leave the second cache.
//
// Where AVX512_BF16 multiplies, a block rounds queries and weights to bf16, and `attend_one` rounds
// neither: a prompt and a decode of the same token then differ by some 2^-9.
//
// Threads share rows x KV heads, in order; of a prompt, blocks of queries x KV heads, the last
// first: they see most. A lone decode keeps K threads busy: S is not split.
//
// Wanted: Kept, the type of keys and values; G, K, H.
#pragma once

#include "vector.h"
#include <vector>

const int ALONE = 16;                                              // new tokens: more are a block
const int STRIDE = 16;                                             // keys whose scores are in hand
const int QUERIES = 16, KEYS = 64;                                 // tokens of a block
const int QUERY_ROWS = G * QUERIES;
const int HP = (H + 15) / 16 * 16;                                 // H filled up with zeros
// Below every score. What is hidden gets twice that: a query which has not seen a key yet, whose
// maximum is NEVER, gives it 2^NEVER = 0 and not 2^0.
const float NEVER = -1e30f;
const float SCALE = 1.44269504f / std::sqrt(float(H));

// Blocks of `block_size` tokens, [blocks, K, block_size, H]; row b of the table, which has
// `most_blocks` numbers, says which of them sequence b has.
struct Pages {
    Kept *keys, *values; const int32_t* table;
    int64_t most_blocks, block_size, window;
    // Where the H numbers of a token begin.
    int64_t offset(int64_t b, int64_t k, int64_t token) const {
        const int64_t block = table[b * most_blocks + token / block_size];
        return ((block * K + k) * block_size + token % block_size) * H;
    }
};

// The rows of a step: B sequences bring num_new_tokens[b] each, behind past[b].
struct Rows {
    int64_t B; const int64_t *past, *num_new_tokens;
    std::vector<int64_t> sequence, position;                       // of each row
    Rows(int64_t B, const int64_t* past, const int64_t* num_new_tokens)
        : B(B), past(past), num_new_tokens(num_new_tokens) {
        for (int64_t b = 0; b < B; b++)
            for (int64_t i = 0; i < num_new_tokens[b]; i++) {
                sequence.push_back(b);
                position.push_back(past[b] + i);
            }
    }
};

// The next n scores of a query -> their weights. Returned is `rescale`, of which what was summed
// with older weights has to be multiplied.
template <int n, class W>
static inline float online_softmax(const float* score, W* weight, float& largest, float& total) {
    vec most = broadcast(largest), added = {};
    for (int t = 0; t < n; t += WIDTH) most = larger(most, read<vec>(score + t));
    const float risen = largest_of(most);
    const float rescale = power_of_2(broadcast(largest - risen))[0];
    for (int t = 0; t < n; t += WIDTH) {
        const vec power = power_of_2(read<vec>(score + t) - risen);
        added += power;
        put(power, weight + t);
    }
    total = total * rescale + sum_of(added);
    largest = risen;
    return rescale;
}

// ---- one token ----

// Asks memory for the lines of a key or value; perhaps not for the last, if it begins within one.
static inline void fetch(const Kept* row) {
    for (int h = 0; h < H; h += 64 / sizeof(Kept)) __builtin_prefetch(row + h);
}

// G queries of one token and KV head -> out [G, H]. The keys from `first` to `end` lie in one
// block, at `here`. While one is worked on, that which comes STRIDE tokens later is asked of
// memory: blocks lie apart, and no CPU guesses where the next one begins. (What is asked for may
// lie beyond the end of all keys: it is never read.)
template <class Out>
static void attend_one(const float* query, const Pages& in, int64_t b, int64_t k, int64_t position,
                       Out* out) {
    const int64_t length = position + 1;
    float sum[G][H] = {}, total[G] = {}, largest[G];
    for (int g = 0; g < G; g++) largest[g] = NEVER;
    int64_t first = std::max(int64_t(0), length - in.window), here = in.offset(b, k, first);
    while (first < length) {
        const int64_t end_of_block = (first / in.block_size + 1) * in.block_size;
        const int64_t end = std::min({first + STRIDE, end_of_block, length});
        const int64_t next = in.offset(b, k, std::min(end, length - 1));
        const int n = end - first;
        alignas(64) float score[G][STRIDE];
        for (int g = 0; g < G; g++) for (int t = n; t < STRIDE; t++) score[g][t] = 2 * NEVER;
        for (int t = 0; t < n; t++) {
            fetch(in.keys + next + t * H);
            const Kept* key = in.keys + here + t * H;
            for (int g = 0; g < G; g++) {
                float dot = 0;
                #pragma omp simd reduction(+:dot)
                for (int h = 0; h < H; h++) dot += query[g * H + h] * number(key[h]);
                score[g][t] = dot;
            }
        }
        for (int g = 0; g < G; g++) {
            const float rescale = online_softmax<STRIDE>(score[g], score[g], largest[g], total[g]);
            for (int h = 0; h < H; h++) sum[g][h] *= rescale;
        }
        for (int t = 0; t < n; t++) {
            fetch(in.values + next + t * H);
            const Kept* value = in.values + here + t * H;
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
//     score [QUERY_ROWS, KEYS]  = Q K^T                 row g QUERIES + i is query i of head g
//     sum   [QUERY_ROWS, HP]    = rescale sum + W V     W the weights
//
// The right factor of a product lies as [columns / 16, depth / PAIR, 16, PAIR]: 16 columns side by
// side, of each one number (fp32), or two where AVX512_BF16 multiplies pairs.

#ifdef __AVX512BF16__
typedef Kept Factor;                                               // what products multiply
#else
typedef float Factor;
#endif
template <class Number> struct By;
template <> struct By<float> {
    typedef vec vector; static const int PAIR = 1;
    static vector load(const float* w) { return read<vec>(w); }
    static vector broadcast(const float* x) { return ::broadcast(*x); }
    static vec add(vec sum, vector w, vector x) { return sum + w * x; }
};
#ifdef __AVX512BF16__
template <> struct By<bf16> {
    typedef __m512bh vector; static const int PAIR = 2;
    static vector load(const bf16* w) { return (vector)_mm512_loadu_si512(w); }
    static vector broadcast(const bf16* x) { return (vector)_mm512_set1_epi32(read<int32_t>(x)); }
    static vec add(vec sum, vector w, vector x) {
        return (vec)_mm512_dpbf16_ps((__m512)sum, w, x);
    }
};
#endif
typedef By<Factor> by;

// KEYS tokens from `first` on: keys become the right factor of depth HP and KEYS columns, values
// that of depth KEYS and HP columns. What lies outside the tokens `from` to `length` is zero, as no
// weight of 0 hides a NaN.
static void lay_out(const Pages& in, int64_t b, int64_t k, int64_t first, int64_t from,
                    int64_t length, Factor* keys, Factor* values) {
    auto at = [](int depths, int depth, int column) {
        const int PAIR = by::PAIR, row = column / 16 * depths + depth / PAIR * PAIR;
        return row * 16 + column % 16 * PAIR + depth % PAIR;
    };
    for (int t = 0; t < KEYS; t++) {
        const bool there = first + t >= from && first + t < length;
        const int64_t offset = there ? in.offset(b, k, first + t) : 0;
        for (int h = 0; h < HP; h++) {
            put(there && h < H ? number(in.keys[offset + h]) : 0.f, keys + at(HP, h, t));
            put(there && h < H ? number(in.values[offset + h]) : 0.f, values + at(KEYS, t, h));
        }
    }
}

// out [QUERY_ROWS, columns] = rescale out + x w, for x [QUERY_ROWS, depth] and the right factor w;
// rescale [QUERY_ROWS], or null, which is 0. ROWS x ACROSS sums are in registers.
template <int depth, int columns>
static void add_product(const Factor* x, const Factor* w, const float* rescale, float* out) {
    const int ROWS = 4, WIDE = WIDTH < 16 ? 1 : columns % 64 == 0 ? 4 : columns % 32 == 0 ? 2 : 1;
    const int ACROSS = WIDE * VECS;
    for (int row = 0; row < QUERY_ROWS; row += ROWS)
        for (int c = 0; c < columns; c += 16 * WIDE) {
            vec sum[ROWS][ACROSS];
            float* to = out + row * columns + c;
            for (int r = 0; r < ROWS; r++)
                for (int p = 0; p < ACROSS; p++) {
                    const float* before = to + r * columns + p * WIDTH;
                    sum[r][p] = rescale ? read<vec>(before) * rescale[row + r] : vec{};
                }
            for (int d = 0; d < depth; d += by::PAIR) {
                by::vector right[ACROSS];
                for (int p = 0; p < ACROSS; p++) {
                    const Factor* panel = w + (c + p / VECS * 16) * depth;
                    right[p] = by::load(panel + d * 16 + p % VECS * WIDTH);
                }
                for (int r = 0; r < ROWS; r++) {
                    const auto left = by::broadcast(x + (row + r) * depth + d);
                    for (int p = 0; p < ACROSS; p++) sum[r][p] = by::add(sum[r][p], right[p], left);
                }
            }
            for (int r = 0; r < ROWS; r++)
                for (int p = 0; p < ACROSS; p++) put(sum[r][p], to + r * columns + p * WIDTH);
        }
}

// Queries q [QUERY_ROWS, HP] from `position` on, of which `count` are real, over keys and values as
// `lay_out` leaves them, from token `begin` on -> out [QUERY_ROWS, HP]; what it has for the others
// means nothing.
static void attend_block(const Factor* q, int64_t position, int count, int64_t begin,
                         int64_t window, const Factor* keys, const Factor* values, float* out) {
    static_assert(64 * G * (128 + 2 * HP) <= 4 << 20, "the stack has no room for a block");
    alignas(64) float score[QUERY_ROWS * KEYS];
    alignas(64) Factor weight[QUERY_ROWS * KEYS];
    float largest[QUERY_ROWS], total[QUERY_ROWS] = {}, rescale[QUERY_ROWS];
    for (float& each : largest) each = NEVER;
    for (int i = 0; i < QUERY_ROWS * HP; i++) out[i] = 0;
    for (int64_t first = begin; first < position + count;
         first += KEYS, keys += KEYS * HP, values += KEYS * HP) {
        if (first + KEYS <= position + 1 - window) continue;       // before what the first sees
        const bool some_hidden = first + KEYS > position + 1
                              || first <= position + QUERIES - 1 - window;
        add_product<HP, KEYS>(q, keys, nullptr, score);
        for (int r = 0; r < QUERY_ROWS; r++) {
            float* row = score + r * KEYS;
            const int64_t last = position + r % QUERIES - first;   // that this query sees
            if (some_hidden) for (int t = 0; t < KEYS; t++)
                if (t > last || t <= last - window) row[t] = 2 * NEVER;
            rescale[r] = online_softmax<KEYS>(row, weight + r * KEYS, largest[r], total[r]);
        }
        add_product<KEYS, HP>(weight, values, rescale, out);
    }
    for (int r = 0; r < QUERY_ROWS; r++) for (int h = 0; h < H; h++) out[r * HP + h] /= total[r];
}

// ---- rows of any sequences ----
//
// Row m of q begins at q + m * stride with its N H numbers; out is [M, N H]. All threads of a
// parallel region call these together, and wait for each other behind every `omp for`.

// The rows from `begin` to `end`.
template <class Out>
static void attend_alone(const float* q, int64_t stride, const Pages& in, const Rows& rows,
                         int64_t begin, int64_t end, Out* out) {
    #pragma omp for schedule(dynamic)
    for (int64_t task = begin * K; task < end * K; task++) {
        const int64_t m = task / K, k = task % K;
        attend_one(q + m * stride + k * G * H, in, rows.sequence[m], k, rows.position[m],
                   out + task * G * H);
    }
}

// The rows from `row` on, which sequence b brings. `keys`, `values`: memory to lay them out in,
// [K, blocks of KEYS tokens, KEYS HP].
template <class Out>
static void attend_prompt(const float* q, int64_t stride, const Pages& in, const Rows& rows,
                          int64_t b, int64_t row, Out* out, std::vector<Factor>& keys,
                          std::vector<Factor>& values) {
    const int64_t past = rows.past[b], count = rows.num_new_tokens[b], length = past + count;
    const int64_t from = std::max(int64_t(0), past + 1 - in.window);    // seen by any of them
    const int64_t begin = from / KEYS * KEYS, blocks = (length - begin + KEYS - 1) / KEYS;
    #pragma omp single
    {
        keys.resize(K * blocks * KEYS * HP);
        values.resize(K * blocks * KEYS * HP);
    }
    #pragma omp for schedule(static)
    for (int64_t task = 0; task < K * blocks; task++)
        lay_out(in, b, task / blocks, begin + task % blocks * KEYS, from, length,
                &keys[task * KEYS * HP], &values[task * KEYS * HP]);
    #pragma omp for schedule(dynamic)
    for (int64_t task = K * ((count + QUERIES - 1) / QUERIES) - 1; task >= 0; task--) {
        const int64_t k = task % K, first = task / K * QUERIES;    // query of the sequence's
        const int real = std::min(int64_t(QUERIES), count - first);
        alignas(64) Factor block[QUERY_ROWS * HP] = {};
        alignas(64) float sum[QUERY_ROWS * HP];
        for (int i = 0; i < real; i++) {
            const float* heads = q + (row + first + i) * stride + k * G * H;
            for (int g = 0; g < G; g++)
                for (int h = 0; h < H; h++)
                    put(heads[g * H + h], block + (g * QUERIES + i) * HP + h);
        }
        const int64_t laid = k * blocks * KEYS * HP;
        attend_block(block, past + first, real, begin, in.window, &keys[laid], &values[laid], sum);
        for (int i = 0; i < real; i++) {
            const int64_t m = row + first + i;
            Out* to = out + (m * K + k) * G * H;
            bool nan = false;
            for (int g = 0; g < G; g++)
                for (int h = 0; h < H; h++) {
                    const float x = sum[(g * QUERIES + i) * HP + h];
                    nan |= x != x;
                    put(x, to + g * H + h);
                }
            // Perhaps 0 * NaN, of a value that the query does not see: again, over what it sees.
            if (nan) attend_one(q + m * stride + k * G * H, in, b, k, past + first + i, to);
        }
    }
}

template <class Out>
static void attend(const float* q, int64_t stride, const Pages& in, const Rows& rows, Out* out,
                   std::vector<Factor>& keys, std::vector<Factor>& values) {
    const int64_t* brought = rows.num_new_tokens;
    for (int64_t b = 0, row = 0; b < rows.B;) {
        int64_t count = brought[b];
        if (count > ALONE) attend_prompt(q, stride, in, rows, b++, row, out, keys, values);
        else {                                                     // with others like it behind it
            for (b++; b < rows.B && brought[b] <= ALONE; b++) count += brought[b];
            attend_alone(q, stride, in, rows, row, row + count, out);
        }
        row += count;
    }
}
