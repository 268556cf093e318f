"""A step of any tokens of any sequences as one call of C++.

Between the products of such a step there is little to compute and much to call: nine operations a layer that are started one by one, by
Python, each of which wakes all threads and waits for the last. Here the threads start once, go through all layers together, and meet only
where one needs what another has made:

    norm    residual, norm                              before QKV and before gate and up
    keep    RoPE, new keys and values to their pages
    look    RoPE, attention over the pages
    gate    silu(gate) * up
    multiply, four times                                QKV, out, gate and up, down

To attention a token is a row of its own that sees as much of its sequence as was there when it came: so a few tokens of one sequence, as
where a draft's guesses are checked, are no case of their own. The many of a prompt look together. The products are those of
`linear.cpp_strips`, attention is that of `kv_cache.decode_cpp` and `prefill_cpp`. The residual stream and all sums are in fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from clawdemy_infer import cpp
from clawdemy_infer.kv_cache import Step, decode_cpp, prefill_cpp
from clawdemy_infer.linear import Codes, cpp_strips, cpp_tiles, packable
from clawdemy_infer.model.decoder import Decoder, Layer, wanted_rows
from clawdemy_infer.model.rope import rope_tables
from clawdemy_infer.timing import now

FEW = 16
"""Tokens of a sequence: for more, attention does not read its keys again for each."""

SOURCE = r"""
#include <vector>

const int64_t HEADS = (G + 2) * KV * H;                                                     // all numbers of a row's q, k and v
const float SCALE = 1 / std::sqrt(float(H)), LOG2_E = 1.44269504f;
struct Layer { const float* gamma; const char *qkv, *out; const float* mlp_gamma; const char *gate_up, *down; };

static void norm(float* x, const float* more, const float* gamma, IN* y, int64_t M) {       // x becomes x + more, y its norm
    #pragma omp for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        float* row = x + m * D; float squares = 0;
        if (more) for (int d = 0; d < D; d++) row[d] += more[m * D + d];
        for (int d = 0; d < D; d++) squares += row[d] * row[d];
        const float scale = 1 / std::sqrt(squares / D + float(EPS));
        for (int d = 0; d < D; d++) store(row[d] * scale * gamma[d], y + m * D + d);
    }
}

struct Rope {
    const float *cos, *sin;                                                                 // (cos, cos) and (-sin, sin), [M, H] each
    template <class N> void turn(const float* head, int64_t m, float scale, N* to) const {
        const float *c = cos + m * H, *s = sin + m * H;
        for (int h = 0, other = H / 2; h < H / 2; h++, other++) {
            store((head[h] * c[h] + head[other] * s[h]) * scale, to + h);
            store((head[other] * c[other] + head[h] * s[other]) * scale, to + other);
        }
    }
};

static void keep(const float* heads, const Rope& rope, const Pages& in, int64_t M) {
    #pragma omp for schedule(static)
    for (int64_t task = 0; task < M * KV; task++) {
        const int64_t m = task / KV, k = task % KV, newest = in.place(m, k, in.lengths[m] - 1);
        const float *key = heads + m * HEADS + (G * KV + k) * H, *value = key + KV * H;
        rope.turn(key, m, 1, in.keys + newest);
        for (int h = 0; h < H; h++) store(value[h], in.values + newest + h);
    }
}

// Rows from `first` on that are a few of their sequence, each by itself.
static void look(const float* heads, const Rope& rope, const Pages& in, IN* out, int64_t first, int64_t count) {
    #pragma omp for schedule(dynamic)
    for (int64_t task = first * KV; task < (first + count) * KV; task++) {
        const int64_t m = task / KV, k = task % KV;
        float query[G][H];
        for (int g = 0; g < G; g++) rope.turn(heads + m * HEADS + (k * G + g) * H, m, SCALE, query[g]);
        attend(query, in, m, k, out + task * G * H);
    }
}

