"""KV heads averaged and copied: transformers with the same weights agrees, and a copied head
changes nothing."""

import pytest
import torch
from tolerances import LOGITS
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from clawdemy_infer.files import load_model
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.model import generate
from clawdemy_infer.variants.grouping import with_kv_heads
from clawdemy_infer.variants.named_caches import CACHES

SMALL = {
    "num_hidden_layers": 3, "hidden_size": 60, "num_attention_heads": 12, "num_key_value_heads": 4,
    "head_dim": 10, "intermediate_size": 44, "vocab_size": 101, "max_position_embeddings": 512,
    "initializer_range": 0.3, "eos_token_id": None
}
TEXT = torch.randint(101, (2, 37), generator=torch.Generator().manual_seed(3))


def pooled_by_hand(state, kv_heads):
    """Section 2.1 of the paper on transformers' tensors: rows of a head are its H outputs, and
    neighbours are averaged."""
    def pooled(x):
        heads = x.view(kv_heads, 4 // kv_heads, 10, *x.shape[1:])
        return heads.mean(1).reshape(kv_heads * 10, *x.shape[1:])
    return {name: pooled(x) if ".k_proj." in name or ".v_proj." in name else x
            for name, x in state.items()}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config], ids=["llama", "qwen2: biases"])
def test_averaged_heads_give_the_logits_of_transformers_with_averaged_weights(
        family, kv_heads, tmp_path):
    torch.manual_seed(5)
    whole = AutoModelForCausalLM.from_config(family(**SMALL))
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "bias" in name:
                parameter.normal_()
    whole.save_pretrained(tmp_path)
    fewer = AutoModelForCausalLM.from_config(
        family(**SMALL | {"num_key_value_heads": kv_heads})).eval()
    fewer.load_state_dict(pooled_by_hand(whole.state_dict(), kv_heads))
    with torch.no_grad():
        expected = fewer(TEXT).logits
    ours = with_kv_heads(load_model(tmp_path), kv_heads)(TEXT)
    torch.testing.assert_close(ours/expected.std(), expected/expected.std(),
                               **LOGITS[torch.float32])


@pytest.mark.parametrize("cache", ["contiguous", "paged", "window"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_ragged_batch_of_seven_writes_what_transformers_writes_with_averaged_weights(
        kv_heads, cache, tmp_path):
    torch.manual_seed(5)
    whole = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    whole.save_pretrained(tmp_path)
    fewer = AutoModelForCausalLM.from_config(
        LlamaConfig(**SMALL | {"num_key_value_heads": kv_heads})).eval()
    fewer.load_state_dict(pooled_by_hand(whole.state_dict(), kv_heads))
    ours = with_kv_heads(load_model(tmp_path), kv_heads)
    texts = [TEXT[i % 2, i:i + n].tolist() for i, n in enumerate((5, 1, 30, 17, 2, 23, 11))]
    cache, written = CACHES[cache](ours, 7, 60), [[] for _ in texts]
    new = dict(enumerate(texts))
    for _ in range(20):
        for i, token in enumerate(ours.step(new, cache).argmax(-1).tolist()):
            written[i].append(token)
            new[i] = [token]
    for text, tokens in zip(texts, written, strict=True):
        expected = fewer.generate(torch.tensor([text]), max_new_tokens=20, do_sample=False,
                                  pad_token_id=0)[0, len(text):]
        assert tokens == expected.tolist()


def test_copied_heads_write_the_same_tokens_and_keep_three_times_the_bytes(smollm):
    as_if_mha = with_kv_heads(smollm, 9)
    tokens = [generate(model, "Once upon a time, in a small town by the sea,", max_tokens=12).tokens
              for model in (smollm, as_if_mha)]
    assert tokens[0] == tokens[1]
    ours, theirs = (ContiguousCache.for_model(model, 1, 100).allocated_bytes
                    for model in (as_if_mha, smollm))
    assert ours == 3 * theirs == 100 * 30 * 2 * 9 * 64 * 4


def test_one_averaged_head_keeps_a_third_and_writes_something_else(smollm):
    """The paper trains on after averaging. Without that it is another model."""
    mqa = with_kv_heads(smollm, 1)
    assert ContiguousCache.for_model(mqa, 1, 100).allocated_bytes == 100 * 30 * 2 * 1 * 64 * 4
    text = "The sea was calm, and the old clockmaker looked out of the window."
    ids = torch.tensor([smollm.tokenizer.encode(text)])
    assert (mqa(ids).argmax(-1) == smollm(ids).argmax(-1)).float().mean() < 0.5


def test_only_the_projections_are_new(smollm):
    mqa = with_kv_heads(smollm, 1)
    assert mqa.layers[3].down.weight.data_ptr() == smollm.layers[3].down.weight.data_ptr()
    assert mqa.config.shape.parameters() == sum(parameter.numel() for parameter in mqa.parameters())
    assert smollm.config.shape.K == 3


@pytest.mark.parametrize("kv_heads", [0, 2, 6, 18])
def test_heads_that_cannot_be_made_are_refused(smollm, kv_heads):
    said = f"kv_heads={kv_heads}: of 9 query and 3 KV heads one can make 1, 3, 9"
    with pytest.raises(ValueError, match=said):
        with_kv_heads(smollm, kv_heads)
