"""Diagrams of mechanisms: what is drawn can be read, comes step by step, and says true numbers."""

import base64
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import NamedTuple

import pytest
import torch
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from clawdemy_course import diagrams
from clawdemy_course.drawing import (
    ACTIVATIONS,
    COMPUTE,
    KV,
    LAUNCH,
    MEMORY,
    WEIGHTS,
    Diagram,
    contrast,
    ink,
)
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.from_config import catalog
from clawdemy_infer.kv_cache.contiguous import ContiguousCache
from clawdemy_infer.lesson.plots import TEXT
from clawdemy_infer.lesson.tables import si

SVG = "{http://www.w3.org/2000/svg}"
LLAMA, QWEN = catalog.model("llama-3.1-70b"), catalog.model("qwen2.5-7b")

PICTURES = {
    "machine": diagrams.machine(),
    "a small machine": diagrams.machine(catalog.machine("l4"), "fp32", 1024, (1, 64)),
    "layer": diagrams.layer(),
    "a large layer": diagrams.layer(LLAMA, batch=256, context=32_768),
    "a batch": diagrams.layer(QWEN, 8, 4096, prompt=1000, weights="int4", kv="fp8"),
    "generation": diagrams.generation(),
    "a prompt": diagrams.generation(prompt=5, steps=6),
    "one step": diagrams.generation(steps=1),
    "cache": diagrams.cache(),
    "an almost full cache": diagrams.cache(126, 8, 128, 4095, 4096, "fp8"),
    "an almost empty cache": diagrams.cache(80, 128, 128, 1, 131_072),
    "the smallest cache": diagrams.cache(1, 1, 64, 1, 3),
    "heads": diagrams.heads(),
    "few heads": diagrams.heads(4, 2, 64, 256, 32),
    "grouped": diagrams.grouped(),
    "small groups": diagrams.grouped(4, 2),
    "windows": diagrams.windows(),
    "small windows": diagrams.windows(2, 5, 2, 2),
    "batch": diagrams.batch(),
    "a batch of a large model": diagrams.batch(LLAMA, (32_767, 8191), (1, 4), "bf16", "bf16",
                                               (256, 8192)),
}


