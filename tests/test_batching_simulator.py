"""The simulated clock: what a ragged step costs, and queues whose waiting times are known to
mathematics."""

import json
import math
from dataclasses import replace

import pytest
from token_prompts import with_tokens

from clawdemy_course.timeline import spans
from clawdemy_infer.batching import SLO, Operations, Policy, Request, StepCost, simulate, simulator
from clawdemy_infer.envelope import parallel
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.from_config import catalog
from clawdemy_infer.machine.calibrated import Calibrated
from clawdemy_infer.rigs.workload import uniform, workload

H100 = catalog.machine("h100-sxm")
# a calibration: a cache, slow attention, element-wise operations that cost, and a fixed cost
CURVED = Calibrated(
    "curved", bandwidth=((1e6, 9e10), (3e8, 4e10), (2e9, 2e10)), peak_flops={"bf16": 4e11},
    memory=64e9, rates={
        "gemm": {"bf16": ((1, 1e10), (16, 1e11), (512, 4e11))},
        "attention": {"bf16": ((1, 5e9), (64, 4e10), (1000, 1e11))}
    }, elementwise={"bf16": ((1, 5e9), )}, fixed_s_per_op=7e-6,
)
# and one on which bytes are all that counts, and come faster the fewer there are
BENT = replace(H100, name="bent", bandwidth=((1e6, 9e12), (3e9, 3e12), (1e12, 1e12)))
SHAPES = [
    "llama-3-8b", "smollm2-135m", "mistral-7b", "gemma-2-9b", "mixtral-8x7b", "gpt-oss-20b",
    "deepseek-v2-lite", "mamba-2.8b", "mamba-codestral-7b", "jamba-v0.1", "hunyuan-large",
    "gpt2-124m"
]


@pytest.mark.parametrize("machine", [H100, CURVED, BENT], ids=lambda machine: machine.name)
@pytest.mark.parametrize("name", SHAPES)
def test_sequences_that_are_all_alike_cost_what_the_roofline_says(name, machine):
    """The oracle is `Machine.time(ModelShape.step)`, tested by itself against transformers and by
    hand."""
    shape, ops = catalog.model(name), 321
    cost = StepCost(shape, machine, operations=Operations(step=ops))
    for B, S in ((1, 33), (1, 977), (37, 5003)):
        decode = machine.time(shape.decode(B, S), ops).seconds
        assert cost.seconds([S] * B) == pytest.approx(decode, rel=1e-9)
        assert cost.padded(B, 1, S) == pytest.approx(decode, rel=1e-9)
    for T, S in ((13, 13), (300, 4999)):
        assert cost.seconds([], [(T, S)]) == pytest.approx(
            machine.time(shape.step(1, T, S), ops).seconds, rel=1e-9)
        assert cost.padded(5, T, S) == pytest.approx(
            machine.time(shape.step(5, T, S), ops).seconds, rel=1e-9)


def test_a_latent_step_has_the_flops_and_bytes_of_its_shape():
    """Seconds are bytes where a byte takes one and FLOPs are free, and the other way round."""
    shape, formats = catalog.model("deepseek-v2"), {"weights": "int4", "kv": "fp8"}
    for what, (bandwidth, peak) in {"bytes": (1.0, math.inf), "flops": (math.inf, 1.0)}.items():
        machine = Machine(what, ((1.0, bandwidth),), {"bf16": peak}, memory=1e12)
        cost = StepCost(shape, machine, **formats)
        assert cost.seconds([1000] * 7) == pytest.approx(
            getattr(shape.decode(7, 1000, **formats), what), rel=1e-12)
        # Ragged: the latents of 100 + 1,900 tokens, and the same weights.
        assert cost.seconds([100, 1900]) == pytest.approx(
            getattr(shape.decode(2, 1000, **formats), what), rel=1e-12)


