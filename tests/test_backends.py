"""The same model on PyTorch and on the Triton kernels, which are interpreted where there is no GPU:
the same logits, the same choices."""

import importlib.util
import json
import re

import pytest
import torch
from tolerances import KERNEL, LOGITS

from clawdemy_infer.arithmetic import ModelShape, MoE
from clawdemy_infer.fast import PackedLinear, backends, int4_codes, int8_codes, kernels
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.fast.kernels import dequantized
from clawdemy_infer.fast.launches import count_ops
from clawdemy_infer.kv_cache import BlockPool, BlockTables, ContiguousCache, PagedCache
from clawdemy_infer.model import Decoder, ModelConfig, Sampling, generate, probabilities
from clawdemy_infer.variants.experts import decoder_with_experts
from clawdemy_infer.variants.int4_cache import KiviCache
from clawdemy_infer.variants.int8_cache import Int8Cache
from clawdemy_infer.variants.sliding_cache import SlidingWindowCache

pytest.importorskip("triton", reason="there is no Triton for this system")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEEPERS = {
    "contiguous": lambda model: ContiguousCache.for_model(model, 2, 30),
    "int8": lambda model: Int8Cache.for_model(model, 2, 30),
    "int4": lambda model: KiviCache.for_model(model, 2, 32, group=16),
    "paged": lambda model: PagedCache.for_model(model, 2, 30, block_size=5),
    "ring": lambda model: SlidingWindowCache.for_model(model, 2, window=9),
    "ring with sinks": lambda model: SlidingWindowCache.for_model(model, 2, window=6, sinks=3),
}
# One sequence passes the 16 tokens of a group, the other begins with one; a ragged decode; a chunk
# beside a decode.
STEPS = [{0: list(range(3, 18)), 1: [7]}, {0: [5], 1: [6]}, {0: [9], 1: [1, 8]}]


def small(**more) -> Decoder:
    torch.manual_seed(0)
    shape = ModelShape(**{
        "name": "small", "D": 32, "F": 48, "N": 2, "K": 1, "H": 32, "L": 2, "V": 61, "tied": False
    } | more)
    return Decoder(ModelConfig(shape)).eval().requires_grad_(False).to(DEVICE)


def on_triton(model: Decoder, weights: str | None = None) -> Decoder:
    return faster(model, weights, backend="triton")


@pytest.mark.parametrize(
    "keeper, more", [
        *((name, {}) for name in KEEPERS), ("contiguous", {"window": 4, "qk_norm": True}),
        ("int4", {"window": 9})
    ], ids=[*KEEPERS, "window, norms on Q and K", "int4, window"])
def test_a_model_gives_the_same_logits_on_the_kernels_whatever_keeps_its_keys_and_values(
        keeper, more):
    plain = small(**more)
    models = plain, on_triton(plain)
    caches = [KEEPERS[keeper](model) for model in models]
    for new in STEPS if "qk_norm" not in more else STEPS[1:]:
        wanted, got = (model.step(new, cache) for model, cache in zip(models, caches, strict=True))
        torch.testing.assert_close(got, wanted, **LOGITS[torch.float32])


@pytest.mark.parametrize("window", [None, 9])
def test_the_kernels_follow_the_tables_of_forks_as_gathered_blocks_do(window):
    """Ragged decode steps over blocks that forks share and scatter; then a chunk among decodes."""
    plain = small(D=48, F=64, N=6, K=2, H=8, tied=True, window=window, max_context=64)
    models = plain, on_triton(plain)
    caches = [PagedCache.over(model, BlockTables(BlockPool(40, 4))) for model in models]
    for model, cache in zip(models, caches, strict=True):
        for sequence, length in enumerate((13, 1, 30)):
            cache.add(sequence)
            model.step({sequence: [(7 * i + sequence) % 61 for i in range(length)]}, cache)
        cache.fork(2, 3)
    steps = [{sequence: [token + sequence] for sequence in range(4)} for token in range(3)]
    for new in [*steps, {0: [5], 1: [1, 2, 3], 3: [4]}]:
        wanted, got = (model.step(new, cache) for model, cache in zip(models, caches, strict=True))
        torch.testing.assert_close(got, wanted, **LOGITS[torch.float32])


@pytest.mark.parametrize("keeper, between", [("contiguous", ["rope_append", "decode_paged"]),
                                             ("paged", ["rope_append", "decode_paged"]),
                                             ("int8", ["decode_int8"]),
                                             ("int4", ["decode_int4"]),
                                             ("ring", ["decode_split"]), ])
