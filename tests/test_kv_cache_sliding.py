"""The sliding window: exact for a model that has one, and with sinks what the paper's algorithm
computes, token by token."""

from functools import lru_cache

import pytest
import torch
from tolerances import LOGITS
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from clawdemy_infer.attention import attend
from clawdemy_infer.files import load_model
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.model import generate
from clawdemy_infer.variants.named_caches import CACHES
from clawdemy_infer.variants.sliding_cache import SlidingWindowCache, _SinkAttention

SMALL = {
    "num_hidden_layers": 3, "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 10, "intermediate_size": 44, "vocab_size": 101, "max_position_embeddings": 512,
    "initializer_range": 0.3
}
TEXT = torch.randint(101, (83,), generator=torch.Generator().manual_seed(3)).tolist()


def both(config, folder):
    """The same random weights in transformers and here."""
    torch.manual_seed(5)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(folder)
    return theirs, load_model(folder)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return both(MistralConfig(**SMALL, sliding_window=9, eos_token_id=None),
                tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return both(LlamaConfig(**SMALL, eos_token_id=None), tmp_path_factory.mktemp("llama"))


def fed(model, cache, ids, pieces, sequence=0):
    """Logits [S, V] of `ids`, brought in pieces of these lengths."""
    out, start = [], 0
    for piece in pieces:
        out.append(model.step({sequence: ids[start:start + piece]}, cache, logits_to_keep=0))
        start += piece
    assert start == len(ids)
    return torch.cat(out)


@torch.no_grad()
def streaming_llm(theirs, ids, window, sinks):
    """Logits [S, V] by the algorithm of the paper, section 3.2, in fp64 and made of transformers'
    own modules: keys are kept as they are before RoPE; for each token those of the first `sinks`
    and the last `window` tokens are turned to their places in the cache."""
    model = theirs.double().model
    H, N, K = SMALL["head_dim"], SMALL["num_attention_heads"], SMALL["num_key_value_heads"]
    kept = [([], []) for _ in model.layers]
    logits = []
    for t, token in enumerate(ids):
        x = model.embed_tokens(torch.tensor([[token]]))
        visible = [p for p in range(t + 1) if p < sinks or p > t - window]
        cos, sin = model.rotary_emb(x, torch.arange(len(visible))[None])
        for layer, (keys, values) in zip(model.layers, kept, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            keys.append(attention.k_proj(normed).view(1, 1, K, H))
            values.append(attention.v_proj(normed).view(1, 1, K, H))
            q = attention.q_proj(normed).view(1, 1, N, H).transpose(1, 2)
            k = torch.cat([keys[p] for p in visible], 1).transpose(1, 2)
            v = torch.cat([values[p] for p in visible], 1).transpose(1, 2).repeat_interleave(
                N//K, 1)
            q, _ = apply_rotary_pos_emb(q, q, cos[:, -1:], sin[:, -1:])
            k, _ = apply_rotary_pos_emb(k, k, cos, sin)
            scores = q @ k.repeat_interleave(N // K, 1).mT / H**0.5
            x = x + attention.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(1, 1, N * H))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits.append(theirs.lm_head(model.norm(x))[0, 0])
    theirs.float()
    return torch.stack(logits).float()


@pytest.fixture(scope="module")
def paper(llama):
    """`streaming_llm` of the small llama, each case computed once."""
    return lru_cache(
        maxsize=None)(lambda ids, window, sinks: streaming_llm(llama[0], ids, window, sinks))


def assert_logits_agree(ours, theirs):
    scale = theirs.std()
    torch.testing.assert_close(ours / scale, theirs / scale, **LOGITS[torch.float32])


@pytest.mark.parametrize("pieces", [[83], [1] * 83, [5, 1, 1, 30, 1, 9, 1, 35], [9, 9, 10, 55]],
                         ids=["whole", "one by one", "in pieces", "in longer pieces"])
def test_a_window_as_wide_as_the_models_own_gives_transformers_logits(mistral, pieces):
    theirs, ours = mistral
    with torch.no_grad():
        expected = theirs(torch.tensor([TEXT])).logits[0]
    assert_logits_agree(fed(ours, SlidingWindowCache.for_model(ours, 1), TEXT, pieces), expected)


def test_greedy_tokens_are_those_of_transformers_with_a_sliding_window(mistral):
    theirs, ours = mistral
    expected = theirs.generate(torch.tensor([TEXT[:17]]), max_new_tokens=40, do_sample=False,
                               pad_token_id=0)[0, 17:].tolist()
    cache, tokens, fresh = SlidingWindowCache.for_model(ours, 1), [], TEXT[:17]
    for _ in range(40):
        fresh = [int(ours.step({0: fresh}, cache).argmax())]
        tokens += fresh
    assert tokens == expected


@pytest.mark.parametrize(("window", "sinks"), [(7, 4), (12, 1), (1, 3), (5, 0), (200, 4)])
@pytest.mark.parametrize("pieces", [[83], [1] * 83, [6, 1, 1, 20, 1, 1, 53], [3, 80]],
                         ids=["whole", "one by one", "in pieces", "in two"])
def test_sinks_are_what_the_paper_computes(llama, paper, window, sinks, pieces):
    _, ours = llama
    assert_logits_agree(
        fed(ours, SlidingWindowCache.for_model(ours, 1, window, sinks), TEXT, pieces),
        paper(tuple(TEXT), window, sinks))


def test_sinks_change_what_a_window_alone_computes(llama):
    """Lest the test above hold for a cache that forgets them."""
    theirs, _ = llama
    with_, without = streaming_llm(theirs, TEXT, 7, 4), streaming_llm(theirs, TEXT, 11, 0)
    assert (with_[-1] - without[-1]).abs().max() > 0.1 * with_.std()


def test_a_ragged_batch_of_seven_computes_what_each_sequence_does_alone(llama):
    theirs, ours = llama
    starts = [1, 30, 7, 12, 2, 11, 41]  # below, at and beyond the 11 tokens that are kept
    cache = SlidingWindowCache.for_model(ours, 7, window=7, sinks=4)
    out = {i: [] for i in range(7)}
    # prompts of seven lengths in one step
    steps = [{i: TEXT[i:i + n] for i, n in enumerate(starts)}]
    # then all decode
    steps += [{i: [TEXT[i + n + t]] for i, n in enumerate(starts)} for t in range(9)]
    # some a token, some a piece, one none
    steps += [{i: TEXT[i + n + 9:i + n + 10 + i % 3] for i, n in enumerate(starts) if i != 4}]
    for step in steps:
        logits = ours.step(step, cache, logits_to_keep=0)
        for i, rows in zip(step, logits.split([len(ids) for ids in step.values()]), strict=True):
            out[i].append(rows)
    for i, rows in out.items():
        rows = torch.cat(rows)
        assert_logits_agree(rows, streaming_llm(theirs, TEXT[i:i + len(rows)], 7, 4))


@pytest.mark.parametrize("length", [1, 10, 400])
def test_bytes_are_those_of_sinks_and_window_whatever_the_length(llama, length):
    _, ours = llama
    cache = SlidingWindowCache.for_model(ours, 3, window=21, sinks=4)
    ours(torch.tensor([(TEXT * 5)[:length]] * 3), cache)
    # B (s + W) * K and V * L K H * fp32
    assert cache.allocated_bytes == 3 * 25 * 2 * 3 * 2 * 10 * 4


def test_an_interrupted_step_can_be_begun_again(llama, paper):
    _, ours = llama
    cache = SlidingWindowCache.for_model(ours, 1, window=7, sinks=2)
    fed(ours, cache, TEXT[:20], [20])
    # a long one and a short one, stopped in the second layer
    for new in (TEXT[20:40], TEXT[50:51]):
        step = cache.begin({0: new})
        for layer in (0, 1):
            step.attend(layer, *(torch.full((len(new), heads, 10), 7.0) for heads in (6, 2, 2)))
    assert cache.lengths == {0: 20}
    assert_logits_agree(fed(ours, cache, TEXT[20:], [15, 1, 47]), paper(tuple(TEXT), 7, 2)[20:])


def test_one_step_back_is_possible_and_two_are_refused(llama, paper):
    _, ours = llama
    cache = SlidingWindowCache.for_model(ours, 1, window=7, sinks=2)
    fed(ours, cache, TEXT[:30], [29, 1])
    cache.truncate(29)
    again = ours.step({0: TEXT[29:30]}, cache)
    assert_logits_agree(again, paper(tuple(TEXT[:30]), 7, 2)[29:])
    with pytest.raises(ValueError, match="length=28: 0, or 29 to 30"):
        cache.truncate(28)
    assert cache.lengths == {0: 30}
    cache.truncate(0)
    assert_logits_agree(fed(ours, cache, TEXT, [83]), paper(tuple(TEXT), 7, 2))


def test_what_an_interrupted_step_overwrote_cannot_come_back(llama):
    _, ours = llama
    cache = SlidingWindowCache.for_model(ours, 1, window=7, sinks=2)
    fed(ours, cache, TEXT[:20], [20])
    # in the slot of token 13
    cache.begin({0: [0]}).attend(0, *(torch.zeros(1, heads, 10) for heads in (6, 2, 2)))
    with pytest.raises(ValueError, match="length=19"):      # whose next token would see 13 to 19
        cache.truncate(19)


def test_what_a_model_with_a_window_does_not_look_at_is_not_kept_for_it(mistral):
    _, ours = mistral
    with pytest.raises(ValueError,
                       match="window=8, sinks=2: the model looks at the last 9 tokens only"):
        ours.step({0: TEXT}, SlidingWindowCache.for_model(ours, 1, window=8, sinks=2))


def test_a_window_is_asked_for_where_the_model_has_none(llama):
    with pytest.raises(ValueError, match="window=None"):
        SlidingWindowCache.for_model(llama[1], 1)


@pytest.mark.parametrize(("name", "value"), [("layers", 0), ("batch", 0), ("kv_heads", 0),
                                             ("head_dim", 0), ("window", 0), ("sinks", -1)])
def test_sizes_that_no_cache_has_are_refused_by_name(name, value):
    sizes = {"layers": 2, "batch": 1, "kv_heads": 2, "head_dim": 4, "window": 8, "sinks": 0
             } | {name: value}
    with pytest.raises(ValueError, match=f"{name}={value}"):
        SlidingWindowCache(**sizes)


def test_sinks_need_the_frequencies_of_rope():
    with pytest.raises(ValueError, match="sinks=4"):
        SlidingWindowCache(layers=2, batch=1, kv_heads=2, head_dim=4, window=8, sinks=4)


# ---- without end ----


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A model whose context is 55 tokens; TEXT has one and a half times as many."""
    return both(LlamaConfig(**SMALL | {"max_position_embeddings": 55}, eos_token_id=None),
                tmp_path_factory.mktemp("short"))


@pytest.mark.parametrize("pieces", [[20, *[1]*63], [83], [50, 20, 13]],
                         ids=["one by one", "whole", "in pieces"])
def test_a_text_goes_on_beyond_the_models_context_as_the_paper_has_it(short, pieces):
    theirs, ours = short
    cache = SlidingWindowCache.for_model(ours, 1, window=17, sinks=4)
    before = cache.allocated_bytes
    assert_logits_agree(fed(ours, cache, TEXT, pieces), streaming_llm(theirs, TEXT, 17, 4))
    assert cache.lengths == {0: 83} and cache.allocated_bytes == before == 21 * 2 * 3 * 2 * 10 * 4
    with pytest.raises(ValueError, match="the model's context is 55"):
        fed(ours, ContiguousCache.for_model(ours, 1, 90), TEXT, pieces)


def test_generation_goes_on_beyond_the_models_context(short):
    theirs, ours = short
    cache = SlidingWindowCache.for_model(ours, 1, window=17, sinks=4)
    written = generate(ours, TEXT[:20], max_tokens=63, cache=cache).tokens
    logits = streaming_llm(theirs, TEXT[:20] + written[:-1], 17, 4)
    assert written == logits[19:].argmax(-1).tolist()
    with pytest.raises(ValueError, match="together 83, but the model's context is 55"):
        generate(ours, TEXT[:20], max_tokens=63)


def test_a_window_wider_than_the_models_context_ends_with_it(short):
    _, ours = short
    cache = SlidingWindowCache.for_model(ours, 1, window=52, sinks=4)
    with pytest.raises(ValueError,
                       match="0 in the cache and 83 new make 83; the model's context is 55"):
        fed(ours, cache, TEXT, [83])
    with pytest.raises(ValueError, match="the model's context is 55"):          # of 256 and 4
        generate(ours, TEXT[:20], max_tokens=63, cache=CACHES["window"](ours, 1, 83))


def test_the_cache_named_window_never_fills_up(tmp_path):
    _, ours = both(
        LlamaConfig(**SMALL | {"max_position_embeddings": 270, "num_hidden_layers": 1},
                    eos_token_id=None), tmp_path)
    cache = CACHES["window"](ours, 1, 0)
    assert len(generate(ours, TEXT, max_tokens=200, cache=cache).tokens) == 200


def test_ten_million_tokens_on_nothing_has_changed(llama):
    """What is seen lies within a few windows; where these lie in the text must not matter. In fp32
    the angles would be noise."""
    _, ours = llama
    logits = []
    for start in (0, 10_000_000):
        cache = SlidingWindowCache.for_model(ours, 1, window=7)
        cache.length = start
        # three layers of 7 tokens look back 18
        logits.append(fed(ours, cache, TEXT[:40], [20, *[1] * 20])[25:])
    assert_logits_agree(*logits)


def test_a_window_that_holds_all_of_the_text_changes_nothing_for_the_real_model(smollm):
    prompt = "Once upon a time, in a small town by the sea,"
    whole = SlidingWindowCache.for_model(smollm, 1, window=64, sinks=4)
    assert generate(smollm, prompt, max_tokens=10, cache=whole).tokens == generate(
        smollm, prompt, max_tokens=10).tokens


@pytest.mark.parametrize("T", [1, 3])
def test_scores_beside_sinks_are_rounded_no_more_than_any_others(T):
    """In bf16, against fp64 on the same 16-bit numbers: as near as PyTorch's own attention is,
    which keeps its scores in fp32. Rounded to 8 bits, scores of 30 would be off by a tenth."""
    torch.manual_seed(0)
    cache = SlidingWindowCache(1, 1, 2, 64, window=300, sinks=4, dtype=torch.bfloat16,
                               frequencies=10_000.0 ** -(torch.arange(32) / 32))
    keys, values = torch.randn(2, 1, 2, 304, 64).bfloat16()
    q = 4 * torch.randn(T, 4, 64).bfloat16()
    attention = _SinkAttention(cache, torch.arange(5000, 5000 + T)[None])
    turned, mask = attention.turned(q), torch.zeros(1, 1, T, 304, dtype=torch.bfloat16)

    def exact(first):
        sides = [x.double().view(T, 2, 2, 64) for x in (first, q)]
        scores = [torch.einsum("tkgh,ksh->tkgs", x, keys[0].double()) / 8 for x in sides]
        scores = torch.cat((scores[0][..., :4], scores[1][..., 4:]), -1)
        return torch.einsum("tkgs,ksh->tkgh", scores.softmax(-1), values[0].double()).flatten(1)

    ours, theirs = ((out.double() - right).square().mean().sqrt() for out, right in (
        (attention.attend(q, keys, values, mask), exact(turned)),
        (attend(q, keys, values, mask), exact(q))))
    assert ours < 1.5 * theirs
