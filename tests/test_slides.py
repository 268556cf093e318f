"""A deck shows what a lesson's tags say, in one file that asks for nothing."""

import base64
import importlib.util
import re
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import nbformat
import pytest
from fontTools.ttLib import TTFont
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
MISSING = importlib.util.find_spec("sphinx_revealjs") is None
needs_reveal = pytest.mark.skipif(MISSING, reason="reveal.js: `make slides` gets it")


def load_slides():
    """notebooks/slides.py is a script and no part of a package."""
    spec = importlib.util.spec_from_file_location("slides", REPOSITORY / "notebooks" / "slides.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["slides"] = module                      # where dataclasses look for annotations
    spec.loader.exec_module(module)
    return module


slides = load_slides()


def text(source, *tags):
    return new_markdown_cell(source, metadata={"tags": ["core", *tags]})


def code(source, *tags, shows=()):
    outputs = [new_output("stream", text=shown) if isinstance(shown, str)
               else new_output("display_data", shown) for shown in shows]
    return new_code_cell(source, metadata={"tags": ["core", *tags]}, outputs=outputs)


def notes(said="**3 min.** Ask the room: how many bytes?"):
    return new_markdown_cell(said, metadata={"tags": ["notes"]})


def png(width, height):
    file = BytesIO()
    Image.new("RGBA", (width, height)).save(file, "PNG")
    return base64.encodebytes(file.getvalue()).decode()


SVG = ('<?xml version="1.0"?><svg viewBox="0 0 80 40" aria-labelledby="said">'
       '<title id="said">a cache</title><pattern id="hatch"/>'
       '<g class="step" data-step="1"><rect fill="url(#hatch)"/></g>'
       '<g class="step" data-step="2"><text>append</text></g>'
       '<g data-step="3" class="step"><use href="#hatch"/></g></svg>')
TABLE = '<table><thead><tr><th>bytes</th></tr></thead><tr><td>16 GB</td></tr></table>'


def lesson():
    """Twelve slides of three minutes, with every kind of cell and output."""
    return new_notebook(cells=[
        text("# 42 · What does it cost?\n\nA *chat* of 8 tokens.", "slide"), notes(),
        text("on no slide"),
        text("## Question\n\nHow many? See [the paper](https://example.org/paper).", "slide"),
        text("The second thing.", "fragment"), notes(),
        code("draw()", "slide", "hide-input", shows=[{"image/svg+xml": SVG}]),
        text("Afterwards.", "fragment"), notes(),
        text("## Envelope", "slide"),
        code("draw_again()", "fragment", "hide-input", shows=[{"image/svg+xml": SVG}]), notes(),
        text("## Build", "slide"),
        code("class Cache:\n    pass", "fragment", shows=["10%\r✓ \x1b[32mCache\x1b[0m: 6 < 7\n"]),
        notes(),
        text("## Measure", "slide"),
        code("", "hide-input", "fragment", shows=[
            {"text/html": TABLE, "text/plain": "plain"}, {"text/markdown": "It is **low**."}]),
        notes(),
        code("", "slide", "hide-input", shows=[{
            "text/html": '<img alt="a &lt; b" src="data:image/png;base64,AA">',
            "image/png": png(720, 400), "text/plain": "a < b"}]), notes(),
        text("## Play", "slide"),
        code("sliders()", "widget", "fragment", "hide-input", shows=[
            {"text/markdown": "*Sliders appear here*", "text/plain": "Sliders appear here"}]),
        code("", "fragment", "hide-input", shows=[{"image/png": png(9, 9), "text/plain": "x"}]),
        notes(),
        *(cell for number in range(4) for cell in (text(f"## More {number}", "slide"), notes())),
    ])


@pytest.fixture(scope="module")
def deck():
    return slides.read(lesson())


@pytest.fixture(scope="module")
def page(deck):
    if MISSING:
        pytest.skip("reveal.js: `make slides` gets it")
    title, shown, _ = deck
    return slides.page(title, shown)


# -- what is on a slide ---------------------------------------------------------------------------


def test_a_right_lesson_has_its_slides_in_order_and_no_problems(deck):
    title, shown, problems = deck
    assert problems == []
    assert title == "42 · What does it cost?"
    assert [slide.number for slide in shown] == list(range(1, 13))
    assert "<h1>42 · What does it cost?</h1>" in shown[0].html
    assert "<em>chat</em>" in shown[0].html
    assert not any("on no slide" in slide.html for slide in shown)


def test_notes_are_beside_the_slide_and_say_its_minutes(deck):
    assert all(slide.minutes == 3 for slide in deck[1])
    assert all("Ask the room" in slide.notes and "Ask the room" not in slide.html
               for slide in deck[1])


def test_a_fragment_waits_for_a_key_unless_only_a_heading_stands_there(deck):
    question, envelope = deck[1][1], deck[1][3]
    assert ('<div class="cell fragment" data-fragment-index="0">\n<p>The second thing.</p>'
            in question.html)
    assert '<div class="cell">\n<figure>' in envelope.html


def test_the_steps_of_a_picture_come_one_by_one_and_what_follows_comes_after_them(deck):
    picture = deck[1][2].html
    assert re.findall(r'<(\w+) class="(?:cell |step )fragment" data-fragment-index="(\d)"',
                      picture) == [("g", "0"), ("g", "1"), ("div", "2")]
    assert '<g class="step" data-step="1">' in picture
    assert deck[1][2].steps == 3


def test_the_ids_of_two_pictures_are_different_ones_and_still_found(deck):
    pictures = [deck[1][2].html, deck[1][3].html]
    ids = [re.findall(r'id="([^"]+)"', picture) for picture in pictures]
    assert not set(ids[0]) & set(ids[1])
    for picture, (said, hatch) in zip(pictures, ids, strict=True):
        assert f'aria-labelledby="{said}"' in picture
        assert f'fill="url(#{hatch})"' in picture
        assert f'href="#{hatch}"' in picture


def test_code_by_line_shows_each_count_at_a_key_press_and_then_what_it_gave():
    source = "bytes = 0\nbytes += 4           # read\nprint(\n    bytes)\nassert bytes"
    cells = [code(source, "slide", "by-line", shows=["4"])]
    slide = slides.read(new_notebook(cells=cells))[1][0]
    first, *lines = slide.html.split("\n")[1:-2]
    assert "fragment" not in first
    shown = re.findall(r'class="fragment" data-fragment-index="(\d)"', "".join(lines))
    assert shown == list("00012")
    assert slide.steps == 3
    assert slide.counts()[1] == 5


def test_a_claim_in_the_notes_stands_under_the_heading_of_its_slide():
    cells = [text("## Envelope", "slide"), notes("> Rows *share* weights\n\n**3 min.** Ask."),
             code("x = 1", "slide"), notes("> What is read?\n>\n**2 min.** Ask.")]
    first, second = slides.read(new_notebook(cells=cells))[1]
    assert "<h2>Envelope</h2>\n<h3>Rows <em>share</em> weights</h3>" in first.html
    assert '<h2 class="again">Envelope</h2>\n<h3>What is read?</h3>' in second.html
    assert "share" not in first.notes and first.minutes == 3


def test_hidden_code_shows_only_what_it_gave(deck):
    assert "draw" not in deck[1][2].html
    assert '<pre class="code">' in deck[1][4].html


def test_a_slide_without_a_heading_shows_the_one_before_it(deck):
    assert deck[1][2].html.startswith('<h2 class="again">Question</h2>')


def test_printed_text_is_what_a_terminal_shows(deck):
    assert "<pre>✓ Cache: 6 &lt; 7</pre>" in deck[1][4].html


def test_a_long_line_is_broken_and_a_plain_block_has_no_colours():
    cells = [code("", "slide", "hide-input", shows=["a " * 60, "short"]),
             text("```\nnot in Python\n```\n\n```python\nx in y\n```", "fragment")]
    html = slides.read(new_notebook(cells=cells))[1][0].html
    assert re.findall(r'<pre( class="long")?>', html) == [' class="long"', ""]
    assert '<pre class="code">not in Python</pre>' in html
    assert '<span class="ow">in</span>' in html


def test_a_table_and_a_computed_sentence_are_html(deck):
    assert TABLE in deck[1][5].html
    assert "It is <strong>low</strong>." in deck[1][5].html
    assert "plain" not in deck[1][5].html


def test_a_figure_keeps_its_alternative_text_and_grows_at_most_twofold(deck):
    assert 'alt="a &lt; b"' in deck[1][6].html
    assert "max-width: 1440px; max-height: 800px" in deck[1][6].html


def test_a_figure_is_enlarged_and_keeps_the_size_that_it_was_drawn_in(deck):
    html = deck[1][6].html
    data, density = re.search(r'srcset="data:image/png;base64,(\S+) (\S+)"', html).groups()
    with Image.open(BytesIO(base64.b64decode(data))) as image:
        assert (image.size, density) == ((1440, 800), "2x")
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)     # what is transparent


