"""Numbers as one says them, and tables that line up and never lose or interpret what is in them."""

import pytest

from clawdemy_infer.lesson.ledger import LedgerRow, scoreboard
from clawdemy_infer.lesson.tables import (
    Table,
    card,
    from_si,
    interval,
    ledger_table,
    reveal_table,
    scoreboard_table,
    si,
)
from clawdemy_infer.machine.calibrated import Calibrated, Speeds


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (0.0261, "s", "26.1 ms"),
        (0.0009999, "s", "1.00 ms"),
        (999.4e-6, "s", "999 µs"),
        (3.1e-6, "s", "3.10 µs"),
        (75.0, "s", "75.0 s"),
        (4321.0, "s", "4,321 s"),
        (0, "s", "0 s"),
        (131_072, "B", "131 kB"),
        (80e9, "B", "80.0 GB"),
        (19.97e9, "B/s", "20.0 GB/s"),
        (989.4e12, "FLOP/s", "989 TFLOP/s"),
        (1.5e21, "FLOP", "1,500 EFLOP"),
        (295, "FLOP/B", "295 FLOP/B"),
        (1024, "tokens", "1,024 tokens"),
        (38.249, "tokens/s", "38.2 tokens/s"),
        (-0.02, "s", "-20.0 ms"),
        (float("inf"), "s", "inf s"),
        (0.5, "", "0.500"),
        (None, "s", "–"),
    ],
)
def test_a_quantity_reads_with_three_figures_and_its_prefix(value, unit, said):
    assert si(value, unit) == said


def test_a_table_lines_up_as_text_and_escapes_as_html():
    table = Table(["what", "time"], [["<b>[bold]", "1.00 s"], ["x", "100 s"]], numeric=["time"],
                  title="A & B")
    assert repr(table).splitlines()[-2:] == ["<b>[bold]   1.00 s", "x            100 s"]
    html = table._repr_html_()
    assert "&lt;b&gt;[bold]" in html and "A &amp; B" in html
    assert html.count("<tr>") == 3


@pytest.mark.parametrize(("text", "value", "unit"), [
    ("20 ms", 0.02, "s"), ("20ms", 0.02, "s"), ("3.5 µs", 3.5e-6, "s"), ("3 us", 3e-6, "s"),
    ("50 GB/s", 50e9, "B/s"), ("3 GiB", 3 * 2**30, "B"), ("1,024 KiB", 2**20, "B"),
    ("2 TFLOP/s", 2e12, "FLOP/s"), ("2 TFLOPS", 2e12, "FLOP/s"), ("1e-3 s", 1e-3, "s"),
    ("64", 64.0, ""), ("1,024 tokens", 1024.0, "tokens"), ("3 ×", 3.0, "×"), ("3x", 3.0, "×"),
    ("7.5 min", 450.0, "s"), ("2 hours", 7200.0, "s"), ("120 Gbit/s", 15e9, "B/s"),
    ("4.42e9 bytes", 4.42e9, "B"), ("$0.49", 0.49, "$"), ("50 FLOPs per byte", 50.0,
                                                           "FLOPs per byte"),
    (".5 B", 0.5, "B"), ("12 %", 12.0, "%"), ("9 sequences", 9.0, "sequences"),
])
def test_a_quantity_is_read_as_one_writes_it(text, value, unit):
    assert from_si(text) == (pytest.approx(value), unit)


@pytest.mark.parametrize("text", ["", "ms", "about 20 ms", "20,5 ms", "-3 s", "1.2.3 s", "2 or 3"])
def test_text_that_is_no_quantity_is_refused(text):
    with pytest.raises(ValueError, match=f"'{text}'.*20 ms"):
        from_si(text)


@pytest.mark.parametrize(("low", "high", "unit", "said"), [
    (0.0121, 0.015, "s", "12.1 – 15.0 ms"), (0.0009, 0.0011, "s", "900 µs – 1.10 ms"),
    (20e9, 25e9, "B/s", "20.0 – 25.0 GB/s"), (2, 3, "", "2.00 – 3.00")])
def test_an_interval_says_its_unit_once(low, high, unit, said):
    assert interval(low, high, unit) == said


def test_a_ledger_table_leaves_out_what_no_row_fills():
    napkin_only = LedgerRow("01 counting", "TTFT", "s", napkin=0.2)
    assert ledger_table([napkin_only]).header == ["quantity", "napkin", "measured"]
    full = LedgerRow("01 counting", "TTFT", "s", napkin=0.2, predicted=0.25, low=0.2, high=0.313,
                     measured=0.32, guess=1.0, late=True, explained=0.95)
    table = ledger_table([napkin_only, full], lessons=True)
    assert table.header == ["lesson", "quantity", "guess", "napkin", "predicted", "measured",
                            "inside?", "explained"]
    assert table.rows[1] == ("01 counting", "TTFT", "1.00 s (late)", "200 ms", "200 – 313 ms",
                             "320 ms", "above", "95%")


def test_what_is_revealed_is_not_what_was_measured():
    row = LedgerRow("01", "TTFT", "s", napkin=0.2, predicted=0.25, low=0.2, high=0.3, measured=0.7)
    table = reveal_table([row])
    assert table.rows == [("TTFT", "open", "200 ms", "200 – 300 ms")]
    assert "700" not in repr(table)


def test_the_machines_card_says_what_it_does_now_in_the_units_of_its_calibration():
    """Twice the speed of launching is half the overhead of a launch."""
    machine = Calibrated("m", ((1.0, 40e9),), {"fp32": 1e11, "bf16": 3e11}, memory=1e6,
                         source="measured 2026-01-01T10:00", fixed_s_per_op=3e-6)
    table = card(machine.at(Speeds(memory=0.5, compute=0.9, launches=2.0)))
    assert table.rows == [
        ["measured 2026-01-01 10:00", "40.0 GB/s", "100 GFLOP/s", "300 GFLOP/s", "3.00 µs"],
        ["at this moment", "20.0 GB/s", "90.0 GFLOP/s", "270 GFLOP/s", "1.50 µs"]]


def test_the_scoreboard_reads_as_it_was_judged():
    rows = [LedgerRow("01", "TTFT", "s", 1.0, predicted=2.0, low=1.0, high=4.0, measured=3.0)]
    said = dict(scoreboard_table(scoreboard(rows)).rows)
    assert said["measurements inside their interval"] == "100% of 1"
    assert said["half-width of an interval, median"] == "± 100%"
    assert said["worst prediction"].startswith("01, TTFT: it took 1.50 times")
    assert dict(scoreboard_table(scoreboard([])).rows)["error of the napkin, median"] == "–"
