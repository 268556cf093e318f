"""Where the memory goes under three allocators: reservation, buddy and pages (Kwon et al. 2023, section 3 and figures 2 and 3).

The unit is a token's room, so 2 * L * K * H elements. Of what a request holds, some is *used* by its tokens so far; some is
*reserved* for tokens that will still come; the rest is *internal* fragmentation, room that it will never use. What nobody holds
is *external* fragmentation while the next request waits and does not fit, and otherwise merely free. Standard library only.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from clawdemy_infer.kv_cache.block_pool import BlockPool
from clawdemy_infer.kv_cache.block_tables import BlockTables


class Lengths(NamedTuple):
    """A request, as an allocator sees it: so many prompt tokens, so many output tokens, and the step in which it arrives."""

    name: int
    prompt: int
    output: int
    arrival: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.output


def sharegpt_like(count: int, seed: int = 0, most: int = 2048) -> list[Lengths]:
    """Requests with the mean lengths of the paper's ShareGPT trace (figure 11: 161 tokens in, 338 out), log-normal, cut to `most`
    together. All arrive at once.
    """
    chance, requests = random.Random(seed), []
    for name in range(count):
        # A log-normal with sigma 1 has a mean of exp(mu + 1/2), and a tail that reaches a few thousand tokens, as chats do.
        prompt, output = (max(1, round(chance.lognormvariate(0, 1) * mean * 0.6065)) for mean in (161.31, 337.99))
        prompt = min(prompt, most - 1)
        requests.append(Lengths(name, prompt, min(output, most - prompt)))
    return requests


class Extent(NamedTuple):
    """Room for tokens start ... stop - 1 of the memory, held by a request."""

    start: int
    stop: int
    request: Lengths


class Allocator(Protocol):
    """Gives room out of `capacity` tokens."""

    capacity: int

    def admit(self, request: Lengths, tokens: int) -> bool:
        """Take room for a request that has `tokens` tokens. False, and nothing taken, where there is none."""

    def grow(self, request: Lengths) -> bool:
        """Room for one token more. False where there is none: the request must wait."""

    def release(self, request: Lengths) -> None:
        """Its room is free."""

    def held(self) -> dict[Lengths, int]:
        """How many tokens each request has room for."""

    def extents(self) -> list[Extent]:
        """Where that room lies, in the order in which each request fills it."""


class Reservation:
    """Each request gets one piece as long as the longest may become, from the beginning (the paper's Orca (Max))."""

    def __init__(self, capacity: int, most: int = 2048) -> None:
        if not 1 <= most <= capacity:
            raise ValueError(f"most={most}: 1 to the capacity of {capacity} tokens is accepted")
        self.capacity, self.most = capacity, most
        self._places = list(reversed(range(0, capacity - most + 1, most)))
        self._held: dict[Lengths, int] = {}

    def admit(self, request: Lengths, tokens: int) -> bool:
        if not self._places or request.total > self.most:
            return False
        self._held[request] = self._places.pop()
        return True

    def grow(self, request: Lengths) -> bool:
        return True

    def release(self, request: Lengths) -> None:
        self._places.append(self._held.pop(request))

    def held(self) -> dict[Lengths, int]:
        return dict.fromkeys(self._held, self.most)

    def extents(self) -> list[Extent]:
        return [Extent(start, start + self.most, request) for request, start in self._held.items()]


def power_of_two(tokens: int) -> int:
    """The smallest power of two that holds `tokens`."""
    return 1 << (tokens - 1).bit_length()


def doubled_output(request: Lengths) -> int:
    """What the paper's Orca (Pow2) reserves: the prompt, and the output as if known up to a factor of two."""
    return request.prompt + power_of_two(request.output)


class Buddy:
    """Pieces of power-of-two sizes, halved when a smaller one is wanted and joined with their other half when both are free.

    `guess` says how many tokens to reserve for a request, never fewer than it needs; it gets a piece of the next power of two.
    """

    def __init__(self, capacity: int, guess: Callable[[Lengths], int] = doubled_output) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity}: at least 1 token")
        self.capacity, self.guess = capacity, guess
        self._free: dict[int, set[int]] = {1 << bit: set() for bit in range(capacity.bit_length())}
        start = 0
        for size in reversed(self._free):                       # 11 = 8 + 2 + 1, and each piece begins at a multiple of its size
            if capacity & size:
                self._free[size].add(start)
                start += size
        self._held: dict[Lengths, tuple[int, int]] = {}

    def admit(self, request: Lengths, tokens: int) -> bool:
        wanted = power_of_two(max(self.guess(request), request.total))
        size = next((size for size, places in self._free.items() if size >= wanted and places), None)
        if size is None:
            return False
        start = min(self._free[size])
        self._free[size].remove(start)
        while size > wanted:
            size //= 2
            self._free[size].add(start + size)
        self._held[request] = start, size
        return True

    def grow(self, request: Lengths) -> bool:
        return True

    def release(self, request: Lengths) -> None:
        start, size = self._held.pop(request)
        while (other := start ^ size) in self._free[size]:
            self._free[size].remove(other)
            start, size = min(start, other), size * 2
        self._free[size].add(start)

    def held(self) -> dict[Lengths, int]:
        return {request: size for request, (_, size) in self._held.items()}

    def extents(self) -> list[Extent]:
        return [Extent(start, start + size, request) for request, (start, size) in self._held.items()]


