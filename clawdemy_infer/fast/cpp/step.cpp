// A step of any tokens of any sequences in one call. Read this file first, then product.h and
// attention.h, and vector.h where an operation on vectors is not plain.
//
// Between the products of such a step there is little to compute and much to call: nine operations
// a layer that PyTorch starts one by one, each of which wakes all threads and waits for the last.
// Here the threads start once, go through all layers together, and meet only where one needs what
// another has made:
//
//     norm        x = x + what came, and its norm          before QKV, and before gate and up
//     multiply    QKV; out; gate and up; down
//     turn        bias, norms of Q and K, RoPE; new keys and values to their pages
//     attend      over the pages
//     gate        silu(gate) up
//
// The letters are the course's: M rows, the new tokens of B sequences; L layers, D model width, F
// feed-forward width, N query heads and K KV heads of H numbers; G = N / K; I inputs and O outputs
// of a weight. D, F, G, H and K are macros: nothing else, in no header, may have such a name.
// Wanted besides (cpp_step.py hands them over): Kept, the type of keys and values; FORMAT of the
// weights; EPS of the norms.
//
//     x [M, D]    -norm->      normed [M, NORMED]
//                 -QKV->       heads [M, HEADS]             N queries, K keys, K values
//                 -turn->      queries in their place, keys and values to their pages
//                 -attend->    attended [M, N H]
//                 -out->       delta [M, DELTA]
//     x += delta  -norm->      normed
//                 -gate, up->  both [M, BOTH]               F gates, F ups
//                 -gate->      gated [M, GATED]
//                 -down->      delta                        added by the next norm
//
// Each arrow is one `omp for` that all threads share, and ends in its barrier: what an arrow writes
// the next may read. Each number is written by one thread, and its sum has one order, so that the
// result does not depend on how many threads there are. x and all sums are in fp32.
#define Result float
#include "product.h"
#include "attention.h"
#include <omp.h>

// What a clock can be read for: PARTS of cpp_step.py, in that order.
enum Part { ELEMENTWISE, QKV, ATTENTION, OUT, GATE_UP, DOWN };
// Numbers from row to row, filled up: a product writes 16 outputs at a time and reads two inputs.
constexpr int64_t filled(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
const int64_t N = G * K, HEADS = filled((N + 2 * K) * H, 16), DELTA = filled(D, 16);
const int64_t BOTH = filled(2 * F, 16), NORMED = filled(D, 2), GATED = filled(F, 2);
static_assert(H % 2 == 0, "RoPE turns pairs");

// A layer's weights, 13 words that `pointers_of` of cpp_step.py writes; what it has not is null.
// INT4 has groups of inputs.
struct Matrix { const char* panels; int64_t group; };
struct Layer {
    Matrix qkv, out, gate_up, down;
    const float *gamma, *mlp_gamma, *bias, *q_gamma, *k_gamma;
};

// 1 / sqrt(mean(x^2) + EPS) of n numbers (Zhang and Sennrich 2019, equation 4).
static inline float rms_scale(const float* x, int n) {
    float squares = 0;
    #pragma omp simd reduction(+:squares)
    for (int i = 0; i < n; i++) squares += x[i] * x[i];
    return 1 / std::sqrt(squares / n + float(EPS));
}

// x [M, D] += delta [M, DELTA], if there is any; then y = x rms_scale(x) gamma, whose rows are
// `stride` numbers apart.
template <class Out>
static void norm(float* x, const float* delta, const float* gamma, Out* y, int64_t stride,
                 int64_t M) {
    #pragma omp for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        float* row = x + m * D;
        if (delta) for (int d = 0; d < D; d++) row[d] += delta[m * DELTA + d];
        const float scale = rms_scale(row, D);
        for (int d = 0; d < D; d++) put(row[d] * scale * gamma[d], y + m * stride + d);
    }
}

// One head of q or k: its norm, if it has one, turned by the angles of its row, scaled -> to [H].
// The tables are (cos, cos) and (-sin, sin) (Su et al. 2021).
template <class Out>
static void turn(const float* head, const float* gamma, const float* cos, const float* sin,
                 float scale, Out* to) {
    float x[H];
    const float norm = gamma ? rms_scale(head, H) : 1;
    for (int h = 0; h < H; h++) x[h] = gamma ? head[h] * norm * gamma[h] : head[h];
    for (int h = 0, other = H / 2; h < H / 2; h++, other++) {
        put((x[h] * cos[h] + x[other] * sin[h]) * scale, to + h);
        put((x[other] * cos[other] + x[h] * sin[other]) * scale, to + other);
    }
}