def test_the_kernels_are_what_ran(monkeypatch, keeper, between):
    """Each operator of a decode step is asked of `kernel`, in each of two layers."""
    used, plain, model = [], backends.kernel, on_triton(small())

    def counted(name, *rest):
        used.append(name)
        return plain(name, *rest)
    for place in ("fast.triton_step", "variants.int8_cache", "variants.int4_cache",
                  "variants.sliding_cache"):
        monkeypatch.setattr(f"clawdemy_infer.{place}.kernel", counted)
    model.step({0: [3], 1: [4]}, KEEPERS[keeper](model))
    if keeper in ("contiguous", "paged"):
        assert used == 2 * ["rms_norm", *between, "rms_norm", "swiglu"] + ["rms_norm"]
    else:                           # a cache that the step's kernels do not know: PyTorch's layers
        assert used == 2 * between


def test_a_launch_counts_as_one_operation_whatever_the_interpreter_does_for_it():
    fused = on_triton(small())
    x, out = torch.randn(3, 32, device=DEVICE), torch.zeros(3, 16, device=DEVICE)
    launch = backends.kernel("swiglu", "swiglu_kernel")[(3, 1)]
    assert count_ops(lambda: launch(x, out, 32, 16, 16, F_BLOCK=16)) == 1
    torch.testing.assert_close(out, backends.kernel("swiglu", "swiglu_reference")(x))
    assert count_ops(lambda: x + x) == 1  # and nothing stays behind
    ops = {}
    for backend in ("torch", "triton"):
        model = faster(fused, backend=backend)
        cache = PagedCache.for_model(model, 1, 30, block_size=5)
        model.step({0: [3, 4]}, cache)
        ops[backend] = count_ops(lambda model=model, cache=cache: model.step({0: [5]}, cache))
    assert ops["triton"] < 0.7 * ops["torch"], ops


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_packed_weights_follow_the_model_to_the_kernels(weights, monkeypatch):
    plain = small(D=64, F=64)
    with monkeypatch.context() as patch:
        asked = []
        patch.setattr(kernels, "kernel", lambda name, *rest: asked.append(name) or
                      backends.kernel(name, *rest))
        packed = on_triton(plain, weights)
    assert set(asked) == {f"linear_{weights}"} and packed.runner.backend == "triton"
    assert generate(packed, [3], 2).tokens == generate(faster(plain, weights), [3], 2).tokens


@pytest.mark.parametrize("make, format", [(int8_codes, "int8"), (int4_codes, "int4")])
def test_a_linear_layer_of_integers_is_the_product_with_what_the_codes_stand_for(make, format):
    codes, x = make(torch.randn(70, 192, device=DEVICE)), torch.randn(3, 192, device=DEVICE)
    layer = PackedLinear(format, codes, backend="triton")
    torch.testing.assert_close(
        layer(x).double(),
        dequantized(codes)(x.double()), **KERNEL[torch.float16])


def test_a_draw_by_the_kernel_comes_from_the_filtered_distribution():
    sampling, n, generator = Sampling(temperature=0.8, top_k=5), 100, torch.Generator(DEVICE)
    wanted = probabilities(torch.randn(1, 40, device=DEVICE), sampling)
    uniform = torch.rand(n, generator=generator.manual_seed(1), device=DEVICE)
    drawn = backends.kernel("sample")(wanted.log().expand(n, -1).contiguous(), uniform)
    counts, wanted = drawn.bincount(minlength=40), wanted[0]
    assert counts[wanted == 0].sum() == 0
    # chi-square of 4 degrees, 1 in 1,000
    assert ((counts - n * wanted).square() / (n * wanted))[wanted > 0].sum() < 18.5


@pytest.mark.parametrize("certain", [False, True])
def test_verification_by_the_kernel_accepts_of_each_sequence_s_own_draft(certain):
    """p = q is accepted always, p(drafted) = 0 never; what lies behind a sequence's count is not
    looked at."""
    p, q = torch.zeros(3, 3, 8, device=DEVICE), torch.zeros(3, 2, 8, device=DEVICE)
    p[..., 2] = q[..., 2] = 1
    p[1, 0, 2], p[1, 0, 6], p[:, 2], p[2, 1] = 0, 1, torch.eye(8)[5], torch.eye(8)[4]
    drafted, counts = torch.full((3, 2), 2, device=DEVICE), torch.tensor([2, 2, 1], device=DEVICE)
    u = torch.rand(3, 3, device=DEVICE)
    accepted, token = backends.kernel("verify")(p, None if certain else q, drafted, u, counts)
    assert accepted.tolist() == [2, 0, 1] and token.tolist() == [5, 6, 4]


# ---- the choice ----


