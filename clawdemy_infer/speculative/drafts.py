"""Drafts: who proposes the next tokens, and what a proposal costs.

    PromptLookup    what followed the last time these words came: costs nothing, knows nothing new
    ModelDraft      another model with the same tokens

`variants` has three more, made of the target itself or trained for it.

A draft returns its tokens together with q, the distribution that it drew them from. Verification
divides by q, so a q that is almost what was sampled from makes an output that is almost right, and
no test of the text will tell."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from clawdemy_infer.kv_cache import BlockPool, BlockTables, ContiguousCache, KVCache, PagedCache
from clawdemy_infer.model import Decoder, Sampling, draw, probabilities
from clawdemy_infer.model.sampling import NOTHING, likeliest

Texts = Mapping[Hashable, Sequence[int]]     # token ids by sequence: prompt and what was generated


class Proposal(NamedTuple):
    """The drafted `tokens` of each sequence, at most G, and q [B, G, V], what they were drawn from:
    not looked at behind a sequence's last, and None where the draft was certain of each."""

    tokens: list[list[int]]
    q: torch.Tensor | None = None


class Draft(Protocol):
    """Proposes what comes next. One draft serves one generation at a time."""

    def begin(self, target: Decoder, cache: KVCache, prompts: Texts) -> None:
        """A new generation of `target` with these prompts, whose keys and values are kept in
        `cache`, still empty. An engine begins without prompts."""

    def join(self, sequence: Hashable) -> None:
        """One more sequence, that was not among the prompts."""

    def leave(self, sequence: Hashable) -> None:
        """It has ended, or gives way; then it may join again."""

    def propose(self, texts: Texts, counts: Mapping[Hashable, int], sampling: Sampling,
                generator: torch.Generator) -> Proposal:
        """At most counts[sequence] tokens to follow each text, drawn as `sampling` says. A text has
        grown since by some of what was proposed then, and by one or more of the target's."""


class PromptLookup:
    """Copies: if the last n tokens came before, propose what followed them there (Saxena 2023,
    prompt lookup decoding). The longest n of `SIZES` wins, and of equals the latest. A copy may run
    into itself, as "a b a b" does (Ziv and Lempel 1977).

    >>> draft, text = PromptLookup(), [5, 6, 7, 8, 5, 6]
    >>> draft.begin(None, None, {"a": text})
    >>> draft.propose({"a": text}, {"a": 3}, None, None).tokens         # 7 8 5 followed 5 6
    [[7, 8, 5]]
    """

    SIZES = 3, 2, 1

    def begin(self, target: Decoder, cache: KVCache, prompts: Texts) -> None:
        self.ends: dict[Hashable, dict[tuple[int, ...], int]] = {}      # of an n-gram's last place
        self.known: dict[Hashable, int] = {}                            # tokens that are in `ends`
        for sequence in prompts:
            self.join(sequence)

    def join(self, sequence: Hashable) -> None:
        self.ends[sequence], self.known[sequence] = {}, 0

    def leave(self, sequence: Hashable) -> None:
        del self.ends[sequence], self.known[sequence]

    def propose(self, texts: Texts, counts: Mapping[Hashable, int], sampling: Sampling,
                generator: torch.Generator) -> Proposal:
        return Proposal([self._copy(sequence, text, counts[sequence])
                         for sequence, text in texts.items()])

    def _copy(self, sequence: Hashable, text: Sequence[int], count: int) -> list[int]:
        ends, T = self.ends[sequence], len(text)
        for end in range(self.known[sequence], T):              # those before the last token
            ends |= {tuple(text[end - n:end]): end for n in self.SIZES if n <= end}
        self.known[sequence] = T
        for n in self.SIZES:
            if n < T and (start := ends.get(tuple(text[-n:]))):
                return [text[start + i % (T - start)] for i in range(count)]
        return []


