"""Speculation inside the engine: all sequences' drafts are verified in one ragged step, beside the prompts that others bring.

The scheduler says for how many drafted tokens a sequence has room (`Plan.guesses`); here they are drafted, read behind the token that
the text ends with, and verified. The step commits all that was read, and the scheduler takes back what fell.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import partial

import torch

from clawdemy_infer.batching import Engine, Policy
from clawdemy_infer.batching.plan import Emission, Plan
from clawdemy_infer.batching.request import Sequence
from clawdemy_infer.batching.torch_executor import TorchExecutor
from clawdemy_infer.batching.torch_executor import engine as plain_engine
from clawdemy_infer.model import Decoder, Sampling
from clawdemy_infer.speculative.drafts import Draft
from clawdemy_infer.speculative.verification import verify_rows

GREEDY = Sampling()


def engine(model: Decoder, draft: Draft, policy: Policy | None = None, **memory) -> Engine:
    """An engine that serves `model` and speculates with `draft`, by default with gamma = 4; `memory` as of `torch_executor.engine`.

    Greedy requests get the tokens that they would get alone, others tokens of the same distribution. A draft with a model of its own
    keeps keys and values in as many blocks as the target's. Raises ValueError as that, and for a draft that does not fit.
    """
    return plain_engine(model, policy or Policy(gamma=4), executor=partial(SpeculativeExecutor, draft=draft), **memory)


class SpeculativeExecutor(TorchExecutor):
    """Runs a step as `TorchExecutor`, and where a plan has room for guesses, drafts and verifies."""

    def __init__(self, model: Decoder, tables, draft: Draft) -> None:
        super().__init__(model, tables)
        self.draft = draft
        self.joined: set[Sequence] = set()
        draft.begin(model, self.cache, {})

    def run(self, plan: Plan, repeats: int, until: float) -> tuple[list[float], Mapping[Sequence, Emission]]:
        for sequence in [each for each in self.joined if each not in self.tables.lengths]:      # it was preempted
            self._leave(sequence)
        for sequence in [each for each in plan.new if each not in self.joined]:
            self.draft.join(sequence)
            self.joined.add(sequence)
        if not plan.guesses:
            return super().run(plan, repeats, until)

        groups = self._groups(plan)
        guesses: dict[Sequence, list[int]] = {}
        proposals = []
        for sampling, members in groups:
            texts = {sequence: sequence.ids for sequence in members}
            proposals.append(self.draft.propose(texts, plan.guesses, sampling, self._generator(members[0])))
            guesses.update(zip(members, proposals[-1].tokens, strict=True))
        brought = {sequence: ids + guesses.get(sequence, []) for sequence, ids in self._brought(plan).items()}
        wanted = [len(guesses.get(sequence, ())) + 1 for sequence in brought]       # of a prompt's chunk only the last row
        logits = self.model.step(brought, self.cache, last_only=wanted)

        first = dict(zip(brought, torch.tensor([0, *wanted]).cumsum(0).tolist(), strict=False))
        emitted = {}
        for (sampling, members), (drafted, q) in zip(groups, proposals, strict=True):
            verdict = verify_rows(logits, drafted, q, sampling, self._generator(members[0]), [first[sequence] for sequence in members],
                                  self.model.backend)
            for sequence, guess, count, token in zip(members, drafted, *(each.tolist() for each in verdict), strict=True):
                emitted[sequence] = self._emission(sequence, [*guess[:count], token], len(guess))
        for sequence in brought:
            if sequence not in guesses and self.tables.lengths[sequence] == sequence.total:
                row = logits[first[sequence]]
                emitted[sequence] = self._emission(sequence, [self._chosen(sequence, int(row.argmax()), row)])
        return [self.now()], emitted

    def _groups(self, plan: Plan) -> list[tuple[Sampling, list[Sequence]]]:
        """Who drafts together: all that are greedy, and all that sample alike. Who has a seed draws alone, so that neighbours change
        nothing."""
        groups: dict[Hashable, tuple[Sampling, list[Sequence]]] = {}
        for sequence in plan.guesses:
            sampling = sequence.request.sampling or GREEDY
            sampling = sampling if sampling.temperature else GREEDY
            groups.setdefault(sampling if sampling.seed is None else sequence, (sampling, []))[1].append(sequence)
        return list(groups.values())

    def forget(self, sequence: Sequence) -> None:
        super().forget(sequence)
        if sequence in self.joined:
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.joined.remove(sequence)
        self.draft.leave(sequence)
