"""Every slide of every deck on the screen of a lecture room, without a network."""

import os
from pathlib import Path

import pytest
from conftest import DECKS, PICTURES, report, strangers

WIDTH, HEIGHT, TEXT_PX = 1920, 1080, 24

# Where Reveal stands, and what is wrong on the slide that it shows.
CHECK = """([width, height, least]) => {
    const slide = Reveal.getCurrentSlide(), found = [];
    const shown = (node) => node.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    const say = (node) => (node.textContent || node.alt || "").trim().slice(0, 40) || node.tagName;
    for (const node of slide.querySelectorAll("*")) {
        if (!shown(node) || node.closest("aside")) continue;
        const box = node.getBoundingClientRect();
        if (box.width && (box.left < -1 || box.top < -1 || box.right > width + 1
            || box.bottom > height + 1)) found.push(`beyond the screen: ${say(node)}`);
        if (node.scrollWidth > node.clientWidth + 1 && getComputedStyle(node).overflowX !== "visible"
            && node.clientWidth) found.push(`cut off at its side: ${say(node)}`);
        if (node.scrollHeight > node.clientHeight + 1
            && getComputedStyle(node).overflowY !== "visible"
            && node.clientHeight) found.push(`cut off at its foot: ${say(node)}`);
        const text = [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
        if (text) {
            const drawn = node.ownerSVGElement ? node.getScreenCTM().a : Reveal.getScale();
            const size = parseFloat(getComputedStyle(node).fontSize) * drawn;
            if (size < least - 0.05) found.push(`${size.toFixed(1)} px: ${say(node)}`);
        }
        if (node.tagName === "IMG" && !(node.complete && node.naturalWidth && node.alt.trim()))
            found.push(`no picture, or none of its text: ${say(node)}`);
    }
    return [...new Set(found)];
}"""


def decks() -> list[Path]:
    """What `make slides` made; of the lessons that LESSONS names, if it names any."""
    names = tuple(os.environ.get("LESSONS", "").split())
    return [path for path in sorted(DECKS.glob("*.html")) if path.name.startswith(names or ("",))]


@pytest.mark.parametrize("deck", decks(), ids=lambda path: path.stem)
def test_every_slide_fits_the_screen_and_can_be_read(browser, deck):
    for old in PICTURES.glob(f"{deck.stem[:2]}_slide_*.png"):
        old.unlink()
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT})
    asked = strangers(context)
    context.set_offline(True)
    page = context.new_page()
    page.on("pageerror", lambda error: asked.append(str(error)))
    page.goto(deck.as_uri())
    page.wait_for_function("window.Reveal?.isReady() && document.documentElement.dataset.fitted")
    slides, wrong = page.evaluate("Reveal.getTotalSlides()"), []
    for number in range(1, slides + 1):
        page.evaluate("index => Reveal.slide(index)", number - 1)
        while page.evaluate("Reveal.availableFragments().next"):
            page.keyboard.press("ArrowRight")
        assert page.evaluate("Reveal.getSlidePastCount()") == number - 1
        hidden = page.evaluate("Reveal.getCurrentSlide()"
                               ".querySelectorAll('.fragment:not(.visible)').length")
        wrong += [f"slide {number}: {hidden} fragments never shown"] if hidden else []
        wrong += [f"slide {number}: {what}"
                  for what in page.evaluate(CHECK, [WIDTH, HEIGHT, TEXT_PX])]
        page.screenshot(path=PICTURES / f"{deck.stem[:2]}_slide_{number:02}.png")
    context.close()
    report.setdefault(deck.stem, {})["slides"] = slides
    assert slides
    assert not asked, "the deck asks for something from the network, or fails"
    assert not wrong, "\n".join(wrong)
