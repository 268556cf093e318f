"""The scheduler: after every step, who runs, who waits, and who gives way. Pure Python; it knows of no model and of no clock.

A step is decided in two halves, and between them somebody spends time: a model that runs, or a simulator that charges for it.

    plan = scheduler.schedule(now)      which sequences bring how many tokens; blocks for them are taken
    ...                                 the step; it commits the tokens to the block tables
    scheduler.update(emitted, times)    the tokens that came out; whoever has ended leaves

How far a sequence has been computed is written down in one place only, `tables.lengths`. A sequence has `total` tokens, and
what is not yet in the tables has to be brought: one token while it decodes, the prompt in the beginning, everything after a
preemption by recomputation. So prefill, decode, chunks and resumption are the same rule, and a step that was interrupted is
simply decided again.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from math import inf

from clawdemy_infer.batching.plan import Emission, Plan
from clawdemy_infer.batching.policy import Policy
from clawdemy_infer.batching.request import Sequence, State


class Scheduler:
    """Continuous batching over `tables`, a `BlockTables` or `CountedBlocks`.

    `running` and `waiting` are sorted by rank: the first of them is never preempted while another runs, and fits alone, so
    there is always one that comes to its end. `swapper` moves the bytes of sequences that are swapped.
    """

    def __init__(self, policy: Policy, tables, max_context: int | None = None) -> None:
        if policy.preemption == "swap" and tables.host is None:
            raise ValueError("preemption='swap': the block tables have no host pool to swap to")
        if policy.prefix_caching and not tables.prefix:
            raise ValueError("prefix_caching=True: these block tables have no prefix cache")
        self.policy, self.tables, self.swapper = policy, tables, tables
        self.max_context = max_context
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        """Is there anything to do?"""
        return bool(self.waiting or self.running)

    @property
    def full(self) -> bool:
        """Would an arrival change nothing before somebody leaves?"""
        return len(self.running) >= self.policy.max_batch

    # ---- requests come and go ----

    def add(self, sequence: Sequence, now: float) -> None:
        """A request arrives: it waits, or is refused with the numbers if it could never run."""
        if wrong := self.refusal(sequence):
            sequence.enter(State.REFUSED, now, wrong)
            return
        first = sequence.request.priority if self.policy.order == "priority" else 0
        sequence.rank = (first, sequence.arrival_s, sequence.serial)
        self._queue(sequence, State.WAITING, now)

    def refusal(self, sequence: Sequence) -> str:
        """Why `sequence` could not be served if it had the machine to itself; empty if it could."""
        P, T, pool = sequence.prompt_tokens, sequence.request.max_tokens, self.tables.pool
        if not P:
            return "the prompt is empty: at least one token is needed to start from"
        both = f"prompt has {P} tokens and max_tokens={T}: together {P + T}"
        if self.max_context and P + T > self.max_context:
            return f"{both}, but the model's context is {self.max_context}"
        if (needed := pool.blocks_for(sequence.longest)) > pool.blocks:
            return f"{both}, for which {needed} blocks of {pool.block_size} tokens may be needed, but there are {pool.blocks}"
        return ""

    def cancel(self, sequence: Sequence, now: float) -> None:
        """Somebody has lost interest. Nothing happens to a sequence that has ended."""
        if not sequence.over:
            self._end(sequence, State.CANCELLED, "cancelled", now)

    # ---- a step ----

    def schedule(self, now: float) -> Plan:
        """Decide the next step. An empty plan: nobody is there."""
        preempted = False
        while not self.tables.can_append(new := self._next()):
            self._preempt(self.running[-1], now)
            preempted = True
        lengths = self.tables.lengths
        self.tables.reserve({each: each.longest - lengths[each] for each in self.running} if self.policy.reserve else new)
        before = len(self.running)
        if not preempted:
            self._admit(new, now)
        guesses = self._guesses(new) if self.policy.gamma else {}
        return Plan(new, None, not (preempted or guesses) and len(self.running) == before == sum(new.values()), guesses)

    def update(self, emitted: Mapping[Sequence, Emission], times: list[float]) -> list[Sequence]:
        """Take what came out, a run at each of `times`. Returns the sequences that have ended with the last of them."""
        ended = []
        for sequence, (ids, reason, text, run, drafted) in emitted.items():
            sequence.extend(times * run, ids, text)
            sequence.drafted += drafted
            sequence.accepted += run - 1
            if reason or sequence.generated >= sequence.limit:
                self._end(sequence, State.FINISHED, reason or "length", times[-1])
                ended.append(sequence)
        return ended

    def repeats(self, plan: Plan) -> int:
        """How many times over this very plan will be decided if nobody arrives: until a sequence ends or blocks run short."""
        if not plan.steady:
            return 1
        steps = min([sequence.limit - sequence.generated for sequence in plan.new])
        while steps > 1 and not self.tables.can_append(dict.fromkeys(plan.new, steps)):
            steps //= 2
        return steps

    # ---- details ----

    def _next(self) -> dict[Sequence, int]:
        """What those who run bring: a token each, and of prompts what the budget leaves."""
        lengths, new, prompts = self.tables.lengths, {}, []
        for sequence in self.running:
            missing = sequence.total - lengths[sequence]
            if missing > 1:
                prompts.append((sequence, missing))
            else:
                # Drafted tokens that fell are forgotten here; or the step was interrupted before its `update`, the token is lost, and
                # its cause is brought again.
                if missing < 1 or self.policy.gamma:
                    self.tables.truncate(sequence.total - 1, sequence)
                new[sequence] = 1
        left = self._left(new)
        for sequence, missing in prompts:
            if left > 0:
                new[sequence] = min(missing, left)
                left -= new[sequence]
        return new

    def _left(self, new: dict[Sequence, int]) -> float:
        """Tokens of the budget that `new` does not use."""
        return self.policy.token_budget - sum(new.values()) if self.policy.token_budget else inf

    def _guesses(self, new: dict[Sequence, int]) -> dict[Sequence, int]:
        """Room for drafted tokens, of what is left: nobody waits or gives way for a guess."""
        tables, guesses, left = self.tables, {}, self._left(new)
        for sequence in new:
            if sequence.total - tables.lengths[sequence] == 1:
                most = min(self.policy.gamma, sequence.limit - sequence.generated - 1, left)    # one token is the model's own in any case
                while most > 0 and not tables.can_append({sequence: 1 + most}):
                    most -= 1
                if most > 0:
                    tables.reserve({sequence: 1 + most})
                    guesses[sequence] = most
                    left -= most
        return guesses

    def _admit(self, new: dict[Sequence, int], now: float) -> None:
        """Let those in who wait, in their order, as long as there is room for all that they bring."""
        left = self._left(new)
        while self.waiting and not self.full and left > 0 and self._make_room(self.waiting[0]):
            sequence = self.waiting.pop(0)
            insort(self.running, sequence, key=_rank)
            sequence.enter(State.RUNNING, now)
            new[sequence] = min(sequence.total - self.tables.lengths[sequence], left)
            left -= new[sequence]

    def _make_room(self, sequence: Sequence) -> bool:
        """Take the blocks for all tokens that `sequence` has, so that chunks of its prompt never wait half-way.

        One block for each sequence that runs stays free, since each may need one soon: who joins should not be thrown out at once.
        """
        tables = self.tables
        room = tables.pool.free - (0 if self.policy.reserve else len(self.running))
        target = sequence.longest if self.policy.reserve else sequence.total
        needed = tables.pool.blocks_for(target)
        if sequence in tables.swapped:
            if needed > room:
                return False
            self.swapper.swap_in(sequence)
        elif tables.prefix:
            free = tables.pool.free
            found = tables.add(sequence, sequence.ids)
            # What was found may have lain idle, and then it took room too.
            if tables.blocks_needed({sequence: target - found}) + free - tables.pool.free > room:
                tables.free(sequence)
                return False
            if not sequence.preemptions:
                sequence.cached = found
        else:
            if needed > room:
                return False
            tables.add(sequence)
        tables.reserve({sequence: target - tables.lengths[sequence]})
        return True

    def _preempt(self, sequence: Sequence, now: float) -> None:
        """Take the blocks of a running sequence away; it waits again, at its old place in the queue."""
        self.running.remove(sequence)
        if self.policy.preemption == "swap" and self.tables.can_swap_out(sequence):
            self.swapper.swap_out(sequence)
        else:
            self.tables.free(sequence)
        sequence.preemptions += 1
        self._queue(sequence, State.PREEMPTED, now)

    def _queue(self, sequence: Sequence, state: State, now: float) -> None:
        insort(self.waiting, sequence, key=_rank)
        sequence.enter(state, now)

    def _end(self, sequence: Sequence, state: State, reason: str, now: float) -> None:
        if sequence.state is State.RUNNING:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)
            if sequence in self.tables.swapped:
                self.tables.free(sequence)
        sequence.enter(state, now, reason)

    def _leave(self, sequence: Sequence) -> None:
        """A running sequence has ended; its blocks are free at once."""
        self.running.remove(sequence)
        self.tables.free(sequence)


def _rank(sequence: Sequence) -> tuple:
    return sequence.rank
