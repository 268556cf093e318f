"""Looks at decks in Chromium, every slide with all its fragments: does anything stand outside of
the slide or of its place, is any text smaller than 24 px, is anything asked of a network?

    python tests/slides_in_browser.py build/slides/*.html [--shots FOLDER]

Needs the packages `playwright` and a Chromium; no other test needs them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

SMALLEST = 24                       # pixels of text
SMALLEST_SCALE = 1.7                # of a figure: its 9 pt at 110 dpi are then 23 px
LOOK = """
([smallest, smallestScale]) => {
  const slide = Reveal.getCurrentSlide(), body = slide.querySelector(".body");
  const found = [], clip = text => JSON.stringify(text.trim().slice(0, 40));
  const over = (what, by) => by > 1 && found.push(`${what} by ${Math.ceil(by)} px`);
  over("higher than its place", body.scrollHeight - body.clientHeight);
  over("wider than its place", body.scrollWidth - body.clientWidth);
  over("higher than the slide", slide.scrollHeight - 1080);
  over("wider than the slide", slide.scrollWidth - 1920);
  const place = body.getBoundingClientRect();
  for (const element of body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect(), name = element.tagName.toLowerCase();
    if (!box.width || !box.height || !element.checkVisibility()) continue;
    if (box.bottom > place.bottom + 1 || box.right > place.right + 1 || box.left < place.left - 1)
      found.push(`<${name}> ${clip(element.textContent)} stands outside`);
    if (name === "img") {
      const scale = Math.min(box.width / element.naturalWidth, box.height / element.naturalHeight);
      if (scale < smallestScale) found.push(`a figure is scaled by ${scale.toFixed(2)} only`);
      if (!element.alt.trim()) found.push("a figure has no alternative text");
    }
  }
  const texts = document.createTreeWalker(slide, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || element.closest("aside, title, desc, style")) continue;
    if (!element.checkVisibility()) continue;
    const scale = element.ownerSVGElement ? Math.abs(element.getScreenCTM().a) : 1;
    const size = parseFloat(getComputedStyle(element).fontSize) * scale;
    if (size < smallest - 0.1)
      found.push(`${clip(texts.currentNode.data)} is ${size.toFixed(1)} px high`);
  }
  return [...new Set(found)].slice(0, 6);
}
"""


def look(page, deck: Path, shots: Path | None = None) -> list[str]:
    """What is wrong with the slides of `deck`, a line each. `page` is Playwright's, of 1920 x 1080
    px; `shots` is where a picture of every slide goes."""
    wrong, name = [], deck.name

    def asked(request) -> None:
        if not request.url.startswith(("data:", "file:")):
            wrong.append(f"{name}: asks for {request.url[:80]}")

    page.on("request", asked)
    page.on("pageerror", lambda error: wrong.append(f"{name}: {error}"))
    page.goto(deck.resolve().as_uri())
    page.wait_for_selector("html[data-fitted]", state="attached")
    for index in range(page.evaluate("Reveal.getTotalSlides()")):
        page.evaluate("index => Reveal.slide(index, 0, 99)", index)
        wrong += [f"{name}, slide {index + 1}: {found}"
                  for found in page.evaluate(LOOK, [SMALLEST, SMALLEST_SCALE])]
        if shots:
            shots.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=shots / f"{deck.stem}_{index + 1:02}.png")
    return wrong


def main(arguments: list[str]) -> int:
    from playwright.sync_api import sync_playwright

    shots = Path(arguments.pop()) if arguments[-2:-1] == ["--shots"] else None
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    wrong = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium,
                                             args=["--no-sandbox", "--disable-gpu"])
        for deck in arguments[:-1] if shots else arguments:
            page = browser.new_page(viewport={"width": 1920, "height": 1080})
            wrong += look(page, Path(deck), shots)
            page.close()
        browser.close()
    print("\n".join(wrong) or "every slide fits")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
