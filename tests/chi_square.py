"""Pearson's test, and small Markov chains to try it on."""

from types import SimpleNamespace

import torch

from clawdemy_infer.model import probabilities

FALSE_ALARM = 1e-4
"""A correct sampler fails a test with this probability, over seeds. The seeds are fixed, so here it
fails always or never."""


def p_value(counts: torch.Tensor, chances: torch.Tensor) -> float:
    """The chance of counts at least this far from `chances`, by Pearson's chi-square: one test over
    all rows [..., V], each of which has a total of its own. 0 where something came that has no
    chance. Cells that expect fewer than 5 are put together.
    """
    statistic = freedom = 0.0
    for row, p in zip(counts.double().view(-1, counts.shape[-1]),
                      chances.double().view(-1, counts.shape[-1]), strict=True):
        if row[p == 0].any():
            return 0.0
        expected, row = (row.sum() * p)[p > 0], row[p > 0]
        rare = expected < 5
        if rare.any():
            expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
            row = torch.cat((row[~rare], row[rare].sum()[None]))
        if len(expected) > 1:
            statistic += float(((row - expected) ** 2 / expected).sum())
            freedom += len(expected) - 1
    assert freedom, "nothing to be tested: all rows are certain"
    return float(
        torch.special.gammaincc(
            torch.tensor(freedom/2).double(),
            torch.tensor(statistic/2).double()))


class Chain:
    """A Markov chain of second order that steps as a `Decoder` does: the logits depend on the last
    two tokens, in float64.

    It remembers what it was brought, as far as the cache says that it counts. So a cache that keeps
    a rejected token, or forgets an accepted one, gives other distributions.
    """

    tokenizer, dtype, device = None, torch.float64, torch.device("cpu")

    def __init__(self, V: int, seed: int, near: "Chain | None" = None) -> None:
        logits = torch.randn(V, V, V, generator=torch.Generator().manual_seed(seed),
                             dtype=torch.float64)
        self.logits = near.logits + logits if near else 1.5 * logits
        self.config = SimpleNamespace(shape=SimpleNamespace(V=V, L=1, K=1, H=2, max_context=None),
                                      eos_ids=())
        self.held: dict = {}

    def step(self, new, cache, logits_to_keep=1):
        before, last, ends = [], [], []
        for sequence, ids in new.items():
            held = self.held.setdefault(sequence, [])
            del held[cache.lengths[sequence]:]
            text = [*held[-1:], *ids]
            held += ids
            before += text[:-1] if len(text) > len(ids) else [0, *text[:-1]]
            last += ids
            ends.append(len(last) - 1)
        cache.begin(new).commit()
        logits = self.logits[before, last]
        return logits[ends] if logits_to_keep else logits


class Lengths:
    """A cache that keeps nothing but how long its sequences are."""

    capacity = 1000

    def __init__(self, batch: int) -> None:
        self.lengths = dict.fromkeys(range(batch), 0)

    def can_append(self, new):
        return True

    def begin(self, new, window=None):
        return SimpleNamespace(commit=lambda: self.lengths.update(
            {name: self.lengths[name] + len(ids)
             for name, ids in new.items()}))

    def truncate(self, length, sequence):
        assert 0 <= length <= self.lengths[sequence]
        self.lengths[sequence] = length


def triples(texts: list[list[int]], V: int) -> torch.Tensor:
    """How often each token came after each two: [V, V, V]."""
    counts = torch.zeros(V**3, dtype=torch.int64)
    for text in texts:
        t = torch.tensor(text)
        counts += torch.bincount((t[:-2] * V + t[1:-1]) * V + t[2:], minlength=V**3)
    return counts.view(V, V, V)


def triple_chances(model, prompt: list[int], V: int, sampling) -> torch.Tensor:
    """The chance of each three tokens after the prompt, as the product of the model's conditional
    ones: [V, V, V] in float64."""
    chances = torch.ones(V, V, V, dtype=torch.float64)
    for a in range(V):
        chances[a] *= probabilities(model(torch.tensor([prompt]))[0, -1], sampling)[a]
        for b in range(V):
            after = probabilities(model(torch.tensor([[*prompt, a]]))[0, -1], sampling)
            chances[a, b] *= after[b]*probabilities(
                model(torch.tensor([[*prompt, a, b]]))[0, -1], sampling)
    return chances
