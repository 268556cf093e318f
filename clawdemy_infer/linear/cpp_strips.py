"""A product in C++: as fast as memory for a few rows, as fast as the multipliers for many.

    Y [M, N] = X [M, K] Wᵀ          sums in fp32

Weights come from memory once: a *strip* of 3 panels is multiplied with all rows of X, tile by tile (`cpp_tiles`), while it lies in the
nearer caches. X, 2 or 4 M K bytes, is read anew for each strip, from those caches too. What is left is to keep memory busy while tiles
compute. So while one strip is worked on, the next one is asked for: its three panels, by the first tiles, a line at each step. Where one
tile is the whole strip, it asks for what is AHEAD in its own panels.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from clawdemy_infer import cpp
from clawdemy_infer.linear.codes import Codes
from clawdemy_infer.linear.cpp_tiles import COMPUTES_IN, TILES, panels

HEAD = r"""
#include <immintrin.h>
#include <algorithm>
#include <cstdint>
#include <cstring>

#ifndef __AVX512BF16__
#error "this CPU has no AVX512_BF16"
#endif

static inline void put(__m512 x, float* y) { _mm512_storeu_ps(y, x); }
static inline void put(__m512 x, uint16_t* y) { _mm256_storeu_si256((__m256i*)y, (__m256i)_mm512_cvtneps_pbh(x)); }
"""
STRIPS = r"""
const int64_t AHEAD = 1024;

template <int panels, int lines>
static void tile_of(int64_t rows, const X* x, const char* w, const char* next, Y* y, int64_t K, int64_t N) {
    switch (rows) {
        #define OF(n) case n: if constexpr (n <= ROWS) return tile<n, panels, lines>(x, w, next, y, K, N);
        OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8)
    }
}

template <int panels>
static void strip(const X* x, const char* w, const char* next, Y* y, int64_t M, int64_t K, int64_t N) {
    const int64_t tiles = (M + ROWS - 1) / ROWS, row = K / INPUTS, size = panel(K);
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t m = t * M / tiles, rows = (t + 1) * M / tiles - m;                    // as even as can be
        auto from = x + m * row; auto to = y + m * N;
        if (tiles == 1) tile_of<panels, panels>(rows, from, w, w + AHEAD, to, K, N);
        else if (tiles == 2) tile_of<panels, 2>(rows, from, w, next + 2 * t * size, to, K, N);
        else if (t < PANELS) tile_of<panels, 1>(rows, from, w, next + t * size, to, K, N);
        else tile_of<panels, 0>(rows, from, w, next, to, K, N);
    }
}

// All threads of a parallel region share it out.
static void multiply(const X* x, const char* w, Y* y, int64_t M, int64_t K, int64_t N) {
    const int64_t size = panel(K);
    #pragma omp for schedule(static)
    for (int64_t p = 0; p < N / 16; p += PANELS) {
        auto mine = w + p * size; auto to = y + p * 16;
        if (p + PANELS <= N / 16) strip<PANELS>(x, mine, mine + PANELS * size, to, M, K, N);
        else for (int64_t i = 0; p + i < N / 16; i++) strip<1>(x, mine + i * size, mine + (i + 1) * size, to + i * 16, M, K, N);
    }
}

extern "C" void product(const X* x, const char* w, Y* y, int64_t M, int64_t K, int64_t N) {
    #pragma omp parallel
    multiply(x, w, y, M, K, N);
}
"""


NAMES = {torch.float32: "float", torch.bfloat16: "uint16_t"}
"""What C++ calls a number of that type."""


def source(format: str) -> str:
    """A product with such weights, which wants Y, the type of its result, to be defined, and for int4 the GROUP."""
    return HEAD + TILES[format] + STRIPS


@functools.cache
def built(format: str, out: torch.dtype, group: int = 0) -> Callable:
    """The machine code of `source`, for results of the type `out`."""
    product = cpp.library(source(format), f"Y={NAMES[out]}", f"GROUP={group}").product
    product.argtypes, product.restype = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3, None
    return product


@functools.cache
def available() -> bool:
    """Is there a compiler here, and has the CPU AVX512_BF16?"""
    try:
        return built("bf16", torch.bfloat16) is not None
    except (ValueError, RuntimeError):
        return False


def in_strips(format: str, source: torch.Tensor | Codes) -> Callable[[torch.Tensor], torch.Tensor]:
    """x [..., K] -> [..., N] for a float weight [N, K] in `format`, or its codes; x in fp32 or bf16, and y as x.

    Raises NotImplementedError for sizes that `panels` refuses, and where it is not `available`; the product, ValueError for an x of
    another width.
    """
    if not available():
        raise NotImplementedError("it wants a C++ compiler, and a CPU with AVX512_BF16")
    packed, inside = panels(format, source), COMPUTES_IN[format]
    N, K = (source.codes if isinstance(source, Codes) else source).shape
    group = K // source.scales.shape[1] if format == "int4" else 0

    def product(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != K:
            raise ValueError(f"x is {list(x.shape)}: the last dimension must be the K={K} inputs")
        y = x.new_empty(*x.shape[:-1], N)
        run = built(format, x.dtype, group)
        x = (x if x.dtype == inside else x.to(inside)).contiguous()
        run(x.data_ptr(), packed.data_ptr(), y.data_ptr(), x.numel() // K, K, N)
        return y
    return product
