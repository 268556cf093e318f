"""Decode on a GPU as a recording: the launches of a step are captured once, and replayed for every
step after.

A decode step of a small model is some ten kernels a layer, each of which a GPU is done with in a
few microseconds. Python needs as long or longer to launch one, so the GPU waits for Python. A CUDA
graph holds the launches themselves, with the addresses of all tensors in them, and the GPU starts
one behind the other. What changes between steps must therefore lie where it lay: tokens, positions,
slots, block table and lengths are copied to where those of the recorded step are. Keys and values
are the cache's own, so each cache has recordings of its own, one for each number of sequences; all
draw on one pool of memory, since no two run at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch

from clawdemy_infer.fast.pages import pages_of, slots_of
from clawdemy_infer.fast.triton_step import TritonStep
from clawdemy_infer.kv_cache import Step
from clawdemy_infer.model.decoder import LogitsToKeep
from clawdemy_infer.timing import now

Outputs = tuple[torch.Tensor, torch.Tensor]


class RecordedSteps:
    """The steps of `plain` in which every sequence brings one token are replayed; others are its
    own. `compile_s` counts the recording."""

    backend = "triton"

    def __init__(self, plain: TritonStep) -> None:
        self.plain, self.compile_s, self.memory = plain, 0.0, None
        # By cache: how each number of sequences is run.
        self.recordings: WeakKeyDictionary = WeakKeyDictionary()

    def takes(self, step: Step) -> bool:
        return self.plain.takes(step)

    def __call__(self, tokens: torch.Tensor, step: Step,
                 logits_to_keep: LogitsToKeep = 1) -> Outputs:
        """For tokens [B], what the last layer leaves, [B, D], and the logits, [B, V]."""
        if max(step.num_new_tokens) > 1:
            return self.plain(tokens, step, logits_to_keep)
        pages = pages_of(step)
        lengths = step.positions.to(torch.int32) + 1
        fresh = [tokens, step.positions, slots_of(step), pages.table, lengths]
        # A table grows with its longest sequence; it is recorded at powers of two, and what lies
        # behind a sequence's blocks is not read.
        room = tuple((*x.shape[:-1], 1 << (x.shape[-1] - 1).bit_length()) if x.dim() == 2
                     else tuple(x.shape) for x in fresh)
        of_cache = self.recordings.setdefault(step.cache, {})
        if room not in of_cache:
            start = now()
            places = [torch.zeros(shape, dtype=x.dtype, device=x.device)
                      for x, shape in zip(fresh, room, strict=True)]
            put(fresh, places)
            attention = self.plain.decode(pages, *places[3:])

            def run() -> Outputs:
                x = self.plain.layers(*places[:3], pages, attention)
                return x, self.plain.logits(x)
            of_cache[room] = places, *self.record(run)
            self.compile_s += now() - start
        places, replay, outputs = of_cache[room]
        put(fresh, places)
        replay()
        return tuple(x.clone() for x in outputs)        # the next replay writes over them

    def record(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """What replays `run()`, and the tensors in which a replay leaves what it returns."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            run()                                       # compiles the kernels: a recording cannot
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory):
            outputs = run()
        self.memory = self.memory or graph.pool()
        return graph.replay, outputs


def put(fresh: Sequence[torch.Tensor], places: Sequence[torch.Tensor]) -> None:
    for x, place in zip(fresh, places, strict=True):
        place[..., :x.shape[-1]].copy_(x)
