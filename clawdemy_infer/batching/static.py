"""Static batching, the baseline: a batch is formed, padded, and kept until all in it have ended.

Every prompt is computed as if it were as long as the longest, and ended sequences go on being
computed. Memory, too, is taken as a rectangle. In return nothing moves: a plain cache, one shape.
"""

from collections.abc import Iterable

import torch

from clawdemy_infer.batching.plan import Plan
from clawdemy_infer.batching.request import Sequence, State
from clawdemy_infer.batching.scheduler import Scheduler
from clawdemy_infer.batching.torch_executor import TorchExecutor
from clawdemy_infer.kv_cache import BlockTables, ContiguousCache
from clawdemy_infer.model import Decoder


class StaticScheduler(Scheduler):
    """The same interface, a plainer rule. `running` is the batch, ended sequences included."""

    def schedule(self, now: float) -> Plan:
        """The next step of this batch, or the first of the next one."""
        if not self.running:
            self._form(now)
        lengths, alive = self.tables.lengths, [each for each in self.running if not each.over]
        if not alive:
            return Plan({})
        # The last token of a prompt is brought with the first step of decoding: only the last
        # column gives logits, and shorter prompts have padding there.
        if prompts := {each: missing - 1 for each in alive
                       if (missing := each.total - lengths[each]) > 1}:
            T = max(each.prompt_tokens for each in self.running) - 1
            return Plan(prompts, padded=(self.running, T, T))
        for each in alive:
            lengths[each] = each.total - 1      # as in `Scheduler._next`
        longest = max(map(lengths.get, self.running))
        return Plan(dict.fromkeys(alive, 1), padded=(self.running, 1, longest + 1))

    def _form(self, now: float) -> None:
        """As many of those who wait as the memory holds in one rectangle."""
        pool, prompt, output = self.tables.pool, 0, 0
        for sequence in self.waiting[:self.policy.max_batch]:
            longest = max(prompt, sequence.prompt_tokens), max(output, sequence.request.max_tokens)
            if (len(self.running) + 1) * pool.blocks_for(sum(longest) - 1) > pool.blocks:
                break
            prompt, output = longest
            self.running.append(sequence)
        for sequence in self.running:
            self.waiting.remove(sequence)
            self.tables.add(sequence)
            self.tables.reserve({sequence: prompt + output - 1})
            sequence.enter(State.RUNNING, now)

    def _leave(self, sequence: Sequence) -> None:
        """Its row goes on being computed; when all have ended, the rectangle is given back."""
        if all(other.over or other is sequence for other in self.running):
            for each in self.running:
                self.tables.free(each)
            self.running = []


class StaticExecutor(TorchExecutor):
    """Runs a static batch the fastest way: one padded rectangle over a contiguous cache."""

    def __init__(self, model: Decoder, tables: BlockTables) -> None:
        super().__init__(model, None, tables)
        self.batch: list[Sequence] = []                 # whose keys and values the cache holds

    def _logits(self, plan: Plan) -> tuple[torch.Tensor, Iterable[Sequence]]:
        """All rows of the rectangle; the logits of its last column."""
        batch, T, _ = plan.padded
        if batch is not self.batch:
            capacity = (max(each.prompt_tokens for each in batch)
                        + max(each.request.max_tokens for each in batch))
            self.batch, self.cache = batch, None        # the old one goes before the new one comes
            self.cache = ContiguousCache.for_model(self.model, len(batch), capacity)
        tokens = []
        for row, sequence in enumerate(batch):
            length = self.tables.lengths[sequence]
            # Beyond that the cache holds padding, ended rows, or a step that broke off.
            self.cache.truncate(min(length, self.cache.lengths[row]), row)
            known = sequence.ids[length:length + T]
            tokens.append(known + [0] * (T - len(known)))
        tokens = torch.tensor(tokens, device=self.model.device)
        logits = self.model(tokens, self.cache, last_only=True)[:, -1]
        self.tables.commit(self._brought(plan))
        return logits, batch