def test_a_ragged_step_counted_by_hand():
    """One layer of D = 8, N = K = 1, H = 8, F = 16, V = 32 in bf16, on a machine that moves a byte
    a second and computes for nothing."""
    shape = replace(catalog.model("smollm2-135m"), name="tiny", L=1, D=8, N=1, K=1, H=8, F=16, V=32)
    machine = Machine("bytes", bandwidth=((1.0, 1.0),), peak_flops={"bf16": 1e30}, memory=1e9)
    M, sequences = 2 + 5, 3  # two decode, over 10 and 20 tokens; one brings 5, and has 9 then
    matrices = 3 * 8 * 8 + 8 * 8 + 8 * 2 * 16 + 16 * 8              # qkv, out, gate and up, down
    ends = M * ((8 + 24) + (8 + 8) + (8 + 32) + (16 + 8))  # what goes into them and comes out
    head = 32 * 8 + sequences * (8 + 32)
    keys = 2 * 8 * (10 + 20 + 9) + M * 2 * 8  # K and V of all that is seen; Q and the output
    # two norms, two residuals, RoPE on Q and K, silu(gate)*up
    glue = M * (2 * 2 * 8 + 2 * 3 * 8 + 2 * 2 * 8 + 3 * 16)
    assert StepCost(shape, machine).seconds([10, 20], [(5, 9)]) == pytest.approx(
        2 * (matrices + ends + head + keys + glue))


def test_operations_and_drafted_logits_counted_by_hand():
    """Bytes alone as above. Two more rows of logits: 8 numbers in and 32 out. Three groups of
    sequences, those that decode among them, dispatch 3 + 3 * 7 operations of 1,000 s; one 3 + 5.
    """
    shape = replace(catalog.model("smollm2-135m"), name="tiny", L=1, D=8, N=1, K=1, H=8, F=16, V=32)
    machine = Machine("bytes", bandwidth=((1.0, 1.0),), peak_flops={"bf16": 1e30}, memory=1e9)
    step, operations = ([10], [(5, 9), (5, 7), (3, 3)]), Operations(step=3, group=5, split=7)
    assert StepCost(shape, machine).seconds(*step, 2) - StepCost(shape, machine).seconds(
        *step) == pytest.approx(2 * 2 * (8 + 32))
    slow = replace(machine, fixed_s_per_op=1000.0)
    for some, count in ((step, 3 + 3 * 7), (([10, 20], []), 3 + 5), (([], [(5, 9)]), 3 + 5)):
        more = (StepCost(shape, slow, operations=operations).seconds(*some)
                - StepCost(shape, machine).seconds(*some))
        assert more == pytest.approx(1000 * count)


def test_windows_are_seen_sequence_by_sequence():
    """A window of 4,096 bites one sequence and not the other: the sum of both alone, less the
    weights that are read once."""
    shape = catalog.model("mistral-7b")
    far = Machine("bytes", bandwidth=((1.0, 1.0),), peak_flops={"bf16": 1e30}, memory=1e12)
    cost = StepCost(shape, far)
    more = cost.seconds([100, 9000]) - cost.seconds([100, 100])
    assert more == pytest.approx((4096 - 100) * shape.kv_bytes_per_token("bf16"))


def test_tensor_parallel_steps_take_the_share_and_talk():
    shape, layout = catalog.model("llama-3.1-70b"), parallel.Layout(tp=8)
    talk = sum(t.seconds for t in parallel.transfers(shape, layout, 16, 1, H100.link))
    expected = H100.time(parallel.step(shape, layout, 16, 1, 2000), 0, talk).seconds
    assert talk > 0
    cost = StepCost(shape, H100, layout=layout)
    assert cost.seconds([2000] * 16) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="pp"):
        StepCost(shape, H100, layout=parallel.Layout(pp=2))
    with pytest.raises(ValueError, match="tp=8"):
        StepCost(shape, replace(H100, link=None), layout=layout)


