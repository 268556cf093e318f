"""Every family against transformers: prefill, decode step by step, and anything between, on small
random models."""

import json

import pytest
import torch
from tolerances import LOGITS
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from clawdemy_infer.files import load_model
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.model.rope import angular_frequencies

SMALL = {
    "hidden_size": 60, "intermediate_size": 84, "num_hidden_layers": 3, "vocab_size": 131,
    "max_position_embeddings": 256, "num_attention_heads": 6, "num_key_value_heads": 2,
    "tie_word_embeddings": False
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32
}
FAMILIES = {
    "llama 2: MHA": LlamaConfig(**SMALL | {"num_key_value_heads": 6}),
    "llama: MQA, tied": LlamaConfig(**SMALL
                                    | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama 3.1: GQA, scaled rope": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "mistral: window 7": MistralConfig(**SMALL, sliding_window=7),
    "mistral: no window": MistralConfig(**SMALL, sliding_window=None),
    "qwen2: bias, tied": Qwen2Config(**SMALL | {"tie_word_embeddings": True}),
    "qwen2: window 5 in all layers": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=5,
                                                 max_window_layers=0),
    "qwen3: norms on Q and K, explicit head_dim": Qwen3Config(**SMALL, head_dim=16),
    "qwen3: tied, MHA": Qwen3Config(
        **SMALL | {"num_key_value_heads": 6, "tie_word_embeddings": True}, head_dim=8),
}
PROMPT = 19         # longer than either window, and no multiple of anything


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, tmp_path_factory):
    """A random checkpoint of one family. Norms and biases are random too: at their initial 1 and 0
    they would hide mistakes."""
    torch.manual_seed(sum(map(ord, request.param)))
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    path = tmp_path_factory.mktemp("family")
    model.save_pretrained(path)
    return path


def both(directory, dtype, batch=3, tokens=PROMPT):
    ours = load_model(directory, dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    ids = torch.randint(0, 131, (batch, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return ours, ids, theirs(ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefill_logits_equal_transformers(directory, dtype):
    ours, ids, expected = both(directory, dtype)
    assert expected.float().std() > 0.3         # logits that differ, or equality would mean nothing
    torch.testing.assert_close(ours(ids), expected, **LOGITS[dtype])


def test_the_parameters_are_as_many_as_the_shape_counts_and_transformers_has(directory):
    ours, theirs = load_model(directory), AutoModelForCausalLM.from_pretrained(directory)
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == theirs.num_parameters() == ours.config.shape.parameters()


@pytest.mark.parametrize("chunks", [[PROMPT], [1] * PROMPT, [7, 5, 7], [12, 1, 1, 5]], ids=str)
def test_logits_with_a_cache_equal_transformers_however_the_tokens_are_cut(directory, chunks):
    ours, ids, expected = both(directory, torch.float32)
    cache = ContiguousCache.for_model(ours, batch=3, capacity=PROMPT + 4)
    logits = torch.cat([ours(chunk, cache) for chunk in ids.split(chunks, dim=1)], dim=1)
    assert cache.length == PROMPT
    torch.testing.assert_close(logits, expected, **LOGITS[torch.float32])


def test_decode_in_bf16_is_as_near_to_fp32_as_transformers_is(directory):
    ours, ids, theirs = both(directory, torch.bfloat16)
    _, _, exact = both(directory, torch.float32)
    cache = ContiguousCache.for_model(ours, batch=3, capacity=PROMPT)
    logits = torch.cat([ours(chunk, cache) for chunk in ids.split(1, dim=1)], dim=1)
    torch.testing.assert_close(logits, theirs, **LOGITS[torch.bfloat16])
    our_error, their_error = ((x.float() - exact).square().mean().sqrt() for x in (logits, theirs))
    assert our_error < 1.3 * their_error


def test_last_only_gives_the_last_position_alone(directory):
    ours, ids, expected = both(directory, torch.float32)
    logits = ours(ids, last_only=True)
    assert logits.shape == (3, 1, 131)
    torch.testing.assert_close(logits, expected[:, -1:], **LOGITS[torch.float32])


def test_a_truncated_cache_goes_on_as_if_the_rest_had_never_been(directory):
    ours, ids, expected = both(directory, torch.float32)
    cache = ContiguousCache.for_model(ours, batch=3, capacity=PROMPT + 6)
    ours(torch.cat([ids[:, :11], ids.flip(1)[:, :6]], dim=1), cache)
    cache.truncate(11)
    torch.testing.assert_close(ours(ids[:, 11:], cache), expected[:, 11:], **LOGITS[torch.float32])


def test_llama_3_1s_own_frequencies_equal_transformers():
    """Meta's published numbers, at the real head dimension."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from clawdemy_infer.model.config import RopeScaling

    theirs = LlamaConfig(
        head_dim=128, max_position_embeddings=131072, rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
        })
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    torch.testing.assert_close(
        angular_frequencies(128, 500000.0, RopeScaling("llama3", 8.0, 8192)), expected, rtol=1e-6,
        atol=0)


def test_the_old_spelling_of_scaled_rope_gives_the_same_model(tmp_path):
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(
        FAMILIES["llama 3.1: GQA, scaled rope"]).save_pretrained(tmp_path)
    ids = torch.arange(60)[None]
    new = load_model(tmp_path)(ids)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    file.write_text(json.dumps(config))
    torch.testing.assert_close(load_model(tmp_path)(ids), new, rtol=0, atol=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    AutoModelForCausalLM.from_config(
        LlamaConfig(**SMALL | {"max_position_embeddings": 12})).save_pretrained(path)
    return load_model(path)


@pytest.mark.parametrize(("tokens", "message"),
                         [(torch.tensor([[3, 131]]), r"tokens hold 131: ids from 0 to V-1 = 130"),
                          (torch.tensor([[3, -1]]), r"tokens hold -1"),
                          (torch.tensor([3, 4]), r"tokens \[2\]"),
                          (torch.zeros(1, 0, dtype=torch.int64), r"tokens \[1, 0\]"),
                          (torch.zeros(1, 3), r"torch.float32"),
                          (torch.zeros(1, 13, dtype=torch.int64),
                           r"0 in the cache and 13 new make 13; the model's context is 12"), ],
                         ids=["unknown", "negative", "no batch", "none", "no ids", "too many"])
def test_tokens_the_model_cannot_take_are_refused_by_value(tiny, tokens, message):
    with pytest.raises(ValueError, match=message):
        tiny(tokens)


def test_tokens_the_cache_cannot_take_are_refused_and_it_stays_as_it_was(tiny):
    cache = ContiguousCache.for_model(tiny, batch=2, capacity=5)
    tiny(torch.tensor([[1, 2, 3], [4, 5, 6]]), cache)
    with pytest.raises(ValueError, match="it holds 3 tokens of at most 5, and 3 more do not fit"):
        tiny(torch.tensor([[1, 2, 3], [4, 5, 6]]), cache)
    with pytest.raises(ValueError, match="1 sequences, but the cache was made for 2"):
        tiny(torch.tensor([[1]]), cache)
    assert cache.length == 3
