"""A step of a few tokens of any number of sequences as one call of C++.

Between the products of such a step there is little to compute and much to call: nine operations a layer that are started one by one, by
Python, each of which wakes all threads and waits for the last. Here the threads start once, go through all layers together, and meet only
where one needs what another has made:

    norm    residual, norm                              before QKV and before gate and up
    keep    RoPE, new keys and values to their pages
    look    RoPE, attention over the pages
    gate    silu(gate) * up
    multiply, four times                                QKV, out, gate and up, down

To attention a token is a row of its own that sees as much of its sequence as was there when it came: so several tokens of one sequence, as
where a draft's guesses are checked, are no case of their own. The products are those of `linear.cpp_strips`, attention is that of
`kv_cache.decode_cpp`. The residual stream and all sums are in fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from clawdemy_infer import cpp
from clawdemy_infer.kv_cache import Step, decode_cpp
from clawdemy_infer.linear import Codes, cpp_strips, cpp_tiles, packable
from clawdemy_infer.model.decoder import Decoder, Layer, wanted_rows
from clawdemy_infer.model.rope import rope_tables
from clawdemy_infer.timing import now

FEW = 16
"""Tokens of a sequence: for more, attention should not read its keys again for each."""

SOURCE = r"""
#include <vector>

const int64_t HEADS = (G + 2) * KV * H;                                                     // all numbers of a row's q, k and v
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
    float of(const float* head, int64_t m, int h) const { return head[h] * cos[m * H + h] + head[(h + H / 2) % H] * sin[m * H + h]; }
};

static void keep(const float* heads, const Rope& rope, const Pages& in, int64_t M) {
    #pragma omp for schedule(static)
    for (int64_t task = 0; task < M * KV; task++) {
        const int64_t m = task / KV, k = task % KV, newest = in.place(m, k, in.lengths[m] - 1);
        const float *key = heads + m * HEADS + (G * KV + k) * H, *value = key + KV * H;
        for (int h = 0; h < H; h++) store(rope.of(key, m, h), in.keys + newest + h), store(value[h], in.values + newest + h);
    }
}

static void look(const float* heads, const Rope& rope, const Pages& in, IN* out, int64_t M) {
    #pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < M * KV; task++) {
        const int64_t m = task / KV, k = task % KV;
        float query[G][H];
        for (int g = 0; g < G; g++)
            for (int h = 0; h < H; h++) query[g][h] = rope.of(heads + m * HEADS + (k * G + g) * H, m, h) / std::sqrt(float(H));
        attend(query, in, m, k, out + task * G * H);
    }
}

static void gate(const float* both, IN* out, int64_t M) {
    #pragma omp for schedule(static)
    for (int64_t part = 0; part < 4 * M; part++) {                                          // four, so that threads share a row
        const int64_t m = part / 4, end = F * (part % 4 + 1) / 4;
        const float *gates = both + m * 2 * F, *up = gates + F;
        for (int64_t f = F * (part % 4) / 4; f < end; f++) store(gates[f] / (1 + expf(-gates[f])) * up[f], out + m * F + f);
    }
}

extern "C" void step(float* x, const Layer* layers, const float* gamma, IN* y, const float* cos, const float* sin,
                     T* keys, T* values, const int32_t* table, const int32_t* lengths,
                     int64_t M, int64_t L, int64_t of_layer, int64_t blocks, int64_t C, int64_t size, int64_t window) {
    std::vector<IN> normed(M * D), seen(M * G * KV * H), gated(M * F);
    std::vector<float> heads(M * HEADS), more(M * D), both(M * 2 * F);
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
        look(heads.data(), rope, in, seen.data(), M);
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
    """Steps of `model`, whose matrices are those of `source`, a float model, in the format of `model`. Of `rows` nothing but the largest
    matters: a trained draft of this model compiles code for them.

    Raises NotImplementedError for a source with other layers than a `Layer`, with a bias or with norms on Q and K, for sizes that
    `cpp_tiles.panels` refuses, and where `cpp_strips` is not available.
    """

    @torch.inference_mode()
    def __init__(self, model: Decoder, source: Decoder, rows: Sequence[int] = (1,)) -> None:
        start, shape, self.format = now(), model.config.shape, model.weights
        if any(type(layer) is not Layer or layer.q_norm or layer.qkv.bias is not None for layer in source.layers):
            raise NotImplementedError("source: a model of plain layers without bias and without norms on Q and K is accepted")
        if not cpp_strips.available():
            raise NotImplementedError("it wants a C++ compiler, and a CPU with AVX512_BF16")
        self.model, self.dtype, self.inside, self.rows = model, model.dtype, cpp_tiles.COMPUTES_IN[self.format], sorted({1, *rows})
        self.group, self.parts = 0, []
        for layer in source.layers:
            self.parts += [layer.attention_norm.weight.float(), self.packed(layer.qkv), self.packed(layer.out),
                           layer.mlp_norm.weight.float(), self.packed(layer.gate_up), self.packed(layer.down)]
        self.pointers, self.gamma = torch.tensor([part.data_ptr() for part in self.parts]), source.norm.weight.float()
        names = cpp_strips.NAMES
        sizes = {"T": names[self.dtype], "IN": names[self.inside], "Y": "float", "GROUP": self.group, "G": shape.N // shape.K, "H": shape.H,
                 "KV": shape.K, "D": shape.D, "F": shape.F, "EPS": model.config.norm_eps}
        code = decode_cpp.SOURCE + cpp_strips.source(self.format) + SOURCE
        self.run = cpp.library(code, *(f"{name}={size}" for name, size in sizes.items())).step
        self.run.argtypes, self.run.restype = [ctypes.c_void_p] * 10 + [ctypes.c_int64] * 7, None
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
        """Is it one of a few tokens each, over keys and values that C++ can find?"""
        return max(step.new) <= FEW and (pages := step.pages_of_rows()) is not None and pages.keys.dtype == self.dtype

    def __call__(self, tokens: torch.Tensor, step: Step, last_only: bool | Sequence[int] = True) -> tuple[torch.Tensor, torch.Tensor]:
        """For tokens [M], what the last layer leaves, [M, D], and the logits that are wanted of it."""
        model, pages = self.model, step.pages_of_rows()
        cos, sin = rope_tables(model.frequencies, step.positions, torch.float32)
        x = model.embed(tokens).float()
        y = torch.empty(x.shape, dtype=self.inside)
        parts = x, self.pointers, self.gamma, y, cos, sin, pages.keys, pages.values, pages.table, pages.lengths
        self.run(*(part.data_ptr() for part in parts), len(x), len(model.layers), pages.keys.stride(0), pages.table.shape[1],
                 pages.keys.shape[3], pages.block_size, pages.window or 2**40)
        return x, model.logits(wanted_rows(y.to(self.dtype), step, last_only))