# ---- queues ----


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_at_a_time_is_the_queue_m_d_1(load):
    """Poisson arrivals, equal jobs, one server: the mean wait is load * service / 2(1 - load)
    (Pollaczek and Khinchine)."""
    shape = catalog.model("llama-3-8b")
    service = H100.time(shape.prefill(1, 700)).seconds
    requests = workload(uniform(700, 700), uniform(1, 1), requests=20_000, rate=load/service,
                        seed=5)
    report = simulate(shape, H100, requests, Policy(max_batch=1))
    waits = [
        sequence.token_times[0] - sequence.arrival_s - service for sequence in report.sequences
    ]
    assert min(waits) == pytest.approx(0, abs=1e-9)
    assert sum(waits) / len(waits) == pytest.approx(load * service / 2 / (1 - load), rel=0.1)
    assert report.summary["busy"] == pytest.approx(load, rel=0.03)


def test_bursts_wait_longer_than_poisson_and_a_metronome_does_not_wait():
    shape = catalog.model("llama-3-8b")
    service = H100.time(shape.prefill(1, 700)).seconds
    waits = {}
    for burstiness in (0.0, 1.0, 3.0):
        requests = workload(uniform(700, 700), uniform(1, 1), requests=3000, rate=0.6/service,
                            burstiness=burstiness, seed=3)
        report = simulate(shape, H100, requests, Policy(max_batch=1))
        waits[burstiness] = sum(s.token_times[0] - s.arrival_s - service
                                for s in report.sequences)/3000
    assert waits[0.0] == pytest.approx(0, abs=1e-9) and 2 * waits[1.0] < waits[3.0]


def test_little_s_law_holds():
    """Mean number in the system = arrival rate * mean time in it, whatever the policy (Little
    1961)."""
    requests = workload("sharegpt", requests=400, rate=30.0, seed=1)
    report = simulate(catalog.model("llama-3-8b"), H100, requests,
                      Policy(max_batch=24, token_budget=256))
    served = sum((step.end_s - step.start_s) * step.sequences for step in report.steps)
    inside = sum(end - start
                 for s in report.sequences
                 for phase, start, end in spans(s)
                 if phase in ("prefill", "decode"))
    # a prompt that waits for the budget is inside and not in the step
    assert inside == pytest.approx(served, rel=0.02)


# ---- what must follow ----


def serve(policy, requests=200, rate=math.inf, **options):
    return simulate(catalog.model("llama-3-8b"), H100,
                    workload("sharegpt", requests=requests, rate=rate, seed=0), policy, **options)


def test_policies_stand_in_the_order_that_the_papers_found():
    static, paged = (serve(policy, kv_bytes=4e9).summary["output_tokens_per_s"]
                     for policy in (Policy("static", 32), Policy(max_batch=32)))
    assert static < paged
    whole, chunked = (serve(policy, rate=25.0).summary
                      for policy in (Policy(max_batch=64), Policy(max_batch=64, token_budget=128)))
    assert chunked["itl_p99"] < whole["itl_p99"]


def test_a_small_cache_preempts_and_swapping_computes_less():
    recompute, swap = (serve(Policy(max_batch=64, preemption=how), kv_bytes=1e9, **options)
                       for how, options in (("recompute", {}), ("swap", {"host_bytes": 8e9})))
    assert recompute.summary["preemptions"] > 0 and swap.summary["preemptions"] > 0
    assert recompute.summary["kv_peak_bytes"] <= 1e9
    work = [sum(step.tokens for step in report.steps) for report in (recompute, swap)]
    assert work[0] > work[1] == sum(s.prompt_tokens + s.generated - 1 for s in swap.sequences)