// heads [M, HEADS]: queries are turned where they are, keys and values go to their pages.
static void turn_all(float* heads, const Layer& layer, const float* cos, const float* sin,
                     const Pages& in, const Rows& rows) {
    const int64_t M = rows.position.size(), each = N + 2 * K;
    #pragma omp for schedule(static)
    for (int64_t task = 0; task < M * each; task++) {
        const int64_t m = task / each, n = task % each;
        float* head = heads + m * HEADS + n * H;
        const float *c = cos + m * H, *s = sin + m * H;
        if (layer.bias) for (int h = 0; h < H; h++) head[h] += layer.bias[n * H + h];
        if (n < N) {
            turn(head, layer.q_gamma, c, s, SCALE, head);
            continue;
        }
        const int64_t offset = in.offset(rows.sequence[m], (n - N) % K, rows.position[m]);
        if (n < N + K) turn(head, layer.k_gamma, c, s, 1, in.keys + offset);
        else for (int h = 0; h < H; h++) put(head[h], in.values + offset + h);
    }
}

// The first `count` numbers, if fewer than WIDTH; the others are zero.
static inline vec read_some(const float* from, int64_t count) {
    if (count >= WIDTH) return read<vec>(from);
    vec x = {};
    memcpy(&x, from, count * sizeof(float));
    return x;
}
// The first `count` numbers, if fewer than WIDTH; nothing is written behind them.
template <class Out> static inline void put_some(vec x, Out* to, int64_t count) {
    if (count >= WIDTH) return put(x, to);
    Out all[WIDTH];
    put(x, all);
    memcpy(to, all, count * sizeof(Out));
}

// silu(gate) up of both [M, BOTH] -> out [M, GATED] (Shazeer 2020, SwiGLU).
static void gate(const float* both, Input* out, int64_t M) {
    const int64_t vectors = (F + WIDTH - 1) / WIDTH;               // of a row
    #pragma omp for schedule(static)
    for (int64_t task = 0; task < M * vectors; task++) {
        const int64_t m = task / vectors, f = task % vectors * WIDTH;
        const float* gates = both + m * BOTH + f;
        const vec x = read_some(gates, F - f), up = read_some(gates + F, F - f);
        const vec gated = x / (1 + power_of_2(-1.44269504f * x)) * up;
        put_some(gated, out + m * GATED + f, F - f);
    }
}

// x [M, D], the embedded tokens, becomes what the last layer leaves, and y [M, D] its norm. cos and
// sin [M, H]. Keys and values [L, blocks, K, block_size, H], from layer to layer `layer_stride`
// numbers; table [B, most_blocks]; past, num_new_tokens [B]. To `clocks` the seconds of each `Part`
// are added, unless it is null.
//
// Preconditions: M, B and `threads` are at least 1; past[b] + num_new_tokens[b] <= most_blocks
// block_size; but for `layer_stride` all is dense; x, y, keys and values lie apart from each other
// and from all that is read. No exception leaves: without memory the process ends.
extern "C" void step(float* x, float* y, const Layer* layers, const float* gamma, const float* cos,
                     const float* sin, Kept* keys, Kept* values, const int32_t* table,
                     const int64_t* past, const int64_t* num_new_tokens, double* clocks, int64_t L,
                     int64_t B, int64_t layer_stride, int64_t most_blocks, int64_t block_size,
                     int64_t window, int64_t threads) {
    const Rows rows(B, past, num_new_tokens);
    const int64_t M = rows.position.size();
    // Zeros: products read what fills the rows of `normed` and `gated` up, which nobody writes; for
    // no layers, `delta` is what the last norm adds.
    std::vector<Input> normed(M * NORMED), attended(M * N * H), gated(M * GATED);
    std::vector<float> heads(M * HEADS), delta(M * DELTA), both(M * BOTH);
    std::vector<Factor> laid_keys, laid_values;
    auto multiply_by = [&](const Matrix& matrix, const std::vector<Input>& in,
                           std::vector<float>& out) {
        const Shape shape(in.size() / M, out.size() / M, matrix.group);
        multiply(in.data(), matrix.panels, out.data(), M, shape);
    };
    #pragma omp parallel num_threads(threads)
    {
        double last = clocks ? omp_get_wtime() : 0;
        auto done = [&](Part part) {                               // the threads have just met
            if (!clocks || omp_get_thread_num()) return;
            const double time = omp_get_wtime();
            clocks[part] += time - last;
            last = time;
        };
        for (int64_t i = 0; i < L; i++) {
            const Layer& layer = layers[i];
            const Pages in = {keys + i * layer_stride, values + i * layer_stride, table,
                              most_blocks, block_size, window};
            norm(x, i ? delta.data() : nullptr, layer.gamma, normed.data(), NORMED, M);
            done(ELEMENTWISE);
            multiply_by(layer.qkv, normed, heads), done(QKV);
            turn_all(heads.data(), layer, cos, sin, in, rows), done(ELEMENTWISE);
            attend(heads.data(), HEADS, in, rows, attended.data(), laid_keys, laid_values);
            done(ATTENTION);
            multiply_by(layer.out, attended, delta), done(OUT);
            norm(x, delta.data(), layer.mlp_gamma, normed.data(), NORMED, M), done(ELEMENTWISE);
            multiply_by(layer.gate_up, normed, both), done(GATE_UP);
            gate(both.data(), gated.data(), M), done(ELEMENTWISE);
            multiply_by(layer.down, gated, delta), done(DOWN);
        }
        norm(x, delta.data(), gamma, y, D, M), done(ELEMENTWISE);
    }
}
