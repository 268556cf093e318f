"""Every figure has a source and obeys physics; an unknown name gets near ones."""

import re
from dataclasses import fields

import pytest

from clawdemy_infer import catalog
from clawdemy_infer.arithmetic import BYTES, ModelShape

MACHINES = catalog._read("machines.toml")
MODELS = catalog._read("models.toml")
each_machine = pytest.mark.parametrize("name", MACHINES)
each_model = pytest.mark.parametrize("name", MODELS)


# ---- sources ----


@each_machine
def test_every_figure_of_a_machine_has_a_source(name):
    entry = MACHINES[name]
    figures = set(entry) - {"name", "sources"}
    assert set(entry["sources"]) == figures == {"memory", "bandwidth", "peak_flops"}
    assert all(len(source) > 20 for source in entry["sources"].values())
    for source in entry["sources"].values():
        assert source in catalog.machine(name).source


@each_model
def test_every_model_names_the_file_its_numbers_are_from(name):
    assert re.fullmatch(r"[\w.-]+/[\w.-]+, config\.json", MODELS[name]["source"])
    assert catalog.model(name).source == MODELS[name]["source"]
    assert set(MODELS[name]) <= {field.name for field in fields(ModelShape)}


@each_machine
def test_bandwidth_is_the_figure_that_its_source_prints(name):
    """A slip of a digit between source and figure would go unseen otherwise."""
    entry = MACHINES[name]
    printed = re.search(r"([\d.,]+) ?(TB/s|GB/s|GBps)", entry["sources"]["bandwidth"])
    assert float(printed[1].replace(",", "")) * {"T": 1e12, "G": 1e9}[printed[2][0]] == entry["bandwidth"]
    assert f"{entry['memory'] // 2**30} GB" in entry["sources"]["memory"]
    assert entry["memory"] % 2**30 == 0


# ---- physics ----


@each_machine
def test_no_machine_breaks_physics(name):
    machine = catalog.machine(name)
    for dtype, peak in machine.peak_flops.items():
        assert dtype in BYTES
        # From a few FLOPs per byte in fp32 to the thousands of an 8-bit peak. Beyond: a figure with sparsity, or a wrong prefix.
        assert 5 <= peak / machine.bandwidth_at() <= 1000
    assert 4e9 < machine.memory < 1e12
    assert 0.01 < machine.memory / machine.bandwidth_at() < 1           # seconds to read all of it once
    order = [machine.peak_flops[dtype] for dtype in ("fp32", "bf16", "int8") if dtype in machine.peak_flops]
    assert order == sorted(order)                                       # fewer bits are not slower
    if "fp16" in machine.peak_flops:
        assert machine.peak_flops["fp16"] == machine.peak_flops["bf16"]


@each_model
def test_no_model_is_misread(name):
    shape = catalog.model(name)
    assert shape.N * shape.H >= shape.D                                 # true of this family; Qwen3 has more, none has less
    assert shape.H in (64, 128)
    assert 2 <= shape.F / shape.D <= 6
    assert 30_000 < shape.V < 200_000
    size = float(re.search(r"([\d.]+)([mb])", name.rpartition("-")[2])[1]) * (1e6 if name.endswith("m") else 1e9)
    assert 0.8 < shape.parameters() / size < 1.4                        # as its name says, give or take the embedding


def test_the_default_models_shape_is_that_of_the_model_that_runs(smollm):
    ours, runs = catalog.model("smollm2-135m"), smollm.config.shape
    same = [field.name for field in fields(ModelShape) if field.name not in ("name", "source")]
    assert {name: getattr(ours, name) for name in same} == {name: getattr(runs, name) for name in same}


# ---- names ----


@pytest.mark.parametrize("call, message", [
    (lambda: catalog.model("lama-2-13b"), r"model='lama-2-13b' is not in models.toml; near matches: llama-2-13b"),
    (lambda: catalog.model("LLAMA-3-8B"), r"near matches: llama-3-8b"),
    (lambda: catalog.machine("h100"), r"machine='h100' is not in machines.toml; near matches: h100-sxm"),
    (lambda: catalog.machine("zzz"), r"near matches: a100-80gb-sxm, h100-sxm, l4, macbook-air-m2, rtx-4090, tpu-v5e"),
    (lambda: catalog.machine(""), r"machine=''"),
])
def test_an_unknown_name_gets_near_ones_or_all(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_name_can_be_loaded():
    assert len(catalog.model_names()) >= 10 and len(catalog.machine_names()) >= 5
    for name in catalog.model_names():
        assert catalog.model(name).parameters() > 0
    for name in catalog.machine_names():
        assert catalog.machine(name).ridge("bf16") > 0
