"""GGUF files that are odd or damaged: a model, or one line that names the file and the key."""

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf_file import TYPE, pack_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from clawdemy_infer.files import load_model
from clawdemy_infer.files.gguf import Header
from clawdemy_infer.paths import Refused, cache_dir


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAWDEMY_CACHE", str(tmp_path / "cache"))


def test_a_file_packed_from_the_specification_is_read(tmp_path):
    path = pack_gguf(tmp_path / "m.gguf")
    model = load_model(path)
    assert model(torch.tensor([[0, 1, 2]])).isfinite().all()
    values = gguf.GGUFReader(path).tensors[0].data                      # another reader
    assert torch.equal(model.embed.weight, torch.from_numpy(np.array(values)))
    assert model.tokenizer.encode("ab") == [2]


@pytest.mark.parametrize(("more", "ends"), [
    ({}, (4,)),
    ({"tokenizer.ggml.eot_token_id": 5}, (4, 5)),
    ({"tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.eom_token_id": 2}, (4, 2)),
    ({"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.eot_token_id": 5}, (5,)),
    ({"tokenizer.ggml.eos_token_id": None}, ())], ids=str)
def test_every_token_that_ends_a_text_is_one(tmp_path, more, ends):
    assert load_model(pack_gguf(tmp_path / "m.gguf", more)).config.eos_ids == ends


