"""Every figure has a source and obeys physics; an unknown name gets near ones."""

import re
from dataclasses import fields

import pytest
from families import NOT_IN_TRANSFORMERS, class_of, config_of, model_of

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.from_config import catalog

MODELS = catalog.read("models.toml")
each_model = pytest.mark.parametrize("name", MODELS)


PUBLISHED = {
    "smollm2-135m": 0.135,
    "smollm2-360m": 0.362,
    "smollm2-1.7b": 1.71,
    "tinyllama-1.1b": 1.1,
    "llama-30b": 32.5,
    "llama-65b": 65.2,
    "llama-2-7b": 6.74,
    "llama-2-13b": 13.02,
    "llama-2-70b": 68.98,
    "codellama-34b": 33.7,
    "llama-3-8b": 8.03,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.6,
    "llama-3.1-405b": 405.9,
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "yi-34b": 34.4,
    "mistral-large-123b": 123,
    "phi-4-14b": 14.7,
    "qwen2.5-0.5b": 0.49,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.62,
    "qwen2.5-14b": 14.7,
    "qwen2.5-32b": 32.8,
    "qwen2.5-72b": 72.7,
    "qwen3-0.6b": 0.6,
    "qwen3-1.7b": 1.7,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
    "mistral-7b": 7.24,
    "phi-3-mini-4k": 3.8,
    "gemma-2b": 2.51,
    "gemma-7b": 8.54,
    "gemma-2-2b": 2.61,
    "gemma-2-9b": 9.24,
    "gemma-2-27b": 27.2,
    "gemma-3-1b": 1.0,
    "gemma-3-4b": 3.88,
    "gemma-3-12b": 11.8,
    "gemma-3-27b": 27.0,
    "aya-23-8b": 8.03,
    # Total, and active for each token. gpt-oss counts the active ones without the embedding,
    # DeepSeek-V2-Lite too: those stay out.
    "mixtral-8x7b": (46.7, 12.9),
    "mixtral-8x22b": (141, 39),
    "qwen1.5-moe-a2.7b": (14.3, 2.7),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235, 22),
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "deepseek-v2-lite": 15.7,
    "deepseek-v2": (236, 21),
    "deepseek-v3": (671, 37),
    "kimi-k2": 1040,
    "hunyuan-large": (389, 52),
    "mamba-130m": 0.129,
    "mamba-2.8b": 2.77,
    "falcon-mamba-7b": 7.27,
    "mamba-codestral-7b": 7.29,
    "jamba-v0.1": (52, 12),
    "gpt2-124m": 0.124,
    "gpt2-xl-1.5b": 1.558,
    "opt-125m": 0.125,
    "opt-1.3b": 1.3,
    "opt-6.7b": 6.7,
    "opt-13b": 12.9,
    "opt-30b": 30,
    "opt-66b": 66,
    "opt-175b": 175,
    "gpt-j-6b": 6.05,
    "gpt-neox-20b": 20.6,
    "phi-2-2.7b": 2.78,
    "falcon-7b": 7,
    "falcon-40b": 40,
    "falcon-180b": 179.5,
    "starcoder2-7b": 7.17,
}


ROUND = {"falcon-40b", "kimi-k2"}
"""Their authors print 40 and 1,040 billion; the modules with the sizes that they publish have 41.3
and 1,026."""


# ---- sources ----


@each_model
def test_every_model_names_the_file_its_numbers_are_from(name):
    assert re.match(r"[\w.-]+/[\w.-]+, config\.json|\w+ et al\. \d{4}, table \d+; .*config\.json",
                    MODELS[name]["source"])
    assert catalog.model(name).source == MODELS[name]["source"]
    assert set(MODELS[name]) <= {field.name for field in fields(ModelShape)}


# ---- physics ----


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_IN_TRANSFORMERS])
def test_parameters_are_exactly_those_of_transformers(name):
    """The class of transformers with these sizes, instantiated without memory: every tensor of it,
    at the model's full size."""
    shape = catalog.model(name)
    assert shape.parameters() == model_of(config_of(class_of(name), shape), "meta").num_parameters()


@pytest.mark.parametrize("name, published", PUBLISHED.items())
def test_parameters_agree_with_what_the_authors_print(name, published):
    """From papers and model cards, in billions, to one unit of the last digit printed. No model
    lacks a figure from outside its file."""
    found = (catalog.model(name).parameters() / 1e9, catalog.model(name).active_parameters() / 1e9)
    published = published if isinstance(published, tuple) else (published,)
    for ours, printed in zip(found, published, strict=False):
        unit = 10.0 ** -len(str(printed).partition(".")[2])
        assert ours == pytest.approx(printed, abs=0.04 * printed if name in ROUND else unit)
    assert set(PUBLISHED) == set(MODELS)


def test_active_parameters_are_all_of_them_where_there_are_no_experts():
    for name in MODELS:
        shape = catalog.model(name)
        assert (shape.active_parameters() < shape.parameters()) is (shape.moe is not None)


def test_every_kind_of_architecture_is_there():
    shapes = [catalog.model(name) for name in MODELS]
    assert len(shapes) >= 40
    attends = [shape for shape in shapes if shape.N and not shape.mla]
    for wanted in (any(shape.K == shape.N for shape in attends),
                   any(1 < shape.K < shape.N for shape in attends),
                   any(shape.K == 1 for shape in attends),
                   any(shape.mla for shape in shapes),
                   any("global shared" in shape.pattern for shape in shapes),
                   any({"local", "global"} <= set(shape.pattern) for shape in shapes),
                   any(shape.moe and shape.moe.shared for shape in shapes),
                   any(shape.moe and not shape.moe.shared for shape in shapes),
                   any(shape.moe and shape.moe.first_dense for shape in shapes),
                   any(shape.moe and shape.moe.every > 1 for shape in shapes),
                   any(shape.ssm and not shape.N for shape in shapes),
                   any(shape.ssm and shape.N for shape in shapes),
                   any(shape.positions for shape in shapes)):
        assert wanted


def test_the_default_models_shape_is_that_of_the_model_that_runs(smollm):
    ours, runs = catalog.model("smollm2-135m"), smollm.config.shape
    same = [field.name for field in fields(ModelShape) if field.name not in ("name", "source")]
    for name in same:
        assert getattr(ours, name) == getattr(runs, name), name


# ---- names ----


@pytest.mark.parametrize("call, message",
                         [(lambda: catalog.model("lama-2-13b"),
                           r"model='lama-2-13b' is not in models.toml; near matches: llama-2-13b"),
                          (lambda: catalog.model("LLAMA-3-8B"), r"near matches: llama-3-8b"), ])
def test_an_unknown_name_gets_near_ones_or_all(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_name_can_be_loaded():
    assert len(catalog.model_names()) >= 10 and len(catalog.machine_names()) >= 5
    for name in catalog.model_names():
        assert catalog.model(name).parameters() > 0
    for name in catalog.machine_names():
        assert catalog.machine(name).ridge("bf16") > 0