def test_speculation_gains_what_the_paper_says_alone_and_loses_it_in_a_batch():
    """Leviathan et al. 2023, theorem 3.8, with c = 0 and v as the roofline has it: 1 for one
    sequence on an H100, and more for many."""
    shape, alpha, gamma, speedups = catalog.model("llama-3-8b"), 0.6, 4, {}
    for batch in (1, 16, 256):
        requests = workload(uniform(10, 10),
                            uniform(41, 41) if batch > 1 else uniform(401, 401), requests=max(
                                batch, 10), seed=0)
        plain, drafted = (simulate(shape, H100, requests, Policy(max_batch=batch, gamma=most),
                                   alpha=alpha).summary["seconds"] for most in (0, gamma))
        speedups[batch] = plain / drafted
    assert speedups[1] == pytest.approx((1 - alpha**5) / (1 - alpha), rel=0.04)
    assert speedups[1] > speedups[16] > speedups[256] and speedups[256] < 1
    # The same model as its own draft: γ steps more, and each round gains at most its own cost.
    one = workload(uniform(10, 10), uniform(401, 401), requests=5, seed=0)
    free, own = (simulate(shape, H100, one, Policy(max_batch=1, gamma=gamma), alpha=1.0,
                          draft=draft).summary["seconds"]
                 for draft in (None, StepCost(shape, H100)))
    assert own / free == pytest.approx(gamma + 1, rel=0.03)


def test_a_simulation_with_drafts_must_be_told_how_many_are_accepted():
    for alpha in (None, 1.5):
        with pytest.raises(ValueError, match=f"alpha={alpha}"):
            simulator(catalog.model("llama-3-8b"), H100, Policy(gamma=2), alpha=alpha)


def test_a_system_prompt_is_found_by_all_but_the_first():
    requests = with_tokens(workload(uniform(600, 700), uniform(1, 20), requests=50, rate=5.0), 1000,
                           shared=512)
    report = simulate(catalog.model("llama-3-8b"), H100, requests, Policy(prefix_caching=True))
    found = sorted(report.sequences, key=lambda sequence: sequence.arrival_s)
    assert [sequence.num_cached_tokens for sequence in found] == [0] + [512] * 49
    assert report.summary["ttft_p50"] < simulate(catalog.model("llama-3-8b"), H100, requests,
                                                 Policy()).summary["ttft_p50"]


def test_goodput_counts_who_was_served_in_time():
    report = serve(Policy(max_batch=32), rate=20.0)
    rows = report.requests
    slo = SLO(ttft_s=sorted(row["ttft_s"] for row in rows)[150], tpot_s=1.0)
    assert report.goodput(slo) * report.seconds == pytest.approx(151)


def test_a_report_is_json():
    report = serve(Policy(max_batch=8), requests=10)
    assert json.loads(
        json.dumps({"requests": report.requests, "summary": report.summary},
                   allow_nan=False))["summary"]["finished"] == 10


def test_the_cache_gets_what_the_weights_leave():
    shape = catalog.model("llama-3-8b")
    engine = simulator(shape, H100, Policy(max_batch=4), memory=20e9)
    # 128 KiB a token: 2 * 32 layers * 8 heads * 128 * 2 bytes
    expected = (20e9 - shape.stored_bytes("bf16")) // (16 * 131_072)
    assert engine.scheduler.tables.pool.blocks == expected
    # Unless it is said, nine tenths of what the machine has.
    engine = simulator(shape, H100)
    expected = (0.9 * H100.memory - shape.stored_bytes("bf16")) // (16 * 131_072)
    assert engine.scheduler.tables.pool.blocks == expected
    # Each of the batch has a state: of 28 Mamba layers, 8192 channels of 16 and the last 4 inputs.
    # A token has keys and values in 4 layers.
    jamba, states = catalog.model("jamba-v0.1"), 28 * 8192 * (16 + 4) * 2
    engine = simulator(jamba, H100, Policy(max_batch=4), memory=110e9)
    expected = (110e9 - jamba.stored_bytes("bf16") - 4 * states) // (16 * 4 * 2 * 8 * 128 * 2)
    assert engine.scheduler.tables.pool.blocks == expected
    with pytest.raises(ValueError, match="memory="):
        simulator(shape, H100, memory=16e9)
    with pytest.raises(ValueError, match="request 'a' has a text"):
        simulate(shape, H100, [Request("a", "Hello", 3, 0.0)])
