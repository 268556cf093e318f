"""RoPE stretched to longer contexts, each way against transformers: frequencies, logits within and
past the original context, and what no cache could keep right."""

import json

import pytest
import torch
from tolerances import LOGITS
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from clawdemy_infer.batching.request import Request
from clawdemy_infer.batching.serving import engine
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.files import load_model
from clawdemy_infer.files.directory import to_hf
from clawdemy_infer.kv_cache import ContiguousCache, PagedCache
from clawdemy_infer.model import ModelConfig, generate
from clawdemy_infer.model.rope import angular_frequencies

H, ORIGINAL = 16, 32
PAIRS = H // 2
SHORT, LONG = [1 + 0.1 * j for j in range(PAIRS)], [1 + 1.7 * j for j in range(PAIRS)]
SMALL = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 131,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": H, "eos_token_id": None}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
WAYS = {
    "linear": (ORIGINAL, {"rope_type": "linear", "factor": 3.0}),
    "dynamic": (ORIGINAL, {"rope_type": "dynamic", "factor": 4.0}),
    "yarn": (128, YARN),
    "yarn with its own numbers": (128, YARN | {"beta_fast": 5.0, "beta_slow": 0.5,
                                               "attention_factor": 0.8}),
    "yarn not truncated": (128, YARN | {"truncate": False, "beta_fast": 4.0}),
    "yarn with mscale": (128, YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}),
    "yarn with one mscale": (128, YARN | {"mscale": 0.7}),
    "longrope": (128, {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
                       "original_max_position_embeddings": ORIGINAL}),
    "longrope with a factor": (128, {
        "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 1.5,
        "attention_factor": 1.1, "original_max_position_embeddings": ORIGINAL}),
    "llama3": (128, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}),
}
BY_LENGTH = ["dynamic", "longrope", "longrope with a factor"]


def config_of(way, kind=LlamaConfig):
    context, rope = WAYS[way]
    return kind(**SMALL, max_position_embeddings=context,
                rope_parameters=rope | {"rope_theta": 500.0})


def saved(way, path, kind=LlamaConfig):
    torch.manual_seed(len(way))
    model = AutoModelForCausalLM.from_config(config_of(way, kind)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=WAYS)
def directory(request, tmp_path_factory):
    return request.param, saved(request.param, tmp_path_factory.mktemp("rope"))


