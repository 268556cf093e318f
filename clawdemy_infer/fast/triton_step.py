"""A step on Triton kernels: what lies between a layer's products is four launches where PyTorch
makes about twenty-five.

    norm                                    rms_norm
    qkv
    RoPE, keys and values to their slots    rope_append
    attention                               decode_paged, prefill_paged
    out, residual, norm                     rms_norm with the residual
    gate and up, silu(gate) up, down        swiglu
    residual
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch

from clawdemy_infer.attention import attend
from clawdemy_infer.fast.backends import kernel
from clawdemy_infer.fast.pages import Pages, has_pages, pages_of, slots_of
from clawdemy_infer.kv_cache import PagedCache, Step
from clawdemy_infer.model.decoder import Decoder, Layer, LogitsToKeep, RMSNorm, wanted_rows
from clawdemy_infer.model.rope import rope_tables

Attention = Callable[[int, torch.Tensor], torch.Tensor]
"""The layer's index and q [M, N, H] -> [M, N*H]. New keys and values are in their slots."""


class TritonStep:
    """Steps of `model` over plain keys and values. Raises ValueError for layers with experts,
    latents or others."""

    backend = "triton"
    compile_s = 0.0

    def __init__(self, model: Decoder) -> None:
        if not is_plain(model):
            raise ValueError("backend='triton': a model of plain layers is accepted, and this one "
                             "has experts, latents or others; torch is accepted")
        kernel("rms_norm")          # imports Triton, which `count_ops` must find before it counts
        self.model = model

    def takes(self, step: Step) -> bool:
        return has_pages(step)

    def __call__(self, tokens: torch.Tensor, step: Step,
                 logits_to_keep: LogitsToKeep = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """For tokens [M], what the last layer leaves, [M, D], and the logits that are wanted of
        it."""
        pages = pages_of(step)
        x = self.layers(tokens, step.positions, slots_of(step), pages, self.attention(step, pages))
        return x, self.logits(wanted_rows(x, step, logits_to_keep))

    def layers(self, tokens: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor,
               pages: Pages, attention: Attention) -> torch.Tensor:
        """Tokens, positions and slots [M] -> what the last layer leaves, [M, D]."""
        model, shape = self.model, self.model.config.shape
        model.frequencies = model.frequencies.to(model.device)
        # (cos, cos) and (-sin, sin), of which the kernel reads one half: [M, H/2]
        cos, sin = (table[:, 0, shape.H // 2:]
                    for table in rope_tables(model.frequencies, positions, model.dtype,
                                             model.config.rope_gain))
        x = model.embed(tokens)
        for index, layer in enumerate(model.layers):
            heads = layer.qkv(norm(layer.attention_norm, x)).view(len(x), -1, shape.H)
            if layer.q_norm is not None:
                q, k, v = heads.split((shape.N, shape.K, shape.K), dim=1)
                heads = torch.cat((norm(layer.q_norm, q), norm(layer.k_norm, k), v), dim=1)
            q = kernel("rope_append")(heads, cos, sin, slots, pages.keys[index],
                                      pages.values[index])
            y = layer.out(attention(index, q))
            y = kernel("rms_norm")(y, layer.mlp_norm.weight, layer.mlp_norm.eps,
                                   residual=x)                          # x becomes x + y
            x = x + layer.down(kernel("swiglu")(layer.gate_up(y)))
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.logits(norm(self.model.norm, x))

    def decode(self, pages: Pages, table: torch.Tensor, lengths: torch.Tensor) -> Attention:
        """Attention of sequences that bring one token each; `lengths` [B] of int32 count it."""
        window = self.model.config.shape.window
        return lambda layer, q: kernel("decode_paged")(
            q, pages.keys[layer], pages.values[layer], table, lengths, window=window).flatten(1)

    def attention(self, step: Step, pages: Pages) -> Attention:
        """Sequences that bring one token go through `decode_paged`. The chunks of prompts through
        `prefill_paged`; over a contiguous cache, where keys lie in one piece, PyTorch does those
        as well as can be done."""
        device, cache, window = pages.table.device, step.cache, self.model.config.shape.window
        first = [0, *accumulate(step.num_new_tokens)]

        def rows_of(sequences: list[int]) -> torch.Tensor:
            rows = [row for i in sequences for row in range(first[i], first[i + 1])]
            return torch.tensor(rows, device=device)

        def numbers(x: list[int]) -> torch.Tensor:
            return torch.tensor(x, dtype=torch.int32, device=device)

        parts: list[tuple[torch.Tensor, Attention]] = []
        ones = [i for i, T in enumerate(step.num_new_tokens) if T == 1]
        chunks = [i for i, T in enumerate(step.num_new_tokens) if T > 1]
        if ones:
            lengths = numbers([step.past[i] + 1 for i in ones])
            parts.append((rows_of(ones), self.decode(pages, pages.table[ones], lengths)))
        if chunks and isinstance(cache, PagedCache):
            table, past = pages.table[chunks], numbers([step.past[i] for i in chunks])
            most = max(step.num_new_tokens)
            starts = numbers([0, *accumulate(step.num_new_tokens[i] for i in chunks)])
            parts.append((rows_of(chunks), lambda layer, q: kernel("prefill_paged")(
                q, pages.keys[layer], pages.values[layer], table, starts, past, window=window,
                max_seqlen_q=most).flatten(1)))
        elif chunks:
            parts += [(torch.arange(part.rectangle.rows.start, part.rectangle.rows.stop,
                                    device=device),
                       lambda layer, q, part=part: attend(q, *cache.read(layer, part),
                                                          part.mask))
                      for part in step.parts if part.rectangle.T > 1]

        def attention(layer: int, q: torch.Tensor) -> torch.Tensor:
            if len(parts) == 1:
                return parts[0][1](layer, q)
            out = q.new_empty(len(q), q.shape[1] * q.shape[2])
            for rows, part in parts:
                out[rows] = part(layer, q[rows])
            return out
        return attention


def is_plain(model: Decoder) -> bool:
    """Has it no other layers than the decoder's own?"""
    return all(type(layer) is Layer for layer in model.layers)


def norm(of: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return kernel("rms_norm")(x.reshape(-1, x.shape[-1]), of.weight, of.eps).view(x.shape)
