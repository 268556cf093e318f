"""The envelope against what it stands for: transformers' modules, torch's FLOP counter, and sums
done by hand."""

import pytest
import torch
from families import config_of, model_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicCache

from clawdemy_infer.arithmetic import Capacity, ModelShape, Work, matmul, total
from clawdemy_infer.from_config import catalog

ODD = ModelShape("odd", L=3, D=60, N=6, K=2, H=14, F=84, V=131)


def transformers_model(shape: ModelShape):
    return model_of(config_of(MistralConfig if shape.window else LlamaConfig, shape))


# ---- weights ----


@pytest.mark.parametrize("tied", [True, False])
def test_streamed_bytes_are_the_weights_that_a_decode_step_touches(tied):
    """By watching a step of transformers: every weight that any operation but the embedding's
    gather takes, counted once."""
    shape = ModelShape("odd", L=3, D=60, N=6, K=2, H=14, F=84, V=131, tied=tied)
    model = transformers_model(shape)
    sizes = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    touched: dict[int, int] = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is not torch.ops.aten.embedding.default:
                for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
                    if isinstance(tensor, torch.Tensor) and tensor.data_ptr() in sizes:
                        touched[tensor.data_ptr()] = sizes[tensor.data_ptr()]
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        model(torch.tensor([[7]]))
    assert shape.streamed_bytes("fp32") == 4 * sum(touched.values())
    assert shape.stored_bytes("fp32") == 4 * sum(sizes.values())
    # a tied table is read as the head
    assert (shape.stored_bytes() == shape.streamed_bytes()) is tied


# ---- the KV cache ----


@pytest.mark.parametrize(
    "name, published",
    [
        # In the order 2 * L * K * H * 2 bytes. The traps: N in place of K (Llama-2-70B would be 8
        # times too large), D/N in place of H (Qwen3-0.6B would be half, Qwen3-4B 80/128 of the
        # truth).
        ("llama-2-7b", 524_288),
        ("llama-2-13b", 819_200),
        ("llama-2-70b", 327_680),
        ("llama-3-8b", 131_072),
        ("qwen3-0.6b", 114_688),
        ("qwen3-4b", 147_456),
        ("gpt-j-6b", 458_752),
        ("opt-13b", 819_200),
        # One per KV head and not per query head; experts do not enter.
        ("falcon-180b", 163_840),
        ("mixtral-8x7b", 131_072),
        # Zhao et al. 2025, "Insights into DeepSeek-V3", table 1: 70.272, 327.680 and 516.096 KB.
        ("deepseek-v3", 70_272),
        ("qwen2.5-72b", 327_680),
        ("llama-3.1-405b", 516_096),
    ])
def test_kv_bytes_of_a_token_are_the_published_ones(name, published):
    assert catalog.model(name).kv_bytes_per_token("bf16") == published


@pytest.mark.parametrize("name, context, published", [
    # What others found these caches to hold at the models' full context, in GiB.
    ("gemma-3-27b", 131_072, 10.4), ("deepseek-v3", 163_840, 10.7),
])
def test_windows_and_latents_are_counted(name, context, published):
    assert catalog.model(name).kv_bytes(1, context) / 2**30 == pytest.approx(published, abs=0.05)


def test_cross_layer_attention_and_grouping_save_95_percent():
    """Sun et al. 2024 (Hunyuan-Large), section 2.2: against multi-head attention in every layer,
    nearly 95 %."""
    shape = catalog.model("hunyuan-large")
    full = ModelShape("mha", L=shape.L, D=shape.D, N=shape.N, K=shape.N, H=shape.H, F=shape.F,
                      V=shape.V)
    assert 1 - shape.kv_bytes(1, 1000) / full.kv_bytes(1, 1000) == pytest.approx(0.95, abs=0.005)