def test_a_gpu_gets_the_kernels_and_a_cpu_pytorch_unless_one_is_named(monkeypatch):
    assert (backends.choose("cuda"), backends.choose("cpu")) == ("triton", "torch")
    assert (backends.choose("cuda", "torch"), backends.choose("cpu",
                                                              "triton")) == ("torch", "triton")
    with pytest.raises(ValueError, match="backend='cuda': torch, triton, cpp are accepted"):
        backends.choose("cpu", "cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backends.choose("cuda") == "torch"
    with pytest.raises(ValueError, match="backend='triton': Triton is not installed"):
        backends.choose("cpu", "triton")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend='fast'"):
        faster(small(), backend="fast")


def test_copies_share_their_weights_and_there_is_a_way_back():
    plain = small()
    fused = on_triton(plain)
    back = faster(fused, backend="torch")
    assert plain.runner is None is not fused.runner and back.runner is None
    assert fused.layers[0].qkv.weight is plain.layers[0].qkv.weight is back.layers[0].qkv.weight


def test_a_packed_model_is_not_packed_again():
    with pytest.raises(ValueError, match="packed in int8"):
        faster(faster(small(), "int8"), "int4", backend="triton")


def test_layers_that_no_kernel_runs_are_refused_where_kernels_are_asked_for():
    config = ModelConfig(ModelShape("experts", D=32, F=48, N=2, K=1, H=16, L=2, V=61, tied=True))
    with pytest.raises(ValueError, match="experts.*torch is accepted"):
        on_triton(decoder_with_experts(config, MoE(4, 2)))


def test_bench_says_what_a_gpu_would_need_where_there_is_none_and_counts_its_bytes(
        monkeypatch, capsys):
    from clawdemy_infer.cli.main import main
    from clawdemy_kernels import checks

    if DEVICE == "cuda":
        pytest.skip("there is a GPU")
    counted = {
        "kernel": "swiglu", "envelope": 6, "asked": 6, "distinct": 6, "sectors": 32, "flops": 0,
        "dot_flops": 0, "ok": True
    }
    monkeypatch.setattr(checks, "traffic", lambda: [counted])
    line = ["bench", "--kernels", "--machine", "a100-80gb-sxm"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "There is no GPU here" in out and "A100" in out
    assert main([*line, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["kernel"]: row for row in result["rows"]}
    keys_and_values = 2 * 8 * 1024 * 8 * 128 * 2
    assert rows["decode_naive"]["asked"] > 4*keys_and_values > rows["decode_paged"][
        "asked"] > keys_and_values
    assert rows["decode_paged"][
        "predicted_s"] == rows["decode_paged"]["bytes"]/result["card"]["bandwidth"]
    assert result["traffic"] == [counted] and rows["swiglu"]["measured_s"] is None
    counted["ok"] = False
    assert main(["bench", "--kernels", "--json"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_bench_on_a_gpu_chooses_blocks_times_every_kernel_and_says_which_machine_it_was(
        monkeypatch, capsys):
    """With a clock that says a millisecond for all, and a GPU that only has a name: what is
    computed from times, and what is kept."""
    from clawdemy_infer.cli.main import main
    from clawdemy_infer.from_config.catalog import machine
    from clawdemy_infer.rigs import bench_kernels
    from clawdemy_kernels import blocks, clock, examples, launch

    if DEVICE == "cuda":
        pytest.skip("there is a GPU; `bench --kernels` itself says more")
    monkeypatch.setattr(launch, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr("clawdemy_infer.machine.calibrate.this_machine",
                        lambda *_: machine("h100-sxm"))
    monkeypatch.setattr(clock, "gpu", lambda: {"name": "a GPU", "triton": "3"})
    monkeypatch.setattr(clock, "copy_bandwidth", lambda: 1e11)
    monkeypatch.setattr(bench_kernels, "seconds", lambda work: 1e-3)
    monkeypatch.setattr(blocks, "choose_all", lambda seconds: {"decode_paged 256": {"S_BLOCK": 32}})
    plain = examples.examples
    monkeypatch.setattr(examples, "examples",
                        lambda sizes, device: plain(sizes, "meta" if device == "cuda" else device))
    assert main(["bench", "--kernels"]) == 0
    out = capsys.readouterr().out
    assert "A copy reaches 100 GB/s" in out and "times as fast as PyTorch" in out
    assert main(["bench", "--kernels", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["gpu"]["name"] == result["device"] == "a GPU" and result["blocks"] == {
        "decode_paged 256": {"S_BLOCK": 32}
    }
    rows = {row["kernel"]: row for row in result["rows"]}
    assert rows["decode_paged"]["of_copy"] == pytest.approx(rows["decode_paged"]["bytes"]/1e-3/1e11)
    assert rows["decode_paged"]["torch_s"] == 1e-3 and rows["decode_sinks"]["torch_s"] is None
    assert "traffic" not in result  # which needs the interpreter


def test_the_table_names_every_kernel_but_the_steps_that_lead_to_them():
    rows = [
        re.split(r"\s{2,}", line.strip())
        for line in backends.__doc__.splitlines()
        if line.startswith("    ")
    ][2:]
    named = {name for *_, kernels in rows for name in kernels.split(", ")}
    assert all(callable(backends.kernel(name)) for name in named)
    assert len(named) == 11
