"""Drafts: who guesses the next tokens, and what a guess costs.

    PromptLookup    what followed the last time these words came: costs nothing, and knows nothing new
    ModelDraft      another model with the same tokens
    SelfDraft       the target itself in fewer bits, on the target's own KV cache
    EarlyExit       the target's own first layers, on the target's own KV cache
    TrainedDraft    one layer that goes on from the target's last vectors: in `trained`

A draft returns its tokens together with q, the distribution that it drew them from, out of one function. Verification divides
by q, so a q that is almost what was sampled from makes an output that is almost right, and no test of the text will tell.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from clawdemy_infer.arithmetic import Work
from clawdemy_infer.kv_cache import BlockPool, BlockTables, ContiguousCache, KVCache, PagedCache
from clawdemy_infer.model import Decoder, Sampling, compiled, draw, probabilities, with_weights
from clawdemy_infer.model.pruning import without_layers

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

Texts = Mapping[Hashable, Sequence[int]]
"""Token ids by sequence: the prompt and what was generated."""


class Proposal(NamedTuple):
    """The drafted `tokens` of each sequence, and q [B, G, V], what they were drawn from: zero behind a sequence's last, and None
    where the draft was certain of each. G is the most that one sequence has."""

    tokens: list[list[int]]
    q: torch.Tensor | None = None


class Draft(Protocol):
    """Guesses what comes next. One draft serves one generation at a time."""

    def begin(self, target: Decoder, cache: KVCache, prompts: Texts) -> None:
        """A new generation of `target` with these prompts, whose keys and values are kept in `cache`, still empty."""

    def join(self, sequence: Hashable) -> None:
        """One more sequence, that was not among the prompts: an engine begins with none."""

    def leave(self, sequence: Hashable) -> None:
        """It has ended, or gives way; then it may join again."""

    def propose(self, texts: Texts, counts: Mapping[Hashable, int], sampling: Sampling, generator: torch.Generator) -> Proposal:
        """At most counts[sequence] tokens to follow each text, drawn as `sampling` says.

        A text has grown since the last call by tokens that were proposed then, and by one, its last, that the target chose.
        """


class PromptLookup:
    """Copies: if the last n tokens came before, propose what followed them there (Saxena 2023, prompt lookup decoding).

    The longest n wins, from `longest` to `shortest`, and of equals the latest. A copy may run into itself: "a b a b" goes on
    with "a b a b a b", as in Ziv and Lempel 1977. Raises ValueError where 1 <= shortest <= longest does not hold.
    """

    def __init__(self, longest: int = 3, shortest: int = 1) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest={shortest}, longest={longest}: 1 <= shortest <= longest is accepted")
        self.sizes = range(longest, shortest - 1, -1)

    def begin(self, target: Decoder, cache: KVCache, prompts: Texts) -> None:
        self.ends: dict[Hashable, dict[tuple[int, ...], int]] = {sequence: {} for sequence in prompts}      # where each n-gram ended last
        self.known = dict.fromkeys(prompts, 0)

    def join(self, sequence: Hashable) -> None:
        self.ends[sequence], self.known[sequence] = {}, 0

    def leave(self, sequence: Hashable) -> None:
        del self.ends[sequence], self.known[sequence]

    def propose(self, texts: Texts, counts: Mapping[Hashable, int], sampling: Sampling, generator: torch.Generator) -> Proposal:
        return Proposal([self._copy(sequence, text, counts[sequence]) for sequence, text in texts.items()])

    def _copy(self, sequence: Hashable, text: Sequence[int], count: int) -> list[int]:
        ends = self.ends[sequence]
        for end in range(self.known[sequence], len(text)):              # all that ended before the last token
            for n in self.sizes:
                if n <= end:
                    ends[tuple(text[end - n:end])] = end
        self.known[sequence] = len(text)
        for n in self.sizes:
            if n < len(text) and (at := ends.get(tuple(text[-n:]))):
                copied: list[int] = []
                for i in range(at, at + count):
                    copied.append(text[i] if i < len(text) else copied[i - len(text)])
                return copied
        return []


class ModelDraft:
    """Another model with the same tokens, and a cache of its own: one forward pass for each drafted token.

    Raises ValueError, at `begin`, for a model of another vocabulary or too short a context.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model

    def begin(self, target: Decoder, cache: KVCache, prompts: Texts) -> None:
        mine, theirs = self.model, target
        if mine.config.shape.V != theirs.config.shape.V:
            raise ValueError(f"draft: its vocabulary has {mine.config.shape.V} tokens and the target's {theirs.config.shape.V}")
        if mine.tokenizer and theirs.tokenizer and mine.tokenizer is not theirs.tokenizer:
            if mine.tokenizer.backend.get_vocab() != theirs.tokenizer.backend.get_vocab():
                raise ValueError("draft: its tokens are not those of the target, though it has as many")
        limit, needed = mine.config.shape.max_context, min(cache.capacity, theirs.config.shape.max_context or cache.capacity)
        if limit and needed > limit:
            raise ValueError(f"draft: its context is {limit} tokens, and {needed} may be needed")
        self.places = {sequence: place for place, sequence in enumerate(prompts)}
        if not prompts:                     # an engine's: as many blocks as the target has, and whoever comes gets of them
            pool = cache.tables.pool
            self.cache = PagedCache.over(mine, BlockTables(BlockPool(pool.blocks, pool.block_size)))
            return
        self.cache = ContiguousCache.for_model(mine, len(prompts), cache.capacity)
        # Read the prompts now: that belongs to the time to the first token. The last token of each is brought by `propose`.
        self._step({sequence: ids[:-1] for sequence, ids in prompts.items() if len(ids) > 1})

    def join(self, sequence: Hashable) -> None:
        self.cache.add(sequence)
        self.places[sequence] = sequence

    def leave(self, sequence: Hashable) -> None:
        self.cache.free(sequence)
        del self.places[sequence]

    def propose(self, texts: Texts, counts: Mapping[Hashable, int], sampling: Sampling, generator: torch.Generator) -> Proposal:
        new, room, counts = {}, {}, dict(counts)
        for sequence, text in texts.items():
            # Of all but the last token the cache holds what the target accepted of our own; what lies behind was rejected.
            place = self.places[sequence]
            held = min(self.cache.lengths[place], len(text) - 1)
            self.cache.truncate(held, place)
            new[sequence] = text[held:]
            if isinstance(self.cache, PagedCache):
                # Where the target's sequences share blocks and ours do not, ours may run short: then there is no guess.
                room[place] = len(text) - held + counts[sequence] - 1
                if not self.cache.can_append(room):
                    room[place] = counts[sequence] = 0
        most = max(counts[sequence] for sequence in texts)
        shape = (len(texts), most, self.model.config.shape.V)
        drafted: dict[Hashable, list[int]] = {sequence: [] for sequence in texts}
        q = None
        for i in range(most):
            active = [sequence for sequence in texts if counts[sequence] > i]
            logits = self._step({sequence: new[sequence] for sequence in active})                                   # [B', V]
            if sampling.temperature == 0:
                tokens = logits.argmax(-1)
            else:
                chances = probabilities(logits, sampling)
                tokens = draw(chances, generator)
                q = chances.new_zeros(shape) if q is None else q
                rows = [row for row, sequence in enumerate(texts) if counts[sequence] > i]
                q[rows, i] = chances
            for sequence, token in zip(active, tokens.tolist(), strict=True):
                drafted[sequence].append(token)
                new[sequence] = [token]
        return Proposal(list(drafted.values()), q)

    def step_work(self, batch: int, context: int) -> Work:
        """What it takes to draft a token for each of `batch` sequences."""
        shape, kept = self.model.config.shape, DTYPES[self.model.dtype]
        return shape.decode(batch, context, weights=self.model.weights, kv=kept, activations=kept)

    def _step(self, new: Texts) -> torch.Tensor | None:
        return self.model.step({self.places[sequence]: ids for sequence, ids in new.items()}, self.cache) if new else None


