"""Steps in which every sequence brings its own number of tokens, on every way of keeping keys and
values, against transformers."""

import random

import answers_04
import pytest
import torch
from test_model_families import FAMILIES
from tolerances import LOGITS
from transformers import AutoModelForCausalLM

from clawdemy_course.build_04 import with_step
from clawdemy_infer.batching.swapping import SwappingCache, SwappingTables
from clawdemy_infer.files import load_model
from clawdemy_infer.kv_cache import BlockPool, BlockTables, ContiguousCache, PagedCache

LENGTHS = [37, 1, 20, 64, 9, 50, 28]            # 7 sequences, no two alike
CHOSEN = [
    "llama 2: MHA", "llama: MQA, tied", "mistral: window 7",
    "qwen3: norms on Q and K, explicit head_dim"
]
CACHES = {
    "contiguous": lambda model: ContiguousCache.for_model(model, 7, 70),
    "paged": lambda model: PagedCache.for_model(model, 7, 70),
    "paged, blocks of 3": lambda model: PagedCache.for_model(model, 7, 70, block_size=3),
    "paged, a block to spare": lambda model: paged(model, 7 * 18 + 1, 4),
    "paged, blocks of 1": lambda model: PagedCache.for_model(model, 7, 70, block_size=1),
}


def paged(model, blocks, block_size, sequences=7, **options):
    cache = PagedCache.over(model, BlockTables(BlockPool(blocks, block_size), **options))
    for sequence in range(sequences):
        cache.add(sequence)
    return cache


@pytest.fixture(scope="module", params=CHOSEN)
def both(request, tmp_path_factory):
    """A random model; 7 texts; and the logits transformers gives for each alone."""
    torch.manual_seed(sum(map(ord, request.param)))
    theirs = AutoModelForCausalLM.from_config(FAMILIES[request.param]).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    path = tmp_path_factory.mktemp("ragged")
    theirs.save_pretrained(path)
    texts = [torch.randint(0, 131, (length,)).tolist() for length in LENGTHS]
    with torch.no_grad():
        return load_model(path), texts, [theirs(torch.tensor([text])).logits[0] for text in texts]


def schedule(seed, lengths=LENGTHS):
    """Steps {sequence: new tokens} until every text is through, half of them in the order of the
    sequences, and half of them with one token each, as in decode."""
    chance, left = random.Random(seed), dict(enumerate(lengths))
    while left:
        chosen = chance.choice([sorted, list])(chance.sample(sorted(left),
                                                             chance.randint(1, len(left))))
        most = chance.choice([1, 16])
        step = {sequence: min(left[sequence], chance.randint(1, most)) for sequence in chosen}
        yield step
        for sequence, count in step.items():
            left[sequence] -= count
            if not left[sequence]:
                del left[sequence]


def run(model, cache, texts, steps):
    """The logits [S, V] of each text, however the steps cut it."""
    logits = [[] for _ in texts]
    for step in steps:
        new = {i: texts[i][cache.lengths[i]:cache.lengths[i] + count] for i, count in step.items()}
        assert cache.can_append(step)
        rows = model.step(new, cache, logits_to_keep=0)
        for i, part in zip(new, rows.split([len(ids) for ids in new.values()]), strict=True):
            logits[i].append(part)
    return [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES.keys())
