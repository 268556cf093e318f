"""What `bench --drafts` says beside its measurements."""

import math

import pytest

from clawdemy_infer.commands_drafts import arithmetic_table, at_best, weights_directory
from clawdemy_infer.model.load import PACKAGED, packaged_file


def test_what_the_parts_leave_room_for_is_the_best_of_all_gammas():
    def v(rows):
        return 1 + 0.1 * (rows - 1)

    found = at_best(0.8, 0.2, v, 8)
    by_hand = {gamma: sum(0.8**i for i in range(gamma + 1)) / (0.2 * gamma + v(gamma + 1)) for gamma in range(9)}
    assert found["speedup"] == pytest.approx(max(by_hand.values())) == pytest.approx(by_hand[found["gamma"]])
    assert (found["tokens_per_round"], found["v"]) == (pytest.approx(sum(0.8**i for i in range(found["gamma"] + 1))), v(found["gamma"] + 1))
    assert "1.55 ×" in repr(arithmetic_table([{"mode": "greedy", "draft": "int8"} | found]))


def test_a_draft_that_never_guessed_leaves_plain_decoding():
    found = at_best(math.nan, 0.2, lambda rows: float(rows), 8)
    assert (found["alpha"], found["gamma"], found["speedup"]) == (0.0, 0, 1.0)


def test_transformers_finds_the_weights_of_a_name_and_of_its_file(tmp_path):
    package, file, _ = PACKAGED["smollm2-135m"]
    by_name, by_file = weights_directory("smollm2-135m"), weights_directory(str(packaged_file(package, file)))
    assert (by_name / "config.json").read_text() == (by_file / "config.json").read_text()
    assert weights_directory(str(tmp_path)) == tmp_path and weights_directory("no-such-model") is None
