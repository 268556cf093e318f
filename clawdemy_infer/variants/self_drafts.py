"""Drafts made of the target itself: a rougher copy, or its first layers. All drafts by name."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from clawdemy_infer.fast.faster import faster
from clawdemy_infer.kv_cache import ContiguousCache, KVCache, PagedCache
from clawdemy_infer.model import Decoder, Sampling
from clawdemy_infer.speculative.drafts import Draft, ModelDraft, PromptLookup, Proposal, Texts
from clawdemy_infer.variants.pruning import without_layers
from clawdemy_infer.variants.trained import load_draft


class SelfDraft(ModelDraft):
    """A copy of the target that computes roughly, on the target's own keys and values: better ones
    than its own, and read already. What it adds to them is forgotten. That needs a
    `ContiguousCache` of its own dtype; over any other it is a model with a cache of its own."""

    shared: KVCache | None = None

    def begin(self, target: Decoder, cache: KVCache, prompts: Texts) -> None:
        if type(cache) is ContiguousCache and cache.dtype == self.model.dtype:
            self.share(cache, prompts)
        else:
            self.shared = None
            super().begin(target, cache, prompts)

    def share(self, cache: KVCache, prompts: Texts) -> None:
        """Draft on the target's `cache`."""
        self.cache = self.shared = cache
        self.names = {sequence: sequence for sequence in prompts}

    def propose(self, texts: Texts, counts: Mapping[Hashable, int], sampling: Sampling,
                generator: torch.Generator) -> Proposal:
        proposal = super().propose(texts, counts, sampling, generator)
        if self.shared:         # the target brings these tokens again, and its own keys and values
            for sequence, text in texts.items():
                self.shared.truncate(len(text) - 1, sequence)
        return proposal


class EarlyExit(SelfDraft):
    """The first `layers` layers of the target, then its own norm and head (Elhoushi et al. 2024,
    LayerSkip, without its training). They keep what they keep in the whole model, so the draft
    writes into the target's cache. Raises ValueError unless 1 <= layers < L."""

    def __init__(self, model: Decoder, layers: int) -> None:
        L = len(model.layers)
        if not 1 <= layers < L:
            raise ValueError(f"layers={layers}: 1 to {L - 1} are accepted")
        super().__init__(without_layers(model, range(layers, L)))

    def begin(self, target: Decoder, cache: KVCache, prompts: Texts) -> None:
        if isinstance(cache, PagedCache) and cache.tables.prefix:
            raise ValueError("draft: blocks that the first layers alone filled must not be found "
                             "again: prefix_caching=False is accepted")
        self.share(cache, prompts)

    def join(self, sequence: Hashable) -> None:
        self.names[sequence] = sequence             # in a cache that is the target's

    def leave(self, sequence: Hashable) -> None:
        del self.names[sequence]


def draft_named(name: str, target: Decoder, compile: bool = False) -> Draft:
    """"lookup"; "int8" or "int4", the target in that format, in C++ if it is or to `compile`;
    "exit:K", its first K layers; or "trained", shipped for the packaged model. ValueError for
    others."""
    if name == "lookup":
        return PromptLookup()
    if name in ("int8", "int4"):
        compile = compile or getattr(target.runner, "backend", "torch") == "cpp"
        return SelfDraft(faster(target, name, compile=compile))
    if name.startswith("exit:") and name[5:].isdigit():
        return EarlyExit(target, int(name[5:]))
    if name == "trained":
        return load_draft(target)
    raise ValueError(f"draft={name!r}: accepted are lookup, int8, int4, trained, exit:K for the "
                     "first K layers")
