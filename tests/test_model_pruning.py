"""A pruned model against transformers' with the same layers taken out."""

import copy
from dataclasses import replace

import pytest
import torch
from tolerances import LOGITS
from transformers import LlamaConfig, LlamaForCausalLM

from clawdemy_infer.files import load_model
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.variants.pruning import influence, without_layers

CONFIG = LlamaConfig(hidden_size=60, intermediate_size=84, num_hidden_layers=5, vocab_size=131,
                     max_position_embeddings=256, num_attention_heads=6, num_key_value_heads=2,
                     tie_word_embeddings=False)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(CONFIG).eval().requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    path = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(path)
    return load_model(path), theirs


@pytest.fixture
def ids():
    return torch.randint(0, 131, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dropped", [[], [0], [4, 1], {1, 2, 3, 4}], ids=str)
def test_logits_equal_transformers_with_the_same_layers_taken_out(both, ids, dropped):
    ours, theirs = both[0], copy.deepcopy(both[1])
    theirs.model.layers = torch.nn.ModuleList(
        layer for index, layer in enumerate(theirs.model.layers) if index not in dropped)
    theirs.config.num_hidden_layers = len(theirs.model.layers)
    expected = theirs(ids, use_cache=False).logits
    torch.testing.assert_close(without_layers(ours, dropped)(ids), expected,
                               **LOGITS[torch.float32])


def test_a_pruned_model_counts_its_own_parameters_and_keeps_a_smaller_cache(both, ids):
    ours, _ = both
    pruned = without_layers(ours, [1, 3])
    count = sum(p.numel() for p in pruned.parameters())
    assert count == pruned.config.shape.parameters() < ours.config.shape.parameters()
    cache = ContiguousCache.for_model(pruned, batch=2, capacity=17)
    logits = torch.cat([pruned(chunk, cache) for chunk in ids.split([9, 1, 7], dim=1)], dim=1)
    torch.testing.assert_close(logits, pruned(ids), **LOGITS[torch.float32])


def test_pruning_copies_no_weight_and_leaves_the_model_as_it_was(both, ids):
    ours, _ = both
    before = ours(ids)
    pruned = without_layers(ours, [0])
    assert pruned.layers[0].out.weight.data_ptr() == ours.layers[1].out.weight.data_ptr()
    assert ours.config.shape.L == len(ours.layers) == 5
    torch.testing.assert_close(ours(ids), before, rtol=0, atol=0)


def test_influence_is_that_of_transformers_hidden_states(both, ids):
    ours, theirs = both
    last = []  # transformers' own list ends with the final norm, not with the last layer
    hook = theirs.model.layers[-1].register_forward_hook(
        lambda _, __, out: last.append(out if torch.is_tensor(out) else out[0]))
    states = [*theirs(ids, output_hidden_states=True).hidden_states[:-1], *last]
    hook.remove()
    expected = [1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item()
                for a, b in zip(states, states[1:], strict=False)]
    assert influence(ours, ids) == pytest.approx(expected, abs=1e-5)
    assert influence(ours, ids) == influence(ours, ids)         # no hook is left behind


def test_a_layer_that_adds_nothing_has_no_influence_and_may_go(both, ids):
    ours, _ = both
    whole = without_layers(ours, [])
    idle = type(whole.layers[0])(ours.config.shape, 1e-6).requires_grad_(False)
    idle.out.weight.zero_()
    idle.down.weight.zero_()
    whole.layers.insert(2, idle)
    whole.config = replace(ours.config, shape=replace(ours.config.shape, L=6))
    assert influence(whole, ids)[2] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dropped, message",
                         [([5], "dropped=5: layers 0 to 4"), ([-1], "dropped=-1"),
                          (range(5), "must stay")], ids=str)
def test_an_impossible_choice_of_layers_is_refused(both, dropped, message):
    with pytest.raises(ValueError, match=message):
        without_layers(both[0], dropped)
