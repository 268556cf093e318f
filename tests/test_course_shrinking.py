"""Lesson 03: ways to read KV heads agree with float64 and run in a decoder; reads are counted as
by hand; the techniques keep the bytes that a sum by hand has."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clawdemy_course import build_03
from clawdemy_course.build_03 import Reads, attending_by, compare, copied_first, grouped
from clawdemy_course.techniques import PUBLISHED, TECHNIQUES
from clawdemy_infer.files import load_model
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.lesson import build
from clawdemy_infer.model import generate

WAYS = [grouped, build_03.head_by_head, copied_first]


@pytest.mark.parametrize("way", WAYS)
@given(K=st.integers(1, 3), G=st.integers(1, 3), S=st.integers(1, 7))
def test_each_way_to_read_KV_heads_is_the_same_attention(way, K, G, S):
    compare(way, K * G, K, S, H=5)


def test_the_oracle_is_pytorchs_attention_in_double_precision():
    q, k, v = build_03.tensors(6, 2, 5, 8)
    right = torch.nn.functional.scaled_dot_product_attention(
        q.double()[:, None], *(x.double().repeat_interleave(3, 0) for x in (k, v)))[:, 0]
    for n in range(6):
        ours = build_03.of_one_head(q[n].tolist(), k[n // 3].tolist(), v[n // 3].tolist(), 8**0.5)
        assert ours == pytest.approx(right[n].tolist())


@pytest.mark.parametrize(("way", "heads"), [
    (grouped, 4),                                   # 2 KV heads, keys and values
    (build_03.head_by_head, 12),                    # once for each of 6 query heads
    (copied_first, 24)])                            # 12 into the copies, and 12 out of them
def test_heads_read_are_counted(way, heads):
    with Reads(53 * 11) as reads:
        way(*build_03.tensors(6, 2, 53, 11))
    assert sum(reads.by_op.values()) == heads


@pytest.mark.parametrize("way", WAYS[1:])
def test_ways_that_read_more_are_told_so_and_nothing_else(way):
    status, text = build.check(build_03.TASK, way)
    assert status == build.WRONG and text.startswith("each KV head is read once for its group")


@pytest.mark.parametrize("way", WAYS)
def test_a_decoder_writes_the_same_text_by_each_of_them(way):
    model = load_model("smollm2-135m")
    told = [generate(model, "The sea", 6, cache=kind.for_model(model, 1, 16)).tokens
            for kind in (attending_by(way), ContiguousCache)]
    assert told[0] == told[1]


@pytest.mark.parametrize(("name", "bytes"), [
    ("MHA", 32 * 2 * 32 * 128 * 2 * 32_768), ("GQA", 32 * 2 * 8 * 128 * 2 * 32_768),
    ("MQA", 32 * 2 * 128 * 2 * 32_768), ("MLA", 32 * (512 + 64) * 2 * 32_768),
    ("window of 4,096", 32 * 2 * 8 * 128 * 2 * 4096),
    ("5 local : 1 global", 2 * 8 * 128 * 2 * (27 * 1024 + 5 * 32_768)),
    ("int8", 32 * 2 * 8 * (128 + 2) * 32_768), ("int4", 32 * 2 * 8 * 128 * 32_768 * 5 / 8)])
def test_a_technique_keeps_the_bytes_of_a_sum_by_hand(name, bytes):
    technique = TECHNIQUES[name]
    assert technique.shape.kv_bytes(1, 32_768, technique.kv) == bytes


def test_every_published_figure_names_its_source_and_table():
    assert len(PUBLISHED) <= 8                          # rows that a slide has room for
    assert all(each.source and each.after for each in PUBLISHED)
    assert {each.source.split(",")[0] for each in PUBLISHED} == {
        "Ainslie 2023", "DeepSeek-V2", "Xiao 2023", "Gemma 3", "LMDeploy"}
