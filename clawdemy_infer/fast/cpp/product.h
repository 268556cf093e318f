// A product of activations and a packed weight: as fast as memory for a few rows, as fast as the
// multipliers for many. FORMAT says what the weight is kept in.
//
//     Y [M, O] = X [M, I] W^T           sums in fp32
//
// A *panel* is 16 outputs side by side. One step through it has, for each of them,
//
//     FP32    1 input     64 bytes
//     FP16    1 input     32 bytes
//     BF16    2 inputs    64 bytes
//     INT8    2 inputs    32 bytes; 16 scales in fp32 stand in front of the panel
//     INT4    8 inputs    64 bytes; behind each group of inputs 16 scales and 16 offsets in fp16
//
// and a *tile* multiplies a few rows of X by 1 or 3 panels, its sums in registers until all of I
// has gone by. With w = (code - zero) scale, the sum over a group of 4-bit codes is
// scale (sum of code x) + offset (sum of x), where offset = -zero scale.
//
// Wanted: FORMAT, and Y, the type of the result.
//
// Where the processor multiplies pairs of bf16 (AVX512_BF16), X is in bf16 for BF16, INT8 and INT4,
// and the codes become bf16, which holds such numbers exactly. Else all numbers become fp32.
//
// Threads share the strips of 3 panels. A strip comes from memory once and is multiplied by all
// rows of X, tile by tile, while it lies in the nearer caches; X, 2 or 4 M I bytes, is read anew
// for each strip, from those caches too. What is left is to keep memory busy while tiles compute:
// the first tiles ask for the next strip, a line at each step. Where one tile is the whole strip,
// it asks for what is AHEAD in its own panels.
#pragma once

#include "vector.h"
#include <vector>

#define FP32 1
#define FP16 2
#define BF16 3
#define INT8 4
#define INT4 5

// Inputs and bytes of a step; bytes in front of a panel, and behind a group.
const int64_t INPUTS = FORMAT == INT4 ? 8 : FORMAT == BF16 || FORMAT == INT8 ? 2 : 1;
const int64_t STEP = FORMAT == FP16 || FORMAT == INT8 ? 32 : 64;
const int64_t FRONT = FORMAT == INT8 ? 64 : 0, BEHIND = FORMAT == INT4 ? 64 : 0;
const int64_t PANELS = 3, AHEAD = 1024;

// ---- one step: the bytes of a panel, and the `weights` of the j-th number of x in them ----

#if defined(__AVX512BF16__) && FORMAT >= BF16
typedef bf16 IN;                                                   // what X is in
typedef int32_t X;                                                 // what is multiplied: a pair
typedef __m512bh weights;
static inline weights all_of(X x) { return (weights)_mm512_set1_epi32(x); }
static inline vec add(vec sum, weights w, weights x) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, w, x);
}
#else
typedef float IN, X;
typedef vec weights;
static inline weights all_of(X x) { return all(x); }
static inline vec add(vec sum, weights w, weights x) { return sum + w * x; }
#endif
const int64_t NUMBERS = INPUTS * sizeof(IN) / sizeof(X);           // X of a step

#if FORMAT == FP32 || FORMAT == FP16
typedef vec bytes;
static inline bytes get(const char* w, int part) {
    return FORMAT == FP32 ? read<vec>(w + part * 4 * WIDTH) : from_fp16(w + part * 2 * WIDTH);
}
static inline weights unpacked(bytes w, int j) { return w; }

#elif defined(__AVX512BF16__) && FORMAT == INT4
// A word of 16 bits has the codes of four inputs, and the processor looks 32 words up in a table at
// once, by their lowest 5 bits: a shift and a look into twice 0 ... 15 make 32 weights.
typedef __m512i bytes;
static inline bytes get(const char* w, int) { return _mm512_loadu_si512(w); }
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
static inline bytes get(const char* w, int) {
    if (FORMAT == INT8) return _mm512_cvtne2ps_pbh(floats(w + 16), floats(w));
    return (weights)_mm512_loadu_si512(w);
}
static inline weights unpacked(bytes w, int) { return w; }