@pytest.mark.parametrize("batch, context", [(1, 1), (3, 17), (2, 40)])
@pytest.mark.parametrize("window", [None, 9])
def test_kv_bytes_are_those_of_transformers_own_cache(batch, context, window):
    """transformers keeps window - 1 tokens between steps: the next one brings its own. With it, the
    window is full."""
    shape = ModelShape("odd", L=3, D=60, N=6, K=2, H=14, F=84, V=131, window=window)
    model = transformers_model(shape)
    cache = DynamicCache(config=model.config)
    tokens = torch.randint(131, (batch, context), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    own = 0 if window is None or context < window else 1
    expected = kept + own * batch * shape.kv_bytes_per_token("fp32")
    assert shape.kv_bytes(batch, context, "fp32") == expected


# ---- FLOPs ----


def counted_flops(shape: ModelShape, batch: int, new: int, past: int = 0) -> tuple[int, int]:
    """FLOPs of a transformers step by torch's counter: of the attention products, and of all
    others."""
    model = transformers_model(shape)
    tokens = torch.randint(shape.V, (batch, past + new), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        if past:
            model(tokens[:, :past], past_key_values=cache)
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, past:], past_key_values=cache, logits_to_keep=1)
    counts = counter.get_flop_counts()["Global"]
    attention = counts[torch.ops.aten.bmm]                              # the linear layers are mm
    return attention, sum(counts.values()) - attention


@pytest.mark.parametrize("shape", [
    ODD,
    ModelShape("mha, tied", L=2, D=48, N=4, K=4, H=12, F=100, V=97, tied=True),
    ModelShape("mqa", L=1, D=40, N=5, K=1, H=16, F=36, V=51),
], ids=lambda shape: shape.name)
@pytest.mark.parametrize("batch, new, past", [(1, 1, 22), (3, 1, 6), (2, 13, 0), (1, 5, 11)],
                         ids=["decode", "batch", "prefill", "chunk"])
def test_flops_are_those_that_torch_counts(shape, batch, new, past):
    """Matrix products exactly. Of attention torch counts the whole T x S rectangle, and we the
    pairs that see each other."""
    attention, products = counted_flops(shape, batch, new, past)
    work = shape.step(batch, new, past + new)
    ours = sum(op.flops for op in work.operations() if op.kernel == "attention")
    assert work.flops - ours == products
    context = past + new
    # query i sees the past, those before it and itself
    visible = sum(past + i + 1 for i in range(new))
    assert ours * new * context == attention * visible
    if new == 1:
        assert ours == attention  # a decode step has no invisible half


def brute_force_pairs(new: int, context: int, window: int | None) -> int:
    query, key = torch.arange(context - new, context)[:, None], torch.arange(context)[None]
    return int(((key <= query) & (query - key < (window or context))).sum())


@pytest.mark.parametrize("window", [None, 1, 5, 16, 64])
@pytest.mark.parametrize("new, context", [(1, 1), (1, 5), (1, 33), (7, 7), (33, 33), (4, 21),
                                          (20, 21)])
def test_attention_counts_the_pairs_of_the_mask(new, context, window):
    shape = ModelShape("windowed", L=1, D=8, N=3, K=3, H=5, F=8, V=8, window=window)
    work = shape.attention(2, new, context)
    assert work.flops == 4 * 2 * 3 * 5 * brute_force_pairs(new, context, window)
    # K and V are read once for all queries of the step: the columns of the mask in which anything
    # is set.
    query, key = torch.arange(context - new, context)[:, None], torch.arange(context)[None]
    seen = int(((key <= query) & (query - key < (window or context))).any(0).sum())
    assert work.bytes == 2 * (2 * 2 * seen * 3 * 5 + 2 * 2 * new * 3 * 5)


def test_a_long_prompt_with_a_window_is_counted_at_once():
    # a loop over the queries would not come back
    work = catalog.model("mistral-7b").prefill(1, 10**12)
    assert work.flops > 0


# ---- intensities in closed form ----


