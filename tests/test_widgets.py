"""Sliders without a browser: what they offer, and that moving one calls the function with the new
value."""

import pytest
from ipywidgets import Dropdown, Output, SelectionSlider

from clawdemy_infer.lesson import widgets


def test_a_slider_over_powers_of_two_ends_where_it_was_told_and_writes_thousands_readably():
    slider = widgets.powers_of_two("rows", 1, 2048, 64)
    assert [value for _, value in slider.options] == [
        1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048
    ]
    assert slider.options[-1][0] == "2,048"
    assert slider.value == 64


def test_a_list_begins_with_its_first_option_unless_told_otherwise():
    assert widgets.choose("machine", ["L4", "H100"]).value == "L4"
    assert widgets.choose("machine", ["L4", "H100"], "H100").value == "H100"


@pytest.fixture
def calls():
    return []


@pytest.fixture
def box(calls):
    return widgets.play(
        lambda **values: calls.append(values),
        machine=widgets.choose("machine", ["L4", "H100"]),
        M=widgets.powers_of_two("M", 1, 64, 1),
        K=widgets.powers_of_two("K", 1, 64, 8),
    )


def test_the_function_runs_at_once_and_again_with_every_move(box, calls):
    assert calls == [{"machine": "L4", "M": 1, "K": 8}]
    (machine, rows), (columns,) = (row.children for row in box.children[:2])
    rows.value = 32
    machine.value = "H100"
    columns.value = 64
    assert calls[1:] == [{"machine": "L4", "M": 32, "K": 8}, {"machine": "H100", "M": 32, "K": 8},
                         {"machine": "H100", "M": 32, "K": 64}]


def test_controls_stand_in_rows_of_two_above_what_they_move(box):
    *rows, output, script = box.children
    assert [[type(control)
             for control in row.children]
            for row in rows] == [[Dropdown, SelectionSlider], [SelectionSlider]]
    assert isinstance(output, Output)
    assert "application/javascript" in script.outputs[0]["data"]    # for keys and screen readers
