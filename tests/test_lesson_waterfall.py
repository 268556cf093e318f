"""From napkin to measured: the steps add up, the sentence has their sign, and nothing is claimed
that was not measured. All numbers are round and worked out by hand."""

import matplotlib

matplotlib.use("Agg")

from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest

from clawdemy_infer.envelope.roofline import Part, Prediction
from clawdemy_infer.lesson import Lesson, plots
from clawdemy_infer.lesson.ledger import LedgerRow, read
from clawdemy_infer.lesson.waterfall import Moment, account, choices, moment
from clawdemy_infer.machine.calibrated import Speeds
from clawdemy_infer.timing import Timing


def part(name, napkin, measured, **more):
    return {"name": name, "napkin_s": napkin, "predicted_s": None, "measured_s": measured, **more}


SLOWER = [part("qkv", 4, 6), part("down", 6, 9), part("attention", 0, 1),
          part("launches", 0, 2, reached=50.0, unit="launches/s")]
FASTER = [part("qkv", 4, 2.5), part("down", 6, 4.5), part("attention", 0, 0.5),
          part("launches", 0, 0.3, reached=50.0, unit="launches/s")]


def row(measured=20.0, parts=SLOWER, **more):
    return LedgerRow("01", "time per token", "s", napkin=10.0, measured=measured, parts=parts,
                     **more)


def test_the_steps_lead_from_napkin_to_measured():
    found = account(row())
    assert found.steps == {"products": 5, "attention": 1, "launches": 2, "not explained": 2}
    assert found.explained == pytest.approx(0.8)
    assert found.sentence == (
        "Products: +5.00 s, 50% of the +10.0 s from napkin to measured; at 67% of the bandwidth, "
        "down at 67%. Not explained: +2.00 s.")


def test_a_machine_that_was_slower_at_that_moment_has_a_step_of_its_own():
    found = account(row(), Moment("memory", 0.8, 0.9))
    assert found.steps == pytest.approx({
        "bandwidth at that moment": 2.5, "products": 2.5, "attention": 1, "launches": 2,
        "not explained": 2})
    assert sum(found.steps.values()) == pytest.approx(10)
    found = account(row(), Moment("memory", 0.5, 0.6))  # and products ran above their bound
    assert found.steps == pytest.approx({
        "bandwidth at that moment": 10, "products": -5, "attention": 1, "launches": 2,
        "not explained": 2})
    assert found.causes == ("memory was slower than calibrated",)
    assert found.sentence.startswith(
        "Memory was slower than calibrated: +10.0 s, 100% of the +10.0 s from napkin to measured; "
        "memory ran at 50% of the speed the prediction used.")


def test_a_faster_run_is_explained_with_its_own_sign():
    found = account(row(8.0, FASTER))
    assert found.steps == pytest.approx(
        {"products": -3, "attention": 0.5, "launches": 0.3, "not explained": 0.2})
    assert found.explained == pytest.approx(0.9)
    assert found.sentence.startswith("Products: -3.00 s, 150% of the -2.00 s from napkin")
    found = account(row(8.0, ()), Moment("compute", 2.0, 2.0))
    assert found.causes == ("compute was faster than calibrated",)
    assert found.steps == {"peak at that moment": -5, "not explained": 3}


def test_a_step_against_the_difference_is_no_share_of_it():
    """The machine was faster, and the run slower: -70 % of a difference says nothing."""
    found = account(row(12.0, [part("qkv", 10, 12)]), Moment("memory", 2.0, 2.0))
    assert found.steps == {"bandwidth at that moment": -5, "qkv": 7, "not explained": 0}
    assert "+7.00 s, and +2.00 s from napkin to measured in all" in found.sentence


def test_launches_are_told_by_number_and_price():
    launches = part("launches", 0, 5, reached=200.0, unit="launches/s")
    found = account(row(15.0, [part("down", 10, 10), launches]))
    assert "; 1,000 launches at 5.00 ms. Not explained: 0 s." in found.sentence
    assert found.explained == 1 and found.causes == ("launches", "launches")


def test_without_parts_all_is_not_explained():
    found = account(row(15.0, ()))
    assert found.steps == {"not explained": 5} and found.explained == 0
    assert found.sentence == "Not explained: +5.00 s, 100% of the +5.00 s from napkin to measured."
    assert account(LedgerRow("02", "speed-up", "×", 4.0, measured=3.0)).sentence == (
        "Not explained: -1.00 ×, 100% of the -1.00 × from napkin to measured.")


def test_a_run_below_its_own_bound_is_impossible_as_stated():
    found = account(row(8.0, FASTER, spread=0.01))
    assert found.sentence.startswith(
        "Impossible as stated: the napkin's bytes take 10.0 s at the bandwidth, and it took "
        "8.00 s. Not counted: what spared it 20% of those bytes. The largest step: products, -")
    # within the spread of the measurement, or at the speed of a moment, it is possible
    for spread, at in ((0.26, Moment()), (0.01, Moment("memory", 1.1, 1.3))):
        assert "mpossible" not in account(row(8.0, FASTER, spread=spread), at).sentence
    for measured, possible in ((10.8, True), (10.3, False)):  # 11.1 s at nine tenths, ± 5 %
        found = account(row(measured, (), spread=0.05), Moment("memory", 0.85, 0.9))
        assert found.sentence.startswith("Impossible") != possible
    # as fast as the napkin, on a machine of half the speed
    assert account(row(10.0, (), spread=0.0), Moment("memory", 0.5, 0.5)).sentence.startswith(
        "Impossible as stated: the napkin's bytes take 20.0 s at the bandwidth at that moment")
    # and where the value was derived from others, nobody can tell
    assert "mpossible" not in account(row(8.0, FASTER)).sentence


