// Numbers side by side: `vec` is WIDTH of fp32, as many as the processor at hand takes at once.
//
//     AVX512   16 numbers, 32 registers       AVX2   8 numbers, 16 registers
//     NEON      4 numbers, 32 registers       SSE    4 numbers, 16 registers
//
// It is the compiler's own vector type, so + - * are its instructions, and a product that is added
// to something becomes one where the processor has that (g++ does so unless it is told not to). All
// else in this folder is written for any WIDTH; it works on VECS vectors, 16 numbers, wherever the
// layout of weights or keys has 16 side by side. What a processor has beyond that stands behind an
// #ifdef, with the portable form beside it.
//
//     read<V>(from)    V from memory, wherever it begins
//     put(x, to)       x to memory, as fp32 or bf16
//     number(x)        one fp32 or bf16 as fp32
//     broadcast(x)     x, WIDTH times
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__) && defined(__FMA__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

const int VECS = 16 / WIDTH;                                       // that 16 numbers fill
typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t uvec __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));   // WIDTH numbers of 16 bits
typedef int16_t shorts __attribute__((vector_size(2 * WIDTH)));
typedef uint16_t bf16;                                             // the upper half of an fp32

template <class V> static inline V read(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}
static inline vec broadcast(float x) { return vec{} + x; }        // vec(x) would not compile

// bf16 <-> fp32: to the nearest, and of two to the even one; NaN to a quiet NaN.
static inline float number(float x) { return x; }
static inline float number(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    return read<float>(&bits);
}
static inline void put(float x, float* to) { *to = x; }
static inline void put(float x, bf16* to) {
    const uint32_t bits = read<uint32_t>(&x);
    *to = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40;
}
static inline void put(vec x, float* to) { memcpy(to, &x, sizeof x); }
static inline void put(vec x, bf16* to) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    const uvec bits = (uvec)x;
    const uvec rounded = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40;
    const halves y = __builtin_convertvector(rounded, halves);
    memcpy(to, &y, sizeof y);
#endif
}

// WIDTH numbers in fp16 -> fp32.
static inline vec from_fp16(const char* from) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(read<__m256i>(from));
#elif WIDTH == 8 && defined(__F16C__)
    return (vec)_mm256_cvtph_ps(read<__m128i>(from));
#else
    const uvec bits = __builtin_convertvector(read<halves>(from), uvec);
    // Exponent and fraction to where fp32 has them; the exponents differ by 112, which a product
    // mends for subnormal numbers too; infinity and NaN keep the largest exponent.
    const vec size = (vec)((bits & 0x7fff) << 13) * 0x1p112f;
    const uvec special = (uvec)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
    return (vec)((uvec)size | special | (bits & 0x8000) << 16);
#endif
}

// WIDTH whole numbers of 16 bits, with a sign, in 32 bits.
static inline ivec from_int16(const char* from) {
#if defined(__AVX512F__)
    return (ivec)_mm512_cvtepi16_epi32(read<__m256i>(from));
#elif WIDTH == 8
    return (ivec)_mm256_cvtepi16_epi32(read<__m128i>(from));
#else
    return __builtin_convertvector(read<shorts>(from), ivec);
#endif
}

static inline float sum_of(vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += x[i];
    return sum;
#endif
}
// Of a number and NaN it is y, so that a maximum may lose a NaN. 2^(NaN - maximum) brings it back.
static inline vec larger(vec x, vec y) { return x > y ? x : y; }
static inline float largest_of(vec x) {
    float most = x[0];
    for (int i = 1; i < WIDTH; i++) most = std::max(most, x[i]);
    return most;
}

// 2^x, within 1.2 units in the last place of fp32; 0 for x up to -126.5; 2^127 for x above 127; NaN
// for NaN. The whole part of x becomes an exponent. For the rest, |f| <= 1/2, stands the polynomial
// of degree 6 with p(0) = 1 whose largest relative error to 2^f is least: 2.0e-9, and 1.6e-8 with
// coefficients in fp32 (Cephes, exp2f.c).
static inline vec power_of_2(vec x) {
    x = broadcast(-127) > x ? broadcast(-127) : x;         // false for NaN, which so stays x
    x = broadcast(127) < x ? broadcast(127) : x;
    const vec half = (vec)(((uvec)x & 0x80000000u) | 0x3f000000u); // 0.5 with the sign of x
    const ivec whole = __builtin_convertvector(x + half, ivec);    // cut towards zero; any, of NaN
    const vec f = x - __builtin_convertvector(whole, vec);
    vec sum = f * 1.535336188e-4f + 1.339887440e-3f;
    sum = sum * f + 9.618437357e-3f;
    sum = sum * f + 5.550332471e-2f;
    sum = sum * f + 2.402264791e-1f;
    sum = sum * f + 6.931472028e-1f;
    sum = sum * f + 1.f;
    return sum * (vec)((whole + 127) << 23);
}