#else
typedef ivec bytes;                                                // one word of 32 bits an output
static inline bytes get(const char* w, int part) {
    if (FORMAT == INT8) return from_int16(w + part * 2 * WIDTH);
    return read<ivec>(w + part * 4 * WIDTH);
}
static inline weights unpacked(bytes w, int j) {
    if (FORMAT == BF16) return (vec)(j ? (uvec)w & 0xffff0000u : (uvec)w << 16);
    if (FORMAT == INT8) return __builtin_convertvector(j ? w >> 8 : w << 24 >> 24, vec);
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

#define UNROLL _Pragma("GCC unroll 16")

// A weight of O outputs and I inputs, and what follows from I: X of a row of x; bytes of a group of
// `group` inputs (all of I, but for INT4) and of a panel.
struct Size {
    int64_t I, O, group, row, steps, group_bytes, panel_bytes;
    Size(int64_t I, int64_t O, int64_t inputs) : I(I), O(O), group(FORMAT == INT4 ? inputs : I),
        row(I / INPUTS * NUMBERS), steps(group / INPUTS), group_bytes(steps * STEP + BEHIND),
        panel_bytes(FRONT + I / group * group_bytes) {}
};

// Adds `rows` of x by one group of panels, which are `size` bytes apart, to `sum`. With each step
// it asks for a line of `lines` of the panels at `next`.
template <int rows, int panels, int lines>
static inline __attribute__((always_inline)) void add_group(
        const X* x, int64_t row, const char* w, const char* next, int64_t size, int64_t steps,
        vec (&sum)[rows][panels][PARTS]) {
    for (int64_t k = 0; k < steps; k++, x += NUMBERS, w += STEP, next += STEP) {
        UNROLL for (int p = 0; p < lines; p++) __builtin_prefetch(next + p * size);
        bytes packed[panels][PARTS];
        UNROLL for (int p = 0; p < panels; p++)
            UNROLL for (int part = 0; part < PARTS; part++)
                packed[p][part] = get(w + p * size, part);
        UNROLL for (int j = 0; j < NUMBERS; j++) {
            weights made[panels][PARTS];
            UNROLL for (int p = 0; p < panels; p++)
                UNROLL for (int part = 0; part < PARTS; part++)
                    made[p][part] = unpacked(packed[p][part], j);
            UNROLL for (int r = 0; r < rows; r++) {
                const weights number = all_of(x[r * row + j]);
                UNROLL for (int p = 0; p < panels; p++)
                    UNROLL for (int part = 0; part < PARTS; part++)
                        sum[r][p][part] = add(sum[r][p][part], made[p][part], number);
            }
        }
    }
}

template <int rows, int panels, int lines>
static void tile(const X* x, const char* w, const char* next, Y* y, const Size& s) {
    const int64_t size = s.panel_bytes;
    vec sum[rows][panels][PARTS] = {};
    if (FORMAT != INT4)
        add_group<rows, panels, lines>(x, s.row, w + FRONT, next, size, s.steps, sum);
    else for (int64_t begin = 0, at = 0; begin < s.I; begin += s.group, at += s.group_bytes) {
        vec part_sum[rows][panels][PARTS] = {};
        const X* mine = x + begin / INPUTS * NUMBERS;
        add_group<rows, panels, lines>(mine, s.row, w + at, next + at, size, s.steps, part_sum);
        const char* scales = w + at + s.steps * STEP;
        for (int r = 0; r < rows; r++) {
            float total = 0;                                       // of x, over the group
            const IN* numbers = (const IN*)(mine + r * s.row);
            #pragma omp simd reduction(+:total)
            for (int64_t i = 0; i < s.group; i++) total += number(numbers[i]);
            for (int p = 0; p < panels; p++)
                for (int part = 0; part < PARTS; part++) {
                    const char* scale = scales + p * size + part * 2 * WIDTH;
                    sum[r][p][part] += part_sum[r][p][part] * from_fp16(scale);
                    sum[r][p][part] += total * from_fp16(scale + 32);
                }
        }
    }
    for (int p = 0; p < panels; p++)
        for (int part = 0; part < PARTS; part++) {
            const vec scale = FRONT ? read<vec>(w + p * size + part * 4 * WIDTH) : all(1);
            for (int r = 0; r < rows; r++)
                put(FRONT ? sum[r][p][part] * scale : sum[r][p][part],
                    y + r * s.O + p * 16 + part * WIDTH);
        }
}

// ---- many rows of numbers that take many instructions to unpack: a panel is made fp32 once ----

static const bool MAKES_WIDE = FORMAT >= BF16 && sizeof(IN) == sizeof(float);

// A panel -> [I, 16] fp32.
static void make_wide(const char* w, const Size& s, float* wide) {
    for (int64_t begin = 0; begin < s.I; begin += s.group) {
        const char* step = w + FRONT + begin / s.group * s.group_bytes;
        const char* end = step + s.steps * STEP;
        for (int part = 0; part < PARTS; part++) {
            const int at = part * WIDTH;
            const vec scale = FORMAT == INT8 ? read<vec>(w + 4 * at)
                            : FORMAT == INT4 ? from_fp16(end + 2 * at) : all(1);
            const vec offset = FORMAT == INT4 ? from_fp16(end + 32 + 2 * at) : vec{};
            float* to = wide + begin * 16 + at;
            for (const char* from = step; from < end; from += STEP) {
                const bytes packed = get(from, part);
                UNROLL for (int j = 0; j < INPUTS; j++, to += 16)
                    put((vec)unpacked(packed, j) * scale + offset, to);
            }
        }
    }
}

template <int rows>
static void wide_tile(const float* x, const float* wide, Y* y, const Size& s) {
    vec sum[rows][PARTS] = {};
    for (int64_t k = 0; k < s.I; k++) {
        vec made[PARTS];
        UNROLL for (int part = 0; part < PARTS; part++)
            made[part] = read<vec>(wide + k * 16 + part * WIDTH);
        UNROLL for (int r = 0; r < rows; r++) {
            const vec number = all(x[r * s.I + k]);
            UNROLL for (int part = 0; part < PARTS; part++) sum[r][part] += made[part] * number;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int part = 0; part < PARTS; part++) put(sum[r][part], y + r * s.O + part * WIDTH);
}

static void wide_strip(const float* x, const char* w, Y* y, int64_t M, const Size& s) {
    static thread_local std::vector<float> wide;
    wide.resize(s.I * 16);
    make_wide(w, s, wide.data());
    const int64_t tiles = (M + WIDE_ROWS - 1) / WIDE_ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t m = t * M / tiles;
        const float* from = x + m * s.I; Y* to = y + m * s.O;
        switch ((t + 1) * M / tiles - m) {
            #define WIDE(n) case n: if constexpr (n <= WIDE_ROWS) { \
                                        wide_tile<n>(from, wide.data(), to, s); break; }
            WIDE(1) WIDE(2) WIDE(3) WIDE(4) WIDE(5) WIDE(6) WIDE(7) WIDE(8)
        }
    }
}

