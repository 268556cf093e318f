"""The real SmolLM2-135M-Instruct against transformers, both from the same GGUF file."""

import copy

import pytest
import torch
from reference import transformers_model
from tolerances import LOGITS

from clawdemy_infer.batching.swapping import SwappingCache, SwappingTables
from clawdemy_infer.files import load_model
from clawdemy_infer.files.load import PACKAGED, packaged_file
from clawdemy_infer.kv_cache import BlockPool, ContiguousCache
from clawdemy_infer.model import generate
from clawdemy_infer.rigs.text import prose

CHAT = [{"role": "user", "content": "Name three rivers of Europe."}]
PROMPTS = {
    "one token": "The", "short": "The capital of France is",
    "question": "Q: How many legs does a spider have?\nA:",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "digits": "3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5,",
    "unicode": "Straße, café, naïve — 日本語 и кириллица 🙂🏽:",
    "list": "Shopping list:\n\n1. bread\n2. milk\n\n3.", "white space": "a\t\tb\n\n\n   c  d",
    "long": "Once upon a time there was a lighthouse keeper who counted the waves. "*24 +
    "One night", "chat": CHAT,
}
NEW = 16


@pytest.fixture(scope="module")
def reference():
    """transformers' reading of the same file: some 20 s."""
    return transformers_model(packaged_file(*PACKAGED["smollm2-135m"][:2]))


def token_ids(model, prompt):
    return model.tokenizer.encode(prompt) if isinstance(prompt,
                                                        str) else model.tokenizer.chat(prompt)


@pytest.fixture(scope="module")
def continuation(reference):
    """What transformers writes behind some ids, greedily and alone: each computed once."""
    known = {}

    def continuation(ids, new=NEW):
        if (tuple(ids), new) not in known:
            with torch.no_grad():
                out = reference.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False,
                                         pad_token_id=0)
            known[tuple(ids), new] = out[0, len(ids):].tolist()
        return known[tuple(ids), new]
    return continuation


def assert_logits_close(ours, theirs):
    scale = theirs.std()
    torch.testing.assert_close(ours / scale, theirs / scale, **LOGITS[ours.dtype])


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_greedy_tokens_are_those_of_transformers(smollm, continuation, prompt):
    ids = token_ids(smollm, prompt)
    expected = continuation(ids)
    ours = generate(smollm, prompt if isinstance(prompt, str) else ids, max_tokens=NEW)
    assert ours.prompt_tokens == ids
    assert ours.tokens == expected
    assert ours.text == smollm.tokenizer.decode(expected)


def test_every_weight_is_the_one_transformers_reads(smollm, reference):
    from clawdemy_infer.files.directory import destinations

    theirs = dict(reference.named_parameters())
    ours = destinations(smollm)
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name].detach(), rtol=0, atol=0)


def test_logits_equal_transformers_in_prefill_in_chunks_and_step_by_step(smollm, reference):
    ids = torch.tensor(
        [token_ids(smollm, PROMPTS["long"])[:150],
         token_ids(smollm, PROMPTS["long"])[33:183]])
    with torch.no_grad():
        expected = reference(ids).logits
    assert_logits_close(smollm(ids), expected)
    cache = ContiguousCache.for_model(smollm, batch=2, capacity=150)
    chunks = ids.split([101, 38, *[1] * 11], dim=1)
    assert_logits_close(torch.cat([smollm(chunk, cache) for chunk in chunks], dim=1), expected)


def test_logits_in_bf16_are_as_near_to_fp32_as_those_of_transformers(smollm, reference,
                                                                     monkeypatch):
    """Of 100 tokens either may be a third nearer, as roundings fall; over 1,500 they are alike."""
    text = smollm.tokenizer.encode(prose("evaluation")[:20_000])
    model, theirs = load_model("smollm2-135m", dtype=torch.bfloat16), copy.deepcopy(reference)
    theirs.bfloat16()
    chat = torch.tensor([token_ids(smollm, PROMPTS["chat"])])
    ids, linear, errors = torch.tensor(text[:1500]).view(15, 100), torch.nn.functional.linear, []
    with torch.no_grad(), monkeypatch.context() as patched:
        assert_logits_close(model(chat), theirs(chat).logits)
        exact = reference(ids).logits
        # Sums in fp32, rounded once, as PyTorch's product in bf16 has them: that one takes many
        # times as long where the CPU has no instructions for bf16.
        patched.setattr(torch.nn.functional, "linear", lambda x, weight, bias=None: linear(
            x.float(), weight.float()).to(x.dtype))
        for logits in (model(ids), theirs(ids).logits):
            errors.append((logits.float() - exact).square().mean().sqrt())
    assert errors[0] < 1.1 * errors[1]


