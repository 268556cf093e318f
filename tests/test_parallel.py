"""Several devices: rings that really turn, pipelines that really run, dice that really choose
experts, and sums by hand."""

import random
from dataclasses import replace

import pytest

from clawdemy_infer.arithmetic import MLA, SSM, ModelShape, MoE
from clawdemy_infer.envelope.parallel import (
    Layout,
    all_reduce_s,
    fits,
    share,
    step,
    transfers,
)
from clawdemy_infer.envelope.roofline import Link
from clawdemy_infer.from_config import catalog

LINK = Link(1000.0, latency_s=5.0, hop_s=0.25)
PLAIN = ModelShape("plain", L=6, D=24, N=12, K=4, H=10, F=36, V=96)
EXPERTS = ModelShape("experts", L=6, D=24, N=12, K=4, H=10, F=36, V=96, moe=MoE(
    experts=8, active=2, F=20, first_dense=2))


# ---- transfers ----


def ring_all_reduce(arrays: list[list[float]]) -> tuple[list[list[float]], int, int]:
    """The ring, done: the arrays in the end, how many steps it took, and the elements that the
    busiest device sent."""
    p, size = len(arrays), len(arrays[0]) // len(arrays)
    held = [list(array) for array in arrays]
    sent, steps = [0] * p, 0
    for turn in range(2 * (p - 1)):
        adding = turn < p - 1
        messages = []
        for device in range(p):
            chunk = (device - turn) % p if adding else (device + 1 - (turn - (p - 1))) % p
            part = slice(chunk * size, (chunk + 1) * size)
            messages.append((device, (device + 1) % p, part, held[device][part]))
        for source, target, part, numbers in messages:
            mine = held[target][part]
            held[target][part] = ([a + b for a, b in zip(mine, numbers, strict=True)] if adding
                                  else numbers)
            sent[source] += len(numbers)
        steps += 1
    return held, steps, max(sent)


@pytest.mark.parametrize("p", [2, 3, 5, 8])
def test_an_all_reduce_costs_what_a_ring_that_turns_sends(p):
    arrays = [[random.Random(device*100 + i).random() for i in range(4*p)] for device in range(p)]
    result, steps, elements = ring_all_reduce(arrays)
    expected = [sum(column) for column in zip(*arrays, strict=True)]
    assert all(array == pytest.approx(expected) for array in result)  # it is an all-reduce
    assert all_reduce_s(4 * p * 8, p, LINK) == pytest.approx(5 + steps * 0.25 + elements * 8 / 1000)


def test_one_device_has_nobody_to_talk_to():
    assert all_reduce_s(1e9, 1, LINK) == 0
    with pytest.raises(ValueError, match="devices=0"):
        all_reduce_s(1, 0, LINK)


@pytest.mark.parametrize("mebibytes, measured", [(1, 34e-6), (16, 115e-6)])
def test_an_all_reduce_is_not_slower_on_paper_than_measured(mebibytes, measured):
    """Eight H100s in one server, from the profiles that the Vidur simulator publishes. Data sheets
    give a bound, but not a far one."""
    predicted = all_reduce_s(mebibytes * 2**20, 8, catalog.machine("h100-sxm").link)
    assert 0.5 * measured < predicted < measured


# ---- tensor parallel ----


def test_the_shares_of_a_matrix_make_the_matrix():
    """A layer of one of two devices: qkv 24·(6 + 2·2)·10, out 60·24, gate and up 24·36, down 18·24,
    and both norms, 48, whole."""
    def numbers(shape):
        return sum(shape.layers[0].numbers().values())

    assert numbers(share(PLAIN, 2)) == 24 * 100 + 60 * 24 + 24 * 36 + 18 * 24 + 48
    for tp in (1, 2, 4):
        ours = share(PLAIN, tp)
        assert tp * (numbers(ours) - 48) == numbers(PLAIN) - 48
        assert tp * ours.kv_bytes(3, 17) == PLAIN.kv_bytes(3, 17)
        assert tp * step(PLAIN, Layout(tp), 3, 5, 17).flops == step(PLAIN, Layout(), 3, 5, 17).flops


