"""The scheduler: after each step, who runs, waits and gives way. It knows no model and no clock.

    plan = scheduler.schedule(now)      which sequences bring how many tokens; takes their blocks
    ...                                 the step; it commits the tokens to the block tables
    scheduler.update(emitted, now)      the tokens that came out; whoever has ended leaves

How far a sequence has been computed is written down in one place only, `tables.lengths`. A sequence
has `total` tokens, and what is not yet in the tables has to be brought: one token while it decodes,
the prompt in the beginning, everything after a preemption by recomputation. So prefill, decode,
chunks and resumption are the same rule, and a step that was interrupted is simply decided again."""

from bisect import insort
from collections.abc import Mapping
from math import inf
from operator import attrgetter

from clawdemy_infer.batching.plan import Emission, Plan
from clawdemy_infer.batching.policy import Policy
from clawdemy_infer.batching.request import Sequence, State
from clawdemy_infer.kv_cache import BlockTables

RANK = attrgetter("rank")


class Scheduler:
    """Continuous batching over `tables`.

    `running` and `waiting` are sorted by rank: the first of them is never preempted while another
    runs, and fits alone, so there is always one that comes to its end. An example: three blocks of
    four tokens, and two prompts of four.

    >>> from clawdemy_infer.batching import Request
    >>> from clawdemy_infer.kv_cache import BlockPool
    >>> scheduler = Scheduler(Policy(), BlockTables(BlockPool(blocks=3, block_size=4)))
    >>> a, b = (Sequence(Request(name, prompt=4, max_tokens=3), 4) for name in "ab")
    >>> scheduler.add(a, now=0), scheduler.add(b, now=0)
    (None, None)
    >>> def step(now):
    ...     plan = scheduler.schedule(now)
    ...     scheduler.tables.commit({s: range(T) for s, T in plan.num_new_tokens.items()})
    ...     scheduler.update({s: Emission() for s in plan.num_new_tokens}, now + 1)
    ...     return {s.request.id: T for s, T in plan.num_new_tokens.items()}
    >>> step(0)                 # both prompts, a block each
    {'a': 4, 'b': 4}
    >>> step(1), b.state        # a fifth token needs a block, and one is free: b gives way
    ({'a': 1}, <State.PREEMPTED: 'preempted'>)
    >>> step(2), a.state        # a has its third token, and leaves
    ({'a': 1}, <State.FINISHED: 'finished'>)
    >>> step(3)                 # b brings its prompt and its first token anew
    {'b': 5}
    """

    def __init__(self, policy: Policy, tables: BlockTables, max_context: int | None = None) -> None:
        if policy.prefix_caching and not tables.prefix:
            raise ValueError("prefix_caching=True: these block tables have no prefix cache")
        self.policy, self.tables, self.max_context = policy, tables, max_context
        tables.on_proof = True                              # keys that led to a token are no NaN
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    # ---- requests come and go ----

    def add(self, sequence: Sequence, now: float) -> None:
        """A request arrives: it waits, or is refused with the numbers if it could never run."""
        if wrong := self.refusal(sequence):
            sequence.enter(State.REFUSED, now, wrong)
            return
        priority = sequence.request.priority if self.policy.order == "priority" else 0
        sequence.rank = (priority, sequence.arrival_s, sequence.serial)
        self._queue(sequence, State.WAITING, now)

    def refusal(self, sequence: Sequence) -> str:
        """Why `sequence` could not be served if it had the machine to itself; empty if it could."""
        P, T, pool = sequence.prompt_tokens, sequence.request.max_tokens, self.tables.pool
        if not P:
            return "the prompt is empty: at least one token is needed to start from"
        both = f"prompt has {P} tokens and max_tokens={T}: together {P + T}"
        if self.max_context and P + T > self.max_context:
            return f"{both}, but the model's context is {self.max_context}"
        if (needed := pool.blocks_for(P + T - 1)) > pool.blocks:   # the last token is never brought
            return (f"{both}, for which {needed} blocks of {pool.block_size} tokens may be needed, "
                    f"but there are {pool.blocks}")
        return ""

    def cancel(self, sequence: Sequence, now: float) -> None:
        """Somebody has lost interest. Nothing happens to a sequence that has ended."""
        if not sequence.over:
            self._end(sequence, State.CANCELLED, "cancelled", now)

    # ---- a step ----

    def schedule(self, now: float) -> Plan:
        """Decide the next step, and take blocks for it. An empty plan: nobody is there."""
        # 1. Those who run bring what they have. While blocks run short, the last one gives way.
        before = len(self.running)
        while not self.tables.can_append(num_new_tokens := self._next()):
            last = self.running.pop()
            self._give_up_blocks(last)
            last.preemptions += 1
            self._queue(last, State.PREEMPTED, now)         # at its old place
        self.tables.reserve(num_new_tokens)
        # 2. Those who wait join, unless somebody has just given way.
        if len(self.running) == before:
            self._admit(num_new_tokens, now)
        # 3. Drafted tokens get what is left.
        return Plan(num_new_tokens, self._room_for_drafts(num_new_tokens))

    def update(self, emitted: Mapping[Sequence, Emission], now: float) -> list[Sequence]:
        """Take what came out of the step. Returns the sequences that have ended with it."""
        for sequence, (ids, text, reason, num_tokens, num_draft_tokens) in emitted.items():
            sequence.extend([now] * num_tokens, ids, text)
            sequence.drafted += num_draft_tokens
            sequence.accepted += max(0, num_tokens - 1)
            (self.tables.forget if reason == State.FAILED else self.tables.learn)(sequence)
            if reason == State.FAILED:
                self._end(sequence, State.FAILED, f"behind its {sequence.total} tokens the logits "
                          "hold NaN or +inf, or are all -inf: no token can be chosen", now)
            elif reason or sequence.generated >= sequence.limit:
                self._end(sequence, State.FINISHED, reason or "length", now)
        return [sequence for sequence in emitted if sequence.over]

    # ---- details ----

    def _next(self) -> dict[Sequence, int]:
        """What those who run bring: a token each, and of prompts what the budget leaves."""
        lengths, num_new_tokens, prompts = self.tables.lengths, {}, []
        for sequence in self.running:
            missing = sequence.total - lengths[sequence]
            if missing > 1:
                prompts.append((sequence, missing))
                continue
            # Rejected draft tokens are forgotten here. Or the step was interrupted before its
            # `update`: the token is lost, and its cause is brought again.
            if missing < 1 or self.policy.gamma:
                self.tables.truncate(sequence.total - 1, sequence)
            num_new_tokens[sequence] = 1
        left = self._left(num_new_tokens)
        for sequence, missing in prompts:
            if left > 0:
                num_new_tokens[sequence] = min(missing, left)
                left -= num_new_tokens[sequence]
        return num_new_tokens

    def _left(self, num_new_tokens: dict[Sequence, int]) -> float:
        """Tokens of the budget that these do not use."""
        return (self.policy.token_budget or inf) - sum(num_new_tokens.values())

    def _admit(self, num_new_tokens: dict[Sequence, int], now: float) -> None:
        """Let in those who wait, in their order, while there is room for all that they bring."""
        left = self._left(num_new_tokens)
        while (self.waiting and len(self.running) < self.policy.max_batch and left > 0
               and self._make_room(self.waiting[0])):
            sequence = self.waiting.pop(0)
            insort(self.running, sequence, key=RANK)
            sequence.enter(State.RUNNING, now)
            num_new_tokens[sequence] = min(sequence.total - self.tables.lengths[sequence], left)
            left -= num_new_tokens[sequence]

    def _make_room(self, sequence: Sequence) -> bool:
        """Take the blocks for all that `sequence` has: chunks of its prompt never wait half-way. A
        block for each that runs stays free: each may soon need one, and who joins should stay."""
        tables, prompt = self.tables, (sequence.ids or (), sequence.digests)
        if tables.blocks_to_add(sequence.total, *prompt) > tables.pool.free - len(self.running):
            return False
        num_cached_tokens = tables.add(sequence, *prompt, again=sequence.preemptions > 0)
        if not sequence.preemptions:
            sequence.num_cached_tokens = num_cached_tokens
        tables.reserve({sequence: sequence.total - num_cached_tokens})
        return True

    def _room_for_drafts(self, num_new_tokens: dict[Sequence, int]) -> dict[Sequence, int]:
        """Drafted tokens take what is left: nobody waits or gives way for one."""
        tables, room, left = self.tables, {}, self._left(num_new_tokens)
        for sequence in num_new_tokens if self.policy.gamma else ():
            if sequence.total - tables.lengths[sequence] == 1:
                # One token is the model's own in any case.
                count = min(self.policy.gamma, sequence.limit - sequence.generated - 1, left)
                while count > 0 and not tables.can_append({sequence: 1 + count}):
                    count -= 1
                if count > 0:
                    tables.reserve({sequence: 1 + count})
                    room[sequence] = count
                    left -= count
        return room

    def _give_up_blocks(self, sequence: Sequence) -> None:
        """By recomputation: everything is forgotten, and brought again."""
        self.tables.free(sequence)

    def _queue(self, sequence: Sequence, state: State, now: float) -> None:
        insort(self.waiting, sequence, key=RANK)
        sequence.enter(state, now)

    def _end(self, sequence: Sequence, state: State, reason: str, now: float) -> None:
        if sequence.state is State.RUNNING:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.enter(state, now, reason)

    def _leave(self, sequence: Sequence) -> None:
        """A running sequence has ended; its blocks are free at once."""
        self.running.remove(sequence)
        self.tables.free(sequence)