def test_a_difference_within_the_spread_is_not_explained_away():
    found = account(row(10.5, spread=0.05))
    assert (found.explained, found.causes) == (None, ())
    assert found.sentence.startswith("Nothing to explain: +500 ms from napkin to measured")
    same = account(LedgerRow("08", "checkpoint", "B", napkin=10.0, measured=10.0))
    assert (same.explained, same.causes) == (None, ()) and "±" not in same.sentence


def test_what_rounding_leaves_is_not_told():
    found = account(row(20.0, [part("qkv", 10, 10.1 + 9.7), part("launches", 0, 0.2)]))
    assert found.steps["not explained"] == 0 and found.sentence.endswith("Not explained: 0 s.")


def test_small_parts_stand_together():
    found = account(row(40.0, [part(name, 0, seconds) for name, seconds in
                               zip("abcdef", (1, 9, 2, 8, 3, 7), strict=True)]))
    assert found.steps == {"b": 9, "d": 8, "e": 3, "f": 7, "other parts": 3, "not explained": 0}


def test_the_moment_is_taken_of_what_the_napkin_waits_for():
    now, around = SimpleNamespace(memory=0.5), [SimpleNamespace(memory=m) for m in (0.4, 0.5)]
    assert moment(None, SimpleNamespace(now=now), around) == ("memory", pytest.approx(0.9), 1.0)
    assert moment(None, "a data sheet", [Speeds(memory=0.5)]) == Moment("memory", 0.5, 0.5)
    assert moment(None, "a data sheet") == Moment("memory", 1.0, 1.0)
    prefill = Prediction({"down": Part(3.0, bound="compute")}, compute_s=3.0, memory_s=1.0)
    around = [Speeds(memory=9.0, compute=0.5), Speeds(memory=9.0, compute=1.0)]
    machine = SimpleNamespace(now=Speeds())
    assert moment(prefill, machine, around) == ("compute", 0.75, 1.0)
    one_row = Prediction({"down": Part(3.0, bound="memory")}, compute_s=3.0, memory_s=1.0)
    assert moment(one_row, machine, around) == ("memory", 9.0, 9.0)


def test_parts_are_shares_of_the_run_that_was_measured(lesson):
    class Watched(list):
        whole_s = 16.0

    lesson.measure("time per token", 20.0, parts=Watched(SLOWER))
    parts = {part["name"]: part for part in lesson.rows["time per token"].parts}
    assert [part["measured_s"] for part in parts.values()] == [7.5, 11.25, 1.25, 2.5]
    assert parts["launches"]["reached"] * parts["launches"]["measured_s"] == 100  # launches still
    lesson.measure("time per token", 20.0, parts=SLOWER)
    assert lesson.rows["time per token"].parts[0]["measured_s"] == 6


# -- what a notebook sees -------------------------------------------------------------------------


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAWDEMY_LEDGER", str(tmp_path / "ledger.jsonl"))
    lesson = Lesson("01", machine="a test's machine")
    lesson.predict("time per token", napkin=10.0, unit="s")
    return lesson


@pytest.mark.parametrize(("choice", "right"), [
    ("products", True), ("down", True), ("launches", False),
    ("memory was slower than calibrated", False), ("not explained", False)])
def test_a_cause_is_judged_by_the_largest_step(lesson, capsys, choice, right):
    lesson.measure("time per token", Timing((20.0,)), parts=SLOWER)
    lesson.cause("time per token", choice)
    lesson.explain("time per token")
    [*_, row] = read()
    assert (row.cause, row.cause_right) == (choice, right)
    assert row.sentence == account(row).sentence and row.explained == pytest.approx(0.8)
    assert f"{'✓' if right else '✗'} you said: {choice}." in capsys.readouterr().out


def test_a_cause_after_the_explanation_never_counts_however_often_cells_are_run(lesson, capsys):
    for _ in range(2):
        lesson.measure("time per token", 20.0, parts=SLOWER)
        lesson.cause("time per token", ...)
        lesson.explain("time per token")
        capsys.readouterr()
        lesson.cause("time per token", "products")
        assert "too late" in capsys.readouterr().out
        lesson.explain("time per token")
    assert {(row.cause, row.cause_right) for row in read()} == {("", None)}
    lesson.measure("time per token", 20.0, parts=SLOWER)
    lesson.cause("time per token", "products")
    assert lesson.rows["time per token"].cause == ""


def test_an_unknown_cause_gets_one_line_with_those_there_are(lesson, capsys):
    lesson.measure("time per token", 20.0, parts=SLOWER)
    lesson.cause("time per token", "the moon")
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and printed.startswith("○ 'the moon' is no cause; take one of ")
    assert all(repr(name) in printed for name in choices(["qkv", "attention"]))
    assert "products" not in choices(["factor", "loop"])  # parts of what is no step


def test_an_explanation_shows_a_figure_with_its_text(lesson, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "display", lambda bundle, raw: shown.append(bundle))
    lesson.measure("time per token", 20.0, parts=SLOWER)
    lesson.explain("time per token")
    [bundle] = shown
    assert set(bundle) == {"text/html", "image/png", "text/plain"}
    text = bundle["text/plain"]
    assert text.startswith("Waterfall of time per token: napkin 10.0 s; products +5.00 s; ")
    assert "not explained +2.00 s; measured 20.0 s. Products: +5.00 s" in text
    assert f'<img alt="{text}"' in bundle["text/html"]
    assert not plt.get_fignums()
