"""Lesson 01: other right ways to count pass; its exercises end where a sum by hand does."""

import pytest
from answers_01 import ALSO_RIGHT

from clawdemy_course import checks, exercise
from clawdemy_course.build_01 import CONFIGS, TASK, decode_step
from clawdemy_infer.from_config import catalog, from_config
from clawdemy_infer.lesson import build


@pytest.mark.parametrize("way", ALSO_RIGHT)
def test_a_count_within_the_tolerance_is_right(way):
    names = {}
    exec(ALSO_RIGHT[way], names)
    assert build.check(TASK, names["my_decode_step"]) == (build.RIGHT, "")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_the_one_that_the_catalog_names(name):
    ours, known = from_config(CONFIGS[name]), catalog.model(name)
    assert [getattr(ours, letter) for letter in "LDNKHFV"] == [
        getattr(known, letter) for letter in "LDNKHFV"]
    assert ours.tied == known.tied and len(CONFIGS) == 10


def test_llama_2_7b_is_counted_as_by_hand():
    # 32 layers of 4·4096² + 3·4096·11008 weights, a head of 32,000·4096; 524,288 B a token.
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32_000 * 4096
    flops, moved = decode_step(CONFIGS["llama-2-7b"], 2, 1000)
    assert flops == 2 * (2 * weights + 4 * 32 * 4096 * 1000)
    assert moved == pytest.approx(2 * weights + 2 * 1000 * 524_288, rel=1e-4)


def test_exercises_end_where_a_sum_by_hand_does():
    # Qwen3-32B: 64 layers of 5120·80·128 + 64·128·5120 + 3·5120·25600; head 151,936·5120.
    layers = 64 * (5120 * 80 * 128 + 64 * 128 * 5120 + 3 * 5120 * 25600)
    read = 2 * (layers + 151_936 * 5120) + 23_000 * 2 * 64 * 8 * 128 * 2
    ttft = (2 * layers * 8000 + 2 * 64 * 64 * 128 * 8000**2) / 989.4e12
    steps = exercise("agent_turn").steps
    assert steps["tpot"].right == pytest.approx(read / 4.8e12, rel=1e-3)
    assert steps["seconds"].right == pytest.approx(ttft + 30_000 * read / 4.8e12, rel=1e-3)
    assert steps["share"].right == pytest.approx(0.5725 / 438.06, rel=1e-3)
    # 65.5 GB stored and 8 · 38,000 · 262,144 B of caches are 145.2 GB, of 141 GiB.
    assert steps["fits"].right is (65.5e9 + 8 * 38_000 * 262_144 < 141 * 2**30)
    # Llama-3.1-70B: 327,680 B of cache a token; 1307.4 TFLOP/s over 5.3 TB/s.
    bound = exercise("compute_bound").steps
    assert bound["below"].right == pytest.approx(2 * 69.5e9 / 327_680 / (1307.4 / 5.3), rel=1e-2)
    # Qwen3-14B: 28.0 GB read, 163,840 B a token: (0.045·864e9 - 28.0e9) / (10,000·163,840) = 6.6;
    # a step of 6 reads 28.0 + 9.8 GB in 43.8 ms, less than the promise.
    promise = exercise("promise").steps
    assert promise["batch"].right == 6
    assert promise["tokens_per_s"].right == pytest.approx(6 / 0.0438, rel=2e-3)
    assert promise["cards"].right == 37


@pytest.mark.parametrize(("name", "step", "answer", "said"), [
    ("unknown_machine", "flops_per_second", 2 * 512**3 / 34.8e-6, "launch in them"),
    ("agent_turn", "share", 8000 / 38_000, "share of the tokens"),
    ("compute_bound", "below", 1777.3, "Leave attention's FLOPs out"),
    ("compute_bound", "batch", 477.9, "Leave attention's FLOPs out"),
    ("promise", "tokens_per_s", 6 / 0.045, "before the promised time"),
    ("promise", "cards", 38, "fewer cards"),
])
def test_a_method_that_is_nearly_right_is_told_what_it_forgot(name, step, answer, said):
    status, line = checks.check_step(step, exercise(name).steps[step], answer)
    assert status == build.WRONG and said in line