class Batch:
    """Sequences that decode greedily together in one cache: every step brings what is not yet in
    it, at most `chunk` tokens each."""

    def __init__(self, model, cache, chunk):
        self.model, self.cache, self.chunk = model, cache, chunk
        self.tokens, self.goal = {}, {}

    def add(self, name, ids, new=NEW):
        self.tokens[name], self.goal[name] = list(ids), len(ids) + new

    def step(self):
        """One token more, or a part of a prompt, for each that is not yet done. False where all
        are."""
        held = self.cache.lengths
        new = {name: ids[held[name]:held[name] + self.chunk] for name, ids in self.tokens.items()
               if name in held and len(ids) < self.goal[name]}
        if not new:
            return False
        assert self.cache.can_append({name: len(ids) for name, ids in new.items()})
        for name, token in zip(new,
                               self.model.step(new, self.cache).argmax(-1).tolist(), strict=True):
            if self.cache.lengths[name] == len(self.tokens[name]):
                self.tokens[name].append(token)
        return True

    def generated(self, name, ids):
        assert self.tokens[name][:len(ids)] == ids
        return self.tokens[name][len(ids):]


@pytest.fixture(scope="module")
def seven(smollm):
    """Prompts of 1 to 2,040 tokens, and how many tokens each is to be continued by."""
    ids = [
        token_ids(smollm, PROMPTS[name])
        for name in ("one token", "question", "code", "unicode", "long", "chat")
    ]
    return [(each, NEW) for each in ids] + [((ids[4] * 9)[:2040], 8)]


def test_a_ragged_batch_of_seven_is_token_identical_to_transformers(smollm, continuation, seven):
    batch = Batch(smollm, ContiguousCache.for_model(smollm, 7, 2048), chunk=700)
    for name, (ids, new) in enumerate(seven):
        batch.add(name, ids, new)
    while batch.step():
        pass
    for name, (ids, new) in enumerate(seven):
        assert batch.generated(name, ids) == continuation(ids, new)


def test_a_paged_batch_of_seven_is_token_identical_through_forks_hits_and_preemptions(
        smollm, continuation, seven):
    """After each of some steps something happens that must not show: fork, swap out and in,
    preemption by recompute (whose blocks are still known), a prefix hit, a step that is interrupted
    in the middle, the end of a sequence.
    """
    tables = SwappingTables(BlockPool(260), host=BlockPool(40), prefix_caching=True)
    batch = Batch(smollm, SwappingCache.over(smollm, tables), chunk=700)
    for name, (ids, new) in enumerate(seven):
        tables.add(name, ids)
        batch.add(name, ids, new)

    def fork():
        tables.fork(2, "child")
        batch.tokens["child"], batch.goal["child"] = list(batch.tokens[2]), batch.goal[2]

    def recompute():
        tables.free(4)
        assert tables.add(4, batch.tokens[4]) > 0

    def hit():
        ids, new = seven[6]
        assert tables.add("again", ids) == 2032
        batch.add("again", ids, new)

    def interrupted():
        with interrupt(smollm.layers[17]), pytest.raises(KeyboardInterrupt):
            batch.step()

    events = {
        5: fork, 6: lambda: batch.cache.swap_out(5), 7: interrupted, 8: recompute,
        10: lambda: batch.cache.swap_in(5), 11: hit
    }
    steps = 0
    while batch.step():
        steps += 1
        events.pop(steps, lambda: None)()
    assert not events
    for name, (ids, new) in [*enumerate(seven), ("child", seven[2]), ("again", seven[6])]:
        assert batch.generated(name, ids) == continuation(ids, new)
        tables.free(name)
    assert tables.pool.used == tables.host.used == 0


def test_an_interrupt_in_layer_17_changes_nothing(smollm):
    """Ctrl-C in the middle of the fourth decode step: the cache still has the length of the third,
    and the step can be run again."""
    ids = token_ids(smollm, PROMPTS["code"])
    expected = generate(smollm, ids, max_tokens=9).tokens
    cache = ContiguousCache.for_model(smollm, batch=1, capacity=len(ids) + 9)
    tokens, step = [], torch.tensor([ids])
    while len(tokens) < 9:
        if len(tokens) == 4:
            length = cache.length
            with interrupt(smollm.layers[17]), pytest.raises(KeyboardInterrupt):
                smollm(step, cache, last_only=True)
            assert cache.length == length
        tokens.append(int(smollm(step, cache, last_only=True).argmax()))
        step = torch.tensor([tokens[-1:]])
    assert tokens == expected


def test_an_interrupted_generation_returns_what_it_has_and_the_model_goes_on(smollm):
    whole = generate(smollm, PROMPTS["short"], max_tokens=8)
    pieces = []
    with interrupt(smollm.layers[17], at=5):
        partial = generate(smollm, PROMPTS["short"], max_tokens=8, on_token=pieces.append)
    assert partial.finish_reason == "interrupted"
    assert partial.tokens == whole.tokens[:5]
    assert whole.text.startswith(partial.text) and partial.text == "".join(pieces) != ""
    with interrupt(smollm.layers[17]):
        nothing = generate(smollm, PROMPTS["short"], max_tokens=8)
    assert (nothing.tokens, nothing.text, nothing.ttft_s, nothing.tpot_s) == ([], "", None, None)
    assert generate(smollm, PROMPTS["short"], max_tokens=8).tokens == whole.tokens


class interrupt:  # noqa: N801
    """Within the block, the step after `at` whole ones stops in `layer` as Ctrl-C would stop it."""

    def __init__(self, layer, at=0):
        self.layer, self.left = layer, at

    def __enter__(self):
        self.hook = self.layer.register_forward_pre_hook(self.stop)

    def stop(self, *_):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def __exit__(self, *_):
        self.hook.remove()