def test_logits_of_a_ragged_batch_are_those_of_each_text_alone(both, make_cache, seed):
    model, texts, expected = both
    cache = make_cache(model)
    for ours, theirs in zip(run(model, cache, texts, schedule(seed)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **LOGITS[torch.float32])
    assert list(cache.lengths.values()) == LENGTHS


@pytest.mark.parametrize("make_cache", CACHES.values(), ids=CACHES.keys())
def test_a_step_gives_the_last_row_of_each_sequence_in_the_order_asked_for(both, make_cache):
    model, texts, expected = both
    cache = make_cache(model)
    rows = model.step({5: texts[5][:30], 1: texts[1], 3: texts[3][:4]}, cache)
    torch.testing.assert_close(rows, torch.stack([expected[5][29], expected[1][0], expected[3][3]]),
                               **LOGITS[torch.float32])
    rows = model.step({3: texts[3][4:5], 5: texts[5][30:31]}, cache)
    torch.testing.assert_close(rows, torch.stack([expected[3][4], expected[5][30]]),
                               **LOGITS[torch.float32])


@pytest.mark.parametrize("which", ["right", "right, with split and cumsum"])
@pytest.mark.parametrize("kind", ["contiguous", "paged, blocks of 3"])
def test_a_learners_step_gives_the_last_logits_of_a_ragged_batch(both, kind, which):
    """A right answer to lesson 04's build task, as the lesson runs it."""
    model, texts, expected = both
    names = {"torch": torch}
    exec(answers_04.ANSWERS[which], names)
    cache, mine = CACHES[kind](model), with_step(names["my_step"])(model)
    for step in schedule(3):
        new = {i: texts[i][cache.lengths[i]:cache.lengths[i] + count] for i, count in step.items()}
        rows = mine.step(new, cache)
        last = torch.stack([expected[i][cache.lengths[i] - 1] for i in new])
        torch.testing.assert_close(rows, last, **LOGITS[torch.float32])
    assert list(cache.lengths.values()) == LENGTHS


def test_pages_are_read_only_where_their_sequence_has_written(both):
    """NaN in a slot that is somebody else's, or nobody's, would spread through any read of it."""
    model, texts, expected = both
    cache = PagedCache.for_model(model, 7, 70, block_size=3)
    for tensor in (cache.keys, cache.values):
        tensor.fill_(torch.nan)
    for ours, theirs in zip(run(model, cache, texts, schedule(5)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **LOGITS[torch.float32])


def test_a_rectangle_in_pages_is_a_rectangle(both):
    model, texts, expected = both
    cache = PagedCache.for_model(model, 3, 40, block_size=4)
    tokens = torch.tensor([texts[i][:28] for i in (0, 3, 6)])
    logits = torch.cat([model(part, cache) for part in tokens.split([13, 1, 1, 9, 4], dim=1)],
                       dim=1)
    torch.testing.assert_close(logits, torch.stack([expected[i][:28] for i in (0, 3, 6)]),
                               **LOGITS[torch.float32])
    cache.truncate(11)
    torch.testing.assert_close(model(tokens[:, 11:12], cache), logits[:, 11:12],
                               **LOGITS[torch.float32])


def test_forks_that_part_are_each_themselves(both):
    """Four continuations of one text, of which one forks again; they share all blocks that are
    full, and read each of them once."""
    model, texts, expected = both
    cache = paged(model, 60, 4, sequences=0)
    cache.add("root")
    model.step({"root": texts[3][:22]}, cache)
    for child in "abc":
        cache.fork("root", child)
    assert cache.tables.pool.used == 6
    tails = {"root": texts[0][:6], "a": texts[2][:6], "b": texts[5][:6], "c": texts[3][22:28]}
    logits = {name: [] for name in tails}
    for i in range(6):
        for name, row in zip(
                tails, model.step({name: tail[i:i + 1]
                                   for name, tail in tails.items()}, cache), strict=True):
            logits[name].append(row)
        if i == 2:
            cache.fork("c", "late")
    # Five full ones that all share; four copies of the sixth, four sevenths, and the seventh as it
    # was when `late` forked.
    assert cache.tables.pool.used == 5 + 4 + 4 + 1
    torch.testing.assert_close(torch.stack(logits["c"]), expected[3][22:28],
                               **LOGITS[torch.float32])
    alone = model(torch.tensor([texts[3][:22] + tails["a"]]))[0, 22:]
    torch.testing.assert_close(torch.stack(logits["a"]), alone, **LOGITS[torch.float32])
    late = model.step({"late": texts[3][25:30]}, cache, logits_to_keep=0)
    torch.testing.assert_close(late, expected[3][25:30], **LOGITS[torch.float32])
    for name in [*tails, "late"]:
        cache.free(name)
    assert cache.tables.pool.used == 0


def test_a_prefix_hit_does_not_change_the_output(both):
    model, texts, expected = both
    cache = paged(model, 48, 4, sequences=0, prefix_caching=True)
    cache.add("first", texts[3])
    model.step({"first": texts[3][:45]}, cache)
    model.step({"first": texts[3][45:]}, cache)
    found = cache.add("again", texts[3])
    assert found == 60
    row = model.step({"again": texts[3][found:]}, cache, logits_to_keep=0)
    torch.testing.assert_close(row, expected[3][60:], **LOGITS[torch.float32])
    other = texts[3][:41] + texts[0][:9]
    cache.free("first")
    assert cache.add("parting", other) == 40
    row = model.step({"parting": other[40:]}, cache, logits_to_keep=0)
    torch.testing.assert_close(row, model(torch.tensor([other]))[0, 40:], **LOGITS[torch.float32])


def test_swapping_out_and_in_does_not_change_the_output(both):
    model, texts, expected = both
    tables = SwappingTables(BlockPool(24, 4), host=BlockPool(20, 4))
    cache = SwappingCache.over(model, tables)
    for name in ("a", "b"):
        cache.add(name)
    model.step({"a": texts[3][:41], "b": texts[5][:30]}, cache)
    cache.swap_out("a")
    assert list(cache.lengths) == ["b"] and tables.host.used == 11
    model.step({"b": texts[5][30:47]}, cache)
    cache.swap_in("a")
    rows = model.step({"a": texts[3][41:42], "b": texts[5][47:48]}, cache)
    torch.testing.assert_close(rows, torch.stack([expected[3][41], expected[5][47]]),
                               **LOGITS[torch.float32])


def test_what_does_not_fit_is_refused_before_anything_happens(both):
    model, texts, _ = both
    cache = paged(model, 5, 4, sequences=2)
    model.step({0: texts[0][:9]}, cache)
    with pytest.raises(ValueError, match="3 more blocks are needed, and 2 of 5 are free"):
        model.step({0: texts[0][9:13], 1: texts[2][:7]}, cache)
    assert not cache.can_append({0: 4, 1: 7}) and cache.can_append({0: 3, 1: 7})
    assert cache.lengths == {0: 9, 1: 0} and cache.tables.pool.used == 3
    with pytest.raises(ValueError, match="no sequence 'x'"):
        model.step({"x": [1]}, cache)
    with pytest.raises(ValueError, match="tokens hold 131"):
        model.step({0: [1, 131]}, cache)


@pytest.mark.parametrize(("blocks", "block_size"), [(24, 16), (7, 3), (1, 1)])
def test_allocated_bytes_are_those_of_whole_blocks(both, blocks, block_size):
    """2 (K and V) · L · K · H · 4 bytes a token, as the arithmetic counts them, for every token
    that the blocks have room for."""
    model, *_ = both
    shape = model.config.shape
    tables = SwappingTables(BlockPool(blocks, block_size), host=BlockPool(3, block_size))
    cache = SwappingCache.over(model, tables)
    per_token = 2 * shape.L * shape.K * shape.H * 4
    assert per_token == shape.kv_bytes_per_token("fp32")
    assert cache.allocated_bytes == blocks * block_size * per_token
    assert sum(tensor.nbytes for tensor in cache.host) == 3 * block_size * per_token


def test_paged_decode_in_bf16_is_as_near_to_fp32_as_contiguous_is(both):
    model, texts, expected = both
    half = type(model)(model.config)
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    errors = {}
    for make_cache in ("contiguous", "paged"):
        logits = run(half, CACHES[make_cache](half), texts, schedule(3))
        errors[make_cache] = sum((ours.float() - theirs).square().mean()
                             for ours, theirs in zip(logits, expected, strict=True))**0.5
    assert errors["paged"] < 1.3 * errors["contiguous"]