def theirs(directory):
    """A fresh one each time: with `dynamic`, a transformers model remembers its longest text."""
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def tokens(count, batch=2):
    return torch.randint(0, 131, (batch, count), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("length", [1, ORIGINAL, ORIGINAL + 1, 3 * ORIGINAL])
@pytest.mark.parametrize("way", WAYS)
def test_frequencies_and_gain_are_those_of_transformers(way, length):
    made = config_of(way)
    expected, gain = ROPE_INIT_FUNCTIONS[made.rope_parameters["rope_type"]](made, "cpu", length)
    ours = ModelConfig.from_hf(json.loads(made.to_json_string()))
    found = angular_frequencies(H, ours.rope_theta, ours.rope_scaling, length)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert ours.rope_gain == pytest.approx(gain, rel=1e-12)


@pytest.mark.parametrize("count", [ORIGINAL - 3, ORIGINAL, ORIGINAL + 1, 90])
def test_logits_equal_transformers_within_and_past_the_original_context(directory, count):
    way, path = directory
    ids = tokens(count)
    with torch.no_grad():
        expected = theirs(path)(ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(load_model(path)(ids), expected, **LOGITS[torch.float32])


def test_a_growing_cache_gives_the_logits_that_transformers_gives_with_one(directory):
    """Past the original context too, where keys keep the angles that they were cached with."""
    way, path = directory
    ours, reference, ids = load_model(path), theirs(path), tokens(ORIGINAL + 9)
    cache, past = ContiguousCache.for_model(ours, batch=2, capacity=ORIGINAL + 9), None
    for chunk in ids.split([ORIGINAL - 4] + [1] * 13, dim=1):
        with torch.no_grad():
            answer = reference(chunk, past_key_values=past, use_cache=True)
        past = answer.past_key_values
        torch.testing.assert_close(ours(chunk, cache), answer.logits, **LOGITS[torch.float32])


def test_greedy_tokens_are_those_of_transformers_past_the_original_context(directory):
    way, path = directory
    ids = tokens(ORIGINAL - 5, batch=1)
    with torch.no_grad():
        expected = theirs(path).generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None,
                                         pad_token_id=0)[0, ids.shape[1]:].tolist()
    model = load_model(path)
    assert generate(model, ids[0].tolist(), 24).tokens == expected


@pytest.mark.parametrize("way", ["yarn", "longrope"])
def test_another_family_is_scaled_alike(way, tmp_path):
    path, ids = saved(way, tmp_path, Qwen3Config), tokens(70)
    with torch.no_grad():
        expected = theirs(path)(ids).logits
    torch.testing.assert_close(load_model(path)(ids), expected, **LOGITS[torch.float32])


def test_texts_of_several_lengths_in_one_step_each_have_their_own_angles(tmp_path):
    model = load_model(saved("longrope", tmp_path))
    long, short = tokens(50, 1)[0].tolist(), tokens(20, 1)[0].tolist()
    cache = ContiguousCache.for_model(model, batch=2, capacity=64)
    together = model.step({0: long, 1: short}, cache)
    for row, ids in zip(together, (long, short), strict=True):
        torch.testing.assert_close(row, model(torch.tensor([ids]))[0, -1],
                                   **LOGITS[torch.float32])


@pytest.mark.parametrize("way", BY_LENGTH)
def test_what_a_cache_cannot_keep_right_is_refused_by_one_line(way, tmp_path):
    model = load_model(saved(way, tmp_path))
    ids = tokens(ORIGINAL + 2, 1)
    message = f"make {ORIGINAL + 2}; beyond {ORIGINAL} this model's RoPE depends on"
    cache = ContiguousCache.for_model(model, batch=1, capacity=64)
    model(ids[:, :10], cache)
    with pytest.raises(ValueError, match=message):                      # a second piece of a prompt
        model(ids[:, 10:], cache)
    assert cache.length == 10
    paged = PagedCache.for_model(model, batch=1, capacity=64)
    with pytest.raises(ValueError, match=message):
        model(ids, paged)
    model(ids[:, :ORIGINAL], paged)                                     # within it all is well


@pytest.mark.parametrize("way", BY_LENGTH)
def test_an_engine_refuses_a_request_that_would_leave_the_original_context(way, tmp_path):
    serving = engine(load_model(saved(way, tmp_path)))
    refused = serving.add(Request("long", list(range(20)), ORIGINAL))
    assert f"the model's context is {ORIGINAL}" in refused.reason
    taken = serving.add(Request("short", list(range(20)), 4))
    serving.run()
    assert len(taken.tokens) == 4


@pytest.mark.parametrize("way", ["yarn", "longrope", "dynamic", "linear"])
def test_the_compiled_step_has_the_same_angles(way, tmp_path):
    model, ids = load_model(saved(way, tmp_path)), tokens(ORIGINAL + 6, 1)
    fast = faster(model, compile=True)
    for count in (ORIGINAL - 2, ORIGINAL + 6):
        torch.testing.assert_close(fast(ids[:, :count]), model(ids[:, :count]),
                                   **LOGITS[torch.float32])


@pytest.mark.parametrize("way", WAYS)
def test_a_scaling_survives_the_way_to_hugging_face_and_back(way):
    config = ModelConfig.from_hf(json.loads(config_of(way).to_json_string()))
    said = json.loads(json.dumps(to_hf(config)))
    back = ModelConfig.from_hf(said)
    assert (back.rope_scaling, back.shape.max_context) == (config.rope_scaling,
                                                           config.shape.max_context)
    kind = said["rope_scaling"]["rope_type"]
    expected, _ = ROPE_INIT_FUNCTIONS[kind](config_of(way), "cpu", 90)
    found, _ = ROPE_INIT_FUNCTIONS[kind](LlamaConfig(**said), "cpu", 90)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("way", "context"), [("linear", 96), ("dynamic", 128), ("yarn", 128),
                                              ("longrope", 128), ("llama3", 128)])
def test_a_model_runs_as_far_as_its_scaling_reaches(way, context):
    config = ModelConfig.from_hf(json.loads(config_of(way).to_json_string()))
    assert config.shape.max_context == context


LLAMA = {"model_type": "llama", **SMALL, "rms_norm_eps": 1e-5, "max_position_embeddings": 128}
LONGROPE = WAYS["longrope"][1]
REFUSED = [
    ({"rope_type": "linear"}, "rope_scaling: factor is missing"),
    ({"rope_type": "linear", "factor": "2"}, "factor='2' is not supported"),
    ({"rope_type": "linear", "factor": 2.0, "beta_fast": 1.0}, "beta_fast=1.0"),
    ({"rope_type": "dynamic", "factor": -1}, "factor=-1"),
    ({"rope_type": ["llama3"]}, r"rope_type=\"\['llama3'\]\" is not supported; accepted: default"),
    ({"rope_type": "ntk"}, "rope_type='ntk' is not supported; accepted: default, linear"),
    ({"rope_type": "yarn", "type": "linear", "factor": 2.0}, "rope_type="),
    (YARN | {"truncate": "no"}, "truncate='no'"),
    (YARN | {"mscale": "x"}, "mscale='x'"),
    (YARN | {"original_max_position_embeddings": 0}, "original_max_position_embeddings=0"),
    (LONGROPE | {"short_factor": SHORT[1:]}, "short_factor=.* accepted: 8 numbers above 0"),
    (LONGROPE | {"long_factor": [0] * PAIRS}, "long_factor="),
    (LONGROPE | {"long_factor": {"a": 1}}, "long_factor="),
    (LONGROPE | {"original_max_position_embeddings": 1}, "original_max_position_embeddings=1"),
]


@pytest.mark.parametrize(("rope", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_a_scaling_that_makes_no_sense_is_refused_by_key(rope, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(LLAMA | {"rope_scaling": rope})
