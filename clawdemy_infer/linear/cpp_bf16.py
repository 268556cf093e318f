"""A product with bf16 weights in C++: as fast as memory for a few rows, as fast as the multipliers for many.

    Y [M, N] = X [M, K] Wᵀ          numbers in bf16, sums in fp32

A CPU with AVX512_BF16 multiplies 32 pairs of numbers at once and adds them up two by two, in 16 sums. So the weights lie as it takes
them, 16 outputs in a *panel*, two inputs of each side by side. 8 rows of X by 3 panels are a *tile*, whose 24 x 16 sums stay in registers
until all of K has gone by: each load of weights serves 8 rows, and each load of X three panels.

    weights     2 * N * K bytes, from memory once: the tiles of a *strip* of 3 panels, one for each 8 rows, follow one another
    X           2 * M * K bytes for each strip, from the nearest caches

What is left is to keep memory busy while the tiles compute. While one strip is worked on, the next one is asked for: its three panels, by
the first tiles, so many lines at each step. Where one tile is the whole strip, it asks for what is AHEAD in its own panels.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from clawdemy_infer import cpp

SOURCE = r"""
#include <immintrin.h>
#include <algorithm>
#include <cstdint>

#ifndef __AVX512BF16__
#error "this CPU has no AVX512_BF16"
#endif

const int64_t ROWS = 8, PANELS = 3, AHEAD = 16;
typedef __m512i pairs;                                      // two inputs of 16 outputs

template <int rows, int panels, int lines>
static void tile(const int32_t* x, const pairs* w, const pairs* next, uint16_t* y, int64_t K2, int64_t N) {
    __m512 sum[rows][panels] = {};
    for (int64_t k = 0; k < K2; k++) {
        for (int p = 0; p < lines; p++) __builtin_prefetch(next + p * K2 + k);
        __m512bh weights[panels];
        for (int p = 0; p < panels; p++) weights[p] = (__m512bh)_mm512_loadu_si512(w + p * K2 + k);
        for (int r = 0; r < rows; r++) {
            const __m512bh both = (__m512bh)_mm512_set1_epi32(x[r * K2 + k]);
            for (int p = 0; p < panels; p++) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], weights[p], both);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++) _mm256_storeu_si256((__m256i*)(y + r * N + p * 16), (__m256i)_mm512_cvtneps_pbh(sum[r][p]));
}

template <int panels, int lines>
static void tile_of(int64_t rows, const int32_t* x, const pairs* w, const pairs* next, uint16_t* y, int64_t K2, int64_t N) {
    switch (rows) {
        #define OF(n) case n: return tile<n, panels, lines>(x, w, next, y, K2, N);
        OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8)
    }
}

template <int panels>
static void strip(const int32_t* x, const pairs* w, const pairs* next, uint16_t* y, int64_t M, int64_t K2, int64_t N) {
    const int64_t tiles = (M + ROWS - 1) / ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t m = t * M / tiles, rows = (t + 1) * M / tiles - m;            // as even as can be
        auto from = x + m * K2; auto to = y + m * N;
        if (tiles == 1) tile_of<panels, panels>(rows, from, w, w + AHEAD, to, K2, N);
        else if (tiles == 2) tile_of<panels, 2>(rows, from, w, next + 2 * t * K2, to, K2, N);
        else if (t < PANELS) tile_of<panels, 1>(rows, from, w, next + t * K2, to, K2, N);
        else tile_of<panels, 0>(rows, from, w, next, to, K2, N);
    }
}

// All threads of a parallel region share it out.
static void multiply(const int32_t* x, const pairs* w, uint16_t* y, int64_t M, int64_t K, int64_t N) {
    const int64_t panels = N / 16, K2 = K / 2;
    #pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; p += PANELS) {
        auto mine = w + p * K2; auto to = y + p * 16;
        if (p + PANELS <= panels) strip<PANELS>(x, mine, mine + PANELS * K2, to, M, K2, N);
        else for (int64_t i = 0; i < panels - p; i++) strip<1>(x, mine + i * K2, mine + (i + 1) * K2, to + i * 16, M, K2, N);
    }
}

extern "C" void product(const int32_t* x, const pairs* w, uint16_t* y, int64_t M, int64_t K, int64_t N) {
    #pragma omp parallel
    multiply(x, w, y, M, K, N);
}
"""


@functools.cache
def built() -> Callable:
    product = cpp.library(SOURCE).product
    product.argtypes, product.restype = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3, None
    return product


@functools.cache
def available() -> bool:
    """Is there a compiler here, and has the CPU AVX512_BF16?"""
    try:
        return built() is not None
    except (ValueError, RuntimeError):
        return False


def panels(weight: torch.Tensor) -> torch.Tensor:
    """A weight [N, K] as the product takes it, [N / 16, K / 2, 16, 2]. NotImplementedError unless N is a multiple of 16, and K of 2."""
    N, K = weight.shape
    if N % 16 or K % 2:
        raise NotImplementedError(f"weight [{N}, {K}]: outputs by the sixteen and inputs by the two are accepted")
    return weight.detach().view(N // 16, 16, K // 2, 2).transpose(1, 2).contiguous()


def cpp_bf16(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """x [M, K] -> [M, N] for a `weight` [N, K], both in bf16. Raises NotImplementedError for sizes that `panels` refuses, and where it is
    not `available`.
    """
    if not available():
        raise NotImplementedError("it wants a C++ compiler, and a CPU with AVX512_BF16")
    (N, K), packed, run = weight.shape, panels(weight), built()

    def product(x: torch.Tensor) -> torch.Tensor:
        x, y = x.contiguous(), torch.empty(len(x), N, dtype=torch.bfloat16)
        run(x.data_ptr(), packed.data_ptr(), y.data_ptr(), len(x), K, N)
        return y
    return product
