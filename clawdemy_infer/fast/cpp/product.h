// A product of activations and a packed weight, meant to be as fast as memory for a few rows, and
// as the multipliers for many. FORMAT says what the weight is kept in.
//
//     Y [M, O] = X [M, I] W^T           sums in fp32
//
// A *panel* is 16 outputs side by side. One step through it has, for each of them,
//
//     FP32    1 input     64 bytes
//     FP16    1 input     32 bytes
//     BF16    2 inputs    64 bytes; one pair behind the other
//     INT8    2 inputs    32 bytes; the same, and 16 scales in fp32 stand in front of the panel
//     INT4    8 inputs    64 bytes; behind each group of inputs 16 scales and 16 offsets in fp16
//
//     weight = O/16 panels, one behind the other
//     panel  = FRONT bytes, then groups        group = steps, then BEHIND bytes
//
// Only INT4 has more groups than one. Its step has 4 bytes for each output, lowest bits first:
//
//     bits     0-3   4-7   8-11   12-15   16-19   20-23   24-27   28-31
//     input     0     2     4       6       1       3       5       7
//
// so that a shift by 4 j brings inputs 2 j and 2 j + 1 to the lowest bits of two words of 16. With
// w = (code - zero) scale, the sum over a group is scale (sum of code x) + offset (sum of x), where
// offset = -zero scale.
//
// Where the processor multiplies pairs of bf16 (AVX512_BF16), X is in bf16 for BF16, INT8 and INT4,
// so that an x in fp32 is rounded to 8 bits, and the codes become bf16, which holds such numbers
// exactly. Else all numbers become fp32.
//
// A *tile* multiplies a few rows of X by 1 or 3 panels, its sums in registers until all of I has
// gone by (in INT4, those of a group). Three, as each number of x that is broadcast then serves
// three; but rows x panels x VECS sums, panels x VECS weights and one x must find registers.
//
// A *strip* of 3 panels comes from memory once and is multiplied by all rows of X, tile by tile, as
// long as it stays in the nearer caches: it has 192 I bytes in FP32, 96 I in BF16, 27 I in INT4,
// and what it asks for takes as much again. Beyond, each tile reads it from the third cache. X, 2
// or 4 M I bytes, is read anew for each strip.
//
// What is left is to keep memory busy while tiles compute. So each asks for what comes next, at
// each step for a line of `lines` panels:
//
//     tiles of a strip    tile t asks for                                       lines
//     1                   what is AHEAD in its own panels                       all of its panels
//     2                   panels 2 t and 2 t + 1 of what follows the strip      2
//     more                panel t of what follows, for t < 3; then nothing      1; 0
//
// Threads share the strips, so that O/48 of them have work, whatever M is.
//
// Wanted: FORMAT, and Result, the type of Y.
#pragma once

#include "vector.h"
#include <vector>

#define FP32 1
#define FP16 2
#define BF16 3                                                     // from here on bf16 holds all
#define INT8 4
#define INT4 5

// Inputs and bytes of a step; bytes in front of a panel, and behind a group.
const int64_t INPUTS = FORMAT == INT4 ? 8 : (FORMAT == BF16 || FORMAT == INT8) ? 2 : 1;
const int64_t STEP = FORMAT == FP16 || FORMAT == INT8 ? 32 : 64;
const int64_t FRONT = FORMAT == INT8 ? 64 : 0, BEHIND = FORMAT == INT4 ? 64 : 0;
const int64_t PANELS = 3;                                          // of a strip
const int64_t AHEAD = 1024;                                        // bytes, 16 steps of FP32

// ---- one step: `load` its bytes; from them `unpacked`, the weights of the j-th operand ----

#if defined(__AVX512BF16__) && FORMAT >= BF16
typedef bf16 Input;                                                // what X is in
typedef int32_t Operand;                                           // what is broadcast: a pair
typedef __m512bh weights;
static inline weights broadcast(const Operand* x) {
    return (weights)_mm512_set1_epi32(read<Operand>(x));
}
static inline vec add(vec sum, weights w, weights x) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, w, x);
}
#else
typedef float Input, Operand;
typedef vec weights;
static inline weights broadcast(const Operand* x) { return broadcast(*x); }
static inline vec add(vec sum, weights w, weights x) { return sum + w * x; }
#endif
// Operands of a step: INT4 4 pairs or 8 numbers, BF16 and INT8 1 or 2, FP32 and FP16 1 number.
const int64_t OPERANDS = INPUTS * sizeof(Input) / sizeof(Operand);

