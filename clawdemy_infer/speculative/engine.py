"""Speculation in the engine: one ragged step verifies all drafts, beside the prompts of others.

The scheduler says for how many drafted tokens a sequence has room, `Plan.num_lookahead_tokens`, and
takes back what was rejected of those that the step committed."""

from collections.abc import Mapping
from functools import partial
from itertools import accumulate

from clawdemy_infer.batching import Engine, Policy, Sequence
from clawdemy_infer.batching.plan import Emission, Plan
from clawdemy_infer.batching.serving import engine as plain_engine
from clawdemy_infer.batching.torch_executor import TorchExecutor
from clawdemy_infer.kv_cache import PagedCache
from clawdemy_infer.model import Decoder, Sampling
from clawdemy_infer.model.sampling import likeliest
from clawdemy_infer.speculative.drafts import Draft
from clawdemy_infer.speculative.verification import verify_rows


def engine(model: Decoder, draft: Draft, policy: Policy | None = None, **memory) -> Engine:
    """An engine that serves `model` and speculates with `draft`, by default with gamma = 4;
    `memory` as of `serving.engine`. Greedy requests get the tokens that they would alone, others
    tokens of the same distribution. A seed repeats them as long as as many are drafted: where the
    budget or the blocks are scarce, neighbours change how many, and so which are drawn. A draft
    with a model of its own keeps keys and values in as many blocks as the target's. Raises
    ValueError as that, and for a draft that does not fit."""
    executor = partial(SpeculativeExecutor, draft=draft)
    return plain_engine(model, policy or Policy(gamma=4), executor=executor, **memory)


class SpeculativeExecutor(TorchExecutor):
    """Runs a step as `TorchExecutor`, and drafts and verifies where a plan has room for that."""

    def __init__(self, model: Decoder, cache: PagedCache, draft: Draft) -> None:
        super().__init__(model, cache)
        self.draft, self.joined = draft, set()
        draft.begin(model, self.cache, {})

    def run(self, plan: Plan) -> Mapping[Sequence, Emission]:
        for sequence in self.joined - self.tables.lengths.keys():       # it was preempted
            self._leave(sequence)
        for sequence in [each for each in plan.num_new_tokens if each not in self.joined]:
            self.draft.join(sequence)
            self.joined.add(sequence)
        if not plan.num_lookahead_tokens:
            return super().run(plan)
        # 1. Draft in groups that sample alike; with a seed alone, from its own generator.
        groups, drafts, drafted = {}, [], {}
        for sequence in plan.num_lookahead_tokens:
            sampling = sequence.request.sampling
            if not sampling or sampling.temperature == 0:
                sampling = Sampling()                               # greedy
            key = sampling if sampling.seed is None else sequence
            groups.setdefault(key, (sampling, []))[1].append(sequence)
        for sampling, members in groups.values():
            tokens, q = self.draft.propose({each: each.ids for each in members},
                                           plan.num_lookahead_tokens, sampling,
                                           self._generator(members[0]))
            drafted |= zip(members, tokens, strict=True)
            drafts.append((sampling, members, tokens, q))
        # 2. The target reads what all bring; of a prompt's chunk only the last row is wanted.
        brought = {sequence: ids + drafted.get(sequence, [])
                   for sequence, ids in self._brought(plan).items()}
        wanted = [len(drafted.get(sequence, ())) + 1 for sequence in brought]
        logits = self.model.step(brought, self.cache, logits_to_keep=wanted)
        first = dict(zip(brought, accumulate(wanted, initial=0), strict=False))
        # 3. Verify each group; the others choose one token, where they have come to their end.
        chosen = {}
        for sampling, members, tokens, q in drafts:
            verdict = verify_rows(logits, tokens, q, sampling, self._generator(members[0]),
                                  [first[sequence] for sequence in members])
            for sequence, mine, count, token in zip(members, tokens, verdict.accepted.tolist(),
                                                    verdict.token.tolist(), strict=True):
                chosen[sequence] = [*mine[:count], token]
        for sequence in brought:
            if sequence not in drafted and self.tables.lengths[sequence] == sequence.total:
                row = logits[first[sequence]]
                chosen[sequence] = [self._choose(sequence, int(likeliest(row)), row)]
        return self._write(chosen, drafted)

    def forget(self, sequence: Sequence) -> None:
        super().forget(sequence)
        if sequence in self.joined:
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.joined.remove(sequence)
        self.draft.leave(sequence)