// ---- strips ----

template <int panels, int lines>
static void tile_of(int64_t rows, const X* x, const char* w, const char* next, Y* y,
                    const Size& s) {
    const int64_t size = s.panel_bytes;
    if constexpr (panels > 1) if (rows > ROWS_OF_3) {              // too many sums for registers
        for (int p = 0; p < panels; p++)
            if (p < lines) tile_of<1, 1>(rows, x, w + p * size, next + p * size, y + p * 16, s);
            else tile_of<1, 0>(rows, x, w + p * size, next, y + p * 16, s);
        return;
    }
    switch (rows) {
        #define OF(n) case n: if constexpr (n <= (panels > 1 ? ROWS_OF_3 : ROWS)) \
                                  return tile<n, panels, lines>(x, w, next, y, s);
        OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8)
    }
}

template <int panels>
static void strip(const X* x, const char* w, const char* next, Y* y, int64_t M, const Size& s) {
    const int64_t tiles = (M + ROWS - 1) / ROWS, size = s.panel_bytes;
    if (MAKES_WIDE && tiles > 2) {
        for (int p = 0; p < panels; p++)
            wide_strip((const float*)x, w + p * size, y + p * 16, M, s);
        return;
    }
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t m = t * M / tiles, rows = (t + 1) * M / tiles - m;    // as even as can be
        const X* from = x + m * s.row; Y* to = y + m * s.O;
        if (tiles == 1) tile_of<panels, panels>(rows, from, w, w + AHEAD, to, s);
        else if (tiles == 2) tile_of<panels, 2>(rows, from, w, next + 2 * t * size, to, s);
        else if (t < PANELS) tile_of<panels, 1>(rows, from, w, next + t * size, to, s);
        else tile_of<panels, 0>(rows, from, w, next, to, s);
    }
}

// All threads of a parallel region share it, and wait for each other at its end.
static void multiply(const IN* x, const char* w, Y* y, int64_t M, const Size& s) {
    const int64_t size = s.panel_bytes;
    #pragma omp for schedule(static)
    for (int64_t p = 0; p < s.O / 16; p += PANELS) {
        const char* mine = w + p * size; Y* to = y + p * 16; const X* from = (const X*)x;
        if (p + PANELS <= s.O / 16) strip<PANELS>(from, mine, mine + PANELS * size, to, M, s);
        else for (int64_t i = 0; p + i < s.O / 16; i++)
            strip<1>(from, mine + i * size, mine + (i + 1) * size, to + i * 16, M, s);
    }
}
