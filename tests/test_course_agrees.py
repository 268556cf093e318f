"""The lessons agree with one another: one machine, one calibration, and the same step costs the
same in each lesson that runs it."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest

from clawdemy_infer.lesson.tables import from_si

LESSONS = sorted((Path(__file__).parents[1] / "notebooks").glob("[0-9]*.ipynb"))
STEPS = {
    "01": r"time per token, context (?P<S>[\d,]+), (?P<format>\w+)",
    "04": r"step, batch (?P<B>\d+), context (?P<S>[\d,]+)",
    "07": r"(?P<format>\w+), decode, B = (?P<B>\d+)",
}
"""How a lesson names a decode step of SmolLM2-135M; what it does not say is fp32, B = 1, S = 64."""
APART = 1.3
"""Most that two measurements of one step may differ, over the middles of their intervals: what a
lesson predicts knows how fast the machine read, computed and launched in its minutes."""


def texts_of(path, calls):
    """The text outputs of the cells of a lesson whose source ends with a call."""
    cells = json.loads(path.read_text())["cells"]
    return ["".join(output["data"]["text/plain"]) for cell in cells
            if "".join(cell["source"]).rstrip().endswith(calls)
            for output in cell.get("outputs", ()) if "text/plain" in output.get("data", {})]


def measured_rows(path):
    """(quantity, predicted interval, measured over its middle) of the rows of a lesson's ledger."""
    for line in texts_of(path, "lesson.table()")[-1].splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        spans = [cell for cell in cells if " – " in cell]
        if spans and cells[-2] in ("yes", "yes, widened", "below", "above"):
            low, high = spans[0].split(" – ")
            unit = re.sub(r"^[\d.,]+", "", high)
            low = low if re.search(r"[^\d.,]", low) else low + unit
            low, high = from_si(low)[0], from_si(high)[0]
            yield cells[0], (low, high), from_si(cells[-3])[0] / math.sqrt(low * high)


def steps():
    """By step, the (lesson, interval, measured over its middle) of each lesson that has it."""
    found = {}
    for path in LESSONS:
        pattern = STEPS.get(path.name[:2])
        for quantity, interval, measured in measured_rows(path) if pattern else ():
            if named := re.fullmatch(pattern, quantity):
                said = {"format": "fp32", "B": "1", "S": "64"} | named.groupdict()
                step = said["format"], int(said["B"]), int(said["S"].replace(",", ""))
                found.setdefault(step, []).append((path.name[:2], interval, measured))
    return {step: rows for step, rows in found.items() if len(rows) > 1}


def test_every_lesson_stands_on_the_same_calibration():
    found = set()
    for path in LESSONS:
        [text] = [text for text in texts_of(path, "") if text.startswith("This machine: ")]
        found.add(re.search(r".*", text)[0] + re.search(r"measured .*|$", text)[0])
    assert len(found) == 1, found


def test_three_steps_at_least_are_in_several_lessons():
    assert len(steps()) >= 3


@pytest.mark.parametrize("step", steps(), ids=str)
def test_a_step_costs_the_same_in_all_lessons(step):
    for (one, (low, high), ratio), (other, (low_, high_), ratio_) in itertools.combinations(
            steps()[step], 2):
        assert low <= high_ and low_ <= high, f"{one} and {other} predict otherwise"
        assert 1 / APART < ratio / ratio_ < APART, f"{one} and {other} measure otherwise"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_that_is_referred_to_exists(path):
    numbers = {lesson.name[:2] for lesson in LESSONS}
    prose = " ".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]
                     if cell["cell_type"] == "markdown")
    said = re.findall(r"[Ll]essons? ((?:\d\d(?:, | and | to )?)+)", prose)
    assert {number for each in said for number in re.findall(r"\d\d", each)} <= numbers
