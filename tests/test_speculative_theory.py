"""The formulas against the paper's own table, a simulation of dice, and sums by hand."""

import random

import pytest

from clawdemy_course import theory
from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.from_config import catalog
from clawdemy_infer.speculative import Round

FP32 = {"weights": "fp32", "kv": "fp32", "activations": "fp32"}
# Leviathan et al. 2023, table 1: alpha, gamma, and the factors of operations and of speed with c =
# 0 and v = 1.
TABLE_1 = [(0.6, 2, 1.96), (0.7, 3, 2.53), (0.8, 2, 2.44), (0.8, 5, 3.69), (0.9, 2, 2.71),
           (0.9, 10, 6.86)]


@pytest.mark.parametrize(("alpha", "gamma", "speed"), TABLE_1)
def test_expected_tokens_are_those_of_the_papers_table(alpha, gamma, speed):
    assert theory.speedup(alpha, gamma, c=0) == pytest.approx(speed, abs=0.006)
    assert theory.expected_tokens([alpha] * gamma, gamma) == pytest.approx(speed, abs=0.006)


def test_expected_tokens_with_an_alpha_for_each_position_are_those_of_dice():
    dice, alphas, brought = random.Random(0), [0.9, 0.5, 0.7], 0
    for _ in range(40_000):
        stood = 0
        while stood < 3 and dice.random() < alphas[stood]:
            stood += 1
        brought += stood + 1
    assert theory.expected_tokens(alphas, 3) == pytest.approx(brought / 40_000, rel=0.01)


def test_the_ends_of_the_formula():
    assert theory.expected_tokens(
        1.0, 7) == 8 and theory.expected_tokens(0.0, 7) == 1 == theory.expected_tokens(0.5, 0)
    for alpha, gamma in ((1.1, 2), (-0.1, 2), ([0.5], 2), (0.5, -1)):
        with pytest.raises(ValueError, match="alpha=|gamma="):
            theory.expected_tokens(alpha, gamma)


ROUNDS = [Round([1, 2, 3], 3, 4), Round([1, 2, 3], 1, 9), Round([5], 0, 6), Round([], 0, 7)]


def test_alpha_is_counted_where_a_token_was_looked_at():
    assert theory.acceptance_by_position(ROUNDS) == [2 / 3, 1 / 2, 1.0]
    assert theory.acceptance_rate(ROUNDS) == 4 / 6
    # NaN
    assert theory.acceptance_rate([Round([], 0, 7)]) != theory.acceptance_rate([Round([], 0, 7)])


def test_rounds_that_were_played_are_priced_each_at_its_own_size():
    v = {4: 1.5, 2: 1.2, 1: 1.0}.__getitem__
    assert theory.speedup_of(ROUNDS, c=0.5, v=v) == pytest.approx(
        (4 + 2 + 1 + 1)/(2*(3*0.5 + 1.5) + (0.5 + 1.2) + 1.0))


def test_a_verification_streams_the_weights_once_and_names_every_row():
    shape = catalog.model("smollm2-135m")
    one, five = (shape.step(1, rows, 100, logits=rows) for rows in (1, 5))
    assert one == shape.decode(1, 100)
    matrices = shape.matrix_parameters() + shape.D * shape.V
    pairs = 96 + 97 + 98 + 99 + 100
    assert five.flops == 2 * 5 * matrices + shape.L * 4 * shape.N * shape.H * pairs
    assert five.bytes < 1.05 * one.bytes


def test_each_row_that_is_checked_needs_its_logits():
    """Where the head is nearly all there is and compute all that counts, four rows cost four."""
    shape = ModelShape("", L=1, D=8, N=1, K=1, H=8, F=8, V=100_000)
    machine = Machine("compute", ((1.0, 1e30),), {"fp32": 1.0}, 1e10)
    assert theory.verification_cost(machine, shape, 4, 9, **FP32) == pytest.approx(4, rel=0.01)


def test_checking_is_free_under_the_roof_and_dear_beyond_the_ridge():
    """Ridge at 10 FLOPs a byte; a row brings half a FLOP for each byte of fp32 weights."""
    machine = Machine("flat", ((1e9, 1e10),), {"fp32": 1e11}, 1e10)
    shape = catalog.model("smollm2-135m")
    assert theory.verification_cost(machine, shape, 5, 64, **FP32) == pytest.approx(1.0, abs=0.05)
    assert theory.verification_cost(machine, shape, 40, 64, **FP32) == pytest.approx(2.0, rel=0.1)
    assert theory.verification_cost(machine, shape, 5, 64, batch=32, **FP32) > 3