class ModelDraft:
    """Another model with the same tokens and a cache of its own: a forward pass for each drafted
    token. Where its logits leave nothing to choose, as behind a NaN, it drafts no further, and the
    target goes on. Raises ValueError, at `begin`, for another vocabulary or too short a context."""

    def __init__(self, model: Decoder) -> None:
        self.model = model

    def begin(self, target: Decoder, cache: KVCache, prompts: Texts) -> None:
        mine, theirs = self.model.config.shape, target.config.shape
        if mine.V != theirs.V:
            raise ValueError(f"draft: its vocabulary has {mine.V} tokens and the target's "
                             f"{theirs.V}")
        tokenizer, other = self.model.tokenizer, target.tokenizer
        if (tokenizer and other and tokenizer is not other
                and tokenizer.backend.get_vocab() != other.backend.get_vocab()):
            raise ValueError("draft: its tokens are not those of the target, though it has as many")
        needed = min(cache.capacity, theirs.max_context or cache.capacity)
        if mine.max_context and needed > mine.max_context:
            raise ValueError(f"draft: its context is {mine.max_context} tokens, and {needed} may "
                             "be needed")
        self.names = {sequence: index for index, sequence in enumerate(prompts)}    # in our cache
        if not prompts:             # an engine's: as many blocks as the target has, for who joins
            pool = cache.tables.pool
            tables = BlockTables(BlockPool(pool.blocks, pool.block_size))
            self.cache = PagedCache.over(self.model, tables)
            return
        self.cache = ContiguousCache.for_model(self.model, len(prompts), cache.capacity)
        # Read the prompts now, in the time to the first token, but for the last token of each.
        self._step({sequence: ids[:-1] for sequence, ids in prompts.items() if len(ids) > 1})

    def join(self, sequence: Hashable) -> None:
        self.cache.add(sequence)
        self.names[sequence] = sequence

    def leave(self, sequence: Hashable) -> None:
        self.cache.free(sequence)
        del self.names[sequence]

    def propose(self, texts: Texts, counts: Mapping[Hashable, int], sampling: Sampling,
                generator: torch.Generator) -> Proposal:
        # 1. Forget what the target rejected: all but a text's last token, as far as it is cached,
        #    stays. Where our cache runs short, since the target's shares blocks, draft nothing.
        new, num_new_tokens, counts = {}, {}, dict(counts)
        for sequence, text in texts.items():
            name = self.names[sequence]
            held = min(self.cache.lengths[name], len(text) - 1)
            self.cache.truncate(held, name)
            new[sequence] = text[held:]
            num_new_tokens[name] = len(text) - held + counts[sequence] - 1
            if not self.cache.can_append(num_new_tokens):
                num_new_tokens[name] = counts[sequence] = 0
        # 2. A token of each, as long as it may have one more.
        longest, q = max(counts[sequence] for sequence in texts), None
        drafted: dict[Hashable, list[int]] = {sequence: [] for sequence in texts}
        for i in range(longest):
            if not (active := [sequence for sequence in texts if counts[sequence] > i]):
                break
            logits = self._step({sequence: new[sequence] for sequence in active})   # [B', V]
            if sampling.temperature == 0:
                tokens = likeliest(logits)
            else:
                chances = probabilities(logits, sampling)
                tokens = draw(chances, generator)
                q = chances.new_zeros(len(texts), longest, logits.shape[-1]) if q is None else q
                q[[row for row, sequence in enumerate(texts) if counts[sequence] > i], i] = chances
            for sequence, token in zip(active, tokens.tolist(), strict=True):
                if token == NOTHING:
                    counts[sequence] = i
                    continue
                drafted[sequence].append(token)
                new[sequence] = [token]
        return Proposal(list(drafted.values()), q)

    def _step(self, new: Texts) -> torch.Tensor | None:
        return self.model.step({self.names[sequence]: ids for sequence, ids in new.items()},
                               self.cache) if new else None
