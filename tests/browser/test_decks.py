"""Every slide of every deck on the screen of a lecture room, without a network: nothing stands
outside of its place, all text is large enough, and the arrow key shows every fragment."""

import os
from pathlib import Path

import pytest
from conftest import DECKS, PICTURES, report, strangers

TEXT_PX = 24
SCALE = 1.7
"""Of a figure, at least: its 9 pt at 110 dpi are then 23 px."""


def decks() -> list[Path]:
    """What `make slides` made; of the lessons that LESSONS names, if it names any."""
    names = tuple(os.environ.get("LESSONS", "").split()) or ("",)
    return [path for path in sorted(DECKS.glob("*.html")) if path.name.startswith(names)]


@pytest.fixture
def screen(browser):
    """A page without a network, and the list of what it asks for nevertheless or fails at."""
    context = browser.new_context(viewport={"width": 1920, "height": 1080})
    context.set_offline(True)
    context.add_init_script(path=Path(__file__).with_name("look.js"))
    complaints = strangers(context)
    page = context.new_page()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page, complaints
    context.close()


@pytest.mark.parametrize("deck", decks(), ids=lambda path: path.stem)
def test_every_slide_fits_the_screen_and_can_be_read(screen, deck):
    page, complaints = screen
    for old in PICTURES.glob(f"{deck.stem[:2]}_slide_*.png"):
        old.unlink()
    page.goto(deck.as_uri())
    page.wait_for_selector("html[data-fitted]", state="attached")
    slides = page.evaluate("Reveal.getTotalSlides()")
    report.setdefault(deck.stem, {})["slides"] = slides
    assert slides
    for number in range(1, slides + 1):
        while page.evaluate("Reveal.availableFragments().next"):
            page.keyboard.press("ArrowRight")
        assert page.evaluate("Reveal.getSlidePastCount()") == number - 1
        complaints += [f"slide {number}: {found}"
                       for found in page.evaluate("limits => look(limits)", [TEXT_PX, SCALE])]
        page.screenshot(path=PICTURES / f"{deck.stem[:2]}_slide_{number:02}.png")
        page.keyboard.press("ArrowRight")
    assert not complaints, "\n".join(complaints)
