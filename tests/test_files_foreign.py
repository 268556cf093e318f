"""What others wrote: weights, their index, settings of a tokenizer. It is read, or refused by one
line that names the file, before anything is allocated."""

import json
import os
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.files import chat_template, load_model
from clawdemy_infer.files.directory import destinations, to_hf, write_model
from clawdemy_infer.files.tokenizer import Tokenizer, rendered
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.paths import Refused

V, D = 24, 32
WORDS = ["<s>", "</s>", "<unk>", "<cls>", "<sep>", *"abcdefghijklmnopqrs"]


def write(path, tied=False, biases=()):
    """A model directory with a tokenizer of one word a letter."""
    torch.manual_seed(0)
    shape = ModelShape(name="tiny", source="test", L=2, D=D, N=4, K=2, H=8, F=48, V=V, tied=tied,
                       max_context=64, biases=biases)
    model = Decoder(ModelConfig(shape, eos_ids=(1,), bos_id=0))
    backend = Backend(models.WordLevel(dict(zip(WORDS, range(V), strict=True)), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    path.mkdir(parents=True)
    weights = {name: value.detach().clone() for name, value in destinations(model).items()}
    write_model(path, to_hf(model.config), weights, backend, {"bos_token": "<s>"})
    return path


@pytest.fixture
def directory(tmp_path):
    return write(tmp_path / "tiny")


def edit(file, **changes):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def refused(directory, message):
    with pytest.raises(Refused, match=message) as error:
        load_model(directory)
    assert "\n" not in str(error.value) and error.value.source


# ---- weights ----


def change_weights(directory, change):
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
                                 "model.layers.1.self_attn.v_proj.weight",
                                 "model.layers.0.mlp.down_proj.weight"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_tensor(directory, key, dtype, value):
    def change(weights):
        weights[key] = weights[key].to(dtype)
        weights[key].view(-1)[3] = value
    change_weights(directory, change)
    refused(directory, f"model.safetensors: {key} holds a number that is not finite")


def test_weights_beyond_the_dtype_asked_for_are_refused(directory):
    change_weights(directory, lambda w: w["model.norm.weight"].fill_(7e4))
    load_model(directory)
    with pytest.raises(ValueError, match="model.norm.weight holds .* not finite in torch.float16"):
        load_model(directory, torch.float16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.uint8,
                                   torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(directory, dtype):
    change_weights(directory, lambda w: w.update(
        {"model.norm.weight": torch.ones(D).to(dtype)}))
    refused(directory, f"model.norm.weight={dtype} is not supported; accepted: torch.float64")


def test_what_changes_nothing_is_passed_over(directory):
    ids = torch.tensor([[3, 4, 5]])
    expected = load_model(directory)(ids)

    def add(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(D, dtype=torch.float16)
        weights["model.layers.1.mlp.down_proj.bias"] = torch.zeros(D)
    change_weights(directory, add)
    torch.testing.assert_close(load_model(directory)(ids), expected, rtol=0, atol=0)
    change_weights(directory, lambda w: w["model.layers.1.mlp.down_proj.bias"].view(-1)[-1:].fill_(
        1e-3))
    refused(directory, "down_proj.bias has no place in this model")


HUGE = [{"hidden_size": 2**24}, {"vocab_size": 2**24}, {"intermediate_size": 2**24},
        {"num_hidden_layers": 1_000}, {"num_attention_heads": 10**6}, {"head_dim": 2**24},
        {"num_attention_heads": 2**23, "num_key_value_heads": 2**23}]


@pytest.mark.parametrize("change", HUGE, ids=str)
def test_a_config_that_makes_more_than_the_files_hold_is_refused_before_it_is_built(directory,
                                                                                    change):
    edit(directory / "config.json", **change)
    tracemalloc.start()
    try:
        refused(directory, "config.json: .*" + "".join(
            f"{key}={value}.*" for key, value in change.items() if key in (
                "hidden_size", "vocab_size", "num_hidden_layers")) + "cannot hold")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("layers", [10**6, 2**32, 10**18])
def test_more_layers_than_any_model_has_are_refused(directory, layers):
    edit(directory / "config.json", num_hidden_layers=layers)
    refused(directory, f"num_hidden_layers={layers} is not supported; accepted: ")


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "intermediate_size", "head_dim"])
def test_a_size_beyond_any_models_is_refused(directory, key):
    edit(directory / "config.json", **{key: 10**12})
    refused(directory, f"{key}=1000000000000 is not supported; accepted: a whole number, 1 to")


@pytest.mark.parametrize(("change", "message"), [
    ({"architectures": 5}, "architectures=5"), ({"architectures": [7]}, "architectures=7"),
    ({"architectures": "LlamaModel"}, "architectures='LlamaModel'"),
    ({"eos_token_id": "x"}, "eos_token_id='x'"), ({"eos_token_id": [1, 2.5]}, "eos_token_id=2.5"),
    ({"eos_token_id": [[1]]}, r"eos_token_id=\[1\]"), ({"bos_token_id": True}, "bos_token_id=True"),
    ({"eos_token_id": -1}, "eos_token_id=-1"), ({"model_type": ["llama"]}, "model_type="),
    ({"quantization_config": "x"}, "quantization_config='x'"),
    ({"num_hidden_layers": 3}, "model.layers.2.* has no weights, one of 9"),
    ({"intermediate_size": 47}, r"proj.weight=.*, as config.json makes it"),
])
def test_keys_of_a_wrong_kind_are_refused_by_name(directory, change, message):
    edit(directory / "config.json", **change)
    refused(directory, message)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json",
                                  "special_tokens_map.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["[]", "null", "[" * 50_000, "{", "\xff", '{"a": NaN}',
                                     '{"a": 1e999}'], ids=lambda text: text[:9])
def test_json_that_is_no_object_is_refused_by_file(directory, name, content):
    (directory / name).write_bytes(content.encode("latin-1"))
    refused(directory, name)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json",
                                  "tokenizer_config.json", "chat_template.jinja",
                                  "model.safetensors", "model.safetensors.index.json"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(directory, name):
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    refused(directory, name)


# ---- the index ----


@pytest.mark.parametrize("said", [None, [], {}, "x", 3, {"a": 3}, {"a": None}, {"a": ["b"]},
                                  {"a": "../model.safetensors"}, {"a": "x/../../y"},
                                  {"a": "/etc/passwd"}], ids=str)
def test_an_index_without_files_of_this_folder_is_refused(directory, said):
    edit(directory / "model.safetensors.index.json", **({} if said is None else {
        "weight_map": said}))
    refused(directory, "model.safetensors.index.json: weight_map=.* is not supported")


def test_an_index_of_a_file_that_is_absent_is_refused(directory):
    edit(directory / "model.safetensors.index.json", weight_map={"a": "b.safetensors"})
    refused(directory, "b.safetensors is missing")


def test_links_as_a_hub_cache_has_them_are_followed(directory, tmp_path):
    ids = torch.tensor([[3, 4, 5]])
    expected = load_model(directory)(ids)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    edit(snapshot / "model.safetensors.index.json", weight_map={"a": "model.safetensors"})
    torch.testing.assert_close(load_model(snapshot)(ids), expected, rtol=0, atol=0)


# ---- tokenizers and templates ----

MESSAGES = [{"role": "user", "content": "héllo <b>"}, {"role": "assistant", "content": "b\nc"}]
TEMPLATES = [
    "{{ bos_token }}{{ cls_token }}{% for m in messages %}{{ m.content }}{{ sep_token }}"
    "{% endfor %}",
    "{% for m in messages %}{{ m | tojson(ensure_ascii=True) }}{% endfor %}",
    "{{ messages | tojson(indent=2, sort_keys=True) }}",
    "{{ messages | tojson(separators=(',', ':')) }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = 1 %}"
    "{{ m.content }} {{ x }}\n{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ x }}\n"
    "{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ dict(a=1) }}{{ dict.fromkeys('ab', 2) }}",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}\n  {{ m.role }}\n{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}{% if tools is none %}none{% endif %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("listed", [False, True], ids=["map", "added_tokens_decoder"])
def test_templates_render_as_transformers_renders_them(directory, template, listed):
    more = {"added_tokens_decoder": {"0": {"content": "<s>", "special": True}}} if listed else {}
    edit(directory / "tokenizer_config.json", chat_template=template, sep_token="<sep>",
         unk_token="<unk>", **more)
    edit(directory / "special_tokens_map.json", cls_token="<cls>",
         bos_token={"content": "<unk>", "lstrip": False})
    theirs = AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer.from_directory(directory)
    for prompt in (True, False):
        assert ours.chat_text(MESSAGES, prompt) == theirs.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=prompt)


LIMITS = [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
     "not done after .* s of the processor"),
    ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    ("{{ 'a' * 10**11 }}", "MemoryError"), ("{{ 'a' * 20000000 }}", "more than 10,000,000"),
    ("{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
     "{% endfor %}", "MemoryError|not done after"),     # whichever bound this machine meets first
    ("{{ 1/0 }}", "division by zero"), ("{{ messages[9].x.y }}", "UndefinedError"),
    ("{% if %}", "TemplateSyntaxError"), ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{{ raise_exception('no') }}", "no$"),
    ("{% include 'config.json' %}", "loader"), ("{{ messages | nothing }}", "nothing"),
    ("{{ 'x' | center(10**11) }}", "MemoryError|OverflowError"),
]


@pytest.mark.parametrize(("template", "message"), LIMITS, ids=[m for _, m in LIMITS])
def test_a_template_that_fails_or_never_ends_is_one_line(template, message):
    with pytest.raises(ValueError, match=message) as error:
        rendered(template, {"messages": MESSAGES})
    assert "\n" not in str(error.value)


def test_a_template_that_sleeps_is_ended_by_the_clock(monkeypatch, tmp_path):
    asleep = tmp_path / "asleep.py"
    asleep.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(chat_template, "__file__", str(asleep))
    monkeypatch.setattr("clawdemy_infer.files.tokenizer.MAX_TEMPLATE_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(ValueError, match="not done after 0.5 s"):
        rendered("{{ 1 }}", {})
    assert time.monotonic() - start < 300


def test_the_program_that_renders_imports_nothing_of_ours():
    code = ("import sys, runpy; sys.stdin.close(); runpy.run_path(sys.argv[1], run_name='x'); "
            "print({name.split('.')[0] for name in sys.modules} & {'clawdemy_infer', 'torch'})")
    found = subprocess.run([sys.executable, "-c", code, chat_template.__file__],
                           capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_messages_that_are_no_data_are_refused(directory):
    tokenizer = Tokenizer.from_directory(directory)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="messages=.*not JSON serializable"):
        tokenizer.chat_text([{"role": "user", "content": object()}])


@pytest.mark.parametrize(("change", "message"), [
    ({"chat_template": ["a"]}, r"tokenizer_config.json: chat_template=\['a'\]"),
    ({"chat_template": {"a": 1}}, "chat_template={'a': 1}"), ({"chat_template": 5}, "=5 is not"),
    ({"chat_template": [{"name": "default", "template": 7}]}, "chat_template=7"),
    ({"eos_token": {"a": 1}}, "eos_token={'a': 1}"), ({"pad_token": 0}, "pad_token=0"),
    ({"mask_token": ["x"]}, "mask_token="), ({"eos_token": {"content": 3}}, "eos_token="),
])
def test_settings_of_a_tokenizer_of_a_wrong_kind_are_refused_by_key(directory, change, message):
    edit(directory / "tokenizer_config.json", **change)
    refused(directory, message)


@pytest.mark.parametrize("content", ["{}", "", "[]", '{"model": 1}', '{"version": "1.0"}', "\xff",
                                     '{"model": {"type": "BPE", "vocab": {}, "merges": [1]}}'])
def test_a_tokenizer_that_is_none_is_refused_by_file(directory, content):
    (directory / "tokenizer.json").write_bytes(content.encode("latin-1"))
    refused(directory, "tokenizer.json: no tokenizer")


def test_a_named_template_is_found(directory):
    edit(directory / "tokenizer_config.json", chat_template=[
        {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}])
    assert load_model(directory).tokenizer.chat_text(MESSAGES) == "plain"


# ---- arbitrary damage ----

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)
FUZZ = settings(max_examples=60, deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("fuzz") / "whole")


def loads_or_one_line(directory):
    try:
        return load_model(directory)
    except (ValueError, OSError) as error:
        assert "\n" not in str(error), error


@given(st.data())
@FUZZ
def test_damaged_safetensors_give_a_model_or_one_line(whole, data):
    file = whole / "model.safetensors"
    original = file.read_bytes()
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 12) | st.integers(0, 1500))
        damaged[at:at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    try:
        file.write_bytes(damaged)
        loads_or_one_line(whole)
    finally:
        file.write_bytes(original)


@pytest.mark.parametrize(("name", "keys"), [
    ("config.json", ["num_hidden_layers", "hidden_size", "num_key_value_heads", "rope_scaling",
                     "rope_parameters", "eos_token_id", "architectures", "model_type", "other",
                     "layer_types", "quantization_config", "rope_theta", "hidden_act"]),
    ("generation_config.json", ["eos_token_id", "bos_token_id"]),
    ("tokenizer_config.json", ["chat_template", "eos_token", "added_tokens_decoder", "x_token"]),
    ("special_tokens_map.json", ["eos_token", "cls_token", "additional_special_tokens"]),
    ("model.safetensors.index.json", ["weight_map", "metadata"])])
def test_settings_of_any_kind_give_a_model_or_one_line(whole, name, keys):
    file = whole / name
    original = file.read_text() if file.exists() else None

    @given(st.dictionaries(st.sampled_from(keys), JSON, min_size=1, max_size=3))
    @FUZZ
    def check(change):
        content = json.loads(original) if original else {}
        file.write_text(json.dumps(content | change))
        loads_or_one_line(whole)

    try:
        check()
    finally:
        file.unlink() if original is None else file.write_text(original)


@given(st.data())
@FUZZ
def test_damaged_tokenizers_give_a_model_or_one_line(whole, data):
    file = whole / "tokenizer.json"
    original = file.read_text()
    at = data.draw(st.integers(0, len(original)))
    changed = original[:at] + data.draw(st.text(max_size=6)) + original[at + data.draw(
        st.integers(0, 20)):]
    try:
        file.write_text(changed)
        loads_or_one_line(whole)
    finally:
        file.write_text(original)