HEADS, TOKENS = "llama.attention.head_count", "tokenizer.ggml.tokens"
REFUSED = [
    ({HEADS: None}, f"{HEADS} is missing"),
    ({HEADS: 0}, f"{HEADS}=0 is not supported"),
    ({HEADS: "two"}, f"{HEADS}='two' is not supported"),
    ({HEADS: 2.0}, f"{HEADS}=2.0 is not supported"),
    ({HEADS: True}, f"{HEADS}=True is not supported"),
    ({HEADS: [2, 2]}, rf"{HEADS}=\[2, 2\] is not supported"),
    ({HEADS: 3}, "head_dim is missing"),
    ({HEADS + "_kv": "1"}, f"{HEADS}_kv='1' is not supported"),
    ({HEADS + "_kv": 3}, "num_key_value_heads=3 is not supported"),
    ({"llama.block_count": 2**32 - 1}, "llama.block_count=4294967295 is not supported"),
    ({"llama.block_count": 1000}, "num_hidden_layers=1000, .* which .*m.gguf .* cannot hold"),
    ({"llama.block_count": 2}, "model.layers.1.input_layernorm.weight has no weights, one of 9"),
    ({"llama.embedding_length": 2**24}, "hidden_size=16777216, .* cannot hold"),
    ({"llama.feed_forward_length": 2**31}, "llama.feed_forward_length=2147483648 is not"),
    ({"llama.feed_forward_length": 64}, r"gate_proj.weight=\[32, 32\] .*: \[64, 32\]"),
    ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base=nan is not supported"),
    ({"llama.attention.layer_norm_rms_epsilon": float("inf")}, "epsilon=inf is not supported"),
    ({"llama.context_length": None}, "llama.context_length is missing"),
    ({"llama.vocab_size": 7}, "llama.vocab_size=7 .* what vocab_size says: 6"),
    ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn' is not supported"),
    ({TOKENS: None}, f"{TOKENS} is missing"),
    ({TOKENS: "abc"}, f"{TOKENS}='abc' is not supported"),
    ({TOKENS: [1, 2, 3]}, f"{TOKENS}=1 is not supported"),
    ({TOKENS: []}, rf"{TOKENS}=\[\] is not supported"),
    ({"tokenizer.ggml.merges": ["ab"]}, "tokenizer.ggml.merges='ab' is not supported"),
    ({"tokenizer.ggml.merges": ["a c"]}, "tokenizer.ggml.merges='a c' is not supported"),
    ({"tokenizer.ggml.merges": [3]}, "tokenizer.ggml.merges=3 is not supported"),
    ({"tokenizer.ggml.token_type": [1, 1]},
     r"tokenizer.ggml.token_type=\[1, 1\] is not supported; accepted: .* each of the 6 tokens"),
    ({"tokenizer.ggml.bos_token_id": 6}, "tokenizer.ggml.bos_token_id=6 is not supported"),
    ({"tokenizer.ggml.padding_token_id": "x"}, "padding_token_id='x' is not supported"),
    ({"tokenizer.ggml.eot_token_id": "x"}, "eot_token_id='x' is not supported"),
    ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
     "tokenizer.ggml.bos_token_id is missing"),
    ({"tokenizer.chat_template": 5}, "tokenizer.chat_template=5 is not supported"),
    ({"tokenizer.ggml.pre": ["gpt-2"]}, r"pre=\['gpt-2'\] is not supported"),
    ({"general.architecture": ["llama"]}, r"general.architecture=\['llama'\] is not supported"),
    ({"general.alignment": 0}, "general.alignment=0"),
    ({"x": [[1, 2], [3]]}, "x: a list of type 9 is not supported"),
    ({"x": struct.pack("<IIQ", 9, 0, 2**62)}, "x: it ends too early"),
    ({"x": struct.pack("<IIQ", 9, 9, 2**62) * 2000}, "x: a list of type 9 is not supported"),
    ({"x": struct.pack("<IQ", 8, 2**63)}, "x: it ends too early"),
    ({"x": struct.pack("<I", 77)}, "x: there is no type 77"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_odd_metadata_are_refused_by_file_and_key_and_nothing_is_kept(tmp_path, change, message):
    path = pack_gguf(tmp_path / "m.gguf", change)
    with pytest.raises(Refused, match=f"m.gguf: .*{message}") as error:
        load_model(path)
    assert "\n" not in str(error.value) and str(error.value.source) == str(path)
    assert list((cache_dir() / "models").iterdir()) == []


NORM = "output_norm.weight"
TENSORS = [
    ({"blk.0.attn_q.weight": ((32, 30), 0, bytes(32 * 30 * 4))}, r"q_proj.weight=\[30, 32\] is"),
    ({"blk.0.attn_q.weight": ((32,), 0, bytes(128))}, r"q_proj.weight=\[32\] is not supported"),
    ({NORM: ((32,), 0, np.full(32, np.inf, "<f4").tobytes())}, "norm.weight holds a number"),
    ({NORM: ((32,), 99, bytes(128))}, r"'output_norm.weight': \[32\] of type 99 is none"),
    ({NORM: ((2**33, 2**33), 0, bytes(128))}, "it ends too early"),
    ({NORM: ((0,), 0, b"")}, r"norm.weight=\[0\] is not supported"),
    ({NORM: ((32, 1, 1, 1, 1), 0, bytes(128))}, "of type 0 is none"),
    ({NORM: ((32,), 24, bytes(32))}, "output_norm.weight='I8' .*; accepted: F32"),
]


@pytest.mark.parametrize(("tensors", "message"), TENSORS, ids=[m for _, m in TENSORS])
def test_odd_tensors_are_refused_by_name(tmp_path, tensors, message):
    with pytest.raises(Refused, match=f"m.gguf: .*{message}"):
        load_model(pack_gguf(tmp_path / "m.gguf", tensors=tensors))


SCALED = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS IQ2_XXS IQ3_S TQ1_0 TQ2_0"


@pytest.mark.parametrize("name", ["F16", "BF16", *SCALED.split()])
def test_a_block_whose_scale_is_not_finite_is_refused_in_every_format(tmp_path, name):
    """All bits of a block are ones, and so are those of its scale in fp16: no number."""
    kind = TYPE[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    width = max(block, 32)
    path = pack_gguf(tmp_path / "m.gguf", {"llama.feed_forward_length": width}, {
        "blk.0.ffn_gate.weight": ((32, width), 0, bytes(4 * 32 * width)),
        "blk.0.ffn_up.weight": ((32, width), 0, bytes(4 * 32 * width)),
        "blk.0.ffn_down.weight": ((width, 32), kind, b"\xff" * (32 * width // block * size))})
    with pytest.raises(ValueError, match="down_proj.weight holds a number that is not finite"):
        load_model(path)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_give_a_model_or_one_line(tmp_path_factory, data):
    whole = pack_gguf(tmp_path_factory.getbasetemp() / "whole.gguf").read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 1400))                            # the head has 1,500 bytes
        content = data.draw(st.binary(max_size=9) | st.sampled_from(
            [struct.pack("<Q", n) for n in (0, 1, 2**31, 2**32, 2**63, 2**64 - 1)]))
        length = data.draw(st.integers(0, 12))
        damaged[at:at + length] = content
    damaged = damaged[:data.draw(st.integers(len(damaged) // 2, len(damaged)) | st.none())]
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(damaged)
    try:
        load_model(path)
    except ValueError as error:
        assert "\n" not in str(error) and "damaged.gguf" in str(error)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_head_or_a_value_error(content):
    try:
        Header(b"GGUF" + struct.pack("<I", 3) + content).read()
    except ValueError:
        pass