class Pages:
    """Blocks of `block_size` tokens, taken one by one as they are needed."""

    def __init__(self, capacity: int, block_size: int = 16) -> None:
        self.tables = BlockTables(BlockPool(capacity // block_size, block_size))
        self.capacity = self.tables.pool.blocks * block_size

    def admit(self, request: Lengths, tokens: int) -> bool:
        self.tables.add(request)
        if self._take(request, tokens):
            return True
        self.tables.free(request)
        return False

    def grow(self, request: Lengths) -> bool:
        return self._take(request, 1)

    def _take(self, request: Lengths, tokens: int) -> bool:
        if not self.tables.can_append({request: tokens}):
            return False
        self.tables.reserve({request: tokens})
        self.tables.commit({request: range(tokens)})
        return True

    def release(self, request: Lengths) -> None:
        self.tables.free(request)

    def held(self) -> dict[Lengths, int]:
        return {request: len(blocks) * self.tables.pool.block_size for request, blocks in self.tables.blocks.items()}

    def extents(self) -> list[Extent]:
        size = self.tables.pool.block_size
        return [Extent(block * size, block * size + size, request) for request, blocks in self.tables.blocks.items() for block in blocks]


class Snapshot(NamedTuple):
    """The memory after one step: how many tokens each running request has, who waits, and the capacity as a sum of five."""

    tokens: dict[Lengths, int]
    waiting: list[Lengths]
    used: int
    reserved: int
    internal: int
    external: int
    free: int


def serve(allocator: Allocator, requests: Iterable[Lengths]) -> Iterator[Snapshot]:
    """First come, first served: every step admits whoever fits, and gives each running request one token; a snapshot each step,
    at which `allocator.extents()` can be asked where everything lies.

    Where a request cannot grow, the one that was admitted last gives its room back and waits, at the head of the queue, to be
    computed anew. Raises ValueError for a request that does not even fit into an empty memory.
    """
    coming = deque(sorted(requests, key=lambda request: request.arrival))
    waiting: deque[Lengths] = deque()
    running: dict[Lengths, int] = {}
    given: dict[Lengths, int] = {}              # tokens of preempted requests
    step = 0
    while coming or waiting or running:
        while coming and coming[0].arrival <= step:
            waiting.append(coming.popleft())
            if waiting[-1].total > allocator.capacity:
                raise ValueError(f"requests: {waiting[-1]} does not fit into {allocator.capacity} tokens")
        while waiting and allocator.admit(waiting[0], tokens := given.get(waiting[0], waiting[0].prompt)):
            running[waiting.popleft()] = tokens
        if waiting and not running:
            raise ValueError(f"requests: {waiting[0]} does not fit into {allocator.capacity} tokens")
        for request in list(running):
            while request in running and not allocator.grow(request):
                last = next(reversed(running))
                allocator.release(last)
                given[last] = running.pop(last)
                waiting.appendleft(last)
            if request in running:
                running[request] += 1
        yield _snapshot(allocator, running, list(waiting))
        for request in [request for request, tokens in running.items() if tokens >= request.total]:
            allocator.release(request)
            del running[request]
        step += 1


def _snapshot(allocator: Allocator, running: dict[Lengths, int], waiting: list[Lengths]) -> Snapshot:
    held, used = allocator.held(), sum(running.values())
    internal = sum(max(0, held[request] - request.total) for request in running)
    rest = allocator.capacity - sum(held.values())
    reserved = sum(held.values()) - used - internal
    return Snapshot(dict(running), waiting, used, reserved, internal, rest if waiting else 0, 0 if waiting else rest)
