"""Numbers as one says them, and tables that line up and never lose or interpret what is in them."""

import pytest

from clawdemy_infer.lesson.ledger import LedgerRow
from clawdemy_infer.lesson.tables import Table, ledger_table, si


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


def test_a_ledger_table_leaves_out_what_no_row_fills():
    napkin_only = LedgerRow("01 counting", "TTFT", "s", napkin=0.2)
    assert ledger_table([napkin_only]).header == ["quantity", "napkin", "measured"]
    full = LedgerRow("01 counting", "TTFT", "s", napkin=0.2, predicted=0.25, measured=0.3,
                     guess=1.0, why="fixed cost")
    table = ledger_table([napkin_only, full], lessons=True)
    assert table.header == [
        "lesson", "quantity", "guess", "napkin", "roofline", "measured", "÷ napkin", "÷ roofline",
        "why"
    ]
    assert table.rows[1] == ("01 counting", "TTFT", "1.00 s", "200 ms", "250 ms", "300 ms", "1.50",
                             "1.20", "fixed cost")
