"""Experts against transformers' Mixtral, and what they touch against counting and against
chance."""

from dataclasses import replace

import pytest
import torch
from tolerances import LOGITS
from transformers import MixtralConfig, MixtralForCausalLM

from clawdemy_infer.arithmetic import ModelShape, MoE
from clawdemy_infer.files.directory import destinations
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.model import ModelConfig
from clawdemy_infer.variants.experts import ExpertLayer, Experts, decoder_with_experts

TOKENS = 19


DENSE = ModelShape("tiny", L=3, D=60, N=6, K=2, H=10, F=84, V=131, max_context=256)


@pytest.fixture(scope="module", params=[(8, 2), (5, 3), (7, 1), (4, 4)],
                ids=lambda Ek: f"{Ek[1]} of {Ek[0]}")
def both(request):
    """transformers' Mixtral of random weights, norms included, and ours with the same."""
    E, k = request.param
    torch.manual_seed(E)
    theirs = MixtralForCausalLM(
        MixtralConfig(hidden_size=60, intermediate_size=84, num_hidden_layers=3,
                      num_attention_heads=6, num_key_value_heads=2, vocab_size=131,
                      num_local_experts=E, num_experts_per_tok=k, sliding_window=None,
                      rope_parameters={"rope_type": "default", "rope_theta": 1e4},
                      rms_norm_eps=1e-5, max_position_embeddings=256)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    ours = decoder_with_experts(ModelConfig(DENSE, norm_eps=1e-5), MoE(E, k))
    weights = dict(theirs.named_parameters())
    copied = 0
    for index, layer in enumerate(ours.layers):
        # `destinations` names the places of a dense layer; these stand in for its MLP while it is
        # asked.
        layer.gate_up = torch.nn.Linear(60, 168, bias=False)
        layer.down = torch.nn.Linear(84, 60, bias=False)
        experts, there = layer.experts, f"model.layers.{index}.mlp"
        for target, name in ((experts.router.weight, "gate.weight"),
                             (experts.gate_up, "experts.gate_up_proj"),
                             (experts.down, "experts.down_proj")):
            target.copy_(weights[f"{there}.{name}"].detach())
            copied += 1
    for name, target in destinations(ours).items():
        if ".mlp." not in name:
            target.data.copy_(weights[name].detach())
            copied += 1
    for layer in ours.layers:
        del layer.gate_up, layer.down
    assert copied == len(weights)
    ids = torch.randint(0, 131, (3, TOKENS), generator=torch.Generator().manual_seed(1))
    return ours, theirs, ids, replace(DENSE, moe=MoE(E, k))


def test_logits_equal_transformers(both):
    ours, theirs, ids, _ = both
    with torch.no_grad():
        expected = theirs(ids).logits
    assert expected.std() > 0.3         # logits that differ, or equality would mean nothing
    torch.testing.assert_close(ours(ids), expected, **LOGITS[torch.float32])


@pytest.mark.parametrize("chunks", [[1] * TOKENS, [7, 5, 7], [12, 1, 1, 5]], ids=str)
def test_logits_with_a_cache_equal_transformers_however_the_tokens_are_cut(both, chunks):
    ours, theirs, ids, _ = both
    cache = ContiguousCache.for_model(ours, batch=3, capacity=TOKENS)
    logits = torch.cat([ours(chunk, cache) for chunk in ids.split(chunks, dim=1)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(logits, theirs(ids).logits, **LOGITS[torch.float32])


def test_the_parameters_are_as_many_as_the_shape_counts_and_transformers_has(both):
    ours, theirs, _, shape = both
    count = sum(p.numel() for p in ours.parameters())
    assert count == theirs.num_parameters() == shape.parameters()


def test_a_row_of_experts_is_what_its_experts_say_one_by_one():
    """In float64, expert after expert for every token: no sorting, no grouping."""
    torch.manual_seed(0)
    layer = Experts(33, 45, experts=11, active=4).double().requires_grad_(False)
    x = torch.randn(17, 33, dtype=torch.float64)
    rows = []
    for row in x:
        p = (layer.router.weight @ row).softmax(0)
        best = sorted(range(11), key=lambda e: -p[e])[:4]
        each = []
        for e in best:
            gate, up = (layer.gate_up[e] @ row).split(45)
            each.append(p[e] * (layer.down[e] @ (gate * gate.sigmoid() * up)))
        rows.append(sum(each) / p[best].sum())
    torch.testing.assert_close(layer(x), torch.stack(rows))


def test_every_chosen_expert_runs_once_and_the_others_not_at_all(monkeypatch):
    torch.manual_seed(0)
    layer = Experts(12, 20, experts=9, active=2).requires_grad_(False)
    x, ran, expert = torch.randn(3, 12), [], layer.expert

    def counted(e, rows):
        ran.append((e, len(rows)))
        return expert(e, rows)
    monkeypatch.setattr(layer, "expert", counted)
    layer(x)
    chosen, _ = layer.route(x)
    assert ran == [(e, chosen.eq(e).sum().item()) for e in chosen.unique().tolist()]
    assert len(ran) < 9


def test_random_tokens_touch_as_many_experts_as_chance_says():
    """Each of 4,000 batches chooses evenly at random: the mean of the counts, against the closed
    form."""
    generator = torch.Generator().manual_seed(0)
    for E, k, B in ((8, 2, 5), (60, 4, 13), (16, 16, 2), (7, 3, 1)):
        # [4000, B*k]
        draws = torch.rand(4000, B, E, generator=generator).topk(k, dim=-1).indices.flatten(1)
        distinct = torch.zeros(4000, E).scatter_(1, draws, 1.0).sum(1)
        error = distinct.std() / 4000**0.5
        assert abs(distinct.mean() - MoE(E, k).touched(B)) <= 5 * error + 1e-9


def test_layers_before_the_first_experts_keep_their_mlp():
    moe = MoE(4, 2, F=16, first_dense=1)
    model = decoder_with_experts(ModelConfig(DENSE), moe)
    assert [isinstance(layer, ExpertLayer) for layer in model.layers] == [False, True, True]
    assert model.layers[1].experts.down.shape == (4, 60, 16)
    assert sum(p.numel() for p in model.parameters()) == replace(DENSE, moe=moe).parameters()


@pytest.mark.parametrize("active", [0, 9])
def test_an_impossible_number_of_active_experts_is_refused_by_name(active):
    with pytest.raises(ValueError, match=f"active={active}: 1 to experts=8"):
        Experts(12, 20, experts=8, active=active)


def test_shared_experts_are_refused():
    with pytest.raises(ValueError, match="shared=8"):
        decoder_with_experts(ModelConfig(DENSE), MoE(4, 2, shared=8))