class Area(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Area") -> bool:
        return (self.left < other.right and other.left < self.right
                and self.top < other.bottom and other.top < self.bottom)

    def within(self, other: "Area") -> bool:
        return (self.left >= other.left and self.right <= other.right
                and self.top >= other.top and self.bottom <= other.bottom)


@cache
def parsed(picture: Diagram) -> ET.Element:
    return ET.fromstring(picture.svg())


def texts(picture: Diagram) -> list[str]:
    return [each.text for each in parsed(picture).iter(f"{SVG}text")]


@cache
def extents(text: str, weight: str) -> tuple[float, float, float]:
    """Width, ascent and descent of a text of size 1, in the font that matplotlib brings."""
    path = TextPath((0, 0), text, 100, prop=FontProperties(family="DejaVu Sans", weight=weight))
    box = path.get_extents()
    return box.x1 / 100, box.y1 / 100, box.y0 / 100


@cache
def written(picture: Diagram) -> list[tuple[str, Area, str]]:
    """Texts, where they are, and their colours."""
    found = []
    for each in parsed(picture).iter(f"{SVG}text"):
        size, x, y = (float(each.get(name)) for name in ("font-size", "x", "y"))
        width, up, down = (size * v for v in extents(each.text, each.get("font-weight", "normal")))
        left = x - {"start": 0, "middle": 0.5, "end": 1}[each.get("text-anchor")] * width
        found.append((each.text, Area(left, y - up, left + width, y - down), each.get("fill")))
    return found


@cache
def boxes(picture: Diagram) -> list[tuple[Area, str]]:
    """Filled rectangles and their colours, in the order of drawing."""
    found = []
    for each in parsed(picture).iter(f"{SVG}rect"):
        x, y, width, height = (float(each.get(name)) for name in ("x", "y", "width", "height"))
        if each.get("fill") != "none":
            found.append((Area(x, y, x + width, y + height), each.get("fill")))
    return found


def of_colour(picture: Diagram, fill: str, height: float) -> list[Area]:
    return [box for box, colour in boxes(picture)
            if colour == fill and box.bottom - box.top == height]


@pytest.fixture(params=PICTURES)
def picture(request) -> Diagram:
    return PICTURES[request.param]


def test_every_text_lies_in_the_picture(picture):
    inside = Area(4, 2, picture.width - 4, picture.height - 2)
    assert [text for text, area, _ in written(picture) if not area.within(inside)] == []


def test_no_two_texts_meet(picture):
    assert [(one[0], other[0]) for one, other in combinations(written(picture), 2)
            if one[1].meets(other[1])] == []


def test_text_lies_in_a_box_in_a_colour_that_can_be_read_or_outside_of_all_boxes(picture):
    for text, area, colour in written(picture):
        if colour == TEXT:
            assert not any(area.meets(box) for box, _ in boxes(picture)), text
        else:
            under = [fill for box, fill in boxes(picture) if area.within(box)]
            assert under and contrast(colour, under[-1]) >= 4.5, text


def test_text_is_large_enough_for_the_last_row(picture):
    """A picture of 800 units is shown 1,600 pixels wide on a slide of 1,080 lines."""
    assert picture.width == 800 and picture.height <= 430
    assert {float(each.get("font-size")) for each in parsed(picture).iter(f"{SVG}text")} <= {
        13, 14, 15, 16}


def test_everything_drawn_lies_in_the_picture(picture):
    assert all(box.within(Area(0, 0, picture.width, picture.height)) for box, _ in boxes(picture))


def test_steps_count_from_one_and_each_draws_something(picture):
    groups = list(parsed(picture).iter(f"{SVG}g"))
    assert [each.get("data-step") for each in groups] == [str(n + 1) for n in range(len(groups))]
    assert {each.get("class") for each in groups} == {"step"}
    assert 3 <= len(groups) <= 6
    assert all(len(each) for each in groups)


def test_a_picture_is_small_and_stands_alone(picture):
    svg = picture.svg()
    assert len(svg.encode()) < 40_000
    for other in ("href", "url(", " id=", "<style"):    # nothing that another picture could change
        assert other not in svg


def test_a_picture_says_in_words_what_is_seen(picture):
    root = parsed(picture)
    assert root.get("role") == "img" and root.get("aria-label") == picture.alt
    assert picture.alt.startswith(root.find(f"{SVG}title").text + ". ")
    assert len(picture.alt.split()) >= 25


@pytest.mark.parametrize(("name", "words"), [
    ("machine", ["memory", "bus", "caches", "cores", "launches", "3.35 TB/s", "989 TFLOP/s"]),
    ("layer", ["norm", "Q, K, V", "attention", "KV cache", "gate and up", "down", "residual",
               "head", "decode", "prefill", "282 MB"]),
    ("generation", ["Without a cache", "With a KV cache", "15 rows", "5 rows"]),
    ("heads", ["MHA", "GQA", "MQA", "MLA", "2,048", "latent"]),
    ("grouped", ["KV heads", "3 times", "read once"]),
    ("windows", ["sliding window", "sinks", "global", "72"]),
    ("batch", ["SmolLM2", "1 + 1 + 3 = 5 rows", "read once", "512, 256, 3 tokens", "next token"]),
    ("cache", ["L = 30", "K = 3", "capacity = 12", "H = 64", "append", "truncate(2)", "115 kB"])])
def test_the_words_name_the_parts(name, words):
    assert [word for word in words if word not in PICTURES[name].alt] == []


def test_a_notebook_gets_the_picture_and_its_words():
    picture = PICTURES["generation"]
    bundle = picture._repr_mimebundle_()
    whole = bundle["text/html"].replace('">', '"/>')                    # a tag that never ends
    image = ET.fromstring(f"<p>{whole}</p>").find("img")
    assert image.get("alt") == bundle["text/plain"] == picture.alt
    coded = image.get("src").removeprefix("data:image/svg+xml;base64,")
    assert base64.b64decode(coded).decode() == bundle["image/svg+xml"] == picture.svg()


def test_words_are_written_as_they_are_given():
    picture = Diagram(200, 60, 'A "box" <of> weights & more. It is blue.')
    picture.box(10, 10, 180, 40, '<script> & "x"', WEIGHTS)
    picture.step()
    picture.text(10, 55, "two\nlines")
    root = parsed(picture)
    assert root.get("aria-label") == 'A "box" <of> weights & more. It is blue.'
    assert root.find(f"{SVG}title").text == 'A "box" <of> weights & more'
    assert texts(picture) == ['<script> & "x"', "two", "lines"]


@pytest.mark.parametrize("colour", [WEIGHTS, KV, ACTIVATIONS, COMPUTE, LAUNCH, MEMORY])
def test_text_can_be_read_on_every_colour(colour):
    assert contrast(ink(colour), colour) >= 4.5


# ---- the numbers ----


def test_prices_of_a_product_are_counted_by_hand():
    """4,096² weights of 2 bytes, and a row in and out: 33.57 MB, 33.55 MFLOP; an H100 reads
    3.35 TB/s and computes 989 TFLOP/s. With 1,024 rows: 50.3 MB and 34.4 GFLOP."""
    said = texts(PICTURES["machine"])
    assert "1 row: 33.6 MB, 33.6 MFLOP" in said and "1,024 rows: 50.3 MB, 34.4 GFLOP" in said
    times = [each for each in said if each.endswith(("µs", "ns")) and each[0].isdigit()]
    assert times == ["10.0 µs", "33.9 ns", "4.00 µs", "15.0 µs", "34.7 µs", "4.00 µs"]
    assert said[-1] == "compute-bound" and "memory-bound" in said
    assert "max(bytes, FLOPs, launch) = 10.0 µs" in said
    assert "max(bytes, FLOPs, launch) = 34.7 µs" in said
    assert "H100, data sheet" in said and "launch overhead: 4.00 µs each (assumed)" in said


@dataclass(frozen=True)
class OnCpu(Machine):
    device: str = "cpu"


def test_on_a_cpu_the_launch_adds_to_what_is_launched():
    cpu = OnCpu("CPU of two cores", ((1, 10e9),), {"fp32": 100e9}, 8e9, 10e-6)
    said = texts(diagrams.machine(cpu, "fp32", 1024, (1, 64)))      # 4.2 MB, 134 MFLOP
    assert "max(bytes, FLOPs) + launch = 430 µs" in said and "this machine" in said
    assert "max(bytes, FLOPs) + launch = 1.35 ms" in said
    assert "launch overhead: 10.0 µs each" in said


def test_what_is_launched_longer_than_it_runs_is_launch_bound():
    assert texts(diagrams.machine(size=256, rows=(1, 2)))[-1] == "launch-bound"


def test_a_layers_numbers_are_the_librarys():
    """SmolLM2-135M: Q, K, V are 576 x (9 + 2 x 3) x 64 numbers, gate and up 576 x 2 x 1536."""
    shape, said = catalog.model("smollm2-135m"), texts(PICTURES["layer"])
    decode, prefill = shape.decode(1, 512), shape.prefill(1, 512)
    for work in (decode, prefill):
        assert {si(work.bytes, "B"), si(work.flops, "FLOP")} <= set(said)
    for part in ("1.11 MFLOP", "3.54 MFLOP", "decode: 1 row", "prefill: 512 rows"):
        assert part in said
    assert f"{decode.intensity:.2f} FLOPs per byte" in said


def test_bars_of_a_layer_are_as_wide_as_their_bytes():
    picture, rows = PICTURES["layer"], (62, 138, 206, 244)      # Q K V, output, gate and up, down
    for left in (222, 514):
        blue = [box.right - box.left for box in of_colour(picture, WEIGHTS, 12)
                if box.left == left and box.top in rows]
        assert [width / blue[0] for width in blue] == pytest.approx(
            [1, 9 / 15, 2 * 1536 / (15 * 64), 1536 / (15 * 64)], rel=1e-3)
        [cached] = (box for box in of_colour(picture, KV, 12)
                    if box.left == left and box.top == 100)
        assert (cached.right - cached.left) / blue[0] == pytest.approx(
            2 * 512 * 3 * 64 / (576 * 15 * 64), rel=1e-3)


def test_a_layer_of_another_kind_is_refused():
    for name in ("mixtral-8x7b", "deepseek-v3"):
        with pytest.raises(ValueError, match="shape=.*dense MLP"):
            diagrams.layer(catalog.model(name))


def test_rows_of_a_generation_are_those_drawn():
    picture = PICTURES["a prompt"]                      # 5 tokens, then 5 more, one a step
    assert {"5 + 6 + 7 + 8 + 9 + 10 = 45 rows", "5 + 1 + 1 + 1 + 1 + 1 = 10 rows",
            "0 + 5 + 6 + 7 + 8 + 9 = 35 cached tokens read"} <= set(texts(picture))
    assert len(of_colour(picture, ACTIVATIONS, 32)) == 2 * 10
    assert len(of_colour(picture, LAUNCH, 32)) == 45 - 10


def test_a_caches_bytes_are_those_of_the_librarys_cache():
    used, room = (ContiguousCache(30, 1, 3, 64, tokens, torch.bfloat16).allocated_bytes
                  for tokens in (6, 12))                # five, and the one that is appended
    assert f"6 tokens: {si(used, 'B')} of {si(room, 'B')}" in texts(PICTURES["cache"])
    assert len(of_colour(PICTURES["cache"], KV, 30)) == 2 * 3 * 5


def test_numbers_kept_by_each_kind_of_heads_are_counted_by_hand():
    """8 query heads of 128: 2·8·128 = 2,048; 2 KV heads: 512; 1: 256; DeepSeek-V2: 512 + 64."""
    said = texts(PICTURES["heads"])
    assert [each for each in said if each.endswith("numbers")] == [
        "2,048 numbers", "512 numbers", "256 numbers", "576 numbers"]
    bars = [box.right - box.left for box in of_colour(PICTURES["heads"], KV, 12)]
    assert [width / bars[0] for width in bars] == pytest.approx([1, 1 / 4, 1 / 8, 576 / 2048])


def test_keys_kept_through_windows_are_those_drawn():
    """6 layers of 12 tokens; a window of 4; a sink more; one layer of 12 and five of 4."""
    said = [each for each in texts(PICTURES["windows"]) if each.endswith("keys")]
    assert said == ["72 of 72 keys", "24 of 72 keys", "30 of 72 keys", "32 of 72 keys"]
    assert len(of_colour(PICTURES["windows"], KV, 22)) == 72 + 24 + 30 + 32


def test_a_batch_reads_weights_once_and_the_caches_of_a_librarys_batch():
    """134.5 M numbers in SmolLM2-135M; the caches hold 512, 256 and 3 tokens."""
    one, many = (ContiguousCache(30, B, 3, 64, S).allocated_bytes for B, S in ((1, 771), (64, 512)))
    said = texts(PICTURES["batch"])
    assert f"538 MB + {si(one, 'B')}" in said and f"538 MB + {si(many, 'B')}" in said
    assert len(of_colour(PICTURES["batch"], ACTIVATIONS, 28)) == 5 + 3


@pytest.mark.parametrize(("draw", "sizes", "message"), [
    (diagrams.heads, {"kv_heads": 3}, "query_heads=8, kv_heads=3"),
    (diagrams.grouped, {"kv_heads": 9}, "query_heads=9, kv_heads=9"),
    (diagrams.windows, {"window": 12}, "window=12"),
    (diagrams.generation, {"prompt": 0}, "prompt=0: at least 1"),
    (diagrams.generation, {"prompt": 9, "steps": 7}, "prompt=9, steps=7"),
    (diagrams.cache, {"length": 12}, "length=12, capacity=12"),
    (diagrams.cache, {"kv": "int5"}, "kv='int5'"),
    (diagrams.batch, {"new": (1, 1, 4)}, r"new=\(1, 1, 4\): 2 or 3 sequences"),
    (diagrams.layer, {"batch": 0}, "batch=0")])
def test_what_cannot_be_drawn_is_refused_by_name(draw, sizes, message):
    with pytest.raises(ValueError, match=message):
        draw(**sizes)