#if FORMAT == FP32 || FORMAT == FP16
typedef vec bytes;
static inline bytes load(const char* w, int v) {
    return FORMAT == FP32 ? read<vec>(w + v * 4 * WIDTH) : from_fp16(w + v * 2 * WIDTH);
}
static inline weights unpacked(bytes w, int j) { return w; }

#elif defined(__AVX512BF16__) && FORMAT == INT4
// The processor looks 32 words of 16 bits up in a table at once, by their lowest 5 bits: a shift
// and a look make 32 weights. The fifth belongs to the next code, so 0 ... 15 (in bf16) stand there
// twice.
typedef __m512i bytes;
static inline bytes load(const char* w, int) { return _mm512_loadu_si512(w); }
#define CODES 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, \
              0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170
alignas(64) static const bf16 TABLE[32] = {CODES, CODES};
static inline weights unpacked(bytes w, int j) {
    return (weights)_mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4 * j), _mm512_load_si512(TABLE));
}

#elif defined(__AVX512BF16__)
typedef weights bytes;
static inline __m512 floats(const char* w) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)w)));
}
static inline bytes load(const char* w, int) {
    if (FORMAT == INT8) return _mm512_cvtne2ps_pbh(floats(w + 16), floats(w));      // (high, low)
    return (weights)_mm512_loadu_si512(w);
}
static inline weights unpacked(bytes w, int) { return w; }

#else
typedef ivec bytes;                                                // one word of 32 bits an output
static inline bytes load(const char* w, int v) {
    if (FORMAT == INT8) return from_int16(w + v * 2 * WIDTH);
    return read<ivec>(w + v * 4 * WIDTH);
}
static inline weights unpacked(bytes w, int j) {
    if (FORMAT == BF16) return (vec)(j ? (uvec)w & 0xffff0000u : (uvec)w << 16);
    if (FORMAT == INT8)
        return __builtin_convertvector(j ? w >> 8 : (ivec)((uvec)w << 24) >> 24, vec);
    return __builtin_convertvector((ivec)((uvec)w >> (j % 2 * 16 + j / 2 * 4)) & 15, vec);
}
#endif

// ---- tiles ----

// Rows of a tile of 1 panel, of one of 3, and of one in fp32: as the registers allow.
#if defined(__AVX512F__)
const int64_t ROWS = FORMAT == INT4 ? 5 : 8, ROWS_OF_3 = ROWS;
#elif defined(__aarch64__)
const int64_t ROWS = 5, ROWS_OF_3 = 1;
#elif WIDTH == 8
const int64_t ROWS = FORMAT <= FP16 ? 6 : 5, ROWS_OF_3 = FORMAT <= FP16 ? 2 : 1;
#else
const int64_t ROWS = 2, ROWS_OF_3 = 0;
#endif
const int64_t WIDE_ROWS = WIDTH == 16 ? 8 : ROWS < 5 ? ROWS : 6;
static_assert(ROWS <= 8 && WIDE_ROWS <= 8, "cases below go to 8");

#define UNROLL _Pragma("GCC unroll 16")

// A weight of O outputs and I inputs, multiples of 16 and INPUTS, and what follows from them:
// operands of a row of x, steps and bytes of a group, bytes of a panel. In INT4 `inputs` are a
// group's, a multiple of INPUTS that divides I; else the only group is I.
struct Shape {
    int64_t I, O, group, row, steps, group_bytes, panel_bytes;
    Shape(int64_t I, int64_t O, int64_t inputs) : I(I), O(O), group(FORMAT == INT4 ? inputs : I),
        row(I / INPUTS * OPERANDS), steps(group / INPUTS), group_bytes(steps * STEP + BEHIND),
        panel_bytes(FRONT + I / group * group_bytes) {}
};