def test_sliders_leave_their_place_to_the_figure(deck):
    assert "Sliders" not in deck[1][7].html
    assert deck[1][7].html.count("<figure>") == 1


# -- what a person must mend ----------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "problem"), [
    (text("## Long\n\n" + "word " * 70, "slide"), "its slide has 71 words; at most 70 fit"),
    (code("\n".join(["x = 1"] * 21), "slide"), "its slide has 21 lines of code; at most 20 fit"),
    (code("x" * 89, "slide"), "its slide has 89 columns of code; at most 88 fit"),
    (text("## T\n\n|a|\n|-|\n" + "|1|\n" * 9, "slide"),
     "its slide has 9 rows in a table; at most 8 fit"),
    (text("## F\n\nIt is $2N$ bytes.", "slide"), "$2N$ stays as it is; write formulas as `code`"),
], ids=["words", "lines", "columns", "rows", "formula"])
def test_what_does_not_fit_is_said_with_its_cell(cell, problem):
    said = cell.source.split("\n")[0][:50]
    notebook = lesson()
    notebook.cells[3:3] = [cell, notes()]
    assert slides.read(notebook)[2] == [f"cell 3 ({said}): {problem}"]


def test_what_just_fits_is_no_problem():
    notebook = lesson()
    notebook.cells[3:3] = [text("## Words\n\n" + "word " * 69, "slide"), notes(),
                           code("\n".join(["x" * 88] * 20), "slide"), notes(),
                           text("## T\n\nThe cells `$A$1`:\n\n|a|\n|-|\n" + "|1|\n" * 8,
                                "slide"), notes()]
    assert slides.read(notebook)[2] == []