def test_attention_intensity_of_mha_is_st_over_s_plus_t():
    """16-bit, no grouping, every pair visible: 4·S·T·N·H FLOPs over 2·2·(S + T)·N·H bytes."""
    shape = ModelShape("mha", L=1, D=64, N=4, K=4, H=16, F=64, V=64)
    for S in (1, 2, 17, 1000):
        assert shape.attention(3, 1, S).intensity == pytest.approx(S * 1 / (S + 1), rel=1e-12)
    # With T queries at the end of S tokens, the causal corner takes T(T-1)/2 of the S·T pairs away.
    S, T = 90, 30
    expected = (S * T - T * (T - 1) / 2) / (S + T)
    assert shape.attention(3, T, S).intensity == pytest.approx(expected, rel=1e-12)


def test_sharing_the_read_in_a_group_multiplies_the_intensity_of_decode_by_nearly_its_size():
    """G = 8: FLOPs stay, K and V are read once for 8 query heads. 4·S·N·H over 4·S·N·H/8 + 4·N·H
    bytes = 8S/(S + 8)."""
    shape = ModelShape("gqa", L=1, D=64, N=16, K=2, H=4, F=64, V=64)
    assert shape.attention(1, 1, 4096).intensity == pytest.approx(8 * 4096 / (4096 + 8), rel=1e-12)
    assert shape.attention(1, 1, 4096, shared=False).intensity == pytest.approx(
        4096/4097, rel=1e-12)


def test_matmul_intensity_tends_to_its_rows():
    """2mkn over 2(mk + kn + mn) bytes = m / (m/n + 1 + m/k), so m for large k and n."""
    assert matmul(7, 10**9, 10**9, weights="bf16", activations="bf16").intensity == pytest.approx(
        7, rel=1e-6)
    work = matmul(3, 5, 11, weights="int4", activations="fp32")
    assert (work.flops, work.bytes) == (2 * 3 * 5 * 11, 55 * 0.5 + (15 + 33) * 4)


# ---- the worked example of the lecture's kind: Llama-2-13B on an H100 ----


@pytest.mark.parametrize(
    "batch, gigabytes, milliseconds, tokens_per_s, fits",
    [
        # By hand. Parameters: 13,015,864,320 x 2 B = 26.032 GB. KV: 2·40·40·128·2 B = 819,200 B a
        # token, x 1,024 = 838,860,800 B a sequence. Time per token from memory alone: all of it
        # once, at 3.35 TB/s.
        #   B = 1     26.032 + 0.839 =  26.871 GB  /3.35e12 =  8.021 ms    1 /  8.021 ms =   124.7
        #   B = 64    26.032 + 53.69 =  79.719 GB           = 23.797 ms   64 / 23.797 ms = 2,689
        #   B = 256   26.032 + 214.7 = 240.780 GB           = 71.875 ms  256 / 71.875 ms = 3,562,
        # the last if only it fitted into 80 GiB.
        (1, 26.871, 8.021, 124.7, True),
        (64, 79.719, 23.797, 2689.4, True),
        (256, 240.780, 71.875, 3561.7, False),
    ])
def test_the_worked_table_of_llama_2_13b_on_an_h100(batch, gigabytes, milliseconds, tokens_per_s,
                                                    fits):
    shape, machine = catalog.model("llama-2-13b"), catalog.machine("h100-sxm")
    capacity = shape.fits(machine.memory, batch, 1024)
    memory = capacity.weight_bytes + capacity.kv_bytes
    assert capacity.kv_bytes == batch * 838_860_800
    assert memory / 1e9 == pytest.approx(gigabytes, abs=0.001)
    seconds = memory / machine.bandwidth_at()
    assert seconds * 1e3 == pytest.approx(milliseconds, abs=0.001)
    assert batch / seconds == pytest.approx(tokens_per_s, abs=0.06)
    assert bool(capacity) is fits


@pytest.mark.parametrize("batch", [1, 64])
def test_the_whole_decode_step_costs_what_the_short_table_says_but_for_what_that_leaves_out(batch):
    """Our step spares the embedding table (0.328 GB, gathered from and not read) and adds the
    activations, some MB a sequence."""
    shape, machine = catalog.model("llama-2-13b"), catalog.machine("h100-sxm")
    short = shape.stored_bytes() + shape.kv_bytes(batch, 1024)
    work = shape.decode(batch, 1024)
    assert work.bytes - (short - 2 * 32000 * 5120) == pytest.approx(0, abs=batch * 30e6)
    assert machine.time(work).bound == "memory"
    assert machine.time(work).seconds == pytest.approx(short / 3.35e12, rel=0.03)