// Adds `rows` of x, which are `row` operands apart, by one group of panels, which are `panel_bytes`
// apart, to `sum`. Each step asks for a line of `lines` of the panels at `next`, which may lie
// beyond the end of the weight: it is never read.
template <int rows, int panels, int lines>
static inline __attribute__((always_inline)) void add_group(
        const Operand* x, int64_t row, const char* w, const char* next, int64_t panel_bytes,
        int64_t steps, vec (&sum)[rows][panels][VECS]) {
    for (int64_t i = 0; i < steps; i++, x += OPERANDS, w += STEP, next += STEP) {
        UNROLL for (int p = 0; p < lines; p++) __builtin_prefetch(next + p * panel_bytes);
        bytes packed[panels][VECS];
        UNROLL for (int p = 0; p < panels; p++)
            UNROLL for (int v = 0; v < VECS; v++) packed[p][v] = load(w + p * panel_bytes, v);
        UNROLL for (int j = 0; j < OPERANDS; j++) {
            weights right[panels][VECS];
            UNROLL for (int p = 0; p < panels; p++)
                UNROLL for (int v = 0; v < VECS; v++) right[p][v] = unpacked(packed[p][v], j);
            UNROLL for (int r = 0; r < rows; r++) {
                const weights left = broadcast(x + r * row + j);
                UNROLL for (int p = 0; p < panels; p++)
                    UNROLL for (int v = 0; v < VECS; v++)
                        sum[r][p][v] = add(sum[r][p][v], right[p][v], left);
            }
        }
    }
}

template <int rows, int panels, int lines>
static void tile(const Operand* x, const char* w, const char* next, Result* y,
                 const Shape& shape) {
    const int64_t panel_bytes = shape.panel_bytes;
    vec sum[rows][panels][VECS] = {};
    if (FORMAT != INT4) {
        add_group<rows, panels, lines>(x, shape.row, w + FRONT, next, panel_bytes, shape.steps,
                                       sum);
    } else for (int64_t first = 0, at = 0; first < shape.I;
                first += shape.group, at += shape.group_bytes) {
        vec group_sum[rows][panels][VECS] = {};
        const Operand* from = x + first / INPUTS * OPERANDS;
        add_group<rows, panels, lines>(from, shape.row, w + at, next + at, panel_bytes,
                                       shape.steps, group_sum);
        const char* scales = w + at + shape.steps * STEP;
        for (int r = 0; r < rows; r++) {
            float total = 0;                                       // of x, over the group
            const Input* inputs = (const Input*)(from + r * shape.row);
            #pragma omp simd reduction(+:total)
            for (int64_t i = 0; i < shape.group; i++) total += number(inputs[i]);
            for (int p = 0; p < panels; p++)
                for (int v = 0; v < VECS; v++) {
                    const char* scale = scales + p * panel_bytes + v * 2 * WIDTH;
                    sum[r][p][v] += group_sum[r][p][v] * from_fp16(scale);
                    sum[r][p][v] += total * from_fp16(scale + 32);
                }
        }
    }
    for (int p = 0; p < panels; p++)
        for (int v = 0; v < VECS; v++) {
            const bool scaled = FRONT > 0;
            const vec scale = scaled ? read<vec>(w + p * panel_bytes + v * 4 * WIDTH)
                                     : broadcast(1);
            for (int r = 0; r < rows; r++)
                put(scaled ? sum[r][p][v] * scale : sum[r][p][v],
                    y + r * shape.O + p * 16 + v * WIDTH);
        }
}

// ---- many rows of numbers that take instructions to unpack: a panel is made fp32 once ----

static const bool MAKES_WIDE = FORMAT >= BF16 && sizeof(Input) == sizeof(float);

// A panel -> [I, 16] fp32.
static void make_wide(const char* w, const Shape& shape, float* wide) {
    for (int64_t first = 0; first < shape.I; first += shape.group) {
        const char* begin = w + FRONT + first / shape.group * shape.group_bytes;
        const char* end = begin + shape.steps * STEP;
        for (int v = 0; v < VECS; v++) {
            const int at = v * WIDTH;
            const vec scale = FORMAT == INT8 ? read<vec>(w + 4 * at)
                            : FORMAT == INT4 ? from_fp16(end + 2 * at) : broadcast(1);
            const vec offset = FORMAT == INT4 ? from_fp16(end + 32 + 2 * at) : vec{};
            float* to = wide + first * 16 + at;
            for (const char* from = begin; from < end; from += STEP) {
                const bytes packed = load(from, v);
                UNROLL for (int j = 0; j < INPUTS; j++, to += 16)
                    put((vec)unpacked(packed, j) * scale + offset, to);
            }
        }
    }
}

