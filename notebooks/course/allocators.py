"""Where the memory goes under three allocators: reservation, buddy and pages (Kwon et al. 2023,
section 3 and figures 2 and 3).

The unit is a token's room, so 2 * L * K * H elements. Of what a request holds, some is *used* by
its tokens so far; some is *reserved* for tokens that will still come; the rest is *internal*
fragmentation, room that it will never use. What nobody holds is *external* fragmentation while the
next request waits and does not fit, and otherwise merely free. Standard library only.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from clawdemy_infer.kv_cache.block_pool import BlockPool
from clawdemy_infer.kv_cache.block_tables import BlockTables


class Lengths(NamedTuple):
    """A request, as an allocator sees it: tokens of its prompt and of its output, and the step in
    which it arrives."""

    name: int
    prompt: int
    output: int
    arrival: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.output


def sharegpt_like(count: int, seed: int = 0, most: int = 2048) -> list[Lengths]:
    """Requests with the mean lengths of the paper's ShareGPT trace (figure 11: 161 tokens in, 338
    out), log-normal, cut to `most` together. All arrive at once."""
    chance, requests = random.Random(seed), []
    for name in range(count):
        # A log-normal with sigma 1 has a mean of exp(mu + 1/2), and a tail that reaches a few
        # thousand tokens, as chats do.
        prompt, output = (max(1, round(chance.lognormvariate(0, 1) * mean * 0.6065))
                          for mean in (161.31, 337.99))
        prompt = min(prompt, most - 1)
        requests.append(Lengths(name, prompt, min(output, most - prompt)))
    return requests


class Extent(NamedTuple):
    """Room for tokens start ... stop - 1 of the memory, held by a request."""

    start: int
    stop: int
    request: Lengths


class Allocator:
    """Gives room out of `capacity` tokens: here, one piece for each request.

    admit(request, tokens)    take room for a request that has `tokens` tokens
    grow(request)             room for one token more
                              each False, and nothing taken, where there is none: it must wait
    release(request)          its room is free
    extents()                 who holds what, each request's room in the order in which it is filled
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.pieces: dict[Lengths, tuple[int, int]] = {}        # where each begins, and its size

    def grow(self, request: Lengths) -> bool:
        return True

    def extents(self) -> list[Extent]:
        return [Extent(start, start + size, request)
                for request, (start, size) in self.pieces.items()]


class Reservation(Allocator):
    """Each request gets one piece as long as the longest may become, from the beginning (the
    paper's Orca (Max))."""

    def __init__(self, capacity: int, most: int = 2048) -> None:
        if not 1 <= most <= capacity:
            raise ValueError(f"most={most}: 1 to the capacity of {capacity} tokens is accepted")
        super().__init__(capacity)
        self.most, self._free = most, list(reversed(range(0, capacity - most + 1, most)))

    def admit(self, request: Lengths, tokens: int) -> bool:
        if not self._free or request.total > self.most:
            return False
        self.pieces[request] = self._free.pop(), self.most
        return True

    def release(self, request: Lengths) -> None:
        self._free.append(self.pieces.pop(request)[0])


def power_of_two(tokens: int) -> int:
    """The smallest power of two that holds `tokens`."""
    return 1 << (tokens - 1).bit_length()


def doubled_output(request: Lengths) -> int:
    """What the paper's Orca (Pow2) reserves: the prompt, and the output as if known up to a factor
    of two."""
    return request.prompt + power_of_two(request.output)


class Buddy(Allocator):
    """Pieces of power-of-two sizes, halved when a smaller one is wanted and joined with their other
    half when both are free.

    `guess` says how many tokens to reserve for a request, never fewer than it needs; it gets a
    piece of the next power of two.
    """

    def __init__(self, capacity: int, guess: Callable[[Lengths], int] = doubled_output) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: at least 1 token")
        super().__init__(capacity)
        self.guess, start = guess, 0
        self._free: dict[int, set[int]] = {1 << bit: set() for bit in range(capacity.bit_length())}
        for size in reversed(self._free):  # 11 = 8 + 2 + 1, each piece at a multiple of its size
            if capacity & size:
                self._free[size].add(start)
                start += size

    def admit(self, request: Lengths, tokens: int) -> bool:
        wanted = power_of_two(max(self.guess(request), request.total))
        size = min((size for size in self._free if size >= wanted and self._free[size]), default=0)
        if not size:
            return False
        start = min(self._free[size])
        self._free[size].remove(start)
        while size > wanted:
            size //= 2
            self._free[size].add(start + size)
        self.pieces[request] = start, size
        return True

    def release(self, request: Lengths) -> None:
        start, size = self.pieces.pop(request)
        while (other := start ^ size) in self._free[size]:
            self._free[size].remove(other)
            start, size = min(start, other), size * 2
        self._free[size].add(start)


