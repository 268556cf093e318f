"""Every architecture that the arithmetic counts, beside transformers' own: parameters, FLOPs by
torch's counter, bytes of its caches."""

import pytest
import torch
from families import SMALL, config_of, model_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import FalconConfig, Gemma3nTextConfig
from transformers.cache_utils import DynamicCache

from clawdemy_infer.arithmetic import ModelShape

each = pytest.mark.parametrize("kind, shape", SMALL.values(), ids=SMALL)
steps = pytest.mark.parametrize("batch, new, past", [(1, 1, 22), (3, 1, 6), (2, 13, 0)],
                                ids=["decode", "batch", "prefill"])


def small(kind, shape: ModelShape):
    # The loop over experts is one that a counter can see into; the fused kernel is not.
    return model_of(config_of(kind, shape),
                    **({"experts_implementation": "eager"} if shape.moe else {}))


def run(model, shape: ModelShape, batch: int, new: int, past: int):
    """The model on `new` tokens after `past`: FLOPs by operator, and the cache."""
    tokens = torch.randint(shape.V, (batch, past + new), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    word = "cache_params" if shape.kinds == ("ssm",) * shape.L else "past_key_values"
    with torch.no_grad():
        if past:
            model(tokens[:, :past], use_cache=True, **{word: cache})
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, past:], use_cache=True, logits_to_keep=1, **{word: cache})
    return counter.get_flop_counts()["Global"], cache


def tensors(cache) -> int:
    """Bytes of all that the layers of a cache hold."""
    held = 0
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.dim() > 0:
                    held += tensor.nbytes
    return held


def flops(work, kernel: str) -> float:
    return sum(op.flops for op in work.operations() if op.kernel == kernel)


@each
def test_parameters_are_those_of_the_module(kind, shape):
    assert shape.parameters() == model_of(config_of(kind, shape), "meta").num_parameters()


@each
@steps
def test_flops_are_those_that_torch_counts(kind, shape, batch, new, past):
    """Matrix products exactly: projections, MLPs, routers, experts, head. The scan of a state space
    is counted elsewhere.

    Latent attention is compared in its naive form, which is the one that transformers runs.
    """
    counts, _ = run(small(kind, shape), shape, batch, new, past)
    aten = torch.ops.aten
    work = shape.step(batch, new, past + new, absorbed=False)
    gemm = flops(work, "gemm")
    if shape.moe and shape.moe.shared_gate:
        # a product with a single column, not counted as an operation
        gemm += 2 * batch * new * shape.D * shape.L
    assert gemm == pytest.approx(counts.get(aten.mm, 0) + counts.get(aten.addmm, 0), rel=1e-12)
    if new == 1 and not shape.ssm:
        # a decode step sees all that the rectangle has
        assert flops(work, "attention") == counts[aten.bmm]


@each
@pytest.mark.parametrize("batch, context", [(1, 1), (3, 17), (2, 40)])
def test_cache_bytes_are_those_of_transformers_own_tensors(kind, shape, batch, context):
    """transformers keeps window - 1 tokens between steps: the next one brings its own. With it, the
    window is full."""
    _, cache = run(small(kind, shape), shape, batch, context, 0)
    local = sum(
        kind == "local" for kind in shape.kinds) if shape.window and context >= shape.window else 0
    own = local * batch * 2 * shape.K * shape.H * 4
    # transformers copies Falcon's keys and values to every query head before it stores them; no
    # engine made for serving does.
    copies = shape.N // shape.K if kind is FalconConfig and shape.K > 1 else 1
    assert shape.kv_bytes(batch, context, "fp32") == tensors(cache) / copies + own


def test_layers_that_share_a_cache_store_none():
    """Gemma 3n: the last layers attend to the cache of an earlier layer of their kind."""
    types = ["sliding_attention", "full_attention"] * 3
    config = Gemma3nTextConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, vocab_size=131, vocab_size_per_layer_input=131,
        hidden_size_per_layer_input=8, layer_types=types, sliding_window=9, num_kv_shared_layers=2,
        laurel_rank=4, activation_sparsity_pattern=None, pad_token_id=None, bos_token_id=None,
        eos_token_id=None,
    )
    model = model_of(config)
    shape = ModelShape(
        "", L=6, D=48, N=4, K=2, H=12, F=64, V=131, window=9,
        pattern=("local", "global", "local", "global", "local shared", "global shared"))
    _, cache = run(model, shape, 2, 40, 0)
    # two windows, a token each
    assert shape.kv_bytes(2, 40, "fp32") == tensors(cache) + 2 * 2 * (2 * 2 * 12 * 4)
    # What is not stored is read all the same.
    alone = ModelShape("", L=6, D=48, N=4, K=2, H=12, F=64, V=131, window=9,
                       pattern=("local", "global"))
    assert [layer.mixer.window for layer in shape.layers] == [9, None] * 3
    read = [
        sum(op.bytes
            for op in s.decode(2, 40).operations()
            if op.kernel == "attention")
        for s in (shape, alone)
    ]
    assert read[0] == read[1] and shape.kv_bytes(2, 40) < alone.kv_bytes(2, 40)
    # It projects queries alone.
    attention = [dict(layer.self_attn.named_parameters()) for layer in model.model.layers]
    projected = [
        sum(p.numel()
            for name, p in found.items()
            if name.startswith(("q_proj", "k_proj", "v_proj")))
        for found in attention
    ]
    assert projected == [k * n for k, n in (layer.matrices()["qkv"] for layer in shape.layers)]


@each
def test_what_a_step_streams_is_what_its_tokens_touch(kind, shape):
    """One token: every weight but the tables it gathers from, and of each layer's experts the
    active ones, by the module's own sizes."""
    model = model_of(config_of(kind, shape), "meta")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    tables = sum(
        size for name, size in sizes.items() if "embed" in name or "wte" in name or "wpe" in name)
    if shape.tied:
        tables -= shape.V * shape.D                                     # the head reads it whole
    touched = sum(sizes.values()) - tables
    if shape.moe:
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        touched -= experts * (1 - shape.moe.active / shape.moe.experts)
    assert shape.streamed_bytes("fp32") == pytest.approx(4 * touched, rel=1e-12)
    assert shape.streamed_bytes("fp32", tokens=10**6) == pytest.approx(
        4*(sum(sizes.values()) - tables), rel=1e-12)


@each
def test_stored_cache_splits_into_tokens_and_state(kind, shape):
    windows = [shape.window if kind.startswith("local") else 500
               for kind in shape.kinds if kind in ("global", "local")]
    for context in (1, 8, 9, 10, 500):
        tokens = sum(min(context, window) for window in windows) / (len(windows) or 1)
        assert shape.kv_bytes(3, context, "int8") == pytest.approx(
            3*(tokens*shape.kv_bytes_per_token("int8") + shape.state_bytes("int8")), rel=1e-12)


@each
def test_two_flops_for_each_number_a_token_is_multiplied_by(kind, shape):
    """w, the figure for doing it by hand, against the step that is summed operation by
    operation."""
    work = shape.prefill(2, 13)
    head = [op for op in work.operations() if op.name == "head"][0]
    assert flops(work, "gemm") == pytest.approx(2*shape.matrix_parameters()*26 + head.flops,
                                                rel=1e-12)
