"""Multi-head latent attention: the logits of transformers' DeepSeek-V2 both ways, and as many bytes
as the shape counts."""

from dataclasses import replace

import pytest
import torch
from tolerances import LOGITS
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from clawdemy_infer.arithmetic import MLA, ModelShape
from clawdemy_infer.variants.latent import LatentCache, LatentConfig, LatentDecoder

SHAPE = ModelShape("small", L=3, D=54, N=6, K=6, H=14 + 8, F=44, V=101, max_context=256,
                   mla=MLA(latent=20, rope=8, value=10))
TEXT = torch.randint(101, (83,), generator=torch.Generator().manual_seed(3)).tolist()
BOTH_WAYS = pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "naive"])


@pytest.fixture(scope="module")
def theirs():
    """Random weights, norms too, of which none is near enough to 0 or 1 to hide a mistake."""
    torch.manual_seed(5)
    model = DeepseekV2ForCausalLM(
        DeepseekV2Config(num_hidden_layers=3, first_k_dense_replace=3, hidden_size=54,
                         num_attention_heads=6, num_key_value_heads=6, q_lora_rank=None,
                         kv_lora_rank=20, qk_nope_head_dim=14, qk_rope_head_dim=8, v_head_dim=10,
                         intermediate_size=44, vocab_size=101, max_position_embeddings=256,
                         rms_norm_eps=1e-6, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def halves(rows):
    """DeepSeek rotates neighbours (0,1), (2,3), ...; this decoder halves (0, n/2), (1, n/2 + 1),
    ..."""
    return torch.cat((rows[0::2], rows[1::2]))


@torch.no_grad()
def ours_from(theirs, absorbed):
    model = LatentDecoder(LatentConfig(SHAPE), absorbed)
    model.embed.weight.copy_(theirs.model.embed_tokens.weight)
    model.norm.weight.copy_(theirs.model.norm.weight)
    model.head.weight.copy_(theirs.lm_head.weight)
    for mine, other in zip(model.layers, theirs.model.layers, strict=True):
        attention, mlp = other.self_attn, other.mlp
        q = attention.q_proj.weight.unflatten(0, (6, 22))
        mine.q.weight.copy_(torch.cat([torch.cat((head[:14], halves(head[14:]))) for head in q]))
        a = attention.kv_a_proj_with_mqa.weight
        mine.kv_a.weight.copy_(torch.cat((a[:20], halves(a[20:]))))
        mine.latent_norm.weight.copy_(attention.kv_a_layernorm.weight)
        mine.kv_b.weight.copy_(attention.kv_b_proj.weight)
        mine.out.weight.copy_(attention.o_proj.weight)
        mine.attention_norm.weight.copy_(other.input_layernorm.weight)
        mine.mlp_norm.weight.copy_(other.post_attention_layernorm.weight)
        mine.gate_up.weight.copy_(torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))
        mine.down.weight.copy_(mlp.down_proj.weight)
    return model.eval()


@BOTH_WAYS
@pytest.mark.parametrize("pieces", [[83], [1]*83, [40, 3, 1, 1, 38]],
                         ids=["whole", "one by one", "in pieces"])
def test_logits_equal_transformers_deepseek_v2(theirs, absorbed, pieces):
    ours = ours_from(theirs, absorbed)
    with torch.no_grad():
        expected = theirs(torch.tensor([TEXT])).logits[0]
    cache, start, out = LatentCache.for_model(ours, 1, 83), 0, []
    for piece in pieces:
        out.append(ours.step({0: TEXT[start:start + piece]}, cache, logits_to_keep=0))
        start += piece
    scale = expected.std()
    torch.testing.assert_close(torch.cat(out) / scale, expected / scale, **LOGITS[torch.float32])


@BOTH_WAYS
def test_a_ragged_batch_computes_what_each_sequence_does_alone(theirs, absorbed):
    ours = ours_from(theirs, absorbed)
    starts = [1, 30, 7, 16, 2, 8, 41]
    cache = LatentCache.for_model(ours, 7, 60)
    ours.step({i: TEXT[i:i + n] for i, n in enumerate(starts)}, cache)
    logits = ours.step({i: [TEXT[i + n]] for i, n in enumerate(starts)}, cache)
    with torch.no_grad():
        expected = torch.cat(
            [theirs(torch.tensor([TEXT[i:i + n + 1]])).logits[:, -1] for i, n in enumerate(starts)])
    torch.testing.assert_close(logits/expected.std(), expected/expected.std(),
                               **LOGITS[torch.float32])


def test_a_token_leaves_latent_and_rope_once_a_layer(theirs):
    """DeepSeek-V2, table 1: (d_c + d_h^R) l elements for each token. 3 layers of 20 + 8 numbers."""
    cache = LatentCache.for_model(ours_from(theirs, True), batch=5, capacity=77)
    assert cache.allocated_bytes == 5 * 77 * 3 * (20 + 8) * 4 == SHAPE.kv_bytes(5, 77, "fp32")


def test_the_parameters_are_as_many_as_the_shape_counts_and_transformers_has(theirs):
    count = sum(parameter.numel() for parameter in LatentDecoder(LatentConfig(SHAPE)).parameters())
    assert count == theirs.num_parameters() == SHAPE.parameters()


def test_a_shape_without_a_latent_is_refused():
    with pytest.raises(ValueError, match="mla=None"):
        LatentDecoder(LatentConfig(replace(SHAPE, mla=None)))