class Pages(Allocator):
    """Blocks of `block_size` tokens, taken one by one as they are needed."""

    def __init__(self, capacity: int, block_size: int = 16) -> None:
        self.tables = BlockTables(BlockPool(capacity // block_size, block_size))
        super().__init__(self.tables.pool.blocks * block_size)

    def admit(self, request: Lengths, tokens: int) -> bool:
        self.tables.add(request)
        if not self.grow(request, tokens):
            self.tables.free(request)
        return request in self.tables.lengths

    def grow(self, request: Lengths, tokens: int = 1) -> bool:
        if not self.tables.can_append({request: tokens}):
            return False
        self.tables.reserve({request: tokens})
        self.tables.commit({request: range(tokens)})
        return True

    def release(self, request: Lengths) -> None:
        self.tables.free(request)

    def extents(self) -> list[Extent]:
        size = self.tables.pool.block_size
        return [Extent(block * size, block * size + size, request)
                for request, blocks in self.tables.blocks.items() for block in blocks]


class Snapshot(NamedTuple):
    """The memory after one step: how many tokens each running request has, who waits, and the
    capacity as a sum of five."""

    tokens: dict[Lengths, int]
    waiting: list[Lengths]
    used: int
    reserved: int
    internal: int
    external: int
    free: int


def serve(allocator: Allocator, requests: Iterable[Lengths]) -> Iterator[Snapshot]:
    """First come, first served: every step admits whoever fits, and gives each running request one
    token; a snapshot each step, at which `allocator.extents()` can be asked where everything lies.

    Where a request cannot grow, the one that was admitted last gives its room back and waits, at
    the head of the queue, to be computed anew. Raises ValueError for a request that does not even
    fit into an empty memory.
    """
    coming = deque(sorted(requests, key=lambda request: request.arrival))
    for request in coming:
        if request.total > allocator.capacity:
            raise ValueError(f"requests: {request} does not fit into {allocator.capacity} tokens")
    waiting: deque[Lengths] = deque()
    running: dict[Lengths, int] = {}
    preempted: dict[Lengths, int] = {}          # tokens that a request had
    step = 0
    while coming or waiting or running:
        # 1. Who arrives, and who fits.
        while coming and coming[0].arrival <= step:
            waiting.append(coming.popleft())
        while waiting and allocator.admit(waiting[0], tokens := preempted.get(
                waiting[0], waiting[0].prompt)):
            running[waiting.popleft()] = tokens
        if waiting and not running:
            raise ValueError(f"requests: {waiting[0]} does not fit into {allocator.capacity} "
                             "tokens")
        # 2. A token for each.
        for request in list(running):
            while request in running and not allocator.grow(request):
                last = next(reversed(running))
                allocator.release(last)
                preempted[last] = running.pop(last)
                waiting.appendleft(last)
            if request in running:
                running[request] += 1
        yield _snapshot(allocator, running, list(waiting))
        # 3. Who has ended.
        for request in [each for each, tokens in running.items() if tokens >= each.total]:
            allocator.release(request)
            del running[request]
        step += 1


def _snapshot(allocator: Allocator, running: dict[Lengths, int],
              waiting: list[Lengths]) -> Snapshot:
    held: Counter[Lengths] = Counter()
    for start, stop, request in allocator.extents():
        held[request] += stop - start
    used, internal = sum(running.values()), sum(max(0, held[each] - each.total) for each in running)
    rest = allocator.capacity - held.total()
    return Snapshot(dict(running), waiting, used, held.total() - used - internal, internal,
                    rest if waiting else 0, 0 if waiting else rest)
