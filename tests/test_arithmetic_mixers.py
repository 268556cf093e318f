"""The parts that the families differ in, each against something that is not our formula: float64,
enumeration, a count by hand."""

from dataclasses import replace
from itertools import combinations, product
from math import exp

import pytest
import torch
from families import SMALL, config_of, model_of
from torch.utils.flop_counter import FlopCounterMode

from clawdemy_infer.arithmetic import (
    BYTES,
    MLA,
    SSM,
    Attention,
    Experts,
    LatentAttention,
    ModelShape,
    MoE,
    Pass,
    StateSpace,
    element_bytes,
)
from clawdemy_infer.from_config import catalog

# ---- latent attention ----


@pytest.mark.parametrize("name", ["deepseek_v2, no query latent", "deepseek_v3"])
@pytest.mark.parametrize("batch, new, past", [(2, 1, 12), (1, 4, 7), (2, 9, 0)],
                         ids=["decode", "chunk", "prefill"])
def test_the_absorbed_form_gives_the_same_numbers_and_costs_the_flops_we_say(
        name, batch, new, past):
    """Written out here in float64, from the projections of transformers' module: same outputs, and
    torch counts its products."""
    kind, shape = SMALL[name]
    layer = model_of(config_of(kind, shape)).double().model.layers[0].self_attn
    N, H, rope, value, latent = shape.N, shape.H, shape.mla.rope, shape.mla.value, shape.mla.latent
    nope, S = H - rope, past + new
    generator = torch.Generator().manual_seed(3)
    # queries, rotated already
    q = torch.randn(batch, N, new, H, dtype=torch.float64, generator=generator)
    # latents, normed already
    c = torch.randn(batch, S, latent, dtype=torch.float64, generator=generator)
    k_rope = torch.randn(batch, 1, S, rope, dtype=torch.float64, generator=generator)
    mask = torch.ones(new, S, dtype=torch.bool).tril(past)

    # Naive: keys and values of every head from the latents, by kv_b.
    with FlopCounterMode(display=False) as naive_counter, torch.no_grad():
        k_nope, v = layer.kv_b_proj(c).view(batch, S, N, nope + value).transpose(1, 2).split(
            (nope, value), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, N, -1, -1)), dim=-1)
        scores = (q @ k.transpose(-1, -2) / H**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        naive = scores @ v
    # Absorbed: kv_b's two halves go to the queries and to the outputs.
    w_k, w_v = layer.kv_b_proj.weight.detach().view(N, nope + value, latent).split((nope, value),
                                                                                   dim=1)
    with FlopCounterMode(display=False) as absorbed_counter, torch.no_grad():
        wide = torch.cat((q[..., :nope] @ w_k, q[..., nope:]), dim=-1)  # [B, N, T, latent + rope]
        keys = torch.cat((c[:, None], k_rope), dim=-1)  # one "head" for all
        scores = (wide @ keys.transpose(-1, -2) / H**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        absorbed = (scores @ c[:, None]) @ w_v.transpose(-1, -2)
    torch.testing.assert_close(absorbed, naive, rtol=1e-10, atol=1e-12)

    visible = sum(past + i + 1 for i in range(new)) / (new * S)  # torch counts the whole rectangle
    mixer = shape.layers[0].mixer
    for form, counter in ((False, naive_counter), (True, absorbed_counter)):
        ops = mixer.of_sequences(Pass(batch, new, S, absorbed=form))
        projections = sum(op.flops for op in ops if op.kernel == "gemm")
        attention = sum(op.flops for op in ops if op.kernel == "attention")
        counts = counter.get_flop_counts()["Global"]
        assert projections + attention / visible == pytest.approx(sum(counts.values()), rel=1e-12)


def test_each_form_of_latent_attention_has_its_use():
    """At DeepSeek-V3's sizes: absorbed for the next token, naive for a long prompt, and by itself
    the cheaper one is taken."""
    shape = catalog.model("deepseek-v3")
    for work in (shape.decode, shape.prefill):
        forms = {form: work(1, 4096, absorbed=form).flops for form in (False, True, None)}
        assert forms[None] == min(forms.values())
        assert (forms[True] < forms[False]) is (work == shape.decode)
    # Making the keys and values of 4,096 tokens again, for one token: more than the rest of the
    # step by far.
    assert shape.decode(1, 4096, absorbed=False).flops > 50 * shape.decode(1, 4096).flops


def test_absorbed_attention_reads_the_latents_once_for_all_heads():
    """128 heads, 576 numbers a token, 2 bytes: 1,152 bytes a token and layer, by hand."""
    mixer = LatentAttention(7168, 128, 192, MLA(512, 64, 128, 1536))
    one, other = ([
        op for op in mixer.of_sequences(Pass(1, 1, S, absorbed=True)) if op.kernel == "attention"
    ][0] for S in (1000, 2000))
    assert other.bytes - one.bytes == 1000 * 576 * 2
    assert one.rows == 128  # all heads multiply the same rows


@pytest.mark.parametrize("absorbed, products", [
    # kv_b [512, 128 · (128 + 128)] makes keys and values of 2 · 300 tokens anew, whose latents lie
    # in the cache in 2 bytes a number: 512 of them go in, 32,768 come out, written in 2 bytes.
    (False, {"kv_b": 512 * 32768 / 2 + 600 * (512 + 32768) * 2}),
    # A head has 128 numbers of a query for 512 of a latent, and 512 of a sum for 128 of its value.
    (True, dict.fromkeys(("absorb_k", "absorb_v"), 128 * (128 * 512 / 2 + 2 * (128 + 512) * 2)))])
def test_latent_products_read_int4_weights_and_say_so(absorbed, products):
    """DeepSeek-V2 by hand: two sequences of 300 tokens bring one token each; half a byte for each
    weight, which a machine's rate for int4 is to be asked for."""
    mixer = catalog.model("deepseek-v2").layers[0].mixer
    run = Pass(2, 1, 300, weights="int4", absorbed=absorbed)
    found = [op for op in mixer.of_sequences(run) if op.kernel == "gemm"]
    assert {op.name: op.bytes for op in found} == products
    assert {op.weights for op in found} == {"int4"}
    assert {op.numbers for op in found} == ({128 * 512} if absorbed else {512 * 32768})


LATENT = LatentAttention(16, 3, 10, MLA(latent=12, rope=4, value=5, q_latent=7))
RUN = Pass(2, 3, 9, weights="int8", kv="fp8")           # activations in bf16


def test_the_bytes_of_latent_rows_counted_by_hand():
    """Six rows: weights of a byte, what goes in and out of two; of RoPE three heads and the shared
    part, 4 numbers of each, read and written."""
    bytes = {op.name: op.bytes for op in LATENT.of_rows(RUN)}
    assert bytes == {"q_a": 16 * 7 + 6 * (16 + 7) * 2, "q_b": 7 * 30 + 6 * (7 + 30) * 2,
                     "kv_a": 16 * 16 + 6 * (16 + 16) * 2, "out": 15 * 16 + 6 * (15 + 16) * 2,
                     "rope": 2 * 6 * (3 + 1) * 4 * 2}


def test_the_bytes_of_both_forms_of_latent_attention_counted_by_hand():
    """Two sequences of 9 tokens bring 3 each, and see 7 + 8 + 9 pairs. Latents lie in the cache in
    a byte a number; keys of 6 and values of 5 numbers made of them, in two."""
    kv_b, attention = LATENT.of_sequences(RUN._replace(absorbed=False))
    assert kv_b.bytes == 12 * 33 + 18 * 12 * 1 + 18 * 33 * 2
    assert attention.bytes == 18 * 33 * 2 + 18 * 4 * 1 + 6 * 3 * (10 + 5) * 2
    assert (attention.flops, attention.rows) == (2 * 2 * 3 * (10 + 5) * 24, 3)
    k, attention, v = LATENT.of_sequences(RUN._replace(absorbed=True))
    assert k.bytes == 3 * (6 * 12 + 6 * (6 + 12) * 2) and v.bytes == 3 * (12*5 + 6 * (12 + 5) * 2)
    assert attention.bytes == 18 * (12 + 4) * 1 + 6 * 3 * (16 + 12) * 2
    assert (attention.flops, attention.rows) == (2 * 2 * 3 * (16 + 12) * 24, 9)


def test_what_a_machine_is_asked_about_attention_counted_by_hand():
    """Rows that share a read, and of a decode step the keys that each sequence sees and the KV
    heads of all: a rate goes by them."""
    layer = Attention(24, N=6, K=2, H=4, window=5)
    found = {(T, shared): (op.rows, op.keys, op.heads) for T in (1, 2) for shared in (True, False)
             for op in layer.of_sequences(Pass(3, T, 9, shared=shared))}
    assert found == {(1, True): (3, 5, 3 * 2), (1, False): (1, 5, 3 * 6), (2, True): (6, 0, 0),
                     (2, False): (2, 0, 0)}


def test_a_layer_that_reads_an_earlier_cache_norms_its_queries_alone():
    """Q 24 x 24 and out 24 x 24, and 4 numbers of a norm; with its own K and V, 24 x 16 and 4
    more."""
    own = Attention(24, N=6, K=2, H=4, qk_norm=True)
    shared = replace(own, owns_kv=False)
    assert (sum(I * O for I, O in own.matrices().values()), own.vectors()) == (
        24 * 24 * 2 + 24 * 16, 4 + 4)
    assert (sum(I * O for I, O in shared.matrices().values()), shared.vectors()) == (24 * 24 * 2, 4)


def test_attention_of_a_latent_model_is_all_between_queries_and_output():
    """Two products and the attention, absorbed, by hand: DeepSeek-V2 at batch 3 and 50 tokens."""
    work = catalog.model("deepseek-v2").attention(3, 1, 50)
    per_head = 2 * 128 * 512 + 2 * 50 * (576 + 512) + 2 * 512 * 128
    assert work.flops == 3 * 128 * per_head
    assert [op.name for op in work.operations()] == ["absorb_k", "attention", "absorb_v"]


# ---- experts ----


@pytest.mark.parametrize("experts, active, tokens", [(4, 1, 3), (4, 2, 1), (4, 2, 2), (5, 2, 3),
                                                     (6, 3, 2), (3, 3, 2)])
def test_touched_experts_are_the_mean_over_all_ways_to_choose(experts, active, tokens):
    """Every way in which `tokens` tokens can each pick `active` different experts, counted one by
    one."""
    ways = list(product(combinations(range(experts), active), repeat=tokens))
    mean = sum(len(set().union(*way)) for way in ways) / len(ways)
    assert MoE(experts, active).touched(tokens) == pytest.approx(mean, rel=1e-12)


def test_a_batch_spreads_over_the_experts_and_each_sees_few_rows():
    """Mixtral at batch 16: 2 of 8 for each of 16 tokens touch 8·(1 - 0.75^16) = 7.92 experts,
    32/7.92 = 4.04 rows each."""
    work = catalog.model("mixtral-8x7b").decode(16, 100)
    up = [op for op in work.operations() if op.name == "expert gate_up"][0]
    assert up.rows == pytest.approx(4.04, abs=0.005)
    # layers · 2 · tokens · active · D · 2F
    assert up.flops == pytest.approx(32 * (2 * 16 * 2 * 4096 * 28672), rel=1e-12)
    weights = 32 * 7.92 * 4096 * 28672 * 2
    assert up.bytes == pytest.approx(weights, rel=0.005)  # and the activations: a few MB


def test_one_token_is_one_row_for_each_of_its_experts_however_many_there_are():
    """Also where 1 - (1 - active / experts) is not quite active / experts in floating point."""
    for experts in range(1, 65):
        for active in range(1, experts + 1):
            _, gate_up, *_ = Experts(4, 4, MoE(experts, active)).work(Pass(1, 1, 1))
            assert gate_up.rows == pytest.approx(1) and gate_up.flops == pytest.approx(
                2 * active * 4 * 8)


def test_the_bytes_of_experts_counted_by_hand():
    """Three tokens of width 8, two of four experts of width 5 for each, one shared of width 7, in
    bf16: 4 (1 - 1/2^3) = 3.5 experts are touched, and 6 rows go through them."""
    layer = Experts(8, 5, MoE(4, 2, shared=7))
    bytes = {op.name: op.bytes for op in layer.work(Pass(1, 3, 3))}
    assert bytes == pytest.approx({
        "router": 2 * (8 * 4 + 3 * (8 + 4)),
        "expert gate_up": 2 * (3.5 * 8 * 10 + 6 * (8 + 10)),
        "expert down": 2 * (3.5 * 5 * 8 + 6 * (5 + 8)),
        "silu(gate)*up": 2 * 6 * (10 + 5),                  # both read, their product written
        "shared gate_up": 2 * (8 * 14 + 3 * (8 + 14)),
        "shared silu(gate)*up": 2 * 3 * (14 + 7), "shared down": 2 * (7 * 8 + 3 * (7 + 8)),
        "combine": 2 * 3 * (2 * 8 + 8),                     # two outputs read, their sum written
    })
    flops = {op.name: op.flops for op in layer.work(Pass(1, 3, 3))}
    assert flops["expert gate_up"] == 2 * 6 * 8 * 10 and flops["combine"] == 0


def test_the_element_wise_bytes_of_a_layer_counted_by_hand():
    """Five rows of width 8 in bf16. A norm reads and writes; a sum reads two arrays and writes one,
    or three where attention and MLP lie side by side; RoPE reads and writes Q and K; an activation
    reads what it writes, and the gate beside it."""
    shape = ModelShape("", L=1, D=8, N=4, K=2, H=6, F=12, V=3)
    for more, norms, sums, act in (({}, 2, 6, ("silu(gate)*up", 3)),
                                   ({"parallel": True, "norms": 1, "gated": False}, 1, 4,
                                    ("activation", 2))):
        ops = replace(shape, **more).layers[0].of_rows(Pass(5, 1, 9))
        bytes = {op.name: op.bytes for op in ops if op.kernel == "elementwise"}
        assert bytes == {"norms": 2 * norms * 5 * 8 * 2, "residual": sums * 5 * 8 * 2,
                         "rope": 2 * 5 * (4 + 2) * 6 * 2, act[0]: act[1] * 5 * 12 * 2}
        assert all(op.flops == 0 for op in ops if op.kernel == "elementwise")


def test_the_layers_with_experts_are_where_the_config_puts_them():
    dense_first = ModelShape("", L=6, D=8, N=2, K=2, H=4, F=8, V=8, moe=MoE(
        4, 2, F=6, first_dense=2))
    assert [type(layer.feed_forward).__name__
            for layer in dense_first.layers] == ["MLP"]*2 + ["Experts"]*4
    alternate = ModelShape("", L=6, D=8, N=2, K=2, H=4, F=8, V=8, moe=MoE(4, 2, every=2, offset=1))
    assert [type(layer.feed_forward).__name__ for layer in alternate.layers] == ["MLP", "Experts"]*3


# ---- state spaces ----


class Counted:
    """A number that counts what is done with it."""

    flops = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def __mul__(self, other):
        Counted.flops += 1
        return Counted(self.value * other.value)

    def __add__(self, other):
        Counted.flops += 1
        return Counted(self.value + other.value)

    def exp(self):
        Counted.flops += 1
        return Counted(exp(self.value))


@pytest.mark.parametrize("second", [False, True], ids=["mamba", "mamba2"])
def test_a_scan_costs_what_its_recurrence_does_number_by_number(second):
    """h = a h + x B, y = C h, and the convolution, in scalars that count. A sum of n terms is
    counted as n multiply-adds."""
    inner, state, conv, heads, tokens = 6, 5, 3, 2, 4
    ssm = SSM(inner, state, conv, heads=heads) if second else SSM(inner, state, conv, dt_rank=1)
    channels = inner + 2 * state if second else inner
    number = Counted(0.5)
    h = [[Counted(0.0) for _ in range(state)] for _ in range(inner)]
    Counted.flops = 0
    for _ in range(tokens):
        for _ in range(channels):
            total = Counted(0.0)
            for _ in range(conv):
                total = total + number * number
        x = [number] * inner  # dt·x: made once a channel, not once a state
        for i in range(inner):
            y = Counted(0.0)
            for j in range(state):
                a = number if second else (number * number).exp()       # Mamba-2: one a for a head
                h[i][j] = a * h[i][j] + x[i] * number
                y = y + number * h[i][j]
    [scan] = StateSpace(8, ssm).of_sequences(Pass(1, tokens, tokens))
    assert scan.flops == Counted.flops


@pytest.mark.parametrize("more, kept, inputs", [
    ({"dt_rank": 2}, 6 * 5 + 6 * 4, 6 + 2 * 5 + 6 + 6),         # x; B and C; dt; the gate
    ({"heads": 3, "groups": 2}, 6 * 5 + 26 * 4, 6 + 2 * 2 * 5 + 3 + 6),
], ids=["mamba", "mamba2"])
def test_the_bytes_of_a_scan_counted_by_hand(more, kept, inputs):
    """Two sequences read their states and write them, in a byte a number; six tokens read what goes
    in and write y, in two."""
    [scan] = StateSpace(8, SSM(inner=6, state=5, conv=4, **more)).of_sequences(RUN)
    assert scan.bytes == 2 * 2 * kept * 1 + 6 * (inputs + 6) * 2


def test_a_state_does_not_grow_with_the_context():
    """Mamba-2.8B by hand: 64 layers · 5,120 channels · (16 states + 4 inputs of the convolution) ·
    2 bytes = 13,107,200."""
    shape = catalog.model("mamba-2.8b")
    assert shape.kv_bytes(1, 1) == shape.kv_bytes(1, 10**6) == 13_107_200
    assert shape.decode(1, 1).bytes == shape.decode(1, 10**6).bytes
    assert shape.kv_bytes_per_token() == 0


# ---- formats ----


def test_formats_that_name_their_scales_count_them():
    """llama.cpp's blocks, in bytes and numbers: q4_0 18 for 32, q8_0 34 for 32, q2_k 84, q3_k 110,
    q4_k 144, q5_k 176, q6_k 210 for 256. MXFP4: 16 bytes and a scale of one byte for 32."""
    blocks = {
        "q4_0": (18, 32), "q8_0": (34, 32), "q2_k": (84, 256), "q3_k": (110, 256),
        "q4_k": (144, 256), "q5_k": (176, 256), "q6_k": (210, 256), "mxfp4": (17, 32)
    }
    assert {name: BYTES[name]
            for name in blocks} == {
                name: bytes/numbers
                for name, (bytes, numbers) in blocks.items()
            }


def test_the_most_bytes_an_element_may_have():
    assert element_bytes("kv", 16) == 16
    with pytest.raises(ValueError, match="kv=16.5: accepted are"):
        element_bytes("kv", 16.5)


def test_a_number_of_bytes_is_a_format_too():
    """int4 in groups of 128 with a 16-bit scale: (4 + 16/128) / 8 bytes."""
    shape = catalog.model("llama-2-7b")
    assert element_bytes("weights", 0.515625) == 0.515625
    assert shape.stored_bytes(0.5) == shape.stored_bytes("int4")
    assert shape.decode(3, 100, weights=1, kv=2.0)[:2] == shape.decode(
        3, 100, weights="int8", kv="bf16")[:2]


# ---- errors ----

ODD = dict(L=3, D=60, N=6, K=2, H=14, F=84, V=131)


@pytest.mark.parametrize("call, message", [
    (lambda: element_bytes("weights", 0), "weights=0: accepted are fp32"),
    (lambda: element_bytes("kv", -1.5), "kv=-1.5"),
    (lambda: element_bytes("kv", 99), "kv=99: .* or a number of bytes per element"),
    (lambda: element_bytes("kv", None), "kv=None"), (lambda: MoE(8, 9), "active=9: 1 to 8 experts"),
    (lambda: MoE(8, 0), "active=0"),
    (lambda: MoE(8, 2, every=2, offset=2), "offset=2: 0 to every - 1 = 1"),
    (lambda: SSM(8, 4), "dt_rank=0, heads=0: one of them is given"),
    (lambda: SSM(8, 4, dt_rank=1, heads=2), "dt_rank=1, heads=2"),
    (lambda: ModelShape("", **ODD, pattern=("global", "ring")),
     "pattern='ring': accepted are global, local"),
    (lambda: ModelShape("", **ODD, pattern=("ssm", )), "pattern='ssm' needs"),
    (lambda: ModelShape("", **ODD, biases=("qkv", "gate")), "biases='gate': accepted are qkv, out"),
    (lambda: ModelShape("", **ODD, pattern=("local", "global")),
     "window=None: layers of the pattern are local"),
    (lambda: ModelShape("", **ODD, window=9, pattern=("global", )), "window=9"),
    (lambda: ModelShape("", **ODD | dict(F=0)), "F=0: a model needs at least 1"),
    (lambda: ModelShape("", **ODD | dict(H=0)), "H=0"),
    (lambda: catalog.model("mixtral-8x7b").streamed_bytes(tokens=0), "tokens=0"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_errors_name_the_argument_and_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