// Rows from `first` on that are many of one sequence, together. `room` is for its keys and values.
static void look_many(const float* heads, const Rope& rope, const Pages& in, IN* out, int64_t first, int64_t count, std::vector<T>* room) {
    const int64_t last = first + count - 1, S = in.lengths[last], past = S - count;
    const int64_t begin = std::max(int64_t(0), past + 1 - in.window) / KEYS * KEYS, blocks = (S - begin + KEYS - 1) / KEYS;
    #pragma omp single
    for (int i = 0; i < 2; i++) room[i].resize(KV * blocks * KEYS * H);
    #pragma omp for schedule(static)
    for (int64_t task = 0; task < KV * blocks; task++)
        lay_out(in, last, task / blocks, begin + task % blocks * KEYS, &room[0][task * KEYS * H], &room[1][task * KEYS * H]);
    #pragma omp for schedule(dynamic)
    for (int64_t task = KV * ((count + QUERIES - 1) / QUERIES) - 1; task >= 0; task--) {    // the longest come first
        const int64_t k = task % KV, from = task / KV * QUERIES;
        const int mine = std::min(int64_t(QUERIES), count - from);
        T q[G * QUERIES * H] = {}; float sum[G * QUERIES][H];
        for (int g = 0; g < G; g++)
            for (int64_t i = 0, m = first + from; i < mine; i++, m++)
                rope.turn(heads + m * HEADS + (k * G + g) * H, m, SCALE * LOG2_E, q + (g * QUERIES + i) * H);
        const int64_t at = k * blocks * KEYS * H;
        attend_many(q, past + from, mine, begin, in.window, &room[0][at], &room[1][at], sum);
        for (int g = 0; g < G; g++)
            for (int i = 0; i < mine; i++)
                for (int h = 0; h < H; h++) store(sum[g * QUERIES + i][h], out + ((first + from + i) * KV * G + k * G + g) * H + h);
    }
}

static void gate(const float* both, IN* out, int64_t M) {
    #pragma omp for schedule(static)
    for (int64_t part = 0; part < M * F / 16; part++) {
        const float *gates = both + part / (F / 16) * 2 * F + part % (F / 16) * 16;
        const __m512 x = _mm512_loadu_ps(gates), up = _mm512_loadu_ps(gates + F);
        put(x / (1 + power_of_2(-LOG2_E * x)) * up, out + part * 16);
    }
}

