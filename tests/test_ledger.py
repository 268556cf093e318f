"""The ledger: nothing measured is lost, nothing is counted twice, and a wrong line is found."""

import errno
import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clawdemy_infer.lesson import ledger
from clawdemy_infer.lesson.ledger import LedgerRow, append, latest, ratio_error, read, scoreboard
from clawdemy_infer.lesson.tables import ledger_table, scoreboard_table


def row(quantity="time per token", measured=0.031, **changes) -> LedgerRow:
    return replace(
        LedgerRow("01 counting", quantity, "s", napkin=0.025, predicted=0.030, measured=measured),
        **changes)


def test_what_is_appended_is_read_back_in_order(tmp_path):
    path = tmp_path / "new" / "folder" / "ledger.jsonl"
    parts = [{"name": "attention", "napkin_s": 0.0, "predicted_s": 0.01, "measured_s": 0.02}]
    rows = [row(), row("TTFT", guess=1.0, low=0.02, high=0.04, parts=parts, cause_right=True),
            row("only a napkin", predicted=None)]
    for one in rows:
        append(one, path)
    assert read(path) == rows


def test_an_absent_ledger_has_no_rows(tmp_path):
    assert read(tmp_path / "none.jsonl") == []


def test_a_ledger_cut_at_any_byte_reads_and_goes_on(tmp_path):
    path = tmp_path / "ledger.jsonl"
    append(row("first"), path)
    whole = path.read_bytes()
    append(row("second"), path)
    both = path.read_bytes()
    for cut in range(len(whole), len(both) + 1):
        path.write_bytes(both[:cut])
        # a row lost at most its newline
        survivors = ["first", "second"] if cut >= len(both) - 1 else ["first"]
        assert [one.quantity for one in read(path)] == survivors
        append(row("third"), path)
        append(row("fourth"), path)
        found = [one.quantity for one in read(path)]
        assert found == [*survivors, "third", "fourth"], f"cut at byte {cut}"


@pytest.mark.parametrize("line",
                         ['{"lesson": "01 cou', "[1, 2]", '{"lesson": "01"}', "not json", ""])
def test_a_wrong_line_is_named_and_costs_no_other_row(tmp_path, line):
    path = tmp_path / "ledger.jsonl"
    append(row(), path)
    with path.open("a") as file:
        file.write(line + "\n")
    append(row("another"), path)
    with pytest.warns(UserWarning, match=r"line 2 of .*ledger\.jsonl"):
        assert [one.quantity for one in read(path)] == ["time per token", "another"]


LINES = st.one_of(
    st.binary(max_size=30),
    st.sampled_from([b"[" * 10**5, b"\xff\xfe{}", b"5 #torn", b"null", b"{}"]),
    st.dictionaries(st.sampled_from([field.name for field in fields(LedgerRow)]), st.one_of(
        st.sampled_from([None, True, 5, -1, 10**400, "x", [], {}, [{}], [5], "1",
                         [{"name": 1, "napkin_s": "x", "predicted_s": 1, "measured_s": None}]]),
        st.floats())).map(lambda values: json.dumps(asdict(row()) | values).encode()))


@given(st.lists(LINES, max_size=4), st.binary(max_size=20))
@settings(max_examples=150, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_ledger_has_become_its_rows_are_read_and_the_next_is_kept(tmp_path, lines, tail):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines) + tail)
    append(row("next"), path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rows = read(path)
    assert rows[-1].quantity == "next"
    assert all("ledger.jsonl is not a row" in str(one.message) for one in said)
    board = scoreboard(rows)
    str(ledger_table(latest(rows), lessons=True)), str(scoreboard_table(board))
    json.dumps(board)


def test_a_row_that_the_disk_took_in_part_is_reported_and_closed_by_the_next(tmp_path, monkeypatch):
    path, plain = tmp_path / "ledger.jsonl", os.write
    append(row("first"), path)
    monkeypatch.setattr(os, "write", lambda file, data: plain(file, data[:50]))
    with pytest.raises(OSError, match="only a part of the row was written.*ledger.jsonl") as error:
        append(row("second"), path)
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    append(row("third"), path)
    assert [one.quantity for one in read(path)] == ["first", "third"]


def test_several_kernels_append_at_once_and_every_row_arrives(tmp_path):
    path = tmp_path / "ledger.jsonl"
    append(row("before"), path)
    with path.open("a") as file:
        file.write('{"lesson": "torn')
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from clawdemy_infer.lesson.ledger import LedgerRow, append\n"
        "for i in range(50):\n"
        "    row = LedgerRow('01', f'{sys.argv[1]} {i}', 's', 1.0, measured=2.0, cause='x' * 500)\n"
        "    append(row, Path(sys.argv[2]))\n")
    kernels = [subprocess.Popen([sys.executable, "-c", script, name, str(path)]) for name in "abc"]
    assert [kernel.wait() for kernel in kernels] == [0, 0, 0]
    found = {one.quantity for one in read(path)}
    assert found == {"before"} | {f"{name} {i}" for name in "abc" for i in range(50)}


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "3"])
@pytest.mark.parametrize("name", ["napkin", "predicted", "low", "high", "measured", "guess"])
def test_a_number_that_cannot_have_a_ratio_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        row(**{name: value})