def test_beyond_the_kv_heads_the_cache_is_held_more_than_once():
    """Twelve devices for four KV heads: each has one query head and one KV head, so a head is held
    three times."""
    ours = share(PLAIN, 12)
    assert (ours.N, ours.K) == (1, 1)
    assert ours.kv_bytes_per_token() == 2 * 6 * 10 * 2
    assert 12 * ours.kv_bytes_per_token() == 3 * PLAIN.kv_bytes_per_token()


def test_latents_are_not_cut_and_states_are():
    latent = ModelShape("latent", L=4, D=24, N=8, K=8, H=12, F=36, V=96, mla=MLA(
        latent=20, rope=4, value=8))
    assert share(latent, 4).kv_bytes_per_token() == latent.kv_bytes_per_token() == 4 * 24 * 2
    states = ModelShape("states", L=4, D=24, N=0, K=0, H=0, F=0, V=96, pattern=("ssm", ), ssm=SSM(
        inner=48, state=16, dt_rank=3))
    assert 4 * share(states, 4).state_bytes() == states.state_bytes()


LLAMA_13B = catalog.model("llama-2-13b")
# The same parameters with 8 KV heads: what 2·32 heads of K and V lose, 64·128·D a layer, the three
# matrices of width F get back.
GROUPED_13B = replace(LLAMA_13B, K=8, F=LLAMA_13B.F + 64 * 128 // 3)


@pytest.mark.parametrize("batch, mha_ms, gqa_ms", [(1, 4.98, 4.17), (8, 12.13, 5.60),
                                                   (16, 20.30, 7.23), (32, 36.65, 10.50),
                                                   (64, 69.33, 17.04), (240, 249.09, 52.99)])
def test_the_tables_of_the_scaling_book(batch, mha_ms, gqa_ms):
    """Llama-2-13B on eight TPU v5e of 0.82 TB/s, context 8,192, first as it is and then with 8 KV
    heads (Austin et al. 2025, How to Scale Your Model, inference): bytes over bandwidth, no
    communication. Ours has 1.5 per cent more: activations go in and out."""
    for shape, milliseconds in ((LLAMA_13B, mha_ms), (GROUPED_13B, gqa_ms)):
        work = step(shape, Layout(tp=8), batch, 1, 8192)
        moved = sum(op.bytes for op in work.operations() if op.kernel != "elementwise")
        assert moved / 0.82e12 * 1e3 == pytest.approx(milliseconds, rel=0.02)


def test_the_scaling_book_runs_out_of_memory_where_we_do():
    """"We OOM beyond batch size 16" with all KV heads, "a much bigger batch of 64" with 8 of
    them."""
    memory = catalog.machine("tpu-v5e").memory
    assert [bool(fits(LLAMA_13B, Layout(tp=8), memory, batch, 8192))
            for batch in (16, 32)] == [True, False]
    assert [bool(fits(GROUPED_13B, Layout(tp=8), memory, batch, 8192))
            for batch in (64, 240)] == [True, False]


def test_all_reduces_by_hand():
    """Two a layer of B·T·D numbers; one where attention and MLP are parallel."""
    [told] = transfers(PLAIN, Layout(tp=4), 3, 5, LINK)
    assert (told.name, told.calls, told.bytes) == ("all-reduce", 12, 3 * 5 * 24 * 2)
    assert told.seconds == pytest.approx(12 * (5 + 6 * (0.25 + 180 / 1000)))
    [parallel] = transfers(replace(PLAIN, parallel=True), Layout(tp=4), 3, 5, LINK)
    assert parallel.calls == 6
    assert transfers(PLAIN, Layout(), 3, 5, LINK) == []


# ---- pipeline parallel ----


def test_at_batch_1_a_pipeline_is_no_faster_than_one_device():
    """OPT-175B in bf16 on five A100s took 230 ms a token (Frantar et al. 2022, GPTQ, table 6). With
    five times the bandwidth it would be 34 ms; one device after another need 172 ms, three quarters
    of what was measured."""
    opt = ModelShape("OPT-175B", L=96, D=12288, N=96, K=96, H=128, F=49152, V=50272, tied=True,
                     gated=False, rope=False, positions=2050)
    a100 = catalog.machine("a100-80gb-sxm")
    five = Layout(pp=5)
    assert fits(opt, five, a100.memory, 1, 128) and not fits(opt, Layout(pp=4), a100.memory, 1, 128)
    assert a100.napkin(step(opt, five, 1, 1, 128)) == pytest.approx(
        a100.napkin(step(opt, Layout(), 1, 1, 128)))
    assert a100.napkin(step(opt, five, 1, 1, 128)) / 0.230 == pytest.approx(0.75, abs=0.02)


def pipeline_turns(stages: int, microbatches: int) -> int:
    """A pipeline, run: stage s may take microbatch m once stage s-1 is done with it; each takes one
    a turn."""
    done = {}
    for m in range(microbatches):
        for s in range(stages):
            done[s, m] = 1 + max(done.get((s - 1, m), 0), done.get((s, m - 1), 0))
    return max(done.values())


@pytest.mark.parametrize("pp, batch", [(1, 7), (3, 1), (3, 2), (3, 3), (3, 12), (4, 6)])
def test_a_prefill_waits_while_the_pipeline_fills(pp, batch):
    layout = Layout(pp=pp)
    each = layout.microbatch(batch)
    assert each * pp >= batch > (each - 1) * pp
    turns = pipeline_turns(pp, -(-batch // each))
    assert layout.filling(batch) == pytest.approx(turns / pp)


def test_a_full_pipeline_makes_as_many_tokens_as_its_devices_have_bandwidth():
    """Four stages with four microbatches of 2: a step of all 8 sequences takes as long as one
    device takes for 2."""
    assert step(PLAIN, Layout(pp=4), 8, 1, 30).bytes == PLAIN.decode(2, 30).bytes
    [told] = transfers(PLAIN, Layout(pp=4), 8, 1, LINK)
    assert (told.name, told.calls, told.bytes) == ("send", 3, 2 * 24 * 2)
    assert told.seconds == pytest.approx(3 * (5 + 0.25 + 0.096))


# ---- expert parallel ----


def test_dice_choose_as_many_experts_as_expected():
    """Two groups of 3 sequences, four tokens each, choose 2 of 8 experts; each of two devices has
    4. What it streams of them by the formula, and by 3,000 throws."""
    dice = random.Random(7)
    throws = [
        len({expert
             for _ in range(24)
             for expert in dice.sample(range(8), 2)
             if expert < 4})
        for _ in range(3000)
    ]
    one_expert = 3 * 24 * 20 * 2
    work = step(EXPERTS, Layout(ep=2), 6, 4, 9)
    streamed = sum(op.bytes for op in work.operations() if op.name.startswith("expert "))
    rows = 6 * 4 * 2 / 2  # rows through this device's experts: their share of all
    in_and_out = rows * (24 + 2 * 20 + 20 + 24) * 2
    # four layers have experts
    assert streamed / 4 == pytest.approx(sum(throws) / 3000 * one_expert + in_and_out, rel=0.01)
    few = [
        len({expert
             for _ in range(2)
             for expert in dice.sample(range(8), 2)
             if expert < 4})
        for _ in range(3000)
    ]
    work = step(EXPERTS, Layout(ep=2), 2, 1, 9)
    streamed = sum(op.bytes for op in work.operations() if op.name.startswith("expert "))
    assert streamed/4 == pytest.approx(
        sum(few)/3000*one_expert + 2*(24 + 2*20 + 20 + 24)*2, rel=0.03)


def test_expert_parallel_work_adds_up():
    """Each group does its own attention, and 1/ep of all that the experts do: together they do what
    one device would."""
    whole, cut = step(EXPERTS, Layout(), 8, 3, 11), step(EXPERTS, Layout(ep=4), 8, 3, 11)
    assert 4 * cut.flops == pytest.approx(whole.flops)


@pytest.mark.parametrize("ep, sequences, seconds", [(2, 3, 0.25 + 0.72), (4, 2, 3 * 0.25 + 0.72)])
def test_all_to_alls_by_hand(ep, sequences, seconds):
    """There and back in each of four layers: 2 experts for each of the sequences' 5 tokens, D = 24
    numbers of 2 B. Of 1,440 B two devices keep half each and send the other in one step; of 960 B
    four keep a quarter and send three, in three steps."""
    [told] = transfers(EXPERTS, Layout(ep=ep), 6, 5, LINK)
    assert (told.name, told.calls, told.bytes) == ("all-to-all", 8, sequences * 5 * 2 * 24 * 2)
    assert told.seconds == pytest.approx(8 * (5 + seconds))


# ---- capacity ----


@pytest.mark.parametrize("shape", [PLAIN, replace(PLAIN, tied=True), EXPERTS],
                         ids=["plain", "tied", "experts"])
def test_one_device_holds_what_the_model_weighs(shape):
    one = fits(shape, Layout(), 1e9, 5, 40)
    assert (one.weight_bytes, one.kv_bytes) == (shape.stored_bytes(), shape.kv_bytes(5, 40))


def test_the_fullest_stage_by_hand():
    """Six layers on four stages: 1, 2, 1 and 2 of them; the last has the head too, 96·24, and the
    final norm."""
    layer = 24 * (12 + 8) * 10 + 120 * 24 + 3 * 24 * 36 + 48
    stage = fits(PLAIN, Layout(pp=4), 1e9, 5, 40)
    assert stage.weight_bytes == 2 * (2 * layer + 96 * 24 + 24)
    assert stage.kv_bytes == 5 * 40 * 2 * (2 * 4 * 10) * 2
    # a tied head needs its copy, and the final norm is there
    last = fits(replace(PLAIN, tied=True), Layout(pp=2), 1e9, 5, 40)
    assert last.weight_bytes == 2 * (3 * layer + 96 * 24 + 24)


def test_the_experts_that_live_elsewhere_are_not_held():
    """A device of four keeps 2 of 8 experts in each of four layers, and all of the rest."""
    gone = 4 * 6 * (3 * 24 * 20)
    quarter = fits(EXPERTS, Layout(ep=4), 1e9, 5, 40)
    assert quarter.weight_bytes == 2 * (EXPERTS.parameters() - gone)
    # five sequences in four groups: two in the largest
    assert quarter.kv_bytes == EXPERTS.kv_bytes(2, 40)


@pytest.mark.parametrize("shape, layout, message",
                         [(PLAIN, Layout(tp=0), "tp=0"),
                          (PLAIN, Layout(tp=5), "tp=5: it must divide the N=12 query heads"),
                          (PLAIN, Layout(tp=3), "tp=3: .*divide the K=4 KV heads or be a multiple"),
                          (PLAIN, Layout(pp=7), "pp=7: at most a stage for each"),
                          (PLAIN, Layout(ep=2), "ep=2: plain has no experts"),
                          (EXPERTS, Layout(ep=3), "ep=3: it must divide the 8 experts"),
                          (ModelShape("s", 2, 24, 0, 0, 0, 0, 96, pattern=("ssm",),
                                      ssm=SSM(inner=48, state=16, heads=6)), Layout(tp=4),
                           "tp=4: .*6 heads of")])
def test_what_cannot_be_cut_is_refused_by_name(shape, layout, message):
    for function, arguments in ((step, (1, 1, 8)), (fits, (1e9, 1, 8)), (transfers, (1, 1, LINK))):
        with pytest.raises(ValueError, match=message):
            function(shape, layout, *arguments)