extern "C" void step(float* x, const Layer* layers, const float* gamma, IN* y, const float* cos, const float* sin,
                     T* keys, T* values, const int32_t* table, const int32_t* lengths, const int64_t* runs,
                     int64_t M, int64_t L, int64_t of_layer, int64_t blocks, int64_t C, int64_t size, int64_t window) {
    std::vector<IN> normed(M * D), seen(M * G * KV * H), gated(M * F);
    std::vector<float> heads(M * HEADS), more(M * D), both(M * 2 * F);
    std::vector<T> room[2];
    auto multiplied = [&](const std::vector<IN>& in, const char* w, std::vector<float>& out) {
        multiply((const X*)in.data(), w, out.data(), M, in.size() / M, out.size() / M);
    };
    const Rope rope = {cos, sin};
    #pragma omp parallel
    for (int64_t i = 0; i < L; i++) {
        const Layer& layer = layers[i];
        const Pages in = {keys + i * of_layer, values + i * of_layer, table, lengths, KV, blocks, C, size, window};
        norm(x, i ? more.data() : nullptr, layer.gamma, normed.data(), M);
        multiplied(normed, layer.qkv, heads);
        keep(heads.data(), rope, in, M);
        for (int64_t first = 0, run = 0; first < M; first += std::abs(runs[run++]))
            if (runs[run] > 0) look(heads.data(), rope, in, seen.data(), first, runs[run]);
            else look_many(heads.data(), rope, in, seen.data(), first, -runs[run], room);
        multiplied(seen, layer.out, more);
        norm(x, more.data(), layer.mlp_gamma, normed.data(), M);
        multiplied(normed, layer.gate_up, both);
        gate(both.data(), gated.data(), M);
        multiplied(gated, layer.down, more);
    }
    #pragma omp parallel
    norm(x, more.data(), gamma, y, M);
}
"""


class StepInCpp:
    """Steps of `model`, whose matrices are those of `source`, a float model, in the format of `model`. It takes any number of rows; `rows`
    are those for which a trained draft of this model will compile code.

    Raises NotImplementedError for a source with other layers than a `Layer`, with a bias or with norms on Q and K, for an H or F
    that is no multiple of 16, for other sizes that `cpp_tiles.panels` refuses, and where `cpp_strips` is not available.
    """

    @torch.inference_mode()
    def __init__(self, model: Decoder, source: Decoder, rows: Sequence[int] = (1,)) -> None:
        start, shape, self.format = now(), model.config.shape, model.weights
        if any(type(layer) is not Layer or layer.q_norm or layer.qkv.bias is not None for layer in source.layers):
            raise NotImplementedError("source: a model of plain layers without bias and without norms on Q and K is accepted")
        if shape.H % 16 or shape.F % 16 or not cpp_strips.available():
            raise NotImplementedError("it wants H and F by the sixteen, a C++ compiler, and a CPU with AVX512_BF16")
        self.model, self.dtype, self.inside, self.rows = model, model.dtype, cpp_tiles.COMPUTES_IN[self.format], sorted({1, *rows})
        self.group, self.parts = 0, []
        for layer in source.layers:
            self.parts += [layer.attention_norm.weight.float(), self.packed(layer.qkv), self.packed(layer.out),
                           layer.mlp_norm.weight.float(), self.packed(layer.gate_up), self.packed(layer.down)]
        self.pointers, self.gamma = torch.tensor([part.data_ptr() for part in self.parts]), source.norm.weight.float()
        names = cpp_strips.NAMES
        sizes = {"T": names[self.dtype], "IN": names[self.inside], "Y": "float", "GROUP": self.group, "G": shape.N // shape.K, "H": shape.H,
                 "KV": shape.K, "D": shape.D, "F": shape.F, "EPS": model.config.norm_eps}
        code = decode_cpp.SOURCE + prefill_cpp.SOURCE + cpp_strips.source(self.format) + SOURCE
        self.run = cpp.library(code, *(f"{name}={size}" for name, size in sizes.items())).step
        self.run.argtypes, self.run.restype = [ctypes.c_void_p] * 11 + [ctypes.c_int64] * 7, None
        self.compile_s = now() - start

    def packed(self, matrix: torch.nn.Linear) -> torch.Tensor:
        source = packable(self.format, matrix.weight.detach())
        if isinstance(source, Codes) and source.zeros is not None:
            group = matrix.weight.shape[1] // source.scales.shape[1]
            if self.group not in (0, group):
                raise NotImplementedError(f"weights in groups of {self.group} and of {group} inputs: groups of one size are accepted")
            self.group = group
        return cpp_tiles.panels(self.format, source)

    def takes(self, step: Step) -> bool:
        """Are its keys and values where C++ can find them, and of the type of this model's?"""
        return (pages := step.pages_of_rows) is not None and pages.keys.dtype == self.dtype

    def __call__(self, tokens: torch.Tensor, step: Step, last_only: bool | Sequence[int] = True) -> tuple[torch.Tensor, torch.Tensor]:
        """For tokens [M], what the last layer leaves, [M, D], and the logits that are wanted of it."""
        model, pages = self.model, step.pages_of_rows
        cos, sin = rope_tables(model.frequencies, step.positions, torch.float32)
        x = model.embed(tokens).float()
        y = torch.empty(x.shape, dtype=self.inside)
        parts = x, self.pointers, self.gamma, y, cos, sin, pages.keys, pages.values, pages.table, pages.lengths, runs(step.new)
        self.run(*(part.data_ptr() for part in parts), len(x), len(model.layers), pages.keys.stride(0), pages.table.shape[1],
                 pages.keys.shape[3], pages.block_size, pages.window or 2**40)
        return x, model.logits(wanted_rows(y.to(self.dtype), step, last_only))


def runs(new: Sequence[int]) -> torch.Tensor:
    """Rows of a step in their order: so many that each look by themselves, or, with a minus, so many of one sequence that look together."""
    found: list[int] = []
    for count in new:
        if count > FEW:
            found.append(-count)
        elif found and found[-1] > 0:
            found[-1] += count
        else:
            found.append(count)
    return torch.tensor(found)