def test_missing_notes_and_wrong_sums_are_said():
    notebook = lesson()
    del notebook.cells[1:3]
    assert slides.read(notebook)[2] == [
        "the lesson has 33 minutes; it should have 35 to 50",
        "cell 0 (# 42 · What does it cost?): its slide has no notes that say how long it takes: "
        "**2 min.**"]
    notebook = new_notebook(cells=[notes("**3 min.** Ask."), text("## A", "slide"), notes()])
    assert slides.read(notebook)[2] == [
        "cell 0 (**3 min.** Ask.): no cell tagged `slide` stands before it",
        "the lesson has 1 slides; it should have 12 to 20",
        "the lesson has 3 minutes; it should have 35 to 50"]


# -- the file -------------------------------------------------------------------------------------


class Requests(HTMLParser):
    """What a browser would load or lead to."""

    def __init__(self, page):
        super().__init__()
        self.found, self.styles, self.inside = [], "", ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.found += [value for name, value in attributes
                       if name in ("src", "href", "srcset", "data-src", "poster")
                       and not value.startswith(("data:", "#"))]

    def handle_data(self, data):
        self.styles += data * (self.inside == "style")


def test_a_deck_asks_for_nothing(page):
    parsed = Requests(page)
    assert parsed.found == []
    assert re.findall(r"@import", parsed.styles) == []
    assert set(re.findall(r"url\(['\"]?(.{5})", parsed.styles)) == {"data:"}
    assert not re.search(r"\bimport\s*[(\"']|\b(src|href)=[\"']https?:", page)
    assert len(page.encode()) < 3e6


def test_the_scripts_end_where_they_should(page):
    assert len(re.findall(r"<script\b[^>]*>", re.sub(r"<script>.*?</script>", "", page,
                                                     flags=re.S))) == 0
    assert page.count("</script") == 1


def test_the_licence_of_reveal_is_in_the_file(page):
    assert "MIT licensed" in page
    assert "Permission is hereby granted, free of charge" in page
    assert page.count("Hakim El Hattab") >= 3


def test_the_fonts_are_in_the_file_with_the_glyphs_that_are_used(page):
    faces = re.findall(r'font-family: "([^"]+)"[^}]*url\(data:font/woff;base64,([^)]+)\)', page)
    assert [name for name, _ in faces] == ["DejaVu Sans"] * 3 + ["DejaVu Sans Mono"]
    for _, data in faces:
        font = TTFont(BytesIO(base64.b64decode(data)))
        glyphs = font.getBestCmap()
        assert {ord(letter) for letter in "aZ~·"} <= set(glyphs)
        assert len(glyphs) < 200
    assert ord("✓") in glyphs


def test_every_slide_has_its_number_the_title_and_its_time(page):
    footers = re.findall(r"<footer><span>(.*?)</span><span>(.*?)</span></footer>", page)
    assert footers == [("42 · What does it cost?", f"{number} / 12") for number in range(1, 13)]
    assert page.count('data-timing="180"') == 12
    assert page.count('<aside class="notes">') == 12


@needs_reveal
def test_lessons_are_chosen_by_their_beginning_and_those_without_slides_are_left_out(
        tmp_path, monkeypatch, capsys):
    for name in ("slides.html", "slides.css"):
        (tmp_path / name).write_text((REPOSITORY / "notebooks" / name).read_text())
    for name, notebook in (("42_cost", lesson()), ("43_plain", new_notebook())):
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    monkeypatch.setattr(slides, "HERE", tmp_path)
    monkeypatch.setattr(slides, "DECKS", tmp_path / "decks")
    assert slides.main([]) == 0
    said = capsys.readouterr().out
    assert re.search(r"42_cost\.html: 12 slides, 36 minutes, 0\.\d MB", said)
    assert "43_plain.ipynb: no cell is tagged `slide`" in said
    assert [path.name for path in (tmp_path / "decks").iterdir()] == ["42_cost.html"]
    assert slides.main(["44"]) == 1
    assert "begins with 44" in capsys.readouterr().err


def test_without_reveal_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(slides.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(slides, "make", lambda lesson: slides.reveal("LICENSE"))
    assert slides.main([]) == 1
    assert capsys.readouterr().err == (
        "reveal.js is not here yet: `make slides` gets it, and so does "
        "pip install --no-deps sphinx-revealjs -c constraints.txt\n")


def test_the_makefile_installs_what_the_message_says():
    makefile = (REPOSITORY / "Makefile").read_text()
    assert "pip install --no-deps sphinx-revealjs -c constraints.txt" in makefile
    assert "sphinx-revealjs==" in (REPOSITORY / "constraints.txt").read_text()