class SelfDraft(ModelDraft):
    """A copy of the target that computes roughly, on the target's own keys and values: better ones than its own, and read already.

    What it adds to them while it guesses is forgotten. That needs a `ContiguousCache`, whose bytes it may overwrite, of its own
    dtype; over any other cache it is a model with a cache of its own.
    """

    shared: KVCache | None = None

    def begin(self, target: Decoder, cache: KVCache, prompts: Texts) -> None:
        if type(cache) is not ContiguousCache or cache.dtype != self.model.dtype:
            self.shared = None
            super().begin(target, cache, prompts)
            return
        self.cache = self.shared = cache
        self.places = {sequence: sequence for sequence in prompts}

    def propose(self, texts: Texts, counts: Mapping[Hashable, int], sampling: Sampling, generator: torch.Generator) -> Proposal:
        proposal = super().propose(texts, counts, sampling, generator)
        if self.shared:
            for sequence, text in texts.items():        # the target brings these tokens again, and its own keys and values
                self.shared.truncate(len(text) - 1, sequence)
        return proposal


class EarlyExit(SelfDraft):
    """The first `layers` layers of the target, then its own norm and head (Elhoushi et al. 2024, LayerSkip, without its training).

    What these layers keep is what they would keep in the whole model, so the draft writes into any cache of the target's that can be
    truncated, contiguous or paged, and has none of its own. Raises ValueError for a number of layers that makes no sense.
    """

    def __init__(self, model: Decoder, layers: int) -> None:
        L = len(model.layers)
        if not 1 <= layers < L:
            raise ValueError(f"layers={layers}: 1 to {L - 1} are accepted")
        super().__init__(without_layers(model, range(layers, L)))

    def begin(self, target: Decoder, cache: KVCache, prompts: Texts) -> None:
        if isinstance(cache, PagedCache) and cache.tables.prefix:
            raise ValueError("draft: blocks that the first layers alone filled must not be found again: prefix_caching=False is accepted")
        self.cache = self.shared = cache
        self.places = {sequence: sequence for sequence in prompts}

    def join(self, sequence: Hashable) -> None:
        self.places[sequence] = sequence            # in a cache that is the target's

    def leave(self, sequence: Hashable) -> None:
        del self.places[sequence]


def draft_named(name: str, target: Decoder) -> Draft:
    """"lookup", "int8" or "int4" (the target itself in so many bits), "exit:K" (its first K layers) or "trained" (the draft that is
    shipped for the packaged model). For a compiled target all but "exit" run compiled code too. Raises ValueError for others.
    """
    if name == "lookup":
        return PromptLookup()
    if name in ("int8", "int4"):
        # Two rows: where all guesses stood, a draft with a cache of its own, as int4 has, has not read the last of them.
        return SelfDraft(compiled(target, name, (1, 2) if name == "int4" else (1,)) if target.compiled_step else with_weights(target, name))
    if name.startswith("exit:") and name[5:].isdigit():
        return EarlyExit(target, int(name[5:]))
    if name == "trained":
        from clawdemy_infer.speculative.trained import load_draft  # it builds on this file
        return load_draft(target)
    raise ValueError(f"draft={name!r}: accepted are lookup, int8, int4, trained, exit:K for the first K layers")
