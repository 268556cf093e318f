"""Dropping layers: the cheapest way to a smaller model, where a layer does little.

Every layer adds to the residual stream. One that adds little can go, and the others still fit: Men
et al. 2024 (ShortGPT) drop those of least influence, Gromov et al. 2024 the deep ones. Both then
train the rest a little ("healing"), which is not done here.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from clawdemy_infer.model.decoder import Decoder


def without_layers(model: Decoder, dropped: Collection[int]) -> Decoder:
    """`model` without these layers, counted from 0. No weight is copied: both models share them.
    Raises ValueError for a layer that the model lacks, or if none would be left."""
    L = len(model.layers)
    for index in dropped:
        if not 0 <= index < L:
            raise ValueError(f"dropped={index}: layers 0 to {L - 1} are accepted")
    kept = [layer for index, layer in enumerate(model.layers) if index not in dropped]
    if not kept:
        raise ValueError(f"dropped={sorted(dropped)}: one layer at least must stay")
    config = replace(model.config, shape=replace(model.config.shape, L=len(kept)))
    with torch.device("meta"):                  # no memory: the rest is put in below
        pruned = Decoder(config, make_layer=kept.__getitem__)
    pruned.embed, pruned.norm, pruned.head = model.embed, model.norm, model.head
    pruned.frequencies, pruned.tokenizer = model.frequencies, model.tokenizer
    pruned.packed = model.packed
    return pruned.eval()


def influence(model: Decoder, tokens: torch.Tensor) -> list[float]:
    """How much each layer turns the residual stream, on tokens [B, T]: 1 - cosine between what goes
    in and what comes out, the mean over the positions (ShortGPT, equation 1, "block influence")."""
    turns: list[float] = []

    def measure(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        cosine = torch.cosine_similarity(inputs[0].float(), output.float(), dim=-1)
        turns.append(1 - cosine.mean().item())

    with ExitStack() as stack:
        for layer in model.layers:
            stack.enter_context(layer.register_forward_hook(measure))
        model(tokens, last_only=True)
    return turns