def test_an_unmeasured_row_is_refused_and_no_file_is_made(tmp_path):
    with pytest.raises(ValueError, match="time per token"):
        append(row(measured=None), tmp_path / "ledger.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_the_ledger_lies_in_the_cache_unless_the_environment_says_where(tmp_path, monkeypatch):
    monkeypatch.delenv("CLAWDEMY_LEDGER", raising=False)
    monkeypatch.setenv("CLAWDEMY_CACHE", str(tmp_path))
    assert ledger.ledger_path() == tmp_path / "ledger.jsonl"
    monkeypatch.setenv("CLAWDEMY_LEDGER", str(tmp_path / "mine.jsonl"))
    append(row())
    assert len(read(tmp_path / "mine.jsonl")) == 1


def test_twice_too_much_is_as_wrong_as_half():
    assert ratio_error(1.0) == 0.0
    assert ratio_error(2.0) == ratio_error(0.5) == 1.0
    assert ratio_error(0.8) == pytest.approx(0.25)


def test_a_quantity_measured_again_counts_once_with_its_last_value():
    rows = [row("a", 1.0), row("b", 2.0), row("a", 3.0), row("a", 4.0, lesson="02 other")]
    assert [(one.lesson, one.quantity, one.measured) for one in latest(rows)] == [
        ("01 counting", "a", 3.0),
        ("01 counting", "b", 2.0),
        ("02 other", "a", 4.0),
    ]


def test_the_scoreboard_agrees_with_a_count_by_hand():
    # measured / predicted: 5/4, 1/2, 1, and one row that has a napkin alone; measured / napkin: 5,
    # 2, 4, 3; intervals: 3 to 6 holds 5 and not 2, 4 to 4.84 holds 4; guesses: twice, right, late
    rows = [
        row("a", 5.0, napkin=1.0, predicted=4.0, low=3.0, high=6.0, guess=10.0, explained=0.9),
        row("b", 2.0, napkin=1.0, predicted=4.0, low=3.0, high=6.0, guess=2.0, cause_right=True),
        row("c", 4.0, napkin=1.0, predicted=4.0, low=4.0, high=4.84, guess=9e9, late=True),
        row("d", 3.0, napkin=1.0, predicted=None, cause_right=False, explained=0.5),
        row("e", None, napkin=1.0, predicted=4.0, low=1.0, high=9.0, guess=1.0),
    ]
    board = scoreboard(rows)
    assert board["median_ratio_error"] == 0.25  # of 0.25, 1, 0
    assert board["median_ratio_error_napkin"] == 2.5  # of 4, 1, 3, 2
    assert board["median_ratio_error_guess"] == 0.5  # of 1, 0
    assert board["coverage"] == pytest.approx(2 / 3)
    assert board["median_width"] == pytest.approx(math.sqrt(2) - 1)  # of √2, √2, √1.21
    assert (board["median_explained"], board["worst"]["quantity"]) == (0.7, "b")
    assert (board["causes_right"], board["causes_named"]) == (1, 2)
    assert [one["ratio"] for one in board["rows"]] == [1.25, 0.5, 1.0, None, None]
    assert [one["inside"] for one in board["rows"]] == ["yes", "below", "yes", None, None]
    assert board["worst"]["ratio_napkin"] == 2.0


def test_an_empty_scoreboard_judges_nothing():
    empty = scoreboard([])
    assert empty.pop("rows") == [] and empty.pop("causes_right") == empty.pop("causes_named") == 0
    assert set(empty.values()) == {None} and {"coverage", "worst"} <= empty.keys()


@pytest.mark.parametrize(("measured", "where"),
                         [(0.9, "below"), (1.0, "yes"), (1.21, "yes"), (1.22, "above")])
def test_a_measurement_lies_in_its_interval_below_or_above(measured, where):
    assert row(measured=measured, predicted=1.1, low=1.0, high=1.21).inside == where
    assert row(predicted=1.1, low=1.0, high=1.21).width == pytest.approx(0.1)


@pytest.mark.parametrize("ends", [{"low": 0.01}, {"high": 0.04}, {"low": 0.04, "high": 0.05},
                                  {"low": 0.01, "high": 0.02}, {"low": 0.04, "high": 0.01}])
def test_half_an_interval_or_one_beside_its_centre_is_refused(ends):
    with pytest.raises(ValueError, match="low=.*high=.*'time per token'.*predicted=0.03") as error:
        row(**ends)
    assert "\n" not in str(error.value)


def test_a_part_without_its_seconds_is_refused():
    with pytest.raises(ValueError, match="parts=.*'time per token'.*measured_s"):
        row(parts=[{"name": "attention"}])


def test_a_ledger_of_an_earlier_version_is_read(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"lesson": "01", "quantity": "TTFT", "unit": "s", "napkin": 1.0, "predicted": '
                    '2.0, "measured": 3.0, "guess": null, "speed": 0.5, "why": "cold", "machine": '
                    '"a CPU", "versions": {"torch": "2"}, "date": "2026-01-01T00:00:00+00:00"}\n')
    [old] = read(path)
    assert (old.predicted, old.low, old.inside, old.late, old.parts) == (2.0, None, None, False, ())
    assert scoreboard([old])["coverage"] is None