def test_capacity_ends_where_one_more_sequence_does_not_fit():
    """80 GiB = 85,899,345,920 B less 26,031,728,640 leaves 59,867,617,280; 838,860,800 goes 71.37
    times into it."""
    shape, machine = catalog.model("llama-2-13b"), catalog.machine("h100-sxm")
    assert shape.fits(machine.memory, 3, 1024).max_batch == 71
    assert shape.fits(machine.memory, 71, 1024) and not shape.fits(machine.memory, 72, 1024)
    assert catalog.model("llama-2-70b").fits(machine.memory, 1, 1).max_batch == 0


# ---- sums of work ----


def test_a_sum_of_work_remembers_what_it_is_made_of():
    a, b = matmul(2, 3, 5), Work(0, 7.0, "norm")
    step = total("step", [total("layer", [a, b]) * 4, b])
    assert (step.flops, step.bytes) == (4 * a.flops, 4 * (a.bytes + 7) + 7)
    assert sum(op.bytes for op in step.operations()) == step.bytes
    # four layers do not share one read
    assert {op.rows for op in step.operations() if op.name == "matmul"} == {2}


def test_a_verification_needs_the_logits_of_several_positions():
    """Three of four new tokens of two sequences: a head on six rows."""
    shape = ModelShape("", L=1, D=8, N=2, K=1, H=4, F=8, V=50)
    [head] = [op for op in shape.step(2, 4, 9, 3).operations() if op.name == "head"]
    assert (head.flops, head.bytes) == (2 * 6 * 8 * 50, 2 * (8 * 50 + 6 * (8 + 50)))


def test_what_just_fits_fits_and_work_without_bytes_has_no_end_of_intensity():
    assert Capacity(memory=10, weight_bytes=6, kv_bytes=4, batch=2)
    assert not Capacity(memory=10, weight_bytes=6, kv_bytes=4.1, batch=2)
    assert Capacity(memory=10, weight_bytes=6, kv_bytes=4, batch=2).max_batch == 2
    assert Work(5, 0).intensity == float("inf") and Work(5, 2).intensity == 2.5


def test_only_the_last_position_needs_logits():
    heads = [op for op in ODD.prefill(2, 50).operations() if op.name == "head"]
    assert [op.flops for op in heads] == [2 * 2 * 60 * 131]


# ---- errors ----


@pytest.mark.parametrize("call, message",
                         [(lambda: ODD.decode(0, 5), "batch=0"),
                          (lambda: ODD.decode(1, 0), "context=0"),
                          (lambda: ODD.prefill(1, 0), "prompt=0"),
                          (lambda: ODD.step(1, 6, 5), "context=5: it counts the 6 new tokens too"),
                          (lambda: ODD.attention(1, 6, 5), "context=5"),
                          (lambda: ODD.step(1, 3, 5, logits=4), "logits=4: 1 to new=3"),
                          (lambda: ODD.step(1, 3, 5, logits=0), "logits=0"),
                          (lambda: ODD.fits(1e9, 0, 5), "batch=0"),
                          (lambda: ODD.decode(1, 5, weights="fp7"),
                           "weights='fp7': accepted are fp32, bf16, fp16, fp8, int8, int4"),
                          (lambda: ODD.decode(1, 5, kv="fp7"), "kv='fp7'"),
                          (lambda: ODD.stored_bytes("q4"), "weights='q4'"),
                          (lambda: matmul(0, 2, 3), "M=0"),
                          (lambda: ModelShape("x", L=1, D=8, N=6, K=4, H=2, F=8, V=8),
                           "K=4: the KV heads must divide the N=6 query heads"),
                          (lambda: ModelShape("x", L=0, D=8, N=6, K=2, H=2, F=8, V=8), "L=0"), ])
def test_errors_name_the_argument_and_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
