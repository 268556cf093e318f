"""Static batching, the baseline: a batch is formed, padded into a rectangle, and kept until its last sequence has ended.

Its costs are two. Every prompt is computed as if it were as long as the longest, and a sequence that has ended goes on being
computed until all have. Memory, too, is taken as a rectangle, for the longest prompt and the most tokens that anybody may
generate. In return nothing moves: one plain cache, one shape.
"""

from __future__ import annotations

from clawdemy_infer.batching.plan import Plan, Rectangle
from clawdemy_infer.batching.request import Sequence, State
from clawdemy_infer.batching.scheduler import Scheduler


class StaticScheduler(Scheduler):
    """The same interface, a plainer rule. `running` is the batch, those included that have ended."""

    @property
    def full(self) -> bool:
        """A batch that runs lets nobody in."""
        return bool(self.running)

    def schedule(self, now: float) -> Plan:
        """The next step of this batch, or the first of the next one."""
        if all(sequence.over for sequence in self.running):
            self._dissolve()
            self._form(now)
        lengths = self.tables.lengths
        alive = [sequence for sequence in self.running if not sequence.over]
        # The last token of a prompt is brought with the first step of decoding: in a rectangle only the last column gives
        # logits, and there the shorter prompts have padding.
        prompts = {sequence: missing - 1 for sequence in alive if (missing := sequence.total - lengths[sequence]) > 1}
        if prompts:
            T = max(sequence.prompt_tokens for sequence in self.running) - 1
            return Plan(prompts, Rectangle(self.running, T, T))
        for sequence in alive:
            if lengths[sequence] == sequence.total:             # interrupted, as in `Scheduler._next`
                self.tables.lengths[sequence] -= 1
        if not alive:
            return Plan({})
        return Plan(dict.fromkeys(alive, 1), Rectangle(self.running, 1, max(map(lengths.get, self.running)) + 1), steady=True)

    def _form(self, now: float) -> None:
        """As many of those who wait as the memory holds in one rectangle."""
        pool, batch, prompt, output = self.tables.pool, [], 0, 0
        for sequence in self.waiting[:self.policy.max_batch]:
            longest = max(prompt, sequence.prompt_tokens), max(output, sequence.request.max_tokens)
            if (len(batch) + 1) * pool.blocks_for(sum(longest) - 1) > pool.blocks:
                break
            prompt, output = longest
            batch.append(sequence)
        for sequence in batch:
            self.waiting.remove(sequence)
            self.tables.add(sequence)
            self.tables.reserve({sequence: prompt + output - 1})
            sequence.enter(State.RUNNING, now)
        self.running = batch

    def _dissolve(self) -> None:
        for sequence in self.running:
            self.tables.free(sequence)
        self.running = []

    def _leave(self, sequence: Sequence) -> None:
        """Its row goes on being computed; when all have ended, the whole rectangle is given back."""
        if all(other.over or other is sequence for other in self.running):
            self._dissolve()
