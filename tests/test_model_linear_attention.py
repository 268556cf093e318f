"""Linear attention against sums by hand in float64, and against transformers' lightning
attention."""

import pytest
import torch
from tolerances import LOGITS

from clawdemy_infer.variants.linear_attention import empty_state, prefill, step

B, N, T, H, X = 2, 3, 23, 5, 7        # X: width of the values
DECAY = torch.tensor([1.0, 0.9, 0.35], dtype=torch.float64)


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, N, T, width, generator=generator, dtype=torch.float64)
            for width in (H, H, X)]


def sums_by_hand(q, k, v, decay):
    """out_t = sum over s <= t of (q_t . k_s) decay^(t-s) v_s, one term at a time."""
    out = torch.zeros_like(v)
    for t in range(q.shape[2]):
        for s in range(t + 1):
            weight = (q[:, :, t] * k[:, :, s]).sum(-1) * decay ** (t - s)
            out[:, :, t] += weight[..., None] * v[:, :, s]
    return out


@pytest.mark.parametrize("chunks", [[1] * T, [T], [7, 1, 15], [22, 1]], ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_any_cut_into_prefills_and_steps_gives_the_sums_by_hand(qkv, chunks, chunk):
    state = empty_state(B, N, H, X, dtype=torch.float64)
    outs = []
    for part in zip(*(x.split(chunks, dim=2) for x in qkv), strict=True):
        alone = part[0].shape[2] == 1
        outs.append(step(state, *part, DECAY) if alone else prefill(state, *part, DECAY, chunk))
    torch.testing.assert_close(torch.cat(outs, 2), sums_by_hand(*qkv, DECAY))


def test_the_state_is_the_same_whichever_way_it_came_about_and_does_not_grow(qkv):
    by_steps, by_chunks = (empty_state(B, N, H, X, dtype=torch.float64) for _ in range(2))
    prefill(by_chunks, *qkv, DECAY, chunk=4)
    for t in range(T):
        step(by_steps, *(x[:, :, t: t + 1] for x in qkv), DECAY)
    torch.testing.assert_close(by_steps, by_chunks)
    assert by_steps.shape == (B, N, H, X)


def test_prefill_and_steps_equal_transformers_lightning_attention():
    """MiniMax's layer, its projections, norm and gate taken from transformers and what lies between
    them from us."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

    torch.manual_seed(0)
    config = MiniMaxConfig(hidden_size=48, num_attention_heads=4, head_dim=12, num_hidden_layers=2,
                           block_size=8, num_key_value_heads=4,
                           layer_types=["linear_attention", "full_attention"])
    layer = MiniMaxLightningAttention(config, layer_idx=0).eval()
    x = torch.randn(2, 21, 48)
    decay = (-layer.slope_rate.flatten()).exp()
    with torch.no_grad():
        qkv = layer.act_fn(layer.qkv_proj(x)).view(2, 21, 4, 36).transpose(1, 2).split(12, dim=3)
        state = empty_state(2, 4, 12, 12)
        core = prefill(state, *(part[:, :, :17] for part in qkv), decay, chunk=5)
        steps = [step(state, *(part[:, :, t: t + 1] for part in qkv), decay) for t in range(17, 21)]
        core = torch.cat([core, *steps], dim=2).transpose(1, 2).reshape(2, 21, 48)
        ours = layer.out_proj(layer.output_gate(x).sigmoid() * layer.norm(core))
        cache = MiniMaxCache()
        theirs, their_state = layer(x, None, None, past_key_values=cache)
    torch.testing.assert_close(ours, theirs, **LOGITS[torch.float32])
    torch.testing.assert_close(state, their_state, **LOGITS[torch.float32])


@pytest.mark.parametrize("wrong, message", [({"chunk": 0}, "chunk=0"),
                                            ({"decay": torch.tensor([1.0, 0.0, 0.5])}, "decay="),
                                            ({"decay": torch.tensor([1.0, 1.5, 0.5])}, "decay=")],
                         ids=str)
def test_an_impossible_chunk_or_decay_is_refused_before_the_state_changes(qkv, wrong, message):
    state = empty_state(B, N, H, X, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        prefill(state, *qkv, **({"decay": DECAY} | wrong))
    assert not state.any()
