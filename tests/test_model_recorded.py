"""Recorded decode: what is replayed is the step that was asked for. Without a GPU everything but
the graph itself is tried."""

import pytest
import torch
from test_backends import DEVICE, small
from tolerances import LOGITS

from clawdemy_infer.fast.faster import faster
from clawdemy_infer.fast.recorded import RecordedSteps
from clawdemy_infer.kv_cache import ContiguousCache, PagedCache
from clawdemy_infer.variants.int8_cache import Int8Cache

KEEPERS = {
    "contiguous": lambda model: ContiguousCache.for_model(model, 3, 40),
    "paged": lambda model: PagedCache.for_model(model, 3, 40, block_size=4),
}
# Prompts of three lengths; all three go on, past the ends of blocks; then two of them, then one; a
# chunk and a decode between.
STEPS = [{0: [3, 4, 5], 1: [7],
          2: list(range(6))}, *({0: [i], 1: [i + 1], 2: [i + 2]} for i in range(9)),
         {0: [5, 6], 1: [9], 2: [1]}, {0: [2], 1: [4], 2: [6]}, {0: [3], 1: [8]}, {0: [2], 1: [2]},
         {1: [30]}, {0: [1], 1: [3], 2: [2]}]


class Rerun(RecordedSteps):
    """Without a GPU: a replay runs the recorded calls once more, on the tensors that they were
    recorded with."""

    recorded = 0

    def record(self, run):
        self.recorded += 1
        if DEVICE == "cuda":
            return super().record(run)
        outputs = tuple(torch.full_like(x, torch.nan) for x in run())

        def replay():
            for place, x in zip(outputs, run(), strict=True):
                place.copy_(x)
        return replay, outputs


def on_triton(model, weights=None):
    return faster(model, weights, backend="triton")


def on_records(model, weights=None):
    made = on_triton(model, weights)
    made.runner = Rerun(made.runner)
    return made


@pytest.mark.parametrize("keeper", KEEPERS)
@pytest.mark.parametrize("more", [{}, {"window": 5}, {"tied": True, "qk_norm": True}],
                         ids=["plain", "window", "tied, norms on Q and K"])
def test_replayed_steps_give_the_logits_of_steps_that_are_run(keeper, more):
    plain, replayed = on_triton(small(**more)), on_records(small(**more))
    caches = [KEEPERS[keeper](model) for model in (plain, replayed)]
    for new in STEPS:
        wanted, got = (model.step(new, cache)
                       for model, cache in zip((plain, replayed), caches, strict=True))
        torch.testing.assert_close(got, wanted, **LOGITS[torch.float32])
    # One recording for each number of sequences, and where tables grow, one more for each power of
    # two.
    assert replayed.runner.recorded == {"contiguous": 3, "paged": 6}[keeper]
    assert replayed.runner.compile_s > 0


def test_a_result_is_not_overwritten_by_the_next_step():
    model = on_records(small())
    cache = ContiguousCache.for_model(model, 1, 9)
    model.step({0: [1]}, cache)
    first = model.step({0: [1]}, cache)
    kept = first.clone()
    model.step({0: [2]}, cache)
    assert torch.equal(first, kept)


def test_each_cache_has_recordings_of_its_own_which_end_with_it():
    model = on_records(small())
    if DEVICE == "cpu":
        # a recording knows addresses, and nothing of the cache
        model.runner.record = lambda run: (lambda: None, run())
    one, other = (ContiguousCache.for_model(model, 1, 9) for _ in range(2))
    for cache in (one, other, one):
        model.step({0: [1]}, cache)
    assert len(model.runner.recordings) == 2 and (one.length, other.length) == (2, 1)
    del cache, other
    assert len(model.runner.recordings) == 1


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_packed_weights_are_recorded_too(format):
    plain, replayed = (make(small(D=64, F=64), format) for make in (on_triton, on_records))
    caches = [ContiguousCache.for_model(model, 2, 9) for model in (plain, replayed)]
    for new in ({0: [3], 1: [4]}, {0: [8], 1: [2]}):
        wanted, got = (model.step(new, cache)
                       for model, cache in zip((plain, replayed), caches, strict=True))
        torch.testing.assert_close(got, wanted, **LOGITS[plain.dtype])


def test_what_no_kernel_looks_after_is_run_as_before():
    model = on_records(small())
    for cache, new in [(Int8Cache.for_model(model, 1, 9), {0: [1]}),
                       (ContiguousCache.for_model(model, 1, 9), {0: [1, 2]})]:
        model.step(new, cache)
    assert not model.runner.recorded


def test_sequences_apart_are_recorded_as_those_side_by_side():
    plain, replayed = on_triton(small()), on_records(small())
    caches = [ContiguousCache.for_model(model, 3, 9) for model in (plain, replayed)]
    for new in ({0: [1], 2: [4]}, {1: [1], 2: [3]}, {2: [5], 0: [6]}):
        wanted, got = (model.step(new, cache)
                       for model, cache in zip((plain, replayed), caches, strict=True))
        torch.testing.assert_close(got, wanted, **LOGITS[torch.float32])
    assert replayed.runner.recorded == 1


def test_what_cannot_be_recorded_is_refused():
    if DEVICE == "cpu":
        with pytest.raises(ValueError,
                           match=r"compile: on a CPU it is C\+\+, and backend='triton'"):
            faster(small(), backend="triton", compile=True)
    else:
        with pytest.raises(ValueError, match="backend='torch'; triton is accepted"):
            faster(small(), backend="torch", compile=True)
