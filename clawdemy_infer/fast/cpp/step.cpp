// A step of any tokens of any sequences in one call.
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
// Wanted: T, the type of keys and values; FORMAT of the weights; G, H, KV, D, F of the shape; EPS
// of the norms. The residual stream x and all sums are in fp32. A product writes 16 outputs at a
// time and reads two inputs, so rows between products are filled up to that.
#define Y float
#include "product.h"
#include "attention.h"
#include <omp.h>

enum Part { ELEMENTWISE, QKV, ATTENTION, OUT, GATE_UP, DOWN };      // that a clock can be read for
constexpr int64_t filled(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// Numbers from row to row: of q, k and v; of gate and up; of what the matrices `out` and `down`
// give; of the norm, and of silu(gate) up, that go into a product.
const int64_t HEADS = filled((G + 2) * KV * H, 16), BOTH = filled(2 * F, 16), MORE = filled(D, 16);
const int64_t NORMED = filled(D, 2), GATED = filled(F, 2);

// A layer's weights; what it has not is null. INT4 has groups of inputs.
struct Matrix { const char* panels; int64_t group; };
struct Layer {
    Matrix qkv, out, gate_up, down;
    const float *gamma, *mlp_gamma, *bias, *q_gamma, *k_gamma;
};

// x [M, D] becomes x + more [M, MORE], and y, `apart` numbers from row to row, its norm (Zhang and
// Sennrich 2019, equation 4).
template <class O>
static void norm(float* x, const float* more, const float* gamma, O* y, int64_t apart, int64_t M) {
    #pragma omp for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        float* row = x + m * D; float squares = 0;
        if (more) for (int d = 0; d < D; d++) row[d] += more[m * MORE + d];
        #pragma omp simd reduction(+:squares)
        for (int d = 0; d < D; d++) squares += row[d] * row[d];
        const float scale = 1 / std::sqrt(squares / D + float(EPS));
        for (int d = 0; d < D; d++) put(row[d] * scale * gamma[d], y + m * apart + d);
    }
}

// One head of q or k: its norm, if it has one, turned by the angles of its row, scaled -> to [H].
// The tables are (cos, cos) and (-sin, sin) (Su et al. 2021).
template <class O>
static void turn(const float* head, const float* gamma, const float* cos, const float* sin,
                 float scale, O* to) {
    float x[H], squares = 0;
    #pragma omp simd reduction(+:squares)
    for (int h = 0; h < H; h++) squares += head[h] * head[h];
    const float size = gamma ? 1 / std::sqrt(squares / H + float(EPS)) : 1;
    for (int h = 0; h < H; h++) x[h] = gamma ? head[h] * size * gamma[h] : head[h];
    for (int h = 0, other = H / 2; h < H / 2; h++, other++) {
        put((x[h] * cos[h] + x[other] * sin[h]) * scale, to + h);
        put((x[other] * cos[other] + x[h] * sin[other]) * scale, to + other);
    }
}

// heads [M, HEADS]: queries are turned where they are, keys and values go to their pages.
static void turn_all(float* heads, const Layer& layer, const float* cos, const float* sin,
                     const Pages& in, const Rows& rows) {
    const int64_t M = rows.token.size(), each = (G + 2) * KV;
    #pragma omp for schedule(static)
    for (int64_t task = 0; task < M * each; task++) {
        const int64_t m = task / each, n = task % each, k = n < G * KV ? 0 : (n - G * KV) % KV;
        float* head = heads + m * HEADS + n * H;
        const float *c = cos + m * H, *s = sin + m * H;
        if (layer.bias) for (int h = 0; h < H; h++) head[h] += layer.bias[n * H + h];
        if (n < G * KV) {
            turn(head, layer.q_gamma, c, s, SCALE, head);
            continue;
        }
        const int64_t place = in.place(rows.sequence[m], k, rows.token[m]);
        if (n < (G + 1) * KV) turn(head, layer.k_gamma, c, s, 1, in.keys + place);
        else for (int h = 0; h < H; h++) put(head[h], in.values + place + h);
    }
}

// silu(gate) up of both [M, BOTH] -> out [M, GATED] (Shazeer 2020, SwiGLU).
static void gate(const float* both, IN* out, int64_t M) {
    const int64_t parts = (F + WIDTH - 1) / WIDTH;
    #pragma omp for schedule(static)
    for (int64_t part = 0; part < M * parts; part++) {
        const int64_t m = part / parts, f = part % parts * WIDTH;
        const float* gates = both + m * BOTH + f;
        const vec x = read_some(gates, F - f), up = read_some(gates + F, F - f);
        const vec gated = x / (1 + power_of_2(-1.44269504f * x)) * up;
        put_some(gated, out + m * GATED + f, F - f);
    }
}

// x [M, D], the embedded tokens, becomes what the last layer leaves, and y its norm. cos, sin
// [M, H]. Keys and values [L, blocks, KV, size, H], those of a layer `of_layer` numbers apart;
// table [B, columns]; past, brought [B]. The seconds of each `Part` are added to
// `clocks`, unless it is null.
extern "C" void step(float* x, float* y, const Layer* layers, const float* gamma, const float* cos,
                     const float* sin, T* keys, T* values, const int32_t* table,
                     const int64_t* past, const int64_t* brought, double* clocks, int64_t L,
                     int64_t B, int64_t of_layer, int64_t columns, int64_t size, int64_t window,
                     int64_t threads) {
    const Rows rows(B, past, brought);
    const int64_t M = rows.token.size();
    std::vector<IN> normed(M * NORMED), seen(M * G * KV * H), gated(M * GATED);
    std::vector<float> heads(M * HEADS), more(M * MORE), both(M * BOTH);
    std::vector<R> room[2];
    auto multiplied = [&](const std::vector<IN>& in, const Matrix& matrix,
                          std::vector<float>& out) {
        const Size size(in.size() / M, out.size() / M, matrix.group);
        multiply(in.data(), matrix.panels, out.data(), M, size);
    };
    #pragma omp parallel num_threads(threads)
    {
        double last = clocks ? omp_get_wtime() : 0;
        auto done = [&](Part part) {                               // the threads have just met
            if (!clocks || omp_get_thread_num()) return;
            const double now = omp_get_wtime();
            clocks[part] += now - last;
            last = now;
        };
        for (int64_t i = 0; i < L; i++) {
            const Layer& layer = layers[i];
            const Pages in = {keys + i * of_layer, values + i * of_layer, table,
                              KV, columns, size, window};
            norm(x, i ? more.data() : nullptr, layer.gamma, normed.data(), NORMED, M);
            done(ELEMENTWISE);
            multiplied(normed, layer.qkv, heads), done(QKV);
            turn_all(heads.data(), layer, cos, sin, in, rows), done(ELEMENTWISE);
            attend(heads.data(), HEADS, in, rows, seen.data(), room), done(ATTENTION);
            multiplied(seen, layer.out, more), done(OUT);
            norm(x, more.data(), layer.mlp_gamma, normed.data(), NORMED, M), done(ELEMENTWISE);
            multiplied(normed, layer.gate_up, both), done(GATE_UP);
            gate(both.data(), gated.data(), M), done(ELEMENTWISE);
            multiplied(gated, layer.down, more), done(DOWN);
        }
        norm(x, more.data(), gamma, y, D, M), done(ELEMENTWISE);
    }
}