template <int rows>
static void wide_tile(const float* x, const float* wide, Result* y, const Shape& shape) {
    vec sum[rows][VECS] = {};
    for (int64_t i = 0; i < shape.I; i++) {
        vec right[VECS];
        UNROLL for (int v = 0; v < VECS; v++) right[v] = read<vec>(wide + i * 16 + v * WIDTH);
        UNROLL for (int r = 0; r < rows; r++) {
            const vec left = broadcast(x[r * shape.I + i]);
            UNROLL for (int v = 0; v < VECS; v++) sum[r][v] += right[v] * left;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECS; v++) put(sum[r][v], y + r * shape.O + v * WIDTH);
}

// One panel by all rows. A thread keeps its 64 I bytes of fp32 as long as it lives.
static void wide_strip(const float* x, const char* w, Result* y, int64_t M, const Shape& shape) {
    static thread_local std::vector<float> wide;
    wide.resize(shape.I * 16);
    make_wide(w, shape, wide.data());
    const int64_t tiles = (M + WIDE_ROWS - 1) / WIDE_ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t m = t * M / tiles;
        const float* from = x + m * shape.I; Result* to = y + m * shape.O;
        switch ((t + 1) * M / tiles - m) {
            #define WIDE(n) case n: if constexpr (n <= WIDE_ROWS) { \
                                        wide_tile<n>(from, wide.data(), to, shape); break; }
            WIDE(1) WIDE(2) WIDE(3) WIDE(4) WIDE(5) WIDE(6) WIDE(7) WIDE(8)
        }
    }
}

// ---- strips ----

template <int panels, int lines>
static void tile_of(int64_t rows, const Operand* x, const char* w, const char* next, Result* y,
                    const Shape& shape) {
    const int64_t size = shape.panel_bytes;
    if constexpr (panels > 1) {
        if (rows > ROWS_OF_3) {                                    // too many sums for registers
            for (int p = 0; p < panels; p++)
                if (p < lines)
                    tile_of<1, 1>(rows, x, w + p * size, next + p * size, y + p * 16, shape);
                else tile_of<1, 0>(rows, x, w + p * size, next, y + p * 16, shape);
            return;
        }
    }
    switch (rows) {
        #define OF(n) case n: if constexpr (n <= (panels > 1 ? ROWS_OF_3 : ROWS)) \
                                  return tile<n, panels, lines>(x, w, next, y, shape);
        OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8)
    }
}

// To make a panel fp32 is worth it from the third tile on.
template <int panels>
static void strip(const Operand* x, const char* w, const char* next, Result* y, int64_t M,
                  const Shape& shape) {
    const int64_t tiles = (M + ROWS - 1) / ROWS, size = shape.panel_bytes;
    if (MAKES_WIDE && tiles > 2) {
        for (int p = 0; p < panels; p++)
            wide_strip((const float*)x, w + p * size, y + p * 16, M, shape);
        return;
    }
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t m = t * M / tiles, rows = (t + 1) * M / tiles - m;    // as even as can be
        const Operand* from = x + m * shape.row; Result* to = y + m * shape.O;
        if (tiles == 1) tile_of<panels, panels>(rows, from, w, w + AHEAD, to, shape);
        else if (tiles == 2) tile_of<panels, 2>(rows, from, w, next + 2 * t * size, to, shape);
        else if (t < PANELS) tile_of<panels, 1>(rows, from, w, next + t * size, to, shape);
        else tile_of<panels, 0>(rows, from, w, next, to, shape);
    }
}

// All threads of a parallel region call it together, and wait for each other at its end.
static void multiply(const Input* x, const char* w, Result* y, int64_t M, const Shape& shape) {
    const int64_t size = shape.panel_bytes;
    #pragma omp for schedule(static)
    for (int64_t p = 0; p < shape.O / 16; p += PANELS) {
        const char* mine = w + p * size; Result* to = y + p * 16;
        const Operand* from = (const Operand*)x;
        if (p + PANELS <= shape.O / 16)
            strip<PANELS>(from, mine, mine + PANELS * size, to, M, shape);
        else for (int64_t i = 0; p + i < shape.O / 16; i++)
            strip<1>(from, mine + i * size, mine + (i + 1) * size, to + i * 16, M, shape);
    }
}
