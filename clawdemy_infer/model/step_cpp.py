"""A decode step of any number of sequences as one call of C++, with bf16 weights.

Between the products of such a step there is little to compute and much to call: nine operations a layer that are started one by one, by
Python, each of which wakes all threads and waits for the last. Here the threads start once, go through all layers together, and meet only
where one needs what another has made:

    norm    residual, norm                              before QKV and before gate and up
    look    RoPE, the new keys and values kept, attention over the pages
    gate    silu(gate) * up
    multiply, four times                                QKV, out, gate and up, down

The products are those of `linear.cpp_bf16`, attention is that of `kv_cache.decode_cpp`. The residual stream and all sums are in fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from clawdemy_infer import cpp
from clawdemy_infer.kv_cache import Step, decode_cpp
from clawdemy_infer.linear import cpp_bf16
from clawdemy_infer.model.decoder import Decoder, Layer
from clawdemy_infer.model.rope import rope_tables
from clawdemy_infer.timing import now

SOURCE = r"""
#include <vector>

struct Layer { const float* gamma; const pairs *qkv, *out; const float* mlp_gamma; const pairs *gate_up, *down; };

static void norm(float* x, const T* more, const float* gamma, T* y, int64_t B) {            // x becomes x + more, y its norm
    #pragma omp for schedule(static)
    for (int64_t b = 0; b < B; b++) {
        float* row = x + b * D; float squares = 0;
        if (more) for (int d = 0; d < D; d++) row[d] += number(more[b * D + d]);
        for (int d = 0; d < D; d++) squares += row[d] * row[d];
        const float scale = 1 / std::sqrt(squares / D + float(EPS));
        for (int d = 0; d < D; d++) store(row[d] * scale * gamma[d], y + b * D + d);
    }
}

static void look(const T* heads, const float* cos, const float* sin, const Pages& in, T* out, int64_t B) {
    #pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < B * HEADS; task++) {
        const int64_t b = task / HEADS, k = task % HEADS, newest = in.place(b, k, in.lengths[b] - 1);
        const T *row = heads + b * (G + 2) * HEADS * H, *key = row + (G * HEADS + k) * H, *value = key + HEADS * H;
        auto turned = [&](const T* head, int h) {
            return number(head[h]) * cos[b * H + h] + number(head[(h + H / 2) % H]) * sin[b * H + h];
        };
        float query[G][H];
        for (int g = 0; g < G; g++) for (int h = 0; h < H; h++) query[g][h] = turned(row + (k * G + g) * H, h) / std::sqrt(float(H));
        for (int h = 0; h < H; h++) store(turned(key, h), in.keys + newest + h), in.values[newest + h] = value[h];
        attend(query, in, b, k, out + task * G * H);
    }
}

static void gate(const T* both, T* out, int64_t B) {
    #pragma omp for schedule(static)
    for (int64_t part = 0; part < 4 * B; part++) {                                          // four, so that threads share a row
        const int64_t b = part / 4, end = F * (part % 4 + 1) / 4;
        for (int64_t f = F * (part % 4) / 4; f < end; f++) {
            const float x = number(both[b * 2 * F + f]);
            store(x / (1 + expf(-x)) * number(both[b * 2 * F + F + f]), out + b * F + f);
        }
    }
}

