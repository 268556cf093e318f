"""Adaptive γ: as many drafted tokens as pay, by what was accepted so far and the theory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import torch

from clawdemy_infer.kv_cache import KVCache
from clawdemy_infer.model import Decoder, Sampling
from clawdemy_infer.speculative.drafts import Draft, Proposal, Texts
from clawdemy_infer.speculative.theory import best_gamma

FIRST_ALPHA = 0.8       # acceptance rate imagined of the first position; others begin as the last
IMAGINED_ROUNDS = 2.0   # weight of what is imagined
FADING = 0.95           # factor of a round's weight in each later round


class Adaptive:
    """Asks `draft` for at most as many tokens as `theory.best_gamma` finds, for each sequence by
    its own acceptance at each position.

    `c` and `v` are as in `theory`; v is asked for the rows of all sequences together, so it knows
    what a batch costs. Old rounds fade, so a draft that did not pay is asked again some time. How
    many tokens depends on what was before them, never on the tokens: so the output stays exact.
    """

    def __init__(self, draft: Draft, c: float, v: Callable[[int], float], most: int = 8) -> None:
        self.draft, self.c, self.v, self.most = draft, c, v, most

    def begin(self, target: Decoder, cache: KVCache, prompts: Texts) -> None:
        self.draft.begin(target, cache, prompts)
        # By sequence: at each position, the weight of tokens accepted, and looked at. And when it
        # was last asked for: the length of its text, and what was drafted.
        self.counts: dict[Hashable, list[list[float]]] = {}
        self.asked: dict[Hashable, tuple[int, list[int]]] = {}
        for sequence in prompts:
            self._enter(sequence)

    def join(self, sequence: Hashable) -> None:
        self.draft.join(sequence)
        self._enter(sequence)

    def leave(self, sequence: Hashable) -> None:
        self.draft.leave(sequence)
        del self.counts[sequence], self.asked[sequence]

    def propose(self, texts: Texts, counts: Mapping[Hashable, int], sampling: Sampling,
                generator: torch.Generator) -> Proposal:
        B, sizes = len(texts), {}
        for sequence, text in texts.items():
            self._learn(sequence, text)
            best = best_gamma(self.alphas(sequence), self.c,
                              lambda rows: self.v(B * rows) / self.v(B), self.most)
            sizes[sequence] = min(best, counts[sequence])
        proposal = self.draft.propose(texts, sizes, sampling, generator)
        for (sequence, text), drafted in zip(texts.items(), proposal.tokens, strict=True):
            self.asked[sequence] = len(text), drafted
        return proposal

    def alphas(self, sequence: Hashable) -> list[float]:
        """α by position, as it looks from here."""
        found, alpha = [], FIRST_ALPHA
        for accepted, reached in self.counts[sequence]:
            alpha = (accepted + IMAGINED_ROUNDS * alpha) / (reached + IMAGINED_ROUNDS)
            found.append(alpha)
        return found

    def _enter(self, sequence: Hashable) -> None:
        self.counts[sequence] = [[0.0, 0.0] for _ in range(self.most)]
        self.asked[sequence] = 0, []

    def _learn(self, sequence: Hashable, text: list[int]) -> None:
        """Which of the last drafted tokens were accepted: those that the text went on with."""
        length, drafted = self.asked[sequence]
        counts = [[FADING * each for each in pair] for pair in self.counts[sequence]]
        self.counts[sequence] = counts
        for i, (token, came) in enumerate(zip(drafted, text[length:], strict=False)):
            counts[i][0] += token == came
            counts[i][1] += 1
            if token != came:
                break
