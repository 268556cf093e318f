"""Checkpoints in the layouts of GPTQ and AWQ: unpacked bit by bit by a reader written from their
definition, and run by transformers."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tolerances import LOGITS
from transformers import AutoConfig, LlamaForCausalLM

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.cli import main as cli
from clawdemy_infer.fast.quantized import on_kernels
from clawdemy_infer.files.directory import destinations, to_hf
from clawdemy_infer.files.layouts import from_gptq, to_awq, to_gptq
from clawdemy_infer.model import Decoder, ModelConfig, generate
from clawdemy_infer.model.config import RopeScaling
from clawdemy_infer.paths import Refused
from clawdemy_infer.quantization import (
    IntFormat,
    Quantized,
    QuantizedModel,
    awq,
    format_named,
    gptq,
    round_to_nearest,
)
from clawdemy_infer.rigs.checkpoint import is_quantized, load_quantized, save_quantized

TOKENS = torch.randint(0, 101, (3, 31), generator=torch.Generator().manual_seed(1))


def tiny(V=101, D=96, N=6, K=2, F=160, **more):
    torch.manual_seed(0)
    shape = ModelShape(name="tiny", source="test", L=2, D=D, N=N, K=K, H=16, F=F, V=V, tied=True,
                       max_context=64, **more)
    return Decoder(ModelConfig(shape)).eval().requires_grad_(False)


def bits_of(column, bits):
    """Numbers of `bits` bits out of one column of 32-bit words: a stream, the first number in the
    lowest bits of the first word."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(column))
    return [stream >> (bits * i) & (2**bits - 1) for i in range(32 * len(column) // bits)]


def read_gptq(stored, bits, version=1):
    codes = torch.tensor([bits_of(column, bits) for column in stored["qweight"].T])         # [O, I]
    # [G, O]
    zeros = torch.tensor([bits_of(row, bits) for row in stored["qzeros"]]) + (version == 1)
    group = stored["g_idx"].long()
    return (codes - zeros.T[:, group]) * stored["scales"].T.float()[:, group]


def read_awq(stored):
    def nibbles(words):
        """[rows, n] of words [rows, n/8]: the i-th lowest four bits hold output 0 2 4 6 1 3 5 7 of
        the eight."""
        out = torch.empty(words.shape[0], words.shape[1] * 8, dtype=torch.long)
        for i, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out[:, place::8] = (words.long() >> (4 * i)) & 15
        return out

    scales = stored["scales"].float()                                   # [G, O]
    repeat = stored["qweight"].shape[0] // len(scales)
    return ((nibbles(stored["qweight"]) - nibbles(stored["qzeros"]).repeat_interleave(repeat, 0))
            * scales.repeat_interleave(repeat, 0)).T


@pytest.mark.parametrize("name", [
    "int2-g16", "int3-g32", "int3-g32-asym", "int4-g32", "int4-g16-asym", "int4", "int8-g32-asym",
    "int8"
])
def test_the_gptq_layout_means_the_same_to_another_reader(name):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    quantized = Quantized.of(format_named(name), weight)
    stored = to_gptq(quantized)
    assert torch.equal(read_gptq(stored, quantized.format.bits), quantized.dequantize())
    assert torch.equal(from_gptq(stored, quantized.format).dequantize(), quantized.dequantize())


@pytest.mark.parametrize("name", ["int4-g32", "int4-g16-asym", "int4"])
def test_the_awq_layout_means_the_same_to_another_reader(name):
    quantized = Quantized.of(format_named(name),
                             torch.randn(24, 96, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(read_awq(to_awq(quantized)), quantized.dequantize())


def test_awq_word_by_hand():
    # AutoAWQ: the outputs 0 1 2 3 4 5 6 7 make the word 0x75316420.
    quantized = Quantized(IntFormat(4, None, "integer"),
                          torch.arange(8, dtype=torch.uint8)[:, None].repeat(1, 8), torch.ones(
                              8, 1), torch.zeros(8, 1))
    assert to_awq(quantized)["qweight"][0].item() == 0x75316420


def test_a_zero_point_of_0_asks_for_version_2():
    weight = torch.rand(32, 32) + 0.1  # all positive: the grid begins at 0
    quantized = Quantized.of(IntFormat(4, 32, "integer"), weight)
    assert (quantized.zero == 0).all()
    stored = to_gptq(quantized, version=2)
    assert torch.equal(read_gptq(stored, 4, version=2), quantized.dequantize())


@pytest.mark.parametrize("positive, written_as", [(False, "gptq"), (True, "gptq_v2")])
def test_a_model_with_zero_points_of_0_is_saved_so_that_a_reader_finds_them(positive, written_as,
                                                                            tmp_path):
    model = tiny()
    if positive:                                            # one matrix whose grids begin at 0
        model.layers[1].down.weight.abs_()
    result = round_to_nearest(model, format_named("int4-g32-asym"))
    kept = result.tensors["layers.1.down"]
    assert bool((kept.zero == 0).any()) == positive
    directory = save_quantized(result, tmp_path / "out", "gptq")
    said = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert said["checkpoint_format"] == written_as
    stored = load_file(directory / "model.safetensors")
    stored = {key: stored[f"model.layers.1.mlp.down_proj.{key}"]
              for key in ("qweight", "qzeros", "scales", "g_idx")}
    version = 2 if written_as == "gptq_v2" else 1
    assert torch.equal(read_gptq(stored, 4, version), kept.dequantize())
    assert torch.equal(load_quantized(directory).tensors["layers.1.down"].dequantize(),
                       kept.dequantize())


METHODS = {
    "rtn": (lambda m, f: round_to_nearest(m, f), "int4-g32", "gptq"),
    "gptq": (lambda m, f: gptq(m, TOKENS, f), "int3-g32", "gptq"),
    "gptq-g_idx": (lambda m, f: gptq(m, TOKENS, f, static_groups=False), "int4-g32-asym", "gptq"),
    "awq": (lambda m, f: awq(m, TOKENS, f), "int4-g32-asym", "awq"),
    "awq-symmetric": (lambda m, f: awq(m, TOKENS, f), "int4-g32", "awq"),
}


@pytest.fixture(scope="module", params=METHODS)
def saved(request, tmp_path_factory):
    method, format, layout = METHODS[request.param]
    result = method(tiny(), format_named(format))
    return result, layout, save_quantized(result,
                                          tmp_path_factory.mktemp("quantized")/request.param,
                                          layout)


def test_what_is_saved_is_loaded_code_for_code(saved):
    result, _, directory = saved
    loaded = load_quantized(directory)
    assert loaded.format == result.format and loaded.method == result.method
    assert loaded.bits_per_weight == result.bits_per_weight
    for name, tensor in result.tensors.items():
        assert torch.equal(loaded.tensors[name].dequantize(), tensor.dequantize()), name
    expected = result.decoder(TOKENS)
    torch.testing.assert_close(
        loaded.decoder(TOKENS)/expected.std(), expected/expected.std(), **LOGITS[torch.float16])


def test_another_reader_and_transformers_run_what_is_saved(saved):
    result, layout, directory = saved
    config = json.loads((directory / "config.json").read_text())
    said = config.pop("quantization_config")
    assert (said["quant_method"], said["bits"], said["group_size"]) == (layout, result.format.bits,
                                                                        32)
    assert said["desc_act"] == (result.tensors["layers.0.qkv"].group_of
                                is not None) if layout == "gptq" else said["zero_point"]
    tensors, weights = load_file(directory / "model.safetensors"), {}
    for key in tensors:
        stem, _, kind = key.rpartition(".")
        if kind == "qweight":
            stored = {
                name: tensors[f"{stem}.{name}"]
                for name in ("qweight", "qzeros", "scales", "g_idx")
                if f"{stem}.{name}" in tensors
            }
            version = 2 if said.get("checkpoint_format") == "gptq_v2" else 1
            weights[f"{stem}.weight"] = read_awq(stored) if layout == "awq" else read_gptq(
                stored, said["bits"], version)
        elif kind == "weight":
            weights[key] = tensors[key].float()
    theirs = LlamaForCausalLM(AutoConfig.for_model(**config | {"dtype": "float32"})).eval()
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected             # tied
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    ours = load_quantized(directory).decoder(TOKENS)
    torch.testing.assert_close(ours/expected.std(), expected/expected.std(),
                               **LOGITS[torch.float32])


def test_a_loaded_checkpoint_runs_on_the_int4_kernels(saved):
    result, _, directory = saved
    loaded = load_quantized(directory)
    if result.format.bits == 4 and loaded.tensors["layers.0.qkv"].group_of is None:
        expected = loaded.decoder(TOKENS)
        torch.testing.assert_close(
            on_kernels(loaded)(TOKENS)/expected.std(), expected/expected.std(),
            **LOGITS[torch.bfloat16])


@pytest.mark.parametrize(
    "more",
    [{}, {"window": 40}, {"biases": ("qkv",)}, {"qk_norm": True},
     {"biases": ("qkv",), "window": 40}])
def test_a_config_survives_the_way_to_hugging_face_and_back(more):
    scaling = RopeScaling("llama3", 8.0, 32) if not more else None
    config = ModelConfig(tiny(**more).config.shape, 1e-5, 5e5, scaling, bos_id=1, eos_ids=(2, 3))
    said = json.loads(json.dumps(to_hf(config)))
    back = ModelConfig.from_hf(said, name="tiny", source="test")
    assert back == config
    assert AutoConfig.for_model(**said).architectures == said["architectures"]


# ---- what is refused ----


@pytest.mark.parametrize(
    "format, layout, said",
    [("mxfp4", "gptq", "format='mxfp4' .*integers of 2, 3, 4, 8 bits.* the gptq layout"),
     ("int4-g32-float", "gptq", "format='int4-g32-float'"),
     ("int3-g32", "awq", "format='int3-g32' .*integers of 4 bits.* the awq layout"),
     ("int5-g32", "gptq", "format='int5-g32'"), ("nf4", None, "format='nf4' .*the gptq layout"),
     ("int4-g32", "gguf", "layout='gguf' is not supported; accepted: gptq, awq"), ])
def test_what_a_layout_cannot_hold_is_refused_and_nothing_is_written(format, layout, said,
                                                                     tmp_path):
    with pytest.raises(ValueError, match=said):
        save_quantized(round_to_nearest(tiny(D=64, N=4, F=128), format_named(format)),
                       tmp_path / "out", layout)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_exists_is_not_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out=.*a directory that does not exist yet"):
        save_quantized(round_to_nearest(tiny(), IntFormat(4, 32)), tmp_path / "out")


def test_a_width_that_does_not_fill_its_words_is_refused(tmp_path):
    model = tiny(D=36, N=2, K=1, F=64)  # 36 inputs are four and a half words
    with pytest.raises(ValueError, match="multiple of 8 inputs"):
        save_quantized(round_to_nearest(model, IntFormat(4)), tmp_path / "out")


def broken(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("change, said", [
    ({"quant_method": "exl2"}, "quant_method='exl2' is not .* gptq, awq"),
    ({"quant_method": "packed", "format": "nf4"}, "quant_method='packed' is not .* gptq, awq"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
    ({"bits": 40}, "bits=40"), ({"quant_method": "awq", "version": "gemv"}, "version='gemv'"),
])
def test_a_checkpoint_of_another_kind_is_refused(change, said, tmp_path):
    directory = save_quantized(round_to_nearest(tiny(), IntFormat(4, 32)), tmp_path / "out")
    with pytest.raises(ValueError, match=said):
        load_quantized(broken(directory, lambda config: config.update(change)))


def test_symmetric_is_believed_only_with_the_zero_points_that_go_with_it(tmp_path):
    directory = save_quantized(round_to_nearest(tiny(), IntFormat(4, 32, "integer")),
                               tmp_path/"out")
    with pytest.raises(ValueError, match="qzeros holds .* symmetric"):
        load_quantized(broken(directory, lambda config: config.update(sym=True)))


def test_missing_tensors_and_directories_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_quantized(tmp_path / "nowhere")
    directory = save_quantized(round_to_nearest(tiny(), IntFormat(4, 32)), tmp_path / "out")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight"):
        load_quantized(directory)


@pytest.mark.parametrize("key", ["self_attn.q_proj.scales", "mlp.up_proj.qzeros"])
def test_a_matrix_without_its_scales_is_named(key, tmp_path):
    directory = save_quantized(round_to_nearest(tiny(), IntFormat(4, 32)), tmp_path / "out")
    tensors = load_file(directory / "model.safetensors")
    del tensors[f"model.layers.1.{key}"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.layers.1.{key} is missing"):
        load_quantized(directory)


# ---- zero points, groups and the head, as other programs write them ----


def edited(directory, change, **keys):
    """A checkpoint with other tensors, and other keys of its quantization_config."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: each.contiguous() for name, each in tensors.items()},
              directory / "model.safetensors")
    return broken(directory, lambda config: config.update(keys))


def words(fields, bits, less=0):
    """int32 words [G, n·bits/32] of fields [G, n], by hand; `less` is taken off each word (or, for
    3 bits, three words) as a whole number."""
    size = 96 if bits == 3 else 32
    per = size // bits
    rows = []
    for row in fields.tolist():
        out = []
        for start in range(0, len(row), per):
            number = sum(code << (bits * i) for i, code in enumerate(row[start:start + per]))
            number = (number - less * sum(1 << (bits * i) for i in range(per))) % 2**size
            out += [(number >> at) % 2**32 for at in range(0, size, 32)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in out])
    return torch.tensor(rows, dtype=torch.int32)


def gptq_parts(bits, zeros, seed=0):
    """A stored matrix [O, 64] in two groups with these zero points [2, O], and what it means."""
    rng, O = torch.Generator().manual_seed(seed), zeros.shape[1]
    codes = torch.randint(0, 2**bits, (O, 64), generator=rng)
    scales = torch.rand(2, O, generator=rng).half()
    meant = (codes - zeros.T.repeat_interleave(32, 1)) * scales.T.float().repeat_interleave(32, 1)
    return {"qweight": words(codes, bits).T.contiguous(), "scales": scales}, meant


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("smallest", [0, 1])
def test_version_1_is_undone_word_by_word_also_where_a_zero_point_is_0(bits, smallest):
    zeros = torch.randint(smallest, 2**bits, (2, 96), generator=torch.Generator().manual_seed(bits))
    zeros[:, ::7] = smallest
    stored, meant = gptq_parts(bits, zeros)
    format = IntFormat(bits, 32, "integer")
    found = from_gptq(stored | {"qzeros": words(zeros, bits, less=1)}, format, version=1)
    assert torch.equal(found.dequantize(), meant)
    if smallest:                        # then nothing is borrowed, and code by code is the same
        assert torch.equal(words(zeros, bits, less=1), words(zeros - 1, bits))
    found = from_gptq(stored | {"qzeros": words(zeros, bits)}, format, version=2)
    assert torch.equal(found.dequantize(), meant)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_that_wrote_over_their_neighbours_are_recognised(bits):
    """AutoGPTQ's `pack`: (zero - 1) as uint32, shifted and or-ed into the word, so that -1 sets all
    bits above."""
    zeros = torch.randint(0, 2**bits, (2, 96), generator=torch.Generator().manual_seed(bits))
    zeros[:, 0] = 0
    rows = []
    for row in zeros.tolist():
        out, at = [0] * (96 * bits // 32), 0
        for zero in row:
            word, shift = divmod(at, 32)
            code = (zero - 1) % 2**32
            out[word] |= code << shift & 0xFFFFFFFF
            if shift + bits > 32:
                out[word + 1] |= code % 2**bits >> (32 - shift)
            at += bits
        rows.append([word - 2**32 if word >= 2**31 else word for word in out])
    stored, _ = gptq_parts(bits, zeros)
    with pytest.raises(ValueError, match="qzeros has zero points of 0 that have written over"):
        from_gptq(stored | {"qzeros": torch.tensor(rows, dtype=torch.int32)},
                  IntFormat(bits, 32, "integer"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("stored_as", [1, 2])
def test_a_symmetric_matrix_is_one_whatever_its_version_is_called(bits, version, stored_as):
    zeros = torch.full((2, 32), 2 ** (bits - 1))
    stored, meant = gptq_parts(bits, zeros)
    stored["qzeros"] = words(zeros, bits, less=1 if stored_as == 1 else 0)
    found = from_gptq(stored, IntFormat(bits, 32), version)
    assert torch.equal(found.dequantize(), meant)


def test_an_index_of_groups_that_is_all_zeros_means_none_and_another_is_followed():
    zeros = torch.randint(1, 16, (2, 32), generator=torch.Generator().manual_seed(0))
    stored, meant = gptq_parts(4, zeros)
    stored["qzeros"], format = words(zeros, 4, less=1), IntFormat(4, 32, "integer")
    unset = from_gptq(stored | {"g_idx": torch.zeros(64, dtype=torch.int32)}, format)
    assert torch.equal(unset.dequantize(), meant) and unset.group_of is None
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)) % 2
    moved = from_gptq(stored | {"g_idx": order.int()}, format)
    assert torch.equal(moved.dequantize(), read_gptq(stored | {"g_idx": order}, 4))
    for wrong in (torch.full((64,), 2), torch.full((64,), -1), torch.zeros(63)):
        with pytest.raises(ValueError, match="g_idx="):
            from_gptq(stored | {"g_idx": wrong.int()}, format)


@pytest.fixture
def checkpoint(tmp_path):
    """A symmetric model in 4 bits and groups of 32, with a head of its own."""
    shape = replace(tiny(V=104).config.shape, tied=False)
    torch.manual_seed(3)
    model = Decoder(ModelConfig(shape)).eval().requires_grad_(False)
    return save_quantized(round_to_nearest(model, IntFormat(4, 32)), tmp_path / "out")


def test_a_quantized_head_is_used(checkpoint):
    expected = Quantized.of(IntFormat(4, 32),
                            load_file(checkpoint / "model.safetensors")["lm_head.weight"].float())

    def change(tensors):
        del tensors["lm_head.weight"]
        tensors |= {f"lm_head.{key}": each for key, each in to_gptq(expected).items()}
    model = load_quantized(edited(checkpoint, change, lm_head=True)).decoder
    assert torch.equal(model.head.weight, expected.dequantize())
    assert model(TOKENS).isfinite().all()


@pytest.mark.parametrize("stem", ["model.layers.0.self_attn.x_proj", "model.norm", "x"])
def test_codes_without_a_place_are_refused(checkpoint, stem):
    def change(tensors):
        for key in ("qweight", "qzeros", "scales"):
            tensors[f"{stem}.{key}"] = tensors[f"model.layers.0.self_attn.q_proj.{key}"].clone()
    with pytest.raises(ValueError, match=f"{stem}"):
        load_quantized(edited(checkpoint, change))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused_by_tensor(checkpoint, value):
    key = "model.layers.1.mlp.down_proj.scales"
    with pytest.raises(ValueError, match=f"{key} holds a number that is not finite"):
        load_quantized(edited(checkpoint, lambda tensors: tensors[key][0].fill_(value)))


def test_what_others_store_and_means_nothing_is_passed_over(checkpoint):
    expected = load_quantized(checkpoint).decoder(TOKENS)

    def change(tensors):
        tensors["model.layers.0.mlp.down_proj.bias"] = torch.zeros(96, dtype=torch.float16)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    more = {"damp_percent": 0.01, "static_groups": False, "true_sequential": True, "dataset": None,
            "model_name_or_path": None, "dynamic": None, "meta": {"quantizer": ["gptqmodel:1.0"]},
            "use_exllama": False, "pack_dtype": "int32"}
    model = load_quantized(edited(checkpoint, change, **more)).decoder
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=0)


def test_one_loader_reads_the_ends_of_a_text_as_the_other(checkpoint):
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_quantized(checkpoint).decoder.config.eos_ids == (2, 7)


WRONG_KEYS = [
    ({"bits": "4"}, "bits='4'"), ({"bits": True}, "bits=True"), ({"bits": 4.0}, "bits=4.0"),
    ({"bits": 5}, "format='int5-g32'"), ({"bits": 16}, "bits=16 .*2 to 8"),
    ({"bits": 8}, "group_size=|config.json makes it"),
    ({"bits": 2}, "quantization_config makes it|config.json makes it"),
    ({"group_size": "32"}, "group_size='32'"), ({"group_size": True}, "group_size=True"),
    ({"group_size": 0}, "group_size=0"), ({"group_size": -2}, "group_size=-2"),
    ({"group_size": 64}, "qzeros=.* quantization_config makes it|group_size=64"),
    ({"group_size": 16}, "qzeros=.* quantization_config makes it"),
    ({"group_size": 10**12}, "divisor of the 96 inputs"), ({"group_size": -1}, "qzeros="),
    ({"sym": "true"}, "sym='true'"), ({"sym": 1}, "sym=1"),
    ({"dynamic": {"+:.*down": {"bits": 8}}}, "quantization_config: dynamic="),
    ({"checkpoint_format": {}}, "checkpoint_format={}"), ({"quant_method": ["gptq"]}, "quant_meth"),
    ({"pack_dtype": "int8"}, "pack_dtype='int8'"), ({"rotation": "h"}, "rotation='h'"),
    ({"is_marlin_format": True}, "is_marlin_format=True"), ({"adapter": {"a": 1}}, "adapter="),
]


@pytest.mark.parametrize(("keys", "message"), WRONG_KEYS, ids=[str(k) for k, _ in WRONG_KEYS])
def test_keys_that_disagree_or_are_unknown_are_refused_by_name(checkpoint, keys, message):
    with pytest.raises(Refused, match=message) as error:
        load_quantized(broken(checkpoint, lambda config: config.update(keys)))
    assert "\n" not in str(error.value) and str(checkpoint) in str(error.value.source)
    assert error.value.key and error.value.value is not ... and error.value.accepted


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_awq_has_4_bits_whatever_its_config_says(bits, tmp_path):
    directory = save_quantized(round_to_nearest(tiny(), IntFormat(4, 32)), tmp_path / "out", "awq")
    with pytest.raises(Refused, match=f"format='int{bits}-g32-asym' .*integers of 4 bits"):
        load_quantized(broken(directory, lambda config: config.update(bits=bits, sym=False)))


@pytest.mark.parametrize("said", ["x", [1], 5, True])
def test_a_quantization_config_that_is_no_object_is_refused(checkpoint, said):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(ValueError, match="quantization_config: quant_method=None"):
        load_quantized(checkpoint)


def test_a_config_that_says_null_is_not_of_a_quantized_model(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert is_quantized(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert not is_quantized(checkpoint)


@pytest.mark.parametrize("key", ["qweight", "qzeros", "scales", "g_idx"])
@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t.flatten(), lambda t: t.sum(),
                                    lambda t: t[:0], lambda t: t.to(torch.int16)],
                         ids=["short", "flat", "scalar", "empty", "int16"])
def test_tensors_of_another_shape_or_kind_are_refused_by_name(checkpoint, key, change):
    name = f"model.layers.0.mlp.down_proj.{key}"
    if key == "g_idx" and change(torch.ones(3)).shape == (3,) and change(
            torch.ones(3)).dtype == torch.float32:
        pytest.skip("it is flat already")
    with pytest.raises(ValueError, match="model.layers.0.mlp.down_proj"):
        load_quantized(edited(checkpoint, lambda tensors: tensors.update(
            {name: change(tensors[name])})))


@pytest.mark.parametrize("name", ["embed", "norm", "head"])
@pytest.mark.parametrize("value", [7e4, -7e4, float("nan")])
def test_what_fp16_cannot_hold_is_refused_before_anything_is_written(name, value, tmp_path):
    shape = replace(tiny().config.shape, tied=False)
    model = Decoder(ModelConfig(shape)).eval().requires_grad_(False)
    quantized = round_to_nearest(model, IntFormat(4, 32))
    getattr(quantized.decoder, name).weight.view(-1)[5] = value
    with pytest.raises(ValueError, match=r"(embed_tokens|norm|lm_head).weight=.*; accepted.*65504"):
        save_quantized(quantized, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@given(st.dictionaries(st.sampled_from(
    ["bits", "group_size", "sym", "desc_act", "quant_method", "checkpoint_format", "lm_head",
     "dynamic", "version", "zero_point", "format", "method", "pack_dtype", "other"]),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    | st.sampled_from(["gptq", "awq", "gptq_v2", "gemm", 2, 3, 4, 8, 16, 32, 64, -1])
    | st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=2), st.integers()),
    min_size=1))
@example({"bits": {"": 2**63}})
@settings(max_examples=60, deadline=None)
def test_any_quantization_config_gives_a_model_or_one_line(tmp_path_factory, keys):
    directory = tmp_path_factory.getbasetemp() / "any-config"
    if not directory.exists():
        save_quantized(round_to_nearest(tiny(), IntFormat(4, 32)), directory)
    original = (directory / "config.json").read_text()
    try:
        load_quantized(broken(directory, lambda config: config.update(keys)))
    except Refused as error:
        assert "\n" not in str(error) and str(directory) in str(error.source) and error.key
    finally:
        (directory / "config.json").write_text(original)


# ---- the commands ----


@pytest.fixture(scope="module")
def small_model(smollm, tmp_path_factory):
    """A model directory of a few rows, with a real tokenizer."""
    directory, model = tmp_path_factory.mktemp("model"), tiny(V=49152, D=64, N=4, K=2, F=96)
    save_file({name: tensor.contiguous()
               for name, tensor in destinations(model).items()}, directory/"model.safetensors")
    (directory / "config.json").write_text(json.dumps(to_hf(model.config)))
    smollm.tokenizer.backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_quantize_and_evaluate_keep_their_contract(method, small_model, tmp_path, capsys):
    out = tmp_path / "out"
    short = ["--sequences", "2", "--length", "32"]
    command = [
        "quantize", "--model",
        str(small_model), "--method", method, "--group", "32", "--out",
        str(out), "--json"
    ]
    assert cli.main([*command, *(short if method != "rtn" else [])]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bits_effective"] == 4.5 and result["seconds"] > 0 and result["bytes"] == (
        out/"model.safetensors").stat().st_size
    assert cli.main(["evaluate", str(out), "--reference", str(small_model), "--json", *short]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"kl", "kl_se", "perplexity", "top1", "reference"
            } <= result.keys() and 0 < result["kl"] < 1


def test_what_quantize_wrote_generates(small_model, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["quantize", "--model", str(small_model), "--method", "rtn", "--bits", "3",
                     "--group", "32", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["format"], result["layout"], result["bits_effective"]) == ("int3-g32", "gptq",
                                                                              3.5)
    ask = ["generate", "--model", str(out), "--prompt", "Hello", "--max-tokens", "3", "--json"]
    assert cli.main(ask) == 0
    expected = generate(load_quantized(out).decoder, "Hello", 3)
    assert json.loads(capsys.readouterr().out)["tokens"] == expected.tokens
    assert cli.main([*ask, "--weights", "int8"]) == 2
    assert "weights='int8'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, code, said",
    [(["--format", "nf4"], 2, "--format nf4"), (["--group", "48"], 2, "group=48 does not divide"),
     (["--bits", "9"], 2, "bits"), (["--group", "0"], 2, "group"),
     (["--method", "best"], 2, "method"),
     (["--calibration", "nowhere.txt"], 2,
      "--calibration: 'nowhere.txt': the path of a text file is accepted"),
     (["--bits", "3", "--layout", "awq"], 2, "awq layout"), ])
def test_wrong_usage_is_one_line_that_names_the_argument(arguments, code, said, small_model,
                                                         tmp_path, capsys):
    command = [
        "quantize", "--model",
        str(small_model), "--out",
        str(tmp_path/"out"), "--group", "32", *arguments
    ]
    try:
        found = cli.main(command)
    except SystemExit as exit:
        found = exit.code
    error = capsys.readouterr().err.strip()
    assert found == code and said in error and error.count("\n") == 0 and not (tmp_path/
                                                                               "out").exists()


@pytest.mark.parametrize("arguments", [["{out}"], ["--table"]])
def test_a_wrong_reference_is_called_by_its_option(arguments, small_model, tmp_path, capsys):
    out = save_quantized(round_to_nearest(tiny(V=49152, D=64, N=4, K=2, F=96), IntFormat(4, 32)),
                         tmp_path/"out")
    assert cli.main(
        ["evaluate", *(each.format(out=out) for each in arguments), "--reference", "smollm3"]) == 2
    assert capsys.readouterr().err.startswith(
        "clawdemy-infer evaluate: reference='smollm3' is not known here; near matches: smollm2-135m"
    )


def test_an_empty_calibration_text_is_refused(small_model, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    command = [
        "quantize", "--model",
        str(small_model), "--out",
        str(tmp_path/"out"), "--group", "32"
    ]
    assert cli.main([*command, "--calibration", str(tmp_path / "empty.txt")]) == 2
    assert "calibration text: it has 0 tokens" in capsys.readouterr().err


def test_a_quantized_model_of_a_foreign_kind_has_no_place(tmp_path):
    model = round_to_nearest(tiny(), IntFormat(4, 32))
    part = QuantizedModel("RTN", model.format,
                          {k: v
                           for k, v in model.tensors.items()
                           if k != "layers.1.out"}, model.decoder)
    directory = save_quantized(part, tmp_path / "out")
    with pytest.raises(ValueError, match="layers.1.self_attn.o_proj is not quantized, as all are"):
        load_quantized(directory)