extern "C" void step(float* x, const Layer* layers, const float* gamma, T* y, const float* cos, const float* sin,
                     T* keys, T* values, const int32_t* table, const int32_t* lengths,
                     int64_t B, int64_t L, int64_t of_layer, int64_t blocks, int64_t C, int64_t size, int64_t window) {
    auto room = [&](int64_t width) { return std::vector<T>(B * width); };
    auto heads = room((G + 2) * HEADS * H), seen = room(G * HEADS * H), more = room(D), both = room(2 * F), gated = room(F);
    auto multiplied = [&](const std::vector<T>& in, const pairs* w, std::vector<T>& out) {
        multiply((const int32_t*)in.data(), w, out.data(), B, in.size() / B, out.size() / B);
    };
    auto normed = room(D);
    #pragma omp parallel
    for (int64_t i = 0; i < L; i++) {
        const Layer& layer = layers[i];
        norm(x, i ? more.data() : nullptr, layer.gamma, normed.data(), B);
        multiplied(normed, layer.qkv, heads);
        const Pages in = {keys + i * of_layer, values + i * of_layer, table, lengths, HEADS, blocks, C, size, window};
        look(heads.data(), cos, sin, in, seen.data(), B);
        multiplied(seen, layer.out, more);
        norm(x, more.data(), layer.mlp_gamma, normed.data(), B);
        multiplied(normed, layer.gate_up, both);
        gate(both.data(), gated.data(), B);
        multiplied(gated, layer.down, more);
    }
    #pragma omp parallel
    norm(x, more.data(), gamma, y, B);
}
"""


class StepInCpp:
    """A step of `model`, in which every sequence brings one token, and keys and values lie in bf16 where C++ can look. The matrices are
    those of `source`, a float model.

    Raises NotImplementedError for a source with other layers than a `Layer`, with a bias or with norms on Q and K, for sizes that
    `cpp_bf16` does not take, and where that is not available.
    """

    @torch.inference_mode()
    def __init__(self, model: Decoder, source: Decoder) -> None:
        start, shape = now(), model.config.shape
        if any(type(layer) is not Layer or layer.q_norm or layer.qkv.bias is not None for layer in source.layers):
            raise NotImplementedError("source: a model of plain layers without bias and without norms on Q and K is accepted")
        sizes = {"T": "uint16_t", "G": shape.N // shape.K, "H": shape.H, "HEADS": shape.K, "D": shape.D, "F": shape.F,
                 "EPS": model.config.norm_eps}
        if not cpp_bf16.available():
            raise NotImplementedError("this CPU has no AVX512_BF16")
        self.run = cpp.library(decode_cpp.SOURCE + cpp_bf16.SOURCE + SOURCE, *(f"{name}={size}" for name, size in sizes.items())).step
        self.run.argtypes, self.run.restype = [ctypes.c_void_p] * 10 + [ctypes.c_int64] * 7, None
        self.model = model
        self.parts = [part for layer in source.layers for part in (
            layer.attention_norm.weight.float(), self.packed(layer.qkv), self.packed(layer.out),
            layer.mlp_norm.weight.float(), self.packed(layer.gate_up), self.packed(layer.down))]
        self.pointers = torch.tensor([part.data_ptr() for part in self.parts])
        self.gamma = source.norm.weight.float()
        self.compile_s = now() - start

    def packed(self, matrix: torch.nn.Linear) -> torch.Tensor:
        return cpp_bf16.panels(matrix.weight.to(torch.bfloat16))

    def takes(self, step: Step) -> bool:
        """Does it look as such a step wants to?"""
        return (pages := step.decode_pages()) is not None and pages.keys.dtype == torch.bfloat16

    def __call__(self, tokens: torch.Tensor, step: Step, last_only: bool | Sequence[int] = True) -> tuple[torch.Tensor, torch.Tensor]:
        """For tokens [B], what the last layer leaves, [B, D], and the logits, [B, V]."""
        model, pages = self.model, step.decode_pages()
        cos, sin = rope_tables(model.frequencies, step.positions, torch.float32)
        x = model.embed(tokens).float()
        y = torch.empty(x.shape, dtype=torch.bfloat16)
        parts = x, self.pointers, self.gamma, y, cos, sin, pages.keys, pages.values, pages.table, pages.lengths
        self.run(*(part.data_ptr() for part in parts), len(x), len(pages.keys), pages.keys.stride(0), pages.table.shape[1],
                 pages.keys.shape[3], pages.block_size, pages.window or 2**40)
        return x, model.logits(y)
