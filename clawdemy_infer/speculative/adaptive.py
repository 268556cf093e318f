"""Adaptive γ: as many guesses as pay, by what has stood so far and the theory's own formula."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import torch

from clawdemy_infer.kv_cache import KVCache
from clawdemy_infer.model import Decoder, Sampling
from clawdemy_infer.speculative.drafts import Draft, Proposal, Texts
from clawdemy_infer.speculative.theory import best_gamma

EXPECTED, TRUST, FADING = 0.8, 2.0, 0.95


class Adaptive:
    """Asks `draft` for at most as many tokens as `theory.best_gamma` finds, for each sequence by its own acceptance at each position.

    `c` and `v` are as in `theory`; v is asked for the rows of all sequences together, so it knows what a batch costs. Acceptance is
    counted with a weight that fades by `FADING` a round, beside `TRUST` imagined rounds in which a position did as well as the one before
    it, and the first as `EXPECTED`. So a draft that did not pay is asked again when its failures have faded.

    How many tokens may depend on what was before them, never on the tokens themselves: so the output stays exact.
    """

    def __init__(self, draft: Draft, c: float, v: Callable[[int], float], most: int = 8) -> None:
        self.draft, self.c, self.v, self.most = draft, c, v, most

    def begin(self, target: Decoder, cache: KVCache, prompts: Texts) -> None:
        self.draft.begin(target, cache, prompts)
        self.counts: dict[Hashable, list[list[float]]] = {}         # by sequence and position: stood, looked at
        self.asked: dict[Hashable, tuple[int, list[int]]] = {}
        for sequence in prompts:
            self._know(sequence)

    def join(self, sequence: Hashable) -> None:
        self.draft.join(sequence)
        self._know(sequence)

    def leave(self, sequence: Hashable) -> None:
        self.draft.leave(sequence)
        del self.counts[sequence], self.asked[sequence]

    def propose(self, texts: Texts, counts: Mapping[Hashable, int], sampling: Sampling, generator: torch.Generator) -> Proposal:
        B, sizes = len(texts), {}
        for sequence, text in texts.items():
            self._learn(sequence, text)
            best = best_gamma(self.alphas(sequence), self.c, lambda rows: self.v(B * rows) / self.v(B), self.most)
            sizes[sequence] = min(best, counts[sequence])
        proposal = self.draft.propose(texts, sizes, sampling, generator)
        for (sequence, text), guess in zip(texts.items(), proposal.tokens, strict=True):
            self.asked[sequence] = len(text), guess
        return proposal

    def alphas(self, sequence: Hashable) -> list[float]:
        """α by position, as it looks from here."""
        found, alpha = [], EXPECTED
        for stood, reached in self.counts[sequence]:
            alpha = (stood + TRUST * alpha) / (reached + TRUST)
            found.append(alpha)
        return found

    def _know(self, sequence: Hashable) -> None:
        self.counts[sequence], self.asked[sequence] = [[0.0, 0.0] for _ in range(self.most)], (0, [])

    def _learn(self, sequence: Hashable, text: list[int]) -> None:
        """Which of the last guesses stood: those that the text went on with."""
        length, guess = self.asked[sequence]
        counts = self.counts[sequence]
        for each in counts:
            each[0] *= FADING
            each[1] *= FADING
        for i, (guessed, came) in enumerate(zip(guess, text[length:], strict=False)):
            counts[i][0] += guessed == came
            counts[i][1] += 1
            if guessed != came:
                break
